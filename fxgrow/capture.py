"""From an ``nn.Module`` and example inputs to a :class:`Program`: one clean ATen graph with names.

Capture goes through ``torch.export`` (non-strict, every input dim ``Dim.AUTO``), twice: in train and in eval mode.
Where the two graphs differ only in literals, the literal is rewired to the module's own ``training`` flag, so that
one graph serves both modes. Where they differ in ops (stochastic depth), they stand side by side, like the graphs of
several named calls, and constrain one set of axes. Parameters are ``get_attr`` nodes under their own names; ties are
kept.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import operator
import os
import re
import sysconfig
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental import _config as experimental
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxgrow.errors import CaptureError
from fxgrow.foreign import Watch, check_backward, check_ops, custom_backwards, in_words
from fxgrow.guards import Guard, broken, find_guards, has_mixed_sizes, settle_sizes, weigh
from fxgrow.materialise import check_readable
from fxgrow.memory import Memory, writes
from fxgrow.quiet import quiet
from fxgrow.structure import describe, take_apart
from fxgrow.trail import Replica

if TYPE_CHECKING:
    from fxgrow.axes.analysis import Axes

#: ops that only check; a regenerated module has no use for them
_ASSERTIONS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "_assert_async")


@dataclass
class Call:
    """One way of calling a model: its name, example inputs, and what tells it from the others.

    ``inputs`` are the forward parameters that take tensors, ``constants`` the values of those that do not.
    ``nested`` are the parameters that take a list, tuple or dict of them: each to its structure (see
    :mod:`fxgrow.structure`) and the names of its leaves. ``training`` is the mode it serves, None for both.
    ``sizes`` are those of the tensors, None in dims that may differ from call to call.
    ``guards`` are the conditions on them under which the graph is the model (see :mod:`fxgrow.guards`).
    ``structure`` describes what it returns where that is no plain tuple, list or dict; the graph then returns leaves.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[str] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    training: bool | None = None
    structure: str | None = None
    nested: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    sizes: dict[str, list[int | None]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)

    def leaves(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments with nested ones taken apart; None where they are not built like the example's."""
        out = dict(given)
        for name, (structure, names) in self.nested.items():
            found = take_apart(out.pop(name, None), structure)
            if found is None:
                return None
            out |= dict(zip(names, found, strict=True))
        return out

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether the graph is for inputs of these shapes, by name."""
        for name, sizes in self.sizes.items():
            shape = shapes[name]
            if len(shape) != len(sizes) or any(s is not None and s != n for s, n in zip(sizes, shape, strict=True)):
                return False
        return broken(self.guards, shapes) is None

    @property
    def label(self) -> str:
        return self.name if self.training is None else f"{self.name}_{'train' if self.training else 'eval'}"

    def serves(self, training: bool | None) -> bool:
        """Whether the call's graph is that of the mode; None asks for any."""
        return self.training is None or training is None or self.training == training


@dataclass
class Program:
    """A captured model.

    Attributes:
        graph: ATen ops; parameters, buffers and constants are ``get_attr`` nodes, inputs placeholders, and the output
            node holds the model's own output structure. ``node.meta["val"]`` is a fake tensor,
            ``node.meta["module_path"]`` the module the op ran in, ``node.meta["source"]`` the user's line.
        parameters, buffers, constants: by name; the tensors are the model's own, not copies.
        aliases: further names of a tied parameter or buffer, to the name it is kept under.
        persistent: names of the buffers that are in the state dict.
        module_types: module path to class name, in order of first use.
        training: the mode the model was in.
        mode_reason: why train and eval have graphs of their own; empty where they share one.
        args, kwargs: the example inputs (clones), of the first call where there are several.
        calls: every way of calling the model that was captured. With several, the graph holds them side by side: the
            nodes of call k > 0 have ``meta["call"] == k``, parameters are shared, the output node is a tuple.
        signature, defaults: the forward method's parameters in order, and the plain values they default to.
    """

    graph: fx.Graph
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    persistent: set[str]
    requires_grad: dict[str, bool]
    module_types: dict[str, str]
    class_name: str
    training: bool
    mode_reason: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    containers: dict[str, str] = field(default_factory=dict)  # module path -> class name of the whole module tree
    calls: list[Call] = field(default_factory=list)
    signature: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    _axes: Axes | None = None

    @property
    def axes(self) -> Axes:
        """The axes of the model, analysed on first use."""
        if self._axes is None:
            from fxgrow.axes.analysis import analyse

            self._axes = analyse(self)
        return self._axes

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter, buffer or constant by any of its names."""
        name = self.aliases.get(name, name)
        for table in (self.parameters, self.buffers, self.constants):
            if name in table:
                return table[name]
        raise KeyError(name)

    def without_tensors(self) -> Program:
        """The same program with shapes in place of tensors, so that remembering it keeps no weights alive."""

        def empty(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {n: torch.empty_like(t, device="meta") for n, t in table.items()}

        return replace(
            self,
            parameters=empty(self.parameters),
            buffers=empty(self.buffers),
            constants=empty(self.constants),
            _axes=None,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Programs are not changed once they are made: copies share the graph."""
        return replace(self)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parameters, **self.buffers, **self.constants}


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    dynamic: Literal["all", "batch"] = "all",
) -> Program:
    """Trace ``model`` as it is called with ``args`` and ``kwargs``.

    Every dim of every tensor input is dynamic unless the model itself fixes it; dims of size 1 are taken as fixed, so
    use a batch of at least 2. The model is left as it was.

    Args:
        model: any module that ``torch.export`` can trace.
        args, kwargs: one example call.
        calls: instead, or in addition, several named ones: name to a tuple of arguments or a dict of keyword arguments,
            e.g. ``{"train": (x, y), "generate": (x,)}``. All of them constrain the axes, and a grown module chooses
            among them by the arguments it is given.
        dynamic: ``batch`` keeps every input dim but the first at the size of the example. Models that compute paddings
            and windows from the size of an image (Swin, MaxViT) trace ten times faster so. Where PyTorch's symbolic
            arithmetic gives up on a model, this is done without being asked, with a warning.

    Raises:
        CaptureError: the model cannot be exported; the message carries PyTorch's reason and the source line.
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture needs an nn.Module, got {type(model).__name__}")
    if isinstance(args, torch.Tensor):
        raise CaptureError("args must be a tuple of inputs, got a tensor: write (x,)")
    wanted = _calls(args, kwargs, calls)
    _check_plain(model)
    check_readable({**dict(model.named_parameters()), **dict(model.named_buffers())}, CaptureError)
    known = _remembered(model, wanted)
    if known is not None:
        known.seconds = time.perf_counter() - start
        return known
    was_training = model.training
    for call in wanted:
        _check_signature(model, call)
        if _strange_dtypes(model, call):
            _check_example(model, call)
    refused = ""
    try:
        exported = _exports(model, wanted, dynamic)
    except CaptureError as error:
        refused = str(error)
        for call in wanted:
            _check_example(model, call)
        exported, how = _with_less(model, wanted, dynamic, error)
        warnings.warn(f"{str(error).partition(chr(10))[0]}; {how}", stacklevel=2)
    traces: list[_Trace] = []
    served: list[Call] = []
    reasons: list[str] = []
    for call, pair in zip(wanted, exported, strict=True):
        if len(pair) == 1:
            reasons.append(f"train mode cannot be traced ({refused.partition(chr(10))[0]})")
            traces.append((pair[0][0], {}))
            served.append(replace(call, training=False, guards=pair[0][1]))
            was_training = False
            continue
        (train, there), (evaluation, here) = pair
        same, reason, flags = _align(train, evaluation)
        if same:
            traces.append((train, flags))
            served.append(replace(call, guards=list(dict.fromkeys([*there, *here]))))
            continue
        reasons.append(reason)
        traces += [(train, {}), (evaluation, {})]
        served += [
            replace(call, training=mode, inputs=[], constants={}, sizes={}, guards=own)
            for mode, own in ((True, there), (False, here))
        ]
    program = _program(model, traces, served)
    program.training, program.mode_reason = was_training, next(iter(reasons), "")
    program.seconds = time.perf_counter() - start
    return program


def _with_less(
    model: nn.Module, calls: list[Call], dynamic: str, error: CaptureError
) -> tuple[list[list[tuple[torch.export.ExportedProgram, list[Guard]]]], str]:
    """What can be traced of a model that cannot be traced whole, and how that was done.

    Raises:
        CaptureError: nothing; the one that was raised first.
    """
    with contextlib.suppress(CaptureError):
        if dynamic != "batch" and not isinstance(error.__cause__, _ON_DATA):
            return _exports(model, calls, "batch"), "captured with every input dim but the first as it is"
    with contextlib.suppress(CaptureError):
        return _exports(
            model, calls, dynamic, (False,)
        ), "captured in eval mode only: call the grown module in eval mode"
    raise error


def _exports(
    model: nn.Module, calls: list[Call], dynamic: str, modes: tuple[bool, ...] = (True, False)
) -> list[list[tuple[torch.export.ExportedProgram, list[Guard]]]]:
    """Every call in train and in eval mode, with its guards; the modules' own modes are put back."""
    before = {name: m.training for name, m in model.named_modules()}
    was_training = model.training
    exported = []
    try:
        for call in calls:
            pair = []
            for mode in modes:
                for name, m in model.named_modules():
                    m.training = before[name]
                if not mode:
                    model.eval()
                elif not was_training:
                    model.train()
                with custom_backwards() as used:
                    traced = _export(model, call.args, call.kwargs, dynamic)
                check_ops(traced.graph, source_line)
                if used:
                    check_backward(model, traced, call.args, call.kwargs, used)
                guards = find_guards(traced, _user_line)
                pair.append((traced, weigh(guards, Replica(model, traced, call.args, call.kwargs))))
            exported.append(pair)
    finally:
        for name, m in model.named_modules():
            m.training = before[name]
    return exported


def _calls(args: Sequence[Any], kwargs: Mapping[str, Any] | None, calls: Mapping[str, Any] | None) -> list[Call]:
    out = []
    if args or kwargs or not calls:
        out.append(Call("forward", _distinct(tuple(args)), _distinct(dict(kwargs or {}))))
    for name, inputs in (calls or {}).items():
        if isinstance(inputs, Mapping):
            out.append(Call(name, (), _distinct(dict(inputs))))
        elif isinstance(inputs, list | tuple):
            out.append(Call(name, _distinct(tuple(inputs)), {}))
        else:
            raise CaptureError(f"calls[{name!r}] must be a tuple of arguments or a dict of keyword arguments")
    return out


def _remembered(model: nn.Module, calls: list[Call]) -> Program | None:
    """The program a regenerated module was made from, with the module's present tensors.

    It keeps what a new trace of generated code would lose: module paths inside blocks, and the user's source lines.
    """
    if not isinstance(model, fx.GraphModule) or "fxgrow" not in model.meta:
        return None
    from fxgrow.regenerate import code_of

    before: Program = model.meta["fxgrow"]
    if code_of(model) != model.meta.get("fxgrow_code"):
        return None  # somebody changed it: trace what is there now
    examples: dict[int, Call] = {}
    for call in calls:
        fitting = matching_calls(before, call.args, call.kwargs)
        if not fitting:
            return None
        examples |= dict.fromkeys(fitting, call)
    if any(k not in examples and c.args == () and c.kwargs == {} for k, c in enumerate(before.calls)):
        return None  # one of its calls has no example left to verify it with
    return replace(
        program_of(model, before),
        calls=[
            replace(c, args=examples[k].args, kwargs=examples[k].kwargs) if k in examples else c
            for k, c in enumerate(before.calls)
        ],
        args=calls[0].args,
        kwargs=calls[0].kwargs,
    )


def program_of(module: fx.GraphModule, program: Program) -> Program:
    """A regenerated module's program with the module's present tensors."""
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    missing = [n for n in program.tensors if n not in own]
    if missing:
        raise CaptureError(f"the regenerated module has lost {missing[0]!r}; rebuild it from its checkpoint")
    return replace(
        program,
        parameters={n: own[n] for n in program.parameters},
        buffers={n: own[n] for n in program.buffers},
        constants={n: own[n] for n in program.constants},
        requires_grad={n: own[n].requires_grad for n in program.parameters},
        training=module.training,
        seconds=0.0,
        _axes=None,
    )


def matching_calls(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool | None = None
) -> list[int]:
    """The numbers of the calls that take these arguments, of one mode or of any.

    The tensors given must be those of the example; every other argument, given or left at its default, must have the
    example's value, which is part of the graph.
    """
    calls, names = program.calls, program.signature
    asked = [n for n, c in enumerate(calls) if c.serves(training)]
    alone = len({c.name for c in calls}) == 1
    if len(args) > len(names):  # forward(*args)
        return asked if alone else []
    together = {**dict(zip(names, args, strict=False)), **kwargs}
    found = []
    for number in asked:
        call, given = calls[number], calls[number].leaves(together)
        if given is None or {n for n, v in given.items() if isinstance(v, torch.Tensor)} != set(call.inputs):
            continue
        others = {n for n in (*given, *call.constants) if n not in call.inputs}
        here, there = {**program.defaults, **given}, {**program.defaults, **call.constants}
        if all(_same_constant(here.get(n), there.get(n)) for n in others):
            found.append(number)
    if alone and not found and not any(isinstance(v, torch.Tensor) for v in together.values()):
        return [n for n in asked if not calls[n].inputs]
    return found


def _same_constant(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b)) or (isinstance(a, int | float) and bool(a == b))


def _distinct(value: Any) -> Any:
    """Clone tensors, so that one tensor passed twice is two inputs."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, value)


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
            raise CaptureError(
                f"module {name or '(root)'} is wrapped ({type(module).__name__}); capture the module inside "
                "(.module or ._orig_mod) and wrap the grown one again"
            )
        hooks = [h for h in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, h)]
        if hooks and not torch.nn.utils.parametrize.is_parametrized(module):
            warnings.warn(f"module {name or '(root)'} has forward hooks; what they compute is traced in", stacklevel=4)


def _check_signature(model: nn.Module, call: Call) -> None:
    """Raises:
    CaptureError: the example has other arguments than ``forward`` takes.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example of call {call.name!r} does not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None


def _strange_dtypes(model: nn.Module, call: Call) -> bool:
    """Whether a float input has a dtype that no tensor of the model has: a trace does not notice that ops refuse it."""
    own = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    given = {t.dtype for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, torch.Tensor)}
    return bool(own) and any(d.is_floating_point and d not in own for d in given)


def _check_example(model: nn.Module, call: Call) -> None:
    """Run the model on an example as it is, on copies of its buffers.

    Raises:
        CaptureError: the model itself raises, so that there is nothing to trace.
    """
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        # with gradients, as it is trained: forwards that differentiate need them
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.func.functional_call(model, buffers, _distinct(call.args), _distinct(call.kwargs))
    except Exception as error:
        shapes = ", ".join(_shown(x) for x in pytree.tree_leaves((call.args, call.kwargs)))
        reason = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{type(model).__name__} itself raises with the example of call {call.name!r} ({shapes}): "
            f"{type(error).__name__}: {reason}{_place(error, '')}"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return repr(value)[:40]


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: str
) -> torch.export.ExportedProgram:
    def one(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, torch.Tensor):
            return None
        wanted = x.shape if dynamic == "all" else x.shape[:1]
        return {i: None if size == 1 else Dim.AUTO for i, size in enumerate(wanted)}

    def dims(value: Any) -> Any:
        return pytree.tree_map(one, value)

    def export(oblivious: bool) -> torch.export.ExportedProgram:
        # oblivious: sizes are not taken to be at least 2, and an op's own branches leave no guards. What remains is
        # what the graph's validity hangs on. The setting is local to the thread.
        with (
            warnings.catch_warnings(),
            quiet(),
            _traceable_forward(model, kwargs, left_out),
            experimental.patch(backed_size_oblivious=oblivious),  # type: ignore[attr-defined]
            watch,
        ):
            warnings.simplefilter("ignore")
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
            shapes = {name: dims(value) for name, value in bound.arguments.items()}
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes or None, strict=False)
            settle_sizes(exported)
            return exported

    watch = Watch(_user_line)
    left_out: set[str] = set()
    try:
        exported = export(True)
        if has_mixed_sizes(exported):  # the plain trace may pin them
            with contextlib.suppress(Exception):
                plain = export(False)
                exported = exported if has_mixed_sizes(plain) else plain
    except Exception as error:
        try:
            if watch.reason or isinstance(error, _ON_DATA):
                raise error
            exported = export(False)
        except Exception:
            raise CaptureError(watch.reason or _capture_message(model, error)) from error
    if watch.reason:
        raise CaptureError(watch.reason)
    if left_out:
        returned = exported.graph_signature.user_outputs
        if not any(isinstance(name, str) for name in returned):
            raise CaptureError(
                f"{type(model).__name__} returns a {left_out.pop()}, which PyTorch cannot take apart into tensors; "
                "return a tuple, list or dict of them, or register the class (torch.export.register_dataclass)"
            )
        warnings.warn(
            f"{type(model).__name__} returns a {', a '.join(sorted(left_out))}, which PyTorch cannot take apart: the "
            "grown module returns None in its place. Register the class with pytree to keep it",
            stacklevel=5,
        )
    return exported


#: what a graph can return
_LEAVES = (torch.Tensor, bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)

#: errors of a trace that reads data: no other choice of dynamic dims helps
_ON_DATA = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@contextlib.contextmanager
def _traceable_forward(model: nn.Module, kwargs: Mapping[str, Any], left_out: set[str]) -> Iterator[None]:
    """Give ``forward`` a form that ``torch.export`` takes, on this instance and while it is traced.

    ``forward(x, **kwargs)`` gets a signature that names the keywords, which dims are looked up by. Objects among the
    results that pytree cannot take apart, such as a cache of keys and values, become None; ``left_out`` gets their
    types.
    """
    forward, own = model.forward, model.__dict__.get("forward")
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    extra = [k for k in kwargs if k not in signature.parameters]
    if extra and any(p.kind is p.VAR_KEYWORD for p in parameters):
        plain = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        named = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in extra]
        signature = signature.replace(parameters=[*plain, *named])

    def known(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, _LEAVES):
            return leaf
        left_out.add(type(leaf).__name__)
        return None

    @functools.wraps(forward)
    def traceable(*args: Any, **keywords: Any) -> Any:
        return pytree.tree_map(known, forward(*args, **keywords))

    traceable.__signature__ = signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = traceable
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _positional(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _defaults(model: nn.Module) -> dict[str, Any]:
    plain = (type(None), bool, int, float, str)
    return {
        n: p.default for n, p in inspect.signature(model.forward).parameters.items() if isinstance(p.default, plain)
    }


def _capture_message(model: nn.Module, error: Exception) -> str:
    text = str(error).strip()
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    location = _place(error, text)
    if in_words(text):
        return f"cannot capture {type(model).__name__}: {in_words(text)}{location}"
    return (
        f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {reason}{location}\n"
        "  The graph must not depend on tensor values; see https://pytorch.org/docs/stable/export.html"
    )


def _place(error: Exception, text: str) -> str:
    """The user's line that an error came from, or that its text names."""
    frames = [(f.filename, f.lineno, f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    named = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', text)
    for file, line, name, code in (*reversed(frames), *reversed(named)):
        if not _library_file(file):
            return f"\n  at {file}:{line} in {name}: {code.strip()}"
    return ""


@functools.cache
def _library_roots() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders whose code is never the user's model (torch, fxgrow, Python itself), and where others are installed."""
    here, paths = Path(__file__).parent, sysconfig.get_paths()
    own = [here, here.parent / "passes", here.parent / "kernels", Path(torch.__file__).parent]
    installed = {paths[k] for k in ("purelib", "platlib")} | {paths["stdlib"] + "/site-packages"}
    return tuple(f"{p}{os.sep}" for p in (*own, paths["stdlib"])), tuple(f"{p}{os.sep}" for p in installed)


def _library_file(path: str) -> bool:
    """Whether a frame is in torch, fxgrow or Python; a model of another package (torchvision, ...) is the user's."""
    roots, installed = _library_roots()
    if path.startswith(("<", *roots[:-1])):
        return True
    return path.startswith(roots[-1]) and not path.startswith(installed)


def _align(
    train: torch.export.ExportedProgram, evaluation: torch.export.ExportedProgram
) -> tuple[bool, str, dict[str, list[tuple[Any, Any]]]]:
    """Where the train and the eval graph differ in literals.

    Returns:
        Whether one graph can serve both modes; otherwise why not; and, by train node, the (path, eval literal) pairs.
    """
    flags: dict[str, list[tuple[Any, Any]]] = {}
    names: dict[str, str] = {}  # eval node -> train node
    todo = list(evaluation.graph.nodes)[::-1]
    for node in train.graph.nodes:
        if not todo:
            return False, "the eval graph is shorter than the train graph", {}
        other = todo[-1]
        while other.target == _CONTIGUOUS and node.target != _CONTIGUOUS:
            todo.pop()  # a copy that only eval needs; views are traced as reshapes, which make it themselves
            names[other.name] = names[other.args[0].name]
            other = todo[-1]
        if node.op != other.op or (node.op == "call_function" and node.target != other.target):
            if node.target == _CONTIGUOUS:
                continue
            if _counts_batches(node):
                flags[node.name] = [(("args", 1), 0)]
                continue
            return False, f"train runs {node.target} where eval runs {other.target}", {}
        todo.pop()
        names[other.name] = _through_copies(node).name
        if node.op == "placeholder" and node.name != other.name:
            return False, "the inputs differ between train and eval", {}
        _fill_defaults(node, other)
        differences: list[tuple[Any, Any]] = []
        if not _compare(node.args, other.args, names, ("args",), differences) or not _compare(
            dict(node.kwargs), dict(other.kwargs), names, ("kwargs",), differences
        ):
            return False, f"train and eval compute {node.name} from different values", {}
        if differences and not all(_is_mode(node, path) for path, _ in differences):
            return False, f"train and eval give {node.target} different literals", {}
        if differences:
            flags[node.name] = differences
    if todo:
        return False, "the eval graph is longer than the train graph", {}
    return True, "", flags


def _fill_defaults(a: fx.Node, b: fx.Node) -> None:
    """Give two calls of one op equally many positional arguments: one may spell out what the other leaves out."""
    schema = getattr(a.target, "_schema", None)
    for node, other in ((a, b), (b, a)):
        for i in range(len(node.args), len(other.args)):
            if schema is None or not schema.arguments[i].has_default_value():
                return
            node.args = (*node.args, schema.arguments[i].default_value)


_CONTIGUOUS = torch.ops.aten.contiguous.default


def _through_copies(node: fx.Node) -> fx.Node:
    """The node whose values these are: a copy into another memory layout is the same value."""
    while node.target == _CONTIGUOUS:
        node = node.args[0]  # type: ignore[assignment]
    return node


#: arguments that switch or weigh randomness and running statistics: no shape, and no factor of a growth, hangs on them
_MODES = {"train", "training", "is_train", "use_input_stats", "dropout", "dropout_p", "momentum"}


def _is_mode(node: fx.Node, path: tuple[Any, ...]) -> bool:
    """Whether a literal is one that any value may be put in for; what else differs between modes needs two graphs."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(path) != 2:
        return False
    name = path[1] if path[0] == "kwargs" else schema.arguments[path[1]].name
    return name in _MODES or (name == "p" and "dropout" in schema.name)


def _counts_batches(node: fx.Node) -> bool:
    """``num_batches_tracked.add_(1)``, the one op that only the train graph of a batch norm has."""
    if node.op != "call_function" or str(node.target) != "aten.add_.Tensor" or node.args[1] != 1 or node.kwargs:
        return False
    counter = node.args[0]
    return isinstance(counter, fx.Node) and counter.op == "placeholder" and not counter.meta["val"].is_floating_point()


def _compare(a: Any, b: Any, names: dict[str, str], path: tuple[Any, ...], out: list[tuple[Any, Any]]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node) and names.get(b.name) == _through_copies(a).name
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(
            _compare(x, y, names, (*path, i), out) for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_compare(a[k], b[k], names, (*path, k), out) for k in a)
    if type(a) is type(b) and (a == b or a is b):
        return True
    if isinstance(a, bool | int | float) and isinstance(b, bool | int | float):
        if float(a) != float(b):
            out.append((path, b))
        return True
    return False


#: an exported graph, and by node the (path, eval literal) pairs where the other mode's graph differs
_Trace = tuple[torch.export.ExportedProgram, dict[str, list[tuple[Any, Any]]]]


def _program(
    model: nn.Module,
    traces: list[_Trace],
    calls: list[Call],
) -> Program:
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
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
        structures.append(_trace_into(graph, exported, flags, aliases, attributes, constants, call, number))
        call.nested = _nested_inputs(model, exported, call)
        shared = set(attributes.values())
        for node in graph.nodes:
            if number and node not in before and node not in shared:
                node.meta["call"] = number
        for node in exported.graph.nodes:
            for path, cls in (node.meta.get("nn_module_stack") or {}).values():
                types.setdefault(_clean(path), cls if isinstance(cls, str) else cls.__qualname__)
    graph.output(structures[0] if len(structures) == 1 else tuple(structures))
    _fold_constants(graph, constants)
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
    program = Program(
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
    )
    graph.lint()
    return program


def _nested_inputs(
    model: nn.Module, exported: torch.export.ExportedProgram, call: Call
) -> dict[str, tuple[str, list[str]]]:
    """The forward parameters whose example is a list, tuple or dict, with the placeholders of their leaves."""
    specs = exported.graph_signature.input_specs
    names = iter([_argument_name(s.arg) for s in specs if s.kind is InputKind.USER_INPUT])
    signature = _positional(model)
    out: dict[str, tuple[str, list[str]]] = {}
    for number, value in [*enumerate(call.args), *call.kwargs.items()]:
        leaves, spec = pytree.tree_flatten(value)
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
            attributes[name].meta = {"val": node.meta.get("val"), "module_path": name.rpartition(".")[0], "source": ""}
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
                new.meta = {"val": node.meta.get("val"), "module_path": "", "source": "", "input": node.name}
                env[node] = new
            else:
                raise CaptureError(f"input {node.name} is a {spec.kind.name.lower()}, which is not supported")
            if spec.kind in (InputKind.PARAMETER, InputKind.USER_INPUT):
                learns.add(node)
            continue
        if node.op == "output":
            flat = pytree.tree_map_only(fx.Node, lambda n: env[n], list(node.args[0]))
            return _structure(call, flat, exported.call_spec.out_spec)
        if any(word in str(node.target) for word in _ASSERTIONS):
            continue
        if node.op == "get_attr":
            env[node] = node  # a subgraph, entered below
            continue
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
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


#: a computed constant of more entries than this stays computed
_FOLD_LIMIT = 1 << 16


def _fold_constants(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Compute what depends on no input and no weight, such as ALiBi's slopes, once: constants grow, ``arange`` cannot.

    Tensors of one value stay as they are; their sizes follow by themselves.
    """
    memory = Memory(graph)
    values: dict[fx.Node, torch.Tensor] = {}
    numbers: set[fx.Node] = set()  # consecutive ones
    computed: dict[fx.Node, None] = {}  # from them, in the graph's order
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants and not memory.written(node):
            values[node] = constants[node.target]
        if node.op != "call_function" or memory.written(node) or not _computable(node, values):
            continue
        try:
            values[node] = _compute(node, values)
        except (RuntimeError, TypeError, ValueError):
            continue
        if str(node.target).startswith(("aten.arange", "aten.linspace")):
            numbers.add(node)
        elif any(i in numbers or i in computed for i in node.all_input_nodes):
            computed[node] = None
    for node in [n for n in computed if values[n].dim() and any(u not in values for u in n.users)]:
        name = f"constant_{node.name}"
        constants[name] = values[node].detach().clone()
        with graph.inserting_before(next(iter(graph.nodes))):
            attribute = graph.get_attr(name)
        attribute.meta = {**node.meta, "module_path": ""}
        attribute.meta.pop("call", None)
        node.replace_all_uses_with(attribute)


def _computable(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> bool:
    """Whether an op needs nothing but known constants, and always gives the same small tensor."""
    value = node.meta.get("val")
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    if writes(node) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return False
    return value.numel() <= _FOLD_LIMIT and all(i in values for i in node.all_input_nodes) and "empty" not in node.name


def _compute(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    if str(kwargs.get("device", "")).startswith("meta"):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


#: in place of memory that is not set
_ZEROS = {
    "aten.empty.memory_format": torch.ops.aten.zeros.default,
    "aten.empty_like.default": torch.ops.aten.zeros_like.default,
    "aten.new_empty.default": torch.ops.aten.new_zeros.default,
}
_DRAWS = {f"aten.{n}_" for n in ("bernoulli", "normal", "uniform", "random", "exponential", "log_normal", "cauchy")}


def _memory_that_holds_nothing(graph: fx.Graph) -> None:
    """Memory that is not set becomes zeros, which is one of the values it may have: every copy of an entry then agrees.

    Where the next thing is that random numbers are drawn into it, it stays. Complex numbers seen through a view need
    strides that are even, whatever the sizes: their source is laid out anew.
    """
    for node in list(graph.nodes):
        name = str(node.target)
        if name in _ZEROS and not any(str(u.target).rpartition(".")[0] in _DRAWS for u in node.users):
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
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _meta(node: fx.Node) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    path = _clean(list(stack.values())[-1][0]) if stack else ""
    calls = list(stack.values())[-1][0] if stack else ""
    if path.startswith("_empty_nn_module_stack"):
        path = calls = ""
    return {
        "val": node.meta.get("val"),
        "module_path": path,
        "module_call": calls,
        "source": source_line(node.meta.get("stack_trace") or ""),
        **{key: node.meta[key] for key in ("sizes", "result_sizes") if key in node.meta},
        # activation checkpointing leaves no trace in the graph but the line that calls it
        **({"checkpointed": True} if re.search(r"checkpoint\w*\(", node.meta.get("stack_trace") or "") else {}),
    }


def _clean(path: str) -> str:
    """Module path without the mark of a repeated call (``layer@1``)."""
    return re.sub(r"@\d+", "", path)


def _user_line(frame: Any) -> str:
    """A frame of the user's own code as ``file.py:12: code``, empty for one of a library."""
    if not isinstance(frame, traceback.FrameSummary) or _library_file(frame.filename):
        return ""
    file = frame.filename.removeprefix(
        f"{Path.cwd()}{os.sep}"
    )  # it is printed and stored: without this machine's folders
    return f"{file}:{frame.lineno}: {(frame.line or '').strip()}"


def source_line(stack_trace: str) -> str:
    """The innermost frame of the user's own code, as ``file.py:12: code``."""
    best = ""
    for file, line, _, code in re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', stack_trace):
        if not _library_file(file):
            best = f"{file}:{line}: {(code or linecache.getline(file, int(line))).strip()}"
    return best


def _structure(call: Call, flat: list[Any], spec: Any) -> Any:
    """The model's own output structure over graph nodes; a tuple of its leaves where it takes more than builtins."""
    tree = pytree.tree_unflatten(list(flat), spec)

    def plain(value: Any) -> bool:
        if type(value) in (list, tuple):
            return all(plain(v) for v in value)
        if type(value) is dict:
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return value is None or isinstance(value, fx.Node | int | float | bool | str)

    if plain(tree):
        return tree
    call.structure = describe(tree, spec)
    return tuple(flat)


def _without_sizes(node: fx.Node) -> dict[str, Any]:
    """A node's metadata for another value at its place."""
    return {k: v for k, v in node.meta.items() if k not in ("sizes", "result_sizes")}


def _rewire(graph: fx.Graph, node: fx.Node, path: tuple[Any, ...], eval_value: Any) -> None:
    """Replace a literal that differs between the modes by a choice on the module's ``training`` flag."""
    holder: Any = node.args if path[0] == "args" else node.kwargs
    literal: Any = holder
    for key in path[1:]:
        literal = literal[key]
    with graph.inserting_before(node):
        flag = graph.get_attr("training")
        flag.meta = {**_without_sizes(node), "val": None, "is_flag": True}
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
            results = pytree.tree_map_only(fx.Node, lambda x: inner[x], list(n.args[0]))
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
