"""From what a user types on the command line to a model and example inputs.

A model is named ``package.module:callable``. The callable returns a module, ``(module, args)``, ``(module, args,
kwargs)`` or a :class:`fxgrow.training.Task`; a folder that :func:`fxgrow.save` wrote is a model too.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.checkpoint import Loaded, load, load_weights
from fxgrow.cli.console import working
from fxgrow.errors import FxgrowError, SpecError, did_you_mean
from fxgrow.folders.dictionary import is_table
from fxgrow.folders.opened import opened
from fxgrow.folders.source import CONFIG
from fxgrow.ir import trees
from fxgrow.manifest import MANIFEST
from fxgrow.program import Program, capture
from fxgrow.reading import parse_yaml
from fxgrow.training.batches import seeded
from fxgrow.training.task import Task

INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,\s]*)\](?:<(?P<limit>\d+))?")
INPUT_HELP = (
    "describe each input as DTYPE[SIZES], with <N for integers below N and NAME= for keywords: "
    '--input "int64[2,16]<65" --input "mask=bool[2,16]"'
)


@dataclass
class Named:
    """A model with its example inputs."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str
    checkpoint: Loaded | None = None
    """Where the model is one."""


def parse_input(text: str, device: str = "cpu") -> tuple[str | None, Any]:
    """An example input: ``[NAME=]DTYPE[SIZES][<LIMIT]`` or a literal (``NAME=0.5``, ``none``).

    Integers are drawn below the limit (2 without one), floats from a normal distribution.

    Returns:
        Keyword or None, and the value.

    Raises:
        SpecError: it is neither.
    """
    found = INPUT.fullmatch(text.strip())
    if found is None:
        name, equals, literal = text.partition("=")
        if not (equals and name.isidentifier()):
            name, literal = "", text
        value = parse_yaml(literal, f"--input {text!r}") if "[" not in literal else literal
        if value is None or isinstance(value, bool | int | float) or str(value).lower() == "none":
            return name or None, None if isinstance(value, str) else value
        raise SpecError(f"--input {text!r}: {INPUT_HELP}")
    dtype = getattr(torch, found["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise SpecError(f"--input {text!r}: no dtype {found['dtype']!r}; for example float32, bfloat16, int64, bool")
    shape = [int(s) for s in found["shape"].split(",") if s.strip()]
    if dtype.is_floating_point or dtype.is_complex:
        if found["limit"]:
            raise SpecError(f"--input {text!r}: <{found['limit']} is for integers")
        return found["name"], torch.randn(shape, device=device).to(dtype)
    limit = int(found["limit"] or 2)
    return found["name"], torch.randint(limit, shape, device=device).to(dtype)


def parse_settings(settings: Sequence[str], option: str = "--config", nested: bool = False) -> dict[str, Any]:
    """``key=value`` pairs; values are YAML: ``depth=4``, ``bias=false``, ``sizes=[1, 2]``.

    Args:
        nested: keys may lead into tables, ``text_config.hidden_size=64``.

    Raises:
        SpecError: one without ``=`` or with a value that is no YAML.
    """
    out: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not all(k.isidentifier() for k in (key.split(".") if nested else [key])):
            raise SpecError(f"{option} {text!r}: write key=value")
        out[key] = parse_yaml(value, f"{option} {text!r}")
        if isinstance(out[key], str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value.strip()):
            out[key] = float(value)  # 1e-3, which YAML takes for text
    return out


def find_callable(reference: str) -> Any:
    """Import ``package.module:callable``; the current folder is importable.

    Raises:
        SpecError: there is no such module or name.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise SpecError(
            f"{reference!r} names no model: write package.module:callable (as in examples.gpt.train:task), "
            "or the folder of a checkpoint"
        )
    if module_name.endswith(".py"):
        module_name = module_name.removesuffix(".py").replace("/", ".").lstrip(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        near = " (the current folder is searched first)" if error.name == module_name.partition(".")[0] else ""
        raise SpecError(f"{reference!r}: cannot import {error.name}{near}") from error
    except Exception as error:
        raise SpecError(f"{reference!r}: importing {module_name} fails: {_location(error)}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(f"{reference!r}: {module_name} has no {part!r}; {did_you_mean(part, own, cutoff=0.4)}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{reference!r} is a {type(found).__name__}, which cannot be called")
    return found


def call(reference: str, settings: Mapping[str, Any]) -> Any:
    """Call what a reference names with keyword arguments.

    Raises:
        SpecError: it cannot be found, takes other arguments, or fails; with the line where it fails.
    """
    function = find_callable(reference)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(**settings)
        except TypeError as error:
            raise SpecError(
                f"{reference!r} takes {signature}, got {dict(settings) or 'nothing'}: {error}. "
                "Pass arguments with --config key=value, or name a function that needs none"
            ) from None
    try:
        return function(**settings)
    except FxgrowError:
        raise
    except Exception as error:
        raise SpecError(f"{reference!r} fails: {_location(error)}") from error


def _location(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "/fxgrow/" not in f.filename and not f.filename.startswith("<")]
    where = f" (at {mine[-1].filename}:{mine[-1].lineno})" if mine else ""
    return f"{type(error).__name__}: {error}{where}"


def load_model(
    reference: str,
    *,
    config: Sequence[str] = (),
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    dry: bool = False,
    named: str | None = None,
) -> Named:
    """The model and example inputs that a command works on.

    Args:
        reference: ``package.module:callable`` or a checkpoint folder: fxgrow's own, or one with a config.
        config: ``key=value`` arguments of the callable.
        inputs: see :func:`parse_input`; they replace what the callable returns.
        weights: a safetensors state dict, or a checkpoint folder, to load.
        device: of the model and its inputs.
        seed: for weights and inputs.
        dry: shapes are enough: build on the meta device where that works.
        named: the class of a folder with a config, where it is not transformers'.

    Raises:
        FxgrowError: the model cannot be found, made or filled, or its inputs are not known.
    """
    torch.manual_seed(seed)
    if is_folder_of_a_class(reference):
        folder = opened(reference, None if named is None else find_callable(named), named_inputs(inputs, device))
        model = (folder.model if dry else folder.load()).to(device)
        return Named(model, (), trees.map_tensors(lambda x: x.to(device), folder.inputs), reference)
    if ":" not in reference and Path(reference).is_dir():
        loaded = load(reference, device=device)
        args, kwargs = _given(inputs, device) if inputs else (loaded.args, loaded.kwargs)
        if weights is not None:
            load_weights(loaded.module, weights)
        return Named(loaded.module, args, kwargs, reference, loaded)
    settings = parse_settings(config)
    made: Any = None
    if dry and weights is None:
        with contextlib.suppress(Exception), torch.device("meta"):
            made = _unpack(call(reference, settings), reference)
            if inputs or made[1] or made[2]:
                device = "meta"
            else:
                made = None
    if made is None:
        torch.manual_seed(seed)
        made = _unpack(call(reference, settings), reference)
    module, args, kwargs = made
    if weights is not None:
        load_weights(module, weights)
    if inputs:
        args, kwargs = _given(inputs, device)
    if not args and not kwargs:
        names = ", ".join(inspect.signature(module.forward).parameters)
        raise SpecError(
            f"{reference!r} returned a {type(module).__name__} without example inputs for forward({names}): "
            f"{INPUT_HELP}; or let the callable return (module, args)"
        )
    module = module.to(device)
    args, kwargs = trees.map_tensors(lambda x: x.to(device), (args, kwargs))
    return Named(module, tuple(args), dict(kwargs), reference)


def _given(inputs: Sequence[str], device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parsed = [parse_input(text, device) for text in inputs]
    return tuple(v for n, v in parsed if n is None), {n: v for n, v in parsed if n is not None}


def named_inputs(inputs: Sequence[str], device: str = "cpu") -> dict[str, Any] | None:
    """Example inputs of a folder's model, by name; None where there are none.

    Raises:
        SpecError: one has no name.
    """
    args, kwargs = _given(inputs, device)
    if args:
        raise SpecError('name the inputs of a folder\'s model: --input "input_ids=int64[2,8]<100"')
    return kwargs or None


def _unpack(result: Any, reference: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if isinstance(result, Task):
        args, kwargs = result.example(result.batches("train", seeded(result.hyper.seed, "train", 0)))
        return result.model, args, kwargs
    if isinstance(result, nn.Module):
        return result, (), {}
    if isinstance(result, tuple) and result and isinstance(result[0], nn.Module) and len(result) in (2, 3):
        args = (result[1],) if isinstance(result[1], torch.Tensor) else tuple(result[1])
        return result[0], args, dict(result[2]) if len(result) == 3 else {}
    raise SpecError(
        f"{reference!r} returned {type(result).__name__}; a model's callable returns a module, (module, args), "
        "(module, args, kwargs) or a fxgrow.training.Task"
    )


def is_folder_of_a_class(reference: str | Path) -> bool:
    """Whether it is a folder with a config, as transformers has them, and not fxgrow's own; or a file of torch.save."""
    folder = Path(reference)
    return is_table(folder) or ((folder / CONFIG).is_file() and not (folder / MANIFEST).is_file())


def named_model(reference: str, **options: Any) -> Named:
    """:func:`load_model`, with a spinner."""
    with working(f"building {reference}"):
        return load_model(reference, **options)


def captured(named: Named) -> Program:
    """The program of a model, its axes analysed, with a spinner."""
    with working(f"capturing {named.label}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the output itself
        program = capture(named.module, named.args, named.kwargs)
        len(program.axes)
    return program
