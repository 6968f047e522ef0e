"""What a rule sees: the vocabulary in which rules are written.

Two interpreters run the rules, and each has a context: analysis, which ties dims to axes (``AnalysisContext``), and the
proof, which follows one growing axis (``ProofContext``). What both offer is :class:`Context`, so that a function on
dims serves the two alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxgrow.algebra import Expr, Size
from fxgrow.errors import GrowthRefused
from fxgrow.plan import AxisMap
from fxgrow.rules.annotation import Content, Dims, Info


class Regroups(Protocol):
    """Whatever can say what a reshape makes of dims."""

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        """The same elements under other sizes, as a reshape gives them."""


class Matches(Regroups, Protocol):
    """What a pattern needs to be matched against a call."""

    @property
    def args(self) -> dict[str, Any]:
        """The call's arguments by the names of the op's schema, defaults filled in."""

    def dims(self, name: str | fx.Node) -> Dims | None:
        """The dims of an operand, by its name; None where it is no tensor."""

    def operand(self, name: str | fx.Node) -> Dims:
        """The dims of an operand that has to be there.

        Raises:
            Conflict: it is no tensor.
        """


class Context(Regroups, Protocol):
    """One call of an op, under either interpreter.

    Attributes:
        node: the call.
        args: its arguments by the names of the op's schema, defaults filled in.
    """

    node: fx.Node
    args: dict[str, Any]

    @property
    def op(self) -> str:
        """The op's name."""

    @property
    def first(self) -> str:
        """The name of the first tensor operand."""

    @property
    def shape(self) -> list[Size]:
        """Sizes of the result; of the first one where there are several."""

    @property
    def result_count(self) -> int | None:
        """Number of results of an op with several, else None."""

    def results(self, node: fx.Node) -> Any:
        """The dims of all results of another op."""

    def dims(self, name: str | fx.Node) -> Dims | None:
        """The dims of an operand, by its name; None where it is no tensor."""

    def operand(self, name: str | fx.Node) -> Dims:
        """The dims of an operand that has to be there.

        Raises:
            Conflict: it is no tensor.
        """

    def tensor_operands(self) -> list[tuple[str, Dims]]:
        """Every tensor operand, those inside lists included, in order."""

    def unify(self, a: Expr, b: Expr) -> None:
        """Tie two dims: the entries of one are those of the other."""

    def freeze(self, expr: Expr, why: str) -> None:
        """The axes of a dim cannot grow."""

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        """What a dim is used for; names of axes come from it."""

    def contracted(self, expr: Expr) -> None:
        """A sum of products runs over a dim."""

    def split(self, dim: Expr, sizes: Sequence[Size]) -> list[Expr]:
        """Cut a dim into parts end to end."""

    def units(self, dim: Expr) -> list[Expr] | None:
        """The entries of a dim one by one; None where it grows."""

    def sized(self, size: Size) -> Expr:
        """A new axis that nothing ties yet."""

    def opaque(self, size: Size, why: str) -> Expr:
        """A new axis that cannot grow."""

    def opaque_results(self, why: str) -> Any:
        """Dims of the result(s) that nothing is known of."""

    def constant_dim(self, i: int) -> Expr:
        """A new axis for dim ``i`` of the result, along which the result does not vary."""

    def inner(self, i: int, size: int) -> Expr:
        """A new axis that becomes the inner factor of dim ``i`` of the result, a broadcast."""

    def outer(self, i: int, size: Size) -> Expr:
        """A new axis that becomes the outer factor of dim ``i`` of the result, a repetition."""

    def constant_like(self, dim: Expr) -> Expr:
        """The dim of another tensor, along which the result does not vary."""

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        """One dim that several operands share, each with entries of its own."""

    def close(self, expr: Expr) -> Expr:
        """Parameters seen so far are now values: they carry the axis with the content they were given."""

    def from_parameter(self, value: Any) -> bool:
        """Whether a value is a parameter, seen through views and casts only."""

    def from_input(self, value: Any) -> bool:
        """Whether a value depends on what the user passes in, and not only on its sizes."""

    def constant(self, value: Any) -> torch.Tensor | None:
        """The value of a constant tensor; None where it is none."""


class GrowthContext(Context, Protocol):
    """One call of an op while an axis grows.

    Attributes:
        growth: the old and new units of the axis, and which are copies of which.
    """

    growth: AxisMap

    @property
    def newborn(self) -> bool:
        """Whether the axis gets entries that are no copies."""

    @property
    def in_eval(self) -> bool:
        """Whether the call is run in eval mode, alone or too."""

    @property
    def result_dims(self) -> Any:
        """Dims of the result(s) as analysis has them, without annotations."""

    def grows(self, expr: Expr) -> bool:
        """Whether the growing axis is in a dim."""

    def is_whole(self, expr: Expr) -> bool:
        """The dim is the growing axis and nothing else."""

    def is_factor(self, expr: Expr, centred: bool) -> bool:
        """The dim is the growing axis, a product with it, or several alike: new zeros then only rescale its mean.

        A statistic that is ``centred`` needs the whole dim: slices have means of their own.
        """

    def is_zero(self, value: Any) -> bool:
        """Whether a value is known to be zero in every entry when the current op reads it, whatever the sizes."""

    def mean_of(self, value: Any) -> tuple[fx.Node, list[int]] | None:
        """(x, dims) where ``value`` is ``x.mean(dims, keepdim=True)``."""

    def of_square(self) -> bool:
        """Whether the operand of the current reduction is a square."""

    def refuse(self, why: str) -> GrowthRefused:
        """The error to raise where the growth cannot be exact here."""

    def combine(self, a: Expr, b: Expr, how: str) -> Expr:
        """Meet of two operands along one dim, either of which may be broadcast (size 1)."""

    def contract(self, exprs: Sequence[Expr], owners: Sequence[str], zero: str | None = None) -> float:
        """A sum of products over the axis: the factor by which it comes out too large.

        1 where a parameter takes the shares, n where n copies meet n copies. ``zero`` names the operand that is asked
        to be zero in newborn entries where neither is.
        """

    def uniform_factor(self, exprs: Sequence[Expr]) -> int:
        """How often each term of a sum over these dims is repeated, if all are repeated alike; else refused."""

    def statistic(self, over: Sequence[Expr], needed: Content, rank: int) -> float:
        """A mean and variance (or mean square) over these dims: by how much the statistic's root shrinks.

        1 for whole copies.
        """

    def demand(self, info: Info, content: Content, why: str) -> None:
        """Ask the parameters that make this value for a content of its new entries, and start over."""

    def pin(self, expr: Expr, content: Content) -> None:
        """A parameter must hold this content in its newborn entries."""

    def newborn_constants(self, values: dict[str, float]) -> None:
        """Values for newborn entries of parameters named by operand, where random ones make no sense."""

    def edit(self, argument: str, value: Any) -> None:
        """Set a literal of the current op."""

    def scale_shared(self, operand: str, factor: float) -> bool:
        """Multiply a parameter, provided that every op that uses it asks for the same. False where that is hopeless."""

    def rescale_output(self, factor: float) -> None:
        """Multiply the op's result by a constant."""

    def rescale_product(self, factor: float, operand: str, biases: Iterable[str]) -> None:
        """Multiply the op's sum of products by a constant, but not the bias that is added to it."""

    def selects_among(self, *, one: bool) -> None:
        """The result is one of several equal copies, which share its gradient; ``one``: a single one gets all of it."""

    def multiplies(self, *, silenced: bool) -> None:
        """Two activations meet over the axis; ``silenced``: both are zero in new units, and so is either's gradient."""
