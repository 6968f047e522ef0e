"""An optimizer's saved state, grown by the plan of its weights.

A state dict has numbers for parameters, and which is which was settled by the code that made the optimizer. So a way of
making it is looked for that fits the state: in numbers and sizes of groups, and in the shapes of all moments. The same
way, over the grown class, says where each parameter has to stand for the script that loads the grown state.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CheckpointError, FxgrowError, GrowthRefused, reworded
from fxgrow.folders.archive import Later
from fxgrow.ir.traced import Traced
from fxgrow.optim.carried import Carried, carried
from fxgrow.optim.rates import KEY, STEPS, GroupRates
from fxgrow.optim.state import map_state
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.weights.moments import moment_of

Maker = Callable[[nn.Module], torch.optim.Optimizer]
#: the names of parameters, group by group
Layout = list[list[str]]
#: classes that a state may be of, where nothing says which; of those with the same state any will do
_USUAL: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.Adadelta,
    torch.optim.Rprop,
    torch.optim.ASGD,
    torch.optim.Adafactor,
    *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []),
)
#: what methods that make optimizers call a group's options, besides their own names
_OPTIONS = {"learning_rate": "lr", "wd": "weight_decay"}


@dataclass(frozen=True)
class Way:
    """A way in which an optimizer was made, as far as its state says.

    Attributes:
        words: what it is called.
        layout: of the small class.
        of: the layout of any instance of the class; None: what the small one's becomes.
        kind: the optimizer's class.
    """

    words: str
    layout: Layout
    of: Callable[[nn.Module], Layout] | None
    kind: type[torch.optim.Optimizer]


@dataclass(frozen=True)
class Growing:
    """A growth that an optimizer's state is to follow.

    Attributes:
        small, large: the class before and after; their weights are not read.
        policy: as :func:`fxgrow.optim.carry` takes it.
        rates: learning rates per slice may stand in the grown state; only where fxgrow is imported can it be loaded.
        later: what makes the moments when they are written.
    """

    small: nn.Module
    large: nn.Module
    program: Program
    plan: GrowthPlan
    grown: Traced
    policy: str
    rates: bool = False
    later: Later = field(default_factory=Later)

    def state_of(self, *asked: Any) -> dict[str, Any]:
        """A parameter's grown state, as :func:`map_state` makes it; large moments are made again when they are written.

        What cannot be made is seen now, before anything is written.
        """
        held: dict[str, torch.Tensor] = {}

        def make(key: str) -> torch.Tensor:
            if key not in held:  # one parameter's moments at a time, which are written one after the other
                held.update((k, made[k]) for made in [map_state(*asked)] for k in put_off)
            return held.pop(key)

        state = map_state(*asked)
        put_off = [k for k, v in state.items() if isinstance(v, torch.Tensor) and self.later.takes(v)]
        for key in put_off:
            state[key] = self.later.put_off(state[key], functools.partial(make, key))
        return state


def is_state(given: Any) -> bool:
    """Whether data are the state dict of an optimizer of PyTorch."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        return False
    groups, state = given["param_groups"], given["state"]
    return (
        isinstance(groups, list)
        and bool(groups)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        and isinstance(state, Mapping)
        and all(isinstance(entries, Mapping) for entries in state.values())
    )


def grown_state(saved: Mapping[str, Any], way: Way, how: Growing, where: str) -> tuple[Any, list[str]]:
    """The state dict over the grown parameters, and what is to be said of it.

    Args:
        saved: the small model's.
        way: see :func:`way_of`.
        where: it stands, for errors.

    Raises:
        CheckpointError: the grown class has other groups.
        GrowthRefused: the policy needs what a plain optimizer does not do.
        FxgrowError: see :func:`fxgrow.optim.carry`.
    """
    if how.policy != "reset":
        _check_finite(saved, where)
    optimizer = _loaded(saved, way, how.small)
    order = None if way.of is None else way.of(how.large)
    old = {id(p): how.program.aliases.get(n, n) for n, p in how.small.named_parameters()}
    named = {how.grown.aliases.get(n, n): n for n, _ in how.large.named_parameters()}
    new = {n: p for n, p in zip(named, how.large.parameters(), strict=True) if n in how.plan.tensors}
    group_of = {n: number for number, names in enumerate(order or ()) for n in names}
    if group_of:  # others may hold the rest
        new = {n: p for n, p in new.items() if named[n] in group_of}

    def group(name: str) -> int | None:
        """Of a parameter that the growth made of nothing."""
        return group_of.get(named[name])

    try:
        content = carried(
            how.plan, old, new, optimizer, how.policy, newcomers=group if group_of else None, state_of=how.state_of
        )
    except FxgrowError as error:
        raise reworded(error, f"{where}: {error}") from error
    kept = how.rates or any(KEY in group for group in saved["param_groups"])
    if any(content.rates) and not kept and how.policy == "exact":
        raise GrowthRefused(
            "policy 'exact' steps grown parameters at learning rates per slice, which a plain "
            f"{way.kind.__name__} does not apply. Take 'asymmetric' or 'copy'; or let the rates stand in the state "
            "(rates, --rates), where the script that loads it imports fxgrow"
        )
    notes = [f"the optimizer's state is of {_article(way.kind)}, its parameters in the order of {way.words}"]
    if any(content.rates) and not kept:
        notes.append(
            "the learning rate of new entries does not warm up: a plain optimizer has one for each group (rates, "
            "--rates, where the training script imports fxgrow)"
        )
    return _written(saved, content, optimizer, order, how, kept, where), notes


def _check_finite(saved: Mapping[str, Any], where: str) -> None:
    """Refuse moments that are no numbers any more.

    Raises:
        GrowthRefused: with the first.
    """
    for number, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise GrowthRefused(
                    f"{where}: {key} of parameter {number} has values that are NaN or infinite. Take a state from "
                    "before that, or policy 'reset'"
                )


def _article(kind: type[torch.optim.Optimizer]) -> str:
    return "a class that is not known" if kind is torch.optim.Optimizer else kind.__name__


def _written(
    saved: Mapping[str, Any],
    content: Carried,
    optimizer: torch.optim.Optimizer,
    layout: Layout | None,
    how: Growing,
    rates: bool,
    where: str,
) -> dict[str, Any]:
    """The state dict, in the order that the training script will have."""
    names = {id(p): n for n, p in how.small.named_parameters()} | {id(p): n for n, p in how.large.named_parameters()}
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    number = 0
    for k, (group, members) in enumerate(zip(saved["param_groups"], content.members, strict=True)):
        mine = [names[id(m.parameter)] for m in members]
        order = mine if layout is None else layout[k]
        if sorted(mine) != sorted(order):
            odd = sorted(set(mine) ^ set(order))[0]
            raise CheckpointError(
                f"{where}: {odd} stands in another parameter group of the grown class than what it was made of. "
                + _ADVICE
            )
        places = [mine.index(n) for n in order]
        made = {k: v for k, v in group.items() if k not in ("params", KEY, STEPS)}
        if "param_names" in made:
            made["param_names"] = [members[i].label or order[j] for j, i in enumerate(places)]
        if rates and content.rates[k]:
            data = content.rates[k][KEY]
            named = [data["names"][i] for i in places]
            made |= {**content.rates[k], KEY: GroupRates({**data, "names": named})}
        made["params"] = list(range(number, number + len(places)))
        groups.append(made)
        for i in places:
            m = members[i]
            entries = content.state.get(m.parameter) if m.name else optimizer.state.get(m.parameter)
            if entries:
                state[number] = dict(entries)
            number += 1
    others = {k: v for k, v in saved.items() if k not in ("state", "param_groups")}
    return {"state": state, "param_groups": groups, **others}


def _loaded(saved: Mapping[str, Any], way: Way, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a state, whose tensors stay where they are."""
    kind = way.kind
    parameters = dict(model.named_parameters())
    init = torch.optim.Optimizer.__init__  # the class's own may ask for options that nobody saved

    def begin(self: torch.optim.Optimizer, params: Any) -> None:
        init(self, params, {})

    stored: Any = type(kind.__name__, (kind,), {"__init__": begin})
    optimizer: torch.optim.Optimizer = stored([{"params": [parameters[n] for n in names]} for names in way.layout])
    for names, group, own in zip(way.layout, saved["param_groups"], optimizer.param_groups, strict=True):
        own.update({k: v for k, v in group.items() if k != "params"})
        for name, number in zip(names, group["params"], strict=True):
            if saved["state"].get(number):
                optimizer.state[parameters[name]] = dict(saved["state"][number])
    return optimizer


def _kind_of(saved: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """A class whose state has these names; the class of all optimizers where none is known."""
    keys = {k for entries in saved["state"].values() for k in entries}
    options = {k for group in saved["param_groups"] for k in group}
    for kind in _USUAL:
        p = nn.Parameter(torch.zeros(2, 2))
        p.grad = torch.zeros(2, 2)
        every: dict[str, Any] = {"momentum": 0.9, "amsgrad": True} if kind is not torch.optim.SGD else {"momentum": 0.9}
        known = inspect.signature(kind).parameters
        optimizer = kind([p], **{k: v for k, v in every.items() if k in known})
        optimizer.step()
        usual = {k for k, v in optimizer.state[p].items() if v is not None}
        if keys <= usual and options & set(optimizer.defaults) >= set(optimizer.defaults) - _LATER:
            return kind
    return torch.optim.Optimizer


#: options that optimizers of earlier versions of PyTorch have not saved
_LATER = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay", "amsgrad"}


# which parameter is which -------------------------------------------------------------------------------------------

_ADVICE = (
    "Name a function that makes the optimizer over a model as the training script does (make_optimizer, "
    "--make-optimizer package.module:function), or leave the optimizer out (--no-optimizer)"
)


def way_of(saved: Any, small: nn.Module, make: Maker | None, where: str, trainers: bool = False) -> Way:
    """The one way of making an optimizer that fits a state.

    Args:
        small: the class that it was made over; weights are not read.
        make: makes it as the training script does; None: a way that fits is looked for.
        where: the state stands, for errors.
        trainers: it is of transformers' Trainer.

    Raises:
        CheckpointError: it is no state; no way fits, or several that give parameters other numbers.
    """
    _check_state(saved, where)
    if make is not None:
        way = _made(make, small, f"{getattr(make, '__name__', 'the function')}()")
        if problem := _misfit(saved, way, small):
            raise CheckpointError(f"{where} is no state of the optimizer that {way.words} makes: {problem}")
        return way
    certain = [_by_names(saved, small), _by_method(saved, small), _by_trainer(saved, small) if trainers else None]
    found = _fitting(saved, small, [way for way in certain if way is not None], _ways(_WHOLE, saved, small), where)
    if len(found) == 1:
        return found[0]
    ways = "; ".join(way.words for way in found)
    raise CheckpointError(f"{where}: which parameter is which is not known: several ways fit ({ways}). {_ADVICE}")


def ways_of(states: Sequence[Any], small: nn.Module, make: Maker | None, wheres: Sequence[str]) -> list[Way]:
    """The one way of making several optimizers, each of which holds parameters of its own.

    Args:
        make: makes them all, in the order of the states.

    The rest, and what it raises, as :func:`way_of`.
    """
    found: list[list[Way]] = []
    for number, (saved, where) in enumerate(zip(states, wheres, strict=True)):
        _check_state(saved, where)
        part = number, len(states)
        if make is not None:
            certain = [_made(make, small, f"{getattr(make, '__name__', 'the function')}()", part)]
        else:
            certain = [w for w in (_by_names(saved, small), _by_method(saved, small, part)) if w is not None]
        usual = iter(()) if make is not None else _ways(_PARTS, saved, small)
        found.append(_fitting(saved, small, certain, usual, where))
    choices = [ways for ways in itertools.product(*found) if _disjoint(ways)]
    if len(choices) == 1:
        return list(choices[0])
    what = "several ways fit" if choices else "those that fit hold the same parameters"
    ways = "; ".join(f"{where}: {' or '.join(w.words for w in fit)}" for where, fit in zip(wheres, found, strict=True))
    raise CheckpointError(f"which parameter is which is not known: {what} ({ways}). {_ADVICE}")


def _disjoint(ways: Sequence[Way]) -> bool:
    names = [n for way in ways for group in way.layout for n in group]
    return len(names) == len(set(names))


def _check_state(saved: Any, where: str) -> None:
    if not is_state(saved):
        raise CheckpointError(f"{where} is not the state dict of an optimizer: a table of state and param_groups")
    if not all(isinstance(n, int) for group in saved["param_groups"] for n in group["params"]):
        raise CheckpointError(
            f"{where} has names for its parameters: load it into the optimizer, and save its state_dict()"
        )


def _fitting(
    saved: Mapping[str, Any], small: nn.Module, certain: Sequence[Way], usual: Iterator[Way], where: str
) -> list[Way]:
    """The first of the ways that are certain which fits; or else the usual ones that do, those with one layout once.

    Raises:
        CheckpointError: none fits.
    """
    tried: list[tuple[Way, str]] = []
    for way in certain:
        problem = _misfit(saved, way, small)
        if not problem:
            return [way]
        tried.append((way, problem))
    found: list[Way] = []
    for way in usual:
        problem = _misfit(saved, way, small)
        if problem:
            tried.append((way, problem))
        elif not any(way.layout == other.layout for other in found):
            found.append(way)
    if found:
        return found
    problems = {problem: way.words for way, problem in reversed(tried)}
    said = "; ".join(f"{words}: {problem}" for problem, words in list(problems.items())[::-1][:4])
    raise CheckpointError(f"{where}: which parameter is which is not known: no way fits ({said}). {_ADVICE}")


def _misfit(saved: Mapping[str, Any], way: Way, model: nn.Module) -> str:
    """Why a state is not of an optimizer that was made so; "" where it may be."""
    groups = saved["param_groups"]
    sizes, mine = [len(g["params"]) for g in groups], [len(names) for names in way.layout]
    if sizes != mine:
        return f"the state has groups of {_listed(sizes)} parameters, the class of {_listed(mine)}"
    numbers = [n for g in groups for n in g["params"]]
    if len(set(numbers)) != len(numbers) or set(saved["state"]) - set(numbers):
        return "the state's numbers of parameters are not those of its groups"
    parameters = dict(model.named_parameters())
    for number, name in zip(numbers, (n for names in way.layout for n in names), strict=True):
        entries = saved["state"].get(number, {})
        for key, value in entries.items():
            moment = moment_of(way.kind, key, entries)
            if not isinstance(value, torch.Tensor) or (value.dim() == 0 and moment is None):
                continue
            if value.dim() != parameters[name].dim() if moment is None else moment.count:
                continue  # says nothing; where it cannot be grown, that is said when it is
            shape = parameters[name].shape if moment is None else moment.shape(parameters[name].shape)
            if value.shape != shape:
                return f"{key} of parameter {number} is {list(value.shape)}, {name} {list(parameters[name].shape)}"
    return ""


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _made(make: Maker, small: nn.Module, words: str, part: tuple[int, int] = (0, 1)) -> Way:
    """What a function makes.

    Args:
        part: which of how many optimizers is meant.

    Raises:
        CheckpointError: it fails, or makes something else.
    """

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                made = make(model)
        except Exception as error:
            raise CheckpointError(f"{words} fails: {type(error).__name__}: {error}") from error
        number, count = part
        several = list(made.values()) if isinstance(made, Mapping) else made
        if count > 1 and isinstance(several, list | tuple):
            if len(several) != count:
                raise CheckpointError(f"{words} makes {len(several)} optimizers, and there are {count} states")
            made = several[number]
            made = made["optimizer"] if isinstance(made, Mapping) and "optimizer" in made else made
        if not isinstance(made, torch.optim.Optimizer):
            raise CheckpointError(f"{words} makes a {type(made).__name__}, which is no torch.optim.Optimizer")
        return made

    def layout(model: nn.Module) -> Layout:
        names = {id(p): n for n, p in model.named_parameters()}
        groups = optimizer(model).param_groups
        if any(id(p) not in names for group in groups for p in group["params"]):
            raise CheckpointError(f"{words} makes an optimizer of parameters that are not the model's")
        return [[names[id(p)] for p in group["params"]] for group in groups]

    return Way(words, layout(small), layout, type(optimizer(small)))


def _by_names(saved: Mapping[str, Any], small: nn.Module) -> Way | None:
    """The names that stand in the groups, where the optimizer was made of named parameters."""
    groups = saved["param_groups"]
    if not all(len(g.get("param_names") or ()) == len(g["params"]) for g in groups):
        return None
    known = {n for n, _ in small.named_parameters()}
    layout = [[_own(str(n), known) for n in g["param_names"]] for g in groups]
    if any(n not in known for names in layout for n in names):
        return None
    return Way("the names in its groups", layout, None, _kind_of(saved))


def _own(name: str, known: set[str]) -> str:
    """A parameter's name without what wrappers put before it."""
    return next((name[i:] for i in (0, *_after_dots(name)) if name[i:] in known), name)


def _after_dots(name: str) -> Iterator[int]:
    return (i + 1 for i, c in enumerate(name) if c == ".")


def _by_method(saved: Mapping[str, Any], small: nn.Module, part: tuple[int, int] = (0, 1)) -> Way | None:
    """The class's own ``configure_optimizers``, called with what the groups say.

    Raises:
        CheckpointError: it cannot be called. What it does may be no usual way.
    """
    method = getattr(small, "configure_optimizers", None)
    if method is None:
        return None
    called = f"{type(small).__name__}.configure_optimizers"
    groups = saved["param_groups"]
    options: dict[str, Any] = {"device_type": "cpu", "device": "cpu"}
    for group in reversed(groups):
        options |= {k: v for k, v in group.items() if k != "params"}
    options["weight_decay"] = max((g.get("weight_decay", 0.0) for g in groups), default=0.0)
    options |= {k: options[v] for k, v in _OPTIONS.items() if v in options}
    given: dict[str, Any] = {}
    for name, p in inspect.signature(method).parameters.items():
        if name in options:
            given[name] = options[name]
        elif p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise CheckpointError(f"{called}() takes {name}, which the optimizer's state does not tell. {_ADVICE}")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        made: Any = model.configure_optimizers(**given)  # type: ignore[operator]
        if isinstance(made, tuple | list) and made and isinstance(made[0], tuple | list) and part[1] > 1:
            made = made[0]  # and not the schedulers, which Lightning has beside them
        elif isinstance(made, tuple | list) and made and part[1] == 1:  # as Lightning has them
            made = made[0][0] if isinstance(made[0], tuple | list) and len(made[0]) == 1 else made[0]
        return made["optimizer"] if isinstance(made, Mapping) and "optimizer" in made else made

    try:
        return _made(make, small, called, part)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_ADVICE}") from error


def _by_trainer(saved: Mapping[str, Any], small: nn.Module) -> Way | None:
    """The groups that transformers' Trainer makes."""
    try:
        trainer: Any = importlib.import_module("transformers").Trainer

        def split(model: nn.Module) -> Layout:
            decays = set(trainer.get_decay_parameter_names(None, model))
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            return [[n for n in names if n in decays], [n for n in names if n not in decays]]

        return Way("transformers' Trainer", split(small), split, _kind_of(saved))
    except Exception:  # another version's, or one that lacks its own requirements
        return None


Test = Callable[[nn.Parameter, bool], bool]


def _ways(table: Mapping[str, Sequence[Test]], saved: Mapping[str, Any], small: nn.Module) -> Iterator[Way]:
    """Ways by their words and tests; each is worked out when it is asked for."""
    kind = _kind_of(saved)
    for words, tests in table.items():
        yield _picked(words, tests, small, kind)


def _picked(words: str, tests: Sequence[Test], small: nn.Module, kind: type[torch.optim.Optimizer]) -> Way:
    """A way that has a group for each test of a parameter, and of whether it is in a list of blocks."""

    def of(model: nn.Module) -> Layout:
        lists = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        inside = {n: n.startswith(tuple(lists)) for n, _ in model.named_parameters()}
        return [[n for n, p in model.named_parameters() if test(p, inside[n])] for test in tests]

    return Way(words, of(small), of, kind)


def _any(_: nn.Parameter, __: bool) -> bool:
    return True


def _learns(p: nn.Parameter, _: bool) -> bool:
    return p.requires_grad


def _matrix(p: nn.Parameter, _: bool) -> bool:
    return p.requires_grad and p.dim() >= 2


def _vector(p: nn.Parameter, _: bool) -> bool:
    return p.requires_grad and p.dim() < 2


def _inner(p: nn.Parameter, inside: bool) -> bool:
    return _matrix(p, inside) and inside


def _outer(p: nn.Parameter, inside: bool) -> bool:
    return p.requires_grad and not _inner(p, inside)


def _outer_matrix(p: nn.Parameter, inside: bool) -> bool:
    return _matrix(p, inside) and not inside


#: the ways in which optimizers are made where nothing says how
_WHOLE: dict[str, list[Test]] = {
    "model.parameters()": [_any],
    "model.parameters(), those that learn": [_learns],
    "matrices, then the rest": [_matrix, _vector],
    "what is no matrix, then matrices": [_vector, _matrix],
}
#: the parameters that one of several optimizers is usually given, where nothing says so
_PARTS: dict[str, list[Test]] = {
    "matrices": [_matrix],
    "what is no matrix": [_vector],
    "the matrices of blocks": [_inner],
    "all but the matrices of blocks": [_outer],
    "all but the matrices of blocks, matrices first": [_outer_matrix, _vector],
    "all but the matrices of blocks, matrices last": [_vector, _outer_matrix],
}

__all__ = ["Growing", "Maker", "Way", "grown_state", "is_state", "way_of", "ways_of"]
