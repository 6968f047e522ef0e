"""Two folders as functions: how far apart what they compute is, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxgrow.emit.graphs import call_graphs, clean_graph
from fxgrow.errors import CheckpointError
from fxgrow.folders.opened import Opened, opened
from fxgrow.ir import trees
from fxgrow.ir.draws import same_draws
from fxgrow.ir.nodes import info_of
from fxgrow.verify.execute import Runner, Tensors
from fxgrow.verify.outputs import relative_errors
from fxgrow.verify.rounding import difference
from fxgrow.verify.trials import Trial, bound
from fxgrow.verify.weights import widen_float

#: what float64 leaves over, relatively
LIMIT = 1e-10


@dataclass(frozen=True)
class Parting:
    """The first op whose result differs, of those that both models have with results of one shape.

    Attributes:
        op: its name; ``module`` and ``source`` say where it is.
        error: relative to the largest value of the result.
    """

    op: str
    module: str
    source: str
    error: float


@dataclass(frozen=True)
class Comparison:
    """What two folders compute of the same inputs, in float64, from the weights in their files.

    Attributes:
        errors: of each output, relative to its largest value.
        parting: where they part; None where they do not, or no op can be held against another.
    """

    errors: list[float]
    parting: Parting | None

    @property
    def same(self) -> bool:
        return all(error <= LIMIT for error in self.errors)


def compare_folders(
    first: str | Path,
    second: str | Path,
    *,
    model_class: type[nn.Module] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Comparison:
    """Run the models of two folders on the same inputs in float64, one op's weights at a time.

    Args:
        model_class: of both; None for the classes of transformers that the configs name.
        inputs: by name; made from the first one's signature and config if None.

    Raises:
        CheckpointError: a folder is damaged, or the two return other tensors.
    """
    one = opened(first, model_class, inputs)
    other = opened(second, model_class, one.inputs)
    seen: list[tuple[fx.Node, Any]] = []
    ours = _run(one, lambda node, result: seen.append((node, result)))
    steps = iter(seen)
    found: list[Parting] = []

    def held_against(node: fx.Node, result: Any) -> None:
        mine, expected = next(steps, (None, None))
        if mine is None or mine.target is not node.target or found:
            return
        pairs = zip(trees.tensors_in(expected), trees.tensors_in(result), strict=False)
        for a, b in pairs:
            if a.shape == b.shape and a.is_floating_point() and (error := _error(a, b)) > LIMIT:
                info = info_of(node)
                found.append(Parting(str(node.target), info.module_path, info.source, error))
                return

    theirs = _run(other, held_against)
    shapes = [[tuple(t.shape) for t in trees.tensors_in(x)] for x in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{first} returns tensors of the shapes {shapes[0]}, {second} of {shapes[1]}")
    errors = [e.relative_error for e in relative_errors(ours, theirs)]
    different = any(error > LIMIT for error in errors)
    return Comparison(errors, found[0] if found and different else None)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 1.0
    return float(difference(a, b).max()) / (scale or 1.0) if a.numel() else 0.0


def _run(folder: Opened, look: Callable[[fx.Node, Any], None]) -> Any:
    """The outputs of a folder's model in eval mode; ``look`` is shown the result of every op."""
    program = folder.capture()
    reader = folder.reader(program)
    (graph,) = call_graphs(program, clean_graph(program.graph, True))
    runner = Runner(graph)
    tensors = Tensors(lambda name: widen_float(reader(name)), runner.written, keep=False)

    def after(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
        look(node, trees.map_tensors(torch.Tensor.clone, result))
        return result

    given = Trial((), folder.inputs, "the example").copy(torch.float64)
    with torch.no_grad(), same_draws():
        return runner.run(bound(given, runner.inputs), tensors, training=False, after=after)
