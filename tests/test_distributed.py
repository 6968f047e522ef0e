"""Growing models that ``DistributedDataParallel`` holds: one launch of two ranks, against one process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import fxgrow
from fxgrow.ranks import gathered
from tests.processes import run_ranks, said

HIDDEN = {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.1}}
DEEPER = {"op": "deepen", "stack": "blocks", "by": 1}
TOKENS = {"op": "extend", "axis": "emb/vocab", "by": 3, "preserve": "approximate"}
WORDS = 11


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)
        self.blocks = nn.ModuleList(Block(6, hidden) for _ in range(2))
        self.unused = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.emb(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(number: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    x, y = torch.randint(0, WORDS, (2, 4, 5), generator=draw)
    return x[rank::ranks], y[rank::ranks]


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten())


X = (batch(0)[0],)


class Trained:
    """A net in training, on one rank or on several."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, rank: int = 0, ranks: int = 1) -> None:
        self.net, self.rank, self.ranks = net(), rank, ranks
        self.model = wrap(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.number = 0

    def steps(self, count: int, parts: int = 1) -> list[float]:
        """Losses after so many steps, on one batch."""
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            for part in range(parts):
                last = part == parts - 1 or self.ranks == 1
                with nullcontext() if last else self.model.no_sync():  # type: ignore[operator]
                    data = batch(self.number * 10 + part, self.rank, self.ranks)
                    (loss_of(self.model, data) / parts).backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            self.optimizer.step()
            self.number += 1
            losses.append(loss_of(self.net, batch(999)).item())
        return losses

    def grow(self, *spec: Any, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Everything that a growth carries over, right after it."""
        model = self.model if model is None else model
        growth = fxgrow.grow(model, list(spec), X, verify=False)
        with growth.applied(model):
            growth.carry_(self.optimizer)
        return self.held()

    def held(self) -> dict[str, Tensor]:
        found = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        for n, p in self.net.named_parameters():
            found |= {f"{n} {k}": v.clone() for k, v in self.optimizer.state.get(p, {}).items()}
            if p.grad is not None:
                found[f"{n} grad"] = p.grad.clone()
        return found


def trajectory(trained: Trained) -> list[Any]:
    """Losses around two growths, and what is held after each: width with noise and depth; tokens and width."""
    first = trained.steps(3)
    grown = trained.grow(HIDDEN, DEEPER)
    second = trained.steps(3)
    again = trained.grow(TOKENS, HIDDEN)
    return [*first, grown, *second, again, *trained.steps(20)]


def in_parts(trained: Trained) -> list[Any]:
    """The same with gradients accumulated, and one growth."""
    return [*trained.steps(3, 2), trained.grow(HIDDEN, DEEPER), *trained.steps(3, 2)]


@functools.cache
def one_process(run: Callable[[Trained], list[Any]]) -> list[Any]:
    return run(Trained())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static": {"static_graph": True, "forward_sync_buffers": False},
}
OTHERS: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4, "find_unused_parameters": True}


def together(rank: int) -> dict[str, Any]:
    """All that two ranks are asked."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        found[name] = trajectory(Trained(lambda m, o=options: DDP(m, **o), rank, 2))
    found["parts"] = in_parts(Trained(lambda m: DDP(m, **OTHERS), rank, 2))
    compiled = Trained(lambda m: torch.compile(DDP(m), backend="eager"), rank, 2)
    found["compiled"] = [*compiled.steps(2), compiled.grow(HIDDEN), *compiled.steps(3)]
    found["inside"] = inside(rank)
    found["waiting"] = waiting(Trained(DDP, rank, 2))
    found["undone"] = undone(Trained(DDP, rank, 2), found)
    options_and_hooks(rank, found)
    schedules(rank, found)
    return found


def inside(rank: int) -> list[Any]:
    """The model inside is passed, as trainers do that keep the DDP to themselves; then gradients go on together."""
    trained = Trained(DDP, rank, 2)
    return [*trained.steps(2), trained.grow(HIDDEN, model=trained.net), *trained.steps(3)]


def waiting(trained: Trained) -> list[Any]:
    """A growth with gradients of one half of the step waiting, which no other rank has seen."""
    trained.steps(2)
    trained.optimizer.zero_grad()
    with trained.model.no_sync() if trained.ranks > 1 else nullcontext():  # type: ignore[operator]
        loss_of(trained.model, batch(50, trained.rank, trained.ranks)).backward()
    trained.grow(HIDDEN, DEEPER)
    loss_of(trained.model, batch(51, trained.rank, trained.ranks)).backward()
    trained.optimizer.step()
    return [trained.held(), *trained.steps(3)]


def undone(trained: Trained, found: dict[str, Any]) -> list[float]:
    """Refusals, on one rank and on all: nothing is changed, and the run goes on with its gradients averaged."""
    rank, model, optimizer = trained.rank, trained.model, trained.optimizer
    losses, before = trained.steps(2), list(trained.net.parameters())
    growth = fxgrow.grow(model, [HIDDEN, DEEPER], X, verify=False)
    wide = {**HIDDEN, "factor": 2 + rank}
    found["spec"] = said(lambda: fxgrow.grow(model, wide, X, verify=False))
    found["all"] = said(lambda: fxgrow.grow(model, {**HIDDEN, "axis": "*/nonsense"}, X))
    found["example"] = said(lambda: fxgrow.grow(model, HIDDEN, X if rank else (X[0].double(),), verify=False))

    def carried(policy: str = "asymmetric") -> None:
        with growth.applied(model):
            growth.carry_(optimizer, policy)

    found["policy"] = said(lambda: carried("copy" if rank else "exact"))
    if rank:
        optimizer.extra = list(optimizer.param_groups[0]["params"])  # type: ignore[attr-defined]
    found["optimizer"] = said(carried)
    vars(optimizer).pop("extra", None)
    with torch.no_grad():
        trained.net.head.bias[0] += 1e-9 * rank
        found["weights"] = said(lambda: fxgrow.grow(model, HIDDEN, X, verify=False))
        dist.broadcast(trained.net.head.bias.data, 0)
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(before, trained.net.parameters(), strict=True))
    assert all(a is b for a, b in zip(before, held, strict=True))
    return losses + trained.steps(4)


def options_and_hooks(rank: int, found: dict[str, Any]) -> None:
    """What goes along with the object that the loop holds, and what cannot."""
    seen: list[int] = []
    trained = Trained(DDP, rank, 2)
    model: Any = trained.model
    model.register_forward_hook(lambda *_: seen.append(1))
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    model.eval()
    trained.steps(1)
    trained.grow(HIDDEN)
    trained.steps(2)
    found["kept"] = [len(seen), model.training, model._get_ddp_logging_data()["comm_hook"], alike(trained)]

    names = ["blocks.1.up.weight", "head.bias"]
    ignoring = net()
    DDP._set_params_and_buffers_to_ignore_for_model(ignoring, names)
    ignored: Any = DDP(ignoring)
    fxgrow.grow(ignored, {**DEEPER, "by": None, "after": [0]}, X, verify=False).apply_(ignored)
    found["ignored"] = sorted(ignored.parameters_to_ignore)

    compressed = Trained(lambda m: DDP(m.float()), rank, 2)
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2)
    compressed.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)  # type: ignore[operator]
    compressed.steps(4)
    found["powerSGD"] = said(lambda: fxgrow.grow(compressed.model, HIDDEN, X))
    fused = net()
    delayed = DDP(
        fused, delay_all_reduce_named_params=[("head.bias", fused.head.bias)], param_to_hook_all_reduce=fused.emb.weight
    )
    found["delayed"] = said(lambda: fxgrow.grow(delayed, HIDDEN, X))

    def joined() -> None:
        with Join([model]):
            fxgrow.grow(model, HIDDEN, X)

    found["join"] = said(joined)

    two = [Trained(DDP, rank, 2), Trained(DDP, rank, 2)]
    for each in two:
        each.steps(1)
    two[0].grow(HIDDEN)
    found["two"] = [each.steps(2) and alike(each) for each in two]

    pre = nn.Sequential(nn.Linear(3, 3), DDP(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))))
    fxgrow.grow(pre, {"op": "widen", "axis": "*/hidden", "factor": 2}, (torch.randn(2, 3),)).apply_(pre)
    (pre(torch.full((2, 3), 1.0 + rank)) ** 2).mean().backward()
    found["held inside"] = len(set(gathered(float(pre.get_parameter("1.module.0.weight").grad.sum()))))  # type: ignore[union-attr]


def alike(trained: Trained) -> bool:
    """Whether all ranks hold the same bits."""
    own = {n: p.detach() for n, p in trained.net.named_parameters()}
    return all(all(torch.equal(other[n], p) for n, p in own.items()) for other in gathered(own))


def event(*operations: Any, **trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": list(operations)}


def schedules(rank: int, found: dict[str, Any]) -> None:
    """A schedule on ranks that train together."""
    trained = Trained(DDP, rank, 2)
    events = [
        event({"op": "freeze", "what": "blocks.0.*"}, step=1),
        event({"op": "unfreeze", "what": "blocks.0.*"}, step=2),
        event(HIDDEN, {"op": "freeze", "what": "old"}, plateau={"metric": "loss", "patience": 2}),
        event({"op": "unfreeze", "what": "old"}, step=8),
    ]
    scheduler = fxgrow.GrowthScheduler(events, X, verify=False)
    scheduler.check(trained.model, trained.optimizer)
    done, losses = [], []
    for step in range(10):
        report = {"loss": float(step if rank else -0.5 * step)}  # no plateau on the second rank
        while result := scheduler.step(trained.model, trained.optimizer, step=step, metrics=report):
            done.append((step, result.op))
        losses += trained.steps(1)
    found["schedule"] = [done, alike(trained)]

    def waits(trigger: dict[str, Any], **counts: Any) -> str:
        alone = fxgrow.GrowthScheduler([{"trigger": trigger, "operations": [HIDDEN], "on_error": "skip"}], X)
        return said(lambda: alone.step(trained.model, trained.optimizer, **counts))

    found["tokens"] = waits({"tokens": 100}, step=1, tokens=90 + 20 * rank)
    found["no tokens"] = waits({"tokens": 100}, step=1, tokens=None if rank else 90)
    found["step"] = waits({"step": 9}, step=1 + rank)
    skipped = fxgrow.GrowthScheduler([{**event({**HIDDEN, "axis": "no"}, step=0), "on_error": "skip"}], X)
    found["skipped"] = skipped.step(trained.model, step=0).error.partition(";")[0]  # type: ignore[union-attr]
    apart = fxgrow.GrowthScheduler([{**event({**HIDDEN, "factor": 2 + rank}, step=0), "on_error": "skip"}], X)
    found["apart"] = said(lambda: apart.step(trained.model, step=0))
    outside = fxgrow.GrowthScheduler([event(HIDDEN, step=0)], X, in_place=False, verify=False)
    result = outside.step(trained.model, trained.optimizer, step=0)
    assert result is not None
    trained.model, trained.optimizer, trained.net = result.module, result.optimizer, result.module.module  # type: ignore[assignment]
    found["outside"] = [type(result.module).__name__, trained.steps(2) and alike(trained)]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(2, together)


def same(a: Any, b: Any, close: float) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.allclose(v, b[k], rtol=0, atol=close) for k, v in a.items())
    return abs(a - b) <= close


@pytest.mark.parametrize("name", [*OPTIONS, "parts"])
def test_two_ranks_train_and_grow_as_one_process(found: list[dict[str, Any]], name: str) -> None:
    one = one_process(in_parts if name == "parts" else trajectory)
    assert all(same(a, b, 0) for a, b in zip(found[0][name], found[1][name], strict=True)), "bits differ between ranks"
    assert all(same(a, b, 1e-9) for a, b in zip(one, found[0][name], strict=True))


@pytest.mark.parametrize("name", ["compiled", "inside"])
def test_gradients_go_on_together(found: list[dict[str, Any]], name: str) -> None:
    trained = Trained()
    one = [*trained.steps(2), trained.grow(HIDDEN), *trained.steps(3)]
    for each in found:
        assert all(same(a, b, 1e-9) for a, b in zip(one, each[name], strict=True))


def test_gradients_that_wait_go_along(found: list[dict[str, Any]]) -> None:
    one = waiting(Trained())
    assert all(same(a, b, 1e-9) for a, b in zip(one[1:], found[0]["waiting"][1:], strict=True))
    assert found[0]["waiting"][1:] == found[1]["waiting"][1:]


def test_what_one_rank_cannot_do_none_does(found: list[dict[str, Any]]) -> None:
    one = Trained().steps(6)
    for each in found:
        assert each["undone"] == pytest.approx(one, abs=1e-9)
        assert each["all"].startswith("SpecError: no axis matches '*/nonsense'")
    for name, start in {
        "spec": "RankError: the spec is not the same on all ranks: rank 0 of 2 has {'version': 1, 'operations': [{'op'",
        "example": "RankError: the growth: rank 0 of 2 failed: Net itself raises with the example",
        "policy": "RankError: the optimizer's policy is not the same on all ranks: rank 0 of 2 has ('exact', {})",
        "optimizer": "RankError: carry_: rank 1 of 2 failed: AdamW keeps parameters of the model in `.extra[0]`",
        "weights": "RankError: the parameter head.bias is not the same on all ranks",
    }.items():
        assert found[0][name].startswith(start), found[0][name]
        assert found[1][name] == found[0][name]


def test_options_and_hooks_stay_or_are_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["kept"] == [3, False, "fp16_compress_hook", True]
        assert each["ignored"] == ["blocks.2.up.weight", "head.bias"]
        assert "communication hook powerSGD_hook keeps a tensor of shape" in each["powerSGD"]
        assert "delay_all_reduce_named_params" in each["delayed"]
        assert "inside of torch.distributed.algorithms.Join" in each["join"]
        assert each["two"] == [True, True]
        assert each["held inside"] == 1


def test_a_schedule_happens_on_all_ranks_or_on_none(found: list[dict[str, Any]]) -> None:
    ops = [(1, "freeze"), (2, "unfreeze"), (5, "grow"), (5, "freeze"), (8, "unfreeze")]
    for each in found:
        assert each["schedule"] == [ops, True]
        assert each["tokens"].startswith("RankError: events.0: so many tokens are completed on ranks [1], and not on")
        assert each["no tokens"].startswith("RankError: events.0 at step 1: rank 1 of 2 failed: events.0 waits for")
        assert each["step"] == (
            "RankError: the ranks do not do the same: rank 0 of 2 is at events.0 at step 1; rank 1 of 2 is at events.0 "
            "at step 2"
        )
        assert each["skipped"] == "no axis matches 'no'"
        assert each["apart"].startswith("RankError: the schedule's action is not the same on all ranks")
        assert each["outside"] == ["DistributedDataParallel", True]
