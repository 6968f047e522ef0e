"""Per-slice learning rates: what growths leave behind for an optimizer's next steps.

They are plain data in the optimizer's parameter groups, under ``fxgrow`` and ``fxgrow_steps``. So they go wherever the
groups go: ``state_dict`` and ``load_state_dict``, ``torch.save``, ``copy.deepcopy``. Step hooks apply them; one hook of
all optimizers finds the groups that have them, so that a plain optimizer which loads such a state needs nothing else.

Around a step, with s the factor a weight was scaled by and g that of its gradient, the optimizer sees ``p / s`` and
``grad / g``; what it adds to them is added to ``p``, times s. Entries that it leaves alone keep their bits.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fxgrow.errors import FxgrowError
from fxgrow.ir.dtensors import is_sharded, local_of
from fxgrow.ir.eager import eager
from fxgrow.ir.foreach import lerp_each
from fxgrow.optim.pieces import MOST, Active, Stepper, newborn_blocks, step_groups
from fxgrow.optim.slices import Factors, Slice, SliceRates, along, combined, halves, wide
from fxgrow.optim.whole import is_muon, muon_group
from fxgrow.saved import tell_torch
from fxgrow.weights.moments import is_elementwise, is_tiled, moment_of

__all__ = [
    "KEY",
    "STEPS",
    "GroupRates",
    "Slice",
    "SliceRates",
    "all_rates",
    "load_rates_state",
    "norm_factors",
    "rates_state",
    "slice_rates",
    "write_rates",
]

KEY, STEPS = "fxgrow", "fxgrow_steps"


class GroupRates(dict[str, Any]):
    """Plain data of one parameter group: the parameters' names, and the rates that each growth left them.

    A class of its own so that unpickling it imports this module, whose hook then applies the rates: a process that does
    not know fxgrow cannot load an optimizer's state and step without them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupRates, (dict(self),)

    def __repr__(self) -> str:
        return f"<per-slice learning rates of {sum(len(g['slices']) for g in self['growths'])} tensors>"


tell_torch()


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


def rates_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The per-slice rates of an optimizer as plain data that JSON can hold, one entry for each growth.

    For checkpoints that do not keep what stands in parameter groups beside hyper-parameters:
    ``torch.distributed.checkpoint`` leaves out of a new optimizer whatever its own groups do not have.
    """
    return [rates.state_dict() for rates in all_rates(optimizer)]


def load_rates_state(optimizer: torch.optim.Optimizer, state: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Put what :func:`rates_state` gave into the groups of another optimizer over the same model.

    Raises:
        FxgrowError: it is of tensors that the model does not have, or has in other shapes.
    """
    rates = [SliceRates.from_state_dict(each) for each in state]
    named = dict(model.named_parameters())
    for name, s in ((name, s) for r in rates for name, s in r.slices.items()):
        if name not in named or not s.fits(named[name].shape):
            has = f"of shape {tuple(named[name].shape)}" if name in named else "not there"
            raise FxgrowError(f"these per-slice learning rates are of another model: {name} is {has} in this one")
    write_rates(optimizer, rates, {id(p): n for n, p in named.items()})


class _Applied:
    """The rates of one optimizer, ready to be applied, and what a step under way has to put back."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.read(optimizer)
        self.handles: list[RemovableHandle] = []
        steps = {inspect.unwrap(vars(c)["step"]) for c in type(optimizer).__mro__ if "step" in vars(c)}
        self.nests = len(steps - {torch.optim.Optimizer.step}) > 1  # a step that may call a parent's, hooks and all
        self.depth = 0
        self.idle = False  # within the step of an optimizer that applies the same rates
        self.hidden: list[dict[str, Any]] | None = None  # the groups, while there is nothing left for the step to do
        self.aside: list[tuple[SliceRates, list[torch.Tensor], list[torch.Tensor]]] = []
        self.entered: dict[nn.Parameter, torch.Tensor | None] = {}
        self.weights: dict[nn.Parameter, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # in state, and before the step

    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """What stands in the groups.

        Raises:
            FxgrowError: it belongs to other parameters than the optimizer holds.
        """
        self.groups = [(group, group[KEY]) for group in optimizer.param_groups if KEY in group]
        self.names: dict[nn.Parameter, str] = {}
        self.rates: list[SliceRates] = []
        self.vectors: dict[tuple[Any, ...], Factors] = {}
        self.stepper = Stepper(
            lambda p, kind, power: self.factors(p, self.names[p], kind, power), lambda of: self.halves(of)
        )
        for group, data in self.groups:
            own = [
                SliceRates.from_state_dict({**growth, "steps": steps})
                for growth, steps in zip(data["growths"], group[STEPS], strict=True)
            ]
            for p, name in zip(group["params"], data["names"], strict=False):
                self.names[p] = name
                for r in own:
                    if name in r.slices and not r.slices[name].fits(p.shape):
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
        self.idle = any(other is not self and other.depth and other.shares(self) for other in _APPLIED.values())
        if self.idle:
            return None
        self.depth = 1
        given = None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None and self.may_move_first(optimizer):
            self.enter({p: of for p in self.names if (of := self.active(p))})
            return None
        if closure is not None:  # it runs the model: before the weights are in other units
            with torch.enable_grad():
                given = _Evaluated(closure(), self.leave)
            args, kwargs = (
                ((args[0], given, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": given})
            )
        try:
            with torch.no_grad():
                self.enter_or_step(optimizer)
        except BaseException:
            self.leave()
            self.depth = 0
            raise
        return None if given is None else (args, kwargs)

    def shares(self, other: _Applied) -> bool:
        """Whether another optimizer has one of these very groups: the one inside another, whose step calls its own."""
        return any(g is h for g, _ in self.groups for h, _ in other.groups)

    def may_move_first(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step may move the weights before it evaluates its closure (SAM's), and may be let do so.

        As long as nothing has factors, the weights stay in their own units.
        """
        known = is_elementwise(optimizer) or is_tiled(optimizer) or is_muon(optimizer)
        return not known and not any(s.scaled for p in self.names for _, s in self.active(p))

    def enter_or_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring parameters into the units in which they step; where the step has to be taken apart, take it."""
        active = {p: of for p in self.names if p.grad is not None and (of := self.active(p))}
        if self.stepper.takes(optimizer):
            cuts = {p: cut for p, of in active.items() if (cut := self.stepper.pieces(optimizer, p, of)) is not None}
            if not cuts:
                self.enter(active)
                return
            self.enter({p: of for p, of in active.items() if p not in cuts})
            try:
                self.stepper.step(optimizer, cuts, active)
            finally:
                self.leave()
        else:
            self.enter(active)
            if not (is_muon(optimizer) and any(s.scaled for of in active.values() for _, s in of)):
                return
            groups = []
            for group in optimizer.param_groups:
                for p in group["params"]:
                    shares = [(s, r.exponent) for r, s in active.get(p, ()) if s.scaled]
                    groups.append({**muon_group(group, p.shape, shares), "params": [p]})
            try:
                step_groups(optimizer, groups, optimizer.state)
            finally:
                self.leave()
        self.hidden, optimizer.param_groups = optimizer.param_groups, []

    def show(self, optimizer: torch.optim.Optimizer) -> None:
        """The groups again."""
        if self.hidden is not None:
            optimizer.param_groups, self.hidden = self.hidden, None

    def active(self, p: nn.Parameter) -> list[tuple[SliceRates, Slice]]:
        """What is in force of a parameter."""
        name = self.names[p]
        return [
            (r, s)
            for r in self.rates
            if (s := r.slices.get(name)) is not None and (s.scaled or (s.warms and r.steps < r.warmup))
        ]

    def post(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.idle:
            self.idle = False
            return
        self.depth -= 1
        if self.depth:
            return
        self.show(optimizer)
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

    def enter(self, active: Mapping[nn.Parameter, Active]) -> None:
        """Bring weights and gradients into the small model's units."""
        for p, slices in active.items():
            name = self.names[p]
            warm = any(s.warms and r.steps < r.warmup for r, s in slices)
            scaled = any(s.scaled for _, s in slices)
            if warm and not scaled and len(slices) == 1 and not slices[0][1].whole:
                newborn = slices[0][1].part(p).newborn
                blocks = list(newborn_blocks(here(p).detach(), newborn, 0))
                if len(blocks) <= MOST:
                    # weights in state, too: where a step copies them into the parameter, they are what it moves
                    of_state = [newborn_blocks(v, newborn, 0) for v in self.averages(p)]
                    blocks += itertools.chain.from_iterable(of_state)
                    if blocks:  # a shard may have no newborn entries
                        self.aside.append((slices[0][0], blocks, [b.clone() for b in blocks]))
                    continue
            if scaled:
                assert p.grad is not None
                for v in self.factors(p, name, "gradient", -1.0):
                    here(p.grad).mul_(v)
            keep = warm or (scaled and not self.halves(slices))
            self.entered[p] = here(p).detach().clone() if keep else None
            if warm and not scaled:
                self.weights[p] = [(v, v.clone()) for v in self.averages(p)]
            if scaled:
                for tensor in (here(p), *self.averages(p)):
                    for v in self.factors(p, name, "value", -1.0):
                        tensor.mul_(v)

    @torch.no_grad()
    def leave(self) -> None:
        """Bring them back; what the optimizer added counts s times, and at newborn entries as much as they warmed."""
        for r, blocks, kept in self.aside:
            lerp_each(blocks, kept, 1.0 - r.newborn_rate)
        self.aside.clear()
        for entered, old in self.entered.items():
            name, p = self.names[entered], here(entered)
            scaled = any(r.slices[name].scaled for r in self.rates if name in r.slices)
            back = self.factors(entered, name, "value", 1.0) if scaled else []
            if old is None:
                for v in back:
                    p.mul_(v)
            elif not scaled:
                for tensor, before in ((p, old), *self.weights.pop(entered, ())):
                    tensor.copy_(torch.lerp(before, tensor, self.warmth(entered, name).to(tensor.dtype)))
            else:
                units = old.clone()
                for v in self.factors(entered, name, "value", -1.0):
                    units.mul_(v)
                moved = (p.to(wide(p)) - units).mul_(self.warmth(entered, name))
                for v in back:
                    moved.mul_(v)
                p.copy_(torch.where(p == units, old, (moved + old).to(p.dtype)))
            for tensor in self.averages(entered):
                for v in back:
                    tensor.mul_(v)
            if entered.grad is not None and scaled:
                for v in self.factors(entered, name, "gradient", 1.0):
                    here(entered.grad).mul_(v)
        self.entered.clear()

    def averages(self, p: nn.Parameter) -> list[torch.Tensor]:
        """State that stands for the weight itself, and is in its units."""
        optimizer = self.optimizer()
        if optimizer is None:
            return []
        state = optimizer.state.get(p, {})
        return [
            here(v)
            for k, v in state.items()
            if (m := moment_of(optimizer, k, state)) is not None and m.weight and v.shape == p.shape
        ]

    # factors ----------------------------------------------------------------------------------------------------------

    def factors(self, p: nn.Parameter, name: str, kind: str, power: float) -> Factors:
        """Of all growths together: a scalar and a broadcastable vector for each dim that has one."""
        of = [
            (r.slices[name], power * (r.exponent if kind == "value" else 1.0)) for r in self.rates if name in r.slices
        ]
        key = (name, kind, p.device, *(e for _, e in of))
        if key not in self.vectors:
            if len(self.vectors) > 8 * len(self.names):  # exponents change at every step of a ramp
                self.vectors.clear()
            self.vectors[key] = combined([(s.part(p), e) for s, e in of], kind, here(p))
        return self.vectors[key]

    def halves(self, slices: Active) -> bool:
        """Whether multiplying by s undoes a division by it to the bit: s is 1, 1/2, 1/4 and so on."""
        return all(
            r.exponent == 1.0 and all(halves(v) for v in (*s.value, np.array(s.value_scale)) if v is not None)
            for r, s in slices
            if s.scaled
        )

    def warmth(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """The learning-rate factor of newborn entries, 1 elsewhere; broadcastable to the parameter.

        An entry that is newborn in several growths warms up with the last of them.
        """
        out = torch.ones((), dtype=wide(p), device=p.device)
        for r in self.rates:
            s = r.slices.get(name)
            if s is None or not s.warms or r.steps >= r.warmup:
                continue
            old = torch.zeros_like(out) if s.whole else torch.ones_like(out)
            for i, mask in enumerate(s.part(p).newborn):
                if mask is not None:
                    old = old * along(1.0 - mask.astype(np.float64), i, here(p))
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
                    averaged = moment.dim(p.shape)
                    for v in combined([(s.part(value, averaged), moment.gradient)], "gradient", here(p), averaged):
                        here(value).mul_(v)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, in the same memory; a plain one itself."""
    return local_of(tensor) if is_sharded(tensor) else tensor


def _steps_under_way(optimizer: torch.optim.Optimizer) -> int:
    """Hooked steps of this optimizer on the stack: more than one where a class's step calls its parent's."""
    hooked, found, frame = type(optimizer).step.__code__, 0, inspect.currentframe()
    while frame is not None:
        found += frame.f_code is hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


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
    if found is not None:
        found.show(optimizer)
    if not any(KEY in group for group in optimizer.param_groups):
        if found is not None and not found.depth:
            for handle in found.handles:
                handle.remove()
            del _APPLIED[optimizer]
        return None
    if found is None:
        found = _APPLIED[optimizer] = _Applied(optimizer)
        found.handles = [
            optimizer.register_step_pre_hook(eager(found.pre)),
            optimizer.register_step_post_hook(eager(found.post)),
        ]
    elif not found.depth and not found.is_of(optimizer):
        found.read(optimizer)
    return found


@eager
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


def norm_factors(optimizer: torch.optim.Optimizer, norm_type: float) -> dict[nn.Parameter, Factors]:
    """What gradients are multiplied by to have the norm of the small model's, where rates have factors."""
    found = _applied(optimizer)
    out: dict[nn.Parameter, Factors] = {}
    if found is not None:
        for p, name in found.names.items():
            of = [r.slices[name] for r in found.rates if name in r.slices and r.slices[name].scaled]
            if of:
                out[p] = [
                    *combined([(s, -1.0) for s in of], "gradient", p),
                    *combined([(s, -1.0 / norm_type) for s in of], "copies", p),
                ]
    return out


def slice_rates(optimizer: torch.optim.Optimizer) -> SliceRates | None:
    """The per-slice learning rates that the last growth left an optimizer, if any are in force."""
    rates = all_rates(optimizer)
    return rates[-1] if rates else None
