"""Try to refute a growth: outputs, state and gradients of both models on many inputs, and newborn parameters alive.

Three comparisons, each with a limit:

* *own dtype*: the user's own module against the grown one, several calls in a row, eval and train mode;
* *float64*: both graphs, node by node, with float64 in place of every float dtype, so that the algebra is tested and
  not the rounding;
* *float64, other weights*: every parameter drawn around its value and those that are zero opened, since the plan is
  linear in them: gates and projections at zero hide what lies behind them.

The parts, each of which can be read alone. What is run: :mod:`~fxgrow.verify.native` and :mod:`~fxgrow.verify.float64`
say what is compared and in which order, on what :mod:`~fxgrow.verify.inputs` finds; :mod:`~fxgrow.verify.weights` are
those of the models in float64, and a :mod:`~fxgrow.verify.side` runs one of the two. What comes of it:
:mod:`~fxgrow.verify.differences` measures outputs, state and gradients, :mod:`~fxgrow.verify.rounding` what of that the
model amplifies, :mod:`~fxgrow.verify.liveness` whether new weights learn, :mod:`~fxgrow.verify.exercise` what nothing
reached. :mod:`~fxgrow.verify.limits` and :mod:`~fxgrow.verify.failures` judge the :mod:`~fxgrow.verify.receipt`.
"""

from __future__ import annotations

import time

import torch
from torch import fx, nn

from fxgrow.emit.module import regenerate
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.verify.failures import Failures
from fxgrow.verify.float64 import Float64
from fxgrow.verify.inputs import Inputs
from fxgrow.verify.native import Native
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Level, Receipt


def verify(
    program: Traced,
    grown_program: Traced,
    plan: GrowthPlan,
    original: nn.Module | None,
    grown: fx.GraphModule,
    level: Level,
) -> Receipt:
    """Measure a growth.

    Args:
        original: the user's own module; where None, one is made of the program.
        level: ``float64`` whole, ``streamed`` (one op's weights at a time), or the model's own dtype alone.

    Raises:
        ExactnessError: the plan is exact, the measurement is not.
    """
    receipt = Receipt(exactness=plan.exactness, measured=level)
    pair, inputs, failures = Pair(program, grown_program, plan), Inputs(program), Failures(plan)
    start = time.perf_counter()
    if original is None:
        original = regenerate(program, program.tensors, hierarchical=False)
    Native(pair, inputs, failures, receipt).run(original, grown)
    receipt.seconds["verify native"] = time.perf_counter() - start
    start = time.perf_counter()
    if level == "float64":
        Float64(pair, inputs, failures, receipt).whole()
    elif level == "streamed":
        Float64(pair, inputs, failures, receipt).streamed()
        receipt.notes.append("gradients not measured: the model is too large for float64 as a whole")
    else:
        receipt.notes.append("float64 not measured: verify='native'")
    if level != "native":
        receipt.seconds["verify float64"] = time.perf_counter() - start
    receipt.inputs = inputs.words
    failures.judge(receipt)
    if level != "native" and (casts := _casts(program)):
        receipt.notes.append(
            f"the model casts to {casts} inside: float64 widens these casts, so that what they do is measured "
            "in the model's own dtype alone"
        )
    return receipt


def verify_streamed(program: Traced, grown_program: Traced, plan: GrowthPlan) -> Receipt:
    """Measure a growth in float64 alone, one op's weights at a time: of models that no module holds whole.

    Args:
        program: whose tensors may be made, or gathered, when they are asked for.

    Raises:
        ExactnessError: the plan is exact, the measurement is not.
    """
    receipt = Receipt(exactness=plan.exactness, measured="streamed")
    pair, inputs, failures = Pair(program, grown_program, plan), Inputs(program), Failures(plan)
    start = time.perf_counter()
    Float64(pair, inputs, failures, receipt).streamed()
    receipt.notes.append("gradients not measured, nor the model's own dtype: no process holds the whole model")
    receipt.seconds["verify float64"] = time.perf_counter() - start
    receipt.inputs = inputs.words
    failures.judge(receipt)
    return receipt


def _casts(program: Traced) -> str:
    """The dtypes narrower than float32 that the graph names itself."""
    found: set[str] = set()
    for node in program.graph.nodes:
        for value in (*node.args, *node.kwargs.values()):
            if value in (torch.float16, torch.bfloat16):
                found.add(str(value).removeprefix("torch."))
    return " and ".join(sorted(found))
