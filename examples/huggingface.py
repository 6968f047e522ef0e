"""Grow a Hugging Face language model between two stretches of training: ``python -m examples.huggingface``.

Needs ``pip install transformers``; nothing is downloaded, the model is a small Llama with random weights. It is called
as always (keyword arguments, labels, a ``ModelOutput`` back), and the grown weights load into the larger class with
``strict=True``.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import typer
from torch import nn

import fxgrow

DETERMINERS, NOUNS = ["the", "a", "my", "your", "one"], ["cat", "dog", "bird", "fish", "child"]
VERBS = ["sees", "eats", "likes", "chases", "finds"]
WORDS = DETERMINERS + NOUNS + VERBS


def sentences(n: int, generator: random.Random) -> torch.Tensor:
    """Token ids (n, 5): determiner, noun, verb, determiner, noun."""
    kinds = (range(5), range(5, 10), range(10, 15), range(5), range(5, 10))
    return torch.tensor([[generator.choice(k) for k in kinds] for _ in range(n)])


def build(**sizes: Any) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise SystemExit("this example needs transformers: pip install transformers") from None
    known = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fixed = {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=16, **{**known, **fixed, **sizes})
    model: nn.Module = LlamaForCausalLM(config)
    return model


SPEC = [
    {"op": "widen", "axis": "*/residual", "factor": 2, "noise": {"scale": 0.01}},
    {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.01}},
    {"op": "deepen", "stack": "model.layers", "by": 1},
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, generator: random.Random) -> float:
    """Returns the last loss."""
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        ids = sentences(32, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(steps: int = typer.Option(60, help="steps before the growth, and after it")) -> None:
    """Train, grow, check, load into the larger class, train on."""
    torch.manual_seed(0)
    generator = random.Random(0)
    model = build()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    typer.echo(f"{steps} steps: loss {train(model, optimizer, steps, generator):.3f}")

    ids = sentences(4, generator)
    growth = fxgrow.grow(model, SPEC, (), {"input_ids": ids, "labels": ids})
    typer.echo(f"grown: {growth.receipt.summary()}")
    optimizer = growth.carry(optimizer)
    typer.echo(f"{steps} more steps: loss {train(growth.module, optimizer, steps, generator):.3f}")

    larger = build(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    larger.load_state_dict(growth.module.state_dict(), strict=True)
    growth.module.eval()
    difference = larger.eval()(input_ids=ids).logits - growth.module(input_ids=ids, labels=ids).logits
    typer.echo(f"in the class itself: outputs differ by {difference.abs().max().item():.1e}")


if __name__ == "__main__":
    typer.run(main)
