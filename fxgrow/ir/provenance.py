"""What a regenerated module remembers: the program it was made from."""

from __future__ import annotations

from torch import fx


def code_of(module: fx.GraphModule) -> str:
    """The generated code of a module and its blocks, to tell whether somebody changed it."""
    return "\n".join(
        [module.code, *(m.code for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]
    )
