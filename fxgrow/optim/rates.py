"""Per-slice learning rates: what growths leave behind for an optimizer's next steps.

They are plain data in the optimizer's parameter groups, under ``fxgrow`` and ``fxgrow_steps``. So they go wherever the
groups go: ``state_dict`` and ``load_state_dict``, ``torch.save``, ``copy.deepcopy``. Step hooks apply them; one hook of
all optimizers finds the groups that have them, so that a plain optimizer which loads such a state needs nothing else.

Around a step, with s the factor a weight was scaled by and g that of its gradient, the optimizer sees ``p / s`` and
``grad / g``; what it adds to them is added to ``p``, times s. Entries that it leaves alone keep their bits.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fxgrow.errors import FxgrowError
from fxgrow.plan import TensorPlan, decode_values, encode_values
from fxgrow.weights.moments import moment_of

KEY, STEPS = "fxgrow", "fxgrow_steps"

Vectors = list[np.ndarray | None]


@dataclass
class Slice:
    """Factors of one parameter, per dim (None: 1 everywhere) and for the whole tensor.

    ``value`` is s, ``gradient`` g; ``newborn`` marks entries that learn under ``warmup``.
    """

    value: Vectors = field(default_factory=list)
    gradient: Vectors = field(default_factory=list)
    newborn: Vectors = field(default_factory=list)
    value_scale: float = 1.0
    gradient_scale: float = 1.0
    whole: bool = False  # the tensor is newborn as a whole

    @property
    def scaled(self) -> bool:
        return (
            self.value_scale != 1.0
            or self.gradient_scale != 1.0
            or any(v is not None for v in (*self.value, *self.gradient))
        )

    @property
    def warms(self) -> bool:
        return self.whole or any(n is not None for n in self.newborn)

    def grown(self, plan: TensorPlan) -> Slice:
        """The same factors after a growth of the parameter: copies have their unit's, newborn entries none."""

        def mapped(vectors: Vectors, missing: float) -> Vectors:
            out = list(vectors)
            for i, d in enumerate(plan.dims[: len(out)]):
                v = out[i]
                if v is not None and d is not None:
                    out[i] = np.where(d.index >= 0, v[np.maximum(d.index, 0)], missing).astype(v.dtype)
            return out

        return Slice(
            mapped(self.value, 1.0),
            mapped(self.gradient, 1.0),
            mapped(self.newborn, 0.0),
            self.value_scale,
            self.gradient_scale,
            self.whole,
        )


class SliceRates:
    """Per-slice learning rates that one growth left.

    ``exact`` slices are stepped in the small model's units, see the module's docstring; with ``ramp`` the learning rate
    factor s goes to 1 over that many steps. ``newborn`` entries get a learning rate of their own for ``warmup`` steps:
    from 0 to ``peak`` over the first half, then to 1 (SPARKLING, ICML 2026).
    """

    def __init__(self, *, warmup: int = 0, peak: float = 1.0, ramp: int | None = None) -> None:
        self.warmup, self.peak, self.ramp = warmup, peak, ramp
        self.steps = 0
        self.slices: dict[str, Slice] = {}

    @property
    def newborn_rate(self) -> float:
        """Learning-rate factor of newborn entries at the current step."""
        if self.steps >= self.warmup:
            return 1.0
        half = max(1.0, self.warmup / 2)
        t = self.steps + 1
        return self.peak * t / half if t <= half else self.peak + (1.0 - self.peak) * (t - half) / half

    @property
    def exponent(self) -> float:
        """s ** exponent is the present learning-rate factor."""
        return 1.0 if self.ramp is None else max(0.0, 1.0 - self.steps / max(1, self.ramp))

    @property
    def finished(self) -> bool:
        """Every later step would be a plain one, once moments are in the grown model's units."""
        warm = self.steps < self.warmup and any(s.warms for s in self.slices.values())
        scaled = self.exponent > 0.0 and any(s.scaled for s in self.slices.values())
        return not warm and not scaled

    def state_dict(self) -> dict[str, Any]:
        """Plain data, JSON-able."""

        def encode(vectors: Vectors) -> list[Any]:
            return [None if v is None else encode_values(v.astype(np.float64)) for v in vectors]

        return {
            "warmup": self.warmup,
            "peak": self.peak,
            "ramp": self.ramp,
            "steps": self.steps,
            "slices": {
                n: {
                    "value": encode(s.value),
                    "gradient": encode(s.gradient),
                    "newborn": encode(s.newborn),
                    "value_scale": s.value_scale,
                    "gradient_scale": s.gradient_scale,
                    "whole": s.whole,
                }
                for n, s in self.slices.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SliceRates:
        def decode(vectors: Sequence[Any]) -> Vectors:
            return [None if v is None else decode_values(v) for v in vectors]

        out = cls(warmup=state["warmup"], peak=state["peak"], ramp=state["ramp"])
        out.steps = state["steps"]
        for name, s in state["slices"].items():
            out.slices[name] = Slice(
                decode(s["value"]),
                decode(s["gradient"]),
                [None if v is None else v.astype(bool) for v in decode(s["newborn"])],
                s["value_scale"],
                s["gradient_scale"],
                s["whole"],
            )
        return out

    def grown(self, plans: Mapping[str, TensorPlan], names: Sequence[str]) -> SliceRates:
        """These rates after a further growth, for the parameters ``names`` of the newly grown model."""
        out = SliceRates(warmup=self.warmup, peak=self.peak, ramp=self.ramp)
        out.steps = self.steps
        for name in names:
            plan = plans[name]
            if plan.source in self.slices and plan.init is None and not (plan.zero or plan.fresh):
                out.slices[name] = self.slices[plan.source].grown(plan)
        return out


class GroupRates(dict[str, Any]):
    """Plain data of one parameter group: the parameters' names, and the rates that each growth left them.

    A class of its own so that unpickling it imports this module, whose hook then applies the rates: a process that does
    not know fxgrow cannot load an optimizer's state and step without them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupRates, (dict(self),)

    def __repr__(self) -> str:
        return f"<per-slice learning rates of {sum(len(g['slices']) for g in self['growths'])} tensors>"


torch.serialization.add_safe_globals([GroupRates])


def rates_of_groups(
    groups: Sequence[Sequence[nn.Parameter]], rates: Sequence[SliceRates], names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """What parameter groups are to hold of rates: entries of each, none where none of its parameters has any.

    Args:
        groups: the parameters of each group.
        rates: of each growth, from the oldest.
        names: of the parameters, by ``id``.
    """
    out: list[dict[str, Any]] = []
    for group in groups:
        members = [names.get(id(p), "") for p in group]
        growths = []
        for r in rates:
            state = r.state_dict()
            del state["steps"]
            state["slices"] = {n: s for n, s in state["slices"].items() if n in members}
            growths.append(state)
        held = any(g["slices"] for g in growths)
        out.append({KEY: GroupRates(names=members, growths=growths), STEPS: [r.steps for r in rates]} if held else {})
    return out


def write_rates(optimizer: torch.optim.Optimizer, rates: Sequence[SliceRates], names: Mapping[int, str]) -> None:
    """Put rates into an optimizer's parameter groups, in place of what stood there: see :func:`rates_of_groups`."""
    groups = optimizer.param_groups
    for group, entries in zip(groups, rates_of_groups([g["params"] for g in groups], rates, names), strict=True):
        group.pop(KEY, None)
        group.pop(STEPS, None)
        group.update(entries)


class _Applied:
    """The rates of one optimizer, ready to be applied, and what a step under way has to put back."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.read(optimizer)
        self.handles: list[RemovableHandle] = []
        steps = {inspect.unwrap(vars(c)["step"]) for c in type(optimizer).__mro__ if "step" in vars(c)}
        self.nests = len(steps - {torch.optim.Optimizer.step}) > 1  # a step that may call a parent's, hooks and all
        self.depth = 0
        self.entered: dict[nn.Parameter, torch.Tensor | None] = {}

    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """What stands in the groups.

        Raises:
            FxgrowError: it belongs to other parameters than the optimizer holds.
        """
        self.groups = [(group, group[KEY]) for group in optimizer.param_groups if KEY in group]
        self.names: dict[nn.Parameter, str] = {}
        self.rates: list[SliceRates] = []
        self.vectors: dict[tuple[Any, ...], list[torch.Tensor | float]] = {}
        for group, data in self.groups:
            own = [
                SliceRates.from_state_dict({**growth, "steps": steps})
                for growth, steps in zip(data["growths"], group[STEPS], strict=True)
            ]
            for p, name in zip(group["params"], data["names"], strict=False):
                self.names[p] = name
                for r in own:
                    if name in r.slices and not _fits(r.slices[name], p):
                        raise FxgrowError(
                            f"the optimizer's state holds per-slice learning rates of {name}, but not for its shape "
                            f"{tuple(p.shape)}: it is the state of another growth"
                        )
            if not self.rates:
                self.rates = own
            else:
                for mine, more in zip(self.rates, own, strict=True):
                    mine.slices.update(more.slices)

    def is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the groups still hold what was read."""
        now = [(g, g[KEY]) for g in optimizer.param_groups if KEY in g]
        if len(now) != len(self.groups) or any(
            g is not h or a is not b for (g, a), (h, b) in zip(now, self.groups, strict=True)
        ):
            return False
        return all([r.steps for r in self.rates] == list(g[STEPS]) for g, _ in now)

    # around a step ----------------------------------------------------------------------------------------------------

    def pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.nests and _steps_under_way(optimizer) > 1:
            self.depth += 1
            return None
        self.leave()  # nothing to do, unless the last step raised
        self.depth = 1
        given = None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:  # it runs the model: before the weights are in other units
            with torch.enable_grad():
                given = _Evaluated(closure(), self.leave)
            args, kwargs = (
                ((args[0], given, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": given})
            )
        self.enter()
        return None if given is None else (args, kwargs)

    def post(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        self.leave()
        skipped = getattr(optimizer, "found_inf", None)  # set by a GradScaler whose optimizer unscales by itself
        if skipped is not None and bool(skipped):
            return
        for r in self.rates:
            r.steps += 1
        if any(r.finished for r in self.rates):
            for r in self.rates:
                if r.finished:
                    self._retire(optimizer, r)
            left = [r for r in self.rates if not r.finished]
            write_rates(optimizer, left, {id(p): n for p, n in self.names.items()})
            self.read(optimizer)
        for group, _data in self.groups:
            group[STEPS] = [r.steps for r in self.rates]

    @torch.no_grad()
    def enter(self) -> None:
        """Bring weights and gradients into the small model's units."""
        for p, name in self.names.items():
            slices = [(r, r.slices[name]) for r in self.rates if name in r.slices]
            if p.grad is None or not slices:
                continue
            warm = any(s.warms and r.steps < r.warmup for r, s in slices)
            scaled = any(s.scaled for _, s in slices)
            if scaled:
                for v in self.factors(p, name, "gradient", -1.0):
                    p.grad.mul_(v)
            keep = warm or (scaled and not self.halves(slices))
            self.entered[p] = p.detach().clone() if keep else None
            if scaled:
                for tensor in (p, *self.averages(p)):
                    for v in self.factors(p, name, "value", -1.0):
                        tensor.mul_(v)

    @torch.no_grad()
    def leave(self) -> None:
        """Bring them back; what the optimizer added counts s times, and at newborn entries as much as they warmed."""
        for p, old in self.entered.items():
            name = self.names[p]
            scaled = any(r.slices[name].scaled for r in self.rates if name in r.slices)
            back = self.factors(p, name, "value", 1.0) if scaled else []
            if old is None:
                for v in back:
                    p.mul_(v)
            elif not scaled:
                p.copy_(torch.lerp(old, p, self.warmth(p, name).to(p.dtype)))
            else:
                units = old.clone()
                for v in self.factors(p, name, "value", -1.0):
                    units.mul_(v)
                moved = (p.to(_wide(p)) - units).mul_(self.warmth(p, name))
                for v in back:
                    moved.mul_(v)
                p.copy_(torch.where(p == units, old, (moved + old).to(p.dtype)))
            for tensor in self.averages(p):
                for v in back:
                    tensor.mul_(v)
            if p.grad is not None and scaled:
                for v in self.factors(p, name, "gradient", 1.0):
                    p.grad.mul_(v)
        self.entered.clear()

    def averages(self, p: nn.Parameter) -> list[torch.Tensor]:
        """State that stands for the weight itself, and is in its units."""
        optimizer = self.optimizer()
        if optimizer is None:
            return []
        state = optimizer.state.get(p, {})
        return [
            v
            for k, v in state.items()
            if (m := moment_of(optimizer, k, state)) is not None and m.weight and v.shape == p.shape
        ]

    # factors ----------------------------------------------------------------------------------------------------------

    def factors(self, p: nn.Parameter, name: str, kind: str, power: float) -> list[torch.Tensor | float]:
        """Of all growths together: a scalar and a broadcastable vector for each dim that has one."""
        of = [
            (r.slices[name], power * (r.exponent if kind == "value" else 1.0)) for r in self.rates if name in r.slices
        ]
        key = (name, kind, p.device, *(e for _, e in of))
        if key not in self.vectors:
            if len(self.vectors) > 8 * len(self.names):  # exponents change at every step of a ramp
                self.vectors.clear()
            self.vectors[key] = combined(of, kind, p)
        return self.vectors[key]

    def halves(self, slices: Sequence[tuple[SliceRates, Slice]]) -> bool:
        """Whether multiplying by s undoes a division by it to the bit: s is 1, 1/2, 1/4 and so on."""
        return all(
            r.exponent == 1.0 and all(_halving(v) for v in (*s.value, np.array(s.value_scale)) if v is not None)
            for r, s in slices
            if s.scaled
        )

    def warmth(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """The learning-rate factor of newborn entries, 1 elsewhere; broadcastable to the parameter.

        An entry that is newborn in several growths warms up with the last of them.
        """
        out = torch.ones((), dtype=_wide(p), device=p.device)
        for r in self.rates:
            s = r.slices.get(name)
            if s is None or not s.warms or r.steps >= r.warmup:
                continue
            old = torch.zeros_like(out) if s.whole else torch.ones_like(out)
            for i, mask in enumerate(s.newborn):
                if mask is not None:
                    old = old * _along(1.0 - mask.astype(np.float64), i, p)
            out = torch.where(old == 0, torch.full_like(old, r.newborn_rate), out)
        return out

    def _retire(self, optimizer: torch.optim.Optimizer, rates: SliceRates) -> None:
        """After a ramp: bring what depends on gradients into the grown model's own units, and step plainly."""
        for p, name in self.names.items():
            s = rates.slices.get(name)
            if s is None or not s.scaled:
                continue
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                moment = moment_of(optimizer, key, state)
                if moment is None or moment.count or not isinstance(value, torch.Tensor):
                    continue
                if value.shape == moment.shape(p.shape):
                    for v in combined([(s, moment.gradient)], "gradient", p, moment.dim(p.shape)):
                        value.mul_(v)


def combined(
    of: Sequence[tuple[Slice, float]], kind: str, p: torch.Tensor, averaged: int | None = None
) -> list[torch.Tensor | float]:
    """The product of slices' factors, each to a power: numbers, and tensors that broadcast to the parameter.

    Args:
        averaged: a dim over which the factors are averaged.
    """
    scale = 1.0
    dims: Vectors = [None] * p.dim()
    for s, power in of:
        scale *= (s.value_scale if kind == "value" else s.gradient_scale) ** power
        for i, v in enumerate(s.value if kind == "value" else s.gradient):
            if v is not None:
                before = dims[i]
                dims[i] = v**power if before is None else before * v**power
    if averaged is not None and (over := dims[averaged]) is not None:
        scale, dims[averaged] = scale * float(np.mean(over)), None
    out: list[torch.Tensor | float] = [] if scale == 1.0 else [scale]
    return out + [_along(v, i, p) for i, v in enumerate(dims) if v is not None]


def _wide(p: torch.Tensor) -> torch.dtype:
    """What factors are computed in: a third in bfloat16 is off by a thousandth."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _along(values: np.ndarray, dim: int, p: torch.Tensor) -> torch.Tensor:
    shape = [1] * p.dim()
    shape[dim] = len(values)
    return torch.from_numpy(values.astype(np.float64)).to(_wide(p)).to(p.device).view(shape)


def _steps_under_way(optimizer: torch.optim.Optimizer) -> int:
    """Hooked steps of this optimizer on the stack: more than one where a class's step calls its parent's."""
    hooked, found, frame = type(optimizer).step.__code__, 0, inspect.currentframe()
    while frame is not None:
        found += frame.f_code is hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


def _halving(values: np.ndarray) -> bool:
    return bool(np.all(np.frexp(values)[0] == 0.5) and np.all(values <= 1.0))


def _fits(s: Slice, p: torch.Tensor) -> bool:
    return all(
        len(vectors) in (0, p.dim()) and all(v is None or len(v) == p.shape[i] for i, v in enumerate(vectors))
        for vectors in (s.value, s.gradient, s.newborn)
    )


class _Evaluated:
    """A closure that was called already; calling it again cannot be right, as the weights are in other units."""

    def __init__(self, loss: Any, leave: Callable[[], None]) -> None:
        self.loss, self.leave, self.calls = loss, leave, 0

    def __call__(self) -> Any:
        self.calls += 1
        if self.calls > 1:
            self.leave()
            raise FxgrowError(
                "this optimizer calls its closure several times in one step, which per-slice learning rates do not "
                "support; carry it with policy 'reset'"
            )
        return self.loss


_APPLIED: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Applied] = weakref.WeakKeyDictionary()


def _applied(optimizer: torch.optim.Optimizer) -> _Applied | None:
    """The rates of an optimizer as its groups have them now, None without any."""
    found = _APPLIED.get(optimizer)
    if not any(KEY in group for group in optimizer.param_groups):
        if found is not None and not found.depth:
            for handle in found.handles:
                handle.remove()
            del _APPLIED[optimizer]
        return None
    if found is None:
        found = _APPLIED[optimizer] = _Applied(optimizer)
        found.handles = [
            optimizer.register_step_pre_hook(found.pre),
            optimizer.register_step_post_hook(found.post),
        ]
    elif not found.depth and not found.is_of(optimizer):
        found.read(optimizer)
    return found


def _before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Runs before the hooks of every optimizer: ours are to be the innermost, next to the step itself."""
    found = _applied(optimizer)
    if found is not None:
        for handle, last in zip(found.handles, (True, False), strict=True):
            hooks = handle.hooks_dict_ref()
            if hooks is not None:
                hooks.move_to_end(handle.id, last=last)


register_optimizer_step_pre_hook(_before_any_step)


def check_settled(parameters: Iterable[torch.Tensor]) -> None:
    """Refuse weights that an optimizer has in other units: its step raised, and what it began was not put back yet.

    Raises:
        FxgrowError: of any optimizer that has per-slice rates of one of the parameters.
    """
    wanted = {id(p) for p in parameters}
    for optimizer, found in list(_APPLIED.items()):
        if found.depth and any(id(p) in wanted for p in found.names):
            raise FxgrowError(
                f"the last step of {type(optimizer).__name__} over these parameters did not finish, so that they are "
                "in the units of an earlier growth. Call optimizer.zero_grad() and optimizer.step() once, which puts "
                "them back, and grow then"
            )


def all_rates(optimizer: torch.optim.Optimizer, names: Mapping[int, str] | None = None) -> list[SliceRates]:
    """The per-slice learning rates of an optimizer, one entry for each growth whose rates are still in force.

    Args:
        names: what to call its parameters, by ``id``; as at their growth where None.
    """
    found = _applied(optimizer)
    if found is None:
        return []
    if names is None:
        return found.rates
    out = []
    for r in found.rates:
        renamed = SliceRates(warmup=r.warmup, peak=r.peak, ramp=r.ramp)
        renamed.steps = r.steps
        renamed.slices = {names[id(p)]: r.slices[n] for p, n in found.names.items() if n in r.slices}
        out.append(renamed)
    return out


def slice_rates(optimizer: torch.optim.Optimizer) -> SliceRates | None:
    """The per-slice learning rates that the last growth left an optimizer, if any are in force."""
    rates = all_rates(optimizer)
    return rates[-1] if rates else None
