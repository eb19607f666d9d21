"""The safetensors format: a header in JSON, then the bytes of the tensors one after another.

    8 bytes   n, the length of the header, little-endian
    n bytes   {"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, ...}
    the rest  the tensors, contiguous, without gaps

Only the header is made here, as the `safetensors` package makes it, which this package does not
need. `on_disk.py` writes and reads the tensors of checkpoints, `hf/safetensors_slices.py` parts of
those of Hugging Face models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

import torch

from spmd_moe.core.errors import CheckpointError, explain, short_dtype

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"  # the key of the header that is no tensor


def check_storable(dtypes: Iterable[tuple[str, torch.dtype]]) -> None:
    """Refuse tensors that the format has no name for."""
    for name, dtype in dtypes:
        if dtype not in DTYPE_NAMES or name == _METADATA:
            what = "the name of no tensor" if name == _METADATA else f"{short_dtype(dtype)}"
            raise CheckpointError(
                explain(
                    "save_checkpoint",
                    f"{name!r} is {what}, which cannot be stored",
                    why="the files are safetensors, which has a fixed list of dtypes",
                    fixes=["a dtype of " + ", ".join(map(short_dtype, DTYPE_NAMES))],
                )
            )


def chunk_name(name: str, at: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> str:
    """A tensor's own name where all of it is there; else with its slice: `w1_eFD[4:8,0:64]`."""
    if tuple(shape) == tuple(whole):
        return name
    slices = ",".join(f"{start}:{start + size}" for start, size in zip(at, shape, strict=True))
    return f"{name}[{slices}]"


def make_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """What precedes the first tensor; `tensors` are name, dtype and shape, in their order."""
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text
