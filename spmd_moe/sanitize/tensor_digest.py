"""Two small summaries of a tensor: a hash for bitwise equality, and a linear sketch.

Both stay on the device and need no synchronization. Ranks that hold the same bits get the same
hash; the sketch of a sum over ranks is the sum of the ranks' sketches.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
import torch.nn.functional as fn
from torch import Tensor

from spmd_moe.core.float32_matmul import float32_matmul

_BLOCK = 1 << 12  # words; each row has the same weights
_ROWS = 64  # rows at a time, to bound temporary memory
COLUMNS = 8  # numbers in a sketch, followed by the squared norm


@torch.no_grad()
def fingerprint(x: Tensor) -> Tensor:
    """An int64 that depends on every bit of `x` and its position, on shape and dtype."""
    words = _words(x)
    whole = words.shape[0] // _BLOCK * _BLOCK
    rows, rest = words[:whole].view(-1, _BLOCK), words[whole:]
    weights = _weights(x.device)
    total = _mixed(rest, weights[: rest.shape[0]]).sum()
    for number, part in enumerate(rows.split(_ROWS)):
        of_row = _mixed(part, weights).sum(1)
        first = number * _ROWS
        places = torch.arange(first, first + part.shape[0], device=x.device)
        total = total + (of_row * (2 * places + 3)).sum()
    return total + zlib.crc32(repr((tuple(x.shape), x.dtype)).encode())


def _words(x: Tensor) -> Tensor:
    """The bytes of `x`, eight in each int64."""
    flat = x.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    short = -octets.shape[0] % 8
    return (fn.pad(octets, [0, short]) if short else octets).view(torch.int64)


def _mixed(words: Tensor, weights: Tensor) -> Tensor:
    """Weighted by position. High bits are folded down; otherwise two flipped ones could cancel."""
    weighted = words * weights
    return weighted.bitwise_xor_(weighted >> 32)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(2**62), 2**62, (_BLOCK,), generator=generator, device="cpu")
    return (2 * drawn + 1).to(device)


@torch.no_grad()
def sketch(x: Tensor) -> Tensor:
    """`COLUMNS` sums over `x` with random signs, the same on all ranks, and its squared norm."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    columns = x.shape[-1] if x.ndim > 1 and x.shape[-1] >= COLUMNS else x.numel()
    matrix = wide.reshape(-1, columns) if columns else wide.reshape(1, 0)
    left, right = _signs(*matrix.shape, matrix.dtype, matrix.device)
    products = float32_matmul(float32_matmul(left.unsqueeze(0), matrix), right)
    sums = products.squeeze(0)
    norm = torch.linalg.vector_norm(matrix).square()
    return torch.cat([sums, norm.view(1)]).to(torch.float64)


@lru_cache(maxsize=256)
def _signs(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (rows,), (columns, COLUMNS)
    drawn = (torch.randint(0, 2, s, generator=generator, device="cpu") * 2 - 1 for s in shapes)
    left, right = (signs.to(device, dtype) for signs in drawn)
    return left, right
