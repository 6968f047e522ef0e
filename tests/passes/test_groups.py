"""More key and value heads for the same queries: copies that share out the groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused, SpecError
from tests.models import relative_error, trained

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
D = 4


class Attention(nn.Module):
    """Grouped queries, written as people write them."""

    def __init__(self, kind: str, heads: int, kv: int) -> None:
        super().__init__()
        self.kind, self.heads, self.kv = kind, heads, kv
        self.q, self.o = nn.Linear(6, heads * D), nn.Linear(heads * D, 6)
        if kind == "fused":
            self.k_v = nn.Linear(6, 2 * kv * D)
        else:
            self.k, self.v = nn.Linear(6, kv * D), nn.Linear(6, kv * D)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        k, v = self.k_v(x).split(self.kv * D, -1) if self.kind == "fused" else (self.k(x), self.v(x))
        q = self.q(x).view(b, t, self.heads, D).transpose(1, 2)
        k, v = (z.view(b, t, self.kv, D).transpose(1, 2) for z in (k, v))
        if self.kind == "rotary":
            q, k = (torch.cat((z[..., : D // 2] - z[..., D // 2 :], z[..., D // 2 :]), -1) for z in (q, k))
        n = self.heads // self.kv
        if self.kind == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(y.transpose(1, 2).reshape(b, t, -1))
        if self.kind == "expand":
            if n > 1:
                k, v = (z[:, :, None].expand(b, self.kv, n, t, D).reshape(b, self.heads, t, D) for z in (k, v))
        else:
            k, v = (z.repeat_interleave(n, dim=1) for z in (k, v))
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return y


class Model(nn.Module):
    def __init__(self, kind: str, heads: int, kv: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(kind, heads, kv) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def made(kind: str, heads: int, kv: int) -> nn.Module:
    return trained(Model(kind, heads, kv).double()).eval()


SHARE = {"op": "widen", "axis": "*/kv_heads", "factor": 2, "groups": "share"}


@pytest.mark.parametrize("kind", ["repeat", "expand", "grouped", "fused", "rotary"])
@pytest.mark.parametrize("heads", [4, 8])
def test_copies_of_units_share_out_their_group(kind: str, heads: int) -> None:
    small = made(kind, heads, 2)
    growth = fxgrow.grow(small, SHARE, (X,))
    assert growth.receipt.exactness == "exact" and relative_error(small, growth.module, (X,)) <= 1e-10
    rows = np.repeat(np.arange(2 * D).reshape(2, D), 2, axis=0).ravel()  # 0 0 1 1
    name = "layers.1.k_v.weight" if kind == "fused" else "layers.1.k.weight"
    parts = 2 if kind == "fused" else 1
    wanted = np.concatenate([rows + i * 2 * D for i in range(parts)])
    assert torch.equal(growth.module.get_parameter(name), small.get_parameter(name)[torch.from_numpy(wanted)])
    assert torch.equal(growth.module.get_parameter("layers.1.q.weight"), small.get_parameter("layers.1.q.weight"))
    large = growth.into(made(kind, heads, 4))
    assert relative_error(small, large, (X,)) <= 1e-10
    before = small(X)
    growth.apply_(small)
    assert torch.allclose(small(X), before, rtol=1e-10) and small.layers[0].kv == 4


@pytest.mark.parametrize("kind", ["repeat", "expand", "grouped"])
@pytest.mark.parametrize(
    ("old", "new"), [((4, 2), (4, 4)), ((8, 2), (8, 4)), ((4, 2), (8, 8)), ((8, 2), (12, 4)), ((4, 2), (8, 4))]
)
def test_sizes_of_a_larger_instance_say_so(kind: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    small, large = made(kind, *old), made(kind, *new)
    fxgrow.expand(small, large, (X,))
    assert relative_error(small, large, (X,)) <= 1e-10


def test_what_cannot_be_shared_out() -> None:
    with pytest.raises(GrowthRefused, match="3 of each group cannot be shared out among 2 copies"):
        fxgrow.grow(made("repeat", 6, 2), SHARE, (X,))
    with pytest.raises(GrowthRefused, match="1 of each group cannot"):
        fxgrow.grow(made("repeat", 4, 4), {**SHARE, "axis": "*/heads"}, (X,))
    with pytest.raises(SpecError, match="groups: share makes equal copies"):
        fxgrow.GrowthSpec.parse({**SHARE, "noise": {}})
    with pytest.raises(SpecError, match=r"groups has 4 units.*one unit for all"):
        fxgrow.expand(made("grouped", 4, 1), made("grouped", 4, 2), (X,))
