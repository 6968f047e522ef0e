"""Grow a Hugging Face language model between two stretches of training: ``python -m examples.huggingface``.

Needs ``pip install transformers``; nothing is downloaded, the model is a small Llama with random weights. The growth is
applied to the model itself: it stays a ``LlamaForCausalLM`` that generates with its cache and is saved and loaded as
always. ``--trainer`` (``pip install accelerate``) trains with ``Trainer`` and grows in a callback.
"""

from __future__ import annotations

import random
import tempfile
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


def words(ids: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in ids.tolist())


def build() -> nn.Module:
    """A Llama of two layers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise SystemExit("this example needs transformers: pip install transformers") from None
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,  # for training; generate asks for its cache itself
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


SPEC = [
    {"op": "widen", "axis": "*/residual", "factor": 2, "noise": {"scale": 0.01}},
    {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.01}},
    {"op": "deepen", "stack": "model.layers", "by": 1},
]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, generator: random.Random
) -> float:
    """Returns the last loss."""
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        ids = sentences(32, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


def grow(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> fxgrow.Growth:
    """The model and its optimizer, in place; whoever holds either of them goes on."""
    growth = fxgrow.grow(model, SPEC, (), {"input_ids": ids, "labels": ids})
    growth.apply_(model)
    growth.carry_(optimizer)
    return growth


def train_by_trainer(model: nn.Module, steps: int, generator: random.Random) -> list[float]:
    """``Trainer`` over twice as many steps, with a growth after the first half; returns the loss of every step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Grow(TrainerCallback):
        """The trainer goes on with the model and the optimizer that it has."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == steps:
                growth = grow(kwargs["model"], kwargs["optimizer"], sentences(4, generator))
                typer.echo(f"grown: {growth.receipt.summary()}")

    data = [{"input_ids": ids, "labels": ids} for ids in sentences(2 * steps * 32, generator)]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=2 * steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[Grow()])  # type: ignore[arg-type]
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(
    steps: int = typer.Option(60, help="steps before the growth, and after it"),
    trainer: bool = typer.Option(False, "--trainer", help="train with transformers' Trainer"),
) -> None:
    """Train, grow, check, generate, train on, save and load."""
    torch.manual_seed(0)
    generator = random.Random(0)
    model: Any = build()
    if trainer:
        losses = train_by_trainer(model, steps, generator)
        typer.echo(f"{steps} steps: loss {losses[steps - 1]:.3f}; {steps} more steps: loss {losses[-1]:.3f}")
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    typer.echo(f"{steps} steps: loss {train(model, optimizer, scheduler, steps, generator):.3f}")

    ids, asked = sentences(4, generator), {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    logits, said = model.eval()(ids).logits, model.generate(ids[:, :1], **asked)
    growth = grow(model, optimizer, ids)
    typer.echo(f"grown: {growth.receipt.summary()}")
    difference = (model.eval()(ids).logits - logits).abs().max().item()
    typer.echo(
        f"the {type(model).__name__} itself: logits differ by {difference:.1e}, {model.num_parameters():,} parameters"
    )
    typer.echo(f"it says: {words(said[0])!r}, then {words(model.generate(ids[:, :1], **asked)[0])!r}")

    typer.echo(f"{steps} more steps: loss {train(model, optimizer, scheduler, steps, generator):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    difference = (loaded.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
    typer.echo(f"saved and loaded, hidden size {loaded.config.hidden_size}: logits differ by {difference:.1e}")


if __name__ == "__main__":
    typer.run(main)
