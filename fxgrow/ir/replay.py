"""Whether a model runs the same ops in eval mode as in train mode, found out while the latter is traced.

A second trace costs as much as the first. Here the forward runs twice inside one trace: in train mode, where every op
is recorded, and then in eval mode, where every op is looked up in the record. One that was run before on the same
operands is not run again: its result is at hand, with the very sizes, strides and symbols that the trace gave it. So
all that Python code may ask of a tensor has the answer that a trace in eval mode would give; and a question about a
size that the guards do not answer already is refused, since a guard is the beginning of another graph.

Whatever does not fit to the letter means that the modes are not known to agree, never that they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode, ProxyTorchDispatchMode, get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from fxgrow.ir import trees
from fxgrow.ir.bits import same_to_the_bit
from fxgrow.ir.ops import schema_of
from fxgrow.ir.running import in_mode
from fxgrow.ir.traits import is_mode_literal

#: where a node of the trace keeps the (path, eval literal) pairs in which eval mode differs
_KEY = "fxgrow_other_mode"

_CONTIGUOUS = torch.ops.aten.contiguous.default
#: what is asked of a tensor, rather than computed from it
_QUESTIONS = frozenset({"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "stride", "device"})
#: results that hang on data: a replay cannot stand for them
_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

Flags = list[tuple[Any, Any]]


class _Differs(Exception):
    """The modes are not known to agree."""


class BothModes:
    """Runs a forward in train mode, and then in eval mode against the record of it.

    Args:
        watch: notices what a trace cannot follow; what it notices in eval mode counts where the modes agree.

    Attributes:
        agree: whether eval mode runs the same ops, but for literals that follow the mode.
        flagged: how many of them have such literals.
        spoilt: the second run left something behind, so that the trace is of no use.
        why: the first difference.
    """

    def __init__(self, model: nn.Module, watch: Any = None) -> None:
        self.model, self.watch = model, watch
        self.agree = self.spoilt = False
        self.flagged, self.why = 0, "it was not tried"

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the forward returns in train mode."""
        mode = get_proxy_mode()
        hooked = self.model._forward_hooks or self.model._forward_pre_hooks  # these run outside of the forward
        if mode is None or not mode.pre_dispatch or not self.model.training or hooked:
            return forward(*args, **kwargs)
        record, held = _Record(self.model, (args, kwargs)), _held(self.model)
        with record.of(mode):
            first = forward(*trees.tree_map(_itself, args), **trees.tree_map(_itself, dict(kwargs)))
        if record.unfit or _assigned(self.model, held):
            self.why = record.unfit or "the forward assigns tensors to attributes"
            return first
        environment = getattr(detect_fake_mode([t for t, _ in record.start]), "shape_env", None)
        known, noticed = _known(environment), getattr(self.watch, "reason", "")
        replay = _Replay(mode.tracer, record)
        try:
            with in_mode(self.model, False), _ops_alone(mode.tracer), replay.no_new_guards(environment), replay:
                second = forward(*trees.tree_map(_itself, args), **trees.tree_map(_itself, dict(kwargs)))
            replay.finish(first, second)
        except Exception as error:
            self.why = f"{type(error).__name__}: {error}"
        else:
            self.agree, self.why = True, ""
            for event, differences in replay.flags:
                event.mark(differences)
            self.flagged = len(replay.flags)
        if _assigned(self.model, held) or _known(environment) != known:
            self.agree, self.spoilt = False, True
        if not self.agree and self.watch is not None:
            self.watch.reason = noticed  # a trace in eval mode will notice for itself
        return first

    def flags_in(self, exported: torch.export.ExportedProgram) -> dict[str, Flags] | None:
        """Where eval mode has other literals, by node; None where the modes are not known to agree."""
        marked = [(n, *n.meta.pop(_KEY)) for n in exported.graph.nodes if _KEY in n.meta]
        # a region has the marks of an op inside of it, and nobody looks into it: fewer are found then
        found = {n.name: differences for n, func, differences in marked if n.target is func}
        return found if self.agree and len(found) == self.flagged else None


def _itself(leaf: Any) -> Any:
    return leaf


def _held(model: nn.Module) -> dict[tuple[str, ...], int]:
    """The tensors that modules hold, by place: parameters, buffers, attributes, and what stands in lists or dicts."""
    out: dict[tuple[str, ...], int] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "forward"):
                continue
            values: Iterable[tuple[Any, Any]] = [("", value)]
            if isinstance(value, dict):
                values = value.items()
            elif isinstance(value, list | tuple):
                values = enumerate(value)
            for key, one in values:
                if isinstance(one, torch.Tensor):
                    out[path, name, str(key)] = id(one)
    return out


def _assigned(model: nn.Module, before: dict[tuple[str, ...], int]) -> bool:
    """Whether modules hold other tensors than they did, but for a list of the weights that they have (``nn.LSTM``)."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    now = _held(model)
    return before.keys() != now.keys() or any(one != before[place] and one not in own for place, one in now.items())


def _known(environment: Any) -> Any:
    """What a trace knows of its sizes."""
    if environment is None:
        return None
    asserts = sum(map(len, environment.deferred_runtime_asserts.values()))
    return len(environment.guards), dict(environment.replacements), dict(environment.var_to_range), asserts


# what is recorded ----------------------------------------------------------------------------------------------------


@dataclass
class _Event:
    """An op that ran: its operands as labels and literals, the tensors themselves, and what it returned."""

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    given: list[torch.Tensor]
    out: Any  # None of what a factory made
    state: tuple[Any, ...]
    node: fx.Node | None

    def counts_batches(self) -> bool:
        """``num_batches_tracked.add_(1)``, the one op that only train mode has."""
        counter = self.given[0] if self.given else None
        return (
            self.func is torch.ops.aten.add_.Tensor
            and counter is not None
            and not counter.is_floating_point()
            and self.args[0] == _Tensor(("state", id(counter)))
            and self.args[1:] == [1]
            and not self.kwargs
        )

    def mark(self, differences: Flags) -> None:
        """Leave the differences at the node, spelling out the arguments that they speak of."""
        assert self.node is not None
        most = max((path[1] + 1 for path, _ in differences if path[0] == "args"), default=0)
        self.node.args = (*self.node.args, *_defaults(self.func, len(self.node.args), most))
        self.node.meta[_KEY] = self.func, differences


_END = _Event("nothing", [], {}, [], None, (), None)


@dataclass(frozen=True)
class _Tensor:
    """A tensor by where it comes from."""

    label: Any


@dataclass(frozen=True, eq=False)
class _Size:
    """A dynamic number; guards that come after it may say more of it."""

    node: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Size) and bool(self.node.expr == other.node.expr)

    def __hash__(self) -> int:
        return hash(self.node.expr)


@dataclass(frozen=True, eq=False)
class _Constant:
    """A tensor that neither an op made nor the model or caller holds as its own."""

    value: torch.Tensor


def _state() -> tuple[Any, ...]:
    """What else an op's result hangs on."""
    casts = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts


class _Labels:
    """Where tensors come from; those that an op returned or wrote come from it, as the trace sees it.

    They are held weakly: what a factory made is copied on its way to Python where somebody else holds it.
    """

    def __init__(self, start: Sequence[tuple[torch.Tensor, Any]]) -> None:
        self.labels = WeakTensorKeyDictionary()
        for tensor, label in start:
            self.labels.setdefault(tensor, label)

    def results(self, func: Any, args: tuple[Any, ...], out: Any, number: int) -> None:
        if func is _CONTIGUOUS:  # another memory layout of the same value
            self.labels[out] = self.labels.get(args[0], (number, 0))
            return
        for place, tensor in enumerate(trees.tensors_in(out)):
            self.labels[tensor] = (number, place)

    def describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            label = self.labels.get(value)
            return _Constant(value) if label is None else _Tensor(label)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return _Size(value.node)
        if isinstance(value, list | tuple):
            return [self.describe(v) for v in value]
        if isinstance(value, dict):
            return {k: self.describe(v) for k, v in value.items()}
        return value


class _Record:
    """The ops of the first run."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.start: list[tuple[torch.Tensor, Any]] = [
            (t, ("state", id(t))) for t in (*model.parameters(), *model.buffers())
        ]
        self.start += [(t, ("input", number)) for number, t in enumerate(trees.tensors_in(inputs))]
        self.labels = _Labels(self.start)
        self.events: list[_Event] = []
        self.unfit = ""

    @contextlib.contextmanager
    def of(self, mode: ProxyTorchDispatchMode) -> Iterator[None]:
        """Record what a trace's mode is given; on the instance, whose class decides how it treats what is no op."""
        dispatch = mode.__torch_dispatch__

        def recorded(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            described = self.labels.describe(args), self.labels.describe(kwargs)
            given = trees.tensors_in((args, kwargs))
            sizes = [_as_made(t) for t in given]
            out = dispatch(func, types, args, kwargs)
            if _asks(func):
                return out
            on_data = any(tag in func.tags for tag in _UNFIT) and not _by_numbers(func, given)
            if on_data or sizes != [_as_made(t) for t in given]:
                self.unfit = f"{func} hangs on data, or changes a tensor's sizes"
            node = _last_node(mode.tracer.graph, func)
            self.events.append(_Event(func, *described, given, out if given else None, _state(), node))
            self.labels.results(func, args, out, len(self.events) - 1)
            return out

        mode.__torch_dispatch__ = recorded  # type: ignore[method-assign]
        try:
            yield
        finally:
            del mode.__torch_dispatch__


def _by_numbers(func: Any, given: list[torch.Tensor]) -> bool:
    """Whether it is a look-up whose result has as many entries as its numbers: masks select as many as hold."""
    return func is torch.ops.aten.index.Tensor and not any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])


def _asks(func: Any) -> bool:
    return str(func).split(".")[1] in _QUESTIONS


def _last_node(graph: fx.Graph, func: Any) -> fx.Node | None:
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target is func:
            return node
    return None


# what is replayed ----------------------------------------------------------------------------------------------------


class _Replay(ProxyTorchDispatchMode):
    """Answers the ops of the second run from the record of the first.

    Of this class, since only such modes see ops before they are taken apart; it has no rule for operators that call
    functions, which therefore end the replay.
    """

    def __init__(self, tracer: Any, record: _Record) -> None:
        super().__init__(tracer, "symbolic", pre_dispatch=True)
        self.events, self.place = record.events, 0
        self.labels, self.first = _Labels(record.start), record.labels
        self.flags: list[tuple[_Event, Flags]] = []
        self.refusal = ""

    def refuse(self, why: str) -> None:
        """Raises:
        _Differs: always; and once more at the end, as the forward may catch it.
        """
        self.refusal = self.refusal or why
        raise _Differs(why)

    @contextlib.contextmanager
    def no_new_guards(self, environment: Any) -> Iterator[None]:
        """Refuse what a trace in eval mode would add to what is known of the sizes."""

        def check(expression: Any, value: Any) -> None:
            self.refuse(f"eval asks for {expression}")

        if environment is None:
            yield
            return
        environment._check_frozen = check
        try:
            yield
        finally:
            del environment._check_frozen

    def __sym_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks(func):
            return func(*args, **kwargs)
        self._skip(func)
        event = self.events[self.place] if self.place < len(self.events) else _END
        if func is _CONTIGUOUS and event.func is not func:
            out = func(*args, **kwargs)  # a copy that only eval mode needs
            self.labels.results(func, args, out, -1)
            return out
        if event.func is not func:
            self.refuse(f"train runs {event.func} where eval runs {func}")
        differences = self._differences(event, args, kwargs)
        out = event.out
        given = trees.tensors_in((args, kwargs))
        known = len(given) == len(event.given) and all(a is b for a, b in zip(given, event.given, strict=True))
        if not given:
            out = func(*args, **kwargs)
        elif differences or not known:
            out = self._computed(func, args, kwargs, event)
        self.labels.results(func, args, out, self.place)
        self.place += 1
        if differences:
            self.flags.append((event, differences))
        return out

    def finish(self, first: Any, second: Any) -> None:
        """Raises:
        _Differs: ops are left that eval mode did not run, or it returns something else.
        """
        if self.refusal:
            raise _Differs(self.refusal)
        self._skip(None)
        if self.place < len(self.events):
            raise _Differs(f"eval does not run {self.events[self.place].func}")
        (a, before), (b, after) = trees.tree_flatten(first), trees.tree_flatten(second)
        found: Flags = []
        if before != after or not _same(self.first.describe(a), self.labels.describe(b), ("out",), found) or found:
            raise _Differs("train and eval return different results")

    def _skip(self, func: Any) -> None:
        """Pass over what only train mode runs: the count of batches, and copies into another memory layout."""
        while self.place < len(self.events):
            event = self.events[self.place]
            if event.func is func:
                return
            if event.counts_batches():
                self.flags.append((event, [(("args", 1), 0)]))
            elif event.func is not _CONTIGUOUS:
                return
            self.place += 1

    def _differences(self, event: _Event, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flags:
        """The (path, literal) pairs in which a call is not that of the record.

        Raises:
            _Differs: it has other operands, or literals that no mode sets.
        """
        if event.state != _state():
            self.refuse(f"{event.func} runs with gradients or casts in one mode only")
        mine, theirs = self.labels.describe(args), list(event.args)
        mine += _defaults(event.func, len(mine), len(theirs))
        theirs += _defaults(event.func, len(theirs), len(mine))
        found: Flags = []
        if not _same(theirs, mine, ("args",), found) or not _same(
            event.kwargs, self.labels.describe(kwargs), ("kwargs",), found
        ):
            self.refuse(f"{event.func} has other operands")
        if not all(is_mode_literal(event.func, path) for path, _ in found):
            self.refuse(f"train and eval give {event.func} different literals")
        return found

    @staticmethod
    def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], event: _Event) -> Any:
        """The op's result, and that of the record where nobody can tell them apart."""
        out = func(*args, **kwargs)
        given = trees.tensors_in((args, kwargs))
        mine, theirs = trees.tensors_in(out), trees.tensors_in(event.out)
        alike = len(mine) == len(theirs) and all(
            _form(a) == _form(b) and _places(a, given) == _places(b, event.given) == []
            for a, b in zip(mine, theirs, strict=True)
        )
        return event.out if alike else out


def _defaults(func: Any, start: int, stop: int) -> list[Any]:
    """The defaults of an op's positional arguments in a range of places."""
    arguments = schema_of(func).arguments[start:stop]
    if not all(a.has_default_value() for a in arguments):
        raise _Differs(f"{func} is given other arguments")
    return [a.default_value for a in arguments]


def _places(tensor: torch.Tensor, among: list[torch.Tensor]) -> list[int]:
    return [i for i, t in enumerate(among) if t is tensor]


def _numbers(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Sizes, strides and offset; none for what has no strides."""
    strided = tensor.layout == torch.strided
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset()) if strided else ()


def _as_made(tensor: torch.Tensor) -> list[Any]:
    """The same as they were when the tensor was made or changed, whatever guards have said since."""
    return [n.node._expr if isinstance(n, torch.SymInt) else n for n in _numbers(tensor)]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that can be asked of a tensor without data."""
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in _numbers(tensor)]
    return sizes, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, type(tensor)


def _same(a: Any, b: Any, path: tuple[Any, ...], out: Flags) -> bool:
    """Whether two described values are one but for numbers, which are written down."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, (*path, i), out) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], (*path, k), out) for k in a)
    if isinstance(a, _Constant) and isinstance(b, _Constant):
        return a.value is b.value or _equal(a.value, b.value)
    if type(a) is type(b) and (a is b or bool(a == b)):
        return True
    if isinstance(a, bool | int | float) and isinstance(b, bool | int | float):
        if float(a) != float(b):
            out.append((path, b))
        return True
    return False


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if type(a) is not torch.Tensor or type(b) is not torch.Tensor or _form(a) != _form(b):
        return False
    with unset_fake_temporarily():
        return same_to_the_bit(a, b)


@contextlib.contextmanager
def _ops_alone(tracer: Any) -> Iterator[None]:
    """What the trace writes into its graph besides ops, it does not write meanwhile; nor does it count modules."""
    modes = [m for m in _get_current_function_mode_stack() if isinstance(m, PreDispatchTorchFunctionMode)]
    tracers = [m.tracer for m in modes]
    stack, calls = dict(tracer.module_stack), dict(tracer.num_calls)
    for mode in modes:
        mode.tracer = _NoGraph()  # type: ignore[assignment]
    try:
        yield
    finally:
        for mode, own in zip(modes, tracers, strict=True):
            mode.tracer = own
        for table, before in ((tracer.module_stack, stack), (tracer.num_calls, calls)):
            table.clear()
            table.update(before)


@dataclass
class _Nothing:
    meta: dict[str, Any] = field(default_factory=dict)


class _NoGraph:
    """In place of a trace's graph. Gradients may be switched, which every op's state tells; all else is refused."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch._C._set_grad_enabled:
            raise _Differs(f"eval enters {target}")
        return _Nothing()
