"""The growth spec: what a user asks for, as one pydantic model.

A spec is a list of operations. It reads the same from YAML, JSON or Python::

    version: 1
    operations:
      - {op: widen, axis: "transformer.h.*.mlp/hidden", factor: 2, noise: {kind: antisymmetric, scale: 1.0e-3}}
      - {op: deepen, stack: transformer.h, factor: 2}
      - {op: extend, axis: "*/vocab", by: 64}

Operations are members of a discriminated union on ``op``. Packages extend the union through the entry-point group
``fxgrow.operations`` (a class deriving from :class:`Operation`) or with :func:`register_operation`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.limits import BLOCKS, OPERATIONS
from fxgrow.plugins import load_plugins
from fxgrow.reading import as_mapping, read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


#: sizes, counts and seeds of a file: whole numbers that fit 64 bits; an axis has a tighter bound of its own
Count = Annotated[int, Field(le=2**63 - 1)]
Name = Annotated[str, Field(max_length=1000)]


class Noise(_Strict):
    """Noise that lets copies part.

    ``antisymmetric`` noise sums to zero over the copies of a unit and is added where the copies are *read*, so the
    function stays exactly the same (Net2Net, Chen et al. 2015, section 3.1.3, made exact). ``independent`` noise goes
    on every copy, as in hand-written scripts; it changes the function and needs ``preserve: approximate``.
    """

    kind: Literal["antisymmetric", "independent"] = "antisymmetric"
    scale: float = Field(2.0, ge=0, le=1e6, description="standard deviation of the noise")
    relative: bool = Field(
        True, description="scale is a multiple of each tensor's own standard deviation; false where scale is given"
    )
    distribution: Literal["bytes", "normal", "rademacher"] = Field(
        "bytes", description="`bytes`: sum of four random bytes, equal to the bit on every backend"
    )
    seed: Count = Field(0, ge=0)
    on: Literal["readers", "writers", "both"] = Field(
        "readers", description="weights that read the grown axis (exact), or that write it (changes the function)"
    )

    @model_validator(mode="before")
    @classmethod
    def _scaled(cls, given: Any) -> Any:
        """A scale alone is absolute; independent noise, which changes the function, is small if nothing is said."""
        if not isinstance(given, Mapping):
            return given
        if "scale" in given:
            return {"relative": False, **given}
        small = {"scale": 1e-3, "relative": False} if given.get("kind") == "independent" else {}
        return {**small, **given}

    @model_serializer(mode="wrap")
    def _said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With ``relative`` beside a scale, though it is a default: a scale alone is absolute."""
        said: dict[str, Any] = dump(self)
        return said | {"relative": self.relative} if "scale" in said else said


class Operation(_Strict):
    """Base of every operation of a spec; a plug-in derives from it and sets a literal ``op``."""

    preserve: Literal["exact", "approximate", "lossy"] = Field(
        "exact", description="what may happen to the function; anything but exact has to be asked for"
    )


def _check_size(factor: float | None, to: int | None, by: int | None) -> None:
    """The three ways of giving a new size.

    Raises:
        ValueError: not exactly one is given, or it is no growth.
    """
    if sum(x is not None for x in (factor, to, by)) != 1:
        raise ValueError("give exactly one of factor, to, by")
    if factor is not None and not factor >= 1:
        raise ValueError(f"factor {factor:g} would shrink the axis; growth needs a factor of at least 1")
    if by is not None and by < 0:
        raise ValueError(f"by {by} would shrink the axis")
    if to is not None and to < 1:
        raise ValueError(f"to {to} is not a size")


class Widen(Operation):
    """Grow every axis that matches ``axis`` by ``factor``, to the size ``to``, or ``by`` an amount."""

    op: Literal["widen"] = "widen"
    axis: Name = Field(description="a glob over axis names, or a parameter's dim as in 'mlp.fc.weight:0'")
    factor: float | None = Field(None, description="multiply the size; the result must be a whole number")
    to: Count | None = Field(None, description="the new size")
    by: Count | None = Field(None, description="how many units to add")
    fill: Literal["copy", "add"] = Field(
        "copy", description="new units copy old ones, or are new and do not show in the outputs yet"
    )
    split: Literal["even", "uneven"] = Field("even", description="how the copies of a unit share its outgoing weight")
    noise: Noise | None = Field(None, description="without noise and with an even split, copies stay equal in training")
    fan_in: Literal["auto", "random", "zero"] = Field("auto", description="fill add: incoming weights of new units")
    fan_out: Literal["auto", "paired", "zero", "random"] = Field(
        "auto", description="fill add: outgoing weights of new units; paired is (+z, -z) on two equal new units"
    )
    seed: Count = Field(0, ge=0, description="fill add: seed of the new units' weights")
    groups: Literal["keep", "share"] = Field(
        "keep",
        description="what becomes of groups that share a unit (query heads of a key-value head): there are more of "
        "them, or they are shared out among its copies, and the members stay",
    )
    constants: Literal["fold", "keep"] = Field(
        "fold",
        description="numbers that keep the function (scales, factors): into weights where that is exact, so that the "
        "weights are a larger model's of the same class; or all in the graph",
    )

    @model_validator(mode="after")
    def _check(self) -> Widen:
        _check_size(self.factor, self.to, self.by)
        if self.fill == "add":
            if self.fan_in == "zero" and self.fan_out == "zero":
                raise ValueError(
                    "with fan_in zero and fan_out zero the gradients of the new units would always stay 0. Make one "
                    "of them non-zero (fan_out: paired is exact and trains at once)"
                )
            if self.fan_in == "random" and self.fan_out == "random" and self.preserve == "exact":
                raise ValueError(
                    "fan_in random and fan_out random change the function; use fan_out: paired or zero, or set "
                    "preserve: approximate"
                )
            if self.split == "uneven":
                raise ValueError("split applies to fill: copy only")
        if self.groups == "share" and (self.fill, self.split, self.noise) != ("copy", "even", None):
            raise ValueError("groups: share makes equal copies: leave out fill, split and noise")
        if self.fill == "copy" and (self.fan_in != "auto" or self.fan_out != "auto"):
            raise ValueError("fan_in and fan_out apply to fill: add only")
        if self.noise is not None and self.preserve == "exact":
            if self.noise.kind == "independent":
                raise ValueError(
                    "independent noise changes the function; use kind: antisymmetric (exact), or preserve: approximate"
                )
            if self.noise.on != "readers":
                raise ValueError(
                    f"noise on {self.noise.on} changes the function: it cancels on the weights that multiply the grown "
                    "units only. Use on: readers, or set preserve: approximate"
                )
        return self


class Extend(Operation):
    """Append entries to an axis that is looked up by number or returned: vocabularies, positions, classes.

    Old inputs give the outputs they gave; outputs along the axis get further entries after the old ones. New rows of a
    trained table hold the mean of the old ones by default (Hewitt 2021: new tokens then have a bounded effect on the
    probabilities of the old ones). Buffers are continued by their own pattern (numbers, triangles, cosines).
    """

    op: Literal["extend"] = "extend"
    axis: Name = Field(description="a glob over axis names, or a tensor's dim as in 'transformer.wpe.weight:0'")
    factor: float | None = Field(None, description="multiply the size; the result must be a whole number")
    to: Count | None = Field(None, description="the new size")
    by: Count | None = Field(None, description="how many entries to append")
    init: Literal["mean", "zero", "random"] = Field(
        "mean", description="new rows of trained tables: mean of the old rows, zeros, or random ones of their spread"
    )
    seed: Count = Field(0, ge=0, description="init random: seed of the new rows")

    @model_validator(mode="after")
    def _check(self) -> Extend:
        _check_size(self.factor, self.to, self.by)
        return self


class Deepen(Operation):
    """Insert blocks into a repeated stack (LLaMA Pro 2024; G_stack 2024 for ``init: stack``)."""

    op: Literal["deepen"] = "deepen"
    stack: Name = Field(description="module path of the repeated stack, as in transformer.h; may be a glob")
    factor: float | None = Field(None, description="multiply the number of blocks")
    by: Count | None = Field(None, description="how many blocks to add")
    after: list[Count] | None = Field(
        None, max_length=BLOCKS, description="add one block after each of these (old numbers)"
    )
    order: Literal["interleave", "append"] = "interleave"
    init: Literal["auto", "zero", "gate", "stack"] = Field(
        "auto",
        description="auto: zero the last projections of a pre-norm residual block, otherwise a learned gate at 0; "
        "stack: plain copies, which change the function (preserve: lossy)",
    )

    @model_validator(mode="after")
    def _check(self) -> Deepen:
        if sum(x is not None for x in (self.factor, self.by, self.after)) != 1:
            raise ValueError("give exactly one of factor, by, after")
        if self.factor is not None and not self.factor >= 1:
            raise ValueError(f"factor {self.factor:g} would remove blocks; growth needs a factor of at least 1")
        if self.by is not None and self.by < 0:
            raise ValueError(f"by {self.by} would remove blocks")
        if self.init == "stack" and self.preserve != "lossy":
            raise ValueError("init: stack copies blocks and changes the function: it needs preserve: lossy")
        return self


class Insert(Operation):
    """Insert an identity layer after a named layer of a chain without a residual (Net2DeeperNet, Chen 2015)."""

    op: Literal["insert"] = "insert"
    layer: Literal["linear", "conv", "batch_norm"] = Field(description="what to insert")
    after: Name = Field(description="module path of the layer whose output is passed on; may be a glob")
    kernel_size: int = Field(3, ge=1, le=1023, description="conv: odd kernel size of the Dirac convolution")
    activation: Literal["auto", "none"] = Field(
        "auto", description="auto: repeat the activation when the layer is an idempotent one (ReLU)"
    )
    bias: bool = True

    @model_validator(mode="after")
    def _check(self) -> Insert:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} is even: a Dirac convolution needs an odd one")
        return self


class Lora(Operation):
    """Put low-rank adapters beside layers: y + (alpha / rank) B A x, with B zero at first (LoRA, Hu et al. 2021)."""

    op: Literal["lora"] = "lora"
    modules: Name = Field(description="a glob over module paths of linear layers, embeddings and heads")
    rank: Count = Field(ge=1)
    alpha: float | None = Field(
        None, gt=0, le=1e6, description="the product is multiplied by alpha / rank; by 1 if left out"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input, in train mode")
    seed: Count = Field(0, ge=0, description="of the random half of the adapter")


_OPERATIONS: dict[str, type[Operation]] = {}


def register_operation(cls: type[Operation]) -> type[Operation]:
    """Add an operation class to the union that specs are validated against. Usable as a decorator.

    Raises:
        TypeError: it is no :class:`Operation` with a name of its own.
    """
    if not (isinstance(cls, type) and issubclass(cls, Operation)):
        raise TypeError(f"{cls!r} is not a class that derives from fxgrow.spec.Operation")
    field = cls.model_fields.get("op")
    if field is None or not isinstance(field.default, str):
        raise TypeError(f"{cls.__name__} needs a field `op: Literal['name'] = 'name'`")
    known = _OPERATIONS.get(field.default)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"operation {field.default!r} of {cls.__module__} is taken by {known.__module__}")
    _OPERATIONS[field.default] = cls
    GrowthSpec.forget_operations()
    return cls


def operations() -> dict[str, type[Operation]]:
    """Every known operation by its ``op``, plug-ins included."""
    load_plugins("fxgrow.operations", register_operation)
    return dict(_OPERATIONS)


class GrowthSpec(BaseModel):
    """A list of operations, applied in order. See the module's docstring for the file form."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    operations: list[Any] = Field(max_length=OPERATIONS)
    _adapter: ClassVar[TypeAdapter[Any] | None] = None

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError(_explain(error, "")) from None
        if not self.operations:
            raise SpecError("spec: (top): a spec needs at least one operation")
        parsed, mistakes = [], []
        for number, op in enumerate(self.operations):
            try:
                parsed.append(op if isinstance(op, Operation) else self.operation_adapter().validate_python(op))
            except ValidationError as error:
                mistakes.append(_explain(error, f"operations.{number}"))
        if mistakes:
            raise SpecError("\n".join(mistakes))
        self.operations = parsed

    @classmethod
    def forget_operations(cls) -> None:
        """Another operation is known: the next spec is read with it."""
        cls._adapter = None

    @classmethod
    def operation_adapter(cls) -> TypeAdapter[Any]:
        """The discriminated union over every registered operation."""
        if cls._adapter is None:
            members = [Annotated[kind, Tag(name)] for name, kind in operations().items()]
            union: Any = functools.reduce(operator.or_, members)
            cls._adapter = TypeAdapter(Annotated[union, Discriminator(_op_of)])
        return cls._adapter

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = {"operations": list(value)}
        if isinstance(value, Mapping) and "op" in value:
            value = {"operations": [dict(value)]}
        return value

    @classmethod
    def parse(cls, spec: GrowthSpec | Operation | Mapping[str, Any] | list[Any] | str | Path) -> GrowthSpec:
        """Make a spec of a dict, a list of operations, an operation, YAML or JSON text, or the path of a file.

        Raises:
            SpecError: with one line per mistake, each naming the field.
        """
        if isinstance(spec, GrowthSpec):
            return spec
        where = "spec"
        if isinstance(spec, Operation):
            spec = [spec]
        if isinstance(spec, str | Path):
            spec, where = read_yaml(spec, "spec")
        if isinstance(spec, Mapping) and "op" in spec:
            spec = [spec]
        given = as_mapping(spec, where, "operations")
        try:
            return cls(**given)
        except SpecError as error:
            lines = str(error).splitlines()
            raise SpecError("\n".join(where + line.removeprefix("spec") for line in lines)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the fields left at their defaults; ``parse`` reads it back."""
        return {
            "version": self.version,
            "operations": [{"op": op.op, **op.model_dump(exclude_defaults=True)} for op in self.operations],
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _op_of(value: Any) -> str | None:
    return value.get("op") if isinstance(value, Mapping) else getattr(value, "op", None)


def _explain(error: ValidationError, prefix: str) -> str:
    """One line per mistake: the field, what is wrong, and the nearest valid name."""
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        if prefix and location and location[0] in _OPERATIONS:
            kind, location = location[0], location[1:]
        else:
            kind = None
        path = ".".join(p for p in [prefix, *location] if p) or "(top)"
        message = item["msg"].removeprefix("Value error, ")
        known: list[str] = []
        if item["type"] == "extra_forbidden":
            model = _OPERATIONS.get(kind or "")
            known = list(model.model_fields) if model is not None else list(GrowthSpec.model_fields)
            if kind and len(location) > 1 and location[0] == "noise":
                known = list(Noise.model_fields)
            message = "no such field"
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            known = sorted(_OPERATIONS)
            message = "no such operation" if item["type"] == "union_tag_invalid" else "an operation needs `op`"
            value = item["input"].get("op") if isinstance(item["input"], Mapping) else None
            location = [str(value)]
            if value is not None:
                message += f" {value!r}"
        if known:
            message += f"; {did_you_mean(location[-1] if location else '', known)}"
        lines.append(f"spec: {path}: {' '.join(message.split())}")
    return "\n".join(lines)


for _cls in (Widen, Extend, Deepen, Insert, Lora):
    register_operation(_cls)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file, plug-ins included (draft 2020-12)."""
    schema = GrowthSpec.model_json_schema()
    operation = GrowthSpec.operation_adapter().json_schema(ref_template="#/$defs/{model}")
    defs = operation.pop("$defs", {})
    schema["properties"]["operations"] = {"type": "array", "minItems": 1, "items": operation}
    schema["$defs"] = {**schema.get("$defs", {}), **defs}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
