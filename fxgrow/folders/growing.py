"""``grow_checkpoint``: a folder with a config and weights in, a larger one out, without fxgrow in it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError, GrowthRefused, SpecError, did_you_mean
from fxgrow.folders import card, dictionary, resuming
from fxgrow.folders.archive import Later, sizes_in
from fxgrow.folders.building import build, taken_by
from fxgrow.folders.conversions import Pieces
from fxgrow.folders.keys import shapes_of, why_not
from fxgrow.folders.opened import Opened, Reader, opened
from fxgrow.folders.optimizer import Growing, Maker, Way, grown_state, way_of, ways_of
from fxgrow.folders.source import CONFIG, Source
from fxgrow.folders.tensorfile import disk_errors
from fxgrow.folders.writing import Target, Writing, check_absent, copy_files, shards_of
from fxgrow.growth import plan_growth, timed
from fxgrow.ir.traced import Traced
from fxgrow.landing.apply import apply, constants_held
from fxgrow.landing.beside import alike
from fxgrow.landing.between import spec_between
from fxgrow.landing.compare import described, differences
from fxgrow.landing.living import attributes_of
from fxgrow.optim.policies import POLICIES
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program, capture
from fxgrow.reading import read_json
from fxgrow.spec import GrowthSpec
from fxgrow.trace.foreign import without_values
from fxgrow.verify.failures import Failures
from fxgrow.verify.float64 import Float64
from fxgrow.verify.inputs import Inputs
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Receipt
from fxgrow.weights.materialise import check_finite, materialise_all, materialise_tensor

SHARD_BYTES = 5 * 10**9
#: tensors that the system is told to read while one is made
_AHEAD = 2
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
    proved by a trace of that class. Then the weights are streamed: memory is needed for the largest tensors, not for
    the model. The new folder has the config, the weights under the class's own names, and all other files of the old
    one; it appears whole, and a run that was killed goes on where it was.

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
        progress: called with bytes written and bytes in all.

    Raises:
        SpecError: the spec or the settings are wrong, or no example is known.
        CheckpointError: the folder or its class is.
        GrowthRefused: what cannot be proved exact, or no config of the class computes; nothing is written then.
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
    source, make, model, given, table = small.source, small.make, small.model, small.inputs, small.table
    found = _states(small, optimizer, make_optimizer)
    with timed(seconds, "capture"):
        program = small.capture()
    if spec is None:
        wanted = _wanted(small, settings, like)
        with timed(seconds, "capture"):
            theirs = capture(build(make, wanted, small.dtypes, "the config with these settings"), (), given)
        operations = spec_between(program, theirs)
        if not operations:
            raise SpecError("these settings change no size: there is nothing to grow")
        with timed(seconds, "plan"):
            plan, grown = _planned(program, GrowthSpec.parse(operations), theirs)
        changed = {k: (source.config.get(k), v) for k, v in wanted.items() if source.config.get(k, _MISSING) != v}
    else:
        with timed(seconds, "plan"):
            plan, grown = _planned(program, GrowthSpec.parse(spec))
        with timed(seconds, "config"):
            changed = _landed(model, source, program, plan, grown)
        wanted = source.config | {k: new for k, (_, new) in changed.items()}
    with timed(seconds, "prove"):
        dtypes = {n: t.dtype for n, t in grown.tensors.items()}
        dtypes |= {alias: dtypes[name] for alias, name in grown.aliases.items() if name in dtypes}

        def made_of(config: Mapping[str, Any]) -> nn.Module:
            return build(make, config, dtypes, "the grown config")

        needed = {n: tuple(plan.tensors[n].shape) for n in (*grown.parameters, *grown.buffers)}
        if lines := why_not(made_of, wanted, needed):
            raise GrowthRefused(_no_config(type(model).__name__, lines))
        large = made_of(wanted)
        _prove(large, program, plan, grown, given)
    reader = small.reader(program)
    targets = _targets(plan, program, grown, small.names, large)
    notes = [f"{name} was left out: the class has no place for it" for name in small.ignored]
    notes += [f"{file.name} was left out: it holds weights of the small model" for file in source.stale]
    if table is not None and (kept := table.kept(small.source.tensors)):
        notes.append(f"kept as they are, with tensors in them: {', '.join(kept)}")
    states: dict[Any, Any] = {}
    how = Growing(small.again(), large, program, plan, grown, policy, rates)
    with timed(seconds, "optimizer"):
        for place, (state, where, way) in found.items():
            states[place], said = grown_state(state, way, how, where)
            notes += [line for line in said if line not in notes]

    def measured() -> Receipt:
        receipt = Receipt(exactness=plan.exactness, notes=["not measured: verification was switched off"])
        if verify:
            with timed(seconds, "verify"):
                receipt = _verified(program, plan, grown, reader)
        receipt.params_before, receipt.params_after = plan.parameters_before, plan.parameters_after
        receipt.notes += notes
        return receipt

    if table is not None:
        receipt = measured()
        with timed(seconds, "write"):
            data = _grown_table(small, wanted, changed, states, how, targets)
            dictionary.check_room(out, data)
            dictionary.write(out, data, how.later)
        return Grown(out, plan, receipt, changed, seconds)
    written, groups = small.conversions.written(large, list(targets))
    shards = shards_of(written, shard_bytes)
    left_out = resuming.parts_in(folder) | set(states)
    others = [file for file in source.others if file not in left_out]
    forgotten = resuming.without_the_best(folder)
    more = sum(file.stat().st_size for file in others) + sum(sizes_in(list(states.values())))
    key = _key(source, plan, wanted, shards)
    with Writing(out, key, shards, source.metadata or {"format": "pt"}, more) as writing:
        with timed(seconds, "write"):
            with ThreadPoolExecutor(1) as ahead:
                made = _Made({t.name: (t, name) for t, name in targets.items()}, plan, reader, ahead)
                _stream(writing, Pieces(small.conversions, large, groups, made), progress)
            writing.index()
        copy_files(others, folder, writing.part)
        for file, state in states.items():
            dictionary.write(writing.part / resuming.place_of(file, folder), state, how.later)
        if forgotten is not None:
            notes += resuming.write_notes(writing.part, forgotten)
        receipt = measured()
        with disk_errors(str(out)):
            text = json.dumps(wanted, indent=2, ensure_ascii=False)
            (writing.part / CONFIG).write_text(text + "\n", encoding="utf-8")
            card.write(writing.part, folder.name, plan, receipt, changed)
        writing.settle()
    return Grown(out, plan, receipt, changed, seconds)


_MISSING = object()


def _planned(program: Program, spec: GrowthSpec, like: Program | None = None) -> tuple[GrowthPlan, Program]:
    """The plan and the grown trace, with the values of its constants: a class is asked whether it has the same."""
    plan, grown = plan_growth(program, spec, like)
    grown.constants.update(materialise_all(plan, program.tensor, program.constants))
    return plan, grown


# the config --------------------------------------------------------------------------------------------------------


def _wanted(small: Opened, settings: Mapping[str, Any] | None, like: str | Path | None) -> dict[str, Any]:
    """The config that a larger model is to have.

    Raises:
        SpecError: a setting that neither the config nor the class has.
    """
    config = small.source.config
    if like is not None:
        found = read_json(Path(like) / CONFIG if Path(like).is_dir() else Path(like), SpecError, finite=False)
        if not isinstance(found, dict):
            raise SpecError(f"{like} is no table of settings")
        return config | found
    assert settings is not None
    wanted = config
    for name, value in settings.items():
        wanted = _with_setting(wanted, name.split("."), value, small.source.called)
    for name in settings:
        if "." not in name and name not in config:  # which a class may have a default for
            made = [
                shapes_of(build(small.make, given, small.dtypes, "the config with these settings"))
                for given in (wanted, {k: v for k, v in wanted.items() if k != name})
            ]
            taken = taken_by(type(small.model))[1] or set()
            if made[0] == made[1] and name not in taken | set(_settings(small.model, config)):
                raise SpecError(
                    f"{small.source.called} has no {name}, and it changes nothing; {did_you_mean(name, config)}"
                )
    return wanted


def _with_setting(config: Mapping[str, Any], path: Sequence[str], value: Any, where: str) -> dict[str, Any]:
    """A config with another value, which may be in a table within it: ``text_config.hidden_size``.

    Raises:
        SpecError: there is no such table, or it has no such setting.
    """
    head, *rest = path
    if not rest:
        return {**config, head: value}
    inner = config.get(head)
    if not isinstance(inner, Mapping):
        raise SpecError(f"{where} has no table {head}; {did_you_mean(head, config)}")
    if len(rest) == 1 and rest[0] not in inner:
        raise SpecError(f"{where} has no {rest[0]} in {head}; {did_you_mean(rest[0], inner)}")
    return {**config, head: _with_setting(inner, rest, value, where)}


def _landed(
    model: nn.Module, source: Source, program: Program, plan: GrowthPlan, grown: Traced
) -> dict[str, tuple[Any, Any]]:
    """Grow the class, whose weights are not there: which settings of its config are others then.

    Raises:
        GrowthRefused: the class cannot compute the grown function.
    """
    before = _settings(model, source.config)
    others = [name for name in plan.tensors if name not in grown.parameters]
    tensors = dict(materialise_all(plan, program.tensor, others))
    tensors |= {n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in grown.parameters.items()}
    apply(model, plan, program.without_tensors(), grown, tensors, constants_held(model, program))
    after = _settings(model, source.config)
    return {k: (before.get(k), v) for k, v in after.items() if before.get(k, _MISSING) != v}


def _settings(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says of itself, as plain data: its config, or arguments that it keeps by their names."""
    held: Any = getattr(model, "config", None)
    if held is None:
        return {k: v for k, v in attributes_of(model).items() if k in config}
    if callable(getattr(held, "to_dict", None)):
        return dict(json.loads(json.dumps(held.to_dict(), default=str)))
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        return dataclasses.asdict(held)
    return dict(held) if isinstance(held, Mapping) else {k: v for k, v in vars(held).items() if not k.startswith("_")}


def _no_config(name: str, lines: Sequence[str]) -> str:
    return "\n".join(
        [
            f"{name}, made from the grown config, does not compute what the growth does:",
            *(f"  {line}" for line in lines),
            "Grow other axes with it, so that a config says the same, or use fxgrow.grow and fxgrow.save",
        ]
    )


def _prove(
    large: nn.Module,
    program: Program,
    plan: GrowthPlan,
    grown: Traced,
    inputs: Mapping[str, Any],
) -> None:
    """See to it that the class made from the grown config computes the grown function.

    Raises:
        GrowthRefused: it does not; the message names the numbers on both sides.
    """
    theirs = capture(large, (), inputs)
    if found := differences(grown, theirs):
        lines = [described(d, "the class") for d in found[:6]]
        lines += [f"and {len(found) - 6} more"] if len(found) > 6 else []
        raise GrowthRefused(_no_config(type(large).__name__, lines))
    computed = dict(large.named_buffers())
    unsaved = [name for name in grown.buffers if name in computed and name not in grown.persistent]
    for name, made in materialise_all(plan, program.tensor, unsaved):
        if not alike(made, computed[name]):
            raise GrowthRefused(
                f"the buffer {name} is not saved, and {type(large).__name__} computes other values for it than the "
                "growth needs"
            )


# one file, and optimizers ------------------------------------------------------------------------------------------


def _grown_table(
    small: Opened,
    wanted: Mapping[str, Any],
    changed: Mapping[str, Any],
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
        make = _Made({t.name: (t, name) for t, name in targets.items()}, how.plan, reader)
        made = {t.name: _made_later(t, make, how.later) for t in targets}
        once: dict[str, torch.Tensor] = {}
        new[place] = table.named(place, {t.name: once.setdefault(n, made[t.name]) for t, n in targets.items()})
    for place in table.settings:
        if table.called(place) == source.called:
            settings = copy.copy(table.at(place))
            settings.update({k: wanted[k] for k in changed})
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
        ahead: has the system read what is asked for next.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[Target, str]],
        plan: GrowthPlan,
        reader: Reader,
        ahead: ThreadPoolExecutor | None = None,
    ) -> None:
        self._targets, self._plan, self._reader, self._ahead = targets, plan, reader, ahead
        self._order = list(targets)
        self._place = {n: i for i, n in enumerate(self._order)}

    def __call__(self, written: str) -> torch.Tensor:
        target, name = self._targets[written]
        tensor = self._plan.tensors[name]
        if self._ahead is not None:
            place = self._place[written]
            for following in self._order[place + 1 : place + 1 + _AHEAD]:
                coming = self._plan.tensors[self._targets[following][1]].source
                if coming is not None and coming != tensor.source:
                    self._ahead.submit(self._reader.ahead, coming)
        source = None if tensor.source is None else self._reader(tensor.source)
        if source is not None:
            check_finite({tensor.source or name: source})
        return materialise_tensor(tensor, source, dtype=target.dtype)


def _stream(writing: Writing, pieces: Pieces, progress: Progress | None) -> None:
    total = sum(t.bytes for shard in writing.shards for t in shard)
    done = writing.bytes_done

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if progress is not None:
        progress(done, total)
    writing.write(lambda shard: pieces(t.name for t in shard), wrote)


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
