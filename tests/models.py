"""Small models for the tests, with weights that look trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from examples.gpt.model import GPT, GPTConfig


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Perturb every parameter, norm and running statistic: at their initial values wrong growths pass."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * noise(p))
        for name, b in module.named_buffers():
            if name.endswith("running_var"):
                b.mul_(1.5).add_(0.3 * noise(b).abs())
            elif name.endswith("running_mean"):
                b.add_(0.3 * noise(b))
    return module


def small_gpt(dtype: torch.dtype = torch.float64, **sizes: Any) -> GPT:
    config = {"vocab_size": 50, "block_size": 12, "n_layer": 2, "n_head": 4, "n_embd": 32, **sizes}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config)).to(dtype)
    return trained(model)  # type: ignore[return-value]


def tokens(seed: int = 0, batch: int = 3, length: int = 7, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(vocab, (batch, length + 1), generator=generator)
    return x[:, :-1].clone(), x[:, 1:].clone()


def small_cnn(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ).to(dtype)
    return trained(model)


#: how far two runs of the same operations on the same bits may part, relative to their largest value. A matrix product
#: may order its sum by thread count, alignment and processor; narrow types round after every layer
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def assert_same(actual: Any, expected: Any) -> None:
    """Both hold the same, up to :data:`ROUNDING`: what the same operations give for the same bits."""
    ours, theirs = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            scale = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING[b.dtype] * scale)
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


def relative_error(old: Callable[..., Any], new: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Largest |new - old| / max |old| over all outputs; both in eval mode."""
    worst = 0.0
    with torch.no_grad():
        a, b = old(*args), new(*args)
    for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
        assert x.shape == y.shape
        worst = max(worst, float((x.double() - y.double()).abs().max() / x.double().abs().max()))
    return worst
