"""``lora``: low-rank adapters beside layers (Hu et al. 2021, section 4.1). Nothing changes until they have learnt."""

from __future__ import annotations

import fnmatch
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

from fxgrow.analysis.call import from_parameter
from fxgrow.errors import GrowthRefused, Refusal, SpecError, did_you_mean
from fxgrow.ir.adapters import DOWN, UP
from fxgrow.ir.nodes import NodeInfo, info_of, meta_like, meta_of, note
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.state import State
from fxgrow.plan import FILL_RANDOM, Adapt, Change, DimPlan, Step, TensorPlan, key_of
from fxgrow.rules.base import casts, copies
from fxgrow.spec import Lora, Operation

_LOOKS_UP = "aten.embedding.default"
_TRANSPOSED = ("aten.addmm.default", "aten.mm.default", "aten.matmul.default")
#: ops that multiply by a weight or look up in one, and which argument it is
_WEIGHTS = {
    "aten.linear.default": 1,
    _LOOKS_UP: 0,
    "aten.addmm.default": 2,
    "aten.mm.default": 1,
    "aten.matmul.default": 1,
}
#: and which one is what it is multiplied by, or looked up by
_DATA = {kind: {1: 0, 0: 1, 2: 1}[weight] for kind, weight in _WEIGHTS.items()}
_VIEWS = ("aten.view.default", "aten.reshape.default")


class LoraPass(GrowthPass):
    """Puts adapters into a graph."""

    op = "lora"

    def apply(self, graph: fx.Graph, change: Change) -> None:
        if isinstance(change, Adapt):
            adapt(self.named(graph)(change.input), self.named(graph)(change.output), change)
        else:
            super().apply(graph, change)


def plan_lora(state: State, op: Lora) -> list[Step]:
    """Decide which layers get adapters, and give them to them.

    Raises:
        SpecError: no layer with a weight matches, or one has an adapter already.
        GrowthRefused: a layer takes or returns more than one value, or is called more than once.
    """
    places, several = _layers(state.graph)
    beside = adapted_layers(state.graph)
    places = {p: kind for p, kind in places.items() if p in beside or not any(p in pair for pair in beside.values())}
    names = [p for p in places if fnmatch.fnmatchcase(p, op.modules)]
    for name in beside:
        matched = name if names else name.rpartition(".")[0]  # a module around the layer and its adapter
        if name in names or (not names and fnmatch.fnmatchcase(matched, op.modules)):
            halves = ", ".join(p for p in beside[name] if p != name)  # fxgrow's own are the layer's
            given = f" ({halves})" if halves else ""
            raise SpecError(f"{matched} has an adapter already{given}: widen its rank, or merge it first")
    if not names:
        for name in several:
            if fnmatch.fnmatchcase(name, op.modules):
                raise _refusal(name, f"it has several weights ({', '.join(several[name])}), and an adapter is of one")
        raise SpecError(f"no linear layer or embedding matches {op.modules!r}; {did_you_mean(op.modules, places)}")
    step = Step(op="lora", request=op.model_dump(exclude_defaults=True, mode="json"))
    for name in names:
        _adapt_layer(state, op, name, places[name], step)
    return [step]


def _layers(graph: fx.Graph) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Layers that multiply by a weight or look up in one, by module path, and the op that does.

    Returns:
        Them, and the weights of modules that have more than one, such as attention with weights of its own.
    """
    found: dict[str, str] = {}
    read: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for weight in node.all_input_nodes:
            name, sizes = str(weight.target), sizes_of(weight)
            if weight.op == "get_attr" and len(sizes or []) > 1 and name.rpartition(".")[2] not in (DOWN, UP):
                inner = info_of(node).module_path
                while inner:
                    if name not in read.setdefault(inner, []):
                        read[inner].append(name)
                    inner = inner.rpartition(".")[0]
        kind, path = op_name(node.target), info_of(node).module_path
        weight = node.args[_WEIGHTS[kind]] if kind in _WEIGHTS else None
        if path and isinstance(weight, fx.Node) and weight.op == "get_attr":
            found[path] = kind
    several = {p: read[p] for p in found if len(read[p]) > 1}
    return {p: k for p, k in found.items() if p not in several}, several


def adapted_layers(graph: fx.Graph) -> dict[str, tuple[str, str]]:
    """Layers beside which the model's own class adds a low-rank product of the same input, as libraries write adapters.

    Returns:
        By module path of the layer, those of the product's two halves.
    """
    found: dict[str, tuple[str, str]] = {}
    for node in graph.nodes:
        if op_name(node.target) != "aten.add.Tensor" or not all(isinstance(a, fx.Node) for a in node.args[:2]):
            continue
        for base, branch in (node.args[:2], node.args[1::-1]):
            up = _product(branch)
            down = _product(up.args[_DATA[op_name(up.target)]]) if up is not None else None
            layer = _product(base)
            while layer is None and op_name(_plain(base).target) == "aten.add.Tensor":  # beside another one
                base = _plain(base).args[0]
                layer = _product(base)
            if up is None or down is None or layer is None or layer in (up, down):
                continue
            ends = [_plain(n.args[_DATA[op_name(n.target)]]) for n in (layer, down)]
            paths = [info_of(n).module_path for n in (layer, down, up)]
            inside = paths[0].rpartition(".")[0]
            if ends[0] is ends[1] and all(f"{p}.".startswith(f"{inside}.") or not inside for p in paths):
                found[paths[0]] = paths[1], paths[2]
    return found


def _product(node: Any) -> fx.Node | None:
    """The product with a weight, or the look-up in one, that a value is, seen through factors, casts and dropout."""
    node = _plain(node)
    at = _WEIGHTS.get(op_name(node.target)) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return node if at is not None and from_parameter(node.args[at]) else None


def _plain(node: Any) -> Any:
    """A value before factors, casts, views and dropout."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        name = op_name(node.target)
        by_number = name in ("aten.mul.Tensor", "aten.div.Tensor") and not isinstance(node.args[1], fx.Node)
        if not (by_number or "dropout" in name or casts(node) or copies(node) or name in _VIEWS):
            break
        node = node.args[0]
    return node


def _adapt_layer(state: State, op: Lora, name: str, kind: str, step: Step) -> None:
    program, embedding = state.program, kind == _LOOKS_UP
    changes, sizes = [], set()
    for call in range(max(1, len(program.calls))):
        inside = [n for n in state.graph.nodes if n.op == "call_function" and info_of(n).call == call]
        inside = [n for n in inside if info_of(n).inside(name)]
        if not inside:
            continue
        source, result = _ends(inside, name)
        into, out = sizes_of(source), sizes_of(result)
        assert into is not None and out is not None
        sizes.add((_vocabulary(inside) if embedding else into[-1], out[-1]))
        changes.append(
            Adapt(
                path=name,
                input=source.name,
                output=result.name,
                rank=op.rank,
                alpha=float(op.rank if op.alpha is None else op.alpha),
                dropout=0.0 if embedding else op.dropout,
                embedding=embedding,
                transposed=kind in _TRANSPOSED,
                padding=_padding(inside) if embedding else None,
                sizes=[],
            )
        )
    if len(sizes) != 1 or not all(isinstance(s, int) for s in next(iter(sizes))):
        raise _refusal(name, f"its sizes are {sorted(map(str, sizes))}, and an adapter needs fixed ones")
    (wide, out_width) = next(iter(sizes))
    for change in changes:
        change.sizes = [int(wide), int(out_width)]
    state.apply(step, changes)
    _add(state, op, name, int(wide), int(out_width), embedding)


def _ends(inside: list[fx.Node], name: str) -> tuple[fx.Node, fx.Node]:
    """The one value that a layer takes, and the one that it hands on."""
    members = set(inside)
    outside = {i for n in inside for i in n.all_input_nodes if i not in members and i.op != "get_attr"}
    taken = [n for n in outside if sizes_of(n) is not None]
    given = [n for n in inside if sizes_of(n) is not None and any(u not in members for u in n.users)]
    if len(taken) != 1 or len(given) != 1:
        raise _refusal(name, f"it takes {len(taken)} tensors and hands on {len(given)}, and an adapter follows one")
    if any("@" in info_of(n).module_call for n in inside):
        raise _refusal(name, "the forward calls it more than once")
    return taken[0], given[0]


def _vocabulary(inside: list[fx.Node]) -> Any:
    """How many entries a table has."""
    look_up = next(n for n in inside if op_name(n.target) == _LOOKS_UP)
    table = look_up.args[0]
    sizes = sizes_of(table) if isinstance(table, fx.Node) else None
    return sizes[0] if sizes else None


def _padding(inside: list[fx.Node]) -> int | None:
    """The entry of a table that gets no gradient."""
    look_up = next(n for n in inside if op_name(n.target) == _LOOKS_UP)
    number = bound_arguments(look_up).get("padding_idx")
    return number if isinstance(number, int) and number >= 0 else None


def _refusal(name: str, why: str) -> GrowthRefused:
    return GrowthRefused(Refusal(name, why, "adapt"))


def _add(state: State, op: Lora, name: str, wide: int, out: int, embedding: bool) -> None:
    """The adapter's two weights: one of them random, one zero."""
    program = state.program
    kin = [t for n, t in program.parameters.items() if n.startswith(f"{name}.") and t.is_floating_point()]
    like = kin[0] if kin else next(iter(program.parameters.values()))
    others = _other_paths(state, name)
    std = 1.0 if embedding else 1 / math.sqrt(3 * wide)  # that of a uniform number up to 1 / sqrt(in)
    for leaf, shape in ((DOWN, [op.rank, wide]), (UP, [out, op.rank])):
        random = (leaf == UP) if embedding else (leaf == DOWN)
        full, rows = f"{name}.{leaf}", shape[0]
        drawn = DimPlan(index=-1 - np.arange(rows), fill=np.full(rows, FILL_RANDOM))
        state.tensors[full] = TensorPlan(
            source=None,
            shape=list(shape),
            initial=[1, shape[1]] if random else list(shape),
            dims=[drawn if random else None, None],
            init="zeros",
            fresh=True,
            key=key_of(full),
            random_std=std,
            random_seed=op.seed,
            dtype=str(like.dtype).removeprefix("torch."),
            device=str(like.device),
        )
        program.aliases |= {f"{other}.{leaf}": full for other in others}
        program.parameters[full] = torch.empty(shape, dtype=like.dtype, device="meta")
        program.requires_grad[full] = True


def _other_paths(state: State, name: str) -> list[str]:
    """Paths at which a layer stands too: those of its class that no call goes by and that hold its tensors alone."""
    program = state.program
    own = {n.removeprefix(f"{name}.") for n in program.parameters if n.startswith(f"{name}.")}
    own |= {n.removeprefix(f"{name}.") for n in program.aliases if n.startswith(f"{name}.")}

    def held(path: str, leaf: str) -> str:
        return program.aliases.get(f"{path}.{leaf}", f"{path}.{leaf}")

    return [
        path
        for path, kind in program.containers.items()
        if path != name
        and path not in program.module_types
        and kind == program.containers.get(name)
        and all(held(path, leaf) == held(name, leaf) for leaf in own - {DOWN, UP})
    ]


class UnadaptPass(GrowthPass):
    """Takes adapters out of a graph."""

    op = "unadapt"


class Unadapt(Operation):
    """What a merge leaves of a graph. No spec can ask for it: a plan with it is looked at, and changes no weight."""

    op: Literal["unadapt"] = "unadapt"
    paths: list[str]


def plan_unadapt(state: State, op: Unadapt) -> list[Step]:
    """Take adapters out of the graph, with their weights."""
    program = state.program
    gone = {f"{path}.{leaf}" for path in op.paths for leaf in (DOWN, UP)}
    for node in [n for n in state.graph.nodes if n.op == "get_attr" and n.target in gone]:
        if node.target.endswith(f".{UP}"):
            added = next(iter(node.users))  # the product, then the scaled product, then the sum
            while op_name(added.target) != "aten.add.Tensor":
                added = next(iter(added.users))
            added.replace_all_uses_with(added.args[0])
            _erase(added)
    for table in (program.parameters, program.requires_grad, state.tensors):
        for name in gone & table.keys():
            del table[name]
    program.aliases = {n: owner for n, owner in program.aliases.items() if owner not in gone}
    state.analyse_again()
    return []


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing uses, and what only it used."""
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for other in read:
        if not other.users and other.op != "placeholder":
            _erase(other)


def adapt(source: fx.Node, result: fx.Node, change: Adapt) -> None:
    """Add an adapter's nodes after a layer's result and send its users there."""
    graph, users = result.graph, list(result.users)
    aten = torch.ops.aten
    value = result.meta.get("val")
    dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
    call = info_of(result).call

    def attribute(leaf: str, shape: list[int]) -> fx.Node:
        out = graph.get_attr(f"{change.path}.{leaf}")
        out.meta = meta_of(torch.empty(shape, dtype=dtype, device="meta"), NodeInfo(module_path=change.path, call=call))
        return out

    def put(target: Any, *args: Any, sizes: list[Any] | None = None) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = meta_like(result, module_path=change.path, module_call=info_of(result).module_call, source="")
        if sizes is not None:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor):
                node.meta["val"] = val.new_empty([*val.shape[:-1], sizes[-1]]) if len(sizes) > 2 else val
            note(node, sizes=sizes)
        return node

    wide, out = change.sizes
    lead = list((sizes_of(result) or [])[:-1])
    with graph.inserting_after(result):
        anchor = graph.call_function(aten.alias.default, (result,))
    with graph.inserting_before(anchor):
        down, up = attribute(DOWN, [change.rank, wide]), attribute(UP, [out, change.rank])
        if change.embedding:
            table = graph.call_function(aten.transpose.int, (down, 0, 1))
            table.meta = meta_of(torch.empty([wide, change.rank], dtype=dtype, device="meta"), info_of(down))
            note(table, sizes=[wide, change.rank])
            padding = () if change.padding is None else (change.padding,)
            low = put(aten.embedding.default, table, source, *padding, sizes=[*lead, change.rank])
        else:
            if change.dropout:
                flag = graph.get_attr("training")
                flag.meta = meta_of(None, NodeInfo(module_path=change.path, is_flag=True, call=call))
                source = put(aten.dropout.default, source, change.dropout, flag, sizes=list(sizes_of(source) or []))
            low = put(aten.linear.default, source, down, sizes=[*lead, change.rank])
        high = put(aten.linear.default, low, up)
        scaled = put(aten.mul.Tensor, high, change.alpha / change.rank)
        added = put(aten.add.Tensor, result, scaled)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(result, added)


def vocabulary(graph: fx.Graph) -> tuple[set[str], set[int]]:
    """Paths of the tables that a graph looks up in, and their numbers of entries."""
    paths, entries = set(), set()
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node.target) == _LOOKS_UP and node.args[0].op == "get_attr":
            paths.add(info_of(node).module_path)
            entries.add((sizes_of(node.args[0]) or [0])[0])
    return paths, entries


register_pass("lora", plan_lora, LoraPass)
register_pass("unadapt", plan_unadapt, UnadaptPass)
