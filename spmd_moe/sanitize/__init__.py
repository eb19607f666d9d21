"""The sanitizer: in the real job, find the first tensor that is not what its type says."""

from spmd_moe.sanitize.watch_job import Sanitizer as Sanitizer
from spmd_moe.sanitize.watch_job import sanitize as sanitize
