"""PEFT: what its layers and configs keep beside their tensors, and its LoRA adapters under a schedule.

That adapters grow with their base is no matter of this file: they are parameters that the graph reads. Nothing here is
imported by anybody; :mod:`fxgrow.plugins` does so once PEFT is imported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import nn

from fxgrow.errors import FxgrowError, GrowthRefused, Refusal, SpecError
from fxgrow.ir.libraries import Adapter, Setter, register_library
from fxgrow.ir.modules import children_of, set_children

#: an attribute of a layer: by adapter, the step at which it began to fade, over how many, to what, from which scaling,
#: and the scaling that it had last
FADING = "fxgrow_fading"


_ASK = "grow the PEFT layer"


class Peft:
    """See :class:`~fxgrow.ir.libraries.Library`."""

    def adapters(self, model: nn.Module) -> Iterator[Adapter]:
        """The LoRA adapters that are active."""
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for name in layer.active_adapters:
                    if name in layer.r:
                        yield Lora(path, layer, name)

    def keep(self, model: nn.Module) -> Callable[[nn.Module, Setter], None] | None:
        """Refuse adapters that no call reads, and remember what layers multiply by beside what configs say."""
        layers = [(p, m) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        if not layers:
            return None
        for path, module in model.named_modules():
            _check_read(path, module)
        ratios = {(id(m), n): _ratio(m, n) for _, m in layers if isinstance(m, LoraLayer) for n in m.r}

        def settle(grown: nn.Module, put: Setter) -> None:
            for _, layer in grown.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    _settle_widths(layer, put)
                if isinstance(layer, LoraLayer):
                    for name in layer.r:
                        _settle_rank(layer, name, ratios.get((id(layer), name), 1.0), put)
                        _settle_fading(layer, name, put)
            self.say(grown, put)

        return settle

    def say(self, model: nn.Module, put: Setter) -> None:
        """Let configs name the adapted layers, and say their ranks and alphas: what is saved with them says no more."""
        for tuner in model.modules():
            if not isinstance(tuner, BaseTuner):
                continue
            inside = [(p, m) for p, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)]
            for name, config in tuner.peft_config.items():
                layers = {p: m for p, m in inside if name in _names(m)}
                if layers:
                    _say_targets(tuner, config, layers, put)
                if layers and isinstance(config, LoraConfig):
                    own = {p: m for p, m in layers.items() if isinstance(m, LoraLayer) and name in m.r}
                    _say_numbers(config, "r", "rank_pattern", {p: m.r[name] for p, m in own.items()}, put)
                    alphas = {p: m.lora_alpha[name] for p, m in own.items()}
                    _say_numbers(config, "lora_alpha", "alpha_pattern", alphas, put)

    def twins(self, model: nn.Module) -> dict[str, str]:
        """Of modules that are trained beside adapters: the original, and what other adapters have in its place."""
        found = {}
        for path, wrapper in model.named_modules():
            if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.disable_adapters or not wrapper.active_adapters:
                continue
            active = wrapper.active_adapters[0]
            if active not in wrapper.modules_to_save:
                continue
            start = f"{path}." if path else ""
            others = [f"modules_to_save.{n}" for n in wrapper.modules_to_save if n != active]
            for leaf, _ in wrapper.original_module.named_parameters():
                for other in ("original_module", *others):
                    found[f"{start}{other}.{leaf}"] = f"{start}modules_to_save.{active}.{leaf}"
        return found


def _names(layer: Any) -> set[str]:
    """The adapters that a layer has."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}


def _check_read(path: str, module: nn.Module) -> None:
    """Whether the forward reads all adapters of a module, so that they grow with it."""
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return
    if not isinstance(module, BaseTunerLayer):
        if module.disable_adapters:
            raise _refused(path, "its adapters are disabled", "enable them")
        return
    if hasattr(module, "trainable_tokens_original"):
        why = "it keeps the rows of its trainable tokens as they were before training, and no call reads those"
        raise GrowthRefused(Refusal(path, f"{why}. Merge it before the growth: merge_and_unload()", _ASK))
    if module.merged:
        raise _refused(path, f"{', '.join(module.merged_adapters)} is merged into its weight", "unmerge_adapter()")
    if module.disable_adapters:
        raise _refused(path, "its adapters are disabled", "enable them")
    names, active = sorted(_names(module)), module.active_adapters
    idle = [n for n in names if n not in active]
    if idle:
        both = [*active, *(n for n in idle if n not in active)]
        raise _refused(
            path,
            f"its adapter {idle[0]} is not active",
            f"activate all of them (model.base_model.set_adapter({both}), captured so), or delete_adapter({idle[0]!r})",
        )


def _refused(path: str, why: str, what: str) -> GrowthRefused:
    said = f"{why}, so that no captured call reads it and it would stay small. Before the growth, {what}"
    return GrowthRefused(Refusal(path, said, _ASK))


# what layers keep -----------------------------------------------------------------------------------------------------


def _settle_widths(layer: Any, put: Setter) -> None:
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        widths = {"in_features": base.num_embeddings, "out_features": base.embedding_dim}
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        widths = {"in_features": base.in_channels, "out_features": base.out_channels}
    elif isinstance(base, nn.Linear):
        widths = {"in_features": base.in_features, "out_features": base.out_features}
    elif hasattr(base, "nf") and getattr(base, "weight", None) is not None:  # of transformers, its weight is (in, out)
        widths = {"in_features": base.weight.shape[0], "out_features": base.weight.shape[1]}
    else:
        widths = {}
    for name, width in widths.items():
        if vars(layer).get(name, width) != width:
            put(layer, name, width)


def _rank(layer: Any, name: str) -> int:
    """The rank that an adapter's tensors have."""
    if name in layer.lora_embedding_A:
        return int(layer.lora_embedding_A[name].shape[0])
    return int(layer.lora_A[name].weight.shape[0]) // int(getattr(layer, "num_experts", 1) or 1)


def _root(layer: Any, name: str, rank: int) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if layer.use_rslora.get(name) else float(rank)


def _ratio(layer: Any, name: str) -> float:
    """What a layer multiplies by, as a part of what its config says."""
    said = layer.lora_alpha[name] / _root(layer, name, layer.r[name])
    return float(layer.scaling[name] / said) if said else 1.0


def _settle_rank(layer: Any, name: str, ratio: float, put: Setter) -> None:
    """Let rank and alpha be those by which the class, made anew, multiplies by what the layer multiplies by."""
    rank = _rank(layer, name)
    if rank != layer.r[name]:
        put(layer.r, name, rank)
    _settle_alpha(layer, name, ratio, put)


def _settle_alpha(layer: Any, name: str, ratio: float, put: Setter) -> None:
    alpha = layer.scaling[name] / ratio * _root(layer, name, layer.r[name]) if ratio else layer.lora_alpha[name]
    if math.isclose(alpha, layer.lora_alpha[name], rel_tol=1e-9):
        return
    put(layer.lora_alpha, name, round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha)


def _settle_fading(layer: Any, name: str, put: Setter) -> None:
    """Let it fade from what its scaling would be now."""
    fading = getattr(layer, FADING, {})
    if name in fading and fading[name][4] not in (0, layer.scaling[name]):
        start, steps, end, full, last = fading[name]
        put(fading, name, (start, steps, end, full * layer.scaling[name] / last, layer.scaling[name]))


# what configs say -----------------------------------------------------------------------------------------------------


def _say_targets(tuner: Any, config: Any, layers: Mapping[str, Any], put: Setter) -> None:
    """Name the layers one by one where the config would put adapters beside others than those that have them."""
    if config.target_modules is None or getattr(config, "target_parameters", None):
        return
    tuned = [p for p, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)]
    outer = [p for p, _ in tuner.model.named_modules() if not any(p.startswith(f"{t}.") for t in tuned)]
    asked = {p for p in outer if p and check_target_module_exists(config, p)}
    if asked == set(layers):
        return
    put(config, "target_modules", set(layers))
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if getattr(config, name, None):
            put(config, name, None)
    if getattr(config, "feedforward_modules", None):
        put(config, "feedforward_modules", {p for p, m in layers.items() if m.is_feedforward})


def _say_numbers(config: Any, name: str, pattern: str, held: Mapping[str, float], put: Setter) -> None:
    """Let a config say the number of every layer: that of the most, and the others by the shortest names that do."""
    patterns, common = getattr(config, pattern), getattr(config, name)
    if all(patterns.get(get_pattern_key(patterns.keys(), p), common) == v for p, v in held.items()):
        return
    most = Counter(held.values()).most_common(1)[0][0]
    leaves: dict[str, set[float]] = {}
    for path, value in held.items():
        leaves.setdefault(path.rpartition(".")[2], set()).add(value)
    said = {}
    for path, value in held.items():
        leaf = path.rpartition(".")[2]
        if len(leaves[leaf]) > 1:
            said[path] = value
        elif value != most:
            said[leaf] = value
    put(config, name, most)
    put(config, pattern, said)


# under a schedule -----------------------------------------------------------------------------------------------------


class Lora:
    """One adapter of a layer, see :class:`~fxgrow.ir.libraries.Adapter`."""

    def __init__(self, path: str, layer: Any, name: str) -> None:
        self.path, self.module, self.name = path, layer, name
        self.embedding = name in layer.lora_embedding_A

    @property
    def layer(self) -> nn.Module:
        """What PEFT has put the adapter around."""
        return self.module.get_base_layer()

    @property
    def alpha(self) -> float:
        """As the layer's config says it."""
        return float(self.module.lora_alpha[self.name])

    @property
    def widths(self) -> tuple[int, int]:
        """Entries or a width, and the width that it writes."""
        return self.module.in_features, self.module.out_features

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that the layer holds for the adapter."""
        own = self.module.named_parameters()
        inside = tuple(f"{attribute}.{self.name}" for attribute in self.module.adapter_layer_names)
        return {n: p for n, p in own if n in inside or n.startswith(tuple(f"{i}." for i in inside))}

    def _check_linear(self) -> None:
        if self.module.merged:
            raise SpecError(
                f"{self.path} has merged its adapter into its weight, and would take out another one than it has put "
                "in: unmerge_adapter() first"
            )
        if self.name in self.module.lora_variant:
            kind = type(self.module.lora_variant[self.name]).__name__
            raise SpecError(f"{self.path} is no plain LoRA ({kind}): what it adds is not in proportion to a scale")

    def _scale_to(self, scaling: float) -> None:
        ratio = _ratio(self.module, self.name) or 1.0
        self.module.scaling[self.name] = scaling
        alpha = scaling / ratio * _root(self.module, self.name, self.module.r[self.name])
        self.module.lora_alpha[self.name] = round(alpha) if alpha == round(alpha) else alpha

    def scale_by(self, factor: float) -> None:
        """Multiply the scaling, and alpha with it, so that what is saved says so."""
        self._check_linear()
        self._scale_to(self.module.scaling[self.name] * factor)
        fading = getattr(self.module, FADING, {})
        if self.name in fading:
            start, steps, end, full, last = fading[self.name]
            fading[self.name] = (start, steps, end, full * factor, last * factor)

    def begin_fade(self, step: int, steps: int, to: float) -> None:
        """From where it is."""
        self._check_linear()
        self.fade(step)
        if not hasattr(self.module, FADING):
            setattr(self.module, FADING, {})
        scaling = self.module.scaling[self.name]
        getattr(self.module, FADING)[self.name] = (step, steps, to, scaling, scaling)

    def fade(self, step: int) -> bool:
        """Bring the scaling to where it is at a step."""
        fading = getattr(self.module, FADING, {})
        if self.name not in fading:
            return False
        self._check_linear()
        start, steps, end, full, _ = fading[self.name]
        done = min(1.0, (step - start) / steps)
        scaling = full * (1 + (end - 1) * done)
        self._scale_to(scaling)
        fading[self.name] = (start, steps, end, full, scaling)
        if done == 1:
            del fading[self.name]
        return True

    def merge(self) -> None:
        """As PEFT merges: all that are active at once."""
        layer, active = self.module, set(self.module.active_adapters)
        idle = sorted(_names(layer) - active - set(layer.merged_adapters))
        if idle:
            raise FxgrowError(
                f"{self.path} has the adapter {idle[0]} beside those that are active, which would be lost: "
                f"delete_adapter({idle[0]!r}), or activate it"
            )
        self._before = list(layer.merged_adapters)
        try:
            layer.merge(safe_merge=True)
        except (RuntimeError, ValueError) as error:
            raise FxgrowError(f"{self.path} cannot be merged: {error}") from error

    def unmerged(self) -> None:
        """Let be merged what was."""
        self.module.merged_adapters[:] = self.__dict__.pop("_before", self.module.merged_adapters)

    def remove(self, model: nn.Module) -> None:
        """Put the layer itself back in its place, as PEFT unloads one."""
        base = self.module.get_base_layer()
        for parent in model.modules():
            children = children_of(parent)
            if any(child is self.module for child in children.values()):
                set_children(parent, {n: base if c is self.module else c for n, c in children.items()})


register_library(Peft())

__all__ = ["Lora", "Peft"]
