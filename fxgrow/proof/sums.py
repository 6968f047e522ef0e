"""Sums and statistics over the growing axis: which tensors are read, and take the shares of copies.

A tensor *carries* the axis where its entries show in a result, and *reads* it where they are multiplied and summed. A
reader takes what makes the sum come out: shares for copies, zeros where new entries of the other factor are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxgrow.algebra import Expr, Leaf, leaves
from fxgrow.errors import GrowthRefused
from fxgrow.proof.call import GrowingCall, parts_of
from fxgrow.proof.contents import Contents, Restart
from fxgrow.rules.annotation import Content, Info, Site, annotate, infos


class UnequalCopies(GrowthRefused):
    """Refused because units have different numbers of copies; whole copies plus new units may still do."""


class Sums:
    """Decides what reads the axis, and what carries it.

    Attributes:
        forced: sites that read it in one op and carry it in another, which leaves them carriers.
    """

    def __init__(self, call: GrowingCall, contents: Contents) -> None:
        self.call, self.contents = call, contents
        self.forced: set[Site] = set()

    def close(self, expr: Expr) -> Expr:
        """Tensors seen so far are now values: they carry the axis with the content they were given."""
        for info in infos(expr):
            if info.site is not None:
                self.carry(info.site, info.content)
        return annotate(expr, Info.closed)

    def carry(self, site: Site, content: Content) -> None:
        """A tensor carries the axis.

        Raises:
            Restart: it was taken for a reader.
        """
        if site in self.call.outcome.readers:
            self.forced.add(site)
            raise Restart
        self.call.outcome.carriers[site] = content

    def contract(self, exprs: Sequence[Expr], owners: Sequence[str], zero: str | None = None) -> float:
        """A sum of products over the axis; see :meth:`fxgrow.rules.context.GrowthContext.contract`."""
        sides = [infos(e) for e in exprs]
        if len(sides) == 1:
            raise self.call.refuse("it sums these units up without weights, so that copies would count several times")
        if len({len(s) for s in sides}) != 1:
            raise self.call.refuse("the operands it multiplies hold these units in different places")
        read = []
        for column in zip(*sides, strict=True):
            read.append(self._read(column, owners))
            if not read[-1]:
                self._multiply(column, owners, zero)
        if all(read):
            return 1.0
        if any(read):
            raise self.call.refuse("part of what it sums over is multiplied by weights, and part by activations")
        return float(self.uniform_factor(exprs[:1]))

    def _read(self, column: Sequence[Info], owners: Sequence[str]) -> bool:
        """Make one of the factors the reader of one occurrence of the axis, if any can be."""
        sites = [x.site for x in column]
        open_ = [i for i, site in enumerate(sites) if site is not None and sites.count(site) == 1 and self._open(site)]
        if not open_:
            return False
        reader = next((i for i in reversed(open_) if owners[i] in ("weight", "mat2", "other")), open_[-1])
        for i, x in enumerate(column):
            if i != reader and x.site is not None:
                self.carry(x.site, x.content)
        site = sites[reader]
        assert site is not None
        others = {x.content for i, x in enumerate(column) if i != reader}
        self.call.outcome.readers.setdefault(site, set()).update(others)
        self.call.read_here.add(site)
        return True

    def _open(self, site: Site) -> bool:
        """Whether a tensor may still become a reader."""
        return self.call.takes_shares(site) and site not in self.forced and site not in self.call.outcome.carriers

    def _multiply(self, column: Sequence[Info], owners: Sequence[str], zero: str | None) -> None:
        """Two values are multiplied at one occurrence of the axis: one of them has to be zero in new entries."""
        for x in column:
            if x.site is not None:
                self.carry(x.site, x.content)
        outcome, newborn = self.call.outcome, self.call.newborn
        outcome.multiplied = True
        outcome.silenced |= newborn and all(x.content is Content.ZERO for x in column)
        if newborn and not any(x.content is Content.ZERO for x in column):
            changing = [bool(x.sources & self.contents.loose) for x in column]
            order = sorted(range(len(column)), key=lambda i: (changing[i], owners[i] != zero, i != len(column) - 1))
            why = "it multiplies two activations and sums over these units"
            self.contents.demand(self.call, column[order[0]], Content.ZERO, why)

    def uniform_factor(self, exprs: Sequence[Expr]) -> int:
        """How often each term of a sum over these dims is repeated, if all are repeated alike.

        Raises:
            UnequalCopies: units have different numbers of copies.
            GrowthRefused: only part of the dim is repeated.
        """
        growth = self.call.growth
        self.call.outcome.statistics = True
        if growth.copies == 1:
            return 1
        if growth.copies == 0:
            raise self.call.refuse(
                f"{growth.new} is no multiple of {growth.old}: some units would be copied more often than others, and "
                "it sums or averages over all of them",
                UnequalCopies,
            )
        total = 1
        for expr in exprs:
            counts = {sum(isinstance(x, Leaf) for x in leaves(p)) for p in parts_of(expr)}
            if len(counts) != 1:
                raise self.call.refuse("only part of the entries it sums over would be copied, which changes the sum")
            total *= growth.copies ** counts.pop()
        return total

    def statistic(self, over: Sequence[Expr], needed: Content, rank: int) -> float:
        """A mean and variance (or mean square) over these dims.

        Returns:
            eta, with eta^2 = copies * old / new: by how much the statistic's root shrinks. 1 for whole copies.
        """
        self.uniform_factor(over)
        for expr in over:
            self.close(expr)
        if not self.call.newborn:
            return 1.0
        if rank != 1 or len(over) != 1 or not self.call.is_factor(over[0], needed is Content.MEAN):
            raise self.call.refuse(
                "new units in only a part of the dim it normalises over; grow by whole copies instead"
            )
        for info in infos(over[0]):
            if info.content is not needed and not (info.content is Content.CONST and needed is Content.MEAN):
                self.contents.demand(self.call, info, needed, "it normalises over these units")
        growth = self.call.growth
        return float(np.sqrt(growth.copies * growth.old / growth.new))


__all__ = ["Sums", "UnequalCopies"]
