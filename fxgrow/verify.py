"""Measure a growth: outputs against the original's, gradients against the plan's, newborn parameters alive.

The float64 comparison materialises the plan in float64 and runs both graphs with float64 in place of every baked float
dtype, so that the algebra is tested and not the rounding; the native comparison runs the user's own module against the
grown one in the model's own dtype.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils._pytree as pytree
from pydantic import BaseModel, Field
from torch import fx, nn

from fxgrow.capture import Call, Program
from fxgrow.errors import ExactnessError
from fxgrow.materialise import copy_gradient, materialise_all
from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.regenerate import regenerate

#: an exact growth that measures more than this in float64 is a bug
LIMIT = 1e-10
GRADIENT_LIMIT = 1e-7


class OutputError(BaseModel):
    """Difference of one output: max |new - old| / max(1e-300, max |old|)."""

    output: str
    shape: list[int]
    relative_error: float
    changed: bool = Field(False, description="an approximate growth was allowed to change this output")


class Receipt(BaseModel):
    """What was measured after a growth. None means not measured, and ``notes`` says why."""

    exactness: Literal["exact", "approximate", "lossy"]
    error_float64: float | None = Field(None, description="largest relative error of an output, float64, eval mode")
    error_float64_train: float | None = Field(None, description="the same in train mode with dropout off")
    error_native: float | None = Field(None, description="the same in the model's own dtype, eval mode")
    outputs: list[OutputError] = Field(default_factory=list)
    gradient_error: float | None = Field(
        None, description="largest relative difference between the grown gradients and the plan's map of the old ones"
    )
    dead_parameters: list[str] = Field(default_factory=list, description="newborn entries without gradient in 2 steps")
    params_before: int = 0
    params_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def summary(self) -> str:
        def show(x: float | None) -> str:
            return "not measured" if x is None else f"{x:.1e}"

        return (
            f"{self.params_before:,} -> {self.params_after:,} parameters ({self.exactness}); relative error "
            f"{show(self.error_float64)} in float64, {show(self.error_native)} native; "
            f"gradients {show(self.gradient_error)}; "
            f"{sum(self.seconds.values()):.1f} s"
        )


def output_numbers(program: Program) -> list[tuple[Call | None, range]]:
    """By call, the numbers of the tensors it returns: those of all calls are counted on."""
    value = program.graph.output_node().args[0]
    calls: list[tuple[Call | None, Any]] = [(next(iter(program.calls), None), value)]
    if len(program.calls) > 1:
        assert isinstance(value, tuple)
        calls = list(zip(program.calls, value, strict=True))
    out, first = [], 0
    for call, returned in calls:
        count = sum(
            isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor) for x in pytree.tree_leaves(returned)
        )
        out.append((call, range(first, first + count)))
        first += count
    return out


def relative_errors(
    old: Any, new: Any, plan: GrowthPlan | None = None, numbers: Sequence[int] | None = None
) -> list[OutputError]:
    """Per output tensor; integer outputs count as different or not.

    Args:
        plan: where it appends entries to an output, the old ones are compared, and it must have grown by just so many.
        numbers: of these outputs in the plan, which counts those of all calls; 0, 1, 2 ... where None.

    Raises:
        ExactnessError: an output has another shape than the plan says.
    """
    out = []
    changed = plan.changed_outputs if plan is not None else set()
    before, after = _tensors(old), _tensors(new)
    numbers = range(len(before)) if numbers is None else numbers
    for i, a, b in zip(numbers, before, after, strict=True):
        for growth in (o for s in plan.steps for o in s.outputs if o.output == i) if plan is not None else ():
            if b.shape[growth.dim] == a.shape[growth.dim] + _appended(plan, i, growth.dim):
                b = b.narrow(growth.dim, 0, a.shape[growth.dim])
        if a.shape != b.shape:
            raise ExactnessError(f"output {i} changed its shape from {tuple(a.shape)} to {tuple(b.shape)}")
        if a.is_floating_point():
            a, b = a.detach().double(), b.detach().double()
            same = (a == b) | (a.isnan() & b.isnan())
            scale = a[a.isfinite()].abs().max().clamp_min(1e-300) if bool(a.isfinite().any()) else a.new_ones(())
            difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
            error = float((difference / scale).max()) if a.numel() else 0.0
            error = float("inf") if error != error else error
        else:
            error = 0.0 if torch.equal(a, b) else 1.0
        out.append(OutputError(output=str(i), shape=list(a.shape), relative_error=error, changed=i in changed))
    return out


def _appended(plan: GrowthPlan | None, output: int, dim: int) -> int:
    """How many entries the plan appends to a dim of an output, over all its steps."""
    steps = plan.steps if plan is not None else []
    return sum(o.new - o.old for s in steps for o in s.outputs if (o.output, o.dim) == (output, dim))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _worst(errors: list[OutputError]) -> float:
    return max((e.relative_error for e in errors if not e.changed), default=0.0)


def _double(value: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value
    )


def widen_float(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.detach().clone()


#: ops that draw at random, and what they draw where nothing is left to chance (``bernoulli`` keeps everything)
_DRAWS = ("rand", "randn", "rand_like", "randn_like", "normal", "normal_", "uniform", "uniform_")
_KEEPS = ("bernoulli", "bernoulli_")


@contextlib.contextmanager
def without_chance() -> Iterator[None]:
    """Run in train mode with every dropout probability 0 and every draw 1 or 0.5: its deterministic part.

    A grown model may draw more numbers than the old one (blocks were inserted), so that a seed is not enough.
    """
    import torch.overrides

    class Off(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            kwargs = dict(kwargs or {})
            if name.startswith(("aten.lstm.", "aten.gru.", "aten.rnn_")) and name.endswith(".input"):
                args = (*args[:5], 0.0, *args[6:])  # dropout between layers
            if "dropout" in name and "scaled_dot" not in name and len(args) > 1:
                args = (args[0], 0.0, *args[2:])
            if "scaled_dot_product_attention" in name:
                if len(args) > 4:
                    args = (*args[:4], 0.0, *args[5:])
                kwargs.pop("dropout_p", None)
            result = func(*args, **kwargs)
            op = name.split(".")[1] if name.startswith("aten.") else ""
            if op in _DRAWS or op in _KEEPS:
                result.fill_(1.0 if op in _KEEPS else 0.5)
            return result

    with Off():
        yield


class Verification:
    """Runs the checks of one growth, cheapest last so that the expensive ones can share the float64 modules."""

    def __init__(self, program: Program, grown: Program, plan: GrowthPlan) -> None:
        self.program, self.grown, self.plan = program, grown, plan

    def _calls(self, training: bool) -> list[tuple[Any, Any]]:
        """The examples of the calls that serve a mode."""
        calls = [(c.args, c.kwargs) for c in self.program.calls if c.serves(training)]
        return calls if self.program.calls else [(self.program.args, self.program.kwargs)]

    def _numbers(self, training: bool) -> list[int]:
        """The numbers that the plan gives to the outputs of the calls that serve a mode."""
        return [n for c, numbers in output_numbers(self.program) if c is None or c.serves(training) for n in numbers]

    def _modules(self, noise: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
        old = regenerate(
            self.program, {n: widen_float(t) for n, t in self.program.tensors.items()}, hierarchical=False, double=True
        )
        plan = self.plan if noise else _noiseless(self.plan)
        tensors = dict(
            materialise_all(
                plan, lambda n: self.program.tensor(n).detach(), list(self.plan.tensors), dtype=torch.float64
            )
        )
        new = regenerate(self.grown, tensors, hierarchical=True, double=True)
        return old, new

    def float64(self, receipt: Receipt) -> None:
        """Outputs in float64, in eval mode and in train mode without dropout."""
        old, new = self._modules(noise=True)
        for training in (False, True):
            calls = _double(self._calls(training))
            if not calls:
                continue  # the model was captured in the other mode only
            old.train(training)
            new.train(training)
            with torch.no_grad(), without_chance() if training else contextlib.nullcontext():
                errors = relative_errors(_run(old, calls), _run(new, calls), self.plan, self._numbers(training))
            if training:
                receipt.error_float64_train = _worst(errors)
            else:
                receipt.error_float64 = _worst(errors)
                receipt.outputs = errors
        self._alive(new, receipt)

    def gradients(self, receipt: Receipt) -> None:
        """Gradients of the noise-free growth against the plan's map of the old ones (Shen et al. 2022's oracle)."""
        if not self.plan.exact_gradients or not self.plan.exact_elsewhere:
            receipt.notes.append("gradient map not checked: this growth does not map gradients exactly")
            return
        old, new = self._modules(noise=False)
        calls = _double(self._calls(self.program.training))
        with without_chance():
            weighed = self._old_entries(old, calls)
            small, large = _gradients(old, calls, weighed), _gradients(new, calls, weighed)
        worst = 0.0
        # gradients that are zero but for rounding (key biases, biases before a batch norm) cannot be compared
        floor = 1e-6 * max((float(g.abs().max()) for g in small.values() if g is not None), default=0.0)
        for name, gradient in large.items():
            plan = self.plan.tensors[name]
            if plan.source is None or plan.zero or gradient is None or small.get(plan.source) is None:
                continue
            if _has_newborn(plan) or self._new_blocks():
                continue  # old entries only are mapped; the output check covers them
            expected = copy_gradient(plan, small[plan.source])  # type: ignore[arg-type]
            for i in plan.appended:  # new rows that old entries are read with may have one of their own
                dim = plan.dims[i]
                if dim is not None:
                    rows = torch.from_numpy(np.flatnonzero(dim.index >= 0)).to(gradient.device)
                    gradient, expected = gradient.index_select(i, rows), expected.index_select(i, rows)
            scale = max(float(expected.abs().max()), floor)
            if scale > 0:
                worst = max(worst, float((gradient - expected).abs().max()) / scale)
        receipt.gradient_error = worst

    def _old_entries(self, old: fx.GraphModule, calls: list[tuple[Any, Any]]) -> dict[int, list[int]] | None:
        """The old shapes of the outputs that stay as they were; None where all of them are compared whole."""
        if not any(s.outputs or s.changed_outputs for s in self.plan.steps):
            return None
        with torch.no_grad():
            shapes = [list(t.shape) for t in _tensors(_run(old, calls))]
        numbers = self._numbers(self.program.training)
        return {
            i: s for i, (n, s) in enumerate(zip(numbers, shapes, strict=True)) if n not in self.plan.changed_outputs
        }

    def _new_blocks(self) -> bool:
        sources = [p.source for p in self.plan.tensors.values()]
        return None in sources or len(set(sources)) != len(sources)

    def _alive(self, new: fx.GraphModule, receipt: Receipt) -> None:
        """Every newborn entry gets a gradient within two steps of gradient descent, where old entries get one at all.

        (Softmax lets none through to a key's bias, nor a norm to the bias before it.)
        """
        newborn = {n: p for n, p in self.plan.tensors.items() if p.source is None or p.zero or _has_newborn(p)}
        parameters = dict(new.named_parameters())
        waiting = {n for n in newborn if n in parameters and parameters[n].requires_grad}
        was, silent = new.training, {n for n in waiting if newborn[n].source is not None and not newborn[n].zero}
        # a bias before a batch norm has a gradient in eval mode only
        for training in (True, True, False, False):
            if not waiting:
                break
            if not self._calls(training):
                continue
            new.train(training)
            with without_chance():
                gradients = _gradients(new, _double(self._calls(training)))
            size = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=1.0)
            for name in list(waiting):
                g = gradients.get(name)
                if g is not None and float(g.abs().max()) > 1e-14 * size:
                    silent.discard(name)
                if g is not None and _newborn_part(newborn[name], g) > 1e-14 * size:
                    waiting.discard(name)
            with torch.no_grad():
                for name, p in parameters.items():
                    g = gradients.get(name)
                    if g is not None:
                        p.sub_(g, alpha=0.01 / max(size, 1e-12))
        new.train(was)
        receipt.dead_parameters = sorted(waiting - silent)

    def native(self, module: Callable[..., Any], grown: fx.GraphModule, receipt: Receipt) -> None:
        """The user's own module against the grown one, eval mode, own dtype."""
        assert isinstance(module, nn.Module)
        modes = {n: m.training for n, m in module.named_modules()}
        was = grown.training
        try:
            module.eval()
            grown.eval()
            calls = self._calls(False)
            with torch.no_grad():
                old, new = _run(module, calls), _run(grown, calls)
        finally:
            for n, m in module.named_modules():
                m.training = modes[n]
            grown.train(was)
        errors = relative_errors(old, new, self.plan, self._numbers(False))
        receipt.error_native = _worst(errors)
        if not receipt.outputs:
            receipt.outputs = errors


def _run(module: Callable[..., Any], calls: list[tuple[Any, Any]]) -> list[Any]:
    """The outputs of every captured call, on copies of its inputs; each draws the same random numbers every time."""
    out = []
    for args, kwargs in calls:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out.append(module(*_copy(args), **_copy(kwargs)))
    return out


def _copy(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)


def _noiseless(plan: GrowthPlan) -> GrowthPlan:
    return plan.model_copy(update={"tensors": {n: t.noiseless() for n, t in plan.tensors.items()}})


def _has_newborn(plan: TensorPlan) -> bool:
    """Whether the tensor has newborn entries, other than rows that wait for inputs that use them."""
    return any(d is not None and i not in plan.appended and bool((d.index < 0).any()) for i, d in enumerate(plan.dims))


def _gradients(
    module: nn.Module, calls: list[tuple[Any, Any]], weighed: Mapping[int, list[int]] | None = None
) -> dict[str, torch.Tensor | None]:
    """Gradients of a fixed random combination of all float outputs of all calls.

    ``weighed``: of these outputs alone, and of so many entries of them, the first ones along every dim.
    """
    with torch.enable_grad():
        found = _tensors(_run(module, calls))
        if weighed is not None:
            found = [found[i][tuple(slice(0, n) for n in shape)] for i, shape in weighed.items()]
        outputs = [t for t in found if t.is_floating_point()]
        total: Any = 0.0
        for i, t in enumerate(outputs):
            generator = torch.Generator().manual_seed(i)
            weight = (
                torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) if t.dim() else t.new_ones(())
            )
            total = total + (t * weight).sum()
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not parameters or not isinstance(total, torch.Tensor) or not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: g if g is not None and g.numel() else None for n, g in zip(parameters, gradients, strict=True)}


def _newborn_part(plan: Any, gradient: torch.Tensor) -> float:
    """Largest gradient among the newborn entries; of all entries where the tensor is new as a whole."""
    if plan.source is None or plan.zero:
        return float(gradient.abs().max())
    worst = 0.0
    for i, d in enumerate(plan.dims):
        if d is not None and i not in plan.appended and bool((d.index < 0).any()):
            rows = torch.from_numpy((d.index < 0).nonzero()[0]).to(gradient.device)
            worst = max(worst, float(gradient.index_select(i, rows).abs().max()))
    return worst


def verify(
    program: Program,
    grown_program: Program,
    plan: GrowthPlan,
    original: nn.Module | None,
    grown: fx.GraphModule,
    level: Literal["float64", "native"],
    tensors: Mapping[str, torch.Tensor],
) -> Receipt:
    """Measure a growth.

    Raises:
        ExactnessError: the plan is exact, the measurement is not.
    """
    receipt = Receipt(exactness=plan.exactness)
    check = Verification(program, grown_program, plan)
    start = time.perf_counter()
    if level == "float64":
        check.float64(receipt)
        check.gradients(receipt)
        receipt.seconds["verify float64"] = time.perf_counter() - start
        start = time.perf_counter()
    else:
        receipt.notes.append("float64 not measured: verify='native'")
    if original is not None:
        check.native(original, grown, receipt)
        receipt.seconds["verify native"] = time.perf_counter() - start
    if receipt.gradient_error is not None and not receipt.gradient_error <= GRADIENT_LIMIT:
        raise ExactnessError(
            f"the plan's map of gradients differs from the grown model's by {receipt.gradient_error:.2e} (limit "
            f"{GRADIENT_LIMIT:g}), so that optimizer state could not be carried exactly. This is a bug in fxgrow: the "
            f"original model is untouched; please report the spec and the model. "
            f"Steps: {[s.request for s in plan.steps]}"
        )
    if plan.exact_elsewhere:
        for label, value in (("eval", receipt.error_float64), ("train", receipt.error_float64_train)):
            if label == "train" and any(s.eval_only for s in plan.steps):
                continue
            if value is not None and not value <= LIMIT:
                raise ExactnessError(
                    f"the growth was planned as exact but its {label} outputs differ by {value:.2e} in float64 (limit "
                    f"{LIMIT:g}). This is a bug in fxgrow: the original model is untouched; please report the spec and "
                    f"the model. Steps: {[s.request for s in plan.steps]}"
                )
    return receipt
