"""Tiny random configurations of Hugging Face models: two layers, 32 wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.families import Example, Maker

V = 50
_COMMON: dict[str, Any] = {"use_cache": False}
_TUPLE: dict[str, Any] = {"return_dict": False}  # an argument of the call: the models' own parts rely on the default


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, V, shape)


def _text(config: str, model: str, length: int = 6, **options: Any) -> Maker:
    def make() -> Example:
        import transformers

        cfg = getattr(transformers, config)(**{"vocab_size": V, **_COMMON, **options})
        cfg._experts_implementation = "batched_mm"
        return Example(
            getattr(transformers, model)(cfg),
            {"input_ids": _tokens(2, 8), **_TUPLE},
            {"input_ids": _tokens(3, length), **_TUPLE},
        )

    return make


def _masked(config: str, model: str, **options: Any) -> Maker:
    def make() -> Example:
        example = _text(config, model, **options)()
        for inputs in (example.kwargs, example.other or {}):
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, -2:] = 0
            inputs["attention_mask"] = mask
        return example

    return make


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "head_dim": 8,
}
_NO_HEAD = {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


class Logits(nn.Module):
    """The first output alone: an encoder's last state among the outputs would pin the stream."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)[0]


def _encoder_decoder(config: str, model: str, **options: Any) -> Maker:
    def make() -> Example:
        import transformers

        cfg = getattr(transformers, config)(**{"vocab_size": V, **_COMMON, **options})
        return Example(
            Logits(getattr(transformers, model)(cfg)),
            {"input_ids": _tokens(2, 8), "decoder_input_ids": _tokens(2, 5), **_TUPLE},
            {"input_ids": _tokens(3, 6), "decoder_input_ids": _tokens(3, 4), **_TUPLE},
        )

    return make


def _vit() -> Example:
    import transformers

    cfg = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return Example(
        transformers.ViTForImageClassification(cfg),
        {"pixel_values": torch.randn(2, 3, 16, 16).double(), **_TUPLE},
        {"pixel_values": torch.randn(3, 3, 16, 16).double(), **_TUPLE},
    )


def _clip() -> Example:
    import transformers

    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    cfg = transformers.CLIPConfig(
        text_config={**part, "vocab_size": V, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**part, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )

    def inputs(b: int, t: int) -> dict[str, Any]:
        return {"input_ids": _tokens(b, t), "pixel_values": torch.randn(b, 3, 16, 16).double(), **_TUPLE}

    return Example(Logits(transformers.CLIPModel(cfg)), inputs(2, 8), inputs(3, 6))


def _whisper() -> Example:
    import transformers

    cfg = transformers.WhisperConfig(
        vocab_size=V,
        num_mel_bins=8,
        **_SEQ2SEQ,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **_COMMON,
    )

    def inputs(b: int, t: int) -> dict[str, Any]:
        return {"input_features": torch.randn(b, 8, 16).double(), "decoder_input_ids": _tokens(b, t), **_TUPLE}

    return Example(Logits(transformers.WhisperForConditionalGeneration(cfg)), inputs(2, 8), inputs(3, 6))


def _electra_like(config: str, model: str, **options: Any) -> Callable[[], Example]:
    return _masked(config, model, **{**_BERT, **options})


FAMILIES: dict[str, dict[str, Maker]] = {
    "transformers": {
        "gpt2": _text("GPT2Config", "GPT2LMHeadModel", **_GPT2),
        "gpt_neo": _text(
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=32,
            window_size=4,
        ),
        "gpt_neox": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", **_NO_HEAD, rotary_pct=0.5),
        "gptj": _text("GPTJConfig", "GPTJForCausalLM", **_GPT2, rotary_dim=4),
        "llama": _text("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
        "llama-masked": _masked("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
        "mistral": _text("MistralConfig", "MistralForCausalLM", **_LLAMA, sliding_window=4),
        "qwen2": _text("Qwen2Config", "Qwen2ForCausalLM", **{k: v for k, v in _LLAMA.items() if k != "head_dim"}),
        "qwen3": _text("Qwen3Config", "Qwen3ForCausalLM", **_LLAMA),
        "gemma": _text("GemmaConfig", "GemmaForCausalLM", **_LLAMA),
        "gemma2": _text("Gemma2Config", "Gemma2ForCausalLM", **_LLAMA, sliding_window=4, query_pre_attn_scalar=8),
        "phi": _text("PhiConfig", "PhiForCausalLM", **_NO_HEAD, partial_rotary_factor=0.5),
        "phi3": _text(
            "Phi3Config",
            "Phi3ForCausalLM",
            **{k: v for k, v in _LLAMA.items() if k != "head_dim"},
            bos_token_id=1,
            eos_token_id=2,
            original_max_position_embeddings=32,
        ),
        "opt": _text(
            "OPTConfig",
            "OPTForCausalLM",
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        ),
        "bloom": _text("BloomConfig", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4),
        "falcon": _text(
            "FalconConfig", "FalconForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
        "mixtral": _text("MixtralConfig", "MixtralForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        "bert": _electra_like("BertConfig", "BertForMaskedLM"),
        "roberta": _electra_like("RobertaConfig", "RobertaForMaskedLM"),
        "distilbert": _masked(
            "DistilBertConfig", "DistilBertForMaskedLM", dim=32, hidden_dim=48, n_layers=2, n_heads=4
        ),
        "albert": _electra_like("AlbertConfig", "AlbertForMaskedLM", embedding_size=16),
        "electra": _electra_like("ElectraConfig", "ElectraForMaskedLM", embedding_size=16),
        "t5": _encoder_decoder(
            "T5Config", "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        ),
        "bart": _encoder_decoder(
            "BartConfig",
            "BartForConditionalGeneration",
            **_SEQ2SEQ,
            max_position_embeddings=32,
        ),
        "vit": _vit,
        "clip": _clip,
        "whisper": _whisper,
        "mamba2": _text(
            "Mamba2Config",
            "Mamba2ForCausalLM",
            length=8,  # the padding to whole chunks specialises
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=2,
            chunk_size=4,
        ),
    }
}
