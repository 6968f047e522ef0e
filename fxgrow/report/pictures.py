"""Pictures of a model's axes: which parameters each axis ties together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxgrow.errors import FxgrowError
from fxgrow.ir.stacks import stacks_of
from fxgrow.program import Program
from fxgrow.report.axes import axis_groups, collapsed

_GREY = "#9a9a9a"
_MOST = 60


def draw_axes(program: Program, path: str | Path) -> None:
    """Axes on the left, parameters with their dims in words on the right, a line wherever a dim carries an axis.

    Repeated blocks are drawn once. Frozen axes are grey and dotted.

    Args:
        program: the model.
        path: of the picture; the suffix says its format (png, svg, pdf).

    Raises:
        FxgrowError: the format is unknown or the file cannot be written.
    """
    import matplotlib  # an import of half a second, for pictures only

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = axis_groups(program)
    tensors = _lines(program, groups)
    described = _descriptions(program)
    order = {name: i for i, name in enumerate(described)}
    names = sorted(tensors, key=lambda n: order.get(n, len(order)))
    left_out = max(0, len(names) - _MOST)
    names = names[:_MOST]
    rows = max(len(names), len(groups), 2)
    figure, axes = plt.subplots(figsize=(6, 0.9 + 0.27 * rows))
    palette = plt.get_cmap("tab10")

    def place(i: int, count: int) -> float:
        return -(i + 0.5) * rows / count

    colours: list[Any] = []
    for number, group in enumerate(groups):
        growing = sum(g["growable"] for g in groups[:number])
        colours.append(palette(growing % 10) if group["growable"] else _GREY)
        many = f" ×{len(group['names'])}" if len(group["names"]) > 1 else ""
        size = "/".join(str(s) for s in dict.fromkeys(group["sizes"]))
        label = f"{group['pattern']}{many}   {size}"
        axes.text(
            *(-0.02, place(number, len(groups)), label),
            ha="right",
            va="center",
            fontsize=9,
            color="black" if group["growable"] else _GREY,
        )
    for row, name in enumerate(names):
        y = place(row, len(names))
        axes.text(1.02, y, name, ha="left", va="center", fontsize=8, family="monospace")
        axes.text(1.7, y, described.get(name, ""), ha="left", va="center", fontsize=7, color="#555555")
        for dim, number in sorted(tensors[name]):
            start, end = place(number, len(groups)), y - 0.15 * (dim - (len(tensors[name]) - 1) / 2)
            xs = [i / 30 for i in range(31)]
            ys = [start + (end - start) * (3 * x**2 - 2 * x**3) for x in xs]
            growable = groups[number]["growable"]
            axes.plot(
                xs, ys, color=colours[number], lw=1.3 if growable else 0.8, alpha=0.8, ls="-" if growable else ":"
            )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-rows, 0)
    axes.axis("off")
    total = sum(p.numel() for p in program.parameters.values())
    note = f" ({left_out} more parameters are not drawn)" if left_out else ""
    axes.set_title(f"{program.class_name}, {total:,} parameters: axes, and the dims they tie{note}", fontsize=10)
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (ValueError, OSError) as error:
        raise FxgrowError(f"the picture {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _lines(program: Program, groups: list[dict[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """What is drawn of the axis graph: tensor names as they are drawn, to (dim, number of the axis group)."""
    stacks = stacks_of(program)
    found: dict[str, dict[tuple[int, int], None]] = {}
    for number, group in enumerate(groups):
        for axis in group["names"]:
            for tensor, about in program.axes.around(axis, "tensor"):
                lines = found.setdefault(collapsed(tensor, stacks), {})
                lines.update({(dim, number): None for dim in about["dims"]})
    return {name: list(lines) for name, lines in found.items()}


def _descriptions(program: Program) -> dict[str, str]:
    """Tensor names as they are drawn, in the model's order, with their dims in words."""
    stacks = stacks_of(program)
    dims = program.axes.tensor_dims()
    out: dict[str, str] = {}
    for name in program.tensors:
        if name in dims:
            words = ", ".join(program.axes.describe(d) for d in dims[name])
            out.setdefault(collapsed(name, stacks), words if len(words) < 90 else words[:87] + "…")
    return out
