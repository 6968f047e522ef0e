"""What a regenerated module remembers: the program it was made from."""

from __future__ import annotations

from torch import fx


def edited(module: fx.GraphModule) -> bool:
    """Whether somebody changed a regenerated module since it was made."""
    return code_of(module) != module.meta.get("fxgrow_code")


def code_of(module: fx.GraphModule) -> str:
    """The generated code of a module and its blocks, to be remembered with it."""
    return "\n".join(
        [module.code, *(m.code for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]
    )
