"""Sums of products: linear, matrix products, einsum, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx

from fxgrow.algebra import Conflict, factors_of, is_static, is_unit, size_of
from fxgrow.ir.ops import op_name
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, moves, register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Pattern
from fxgrow.rules.resize import Resize

register_rule("aten.linear.default", Pattern("... i, o i, o? -> ... o", ["input", "weight", "bias"], sum="i"))
register_rule("aten.mm.default", Pattern("m k, k n -> m n", ["self", "mat2"], sum="k"))
register_rule("aten.mv.default", Pattern("m k, k -> m", ["self", "vec"], sum="k"))
register_rule("aten.dot.default", Pattern("k, k ->", ["self", "tensor"], sum="k"))
register_rule("aten.vdot.default", Pattern("k, k ->", ["self", "other"], sum="k"))
register_rule(["aten.outer.default", "aten.ger.default"], Pattern("m, n -> m n", ["self", "vec2"]))


def _bias_letters(bias: Dims, letters: Sequence[str]) -> str:
    """The pattern of a bias that broadcasts against dims named by letters: a dim of size 1 shares no letter."""
    names = letters[len(letters) - len(bias) :]
    return " ".join(x if not is_unit(d) else f"{x}1" for x, d in zip(names, bias, strict=True))


class AddMM(Rule):
    """``beta * bias + alpha * a @ b``; the bias broadcasts."""

    def _pattern(self, ctx: Context) -> Pattern:
        bias = _bias_letters(ctx.operand("self"), "mn")
        return Pattern(f"{bias}, m k, k n -> m n", ["self", "mat1", "mat2"], sum="k", bias=("self",))

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._pattern(ctx).relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._pattern(ctx).grow(ctx)


register_rule("aten.addmm.default", AddMM())


class Matched(Rule):
    """A contraction whose pattern follows from the ranks of its operands and its arguments."""

    def __init__(self, pattern: Callable[[Any], Pattern]) -> None:
        self.pattern = pattern

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self.pattern(ctx).relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self.pattern(ctx).grow(ctx)


def _addmv(ctx: Context) -> Pattern:
    bias = _bias_letters(ctx.operand("self"), "m")
    return Pattern(f"{bias}, m k, k -> m", ["self", "mat", "vec"], sum="k", bias=("self",))


def _addr(ctx: Context) -> Pattern:
    return Pattern(f"{_bias_letters(ctx.operand('self'), 'mn')}, m, n -> m n", ["self", "vec1", "vec2"], bias=("self",))


def _addbmm(ctx: Context) -> Pattern:
    bias = _bias_letters(ctx.operand("self"), "mn")
    return Pattern(f"{bias}, b m k, b k n -> m n", ["self", "batch1", "batch2"], sum="b k", bias=("self",))


def _tensordot(ctx: Context) -> Pattern:
    """Pairs of dims are contracted; what is left of the first operand comes before what is left of the second."""
    a, b = (len(ctx.operand(x)) for x in ("self", "other"))
    pairs = [(i % a, j % b) for i, j in zip(ctx.args["dims_self"], ctx.args["dims_other"], strict=True)]
    left = [f"a{i}" for i in range(a)]
    right = [f"b{j}" for j in range(b)]
    for k, (i, j) in enumerate(pairs):
        left[i] = right[j] = f"k{k}"
    out = [x for x in (*left, *right) if not x.startswith("k")]
    summed = " ".join(f"k{k}" for k in range(len(pairs)))
    return Pattern(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}", ["self", "other"], sum=summed)


def _inner(ctx: Context) -> Pattern:
    """The last dims are contracted."""
    ranks = [len(ctx.operand(x)) for x in ("self", "other")]
    if 0 in ranks:
        raise Conflict("an inner product with a scalar")
    left, right = ([f"{x}{i}" for i in range(n - 1)] for x, n in zip("ab", ranks, strict=True))
    return Pattern(
        f"{' '.join([*left, 'k'])}, {' '.join([*right, 'k'])} -> {' '.join(left + right)}", ["self", "other"], sum="k"
    )


def _vecdot(ctx: Context) -> Pattern:
    ranks = [len(ctx.operand(x)) for x in ("x", "y")]
    rank = max(ranks)
    at = int(ctx.args["dim"]) % rank
    letters = ["k" if i == at else f"d{i}" for i in range(rank)]
    terms = [_bias_letters(ctx.operand(x), letters) for x in ("x", "y")]
    out = [
        f"{x}1" if all(f"{x}1" in t.split() or x not in t.split() for t in terms) else x for x in letters if x != "k"
    ]
    if ctx.node.meta["val"].is_complex():
        raise Conflict("an inner product of complex vectors")
    return Pattern(f"{', '.join(terms)} -> {' '.join(out)}", ["x", "y"], sum="k")


def _kron(ctx: Context) -> Pattern:
    """Every dim is the product of the operands' dims."""
    a, b = (len(ctx.operand(x)) for x in ("self", "other"))
    rank = max(a, b)
    left, right = ([f"{x}{i}" for i in range(rank - n, rank)] for x, n in (("a", a), ("b", b)))
    pairs = [[x for x in (f"a{i}", f"b{i}") if x in (*left, *right)] for i in range(rank)]
    return Pattern(
        f"{' '.join(left)}, {' '.join(right)} -> {' '.join('(' + ' '.join(p) + ')' for p in pairs)}", ["self", "other"]
    )


def _multi_dot(ctx: Context) -> Pattern:
    """A chain of matrices, whose ends may be vectors."""
    nodes = list(ctx.args["tensors"])
    names = [f"tensors{i}" for i in range(len(nodes))]
    ctx.args = {**ctx.args, **dict(zip(names, nodes, strict=True))}
    terms = [f"k{i} k{i + 1}" for i in range(len(nodes))]
    if len(ctx.operand("tensors0")) == 1:
        terms[0] = "k1"
    if len(ctx.operand(names[-1])) == 1:
        terms[-1] = f"k{len(nodes) - 1}"
    ends = [x for x in ("k0", f"k{len(nodes)}") if any(x in t.split() for t in terms)]
    inner = " ".join(f"k{i}" for i in range(1, len(nodes)))
    return Pattern(f"{', '.join(terms)} -> {' '.join(ends)}", names, sum=inner, bias=())


for _name, _of in (
    ("addmv", _addmv),
    ("addr", _addr),
    ("addbmm", _addbmm),
    ("tensordot", _tensordot),
    ("inner", _inner),
    ("linalg_vecdot", _vecdot),
    ("kron", _kron),
    ("linalg_multi_dot", _multi_dot),
):
    register_rule(f"aten.{_name}.default", Matched(_of))


class BAddBMM(Rule):
    """``beta * bias + alpha * a @ b`` over a batch; the bias broadcasts."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        a, b = ctx.dims("batch1"), ctx.dims("batch2")
        assert a is not None and b is not None
        for dim in factors_of(a[0])[1:]:
            ctx.role(dim, "heads")
        if is_static(size_of(a[-1])):
            ctx.role(a[-1], "head_dim")
        return self._pattern(ctx).relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._pattern(ctx).grow(ctx)

    @staticmethod
    def _pattern(ctx: Context) -> Pattern:
        bias = _bias_letters(ctx.operand("self"), "bmn")
        return Pattern(f"{bias}, b m k, b k n -> b m n", ["self", "batch1", "batch2"], sum="k", bias=("self",))


register_rule("aten.baddbmm.default", BAddBMM())

_PASSES = ("dropout", "to", "_to_copy", "contiguous", "clone", "mul", "div", "type_as", "view", "reshape", "expand")


def after_softmax(node: Any) -> bool:
    """Whether a value is attention weights: a softmax, seen through dropout, casts and views."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = op_name(node.target).removeprefix("aten.").partition(".")[0].strip("_")
        if "softmax" in name:
            return True
        if name not in {p.strip("_") for p in _PASSES} or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return False


def is_weight(value: Any) -> bool:
    """Whether a value is a parameter, or entries picked from one (the experts of a router)."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.all_input_nodes:
        name = op_name(value.target)
        if not moves(value) and name not in _PICKS:
            return False
        value = value.all_input_nodes[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


_PICKS = ("aten.index.Tensor", "aten.index_select.default", "aten.gather.default")


class MatMul(Rule):
    """``torch.matmul`` at every rank; between two activations it is attention, and names its axes so."""

    operands = ("self", "other")

    def _pattern(self, ctx: Context) -> Pattern:
        a, b = (len(ctx.operand(x)) for x in self.operands)
        left = "k" if a == 1 else ("m k" if a == 2 and b <= 2 else "... m k")
        right = "k" if b == 1 else ("k n" if b == 2 else "... k n")
        out = " ".join((["..."] if "..." in left + right else []) + (["m"] if a > 1 else []) + (["n"] if b > 1 else []))
        return Pattern(f"{left}, {right} -> {out}", list(self.operands), sum="k")

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        a, b = (ctx.dims(x) for x in self.operands)
        assert a is not None and b is not None
        left, right = (ctx.args[x] for x in self.operands)
        if len(a) > 2 and len(b) > 2 and not (is_weight(left) or is_weight(right)):
            for dim in (*a[1:-2], *b[1:-2]):
                ctx.role(dim, "heads")
            if after_softmax(left):
                ctx.role(b[-1], "value_dim")
            elif is_static(size_of(a[-1])):
                ctx.role(a[-1], "head_dim")
            if len(a) == len(b) == 3:  # batch and heads in one dim
                for dim in factors_of(a[0])[1:]:
                    ctx.role(dim, "heads")
        return self._pattern(ctx).relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._pattern(ctx).grow(ctx)


class BatchMatMul(MatMul):
    operands = ("self", "mat2")


register_rule("aten.matmul.default", MatMul())
register_rule("aten.bmm.default", BatchMatMul())


class Einsum(Rule):
    """``torch.einsum``: its equation is the rule; between two activations it is attention, and names its axes so."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        self._name(ctx)
        return self._run(ctx, "relate")

    @staticmethod
    def _name(ctx: Context) -> None:
        left, _, right = str(ctx.args["equation"]).replace(" ", "").partition("->")
        terms, nodes = left.split(","), list(ctx.args["tensors"])
        if len(terms) != 2 or "." in left or not right or any(map(ctx.from_parameter, nodes)):
            return
        dims = [dict(zip(t, ctx.dims(n) or [], strict=False)) for t, n in zip(terms, nodes, strict=True)]
        batch = [x for x in terms[0] if x in terms[1] and x in right]
        summed = [x for x in terms[0] if x in terms[1] and x not in right]
        if len(batch) < 2 or len(summed) != 1:
            return
        for letter in batch[1:]:
            for d in dims:
                ctx.role(d[letter], "heads")
        if after_softmax(nodes[0]):
            for letter in terms[1]:
                if letter not in terms[0]:
                    ctx.role(dims[1][letter], "value_dim")
        elif is_static(size_of(dims[0][summed[0]])):
            ctx.role(dims[0][summed[0]], "head_dim")

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._run(ctx, "grow")

    def _run(self, ctx: Context, method: str) -> Dims | list[Dims] | None:
        equation = str(ctx.args["equation"]).replace(" ", "")
        left, arrow, right = equation.partition("->")
        if not arrow:
            letters = sorted(set(left.replace("...", "")) - {","})
            right = ("..." if "..." in left else "") + "".join(x for x in letters if left.count(x) == 1)
        terms = left.split(",")
        nodes = list(ctx.args["tensors"])
        names = [f"tensors{i}" for i in range(len(nodes))]
        ctx.args = {**ctx.args, **dict(zip(names, nodes, strict=True))}
        if any(len(set(t)) != len(t) for t in (x.replace("...", "") for x in terms)):
            raise Conflict(f"einsum {equation!r} takes a diagonal")

        def spaced(term: str) -> str:
            return " ".join("..." if c == "@" else c for c in term.replace("...", "@"))

        summed = sorted(set(left) - set(right) - set(",."))
        if "..." in left and "..." not in right:
            raise Conflict(f"einsum {equation!r} sums over its unnamed dims")
        for letter in summed:
            if sum(letter in t for t in terms) == 1:
                raise Conflict(f"einsum {equation!r} sums {letter!r} of one operand alone")
        rule = Pattern(", ".join(map(spaced, terms)) + " -> " + spaced(right), names, sum=" ".join(summed), bias=())
        return getattr(rule, method)(ctx)


register_rule("aten.einsum.default", Einsum())
register_rule(
    "aten.bilinear.default",
    Pattern("... i, ... j, o i j, o? -> ... o", ["input1", "input2", "weight", "bias"], sum="i j"),
)


class Convolution(Rule):
    """Convolutions of any rank and group count, with or without a batch; the spatial extents do not grow."""

    def __init__(self, pattern: str) -> None:
        def rule(text: str) -> Pattern:
            return Pattern(
                text,
                ["input", "weight", "bias"],
                sum="i",
                why="the spatial extent of a convolution",
                sizes=lambda args: {"g": args["groups"]},
                roles={"g": "channels", "o": "channels", "i": "channels"},
                literals={"groups": "g"},
            )

        self.batched, self.single = rule(pattern), rule(pattern.replace("b (g", "(g"))

    def _pattern(self, rank: int, weight: int) -> Pattern:
        return self.batched if rank == weight else self.single

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        x, weight = ctx.dims("input") or [], ctx.dims("weight") or []
        pattern = self._pattern(len(x), len(weight))
        for dims, role in ((x, "spatial"), (weight, "kernel")):
            for dim in dims[len(dims) - len(weight) + 2 :]:
                ctx.freeze(dim, pattern.why)
                ctx.role(dim, role, 100)
        out = cast(Dims, pattern.relate(ctx))
        for dim in out[len(out) - len(weight) + 2 :]:
            ctx.role(dim, "spatial", 100)
        return out

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._pattern(len(ctx.dims("input") or []), len(ctx.dims("weight") or [])).grow(ctx)

    def resize(self, ctx: Resize) -> None:
        if ctx.args["groups"] != 1:
            self._pattern(len(ctx.dims(ctx.args["input"])), len(ctx.dims(ctx.args["weight"]))).resize(ctx)


register_rule(
    [f"aten.conv{n}d.{o}" for n in (1, 2, 3) for o in ("default", "padding")],
    Convolution("b (g i) *, (g o) i *, (g o)? -> b (g o) *"),
)
register_rule(
    ["aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"],
    Convolution("b (g i) *, (g i) o *, (g o)? -> b (g o) *"),
)
