"""Modules that a plan adds to the living model: blocks, copied and numbered anew, and adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fxgrow.errors import GrowthRefused, Refusal
from fxgrow.ir.adapters import adapter_of, attach_gate
from fxgrow.ir.modules import children_of
from fxgrow.ir.stacks import block_path
from fxgrow.landing.living import Living, attributes_of, configs_of
from fxgrow.plan import Adapt, CloneBlock, GrowthPlan, InsertLayer, Renumber


class Numbered(NamedTuple):
    """An attribute that was taken for its block's number, what it held, and what it holds now."""

    module: nn.Module
    name: str
    old: int
    new: int


@dataclass
class Restacked:
    """What became of one stack: for each number, the old number of the block that stands there or was copied.

    Attributes:
        numbered: attributes that have another number now.
    """

    stack: str
    origins: dict[int, int]
    copied: set[int]
    numbered: list[Numbered]


def restack(living: Living, plan: GrowthPlan) -> list[Restacked]:
    """Give the model's stacks the blocks of a plan, and its layers their adapters.

    Copies have the tensors of their source until those are exchanged.

    Raises:
        GrowthRefused: the plan needs a layer that the class does not run.
    """
    done = []
    for step in plan.steps:
        for change in step.changes:
            _check(change)
            if isinstance(change, Adapt) and adapter_of(living.module(change.path)) is None:  # of another call
                living.adapter(change)
        for stack, clones, prefixes in _stackings(step.changes):
            done.append(_restack(living, stack, clones, prefixes))
    return done


def _check(change: Any) -> None:
    if isinstance(change, InsertLayer):
        why = f"the class does not run the new layer {change.path}. Use growth.module, or add the layer to the class"
        raise GrowthRefused(Refusal(change.after, why, "apply the layer inserted after"))


def _stackings(changes: Sequence[Any]) -> Iterator[tuple[str, list[CloneBlock], dict[str, str]]]:
    """Clones of one stack and the renumbering that follows them."""
    clones: list[CloneBlock] = []
    for change in changes:
        if isinstance(change, CloneBlock):
            clones.append(change)
        elif isinstance(change, Renumber) and clones:
            yield clones[0].stack, clones, change.prefixes
            clones = []


def _restack(living: Living, stack: str, clones: list[CloneBlock], prefixes: dict[str, str]) -> Restacked:
    children = children_of(living.module(stack))

    def number(name: str) -> str:
        return prefixes.get(block_path(stack, name), block_path(stack, name)).rpartition(".")[2]

    numbered = {number(n): m for n, m in children.items() if n.isdigit()}
    origins = {int(number(n)): int(n) for n in children if n.isdigit()}
    for clone in clones:
        source = children[str(clone.source)]
        assert source is not None
        block = copied(source, living.model)
        if clone.gate is not None:
            attach_gate(block, clone.gate.rpartition(".")[2], nn.Parameter(torch.empty((), device="meta")))
        numbered[str(clone.number)] = block
        origins[clone.number] = clone.source
    ordered = iter(sorted(numbered.items(), key=lambda c: int(c[0])))
    out: dict[str, nn.Module | None] = {}
    for name, module in children.items():
        if not name.isdigit():
            out[name] = module
        elif not any(n.isdigit() for n in out):
            out.update(ordered)
    old = {int(n): m for n, m in children.items() if n.isdigit() and m is not None}
    places = _numbers_kept(old)
    living.children(stack, out)
    anew: list[Numbered] = []
    for n, module in out.items():
        if n.isdigit() and module is not None:
            parts = dict(module.named_modules())
            for (path, name), offset in places.items():
                held = vars(parts[path]).get(name) if path in parts else None
                if type(held) is int and held != int(n) + offset:
                    living.attribute(parts[path], name, int(n) + offset)
                    anew.append(Numbered(parts[path], name, held, int(n) + offset))
    return Restacked(stack, origins, {c.number for c in clones}, anew)


def copied(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a block that shares with the model all that is not the block's own: configs, other modules.

    Its parameters are places for others: shapes without values.
    """
    memo: dict[int, Any] = {}
    around = list(_around(model, block))
    shared = {id(c) for module in around for c in configs_of(module)}
    for module in model.modules():
        # a dict that the block alone holds are its layers' own numbers
        memo.update({id(c): c for c in configs_of(module) if type(c) is not dict or id(c) in shared})
    for module in around:
        memo[id(module)] = module
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
    for parameter in block.parameters():
        if id(parameter) not in memo:
            place = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(place, requires_grad=parameter.requires_grad)
    return copy.deepcopy(block, memo)


def _around(model: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """The modules that can be reached without entering a block: those that it shares with others as well."""
    yield model
    for child in model.children():
        if child is not block:
            yield from _around(child, block)


def _numbers_kept(blocks: dict[int, nn.Module]) -> dict[tuple[str, str], int]:
    """Attributes by which every block's modules know the block's number (``layer_idx``), and what they add to it."""
    if len(blocks) < 2:
        return {}
    found: dict[tuple[str, str], dict[int, int]] = {}
    for number, block in blocks.items():
        for path, module in block.named_modules():
            for name, value in attributes_of(module).items():
                if type(value) is int:
                    found.setdefault((path, name), {})[number] = value - number
    out = {}
    for key, offsets in found.items():
        offset = next(iter(offsets.values()))
        if len(offsets) > 1 and set(offsets.values()) == {offset} and offset in (0, 1):
            out[key] = offset
    return out


__all__ = ["Numbered", "Restacked", "copied", "restack"]
