"""What the models of a schedule have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Takes no field that it does not know, and no infinity; does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def exactly_one(model: BaseModel, *names: str) -> None:
    """Check that one of some optional fields is given.

    Raises:
        ValueError: none or several are.
    """
    if sum(getattr(model, name) is not None for name in names) != 1:
        raise ValueError(f"give exactly one of {', '.join(n.rstrip('_') for n in names)}")


__all__ = ["Strict", "exactly_one"]
