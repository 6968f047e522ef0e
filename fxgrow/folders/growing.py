"""``grow_checkpoint``: a folder with a config and weights in, a larger one out, without fxgrow in it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError, GrowthRefused, SpecError
from fxgrow.folders import card, dictionary, resuming
from fxgrow.folders.archive import Later, sizes_in
from fxgrow.folders.configs import Configs, Larger, asked_for, wanted_of
from fxgrow.folders.conversions import Pieces
from fxgrow.folders.opened import Ahead, Opened, Reader, opened
from fxgrow.folders.optimizer import Growing, Maker, Way, grown_state, way_of, ways_of
from fxgrow.folders.source import CONFIG, Source
from fxgrow.folders.tensorfile import disk_errors, into_cache
from fxgrow.folders.writing import Target, Writing, check_absent, copy_files, shards_of
from fxgrow.growth import plan_growth, timed
from fxgrow.ir.traced import Traced
from fxgrow.landing.between import spec_between
from fxgrow.optim.policies import POLICIES
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.spec import GrowthSpec
from fxgrow.trace.foreign import without_values
from fxgrow.verify.failures import Failures
from fxgrow.verify.float64 import Float64
from fxgrow.verify.inputs import Inputs
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Receipt
from fxgrow.weights.materialise import check_finite, materialise_all, materialise_tensor

SHARD_BYTES = 5 * 10**9
#: bytes that are worth proving a config beside writing them
_BESIDE = 2**28
#: tensors among which the one that is read next is looked for
_NEAR = 8
Progress = Callable[[int, int], None]


@dataclass
class Grown:
    """What :func:`grow_checkpoint` made.

    Attributes:
        folder: of the grown checkpoint; or its file.
        plan: how every tensor was made.
        receipt: what was measured.
        settings: those of the config that are others now: old and new, None where there was none.
        seconds: of each part.
    """

    folder: Path
    plan: GrowthPlan
    receipt: Receipt
    settings: dict[str, tuple[Any, Any]]
    seconds: dict[str, float] = field(default_factory=dict)


@without_values()
def grow_checkpoint(
    folder: str | Path,
    spec: Any = None,
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    like: str | Path | None = None,
    model_class: type[nn.Module] | None = None,
    inputs: Mapping[str, Any] | None = None,
    optimizer: str | Path | bool = True,
    policy: str = "asymmetric",
    make_optimizer: Maker | None = None,
    rates: bool = False,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Grown:
    """Grow a checkpoint that a class is made from by its config: a folder of transformers, or of a class of yours.

    The class is made without memory for weights, traced and grown; the config that makes the grown class is found, and
    proved by a trace of that class. Meanwhile the weights are streamed: memory is needed for the largest tensors, not
    for the model. The new folder has the config, the weights under the class's own names, and all other files of the
    old one; it appears whole, and a run that was killed goes on where it was.

    A file of ``torch.save`` that holds weights, settings and an optimizer's state becomes such a file; what else it
    holds is kept.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or shards of it with their index; or a file.
        spec: as :func:`fxgrow.grow` takes it; or instead of it
        settings: of the config, by name (``text_config.hidden_size``: in a table of it), with their new values; or
        like: the ``config.json`` of a larger model of the class.
        out: the new folder, which is not there yet; beside the old one, ``-grown``, if None.
        model_class: of your own, which is made from a config's settings by name, or from an object of them; None for
            the class of transformers that the config names.
        inputs: example inputs by name; made from the signature and the config if None.
        optimizer: False leaves optimizers' states out; a path: of one that stands elsewhere, and goes into the new
            folder under its name. Those in the file, and ``optimizer.pt`` of the folder, are found.
        policy: how an optimizer's state grows: see :func:`fxgrow.optim.carry`. ``exact`` is refused where it needs
            learning rates per slice, and new entries do not warm up, unless
        rates: they stand in the state, so that it is loaded only where fxgrow is imported.
        make_optimizer: makes the optimizer over a model, as the training script does; None: a way of making it that
            fits the state is looked for.
        verify: compare both models in float64, an op's weights at a time.
        shard_bytes: the most that a file of weights holds.
        progress: called with bytes written and bytes in all, by the thread that writes.

    Raises:
        SpecError: the spec or the settings are wrong, or no example is known.
        CheckpointError: the folder or its class is.
        GrowthRefused: what cannot be proved exact, or no config of the class computes; nothing is left then.
        DiskError: no room, or the new folder is there already.
        ExactnessError: an exact plan measured inexact.
    """
    folder = Path(folder)
    single = folder.is_file()
    if out is None:
        folder = folder if folder.name else folder.resolve()  # "." has no name beside which to write
        out = folder.with_name(folder.stem + "-grown" + folder.suffix if single else folder.name + "-grown")
    out = Path(out)
    seconds: dict[str, float] = {}
    if sum(given is not None for given in (spec, settings, like)) != 1:
        raise SpecError("give one of: a spec, settings of the config, the config of a larger model")
    if policy not in POLICIES:
        raise FxgrowError(f"unknown optimizer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    check_absent(out, "file" if single else "folder")
    if folder.resolve() in out.resolve().parents:
        raise SpecError(f"{out} is inside {folder}, whose files all go along: name a folder elsewhere")
    small = opened(folder, model_class, inputs)
    with into_cache(small.source.tensors.values()):
        found = _states(small, optimizer, make_optimizer)
        with timed(seconds, "capture"):
            program = small.capture()
            asked = None if spec is not None else asked_for(small, wanted_of(small, settings, like))
            operations = spec if asked is None else spec_between(program, asked.traced)
        if asked is not None and not operations:
            raise SpecError("these settings change no size: there is nothing to grow")
        with timed(seconds, "plan"):
            plan, grown = _planned(program, GrowthSpec.parse(operations), None if asked is None else asked.traced)
        configs = Configs(small, program, plan, grown)
        candidates = configs.by_spec() if asked is None else configs.by_settings(asked)
        with timed(seconds, "config"):
            larger = next(candidates, None)
    making = _Making(small, program, plan, grown, configs, found, policy, rates, verify, seconds)
    refusal: FxgrowError | None = None
    while larger is not None:
        try:
            if small.table is not None:
                return making.file(larger, out)
            return making.folder(larger, out, shard_bytes, progress)
        except FxgrowError as error:
            if error is not larger.wrong:
                raise
            refusal = error
        with timed(seconds, "config"):
            larger = next(candidates, None)
    assert refusal is not None, "no config was tried"
    raise refusal


class _Stopped(Exception):
    """Nobody waits for what is written any more."""


def _planned(program: Program, spec: GrowthSpec, like: Program | None = None) -> tuple[GrowthPlan, Program]:
    """The plan and the grown trace, with the values of its constants: a class is asked whether it has the same."""
    plan, grown = plan_growth(program, spec, like)
    grown.constants.update(materialise_all(plan, program.tensor, program.constants))
    return plan, grown


class _Making:
    """What is made of a growth once a config may say it.

    Args:
        found: optimizers' states, see :func:`_states`.
        seconds: filled in.
    """

    def __init__(
        self,
        small: Opened,
        program: Program,
        plan: GrowthPlan,
        grown: Program,
        configs: Configs,
        found: Mapping[Any, tuple[Any, str, Way]],
        policy: str,
        rates: bool,
        verify: bool,
        seconds: dict[str, float],
    ) -> None:
        self.small, self.program, self.plan, self.grown, self.configs = small, program, plan, grown, configs
        self.found, self.policy, self.rates, self.verify, self.seconds = found, policy, rates, verify, seconds
        self.reader = small.reader(program)
        self.notes: list[str] = []

    def file(self, larger: Larger, out: Path) -> Grown:
        """A file of ``torch.save``; see :func:`grow_checkpoint`."""
        table = self.small.table
        assert table is not None
        self.notes = self._left_out()
        self._prove(larger)
        if kept := table.kept(self.small.source.tensors):
            self.notes.append(f"kept as they are, with tensors in them: {', '.join(kept)}")
        how, states = self._states(larger)
        receipt = self._measured()
        with timed(self.seconds, "write"):
            data = _grown_table(self.small, larger, states, how, self._targets(larger))
            dictionary.check_room(out, data)
            dictionary.write(out, data, how.later)
        return Grown(out, self.plan, receipt, larger.changed, self.seconds)

    def folder(self, larger: Larger, out: Path, shard_bytes: int, progress: Progress | None) -> Grown:
        """A folder; see :func:`grow_checkpoint`."""
        small, source, plan = self.small, self.small.source, self.plan
        folder = source.folder
        self.notes = self._left_out()
        targets = self._targets(larger)
        how, states = self._states(larger)
        written, groups = small.conversions.written(larger.model, list(targets))
        shards = shards_of(written, shard_bytes)
        left_out = resuming.parts_in(folder) | set(states)
        others = [file for file in source.others if file not in left_out]
        forgotten = resuming.without_the_best(folder)
        more = sum(file.stat().st_size for file in others) + sum(sizes_in(list(states.values())))
        key = _key(source, plan, larger.config, shards)
        with Writing(out, key, shards, source.metadata or {"format": "pt"}, more) as writing:
            with ThreadPoolExecutor(1) as ahead:
                made = _Made(targets, plan, Ahead(self.reader, ahead))
                self._stream(
                    writing, Pieces(small.conversions, self.configs.again(larger), groups, made), larger, progress
                )
            writing.index()
            copy_files(others, folder, writing.part)
            for file, state in states.items():
                dictionary.write(writing.part / resuming.place_of(file, folder), state, how.later)
            if forgotten is not None:
                self.notes += resuming.write_notes(writing.part, forgotten)
            receipt = self._measured()
            with disk_errors(str(out)):
                text = json.dumps(larger.config, indent=2, ensure_ascii=False)
                (writing.part / CONFIG).write_text(text + "\n", encoding="utf-8")
                card.write(writing.part, folder.name, plan, receipt, larger.changed)
            writing.settle()
        return Grown(out, plan, receipt, larger.changed, self.seconds)

    def _stream(self, writing: Writing, pieces: Pieces, larger: Larger, progress: Progress | None) -> None:
        """Write the weights of what is proved; where they are many, while that is done: the disk is idle meanwhile.

        Raises:
            FxgrowError: the config is wrong, and the hidden folder is gone; else what the writing raises.
        """
        beside = sum(t.bytes for shard in writing.shards for t in shard) > _BESIDE
        if not beside:
            self._prove(larger)
        while True:
            stop = threading.Event()
            with timed(self.seconds, "write"), ThreadPoolExecutor(1) as thread:
                streamed = thread.submit(_stream, writing, pieces, progress, stop)
                try:
                    if beside:
                        self._prove(larger)
                    self.notes += streamed.result()
                    return
                except BaseException as error:
                    stop.set()
                    if not beside or error is not larger.wrong:
                        raise
            beside = False
            larger.forget()  # PyTorch's tracing patches what other threads see, too: only a trace alone says no
            self._prove(larger)

    def _prove(self, larger: Larger) -> None:
        with timed(self.seconds, "prove"):
            self.configs.prove(larger)

    def _targets(self, larger: Larger) -> dict[Target, str]:
        return _targets(self.plan, self.program, self.grown, self.small.names, larger.model)

    def _left_out(self) -> list[str]:
        out = [f"{name} was left out: the class has no place for it" for name in self.small.ignored]
        stale = self.small.source.stale
        return [*out, *(f"{file.name} was left out: it holds weights of the small model" for file in stale)]

    def _measured(self) -> Receipt:
        receipt = Receipt(exactness=self.plan.exactness, notes=["not measured: verification was switched off"])
        if self.verify:
            with timed(self.seconds, "verify"):
                receipt = _verified(self.program, self.plan, self.grown, self.reader)
        receipt.params_before, receipt.params_after = self.plan.parameters_before, self.plan.parameters_after
        receipt.notes += self.notes
        return receipt

    def _states(self, larger: Larger) -> tuple[Growing, dict[Any, Any]]:
        """The optimizers' states, grown, by their places."""
        how = Growing(self.small.again(), larger.model, self.program, self.plan, self.grown, self.policy, self.rates)
        states: dict[Any, Any] = {}
        with timed(self.seconds, "optimizer"):
            for place, (state, where, way) in self.found.items():
                states[place], said = grown_state(state, way, how, where)
                self.notes += [line for line in said if line not in self.notes]
        return how, states


# one file, and optimizers ------------------------------------------------------------------------------------------


def _grown_table(
    small: Opened,
    larger: Larger,
    states: Mapping[Any, Any],
    how: Growing,
    targets: Mapping[Target, str],
) -> Any:
    """The data of a file, with weights, settings and optimizers' states grown; and averages of the weights."""
    table, source = small.table, small.source
    assert table is not None
    new = {place: states.get(place, dictionary.LEFT_OUT) for place in table.optimizers}
    for place in table.weights:
        tensors = table.tensors(place)
        if not dictionary.are_of(tensors, source.tensors):
            continue
        reader = Reader(how.program, {m: tensors[n] for n, m in small.names.items()})
        make = _Made(targets, how.plan, reader)
        made = {t.name: _made_later(t, make, how.later) for t in targets}
        once: dict[str, torch.Tensor] = {}
        new[place] = table.named(place, {t.name: once.setdefault(n, made[t.name]) for t, n in targets.items()})
    for place in table.settings:
        if table.called(place) == source.called:
            settings = copy.copy(table.at(place))
            settings.update({k: larger.config[k] for k in larger.changed})
            new[place] = settings
    return table.with_(new)


def _made_later(target: Target, make: _Made, later: Later) -> torch.Tensor:
    """A tensor that is made when it is written, if it is large."""
    like = torch.empty(target.shape, dtype=target.dtype)
    return later.put_off(like, lambda: make(target.name)) if later.takes(like) else make(target.name)


def _states(small: Opened, given: str | Path | bool, make: Maker | None) -> dict[Any, tuple[Any, str, Way]]:
    """Optimizers' states, by their places in a file or by their files; each with where it is, and how it was made.

    Raises:
        CheckpointError: one cannot be read, or is not of the class.
    """
    folder, table = small.source.folder, small.table
    found: dict[Any, tuple[Any, str]] = {}
    if table is not None:
        if not isinstance(given, bool):
            raise SpecError(f"{folder} is one file, and the state that stands in it is grown: {given} is not read")
        found = {place: (table.at(place), table.called(place)) for place in table.optimizers if given}
    elif given is not False:
        files = resuming.states_in(folder) if given is True else [Path(given)]
        found = {file: (resuming.state_of(file), str(file)) for file in files}
    model = small.again()  # a function of the user's may freeze some of it
    trainers = table is None and resuming.is_of_trainer(folder)
    if table is not None and len(found) > 1:
        ways = ways_of([s for s, _ in found.values()], model, make, [where for _, where in found.values()])
    else:
        ways = [way_of(state, model, make, where, trainers) for state, where in found.values()]
    return {k: (state, where, way) for (k, (state, where)), way in zip(found.items(), ways, strict=True)}


# the weights -------------------------------------------------------------------------------------------------------


def _targets(
    plan: GrowthPlan, program: Program, grown: Traced, names: Mapping[str, str], large: nn.Module
) -> dict[Target, str]:
    """What is written, in the order in which it is read, and the plan's name of it.

    A tensor has the names that its source has in the files: of tied ones, those that were saved.
    """
    back = {m: n for n, m in names.items()}
    own = large.state_dict(keep_vars=True)
    prefix = _prefix(names)
    order = {program.aliases.get(m, m): i for i, m in enumerate(names.values())}
    alias_of: dict[str, list[str]] = {}
    for alias, name in grown.aliases.items():
        alias_of.setdefault(name, []).append(alias)
    found: list[tuple[int, Target, str]] = []
    for name, tensor in plan.tensors.items():
        if name not in grown.parameters and name not in grown.buffers:
            continue
        every = [n for n in (name, *alias_of.get(name, ())) if n in own]
        saved = [n for n in every if n in back]
        if not saved and tensor.source is not None and program.aliases.get(tensor.source, tensor.source) not in order:
            continue  # a buffer that is not saved
        dtype = grown.tensors[name].dtype
        place = order.get(tensor.source or "", len(order))
        for n in saved or every[:1]:
            found.append((place, Target(back.get(n, prefix(n)), dtype, tuple(tensor.shape)), name))
    written = {target.name for _, target, _ in found}
    for name, tensor in own.items():  # read by no call: as it was, where its size is still right
        if prefix(name) not in written and not any(own[o] is tensor for o in own if prefix(o) in written):
            old = back.get(name)
            if old is None or tuple(program.tensor(name).shape) != tuple(tensor.shape):
                raise GrowthRefused(f"{name} is read by no captured call, so that how it grows is not known")
            found.append((order[name], Target(old, program.tensor(name).dtype, tuple(tensor.shape)), name))
    return {target: name for _, target, name in sorted(found, key=lambda item: item[0])}


def _prefix(names: Mapping[str, str]) -> Callable[[str], str]:
    """From the model's names to those in the files."""
    for file, own in names.items():
        if file != own:
            if own.endswith(f".{file}"):
                return lambda n, cut=own.removesuffix(file): n.removeprefix(cut)  # type: ignore[misc]
            return lambda n, more=file.removesuffix(own): more + n  # type: ignore[misc]
    return lambda n: n


class _Made:
    """The grown tensors by the names that they are written under.

    Args:
        targets: by that name, with the plan's, in the order in which they are asked for.
        read: the old tensors; an :class:`Ahead` is told what is asked for next.
    """

    def __init__(self, targets: Mapping[Target, str], plan: GrowthPlan, read: Reader | Ahead) -> None:
        self._targets = {t.name: (t, plan.tensors[name]) for t, name in targets.items()}
        self._read = read
        self._order = list(self._targets)
        self._place = {n: i for i, n in enumerate(self._order)}

    def __call__(self, written: str) -> torch.Tensor:
        target, tensor = self._targets[written]
        source = None if tensor.source is None else self._read(tensor.source)
        if isinstance(self._read, Ahead):
            place = self._place[written] + 1
            sources = (self._targets[n][1].source for n in self._order[place : place + _NEAR])
            if (coming := next((s for s in sources if s not in (None, tensor.source)), None)) is not None:
                self._read.begin(coming)
        if source is not None:
            check_finite({tensor.source or target.name: source})
        return materialise_tensor(tensor, source, dtype=target.dtype)  # in memory of its own


def _stream(writing: Writing, pieces: Pieces, progress: Progress | None, stop: threading.Event) -> list[str]:
    """Write the weights, until told to stop; returns what is to be said of it."""
    damaged = writing.check(stop.is_set)
    total = sum(t.bytes for shard in writing.shards for t in shard)
    done = writing.bytes_done

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if progress is not None:
        progress(done, total)

    def made(shard: Sequence[Target]) -> Iterator[torch.Tensor]:
        for tensor in pieces(t.name for t in shard):
            if stop.is_set():
                raise _Stopped
            yield tensor

    writing.write(made, wrote)
    return [f"{name} of an earlier run was damaged since, and was written again" for name in damaged]


def _key(source: Source, plan: GrowthPlan, config: Mapping[str, Any], shards: Iterable[Sequence[Target]]) -> str:
    """What a run that goes on has to have in common with the one before."""
    files = sorted({e.file for e in source.tensors.values()})
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    said = json.dumps(
        [str(source.folder.resolve()), state, config, [[t.name for t in s] for s in shards]],
        sort_keys=True,
        default=str,
    )
    digest = hashlib.blake2b(digest_size=16)
    digest.update(said.encode())
    digest.update(plan.model_dump_json(include={"tensors", "steps"}).encode())
    return digest.hexdigest() + "\n"


def _verified(program: Program, plan: GrowthPlan, grown: Traced, reader: Reader) -> Receipt:
    """Compare both models in float64, an op's weights at a time.

    Raises:
        ExactnessError: the plan is exact, the measurement is not.
    """
    small = dataclasses.replace(
        program, parameters=reader.table(program.parameters), buffers=reader.table(program.buffers)
    )
    receipt, failures = Receipt(exactness=plan.exactness, measured="streamed"), Failures(plan)
    Float64(Pair(small, grown, plan), Inputs(small), failures, receipt).streamed()
    failures.judge(receipt)
    return receipt
