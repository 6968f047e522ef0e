"""``torch.compile`` by region: blocks that are alike run one compiled code, so that one is compiled for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import fx, nn

from fxgrow.errors import FxgrowError, SpecError
from fxgrow.ir.compiled import Options, as_written, share, shared_of, structures
from fxgrow.ir.packages import compile_ahead
from fxgrow.ir.replicas import innermost
from fxgrow.ir.running import attributes_kept, in_mode

Module = TypeVar("Module", bound=nn.Module)


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is compiled by itself, by path: the generated blocks of a regenerated module, and of any other the numbered
    children that have modules of their own, the outermost ones, but for stages whose own blocks repeat.
    """
    if isinstance(module, fx.GraphModule):
        return [(n, m) for n, m in module.named_modules() if n and isinstance(m, fx.GraphModule)]
    seen: dict[int, tuple[str, nn.Module]] = {}
    for path, block in _blocks_in(module, "")[0]:
        seen.setdefault(id(block), (path, block))
    return list(seen.values())


def _blocks_in(module: nn.Module, prefix: str) -> tuple[list[tuple[str, nn.Module]], bool]:
    """The blocks under a module, and whether any of them repeats."""
    numbered = {n: c for n, c in module.named_children() if n.isdigit() and any(True for _ in c.children())}
    keys = structures(list(numbered.values()), [int(n) for n in numbered])
    alike = len(set(keys)) < len(keys)
    out: list[tuple[str, nn.Module]] = []
    repeats = alike
    inside = {n: _blocks_in(c, f"{prefix}{n}.") for n, c in module.named_children() if n not in numbered or not alike}
    stages = any(inside[n][1] for n in numbered) if not alike else False
    for name, child in module.named_children():
        found, again = inside.get(name, ([], False))
        if name in numbered:
            out += found if stages and again else [(prefix + name, child)]
        else:
            out += found
        repeats = repeats or again
    return out, repeats


def numbers_of(blocks: Sequence[tuple[str, nn.Module]]) -> list[int | None]:
    """The place of each block in its stack, None where it has none."""
    places = [path.rpartition(".")[2] for path, _ in blocks]
    return [int(p) if p.isdigit() else None for p in places]


def compile_regions(module: Module, *, checkpoint: bool = False, **options: Any) -> Module:
    """Compile every block by itself, in place; a module without blocks is compiled whole.

    Blocks of one structure run one compiled code: their classes, plain attributes, and shapes and dtypes of tensors,
    but for a number that is the block's own place in its stack. A second call compiles what has changed since.

    Args:
        module: from :func:`fxgrow.grow`, or any module, with its methods, hooks and names.
        checkpoint: keep a block's inputs alone for its backward, and run it again there.
        options: for ``torch.compile``.

    Returns:
        The module itself; names and state dict are unchanged. Copies and pickles of it are not compiled.
    """
    inner = innermost(module)
    blocks = blocks_of(inner) or [("", inner)]
    wanted = Options(dict(options), checkpoint)
    share([b for _, b in blocks], numbers_of(blocks), wanted)
    return module


def renew(module: nn.Module) -> None:
    """Compile what a growth has changed of a module whose blocks are compiled in place, with the same options."""
    inner = innermost(module)
    shared = next((s for part in inner.modules() if (s := shared_of(part)) is not None), None)
    if shared is not None:
        compile_regions(inner, checkpoint=shared.options.again, **shared.options.given)


def package(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> Path:
    """Compile a module in eval mode into a file; see :meth:`fxgrow.Growth.package`."""
    if path.suffix != ".pt2":
        raise SpecError(f"a package of AOTInductor is a file *.pt2, not {str(path)!r}")
    try:
        with in_mode(module, False), attributes_kept(module):
            return compile_ahead(innermost(module), args, kwargs, path, options)
    except Exception as error:  # whatever torch.export, Inductor and the C++ compiler raise
        reason = str(error).strip().partition("\n")[0]
        raise FxgrowError(f"{type(module).__name__} cannot be packaged: {type(error).__name__}: {reason}") from error


__all__ = ["as_written", "blocks_of", "compile_regions", "numbers_of", "package", "renew"]
