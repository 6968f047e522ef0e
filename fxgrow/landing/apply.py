"""``growth.apply_``: the user's own model, grown in place, and proved by a second trace.

Tensors are exchanged, blocks copied, and the numbers set that modules and configs keep. Which attributes these are is
not known beforehand: an attribute is tried where it holds a number that the growth changes in the graph, or where the
class, built anew from another config, has another one. Then the model is traced again and its graph compared with the
grown one, literal by literal. What differs is looked up again; if it cannot be made equal, all is put back.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fxgrow.errors import CaptureError, FxgrowError, GrowthRefused
from fxgrow.ir.libraries import libraries
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.replicas import around, check_replicas, follow, ignored_by, innermost, within
from fxgrow.ir.running import plain_tensors
from fxgrow.ir.traced import Traced
from fxgrow.landing.blocks import Numbered, Restacked, restack
from fxgrow.landing.compare import Difference, described, differences
from fxgrow.landing.config import Arguments, Builder, builders_of
from fxgrow.landing.following import Following
from fxgrow.landing.literals import (
    Candidate,
    Literal,
    candidates,
    changed_literals,
    mirrored,
    moved,
    names_in_code,
    steady_attributes,
)
from fxgrow.landing.living import Living, attributes_of, configs_of
from fxgrow.landing.raised import changed_sizes, literals_at, literals_of_raise
from fxgrow.landing.retrace import retrace
from fxgrow.landing.settings import Goal, Settings, adopt, relative, solve
from fxgrow.landing.sizes import KeptSizes
from fxgrow.landing.ties import tied_with
from fxgrow.landing.told import settings_held, told, unread
from fxgrow.plan import GrowthPlan
from fxgrow.warn import warn

#: second traces of one model; every one but the last has found a number that differs
_MOST = 10
#: other settings of a config that are tried, beside the likeliest
_MOST_OTHERS = 3


class Setting(NamedTuple):
    """A plain attribute that was set, and what it held."""

    holder: Any
    name: str
    old: Any


def constants_held(model: nn.Module, program: Traced) -> dict[str, tuple[str, str]]:
    """Which module holds each of a program's constants as a plain attribute, and under which name."""
    places = {
        (t.data_ptr(), tuple(t.shape), t.stride()): name
        for name, t in plain_tensors(model).items()
        if not t.is_meta and t.numel()
    }
    out = {}
    for name, constant in program.constants.items():
        if not constant.is_meta and constant.numel():
            found = places.get((constant.data_ptr(), tuple(constant.shape), constant.stride()))
            if found is not None:
                path, _, leaf = found.rpartition(".")
                out[name] = path, leaf
    return out


def apply(
    model: nn.Module,
    plan: GrowthPlan,
    before: Traced,
    grown: Traced,
    tensors: Mapping[str, torch.Tensor],
    held: Mapping[str, tuple[str, str]],
    *,
    prove: bool = True,
) -> Living:
    """Grow a living model.

    Args:
        model: as it was traced, or what ``torch.compile`` or ``DistributedDataParallel`` made of it.
        before: its program before the growth.
        grown: the grown program.
        tensors: the grown parameters and buffers by name; the model holds these very objects afterwards.
        held: places of constants, see :func:`constants_held`.
        prove: False takes the likeliest numbers as they are, for a caller who traces what is made of them himself.

    Returns:
        The model, of which all that was changed can be undone.

    Raises:
        GrowthRefused: the class cannot compute the grown function; the model is as it was.
        FxgrowError: a DDP that holds it cannot go on with other parameters.
    """
    living, replicas = Living(innermost(model)), around(model)
    check_replicas(replicas)
    old, ignored = named_tensors(living.model), ignored_by(replicas)
    ignored |= {
        id(tensors[n]) for n, t in plan.tensors.items() if n in tensors and id(old.get(t.source or "")) in ignored
    }

    def begun() -> _Applying:
        return _Applying(living, plan, before, grown, tensors, held, prove)

    refusal: GrowthRefused | None = None
    keeping = [settle for library in libraries() if (settle := library.keep(living.model)) is not None]
    try:
        builders = builders_of(living.model)
        for settled in begun().options(builders):
            try:
                applying = begun()
                applying.run(builders, settled)
                for settle in keeping:
                    settle(living.model, living.attribute)
                if keeping and not applying.lands():
                    raise FxgrowError("a library's layers compute with what they keep of their sizes")
                for ddp in {*replicas, *within(living.model)}:  # and copies of those in blocks
                    living.undone_by(follow(ddp, ignored))
                return living
            except GrowthRefused as error:
                refusal = refusal or error
                living.undo()
    except BaseException:
        living.undo()
        raise
    assert refusal is not None, "options were empty"
    raise refusal


Settled = list[tuple[Builder, Settings]]  # modules that are built from configs, and what these are to say


class _Applying:
    def __init__(
        self,
        living: Living,
        plan: GrowthPlan,
        before: Traced,
        grown: Traced,
        tensors: Mapping[str, torch.Tensor],
        held: Mapping[str, tuple[str, str]],
        proving: bool,
    ) -> None:
        self.living, self.plan, self.before, self.grown, self.tensors = living, plan, before, grown, tensors
        self.held, self.proving = held, proving
        self.tried: set[tuple[Any, ...]] = set()
        self.chosen: dict[tuple[Any, ...], Candidate] = {}
        self.done: list[tuple[Candidate, list[Setting]]] = []
        self.last: list[Candidate] = []  # what was set last
        self.unset: list[Literal] = []
        self.literals = changed_literals(before, grown)
        self.modules = {id(m) for m in living.model.modules()}  # all others are copies of them
        self.numbered: list[Numbered] = []
        self.told: list[str] = []
        self.kept = 0  # so many of what was done belong to the best that was reached
        self.choose(self.literals, sure=True)

    def options(self, builders: list[Builder]) -> Iterator[Settled]:
        """What configs may be set to, the likeliest first: several settings may make the grown shapes."""
        goal = self.goal() if builders else Goal({}, {}, {}, [])
        found = [(b, solve(b, goal.within(b.path))) for b in builders if not (b.sealed or _in_stack(b, goal.stacks))]
        first = _agreed([(b, settings) for b, each in found if (settings := next(each, None)) is not None], builders)
        yield first
        for builder, each in found:
            alone = builder.together or isinstance(builder.config, Arguments)  # these land without, too: see below
            for settings in itertools.islice(each, 0 if alone else _MOST_OTHERS):
                yield [(b, settings if b is builder else s) for b, s in first]
        if any(s.in_part or isinstance(b.config, Arguments) for b, s in first):
            yield []  # the settings that fit without the others may have done harm

    def goal(self) -> Goal:
        """What modules that are built from configs have to become. The model is as it was afterwards."""
        paths = {id(m): p for p, m in self.living.model.named_modules()}
        sure = [c for c in self.chosen.values() if id(c.holder) in paths and c.index is None and not c.rivals]
        wanted = {(paths[id(c.holder)], c.name): c.value for c in sure}
        left = set(unread(self.grown)) - set(self.before.twins)  # they stay small, whatever the class makes of them
        left |= {n for n, p in self.plan.tensors.items() if p.source is None}  # gates, adapters: no class has them
        shapes = {n: tuple(t.shape) for n, t in self.tensors.items() if n not in left}
        shapes |= {a: shapes[n] for a, n in self.grown.aliases.items() if n in shapes}
        mark = self.living.mark
        stacks = restack(self.living, self.plan)
        steady = steady_attributes(self.before, self.grown, self.living.model)
        self.living.undo(mark)
        return Goal(shapes, wanted, steady, stacks)

    def run(self, builders: list[Builder], settled: Settled) -> None:
        living = self.living
        kept = KeptSizes(living.model)
        constants = {n: (living.module(path), leaf) for n, (path, leaf) in self.held.items() if n in self.tensors}
        following, held = Following(living.model), settings_held(living.model)
        follows = {id(h) for b, _ in settled for m in b.module.modules() for h in (m, *configs_of(m))}
        self.put([c for c in self.chosen.values() if id(c.holder) not in follows])
        stacks = restack(living, self.plan)
        origin = living.origins = origins(living.model, stacks)
        self.numbered = [n for s in stacks for n in s.numbered]
        self.literals = moved(self.literals, living.model, origin)
        self.exchange(constants)
        kept.settle(living)
        for builder, settings in settled:
            adopt(living, builder, settings, origin)
        if self.proving:
            self.prove()
        mark = living.mark
        if following.settle(living, origin) and not self.lands():
            living.undo(mark)
        if self.proving:
            self.warn(builders, held, {len(s.origins) - len(s.copied) for s in stacks})

    # numbers

    def choose(self, literals: Iterable[Literal], sure: bool = False) -> list[Candidate]:
        """The likeliest attribute for every literal that none was tried for; where two want one attribute, the first.

        Args:
            sure: only attributes of the module itself that hold the number and that its line reads.
        """
        out: dict[tuple[Any, ...], Candidate] = {}
        for literal in literals:
            found = candidates(self.living.model, literal)
            free = [c for c in found if (*c.key, c.value) not in self.tried]
            fitting = [c for c in free if out.get(c.key, c).value == c.value and (not sure or c.is_sure)]
            if not found:
                self.unset.append(literal)
            if not fitting:
                continue
            if any(c.key in out and c.rank[:3] == fitting[0].rank[:3] for c in fitting):
                continue  # set for another literal already
            likeliest = [c for c in fitting if c.rank[:3] == fitting[0].rank[:3]]
            out[fitting[0].key] = replace(fitting[0], rivals=len({c.key for c in likeliest}) - 1)
        if any(c.is_direct for c in out.values()):  # what follows from others may be right once these are
            out = {k: c for k, c in out.items() if c.is_direct}
        self.chosen |= out
        return list(out.values())

    def put(self, chosen: Iterable[Candidate]) -> None:
        self.last = list(chosen)
        for candidate in self.last:
            self.tried.add((*candidate.key, candidate.value))
            old = attributes_of(candidate.holder).get(candidate.name)
            if not candidate.put(self.living):
                continue
            settings = [Setting(candidate.holder, candidate.name, old)]
            if candidate.index is None and isinstance(old, int | float) and not candidate.keyed:
                others = mirrored(self.living, candidate.holder, candidate.name, old, candidate.value)
                settings += [Setting(o, candidate.name, old) for o in others]
            self.done.append((candidate, settings))

    # tensors

    def exchange(self, constants: Mapping[str, tuple[Any, str]]) -> None:
        grown = self.grown
        kept = {n: n for n in (*grown.parameters, *grown.buffers)}
        kept |= {a: n for a, n in grown.aliases.items() if n in kept}
        exchanged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for place, name in kept.items():
            old = self.living.tensor(place, self.tensors[name])
            if old is not None:
                exchanged[id(old)] = old, self.tensors[name]
        self.living.references(exchanged)
        for name, (holder, leaf) in constants.items():
            self.living.attribute(holder, leaf, self.tensors[name])

    # the proof

    def prove(self) -> None:
        """Trace the model again until its graph is the grown one.

        Raises:
            GrowthRefused: nothing is left that could be set.
        """
        literals, found, mark, self.kept = self.literals, list[Difference](), self.living.mark, len(self.done)
        failure: CaptureError | None = None
        raised: dict[str, list[Literal]] = {}  # by what was said: numbers that a condition held sizes against
        self.last = []
        for attempt in range(_MOST):
            chosen, wrong = list[Candidate](), math.inf
            try:
                theirs = self.trace()
            except CaptureError as error:
                failure = failure or error
                if raised and str(error) not in raised and not found:  # that condition holds now, and another does not
                    mark, self.kept = self.living.mark, len(self.done)
                else:
                    self.take_back(mark)  # what was set last does not suffice, or makes it worse
                    chosen = self.likeliest()
                raised[str(error)] = literals_of_raise(self.living.model, error, changed_sizes(self.plan.axes))
                chosen = chosen or self.choose(raised[str(error)])
                chosen = chosen or self.choose(literals_at(error, literals), sure=True)
            else:
                now = differences(self.grown, theirs)
                wrong = len(now)
                if not now:
                    self.prune()
                    return
                if found and len(now) >= len(found):
                    self.take_back(mark)
                    chosen = self.likeliest()
                else:
                    failure, found, mark, self.kept = None, now, self.living.mark, len(self.done)
                    literals = [x for d in found for x in (_literals(d) or _factors(d, self.literals))]
            if not attempt and self.unnumber(wrong):
                mark = self.living.mark
                continue
            chosen = chosen or self.choose(literals)
            if not chosen:
                break
            self.put(chosen)
        raise self.refused(found) if found else self.refused_trace(failure)

    def unnumber(self, wrong: float) -> bool:
        """Give back to attributes what they held that are no numbers of blocks, though they were equal to them.

        Args:
            wrong: see :meth:`wrong`, of the model as it is.
        """
        groups: dict[tuple[type, str], list[Numbered]] = {}
        for each in self.numbered:
            if each.name in names_in_code(type(each.module)):  # type: ignore[arg-type]
                groups.setdefault((type(each.module), each.name), []).append(each)
        if not groups:
            return False
        mark = self.living.mark
        for each in itertools.chain(*groups.values()):
            self.living.attribute(each.module, each.name, each.old)
        least = self.wrong()
        if least >= wrong:
            self.living.undo(mark)
            return False
        for (kind, name), group in groups.items():
            mark = self.living.mark
            for each in group:
                self.living.attribute(each.module, name, each.new)
            if self.wrong() > least:
                self.living.undo(mark)
                self.told.append(
                    f"{kind.__name__}.{name} is {sorted({e.old for e in group})} in blocks that were copied or moved, "
                    "and stays so: captured calls compute with it. If it is the block's number to other methods, set it"
                )
        return True

    def wrong(self) -> float:
        """In how much the model's graph differs from the grown one."""
        try:
            return len(differences(self.grown, self.trace()))
        except CaptureError:
            return math.inf

    def likeliest(self) -> list[Candidate]:
        """Of what was set last, and taken back, the likeliest by themselves, where there were others too."""
        best = min((c.rank[:3] for c in self.last), default=())
        last, self.last = self.last, []
        others = [c for c in last if c.rank[:3] != best]
        self.tried.difference_update((*c.key, c.value) for c in others)
        return [c for c in last if c.rank[:3] == best] if others else []

    def take_back(self, mark: int) -> None:
        self.living.undo(mark)
        del self.done[self.kept :]

    def prune(self) -> None:
        """Take back what was set and no captured call reads, an attribute at a time: it held the number by chance, or
        is for other methods; which of the two, nobody can tell but the user.
        """
        groups: dict[tuple[type, str], list[Setting]] = {}
        for candidate, settings in self.done:
            groups.setdefault((type(candidate.holder), candidate.name), []).extend(settings)
        for (kind, name), settings in groups.items():
            mark = self.living.mark
            now, old = attributes_of(settings[0].holder)[name], settings[0].old
            copies = [m for m in self.living.model.modules() if type(m) is kind and id(m) not in self.modules]
            settings += [Setting(m, name, old) for m in copies if vars(m).get(name) == now]
            for setting in reversed(settings):
                self.living.attribute(setting.holder, setting.name, setting.old)
            if not self.lands():
                self.living.undo(mark)
            elif now != old:
                warn(
                    f"{kind.__name__}.{name} is {old}, as a size was that has grown, and stays so: no "
                    f"captured call reads it. If other methods do, and mean that size, set it to {now}"
                )

    def lands(self) -> bool:
        try:
            return not self.proving or not differences(self.grown, self.trace())
        except CaptureError:
            return False

    def trace(self) -> Traced:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return retrace(self.living.model, self.before)

    def warn(self, builders: Iterable[Builder], held: Mapping[int, Any], blocks: Collection[int]) -> None:
        """Say what a checkpoint of the model would not bring back, and what may be stale in it."""
        found = told(self.living.model, self.plan, self.before, self.grown, builders, held, blocks)
        for said in (*found, *self.told):
            warn(said)

    # words

    def refused(self, found: list[Difference]) -> GrowthRefused:
        name = type(self.living.model).__name__
        lines = [f"{name} cannot compute the grown function, and is as it was:"]
        lines += [f"  {described(d)}" for d in found[:4]]
        if len(found) > 4:
            lines.append(f"  and {len(found) - 4} more")
        lines.append(
            "Make the number an attribute of the module, or a field of its config, that the forward reads; or use "
            "growth.module"
        )
        lines.append(tied_with(self.before, self.plan))
        return GrowthRefused("\n".join(line for line in lines if line))

    def refused_trace(self, error: FxgrowError | None) -> GrowthRefused:
        name = type(self.living.model).__name__
        lines = [f"{name} cannot run with the grown weights, and is as it was:", f"  {error}"]
        for literal in {(u.line, u.old, u.new): u for u in self.unset}.values():  # blocks are alike: a line once
            lines.append(
                f"  {literal.line or literal.path}: computes with {literal.old}, the growth needs {literal.new}, and "
                "no attribute of the module or its config holds that number"
            )
        lines.append(tied_with(self.before, self.plan))
        return GrowthRefused("\n".join(line for line in lines if line))


def _agreed(settled: Settled, builders: list[Builder]) -> Settled:
    """Without those of a config that several modules are built from, and that do not all want the same of it."""

    def agree(builder: Builder) -> bool:
        beside = [b for b in builders if b.config is builder.config]
        wanted = [s.values for b, s in settled if b.config is builder.config]
        return len(wanted) == len(beside) and all(w == wanted[0] for w in wanted)

    return [(b, s) for b, s in settled if not b.together or agree(b)]


def _in_stack(builder: Builder, stacks: list[Restacked]) -> bool:
    """Whether a module has, or may have, another path in a model whose stacks have other blocks."""
    return bool(builder.path) and any(relative(builder.path, s.stack) is not None for s in stacks)


def origins(model: nn.Module, stacks: list[Restacked]) -> dict[str, str]:
    """For every module path of a model whose stacks have other blocks, the path that it had or was copied from."""
    out: dict[str, str] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        was = path
        for stack in reversed(stacks):
            prefix = f"{stack.stack}." if stack.stack else ""
            if was.startswith(prefix):
                number, dot, rest = was[len(prefix) :].partition(".")
                if number.isdigit() and int(number) in stack.origins:
                    was = f"{prefix}{stack.origins[int(number)]}{dot}{rest}"
        if was != path:
            out[path] = was
    return out


def _literals(d: Difference) -> list[Literal]:
    """The numbers of a difference, each entry of a list by itself."""
    if d.kind != "literal":
        return []
    pairs = [(d.theirs, d.ours)]
    if isinstance(d.ours, list | tuple) and isinstance(d.theirs, list | tuple) and len(d.ours) == len(d.theirs):
        pairs = [(old, new) for old, new in zip(d.theirs, d.ours, strict=True) if old != new]
    line = d.their_source or d.source
    return [
        Literal(d.module_path, old, new, line, d.node, d.argument)
        for old, new in pairs
        if all(v is None or type(v) in (int, float) for v in (old, new))
    ]


def _factors(d: Difference, literals: Iterable[Literal]) -> list[Literal]:
    """The numbers behind a product with one that only one of the graphs has: in the other it is by 1."""
    wanted = {"extra": (d.theirs, 1.0), "missing": (1.0, d.ours)}.get(d.kind)
    return [x for x in literals if x.path == d.module_path and (x.old, x.new) == wanted]


__all__ = ["apply", "constants_held"]
