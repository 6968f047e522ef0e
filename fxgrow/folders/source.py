"""What a folder holds: a config, weights in one file or in shards with an index, and everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxgrow.errors import CheckpointError
from fxgrow.folders.tensorfile import Entry, entries
from fxgrow.reading import read_json

#: names of files that hold a model's weights: those that are not read are of the small model, whose folder this is
_WEIGHTS = (
    *("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("tf_model*.h5", "flax_model*.msgpack", "consolidated*.safetensors", "consolidated*.pth", "*.gguf"),
)
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass
class Source:
    """A checkpoint's folder.

    Attributes:
        config: of ``config.json``.
        tensors: where each is, by its name in the files.
        metadata: of the weights' files.
        sharded: whether there is an index.
        weights: the names of the files that hold weights, index included.
        called: where the config stands, for errors.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    sharded: bool = False
    weights: set[str] = field(default_factory=set)
    called: str = ""

    def __post_init__(self) -> None:
        """A folder's config is a file."""
        self.called = self.called or str(self.folder / CONFIG)

    @property
    def stale(self) -> list[Path]:
        """Files that hold weights by their names, and are not read: of other formats, or left over."""
        found = {f for pattern in _WEIGHTS for f in self.folder.glob(pattern) if f.is_file()}
        return sorted(f for f in found if f.name not in self.weights)

    @property
    def others(self) -> list[Path]:
        """Files that are neither config nor weights: tokenizer, generation config, licence."""
        own = {self.folder / name for name in (*self.weights, CONFIG)} | set(self.stale)
        return sorted(f for f in self.folder.rglob("*") if f.is_file() and f not in own)


def open_folder(folder: Path) -> Source:
    """Read a folder's config and the headers of its weights.

    Raises:
        CheckpointError: it lacks one of them, or one is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so that its class is not known")
    config = read_json(folder / CONFIG, finite=False)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is no table of settings")
    if (folder / INDEX).is_file() and (folder / SINGLE).is_file():
        raise CheckpointError(f"{folder} has {INDEX} and {SINGLE}: which one holds the weights? Remove the other")
    if (folder / INDEX).is_file():
        return _sharded(folder, config)
    if (folder / SINGLE).is_file():
        tensors, metadata = entries(folder / SINGLE)
        return Source(folder, config, tensors, metadata, weights={SINGLE})
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    there = f"; {pickled[0]} is pickled: save the model with safetensors (save_pretrained does)" if pickled else ""
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{there}")


def _sharded(folder: Path, config: dict[str, Any]) -> Source:
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, Mapping) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from names to files")
    out = Source(folder, config, {}, sharded=True, weights={INDEX})
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names {name[:80]!r}, which is not a file of the folder")
        try:
            there = (folder / name).is_file()
        except OSError:  # no name of a file
            there = False
        if not name or not there:
            raise CheckpointError(f"{folder / INDEX} names {name[:80]!r}, which is not there")
        found, metadata = entries(folder / name)
        out.metadata |= metadata
        out.weights.add(name)
        for tensor, entry in found.items():
            if places.get(tensor) != name:
                raise CheckpointError(f"{folder / name} holds {tensor}, which {INDEX} has elsewhere, or not at all")
            out.tensors[tensor] = entry
    missing = sorted(set(places) - set(out.tensors))
    if missing:
        raise CheckpointError(f"{folder / INDEX} names {missing[0]}, which {places[missing[0]]} does not hold")
    return out
