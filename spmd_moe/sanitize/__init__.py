"""The sanitizer: in a running job, find the first tensor that differs from its declared placement.

Read in this order:

    watch_job          `sanitize`: which steps are watched, and what is hooked in them
    observe_functions  annotated functions, as an observer sees them
    compare_ranks      are tensors that are declared R or I equal on all ranks?
    gradient_sums      is each gradient summed once?
    tensor_digest      the hashes and sketches that are compared
"""

from spmd_moe.sanitize.watch_job import Sanitizer as Sanitizer
from spmd_moe.sanitize.watch_job import sanitize as sanitize
