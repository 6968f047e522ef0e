"""A finding as a script that stands alone: paste it, run it, and it fails."""

from __future__ import annotations

from tests.fuzz.judge import Probe
from tests.fuzz.text import SIZES
from tests.fuzz.trial import Finding


def script(finding: Finding) -> str:
    """The text of the script."""
    case, model = finding.case, finding.case.model
    probe = finding.probe or Probe("forward", 0, 0)
    lines = [f'"""{finding.kind}: {finding.detail}', "", f"model {finding.number}; {probe}", '"""', ""]
    lines += [model.prelude().replace("import torch\n", "import torch\nimport fxgrow\n", 1), ""]
    lines += [model.definition(), "", ""]
    lines += [f"generator.manual_seed({case.seed})", f"torch.manual_seed({case.seed})", "model = trained(M()).eval()"]
    values = [i for i in model.inputs if i.name in model.ways()["forward"]]
    lines += [f"example = ({', '.join(i.code(SIZES[0], model.dtype) for i in values)},)"]
    calls = ""
    if model.calls:
        parts = []
        for name, names in model.calls.items():
            inner = ", ".join(f"example[{[i.name for i in model.inputs].index(n)}]" for n in names)
            parts.append(f'"{name}": ({inner},)')
        calls = f", calls={{{', '.join(parts)}}}"
    if model.dynamic != "all":
        calls += f', dynamic="{model.dynamic}"'
    lines += [f"program = fxgrow.capture(model, example{calls})"]
    for spec in case.before:
        lines += [
            "try:  # thrown away",
            f"    fxgrow.grow(program, {spec!r}, verify=False)",
            "except Exception:",
            "    pass",
        ]
    for spec in case.growths:
        lines += [f"growth = fxgrow.grow(program, {spec!r}, verify=False)", "program = growth.program"]
    if case.growths:
        names = model.ways()[probe.call]
        given = [i for i in model.inputs if i.name in names]
        parts = []
        for i in given:
            code = i.code(SIZES[probe.sizes], model.dtype)
            parts.append(code if i.high or probe.scale == 1 else f"{code} * {probe.scale:g}")
        lines += [f"for mode in ({probe.training}, {not probe.training}):"]
        lines += [f"    given = ({', '.join(parts)},)"]
        lines += ["    for call in range(3):  # state may drift"]
        lines += ["        a, b = model.train(mode)(*given), growth.module.train(mode)(*given)"]
        lines += ["        a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))"]
        lines += ["        for x, y in zip(a, b):"]
        lines += ["            assert x.dtype == y.dtype, (x.dtype, y.dtype)"]
        lines += ["            torch.testing.assert_close(y, x, rtol=1e-7, atol=1e-9, equal_nan=True)"]
    return "\n".join(lines) + "\n"
