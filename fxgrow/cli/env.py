"""``fxgrow env``: what this machine has."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

from fxgrow.cli.console import out, print_json
from fxgrow.cli.options import Json
from fxgrow.version import __version__


def versions() -> dict[str, str]:
    """Of fxgrow, Python, torch and triton, as installed; imports none of them."""
    found = {"fxgrow": __version__, "Python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def env(json_: Json = False) -> None:
    """Versions, the device, and which kernels are used here; where some are not, why.

    \b
    fxgrow env
    fxgrow env --json
    """
    import torch

    from fxgrow.kernels import backends

    rows = versions() | {"torch": torch.__version__}  # with what it was built for
    rows["CUDA"] = str(torch.version.cuda) if torch.cuda.is_available() else "no device"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows |= {f"kernels: {b.name}": b.devices if b.available else f"not available: {b.reason}" for b in backends()}
    if json_:
        print_json(rows)
        return
    for name, text in rows.items():
        out().print(f"{name:<16} {text}", soft_wrap=True, markup=False)
