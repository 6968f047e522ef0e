"""One rule per ATen op: how its dims are related, what growth does to it, which literals depend on sizes.

Each file registers the rules of one kind of op in :data:`RULES`.
"""

from fxgrow.rules import (  # noqa: F401 - importing them registers their rules
    aliases,
    attention,
    classes,
    contraction,
    creation,
    distance,
    indexing,
    loss,
    norm,
    order,
    pointwise,
    recurrent,
    reduction,
    scatter,
    shape,
    spectral,
)
from fxgrow.rules.annotation import Content
from fxgrow.rules.base import RULES, Rule, register_rule
from fxgrow.rules.forms import Along, Opaque, Pattern, Pointwise, Structural

__all__ = ["RULES", "Along", "Content", "Opaque", "Pattern", "Pointwise", "Rule", "Structural", "register_rule"]
