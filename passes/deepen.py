"""``deepen``: insert blocks into a repeated stack (LLaMA Pro; a learned gate elsewhere; G_stack copies on request)."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxgrow.emit.blocks import Region, block_regions
from fxgrow.errors import GrowthRefused, Refusal, SpecError
from fxgrow.ir.memory import Memory, writes
from fxgrow.ir.nodes import NodeInfo, info_of, meta_like, meta_of
from fxgrow.ir.ops import op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.stacks import block_path, children_of, stack_name, stacks_of
from fxgrow.ir.traced import Traced
from fxgrow.limits import check_blocks
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.changes import NEW, renamed_path
from fxgrow.passes.identity import Identity, Values, merged, same_value
from fxgrow.passes.state import State
from fxgrow.plan import Change, CloneBlock, Renumber, Step, TensorPlan
from fxgrow.rules.base import idempotent
from fxgrow.spec import Deepen


class DeepenPass(GrowthPass):
    """Clones blocks of a stack and renumbers them."""

    op = "deepen"

    def change(self, graph: fx.Graph, changes: Sequence[Change]) -> None:
        for (kind, stack), group in itertools.groupby(changes, lambda c: (c.kind, getattr(c, "stack", None))):
            if stack is None:
                super().change(graph, list(group))
                continue
            regions = block_regions(self.traced(), graph, stack)
            # from the last to the first, so that no clone moves the input of a block that is still to be copied: what
            # is known of the blocks stays true
            for change in reversed(list(group)):
                assert isinstance(change, CloneBlock)
                self.clone(graph, change, regions)

    def apply(self, graph: fx.Graph, change: Change) -> None:
        if isinstance(change, CloneBlock):
            self.change(graph, [change])
        else:
            super().apply(graph, change)

    def clone(self, graph: fx.Graph, change: CloneBlock, regions: list[Region]) -> None:
        """Copy a block's nodes in every call, and its modules. ``regions`` are the blocks of its stack."""
        old, new = block_path(change.stack, change.source), _temporary(change)
        for region in [r for r in regions if r.path == old]:
            clone_region(graph, change, region, [r for r in regions if r.call == region.call])
        containers = self.traced().containers
        for path, kind in list(containers.items()):
            if path == old or path.startswith(old + "."):
                containers[new + path[len(old) :]] = kind


def plan_deepen(state: State, op: Deepen) -> list[Step]:
    """Decide which blocks are inserted where and how each is the identity, and apply it.

    Raises:
        SpecError: no stack matches, or the number of blocks asked for is none.
        GrowthRefused: a block is not one piece of the graph, or no identity of it exists.
    """
    stacks = stacks_of(state.program)
    names = [s for s in stacks if fnmatch.fnmatchcase(stack_name(s), op.stack) or s == op.stack]
    if not names:
        raise SpecError(
            f"no repeated stack matches {op.stack!r}; the model has: {', '.join(map(stack_name, stacks)) or 'none'} "
            "(a stack is a ModuleList or Sequential whose numbered children have modules of their own)"
        )
    step = Step(
        op="deepen",
        request=op.model_dump(exclude_defaults=True, mode="json"),
        exactness="lossy" if op.init == "stack" else "exact",
    )
    for stack in names:
        _deepen_stack(state, op, stack, stacks[stack], step)
    return [step]


def places(op: Deepen, numbers: list[int], stack: str) -> list[tuple[int, int]]:
    """(block that is copied, block it is placed after) of every new block, in order."""
    n = len(numbers)
    if op.after is not None:
        wrong = [a for a in op.after if a not in numbers]
        if wrong:
            raise SpecError(f"{stack_name(stack)} has blocks {numbers[0]} to {numbers[-1]}, no block {wrong[0]}")
        check_blocks(stack, n, len(op.after))
        return [(a, a) for a in sorted(op.after)]
    if op.factor is not None:
        check_blocks(stack, n, n * op.factor - n)
        total = round(n * op.factor)
        if abs(total - n * op.factor) > 1e-6:
            raise SpecError(
                f"{stack_name(stack)} has {n} blocks; factor {op.factor:g} gives {n * op.factor:g}, no whole number"
            )
        extra = total - n
    else:
        assert op.by is not None
        check_blocks(stack, n, op.by)
        extra = op.by
    if op.order == "append":
        if op.init == "stack":
            return [(numbers[i % n], numbers[-1]) for i in range(extra)]
        return [(numbers[(n - extra + i) % n] if extra <= n else numbers[i % n], numbers[-1]) for i in range(extra)]
    # as even as possible: the last of each group of blocks is followed by a new one (LLaMA Pro)
    counts = [0] * n
    for i in range(extra):
        counts[((i % n + 1) * n) // min(extra, n) - 1 if extra < n else i % n] += 1
    return [(numbers[i], numbers[i]) for i in range(n) for _ in range(counts[i])]


def _deepen_stack(state: State, op: Deepen, stack: str, numbers: list[int], step: Step) -> None:
    program = state.program
    new_blocks = places(op, numbers, stack)
    if not new_blocks:
        step.notes.append(f"{stack_name(stack)} keeps its {len(numbers)} blocks")
        return
    blocks = _Blocks(program, state.graph, stack, block_regions(program, state.graph, stack), Memory(state.graph))
    numbering: dict[int, int] = {}
    order: list[tuple[int, int | None]] = []  # (old number, number in new_blocks)
    for number in children_of(program, stack):  # a layer among the blocks moves on with them
        order.append((number, None))
        order += [(source, i) for i, (source, after) in enumerate(new_blocks) if after == number]
    clones: list[CloneBlock] = []
    zeros: dict[int, Values] = {}
    for position, (number, i) in enumerate(order):
        if i is None:
            numbering[number] = order[0][0] + position
            continue
        source, after = new_blocks[i]
        try:
            init, zeroed = blocks.identity(source, after, op.init)
        except GrowthRefused as refusal:
            raise GrowthRefused(f"{refusal}{blocks.others(numbers, op.init)}", refusal.refusal) from None
        new_number = order[0][0] + position
        zeros[len(clones)] = zeroed
        clones.append(
            CloneBlock(
                stack=stack,
                source=source,
                after=after,
                number=new_number,
                init=init,
                gate=f"{block_path(stack, new_number)}.alpha" if init == "gate" else None,
            )
        )
    prefixes = {block_path(stack, a): block_path(stack, b) for a, b in numbering.items() if a != b}
    shared = blocks.shared()
    tensors = _clone_tensors(state, clones, zeros, shared)
    state.apply(step, [*clones, Renumber(prefixes=prefixes)])
    state.rename(lambda name: renamed_path(name, prefixes))
    _add_tensors(state, clones, numbering, tensors, [renamed_path(n, prefixes) for n in shared])
    state.order_blocks(stack)


@dataclass
class _Blocks:
    """The blocks of one stack, in every captured call."""

    program: Traced
    graph: fx.Graph
    stack: str
    regions: list[Region]
    memory: Memory
    found: dict[tuple[int, int], tuple[Any, Values]] = field(default_factory=dict)

    def identity(self, source: int, after: int, init: str) -> tuple[Any, Values]:
        """How a copy of one block, placed after another, is the identity in every call: the kind, and what to set.

        Raises:
            GrowthRefused: the block is not one piece of the graph, or there is no identity of the kind asked for.
        """
        if (source, after) not in self.found:
            self.found[source, after] = self._identity(source, after, init)
        return self.found[source, after]

    def _identity(self, source: int, after: int, init: str) -> tuple[Any, Values]:
        path = block_path(self.stack, source)
        mine = [r for r in self.regions if r.path == path]
        if not mine or {r.call for r in mine} != self.ran.get(path):
            raise self.refuse(f"the forward calls {path} more than once, or never", "Deepen a stack that runs once")
        values = merged([self._in_one_call(r, after, init) for r in mine])
        if values is not None:
            return "stack" if init == "stack" else "zero", values
        for region in mine:
            self._check_gate(region)
        return "gate", {}

    @functools.cached_property
    def ran(self) -> dict[str, set[int]]:
        """The calls of the model that run each module of the stack, by its path."""
        found: dict[str, set[int]] = {}
        prefix = block_path(self.stack, "")
        for node in self.graph.nodes:
            info = info_of(node)
            if node.op == "call_function" and info.module_path.startswith(prefix):
                number = info.module_path[len(prefix) :].partition(".")[0]
                found.setdefault(prefix + number, set()).add(info.call)
        return found

    def shared(self) -> list[str]:
        """Tensors of a block that are read outside it too: a copy of the block reads them as the block does."""
        read: dict[str, list[list[str]]] = {}
        for r in self.regions:
            read.setdefault(r.path, []).append([str(n.target) for n in r.inputs if n.op == "get_attr"])
        return [
            n
            for path, (first, *rest) in read.items()
            for n in first
            if n.startswith(path + ".") and all(n in names for names in rest)
        ]

    def others(self, numbers: list[int], init: str) -> str:
        """The blocks of the stack that a copy could be made of, in words."""
        able = []
        for number in numbers:
            with contextlib.suppress(GrowthRefused):
                self.identity(number, number, init)
                able.append(number)
        return (
            f"\n(blocks of {stack_name(self.stack)} that can be copied: use `after: {able}`, or some of them)"
            if able
            else ""
        )

    def refuse(self, why: str, instead: str) -> GrowthRefused:
        return GrowthRefused(Refusal(stack_name(self.stack), f"{why}. {instead}", "deepen"))

    def _in_one_call(self, region: Region, after: int, init: str) -> Values | None:
        """What to set so that the copy's branches are zero; None where only a gate can make it the identity."""
        regions = [r for r in self.regions if r.call == region.call]
        source = stream_input(region, self.stack, regions)
        if init == "stack":
            return {}
        before = next((r for r in regions if r.path == block_path(self.stack, after)), None)
        if before is None:
            raise self.refuse(
                f"a call runs {region.path} but not block {after}", "Place the new block after one it runs"
            )
        if not before.outputs:
            raise self.refuse(
                f"nothing that {before.path} computes is used outside it, so that a copy after it would have no input",
                "Place the new block after another one",
            )
        trained = {n: p for n, p in self.program.parameters.items() if p.is_floating_point()}
        search = Identity(region, source, (before.outputs[0], before.nodes[-1]), self.memory, trained)
        elsewhere = search.write_elsewhere()
        if elsewhere is not None:
            node, value = elsewhere
            raise self.refuse(
                f"{region.path} writes into {value.target if value.op == 'get_attr' else value.name}, which is not its "
                f"own ({_at(node)}), so that a copy of it would write there a second time",
                "Keep that state inside the block",
            )
        found = search.find() if init in ("auto", "zero") else None
        if found is None and init == "zero":
            line = info_of(region.outputs[0]).source
            raise self.refuse(
                f"init: zero needs a block that returns its input plus branches that end in layers of its own, which "
                f"can be set to zero; {region.path} returns something else ({line})",
                "Use init: gate, or auto",
            )
        return found

    def _check_gate(self, region: Region) -> None:
        """A gate needs the block's input as it was."""
        source = stream_input(region, self.stack, [r for r in self.regions if r.call == region.call])
        for node in region.nodes:
            if any(source in self.memory.sharing(target) for target in writes(node)):
                raise self.refuse(
                    f"{region.path} changes its input in place ({_at(node)}), and a gate between the block's input and "
                    "its output needs the input as it was",
                    "Write it without the in-place op",
                )


def _at(node: fx.Node) -> str:
    source = info_of(node).source
    return f"{node.target} at {source}" if source else str(node.target)


# identity ---------------------------------------------------------------------------------------------------------


def stream_input(region: Region, stack: str, regions: list[Region]) -> fx.Node:
    """The block's input that its output replaces: same shape, and where there are several, what the block before gives.

    Raises:
        GrowthRefused: no input or no single output has the right shape.
    """
    if len(region.outputs) != 1:
        why = (
            f"{len(region.outputs)} values that {region.path} computes are used outside it "
            f"({'; '.join(map(_at, region.outputs))}), and a copy that follows it can take up one only"
        )
        raise GrowthRefused(Refusal(stack_name(stack), why, "deepen"))
    (out,) = region.outputs
    same = [n for n in region.inputs if sizes_of(n) is not None and sizes_of(n) == sizes_of(out)]
    if len(same) > 1:
        before = [r.outputs[0] for r in regions if len(r.outputs) == 1]
        linked = [n for n in same if n in before]
        chain = [n for n in same if _adds_to(out, n, region)]
        same = linked if len(linked) == 1 else chain if len(chain) == 1 else same
    if len(same) != 1:
        what = "none of its inputs has" if not same else f"{len(same)} of its inputs have"
        why = (
            f"the output of block {region.path} has the shape {sizes_of(out)}, and {what} that shape, so that no copy "
            "of it can follow it"
        )
        raise GrowthRefused(Refusal(stack_name(stack), why, "deepen"))
    return same[0]


def _adds_to(out: fx.Node, source: fx.Node, region: Region) -> bool:
    """Whether a block's result is this input of it with other values added to it."""
    out = same_value(out)
    if out is source:
        return True
    adds = op_name(out.target) in ("aten.add.Tensor", "aten.add_.Tensor")
    if out not in region.nodes or not (adds or idempotent(out)):
        return False
    return any(isinstance(a, fx.Node) and _adds_to(a, source, region) for a in out.args[:2])


# graph ------------------------------------------------------------------------------------------------------------


def _temporary(clone: CloneBlock) -> str:
    return block_path(clone.stack, f"{NEW}{clone.number}")


def clone_region(graph: fx.Graph, change: CloneBlock, region: Region, regions: list[Region]) -> None:
    """Copy a block's nodes in one call, feed the copy with the output of the block before, and pass its result on."""
    predecessor = next(r for r in regions if r.path == block_path(change.stack, change.after))
    before = predecessor.outputs[0]
    source = stream_input(region, change.stack, regions)
    path, new_path = region.path, _temporary(change)

    def renamed(name: str) -> str:
        return new_path + name[len(path) :] if name == path or name.startswith(path + ".") else name

    env: dict[fx.Node, fx.Node] = {n: n for n in region.inputs}
    env[source] = before
    last = predecessor.nodes[-1]
    inside = set(region.nodes)
    users = list(before.users)
    with graph.inserting_after(last):
        anchor = graph.create_node("call_function", torch.ops.aten.alias.default, (before,))
    with graph.inserting_before(anchor):
        for node in region.nodes:
            for operand in node.all_input_nodes:
                if operand not in env and operand not in inside:
                    env[operand] = graph.get_attr(renamed(str(operand.target)))
                    env[operand].meta = _renamed_meta(operand, renamed)
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = _renamed_meta(node, renamed)
        out = env[region.outputs[0]]
        if change.init == "gate":
            assert change.gate is not None
            alpha = graph.get_attr(f"{new_path}.alpha")
            dtype = getattr(region.outputs[0].meta.get("val"), "dtype", torch.float32)
            alpha.meta = meta_of(torch.empty((), dtype=dtype, device="meta"), NodeInfo(module_path=new_path))
            aten = torch.ops.aten
            meta = meta_like(region.outputs[0], module_path=new_path)
            difference = graph.call_function(aten.sub.Tensor, (out, before))
            gated = graph.call_function(aten.mul.Tensor, (difference, alpha))
            out = graph.call_function(aten.add.Tensor, (before, gated))
            for made in (difference, gated, out):
                made.meta = dict(meta)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(before, out)


def _renamed_meta(node: fx.Node, renamed: Callable[[str], str]) -> dict[str, Any]:
    return meta_like(node, module_path=renamed(info_of(node).module_path))


# tensors ----------------------------------------------------------------------------------------------------------


def _clone_tensors(
    state: State, clones: list[CloneBlock], zeros: dict[int, Values], shared: list[str]
) -> dict[str, TensorPlan]:
    """Plans of the new blocks' own tensors, by their new names."""
    out: dict[str, TensorPlan] = {}
    sources = _by_block(state.tensors, {block_path(c.stack, c.source) for c in clones})
    for i, clone in enumerate(clones):
        old = block_path(clone.stack, clone.source)
        for name in sources.get(old, ()):
            if name in shared:
                continue
            new = block_path(clone.stack, clone.number) + name[len(old) :]
            copied = state.tensors[name].model_copy(deep=True)
            copied.fresh = clone.init != "stack"
            copied.key = zlib.crc32(new.encode())
            if name in zeros[i]:
                copied.zero, copied.level = True, zeros[i][name]
            out[new] = copied
    return out


def _by_block(names: Iterable[str], paths: set[str]) -> dict[str, list[str]]:
    """The names under each of some module paths (the path itself included), in one walk through the names."""
    found: dict[str, list[str]] = {}
    for name in names:
        end = len(name)
        while end > 0:
            if name[:end] in paths:
                found.setdefault(name[:end], []).append(name)
            end = name.rfind(".", 0, end)
    return found


def _add_tensors(
    state: State,
    clones: list[CloneBlock],
    numbering: dict[int, int],
    tensors: dict[str, TensorPlan],
    shared: list[str],
) -> None:
    """Enter the new blocks' names, each like those of the block it was copied from, which has its new number by now.

    What the block shares with others is tied to it, as it is between them.
    """
    program = state.program
    state.tensors.update(tensors)
    likes = {block_path(c.stack, numbering[c.source]) for c in clones}

    def under(table: Iterable[str]) -> dict[str, list[str]]:
        return _by_block(table, likes)

    tables: list[dict[str, Any]] = [program.parameters, program.buffers, program.requires_grad, program.module_types]
    theirs = [under(n for n in t if n not in shared) for t in tables]
    persistent, aliases, tied = under(program.persistent), under(program.aliases), under(shared)
    for clone in clones:
        path = block_path(clone.stack, clone.number)
        like = block_path(clone.stack, numbering[clone.source])

        def moved(name: str, like: str = like, path: str = path) -> str:
            return path + name[len(like) :] if name.startswith(like + ".") or name == like else name

        for table, names in zip(tables, theirs, strict=True):
            table.update({moved(n): table[n] for n in names.get(like, ())})
        program.persistent |= {moved(n) for n in persistent.get(like, ())}
        program.aliases.update({moved(a): moved(program.aliases[a]) for a in aliases.get(like, ())})
        program.aliases.update({moved(n): n for n in tied.get(like, ())})
        if clone.gate is not None:
            dtype = next((p.dtype for p in program.parameters.values() if p.is_floating_point()), torch.float32)
            device = next((p.device for p in program.parameters.values()), torch.device("cpu"))
            program.parameters[clone.gate] = torch.zeros((), dtype=dtype, device=device)
            program.requires_grad[clone.gate] = True
            state.tensors[clone.gate] = TensorPlan(
                source=None, shape=[], init="zeros", fresh=True, dtype=str(dtype).removeprefix("torch.")
            )


register_pass("deepen", plan_deepen, DeepenPass)
