"""Axes that a class ties though its graph does not: ``n_embd``, which is the stream and the heads times their width."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fxgrow.analysis.axes import NamedAxis
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program


def tied_with(before: Traced, plan: GrowthPlan) -> str:
    """Growths of other axes by which the sizes that grew would stay what they were to others, in words; "" for none.

    Args:
        before: the program that was grown.
    """
    found = dict.fromkeys(_beside(list(Program.of(before).axes), {a.name: (a.old, a.new) for a in plan.axes}))
    if not found:
        return ""
    return (
        "The class may tie axes that its graph does not: it may land with " + " or ".join(list(found)[:3]) + " as well"
    )


def _beside(axes: list[NamedAxis], grown: dict[str, tuple[int, int]]) -> Iterator[str]:
    sizes = {a.name: a.size for a in axes if a.growable}
    still = {n: s for n, s in sizes.items() if n not in grown}
    products: dict[tuple[int, int], None] = {}  # old and new sizes of grown axes, and of what they span with another
    for name, (old, new) in grown.items():
        products[old, new] = None
        products.update({(old * s, new * s): None for n, s in sizes.items() if n != name and _together(n, name)})
    for old, new in products:
        for name, size in still.items():
            if size == old:
                yield f"`widen {_everywhere(name)} to: {new}`"
        for a, b in itertools.combinations(still, 2):
            if _together(a, b) and still[a] * still[b] == old:
                for name, other in ((a, b), (b, a)):
                    if new % still[other] == 0:
                        yield f"`widen {_everywhere(name)} to: {new // still[other]}`"


def _together(one: str, other: str) -> bool:
    """Whether two axes are of one module."""
    return one.rpartition("/")[0] == other.rpartition("/")[0]


def _everywhere(name: str) -> str:
    """The axis in every block."""
    path, _, role = name.rpartition("/")
    return name if path in ("", ".") else f"*/{role}"


__all__ = ["tied_with"]
