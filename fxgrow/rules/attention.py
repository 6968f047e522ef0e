"""Scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

from fxgrow.algebra import Conflict, Expr, is_unit, resolve, size_of
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context, GrowthContext


def table() -> dict[str, Rule]:
    """Attention is one op."""
    return {"aten.scaled_dot_product_attention": ScaledDotProductAttention()}


class ScaledDotProductAttention(Rule):
    """``softmax(q k^T * scale + mask) v``: "... h q k, ... h s k, ... h s v -> ... h q v".

    Heads pass. The query-key width is contracted between two activations: n copies multiply the scores by n, which the
    literal ``scale`` takes back; new width is exact where the keys (or the queries) are zero. The default scale
    ``1/sqrt(k)`` depends on the size and becomes a literal. Grouped queries (``enable_gqa``) split the query heads into
    kv_heads x group.
    """

    special = "a sum, a softmax and a sum in one, whose scale follows a size, and heads in groups"

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        q, k, v = (ctx.dims(x) for x in ("query", "key", "value"))
        assert q is not None and k is not None and v is not None
        if ctx.args.get("dropout_p") is not None and len({len(q), len(k), len(v)}) != 1:
            raise Conflict("query, key and value differ in rank")
        ctx.unify(q[-1], k[-1])
        ctx.unify(k[-2], v[-2])
        ctx.freeze(k[-2], "softmax runs over it")
        ctx.role(q[-1], "head_dim")
        ctx.role(v[-1], "value_dim")
        lead: Dims = []
        for i in range(len(q) - 2):
            a, b, c = q[i], k[i], v[i]
            self._pair(ctx, b, c)
            if ctx.args.get("enable_gqa") and i == len(q) - 3 and size_of(a) != size_of(b):
                kv, group = ctx.regroup([a], [size_of(b), size_of(a) // size_of(b)])
                ctx.unify(kv, b)
                ctx.role(b, "kv_heads", 2)
                ctx.role(group, "groups")
                ctx.role(group, "heads")
            else:
                self._pair(ctx, a, b)
                if i == len(q) - 3 and i > 0:
                    ctx.role(a, "heads")
            lead.append(resolve(a) if not is_unit(a) else resolve(b))
        mask = ctx.dims("attn_mask")
        if mask is not None:
            full = [*lead, q[-2], k[-2]]
            for i in range(1, len(mask) + 1):
                if not is_unit(mask[-i]):
                    ctx.unify(mask[-i], full[-i])
        return [*lead, resolve(q[-2]), resolve(v[-1])]

    @staticmethod
    def _pair(ctx: Context, a: Expr, b: Expr) -> None:
        if not is_unit(a) and not is_unit(b):
            ctx.unify(a, b)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        q, k, v = (ctx.dims(x) for x in ("query", "key", "value"))
        assert q is not None and k is not None and v is not None
        scale = ctx.args.get("scale")
        if ctx.grows(q[-1]) or ctx.grows(k[-1]):
            old = float(scale) if scale is not None else 1.0 / math.sqrt(size_of(q[-1]))
            factor = ctx.contract([q[-1], k[-1]], ["query", "key"], zero="key")
            ctx.edit("scale", old / factor)
        if ctx.grows(k[-2]) or ctx.grows(q[-2]):
            raise ctx.refuse("attention over a growing sequence")
        lead: Dims = []
        for i in range(len(q) - 2):
            a, b, c = q[i], k[i], v[i]
            if not any(ctx.grows(x) for x in (a, b, c)):
                lead.append(a if not is_unit(a) else b)
                continue
            if ctx.in_eval and isinstance(ctx.args.get("dropout_p"), int | float) and ctx.args["dropout_p"] > 0:
                raise ctx.refuse(
                    "it drops weights at random in eval mode too, and every copy would have a draw of its own. Give it "
                    "the module's mode: dropout_p=p if self.training else 0"
                )
            for x in (a, b, c):
                ctx.close(x)
            if ctx.args.get("enable_gqa") and size_of(a) != size_of(b):
                lead.append(annotate(a, lambda info: info.becomes(Content.FREE, zeroable=False)))
                continue
            total = a
            for x in (b, c):
                total = ctx.combine(total, x, "any")
            mask = ctx.dims("attn_mask") or []
            place = len(mask) - len(q) + i
            if place >= 0 and not is_unit(mask[place]):
                total = ctx.combine(total, mask[place], "any")
            lead.append(ctx.close(self._value_content(total, c)))
        return [*lead, q[-2], ctx.close(v[-1])]

    @staticmethod
    def _value_content(total: Expr, value: Expr) -> Expr:
        """A head with zero values gives zero whatever its scores are."""
        zero = iter(infos(value))

        def one(info: Info) -> Info:
            mine: Any = next(zero, None)
            if mine is None:
                return info
            return mine.becomes(Content.ZERO) if mine.content is Content.ZERO else mine.becomes(info.content)

        return annotate(total, one)


register_table(__name__, table())
