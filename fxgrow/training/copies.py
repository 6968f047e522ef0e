"""Copies: which weights a growth made equal, and how far apart they are later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.ir.dtensors import whole_of
from fxgrow.ir.fsdp import reshard


@dataclass
class Copies:
    """Which slices of the weights are equal to the bit right after a growth, and how far apart they are later.

    A copy that never parts from its original is wasted. ``pairs`` maps a parameter and a dim to the index vectors of
    equal slices; ``zeros`` are the weights that the growth set to zero (last projections of inserted blocks).
    """

    pairs: dict[tuple[str, int], tuple[Tensor, Tensor]]
    zeros: list[str]

    @classmethod
    def none(cls) -> Copies:
        return cls({}, [])

    @classmethod
    def of(cls, model: nn.Module) -> Copies:
        """Find them in the matrices of ``model`` by comparing values, without asking the compiler.

        Of a sharded model, one matrix is gathered at a time: a collective operation.
        """
        pairs, zeros = {}, []
        reshard(model)
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            weight = whole_of(parameter).cpu()
            if not weight.any():
                zeros.append(name)
                continue
            for dim in (0, 1):
                slices = weight if dim == 0 else weight.t()
                first: dict[bytes, int] = {}
                found = []
                for index, row in enumerate(slices.contiguous()):
                    if row.any():
                        other = first.setdefault(row.numpy().tobytes(), index)
                        if other != index:
                            found.append((other, index))
                if found:
                    left, right = torch.tensor(found).t().to(parameter.device)
                    pairs[name, dim] = (left, right)
        return cls(pairs, zeros)

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Plain data, and the index vectors among some tensors; :meth:`unpacked` reads them back."""
        for number, pair in enumerate(self.pairs.values()):
            tensors[f"copies.{number}"] = torch.stack(pair).cpu()
        return {"pairs": [[name, dim] for name, dim in self.pairs], "zeros": self.zeros}

    @classmethod
    def unpacked(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Copies:
        """What :meth:`packed` made.

        Raises:
            KeyError, ValueError, TypeError: it is none.
        """
        found = [tensors[f"copies.{number}"].to(device, copy=True).unbind() for number in range(len(data["pairs"]))]
        pairs = zip(data["pairs"], found, strict=True)
        return cls(
            {(str(n), int(d)): (left, right) for (n, d), (left, right) in pairs}, [str(z) for z in data["zeros"]]
        )

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """How far the copies have parted.

        Returns:
            ``copies``: number of pairs, ``apart_max``: largest difference of any weight of any two copies,
            ``apart_min``: the same for the two copies that have parted least; ``zero_max``: the largest element of the
            one of ``zeros`` that has moved least. Keys that nothing can be said of are left out.
        """
        reshard(model)
        weights = dict(model.named_parameters())
        result: dict[str, Any] = {}
        with torch.no_grad():
            apart = [
                _apart(whole_of(weights[name]), dim, left, right)
                for (name, dim), (left, right) in self.pairs.items()
                if name in weights  # adapters may be merged since
            ]
            if apart:
                every = torch.cat(apart)
                result = {"copies": every.numel(), "apart_max": float(every.max()), "apart_min": float(every.min())}
            zeros = [float(whole_of(weights[name]).abs().max()) for name in self.zeros if name in weights]
            if zeros:
                result["zero_max"] = min(zeros)
        return result


def _apart(weight: Tensor, dim: int, left: Tensor, right: Tensor) -> Tensor:
    return (weight.index_select(dim, left) - weight.index_select(dim, right)).abs().amax(1 - dim)
