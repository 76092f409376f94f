"""The same Transformer in PyTorch, as one writes it there, for `training.py` to compare with.

Fused projections of queries, keys and values, `scaled_dot_product_attention`, a fused AdamW, and
on GPUs autocast to bfloat16. GPT-2's parts, or Llama's: RMS norm, rotary positions, SwiGLU, grouped
queries.
"""

import torch
from torch import nn
from torch.nn import functional

from lm_jax.config import ModelConfig


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = c.heads, c.kv_heads, c.head_width
        wide = (c.heads + 2 * c.kv_heads) * c.head_width
        self.qkv = nn.Linear(c.width, wide, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)

    def forward(self, x, rope):
        B, T, _ = x.shape
        sizes = [n * self.head_width for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            part.view(B, T, -1, self.head_width).transpose(1, 2)
            for part in self.qkv(x).split(sizes, dim=2)
        )
        if rope is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated = c.gated_mlp
        self.up = nn.Linear(c.width, (1 + c.gated_mlp) * c.mlp_width, bias=c.mlp_bias)
        self.down = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x):
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            h = functional.silu(gate) * h
        else:
            h = functional.gelu(h, approximate="tanh")
        return self.down(h)


def norm(c: ModelConfig):
    if c.norm == "rmsnorm":
        return nn.RMSNorm(c.width, eps=c.norm_epsilon)
    return nn.LayerNorm(c.width, eps=c.norm_epsilon, bias=c.norm_bias)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention_norm, self.attention = norm(c), Attention(c)
        self.mlp_norm, self.mlp = norm(c), FeedForward(c)

    def forward(self, x, rope):
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens and targets in, the mean cross-entropy out."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        learned = c.position == "learned"
        self.positions = nn.Embedding(c.max_length, c.width) if learned else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = norm(c)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied_head:
            self.head.weight = self.embedding.weight
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=c.init_std)

    def forward(self, inputs, targets):
        x, rope = self.embedding(inputs), None
        places = torch.arange(inputs.shape[1], device=inputs.device)
        if self.positions is not None:
            x = x + self.positions(places)
        else:
            half = torch.arange(0, self.config.head_width, 2, device=inputs.device)
            angles = places[:, None] * self.config.rope_theta ** (-half / self.config.head_width)
            rope = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rope)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Training:
    """A model and its optimizer, set as the other side has them."""

    def __init__(self, config: ModelConfig, *, compiled: bool, device: str):
        torch.manual_seed(0)
        self.device, self.half = device, config.dtype == "bfloat16"
        self.model = Transformer(config).to(device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=6e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.loss = torch.compile(self.model) if compiled else self.model
        if device == "cuda":
            torch.set_float32_matmul_precision("high")

    def step(self, inputs, targets) -> float:
        """One update on int64 [B, T]; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def batch(self, tokens):
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
