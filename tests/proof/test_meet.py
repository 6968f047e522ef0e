"""What new entries hold where two operands meet, and which of the two is asked to be zero."""

from __future__ import annotations

import pytest

from fxgrow.algebra import UNIT, Axis, Conflict, Expr, Leaf, Unifier, product
from fxgrow.proof.meet import meet
from fxgrow.rules.annotation import Content, Info, infos

A, B = ("a", 0, 0), ("b", 0, 0)
CONST, ZERO, MEAN, FREE = Content.CONST, Content.ZERO, Content.MEAN, Content.FREE


def leaf(content: Content, *sources: tuple[str, int, int], zeroable: bool = True) -> Leaf:
    axis = Unifier().fresh(3)
    assert isinstance(axis, Axis)
    return Leaf(axis, Info(content, frozenset(sources), zeroable=zeroable))


@pytest.mark.parametrize(
    ("a", "b", "how", "result"),
    [
        (ZERO, FREE, "mul", ZERO),
        (FREE, ZERO, "mul_first", FREE),  # a * f(b) with f(0) != 0
        (ZERO, FREE, "mul_first", ZERO),
        (MEAN, MEAN, "add", MEAN),
        (MEAN, CONST, "add", MEAN),
        (MEAN, ZERO, "add", FREE),
        (ZERO, ZERO, "zero", ZERO),
        (ZERO, ZERO, "any", FREE),
        (CONST, CONST, "any", CONST),
    ],
)
def test_contents_meet(a: Content, b: Content, how: str, result: Content) -> None:
    (info,) = infos(meet(leaf(a, A), leaf(b, B), how))
    assert info.content is result


@pytest.mark.parametrize("swap", [False, True])
def test_a_broadcast_operand_holds_the_same_everywhere(swap: bool) -> None:
    pair: tuple[Expr, Expr] = (leaf(MEAN, A), UNIT)
    a, b = reversed(pair) if swap else pair
    (info,) = infos(meet(a, b, "add"))
    assert (info.content, info.sources) == (MEAN, {A})


def test_one_factor_of_a_product_is_asked_to_be_zero() -> None:
    def asked(a: Leaf, b: Leaf) -> frozenset[tuple[str, int, int]]:
        return infos(meet(a, b, "mul"))[0].sources

    assert asked(leaf(FREE, A), leaf(FREE, B)) == {B}
    assert asked(leaf(FREE, A), leaf(FREE, B, zeroable=False)) == {A}
    assert asked(leaf(ZERO, A), leaf(FREE, B)) == {A}
    assert asked(leaf(CONST, A), leaf(FREE, B)) == {B}
    assert infos(meet(leaf(FREE, A), leaf(FREE, B), "add"))[0].sources == {A, B}


def test_the_axis_has_to_be_at_the_same_places() -> None:
    plain = Unifier().fresh(3)
    with pytest.raises(Conflict, match="in different places"):
        meet(product([leaf(FREE), plain]), product([plain, leaf(FREE)]), "add")
