"""What new entries of tensors hold: whatever is asked of them, one attempt of the proof after the other, or given."""

from __future__ import annotations

from typing import NoReturn, Protocol

from torch import fx

from fxgrow.proof.call import GrowingCall
from fxgrow.rules.annotation import Content, Info, Site


class Restart(Exception):
    """Something new was found out: begin the proof again."""


class Contents(Protocol):
    """What new entries of the growing axis hold where a tensor is read.

    Attributes:
        loose: sites that the forward writes, so that their new entries may hold anything.
    """

    loose: set[Site]

    def of(self, site: Site) -> Content:
        """What new entries of a tensor hold."""

    def demand(self, call: GrowingCall, info: Info, content: Content, why: str) -> NoReturn:
        """An op needs this of a value's new entries.

        Raises:
            Restart: what makes them will hold it.
            GrowthRefused: it cannot.
        """

    def pin(self, call: GrowingCall, site: Site, content: Content, why: str) -> bool:
        """An op needs this of a tensor's new entries. False if it is so already.

        Raises:
            GrowthRefused: it cannot be.
        """

    def check_state(self, call: GrowingCall, buffer: fx.Node, assumed: Info, left: Info) -> None:
        """A call of the model leaves in a buffer what the next one assumes of its new entries.

        Raises:
            Restart: the two were not the same.
            GrowthRefused: they cannot be.
        """


#: what new entries have to be, in words
_HOLD = {
    Content.ZERO: "be zero",
    Content.MEAN: "hold the mean of the old ones",
    Content.CONST: "hold what all others hold",
    Content.FREE: "hold anything",
}


class AskedContents:
    """New entries hold what ops ask for; the first attempt assumes ``default``.

    Attributes:
        pinned: what was asked for so far.
        reasons: by which op.
        held: sites written by the forward, which has to write what was asked for.
    """

    def __init__(self, default: Content) -> None:
        self.default = default
        self.pinned: dict[Site, Content] = {}
        self.reasons: dict[Site, str] = {}
        self.loose: set[Site] = set()
        self.held: set[Site] = set()

    def of(self, site: Site) -> Content:
        return self.pinned.get(site, Content.FREE if site in self.loose else self.default)

    def demand(self, call: GrowingCall, info: Info, content: Content, why: str) -> NoReturn:
        if not info.sources:
            raise call.refuse(f"{why}, and no weights of the model decide what new units hold there")
        changed = False
        for site in sorted(info.sources):
            changed |= self.pin(call, site, content, why)
        if not changed:
            raise call.refuse(
                f"{why}, so that new units have to {_HOLD[content]} there, which no choice of the weights that make "
                "them brings about"
            )
        raise Restart

    def pin(self, call: GrowingCall, site: Site, content: Content, why: str) -> bool:
        known = self.pinned.get(site)
        if known is content:
            return False
        if site in self.loose:
            self.loose.discard(site)
            self.held.add(site)
        if content is Content.MEAN and not call.takes_shares(site):
            dtype = call.axes.program.tensor(site[0]).dtype
            raise call.refuse(f"{why}; {site[0]} holds {dtype}, which has no means")
        if content is Content.MEAN and not _fills_dim(call, site):
            raise call.refuse(
                f"{why}, for which {site[0]} would need means over a part of a dim, which fxgrow does not make"
            )
        if known is not None:
            raise call.refuse(
                f"{why}, so that new entries of {site[0]} have to {_HOLD[content]}; but for {self.reasons[site]} they "
                f"have to {_HOLD[known]}"
            )
        self.pinned[site] = content
        self.reasons[site] = f"{call.op} at {call.source}" if call.source else call.op
        return True

    def check_state(self, call: GrowingCall, buffer: fx.Node, assumed: Info, left: Info) -> None:
        """Where they differ, new entries of the buffer may hold anything; and where an op cannot do with that, what is
        written has to be what it asks for."""
        mean = assumed.content is Content.MEAN and left.content is Content.CONST
        if assumed.content is Content.FREE or left.content is assumed.content or mean:
            return
        (site,) = assumed.sources
        if site not in self.held:
            self.loose.add(site)
            self.pinned.pop(site, None)
            raise Restart
        call.at(call.axes.memory.writers(buffer)[-1])
        why = f"the forward writes into {site[0]}, and the next call reads it"
        self.demand(call, Info(left.content, left.sources - {site}), assumed.content, why)


class GivenContents:
    """New entries hold what they are given, which may be anything: an op that needs more would change its result."""

    def __init__(self) -> None:
        self.loose: set[Site] = set()

    def of(self, site: Site) -> Content:
        return Content.FREE

    def demand(self, call: GrowingCall, info: Info, content: Content, why: str) -> NoReturn:
        raise call.refuse(f"{why}, so that new entries would change its result")

    def pin(self, call: GrowingCall, site: Site, content: Content, why: str) -> bool:
        raise call.refuse(f"{why}, so that new entries would change its result")

    def check_state(self, call: GrowingCall, buffer: fx.Node, assumed: Info, left: Info) -> None:
        """Nothing is assumed."""


def _fills_dim(call: GrowingCall, site: Site) -> bool:
    """Whether the growing axis is all there is to the dim of a parameter."""
    for node in call.axes.uses[call.axis.id]:
        if node.op == "get_attr" and str(node.target) == site[0]:
            return call.axes.dims[node][site[1]] is call.axis
    return False


__all__ = ["AskedContents", "Contents", "GivenContents", "Restart"]
