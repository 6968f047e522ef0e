"""How large a thing may be: stated bounds on files, sizes and depths.

A bound is far above what anybody asks for on purpose, and below what would keep a machine busy for hours or fill its
memory before the mistake shows.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Final

from fxgrow.errors import SpecError

#: bytes of a spec or schedule, and of a manifest or other JSON file
TEXT_BYTES: Final = 1 << 20
JSON_BYTES: Final = 1 << 28
#: levels of lists and mappings in a file, and values once its aliases are written out
NESTING: Final = 64
VALUES: Final = 100_000
#: operations of a spec, growths of a schedule
OPERATIONS: Final = 1000
#: units of an axis, blocks of a stack, elements of a tensor
UNITS: Final = 1 << 28
BLOCKS: Final = 4096
ELEMENTS: Final = 1 << 48

#: bytes that planning keeps for every unit of a growing axis: its index, shares, fills, and copies of them
_PLANNING_BYTES = 64


def bytes_in_words(count: float) -> str:
    """1536 → 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def host_bytes() -> int | None:
    """Memory that this machine has left for the CPU, swap included; None where it is not known."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        fields = {
            name: int(kib) for name, kib in re.findall(r"^(MemAvailable|SwapFree): *(\d+) kB$", text, re.MULTILINE)
        }
        return (fields["MemAvailable"] + fields.get("SwapFree", 0)) << 10
    except (OSError, ValueError, KeyError):  # not Linux
        return None


def check_units(what: str, old: int, new: float) -> None:
    """Whether an axis of ``new`` units can be planned.

    Raises:
        SpecError: it has too many, or planning would not fit in memory.
    """
    if new > UNITS:
        raise SpecError(f"{what} has {old} units; {new:g} are more than the {UNITS:,} that an axis may have")
    free = host_bytes()
    if free is not None and new * _PLANNING_BYTES > free:
        raise SpecError(
            f"{what} has {old} units; planning {new:,.0f} takes {bytes_in_words(new * _PLANNING_BYTES)}, and "
            f"{bytes_in_words(free)} are available"
        )


def check_blocks(stack: str, old: int, more: float) -> None:
    """Whether a stack can be given ``more`` blocks.

    Raises:
        SpecError: it would have too many.
    """
    if old + more > BLOCKS:
        raise SpecError(f"{stack} has {old} blocks; {more:g} more are over the {BLOCKS:,} that a stack may have")


def check_elements(name: str, shape: list[int]) -> None:
    """Whether a tensor of this shape can exist.

    Raises:
        SpecError: it has too many elements.
    """
    if math.prod(shape) > ELEMENTS:
        raise SpecError(f"{name} would have the shape {shape}: more than the {ELEMENTS:,} elements a tensor may have")
