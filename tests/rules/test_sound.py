"""Growths of small models with odd ops, compared outside of fxgrow: on other values and batches than the example's.

Every case is exact to rounding, in the dtype that it had, or refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgrow import GrowthRefused, grow
from fxgrow.ir.ops import bound_arguments
from tests.models import trained

DOUBLE, FACTOR_3 = {"factor": 2}, {"factor": 3}
MORE, ADDED = {"by": 3}, {"fill": "add", "by": 2}


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Odd(nn.Module):
    """``up`` writes an axis of 8, ``out`` and ``w`` read it. Keywords are members, tensors buffers."""

    def __init__(self, f: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = f
        self.up, self.out, self.w = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(4 * torch.randn(3, 8))
        for name, value in members.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        trained(self.double())
        for name, value in members.items():
            if isinstance(value, Tensor):
                setattr(self, name, value.clone())  # in the dtype it came in

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


class Tied(nn.Module):
    """An embedding of 8 whose table is the head too, behind a norm and whatever ``f`` does to what the norm gives."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.emb, self.norm = f, nn.Embedding(7, 8), nn.LayerNorm(8)
        trained(self.double())

    def forward(self, x: Tensor) -> Tensor:
        numbers = (3 * x).long().clamp(0, 6)
        return F.linear(self.f(self.norm(self.emb(numbers))), self.emb.weight)


def inputs(*shape: int) -> list[Tensor]:
    """The example, then other values, scales and batch sizes."""
    more = r(shape[0] + 3, *shape[1:], seed=2)
    return [r(*shape), 3 * r(*shape, seed=1), 0.3 * more, 0 * r(*shape)]


def outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def check_exact(model: nn.Module, operation: dict[str, Any], axis: str = "up.weight:0", *shape: int) -> nn.Module:
    """Grow with the receipt off, and compare values, shapes and dtypes by hand."""
    xs = inputs(*(shape or (6, 5)))
    grown = grow(model, {"operations": [{"op": "widen", "axis": axis, **operation}]}, (xs[0],), verify=False).module
    model.eval()
    grown.eval()
    for x in xs:
        with torch.no_grad():
            old, new = outputs(model(x)), outputs(grown(x))
        for a, b in zip(old, new, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            if not (a.is_floating_point() or a.is_complex()):
                assert torch.equal(a, b)
                continue
            assert torch.equal(a.isnan(), b.isnan())
            limit = 1e-12 if a.dtype in (torch.float64, torch.complex128) else 8 * torch.finfo(a.dtype).eps
            difference = (a - b).abs().nan_to_num().max()
            assert float(difference) <= limit * float(a.abs().nan_to_num().max()), operation
    return grown


def check_refused(model: nn.Module, operation: dict[str, Any], reason: str, axis: str = "up.weight:0") -> None:
    with pytest.raises(GrowthRefused, match=reason):
        grow(model, {"operations": [{"op": "widen", "axis": axis, **operation}]}, (r(6, 5),), verify=False)


# a tensor seen through a map that is not linear is a value ----------------------------------------------------------


@pytest.mark.parametrize("operation", [DOUBLE, FACTOR_3])
@pytest.mark.parametrize(
    "seen",
    [
        lambda w: w.bool().to(w.dtype),
        lambda w: w.round().bool().to(w.dtype),
        lambda w: w.to(torch.int8).to(w.dtype),
        lambda w: w.t().long().to(w.dtype).t(),
        lambda w: w.to(torch.float8_e4m3fn).to(w.dtype),
        lambda w: F.pad(w, (0, 0, 0, 1), value=1.0),
        lambda w: w.cumprod(0),
        lambda w: w.sort(0).values,
        lambda w: w.float().half().double(),
        lambda w: w.to(torch.complex128).real,
    ],
)
def test_a_weight_behind_a_map_that_is_not_linear_takes_no_shares(
    seen: Callable[[Tensor], Tensor], operation: dict[str, Any]
) -> None:
    grown = check_exact(Odd(lambda s, x: F.linear(torch.tanh(s.up(x)), seen(s.w))), operation)
    assert grown.w.shape[1] == 8 * operation["factor"]


def test_a_linear_view_of_a_weight_takes_the_shares() -> None:
    """Copies are uneven where a parameter takes their shares, and only there."""
    for seen in (lambda w: w.t().contiguous().t(), lambda w: F.pad(w, (0, 0, 0, 1)), lambda w: w.cumsum(0)):
        grown = check_exact(Odd(lambda s, x, seen=seen: F.linear(torch.tanh(s.up(x)), seen(s.w))), MORE)
        assert torch.allclose(grown.w[:, 0] + grown.w[:, 8], Odd(lambda s, x: x).w[:, 0])


@pytest.mark.parametrize(
    "f",
    [
        lambda h: F.pad(h, (0, 0, 1, 0), value=1.0),
        lambda h: torch.cumprod(h, 1),
        lambda h: torch.sort(h, 1).values,
        lambda h: h.to(torch.int32).to(h.dtype),
        lambda h: torch.cat([h, h[:, :1]], 1),
        lambda h: h[:, [0, 2, 0]],
        lambda h: h.flip(1).cumsum(1),
    ],
)
def test_a_scale_is_folded_through_linear_ops_only(f: Callable[[Tensor], Tensor]) -> None:
    for operation in (DOUBLE, FACTOR_3):
        check_exact(Tied(f), operation, "emb.weight:1")


def test_an_identity_block_is_zero_behind_linear_ops_only() -> None:
    """Zeroing the last projection of a branch does not silence a branch that pads with ones."""

    class Block(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a, self.b, self.value = nn.Linear(5, 8), nn.Linear(8, 4), value

        def forward(self, x: Tensor) -> Tensor:
            return x + F.pad(self.b(torch.tanh(self.a(x))), (1, 0), value=self.value)

    class Stack(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(value), Block(value)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    for value in (0.0, 1.0):
        model = trained(Stack(value).double())
        grown = grow(model, {"operations": [{"op": "deepen", "stack": "blocks", "by": 1}]}, (r(6, 5),), verify=False)
        for x in inputs(6, 5):
            assert torch.allclose(model(x), grown.module(x), rtol=1e-12, atol=1e-12)


# results and parameters that are no real numbers --------------------------------------------------------------------


def bits(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return (2 * r(*shape)).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 6, shape, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def positive(s: Any, x: Tensor) -> Tensor:
    return s.up(x) > 0


def test_whole_numbers_and_truth_values_stay_what_they_are() -> None:
    def use(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        yes = positive(s, x)
        count = yes.sum(-1)
        return (
            *(count, count / 4, count * 3, yes.sum(), s.table[count]),
            yes.long().cumsum(0).sum(-1, keepdim=True) * -1,
            torch.count_nonzero(s.up(x).relu(), -1),
            yes.long() @ s.w.round().long().t(),
            torch.einsum("bi,oi->bo", s.up(x).round().long(), s.numbers),
            torch.tensordot(yes.long(), s.numbers, dims=([1], [1])),
            *(yes.any(-1), yes.all(-1, keepdim=True), (s.up(x) > 9).any()),
            yes.double().mean(-1),
        )

    for operation in (DOUBLE, FACTOR_3):
        check_exact(Odd(use, numbers=bits(torch.int64, 3, 8), table=r(9, 4)), operation)


def test_whole_numbers_that_cannot_be_divided_are_refused() -> None:
    def biased(s: Any, x: Tensor) -> Tensor:
        return torch.addmm(s.bias, positive(s, x).long(), s.w.round().long().t())

    check_refused(Odd(biased, bias=bits(torch.int64, 3)), DOUBLE, "whole numbers, to which a bias is added")
    narrow = Odd(lambda s, x: positive(s, x).sum(-1, dtype=torch.uint8))
    check_refused(narrow, DOUBLE, r"sums whole numbers in torch.uint8.*overflow.*dtype=torch.int64")


KINDS = [torch.bool, torch.int8, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.complex64]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_buffer_of_any_dtype_grows_or_is_refused(kind: torch.dtype) -> None:
    """Read, multiplied, added, and under norms that need new entries of one value."""

    def seen(s: Any, x: Tensor) -> Tensor:
        return (s.q.real if s.q.is_complex() else s.q).to(x.dtype)

    def use(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        h, q, size = torch.tanh(s.up(x)), seen(s, x), s.up.weight.shape[:1]
        normed = F.rms_norm(h + q[0], size, eps=1e-6)
        return F.linear(h, q), s.out(h * q[1]), s.out(normed)

    model = Odd(use, q=bits(kind, 3, 8))
    for operation in (FACTOR_3, ADDED):
        grown = check_exact(model, operation)
        assert grown.q.dtype is kind
    if kind.itemsize == 1 or not (kind.is_floating_point or kind.is_complex):
        centred = Odd(lambda s, x: s.out(F.layer_norm(s.up(x) + seen(s, x)[0], (8,))), q=bits(kind, 3, 8))
        check_refused(centred, ADDED, "q holds torch.* which has no means")


def test_complex_parameters_take_shares_and_noise() -> None:
    def rotate(s: Any, x: Tensor) -> Tensor:
        return torch.view_as_real((s.up(x) * (1 + 0j)) @ s.turn.t()).flatten(-2)

    model = Odd(rotate, turn=bits(torch.complex128, 3, 8))
    model.turn = nn.Parameter(model.turn.clone())
    noisy = {**DOUBLE, "noise": {"kind": "antisymmetric", "scale": 0.1, "seed": 1}}
    for operation in (DOUBLE, {**DOUBLE, "split": "uneven"}, MORE, ADDED, noisy):
        grown = check_exact(model, operation)
        assert grown.turn.is_complex()
        assert torch.allclose(grown.turn[:, 1] + (0 if "by" in operation else grown.turn[:, 9]), model.turn[:, 1]) or (
            operation is MORE
        )
    assert not torch.equal(check_exact(model, noisy).turn[:, 1], model.turn[:, 1] / 2)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64])
def test_values_that_are_not_finite_are_found_in_every_dtype(kind: torch.dtype) -> None:
    broken = bits(kind, 8)
    broken[2] = float("nan")
    model = Odd(lambda s, x: s.out(s.up(x) * (s.q.real if s.q.is_complex() else s.q.to(x.dtype))), q=broken)
    check_refused(model, DOUBLE, r"NaN or infinite.*q \(1 of 8 values\)")


# constants that an op chooses by dtype ------------------------------------------------------------------------------


class Normed(nn.Module):
    """A stream of 8 under RMS norms that leave eps to the op: the module, the function without a weight, and scaled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.out = nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        trained(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) * 1e-3
        return self.out(self.norm(h) + F.rms_norm(h, (h.shape[-1],)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", [{"by": 4}, ADDED])
@pytest.mark.parametrize("constants", ["fold", "keep"])
def test_a_norm_without_eps_keeps_the_one_of_its_dtype(
    dtype: torch.dtype, operation: dict[str, Any], constants: str
) -> None:
    """Compared with the op's own arithmetic in float64, at the eps that the op has in the model's dtype."""
    model = Normed().to(dtype)
    spec = {"operations": [{"op": "widen", "axis": "up.weight:0", "constants": constants, **operation}]}
    grown = grow(model, spec, (r(6, 5).to(dtype),), verify=False).module
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    old = 8
    new = old + operation["by"]
    found = [bound_arguments(n)["eps"] for n in grown.graph.nodes if "rms_norm" in str(n.target)]
    assert found == ([None] if constants == "fold" else [pytest.approx(eps * old / new, rel=1e-12)]) * 2
    for x in inputs(6, 5):
        x = (x + 0.1).to(dtype)
        with torch.no_grad():
            a, b = model(x).double(), grown(x).double()
        assert float((a - b).abs().max()) <= 16 * torch.finfo(dtype).eps * float(a.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_receipt_in_float64_holds_the_eps_of_the_models_dtype(dtype: torch.dtype) -> None:
    receipt = grow(
        Normed().to(dtype), {"operations": [{"op": "widen", "axis": "up.weight:0", "by": 4}]}, (r(6, 5).to(dtype),)
    ).receipt
    assert receipt.error_float64 is not None
    assert receipt.error_float64 < 1e-12


# operands and dims that a rule has to look at -----------------------------------------------------------------------


def test_differences_follow_what_stands_before_and_behind() -> None:
    """Also where new units would be zero but for it."""

    def use(s: Any, x: Tensor) -> Tensor:
        return s.out(torch.diff(s.up(x), dim=0, prepend=s.first, append=torch.ones_like(s.up(x)[:1])))

    for operation in (DOUBLE, MORE, ADDED):
        grown = check_exact(Odd(use, first=r(2, 8)), operation)
        assert grown.first.shape[1] == grown.up.weight.shape[0]


def test_a_mask_covers_as_many_dims_as_it_has() -> None:
    def use(s: Any, x: Tensor) -> Tensor:
        return s.up(x).unflatten(0, (3, 2))[s.mask].sum(0) @ s.w.t()

    model = Odd(use, mask=torch.tensor([[True, False], [True, True], [False, True]]))
    grown = grow(model, {"operations": [{"op": "widen", "axis": "up.weight:0", "by": 3}]}, (r(6, 5),), verify=False)
    x = r(6, 5, seed=3)
    assert torch.allclose(model(x), grown.module(x), rtol=1e-12)
    covered = Odd(lambda s, x: s.up(x)[s.mask].sum() + x, mask=r(6, 8) > 0)
    check_refused(covered, DOUBLE, "looked up by number")


@pytest.mark.parametrize("cut", [slice(1, 7, 2), slice(0, 6, 2), slice(2, 8, 3), slice(1, 8, 3)])
def test_a_strided_slice_that_takes_part_of_the_units_is_refused(cut: slice) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "a bug in the rule"
        check_refused(Odd(lambda s, x: F.linear(s.up(x)[:, cut], s.w[:, cut])), DOUBLE, "takes entries")


def test_a_strided_slice_of_every_unit_grows() -> None:
    def use(s: Any, x: Tensor) -> Tensor:
        return F.linear(s.up(x)[:, :7:2], s.w[:, ::2]) + F.linear(s.up(x)[:, 1::2], s.w[:, 1:8:2])

    check_exact(Odd(use), DOUBLE)


def test_an_index_computed_from_the_axis_freezes_it() -> None:
    def use(s: Any, x: Tensor) -> Tensor:
        return s.out(s.up(x)).index_select(1, (s.up(x)[0] > 0).long())

    check_refused(Odd(use), DOUBLE, "it indexes another tensor")


def test_an_operand_that_only_lends_its_dtype_freezes_nothing() -> None:
    check_exact(Odd(lambda s, x: s.out(x[:, :1].type_as(s.up(x)) * s.up(x) + s.up(x).new_ones(1))), DOUBLE)


# numbers that are equal by construction, and between copies up to rounding only --------------------------------------


def top(h: Tensor) -> Tensor:
    return h.amax(-1, keepdim=True)


@pytest.mark.parametrize("operation", [DOUBLE, MORE])
@pytest.mark.parametrize(
    "f",
    [
        lambda h: torch.where(h == top(h), h, 0),
        lambda h: h * (h >= h.max(-1, keepdim=True).values),
        lambda h: h * ((h - top(h)) >= 0),
        lambda h: h * (h * 2 != top(h) * 2).to(h.dtype),
        lambda h: (h / top(h)).floor() * h,
        lambda h: (h / top(h)).to(torch.int32) * h,
        lambda h: (h * (7.5 / top(h.abs()))).round() * top(h.abs()),
        lambda h: torch.where(h <= h.min(), 0.0, h),
        lambda h: h * (h.abs() == top(h.abs()).expand_as(h)),
        lambda h: (h.unsqueeze(-1) >= h.unsqueeze(-2)).to(h.dtype).mean(-1) * h,
        lambda h: (h - top(h)).argmax(0) * h,
        lambda h: (1 / (top(h) - h)).nan_to_num(posinf=0.0) * h,
        lambda h: h * (h >= torch.zeros_like(top(h)).index_copy(0, torch.arange(6), top(h))).to(h.dtype),
        lambda h: h * (h >= top(h).scatter(1, torch.zeros(6, 1, dtype=torch.int64), top(h))).to(h.dtype),
    ],
)
def test_what_tells_copies_apart_is_refused(f: Callable[[Tensor], Tensor], operation: dict[str, Any]) -> None:
    check_refused(Odd(lambda s, x: s.out(f(s.up(x)))), operation, "equal by construction")


@pytest.mark.parametrize(
    "f",
    [
        torch.sign,
        lambda d: d.angle() + d,
        lambda d: d.bool().to(d.dtype),
        lambda d: d.count_nonzero(-1).to(d.dtype).unsqueeze(-1) * d,
        lambda d: torch.zeros_like(d, dtype=torch.bool).copy_(d).to(d.dtype),
    ],
)
def test_zeros_up_to_rounding_have_no_sign(f: Callable[[Tensor], Tensor]) -> None:
    """New entries at the mean are zero after ``h - mean(h)`` up to rounding, so that their sign is anything."""

    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
            self.read = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            signs = f(h - h.mean(-1, keepdim=True))
            return signs.sum(-1) + (signs * self.read).sum(-1) + self.out(h).sum(-1)

    check_refused(Signs().double(), MORE, "a sum|new units|newborn|zero")


def test_margins_and_comparisons_with_other_numbers_grow() -> None:
    """Rounding to a grid that the largest number meets exactly is safe: a rounding jumps between the steps."""

    def steps(h: Tensor) -> Tensor:
        scale = 127 / top(h.abs()).clamp(min=1e-5)
        return (h * scale).round().clamp(-128, 127) / scale

    def use(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = s.up(x)
        return (
            *(s.out(steps(h)), s.out(steps(steps(h) * h))),
            *(s.out(h * (h >= top(h) - 0.1)), s.out(h * (h > 0.5 * top(h))), s.out(h * torch.isclose(h, top(h)))),
            *(s.out(h * (h > 0.3)), s.out(h * (h > h.mean(-1, keepdim=True))), s.out(h * (top(h) > 1))),
            *(s.out((h - top(h)).exp()), s.out(F.rms_norm(h / top(h.abs()), h.shape[-1:], eps=1e-6))),
        )

    for operation in (DOUBLE, FACTOR_3):
        check_exact(Odd(use), operation)


class WeightNormed(nn.Module):
    """What a layer gives, normalised as a weight is, with a scale that broadcasts from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.o = nn.Linear(5, 16), nn.Parameter(torch.rand(1, 4) + 0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.a(x).unflatten(-1, (4, 4)), self.g, 1)
        return self.o(weight.movedim(1, -1))  # type: ignore[no-any-return]


def test_a_weight_norm_whose_scale_has_another_rank_is_refused() -> None:
    with pytest.raises(GrowthRefused, match="another rank"):
        grow(WeightNormed().double(), {"op": "widen", "axis": "g:1", **DOUBLE}, (r(3, 5),))


@pytest.mark.parametrize(
    "norm",
    [
        lambda s, h: F.layer_norm(h, h.shape[-1:], s.gain, s.gain),
        lambda s, h: F.layer_norm(F.layer_norm(h, h.shape[-1:], s.gain), h.shape[-1:], None, s.gain),
    ],
    ids=["weight is bias", "weight of one, bias of another"],
)
def test_a_scale_of_a_norm_does_not_reach_its_bias(norm: Callable[[Any, Tensor], Tensor]) -> None:
    model = Odd(lambda s, x: s.out(norm(s, s.up(x))), gain=nn.Parameter(r(8, seed=3)))
    grown = grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (r(4, 5),), verify=False).module
    torch.testing.assert_close(grown(r(6, 5, seed=1)), model(r(6, 5, seed=1)))
    for how in ({"by": 1}, {"by": 3, "fill": "add"}):
        with pytest.raises(GrowthRefused, match=r"scale cannot be adjusted|different factors|hold the mean|be zero"):
            grow(model, {"op": "widen", "axis": "up.weight:0", **how}, (r(4, 5),), verify=False)


@pytest.mark.parametrize(
    "pick",
    [
        lambda s, rows: torch.take_along_dim(rows, s.places, 0).sum(1),
        lambda s, rows: torch.gather(rows, 0, s.places).sum(1),
        lambda s, rows: F.embedding(s.places[:, 0], s.w.T[:, :4]).sum(1),
        lambda s, rows: F.one_hot(s.places[:, 1], 8).to(rows.dtype).matmul(s.w.T).sum(1),
    ],
    ids=["take_along_dim", "gather", "embedding", "one_hot"],
)
def test_entry_0_that_a_zero_picks_is_not_zero(pick: Callable[[Any, Tensor], Tensor]) -> None:
    places = torch.randint(1, 8, (6, 4), generator=torch.Generator().manual_seed(0))
    model = Odd(lambda s, x: pick(s, s.up(x).mean(0)[:, None].expand(8, 4).contiguous()) @ s.q, places=places)
    model.q = nn.Parameter(r(6, 2, seed=5))
    for how in (DOUBLE, MORE, ADDED, {**ADDED, "fan_in": "zero"}):
        try:
            module = grow(model, {"op": "widen", "axis": "q:0", **how}, (r(4, 5),), verify=False).module
        except GrowthRefused:
            if "fill" not in how:
                raise
            continue
        torch.testing.assert_close(module(r(6, 5, seed=1)), model(r(6, 5, seed=1)))
