"""Recurrent layers: LSTM, GRU and plain RNN, as whole layers and as single cells."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxgrow.algebra import Conflict, Expr, concat, is_unit, resolve, size_of
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context, GrowthContext


def table() -> dict[str, Rule]:
    """By the number of gates."""
    return {
        "aten.lstm.input": Layers(4),
        "aten.gru.input": Layers(3),
        "aten.rnn_tanh.input aten.rnn_relu.input": Layers(1),
        "aten.lstm_cell": Cell(4),
        "aten.gru_cell": Cell(3),
        "aten.rnn_tanh_cell aten.rnn_relu_cell": Cell(1),
    }


def _opened(expr: Expr) -> Expr:
    """The hidden state as the recurrence leaves it: copies agree, nothing is known of new entries."""
    return annotate(expr, lambda info: Info(Content.FREE, info.sources, zeroable=False))


class _Gates(Rule):
    """What layers and cells share: one direction's weights.

    "i, (gates h) i, (gates h) h, (gates h)?, (gates h)? -> h": the rows are written gate by gate, each gate has one row
    per hidden unit; ``i`` and the recurrent ``h`` are contracted. A hidden unit that is copied keeps its state, so that
    it can be copied however often; the recurrent weights of its copies share.
    """

    special = "it feeds its own state back through a weight that both writes and reads the hidden axis"

    def __init__(self, gates: int) -> None:
        self.gates = gates

    @staticmethod
    def _states(ctx: Context) -> list[Dims]:
        """The hidden state, and the cell's where there is one."""
        value = ctx.args["hx"]
        return [ctx.operand(s) for s in (value if isinstance(value, list | tuple) else [value])]

    def _relate(self, ctx: Context, x: Expr, hidden: Expr, weights: list[Any]) -> None:
        w_ih, w_hh, *biases = [ctx.dims(w) for w in weights]
        assert w_ih is not None and w_hh is not None
        ctx.unify(x, w_ih[1])
        ctx.unify(hidden, w_hh[1])
        ctx.role(w_hh[1], "hidden")
        for contracted in (w_ih[1], w_hh[1]):
            ctx.contracted(contracted)
        for rows in (w_ih[0], w_hh[0], *(b[0] for b in biases if b is not None)):
            for gate in ctx.split(rows, [size_of(hidden)] * self.gates):
                ctx.unify(gate, hidden)

    def _grow(self, ctx: GrowthContext, x: Expr, hidden: Expr, weights: list[Any]) -> Expr:
        """The hidden state after the step, annotated."""
        w_ih, w_hh, *biases = [ctx.dims(w) for w in weights]
        assert w_ih is not None and w_hh is not None
        for rows in (w_ih[0], w_hh[0], *(b[0] for b in biases if b is not None)):
            ctx.close(rows)
        state = _opened(hidden)
        for a, b in ((x, w_ih[1]), (state, w_hh[1])):
            if (ctx.grows(a) or ctx.grows(b)) and ctx.contract([a, b], ["input", "weight"]) != 1.0:
                raise ctx.refuse("the weights of the recurrence are computed, so that no parameter takes the shares")
        return state


class Layers(_Gates):
    """``nn.LSTM`` and its like: layers, directions, and the states of all of them in one tensor.

    The states share one hidden axis, so all layers do.
    """

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        x, hidden, states = self._operands(ctx)
        for i, dims in enumerate(states):
            if i:
                ctx.unify(dims[-1], hidden)
            for d in dims[:-2]:
                ctx.freeze(d, "layers and directions of a recurrence")
        feature, lead = x[-1], x[:-1]
        first = bool(ctx.args.get("batch_first"))
        for d in lead[-1:] if first else lead[:1]:
            ctx.freeze(d, "a recurrence runs over it")
        for dims in states if len(lead) == 2 else ():
            ctx.unify(lead[0 if first else 1], dims[-2])
        for layer in self._layers(ctx):
            for weights in layer:
                self._relate(ctx, feature, hidden, weights)
            feature = concat([resolve(hidden)] * len(layer))
        return [[*lead, resolve(feature)], *([*map(resolve, d)] for d in states)]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        x, hidden, states = self._operands(ctx)
        for dims in states:
            ctx.close(dims[-1])
            self._safe(ctx, dims[-1])
        feature, lead = x[-1], x[:-1]
        for layer in self._layers(ctx):
            feature = concat([self._grow(ctx, feature, hidden, weights) for weights in layer])
        lead = [_opened(ctx.close(d)) for d in lead]
        return [[*lead, feature], *([_opened(ctx.close(e)) for e in d] for d in states)]

    @staticmethod
    def _safe(ctx: GrowthContext, state: Expr) -> None:
        """New units start from what the state holds; it does not matter what, as long as nobody else supplies it."""
        if ctx.newborn and any(i.content is Content.FREE and not i.sources for i in infos(state)):
            raise ctx.refuse("the initial state of new units is not known")

    def _operands(self, ctx: Context) -> tuple[Dims, Expr, list[Dims]]:
        x = ctx.operand("input")
        states = self._states(ctx)
        weights = ctx.operand(ctx.args["params"][1])
        if is_unit(states[0][-1]) or size_of(weights[0]) != self.gates * size_of(states[0][-1]):
            raise Conflict("a recurrence with projections, or of one unit")
        return x, states[0][-1], states

    @staticmethod
    def _layers(ctx: Context) -> list[list[list[fx.Node]]]:
        """Weights by layer and direction."""
        params = list(ctx.args["params"])
        width = 4 if ctx.args["has_biases"] else 2
        directions = 2 if ctx.args["bidirectional"] else 1
        cells = [params[i : i + width] for i in range(0, len(params), width)]
        if len(cells) != directions * ctx.args["num_layers"]:
            raise Conflict("a recurrence with projections")
        return [cells[i : i + directions] for i in range(0, len(cells), directions)]


class Cell(_Gates):
    """``nn.LSTMCell`` and its like: one step."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        x, states, weights = self._operands(ctx)
        for other in states[1:]:
            ctx.unify(states[0][-1], other[-1])
        for state in states:
            for mine, theirs in zip(x[:-1], state[:-1], strict=True):
                ctx.unify(mine, theirs)
        self._relate(ctx, x[-1], states[0][-1], weights)
        out = [[*x[:-1], resolve(s[-1])] for s in states]
        return out if ctx.result_count is not None else out[0]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        x, states, weights = self._operands(ctx)
        for s in states:
            ctx.close(s[-1])
        new = self._grow(ctx, x[-1], states[0][-1], weights)
        lead = [_opened(ctx.close(d)) for d in x[:-1]]
        out = [[*lead, new] for _ in states]
        return out if ctx.result_count is not None else out[0]

    def _operands(self, ctx: Context) -> tuple[Dims, list[Dims], list[Any]]:
        x, states = ctx.operand("input"), self._states(ctx)
        if any(is_unit(s[-1]) for s in states):
            raise Conflict("a recurrence of one unit")
        weights = [ctx.args[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
        return x, states, [w for w in weights if w is not None]


register_table(__name__, table())
