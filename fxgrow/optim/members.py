"""Which grown parameters stand in which parameter group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.optim.whole import is_muon
from fxgrow.plan import TensorPlan

#: which optimizer takes parameters that were made of nothing: see :func:`fxgrow.optim.carry`
Newcomers = bool | int | torch.optim.Optimizer | Callable[[str], int | None] | None


@dataclass(frozen=True)
class Member:
    """One entry of a parameter group after a growth.

    Attributes:
        parameter: the grown one, or one that the model does not have.
        name: in the grown model; None where the model does not have it.
        old: what the grown parameter was made of; None for a newcomer.
        label: what the group's ``param_names`` call it, if it has any.
    """

    parameter: nn.Parameter
    name: str | None
    old: nn.Parameter | None
    label: str | None


def members_of(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    new: Mapping[str, nn.Parameter],
    plans: Mapping[str, TensorPlan],
    newcomers: Newcomers,
) -> list[list[Member]]:
    """The members of each group: in place of a parameter what it became, then newcomers.

    Args:
        names: ``id`` of each of the small model's parameters to its name.
        new: the grown model's parameters by name.

    Raises:
        FxgrowError: the optimizer was carried over this growth already; nobody can say which optimizer a newcomer
            belongs to; or there is no such group.
    """
    by_source: dict[str, list[str]] = {}
    for name in new:
        source = plans[name].source
        if source is not None:
            by_source.setdefault(source, []).append(name)
    grown = {id(p): n for n, p in new.items() if id(p) not in names}
    out: list[list[Member]] = []
    for group in optimizer.param_groups:
        members: list[Member] = []
        labels = group.get("param_names", [])
        if len(labels) != len(group["params"]):
            labels = [None] * len(group["params"])
        for p, label in zip(group["params"], labels, strict=True):
            if id(p) in grown:
                raise FxgrowError(
                    f"the optimizer holds {grown[id(p)]} of the grown model already: it was carried over this growth, "
                    "or was made over the grown model. Carry an optimizer once for each growth"
                )
            source = names.get(id(p))
            became = by_source.get(source, []) if source is not None else []
            if not became:  # not of this model
                members.append(Member(p, None, None, label))
            for name in became:
                members.append(Member(new[name], name, p, _relabelled(label, str(source), name)))
        out.append(members)
    for name, number in _joining(optimizer, out, new, plans, newcomers).items():
        named = "param_names" in optimizer.param_groups[number]
        out[number].append(Member(new[name], name, None, name if named else None))
    before, after = ({n: k for k, n in enumerate(order)} for order in (names.values(), new))
    for number, group in enumerate(optimizer.param_groups):
        places = [before[names[id(p)]] for p in group["params"] if id(p) in names]
        if places == sorted(places):
            out[number] = _in_order(out[number], after)
    return out


def _in_order(members: list[Member], order: Mapping[str, int]) -> list[Member]:
    """Members in the grown model's order: an optimizer's state is loaded by position.

    One that is made anew over the grown model, by the code that made this one over the small model, has that order.
    Parameters of others stay behind the one they stood behind.
    """
    runs: list[tuple[int, list[Member]]] = [(-1, [])]
    for m in members:
        if m.name is None:
            runs[-1][1].append(m)
        else:
            runs.append((order[m.name], [m]))
    return [m for _, run in sorted(runs, key=lambda r: r[0]) for m in run]


def _relabelled(label: str | None, source: str, name: str) -> str | None:
    """A user's name of a parameter after the growth: with the user's own prefix, or unchanged."""
    if label is None or source == name:
        return label
    return label.removesuffix(source) + name if label.endswith(source) else name


def _joining(
    optimizer: torch.optim.Optimizer,
    groups: list[list[Member]],
    new: Mapping[str, nn.Parameter],
    plans: Mapping[str, TensorPlan],
    newcomers: Newcomers,
) -> dict[str, int]:
    """The newcomers that join this optimizer, and the group of each."""
    if isinstance(newcomers, torch.optim.Optimizer):
        newcomers = newcomers is optimizer
    coming = [n for n in new if plans[n].source is None]
    if newcomers is False or not coming:
        return {}
    if callable(newcomers):
        told = {name: number for name in coming if (number := newcomers(name)) is not None}
        rest = {name: new[name] for name in new if name not in told}
        joining = _joining(optimizer, groups, rest, plans, None)
        for name, number in told.items():
            joining |= _joining(optimizer, groups, {name: new[name]}, plans, number)
        return joining
    if newcomers is not None and newcomers is not True:
        for name in coming:
            _check_taken(optimizer, name, new[name])
        if not 0 <= newcomers < len(groups):
            raise FxgrowError(f"newcomers={newcomers}: the optimizer has groups 0 to {len(groups) - 1}")
        return dict.fromkeys(coming, newcomers)
    group_of = {m.name: k for k, members in enumerate(groups) for m in members if m.name is not None}
    trained = [n for n in new if plans[n].source is not None and (new[n].requires_grad or n in group_of)]
    alone = newcomers or all(n in group_of for n in trained)
    out: dict[str, int] = {}
    for name in coming:
        siblings = next(_siblings(name, new, trained), [])
        mine = [n for n in siblings if n in group_of]
        if mine and len(mine) < len(siblings) and not alone:
            other = next(n for n in siblings if n not in group_of)
            raise FxgrowError(
                f"the growth makes a new parameter {name}, and of the parameters beside it this optimizer holds "
                f"some ({mine[0]}) and another one the rest ({other}). Say which takes the new parameters: "
                "newcomers=that optimizer, the same for all of them (or True for it and False for the others)"
            )
        if mine:
            out[name] = group_of[mine[0]]
        elif alone:
            out[name] = len(groups) - 1
        if name in out:
            _check_taken(optimizer, name, new[name])
    return out


def _check_taken(optimizer: torch.optim.Optimizer, name: str, p: nn.Parameter) -> None:
    """Refuse a newcomer that the optimizer cannot step."""
    if is_muon(optimizer) and p.dim() != 2:
        raise FxgrowError(
            f"the growth makes a new parameter {name} of shape {tuple(p.shape)}, and {type(optimizer).__name__} "
            "steps matrices alone. Carry it together with an optimizer that takes it, growth.carry_([first, second], "
            "newcomers=second), or leave it to one that you make for it afterwards: newcomers=False"
        )


def _siblings(name: str, new: Mapping[str, nn.Parameter], candidates: list[str]) -> Iterator[list[str]]:
    """The parameters in the nearest module around, with as many dims; then those that are (no) matrices, too; any."""
    dims, parts = new[name].dim(), name.split(".")
    prefixes = [".".join([*parts[:k], ""]) for k in range(len(parts) - 1, 0, -1)] + [""]
    for alike in (lambda d: d == dims, lambda d: (d < 2) == (dims < 2), lambda _: True):
        for prefix in prefixes:
            found = [n for n in candidates if n.startswith(prefix) and alike(new[n].dim())]
            if found:
                yield found
