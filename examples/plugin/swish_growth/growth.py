"""An operation: widen every axis of a role by the same factor."""

from __future__ import annotations

from typing import Literal

import fxgrow
from fxgrow import passes
from fxgrow.plan import Step
from fxgrow.spec import Operation, Widen


class WidenRole(Operation):
    """Widen every growable axis of a role."""

    op: Literal["widen_role"] = "widen_role"
    role: str
    factor: float = 2


class WidenRolePass(passes.GrowthPass):
    """Steps of this operation are made of ``widen``'s."""

    op = "widen_role"


def plan_widen_role(state: passes.State, operation: WidenRole) -> list[Step]:
    """The steps, one axis after another."""
    names = [a.name for a in state.axes if a.role == operation.role and a.growable]
    if not names:
        known = ", ".join(sorted({a.role for a in state.axes if a.growable}))
        raise fxgrow.SpecError(f"widen_role: no axis has the role {operation.role!r}; there are {known}")
    return [step for name in names for step in passes.run_operation(state, Widen(axis=name, factor=operation.factor))]


def register() -> None:
    """What the entry point of group ``fxgrow.passes`` calls."""
    passes.register_pass("widen_role", plan_widen_role, WidenRolePass)
