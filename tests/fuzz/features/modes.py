"""What differs between train and eval: literals, ops, branches, and dropout at zero."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Rejected
from tests.fuzz.features.layers import _activated, _linear


def literal(c: Composer) -> None:
    """A number, a size or a flag that is another one in train mode."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    divisors = [k for k in range(1, d + 1) if d % k == 0]
    if len(divisors) > 2 and c.rng.random() < 0.5:
        a, b = c.rng.sample(divisors, 2)
        lead = c.shape(list(v.dims[:-1]))
        h = c.value(f"{v.name}.reshape({lead}, {a} if self.training else {b}, -1)")
        then = (".amax(-2).mean(-1)", ".mean(-1).amax(-1)", ".sum(-2).flatten(1).mean(-1)", ".prod(-2).sum(-1)")
        c.value(f"{h.name}{c.rng.choice(then)}")
        return
    how = c.rng.choice(
        (
            f"{v.name} * (0.5 if self.training else 2.0)",
            f"{v.name}.clamp(min=-1.0 if self.training else -2.0)",
            f"{v.name}.sum(-1 if self.training else 0, keepdim=True)" if len(v.dims) > 1 else f"{v.name} * 2",
            f"{v.name}[..., : {max(1, d // 2)} if self.training else {d}].sum(-1)",
            f"{v.name}.roll(1 if self.training else 2, -1)",
            f"torch.softmax({v.name} / (1.0 if self.training else 0.5), -1)",
            f"F.leaky_relu({v.name}, 0.3 if self.training else 0.1)",
            f"{v.name}.topk(1 if self.training else 2, -1).values.sum(-1)",
            f"F.pad({v.name}, (1, 0), value=1.0 if self.training else 0.0)",
            f"{v.name}.cumsum(-1 if self.training else 0)",
            f"F.layer_norm({v.name}, ({d},), eps=1e-5 if self.training else 1e-2)",
        )
    )
    c.value(how)


def branch(c: Composer) -> None:
    """Other ops in each mode."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    a = c.rng.choice(
        (f"torch.tanh({v.name})", f"{v.name} - {v.name}.mean(-1, keepdim=True)", f"{v.name} * {c.parameter(d)}")
    )
    b = c.rng.choice(
        (f"{v.name}", f"{v.name}.exp()", f"F.layer_norm({v.name}, ({d},))", f"F.linear({v.name}, {c.parameter(d, d)})")
    )
    name = c.fresh()
    c.step(f"if self.training:\n    {name} = {a}\nelse:\n    {name} = {b}", name)


def dropout(c: Composer) -> None:
    """At zero, so that both modes agree; the op stays in the graph."""
    v = c.choose(c.reals())
    c.value(f"F.dropout({v.name}, 0.0, self.training)")


def auxiliary(c: Composer) -> None:
    """A head that train mode alone adds."""
    v = c.choose(c.vectors())
    h = _activated(c, _linear(c, v))
    w = c.parameter(int(v.dims[-1]), int(h.dims[-1]))
    name = c.fresh()
    c.step(f"{name} = {v.name}\nif self.training:\n    {name} = {name} + F.linear({h.name}, {w})", name)


def calls(c: Composer) -> None:
    """A second way of calling: with an argument that is otherwise left out."""
    from tests.fuzz.text import Input

    if c.model.calls or any(i.optional for i in c.model.inputs):
        raise Rejected("once is enough")
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    i = Input("y", v.dims, optional=True)
    h = _linear(c, v, d)
    name = c.fresh()
    c.model.inputs.append(i)
    c.model.calls["short"] = [x.name for x in c.model.inputs if not x.optional]
    try:
        c._start()
        how = c.rng.choice(
            (f"{v.name} + y", f"{v.name} * y.sum(-1, keepdim=True)", f"torch.cat([{v.name}, y], -1)[..., :{d}]")
        )
        c.step(f"if y is None:\n    {name} = {h.name}\nelse:\n    {name} = {how}", name)
    except Rejected:
        c.model.inputs.remove(i)
        c.model.calls.clear()
        c._start()
        raise
