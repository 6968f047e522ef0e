"""Grown models on disk: safetensors and one JSON manifest, no pickle.

A checkpoint is a folder::

    manifest.json            versions, plan, receipt, names, ties, the flat graph: see :class:`fxgrow.manifest.Manifest`
    model.safetensors        every parameter, buffer and constant once, under its own name
    examples.safetensors     the example inputs and what the model gave for them (left out with ``examples=False``)

The module is regenerated from the graph, so that loading needs neither the user's code nor a new trace, and what comes
back can be analysed and grown again. ``model.safetensors`` is an ordinary state dict: other tools can read it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx, nn

from fxgrow.compile import compile_regions
from fxgrow.emit.module import regenerate
from fxgrow.errors import CheckpointError, DiskError
from fxgrow.growth import Growth
from fxgrow.ir import trees
from fxgrow.ir.guards import Guard, compile_condition, inputs_of
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.nodes import info_of
from fxgrow.ir.provenance import edited, provenance_of
from fxgrow.ir.running import run_eval
from fxgrow.ir.serialize import graph_from_json, graph_to_json, path_name
from fxgrow.ir.traced import Call
from fxgrow.ir.treespecs import check as check_treespec
from fxgrow.ir.values import decode_value, encode_value
from fxgrow.manifest import (
    EXAMPLES,
    MANIFEST,
    MODEL,
    CallRecord,
    GuardRecord,
    Manifest,
    TensorRecord,
    read_manifest,
)
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.publish import find, new_id, publish
from fxgrow.reading import first_problem
from fxgrow.verify.outputs import relative_errors
from fxgrow.verify.receipt import Receipt
from fxgrow.version import __version__
from fxgrow.weights.materialise import check_readable

_UNREADABLE = "its plan or receipt cannot be read"
Result = TypeVar("Result")


@dataclass
class Loaded:
    """What :func:`load` returns. It can be saved and grown again like the growth it was.

    Attributes:
        module: a GraphModule in the mode it was saved in.
        plan, receipt: of the growth that made it; None where there was none.
        program: graph and names.
        args, kwargs: the example inputs of the first call, empty where they were not stored.
        outputs: by call, the tensors that the model gave for its example in eval mode; None where not stored.
        manifest: everything else.
    """

    module: fx.GraphModule
    plan: GrowthPlan | None
    receipt: Receipt | None
    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[list[torch.Tensor]] | None
    manifest: Manifest

    def replay_error(self) -> float:
        """Largest relative difference between what the model gives for its examples now and what it gave when saved.

        Raises:
            CheckpointError: the checkpoint has no examples.
        """
        if self.outputs is None:
            raise CheckpointError("the checkpoint was saved without examples, so that there is nothing to compare with")
        worst = 0.0
        for call, before in zip(self.program.calls, self.outputs, strict=True):
            if not call.serves(False):
                continue
            now = trees.tensors_in(run_eval(self.module, call.args, call.kwargs))
            if len(now) != len(before):
                raise CheckpointError(f"{call.name} returns {len(now)} tensors, the checkpoint has {len(before)}")
            worst = max([worst, *(e.relative_error for e in relative_errors(before, now))])
        return worst

    def compile(self, **options: Any) -> fx.GraphModule:
        """Like :meth:`fxgrow.Growth.compile`."""
        return compile_regions(self.module, **options)


# saving ---------------------------------------------------------------------------------------------------------------


def save(growth: Growth | Loaded | fx.GraphModule, path: str | Path, *, examples: bool = True) -> Path:
    """Write a grown model, with the weights it has now, to a folder.

    A new folder appears whole or not at all. One that holds an older checkpoint is replaced in one step: for whoever
    reads, and whenever this process is killed, it is the old or the new one (see :mod:`fxgrow.publish`). Other files in
    it, and folders that hold something else, are left alone.

    Args:
        growth: from :func:`fxgrow.grow` or :func:`load`, or the module of one.
        path: of the folder.
        examples: store the example inputs and the model's outputs for them, so that ``fxgrow verify`` can tell
            whether a loaded model still computes the same. Turn it off where the inputs are private.

    Returns:
        The path.

    Raises:
        CheckpointError: the module was edited by hand, or holds something that cannot be stored.
        DiskError: the folder cannot be written (no space, no permission); what was there is unchanged.
    """
    path = Path(path)
    module = growth if isinstance(growth, nn.Module) else growth.module
    plan = None if isinstance(growth, nn.Module) else growth.plan
    receipt = None if isinstance(growth, nn.Module) else growth.receipt
    found = provenance_of(module)
    program = found and found.program
    if not isinstance(program, Program) or not isinstance(module, fx.GraphModule):
        raise CheckpointError(
            "only modules made by fxgrow can be saved this way; save others with safetensors.torch.save_model"
        )
    if edited(module):
        raise CheckpointError("the module's graph was edited after the growth; save its state dict, or capture it anew")
    try:
        taken = path.exists() and not (path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir())))
    except (OSError, ValueError) as error:
        raise DiskError(f"{str(path)[:200]!r} cannot be written: {error}") from error
    if taken:
        raise CheckpointError(f"{path} exists and is not a checkpoint; choose another path")
    tensors, records = _collect(program, module)
    manifest = Manifest(
        saved=new_id(),
        fxgrow=__version__,
        torch=torch.__version__,
        class_name=program.class_name,
        parameters=sum(p.numel() for p in module.parameters()),
        training=module.training,
        mode_reason=program.mode_reason,
        containers=dict(program.containers),
        module_types={k: v for k, v in program.module_types.items() if not k.startswith("_empty")},
        ties=dict(program.aliases),
        tensors=records,
        plan=None if plan is None else _plain(plan),
        receipt=None if receipt is None else _plain(receipt),
        signature=list(program.signature),
        asks_dtype=program.asks_dtype,
        defaults={n: encode_value(v, f"default of {n}") for n, v in program.defaults.items()},
        graph=graph_to_json(program.graph),
    )
    stored: dict[str, torch.Tensor] = {}
    device = next(iter(tensors.values()), torch.empty(0)).device
    on_meta = any(t.is_meta for t in tensors.values())
    for number, call in enumerate(program.calls):
        record = CallRecord(name=call.name, inputs=call.inputs, training=call.training)
        record.structure, record.nested, record.sizes = call.treespec, call.nested, call.sizes
        record.dtypes = {n: cast(Any, str(d).removeprefix("torch.")) for n, d in call.dtypes.items()}
        record.guards = [GuardRecord(**asdict(guard)) for guard in call.guards]
        record.constants = {n: encode_value(v, f"input {n}") for n, v in call.constants.items()}
        if examples and not on_meta:
            args, kwargs = trees.map_tensors(lambda x: x.to(device), (call.args, call.kwargs))
            record.args = _encode_inputs(args, "example args", stored)
            record.kwargs = _encode_inputs(kwargs, "example kwargs", stored)
            outputs = trees.tensors_in(run_eval(module, args, kwargs)) if call.serves(False) else []
            for i, output in enumerate(outputs):
                stored[f"output.{number}.{i}"] = output
        manifest.calls.append(record)
    files = {MODEL: tensors, **({EXAMPLES: stored} if stored else {})}

    def write(place: Callable[[str], Path]) -> None:
        for name, content in files.items():
            _write_tensors(content, place(name), str(manifest.saved))
        text = _lines(manifest.model_dump(mode="json", exclude_none=True))
        place(MANIFEST).write_text(text, encoding="utf-8")

    try:
        publish(path, [*files, MANIFEST], write, str(manifest.saved), lambda: _present(path), [EXAMPLES])
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror or error}. What was there is unchanged") from error
    return path


def _present(path: Path) -> tuple[str, list[str]] | None:
    """Id and files of the save that a folder holds."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    return None if manifest.saved is None else (manifest.saved, _files(manifest))


def _files(manifest: Manifest) -> list[str]:
    return [MODEL, *([EXAMPLES] if _complete(manifest) else []), MANIFEST]


def _complete(manifest: Manifest) -> bool:
    """Whether examples are stored."""
    return bool(manifest.calls) and all(c.args is not None and c.kwargs is not None for c in manifest.calls)


def _collect(program: Program, module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, TensorRecord]]:
    own = named_tensors(module)
    records: dict[str, TensorRecord] = {}
    for name in program.tensors:
        tensor = own.get(name)
        if tensor is None:
            raise CheckpointError(f"the module has no tensor {name!r} any more")
        kind: Literal["parameter", "buffer", "constant"] = (
            "parameter" if name in program.parameters else "buffer" if name in program.buffers else "constant"
        )
        records[name] = TensorRecord(
            kind=kind,
            shape=list(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor.requires_grad,
            persistent=kind != "constant" and (kind == "parameter" or name in program.persistent),
            channels_last=_channels_last(tensor),
        )
    for alias, name in program.aliases.items():
        if own.get(alias) is not own.get(name):
            raise CheckpointError(
                f"{alias} and {name} were one tensor when the model was captured and are two now; tie them again "
                f"(or capture the model anew)"
            )
    return {n: own[n] for n in records}, records


def _channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _plain(model: BaseModel) -> dict[str, Any]:
    """A pydantic model as JSON data; infinities as strings, which pydantic reads back."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, list) else value

    out: dict[str, Any] = finite(model.model_dump(mode="json", exclude_none=True))
    return out


def _encode_inputs(inputs: Any, where: str, stored: dict[str, torch.Tensor]) -> Any:
    """Arguments as JSON; tensors go to ``stored``, and their names take their place."""

    def refer(value: Any, where: str) -> tuple[str, str] | None:
        if isinstance(value, dict | list) and type(value) not in (dict, list):  # graphs tell them apart
            raise CheckpointError(f"{where} is of the class {type(value).__name__}, which a checkpoint cannot store")
        if not isinstance(value, torch.Tensor):
            return None
        name = f"input.{len(stored)}"
        stored[name] = value
        return "tensor", name

    return encode_value(inputs, where, refer)


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, saved: str) -> None:
    """One safetensors file; tensors that share memory are stored apart, ties having been taken care of.

    Raises:
        CheckpointError: a tensor that cannot be stored.
        OSError: the file cannot be written.
    """
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    check_readable(tensors, CheckpointError)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to store")
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        plain[name] = flat
    try:
        save_file(plain, path, metadata={"format": "pt", "saved": saved})
    except (SafetensorError, ValueError, KeyError) as error:
        if system := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1]))) from error
        kinds = sorted({str(t.dtype) for t in plain.values()})
        raise CheckpointError(f"safetensors cannot store these tensors ({', '.join(kinds)}): {error}") from error
    path.chmod(0o644)  # safetensors makes files that only the owner can read


def _lines(data: dict[str, Any]) -> str:
    """JSON with one line for each entry of each table, so that people can read and compare manifests."""

    def compact(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    parts = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {compact(k)}: {compact(v)}" for k, v in value.items())
            parts.append(f" {compact(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list) and value:
            inner = ",\n".join(f"  {compact(v)}" for v in value)
            parts.append(f" {compact(key)}: [\n{inner}\n ]")
        else:
            parts.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# loading --------------------------------------------------------------------------------------------------------------


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Loaded:
    """Read a checkpoint folder and regenerate its module. Runs none of the stored graph.

    Args:
        path: the folder.
        device: where the tensors go.

    Raises:
        CheckpointError: something is missing, does not fit, or is of a newer version; the message says what and where.
    """
    path = Path(path)
    return _of_one_save(path, lambda manifest: _load(path, manifest, device))


def _of_one_save(path: Path, read: Callable[[Manifest], Result]) -> Result:
    """Read a folder that may be replaced meanwhile: what fails is read again where the manifest is another by now.

    Where it is the same, once more: a file may have taken its plain name between being looked for and being opened.
    """
    last: str | None = ""
    while True:
        manifest = read_manifest(path)
        try:
            return read(manifest)
        except CheckpointError:
            if manifest.saved == last:
                raise
            last = manifest.saved


def _load(path: Path, manifest: Manifest, device: str | torch.device) -> Loaded:
    tensors = read_tensors(find(path, MODEL, manifest.saved), device, manifest)
    _check_tensors(manifest, tensors, path / MODEL)
    try:
        graph = graph_from_json(manifest.graph)
        plan = None if manifest.plan is None else GrowthPlan.from_data(manifest.plan, _UNREADABLE)
        receipt = None if manifest.receipt is None else Receipt.model_validate(manifest.receipt)
    except CheckpointError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from error
    except (ValidationError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {_UNREADABLE}: {first_problem(error)}") from error
    _check_names(manifest, graph, path / MANIFEST)
    calls, outputs = _read_calls(manifest, path, device)
    args, kwargs = (calls[0].args, calls[0].kwargs) if calls else ((), {})

    def of(kind: str) -> dict[str, torch.Tensor]:
        return {n: tensors[n] for n, r in manifest.tensors.items() if r.kind == kind}

    program = Program(
        graph=graph,
        parameters=of("parameter"),
        buffers=of("buffer"),
        constants=of("constant"),
        aliases=dict(manifest.ties),
        persistent={
            *(n for n, r in manifest.tensors.items() if r.kind == "buffer" and r.persistent),
            *(a for a, n in manifest.ties.items() if manifest.tensors[n].persistent),
        },
        requires_grad={n: r.requires_grad for n, r in manifest.tensors.items()},
        module_types=dict(manifest.module_types),
        class_name=manifest.class_name,
        training=manifest.training,
        mode_reason=manifest.mode_reason,
        args=args,
        kwargs=kwargs,
        containers=dict(manifest.containers),
        calls=calls,
        signature=list(manifest.signature),
        asks_dtype=manifest.asks_dtype,
        defaults={n: decode_value(v, {}, f"{path / MANIFEST}: {n}") for n, v in manifest.defaults.items()},
    )
    try:
        module = regenerate(program, {n: tensors[n] for n in manifest.tensors})
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, SyntaxError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: the module cannot be made of its graph: {first_problem(error)}"
        ) from error
    own = dict(module.named_parameters(remove_duplicate=False))
    program.parameters = {n: own[n] for n in program.parameters}
    return Loaded(module, plan, receipt, program, args, kwargs, outputs, manifest)


def _read_calls(
    manifest: Manifest, path: Path, device: str | torch.device
) -> tuple[list[Call], list[list[torch.Tensor]] | None]:
    """The calls with their examples, and what the model gave for them."""
    where = path / MANIFEST
    complete = _complete(manifest)
    stored = read_tensors(find(path, EXAMPLES, manifest.saved), device, manifest) if complete else {}
    known = {"tensor": stored}
    calls, outputs = [], []
    for number, record in enumerate(manifest.calls):
        example = f"{where}: the example of call {record.name}"
        args: Any = decode_value(record.args, known, example) if complete else ()
        kwargs: Any = decode_value(record.kwargs, known, example) if complete else {}
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise CheckpointError(f"{example} is damaged")
        constants = {n: decode_value(v, {}, f"{where}: input {n}") for n, v in record.constants.items()}
        for text in (record.structure, *(t for t, _ in record.nested.values())):
            if text is not None:
                check_treespec(text)
        call = Call(record.name, args, kwargs, list(record.inputs), constants)
        call.training, call.treespec, call.nested = record.training, record.structure, dict(record.nested)
        call.sizes, call.guards = dict(record.sizes), [Guard(**guard.model_dump()) for guard in record.guards]
        call.dtypes = {n: getattr(torch, d) for n, d in record.dtypes.items()}
        for guard in call.guards:
            try:
                unknown = set(inputs_of(guard.condition)) - set(call.inputs)
                compile_condition(guard.condition)
            except ValueError as error:
                raise CheckpointError(f"{where}: a guard of call {record.name} cannot be read: {error}") from error
            if unknown:
                raise CheckpointError(
                    f"{where}: a guard of call {record.name} names {unknown.pop()!r}, which is no input of it"
                )
        calls.append(call)
        prefix = f"output.{number}."
        found = sorted((n for n in stored if n.startswith(prefix)), key=lambda n: int(n.rpartition(".")[2]))
        outputs.append([stored[n] for n in found])
    return calls, outputs if complete else None


def read_tensors(
    path: Path, device: str | torch.device = "cpu", manifest: Manifest | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory of their own: what happens to the file later does not reach them.

    Raises:
        CheckpointError: it is missing, damaged, or not of the save that its manifest is of.
    """
    return {name: tensor.clone() for name, tensor in mapped_tensors(path, device, manifest).items()}


def mapped_tensors(
    path: Path, device: str | torch.device = "cpu", manifest: Manifest | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the CPU as they lie in it: what nobody looks at is not read. Not to be written to.

    Raises:
        CheckpointError: as :func:`read_tensors`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            theirs = (file.metadata() or {}).get("saved")
            if manifest is not None and theirs not in (None, manifest.saved):
                raise CheckpointError(
                    f"{path} is of another save than its manifest; to use other weights, give them to the loaded "
                    "module with fxgrow.checkpoint.load_weights"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, AssertionError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_tensors(manifest: Manifest, tensors: dict[str, torch.Tensor], path: Path) -> None:
    mistakes = [f"{n} is missing" for n in manifest.tensors if n not in tensors]
    mistakes += [f"{n} is not in the manifest" for n in tensors if n not in manifest.tensors]
    for name, record in manifest.tensors.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        said = f"{record.dtype} {record.shape}"
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if said != found:
            mistakes.append(f"{name} is {found}, the manifest says {said}")
        elif record.channels_last and tensor.dim() != 4:
            mistakes.append(f"{name} has {tensor.dim()} dims, but channels_last in the manifest, which needs 4")
        elif record.channels_last:
            tensors[name] = tensor.to(memory_format=torch.channels_last)
    if mistakes:
        raise CheckpointError(f"{path} does not fit its manifest: {_some(mistakes)}")


def _check_names(manifest: Manifest, graph: fx.Graph, path: Path) -> None:
    where = str(path)
    for name in [*manifest.tensors, *manifest.ties, *(p for p in manifest.containers if p)]:
        path_name(name, where)
    for alias, name in manifest.ties.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CheckpointError(f"{where}: {alias} is tied to {name}, which is no stored tensor")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target != "training" and str(node.target) not in manifest.tensors:
            raise CheckpointError(f"{where}: graph node {node.name} reads {node.target}, which is no stored tensor")
        sizes = info_of(node).sizes
        record = manifest.tensors.get(str(node.target)) if node.op == "get_attr" else None
        if record is not None and sizes is not None and list(sizes) != record.shape:
            raise CheckpointError(
                f"{where}: the graph expects {node.target} to be {list(sizes)}, it is {record.shape}: "
                "graph and tensors are of different models"
            )


def _some(mistakes: list[str], most: int = 6) -> str:
    more = f"; and {len(mistakes) - most} more" if len(mistakes) > most else ""
    return "; ".join(mistakes[:most]) + more


# plain state dicts ----------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Load a plain safetensors state dict (or the one inside a checkpoint folder) into a module, strictly.

    Names of tied tensors may be there once or more often. Values are converted to the module's dtypes only where that
    loses nothing (bfloat16 to float32).

    Raises:
        CheckpointError: the file cannot be read, or names, shapes or dtypes differ; all mistakes are listed, and the
            module is as it was.
    """
    path = Path(file)
    folder = path if path.is_dir() and (path / MANIFEST).is_file() else None
    if path.is_dir():
        path = path / MODEL
    if not path.is_file() and folder is None:
        raise CheckpointError(f"{path} does not exist")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise CheckpointError(
            f"{path} looks like a pickle, which fxgrow does not read. Convert it once, where you trust it: "
            f"safetensors.torch.save_model(model, {str(path.with_suffix('.safetensors'))!r})"
        )
    if folder is None:
        tensors = read_tensors(path)
    else:
        tensors = _of_one_save(folder, lambda m: read_tensors(find(path.parent, MODEL, m.saved), "cpu", m))
    own = module.state_dict(keep_vars=True)
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    hidden = {n for n, _ in module.named_buffers() if n not in own}  # not persistent; a checkpoint of ours stores them
    mistakes: list[str] = []
    for name, tensor in own.items():
        names = by_tensor[id(tensor)]
        present = [n for n in names if n in tensors]
        if not present:
            if name == names[0]:
                mistakes.append(f"{' = '.join(names)} {list(tensor.shape)} is missing in the file")
            continue
        if name not in tensors:
            continue
        found = tensors[name]
        if found.shape != tensor.shape:
            mistakes.append(f"{name} is {list(found.shape)} in the file, {list(tensor.shape)} in the model")
        elif torch.promote_types(found.dtype, tensor.dtype) != tensor.dtype:
            mistakes.append(
                f"{name} is {str(found.dtype).removeprefix('torch.')} in the file, which "
                f"{str(tensor.dtype).removeprefix('torch.')} cannot hold without loss"
            )
        elif any(not torch.equal(tensors[n], tensors[present[0]]) for n in present[1:]) and name == present[0]:
            mistakes.append(f"{' and '.join(present)} are one tensor in the model and differ in the file")
    constants = _constants_beside(path)
    mistakes += [f"{n} is not in the model" for n in tensors if n not in own and n not in hidden and n not in constants]
    if mistakes:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: {_some(mistakes)}")
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in tensors.items():
            target = own.get(name, buffers.get(name) if name in hidden else None)
            if target is not None:
                target.copy_(value)


def _constants_beside(path: Path) -> set[str]:
    """Names of constants, where the file belongs to a checkpoint of ours."""
    if path.name != MODEL or not (path.parent / MANIFEST).is_file():
        return set()
    manifest = read_manifest(path.parent)
    return {n for n, r in manifest.tensors.items() if r.kind == "constant"}
