"""The sanitizer: in the real job, find the first tensor that is not what its type says."""

from spmd_moe.sanitize.watch import Sanitizer as Sanitizer
from spmd_moe.sanitize.watch import sanitize as sanitize
