"""Why an axis is as it is, in words: what ties and freezes it, and which operation could grow it all the same."""

from __future__ import annotations

from typing import Literal

from fxgrow.errors import FxgrowError
from fxgrow.growth import plan_growth
from fxgrow.program import Program
from fxgrow.spec import Extend, GrowthSpec


def explain(program: Program, name: str) -> str:
    """Why an axis is frozen and what would grow it, or what grows with it: tensors, ops and source lines.

    Args:
        name: of the axis, a glob, or a parameter's dim (``mlp.c_fc.weight:0``); of several axes the first is taken.

    Raises:
        SpecError: no axis has the name.
    """
    (info, *_) = program.axes.find(name)
    text = program.axes.explain(info.name)
    if info.reason is None:
        return text
    first, frozen, *rest = text.split("\n")
    return "\n".join([first, frozen, f"  {_by_extend(program, info.name)}", *rest])


def _by_extend(program: Program, name: str) -> str:
    """Whether ``extend`` can grow a frozen axis, in one line: tried on shapes alone."""

    def refusal(preserve: Literal["exact", "approximate"]) -> str:
        try:
            plan_growth(program, GrowthSpec.parse(Extend(axis=name, by=1, preserve=preserve)))
        except FxgrowError as error:
            return str(error)
        return ""

    exact = refusal("exact")
    if not exact:
        return "widen cannot grow it; extend can: it appends entries after the old ones"
    if not refusal("approximate"):
        return f"widen cannot grow it; extend can with preserve: approximate. Exactly it cannot: {exact}"
    return f"extend cannot grow it either: {exact}"
