"""A small GPT with nanoGPT's parameter names.

It is an ordinary PyTorch model and knows nothing of growth. Every size that a growth can change is a field of
:class:`GPTConfig`, so that a grown state dict loads into ``GPT(larger config)`` with ``strict=True``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """Sizes of a GPT; those left None follow from the others as in GPT-2."""

    block_size: int = 128
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    dropout: float = 0.0
    bias: bool = True
    flash: bool = True
    """Attention by PyTorch's fused operator; False writes it out."""
    n_hidden: int | None = None
    """Width of the MLP; 4 × n_embd."""
    head_dim: int | None = None
    """Width of a head's queries and keys; n_embd / n_head."""
    value_dim: int | None = None
    """Width of a head's values; head_dim."""
    attention_scale: float | None = None
    """Factor on the attention scores; 1/√head_dim. A growth of head_dim keeps the old factor."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_hidden is None:
            self.n_hidden = 4 * self.n_embd
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}; set head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.value_dim is None:
            self.value_dim = self.head_dim


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, over the last dim."""

    def __init__(self, width: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, queries, keys and values from one projection."""

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.value_dim is not None
        self.n_head, self.head_dim, self.value_dim = config.n_head, config.head_dim, config.value_dim
        self.query_width, self.value_width = self.n_head * self.head_dim, self.n_head * self.value_dim
        self.c_attn = nn.Linear(config.n_embd, 2 * self.query_width + self.value_width, bias=config.bias)
        self.c_proj = nn.Linear(self.value_width, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.flash = config.flash
        self.scale = config.attention_scale
        if not self.flash:
            mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
            self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, n_embd) → the same shape."""
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).split([self.query_width, self.query_width, self.value_width], dim=2)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = k.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.n_head, self.value_dim).transpose(1, 2)
        if self.flash:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)
        else:
            scale = 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale
            att = (q @ k.transpose(-2, -1)) * scale
            att = att.masked_fill(~self.mask[:, :, :T, :T], float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, self.value_width)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.n_hidden is not None
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only transformer; the token embedding and the head are one tensor."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, config.bias, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # projections into the stream start smaller, so that the stream's variance does not grow with depth
                depth = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the mean cross-entropy where targets are given.

        Args:
            idx: tokens, int64 (batch, time ≤ block_size).
            targets: the tokens that follow, same shape; -1 is not scored.

        Returns:
            Logits (batch, time, vocab_size), or of the last position only without targets; and the loss or None.
        """
        _, T = idx.size()
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than the block size {self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](positions))
        for block in self.transformer["h"].children():
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``idx`` (batch, time) by ``max_new_tokens`` sampled tokens; call ``eval()`` first."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1] / temperature
            if top_k is not None:
                smallest = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, float("-inf"))
            following = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)
            idx = torch.cat((idx, following), dim=1)
        return idx
