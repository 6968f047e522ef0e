"""Losses whose targets number the entries of a dim: the classes."""

from __future__ import annotations

from torch import fx

from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque


def table() -> dict[str, Rule]:
    """The rows of this family."""
    return {
        "aten.cross_entropy_loss aten.nll_loss aten.nll_loss_nd": ClassLoss(),
        "aten.cosine_embedding_loss aten.margin_ranking_loss aten.triplet_margin_loss": Opaque(_AVERAGES),
        "aten.multi_margin_loss aten.multilabel_margin_loss": Opaque(_AVERAGES),
        "aten.ctc_loss.IntList aten.ctc_loss.Tensor": Opaque(_AVERAGES),
    }


_AVERAGES = "the loss averages over it"


class ClassLoss(Rule):
    """Losses over classes: the class dim is what the targets number, the result is a scalar or per sample."""

    special = "what is frozen has two reasons and a name: the classes, which targets number, and the samples"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    @property
    def depends_on_all(self) -> bool:
        return True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("self")
        classes = dims[1] if len(dims) > 1 else dims[0]
        ctx.role(classes, "vocab", 10)
        ctx.freeze(classes, "the loss runs over it and targets number its entries")
        for _, other in ctx.tensor_operands():
            for d in other:
                ctx.freeze(d, "the loss runs over it")
        found: Dims | list[Dims] | None = ctx.opaque_results("the loss runs over it")
        return found

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        raise ctx.refuse("the loss runs over it")


register_table(__name__, table())
