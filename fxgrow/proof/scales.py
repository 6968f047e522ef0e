"""Constants that keep what is computed: into literals, into parameters that all their users agree on, or new nodes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxgrow.ir.ops import nodes_among, op_name
from fxgrow.proof.call import GrowingCall
from fxgrow.proof.contents import Restart
from fxgrow.proof.outcome import Scale
from fxgrow.rules.base import is_linear, weights

_MULTIPLIES = ("aten.mul.Tensor", "aten.mul.Scalar")
_DIVIDES = ("aten.div.Tensor", "aten.div.Scalar")
_NORMS = ("aten.layer_norm.default", "aten.rms_norm.default")

Requests = dict[str, dict[str, float]]  # tensor -> the op that asks -> factor


class Scales:
    """Where the factors go that the ops ask for.

    Attributes:
        shared: tensors that ops want multiplied.
        folds: the same, of a norm's weight and bias, in place of a sum of products after it.
        no_fold: another op uses a norm's weight too, so that none is folded.
    """

    def __init__(self, call: GrowingCall) -> None:
        self.call = call
        self.shared: Requests = {}
        self.folds: Requests = {}
        self.no_fold = False

    def begin(self) -> None:
        """Start a new attempt."""
        self.shared, self.folds = {}, {}

    # results

    def rescale_output(self, factor: float) -> None:
        """Multiply the op's result by a constant: in a literal that follows it, or by a new node.

        Raises:
            GrowthRefused: the result is of whole numbers, which do not stay what they are.
        """
        node = self.call.node
        if not _continuous(node):
            self._check_whole(factor)  # a literal that follows may be a whole number itself
        elif self._scale_literal(list(node.users), factor):
            return
        self.call.outcome.graph.scale_result(node.name, factor)

    def _scale_literal(self, users: list[fx.Node], factor: float) -> bool:
        """Put the factor into the number that the result's one user multiplies it by, or divides it by."""
        if len(users) != 1 or len(users[0].args) < 2 or users[0].args[0] is not self.call.node:
            return False
        name, literal = op_name(users[0].target), users[0].args[1]
        if not isinstance(literal, float | int) or name not in _MULTIPLIES + _DIVIDES:
            return False
        scaled = literal * factor if name in _MULTIPLIES else literal / factor
        self.call.outcome.graph.literals[users[0].name, "other"] = scaled
        return True

    def _check_whole(self, factor: float) -> None:
        """Sums of whole numbers over n copies are n-fold, without remainder, as long as none is too large."""
        dtype = self.call.node.meta["val"].dtype
        if abs(round(1 / factor) * factor - 1) > 1e-12:
            raise self.call.refuse(
                f"its result is of whole numbers ({dtype}), which cannot be multiplied by {factor:g}"
            )
        if dtype is not torch.int64:
            raise self.call.refuse(
                f"it sums whole numbers in {dtype}, which sums over copies may overflow; sum with dtype=torch.int64"
            )

    def rescale_product(self, factor: float, operand: str, biases: Iterable[str]) -> None:
        """Multiply the op's sum of products by a constant, but not the bias that is added to it."""
        call = self.call
        if op_name(call.node.target) == "aten.linear.default" and self._fold_into_norm(factor):
            return
        if not any(isinstance(call.args.get(b), fx.Node) for b in biases):
            self.rescale_output(factor)
            return
        if not _continuous(call.node):
            raise call.refuse("a sum of products of whole numbers, to which a bias is added, cannot be rescaled")
        if isinstance(call.args.get("alpha"), int | float):
            call.outcome.graph.literals[call.node.name, "alpha"] = call.args["alpha"] * factor
            return
        source = call.args[operand]
        if sum(a is source for a in call.args.values()) != 1:
            raise call.refuse("a sum of products of a value with itself, to which a bias is added, cannot be rescaled")
        call.outcome.graph.scale_operand(call.node.name, source.name, factor)

    # tensors

    def _fold_into_norm(self, factor: float) -> bool:
        """Scale the weight and bias of the norm that alone feeds the current op, through ops that only move entries."""
        source = self.call.args.get("input")
        while isinstance(source, fx.Node) and len(source.users) == 1 and _keeps_scale(source):
            source = source.args[0]
        if self.no_fold or not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        layer = weights(source) if op_name(source.target) in _NORMS else []
        if any(value.op != "get_attr" or self.call.axes.memory.written(value) for value in layer):
            return False
        for value in layer:
            self.folds.setdefault(str(value.target), {})[source.name] = factor
        return bool(layer)

    def scale_shared(self, operand: str, factor: float) -> bool:
        """Multiply a parameter, provided that every op that uses it asks for the same. False where that is hopeless."""
        value = self.call.args.get(operand)
        if not isinstance(value, fx.Node) or value.op != "get_attr" or self.call.axes.memory.written(value):
            return False
        if any(u.target != self.call.node.target for u in value.users):
            return False
        again = [n for _, n in nodes_among(self.call.args) if n.op == "get_attr" and n.target == value.target]
        if len(again) > 1:
            return False  # the op reads it a second time, as a bias say, which keeps its scale
        self.shared.setdefault(str(value.target), {})[self.call.node.name] = factor
        return True

    def settle(self) -> None:
        """Apply the scales that every op using a tensor agreed on.

        Raises:
            Restart: a norm's weight has other users; products are scaled instead.
            GrowthRefused: ops would need a tensor multiplied by different factors.
        """
        users: dict[str, set[str]] = {}
        for node in self.call.axes.uses.get(self.call.axis.id, []):
            if node.op == "get_attr":
                users.setdefault(str(node.target), set()).update(u.name for u in node.users)

        def agreed(name: str, requests: dict[str, float]) -> bool:
            return len(set(requests.values())) == 1 and users[name] == set(requests)

        if not all(agreed(name, requests) for name, requests in self.folds.items()):
            self.no_fold = True
            raise Restart
        for name, requests in self.shared.items():
            if not agreed(name, requests):
                raise self.call.refuse_all(f"several ops use {name}, and would need it multiplied by different factors")
        scales = self.call.outcome.scales
        for folded, table in ((False, self.shared), (True, self.folds)):
            for name, requests in table.items():
                before = scales.get(name, Scale(1.0, False))
                scales[name] = Scale(before.factor * next(iter(requests.values())), before.folded or folded)


def _keeps_scale(node: fx.Node) -> bool:
    """Whether scaling the op's first operand scales its result, and no other numbers go in."""
    if not is_linear(node):
        return False
    return [n for n in node.all_input_nodes if _continuous(n)] == [node.args[0]]


def _continuous(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


__all__ = ["Scales"]
