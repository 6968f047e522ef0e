"""The manifest of a checkpoint: what ``manifest.json`` holds, and reading it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxgrow.errors import CheckpointError
from fxgrow.reading import first_problem, read_json
from fxgrow.version import __version__

FORMAT: Final = "fxgrow-checkpoint"
VERSION = 2  # 1: saves had no id
MANIFEST, MODEL, EXAMPLES = "manifest.json", "model.safetensors", "examples.safetensors"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


Floats = Literal["bfloat16", "float16", "float32", "float64"]


class TensorRecord(_Model):
    """One stored tensor."""

    kind: Literal["parameter", "buffer", "constant"]
    shape: list[int]
    dtype: str
    requires_grad: bool = False
    persistent: bool = True
    channels_last: bool = False


class GuardRecord(_Model):
    """A condition on the shapes of a call's inputs, see :class:`fxgrow.guards.Guard`."""

    condition: str
    source: str = ""
    edge: bool = False


class CallRecord(_Model):
    """One way of calling the model; ``args`` and ``kwargs`` are its example, None where it was not stored.

    ``dtypes`` are those that inputs must have, of a module that was cast.
    """

    name: str
    inputs: list[str] = Field(default_factory=list)
    constants: dict[str, Any] = Field(default_factory=dict)
    training: bool | None = None
    structure: str | None = None
    nested: dict[str, tuple[str, list[str]]] = Field(default_factory=dict)
    sizes: dict[str, list[int | None]] = Field(default_factory=dict)
    guards: list[GuardRecord] = Field(default_factory=list)
    dtypes: dict[str, Floats] = Field(default_factory=dict)
    args: Any = None
    kwargs: Any = None


class Manifest(_Model):
    """What ``manifest.json`` holds.

    Attributes:
        format, version: of the checkpoint; a newer version than :data:`VERSION` is refused.
        saved: id of the save, which its tensor files carry too (see :mod:`fxgrow.publish`); None in version 1.
        fxgrow, torch: versions that wrote it, for people.
        plan, receipt: of the growth that made the model, where there was one.
        training: the module's mode; ``mode_reason`` says why train and eval have graphs of their own, if they have.
        containers: module path to class name, the whole tree.
        ties: further names of a tied tensor to the name it is stored under.
        tensors: what ``model.safetensors`` holds.
        graph: see :func:`fxgrow.serialize.graph_to_json`.
        calls: the ways of calling the model, with example arguments, tensors by their names in
            ``examples.safetensors``.
        signature: the forward method's parameters in order.
        asks_dtype: the forward asks for dtypes of tensors, as far as is known.
    """

    format: Literal["fxgrow-checkpoint"] = FORMAT
    version: int = VERSION
    saved: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")
    fxgrow: str
    torch: str
    class_name: str
    parameters: int = Field(description="elements of all parameters, tied ones once")
    training: bool
    mode_reason: str = ""
    containers: dict[str, str]
    module_types: dict[str, str] = Field(default_factory=dict)
    ties: dict[str, str] = Field(default_factory=dict)
    tensors: dict[str, TensorRecord]
    plan: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    calls: list[CallRecord] = Field(default_factory=list)
    signature: list[str] = Field(default_factory=list)
    asks_dtype: bool = True
    defaults: dict[str, Any] = Field(default_factory=dict)
    graph: list[dict[str, Any]]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: there is none, it is not one, or it was written by a newer version.
    """
    file = Path(path) / MANIFEST
    try:
        found = file.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise CheckpointError(f"{str(path)[:200]!r} cannot be read: {error}") from error
    if not found:
        raise CheckpointError(
            f"{path} is not a checkpoint folder (of fxgrow.save or fxgrow grow): it has no {MANIFEST}"
        )
    try:
        data = read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error.__cause__
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the manifest of a checkpoint: it does not say format {FORMAT!r}")
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{file} has version {version!r}, written by fxgrow {data.get('fxgrow', '?')}; this is fxgrow "
            f"{__version__}, which reads up to {VERSION}. Update fxgrow"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_problem(error)}") from error
