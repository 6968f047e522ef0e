"""Growth in ``transformers.Trainer`` and in Lightning, with the real libraries where they are there."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import trainers
from fxgrow.errors import FxgrowError, SpecError
from fxgrow.integrations import common
from fxgrow.schedule import Schedule
from fxgrow.scheduler import GrowthScheduler


@pytest.mark.slow
@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_a_trainer_grows_goes_on_and_resumes(name: str) -> None:
    result = trainers.measured(name)
    if result is None:
        pytest.skip(f"{name} is not installed")
    assert result.jump <= trainers.JUMP
    assert result.at_end < result.at_growth, "it goes on learning"
    assert result.resumed == 0.0
    assert result.done == ["grow", "learning_rate", "checkpoint"]


def test_what_a_trainer_fixes_cannot_be_scheduled() -> None:
    schedule = [{"trigger": {"step": 1}, "operations": [{"op": "accumulation", "factor": 2}]}]
    with pytest.raises(SpecError, match=r"events\.0 changes the accumulation, which the Trainer fixes"):
        common.check_sizes(Schedule.parse(schedule), "the Trainer")


def test_metrics_are_the_numbers_among_what_is_logged() -> None:
    logged = {"loss": torch.tensor(0.5), "step": 3, "ok": True, "name": "x", "many": torch.ones(2)}
    assert common.numbers(logged) == {"loss": 0.5, "step": 3.0}
    assert common.numbers(None) == {}


WIDEN = {"op": "widen", "axis": "./hidden", "factor": 2}
FREEZE = {"op": "freeze", "what": "0.*"}
X = torch.randn(5, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def stopped(*operations: dict[str, Any]) -> GrowthScheduler:
    """A scheduler that goes on after an event."""
    schedule = [{"trigger": {"step": 1}, "operations": list(operations)}]
    first, model = GrowthScheduler(schedule, (X,)), net()
    while first.step(model, step=1):
        pass
    resumed = GrowthScheduler(schedule, (X,))
    resumed.load_state_dict(first.state_dict())
    return resumed


def test_what_stands_still_is_there_for_the_optimizer_that_a_trainer_makes() -> None:
    model = net()
    model[2].bias.requires_grad_(False)  # by the user, before the run
    still = common.replayed(stopped(WIDEN, FREEZE), model)
    assert model[0].out_features == 16
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["2.bias"]
    model[0].weight.grad = torch.ones(16, 4)
    common.hold(still)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.weight"]
    assert model[0].weight.grad is None


def test_a_model_made_in_its_large_sizes_goes_on_only_where_sizes_are_all() -> None:
    common.check_made(stopped(WIDEN))
    with pytest.raises(FxgrowError, match=r"events\.0 has done freeze, .*call resume\(\)"):
        common.check_made(stopped(WIDEN, FREEZE))
    lora = {"op": "lora", "modules": "0", "rank": 2}
    with pytest.raises(FxgrowError, match=r"events\.0 has done lora"):
        common.check_made(stopped(lora))


def test_a_metric_that_was_never_reported_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    trigger = {"plateau": {"metric": "eval_los"}}
    scheduler = GrowthScheduler([{"trigger": trigger, "operations": [WIDEN]}])
    with caplog.at_level(logging.WARNING, "fxgrow"):
        common.warn_unseen(scheduler, ["eval_los"])
        assert not caplog.records
        common.warn_unseen(scheduler, ["loss", "eval_loss"])
    assert "'eval_los' was never reported; did you mean eval_loss" in caplog.text


def of_transformers(sentences: int) -> tuple[Any, ...]:
    """Ids and examples of so many sentences, what makes a Llama, and what trains it; skips without the library."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from examples import huggingface
    from fxgrow.integrations.transformers import GrowthCallback

    ids = huggingface.sentences(sentences, random.Random(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    return ids, data, huggingface.build, transformers.Trainer, transformers.TrainingArguments, GrowthCallback


@pytest.mark.slow
def test_transformers_reports_what_it_measures_and_grows_under_mixed_precision(tmp_path: Path) -> None:
    """The loss is logged at every step, the evaluation at some; bfloat16; a freeze, and a checkpoint with it."""
    ids, data, build, Trainer, TrainingArguments, GrowthCallback = of_transformers(64)
    plateau = {"metric": "eval_loss", "patience": 2, "min_delta": 100.0}
    widen, freeze = {"op": "widen", "axis": "*/hidden", "factor": 2}, {"op": "freeze", "what": "model.embed_tokens.*"}
    events = [
        {"trigger": {"step": 1}, "operations": [widen, freeze]},
        {"trigger": {"step": 4}, "operations": [{"op": "checkpoint"}]},
        {"trigger": {"plateau": plateau}, "operations": [{"op": "learning_rate", "scale": 0.5}]},
    ]

    def trained(checkpoint: Path | None) -> tuple[Any, list[tuple[str, int]]]:
        torch.manual_seed(0)
        model: Any = build()
        growth = GrowthCallback(events, example={"input_ids": ids[:2], "labels": ids[:2]})
        if checkpoint is not None:
            growth.resume(model, checkpoint)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            bf16=True,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[growth])  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        assert not model.model.embed_tokens.weight.requires_grad
        return model, [(each.op, each.step) for each in growth.done]

    model, done = trained(None)
    # evaluated after 4 steps, which the callback sees after the fifth; then two more
    assert done == [("grow", 1), ("freeze", 1), ("checkpoint", 4), ("learning_rate", 9)]
    resumed, after = trained(tmp_path / "checkpoint-4")
    assert after == [("learning_rate", 9)]
    assert trainers.apart(model, resumed) == 0.0


@pytest.mark.slow
def test_transformers_resumes_with_gates_and_knows_the_best_of_the_model_that_it_has(tmp_path: Path) -> None:
    """Gates decay with the Trainer's other matrices; weights of a smaller model are not loaded into a deeper one."""
    ids, data, build, Trainer, TrainingArguments, GrowthCallback = of_transformers(16)
    deeper = {"op": "deepen", "stack": "model.layers", "after": [0], "init": "gate"}
    events = [{"trigger": {"step": 2}, "operations": [deeper, {"op": "lora", "modules": "*_proj", "rank": 2}]}]

    def trained(checkpoint: Path | None, rate: float) -> Any:
        torch.manual_seed(0)
        model: Any = build()
        growth = GrowthCallback(events, example={"input_ids": ids[:2], "labels": ids[:2]}, verify=False)
        if checkpoint is not None:
            growth.resume(model, checkpoint)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=rate,
            weight_decay=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[growth])  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    still = trained(None, 0.0)  # the first evaluation is the best one, but of the small model
    assert still.state.best_model_checkpoint.endswith("checkpoint-2")
    assert still.evaluate()["eval_loss"] == still.state.best_metric
    whole = trained(None, 1e-2)
    assert trainers.apart(whole.model, trained(tmp_path / "checkpoint-3", 1e-2).model) == 0.0


@pytest.mark.slow
def test_lightning_counts_validations_and_not_steps(tmp_path: Path) -> None:
    """The loss is logged at every step, that of the validation after each epoch."""
    try:
        import lightning.pytorch as pl
    except ImportError:
        pl = pytest.importorskip("pytorch_lightning")
    from fxgrow.integrations.lightning import GrowthCallback

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=4)

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, number: int) -> Any:
            loss = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("val_loss", torch.tensor(1.0))  # never moves

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    plateau = {"metric": "val_loss", "patience": 2}
    events = [{"trigger": {"plateau": plateau}, "operations": [WIDEN]}]
    growth = GrowthCallback(events, net="net", example=(X,))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=4, callbacks=[growth], default_root_dir=tmp_path, **options)
    trainer.fit(Module(), data, data)
    assert [(each.op, each.step) for each in growth.done] == [("grow", 12)]
