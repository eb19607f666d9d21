"""The choice of the grouped matmul, from dtype, device and widths, unless the caller passes one."""

from __future__ import annotations

import torch

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.validate import describe_value
from spmd_moe.layer.grouped_matmul import GroupedMatmul, LoopedMatmul, Masked, TorchGroupedMM
from spmd_moe.layer.grouped_mm_support import has_kernel


def check_matmul(where: str, matmul: object) -> None:
    """Raise unless it is a grouped matmul, or None: then `choose_matmul` chooses."""
    if matmul is None:
        return
    methods = (getattr(matmul, name, None) for name in ("rows", "outer"))
    if isinstance(matmul, type) or not all(map(callable, methods)):
        raise ConfigError(
            explain(
                where,
                f"matmul is {describe_value(matmul)}; "
                "it must be an object with the methods rows and outer",
                why="the experts multiply by it, forward and backward",
                fixes=["matmul=LoopedMatmul(row_block=4)", "matmul=None   # what suits the device"],
            )
        )


# Made once: every call of the layer chooses.
_CPU = torch.device("cpu")
_AS_THEY_ARE, _IN_FLOAT32 = LoopedMatmul(), LoopedMatmul(compute=torch.float32)


def choose_matmul(
    dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], fixed: bool = False
) -> GroupedMatmul:
    """The matmul for a dtype, a device and row widths; with `fixed` the host must not wait."""
    # Compared first, because each read of `device.type` makes a string.
    if device != _CPU and device.type == "cuda":
        if has_kernel(dtype, device, widths):
            return TorchGroupedMM()
    elif not fixed and dtype in _WIDENED_ON_THIS_CPU and device.type == "cpu":
        return _IN_FLOAT32
    return Masked() if fixed else _AS_THEY_ARE


def _widened_on_this_cpu() -> frozenset[torch.dtype]:
    # Without matmul units for a half precision, torch's CPU matmuls in it are 10 to 30 times slower
    # than float32, and round at every step.
    units = [name for name, present in torch.cpu.get_capabilities().items() if present]
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return frozenset(
        dtype for dtype, suffix in half.items() if not any(u.endswith(suffix) for u in units)
    )


_WIDENED_ON_THIS_CPU = _widened_on_this_cpu()
