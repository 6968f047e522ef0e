"""What a regenerated module remembers: the program it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxgrow.ir.traced import Traced

_KEY = "fxgrow"

#: dtypes to the dtypes that they were cast to
Cast = Mapping[torch.dtype, torch.dtype]
#: after these casts, one after another: the program, and its constants; None where the model is gone
Recast = Callable[[tuple[Cast, ...]], "tuple[Traced, Mapping[str, torch.Tensor]] | None"]


@dataclass(frozen=True)
class Provenance:
    """Where a module comes from.

    Attributes:
        program: with shapes in place of tensors.
        code: as it was generated; empty for a module that was not.
        graphs: of a module that has one for each of several ways of calling it.
        casts: of the module since it was made.
        recast: makes the program anew in other dtypes, from the model that it was made from.
    """

    program: Traced
    code: str = ""
    graphs: tuple[fx.Graph, ...] = ()
    casts: tuple[Cast, ...] = ()
    recast: Recast | None = None


def remember(module: fx.GraphModule, what: Provenance) -> None:
    module.meta[_KEY] = what


def provenance_of(module: nn.Module) -> Provenance | None:
    """What a module remembers; None for one that was not made from a program."""
    # a graph module has no ``meta`` while its constructor runs
    found = getattr(module, "meta", {}).get(_KEY) if isinstance(module, fx.GraphModule) else None
    return Provenance(found) if isinstance(found, Traced) else found


def edited(module: fx.GraphModule) -> bool:
    """Whether somebody changed a regenerated module since it was made."""
    found = provenance_of(module)
    return found is None or code_of(module) != found.code


def code_of(module: fx.GraphModule) -> str:
    """The generated code of a module and its blocks, to be remembered with it."""
    return "\n".join(
        [module.code, *(m.code for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]
    )
