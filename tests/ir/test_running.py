"""A run in eval mode leaves the module and its inputs as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.ir.running import in_mode, plain_tensors, plain_tensors_kept, run_eval, run_with


class Writes(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.frozen.eval()

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
        return self.drop(self.frozen(x.add_(1))) + more["y"]


def test_run_eval() -> None:
    model, x, y = Writes(), torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    out = run_eval(model, [x], {"more": {"y": y}})
    assert not out.requires_grad and not x.any() and torch.allclose(out, torch.full((2, 3), 2.0), atol=1e-4)
    assert model.training and model.drop.training and not model.frozen.training


def test_in_mode_leaves_what_is_frozen() -> None:
    model = Writes()
    with in_mode(model, True):
        assert not model.frozen.training
    model.eval()
    with in_mode(model, True):
        assert model.frozen.training
    assert not any(m.training for m in model.modules())


class Twice(nn.Module):
    """A norm that stands under two names, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.again = nn.BatchNorm1d(4)
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x).flatten(0, 1))
        return self.again(self.b(h.relu())).view(x.shape)


def test_run_with_other_tensors_puts_back_what_stands_under_two_names() -> None:
    model, x = Twice(), torch.randn(2, 3, 4)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.clone() for n, t in own.items()}
    other = {n: t.detach().clone() for n, t in own.items()}
    other["a.weight"] = torch.zeros(4, 4)
    assert not run_with(model, other, (x,), {}).any(), "the tie is set, too"
    assert other["norm.num_batches_tracked"] == 2, "written by both"
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[n] is t and torch.equal(t, before[n]) for n, t in own.items())


def test_capture_leaves_a_module_under_two_names_as_it_was() -> None:
    model, x = Twice(), torch.randn(2, 3, 4)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.clone() for n, t in own.items()}
    fxgrow.capture(model, (x,))
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[n] is t and torch.equal(t, before[n]) for n, t in own.items())


def test_plain_tensors_of_a_module() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    module.calls, module[0].last, module.mask = torch.zeros(1), torch.ones(2), torch.ones(1).expand(4)
    assert set(plain_tensors(module)) == {"calls", "0.last"}
    with plain_tensors_kept(module):
        module.calls.add_(1)
    assert not module.calls.any()


def test_run_eval_leaves_buffers_as_they_were() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.sum()
            return x + self.calls.add_(1)

    model = Counts()
    calls, last = model.calls, model.last
    assert run_eval(model, [torch.zeros(1)], {}).item() == 1
    assert model.calls is calls and model.last is last and not calls and not last


class Keeps(nn.Module):
    """Keeps what it has seen, as forwards do, in a number, a list and a dict; an LSTM keeps its weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)
        self.seen, self.cache, self.calls = [0], {"first": 1}, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x)[0]
        self.calls += 1
        self.seen.append(x.shape[-1])
        self.cache["width"] = h.shape[-1]
        return self.out(h)


def test_what_a_forward_keeps_is_as_it_was_after_a_run_and_a_trace() -> None:
    model, x = Keeps(), torch.randn(2, 5, 4)
    seen, cache, weights = model.seen, model.cache, model.lstm._flat_weights
    run_eval(model, [x], {})
    fxgrow.capture(model, (x,))
    assert model.seen is seen == [0] and model.cache is cache == {"first": 1} and model.calls == 0
    assert model.lstm._flat_weights is weights
    assert all(a is b for a, b in zip(weights, model.lstm.parameters(), strict=True))
