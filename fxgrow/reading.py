"""Text that somebody gives us, as data: one reader for YAML and JSON, which knows what a bad file looks like.

Whatever is wrong with a file (missing, a folder, not UTF-8, not YAML, too large, too deep, keys twice, aliases that
multiply) becomes one error that says what, where and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fxgrow.errors import CheckpointError, FxgrowError, SpecError
from fxgrow.limits import JSON_BYTES, NESTING, TEXT_BYTES, VALUES, bytes_in_words


def read_text(path: Path, limit: int, error: type[FxgrowError]) -> str:
    """The text of a file.

    Raises:
        FxgrowError: of the kind ``error``: there is no such file, or it is no text of a permitted size.
    """
    try:
        if path.is_dir():
            raise error(f"{path} is a folder, not a file")
        if not path.exists():
            raise error(f"{path} does not exist")
        if not path.is_file():
            raise error(f"{path} is not an ordinary file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FxgrowError:  # a SpecError is a ValueError as well
        raise
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"{str(path)[:200]!r} cannot be read: {problem}") from problem
    if len(data) > limit:
        raise error(f"{path} is larger than {bytes_in_words(limit)}, the limit for such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from problem


def read_yaml(source: str | Path, what: str) -> tuple[Any, str]:
    """Data of YAML or JSON text, or of the file that a path names, and what to call it in an error.

    Args:
        source: a path, or text: a single line that ends in .yaml, .yml or .json is a path too.
        what: "spec" or "schedule".

    Raises:
        SpecError: it cannot be read.
    """
    text, where = str(source), what
    if isinstance(source, Path) or ("\n" not in text and text.endswith((".yaml", ".yml", ".json"))):
        try:
            text, where = read_text(Path(source), TEXT_BYTES, SpecError), str(source)
        except SpecError as error:
            raise SpecError(f"{what} file {error}") from error.__cause__
    return parse_yaml(text, where), where


def parse_yaml(text: str, where: str) -> Any:
    """The data of YAML or JSON text.

    Raises:
        SpecError: it cannot be read; ``where`` says what it is.
    """
    if len(text) > TEXT_BYTES:
        raise SpecError(f"{where}: longer than {bytes_in_words(TEXT_BYTES)}, the limit for such a text")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise SpecError(f"{where}: not YAML or JSON: {reason}") from None


def as_mapping(given: Any, where: str, key: str) -> dict[str, Any]:
    """What a spec or a schedule was given as, with names for keys; a bare list is its ``key``.

    Raises:
        SpecError: it is neither a mapping nor a list, or has the key is not a string.
    """
    if isinstance(given, list | tuple):
        given = {key: list(given)}
    if not isinstance(given, Mapping):
        raise SpecError(f"{where}: expected a mapping with `{key}`, got {type(given).__name__}")
    if odd := [k for k in given if not isinstance(k, str)]:
        raise SpecError(f"{where}: {str(odd[0])[:80]!r}: the key is not a string")
    return dict(given)


def _check_node(root: yaml.Node, where: str) -> None:
    """Depth, keys, and how many values there are once aliases are written out, before any is.

    Raises:
        SpecError: too deep, too many, a key twice, or an alias inside what it stands for.
    """
    known: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node, depth: int, inside: frozenset[int]) -> tuple[int, int]:
        """Values and levels of a node."""
        line = node.start_mark.line + 1
        if id(node) in inside:
            raise SpecError(f"{where}: line {line}: an alias refers to what it is part of")
        count, height = known.get(id(node), (0, 0))
        if depth + height > NESTING:
            raise SpecError(f"{where}: line {line}: nested more than {NESTING} levels deep")
        if count:
            return count, height
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise SpecError(f"{where}: line {key.start_mark.line + 1}: the key {key.value!r} appears twice")
                    seen.add(key.value)
                children += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        count = 1
        for child in children:
            more, levels = measure(child, depth + 1, inside | {id(node)})
            count, height = count + more, max(height, levels + 1)
            if count > VALUES:
                raise SpecError(f"{where}: line {line}: more than {VALUES:,} values, aliases written out")
        known[id(node)] = count, height
        return count, height

    measure(root, 1, frozenset())


def read_json(path: Path, error: type[FxgrowError] = CheckpointError, *, finite: bool = True) -> Any:
    """The data of a JSON file.

    Args:
        finite: refuse NaN and infinities, which JSON has not but Python writes.

    Raises:
        FxgrowError: of the kind ``error``: it cannot be read.
    """
    return parse_json(read_text(path, JSON_BYTES, error), str(path), error, finite=finite)


def parse_json(text: str, where: str, error: type[FxgrowError] = CheckpointError, *, finite: bool = True) -> Any:
    """The data of JSON text, see :func:`read_json`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            keys = [k for k, _ in items]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
        return made

    def number(name: str) -> float:
        value = float(name)
        if finite and not math.isfinite(value):
            raise ValueError(f"{name[:40]} is not a finite number")
        return value

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except RecursionError:
        raise error(f"{where} is nested too deeply") from None
    except (ValueError, TypeError) as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > NESTING:
            raise error(f"{where} is nested more than {NESTING} levels deep")
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if "\\u" in text:  # an escape can name half of a character, which no file can be written with
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            raise error(f"{where} is not JSON: {problem.reason} ({problem.object[problem.start]!a})") from None
    return data


def first_problem(error: Exception) -> str:
    """What is wrong first, in a line; where data do not fit a model, with the place."""
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc'])) or '(top)'}: {' '.join(item['msg'].split())}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
