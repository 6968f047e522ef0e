"""The table of optimizers' state: it knows what every optimizer of torch keeps, and takes what users say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import fxgrow
from fxgrow.optim import (
    KINDS,
    MOMENTS,
    Moment,
    moment_of,
    register_elementwise,
    register_state,
    register_tiled,
)

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


# what is not one number for each entry --------------------------------------------------------------------------------


class Keeps(optim.Optimizer):
    """Keeps one thing."""

    def __init__(self, params: Any, value: Any, key: str = "kept") -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p][key] = value(p)

    def step(self, closure: Any = None) -> None: ...


def carried(value: Any, key: str, policy: str, **options: Any) -> Any:
    """The state of the widened weight of 3 rows and 2 columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = Keeps(model.parameters(), value, key)
    growth = fxgrow.grow(
        model,
        {"op": "widen", "axis": "./hidden", "factor": 2},
        (torch.zeros(2, 2, dtype=torch.float64),),
        verify=False,
    )
    growth.carry_(optimizer, policy, **options)
    return optimizer.state[growth.module.get_parameter("0.weight")][key]


@pytest.mark.parametrize("value", [0.7, torch.tensor(0.7), torch.tensor([0.7])])
@pytest.mark.parametrize("key", ["exp_avg_sq", "norm"])
def test_a_number_that_may_depend_on_gradients_is_asked_for(value: Any, key: str) -> None:
    """NovoGrad's squared norm: that of the grown gradient is another one."""
    for policy in ("copy", "asymmetric"):
        with pytest.raises(fxgrow.FxgrowError, match=f"{key!r} is one number"):
            carried(lambda _: value, key, policy)
    register_state(key, "count", Keeps)
    assert float(carried(lambda _: value, key, "copy")) == pytest.approx(0.7)


@pytest.mark.parametrize("value", [7, 7.0, True, "words", None, torch.tensor(7.0), torch.tensor(7), float("inf")])
def test_counts_and_words_need_no_name(value: Any) -> None:
    assert carried(lambda _: value, "calls", "copy") in (value, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("rows", [False, True])
def test_counts_of_entries_and_rows(dtype: torch.dtype, rows: bool) -> None:
    def counts(p: Tensor) -> Tensor:
        own = torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1))
        return (own if rows else own.expand_as(p)).clone().to(dtype)

    with pytest.raises(fxgrow.FxgrowError, match="a count of entries or rows grows with them"):
        carried(counts, "step", "copy")
    if rows:
        return  # of a bias, a row is an entry
    register_state("step", (0, 0), Keeps)
    found = carried(counts, "step", "copy")
    assert found.dtype == dtype
    assert found.tolist() == [[float(i), float(i)] for i in (0, 1, 2, 0, 1, 2)]
    assert carried(counts, "step", "asymmetric").tolist()[3:] == [[0, 0]] * 3, "new entries have taken no step"


WRONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "no kind": (None, {}),
    "a number": (1, {}),
    "words": (("a", "b"), {}),
    "three": ((1, 2, 3), {}),
    "one": ((1,), {}),
    "no number": ((float("nan"), 1), {}),
    "no dim": ("square", {"averaged": "last"}),
    "half a dim": ("square", {"averaged": 1.5}),
    "seeds": ("square", {"seeded": "no"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_registered_is_looked_at(name: str) -> None:
    kind, options = WRONG[name]
    with pytest.raises(fxgrow.FxgrowError, match=r"register_state\('odd'\)"):
        register_state("odd", kind, **options)
    assert moment_of(optim.SGD, "odd", {}) is None


def test_classes_alone_are_registered() -> None:
    for register in (register_elementwise, register_tiled):
        for wrong in ("SGD", nn.Linear, optim.SGD(nn.Linear(1, 1).parameters())):
            with pytest.raises(fxgrow.FxgrowError, match="is not a class of optimizers"):
                register(wrong)  # type: ignore[arg-type]
