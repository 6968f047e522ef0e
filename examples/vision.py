"""Grow a small convolutional network while it learns to tell shapes apart: ``python -m examples.vision`` (a minute).

Inverted residuals with depthwise convolutions, squeeze-and-excitation, batch norm and stochastic depth: what
MobileNet and EfficientNet are made of. Channels double, a stage gets another block, and training goes on: the same
model, the same optimizer, and the cosine schedule that holds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import typer
from torch import nn

import fxgrow

SHAPES = ("disc", "square", "triangle", "cross", "ring")


def images(n: int, generator: torch.Generator, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy shapes of random place and size: float32 (n, 1, size, size), and their numbers (n,)."""
    kind = torch.randint(len(SHAPES), (n,), generator=generator)
    middle = torch.rand(n, 2, 1, 1, generator=generator) * 6 + size / 2 - 3
    radius = torch.rand(n, 1, 1, generator=generator) * 3 + 3
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dy, dx = y - middle[:, 0], x - middle[:, 1]
    far = (dy**2 + dx**2).sqrt()
    masks = torch.stack(
        [
            far < radius,
            torch.maximum(dy.abs(), dx.abs()) < radius * 0.85,
            (dy < radius * 0.7) & (dx.abs() * 1.7 < dy + radius),
            (torch.minimum(dy.abs(), dx.abs()) < radius * 0.3) & (torch.maximum(dy.abs(), dx.abs()) < radius),
            (far < radius) & (far > radius * 0.6),
        ]
    )
    picture = masks[kind, torch.arange(n)].float()
    return (picture + 0.4 * torch.randn(n, size, size, generator=generator)).unsqueeze(1), kind


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        wide = 2 * channels
        self.drop = drop
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm2, self.excite = nn.BatchNorm2d(wide), SqueezeExcite(wide)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm1(self.expand(x)))
        h = self.norm3(self.project(self.excite(F.silu(self.norm2(self.depthwise(h))))))
        if self.training and self.drop:  # stochastic depth (Huang et al. 2016)
            h = h * torch.empty(h.shape[0], 1, 1, 1, device=h.device).bernoulli_(1 - self.drop).div_(1 - self.drop)
        return x + h


class Net(nn.Module):
    def __init__(self, channels: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(InvertedResidual(channels, 0.1 * i) for i in range(blocks))
        self.head = nn.Linear(channels, len(SHAPES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


#: doubles the stream and the inner channels, with noise so that copies part, and adds a block that starts as identity
SPEC = """
version: 1
operations:
  - {op: widen, axis: "./channels", factor: 2, noise: {scale: 0.02}}
  - {op: widen, axis: "blocks.*/channels", factor: 1.5, fill: add}
  - {op: deepen, stack: blocks, by: 1}
"""


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    generator: torch.Generator,
    batch: int = 64,
) -> float:
    """Train for some steps; returns the mean loss of the last ten."""
    model.train()
    losses = []
    for _ in range(steps):
        x, y = images(batch, generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def main(
    steps: int = typer.Option(150, help="steps before the growth, and after it"),
    seed: int = typer.Option(0, help="seed of weights, images and noise"),
) -> None:
    """Train, grow, check that nothing moved, train on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    test = images(1000, torch.Generator().manual_seed(seed + 1))
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    loss = train(model, optimizer, scheduler, steps, generator)
    before = accuracy(model, *test)
    typer.echo(f"{steps} steps: loss {loss:.3f}, accuracy {before:.1%}")

    growth = fxgrow.grow(model, SPEC, (test[0][:4],))
    growth.apply_(model)
    growth.carry_(optimizer)
    receipt = growth.receipt
    typer.echo(f"grown {receipt.params_before:,} -> {receipt.params_after:,} parameters: {growth.plan.exactness}")
    moved = f"{receipt.error_float64:.1e} in eval, {receipt.error_float64_train:.1e} in train"
    typer.echo(f"  float64 outputs moved {moved}")
    typer.echo(f"  accuracy {accuracy(model, *test):.1%}")

    loss = train(model, optimizer, scheduler, steps, generator)
    rate = optimizer.param_groups[0]["lr"]
    typer.echo(f"{steps} more steps: loss {loss:.3f}, accuracy {accuracy(model, *test):.1%}, learning rate {rate:.0e}")


if __name__ == "__main__":
    typer.run(main)
