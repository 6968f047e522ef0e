"""Carry an optimizer over a growth: state by provenance, per-slice learning rates.

With s the factor a weight was scaled by and g that of its gradient (every copied axis has s * g = its share a), an
optimizer that works on ``p / s`` with gradient ``grad / g`` takes exactly the steps it took on the small model. That is
how policy ``exact`` runs any optimizer class, weight decay and eps included, instead of rescaling each one's
hyper-parameters (RECIPES §8 lists those: lr*s, wd/s, eps*g, m*g, v*g^2 for AdamW).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.materialise import Moment, materialise_moment
from fxgrow.plan import TensorPlan, _decode_values, _encode_values

if TYPE_CHECKING:
    from fxgrow.growth import Growth

Policy = Literal["exact", "asymmetric", "copy", "reset"]
POLICIES: tuple[str, ...] = ("exact", "asymmetric", "copy", "reset")

#: how the state tensors of the optimizers in torch.optim (and of Lion and Muon) depend on gradients
MOMENTS: dict[str, Moment] = {
    "exp_avg": "gradient",
    "momentum_buffer": "gradient",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",
    "square_avg": "square",
    "sum": "square",
}


@dataclass
class Slice:
    """Factors of one parameter, per dim (None: 1 everywhere) and for the whole tensor.

    ``value`` is s, ``gradient`` g; ``newborn`` marks entries that learn under ``warmup``.
    """

    value: list[np.ndarray | None] = field(default_factory=list)
    gradient: list[np.ndarray | None] = field(default_factory=list)
    newborn: list[np.ndarray | None] = field(default_factory=list)
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


class SliceRates:
    """Per-slice learning rates of an optimizer, applied by its step hooks.

    ``exact`` slices are stepped in the small model's units, see the module's docstring; with ``ramp`` the learning rate
    factor s goes to 1 over that many steps. ``newborn`` entries get a learning rate of their own for ``warmup`` steps:
    from 0 to ``peak`` over the first half, then to 1 (SPARKLING, ICML 2026).
    """

    def __init__(self, *, warmup: int = 0, peak: float = 1.0, ramp: int | None = None) -> None:
        self.warmup, self.peak, self.ramp = warmup, peak, ramp
        self.steps = 0
        self.slices: dict[str, Slice] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._vectors: dict[tuple[str, str, int], torch.Tensor] = {}
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    # life -----------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> SliceRates:
        """Hook into an optimizer's ``step``; parameters by the grown model's names."""
        self._parameters = {n: parameters[n] for n in self.slices if n in parameters}
        self._optimizer = weakref.ref(optimizer)
        optimizer.register_step_pre_hook(self._pre)
        optimizer.register_step_post_hook(self._post)
        optimizer.fxgrow_slices = self  # type: ignore[attr-defined]
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain data, JSON-able."""

        def encode(vectors: list[np.ndarray | None]) -> list[Any]:
            return [None if v is None else _encode_values(v.astype(np.float64)) for v in vectors]

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
        def decode(vectors: list[Any]) -> list[np.ndarray | None]:
            return [None if v is None else _decode_values(v) for v in vectors]

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

    # rates ----------------------------------------------------------------------------------------------------------

    @property
    def newborn_rate(self) -> float:
        """Learning-rate factor of newborn entries at the current step."""
        if self.steps >= self.warmup:
            return 1.0
        half = max(1.0, self.warmup / 2)
        t = self.steps + 1
        return self.peak * t / half if t <= half else self.peak + (1.0 - self.peak) * (t - half) / half

    @property
    def _exponent(self) -> float:
        """s ** exponent is the present learning-rate factor."""
        return 1.0 if self.ramp is None else max(0.0, 1.0 - self.steps / max(1, self.ramp))

    def _vector(self, name: str, kind: str, i: int, values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        key = (name, kind, i)
        if key not in self._vectors or self._vectors[key].device != like.device:
            shape = [1] * like.dim()
            shape[i] = len(values)
            self._vectors[key] = torch.from_numpy(values.astype(np.float64)).to(like.device).view(shape)
        return self._vectors[key]

    def _multiply(self, name: str, tensor: torch.Tensor, kind: str, power: float) -> None:
        slices = self.slices[name]
        vectors = slices.value if kind == "value" else slices.gradient
        scale = slices.value_scale if kind == "value" else slices.gradient_scale
        if scale != 1.0:
            tensor.mul_(scale**power)
        for i, v in enumerate(vectors):
            if v is not None:
                tensor.mul_(self._vector(name, kind, i, v, tensor).pow(power).to(tensor.dtype))

    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before.clear()
        warm = self.steps < self.warmup
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            s = self.slices[name]
            if s.scaled:
                self._multiply(name, p.grad, "gradient", -1.0)
                self._multiply(name, p, "value", -self._exponent)
            if warm and (s.whole or any(n is not None for n in s.newborn)):
                self._before[name] = p.detach().clone()

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rate = self.newborn_rate
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            s = self.slices[name]
            if name in self._before:
                old = self._before.pop(name)
                p.copy_(torch.lerp(old, p, self._factor(name, p, rate)))
            if s.scaled:
                self._multiply(name, p, "value", self._exponent)
                self._multiply(name, p.grad, "gradient", 1.0)
        self.steps += 1
        if self.ramp is not None and self.steps == self.ramp:
            self._retire(optimizer)

    def _factor(self, name: str, p: torch.Tensor, rate: float) -> torch.Tensor:
        """``rate`` at newborn entries, 1 elsewhere; broadcastable to the parameter."""
        s = self.slices[name]
        if s.whole:
            return torch.full((), rate, dtype=p.dtype, device=p.device)
        old: torch.Tensor | None = None
        for i, mask in enumerate(s.newborn):
            if mask is not None:
                v = self._vector(name, "newborn", i, 1.0 - mask.astype(np.float64), p)
                old = v if old is None else old * v
        assert old is not None
        return (rate + (1.0 - rate) * old).to(p.dtype)

    def _retire(self, optimizer: torch.optim.Optimizer) -> None:
        """After the ramp: bring the moments into the grown model's own units, and step plainly."""
        for name, p in self._parameters.items():
            s = self.slices[name]
            if s.scaled:
                for key, value in optimizer.state.get(p, {}).items():
                    if key in MOMENTS and isinstance(value, torch.Tensor) and value.shape == p.shape:
                        self._multiply(name, value, "gradient", 2.0 if MOMENTS[key] == "square" else 1.0)
                s.value = [None] * len(s.value)
                s.gradient = [None] * len(s.gradient)
                s.value_scale = s.gradient_scale = 1.0


def slice_rates(optimizer: torch.optim.Optimizer) -> SliceRates | None:
    """The per-slice learning rates attached to an optimizer, if any."""
    return getattr(optimizer, "fxgrow_slices", None)


def carry(
    growth: Growth,
    optimizer: torch.optim.Optimizer,
    policy: str = "asymmetric",
    *,
    warmup: int = 250,
    peak: float = 1.3,
    ramp: int | None = None,
) -> torch.optim.Optimizer:
    """A new optimizer of the same class over the grown parameters.

    Parameter groups keep their order and hyper-parameters; a new parameter joins the group of the one it was made of.

    Args:
        growth: a finished growth of the model that ``optimizer`` trains.
        optimizer: left as it is.
        policy: ``exact``: the small model's trajectory goes on unchanged (refused where the growth does not map
            gradients exactly); ``asymmetric``: old entries keep their moments, newborn ones start with none and get a
            re-warmed learning rate of their own; ``copy``: every copy inherits its unit's moments, scaled like its
            gradient; ``reset``: no state.
        warmup: ``asymmetric``: steps of the newborn entries' own learning rate.
        peak: ``asymmetric``: its highest multiple of the current learning rate.
        ramp: ``exact``: steps over which the per-slice factors go to 1; None: they stay.

    Raises:
        FxgrowError: unknown policy, a parameter the model does not have, or state that cannot be mapped.
    """
    if policy not in POLICIES:
        raise FxgrowError(f"unknown optimizer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    plans = growth.plan.tensors
    if policy == "exact" and not growth.plan.exact_gradients:
        axes = ", ".join(f"{a.name} ({a.old} -> {a.new})" for a in growth.plan.axes if not a.exact_gradients)
        raise FxgrowError(
            f"policy 'exact' needs gradients that map exactly, but statistics run over padded or unevenly split axes: "
            f"{axes}. Use policy 'asymmetric' or 'copy', or grow by whole even copies"
        )
    names = growth.source_names()
    new = dict(growth.module.named_parameters(remove_duplicate=True))
    by_source: dict[str, list[str]] = {}
    for name in new:
        source = plans[name].source
        if source is not None:
            by_source.setdefault(source, []).append(name)
    groups, old_of = _groups(optimizer, names, by_source, new, plans)
    made = _construct(optimizer, groups)
    previous = slice_rates(optimizer)
    rates = SliceRates(warmup=warmup if policy == "asymmetric" else 0, peak=peak, ramp=ramp)
    for name, parameter in new.items():
        plan = plans[name]
        old = old_of.get(name)
        state = dict(optimizer.state.get(old, {})) if old is not None else {}
        fresh = _is_fresh(plan, name)
        if policy != "reset" and state and not fresh:
            made.state[parameter] = _map_state(plan, old, state, policy, name)
        inherited = previous.slices.get(plan.source or "") if previous is not None else None
        s = _slice(plan, policy, fresh, inherited if policy == "exact" else None)
        if s is not None:
            rates.slices[name] = s
    if rates.slices:
        rates.attach(made, new)
    return made


def _is_fresh(plan: TensorPlan, name: str) -> bool:
    """A parameter of an inserted block or layer: it starts without state."""
    return plan.init is not None or plan.zero or plan.fresh


def _groups(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    by_source: Mapping[str, list[str]],
    new: Mapping[str, nn.Parameter],
    plans: Mapping[str, TensorPlan],
) -> tuple[list[dict[str, Any]], dict[str, nn.Parameter]]:
    groups: list[dict[str, Any]] = []
    old_of: dict[str, nn.Parameter] = {}
    placed: set[str] = set()
    for group in optimizer.param_groups:
        members: list[str] = []
        for p in group["params"]:
            source = names.get(id(p))
            if source is None:
                raise FxgrowError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not one of the grown model's "
                    "source; carry the optimizer that trains the model that was grown"
                )
            for name in by_source.get(source, []):
                members.append(name)
                old_of[name] = p
        placed.update(members)
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": [new[n] for n in members]})
    for name in new:
        if name not in placed and plans[name].source is None:
            dims = new[name].dim()
            like = [i for i, g in enumerate(groups) if any(q.dim() == dims for q in g["params"])]
            low = [i for i, g in enumerate(groups) if any(q.dim() < 2 for q in g["params"])]
            chosen = (like or (low if dims < 2 else []) or [len(groups) - 1])[0]
            groups[chosen]["params"].append(new[name])
    return groups, old_of


def _construct(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    cls = type(optimizer)
    accepted = inspect.signature(cls.__init__).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted and k != "params"}
    for g in groups:
        g.pop("param_names", None)
    made: torch.optim.Optimizer = cls(list(groups), **options)
    for target, g in zip(made.param_groups, groups, strict=True):
        target.update({k: v for k, v in g.items() if k != "params"})
    return made


def _map_state(
    plan: TensorPlan, old: nn.Parameter | None, state: Mapping[str, Any], policy: str, name: str
) -> dict[str, Any]:
    assert old is not None
    out: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            out[key] = value
        elif value.shape != old.shape or old.dim() == 0 or key == "step":
            if value.numel() > 1:
                raise FxgrowError(
                    f"cannot carry the optimizer state {key!r} of {name}: its shape {tuple(value.shape)} is not the "
                    f"parameter's {tuple(old.shape)}. Use policy 'reset'"
                )
            out[key] = value.clone()
        elif key not in MOMENTS:
            raise FxgrowError(
                f"cannot carry the optimizer state {key!r} of {name}: fxgrow does not know how it depends on gradients "
                f"(known: {', '.join(MOMENTS)}). Use policy 'reset'"
            )
        else:
            kind = MOMENTS[key]
            mapped = materialise_moment(
                plan,
                value,
                kind,
                scale_gradients=policy != "exact",
                keep_copies=policy != "asymmetric" or kind == "square",
            )
            if policy == "asymmetric" and kind == "square":
                _seed_squares(plan, value, mapped)
            out[key] = mapped
    return out


def _seed_squares(plan: TensorPlan, old: torch.Tensor, mapped: torch.Tensor) -> None:
    """Newborn units under the tensor's old step count would take steps several times too long with v = 0."""
    average = float(old.float().mean())
    for i, d in enumerate(plan.dims):
        if d is not None and bool((d.index < 0).any()):
            rows = torch.from_numpy(np.flatnonzero(d.index < 0)).to(mapped.device)
            mapped.index_fill_(i, rows, average)


def _slice(plan: TensorPlan, policy: str, fresh: bool, inherited: Slice | None) -> Slice | None:
    if policy == "asymmetric":
        if fresh:
            return Slice(whole=True)
        newborn = [None if d is None or not d.newborn.any() else d.newborn for d in plan.dims]
        return Slice(newborn=newborn) if any(n is not None for n in newborn) else None
    if policy == "exact" and not fresh:
        value: list[np.ndarray | None] = []
        gradient: list[np.ndarray | None] = []
        for i, d in enumerate(plan.dims):
            before_v = inherited.value[i] if inherited is not None and inherited.value else None
            before_g = inherited.gradient[i] if inherited is not None and inherited.gradient else None
            value.append(_composed(d.split if d is not None else None, before_v, d))
            gradient.append(_composed(d.gradient if d is not None else None, before_g, d))
        out = Slice(
            value=value,
            gradient=gradient,
            value_scale=plan.scale * (inherited.value_scale if inherited is not None else 1.0),
            gradient_scale=plan.gradient_scale * (inherited.gradient_scale if inherited is not None else 1.0),
        )
        return out if out.scaled else None
    return None


def _composed(now: np.ndarray | None, before: np.ndarray | None, dim: Any) -> np.ndarray | None:
    """Factors of this growth times those that an earlier exact carry left in place."""
    if before is None:
        return now
    if dim is not None:
        before = np.where(dim.index >= 0, before[np.maximum(dim.index, 0)], 1.0)
    return before if now is None else now * before
