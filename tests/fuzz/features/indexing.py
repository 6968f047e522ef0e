"""Choosing: orders, maxima, gathers and scatters, masks, parts and pads."""

from __future__ import annotations

from tests.fuzz import supply
from tests.fuzz.compose import Composer, Rejected
from tests.fuzz.features.layers import _linear


def equality(c: Composer) -> None:
    """Values compared with one of themselves."""
    v = c.choose(c.vectors())
    dim = c.rng.choice((-1, len(v.dims) - 2)) if len(v.dims) > 1 else -1
    peak = c.value(f"{v.name}.{c.rng.choice(('amax', 'amin'))}({dim}, keepdim=True)")
    test = c.value(f"{v.name} {c.rng.choice(('==', '==', '>=', '!=', '<='))} {peak.name}")
    c.value(
        c.rng.choice(
            (f"torch.where({test.name}, {v.name}, 0)", f"{v.name} * {test.name}", f"{test.name}.to({v.name}.dtype)")
        )
    )


def order(c: Composer) -> None:
    v = c.choose(c.vectors())
    how = c.rng.choice(
        (
            "{}.sort(-1).values",
            "{}.sort(-1, descending=True)[0]",
            "{}.topk(2, -1).values",
            "{}.argsort(-1)",
            "{}.argmax(-1)",
            "{}.max(-1).values",
            "{}.max(-1).indices",
            "{}.median(-1).values",
            "{}.kthvalue(1, -1).values",
            "{}.cummax(-1).values",
            "{}.cumsum(-1)",
            "{}.cumprod(-1)",
            "{}.sort(0).values",
            "{}.topk(2, -1).indices",
            "{}.logcumsumexp(-1)",
            "torch.quantile({}, 0.4, dim=-1)",
            "{}.flip(-1)",
            "{}.roll(1, -1)",
            f"F.one_hot({{}}.argmax(-1), {v.dims[-1]})",
        )
    )
    c.value(how.format(v.name))


def gather(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    roll = c.rng.random()
    if roll < 0.3:
        index = supply.integers(c, [*v.dims[:-1], 2], high=d)
        c.value(f"{v.name}.gather(-1, {index})")
    elif roll < 0.5:
        index = c.buffer(f"torch.tensor({[c.rng.randrange(d) for _ in range(c.size())]})")
        c.value(c.rng.choice((f"{v.name}[..., {index}]", f"{v.name}.index_select(-1, {index})")))
    elif roll < 0.7:
        best = c.value(f"{v.name}.argmax(-1, keepdim=True)")
        other = _linear(c, v, d)
        c.value(f"{other.name}.gather(-1, {best.name})")
    else:
        table = c.parameter(5, c.size())
        index = supply.integers(c, list(v.dims[:-1]), high=5)
        how = c.rng.choice((f"F.embedding({index}, {table})", f"{table}[{index}]"))
        c.value(how)


def scatter(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    index = supply.integers(c, list(v.dims), high=d)
    how = c.rng.choice(
        (
            f"torch.zeros_like({v.name}).scatter_add(-1, {index}, {v.name})",
            f"{v.name}.scatter(-1, {index}, 0.5)",
            f"torch.zeros_like({v.name}).scatter_reduce(-1, {index}, {v.name}, 'amax')",
            f"{v.name}.scatter_reduce(-1, {index}, {v.name}, 'mean', include_self=False)",
        )
    )
    c.value(how)


def masked(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    mask = supply.booleans(c, c.rng.choice(([d], list(v.dims), [*v.dims[:-1], 1])))
    how = c.rng.choice(
        (
            f"{v.name}.masked_fill({mask}, {c.constant()})",
            f"torch.where({mask}, {v.name}, {c.constant()})",
            f"{v.name} * {mask}",
            f"torch.where({mask}, {v.name}, -{v.name})",
            f"{v.name} + {mask} * {c.constant()}",
        )
    )
    c.value(how)


def picked(c: Composer) -> None:
    """Entries where a mask holds: how many is known to the values alone."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    roll = c.rng.random()
    if roll < 0.4:
        keep = [c.rng.random() < 0.6 for _ in range(d)]
        mask = c.buffer(f"torch.tensor({keep if any(keep) else [True] * d})")
        c.value(f"{v.name}[..., {mask}]" + c.rng.choice((".sum(-1)", "", ".mean(-1)")))
    elif len(v.dims) >= 2:
        test = c.value(f"{v.name} > {c.rng.choice(('0', '-0.3'))}")
        if c.rng.random() < 0.5:
            c.value(f"{v.name}[{test.name}].sum()")
        else:
            test = c.value(f"{v.name}.sum(-1) > -1e3")
            c.value(f"{v.name}[{test.name}].sum(0)")


def slices(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    if d < 3:
        raise Rejected("too short")
    a, b = sorted(c.rng.sample(range(d + 1), 2))
    how = c.rng.choice(
        (
            f"[..., {a}:{b}]",
            f"[..., {a}:{d}:2]",
            f"[..., 1:{d - 1}:2]",
            "[..., ::2]",
            f"[..., -{max(1, d - a)}:]",
            f".narrow(-1, {a}, {b - a})",
            f".select(-1, {c.rng.randrange(d)})",
            f"[..., {c.rng.randrange(d)}]",
            f".split([{a or 1}, {d - (a or 1)}], -1)[{c.rng.choice((0, 1))}]",
            ".chunk(2, -1)[0]",
            ".unbind(-1)[0]",
            f".unfold(-1, 2, {c.rng.choice((1, 2))}).sum(-1)",
            ".diff(dim=-1)",
        )
    )
    c.value(f"{v.name}{how}")


def neighbours(c: Composer) -> None:
    """Differences and concatenations with an operand that is easily forgotten."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    left = len(v.dims) - 1
    other = c.parameter(*[1] * left, c.rng.choice((1, 2)))
    edge = c.value(f"{other}.expand({c.shape([*v.dims[:-1], -1])})") if left else None
    how = c.rng.choice(("diff", "diff", "cat", "pad", "trapezoid", "bucketize", "diff0"))
    if how == "diff":
        end = c.rng.choice(("prepend", "append"))
        c.value(f"torch.diff({v.name}, dim=-1, {end}={edge.name if edge else other})")
    elif how == "diff0":
        first = c.parameter(*[1] * left, d)
        if left == 0 or c.rng.random() < 0.5:
            c.value(f"torch.diff({v.name}, dim=0, prepend={v.name}[:1] * {c.constant()})")
        else:
            c.value(f"torch.diff({v.name}, dim=0, prepend={first}.expand({c.shape([1, *v.dims[1:]])}))")
    elif how == "cat":
        c.value(f"torch.cat([{edge.name if edge else other}, {v.name}], -1)")
    elif how == "pad":
        sides = f"({c.rng.choice((0, 1))}, {c.rng.choice((1, 2))}" + (
            ", 0, 1)" if left and c.rng.random() < 0.4 else ")"
        )
        mode = c.rng.choice(
            (f", value={c.constant()}", "", ', mode="replicate"' if len(v.dims) == 3 and ", 0" not in sides else "")
        )
        c.value(f"F.pad({v.name}, {sides}{mode})")
    elif how == "trapezoid":
        c.value(f"torch.trapezoid({v.name}, {c.parameter(d)}, dim=-1)")
    else:
        c.value(f"torch.bucketize({v.name}, {c.parameter(d)}.sort().values)")


def lookups(c: Composer) -> None:
    """Tables looked up by numbers that come from elsewhere: positions, bags, relative distances."""
    n = c.size()
    roll = c.rng.random()
    if roll < 0.4:
        t = c.letter("T")
        table = c.parameter(24, n)
        c.value(
            c.rng.choice((f"{table}[:{t}]", f"F.embedding(torch.arange({t}), {table})", f"{table}[torch.arange({t})]"))
        )
        v = c.pool[-1]
        fits = [u for u in c.vectors(2) if u.dims[-2:] == v.dims]
        if fits:
            c.value(f"{c.choose(fits).name} + {v.name}")
    elif roll < 0.7:
        t = c.letter("T")
        table = c.parameter(11, n)
        far = c.value(f"(torch.arange({t})[None, :] - torch.arange({t})[:, None]).clamp(-5, 5) + 5")
        c.value(f"{table}[{far.name}].sum(1)")
    else:
        ids = [i for i in c.model.inputs if i.high and len(i.dims) == 2]
        if not ids:
            raise Rejected("no numbers")
        layer = c.member(
            f'self.NAME = nn.EmbeddingBag({ids[0].high}, {n}, mode="{c.rng.choice(("sum", "mean", "max"))}")', "l"
        )
        c.value(f"{layer}({ids[0].name})")
