"""From a flat graph and its tensors to a hierarchical GraphModule.

Repeated blocks become child modules at their own paths. Blocks whose graphs are equal share one generated class, and so
one code object: compiling block by region compiles one of them.
"""

from __future__ import annotations

import builtins
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxgrow.axes.analysis import sizes_of
from fxgrow.capture import Call, Program, matching_calls
from fxgrow.errors import InputError
from fxgrow.guards import check_guards, compile_condition, inputs_of
from fxgrow.rules.base import implied_arguments, set_argument
from fxgrow.structure import rebuild

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def regenerate(
    program: Program,
    tensors: Mapping[str, torch.Tensor],
    *,
    hierarchical: bool = True,
    double: bool = False,
) -> fx.GraphModule:
    """Build a module that runs ``program.graph`` with the given tensors.

    Args:
        program: graph, names, ties; its own tensors are not used.
        tensors: parameters, buffers and constants by name, in the shapes the graph expects.
        hierarchical: one child module per repeated block; else one flat graph.
        double: replace the floating-point dtypes baked into the graph by float64, to verify in float64.

    Returns:
        A GraphModule in the program's train or eval mode, with the original parameter names, ties, ``requires_grad``
        and buffer persistence. Hooks of the original are not carried over.
    """
    graphs = call_graphs(program, clean_graph(program.graph, double))
    own: dict[str, nn.Module] = {}
    targets = [_split_blocks(program, g, own) if hierarchical else g for g in graphs]
    for call, graph in zip(program.calls, targets, strict=False):
        if call.structure is not None:
            _restructure(graph, call.structure)
    for call, graph in zip(program.calls, targets, strict=False):
        _check_inputs(graph, call)
    plain = len(graphs) == 1 and not any(c.nested or c.constants or c.training is not None for c in program.calls)
    kind = RegeneratedModule if plain else CallsModule
    module = kind(nn.Module(), fx.Graph(), class_name=_identifier(program.class_name))
    for path, child in own.items():
        _attach(module, program, path, child)
    holders = {**own, "": module}
    for name, tensor in tensors.items():
        if name in program.constants:
            _register(module, program, holders, name, tensor, constant=True)
        else:
            _register(module, program, holders, name, tensor)
    for alias, name in program.aliases.items():
        _register_alias(module, program, holders, alias, name)
    _order_children(module, program)
    module.meta["fxgrow"] = program.without_tensors()
    if isinstance(module, CallsModule):
        module.meta["fxgrow_graphs"] = targets
    module.graph = targets[0]
    _share_classes(own)
    module.train(program.training)
    module.meta["fxgrow_code"] = code_of(module)
    return module


def code_of(module: fx.GraphModule) -> str:
    """The generated code of a module and its blocks, to tell whether somebody changed it."""
    return "\n".join(
        [module.code, *(m.code for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]
    )


class RegeneratedModule(fx.GraphModule):
    """A GraphModule that can be pickled, though its ``meta`` holds a graph."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        from fxgrow.pickling import reduce

        return reduce(self) if "fxgrow" in self.meta else super().__reduce_ex__(protocol)


class CallsModule(RegeneratedModule):
    """A GraphModule with a graph for each of several ways of calling it; ``graph`` is that of the first.

    ``forward`` takes lists and dicts of tensors apart, and chooses by which tensor arguments are given, by the values
    of the others, and by the module's mode.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        meta = self.__dict__.get("meta", {})  # not there yet while the constructor runs
        graphs, program = meta.get("fxgrow_graphs"), meta.get("fxgrow")
        if graphs is None or program is None:
            return code
        cls = type(self)
        functions = [cls.forward]
        for graph in graphs[1:]:
            helper = fx.GraphModule(nn.Module(), fx.Graph())
            helper.graph = graph
            functions.append(type(helper).forward)
        signature, calls = program.signature, program.calls
        taken = [[str(n.target) for n in graph.nodes if n.op == "placeholder"] for graph in graphs]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            served = [n for n, c in enumerate(calls) if c.serves(self.training)]
            if not served:
                now, other = ("train", "eval") if self.training else ("eval", "train")
                raise InputError(
                    f"the module is in {now} mode, and was captured in the other mode only ({program.mode_reason}); "
                    f"call .{other}() on it first"
                )
            plain = not any(calls[n].nested or calls[n].constants for n in served)
            if len(served) == 1 and (plain or len(args) > len(signature)):  # as a GraphModule of that graph would
                return functions[served[0]](self, *args, **kwargs)
            found = matching_calls(program, args, kwargs, self.training)
            if not found:
                known = "; ".join(_signature(c) for c in calls)
                raise TypeError(f"no call with these arguments was captured; captured: {known}")
            together = {**dict(zip(signature, args, strict=False)), **kwargs}
            chosen = found[0]
            if len(found) > 1:  # sizes decide; where none is for them, the first says why not
                chosen = next((n for n in found if _fits(calls[n], together)), chosen)
            call, given = calls[chosen], calls[chosen].leaves(together) or {}
            # a plain value has no default where a tensor comes after it
            values = {n: given[n] if n in call.inputs else call.constants.get(n) for n in taken[chosen]}
            return functions[chosen](self, **values)

        cls.forward = forward
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        out = super().__deepcopy__(memo)
        out.recompile()
        return out


def _fits(call: Call, given: Mapping[str, Any]) -> bool:
    leaves = call.leaves(given) or {}
    return call.fits({n: leaves[n].shape for n in call.inputs})


def _signature(call: Call) -> str:
    inside = {n for _, names in call.nested.values() for n in names}
    constants = [f"{n}={v!r}" for n, v in call.constants.items() if n not in inside]
    return f"{call.label}({', '.join([*(n for n in call.inputs if n not in inside), *call.nested, *constants])})"


def call_graphs(program: Program, graph: fx.Graph) -> list[fx.Graph]:
    """One graph per captured call, inputs under the model's own names; parameters are read where they are used."""
    if len(program.calls) <= 1:
        return [graph]
    out = []
    for number in range(len(program.calls)):
        own = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}

        def value(n: fx.Node, own: fx.Graph = own, env: dict[fx.Node, fx.Node] = env) -> fx.Node:
            if n not in env:
                env[n] = own.get_attr(str(n.target))
                env[n].meta = dict(n.meta)
            return env[n]

        for node in graph.nodes:
            if node.op == "output":
                own.output(fx.map_arg(node.args[0][number], value))
            elif node.op == "placeholder" and node.meta.get("call", 0) == number:
                name = node.meta["input"]
                is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
                env[node] = own.placeholder(
                    name, **({} if is_tensor or not node.args else {"default_value": node.args[0]})
                )
                env[node].meta = dict(node.meta)
            elif node.op == "call_function" and node.meta.get("call", 0) == number:
                env[node] = own.node_copy(node, value)
        out.append(own)
    return out


def check_size(value: torch.Tensor, sizes: Sequence[int | None], name: str) -> None:
    """Sizes that the trace made part of the graph are checked when it runs.

    Raises:
        InputError: an input has another rank, or another size in a dim that is fixed.
    """
    if len(value.shape) == len(sizes) and all(s is None or s == n for s, n in zip(sizes, value.shape, strict=True)):
        return
    wanted = ", ".join("any" if s is None else str(s) for s in sizes)
    raise InputError(
        f"input {name} has shape {tuple(value.shape)}; this graph takes ({wanted}): the model fixed these sizes when "
        "it was captured. Capture it with an example of the other sizes (dims of size 1 are always taken as fixed)"
    )


def _check_inputs(graph: fx.Graph, call: Call) -> None:
    """Check, first of all, the input dims that are numbers in the graph, and its guards."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    inputs = {n.meta.get("input", str(n.target)): n for n in placeholders}
    if call.guards:
        names = list(dict.fromkeys(n for g in call.guards for n in inputs_of(g.condition)))
        guards = [(g.condition, g.source, g.edge) for g in call.guards]
        for guard in call.guards:
            compile_condition(guard.condition)
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_guards, ([inputs[n] for n in names], names, *guards))
    for name, sizes in reversed(call.sizes.items()):
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_size, (inputs[name], list(sizes), name))


def _restructure(graph: fx.Graph, structure: str) -> None:
    """Return the model's own kind of output instead of its leaves."""
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(rebuild, (list(output.args[0]), structure)),)  # type: ignore[arg-type]


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "Model"


# graph ------------------------------------------------------------------------------------------------------------


def clean_graph(graph: fx.Graph, double: bool) -> fx.Graph:
    """A copy without baked devices (and, to verify, without baked float dtypes)."""
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    devices: dict[int, Any] = {}
    for node in graph.nodes:
        new = env[node] = out.node_copy(node, lambda n: env[n])
        if node.op == "call_function":
            if isinstance(new.kwargs.get("device"), torch.device):
                call = node.meta.get("call", 0)
                if call not in devices:
                    devices[call] = _device_node(out, new, env.values(), call)
                new.kwargs = {**new.kwargs, "device": devices[call]}
            if double:
                for name, value in implied_arguments(node).items():  # as in the model's own dtype
                    set_argument(new, name, value)
                new.args = _to_double(new.args)
                new.kwargs = _to_double(new.kwargs)
    return out


def _device_node(graph: fx.Graph, before: fx.Node, nodes: Any, call: int) -> Any:
    """The device of the call's first tensor input (or of a parameter), read when the module runs."""
    inputs = [n for n in nodes if n.op == "placeholder" and n.meta.get("call", 0) == call]
    candidates = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    candidates += [n for n in nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), torch.Tensor)]
    if not candidates:
        return before.kwargs["device"]
    place = inputs[-1] if candidates[0].op == "placeholder" else candidates[0]
    with graph.inserting_after(place):
        node = graph.create_node("call_function", builtins.getattr, (candidates[0], "device"), name="device")
    node.meta = {"module_path": "", "val": None, "source": "", **({"call": call} if call else {})}
    return node


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else value
    if isinstance(value, tuple | list):
        return type(value)(_to_double(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_double(v) for k, v in value.items()}
    return value


# blocks -----------------------------------------------------------------------------------------------------------


def stacks_of(program: Program) -> dict[str, list[int]]:
    """Repeated stacks of the module tree: path of the container to the numbers of its blocks.

    A block is a numbered child that has modules of its own; a chain of plain layers is no stack.
    """
    paths = set(program.containers)
    out: dict[str, list[int]] = {}
    for path in program.containers:
        parent, _, number = path.rpartition(".")
        if number.isdigit() and any(p.startswith(path + ".") for p in paths):
            out.setdefault(parent, []).append(int(number))
    return {k: sorted(v) for k, v in out.items()}


def block_path(stack: str, number: int | str) -> str:
    """Module path of a block; the model itself may be the stack."""
    return f"{stack}.{number}" if stack else str(number)


def children_of(program: Program, stack: str) -> list[int]:
    """The numbers that stand in a container: its blocks, and the plain layers among them."""
    prefix = f"{stack}." if stack else ""
    names = {p.removeprefix(prefix) for p in program.containers if p.startswith(prefix)}
    return sorted(int(n) for n in names if n.isdigit())


def block_of(path: str, stacks: Mapping[str, Any], inside: str = "") -> str | None:
    """The outermost block a module path lies in, as ``stack.number``."""
    parts = path.split(".")
    for i in range(len(parts)):
        stack = ".".join(parts[:i])
        if stack in stacks and parts[i].isdigit() and int(parts[i]) in stacks[stack]:
            found = block_path(stack, parts[i])
            if found != inside:
                return found
    return None


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


def block_regions(program: Program, graph: fx.Graph, stack: str | None = None) -> list[Region]:
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
        key = (node.meta.get("call", 0), block_of(node.meta.get("module_path", ""), stacks))
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
    return str(node.target).startswith(path + ".") and all(
        u in inside for u in node.users if u.meta.get("call", 0) == call
    )


def _split_blocks(program: Program, graph: fx.Graph, children: dict[str, nn.Module]) -> fx.Graph:
    """Move blocks into child modules, added to ``children``.

    A block that an earlier call of the model has made already is called if its code is the same, else left in line.
    """
    regions: dict[fx.Node, Region] = {}
    for region in block_regions(program, graph):
        kind = program.containers.get(region.path, "Block")
        child = fx.GraphModule(nn.Module(), fx.Graph(), class_name=_identifier(kind))
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
        call.meta = {"module_path": region.path, "source": "", "val": region.outputs[0].meta.get("val")}
        if len(region.outputs) == 1:
            env[region.outputs[0]] = call
        else:
            for i, n in enumerate(region.outputs):
                env[n] = out.call_function(__import__("operator").getitem, (call, i))
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


def _share_classes(children: Mapping[str, nn.Module]) -> None:
    """Give blocks with equal code one class, that of the first."""
    first: dict[str, type] = {}
    for child in children.values():
        assert isinstance(child, fx.GraphModule)
        cls = first.setdefault(type(child).__name__ + "\n" + child.code, type(child))
        child.__class__ = cls


# modules ----------------------------------------------------------------------------------------------------------


def _parent(module: nn.Module, program: Program, path: str) -> nn.Module:
    """The container at ``path``, made where it is missing; lists stay lists."""
    here = ""
    for part in path.split(".") if path else []:
        here = f"{here}.{part}" if here else part
        if part not in module._modules:
            kind = program.containers.get(here, "")
            module.add_module(part, nn.ModuleList() if kind in ("ModuleList", "Sequential") else nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _order_children(module: nn.Module, program: Program) -> None:
    """Children in the original's order, so that tied parameters are listed first under the same name as there."""
    order = {path: i for i, path in enumerate(program.containers)}
    for path, parent in list(module.named_modules()):
        prefix = f"{path}." if path else ""
        children = sorted(parent._modules.items(), key=lambda c: order.get(prefix + c[0], len(order)))
        parent._modules.clear()
        parent._modules.update(children)


def _attach(module: nn.Module, program: Program, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    _parent(module, program, parent).add_module(name, child)


def _register(
    module: nn.Module,
    program: Program,
    holders: Mapping[str, nn.Module],
    name: str,
    tensor: torch.Tensor,
    constant: bool = False,
) -> None:
    path, _, leaf = name.rpartition(".")
    holder = _parent(module, program, path)
    if name in program.parameters:
        holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=program.requires_grad.get(name, True)))
    else:
        holder.register_buffer(leaf, tensor, persistent=not constant and name in program.persistent)


def _register_alias(
    module: nn.Module, program: Program, holders: Mapping[str, nn.Module], alias: str, name: str
) -> None:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(_parent(module, program, path), leaf)
    path, _, leaf = alias.rpartition(".")
    holder = _parent(module, program, path)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        holder.register_buffer(leaf, tensor, persistent=alias in program.persistent)
