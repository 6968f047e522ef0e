"""Growth in other people's training loops: ``transformers.Trainer`` and Lightning, each by a callback.

Each run trains a small model for some steps, grows it by a schedule (hidden axis and depth, a second warm-up), saves a
checkpoint after that, and trains on. What is shown: the lines that the callback adds to a script; the jump of the loss
on one batch right before and right after the growth, in float32; the loss at the growth and at the end; and whether a
run that resumes from the checkpoint ends in the very weights. ``pip install -e .[trainers]``, then
``python -m benchmarks trainers``.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common

STEPS, GROWTH, SAVED = 24, 8, 12
#: what a growth may move the loss by
JUMP = 1e-5


@dataclass
class Result:
    """What a trainer does with a growth."""

    trainer: str
    lines: int
    jump: float
    at_growth: float
    at_end: float
    resumed: float
    done: list[str]


def schedule(*growths: dict[str, Any]) -> list[dict[str, Any]]:
    """A growth with a second warm-up, and a checkpoint some steps later."""
    return [
        {"name": "larger", "trigger": {"step": GROWTH}, "operations": [*growths, {"op": "learning_rate", "rewarm": 6}]},
        {"name": "safe", "trigger": {"step": SAVED}, "operations": [{"op": "checkpoint"}]},
    ]


class Watch:
    """The loss of a model on one batch, right before a growth."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self.loss, self.before = loss, float("nan")

    def __call__(self, action: Any) -> None:
        if action.op == "grow":
            self.before = self.now()

    def now(self) -> float:
        with torch.no_grad():
            return float(self.loss())


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of any weight."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def by_transformers(folder: Path) -> Result:
    """A small Llama in ``transformers.Trainer``."""
    import random

    from transformers import Trainer, TrainerCallback, TrainingArguments

    from examples.huggingface import build, sentences
    from fxgrow.integrations.transformers import GrowthCallback

    events = schedule(
        {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.01}},
        {"op": "deepen", "stack": "model.layers", "by": 1},
    )
    ids = sentences(16 * STEPS, random.Random(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    example = {"input_ids": ids[:2], "labels": ids[:2]}

    class After(TrainerCallback):
        """Runs after the growth of the same step."""

        jump = float("nan")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == GROWTH:
                self.jump = abs(watch.now() - watch.before)

    def trained(checkpoint: Path | None) -> tuple[Any, GrowthCallback, float]:
        torch.manual_seed(0)
        model: Any = build()
        watch.loss = lambda: model(input_ids=ids[:16], labels=ids[:16]).loss
        growth, after = GrowthCallback(events, example=example, before=watch), After()
        if checkpoint is not None:
            growth.resume(model, checkpoint)
        arguments = TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[growth, after])  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model, growth, after.jump

    watch = Watch(lambda: torch.zeros(()))
    model, growth, jump = trained(None)
    losses = watch.before, watch.now()
    resumed, _, _ = trained(folder / f"checkpoint-{SAVED}")
    return Result("transformers.Trainer", 2, jump, *losses, apart(model, resumed), [each.op for each in growth.done])


def by_lightning(folder: Path) -> Result:
    """A small net in a Lightning ``Trainer``."""
    import logging

    try:
        import lightning.pytorch as pl
    except ImportError:
        import pytorch_lightning as pl

    from fxgrow.integrations.lightning import GrowthCallback

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    events = schedule({"op": "widen", "axis": "./hidden", "factor": 2, "noise": {"scale": 0.01}})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * SAVED, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.prod(1, keepdim=True))

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
            self.jump = float("nan")

        def training_step(self, batch: Any, _: int) -> Tensor:
            if self.global_step == GROWTH:
                self.jump = abs(watch.now() - watch.before)
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def trained(checkpoint: Path | None) -> tuple[Module, GrowthCallback]:
        torch.manual_seed(0)
        module = Module()
        watch.loss = lambda: (module.net(x) - data.tensors[1]).square().mean()
        growth = GrowthCallback(events, "net", (x[:2],), before=watch)
        if checkpoint is not None:
            growth.resume(module, checkpoint)
        trainer = pl.Trainer(
            max_steps=STEPS,
            callbacks=[growth],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=checkpoint)
        return module, growth

    watch = Watch(lambda: torch.zeros(()))
    module, growth = trained(None)
    losses = watch.before, watch.now()
    resumed, _ = trained(folder / f"growth-{SAVED}.ckpt")
    return Result("Lightning", 2, module.jump, *losses, apart(module, resumed), [each.op for each in growth.done])


TRAINERS: dict[str, tuple[Callable[[Path], Result], tuple[str, ...]]] = {
    "transformers": (by_transformers, ("transformers",)),
    "lightning": (by_lightning, ("lightning", "pytorch_lightning")),
}


def measured(name: str) -> Result | None:
    """What a trainer does; None where the library is not there."""
    run, libraries = TRAINERS[name]
    if not any(importlib.util.find_spec(library) for library in libraries):
        return None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(Path(folder))


def run(argv: list[str]) -> int:
    """Measure, print, and fail where a growth moves the loss or a resumed run ends elsewhere."""
    parser = common.parser("trainers", __doc__)
    parser.add_argument("trainers", nargs="*", metavar="TRAINER", help=f"of {', '.join(TRAINERS)}; all if none")
    options = parser.parse_args(argv)
    torch.set_num_threads(common.threads(options))
    results = []
    for name in options.trainers or TRAINERS:
        result = measured(name)
        if result is None:
            print(f"{name} is not installed: pip install -e .[trainers]")
        else:
            results.append(result)
    columns = ["trainer", "lines", "jump", "loss at growth", "loss at end", "resumed, apart"]
    rows = [
        [r.trainer, r.lines, f"{r.jump:.1e}", f"{r.at_growth:.4f}", f"{r.at_end:.4f}", f"{r.resumed:.1e}"]
        for r in results
    ]
    common.table("Growth in a trainer's loop", columns, rows)
    verdicts = [common.verdict(f"jump, {r.trainer}", r.jump, JUMP) for r in results]
    verdicts += [common.verdict(f"resumed apart, {r.trainer}", r.resumed, 0.0) for r in results]
    common.save(options.json, {"results": [asdict(r) for r in results], "verdicts": verdicts})
    return int(not results or any(r.jump > JUMP or r.resumed > 0 for r in results))
