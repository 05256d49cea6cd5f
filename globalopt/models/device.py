"""Choose the device to compute on, and the floating-point type to compute in there."""

from __future__ import annotations

import torch

from globalopt.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Floating-point types by the name that a user gives."""


def computed_dtype(dtype: str, place: torch.device, stored: torch.dtype) -> torch.dtype:
    """Choose the type to compute in on the device `place`, for weights stored in `stored`.

    Args:
        dtype: a name of `DTYPES`, or "auto": float32 on a CPU, `stored` elsewhere.

    >>> computed_dtype("auto", torch.device("cpu"), torch.bfloat16)
    torch.float32
    >>> computed_dtype("auto", torch.device("cuda"), torch.bfloat16)
    torch.bfloat16
    """
    return DTYPES.get(dtype, torch.float32 if place.type == "cpu" else stored)


def resolve_device(device: str) -> torch.device:
    """Choose the torch device called `device`; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.

    >>> resolve_device("cpu:1")
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: --device cpu:1 is not available here; use --device auto or cpu.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device} is no torch device; use auto, cpu, cuda, cuda:0 or mps.") from error
    here = 1 if place.type == "cpu" else 0
    if accelerator is not None and place.type == accelerator.type:
        here = torch.accelerator.device_count()
    if (place.index or 0) >= here:
        raise UsageError(f"--device {device} is not available here; use --device auto or cpu.")
    return place
