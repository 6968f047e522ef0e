"""Every growable axis of every small model grows exactly in several ways, or is refused with a reason.

``grow`` itself measures in float64 and raises ``ExactnessError`` beyond 1e-10; here the grown module is also run on
inputs of other sizes than those it was captured with, its gradient map and its newborn parameters are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxgrow.errors import GrowthRefused
from fxgrow.growth import Growth, grow
from fxgrow.program import Program, capture
from fxgrow.verify.outputs import relative_errors

from .adversarial import ADVERSARIAL
from .strangers import STRANGERS
from .vision import ZOO
from .zoo import Example

MODELS = {
    **ZOO,
    **{f"adversarial-{k}": v for k, v in ADVERSARIAL.items()},
    **{f"stranger-{k}": v for k, v in STRANGERS.items()},
}

#: newborn entries that get no gradient within two steps, and why that is not the growth's fault or cannot be helped
SILENT = {
    "adversarial-abs-weight": "abs has gradient 0 at the reader's zeros",
    "adversarial-xx-sum": "x ** 2 has gradient 0 at the zeros that a sum of squares needs",
    "adversarial-scalar-out": "the same",
    "adversarial-where": "the axis only decides a comparison, which has no gradient",
    "adversarial-vq": "an argmax lets no gradient through to the writers",
    "cross-attention": "softmax lets no gradient through to a key's bias, here a part of a fused one",
    "stranger-complex-rotary": "softmax lets no gradient through to a key's bias, old or new, where it is not turned",
    "adversarial-instnorm": "a mean of a normalised map, as in gn-c",
    "adversarial-gn-c": "the mean of a normalised map is its bias alone, which starts at 0 as its reader does",
    "mlp-norm=layer-residual=True": "new units normalise to 0, where ReLU has gradient 0 at first",
    "mlp-norm=rms-act=sigmoid": "zeros before and after a sigmoid: the norm's weight needs a third step",
}


def growths(size: int, first: bool) -> Iterator[dict[str, Any]]:
    """Requests to try: all of them on the first model of a family, the most telling ones on its variants."""
    uneven = size + max(1, size // 2 - 1)
    if first:
        yield {"factor": 2}
    yield {"by": 6, "fill": "add"}  # three unlike units: a single one may be dead by chance where ReLU follows
    yield {"to": uneven}
    if first:
        yield {"to": uneven + (uneven - size + 1) % 2, "fill": "add"}
    yield {"factor": 3, "split": "uneven", "noise": {"scale": 1e-2}}


def outputs(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return module.eval()(*args)


def problems(name: str, example: Example, growth: Growth) -> list[str]:
    """What is wrong with a growth that was carried out."""
    receipt, out = growth.receipt, []
    if receipt.error_float64 is None and receipt.error_float64_train is None:
        out.append("nothing was measured")
    errors = relative_errors(outputs(example.model, example.other), outputs(growth.module, example.other))
    worst = max(e.relative_error for e in errors)
    if not worst <= 1e-10:
        out.append(f"differs by {worst:.1e} on inputs of another size")
    if receipt.dead_parameters and name not in SILENT:
        out.append(f"dead: {receipt.dead_parameters}")
    return out


def together(program: Program) -> list[tuple[str, int]]:
    """Globs over growable axes: alike axes of several blocks grow together."""
    found: dict[tuple[str, int], bool] = {}
    for axis in program.axes:
        key = re.sub(r"\.\d+\b", ".*", axis.name), axis.size
        found[key] = found.get(key, True) and axis.growable
    return [key for key, growable in found.items() if growable]


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_grows_exactly_or_says_why(name: str) -> None:
    example = MODELS[name]()
    program = capture(example.model, example.args)
    before = {n: t.clone() for n, t in example.model.state_dict().items()}
    wrong, done = [], 0
    for axis, size in together(program):
        for request in growths(size, first="=" not in name or name == "gpt-depth=2"):
            try:
                growth = grow(program, [{"op": "widen", "axis": axis, **request}])
            except GrowthRefused as refusal:
                if not re.search(r"cannot grow .{20,}", str(refusal)) or "rule fails" in str(refusal):
                    wrong.append(f"{axis} {request}: refused without a reason: {refusal}")
                continue
            done += 1
            wrong += [f"{axis} {request}: {p}" for p in problems(name, example, growth)]
    assert not wrong, "\n".join(wrong)
    assert all(torch.equal(t, before[n]) for n, t in example.model.state_dict().items()), "the original was changed"
    if name in ZOO or name.startswith("stranger"):
        assert done, "nothing could grow"


def widen(axis: str, **options: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **options}


SEVERAL = {
    "gpt-depth=2": [
        widen("*/residual", to=24),
        widen("*/hidden", factor=1.5),
        widen("*/heads", by=2, fill="add"),
        widen("*/head_dim", by=3, fill="add"),
        widen("*/value_dim", factor=2, noise={"scale": 1e-2}),
    ],
    "gpt-norm=rms-act=silu-fused=False": [
        widen("*/residual", to=21),
        widen("*/head_dim", factor=2, split="uneven"),
        widen("*/heads", by=1, fill="add"),
        widen("*/hidden", by=3, fill="add"),
    ],
    "llama": [
        widen("*/residual", to=21),
        widen("./hidden", factor=2, split="uneven"),
        widen("*/head_dim", by=1, fill="add"),
        widen("*/kv_heads", factor=2),
        widen("*/groups", by=1, fill="add"),
    ],
    "vit": [widen("*/residual", factor=2), widen("*/heads", factor=2), widen("./hidden-2", by=5, fill="add")],
    "resnet-kind=cat": [widen("./channels", factor=2), widen("./channels-2", by=3, fill="add")],
    "resnet-kind=grouped": [widen("./channels", factor=2), widen("./channels-2", to=7)],
    "inverted-residual": [widen("./channels", to=9, split="uneven"), widen("./channels-2", by=3, fill="add")],
    "autoencoder": [widen("*/hidden", factor=2), widen("*/rank", by=3, fill="add")],
    "adversarial-einsum3": [widen("*/rank", to=11), widen("*/rank-2", factor=2, noise={"scale": 1e-2})],
    "adversarial-outer-mixed": [widen("*/hidden", by=2, fill="add"), widen("*/rank", by=2, fill="add")],
    "adversarial-lora": [widen("*/hidden", by=2, fill="add"), widen("*/rank", by=3, fill="add")],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_axes_at_once_and_one_growth_after_another(name: str) -> None:
    example = MODELS[name]()
    program = capture(example.model, example.args)
    once = grow(program, SEVERAL[name])
    assert not problems(name, example, once)
    for first, second in zip(SEVERAL[name], SEVERAL[name][1:] + SEVERAL[name][:1], strict=True):
        step = grow(program, [first])
        chained = grow(step.module, [second], example.args)
        assert not problems(name, example, chained), (first, second)
        again = grow(chained.module, [{**first, **({"to": first["to"] + 5} if "to" in first else {})}], example.args)
        assert not problems(name, example, again), (first, second, "again")


@pytest.mark.parametrize("name", ["gpt-depth=2", "resnet-kind=grouped", "siamese", "llama"])
def test_the_names_are_the_same_from_run_to_run_and_after_a_growth(name: str) -> None:
    def names(program: Program) -> dict[str, int]:
        return {a.name: a.size for a in program.axes}

    example = MODELS[name]()
    program = capture(example.model, example.args)
    found = names(program)
    assert names(capture(example.model, example.args)) == found
    axis = next(a.name for a in program.axes if a.growable)
    growth = grow(program, [widen(axis, factor=2)])
    assert names(growth.program) == {n: s * 2 if n == axis else s for n, s in found.items()}
