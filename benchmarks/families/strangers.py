"""Hugging Face families that fxgrow was not developed on: tiny random configurations, as in ``huggingface``."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.families import Example, Maker
from benchmarks.families.huggingface import (
    _BERT,
    _GPT2,
    _LLAMA,
    _SEQ2SEQ,
    _TUPLE,
    Logits,
    _encoder_decoder,
    _masked,
    _text,
)

LABEL = "strangers"

_NO_WIDTH = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    **_NO_WIDTH,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_DISENTANGLED = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def _image(config: str, model: str, size: int = 16, **options: Any) -> Maker:
    def make() -> Example:
        import transformers

        cfg = getattr(transformers, config)(num_labels=5, **options)
        return Example(
            Logits(getattr(transformers, model)(cfg)),
            {"pixel_values": torch.randn(2, 3, size, size).double(), **_TUPLE},
            {"pixel_values": torch.randn(3, 3, size, size).double(), **_TUPLE},
        )

    return make


FAMILIES: dict[str, dict[str, Maker]] = {
    "transformers": {
        "olmo2": _text("Olmo2Config", "Olmo2ForCausalLM", **_NO_WIDTH),
        "stablelm": _text(
            "StableLmConfig", "StableLmForCausalLM", **_NO_WIDTH, partial_rotary_factor=0.5, use_qkv_bias=True
        ),
        "cohere": _text("CohereConfig", "CohereForCausalLM", **_NO_WIDTH),
        "granite": _text("GraniteConfig", "GraniteForCausalLM", **_NO_WIDTH, logits_scaling=8.0),
        "gemma3": _text("Gemma3TextConfig", "Gemma3ForCausalLM", **_LLAMA, sliding_window=4, query_pre_attn_scalar=8),
        "glm4": _text("Glm4Config", "Glm4ForCausalLM", **_LLAMA, partial_rotary_factor=0.5),
        "bitnet": _text("BitNetConfig", "BitNetForCausalLM", **_NO_WIDTH),
        "qwen3_moe": _text("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **_LLAMA, **_EXPERTS),
        "deepseek_v2": _text("DeepseekV2Config", "DeepseekV2ForCausalLM", **_LATENT),
        "deepseek_v3": _text("DeepseekV3Config", "DeepseekV3ForCausalLM", **_LATENT),
        "gpt_oss": _text(
            "GptOssConfig",
            "GptOssForCausalLM",
            **_LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
        "gpt_bigcode": _text("GPTBigCodeConfig", "GPTBigCodeForCausalLM", **_GPT2),
        "mpt": _text(
            "MptConfig", "MptForCausalLM", d_model=32, n_heads=4, n_layers=2, max_seq_len=32, expansion_ratio=2
        ),
        "mamba": _text(
            "MambaConfig",
            "MambaForCausalLM",
            length=8,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            expand=2,
            time_step_rank=4,
        ),
        "xlnet": _text("XLNetConfig", "XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48),
        "deberta": _masked("DebertaConfig", "DebertaForMaskedLM", **_DISENTANGLED),
        "deberta_v2": _masked(
            "DebertaV2Config",
            "DebertaV2ForMaskedLM",
            **_DISENTANGLED,
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        "mpnet": _masked("MPNetConfig", "MPNetForMaskedLM", **_BERT),
        "convbert": _masked("ConvBertConfig", "ConvBertForMaskedLM", **_BERT, embedding_size=16, conv_kernel_size=3),
        "fnet": _text("FNetConfig", "FNetForMaskedLM", **{k: v for k, v in _BERT.items() if "heads" not in k}),
        "pegasus": _encoder_decoder(
            "PegasusConfig",
            "PegasusForConditionalGeneration",
            **_SEQ2SEQ,
            max_position_embeddings=32,
        ),
        "deit": _image(
            "DeiTConfig",
            "DeiTForImageClassification",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
        ),
        "convnextv2": _image(
            "ConvNextV2Config",
            "ConvNextV2ForImageClassification",
            32,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
        ),
    }
}
