"""The class of a checkpoint, made from its config: its buffers hold what the class computes, its weights nothing.

Parameters are memory that nobody writes, which a system hands out when it is written: a model that is larger than
memory can be made, traced and changed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxgrow.errors import CheckpointError, SpecError
from fxgrow.folders.conversions import Stored
from fxgrow.landing.beside import Unwritten
from fxgrow.landing.living import attributes_of

Make = Callable[[Mapping[str, Any]], nn.Module]
#: where a class of transformers keeps patterns of names that it has no place for
_LEFT_OUT = "_keys_to_ignore_on_load_unexpected"
#: entries of a config that say what it is, and are no settings
_OF_TRANSFORMERS = ("architectures", "model_type", "transformers_version")


def maker_of(folder: Path, config: Mapping[str, Any], kind: type[nn.Module] | None) -> Make:
    """What makes the class from the settings of a ``config.json``.

    Args:
        kind: the class; None for the one of transformers that the config names.

    Raises:
        CheckpointError: there is no such class, or transformers is not there.
    """
    if kind is not None:
        return _from_class(kind)
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder} brings code of its own (auto_map), which is not run: import it yourself and name the class"
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            f"{folder} looks like a folder of transformers, which is not installed: pip install transformers, or name "
            "the class that it is of"
        ) from None
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{folder / 'config.json'} names no class under architectures: name it yourself")
    found: Any = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"transformers {transformers.__version__} has no class {names[0][:80]!r}: name one")
    settings = found.config_class  # type: ignore[attr-defined]

    def make(given: Mapping[str, Any]) -> Any:
        model: Any = found(settings.from_dict(copy.deepcopy(dict(given))))
        if hasattr(model, "set_experts_implementation"):  # of several that compute the same, one that can be traced
            model.set_experts_implementation("batched_mm")
        if getattr(model.config, "is_encoder_decoder", False):
            model.register_forward_hook(_said)
        return model

    return make


def _said(_: nn.Module, __: Any, out: Any) -> Any:
    """What a class is for: beside it, the state of an encoder would be a result that keeps its width for ever."""
    if not isinstance(out, Mapping):
        return out
    kept = {name: value for name, value in out.items() if not name.endswith(("hidden_state", "hidden_states"))}
    return kept if kept and len(kept) < len(out) else out


def _from_class(kind: type[nn.Module]) -> Make:
    """A class that takes the settings by name, or an object of them whose class its signature says."""
    held, known = taken_by(kind)

    def make(given: Mapping[str, Any]) -> nn.Module:
        own = {
            k: copy.deepcopy(v) for k, v in given.items() if k not in _OF_TRANSFORMERS and (known is None or k in known)
        }
        return kind(**own) if held is None else kind(held(**own))

    return make


def taken_by(kind: type[nn.Module]) -> tuple[Any, set[str] | None]:
    """The class of an object of settings that a class takes, None where it takes them by name; and their names.

    The names are None where it takes any.
    """
    parameters = [p for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    first = parameters[0] if parameters else None
    try:
        hint = typing.get_type_hints(kind.__init__).get(first.name) if first else None
    except Exception:  # a hint that cannot be read
        hint = None
    if isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "from_dict")):
        fields = getattr(hint, "__dataclass_fields__", None)
        return hint, None if fields is None else set(fields)
    return None, {p.name for p in parameters}


def build(make: Make, config: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], what: str) -> nn.Module:
    """The class with these settings, in eval mode.

    Args:
        dtypes: of tensors by name; what it does not name is of the one that most are of.

    Raises:
        CheckpointError: the class cannot be made so.
    """
    floats = Counter(d for d in dtypes.values() if d.is_floating_point and d.itemsize > 1)
    usual = next((d for d, _ in floats.most_common(1)), None)
    try:
        with (
            warnings.catch_warnings(),
            default_dtype(usual),
            torch.random.fork_rng(devices=[]),
            Unwritten(),
            _at_most(10_000 + 100 * len(dtypes)),
        ):
            warnings.simplefilter("ignore")
            model = make(config)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:300]
        raise CheckpointError(f"the class cannot be made from {what}: {type(error).__name__}: {said}") from error
    for name, p in model.named_parameters():
        if dtypes.get(name, p.dtype) != p.dtype:
            p.data = torch.empty(p.shape, dtype=dtypes[name])
    return model.eval()


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """A class with more parameters than that is no class of these files: a number of its config is damaged."""
    left = count

    def counted(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(f"it has more than {count} parameters, far more than there are tensors")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Floats are of a dtype where nothing else is said."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prefixes_of(model: nn.Module) -> list[Callable[[str], str]]:
    """From names in files to the model's: the files may hold the model that the class wraps, without its prefix, or the
    other way around.
    """
    prefix = getattr(model, "base_model_prefix", "") or ""
    choices: list[Callable[[str], str]] = [lambda n: n]
    if prefix:
        choices += [lambda n: f"{prefix}.{n}", lambda n: n.removeprefix(f"{prefix}.")]
    return choices


def names_of(model: nn.Module, tensors: Mapping[str, Stored], where: str) -> tuple[dict[str, str], list[str]]:
    """The model's name for each name in the files, and those that the class says it has no place for.

    Raises:
        CheckpointError: a name or a shape does not fit, or something is missing.
    """
    own = model.state_dict(keep_vars=True)
    choices = prefixes_of(model)
    best = max(choices, key=lambda c: sum(c(n) in own for n in tensors))
    found = {n: best(n) if best(n) in own else n for n in tensors}
    patterns = attributes_of(model).get(_LEFT_OUT) or getattr(type(model), _LEFT_OUT, None) or ()
    ignored = [n for n in tensors if found[n] not in own and any(re.search(p, n) for p in patterns)]
    found = {n: m for n, m in found.items() if n not in ignored}
    kind = type(model).__name__
    mistakes = [f"{n} is in the files, and {kind} has no such tensor" for n, m in found.items() if m not in own]
    for n, m in found.items():
        if m in own and tuple(own[m].shape) != tensors[n].shape:
            mistakes.append(f"{n} is {list(tensors[n].shape)} in the files, {list(own[m].shape)} in the class")
    there = {id(own[m]) for m in found.values() if m in own}
    mistakes += [f"{n} of the class is not in the files" for n, t in own.items() if id(t) not in there]
    if mistakes:
        more = f"; and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise CheckpointError(f"{where} does not fit {kind}: {'; '.join(mistakes[:5])}{more}")
    return found, ignored


def example_of(model: nn.Module) -> dict[str, Any]:
    """Example inputs, from the signature of the model's forward and the sizes in its config.

    Raises:
        SpecError: nothing is known of what it takes.
    """
    known = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    vocabulary = getattr(text, "vocab_size", None)
    generator = torch.Generator().manual_seed(0)

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def tokens() -> torch.Tensor:
        return torch.randint(min(int(vocabulary or 2), 1000), (2, 8), generator=generator)

    out: dict[str, Any] = {}
    if "input_ids" in known and vocabulary:
        out["input_ids"] = tokens()
        if "decoder_input_ids" in known and getattr(config, "is_encoder_decoder", False):
            out["decoder_input_ids"] = tokens()
    elif "pixel_values" in known and getattr(config, "image_size", None):
        size = config.image_size  # type: ignore[union-attr]
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), high, wide)
        out["pixel_values"] = torch.randn(shape, generator=generator).to(dtype)
    elif "input_features" in known and all(hasattr(config, key) for key in ("num_mel_bins", "max_source_positions")):
        length = 2 * config.max_source_positions  # type: ignore[union-attr]
        frames = torch.randn(2, config.num_mel_bins, length, generator=generator)  # type: ignore[union-attr]
        out["input_features"] = frames.to(dtype)
        if "decoder_input_ids" in known and vocabulary:
            out["decoder_input_ids"] = tokens()
    elif "idx" in known and (size := getattr(config, "vocab_size", None)):
        out["idx"] = torch.randint(
            min(int(size), 1000), (2, min(8, getattr(config, "block_size", 8))), generator=generator
        )
    if not out:
        names = ", ".join(n for n in known if n not in ("args", "kwargs"))
        raise SpecError(f"no example is known for {type(model).__name__}.forward({names}): give one (--input NAME=…)")
    if "use_cache" in known:
        out["use_cache"] = False
    return out
