"""What a living model is beside its function: every value it keeps, what it generates, what it saves."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.families import Example
from benchmarks.families.huggingface import Logits

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Wide(TorchDispatchMode):
    """Casts to narrower floats are casts to float64: a norm that computes in float32 leaves 1e-7 in any comparison."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: torch.float64 if x in _NARROW else x, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused growth must leave as it was, by name: identities, bits, plain values, modes, hooks."""
    out: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        out[f"{path} class"] = (id(module), type(module), module.training, list(module._modules))
        out[f"{path} values"] = _values(vars(module), 4)
        out[f"{path} hooks"] = [len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v is not None]
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                out[f"{path}.{name}"] = None if tensor is None else (id(tensor), tensor.requires_grad, bits(tensor))
    return out


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    """Dtype, shape and a digest of the values."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha1(flat.numpy().tobytes()).hexdigest()


def _values(value: Any, depth: int) -> Any:
    """Numbers and texts, also those in containers and in the attributes of plain objects (configs)."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, Tensor):
        return bits(value)
    if depth == 0 or isinstance(value, nn.Module) or callable(value):
        return type(value)
    if isinstance(value, Mapping):
        hidden = ("_parameters", "_buffers", "_modules")
        return {k: _values(v, depth - 1) for k, v in value.items() if k not in hidden and not str(k).endswith("_hooks")}
    if isinstance(value, list | tuple):
        return [_values(v, depth - 1) for v in value]
    return (type(value), _values(vars(value), depth - 1)) if hasattr(value, "__dict__") else type(value)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]


def _speaker(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Logits) else model


def spoken(model: nn.Module, example: Example) -> dict[str, Tensor] | None:
    """Greedy continuations, with and without a cache; None where the model has no ``generate`` or cannot."""
    speaker: Any = _speaker(model)
    generate: Any = getattr(speaker, "generate", None)
    if generate is None:
        return None
    if not hasattr(speaker, "can_generate"):  # nanoGPT's: samples, of which one candidate is the most probable
        return {"sampled": generate(example.args[0], 6, top_k=1)}
    if not speaker.can_generate():
        return None
    inputs = {k: v for k, v in example.kwargs.items() if k in ("input_ids", "attention_mask", "input_features")}
    out = {}
    for cached in (True, False):
        settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 10**9}
        config = speaker.config
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            settings["decoder_start_token_id"] = 0
        out["cached" if cached else "plain"] = generate(**inputs, **settings, use_cache=cached)
    return out


def reloaded(model: nn.Module) -> nn.Module | None:
    """The model that another process would build of what this one saves; None where there is no config.

    ``save_pretrained`` and ``from_pretrained``, or the class built of the model's own config dataclass and a strict
    load.
    """
    speaker: Any = _speaker(model)
    if hasattr(speaker, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            speaker.save_pretrained(folder)
            made = type(speaker).from_pretrained(folder, dtype=torch.float64)
        made.config._experts_implementation = getattr(speaker.config, "_experts_implementation", None)
        return (Logits(made) if isinstance(model, Logits) else made).eval()  # type: ignore[no-any-return]
    config = getattr(speaker, "config", None)
    if not is_dataclass(config):
        return None
    built: nn.Module = type(speaker)(copy.deepcopy(config))
    built.double().load_state_dict(speaker.state_dict(), strict=True)
    return built.eval()
