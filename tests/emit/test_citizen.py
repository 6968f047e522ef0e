"""The grown module among other people's code: keywords, missing attributes, checkpointing, averages."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgrow
from fxgrow.emit.blocks import CheckpointedBlock
from tests.models import trained

HIDDEN = {"op": "widen", "axis": "up.weight:0", "factor": 2}
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Language(nn.Module):
    """A forward as libraries write them: a mask between the inputs and the labels, and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.config = {"width": 8}

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        h = torch.tanh(self.up(x)) * scale
        if mask is not None:
            h = h * mask
        y = self.out(h)
        return y if labels is None else (y - labels).square().mean()

    def generate(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


def grown(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return fxgrow.grow(model, HIDDEN, args, kwargs, verify=False).module


def test_what_the_example_left_out_may_be_given_as_it_is_by_default() -> None:
    model = trained(Language().double()).eval()
    module = grown(model, X)
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for args, kwargs in (
            ((X,), {}),
            ((), {"x": X}),
            ((X, None), {"use_cache": None}),
            ((X,), {"labels": None, "mask": None, "scale": 1}),
            ((X, None, None, None, 1.0), {}),
        ):
            torch.testing.assert_close(again(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X, torch.ones(4, 1)), {}, "mask is a tensor, and was captured without one"),
        ((X,), {"use_cache": True}, "use_cache is 'True', and was captured as None"),
        ((X,), {"scale": 2.0}, "scale is '2.0', and was captured as 1.0"),
        ((), {"labels": X}, "the input x is missing"),
        ((X,), {"depth": 3}, "depth is '3', and was captured as None"),
    ],
)
def test_what_was_not_captured_is_named(args: Any, kwargs: Any, words: str) -> None:
    module = grown(Language().double(), X)
    with pytest.raises(TypeError) as raised:
        module(*args, **kwargs)
    assert words in str(raised.value)
    assert "calls=" in str(raised.value)
    assert "forward(x)" in str(raised.value)


def test_arguments_count_by_the_models_own_forward() -> None:
    """The example has labels and no mask: what is given second is a mask, as in the original."""
    model, labels = trained(Language().double()).eval(), torch.randn(4, 3, dtype=torch.float64)
    module = grown(model, X, labels=labels)
    torch.testing.assert_close(module(X, None, labels), model(X, None, labels), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(X, labels=labels), model(X, labels=labels), rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="mask is a tensor"):
        module(X, labels)


def test_open_arguments_go_on_as_before() -> None:
    class Open(Language):
        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return super().forward(*args, **kwargs)

    model, mask = trained(Open().double()).eval(), torch.rand(4, 1, dtype=torch.float64)
    torch.testing.assert_close(grown(model, X)(X), model(X), rtol=0, atol=1e-12)
    torch.testing.assert_close(grown(model, X, mask)(X, mask), model(X, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(grown(model, X, mask=mask)(X, mask=mask), model(X, mask=mask), rtol=0, atol=1e-12)


def test_a_compiled_module_takes_defaults() -> None:
    model = trained(Language().double()).eval()
    module = torch.compile(grown(model, X), backend="eager")
    torch.testing.assert_close(module(X, mask=None, use_cache=None), model(X), rtol=0, atol=1e-12)


def test_a_missing_attribute_says_where_to_find_it() -> None:
    model = Language().double()
    module = grown(model, X)
    again = fxgrow.grow(module, HIDDEN, (X,), verify=False).module
    for one in (module, again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for name in ("generate", "config"):
            assert not hasattr(one, name)
            with pytest.raises(
                AttributeError, match=rf"not its '{name}'. growth.apply_\(model\) .* growth.into\(larger\)"
            ):
                getattr(one, name)
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            _ = one.nonsense


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, again: bool, part: bool = False) -> None:
        super().__init__()
        self.blocks, self.again, self.part = nn.ModuleList(Block() for _ in range(4)), again, part

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.part:
                h = block.norm(x)
                h = checkpoint(block.up, h, use_reentrant=False)
                x = x + block.down(torch.tanh(h))
            elif self.again and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def saved_bytes(module: nn.Module, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    """What autograd keeps for the backward besides weights, and the gradients."""
    own = {t.untyped_storage().data_ptr() for t in module.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = module(x).square().mean()
    total = sum(kept.values())
    loss.backward()
    return total, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_checkpointing_is_put_back_around_blocks() -> None:
    spec = [{"op": "widen", "axis": "blocks.*/hidden", "factor": 2}, {"op": "deepen", "stack": "blocks", "by": 1}]
    torch.manual_seed(0)
    plain = trained(Stack(False).double()).train()
    again = Stack(True).double().train()
    again.load_state_dict(plain.state_dict())
    x = torch.randn(8, 16, dtype=torch.float64)
    growths = [fxgrow.grow(m, spec, (x,), verify=False) for m in (plain, again)]
    kept, gradients = zip(*(saved_bytes(g.module, x) for g in growths), strict=True)
    assert kept[1] < kept[0] / 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, rtol=1e-9, atol=1e-12)
    assert not any("checkpointing" in n for g in growths for n in g.receipt.notes)
    module = growths[1].module
    assert all(isinstance(b, CheckpointedBlock) for b in module.blocks)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert saved_bytes(copied, x)[0] == kept[1]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), again.eval()(x), rtol=0, atol=1e-12)
    second = fxgrow.grow(module, spec[0], (x,)).module
    assert isinstance(second.blocks[0], CheckpointedBlock)


def test_checkpointing_of_a_part_is_said_to_be_gone() -> None:
    x = torch.randn(8, 16, dtype=torch.float64)
    spec = {"op": "widen", "axis": "blocks.0.down.weight:1", "factor": 2}
    growth = fxgrow.grow(Stack(True, part=True).double(), spec, (x,), verify=False)
    assert any("checkpointing" in n for n in growth.receipt.notes)
    assert not any(isinstance(b, CheckpointedBlock) for b in growth.module.blocks)


def test_averages_of_the_grown_module() -> None:
    module = grown(trained(Language().double()), X)
    average = torch.optim.swa_utils.AveragedModel(module)
    for _ in range(2):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.1)
        average.update_parameters(module)
    torch.testing.assert_close(average(X).shape, module(X).shape)
    assert int(average.n_averaged) == 2
    assert average.module.up.weight.equal(module.up.weight) is False
