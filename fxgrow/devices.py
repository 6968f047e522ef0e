"""How much memory a device has left, and whether what is to be made fits there."""

from __future__ import annotations

import torch

from fxgrow.errors import SpecError
from fxgrow.limits import bytes_in_words, host_bytes


def available_bytes(device: torch.device) -> int | None:
    """Memory that a device has left; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_bytes() if device.type == "cpu" else None


def check_memory(needed: dict[torch.device, int]) -> None:
    """Whether tensors of so many bytes fit, by device.

    Raises:
        SpecError: they do not.
    """
    for device, count in needed.items():
        free = available_bytes(device)
        if free is not None and count > free:
            raise SpecError(
                f"the grown model needs {bytes_in_words(count)} on {device}, where {bytes_in_words(free)} are "
                "available. fxgrow.plan_growth and `fxgrow plan` work without the memory"
            )
