"""What image models alone do: weights transformed before use, softmaxes over maps, windows, maps of one pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .zoo import ZOO, entry, floats

__all__ = ["ZOO"]


def images(size: int = 8) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (floats(2, 3, size, size),), (floats(3, 3, size, size),)


class StandardisedConv(nn.Conv2d):
    """Scaled weight standardisation as normaliser-free networks do it: batch norm of the weight, one group a filter."""

    def __init__(self, *args: Any, gain: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1) if self.gain is not None else None
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@entry("weight-standardised", {}, {"gain": False, "bias": False})
def weight_standardised(gain: bool = True, bias: bool = True) -> Any:
    def conv(i: int, o: int, groups: int = 1) -> nn.Module:
        return StandardisedConv(i, o, 3, padding=1, groups=groups, gain=gain, bias=bias)

    model = nn.Sequential(
        conv(3, 8), nn.GELU(), conv(8, 8, 4), nn.GELU(), conv(8, 6), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return nn.Sequential(model, nn.Linear(6, 4)), *images()


@entry("weight-norm")
def weight_norm() -> Any:
    def normed(module: nn.Module) -> nn.Module:
        return torch.nn.utils.parametrizations.weight_norm(module)

    convs = normed(nn.Conv2d(3, 8, 3)), nn.GELU(), normed(nn.Conv2d(8, 6, 3)), nn.GELU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), normed(nn.Linear(6, 4))), *images()


class SplitAttention(nn.Module):
    """ResNeSt's: two feature maps, weighed by a softmax between the two, channel by channel."""

    def __init__(self, radix: int = 2, width: int = 6) -> None:
        super().__init__()
        self.radix = radix
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, width * radix, 3, padding=1, groups=radix)
        self.norm = nn.BatchNorm2d(width * radix)
        self.fc1, self.fc2 = nn.Conv2d(width, 5, 1), nn.Conv2d(5, width * radix, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(F.gelu(self.stem(x)))))
        b, c, h, w = x.shape
        maps = x.reshape(b, self.radix, c // self.radix, h, w)
        attention = self.fc2(F.gelu(self.fc1(maps.sum(1).mean((2, 3), keepdim=True))))
        attention = attention.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, -1)
        out = (maps * attention.view(b, self.radix, c // self.radix, 1, 1)).sum(1)
        return self.head(out.mean((2, 3)))  # type: ignore[no-any-return]


@entry("split-attention")
def split_attention() -> Any:
    return SplitAttention(), *images()


class Outlook(nn.Module):
    """VOLO's outlook attention: each pixel weighs the windows around it, which are then folded over each other."""

    def __init__(self, width: int = 8, heads: int = 2, window: int = 3) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.stem = nn.Conv2d(3, width, 1)
        self.norm = nn.LayerNorm(width)
        self.v, self.attention = nn.Linear(width, width, bias=False), nn.Linear(width, window**4 * heads)
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm(x)
        b, h, w, c = x.shape
        k = self.window**2
        v = F.unfold(self.v(y).permute(0, 3, 1, 2), self.window, padding=1, stride=2)
        n = v.shape[-1]
        v = v.reshape(b, self.heads, c // self.heads, k, n).permute(0, 1, 4, 3, 2)
        pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), 2, 2).permute(0, 2, 3, 1)
        scores = self.attention(pooled).reshape(b, n, self.heads, k, k).permute(0, 2, 1, 3, 4)
        mixed = (scores * (c // self.heads) ** -0.5).softmax(-1) @ v
        mixed = mixed.permute(0, 1, 4, 3, 2).reshape(b, c * k, n)
        y = F.fold(mixed, (h, w), self.window, padding=1, stride=2).permute(0, 2, 3, 1)
        return self.head((x + self.proj(y)).mean((1, 2)))  # type: ignore[no-any-return]


@entry("outlook-attention")
def outlook_attention() -> Any:
    return Outlook(), *images()


@entry("map-of-one-pixel")
def map_of_one_pixel() -> Any:
    """Batch norm pins the dynamic size of its map to 1 here."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4)), *images(4)
