"""Comparing graphs: equal ones are found equal however they are written, every mutation is found at its node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.guards import Guard
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import op_name
from fxgrow.ir.traced import Traced
from fxgrow.landing.compare import differences
from tests.models import trained


class Block(nn.Module):
    """Attention and an MLP, with dropout and a residual."""

    def __init__(self, width: int, heads: int, hidden: int, view: Any = None) -> None:
        super().__init__()
        self.heads, self.each, self.view = heads, width // heads, view
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, self.each).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, time, width))
        return x + self.drop(self.fc2(F.gelu(self.fc1(x)))) * 0.5


class Net(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 6, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.block = block(width, heads, hidden)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


class Convolutions(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.relu(self.norm(self.conv(x))), 2).mean((2, 3)))


class Counting(nn.Module):
    """Writes into buffers, in an order that matters."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.fc(x) + self.seen
        self.seen.mul_(0.9)
        self.seen.add_(y.detach().mean(0))
        return {"y": torch.rand_like(y) * y, "seen": self.seen * 2, "table": y + torch.tensor([1.0, 2.0, 3.0, 4.0])}


def ids() -> tuple[Tensor]:
    return (torch.arange(10).reshape(2, 5) % 11,)


def image() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4),)


def rows() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 12).reshape(3, 4),)


class Recurrent(nn.Module):
    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, hidden, num_layers=2, batch_first=True), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


def series() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 2 * 3 * 4).reshape(2, 3, 4),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor]]]] = {
    "attention": (Net, ids),
    "convolutions": (Convolutions, image),
    "writes": (Counting, rows),
    "recurrent": (Recurrent, series),
}


@pytest.fixture(scope="module")
def traces() -> dict[str, fxgrow.Program]:
    return {name: fxgrow.capture(trained(make()), inputs()) for name, (make, inputs) in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_traced_twice_is_equal(traces: dict[str, fxgrow.Program], name: str) -> None:
    make, inputs = MODELS[name]
    assert differences(traces[name], fxgrow.capture(make(), inputs())) == []


def mutations(graph: fx.Graph) -> Iterator[tuple[str, str, Callable[[fx.Graph], None]]]:
    """Every number, truth value, word and operand of every op, changed: node, what it was, and how to change it."""

    def arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
        for i, a in enumerate(node.args):
            for j, b in enumerate(a) if isinstance(a, list | tuple) else [(None, a)]:
                yield ("args", i, j), b
        for key, a in node.kwargs.items():
            yield ("kwargs", key, None), a

    def put(node: fx.Node, path: Any, value: Any) -> None:
        kind, key, inner = path
        holder = list(node.args) if kind == "args" else dict(node.kwargs)
        if inner is not None:
            value = [value if j == inner else b for j, b in enumerate(holder[key])]
        holder[key] = value
        setattr(node, kind, tuple(holder) if kind == "args" else holder)

    nodes = [n for n in graph.nodes if n.op == "call_function" and not info_of(n).is_flag]
    for node in nodes:
        for path, old in arguments(node):
            if isinstance(old, fx.Node):
                val = old.meta.get("val")
                others = [
                    n
                    for n in graph.nodes
                    if n is not old
                    and isinstance(val, Tensor)
                    and isinstance(w := n.meta.get("val"), Tensor)
                    and n < node
                    and w.shape == val.shape
                    and w.dtype == val.dtype
                ]
                new: Any = others[-1].name if others else None
            elif isinstance(old, bool):
                new = not old
            elif isinstance(old, int | float):
                new = old + 1 if old != -1 else None
            elif isinstance(old, str):
                new = {"none": "tanh"}.get(old)
            else:
                new = None
            if new is None:
                continue

            def change(copy: fx.Graph, name: str = node.name, path: Any = path, new: Any = new) -> None:
                named = {n.name: n for n in copy.nodes}
                put(named[name], path, named[new] if isinstance(new, str) and new in named else new)

            yield node.name, f"{op_name(node.target)} {path} {old} -> {new}", change


#: which kernel runs, where memory lies, one zero for another, and slices of everything, along whichever dim
HARMLESS = (
    *("batch_norm.default ('args', 8,", "pin_memory", "zeros_1 -> zeros", "zeros -> zeros_1"),
    *("slice.Tensor ('args', 1, None) 0 -> 1", "9223372036854775807 ->", "slice_1 -> getitem"),
)


@pytest.mark.parametrize("name", MODELS)
def test_every_mutation_is_found_at_its_node(traces: dict[str, fxgrow.Program], name: str) -> None:
    program = traces[name]
    missed, misplaced, tried = [], [], 0
    for node, what, change in mutations(program.graph):
        if any(harmless in what for harmless in HARMLESS):
            continue
        graph = copy_graph(program.graph)
        change(graph)
        tried += 1
        found = differences(replace(Traced(**_fields(program)), graph=graph), program)
        if not found:
            missed.append((node, what))
        elif not any(node in (d.node, _split_of(program, node)) or d.node == _split_of(program, node) for d in found):
            misplaced.append((node, what, [str(d) for d in found]))
    assert tried > 10
    assert missed == []
    assert misplaced == []


def _alike(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _fields(program: Traced) -> dict[str, Any]:
    return {name: getattr(program, name) for name in Traced.__dataclass_fields__}


def _split_of(program: Traced, name: str) -> str:
    node = next(n for n in program.graph.nodes if n.name == name)
    first = node.args[0] if node.args else None
    return first.name if op_name(node.target) == "getitem" and isinstance(first, fx.Node) else name


# grown --------------------------------------------------------------------------------------------------------------


def _grown(*axes: str, **options: Any) -> fxgrow.Program:
    spec = fxgrow.GrowthSpec.parse([{"op": "widen", "axis": axis, "factor": 2, **options} for axis in axes])
    return fxgrow.plan_growth(fxgrow.capture(trained(Net()), ids()), spec)[1]


def test_a_growth_is_equal_to_the_larger_class() -> None:
    assert differences(_grown("*/hidden"), fxgrow.capture(Net(hidden=12), ids())) == []


def test_constants_that_the_larger_class_has_otherwise_are_the_only_differences() -> None:
    grown = _grown("*/residual", "*/head_dim", "*/value_dim", constants="keep")
    scale, factor = differences(grown, fxgrow.capture(Net(width=16), ids()))
    assert (scale.kind, scale.module_path, scale.argument) == ("literal", "block", "scale")
    assert (scale.ours, scale.theirs) == (0.25, pytest.approx(8**-0.5))
    assert "scaled_dot_product_attention(q, k, v, is_causal=True)" in scale.source == scale.their_source
    assert (factor.kind, factor.module_path, factor.ours, factor.theirs) == ("missing", "head", 0.5, None)


def test_sizes_that_differ_are_named_where_they_stand() -> None:
    found = {(d.kind, d.argument, d.ours, d.theirs) for d in differences(_grown("*/residual"), _larger())}
    assert found >= {("literal", "split_size", 8, 16), ("literal", "shape[2]", 2, 4), ("literal", "shape[2]", 8, 16)}
    assert ("tensor", "shape", (24, 16), (48, 16)) in found


def _larger() -> fxgrow.Program:
    return fxgrow.capture(Net(width=16, heads=4), ids())


# written otherwise --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc(x).split(4, dim=-1)
        h = a.view(x.shape[0], 1, -1, 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(h, h, h, scale=self.scale)
        return F.layer_norm(y.reshape(x.shape[0], 4), [4]) * 2 + b.contiguous().to(b.dtype)


class Spelled(Plain):
    """The same in other words."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.fc(x), [4, 4], dim=1)
        h = a.reshape(-1, 1, 2, 2).permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(h, h, h, scale=2**-0.5)
        return F.layer_norm(y.reshape(-1, 2, 2).reshape(-1, 4), (4,), None, None, 1e-5) * 2.0 + F.dropout(b, 0.0)


def test_one_function_in_other_words_is_equal() -> None:
    assert differences(fxgrow.capture(Plain(), rows()), fxgrow.capture(Spelled(), rows())) == []


def test_floats_are_equal_up_to_rounding_and_no_further() -> None:
    program = fxgrow.capture(Plain(0.3), rows())
    assert differences(program, fxgrow.capture(Plain(0.1 + 0.2), rows())) == []
    (found,) = differences(program, fxgrow.capture(Plain(0.3 * (1 + 1e-10)), rows()))
    assert found.argument == "scale"


def test_a_narrower_domain_is_a_difference() -> None:
    program = fxgrow.capture(Plain(), rows())
    (call,) = program.calls
    short = replace(Traced(**_fields(program)), calls=[replace(call, guards=[Guard("x.shape[0] <= 9", "here")])])
    wide = replace(Traced(**_fields(program)), calls=[replace(call, guards=[Guard("x.shape[0] <= 12", "here")])])
    assert differences(short, wide) == differences(short, program) == []
    (found,) = differences(wide, short)
    assert (found.kind, found.ours, found.theirs) == ("guard", "x.shape[0] <= 12", "x.shape[0] <= 9")
    fixed = replace(Traced(**_fields(program)), calls=[replace(call, sizes={"x": [3, 4]})])
    (found,) = differences(program, fixed)
    assert (found.kind, found.argument, found.ours, found.theirs) == ("guard", "x.shape[0]", "any", 3)
    assert differences(fixed, program) == []


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tie:
            self.a.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_a_tie_that_one_class_lacks_is_a_difference() -> None:
    tied, loose = (fxgrow.capture(Tied(tie), rows()) for tie in (True, False))
    assert differences(tied, tied) == differences(loose, loose) == []
    for one, two in ((tied, loose), (loose, tied)):
        (found,) = differences(one, two)
        assert (found.kind, {found.ours, found.theirs}) == ("tensor", {"a.weight", "b.weight"})


class Ordered(nn.Module):
    """Two buffers, written one after the other."""

    a: Tensor
    b: Tensor

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way = way
        for name in "ab":
            self.register_buffer(name, torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            self.a.add_(x.sum(0))
            self.a.mul_(0.5)
            y = x + self.a
        elif self.way == 1:
            self.a.mul_(0.5)
            self.a.add_(x.sum(0))
            y = x + self.a
        else:
            y = x + self.a
            self.a.add_(x.sum(0))
            self.a.mul_(0.5)
        return y


def test_the_order_of_writes_and_reads_counts() -> None:
    programs = [fxgrow.capture(Ordered(way), rows()) for way in (0, 1, 2)]
    for i, one in enumerate(programs):
        for j, two in enumerate(programs):
            assert (differences(one, two) == []) == (i == j)


class Stochastic(nn.Module):
    """Other ops in train mode than in eval mode."""

    def __init__(self, factor: float = 2.0, learned: float = 3.0) -> None:
        super().__init__()
        self.fc, self.factor, self.learned = nn.Linear(4, 4), factor, learned

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.tanh(y) * self.learned if self.training else y * self.factor


def test_both_modes_are_compared() -> None:
    programs = [fxgrow.capture(Stochastic(*f), rows()) for f in ((2.0, 3.0), (2.5, 3.0), (2.0, 3.5))]
    assert differences(programs[0], programs[0]) == []
    for other, values in zip(programs[1:], ((2.0, 2.5), (3.0, 3.5)), strict=True):
        (found,) = differences(programs[0], other)
        assert (found.kind, found.ours, found.theirs) == ("literal", *values)
