"""The example GPT: its model, its text, its command line and its report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from examples.gpt import report, train
from examples.gpt.data import Text, decode, encode, python_help
from examples.gpt.model import GPT, GPTConfig
from fxgrow.schedule import Schedule

torch.set_num_threads(1)
SMALL = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=8)


def tokens(batch: int = 2, time: int = 16) -> torch.Tensor:
    return torch.randint(256, (batch, time), generator=torch.Generator().manual_seed(1))


def test_names_are_those_of_nanogpt_and_the_embedding_is_tied() -> None:
    model = GPT(SMALL)
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    for layer in range(2):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            expected |= {f"transformer.h.{layer}.{name}.weight", f"transformer.h.{layer}.{name}.bias"}
    expected |= {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert set(model.state_dict()) == expected
    wte: Any = model.transformer["wte"]
    assert wte.weight is model.lm_head.weight
    assert set(GPT(dataclasses.replace(SMALL, bias=False, flash=False)).state_dict()) == {
        name for name in expected if not name.endswith("bias")
    }


def test_shapes_with_every_size_of_its_own() -> None:
    config = dataclasses.replace(SMALL, n_head=3, head_dim=5, value_dim=7, n_hidden=11)
    shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (3 * 5 + 3 * 5 + 3 * 7, 8)
    assert shapes["transformer.h.1.attn.c_proj.weight"] == (8, 3 * 7)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (11, 8)
    logits, loss = GPT(config)(tokens(), tokens())
    assert logits.shape == (2, 16, 256)
    assert loss is not None
    assert loss.shape == ()
    defaults = GPTConfig(n_embd=96, n_head=3)
    assert (defaults.n_hidden, defaults.head_dim, defaults.value_dim) == (384, 32, 32)
    with pytest.raises(ValueError, match="n_embd 10 is no multiple of n_head 4"):
        GPTConfig(n_embd=10, n_head=4)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_fused_and_written_out_attention_agree(scale: float | None) -> None:
    config = dataclasses.replace(SMALL, attention_scale=scale, value_dim=3)
    fused, manual = GPT(config).double(), GPT(dataclasses.replace(config, flash=False)).double()
    manual.load_state_dict(fused.state_dict())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    manual.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(tokens(), tokens()), manual(tokens(), tokens()), rtol=1e-12, atol=1e-12)


def test_the_loss_is_that_of_the_next_token_and_the_past_does_not_see_the_future() -> None:
    model = GPT(SMALL).eval()
    x, y = tokens(), tokens().roll(1)
    logits, loss = model(x, y)
    expected = -F.log_softmax(logits, -1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    changed = x.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(model(changed, y)[0][:, :9], logits[:, :9])
    last, none = model(x)
    assert none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])
    with pytest.raises(ValueError, match="17 tokens are more than the block size 16"):
        model(tokens(time=17))


def test_generate_continues_beyond_the_block_size_and_repeats_under_a_seed() -> None:
    model = GPT(SMALL).double().eval()
    first, second = (
        model.generate(tokens(1, 10), 12, top_k=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.shape == (1, 22)
    assert torch.equal(first, second)
    assert torch.equal(first[:, :10], tokens(1, 10))


def test_text_is_bytes_and_comes_back() -> None:
    text = "Grüße, growth ×2"
    assert decode(encode(text)) == text
    assert encode(text).dtype == torch.int64
    assert "�" in decode(torch.tensor([255, 65]))
    assert len(python_help()) > 100_000


def test_batches_are_shifted_by_one_and_the_splits_are_apart(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(500)) + "z" * 100)
    data = Text(path, block_size=20, batch_size=3)
    assert len(data.splits["train"]) == 540
    assert decode(data.splits["val"]) == "z" * 60
    x, y = data.batch("train", torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (3, 20)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again, _ = data.batch("train", torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    other, _ = data.batch("train", torch.Generator().manual_seed(1))
    assert not torch.equal(x, other)
    starts = {int(data.batch("val", torch.Generator().manual_seed(s))[0][0, 0]) for s in range(5)}
    assert starts == {ord("z")}
    path.write_text("too short")
    with pytest.raises(ValueError, match="too few for the train split"):
        Text(path)


def test_the_schedule_file_is_the_one_the_issue_asks_for() -> None:
    schedule = Schedule.parse(train.SCHEDULE)
    widened = [op.axis for event in schedule.events for op in event.operations if op.op == "widen"]
    assert widened == ["transformer.h.*.mlp/hidden", "transformer.h.*.attn/heads", "./residual"]
    assert all(
        op.noise is not None and op.noise.kind == "antisymmetric" and op.noise.scale > 0
        for event in schedule.events
        for op in event.operations
        if op.op == "widen"
    )
    assert [(op.op, op.factor) for op in schedule.events[-1].operations] == [("deepen", 2)]


def test_difference_and_strict_load() -> None:
    model, other = GPT(SMALL), GPT(SMALL)
    batch = (tokens(), tokens())
    assert train.difference(model, other, batch) > 0
    assert train.difference(model, train.plain_gpt(model, SMALL), batch) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        train.plain_gpt(model, dataclasses.replace(SMALL, n_layer=3))


def demo(*arguments: Any) -> Any:
    return CliRunner().invoke(train.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path) -> None:
    late = {"trigger": {"step": 900}, "operations": [{"op": "widen", "axis": "*/hiden", "factor": 2}]}
    (tmp_path / "late.yaml").write_text(json.dumps([late]))
    for arguments, message in (
        (("--text", tmp_path / "none.txt"), "none.txt"),
        (("--schedule", tmp_path / "none.yaml"), "schedule file"),
        (("--schedule", tmp_path / "late.yaml"), "events.0 (step 900): no axis matches '*/hiden'"),
    ):
        result = demo("--out", tmp_path / "out", *arguments)
        assert result.exit_code == 1
        assert "error:" in result.output
        assert message in result.output.replace("\n", "")
        assert "Traceback" not in result.output
    assert demo("--help").exit_code == 0


def test_a_report_needs_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "start", "step": 0}) + "\n")
    with pytest.raises(ValueError, match="holds no evaluation yet"):
        report.write_report(tmp_path)
