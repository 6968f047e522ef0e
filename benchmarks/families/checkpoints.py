"""Families as people have their checkpoints: every setting the library's default but the sizes, which are small.

Where :mod:`~benchmarks.families.huggingface` sets something so that more axes are free (``head_dim``), or one call is
simpler (``use_cache``), these keep what a new config of the class says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.families import Example, Maker
from benchmarks.families.huggingface import _BERT, _GPT2, _TUPLE, V, _tokens
from benchmarks.families.huggingface import FAMILIES as TINY

LABEL = "checkpoints"

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
#: the keys of tokens that the library's default config has beyond a small vocabulary
_WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


def _text(config: str, model: str, **sizes: Any) -> Maker:
    def make() -> Example:
        import transformers

        made = getattr(transformers, config)(vocab_size=V, **sizes)
        net = getattr(transformers, model)(made)
        return Example(net, {"input_ids": _tokens(2, 8), **_TUPLE}, {"input_ids": _tokens(3, 6), **_TUPLE})

    return make


def _causal(stem: str, **sizes: Any) -> Maker:
    return _text(f"{stem}Config", f"{stem}ForCausalLM", **sizes)


def _tiny(name: str) -> Callable[[], Example]:
    return TINY["transformers"][name]


FAMILIES: dict[str, dict[str, Maker]] = {
    "transformers": {
        "gpt2": _text("GPT2Config", "GPT2LMHeadModel", **_GPT2),
        "llama": _causal("Llama", **_GROUPED),
        "mistral": _causal("Mistral", **_GROUPED, sliding_window=4),
        "qwen2": _causal("Qwen2", **_GROUPED),
        "qwen3": _causal("Qwen3", **_GROUPED, head_dim=8),
        "gemma": _causal("Gemma", **_GROUPED, head_dim=8),
        "gemma2": _causal("Gemma2", **_GROUPED, head_dim=8, sliding_window=4),
        "gemma3": _text("Gemma3TextConfig", "Gemma3ForCausalLM", **_GROUPED, head_dim=8, sliding_window=4),
        "phi": _causal("Phi", **_SIZES),
        "phi3": _causal("Phi3", **_GROUPED, **_WORDS),
        "falcon": _causal("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "gpt_neo": _tiny("gpt_neo"),
        "gpt_neox": _causal("GPTNeoX", **_SIZES),
        "gptj": _text("GPTJConfig", "GPTJForCausalLM", **_GPT2, rotary_dim=4),
        "opt": _tiny("opt"),
        "bloom": _causal("Bloom", hidden_size=32, n_layer=2, n_head=4),
        "mpt": _causal("Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=32),
        "stablelm": _causal("StableLm", **_GROUPED),
        "cohere": _causal("Cohere", **_GROUPED, **_WORDS),
        "olmo2": _causal("Olmo2", **_GROUPED, **_WORDS),
        "granite": _causal("Granite", **_GROUPED),
        "mixtral": _causal("Mixtral", **_GROUPED, num_local_experts=4),
        "qwen2_moe": _causal(
            "Qwen2Moe", **_GROUPED, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4
        ),
        "bert": _text("BertConfig", "BertForMaskedLM", **_BERT),
        "roberta": _text("RobertaConfig", "RobertaForMaskedLM", **_BERT),
        "distilbert": _text("DistilBertConfig", "DistilBertForMaskedLM", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        "electra": _text("ElectraConfig", "ElectraForMaskedLM", **_BERT, embedding_size=16),
        "albert": _text("AlbertConfig", "AlbertForMaskedLM", **_BERT, embedding_size=16),
        "vit": _tiny("vit"),
        "t5": _tiny("t5"),
        "bart": _tiny("bart"),
        "whisper": _tiny("whisper"),
    }
}
