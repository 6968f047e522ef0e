"""Hugging Face models with their default configs, two layers deep: real widths, heads and vocabularies.

Those whose two layers stay below some sixty million parameters, so that several copies fit in memory in float64
(ALBERT's would be two hundred), and whose own forward runs in float64 (XGLM's does not).
"""

from __future__ import annotations

from typing import Any

from benchmarks.families import Example, Maker
from benchmarks.families.huggingface import _TUPLE, Logits, _tokens

LABEL = "defaults"

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
)


def _default(config: str, model: str, inputs: str = "text", **options: Any) -> Maker:
    def make() -> Example:
        import torch
        import transformers

        cfg = getattr(transformers, config)(**options)
        for key in _LAYERS:
            if isinstance(getattr(cfg, key, None), int):
                setattr(cfg, key, 2)
        if hasattr(cfg, "use_cache"):
            cfg.use_cache = False
        net = getattr(transformers, model)(cfg)
        given = {
            "text": lambda b: {"input_ids": _tokens(b, 6)},
            "pairs": lambda b: {"input_ids": _tokens(b, 6), "decoder_input_ids": _tokens(b, 4)},
            "image": lambda b: {"pixel_values": torch.randn(b, 3, 224, 224).double()},
        }[inputs]
        if inputs != "text":
            net = Logits(net)
        return Example(net, {**given(2), **_TUPLE}, {**given(3), **_TUPLE})

    return make


FAMILIES: dict[str, dict[str, Maker]] = {
    "transformers": {
        "gpt2": _default("GPT2Config", "GPT2LMHeadModel"),
        "opt": _default("OPTConfig", "OPTForCausalLM"),
        "bloom": _default("BloomConfig", "BloomForCausalLM"),
        "openai-gpt": _default("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
        "biogpt": _default("BioGptConfig", "BioGptForCausalLM"),
        "gpt_bigcode": _default("GPTBigCodeConfig", "GPTBigCodeForCausalLM"),
        "mamba": _default("MambaConfig", "MambaForCausalLM"),
        "bert": _default("BertConfig", "BertForMaskedLM"),
        "roberta": _default("RobertaConfig", "RobertaForMaskedLM"),
        "distilbert": _default("DistilBertConfig", "DistilBertForMaskedLM"),
        "electra": _default("ElectraConfig", "ElectraForMaskedLM"),
        "mpnet": _default("MPNetConfig", "MPNetForMaskedLM"),
        "deberta": _default("DebertaConfig", "DebertaForMaskedLM"),
        "fnet": _default("FNetConfig", "FNetForMaskedLM"),
        "t5": _default("T5Config", "T5ForConditionalGeneration", "pairs"),
        "pegasus": _default("PegasusConfig", "PegasusForConditionalGeneration", "pairs"),
        "vit": _default("ViTConfig", "ViTForImageClassification", "image"),
        "deit": _default("DeiTConfig", "DeiTForImageClassification", "image"),
    }
}
