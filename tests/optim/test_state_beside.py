"""State in other places than ``state[parameter]``, steps without hooks, and newcomers that cannot be stepped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import fxgrow
from fxgrow.errors import FxgrowError
from tests.optim.nets import HIDDEN, STREAM, VARIANTS, grown, sized, step

POLICIES = ["asymmetric", "copy", "exact", "reset"]


class Beside(optim.Optimizer):
    """Momentum, kept where ``keep`` says: the buffer of parameter number ``i``."""

    def __init__(self, params: Any, keep: Callable[..., torch.Tensor], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.keep, self.kept = keep, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    p.sub_(self.keep(self, group, i, p).mul_(0.9).add_(p.grad), alpha=group["lr"])


def of_state(o: Any, g: Any, i: int, p: Any) -> Any:
    return o.state[p] if p in o.state else o.state.setdefault(p, torch.zeros_like(p))


def flat(o: Any, g: Any, i: int, p: Any) -> Any:
    sizes = [q.numel() for q in g["params"]]
    return o.kept.setdefault("flat", torch.zeros(sum(sizes)).to(p)).split(sizes)[i].view(p.shape)


PLACES: dict[str, tuple[str, Callable[..., Any]]] = {
    "by number": (r"\.kept\[0\]", lambda o, g, i, p: o.kept.setdefault(i, torch.zeros_like(p))),
    "by id": (r"\.kept\[id", lambda o, g, i, p: o.kept.setdefault(id(p), torch.zeros_like(p))),
    "by shape": (r"\.kept\[", lambda o, g, i, p: o.kept.setdefault((i, p.shape), torch.zeros_like(p))),
    "flat": (r"\.kept\['flat'\]", flat),
    "group": (r"\['bufs'\]\[0\]", lambda o, g, i, p: g.setdefault("bufs", {}).setdefault(i, torch.zeros_like(p))),
    "state of all": (r"\.state\['all'\]", lambda o, g, i, p: o.state["all"].setdefault(i, torch.zeros_like(p))),
}


@pytest.mark.parametrize("name", PLACES)
def test_state_elsewhere_is_refused_with_the_place(name: str) -> None:
    """It would have the small model's sizes and order, or, by ``id``, be forgotten without a word."""
    where, keep = PLACES[name]
    model = sized()
    optimizer = Beside(model.parameters(), keep)
    for k in range(2):
        step(model, optimizer, k)
    growth = grown(model, HIDDEN, STREAM)
    groups, kept = [list(g["params"]) for g in optimizer.param_groups], copy.deepcopy(optimizer.kept)
    for policy in ("asymmetric", "copy", "reset"):
        with pytest.raises(FxgrowError, match=where):
            growth.carry_(optimizer, policy)
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert all(p is q for p, q in zip(before, group["params"], strict=True))
    assert str(kept) == str(optimizer.kept)


def test_state_that_is_no_dict_is_refused() -> None:
    model = sized()
    optimizer = Beside(model.parameters(), of_state)
    step(model, optimizer, 0)
    growth = grown(model, HIDDEN)
    with pytest.raises(FxgrowError, match="its state is a Tensor, not a dict"):
        growth.carry_(optimizer, "copy")
    growth.carry_(optimizer, "reset")
    step(growth.module, optimizer, 1)


def test_settings_are_no_state() -> None:
    """Numbers and vectors among a class's own attributes, though a bias may have as many entries."""
    model = sized()
    optimizer = VARIANTS["AdamW"](model.parameters())
    optimizer.table = torch.ones(3)  # type: ignore[attr-defined]
    optimizer.param_groups[0]["weights"] = torch.ones(8)
    growth = grown(model, HIDDEN)
    growth.carry_(optimizer)
    step(growth.module, optimizer, 0)


class Twice(optim.SGD):
    """One buffer for all parameters of a shape."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        held: dict[Any, torch.Tensor] = {}
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = held.setdefault(p.shape, torch.zeros_like(p)).add_(p.grad)


def test_one_tensor_as_the_state_of_several_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    optimizer = Twice(model.parameters(), lr=0.1)
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    growth = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), verify=False)
    with pytest.raises(FxgrowError, match="one tensor of shape"):
        growth.carry_(optimizer, "copy")


class Eager(optim.SGD):
    """Makes its state with itself, and counts on it; and has a hook on each parameter."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr=lr)
        self.calls = 0
        for p in self.param_groups[0]["params"]:
            self.state[p].update(step=0, exp_avg=torch.full_like(p, 1e-3))
            p.register_hook(self.seen)

    def seen(self, _: torch.Tensor) -> None:
        self.calls += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] += 1
            p.sub_(state["exp_avg"].mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("policy", ["reset", "copy", "asymmetric"])
def test_state_that_a_class_makes_with_itself_is_made_for_what_has_none(policy: str) -> None:
    model = deep()
    optimizer = Eager(model.parameters())
    step(model, optimizer, 0)
    growth = grown(model, DEEPEN)
    growth.carry_(optimizer, policy)
    fresh = growth.module.get_parameter("h.1.up.weight")
    assert float(optimizer.state[fresh]["exp_avg"].mean()) == pytest.approx(1e-3)
    assert optimizer.state[growth.module.get_parameter("emb.weight")]["step"] == (0 if policy == "reset" else 1)
    before = optimizer.calls
    step(growth.module, optimizer, 1)
    assert optimizer.state[fresh]["step"] == 1
    assert optimizer.calls == before, "hooks of stand-ins, not of the model's"


# steps without hooks --------------------------------------------------------------------------------------------------


def replaced(optimizer: Any) -> Callable[..., None]:
    def plain(closure: Any = None) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-1e-2)

    return plain


def around(optimizer: Any) -> Callable[..., Any]:
    own = optimizer.step
    return lambda *args: own(*args)


def test_a_step_of_ones_own_that_runs_no_hooks_is_refused_where_rates_are_left() -> None:
    for policy in POLICIES:
        model = sized()
        optimizer = VARIANTS["SGD"](model.parameters())
        step(model, optimizer, 0)
        optimizer.step = replaced(optimizer)  # type: ignore[method-assign]
        growth = grown(model, HIDDEN)
        if policy in ("copy", "reset"):
            growth.carry_(optimizer, policy)
            continue
        with pytest.raises(FxgrowError, match="runs no step hooks"):
            growth.carry_(optimizer, policy)
        assert optimizer.param_groups[0]["params"][0] is model.emb.weight


def test_a_step_around_the_classs_own_goes_on() -> None:
    model = sized()
    optimizer = VARIANTS["SGD"](model.parameters())
    twin = copy.deepcopy(model)
    other = VARIANTS["SGD"](twin.parameters())
    for k in range(2):
        assert step(model, optimizer, k) == step(twin, other, k)
    optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    optimizer.step = around(optimizer)  # type: ignore[method-assign]
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(optimizer, "exact")
    for k in range(2, 6):
        assert abs(step(growth.module, optimizer, k) - step(twin, other, k)) < 1e-12


# newcomers and options ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Without biases, so that all are matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(11, 6), nn.Linear(6, 3, bias=False)
        self.h = nn.ModuleList([Block(), Block()])

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.emb(i)
        for block in self.h:
            x = block(x)
        return self.out(x)  # type: ignore[no-any-return]


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().double()


DEEPEN = {"op": "deepen", "stack": "h", "factor": 2, "init": "zero"}
GATES = {**DEEPEN, "init": "gate"}


@pytest.mark.parametrize("policy", ["copy", "exact", "asymmetric"])
def test_new_blocks_under_a_fused_momentum(policy: str) -> None:
    """The fused kernel takes the momentum of all tensors, or of none: a new one's is zero, which is none."""
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        model = deep()
        optimizer = optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, **how)
        for k in range(2):
            step(model, optimizer, k)
        growth = grown(model, DEEPEN)
        growth.carry_(optimizer, policy, warmup=0)
        ends.append([step(growth.module, optimizer, k) for k in range(2, 6)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


def test_muon_takes_no_gates() -> None:
    model = deep()
    muon = optim.Muon(model.parameters(), lr=1e-3)
    growth = grown(model, GATES)
    for newcomers in (None, True, 0, muon):
        with pytest.raises(FxgrowError, match=r"alpha of shape \(\), and Muon steps matrices alone"):
            growth.carry_(muon, "reset", newcomers=newcomers)
    growth.carry_(muon, "reset", newcomers=False)
    step(growth.module, muon, 0)


def test_a_newcomer_unlike_all_that_is_there_is_asked_for() -> None:
    """Gates among matrices alone, of two optimizers: neither would have trained them."""
    model = deep()
    first = optim.SGD(model.h.parameters(), lr=1e-2)
    last = optim.SGD([model.emb.weight, model.out.weight], lr=1e-2)
    growth = grown(model, GATES)
    growth.carry_([first, last], "reset")
    names = {id(p): n for n, p in growth.module.named_parameters()}
    joined = {names[id(p)] for p in first.param_groups[0]["params"]}
    assert {n for n in names.values() if n.endswith("alpha")} <= joined


@pytest.mark.parametrize("newcomers", ["first", 1.5, [0], nn.Linear(1, 1)])
def test_newcomers_of_another_kind(newcomers: Any) -> None:
    model = deep()
    optimizer = VARIANTS["SGD"](model.parameters())
    with pytest.raises(FxgrowError, match="newcomers="):
        grown(model, GATES).carry_(optimizer, newcomers=newcomers)


def test_numbers_of_numpy_come_back() -> None:
    """``torch.load`` reads Python's numbers alone."""
    model = sized()
    optimizer = VARIANTS["AdamW"](model.parameters())
    step(model, optimizer, 0)
    growth = grown(model, HIDDEN)
    growth.carry_(optimizer, warmup=np.int64(5), peak=np.float32(1.25))
    step(growth.module, optimizer, 1)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True)["param_groups"][0]["fxgrow_steps"] == [1]


def test_rows_of_zero_in_a_waiting_sparse_gradient_stay_rows() -> None:
    """SparseAdam steps every row that is named, by its momentum."""
    model = sized(sparse=True)
    rest = [p for n, p in model.named_parameters() if n != "emb.weight"]
    twins = []
    for how in ("small", "grown"):
        own = copy.deepcopy(model)
        optimizers = [optim.SparseAdam([own.emb.weight], lr=1e-2), optim.SGD(list(own.parameters())[1:], lr=1e-2)]
        for k in range(3):
            step(own, optimizers, k)
        for one in optimizers:
            one.zero_grad()
        rows, values = torch.tensor([[1, 4]]), torch.zeros(2, 6, dtype=torch.float64)
        own.emb.weight.grad = torch.sparse_coo_tensor(rows, values, (11, 6), check_invariants=False)
        module: nn.Module = own
        if how == "grown":
            growth = grown(own, STREAM)
            growth.carry_(optimizers, "exact")
            module = growth.module
        for one in optimizers:
            one.step()
        twins.append([step(module, optimizers, k) for k in range(3, 6)])
    assert len(rest) == 6
    assert twins[0] == pytest.approx(twins[1], abs=1e-12)
