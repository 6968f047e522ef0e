"""What the models are run on."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow
from fxgrow.verify.inputs import Inputs
from fxgrow.verify.trials import Trial


class Modes(nn.Linear):
    """Another graph in train mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.training else 1)


def inputs(model: nn.Module) -> Inputs:
    return Inputs(fxgrow.capture(model, (torch.ones(4, 3),)))


def test_the_first_that_the_model_takes_is_found_and_looked_for_once() -> None:
    found, tried = inputs(nn.Linear(3, 2)), []

    def takes(trial: Trial) -> bool:
        tried.append(trial.words)
        return len(tried) == 2

    assert found.rounds(False) == [] and found.found("mixed", 0) is None and not found.sought("mixed", 0)
    found.look("mixed", 0, takes)
    found.look("mixed", 0, takes)
    assert len(tried) == 2 and found.words == tried[1:] and found.sought("mixed", 0)
    trial = found.found("mixed", 0)
    assert trial is not None and found.rounds(False) == [{0: trial}] and found.rounds(False, ("longer",)) == []


def test_what_no_model_takes_is_not_looked_for_again() -> None:
    found = inputs(nn.Linear(3, 2))
    found.look("longer", 0, lambda trial: False)
    assert found.sought("longer", 0) and found.found("longer", 0) is None and found.words == []


def test_a_call_is_run_in_its_own_mode() -> None:
    found = inputs(Modes(3, 2))
    (eval_call,), (train_call,) = found.served(False), found.served(True)
    assert list(found.example(False)) == [eval_call] and list(found.example(True)) == [train_call]
    for call in (eval_call, train_call):
        found.look("longer", call, lambda trial: True)
    assert [list(r) for r in found.rounds(True)] == [[train_call]]
    assert [words.split(":")[0] for words in found.words] == ["forward_eval", "forward_train"]
