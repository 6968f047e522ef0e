"""Repeated blocks of a flat graph become child modules, and blocks with equal graphs share one class."""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fxgrow.ir.direct import DirectModule
from fxgrow.ir.memory import writes
from fxgrow.ir.nodes import NodeInfo, info_of, meta_of
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.stacks import block_of, block_path, stacks_of
from fxgrow.ir.traced import Traced


@dataclass
class Region:
    """A block's nodes in the flat graph, one contiguous run.

    ``sizes`` are inputs that are dynamic sizes and can be read off a tensor input: (tensor, dim).
    """

    path: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    sizes: dict[fx.Node, tuple[fx.Node, int]]
    call: int = 0


def block_regions(program: Traced, graph: fx.Graph, stack: str | None = None) -> list[Region]:
    """The blocks whose nodes form one run; parameters of their own and training flags belong to them.

    The outermost blocks, or those of one ``stack``, which may lie inside another's. What stands in the model itself is
    taken for blocks only where that is the stack asked for: its children are often stages, with blocks of their own.
    """
    stacks = stacks_of(program)
    stacks = {s: n for s, n in stacks.items() if (s if stack is None else s == stack)}
    runs: list[tuple[tuple[int, str | None], list[fx.Node]]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        info = info_of(node)
        key = (info.call, block_of(info.module_path, stacks))
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(node)
    counts = Counter(key for key, _ in runs)
    out = []
    for (call, path), nodes in runs:
        if path is None or counts[call, path] != 1:
            continue
        inside = set(nodes)
        inputs: dict[fx.Node, None] = {}
        for n in nodes:
            for a in n.all_input_nodes:
                if a not in inside and not _owned(a, path, inside, call):
                    inputs.setdefault(a)
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        out.append(Region(path, nodes, list(inputs), outputs, _readable_sizes(list(inputs)), call))
    return out


def stacks_in_line(program: Traced, graph: fx.Graph) -> dict[str, list[int]]:
    """The repeated stacks whose blocks run one after another, each fed by one before it.

    Blocks none of which reads what another computes stand side by side: the experts of a mixture, branches, towers. A
    container of one block counts as a stack.
    """
    stacks = stacks_of(program)
    members = {block_path(s, n): (s, n) for s, numbers in stacks.items() for n in numbers}
    ran: dict[str, set[int]] = {s: set() for s in stacks}
    linked: set[str] = set()
    upstream: dict[fx.Node, frozenset[tuple[str, int]]] = {}  # the blocks that a value has come through
    known: dict[str, list[tuple[str, int]]] = {}
    for node in graph.nodes:
        path = info_of(node).module_path
        if path not in known:
            known[path] = [members[p] for p in _prefixes(path) if p in members]
        before = frozenset[tuple[str, int]]().union(*(upstream[n] for n in node.all_input_nodes))
        own = known[path] if node.op == "call_function" else []
        for stack, number in own:
            ran[stack].add(number)
            if stack not in linked and any(s == stack and n != number for s, n in before):
                linked.add(stack)
        upstream[node] = before.union(own)
    return {s: numbers for s, numbers in stacks.items() if s in linked or len(ran[s]) < 2}


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _readable_sizes(inputs: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int]]:
    known: dict[str, tuple[fx.Node, int]] = {}
    for n in inputs:
        for i, size in enumerate(sizes_of(n) or []):
            known.setdefault(str(size), (n, i))
    out = {}
    for n in inputs:
        value = n.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value.node.expr) in known:
            out[n] = known[str(value.node.expr)]
    return out


def _owned(node: fx.Node, path: str, inside: set[fx.Node], call: int) -> bool:
    if node.op != "get_attr":
        return False
    if node.target == "training":
        return True
    return str(node.target).startswith(path + ".") and all(u in inside for u in node.users if info_of(u).call == call)


class CheckpointedBlock(DirectModule):
    """A block whose activations are made again for its backward, as the original's were."""

    def recompile(self) -> Any:
        code = super().recompile()
        kind = type(self)
        kind.forward = _checkpointed(kind.forward)
        return code


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def again(self: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args)
        return checkpoint(forward, self, *args, use_reentrant=False)

    return again


def is_checkpointed(region: Region) -> bool:
    """Whether all of a block ran under activation checkpointing, and nothing that it writes would be written twice."""
    return all(info_of(n).checkpointed and not writes(n) for n in region.nodes)


def split_blocks(program: Traced, graph: fx.Graph, children: dict[str, nn.Module]) -> fx.Graph:
    """Move blocks into child modules, added to ``children``.

    A block that an earlier call of the model has made already is called if its code is the same, else left in line.
    """
    regions: dict[fx.Node, Region] = {}
    for region in block_regions(program, graph):
        kind = program.containers.get(region.path, "Block")
        child = (CheckpointedBlock if is_checkpointed(region) else DirectModule)(
            nn.Module(), fx.Graph(), class_name=identifier(kind)
        )
        child.graph = _block_graph(region)
        known = children.setdefault(region.path, child)
        if known is child or (isinstance(known, fx.GraphModule) and known.code == child.code):
            regions[region.nodes[0]] = region
    member = {n: r for r in regions.values() for n in r.nodes}
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def value(n: fx.Node) -> fx.Node:
        if n not in env:  # parameters and flags are read where they are used
            env[n] = out.get_attr(str(n.target))
            env[n].meta = dict(n.meta)
        return env[n]

    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        inside = member.get(node)
        if inside is None:
            env[node] = out.node_copy(node, value)
            continue
        if node is not inside.nodes[0]:
            continue
        region = inside
        call = out.call_module(region.path, tuple(value(n) for n in region.inputs if n not in region.sizes))
        value_of_call = region.outputs[0].meta.get("val") if region.outputs else None  # none: it only writes state
        call.meta = meta_of(value_of_call, NodeInfo(module_path=region.path))
        if len(region.outputs) == 1:
            env[region.outputs[0]] = call
        else:
            for i, n in enumerate(region.outputs):
                env[n] = out.call_function(operator.getitem, (call, i))
                env[n].meta = dict(n.meta)
    return out


def _block_graph(region: Region) -> fx.Graph:
    """The block's own graph. Node names come from ops alone, so that equal blocks give equal code."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(n for n in region.inputs if n not in region.sizes):
        env[node] = graph.placeholder("x" if number == 0 else f"x{number}")
        env[node].meta = dict(node.meta)
    for node, (tensor, dim) in region.sizes.items():
        env[node] = graph.call_function(torch.ops.aten.sym_size.int, (env[tensor], dim))
        env[node].meta = dict(node.meta)

    def value(n: fx.Node) -> fx.Node:
        if n not in env:
            name = str(n.target)
            env[n] = graph.get_attr(name if name == "training" else name.removeprefix(region.path + "."))
            env[n].meta = dict(n.meta)
        return env[n]

    for node in region.nodes:
        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        env[node] = graph.create_node("call_function", node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    results = tuple(env[n] for n in region.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph


def share_classes(children: Mapping[str, nn.Module]) -> None:
    """Give blocks with equal code one class, that of the first."""
    first: dict[str, type] = {}
    for child in children.values():
        assert isinstance(child, fx.GraphModule)
        again = isinstance(child, CheckpointedBlock)
        cls = first.setdefault(f"{again} {type(child).__name__}\n{child.code}", type(child))
        child.__class__ = cls


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "Model"
