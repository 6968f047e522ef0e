"""Sizes that modules keep beside their tensors and that no graph shows: ``in_features`` and its like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fxgrow.landing.living import Living

Sizes = dict[str, Any]


def _of_linear(m: Any) -> Sizes:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _of_bilinear(m: Any) -> Sizes:
    out, first, second = m.weight.shape
    return {"out_features": out, "in1_features": first, "in2_features": second}


def _of_embedding(m: Any) -> Sizes:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _of_convolution(m: Any) -> Sizes:
    first, second = m.weight.shape[:2]
    if m.transposed:
        return {"in_channels": first, "out_channels": second * m.groups}
    return {"out_channels": first, "in_channels": second * m.groups}


def _of_elements(m: Any) -> Sizes:
    return {} if m.weight is None else {"normalized_shape": type(m.normalized_shape)(m.weight.shape)}


def _of_groups(m: Any) -> Sizes:
    return {} if m.weight is None else {"num_channels": m.weight.shape[0]}


def _of_statistics(m: Any) -> Sizes:
    known = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    return {} if known is None else {"num_features": known.shape[0]}


def _of_attention(m: Any) -> Sizes:
    width = m.out_proj.weight.shape[0]
    heads = {"head_dim": width // m.num_heads}
    if m.in_proj_weight is not None:
        return {"embed_dim": width, "kdim": width, "vdim": width, **heads}
    return {"embed_dim": width, "kdim": m.k_proj_weight.shape[1], "vdim": m.v_proj_weight.shape[1], **heads}


def _of_recurrent(m: Any) -> Sizes:
    rows, out = m.weight_hh_l0.shape
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    sizes = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": rows // gates}
    return {**sizes, "proj_size": out} if m.proj_size else sizes


def _of_cell(m: Any) -> Sizes:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WITH_STATISTICS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

#: what PyTorch's own layers keep, by class, read off their tensors
_OWN: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], Sizes]]] = [
    (nn.Linear, _of_linear),
    (nn.Bilinear, _of_bilinear),
    (nn.Embedding, _of_embedding),
    (nn.EmbeddingBag, _of_embedding),
    (_CONVOLUTIONS, _of_convolution),
    (nn.LayerNorm, _of_elements),
    (nn.RMSNorm, _of_elements),
    (nn.GroupNorm, _of_groups),
    (_WITH_STATISTICS, _of_statistics),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.shape[0]}),
    (nn.MultiheadAttention, _of_attention),
    (nn.RNNBase, _of_recurrent),
    (nn.RNNCellBase, _of_cell),
]


def kept_sizes(module: nn.Module) -> Sizes:
    """What a layer of PyTorch's keeps of the sizes of its tensors; nothing for other modules."""
    for kind, sizes in _OWN:
        if isinstance(module, kind):
            try:
                return _read(module, sizes)
            except (AttributeError, TypeError, ValueError):  # a subclass that has made its weights anew
                return {}
    return {}


class _Reader(nn.Module):
    """Reads a layer's sizes in its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, sizes: Callable[[Any], Sizes]) -> Sizes:
        return sizes(self.module)


def _read(module: nn.Module, sizes: Callable[[Any], Sizes]) -> Sizes:
    """The sizes of a layer. A weight that is computed where it is read, and may write buffers then, is so on meta."""
    if not is_parametrized(module):
        return sizes(module)
    reader = _Reader(module)
    tensors = {n: t.detach().to("meta") for n, t in (*reader.named_parameters(), *reader.named_buffers())}
    with torch.no_grad():
        return dict(torch.func.functional_call(reader, tensors, (sizes,)))


class KeptSizes:
    """The sizes that modules keep, read before the tensors are exchanged, to be set by the same relation after."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = {m: _agreeing(m, kept_sizes(m)) for m in model.modules()}
        self.relations = _relations(model)

    def settle(self, living: Living) -> None:
        """Set what follows from the tensors that the modules have now."""
        for module in list(living.model.modules()):
            now = kept_sizes(module)
            for name in self.own.get(module, now):  # a copied block's modules are new here
                if name in now and vars(module).get(name) not in (None, now[name]):
                    living.attribute(module, name, now[name])
        for module in list(living.model.modules()):
            for name, (leaf, dim) in self.relations.get(type(module), {}).items():
                tensor = dict(_tensors(module)).get(leaf)
                if tensor is not None and name in vars(module) and vars(module)[name] != tensor.shape[dim]:
                    living.attribute(module, name, tensor.shape[dim])


def _agreeing(module: nn.Module, sizes: Sizes) -> list[str]:
    held = vars(module)
    return [n for n, v in sizes.items() if n in held and held[n] == v]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _relations(model: nn.Module) -> Mapping[type, dict[str, tuple[str, int]]]:
    """Attributes of other classes that are a size of a tensor beside them, in every module of the class.

    Only where modules of the class have different sizes, and one dim alone explains them all: else it may be chance.
    """
    by_class: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if not kept_sizes(module):
            by_class.setdefault(type(module), []).append(module)
    out: dict[type, dict[str, tuple[str, int]]] = {}
    for kind, modules in by_class.items():
        for name, value in vars(modules[0]).items():
            values = [vars(m).get(name) for m in modules]
            if type(value) is not int or any(type(v) is not int for v in values) or len(set(values)) < 2:
                continue
            places = [
                (leaf, dim)
                for leaf, tensor in _tensors(modules[0])
                for dim in range(tensor.dim())
                if all(_size(m, leaf, dim) == v for m, v in zip(modules, values, strict=True))
            ]
            if places and len({leaf for leaf, _ in places}) == len(places):
                out.setdefault(kind, {})[name] = places[0]
    return out


def _size(module: nn.Module, leaf: str, dim: int) -> int | None:
    tensor = dict(_tensors(module)).get(leaf)
    return tensor.shape[dim] if tensor is not None and tensor.dim() > dim else None
