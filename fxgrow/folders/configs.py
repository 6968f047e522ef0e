"""The config of the grown class: found, and proved by a trace of the class that is made from it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CheckpointError, FxgrowError, GrowthRefused, SpecError, did_you_mean
from fxgrow.folders.building import build, taken_by
from fxgrow.folders.keys import shapes_of, why_not
from fxgrow.folders.opened import Opened
from fxgrow.folders.source import CONFIG
from fxgrow.landing.apply import apply, constants_held
from fxgrow.landing.beside import alike
from fxgrow.landing.compare import Difference, described, differences
from fxgrow.landing.living import attributes_of
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program, capture
from fxgrow.reading import read_json
from fxgrow.weights.materialise import materialise_all

_MISSING = object()


def wanted_of(small: Opened, settings: Mapping[str, Any] | None, like: str | Path | None) -> dict[str, Any]:
    """The config that a larger model is to have.

    Raises:
        SpecError: a setting that neither the config nor the class has.
    """
    config = small.source.config
    if like is not None:
        found = read_json(Path(like) / CONFIG if Path(like).is_dir() else Path(like), SpecError, finite=False)
        if not isinstance(found, dict):
            raise SpecError(f"{like} is no table of settings")
        return config | found
    assert settings is not None
    wanted = config
    for name, value in settings.items():
        wanted = _with_setting(wanted, name.split("."), value, small.source.called)
    for name in settings:
        if "." not in name and name not in config:  # which a class may have a default for
            made = [
                shapes_of(build(small.make, given, small.dtypes, "the config with these settings"))
                for given in (wanted, {k: v for k, v in wanted.items() if k != name})
            ]
            taken = taken_by(type(small.model))[1] or set()
            if made[0] == made[1] and name not in taken | set(_settings(small.model, config)):
                raise SpecError(
                    f"{small.source.called} has no {name}, and it changes nothing; {did_you_mean(name, config)}"
                )
    return wanted


def _with_setting(config: Mapping[str, Any], path: Sequence[str], value: Any, where: str) -> dict[str, Any]:
    """A config with another value, which may be in a table within it: ``text_config.hidden_size``.

    Raises:
        SpecError: there is no such table, or it has no such setting.
    """
    head, *rest = path
    if not rest:
        return {**config, head: value}
    inner = config.get(head)
    if not isinstance(inner, Mapping):
        raise SpecError(f"{where} has no table {head}; {did_you_mean(head, config)}")
    if len(rest) == 1 and rest[0] not in inner:
        raise SpecError(f"{where} has no {rest[0]} in {head}; {did_you_mean(rest[0], inner)}")
    return {**config, head: _with_setting(inner, rest, value, where)}


@dataclass
class Larger:
    """A class made from a config that is to be the grown one's.

    Attributes:
        config: the whole of it.
        changed: its settings that are others now: old and new, None where there was none.
        model: made from it; nobody has written its parameters.
        wrong: why it is not the grown one's, once that is known.
    """

    config: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    model: nn.Module
    inputs: Mapping[str, Any]
    wrong: FxgrowError | None = None

    @functools.cached_property
    def traced(self) -> Program:
        """Its trace, made on first use."""
        return capture(self.model, (), self.inputs)

    def forget(self) -> None:
        """Trace and prove it anew."""
        self.__dict__.pop("traced", None)
        self.wrong = None


class Configs:
    """Finds the config from which the class computes a growth.

    Args:
        small: what grows.
        program, plan, grown: its trace, its growth, and the trace that the growth needs.
    """

    def __init__(self, small: Opened, program: Program, plan: GrowthPlan, grown: Program) -> None:
        self.small, self.program, self.plan, self.grown = small, program, plan, grown
        dtypes = {n: t.dtype for n, t in grown.tensors.items()}
        self.dtypes = dtypes | {alias: dtypes[name] for alias, name in grown.aliases.items() if name in dtypes}
        self.needed = {n: tuple(plan.tensors[n].shape) for n in (*grown.parameters, *grown.buffers)}

    def by_settings(self, asked: Larger) -> Iterator[Larger]:
        """The one that was asked for.

        Args:
            asked: the class with these settings in the small model's dtypes; where the growth has these too, its trace
                is the proof's.

        Raises:
            GrowthRefused: it does not have the grown shapes.
        """
        found = self._made(asked.changed, asked.config)
        yield asked if _dtypes(asked.model) == _dtypes(found.model) else found

    def by_spec(self) -> Iterator[Larger]:
        """The likeliest one, and then the one by which the class itself can be grown, if that is another.

        Finding the likeliest takes no trace. One that is asked for the next has found the last one wrong.

        Raises:
            GrowthRefused: the class cannot compute the grown function, or has not the grown shapes.
        """
        likeliest: Larger | None = None
        try:
            likeliest = self._made(self._changed(prove=False))
        except (GrowthRefused, CheckpointError):
            pass
        else:
            yield likeliest
        changed = self._changed(prove=True)
        if likeliest is None or changed != likeliest.changed:
            yield self._made(changed)

    def _changed(self, prove: bool) -> dict[str, tuple[Any, Any]]:
        """Grow the class, whose weights are not there: which settings of its config are others then.

        Raises:
            GrowthRefused: the class cannot compute the grown function.
        """
        model, program, plan, grown = self.small.model, self.program, self.plan, self.grown
        before = _settings(model, self.small.source.config)
        others = [name for name in plan.tensors if name not in grown.parameters]
        tensors = dict(materialise_all(plan, program.tensor, others))
        tensors |= {n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in grown.parameters.items()}
        held = constants_held(model, program)
        living = apply(model, plan, program.without_tensors(), grown, tensors, held, prove=prove)
        after = _settings(model, self.small.source.config)
        living.undo()
        return {k: (before.get(k), v) for k, v in after.items() if before.get(k, _MISSING) != v}

    def _made(self, changed: Mapping[str, tuple[Any, Any]], wanted: Mapping[str, Any] | None = None) -> Larger:
        """The class with some settings.

        Raises:
            GrowthRefused: it has not the grown shapes.
        """
        config = self.small.source.config | {k: new for k, (_, new) in changed.items()} if wanted is None else wanted

        if lines := why_not(self._build, config, self.needed):
            raise GrowthRefused(_no_config(type(self.small.model).__name__, lines))
        return Larger(dict(config), dict(changed), self._build(config), self.small.inputs)

    def _build(self, config: Mapping[str, Any]) -> nn.Module:
        return build(self.small.make, config, self.dtypes, "the grown config")

    def again(self, larger: Larger) -> nn.Module:
        """The class made once more: a model that is traced is nobody else's meanwhile."""
        return self._build(larger.config)

    def prove(self, larger: Larger) -> None:
        """See to it that a class computes the grown function; what is raised is noted with it.

        Raises:
            GrowthRefused: it does not; the message names the numbers on both sides.
            CaptureError: it cannot be traced.
        """
        try:
            self._prove(larger)
        except FxgrowError as error:
            larger.wrong = error
            raise

    def _prove(self, larger: Larger) -> None:
        name, grown = type(larger.model).__name__, self.grown
        if found := differences(grown, larger.traced):
            raise GrowthRefused(_no_config(name, _lines(found)))
        computed = dict(larger.model.named_buffers())
        unsaved = [name for name in grown.buffers if name in computed and name not in grown.persistent]
        for buffer, made in materialise_all(self.plan, self.program.tensor, unsaved):
            if not alike(made, computed[buffer]):
                raise GrowthRefused(
                    f"the buffer {buffer} is not saved, and {name} computes other values for it than the growth needs"
                )


def asked_for(small: Opened, config: Mapping[str, Any]) -> Larger:
    """The class with other settings, in the small model's dtypes."""
    old = small.source.config
    changed = {k: (old.get(k), v) for k, v in config.items() if old.get(k, _MISSING) != v}
    model = build(small.make, config, small.dtypes, "the config with these settings")
    return Larger(dict(config), changed, model, small.inputs)


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {n: t.dtype for n, t in (*model.named_parameters(), *model.named_buffers())}


def _lines(found: Sequence[Difference]) -> list[str]:
    lines = [described(d, "the class") for d in found[:6]]
    return [*lines, f"and {len(found) - 6} more"] if len(found) > 6 else lines


def _no_config(name: str, lines: Sequence[str]) -> str:
    return "\n".join(
        [
            f"{name}, made from the grown config, does not compute what the growth does:",
            *(f"  {line}" for line in lines),
            "Grow other axes with it, so that a config says the same, or use fxgrow.grow and fxgrow.save",
        ]
    )


def _settings(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says of itself, as plain data: its config, or arguments that it keeps by their names."""
    held: Any = getattr(model, "config", None)
    if held is None:
        return {k: v for k, v in attributes_of(model).items() if k in config}
    if callable(getattr(held, "to_dict", None)):
        return dict(json.loads(json.dumps(held.to_dict(), default=str)))
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        return dataclasses.asdict(held)
    return dict(held) if isinstance(held, Mapping) else {k: v for k, v in vars(held).items() if not k.startswith("_")}
