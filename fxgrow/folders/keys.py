"""Why no config says what a growth needs: the settings that make a tensor's size, and what else they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fxgrow.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
#: settings that are tried
_TRIES = 24


def shapes_of(model: nn.Module) -> Shapes:
    """Of what a model saves, by name."""
    return {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}


def why_not(build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], needed: Shapes) -> list[str]:
    """Lines on which settings keep a class from having these shapes; none where it has them.

    Args:
        build: makes the class from a config.
        needed: those of the tensors that matter.
    """
    there = shapes_of(build(config))
    wrong = _wrong(there, needed)
    if not wrong:
        return []
    first = min(wrong)
    lines = [f"{first} has to be {list(needed[first])}, and is {list(there[first])}"]
    for key, value in _candidates(config, wrong, there, needed):
        try:
            made = shapes_of(build(_with(config, key, value)))
        except CheckpointError:
            continue
        left = _wrong(made, needed)
        if made[first] == there[first] or (made[first] != needed[first] and len(lines) > 1):
            continue
        said = f"{'.'.join(key)}: {value} makes it {list(made[first])}"
        if made[first] == needed[first] and left:
            other = min(left, key=lambda n: (there.get(n) != needed[n], n))  # one that was right is the best reason
            said += f", and with it {other} {list(made[other])}, where the growth needs {list(needed[other])}"
        lines.append(said)
    if len(lines) == 1:
        lines.append("no single setting of the config makes it so")
    return lines[:4]


def _wrong(there: Shapes, needed: Shapes) -> list[str]:
    return [n for n, shape in needed.items() if n in there and there[n] != shape]


def _candidates(
    config: Mapping[str, Any], wrong: list[str], there: Shapes, needed: Shapes
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Settings, and what they would be if they grew as a dim has to."""
    factors = dict.fromkeys(
        (new, old) for n in wrong for old, new in zip(there[n], needed[n], strict=False) if old != new and old
    )
    tried = 0
    for key, value in _numbers(config):
        for new, old in factors:
            if value * new % old == 0 and (value == old or old % value == 0) and tried < _TRIES:
                tried += 1
                yield key, value * new // old
                break


def _numbers(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for name, value in config.items():
        if type(value) is int and value > 1 and not name.endswith("_id"):
            yield (*path, name), value
        elif isinstance(value, Mapping) and len(path) < 2:
            yield from _numbers(value, (*path, name))


def _with(config: Mapping[str, Any], key: tuple[str, ...], value: int) -> dict[str, Any]:
    head, *rest = key
    return {**config, head: _with(config[head], tuple(rest), value) if rest else value}
