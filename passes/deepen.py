"""``deepen``: insert blocks into a repeated stack (LLaMA Pro; a learned gate elsewhere; G_stack copies on request)."""

from __future__ import annotations

import contextlib
import fnmatch
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fxgrow.capture import Program
from fxgrow.errors import GrowthRefused, SpecError
from fxgrow.limits import check_blocks
from fxgrow.passes.base import GrowthPass, State, register_pass
from fxgrow.plan import Change, CloneBlock, Renumber, Step, TensorPlan
from fxgrow.regenerate import Region, block_regions, stacks_of
from fxgrow.rules.base import RULES, Pointwise, bound_arguments, op_name
from fxgrow.spec import Deepen


class DeepenPass(GrowthPass):
    """Clones blocks of a stack and renumbers them."""

    op = "deepen"

    def apply(self, graph: fx.Graph, change: Change) -> None:
        assert self.program is not None
        if isinstance(change, CloneBlock):
            clone_block(self.program, graph, change)
        elif isinstance(change, Renumber):
            rename_modules(self.program, graph, change.prefixes)
        else:
            super().apply(graph, change)


def plan_deepen(state: State, op: Deepen) -> list[Step]:
    """Decide which blocks are inserted where and how each is the identity, and apply it.

    Raises:
        SpecError: no stack matches, or the number of blocks asked for is none.
        GrowthRefused: a block is not one piece of the graph, or no identity of it exists.
    """
    stacks = stacks_of(state.program)
    names = [s for s in stacks if fnmatch.fnmatchcase(s, op.stack)]
    if not names:
        raise SpecError(
            f"no repeated stack matches {op.stack!r}; the model has: {', '.join(stacks) or 'none'} "
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
            raise SpecError(f"{stack} has blocks {numbers[0]} to {numbers[-1]}, no block {wrong[0]}")
        check_blocks(stack, n, len(op.after))
        return [(a, a) for a in sorted(op.after)]
    if op.factor is not None:
        check_blocks(stack, n, n * op.factor - n)
        total = round(n * op.factor)
        if abs(total - n * op.factor) > 1e-6:
            raise SpecError(f"{stack} has {n} blocks; factor {op.factor:g} gives {n * op.factor:g}, no whole number")
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
        step.notes.append(f"{stack} keeps its {len(numbers)} blocks")
        return
    regions = block_regions(program, state.graph, stack)
    numbering: dict[int, int] = {}
    order: list[tuple[int, int | None]] = []  # (old number, number in new_blocks)
    for number in numbers:
        order.append((number, None))
        order += [(source, i) for i, (source, after) in enumerate(new_blocks) if after == number]
    clones: list[CloneBlock] = []
    zeros: dict[int, list[str]] = {}
    for position, (number, i) in enumerate(order):
        if i is None:
            numbering[number] = numbers[0] + position
            continue
        source, after = new_blocks[i]
        try:
            init, zeroed = _identity_everywhere(state.graph, regions, f"{stack}.{source}", op.init, stack)
        except GrowthRefused as refusal:
            raise GrowthRefused(f"{refusal}{_other_blocks(state.graph, regions, numbers, op.init, stack)}") from None
        new_number = numbers[0] + position
        zeros[len(clones)] = zeroed
        clones.append(
            CloneBlock(
                stack=stack,
                source=source,
                after=after,
                number=new_number,
                init=init,
                gate=f"{stack}.{new_number}.alpha" if init == "gate" else None,
            )
        )
    prefixes = {f"{stack}.{a}": f"{stack}.{b}" for a, b in numbering.items() if a != b}
    tensors = _clone_tensors(state, clones, zeros)
    changes: list[Change] = [*clones, Renumber(prefixes=prefixes)]
    # from the last to the first, so that no clone moves the input of a block that is still to be copied: what is known
    # of the blocks stays true
    for change in reversed(clones):
        clone_block(program, state.graph, change, regions)
    DeepenPass(step, program).apply(state.graph, changes[-1])
    state.rename(lambda name: renamed_path(name, prefixes))
    _add_tensors(state, clones, numbering, tensors)
    state.order_blocks(stack)
    step.changes.extend(changes)
    state.structure_changed()


def _other_blocks(graph: fx.Graph, regions: list[Region], numbers: list[int], init: str, stack: str) -> str:
    """The blocks of the stack that a copy could be made of, in words."""
    able = []
    for number in numbers:
        with contextlib.suppress(GrowthRefused):
            _identity_everywhere(graph, regions, f"{stack}.{number}", init, stack)
            able.append(number)
    return f"\n(blocks of {stack} that can be copied: use `after: {able}`, or some of them)" if able else ""


def _identity_everywhere(
    graph: fx.Graph, regions: list[Region], path: str, init: str, stack: str
) -> tuple[Any, list[str]]:
    """One identity for every captured call that runs the block."""
    mine = [r for r in regions if r.path == path]
    ran = {
        n.meta.get("call", 0)
        for n in graph.nodes
        if n.op == "call_function" and (n.meta.get("module_path", "") + ".").startswith(path + ".")
    }
    if not mine or {r.call for r in mine} != ran:
        raise GrowthRefused(
            f"cannot deepen {stack}: block {path} is not one piece of the graph (it is called more than once, or never)"
        )
    found = [_identity(r, init, stack, [x for x in regions if x.call == r.call]) for r in mine]
    kinds = {kind for kind, _ in found}
    if "gate" in kinds and len(kinds) > 1:
        found = [_identity(r, "gate", stack, [x for x in regions if x.call == r.call]) for r in mine]
    return found[0][0], list(dict.fromkeys(name for _, names in found for name in names))


# identity ---------------------------------------------------------------------------------------------------------


def stream_input(region: Region, stack: str, regions: list[Region]) -> fx.Node:
    """The block's input that its output replaces: same shape, and where there are several, what the block before gives.

    Raises:
        GrowthRefused: no input or no single output has the right shape.
    """
    from fxgrow.axes.analysis import sizes_of

    if len(region.outputs) != 1:
        raise GrowthRefused(
            f"cannot deepen {stack}: block {region.path} hands on {len(region.outputs)} values "
            f"({', '.join(n.name for n in region.outputs)}), not one"
        )
    (out,) = region.outputs
    same = [n for n in region.inputs if sizes_of(n) is not None and sizes_of(n) == sizes_of(out)]
    if len(same) > 1:
        before = [r.outputs[0] for r in regions if r.path.startswith(stack + ".") and len(r.outputs) == 1]
        linked = [n for n in same if n in before]
        chain = [n for n in same if _adds_to(out, n, region)]
        same = linked if len(linked) == 1 else chain if len(chain) == 1 else same
    if len(same) != 1:
        what = "none of its inputs has" if not same else f"{len(same)} of its inputs have"
        raise GrowthRefused(
            f"cannot deepen {stack}: block {region.path} maps to shape {sizes_of(out)}, and {what} that shape"
        )
    return same[0]


def _adds_to(out: fx.Node, source: fx.Node, region: Region) -> bool:
    found = _branches(out, source, region)
    return found is not None


def _branches(out: fx.Node, source: fx.Node, region: Region) -> list[fx.Node] | None:
    """The terms f, g ... of ``out = source + f + g ...``, or None where out is no such sum."""
    out = _same_value(out)
    if out is source:
        return []
    if out not in region.nodes or op_name(out.target) not in ("aten.add.Tensor", "aten.add_.Tensor"):
        return None
    args = bound_arguments(out)
    if args.get("alpha", 1) != 1:
        return None
    a, b = args["self"], args["other"]
    for carrier, branch in ((a, b), (b, a)):
        if isinstance(carrier, fx.Node) and isinstance(branch, fx.Node):
            rest = _branches(carrier, source, region)
            if rest is not None:
                return [*rest, branch]
    return None


def _same_value(node: fx.Node) -> fx.Node:
    """Through casts to the dtype the value has already (``x.float()`` in a float32 model) and copies of it."""
    while node.op == "call_function" and op_name(node.target) in _CASTS and isinstance(node.args[0], fx.Node):
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        if getattr(before, "dtype", None) != getattr(after, "dtype", None):
            break
        node = node.args[0]
    return node


_CASTS = (
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten._to_copy.default",
    "aten.type_as.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
)

#: ops whose result is zero when these parameters are
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "aten.linear.default": ("weight", "bias"),
    "aten.addmm.default": ("mat2", "self"),
    "aten.batch_norm.default": ("weight", "bias"),
    "aten.layer_norm.default": ("weight", "bias"),
    "aten.rms_norm.default": ("weight",),
    "aten.group_norm.default": ("weight", "bias"),
    **{f"aten.conv{n}d.{o}": ("weight", "bias") for n in (1, 2, 3) for o in ("default", "padding")},
}


def last_projection(branch: fx.Node, region: Region) -> list[str] | None:
    """Parameters that make a branch zero when they are: those of its last projection, or None."""
    node = branch
    while node in region.nodes:
        name = op_name(node.target)
        if len(node.users) > 1:
            return None  # its value is also used elsewhere in the block
        if name in _PROJECTIONS:
            return _own_parameters(node, _PROJECTIONS[name], region)
        rule = RULES.get(name)
        args = bound_arguments(node)
        operands = [a for a in args.values() if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]
        product = name in ("aten.mul.Tensor", "aten.div.Tensor")
        zero = (rule is not None and rule.linear(node)) or (isinstance(rule, Pointwise) and rule.zero is True)
        if not operands or not (product or (zero and len(operands) == 1)):
            return None
        inside = [o for o in (operands[:1] if name == "aten.div.Tensor" else operands) if o in region.nodes]
        if len(inside) != 1:
            return None
        node = inside[0]
    return None


def _own_parameters(node: fx.Node, operands: tuple[str, ...], region: Region) -> list[str] | None:
    out = []
    args = bound_arguments(node)
    for operand in operands:
        value = args.get(operand)
        if value is None and operand in ("bias",):
            continue
        if not isinstance(value, fx.Node):
            return None
        user = node
        while value.op == "call_function" and _only_moves(value):
            user, value = value, value.all_input_nodes[0]
        if value.op != "get_attr" or not str(value.target).startswith(region.path + ".") or _shared(value, user):
            return None
        out.append(str(value.target))
    return out


def _only_moves(node: fx.Node) -> bool:
    """Whether a value is zero when the one it is made of is, entry by entry."""
    rule = RULES.get(op_name(node.target))
    return rule is not None and rule.moves and rule.linear(node) and len(node.all_input_nodes) == 1


def _shared(parameter: fx.Node, user: fx.Node) -> bool:
    """Whether another op of the same call uses the parameter."""
    return any(u is not user and u.meta.get("call", 0) == user.meta.get("call", 0) for u in parameter.users)


def _identity(region: Region, init: str, stack: str, regions: list[Region]) -> tuple[Any, list[str]]:
    """How a copy of the block is the identity, and which of its parameters are zero then.

    ``regions`` are the blocks of the same call.
    """
    source = stream_input(region, stack, regions)
    writes = [
        n
        for n in region.nodes
        if getattr(getattr(n.target, "_schema", None), "is_mutable", False) and n.args and n.args[0] is source
    ]
    if init == "stack":
        return "stack", []
    if init in ("auto", "zero"):
        branches = _branches(region.outputs[0], source, region)
        found = [last_projection(b, region) for b in branches] if branches else [None]
        if all(f is not None for f in found):
            return "zero", [name for f in found if f is not None for name in f]
        if init == "zero":
            line = region.outputs[0].meta.get("source", "")
            raise GrowthRefused(
                f"cannot deepen {stack} with init: zero: the result of {region.path} ({line}) is not its input plus "
                "branches that end in projections; use init: gate (or auto)"
            )
    if writes:
        raise GrowthRefused(
            f"cannot deepen {stack}: {region.path} writes into its input in place "
            f"({writes[0].target} at {writes[0].meta.get('source', '')}), so that a gate cannot restore it"
        )
    return "gate", []


# graph ------------------------------------------------------------------------------------------------------------


#: marks the number of a new block until the old ones have moved out of its way
_NEW = "+"


def _temporary(clone: CloneBlock) -> str:
    return f"{clone.stack}.{_NEW}{clone.number}"


def clone_block(program: Program, graph: fx.Graph, change: CloneBlock, regions: list[Region] | None = None) -> None:
    """Copy a block's nodes in every call, feed the copy with the output of the block before, and pass its result on.

    ``regions`` are the stack's blocks in the graph as it is; looked up where None.
    """
    if regions is None:
        regions = block_regions(program, graph, change.stack)
    for region in [r for r in regions if r.path == f"{change.stack}.{change.source}"]:
        _clone_region(graph, change, region, [r for r in regions if r.call == region.call])


def _clone_region(graph: fx.Graph, change: CloneBlock, region: Region, regions: list[Region]) -> None:
    predecessor = next(r for r in regions if r.path == f"{change.stack}.{change.after}")
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
            alpha.meta = {"val": torch.empty((), dtype=dtype, device="meta"), "module_path": new_path, "source": ""}
            aten = torch.ops.aten
            meta = {**_renamed_meta(region.outputs[0], renamed), "module_path": new_path}
            difference = graph.call_function(aten.sub.Tensor, (out, before))
            gated = graph.call_function(aten.mul.Tensor, (difference, alpha))
            out = graph.call_function(aten.add.Tensor, (before, gated))
            for made in (difference, gated, out):
                made.meta = dict(meta)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(before, out)


def _renamed_meta(node: fx.Node, renamed: Callable[[str], str]) -> dict[str, Any]:
    meta = dict(node.meta)
    meta["module_path"] = renamed(meta.get("module_path", ""))
    return meta


def rename_modules(program: Program, graph: fx.Graph, prefixes: dict[str, str]) -> None:
    """Rename module paths in targets and metadata; temporary names of new blocks become their numbers."""
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = renamed_path(str(node.target), prefixes)
        if "module_path" in node.meta:
            node.meta["module_path"] = renamed_path(node.meta["module_path"], prefixes)


def renamed_path(name: str, prefixes: dict[str, str]) -> str:
    """``name`` with the longest matching prefix replaced; ``stack.+7`` becomes ``stack.7``."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        head = ".".join(parts[:i])
        if head in prefixes:
            return ".".join([prefixes[head], *parts[i:]])
        if parts[i - 1].startswith(_NEW):
            return ".".join([*parts[: i - 1], parts[i - 1].removeprefix(_NEW), *parts[i:]])
    return name


# tensors ----------------------------------------------------------------------------------------------------------


def _clone_tensors(state: State, clones: list[CloneBlock], zeros: dict[int, list[str]]) -> dict[str, TensorPlan]:
    """Plans of the new blocks' tensors, by their new names."""
    out: dict[str, TensorPlan] = {}
    sources = _by_block(state.tensors, {f"{c.stack}.{c.source}" for c in clones})
    for i, clone in enumerate(clones):
        old = f"{clone.stack}.{clone.source}"
        for name in sources.get(old, ()):
            new = f"{clone.stack}.{clone.number}{name[len(old) :]}"
            copied = state.tensors[name].model_copy(deep=True)
            copied.fresh = clone.init != "stack"
            copied.key = zlib.crc32(new.encode())
            if name in zeros[i]:
                copied.zero = True
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
    state: State, clones: list[CloneBlock], numbering: dict[int, int], tensors: dict[str, TensorPlan]
) -> None:
    """Enter the new blocks' names, each like those of the block it was copied from, which has its new number by now."""
    program = state.program
    state.tensors.update(tensors)
    likes = {f"{c.stack}.{numbering[c.source]}" for c in clones}

    def under(table: Iterable[str]) -> dict[str, list[str]]:
        return _by_block(table, likes)

    tables: list[dict[str, Any]] = [program.parameters, program.buffers, program.requires_grad]
    tables += [program.containers, program.module_types]
    theirs = [under(t) for t in tables]
    persistent, aliases = under(program.persistent), under(program.aliases)
    for clone in clones:
        path = f"{clone.stack}.{clone.number}"
        like = f"{clone.stack}.{numbering[clone.source]}"

        def moved(name: str, like: str = like, path: str = path) -> str:
            return path + name[len(like) :] if name.startswith(like + ".") or name == like else name

        for table, names in zip(tables, theirs, strict=True):
            table.update({moved(n): table[n] for n in names.get(like, ())})
        program.persistent |= {moved(n) for n in persistent.get(like, ())}
        program.aliases.update({moved(a): moved(program.aliases[a]) for a in aliases.get(like, ())})
        if clone.gate is not None:
            dtype = next((p.dtype for p in program.parameters.values() if p.is_floating_point()), torch.float32)
            device = next((p.device for p in program.parameters.values()), torch.device("cpu"))
            program.parameters[clone.gate] = torch.zeros((), dtype=dtype, device=device)
            program.requires_grad[clone.gate] = True
            state.tensors[clone.gate] = TensorPlan(
                source=None, shape=[], init="zeros", fresh=True, dtype=str(dtype).removeprefix("torch.")
            )


register_pass("deepen", plan_deepen, DeepenPass)
