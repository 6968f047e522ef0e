"""Distances, losses between two tensors, tables and weights that are held at a norm: exact or refused, by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sound import ADDED, DOUBLE, FACTOR_3, Odd, check_exact, check_refused, r
from torch import Tensor, nn

from fxgrow import GrowthRefused, grow
from tests.models import trained


def pair(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(s.up(x)), torch.tanh(s.up(x.flip(0)))


@pytest.mark.parametrize("operation", [DOUBLE, FACTOR_3])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, 0.5, float("inf")])
def test_distances_of_rows_grow_by_copies(order: float, operation: dict[str, Any]) -> None:
    check_exact(Odd(lambda s, x: F.pairwise_distance(*pair(s, x), p=order, keepdim=True)), operation)
    check_exact(Odd(lambda s, x: F.pairwise_distance(s.w[0], torch.tanh(s.up(x)), p=order)), operation)
    check_exact(Odd(lambda s, x: F.pdist(torch.tanh(s.up(x)), p=order)), operation, "up.weight:0", 6, 5)


def test_distances_that_add_eps_to_every_entry_take_no_new_ones() -> None:
    check_refused(Odd(lambda s, x: F.pairwise_distance(*pair(s, x))), ADDED, "adds eps to every difference")
    check_refused(Odd(lambda s, x: F.pairwise_distance(*pair(s, x), eps=0.0)), ADDED, "both would be zero")
    check_exact(Odd(lambda s, x: F.triplet_margin_with_distance_loss(*pair(s, x), torch.sin(s.up(x)))), DOUBLE)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": lambda a, b, **how: F.smooth_l1_loss(a, b, beta=0.3, **how),
    "huber": lambda a, b, **how: F.huber_loss(a, b, delta=0.3, **how),
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "bce": lambda a, b, **how: F.binary_cross_entropy(a.sigmoid(), b.sigmoid(), **how),
    "bce with logits": lambda a, b, **how: F.binary_cross_entropy_with_logits(a, b.sigmoid(), **how),
    "kl": lambda a, b, **how: F.kl_div(a, b.exp(), **how),
    "poisson": lambda a, b, **how: F.poisson_nll_loss(a, b.exp(), full=True, **how),
    "soft margin": lambda a, b, **how: F.soft_margin_loss(a, b.detach(), **how),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [*LOSSES, *OTHERS])
def test_losses_over_copies(loss: str, reduction: str) -> None:
    def f(s: Any, x: Tensor) -> Tensor:
        value = (LOSSES | OTHERS)[loss](*pair(s, x), reduction=reduction)
        return value.mean(-1) if reduction == "none" else value

    for operation in (DOUBLE, FACTOR_3):
        model = Odd(f)
        grown = check_exact(model, operation)
        for module in (model, grown):
            module(r(6, 5)).sum().backward()
        small, large = model.up.weight.grad, grown.get_parameter("up.weight").grad
        assert small is not None and large is not None
        n = operation["factor"]
        torch.testing.assert_close(large.view(n, 8, 5).sum(0), small, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_take_no_new_units(reduction: str) -> None:
    """Zeros in both tensors would add nothing, and get no gradient ever."""
    for loss in LOSSES.values():
        model = Odd(lambda s, x, loss=loss: loss(*pair(s, x), reduction=reduction))
        check_refused(model, ADDED, "both would be zero")
        check_refused(model, {"to": 12}, "both would be zero")
    for loss in OTHERS.values():
        check_refused(
            Odd(lambda s, x, loss=loss: loss(*pair(s, x), reduction=reduction)), ADDED, "the loss runs over it"
        )
    # a target that does not vary along the axis is no zero
    fixed = Odd(lambda s, x: F.mse_loss(torch.tanh(s.up(x)), torch.ones(8, dtype=x.dtype), reduction=reduction))
    check_refused(fixed, ADDED, "loss|operand")
    check_exact(fixed, DOUBLE)


class Table(nn.Module):
    """Numbers looked up in a table."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = table, nn.Linear(8, 3)
        trained(self.double())
        with torch.no_grad():
            self.table.weight.mul_(3)  # type: ignore[operator, union-attr]

    def forward(self, i: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(i)))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("operation", [{"op": "widen", "axis": "table.weight:1", **ADDED}, {"op": "extend", "by": 3}])
def test_a_table_held_at_a_norm(operation: dict[str, Any]) -> None:
    """A look-up shortens rows of the table itself: compared over several calls, with the table that they leave."""
    model = Table(nn.Embedding(7, 8, max_norm=1.5))
    growth = grow(model, [{"axis": "table.weight:0", **operation}], (numbers(0, 3, 2),), verify=False)
    for seed in (1, 2, 1):
        i = numbers(seed, 4, 3)
        torch.testing.assert_close(growth.module(i), model(i), rtol=0, atol=1e-12)
        table = growth.module.get_parameter("table.weight")
        torch.testing.assert_close(table[:7, :8], model.table.weight, rtol=0, atol=1e-14)  # type: ignore[union-attr]
    with pytest.raises(GrowthRefused, match="divides by the norm plus 1e-7"):
        grow(model, {"op": "widen", "axis": "table.weight:1", "factor": 2}, (numbers(0, 3, 2),), verify=False)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    "operation",
    [
        {"op": "extend", "axis": "table.weight:0", "by": 3},
        {"op": "widen", "axis": "table.weight:1", "factor": 2},
        {"op": "widen", "axis": "table.weight:1", "by": 3},
    ],
)
def test_bags_of_rows(mode: str, operation: dict[str, Any]) -> None:
    model = Table(nn.EmbeddingBag(7, 8, mode=mode, padding_idx=-2))
    growth = grow(model, operation, (numbers(0, 3, 4),), verify=False)
    for seed in (1, 2):
        i = numbers(seed, 5, 6)
        torch.testing.assert_close(growth.module(i), model(i), rtol=0, atol=1e-12)
    if operation["op"] == "extend":
        assert growth.module(torch.tensor([[9, 8, 1]])).shape == (1, 3)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("factor", [2, 3])
def test_spectral_norm(norm: Callable[[nn.Module], nn.Module], factor: int) -> None:
    """Eval mode, then training: every call takes a step of the power iteration and leaves its vectors in buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(5, 8)), nn.Tanh(), norm(nn.Linear(8, 3))).double()
    for axis in ("2.weight:1", "2.weight_orig:1", "2.parametrizations.weight.original:1"):
        try:
            module = grow(model, {"op": "widen", "axis": axis, "factor": factor}, (r(4, 5),), verify=False).module
            break
        except Exception as error:
            refused = error
    else:
        raise refused
    other = copy.deepcopy(model)
    for training in (False, True, True, False):
        module.train(training)
        other.train(training)
        x = r(6, 5, seed=3)
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-11)
        if training:
            module(x).square().sum().backward()
            other(x).square().sum().backward()


def test_group_norm_of_one_group() -> None:
    """Without positions it is layer norm; with them the statistic is over both, and no new channel can be neutral."""
    flat = Odd(lambda s, x: s.out(s.norm(s.up(x))), norm=nn.GroupNorm(1, 8, eps=1e-2))
    for operation in (DOUBLE, {"to": 12}, {"by": 9}):
        check_exact(flat, operation)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    check_exact(trained(conv.double()), DOUBLE, "0.weight:0", 2, 3, 7, 6)
    with pytest.raises(GrowthRefused, match="channels and positions together"):
        grow(conv, {"op": "widen", "axis": "0.weight:0", "by": 4, "fill": "add"}, (r(2, 3, 7, 6),))
    # the reason, in numbers: channels that hold the mean at each position change the variance by no fixed factor
    ratios = []
    for seed in range(2):
        x = r(1, 8, 5, seed=seed)
        padded = torch.cat([x, x.mean(1, keepdim=True).expand(-1, 4, -1)], 1)
        ratios.append(float(padded.var(unbiased=False) / x.var(unbiased=False)))
    assert abs(ratios[0] - ratios[1]) > 1e-3


@pytest.mark.parametrize("how", [{"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("axis", ["attention/heads", "attention/head_dim", "./residual"])
def test_attention_to_an_added_zero(how: dict[str, Any], axis: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **how)
            trained(self.double())

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.out(h + self.attention(h, h, h, need_weights=False)[0])

    model = Attends()
    module = grow(model, {"op": "widen", "axis": axis, "factor": 2}, (r(2, 4, 5),), verify=False).module
    for shape in ((3, 6, 5), (1, 2, 5)):
        torch.testing.assert_close(module(r(*shape)), model(r(*shape)), rtol=0, atol=1e-12)


def test_entries_put_back_where_they_were_pooled_from() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.pool, self.back = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
            trained(self.double())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.back(*self.pool(torch.tanh(self.a(x)))))

    for operation in (DOUBLE, ADDED, {"by": 3}):
        check_exact(Net(), operation, "a.weight:0", 2, 3, 6, 6)


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: s.out(torch.float_power(s.up(x), 2)),
        lambda s, x: s.out(torch.polygamma(1, s.up(x).exp())),
        lambda s, x: s.out(torch.special.gammainc(s.up(x).exp(), s.up(x.flip(0)).exp())),
        lambda s, x: s.out(torch.ldexp(s.up(x), s.up(x.flip(0)))),
        lambda s, x: s.out(s.up(x).slice_scatter(x[:2] @ s.w[:, :].t()[:5].contiguous().new_ones(5, 8), 0, 1, 3)),
    ],
)
def test_rarer_pointwise_ops_grow_by_copies(f: Callable[[Any, Tensor], Tensor]) -> None:
    check_exact(Odd(f), DOUBLE)
