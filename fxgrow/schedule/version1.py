"""Schedules as fxgrow 0.1 wrote them: growths alone, with the learning rate and the accumulation as fields of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.schedule.base import Strict
from fxgrow.spec import Count


class _Unchanged(Strict):
    policy: Literal["none"] = "none"


class _Rewarm(Strict):
    policy: Literal["rewarm"] = "rewarm"
    steps: Count = Field(gt=0)
    from_: float = Field(0.0, ge=0, le=1e6, alias="from")


class _Scale(Strict):
    policy: Literal["scale"] = "scale"
    factor: float = Field(gt=0, le=1e6)


_RATES: dict[str, type[_Unchanged | _Rewarm | _Scale]] = {"none": _Unchanged, "rewarm": _Rewarm, "scale": _Scale}
_FACTOR: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)])


def is_version_1(given: Mapping[str, Any]) -> bool:
    """Whether a schedule is of the first version, by its number or its key."""
    return given.get("version", 1) == 1 and "growths" in given


def from_version_1(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same as the second version says it.

    Raises:
        SpecError: a field that only the first version has is wrong.
    """
    growths = given["growths"]
    if isinstance(growths, list):
        growths = [_event(growth, f"{where}: growths.{number}") for number, growth in enumerate(growths)]
    return {**{k: v for k, v in given.items() if k != "growths"}, "version": 2, "events": growths}


def _event(growth: Any, place: str) -> Any:
    if not isinstance(growth, Mapping) or not isinstance(growth.get("operations"), list):
        return growth
    more = [*_rate(growth.get("learning_rate", "none"), f"{place}.learning_rate")]
    try:
        factor = _FACTOR.validate_python(growth.get("accumulation", 1.0))
    except ValidationError as error:
        raise SpecError(f"{place}.accumulation: {error.errors()[0]['msg']}") from None
    if factor != 1:
        more.append({"op": "accumulation", "factor": factor})
    kept = {k: v for k, v in growth.items() if k not in ("learning_rate", "accumulation")}
    return {**kept, "operations": [*growth["operations"], *more]}


def _rate(given: Any, place: str) -> list[dict[str, Any]]:
    given = {"policy": given} if isinstance(given, str) else given
    policy = given.get("policy") if isinstance(given, Mapping) else given
    kind = _RATES.get(policy) if isinstance(policy, str) else None
    if kind is None:
        near = did_you_mean(str(policy), _RATES)
        raise SpecError(f"{place}: no such learning-rate policy {str(policy)[:40]!r}; {near}")
    try:
        rate = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"{'.'.join([place, *map(str, first['loc'])])}: {first['msg']}") from None
    if isinstance(rate, _Scale):
        return [{"op": "learning_rate", "scale": rate.factor}]
    return [{"op": "learning_rate", "rewarm": rate.steps, "from": rate.from_}] if isinstance(rate, _Rewarm) else []


__all__ = ["from_version_1", "is_version_1"]
