"""One graph with names of its own out of the exported ones."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.memory import Memory, writes
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.nodes import NodeInfo, info_of, meta_like, meta_of, note
from fxgrow.ir.ops import HigherOrderOperator, schema_of
from fxgrow.ir.provenance import provenance_of
from fxgrow.ir.traced import Call, Traced
from fxgrow.ir.traits import Trait, traits_of
from fxgrow.ir.treespecs import describe
from fxgrow.trace.constants import fold_constants
from fxgrow.trace.dtypes import join_casts
from fxgrow.trace.lines import source_line

#: an exported graph, and by node the (path, eval literal) pairs where the other mode's graph differs
Trace = tuple[torch.export.ExportedProgram, dict[str, list[tuple[Any, Any]]]]


def traced_from(
    model: nn.Module,
    traces: list[Trace],
    calls: list[Call],
) -> Traced:
    own = named_tensors(model)
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in own.items():
        first = kept.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
    parameter_names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    persistent = {n for n in model.state_dict(keep_vars=True) if n not in parameter_names}
    graph = fx.Graph()
    constants: dict[str, torch.Tensor] = {}
    attributes: dict[str, fx.Node] = {}
    types: dict[str, str] = {}
    structures = []
    for number, ((exported, flags), call) in enumerate(zip(traces, calls, strict=True)):
        before = set(graph.nodes)
        structures.append(_trace_into(graph, exported, flags, aliases, attributes, constants, call, number, own))
        call.nested = _nested_inputs(model, exported, call)
        shared = set(attributes.values())
        for node in graph.nodes:
            if number and node not in before and node not in shared:
                note(node, call=number)
        for node in exported.graph.nodes:
            for path, cls in (node.meta.get("nn_module_stack") or {}).values():
                types.setdefault(_clean(path), cls if isinstance(cls, str) else cls.__qualname__)
    graph.output(structures[0] if len(structures) == 1 else tuple(structures))
    join_casts(graph)
    fold_constants(graph, constants)
    graph.eliminate_dead_code(is_impure_node=_impure)
    needed = False
    for node in reversed([n for n in graph.nodes if n.op == "placeholder"]):
        if needed:
            node.args = ()  # Python allows no default before an argument without one
        needed |= not node.args
    _views_to_reshapes(graph)
    _memory_that_holds_nothing(graph)
    used = {n.target for n in graph.nodes if n.op == "get_attr"}
    for name in own:
        if aliases.get(name, name) == name and name not in used and name in parameter_names | persistent:
            used.add(name)  # unused, but part of the state dict
    program = Traced(
        graph=graph,
        parameters={n: p for n, p in own.items() if n in used and n in parameter_names},
        buffers={n: b for n, b in own.items() if n in used and n not in parameter_names},
        constants=constants,
        aliases={a: n for a, n in aliases.items() if n in used},
        persistent=persistent,
        requires_grad={n: p.requires_grad for n, p in own.items()},
        module_types=types,
        class_name=type(model).__name__,
        training=True,
        mode_reason="",
        args=calls[0].args,
        kwargs=calls[0].kwargs,
        # a module that stands at several places has several paths: a shared block has a number at each of them
        containers={n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)},
        calls=calls,
        signature=_positional(model),
        defaults=_defaults(model),
        members=_members(model),
    )
    graph.lint()
    return program


def _check_apart(constant: Any, own: Mapping[str, torch.Tensor]) -> None:
    """Refuse a constant that is a parameter's or buffer's memory: growth would part them, and it gets no gradient.

    Raises:
        CaptureError: the forward reads the tensor where PyTorch does not look for it.
    """
    if not isinstance(constant, torch.Tensor) or constant.is_meta or constant.layout != torch.strided:
        return
    memory = constant.untyped_storage().data_ptr()
    for name, tensor in own.items():
        same = tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() == memory
        if memory and same:
            raise CaptureError(
                f"the forward reads {name} through a plain attribute, a list or another object, which PyTorch traces "
                f"as a constant without gradient: read it as self.{name}, or keep it in a ParameterList"
            )


def _nested_inputs(
    model: nn.Module, exported: torch.export.ExportedProgram, call: Call
) -> dict[str, tuple[str, list[str]]]:
    """The forward parameters whose example is a list, tuple or dict, with the placeholders of their leaves."""
    specs = exported.graph_signature.input_specs
    names = iter([_argument_name(s.arg) for s in specs if s.kind is InputKind.USER_INPUT])
    signature = _positional(model)
    out: dict[str, tuple[str, list[str]]] = {}
    for number, value in [*enumerate(call.args), *call.kwargs.items()]:
        leaves, spec = trees.tree_flatten(value)
        mine = [next(names) for _ in leaves]
        parameter = signature[number] if isinstance(number, int) and number < len(signature) else str(number)
        if isinstance(value, list | tuple | dict) and leaves:
            out[parameter] = (describe(value, spec), mine)
    return out


def _trace_into(
    graph: fx.Graph,
    exported: torch.export.ExportedProgram,
    flags: dict[str, list[tuple[Any, Any]]],
    aliases: Mapping[str, str],
    attributes: dict[str, fx.Node],
    constants: dict[str, torch.Tensor],
    call: Call,
    number: int,
    own: Mapping[str, torch.Tensor],
) -> Any:
    """Append one call's ops to the graph, and fill in which inputs it takes. Returns its output structure."""
    env: dict[fx.Node, Any] = {}
    learns: set[fx.Node] = set()  # what gradients flow through: it depends on parameters or on what the caller passes
    specs = {_argument_name(s.arg): s for s in exported.graph_signature.input_specs}
    for out in exported.graph_signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the graph returns a {out.kind.name.lower()} ({out.target}); this is not supported")

    def attribute(name: str, node: fx.Node) -> fx.Node:
        name = aliases.get(name, name)
        if name not in attributes:
            attributes[name] = graph.get_attr(name)
            attributes[name].meta = meta_of(node.meta.get("val"), NodeInfo(module_path=name.rpartition(".")[0]))
        return attributes[name]

    def is_input(node: fx.Node) -> bool:
        return node.op == "placeholder" and specs[node.name].kind is InputKind.USER_INPUT

    # inputs first: ``w = self.W`` before the input ``w`` is read would overwrite it
    for node in sorted(exported.graph.nodes, key=lambda n: not is_input(n)):
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                env[node] = attribute(str(spec.target), node)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                name = "constant_" + re.sub(r"\W", "_", str(spec.target)) + (f"_{number}" if number else "")
                value = exported.constants[str(spec.target)]
                _check_apart(value, own)
                constants[name] = value.detach() if isinstance(value, torch.Tensor) else value
                env[node] = attribute(name, node)
            elif spec.kind is InputKind.USER_INPUT:
                value = getattr(spec.arg, "value", None)
                label = f"{node.name}__{call.label}" if number else node.name
                if isinstance(node.meta.get("val"), torch.Tensor):
                    new = graph.placeholder(label)
                    call.inputs.append(node.name)
                    call.sizes[node.name] = [_fixed(s) for s in node.meta["val"].shape]
                else:
                    new = graph.placeholder(label, default_value=value)
                    call.constants[node.name] = value
                new.meta = meta_of(node.meta.get("val"), NodeInfo(input=node.name))
                env[node] = new
            else:
                raise CaptureError(f"input {node.name} is a {spec.kind.name.lower()}, which is not supported")
            if spec.kind in (InputKind.PARAMETER, InputKind.USER_INPUT):
                learns.add(node)
            continue
        if node.op == "output":
            flat = trees.tree_map_only(fx.Node, lambda n: env[n], list(node.args[0]))
            return _structure(call, flat, exported.call_spec.out_spec)
        if Trait.CHECKS in traits_of(node.target):
            continue
        if node.op == "get_attr":
            env[node] = node  # a subgraph, entered below
            continue
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            env[node] = _inline(graph, exported.graph_module, node, env, learns)
            if node.args[0] is not False and not learns.isdisjoint(node.all_input_nodes):
                learns.add(node)
            continue
        if node.target is not torch.ops.aten.detach.default and not learns.isdisjoint(node.all_input_nodes):
            learns.add(node)
        if node.target is operator.getitem and isinstance(env.get(node.args[0]), _Region):
            env[node] = env[node.args[0]][node.args[1]]
            continue
        new = graph.node_copy(node, lambda n: env[n])
        new.meta = _meta(node)
        for path, literal in flags.get(node.name, ()):
            _rewire(graph, new, path, literal)
        env[node] = new
    raise CaptureError("the exported graph has no output")


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size where the trace fixed it, None where it is dynamic."""
    return int(size) if isinstance(size, int) or size.node.expr.is_number else None


def _views_to_reshapes(graph: fx.Graph) -> None:
    """Whether a view is possible depends on strides, which differ between modes, kernels and sizes.

    Only where something is written in place can it matter that a view shares memory; then views stay.
    """
    memory = Memory(graph)
    for node in graph.nodes:
        if node.target == torch.ops.aten.view.default and not memory.written(node):
            node.target = torch.ops.aten.reshape.default


#: in place of memory that is not set
_ZEROS = {
    "aten.empty.memory_format": torch.ops.aten.zeros.default,
    "aten.empty_like.default": torch.ops.aten.zeros_like.default,
    "aten.new_empty.default": torch.ops.aten.new_zeros.default,
}


def _drawn_into(node: fx.Node) -> bool:
    return Trait.DRAWS in traits_of(node.target) and bool(writes(node))


def _memory_that_holds_nothing(graph: fx.Graph) -> None:
    """Memory that is not set becomes zeros, which is one of the values it may have: every copy of an entry then agrees.

    Where the next thing is that random numbers are drawn into it, it stays. Complex numbers seen through a view need
    strides that are even, whatever the sizes: their source is laid out anew.
    """
    for node in list(graph.nodes):
        name = str(node.target)
        if name in _ZEROS and not any(_drawn_into(u) for u in node.users):
            node.target = _ZEROS[name]
            node.kwargs = {
                k: v for k, v in node.kwargs.items() if k != "memory_format" or name.endswith("like.default")
            }
        if name == "aten.view_as_complex.default":
            source = node.args[0]
            with graph.inserting_before(node):
                laid_out = graph.call_function(torch.ops.aten.contiguous.default, (source,))
            laid_out.meta = {**_without_sizes(node), "val": source.meta["val"]}
            node.args = (laid_out,)


def _argument_name(arg: Any) -> str:
    return str(arg.name)


def _impure(node: fx.Node) -> bool:
    """Keep inputs, the output, and ops that write into a buffer."""
    if node.op in ("placeholder", "output"):
        return True
    schema = schema_of(node.target)
    return bool(schema is not None and schema.is_mutable)


def _meta(node: fx.Node) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    path = _clean(list(stack.values())[-1][0]) if stack else ""
    calls = list(stack.values())[-1][0] if stack else ""
    if path.startswith("_empty_nn_module_stack"):
        path = calls = ""
    lines = node.meta.get("stack_trace") or ""
    info = NodeInfo(
        module_path=path,
        module_call=calls,
        source=source_line(lines),
        sizes=info_of(node).sizes,
        result_sizes=info_of(node).result_sizes,
        # activation checkpointing leaves no trace in the graph but the line that calls it
        checkpointed=re.search(r"checkpoint\w*\(", lines) is not None,
    )
    return meta_of(node.meta.get("val"), info)


def _clean(path: str) -> str:
    """Module path without the mark of a repeated call (``layer@1``)."""
    return re.sub(r"@\d+", "", path)


def _positional(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _defaults(model: nn.Module) -> dict[str, Any]:
    plain = (type(None), bool, int, float, str)
    return {
        n: p.default for n, p in inspect.signature(model.forward).parameters.items() if isinstance(p.default, plain)
    }


def _members(model: nn.Module) -> frozenset[str]:
    """What one can ask of the user's object and not of any module."""
    known = provenance_of(model)
    if known is not None:
        return known.program.members
    names = {*dir(type(model)), *vars(model)} - set(dir(nn.Module))
    return frozenset(n for n in names if not n.startswith("_") and n != "training")


def _structure(call: Call, flat: list[Any], spec: Any) -> Any:
    """The model's own output structure over graph nodes; a tuple of its leaves where it takes more than builtins."""
    tree = trees.tree_unflatten(list(flat), spec)

    def plain(value: Any) -> bool:
        if type(value) in (list, tuple):
            return all(plain(v) for v in value)
        if type(value) is dict:
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return value is None or isinstance(value, fx.Node | int | float | bool | str)

    if plain(tree):
        return tree
    call.treespec = describe(tree, spec)
    return tuple(flat)


def _without_sizes(node: fx.Node, **changes: Any) -> dict[str, Any]:
    """A node's metadata for another value at its place."""
    return meta_like(node, sizes=None, result_sizes=None, **changes)


def _rewire(graph: fx.Graph, node: fx.Node, path: tuple[Any, ...], eval_value: Any) -> None:
    """Replace a literal that differs between the modes by a choice on the module's ``training`` flag."""
    holder: Any = node.args if path[0] == "args" else node.kwargs
    literal: Any = holder
    for key in path[1:]:
        literal = literal[key]
    with graph.inserting_before(node):
        flag = graph.get_attr("training")
        flag.meta = {**_without_sizes(node, is_flag=True), "val": None}
        if literal is True and eval_value is False:
            value = flag
        elif isinstance(literal, int | float) and eval_value in (0, False):
            value = graph.call_function(operator.mul, (literal, flag))
        else:
            value = graph.call_function(operator.getitem, ((eval_value, literal), flag))
        if value is not flag:
            value.meta = dict(flag.meta)

    def put(container: Any, keys: tuple[Any, ...]) -> Any:
        if not keys:
            return value
        if isinstance(container, dict):
            return {**container, keys[0]: put(container[keys[0]], keys[1:])}
        return type(container)(put(v, keys[1:]) if i == keys[0] else v for i, v in enumerate(container))

    if path[0] == "args":
        node.args = put(tuple(node.args), path[1:])
    else:
        node.kwargs = put(dict(node.kwargs), path[1:])


def _inline(
    graph: fx.Graph, owner: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], learns: set[fx.Node]
) -> Any:
    """Copy the body of a ``wrap_with_set_grad_enabled`` region in; what enters and leaves a no-grad one is detached.

    Args:
        learns: the nodes of the traced graph that gradients flow through. Buffers do not: they enter as they are, and
            what a region writes into them is no part of the graph of gradients.
    """
    name = str(node.target)
    if "set_grad_enabled" not in name:
        raise CaptureError(_region(name, source_line(node.meta.get("stack_trace") or "")))
    enabled, body_node, *operands = node.args
    assert isinstance(body_node, fx.Node)
    body = getattr(owner, str(body_node.target))
    inner: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    for n in body.graph.nodes:
        if n.op == "placeholder":
            value = next(inputs)
            inner[n] = env[value] if isinstance(value, fx.Node) else value
            learned = isinstance(value, fx.Node) and value in learns and isinstance(value.meta.get("val"), torch.Tensor)
            if learned and not enabled:
                inner[n] = _detached(graph, inner[n])
        elif n.op == "output":
            results = trees.tree_map_only(fx.Node, lambda x: inner[x], list(n.args[0]))
            if enabled:
                return _Region(results)
            return _Region([_detached(graph, r) for r in results])
        else:
            inner[n] = graph.node_copy(n, lambda x: inner[x])
            inner[n].meta = _meta(n)
    raise CaptureError(f"region {body_node.target} has no output")


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    out = graph.call_function(torch.ops.aten.detach.default, (node,))
    out.meta = dict(node.meta)
    return out


def _region(name: str, line: str) -> str:
    """Why a region that a graph runs by a higher-order operator cannot be entered."""
    at = f" at {line}" if line else ""
    if "autocast" in name:
        return (
            f"the model enters torch.autocast inside forward{at}, which decides dtypes outside the graph; cast by hand "
            "(x.float(), x.to(dtype)), or leave it out and put autocast around the model"
        )
    return f"the model runs {name}{at}, an operator that calls a function of its own; capture the parts around it"


class _Region(list):
    """Results of an inlined region, picked apart by the ``getitem`` nodes that follow it."""
