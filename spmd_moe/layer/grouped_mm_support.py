"""Capabilities of `torch.nn.functional.grouped_mm` on a device, which torch does not report."""

from __future__ import annotations

import torch
from torch import Tensor

_CAPABILITIES = (9, 10)  # major; on others grouped_mm is a loop that waits for the device


def has_kernel(dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> bool:
    """Whether grouped_mm is one kernel for rows of these widths on this CUDA device."""
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    major = torch.cuda.get_device_capability(device)[0]
    return dtype is torch.bfloat16 and aligned and major in _CAPABILITIES


def writes_empty_groups(x: Tensor) -> bool:
    """Whether grouped_mm writes zeros to the weight gradient of an expert without rows.

    It does on CPUs and on Hopper. On Blackwell (pytorch issue 172439) and with ROCm (pytorch pull
    request 174314) that memory may be uninitialized, and the layer has to zero it.
    """
    if x.device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9
