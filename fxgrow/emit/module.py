"""From a flat graph and its tensors to a hierarchical GraphModule.

Repeated blocks become child modules at their own paths. Blocks whose graphs are equal share one generated class, and so
one code object: compiling block by region compiles one of them.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from typing_extensions import Self

from fxgrow.emit.blocks import identifier, share_classes, split_blocks
from fxgrow.emit.casts import cast_by, check_cast, keeping, refusal
from fxgrow.emit.checks import check_inputs
from fxgrow.emit.graphs import call_graphs, clean_graph
from fxgrow.errors import CheckpointError, InputError
from fxgrow.ir.direct import DirectModule
from fxgrow.ir.modules import child_of, named_tensors, order_children
from fxgrow.ir.provenance import Provenance, code_of, edited, provenance_of, remember
from fxgrow.ir.serialize import graph_from_json, graph_to_json
from fxgrow.ir.traced import Call, Traced, by_name, matching_calls, same_constant
from fxgrow.ir.treespecs import check, rebuild


def regenerate(
    program: Traced,
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
    targets = [split_blocks(program, g, own) if hierarchical else g for g in graphs]
    for call, graph in zip(program.calls, targets, strict=False):
        if call.treespec is not None:
            _restructure(graph, call.treespec)
    for call, graph in zip(program.calls, targets, strict=False):
        check_inputs(graph, call)
    plain = len(graphs) == 1 and not any(c.nested or c.constants or c.training is not None for c in program.calls)
    taken = [str(n.target) for n in targets[0].nodes if n.op == "placeholder"]
    if set(taken) <= set(program.signature) and taken != program.signature:
        plain = False  # what was left out in the example may be given as it is by default, by place or by name
    kind = RegeneratedModule if plain else CallsModule
    module = kind(nn.Module(), fx.Graph(), class_name=identifier(program.class_name))
    for path, child in own.items():
        _attach(module, program, path, child)
    for name, tensor in tensors.items():
        _register(module, program, name, tensor)
    for alias, name in program.aliases.items():
        _register_alias(module, program, alias, name)
    _order_children(module, program)
    made = Provenance(program.without_tensors(), graphs=() if plain else tuple(targets))
    remember(module, made)
    module.graph = targets[0]
    share_classes(own)
    module.train(program.training)
    remember(module, dataclasses.replace(made, code=code_of(module)))
    return module


class RegeneratedModule(DirectModule):
    """A GraphModule that can be pickled, though its ``meta`` holds a graph."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            found = provenance_of(self) if "meta" in self.__dict__ else None
            if found is None or name not in found.program.members:
                raise
            kind = found.program.class_name
            raise AttributeError(
                f"the grown {kind} is a graph module, which keeps the forward and the weights of {kind} and not its "
                f"{name!r}. growth.apply_(model) grows your own {kind} in place, and growth.into(larger) fills a "
                "larger instance that you made; both keep the class"
            ) from error

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        found = provenance_of(self) if "meta" in self.__dict__ else None
        cast = cast_by(self, fn) if found is not None and recurse else {}
        if found is None or not cast:
            return super()._apply(fn, recurse)
        casts = (*found.casts, cast)
        made = found.recast(casts) if found.program.asks_dtype and found.recast is not None else None
        if made is None:
            check_cast(found.program, cast)
            super()._apply(keeping(fn, self, dict.fromkeys(found.program.constants)))
            remember(self, dataclasses.replace(found, casts=casts))
            return self
        program, constants = made
        fresh = regenerate(program, program.without_tensors().tensors)
        blocks = _alike(self, fresh, cast)
        super()._apply(keeping(fn, self, {n: t.dtype for n, t in program.tensors.items()}))
        for name, value in constants.items():
            path, _, leaf = name.rpartition(".")
            holder = self.get_submodule(path)
            holder.register_buffer(leaf, value.to(getattr(holder, leaf).device), persistent=False)
        made_so = provenance_of(fresh)
        assert made_so is not None
        remember(self, dataclasses.replace(made_so, casts=casts, recast=found.recast))
        for mine, other in blocks.values():
            mine.graph = other.graph
        share_classes({n: mine for n, (mine, _) in blocks.items() if n})
        remember(self, dataclasses.replace(made_so, casts=casts, recast=found.recast, code=code_of(self)))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce(self) if provenance_of(self) is not None else super().__reduce_ex__(protocol)


class CallsModule(RegeneratedModule):
    """A GraphModule with a graph for each of several ways of calling it; ``graph`` is that of the first.

    ``forward`` takes lists and dicts of tensors apart, and chooses by which tensor arguments are given, by the values
    of the others, and by the module's mode.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        found = provenance_of(self)
        if found is None or not found.graphs:
            return code
        graphs, program = found.graphs, found.program
        cls = type(self)
        functions = [cls.forward]
        for graph in graphs[1:]:
            helper = DirectModule(nn.Module(), fx.Graph())
            helper.graph = graph
            functions.append(type(helper).forward)
        signature, calls = program.signature, program.calls
        taken = [[str(n.target) for n in graph.nodes if n.op == "placeholder"] for graph in graphs]

        def direct(number: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
            """Whether the arguments are the graph's own inputs, each in its place or by its name."""
            call, names = calls[number], taken[number]
            known = not signature or not set(names) <= set(signature) or signature[: len(args)] == names[: len(args)]
            return not call.nested and not call.constants and known and (not signature or kwargs.keys() <= set(names))

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            served = [n for n, c in enumerate(calls) if c.serves(self.training)]
            if not served:
                now, other = ("train", "eval") if self.training else ("eval", "train")
                raise InputError(
                    f"the module is in {now} mode, and was captured in the other mode only ({program.mode_reason}); "
                    f"call .{other}() on it first"
                )
            if len(served) == 1 and (direct(served[0], args, kwargs) or len(args) > len(signature)):
                return functions[served[0]](self, *args, **kwargs)  # as a GraphModule of that graph would
            found = matching_calls(program, args, kwargs, self.training)
            if not found:
                raise TypeError(_misfit(program, served, args, kwargs))
            together = by_name(signature, args, kwargs)
            chosen = found[0]
            if len(found) > 1:  # sizes decide; where none is for them, the first says why not
                chosen = next((n for n in found if _fits(calls[n], together)), chosen)
            call, given = calls[chosen], calls[chosen].flatten(together) or {}
            # a plain value has no default where a tensor comes after it
            values = {n: given[n] if n in call.inputs else call.constants.get(n) for n in taken[chosen]}
            return functions[chosen](self, **values)

        cls.forward = forward
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        out = super().__deepcopy__(memo)
        out.recompile()
        return out


def _alike(
    module: fx.GraphModule, fresh: fx.GraphModule, cast: Mapping[torch.dtype, torch.dtype]
) -> dict[str, tuple[fx.GraphModule, fx.GraphModule]]:
    """The graph modules of two modules by path.

    Raises:
        GrowthRefused: the other one is built differently.
    """
    found = [{n: m for n, m in one.named_modules() if isinstance(m, fx.GraphModule)} for one in (module, fresh)]
    mine, other = found
    same = mine.keys() == other.keys() and all(type(mine[n]).__bases__ == type(other[n]).__bases__ for n in mine)
    if not same or {n for n, _ in module.named_parameters()} != {n for n, _ in fresh.named_parameters()}:
        raise refusal("grown module", cast, "in that dtype it has other blocks, calls or parameters")
    return {n: (m, other[n]) for n, m in mine.items()}


def _fits(call: Call, given: Mapping[str, Any]) -> bool:
    leaves = call.flatten(given) or {}
    return call.fits({n: leaves[n].shape for n in call.inputs})


def _misfit(program: Traced, served: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Why no call takes these arguments: what differs from the one that comes nearest."""
    together = by_name(program.signature, args, kwargs)

    def against(call: Call) -> list[str]:
        given = call.flatten(together)
        if given is None:
            return [f"{', '.join(call.nested)} is built differently"]
        out = [f"the input {n} is missing" for n in call.inputs if not isinstance(given.get(n), torch.Tensor)]
        for name in dict.fromkeys((*given, *call.constants)):
            if name in call.inputs:
                continue
            here = given.get(name, program.defaults.get(name))
            there = call.constants.get(name, program.defaults.get(name))
            if isinstance(here, torch.Tensor):
                out.append(f"{name} is a tensor, and was captured without one")
            elif not same_constant(here, there):
                out.append(f"{name} is {str(here)[:40]!r}, and was captured as {there!r}")
        return out

    reasons = min((against(program.calls[n]) for n in served), key=len)
    known = "; ".join(_signature(c) for c in program.calls)
    return (
        f"no call with these arguments was captured ({', '.join(reasons)}); captured: {known}. What is not a tensor is "
        "part of the graph: grow with this call as well, calls={'name': {…}}, or grow your own model in place, "
        "growth.apply_(model)"
    )


def _signature(call: Call) -> str:
    inside = {n for _, names in call.nested.values() for n in names}
    constants = [f"{n}={v!r}" for n, v in call.constants.items() if n not in inside]
    return f"{call.label}({', '.join([*(n for n in call.inputs if n not in inside), *call.nested, *constants])})"


def _restructure(graph: fx.Graph, treespec: str) -> None:
    """Return the model's own kind of output instead of its leaves."""
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(rebuild, (list(output.args[0]), treespec)),)  # type: ignore[arg-type]


# modules ----------------------------------------------------------------------------------------------------------


def _parent(module: nn.Module, program: Traced, path: str) -> nn.Module:
    """The container at ``path``, made where it is missing; lists stay lists."""
    here = ""
    for part in path.split(".") if path else []:
        here = f"{here}.{part}" if here else part
        child = child_of(module, part)
        if child is None:
            kind = program.containers.get(here, "")
            child = nn.ModuleList() if kind in ("ModuleList", "Sequential") else nn.Module()
            module.add_module(part, child)
        module = child
    return module


def _order_children(module: nn.Module, program: Traced) -> None:
    """Children in the original's order, so that tied parameters are listed first under the same name as there."""
    order = {path: i for i, path in enumerate(program.containers)}
    for path, parent in list(module.named_modules()):
        prefix = f"{path}." if path else ""
        order_children(parent, lambda name, prefix=prefix: order.get(prefix + name, len(order)))  # type: ignore[misc]


def _attach(module: nn.Module, program: Traced, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    _parent(module, program, parent).add_module(name, child)


def _register(module: nn.Module, program: Traced, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    holder = _parent(module, program, path)
    if name in program.parameters:
        holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=program.requires_grad.get(name, True)))
    else:
        kept = name in program.persistent and name not in program.constants
        holder.register_buffer(leaf, tensor, persistent=kept)


def _register_alias(module: nn.Module, program: Traced, alias: str, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(_parent(module, program, path), leaf)
    path, _, leaf = alias.rpartition(".")
    holder = _parent(module, program, path)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        holder.register_buffer(leaf, tensor, persistent=alias in program.persistent)


# pickling ------------------------------------------------------------------------------------------------------------


def reduce(module: fx.GraphModule) -> tuple[Callable[..., fx.GraphModule], tuple[Any, ...]]:
    """What ``__reduce__`` returns.

    Raises:
        pickle.PicklingError: the module's graph was edited, or holds something that cannot be stored.
    """
    found = provenance_of(module)
    if found is None or edited(module):
        raise pickle.PicklingError(
            "the graph of this grown module was edited after the growth, and the edits would be lost; pickle its state "
            "dict, or grow the edited module once more"
        )
    program = found.program
    own = named_tensors(module)
    known = {*program.tensors, *program.aliases}
    if other := next((n for n in (*own, *program.tensors) if (n in own) != (n in known)), ""):
        what = f"has a tensor {other} now that it did not grow with" if other in own else f"has no tensor {other} now"
        raise pickle.PicklingError(
            f"this grown module {what}, and would come back as it was grown: pickle its state dict"
        )
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    try:
        fields["graph"] = graph_to_json(program.graph)
    except CheckpointError as error:
        raise pickle.PicklingError(f"this grown module cannot be pickled: {error}") from error
    modes = {name: m.training for name, m in module.named_modules()}
    return restore, (fields, {n: own[n] for n in program.tensors}, modes)


def restore(
    fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], modes: Mapping[str, bool]
) -> fx.GraphModule:
    """The inverse of :func:`reduce`."""
    for call in fields["calls"]:
        for text in (call.treespec, *(t for t, _ in call.nested.values())):
            if text is not None:
                check(text)
    program = Traced(**{**fields, "graph": graph_from_json(fields["graph"])})
    program.requires_grad = {**program.requires_grad, **{n: t.requires_grad for n, t in tensors.items()}}
    module = regenerate(program, tensors)
    for name, m in module.named_modules():
        m.training = modes.get(name, module.training)
    return module
