"""What a user has to know of a model that was grown in place: what it is not, made anew, and what stayed as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fxgrow.ir.traced import Traced
from fxgrow.landing.bundles import inner, name_of, settings_of
from fxgrow.landing.config import Arguments, Builder
from fxgrow.landing.living import attributes_of, configs_of, is_config
from fxgrow.plan import GrowthPlan

_MOST_NAMED = 3


def told(
    model: nn.Module,
    plan: GrowthPlan,
    before: Traced,
    grown: Traced,
    builders: Iterable[Builder],
    held: Settings,
    blocks: Collection[int],
) -> Iterator[str]:
    """What to warn of.

    Args:
        model: as it is now.
        builders: of modules in it that are built from configs.
        held: settings of its configs before, see :func:`settings_held`.
        blocks: how many there were in stacks that have more now.
    """
    builders, name = list(builders), type(model).__name__
    yield from _made_anew(builders)
    sizes = {a.old for a in plan.axes}
    yield from _stale(model, sizes | {*blocks}, builders, held)
    small = [n for n in unread(grown) if n in before.parameters and n not in before.twins]
    left = [n for n in small if sizes & {*before.parameters[n].shape}]
    if left:
        yield (
            f"no captured call reads {', '.join(left[:_MOST_NAMED])}, and so they stay as they were: if a method of "
            f"{name} gives them what has grown, it will fail"
        )
    unsaved = [c.node for c in plan.constants if c.op == "buffer"]
    if unsaved:
        yield (
            f"{name} holds buffers that its state dict does not, and that have grown "
            f"({', '.join(unsaved[:_MOST_NAMED])}): save them with the weights, else a model that loads these computes "
            "something else"
        )


def unread(program: Traced) -> list[str]:
    """Parameters that no captured call reads."""
    read = {n.target for n in program.graph.nodes if n.op == "get_attr" and n.users}
    return [n for n in program.parameters if n not in read]


def _made_anew(builders: list[Builder]) -> Iterator[str]:
    """Classes whose configs would now make another model."""
    known = {type(b.module).__name__: (b, said) for b in builders if not b.kept and (said := b.differs())}
    for kind, (builder, said) in known.items():
        if not isinstance(builder.config, Arguments):
            yield (
                f"{kind} is grown, and its config cannot say so: made anew from it, {said}. Keep the model itself, or "
                "grow what the config ties (docs/landing.md)"
            )
        elif builder.config.complete:
            yield (
                f"{kind} is grown, and the arguments that it keeps cannot say so: made anew from them, {said}. Keep "
                "the model itself, or grow what they tie (docs/landing.md)"
            )


Settings = Mapping[int, list[tuple[Any, Any]]]  # by id of a config: names of settings, and what they are


def settings_held(model: nn.Module) -> Settings:
    """What the configs in a model say."""
    return {id(c): list(settings_of(c)) for m in model.modules() for c in configs_of(m, 1)}


def _stale(model: nn.Module, sizes: set[int], builders: list[Builder], held: Settings) -> Iterator[str]:
    """Configs from which nothing is built alone, and which may say an old size."""
    built = {id(c) for b in builders for m in b.module.modules() for c in configs_of(m)}
    seen: set[int] = set()
    for module in model.modules():
        for attribute, config in list(vars(module).items()):
            if not is_config(config) or id(config) in seen or id(config) in built:
                continue
            seen.add(id(config))
            kept = [k for k, v in held.get(id(config), []) if v in sizes and _now(config, k) == v]
            if kept:
                said = ", ".join(f"{'.'.join(map(str, k))} {_now(config, k)}" for k in kept[:_MOST_NAMED])
                yield (
                    f"{type(module).__name__}.{attribute} says {said}, as a size or a number of blocks was that has "
                    "grown, and nothing in the model is built from it alone, so that it stays so: set it, if it means "
                    "that"
                )


def _now(config: Any, key: Any) -> Any:
    held = attributes_of(inner(config, key)).get(name_of(key))
    for place in [i for i in key if isinstance(i, int)]:
        held = held[place] if isinstance(held, list | tuple) and place < len(held) else None
    return held


__all__ = ["settings_held", "told", "unread"]
