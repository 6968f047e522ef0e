"""Sums of products: linear, matrix products, einsum, convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxgrow.algebra import Conflict, factors_of, is_static, is_unit, size_of
from fxgrow.ir.ops import op_name
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, is_linear, moves, register_table, rule_of
from fxgrow.rules.context import Context, Matches
from fxgrow.rules.forms import Pattern, Pointwise
from fxgrow.rules.forms.pattern import missing_in_result


def table() -> dict[str, Rule]:
    """The rows of contractions."""
    convolution = Pattern(
        _convolution,
        ["input", "weight", "bias"],
        sum="i",
        why="the spatial extent of a convolution",
        roles=CONVOLVED,
        literals={"groups": "g"},
        weights=("weight", "bias"),
    )
    return {
        # layers
        "aten.linear": Pattern(
            "... i, o i, o? -> ... o", ["input", "weight", "bias"], sum="i", weights=("weight", "bias")
        ),
        "aten.bilinear": Pattern(
            "... i, ... j, o i j, o? -> ... o",
            ["input1", "input2", "weight", "bias"],
            sum="i j",
            weights=("weight", "bias"),
        ),
        """
        aten.conv1d aten.conv2d aten.conv3d
        aten.conv1d.padding aten.conv2d.padding aten.conv3d.padding
        """: convolution,
        "aten.conv_transpose1d aten.conv_transpose2d.input aten.conv_transpose3d.input": dataclasses.replace(
            convolution, pattern=_transposed_convolution
        ),
        # products of two
        "aten.mm": Pattern("m k, k n -> m n", ["self", "mat2"], sum="k"),
        "aten.bmm": Pattern("b m k, b k n -> b m n", ["self", "mat2"], sum="k", roles=of_attention),
        "aten.matmul": Pattern(_matmul, ["self", "other"], sum="k", roles=of_attention),
        "aten.mv": Pattern("m k, k -> m", ["self", "vec"], sum="k"),
        "aten.dot": Pattern("k, k ->", ["self", "tensor"], sum="k"),
        "aten.vdot": Pattern("k, k ->", ["self", "other"], sum="k"),
        "aten.linalg_vecdot": Pattern(_vecdot, ["x", "y"], sum="k"),
        "aten.inner": Pattern(_inner, ["self", "other"], sum="k"),
        "aten.outer aten.ger": Pattern("m, n -> m n", ["self", "vec2"]),
        "aten.kron": Pattern(_kron, ["self", "other"]),
        "aten.tensordot": Pattern(_tensordot, ["self", "other"], sum=missing_in_result),
        # products of two, added to a third
        "aten.addmm": Pattern(
            "m n, m k, k n -> m n", ["self", "mat1", "mat2"], sum="k", bias=("self",), weights=("mat2", "self")
        ),
        "aten.addmv": Pattern("m, m k, k -> m", ["self", "mat", "vec"], sum="k", bias=("self",)),
        "aten.addr": Pattern("m n, m, n -> m n", ["self", "vec1", "vec2"], bias=("self",)),
        "aten.addbmm": Pattern("m n, b m k, b k n -> m n", ["self", "batch1", "batch2"], sum="b k", bias=("self",)),
        "aten.baddbmm": Pattern(
            "b m n, b m k, b k n -> b m n",
            ["self", "batch1", "batch2"],
            sum="k",
            bias=("self",),
            roles=of_attention,
        ),
        # products of any number
        "aten.linalg_multi_dot": Pattern(_multi_dot, ["tensors"], sum=missing_in_result),
        "aten.einsum": Pattern(_einsum, ["tensors"], sum=missing_in_result, roles=of_attention_by_einsum),
    }


# patterns that depend on the call -------------------------------------------------------------------------------------

#: what the axes of a convolution are called
CONVOLVED = {"g": "channels", "o": "channels", "i": "channels", "*x": "spatial", "*k": "kernel", "*y": "spatial"}


def _convolution(ctx: Matches) -> str:
    """b (g i) *x, (g o) i *k, (g o)? -> b (g o) *y, with or without b"""
    return _with_batch(ctx, "b (g i) *x, (g o) i *k, (g o)? -> b (g o) *y")


def _transposed_convolution(ctx: Matches) -> str:
    """b (g i) *x, (g i) o *k, (g o)? -> b (g o) *y, with or without b"""
    return _with_batch(ctx, "b (g i) *x, (g i) o *k, (g o)? -> b (g o) *y")


def _with_batch(ctx: Matches, pattern: str) -> str:
    single = len(ctx.operand("input")) < len(ctx.operand("weight"))
    return pattern.replace("b (g", "(g") if single else pattern


def _matmul(ctx: Matches) -> str:
    """... m k, ... k n -> ... m n, without m or n where an operand is a vector"""
    a, b = (len(ctx.operand(x)) for x in ("self", "other"))
    left = "k" if a == 1 else ("m k" if a == 2 and b <= 2 else "... m k")
    right = "k" if b == 1 else ("k n" if b == 2 else "... k n")
    out = " ".join((["..."] if "..." in left + right else []) + (["m"] if a > 1 else []) + (["n"] if b > 1 else []))
    return f"{left}, {right} -> {out}"


def _inner(ctx: Matches) -> str:
    """a0 a1 k, b0 b1 k -> a0 a1 b0 b1, at every rank: the last dims are contracted"""
    ranks = [len(ctx.operand(x)) for x in ("self", "other")]
    if 0 in ranks:
        raise Conflict("an inner product with a scalar")
    left, right = ([f"{x}{i}" for i in range(n - 1)] for x, n in zip("ab", ranks, strict=True))
    return f"{' '.join([*left, 'k'])}, {' '.join([*right, 'k'])} -> {' '.join(left + right)}"


def _vecdot(ctx: Matches) -> str:
    """d0 d1 k, d0 d1 k -> d0 d1, where k stands at dim; both broadcast"""
    ranks = [len(ctx.operand(x)) for x in ("x", "y")]
    rank = max(ranks)
    at = int(ctx.args["dim"]) % rank
    letters = ["k" if i == at else f"d{i}" for i in range(rank)]
    terms = [_broadcasting(ctx.operand(x), letters) for x in ("x", "y")]
    out = [
        f"{x}1" if all(f"{x}1" in t.split() or x not in t.split() for t in terms) else x for x in letters if x != "k"
    ]
    if any(ctx.args[x].meta["val"].is_complex() for x in ("x", "y")):
        raise Conflict("an inner product of complex vectors")
    return f"{', '.join(terms)} -> {' '.join(out)}"


def _broadcasting(dims: Dims, letters: Sequence[str]) -> str:
    """The term of an operand that broadcasts against dims named by letters: a dim of size 1 shares no letter."""
    names = letters[len(letters) - len(dims) :]
    return " ".join(x if not is_unit(d) else f"{x}1" for x, d in zip(names, dims, strict=True))


def _kron(ctx: Matches) -> str:
    """a0 a1, b0 b1 -> (a0 b0) (a1 b1), at every rank"""
    a, b = (len(ctx.operand(x)) for x in ("self", "other"))
    rank = max(a, b)
    left, right = ([f"{x}{i}" for i in range(rank - n, rank)] for x, n in (("a", a), ("b", b)))
    pairs = [[x for x in (f"a{i}", f"b{i}") if x in (*left, *right)] for i in range(rank)]
    return f"{' '.join(left)}, {' '.join(right)} -> {' '.join('(' + ' '.join(p) + ')' for p in pairs)}"


def _tensordot(ctx: Matches) -> str:
    """a0 k0, k0 b1 -> a0 b1, at every rank: dims_self meet dims_other, what is left of either operand stays in order"""
    a, b = (len(ctx.operand(x)) for x in ("self", "other"))
    left = [f"a{i}" for i in range(a)]
    right = [f"b{j}" for j in range(b)]
    for k, (i, j) in enumerate(zip(ctx.args["dims_self"], ctx.args["dims_other"], strict=True)):
        left[i] = right[j] = f"k{k}"
    out = [x for x in (*left, *right) if not x.startswith("k")]
    return f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}"


def _multi_dot(ctx: Matches) -> str:
    """k0 k1, k1 k2, k2 k3 -> k0 k3, for any number of matrices; the ends may be vectors"""
    ranks = [len(ctx.operand(x)) for x in ctx.args["tensors"]]
    terms = [f"k{i} k{i + 1}" for i in range(len(ranks))]
    if ranks[0] == 1:
        terms[0] = "k1"
    if ranks[-1] == 1:
        terms[-1] = f"k{len(ranks) - 1}"
    ends = [x for x in ("k0", f"k{len(ranks)}") if any(x in t.split() for t in terms)]
    return f"{', '.join(terms)} -> {' '.join(ends)}"


def _einsum(ctx: Matches) -> str:
    """as its equation says"""
    equation = str(ctx.args["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = sorted(set(left.replace("...", "")) - {","})
        right = ("..." if "..." in left else "") + "".join(x for x in letters if left.count(x) == 1)
    terms = left.split(",")
    if any(len(set(t)) != len(t) for t in (x.replace("...", "") for x in terms)):
        raise Conflict(f"einsum {equation!r} takes a diagonal")
    if "..." in left and "..." not in right:
        raise Conflict(f"einsum {equation!r} sums over its unnamed dims")
    for letter in sorted(set(left) - set(right) - set(",.")):
        if sum(letter in t for t in terms) == 1:
            raise Conflict(f"einsum {equation!r} sums {letter!r} of one operand alone")

    def spaced(term: str) -> str:
        return " ".join("..." if c == "@" else c for c in term.replace("...", "@"))

    return ", ".join(map(spaced, terms)) + " -> " + spaced(right)


# names of axes --------------------------------------------------------------------------------------------------------


def of_attention(ctx: Context) -> None:
    """heads, head_dim and value_dim, where both operands are activations"""
    (x, a), (y, b) = ctx.tensor_operands()[-2:]
    left, right = ctx.args[x], ctx.args[y]
    if len(a) < 3 or len(b) < 3 or is_weight(left) or is_weight(right):
        return
    for dim in (*a[1:-2], *b[1:-2]):
        ctx.role(dim, "heads")
    if after_softmax(left):
        ctx.role(b[-1], "value_dim")
    elif is_static(size_of(a[-1])):
        ctx.role(a[-1], "head_dim")
    if len(a) == len(b) == 3:  # batch and heads in one dim
        for dim in factors_of(a[0])[1:]:
            ctx.role(dim, "heads")


def of_attention_by_einsum(ctx: Context) -> None:
    """heads, head_dim and value_dim by their place in the equation, where both operands are activations"""
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


def after_softmax(node: Any) -> bool:
    """Whether a value is attention weights: a softmax, seen through what moves, casts or scales its entries."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if "softmax" in op_name(node.target):
            return True
        rule = rule_of(node)
        scales = isinstance(rule, Pointwise) and rule.zero is True and rule.mean is True
        if not (scales or moves(node)) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return False


def is_weight(value: Any) -> bool:
    """Whether a value is a parameter, or entries picked from one (the experts of a router)."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.all_input_nodes:
        if not moves(value) and not is_linear(value):
            return False
        value = value.all_input_nodes[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


register_table(__name__, table())
