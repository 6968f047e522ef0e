"""``deepen``: insert blocks into a repeated stack (LLaMA Pro; a learned gate elsewhere; G_stack copies on request)."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from fxgrow.emit.blocks import Region, block_regions, stacks_in_line
from fxgrow.errors import GrowthRefused, Refusal, SpecError
from fxgrow.ir.memory import Memory, writes
from fxgrow.ir.nodes import NodeInfo, info_of, meta_like, meta_of, meta_of_copy
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.stacks import block_path, children_of, stack_name, stacks_of
from fxgrow.ir.traced import Traced
from fxgrow.limits import check_blocks
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.changes import NEW, renamed_path
from fxgrow.passes.identity import Identity, Values, at, carriers, merged, same_value, stream_outputs
from fxgrow.passes.state import State
from fxgrow.plan import Change, CloneBlock, Renumber, Step, TensorPlan, key_of
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
    stacks = stacks_in_line(state.program, state.graph)
    names = [s for s in stacks if _named(s, op.stack)]
    if not names:
        if beside := [s for s in stacks_of(state.program) if _named(s, op.stack)]:
            why = (
                "none of its blocks reads what another one computes: they stand side by side, as the experts of a "
                "mixture do, so that no block of it could follow another"
            )
            raise GrowthRefused(Refusal(stack_name(beside[0]), f"{why}. Deepen the stack that it is part of", "deepen"))
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


def _named(stack: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(stack_name(stack), pattern) or stack == pattern


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
    regions = block_regions(program, state.graph, stack)
    blocks = _Blocks(program, state.graph, stack, regions, Memory(state.graph), state.tensors)
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
        source, found = blocks.choose(source, after, op.init, numbers)
        new_number = order[0][0] + position
        zeros[len(clones)] = found.values
        step.notes += found.notes
        clones.append(
            CloneBlock(
                stack=stack,
                source=source,
                after=after,
                number=new_number,
                init=found.init,
                gate=f"{block_path(stack, new_number)}.alpha" if found.init == "gate" else None,
                why_gate=found.why,
            )
        )
    prefixes = {block_path(stack, a): block_path(stack, b) for a, b in numbering.items() if a != b}
    shared = blocks.shared()
    tensors = _clone_tensors(state, clones, zeros, shared)
    state.apply(step, [*clones, Renumber(prefixes=prefixes)])
    state.rename(lambda name: renamed_path(name, prefixes))
    _add_tensors(state, clones, numbering, tensors, [renamed_path(n, prefixes) for n in shared])
    state.order_blocks(stack)


@dataclass(frozen=True)
class _Copy:
    """How a copy of a block is the identity.

    Attributes:
        init: by zeros, by a gate, or not at all (``stack``).
        values: the parameters to set, and to what.
        why: it takes a gate: the op and its line.
        notes: what a user should know of it.
    """

    init: Literal["zero", "gate", "stack"]
    values: Values = field(default_factory=dict)
    why: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Blocks:
    """The blocks of one stack, in every captured call."""

    program: Traced
    graph: fx.Graph
    stack: str
    regions: list[Region]
    memory: Memory
    tensors: Mapping[str, TensorPlan]
    found: dict[tuple[int, int], _Copy] = field(default_factory=dict)

    def choose(self, source: int, after: int, init: str, numbers: list[int]) -> tuple[int, _Copy]:
        """The block to copy, which is ``source`` where that can be, else the nearest one that can; and how.

        Raises:
            GrowthRefused: none can.
        """
        try:
            return source, self.identity(source, after, init)
        except GrowthRefused as refusal:
            first = refusal
        if init != "stack":  # a copy that is the identity holds another block's numbers as well as this one's
            for other in sorted(numbers, key=lambda n: abs(n - source)):
                with contextlib.suppress(GrowthRefused):
                    found = self.identity(other, after, init)
                    reason = first.refusal.why if first.refusal is not None else str(first)
                    paths = [block_path(self.stack, n) for n in (after, other)]
                    note = f"the new block after {paths[0]} is a copy of {paths[1]}: {reason}"
                    return other, replace(found, notes=(*found.notes, note))
        raise GrowthRefused(f"{first}{self.others(numbers, init)}", first.refusal) from None

    def identity(self, source: int, after: int, init: str) -> _Copy:
        """How a copy of one block, placed after another, is the identity in every call.

        Raises:
            GrowthRefused: the block is not one piece of the graph, or there is no identity of the kind asked for.
        """
        if (source, after) not in self.found:
            self.found[source, after] = self._identity(source, after, init)
        return self.found[source, after]

    def _identity(self, source: int, after: int, init: str) -> _Copy:
        path = block_path(self.stack, source)
        mine = [r for r in self.regions if r.path == path]
        if not mine or {r.call for r in mine} != self.ran.get(path):
            raise self.refuse(f"the forward calls {path} more than once, or never", "Deepen a stack that runs once")
        searches = [self._in_one_call(r, after, init) for r in mine]
        if init == "stack":
            return _Copy("stack")
        values = merged(values for values, _ in searches)
        if values is not None:
            drops = {at(n) for _, search in searches for n in search.drops}
            return _Copy("zero", values, notes=tuple(map(_drops_again, sorted(drops))))
        for region in mine:
            self._check_gate(region)
        why = next((search.why for values, search in searches if values is None), None)
        asked = "the spec asks for one" if init == "gate" else "its calls would set one parameter to two numbers"
        return _Copy("gate", why=why or asked)

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

    def _in_one_call(self, region: Region, after: int, init: str) -> tuple[Values | None, Identity]:
        """What to set so that the copy is the identity, None where only a gate can make it one; and the search."""
        regions = [r for r in self.regions if r.call == region.call]
        source = stream_input(region, self.stack, regions)
        before = next((r for r in regions if r.path == block_path(self.stack, after)), None)
        if before is None:
            raise self.refuse(
                f"a call runs {region.path} but not block {after}", "Place the new block after one it runs"
            )
        if not stream_outputs(before):
            raise self.refuse(
                f"nothing that {before.path} computes is used outside it, so that a copy after it would have no input",
                "Place the new block after another one",
            )
        last = before.nodes[-1]
        late = [n for n in region.inputs if n is not source and self.memory.place[n] > self.memory.place[last]]
        if late:
            raise self.refuse(
                f"{region.path} reads {late[0].name}, which is computed after {before.path} ({at(late[0])})",
                "Place the new block after a later one",
            )
        trained = {n: p for n, p in self.program.parameters.items() if p.is_floating_point()}
        given = stream_output(before, self.stack, stream_outputs(region)[0])
        search = Identity(region, source, (given, last), self.memory, trained, self._is_zero)
        elsewhere = search.write_elsewhere()
        if elsewhere is not None:
            node, value = elsewhere
            raise self.refuse(
                f"{region.path} writes into {value.target if value.op == 'get_attr' else value.name}, which is not its "
                f"own ({at(node)}), so that a copy of it would write there a second time",
                "Keep that state inside the block",
            )
        found = search.find() if init in ("auto", "zero") else None
        if found is None and init == "zero":
            raise self.refuse(
                f"init: zero needs a block that returns its input plus branches that end in layers of its own, which "
                f"can be set to zero; {region.path} returns something else ({search.why})",
                "Use init: gate, or auto",
            )
        return found, search

    def _is_zero(self, name: str) -> bool:
        """Whether a parameter is zero now, where its values are at hand."""
        plan, value = self.tensors[name], self.program.parameters[name]
        if plan.zero:
            return plan.level == 0
        return plan.source is not None and not value.is_meta and not bool(value.detach().any())

    def _check_gate(self, region: Region) -> None:
        """A gate needs the block's input as it was."""
        source = stream_input(region, self.stack, [r for r in self.regions if r.call == region.call])
        for node in region.nodes:
            if any(source in self.memory.sharing(target) for target in writes(node)):
                raise self.refuse(
                    f"{region.path} changes its input in place ({at(node)}), and a gate between the block's input and "
                    "its output needs the input as it was",
                    "Write it without the in-place op",
                )


def _drops_again(op: str) -> str:
    return (
        f"{op} drops entries of the sum, those of a new block once more: it is the identity without dropout, and in "
        "the mean with it (init: gate is the identity with dropout, too)"
    )


# identity ---------------------------------------------------------------------------------------------------------


def stream_input(region: Region, stack: str, regions: list[Region]) -> fx.Node:
    """The block's input that its output replaces: same shape, and where there are several, what the block before gives.

    Raises:
        GrowthRefused: no input or no single output has the right shape.
    """
    found = stream_outputs(region)
    if len(found) != 1:
        why = (
            f"{len(found)} values that {region.path} computes are used outside it "
            f"({'; '.join(map(at, found))}), and a copy that follows it can take up one only"
        )
        raise GrowthRefused(Refusal(stack_name(stack), why, "deepen"))
    (out,) = found
    same = [n for n in region.inputs if sizes_of(n) is not None and sizes_of(n) == sizes_of(out)]
    if len(same) > 1:
        before = [outputs[0] for r in regions if len(outputs := stream_outputs(r)) == 1]
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


def stream_output(region: Region, stack: str, like: fx.Node) -> fx.Node:
    """The value of a block that a copy after it takes up: the one that has the shape of the copy's own result.

    Raises:
        GrowthRefused: none of its values has, or several have.
    """
    found = [n for n in stream_outputs(region) if sizes_of(n) == sizes_of(like)]
    if len(found) != 1:
        what = "none" if not found else f"{len(found)}"
        why = f"{what} of the values that {region.path} computes for others has the shape {sizes_of(like)}"
        raise GrowthRefused(Refusal(stack_name(stack), why, "deepen"))
    return found[0]


def _adds_to(out: fx.Node, source: fx.Node, region: Region) -> bool:
    """Whether a block's result is this input of it with other values added to it."""
    out = same_value(out)
    return out is source or (out in region.nodes and any(_adds_to(a, source, region) for a in carriers(out)))


# graph ------------------------------------------------------------------------------------------------------------


def _temporary(clone: CloneBlock) -> str:
    return block_path(clone.stack, f"{NEW}{clone.number}")


def clone_region(graph: fx.Graph, change: CloneBlock, region: Region, regions: list[Region]) -> None:
    """Copy a block's nodes in one call, feed the copy with the output of the block before, and pass its result on."""
    predecessor = next(r for r in regions if r.path == block_path(change.stack, change.after))
    (result,) = stream_outputs(region)
    before = stream_output(predecessor, change.stack, result)
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
        out = env[result]
        if change.init == "gate":
            assert change.gate is not None
            alpha = graph.get_attr(f"{new_path}.alpha")
            dtype = getattr(result.meta.get("val"), "dtype", torch.float32)
            alpha.meta = meta_of(torch.empty((), dtype=dtype, device="meta"), NodeInfo(module_path=new_path))
            aten = torch.ops.aten
            meta = meta_like(result, module_path=new_path)
            difference = graph.call_function(aten.sub.Tensor, (out, before))
            gated = graph.call_function(aten.mul.Tensor, (difference, alpha))
            out = graph.call_function(aten.add.Tensor, (before, gated))
            for made in (difference, gated, out):
                made.meta = dict(meta)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(before, out)


def _renamed_meta(node: fx.Node, renamed: Callable[[str], str]) -> dict[str, Any]:
    return meta_of_copy(node, module_path=renamed(info_of(node).module_path))


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
            copied.fresh, copied.inserted = clone.init != "stack", clone.init == "stack"
            copied.key = key_of(new)
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
