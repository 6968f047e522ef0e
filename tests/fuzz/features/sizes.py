"""Size arithmetic: views by sizes of the inputs, scales that count, parts by length, and guards."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Rejected


def guard(c: Composer) -> None:
    """A branch that Python takes by an input's size."""
    v = c.choose(c.vectors(1))
    free = [(i, d) for i, d in enumerate(v.dims) if d in ("B", "T", "U")]
    if not free:
        raise Rejected("no free dim")
    place, letter = c.rng.choice(free)
    assert isinstance(letter, str)
    size = c.letter(letter)
    # both contexts must take the same branch while composing, others take the other one
    limit = c.rng.choice({"B": (2, 4, 5), "T": (3, 4, 9, 10), "U": (3, 6, 7)}[letter])
    index = ":, " * place
    other = c.rng.choice(
        (
            f"{v.name}[{index}-{limit}:]",
            f"{v.name}[{index}:{limit}]",
            f"{v.name} * 2",
            f"torch.tanh({v.name})",
            f"{v.name}.sum({place}, keepdim=True)",
        )
    )
    test = c.rng.choice((">", ">", ">=", "<", "<="))
    if c.rng.random() < 0.3:
        c.value(f"torch.tanh({v.name}) if {size} % 2 == 0 else {v.name}")
    else:
        c.value(f"{other} if {size} {test} {limit} else {v.name}")


def last_ones(c: Composer) -> None:
    v = c.choose(c.vectors(2))
    n = c.rng.choice((1, 2, 3))
    c.value(
        c.rng.choice(
            (
                f"{v.name}[:, -{n}:]",
                f"{v.name}[:, :{n}]",
                f"{v.name}[:, ::2]",
                f"{v.name}[:, -1]",
                f"{v.name}[:, 1:] - {v.name}[:, :-1]",
                f"{v.name}[:, : {v.name}.shape[1] // 2]",
                f"{v.name}[:, {v.name}.shape[1] // 2 :]",
                f"{v.name}[:, : {v.name}.shape[1] - 1]",
            )
        )
    )


def views(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    divisors = [k for k in range(2, d) if d % k == 0]
    lead = c.shape(list(v.dims[:-1]))
    if divisors and c.rng.random() < 0.7:
        k = c.rng.choice(divisors)
        h = c.value(
            c.rng.choice(
                (
                    f"{v.name}.view({lead}, {k}, {d // k})",
                    f"{v.name}.reshape({lead}, -1, {k})",
                    f"{v.name}.unflatten(-1, ({k}, -1))",
                )
            )
        )
        then = c.rng.choice(
            (
                ".transpose(-1, -2).flatten(-2)",
                ".sum(-1)",
                ".amax(-2)",
                ".softmax(-1).flatten(-2)",
                ".transpose(-1, -2)",
                ".mean(-2)",
                ".cumsum(-1).flatten(-2)",
                ".flip(-1).flatten(-2)",
                "",
                ".logsumexp(-1)",
                ".norm(dim=-1)",
                ".prod(-1)",
            )
        )
        if then:
            c.value(f"{h.name}{then}")
    elif len(v.dims) > 2:
        flat = c.value(
            c.rng.choice(
                (f"{v.name}.reshape(-1, {d})", f"{v.name}.flatten(0, 1)", f"{v.name}.view(-1, {v.name}.shape[-1])")
            )
        )
        h = c.value(f"F.linear({flat.name}, {c.parameter(d, d)})")
        c.value(
            c.rng.choice(
                (
                    f"{h.name}.view({c.shape(list(v.dims))})",
                    f"{h.name}.view_as({v.name})",
                    f"{h.name}.reshape({v.name}.shape)",
                )
            )
        )
    else:
        c.value(f"{v.name}.unsqueeze(-1).expand({lead}, {d}, 2).flatten(-2)")


def scaled(c: Composer) -> None:
    """Factors that are sizes: of the batch, the length, or an axis that may grow."""
    v = c.choose(c.vectors())
    sizes = [f"{v.name}.shape[-1]", f"{v.name}.size(-1)", f"{v.name}.shape[0]", "x.shape[-1]"]
    s = c.rng.choice(sizes)
    c.value(
        c.rng.choice(
            (
                f"{v.name} / {s}",
                f"{v.name} * {s} ** -0.5",
                f"{v.name} / math.sqrt({s})",
                f"{v.name} + {s}",
                f"{v.name}.sum(-1) / {s}",
                f"{v.name}.sum(-1, keepdim=True) / {s}",
                f"({v.name} > 0).sum(-1) / {s}",
            )
        )
    )


def counting(c: Composer) -> None:
    """Constants made of numbers: positions, triangles, angles."""
    v = c.choose(c.vectors(2))
    t, d = f"{v.name}.shape[1]", int(v.dims[-1])
    how = c.rng.choice(
        (
            f"{v.name} + torch.arange({t})[:, None]",
            f"{v.name} * torch.linspace(0, 1, {d}, dtype={v.name}.dtype)",
            f"torch.ones({t}, {t}, dtype={v.name}.dtype).tril() @ {v.name}",
            f"{v.name} + torch.sin(torch.arange({t})[:, None] * torch.arange({d}))",
            f"{v.name} * (torch.arange({d}) % 2)",
            f"{v.name}.masked_fill(torch.arange({t})[:, None] > 2, 0.0)",
            f"torch.eye({t}, dtype={v.name}.dtype) @ {v.name}",
            f"{v.name} + torch.full(({d},), 0.5)",
            f"{v.name} - torch.zeros({d}, dtype={v.name}.dtype)",
            f"{v.name} + torch.ones({t}, {d})",
        )
    )
    if len(v.dims) != 3:
        raise Rejected("counts along three dims")
    c.value(how)


def windows(c: Composer) -> None:
    """The length cut into windows, with a pad that fills the last one."""
    v = c.choose([v for v in c.vectors(2) if len(v.dims) == 3 and v.dims[1] == "T"])
    w, d = c.rng.choice((2, 3)), int(v.dims[-1])
    t = f"{v.name}.shape[1]"
    padded = c.value(f"F.pad({v.name}, (0, 0, 0, (-{t}) % {w}))")
    h = c.value(f"{padded.name}.view({v.name}.shape[0], -1, {w}, {d})")
    h = c.value(f"{h.name}.{c.rng.choice(('mean(2)', 'flatten(2)', 'amax(2)'))}")
    if c.rng.random() < 0.5:
        c.value(f"F.linear({h.name}, {c.parameter(c.size(), int(h.dims[-1]))})")
