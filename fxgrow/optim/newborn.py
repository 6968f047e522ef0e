"""What is new in a grown model: whole parameters and entries of widened ones; and training these alone."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fxgrow.errors import FxgrowError, SpecError, did_you_mean
from fxgrow.ir.adapters import DOWN, UP
from fxgrow.ir.eager import eager
from fxgrow.ir.replicas import following
from fxgrow.optim.rates import KEY
from fxgrow.plan import GrowthPlan, TensorPlan


class NewParameters:
    """The parameters of a grown model that have new entries, by name, in the model's order.

    Whole parameters are new where they belong to new blocks, gates or inserted layers. In a widened one every entry is
    new that is not the first copy of an old one: further copies, and entries that copy nothing.

    Attributes:
        names: all that have anything new.
        whole: those of them that are new as a whole.
    """

    def __init__(self, plan: GrowthPlan, names: Sequence[str]) -> None:
        self._plan, self._plans = plan, {n: plan.tensors[n] for n in names}
        self._aliases = dict(plan.aliases)
        self.whole = [n for n, p in self._plans.items() if _is_new(p)]
        new = set(self.whole) | {n for n, p in self._plans.items() if _has_new(p)}
        self.names = [n for n in names if n in new]

    @property
    def widened(self) -> list[str]:
        """Names of parameters that have old entries, and new ones beside them."""
        whole = set(self.whole)
        return [n for n in self.names if n not in whole]

    def entries(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Boolean, in the shape of the parameter: which of its entries are new.

        Raises:
            SpecError: the grown model has no parameter of that name.
        """
        name = self._aliases.get(name, name)
        if name not in self._plans:
            raise SpecError(f"no parameter {name!r}; {did_you_mean(name, self._plans)}")
        plan = self._plans[name]
        out = torch.full(plan.shape, _is_new(plan), dtype=torch.bool, device=device)
        for i, dim in enumerate(plan.dims):
            if dim is not None:
                along = [-1 if j == i else 1 for j in range(len(plan.shape))]
                out |= torch.from_numpy(dim.newborn).to(device).view(along)
        return out

    def without(self, names: Collection[str]) -> NewParameters:
        """The same without some parameters, such as adapters that are merged since."""
        return NewParameters(self._plan, [n for n in self._plans if n not in names])

    def numel(self) -> int:
        """The number of new entries."""
        return sum(_count(self._plans[n]) for n in self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._aliases.get(name, name) in self.names

    def __repr__(self) -> str:
        return (
            f"<{len(self.whole)} new parameters, and new entries of {len(self.widened)} widened ones: "
            f"{self.numel():,} numbers>"
        )


def _is_new(plan: TensorPlan) -> bool:
    return plan.source is None or plan.fresh or plan.inserted


def _has_new(plan: TensorPlan) -> bool:
    return any(d is not None and bool(d.newborn.any()) for d in plan.dims)


def _count(plan: TensorPlan) -> int:
    total = old = 1
    for i, size in enumerate(plan.shape):
        dim = plan.dims[i] if plan.dims else None
        total *= size
        old *= size if dim is None else size - int(dim.newborn.sum())
    return total if _is_new(plan) else total - old


Part = Literal["old", "new"]
NOTHING_NEW = "the growth made nothing new, or it is merged"

#: those that hold something
_HOLDING: weakref.WeakSet[Frozen] = weakref.WeakSet()


@dataclass(eq=False)
class _Before:
    """What a step must leave alone: of each widened parameter its values, and state of its shape by key."""

    rates: list[Any]
    values: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    states: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)


class Frozen:
    """Old parameters that stand still while the new ones learn, or new ones; until :meth:`unfreeze`. A context manager.

    What is old (or new) as a whole gets ``requires_grad=False``, so that no optimizer steps it. In a widened parameter
    the gradients of such entries are zero, and whatever a step of any optimizer does to these entries (weight decay,
    momentum) and to their moments is undone after it, to the bit. What an optimizer keeps in another shape than the
    parameter's (Adafactor's rows and columns) covers old and new entries alike and goes on. Buffers are not held: put
    norms that average into eval mode. Gradients that wait in what is frozen are dropped.

    Attributes:
        what: ``old`` or ``new``: what stands still.
        new: what is new.
    """

    def __init__(self, new: NewParameters, parameters: Mapping[str, nn.Parameter], what: Part = "old") -> None:
        self.what: Part = what
        self.new = new
        widened, whole = set(new.widened), set(new.whole)
        if not any(parameters[n].requires_grad for n in new):
            why = "requires_grad is False in all that is new" if new.names else NOTHING_NEW
            so = "nothing would be trained, as " if what == "old" else ""
            raise SpecError(f"{so}{why}; nothing was frozen")
        if what == "new" and not any(p.requires_grad for n, p in parameters.items() if n not in whole):
            raise SpecError("nothing would be trained, as nothing that is old learns; nothing was frozen")
        still = [n for n in parameters if (n in whole if what == "new" else n not in new)]
        self._held = [parameters[n] for n in still if parameters[n].requires_grad]
        self._learning = {
            p: ~new.entries(n, p.device) if what == "new" else new.entries(n, p.device)
            for n, p in parameters.items()
            if n in widened and p.requires_grad
        }
        self._steps: dict[int, list[_Before]] = {}
        with following(parameters.values()):
            for p in self._held:
                p.requires_grad_(False)
                p.grad = None
        self._handles: list[RemovableHandle] = []
        _HOLDING.add(self)
        for p in self._learning:
            if p.grad is not None:
                p.grad = self._of_learning(p, p.grad)
            self._handles.append(p.register_hook(lambda g, p=p: self._of_learning(p, g)))
        if self._learning:
            # hooks of all optimizers run around those of any one of them, which may hold weights in other units
            self._handles.append(register_optimizer_step_pre_hook(eager(self._before_step)))
            self._handles.append(register_optimizer_step_post_hook(eager(self._after_step)))

    def unfreeze(self) -> None:
        """Let everything learn again that did before."""
        for handle in self._handles:
            handle.remove()
        with following(self._held):
            for p in self._held:
                p.requires_grad_(True)
        self._handles, self._held, self._learning, self._steps = [], [], {}, {}
        _HOLDING.discard(self)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.unfreeze()

    def holds(self, p: Tensor) -> bool:
        """Whether a parameter, or some of its entries, stand still."""
        return p in self._learning or any(p is held for held in self._held)

    def _mask(self, p: nn.Parameter) -> Tensor:
        if self._learning[p].device != p.device:
            self._learning[p] = self._learning[p].to(p.device)
        return self._learning[p]

    def _of_learning(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        mask = self._mask(p)
        if not gradient.is_sparse:
            return gradient.masked_fill(~mask, 0)
        gradient = gradient.coalesce()
        rows = mask[tuple(gradient.indices())]
        return torch.sparse_coo_tensor(gradient.indices(), gradient.values().masked_fill(~rows, 0), gradient.shape)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        mine = [p for group in optimizer.param_groups for p in group["params"] if p in self._learning]
        if not mine:
            return
        before = _Before([group.get(KEY) for group in optimizer.param_groups])
        for p in mine:
            before.values[p] = p.detach().clone()
            before.states[p] = {k: v.clone() for k, v in _state(optimizer, p).items()}
        stack = self._steps.setdefault(id(optimizer), [])
        del stack[:-1]  # a step that raised leaves its own; a step within a step puts one more on top
        stack.append(before)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stack = self._steps.get(id(optimizer))
        if not stack:
            return
        before = stack.pop()
        # where the end of per-slice learning rates brought the moments into other units, they have to stay so
        same = all(a is b for a, b in zip(before.rates, (g.get(KEY) for g in optimizer.param_groups), strict=False))
        for p, value in before.values.items():
            mask = self._mask(p)
            p.copy_(torch.where(mask, p, value))
            now = _state(optimizer, p)
            for key, old in before.states[p].items() if same else ():
                if key in now:
                    now[key].copy_(torch.where(mask, now[key], old))


def check_unfrozen(parameters: Mapping[str, Tensor]) -> None:
    """Refuse to grow what stands still: it would be let go in other parameters than the grown model has.

    Raises:
        FxgrowError: with a parameter's name.
    """
    for frozen in list(_HOLDING):
        name = next((n for n, p in parameters.items() if frozen.holds(p)), None)
        if name is not None:
            raise FxgrowError(
                f"freeze_{frozen.what} of an earlier growth holds {name}, and could not let go what becomes of it: "
                "call unfreeze() of what it returned, grow, and freeze anew"
            )


def _state(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer keeps for every entry of a parameter."""
    state = optimizer.state.get(p, {})
    items = state.items() if isinstance(state, Mapping) else ()
    return {k: v for k, v in items if isinstance(v, Tensor) and v.shape == p.shape}


def freeze(new: NewParameters, model: nn.Module, what: Part) -> Frozen:
    """Hold everything in a model but what is new, or that alone. Adapters that are merged since are neither.

    Raises:
        SpecError: the model has not the grown parameters under their names, they are sharded, or nothing would be
            trained, or frozen; nothing is changed then.
    """
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    new = new.without({n for n in new if n.endswith((f".{DOWN}", f".{UP}")) and n not in by_name})
    for name in new:
        p, shape = by_name.get(name), tuple(new.entries(name, "meta").shape)
        if p is None or tuple(p.shape) != shape:
            found = "no such parameter" if p is None else f"one of shape {tuple(p.shape)}"
            raise SpecError(f"the model is not the grown one: {name} has shape {shape}, and the model has {found}")
        if hasattr(p, "device_mesh"):
            raise SpecError(f"{name} is sharded: freeze the parameters before the model is sharded")
        names[id(p)] = name  # the class may have tied it to one whose name comes first
    return Frozen(new, {name: by_name[name] for name in names.values()}, what)


__all__ = ["NOTHING_NEW", "Frozen", "NewParameters", "Part", "check_unfrozen", "freeze"]
