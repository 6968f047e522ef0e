"""What an exact growth may measure."""

from __future__ import annotations

import torch

from fxgrow.ir.traced import Traced
from fxgrow.verify.rounding import Tolerance

#: an exact growth that measures more than this in float64 is a bug
LIMIT = 1e-10
GRADIENT_LIMIT = 1e-7
#: beyond this, rounding is looked into: the model runs again with its values moved
SUSPICIOUS = 1e-12


def native_tolerance(program: Traced) -> Tolerance:
    """Of a comparison in the model's own dtype: that of the coarsest dtype that it computes in.

    256 units in the last place (3e-5 in float32), and no more than 1/32; beyond that, 16 times what one unit in every
    value moves the output by.
    """
    values = [t.dtype for t in program.tensors.values()]
    values += [v.dtype for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    eps = max((torch.finfo(d).eps for d in values if d.is_floating_point), default=0.0)
    return Tolerance(max(LIMIT, min(256 * eps, 1 / 32)), steps=1, amplified=16)
