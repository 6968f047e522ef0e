"""Runs of a model without data: does it raise at a size, and does it compute what its graph computes there?

Both run on fake tensors. What a run computes is written down as one digest for each output: the ops below autograd with
their literals, over the names of weights and inputs. Equal digests mean equal functions at that size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import TorchDispatchMode

from fxgrow.ir import trees
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.quiet import quiet
from fxgrow.ir.running import in_mode, run_with
from fxgrow.ir.traits import Trait, traits_of

#: by node, the (path, literal) pairs in which a mode differs from the one that was traced
Literals = dict[str, list[tuple[Any, Any]]]
_DEVICE = torch.ops.prim.device.default
#: from a size of an input in the graph, and in the example, to the size to run at
Sizes = Callable[[Any, int], int]


class Replica:
    """A model and the graph of one of its calls, to be run at sizes other than the example's.

    Args:
        training: the mode that both are in.
    """

    def __init__(
        self,
        model: nn.Module,
        exported: torch.export.ExportedProgram,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        training: bool,
    ) -> None:
        self.model, self.exported = model, exported
        self.training, self.flags = training, Literals()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[int, torch.Tensor] = {}  # weights and buffers to their fakes, which no run changes
        self.leaves, self.spec = trees.tree_flatten((args, dict(kwargs)))
        self.specs = {str(s.arg.name): s for s in exported.graph_signature.input_specs}
        self.inputs = [
            n for n in exported.graph.nodes if n.op == "placeholder" and self.specs[n.name].kind is InputKind.USER_INPUT
        ]
        self.state = named_tensors(model)

    def in_eval(self, flags: Literals) -> Replica:
        """The same in eval mode, where the graph has other literals, by node and path, than it was traced with."""
        other = copy.copy(self)
        other.training, other.flags = False, flags
        return other

    def raises(self, sizes: Sizes) -> bool:
        """Whether the model does where its inputs have these sizes."""
        try:
            with quiet():
                self._model(sizes)
        except Exception:
            return True
        return False

    def agrees(self, sizes: Sizes) -> bool:
        """Whether model and graph compute the same where the inputs have these sizes; False where that is not known."""
        try:
            with quiet():
                return self._model(sizes) == self._graph(sizes)
        except Exception:
            return False

    def _given(self, trail: _Trail, sizes: Sizes) -> tuple[dict[str, torch.Tensor], list[Any]]:
        mode = self.fakes
        named: set[int] = set()

        def fake(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in self.known:
                self.known[id(tensor)] = mode.from_tensor(tensor.detach(), static_shapes=True)
            if id(tensor) not in named:  # ties stay
                named.add(id(tensor))
                trail.name(self.known[id(tensor)], ("state", name))
            return self.known[id(tensor)]

        def resized(number: int, node: fx.Node, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            shape = [sizes(s, n) for s, n in zip(node.meta["val"].shape, leaf.shape, strict=True)]
            out = mode.from_tensor(leaf.detach(), static_shapes=True).new_empty(shape)
            trail.name(out, ("input", number))
            return out

        state = {name: fake(name, t) for name, t in self.state.items()}
        return state, [resized(i, n, x) for i, (n, x) in enumerate(zip(self.inputs, self.leaves, strict=True))]

    def _model(self, sizes: Sizes) -> list[Any]:
        with in_mode(self.model, self.training), self.fakes, torch.no_grad():
            trail = _Trail()
            state, leaves = self._given(trail, sizes)
            args, kwargs = trees.tree_unflatten(leaves, self.spec)
            with trail:
                out = run_with(self.model, state, args, kwargs)
            return trail.digests([out, *state.values()])

    def _graph(self, sizes: Sizes) -> list[Any]:
        with self.fakes, torch.no_grad():
            trail = _Trail()
            state, leaves = self._given(trail, sizes)
            values = iter(leaves)
            given = []
            for node in self.exported.graph.nodes:
                if node.op == "placeholder":
                    spec = self.specs[node.name]
                    if spec.kind is InputKind.USER_INPUT:
                        given.append(next(values))
                    elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                        given.append(state[str(spec.target)])
                    else:
                        given.append(self.exported.constants[str(spec.target)])
            with trail:
                out = _InMode(self.exported.graph_module, self.flags).run(*given)
            return trail.digests([out, *state.values()])


class _InMode(fx.Interpreter):
    """Runs a graph with other literals."""

    def __init__(self, module: fx.GraphModule, flags: Literals) -> None:
        super().__init__(module)
        self.flags = flags

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.flags:
            return super().run_node(n)
        given, named = self.fetch_args_kwargs_from_env(n)
        args, kwargs = list(given), dict(named)
        for (where, key), value in self.flags[n.name]:
            if n.target is torch.ops.aten.add_.Tensor:  # nothing is added: only the other mode counts
                return args[0]
            if where == "args":
                args[key] = value
            else:
                kwargs[key] = value
        return n.target(*args, **kwargs)  # type: ignore[operator]


class _Trail(TorchDispatchMode):
    """Writes down what every tensor was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[torch.Tensor, int]] = {}  # the tensor too, so that its id stays its own
        self.written: dict[int, int] = {}  # storage -> the last write into it
        self.drawn = 0

    def name(self, tensor: torch.Tensor, digest: Any) -> None:
        self.known[id(tensor)] = (tensor, hash(digest))

    def digests(self, value: Any) -> list[Any]:
        return [self._digest(x) for x in trees.tensors_in(value)]

    def _digest(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self.known:
                own = self.known[id(value)][1]
            else:  # a constant: its numbers, where they are at hand
                small = type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta and value.numel() <= 4096
                own = hash((str(value.dtype), tuple(value.shape), str(value.tolist()) if small else ""))
            return own, self.written.get(value.untyped_storage()._cdata, 0), tuple(value.shape)
        if isinstance(value, list | tuple):
            return tuple(self._digest(v) for v in value)
        if isinstance(value, Mapping):
            return tuple((k, self._digest(v)) for k, v in value.items())
        return type(value).__name__, str(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # which PyTorch asks of every operand
            return func(*args)
        kwargs = kwargs or {}
        before = self._digest((args, kwargs))
        out = func(*args, **kwargs)
        traits = traits_of(func)
        if Trait.SAME in traits or (Trait.SAME_IN_SHAPE in traits and out.shape == args[0].shape):
            self.known[id(out)] = (out, before[0][0][0])
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn += 1
            before = (before, self.drawn)
        digest = hash((str(func), before))
        for number, tensor in enumerate(trees.tensors_in(out)):
            self.known[id(tensor)] = (tensor, hash((digest, number)))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in trees.tree_leaves(value):
                    self.written[tensor.untyped_storage()._cdata] = digest
        return out
