"""A module's blocks as they are going to be called, without its weights: for compiling them ahead of need."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxgrow.ir import trees
from fxgrow.ir.modules import set_tensor


@dataclass(frozen=True)
class BlockCall:
    """How a block is called: its arguments, with fake tensors."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def blocks_called(
    module: nn.Module, blocks: list[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[BlockCall]:
    """The first call of each block when a module is called, run on fake tensors.

    Args:
        module: with its weights on meta; stays as it is.
        args, kwargs: with tensors on the device on which the module is going to run.
    """
    device = next((t.device for t in trees.tensors_in((args, dict(kwargs)))), torch.device("cpu"))
    names = [next(n for n, m in module.named_modules() if m is b) for b in blocks]
    fakes, out = FakeTensorMode(), dict[int, BlockCall]()
    running = copy.deepcopy(module)
    with fakes:
        _fill(running, device)

        def note(number: int, block: nn.Module) -> Any:
            def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                out.setdefault(number, BlockCall(block, given, named))

            return hook

        for number, (name, block) in enumerate(zip(names, blocks, strict=True)):
            running.get_submodule(name).register_forward_pre_hook(note(number, block), with_kwargs=True)
        given = trees.map_tensors(fakes.from_tensor, (args, dict(kwargs)))
        running(*given[0], **given[1])
    return [out[n] for n in sorted(out)]


def stand_in(value: Any) -> Any:
    """A nested value with zeros in the place of fake tensors, of their strides, with a history where they have one."""

    def zeros(x: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()
        return made.requires_grad_().clone() if x.requires_grad else made

    return trees.map_tensors(zeros, value)


def real(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a block with zeros for its weights."""
    made = copy.deepcopy(block)
    _fill(made, device)
    return made


def _fill(module: nn.Module, device: torch.device) -> None:
    """Zeros in the place of tensors on meta; what is tied stays tied."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for leaf, own in _own_tensors(part):
            if id(own) not in made:
                value = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=device).zero_()
                made[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
            set_tensor(part, leaf, made[id(own)])


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    kinds = module.named_parameters, module.named_buffers
    return [pair for kind in kinds for pair in kind(recurse=False, remove_duplicate=False)]


# between processes ---------------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """What decides, beside the graph, what is compiled: the compilers' configurations, and the number of threads."""
    return {
        "inductor": torch._inductor.config.save_config_portable(),
        "dynamo": torch._dynamo.config.save_config_portable(),
        "functorch": torch._functorch.config.save_config_portable(),
        "threads": torch.get_num_threads(),
    }


def take(found: Mapping[str, Any]) -> None:
    """Settings of another process, in this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # settings that are left over
        torch._inductor.config.load_config(found["inductor"])
        torch._dynamo.config.load_config(found["dynamo"])
        torch._functorch.config.load_config(found["functorch"])
    torch.set_num_threads(found["threads"])


class _Weightless(pickle.Pickler):
    """Pickles tensors of a module as their shapes."""

    def __init__(self, file: io.BytesIO, tensors: set[int]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) not in self._tensors:
            return NotImplemented
        kind = nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor
        return _placeholder, (
            kind is nn.Parameter,
            tuple(value.shape),
            value.stride(),
            value.dtype,
            value.requires_grad,
        )


def _placeholder(
    parameter: bool, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, learns: bool
) -> torch.Tensor:
    made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return nn.Parameter(made, learns) if parameter else made


def without_weights(model: nn.Module, more: Any) -> bytes:
    """A pickle of a model whose parameters and buffers are on meta, and of something else as it is.

    Raises:
        Exception: whatever pickling raises, for a class that cannot be.
    """
    out = io.BytesIO()
    _Weightless(out, {id(t) for t in (*model.parameters(), *model.buffers())}).dump((model, more))
    return out.getvalue()


__all__ = ["BlockCall", "blocks_called", "real", "settings", "stand_in", "take", "without_weights"]
