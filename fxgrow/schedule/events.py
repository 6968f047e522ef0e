"""One event of a schedule: when, what, and what happens to the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.limits import OPERATIONS
from fxgrow.schedule.actions import ACTIONS, Action
from fxgrow.schedule.aliases import ALIASES, expanded
from fxgrow.schedule.base import Strict
from fxgrow.schedule.triggers import Trigger
from fxgrow.spec import Count, GrowthSpec, Operation
from fxgrow.spec import operations as growth_operations


class OptimizerPolicy(Strict):
    """What happens to the optimizer's state (RECIPES: SPARKLING 2026 for ``asymmetric``, Shen 2022 for ``exact``)."""

    policy: Literal["exact", "asymmetric", "copy", "reset"] = Field(
        "asymmetric",
        description="exact: the grown model takes the steps that the small one would; asymmetric: old entries keep "
        "their state, new ones start without momentum and warm up; copy: copies inherit the state; reset: no state",
    )
    warmup: Count = Field(
        250, ge=0, description="asymmetric: steps over which the learning rate of new entries warms up"
    )
    peak: float | None = Field(
        None, gt=0, le=1e6, description="asymmetric: the highest learning rate of new entries, as a factor"
    )
    ramp: Count | None = Field(
        None,
        ge=1,
        description="exact: steps over which the per-slice learning rates go back to the common one; none: never",
    )


@dataclass(frozen=True)
class Grow:
    """Growth operations that stand one after the other: they make one growth."""

    spec: GrowthSpec
    optimizer: OptimizerPolicy

    @property
    def op(self) -> str:
        return "grow"


class Event(Strict):
    """What a schedule does at one moment: operations, one after the other."""

    name: str | None = Field(None, description="a label for logs and pictures")
    trigger: Trigger
    operations: list[Any] = Field(
        min_length=1,
        max_length=OPERATIONS,
        description="those of a growth spec, and what else a schedule does; growth operations in a row are one growth",
    )
    optimizer: OptimizerPolicy = Field(
        default_factory=lambda: OptimizerPolicy.model_validate({}), description="what a growth does to the optimizer"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="an operation that is refused ends the run, or is left out and logged; nothing is half done"
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _bare_policy(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @property
    def actions(self) -> list[Grow | Action]:
        """What happens, in order: every one is done as a whole or not at all."""
        out: list[Grow | Action] = []
        growing: list[Any] = []
        for operation in [*self.operations, None]:
            if isinstance(operation, Operation):
                growing.append(operation)
                continue
            if growing:
                out.append(Grow(GrowthSpec(operations=growing), self.optimizer))
                growing = []
            if operation is not None:
                out.append(operation)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; :func:`parse_event` reads it back."""
        data = self.model_dump(exclude_defaults=True, by_alias=True, exclude={"operations"})
        dump = {"exclude_defaults": True, "by_alias": True}
        data["operations"] = [{"op": op.op, **op.model_dump(**dump)} for op in self.operations]
        return data


def read_operations(given: list[Any]) -> tuple[list[Operation | Action], list[str]]:
    """Operations of both kinds from plain data, by their ``op``.

    Returns:
        Them, and one line for each mistake, with the operation's number and field.
    """
    read: list[Operation | Action] = []
    mistakes: list[str] = []
    for number, operation in enumerate(given):
        place = f"operations.{number}"
        try:
            read.append(_read(operation, place))
        except SpecError as error:
            mistakes += str(error).splitlines()
    return read, mistakes


def _read(given: Any, place: str) -> Operation | Action:
    if isinstance(given, Operation | Action):
        return given
    try:
        given = expanded(given)
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from None
    name = given.get("op") if isinstance(given, Mapping) else None
    if name in ACTIONS:
        try:
            return ACTIONS[str(name)].model_validate(given)
        except ValidationError as error:
            raise SpecError("\n".join(_explained(error, ACTIONS[str(name)], place))) from None
    known = growth_operations()
    if isinstance(name, str) and name not in known:
        near = did_you_mean(name, [*known, *ACTIONS, *ALIASES])
        raise SpecError(f"{place}: no such operation {name!r}; {near}")
    try:
        operation: Operation = GrowthSpec(operations=[given]).operations[0]
    except SpecError as error:
        lines = (line.removeprefix("spec: ").replace("operations.0", place, 1) for line in str(error).splitlines())
        raise SpecError("\n".join(lines)) from None
    return operation


def _explained(error: ValidationError, kind: type[Action], place: str) -> Iterator[str]:
    known = [f.alias or name for name, f in kind.model_fields.items()]
    for item in error.errors():
        path = ".".join([place, *(str(part) for part in item["loc"])])
        message = " ".join(item["msg"].removeprefix("Value error, ").split())
        if item["type"] == "extra_forbidden":
            message = f"no such field; {did_you_mean(str(item['loc'][-1]), known)}"
        yield f"{path}: {message}"


__all__ = ["Event", "Grow", "OptimizerPolicy", "read_operations"]
