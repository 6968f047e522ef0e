"""Text as bytes: English that every CPython ships, or a file of yours. A token is a byte, so there is no tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
VALIDATION = 0.1


def python_help() -> str:
    """The texts behind Python's ``help()``: some 450,000 characters of English about the language.

    Raises:
        ValueError: this Python was packaged without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python ships without pydoc_data; give a text file instead (--text FILE)") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of ``text``, int64."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()


def decode(tokens: Tensor) -> str:
    """Text of a vector of tokens; bytes that are no UTF-8 show as �."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


class Text:
    """A text split into a first part for training and a last part for validation.

    Args:
        path: a text file; None takes Python's own help texts.
        block_size: tokens in one sample.
        batch_size: samples in one micro-batch.

    Raises:
        ValueError: the text is too short for one block in each part.
    """

    def __init__(self, path: str | Path | None = None, block_size: int = 128, batch_size: int = 16) -> None:
        text = python_help() if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
        self.name = "Python's help texts (pydoc_data.topics)" if path is None else str(path)
        self.block_size, self.batch_size = block_size, batch_size
        tokens = encode(text)
        cut = int(len(tokens) * (1 - VALIDATION))
        self.splits = {"train": tokens[:cut], "val": tokens[cut:]}
        for split, part in self.splits.items():
            if len(part) <= block_size + 1:
                raise ValueError(
                    f"{self.name}: {len(part)} bytes are too few for the {split} split; blocks of {block_size} need "
                    f"about {int((block_size + 2) / VALIDATION)} bytes of text in all"
                )

    def batch(self, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random blocks and the tokens that follow each of their tokens, int64 (batch_size, block_size) both."""
        tokens = self.splits[split]
        starts = torch.randint(len(tokens) - self.block_size, (self.batch_size, 1), generator=generator)
        places = starts + torch.arange(self.block_size)
        return tokens[places], tokens[places + 1]
