"""What fxgrow knows of a node, besides the example value that torch keeps in ``node.meta["val"]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from fxgrow.algebra import Size

_KEY = "fxgrow"


class NodeInfo(NamedTuple):
    """Where a node comes from, and what it stands for; a tuple, since deepening copies thousands of them.

    Attributes:
        module_path: the module that the op ran in.
        module_call: the same with a mark where that module was called before (``layer@1``).
        source: the user's line.
        call: number of the way of calling the model that the node is of.
        input: the forward parameter, or the leaf of one, that a placeholder stands for.
        sizes: of its tensor, where they are other ones than those of the example value.
        result_sizes: the same of each result, of an op with several.
        is_flag: it depends on the module's mode alone.
        rescale: a growth inserted it, to multiply a value by a constant.
        checkpointed: it ran under activation checkpointing.
        numbers: what the model's class computes for arguments of the op, by name, where growth put other numbers there.
    """

    module_path: str = ""
    module_call: str = ""
    source: str = ""
    call: int = 0
    input: str | None = None
    sizes: Sequence[Size] | None = None
    result_sizes: Sequence[Sequence[Size] | None] | None = None
    is_flag: bool = False
    rescale: bool = False
    checkpointed: bool = False
    numbers: tuple[tuple[str, float | None], ...] = ()

    def inside(self, path: str) -> bool:
        """Whether the op ran in a module, or in one within it."""
        return self.module_path == path or self.module_path.startswith(path + ".")


_NOTHING = NodeInfo()


def info_of(node: fx.Node) -> NodeInfo:
    """What is known of a node."""
    found: NodeInfo = node.meta.get(_KEY, _NOTHING)
    return found


def note(node: fx.Node, **changes: Any) -> None:
    """Set fields of what is known of a node."""
    node.meta[_KEY] = info_of(node)._replace(**changes)


def meta_of(val: Any, info: NodeInfo = _NOTHING) -> dict[str, Any]:
    """Metadata of a new node."""
    return {"val": val, _KEY: info}


def meta_like(node: fx.Node, **changes: Any) -> dict[str, Any]:
    """Metadata of another op in the place of one, with some fields of what is known of that changed.

    What growth did to the one's own arguments is not the other's.
    """
    return meta_of_copy(node, **{"rescale": False, "numbers": (), **changes})


def meta_of_copy(node: fx.Node, **changes: Any) -> dict[str, Any]:
    """Metadata of the same op at another place, with some fields of what is known of it changed."""
    return {**node.meta, _KEY: info_of(node)._replace(**changes)}
