"""The decoder.

Legend: B batch, L sequence, M model dimension, D head dimension, V vocabulary, N chosen positions.

A plain PyTorch module: it knows of no cache, no process group and no sharding. A cache comes in as `attend`
(llama/attention.py), parallelism is applied from outside (llama/training/parallel.py).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llama.attention import Attend, Attention, CausalAttend
from llama.config import ModelConfig
from llama.feed_forward import FeedForward
from llama.moe import MoE, RoutingRecord
from llama.norm import RMSNorm
from llama.rope import rotary_cos_sin, rotary_frequencies


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm residual block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward: FeedForward | MoE = (
            MoE(config, layer) if config.is_moe_layer(layer) else FeedForward(config.dim, config.ffn_hidden_dim)
        )

    def forward(
        self, x_BLM: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, attend: Attend, routing: RoutingRecord | None
    ) -> Tensor:
        x_BLM = x_BLM + self.attention(self.attention_norm(x_BLM), cos_BLD, sin_BLD, attend)
        normed_BLM = self.ffn_norm(x_BLM)
        if isinstance(self.feed_forward, MoE):
            return x_BLM + self.feed_forward(normed_BLM, routing)
        return x_BLM + self.feed_forward(normed_BLM)


class Transformer(nn.Module):
    """LLaMA decoder (arXiv:2302.13971), dense or mixture of experts, by its `ModelConfig`.

    The weights are uninitialised until `init_weights` or a load.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._attend = CausalAttend()

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        routing: RoutingRecord | None = None,
        output_index: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens_BL: `[batch, seq]` int64.
            positions: `[batch, seq]` int64; None counts from 0 in every row.
            attend: the attention to use; None is causal attention within each row, without a cache.
            routing: collects the routers' statistics when given.
            output_index: `[N]` int64 indices into the flattened `batch·seq`; only these positions' logits are computed.

        Returns:
            `[batch, seq, vocab]`, or `[N, vocab]` with `output_index`.
        """
        if positions is None:
            positions = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        frequencies = rotary_frequencies(self.config.resolved_head_dim, self.config.rope_theta).to(tokens_BL.device)
        cos_BLD, sin_BLD = rotary_cos_sin(positions, frequencies)
        x_BLM = self.tok_embeddings(tokens_BL)
        for block in self.layers:
            x_BLM = block(x_BLM, cos_BLD, sin_BLD, attend or self._attend, routing)
        if output_index is not None:
            x_BLM = x_BLM.flatten(0, 1)[output_index]
        x_BLM = self.norm(x_BLM)
        if self.output is None:
            return linear(x_BLM, self.tok_embeddings.weight)
        return self.output(x_BLM)

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The fp32 start value of the parameter called `name`.

        It depends on nothing but the name, the full shape, the depth and the seed: any layout of ranks starts from
        the same model. Norms are 1; matrices are N(0, 0.02²), those that write into the residual stream (`wo`, `w2`)
        N(0, 0.02² / (2·layers)) (GPT-2, Radford et al. 2019, §2.3).
        """
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        residual = name.removesuffix(".weight").endswith((".wo", ".w2"))
        std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its start value and every routing bias to zero; plain (unsharded) models only."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_weight(name, parameter.shape, seed))
        for buffer in self.buffers():
            buffer.zero_()
