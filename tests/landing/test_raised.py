"""Sizes that a forward holds its inputs against, else it raises: no graph has the number, and the class has to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained

D = torch.float64


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.inner = 6, 8
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.width, "another width"
        h = self.up(x).tanh()
        self.check(h)
        return x + self.down(h)

    def check(self, h: Tensor) -> None:
        if h.dim() != 2 or h.shape[-1] != self.inner:
            raise ValueError(f"{self.inner} are wanted")


class Strict(nn.Module):
    """Three conditions, of which each hides the next; the model's attributes hold other numbers as well."""

    def __init__(self, known: int | None = None) -> None:
        super().__init__()
        self.d_model, self.known, self.other = 6, known, 6
        self.first, self.part, self.last = nn.Linear(5, 6), Part(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.size(-1) != self.d_model:
            raise RuntimeError("the last size has to be d_model")
        if self.known is not None and x.size(-1) != _KNOWN:
            raise RuntimeError("it is known to be another")
        return self.last(self.part(x))


_KNOWN = 6


@pytest.mark.parametrize("axes", [["./residual"], ["part/hidden"], ["./residual", "part/hidden"]])
def test_conditions_are_held(axes: list[str]) -> None:
    torch.manual_seed(0)
    model, x = trained(Strict().to(D)), torch.randn(4, 5, dtype=D)
    before = copy.deepcopy(model)
    growth = fxgrow.grow(model, [{"op": "widen", "axis": a, "factor": 2} for a in axes], (x,))
    growth.apply_(model)
    grown = "./residual" in axes, "part/hidden" in axes
    assert (model.d_model, model.part.width) == ((12, 12) if grown[0] else (6, 6))
    assert (model.part.inner, model.other) == (16 if grown[1] else 8, 6)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)


def test_a_condition_on_a_number_of_no_attribute_is_refused() -> None:
    torch.manual_seed(0)
    model, x = trained(Strict(known=1).to(D)), torch.randn(4, 5, dtype=D)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./residual", "factor": 2}, (x,))
    held = [(m, dict(vars(m))) for m in model.modules()]
    with pytest.raises(fxgrow.GrowthRefused, match="Strict itself raises"):
        growth.apply_(model)
    assert all(vars(m)[k] is v for m, own in held for k, v in own.items())
    model(x).sum().backward()


class Settings:
    def __init__(self) -> None:
        self.dim, self.lr = 6, 0.1


def _same(size: int, wanted: int) -> None:
    if size != wanted:
        raise ValueError(f"{size} is not {wanted}")


class Forms(nn.Module):
    """Conditions that read a config, a property, half of a size, and that stand in functions or behind other lines."""

    def __init__(this, form: str) -> None:
        super().__init__()
        this.form, this.config, this.sizes, this.half, this.width, this.other = form, Settings(), [6, 7], 3, 6, 6
        this.first, this.last = nn.Linear(5, 6), nn.Linear(6, 3)

    @property
    def size(this) -> int:
        return this.sizes[0]

    def forward(this, x: Tensor) -> Tensor:
        h = this.first(x)
        return this.last(getattr(this, this.form)(h).tanh())

    def settings(this, h: Tensor) -> Tensor:
        assert h.shape[-1] == this.config.dim
        return h

    def computed(this, h: Tensor) -> Tensor:
        assert h.shape[-1] == this.size
        return h

    def part(this, h: Tensor) -> Tensor:
        assert h.shape[-1] == 2 * this.half
        return h

    def checked(this, h: Tensor) -> Tensor:
        torch._check(h.shape[-1] == this.width)
        return h

    def function(this, h: Tensor) -> Tensor:
        _same(h.shape[-1], this.width)
        return h

    def behind(this, h: Tensor) -> Tensor:
        if h.shape[-1] == this.width:
            return h
        raise ValueError("another size")

    def again(this, h: Tensor) -> Tensor:
        try:
            _same(h.shape[-1], this.width)
        except ValueError:
            raise RuntimeError("another size")  # noqa: B904
        return h

    def local(this, h: Tensor) -> Tensor:
        width = this.width
        assert h.shape[-1] == width
        return h


@pytest.mark.parametrize("form", ["settings", "computed", "part", "checked", "function", "behind", "again", "local"])
def test_conditions_in_all_forms(form: str) -> None:
    torch.manual_seed(0)
    model, x = trained(Forms(form).to(D)), torch.randn(4, 5, dtype=D)
    before = copy.deepcopy(model)
    fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,), verify=False).apply_(model)
    held = {"settings": model.config.dim, "computed": model.sizes[0], "part": 2 * model.half}
    assert held.get(form, model.width) == 12
    assert (model.other, model.sizes[1]) == (6, 7)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)
