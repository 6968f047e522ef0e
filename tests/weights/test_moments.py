"""The table of optimizers' state: it knows what every optimizer of torch keeps, and takes what users say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import fxgrow
from fxgrow.optim import KINDS, MOMENTS, Moment, moment_of, register_state

#: of torch.optim, what makes one that keeps all it can
FULL: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9},
}
OPTIMIZERS = sorted(
    n
    for n in dir(optim)
    if isinstance(c := getattr(optim, n), type) and issubclass(c, optim.Optimizer) and c is not optim.Optimizer
)


@pytest.fixture(autouse=True)
def for_one_test() -> Iterator[None]:
    before = dict(MOMENTS)
    yield
    MOMENTS.clear()
    MOMENTS.update(before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_every_optimizer_of_torch_keeps_is_known(name: str) -> None:
    """A new one in torch shows here: say what its state is in the table, or why it cannot be carried."""
    if name == "LBFGS":
        pytest.skip("refused as a whole: it keeps a history of flattened gradients")
    model = nn.Linear(3, 4, bias=name != "Muon")
    optimizer = getattr(optim, name)(model.parameters(), **{"lr": 1e-3, **FULL.get(name, {})})
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p).to_sparse() if name == "SparseAdam" else torch.ones_like(p)
        optimizer.step()
    known = 0
    for p in model.parameters():
        state = optimizer.state[p]
        for key, value in state.items():
            if isinstance(value, Tensor):
                moment = moment_of(optimizer, key, state)
                assert moment is not None, f"{name} keeps {key!r}"
                assert moment.count or value.shape == moment.shape(p.shape), f"{key!r} has shape {tuple(value.shape)}"
                known += 1
    assert known


class Sub(optim.RMSprop):
    pass


class Own(optim.Optimizer):
    pass


def test_a_name_means_what_the_class_says() -> None:
    assert moment_of(optim.SGD, "momentum_buffer", {}) == KINDS["gradient"]
    assert moment_of(optim.RMSprop, "momentum_buffer", {}) == KINDS["update"]
    assert moment_of(Sub, "momentum_buffer", {}) == KINDS["update"]
    assert moment_of(Own, "momentum_buffer", {"square_avg": 0}) == KINDS["update"], "an RMSprop by another name"
    register_state("momentum_buffer", "gradient", Own)
    assert moment_of(Own, "momentum_buffer", {"square_avg": 0}) == KINDS["gradient"]
    assert moment_of(optim.SGD, "speed", {}) is None
    register_state("speed", (1, 1), averaged=0, seeded=True)
    assert moment_of(optim.SGD, "speed", {}) == Moment(1, 1, seeded=True, averaged=0)
    assert Moment(averaged=-1).shape(torch.Size([3, 4])) == (3, 1)
    assert Moment(averaged=-2).shape(torch.Size([2, 3, 4])) == (2, 1, 4)


def test_what_is_no_kind_is_refused() -> None:
    with pytest.raises(fxgrow.FxgrowError, match="unknown kind 'gradeint'; did you mean gradient"):
        register_state("speed", "gradeint")
    with pytest.raises(fxgrow.FxgrowError, match="not a class of optimizers"):
        register_state("speed", "gradient", nn.Linear)  # type: ignore[arg-type]
