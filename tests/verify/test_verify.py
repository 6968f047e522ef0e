"""The receipt tries to refute: what used to pass it fails, or is named as not exercised; nothing right is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxgrow
import fxgrow.growth
from fxgrow.verify.receipt import Receipt
from fxgrow.verify.side import Results, Side
from tests.models import small_gpt, trained

aten = torch.ops.aten


class M(nn.Module):
    """``f`` between two linear layers, of 5, 8 and 3 features."""

    def __init__(self, f: Callable[..., Any], **buffers: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out, self.f = nn.Linear(5, 8), nn.Linear(8, 3), f
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> Any:
        return self.f(self, x)


def example(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*(shape or (4, 5)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def receipt(
    f: Callable[..., Any], x: torch.Tensor | None = None, dtype: torch.dtype = torch.float64, **how: Any
) -> Receipt:
    buffers = how.pop("buffers", {})
    model = trained(M(f, **buffers)).to(dtype)
    x = example() if x is None else x
    spec = {"op": "widen", "axis": "up.weight:0", **(how or {"factor": 2})}
    return fxgrow.grow(model, spec, (x.to(dtype) if x.is_floating_point() else x,)).receipt


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[fx.Graph], None]], None]:
    """Change the grown graph behind the planner's back."""

    def install(change: Callable[[fx.Graph], None]) -> None:
        plan_growth = fxgrow.growth.plan_growth

        def wrong(*given: Any) -> Any:
            plan, grown = plan_growth(*given)
            change(grown.graph)
            grown.graph.lint()
            return plan, grown

        monkeypatch.setattr(fxgrow.growth, "plan_growth", wrong)

    return install


def after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Everybody who reads ``node`` reads ``target(node, *args)`` instead."""
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def the(graph: fx.Graph, target: Any) -> fx.Node:
    return next(n for n in graph.nodes if n.target == target)


def plain(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(torch.tanh(m.up(x)))


# what passed ----------------------------------------------------------------------------------------------------------


def test_nan_counts_as_a_difference(sabotage: Any) -> None:
    sabotage(lambda g: after(g, the(g, aten.tanh.default), aten.mul.Tensor, float("nan")) and None)
    with pytest.raises(fxgrow.ExactnessError, match="outputs differ by inf"):
        receipt(plain)


def test_nan_in_both_is_no_difference() -> None:
    """Half of what comes out is NaN, the other half is compared."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(m.out(torch.tanh(m.up(x))))

    found = receipt(f)
    assert found.error_float64 is not None and found.error_float64 <= 1e-12


def test_an_error_in_a_small_column(sabotage: Any) -> None:
    """Columns 10^12 smaller than others of the same output, wrong by a tenth."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(m, x)
        return torch.cat([y * 1e12, y], -1)

    def wrong(graph: fx.Graph) -> None:
        cat = the(graph, aten.cat.default)
        with graph.inserting_before(cat):
            small = graph.call_function(aten.mul.Tensor, (cat.args[0][1], 1.1))
        small.meta = dict(cat.args[0][1].meta)
        cat.args = ([cat.args[0][0], small], *cat.args[1:])

    assert receipt(f).error_float64 is not None
    sabotage(wrong)
    with pytest.raises(fxgrow.ExactnessError, match="outputs differ by 1"):
        receipt(f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_another_dtype_is_a_difference(sabotage: Any, dtype: torch.dtype) -> None:
    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(m, x).argmax(-1) if dtype == torch.int32 else plain(m, x)

    def wrong(graph: fx.Graph) -> None:
        after(graph, graph.output_node().args[0], aten.to.dtype, dtype)  # type: ignore[arg-type]

    sabotage(wrong)
    with pytest.raises(fxgrow.ExactnessError, match="changed its dtype"):
        receipt(f)


def test_branches_that_the_example_does_not_reach(sabotage: Any) -> None:
    """``where(x > 10, wrong, right)``: larger inputs reach it."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(m, x)
        return torch.where(x.sum(-1, keepdim=True) > 10, torch.tanh(y), y)

    def wrong(graph: fx.Graph) -> None:
        tanh = [n for n in graph.nodes if n.target == aten.tanh.default][-1]
        after(graph, tanh, aten.mul.Tensor, 1.5)

    assert receipt(f).unexercised == []
    sabotage(wrong)
    with pytest.raises(fxgrow.ExactnessError, match="differ by"):
        receipt(f)


def test_relu_that_the_example_does_not_open(sabotage: Any) -> None:
    """``relu(x - 10) * wrong``."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(m, x) + F.relu(x[:, :3] - 10) * torch.sigmoid(plain(m, x))

    sabotage(lambda g: after(g, the(g, aten.sigmoid.default), aten.mul.Tensor, 1.5) and None)
    with pytest.raises(fxgrow.ExactnessError, match="differ by"):
        receipt(f)


def test_what_nothing_reaches_is_named() -> None:
    """No input gets beyond 1e9: the receipt says where, in the user's own line."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(m, x)
        y = y + F.relu(torch.tanh(y) - 2)
        return torch.where(y > 1e9, torch.sin(y), y)

    found = receipt(f)
    assert len(found.unexercised) == 2
    assert "relu at" in found.unexercised[0] and "test_verify.py" in found.unexercised[0]
    assert "where at" in found.unexercised[1] and "condition was False everywhere" in found.unexercised[1]
    assert "2 places not exercised" in found.summary()


@pytest.mark.parametrize("kind", ["buffer", "parameter", "projection"])
def test_gates_at_zero_are_opened(sabotage: Any, kind: str) -> None:
    """A gate or a last projection at 0 hides what lies behind it until training opens it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out, self.side = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
            trained(self)
            if kind == "buffer":
                self.register_buffer("gate", torch.zeros(3))
            elif kind == "parameter":
                self.gate = nn.Parameter(torch.zeros(3))
            else:
                self.gate = nn.Linear(3, 3, bias=False)
                nn.init.zeros_(self.gate.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.up(x))
            side = torch.sigmoid(self.side(h))
            return self.out(h) + (self.gate(side) if kind == "projection" else self.gate * side)

    def grow() -> Receipt:
        torch.manual_seed(0)
        return fxgrow.grow(Gated().double(), {"op": "widen", "axis": "up.weight:0", "factor": 2}, (example(),)).receipt

    assert grow().unexercised == []
    sabotage(lambda g: after(g, the(g, aten.sigmoid.default), aten.mul.Tensor, 1.5) and None)
    with pytest.raises(fxgrow.ExactnessError, match="differ by"):
        grow()


def test_sizes_that_the_example_lacks(sabotage: Any) -> None:
    """A size that became a literal: right for the example's length alone."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.out(torch.tanh(m.up(x)).sum(1) / x.shape[1])

    def wrong(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if str(n.target).startswith("aten.div"))
        node.args = (node.args[0], 6)

    x = example(4, 6, 5)
    assert receipt(f, x).error_float64 is not None
    sabotage(wrong)
    with pytest.raises(fxgrow.ExactnessError, match="differ by"):
        receipt(f, x)


def test_indices_over_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example uses three rows of fifty; an error in the last one is found."""
    model = small_gpt()
    x = torch.randint(3, (3, 7))
    materialise = fxgrow.growth.materialise_all

    def wrong(*args: Any, **kwargs: Any) -> Any:
        for name, t in materialise(*args, **kwargs):
            yield name, (t.clone().index_fill_(0, torch.tensor([49]), 3.0) if name == "transformer.wte.weight" else t)

    spec = [{"op": "widen", "axis": "*/hidden", "factor": 2}]
    assert fxgrow.grow(model, spec, (x,)).receipt.error_native is not None
    monkeypatch.setattr(fxgrow.growth, "materialise_all", wrong)
    with pytest.raises(fxgrow.ExactnessError, match="in its own dtype"):
        fxgrow.grow(model, spec, (x,))


def ema(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.tanh(m.up(x))
    out = m.out(h + m.mean)
    m.mean.copy_((0.9 * m.mean + 0.1 * h.mean(0)).detach())
    return out


def test_state_is_compared_over_several_calls(sabotage: Any) -> None:
    """What the forward writes is wrong from the first call on; its first output is right."""
    buffers = {"mean": torch.zeros(8, dtype=torch.float64)}
    found = receipt(ema, buffers=dict(buffers))
    assert found.error_state is not None and found.error_state <= 1e-12

    def wrong(graph: fx.Graph) -> None:
        copy = the(graph, aten.copy_.default)
        with graph.inserting_before(copy):
            other = graph.call_function(aten.mul.Tensor, (copy.args[1], 1.5))
        other.meta = dict(copy.args[1].meta)  # type: ignore[union-attr]
        copy.args = (copy.args[0], other, *copy.args[2:])

    sabotage(wrong)
    with pytest.raises(fxgrow.ExactnessError, match="writes into its buffers differs"):
        receipt(ema, buffers=dict(buffers))
    spec = {"op": "widen", "axis": "up.weight:0", "factor": 2}
    with pytest.raises(fxgrow.ExactnessError, match=r"writes into its buffers differs by .* in its own dtype"):
        fxgrow.grow(trained(M(ema, **buffers)).double(), spec, (example(),), verify="native")


def normed(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.batch_norm(torch.tanh(m.up(x)), m.mean, m.spread, training=m.training)
    return m.out(h)


@pytest.mark.parametrize(("f", "followed"), [(ema, True), (normed, False)])
def test_calls_in_a_row_where_one_leaves_something_for_the_next(
    f: Callable[..., Any], followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch norm in eval mode writes nothing: with the model's own weights the example is enough."""
    run, seen = Side.run, []

    def watched(self: Side, rounds: Any, training: bool, **how: Any) -> Results:
        seen.append([trial.words == "example" for trials in rounds for trial in trials.values()])
        return run(self, rounds, training, **how)

    monkeypatch.setattr(Side, "run", watched)
    buffers = {"mean": torch.zeros(8, dtype=torch.float64), "spread": torch.ones(8, dtype=torch.float64)}
    found = receipt(f, buffers=buffers)
    assert found.error_state is not None and found.error_state <= 1e-12
    assert ([True, False] in seen) == followed and [True] in seen
    assert [False, False] in seen, "with other weights, calls follow each other either way"


def test_the_original_is_left_as_it_was() -> None:
    """Verification calls it, several times and in train mode: neither its buffers nor its modes change."""
    model = trained(M(lambda m, x: ema(m, m.norm(x)), mean=torch.zeros(8))).double()
    model.norm = nn.BatchNorm1d(5).double()
    model.norm.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (example(),))
    assert model.training and not model.norm.training
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_large_models_have_limits(sabotage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what float64 holds, the graph is streamed through it, and the own dtype has a limit of its own."""
    monkeypatch.setattr(fxgrow.growth, "AUTO_FLOAT64_PARAMETERS", 10)
    found = receipt(plain, dtype=torch.float32)
    assert found.measured == "streamed" and found.gradient_error is None
    assert found.error_float64 is not None and found.error_float64 <= 1e-12
    assert found.error_native is not None and found.error_native <= found.limits["native"] < 1e-4
    sabotage(lambda g: after(g, the(g, aten.tanh.default), aten.mul.Tensor, 1.001) and None)
    with pytest.raises(fxgrow.ExactnessError, match=r"in its own dtype.*in float64"):
        receipt(plain, dtype=torch.float32)
    with pytest.raises(fxgrow.ExactnessError, match="in its own dtype"):
        fxgrow.grow(
            trained(M(plain)),
            {"op": "widen", "axis": "up.weight:0", "factor": 2},
            (example().float(),),
            verify="native",
        )


# no false alarms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_without_eps(dtype: torch.dtype) -> None:
    """The op's own eps depends on dtype; float64 holds it at that of the model."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.out(F.rms_norm(m.up(x) * 1e-3, (m.up.out_features,)))

    found = receipt(f, dtype=dtype, to=12)
    assert found.error_float64 is not None and found.error_float64 <= 1e-12


def test_rounding_that_the_model_amplifies() -> None:
    """A difference of nearly equal numbers is mostly rounding: how much is measured, not guessed."""

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(m, x)
        return torch.cat([y, ((y + 1e9) - 1e9 - y) * 1e3], -1)

    found = receipt(f)
    assert found.error_float64 is not None and found.error_float64 <= 1e-10
    assert found.amplification is not None and found.amplification > 100


def test_amplified_rounding_hides_no_error(sabotage: Any) -> None:
    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = plain(m, x)
        return ((y + 1e6) - 1e6) * 1e3

    sabotage(lambda g: after(g, the(g, aten.tanh.default), aten.mul.Tensor, 1.0001) and None)
    with pytest.raises(fxgrow.ExactnessError, match="differ by"):
        receipt(f)


# what it says ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dropout", "attention", "lstm"])
def test_dropout_is_named_wherever_it_is(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
            if kind == "lstm":
                self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "lstm":
                x = self.rnn(x)[0]
            if kind == "attention":
                x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0)
            h = torch.tanh(self.up(x))
            return self.out(F.dropout(h, 0.1, self.training) if kind == "dropout" else h)

    found = fxgrow.grow(
        Net().double(), {"op": "widen", "axis": "up.weight:0", "factor": 2}, (example(2, 3, 4),)
    ).receipt
    (note,) = [n for n in found.notes if "dropout" in n]
    assert "not distributed like" in note and "the mean moves" in note
    assert found.error_float64_train is not None and found.error_float64_train <= 1e-12


def test_what_was_not_measured_says_why() -> None:
    model, spec, x = M(plain).double(), {"op": "widen", "axis": "up.weight:0", "factor": 2}, (example(),)
    off = fxgrow.grow(model, spec, x, verify=False).receipt
    assert off.measured == "nothing" and "switched off" in off.notes[0]
    with torch.device("meta"):
        shapes = M(plain).double()
        seen = torch.empty(4, 5, dtype=torch.float64)
    meta = fxgrow.grow(shapes, spec, (seen,)).receipt
    assert meta.measured == "nothing" and "meta" in meta.notes[0]
    consumed = fxgrow.grow(model, spec, x, consume=True).receipt
    assert consumed.measured == "nothing" and "consume" in consumed.notes[0]


def test_casts_inside_are_named() -> None:
    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.out(torch.tanh(m.up(x)).to(torch.bfloat16).float())

    found = receipt(f, dtype=torch.float32)
    assert any("casts to bfloat16" in n for n in found.notes)
    assert found.limits["native"] > 1e-2


def test_a_receipt_prints_and_round_trips() -> None:
    found = receipt(plain)
    assert Receipt.model_validate_json(found.model_dump_json()) == found
    assert len(found.inputs) == 2 and "times 1, 100, -100, 0.01" in found.inputs[0]
    assert found.limits == {"native": 1e-10, "float64": 1e-10, "gradients": 1e-7}
    assert "in float64" in found.summary()


def test_activation_checkpointing_is_named() -> None:
    from torch.utils.checkpoint import checkpoint

    def f(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.out(torch.tanh(x))

    class Net(M):
        def forward(self, x: torch.Tensor) -> Any:
            return self.f(self, checkpoint(self.up, x, use_reentrant=False))

    spec = {"op": "widen", "axis": "up.weight:0", "factor": 2}
    notes = fxgrow.grow(Net(f).double(), spec, (example(),), verify=False).receipt.notes
    assert any("activation checkpointing is traced away" in n for n in notes)
    assert not any("checkpointing" in n for n in receipt(plain).notes)
