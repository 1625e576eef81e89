"""The decoder, and what it shares with the encoder–decoder.

Legend: B batch, L sequence, M model dimension, D head dimension, V vocabulary, N chosen positions.

A plain PyTorch module: it knows of no cache, no process group and no sharding. A cache comes in as `attend`
(llama/attention.py), parallelism is applied from outside (llama/training/parallel.py).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from llama.attention import Attend, Attention, CausalAttend, LayerContext, ScoreBias
from llama.config import ModelConfig
from llama.feed_forward import FeedForward
from llama.generate import generate, stream
from llama.linear import Linear, linear
from llama.losses import linear_cross_entropies, linear_cross_entropy_sum
from llama.moe import MoE, RoutingRecord
from llama.norm import build_norm, deepnorm
from llama.position import ALiBi, RelativeBias, sinusoidal
from llama.rope import rotary_cos_sin, rotary_frequencies


def initial_buffer(name: str) -> float:
    """The start value of the buffer called `name`: a running variance is 1, a running mean and a routing bias 0."""
    return 1.0 if name.endswith("running_var") else 0.0


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward, each on a residual stream with norms placed as `config.norm_placement` says.

    pre: x + f(norm(x)) (LLaMA). post: norm(x + f(x)) (arXiv:1706.03762, §3.1). sandwich: x + norm(f(norm(x)))
    (CogView, arXiv:2105.13290, §2.4). deepnorm: norm(α·x + f(x)) (arXiv:2203.00555, figure 2).
    """

    def __init__(self, config: ModelConfig, layer: int, encoder: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.norm_first = config.norm_placement in ("pre", "sandwich")
        deep = config.norm_placement == "deepnorm"
        self.alpha = deepnorm(*config.stacks).of(encoder).alpha if deep else 1.0
        self.dropout = config.residual_dropout
        self.attention_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.feed_forward: FeedForward | MoE = (
            MoE(config, layer) if config.is_moe_layer(layer) else FeedForward(config, config.ffn_hidden_dim)
        )
        self.attention_post_norm = self.ffn_post_norm = None
        if config.norm_placement == "sandwich":
            self.attention_post_norm = build_norm(config.norm, config.dim, config.norm_eps)
            self.ffn_post_norm = build_norm(config.norm, config.dim, config.norm_eps)

    def forward(self, x_BLM: Tensor, context: LayerContext, routing: RoutingRecord | None) -> Tensor:
        return self._feed_forward(self._attend(x_BLM, context), routing)

    def _attend(self, x_BLM: Tensor, context: LayerContext) -> Tensor:
        return self._residual(
            x_BLM, lambda x: self.attention(x, context), self.attention_norm, self.attention_post_norm
        )

    def _feed_forward(self, x_BLM: Tensor, routing: RoutingRecord | None) -> Tensor:
        return self._residual(x_BLM, lambda x: self._feed(x, routing), self.ffn_norm, self.ffn_post_norm)

    def _feed(self, x_BLM: Tensor, routing: RoutingRecord | None) -> Tensor:
        if isinstance(self.feed_forward, MoE):
            return self.feed_forward(x_BLM, routing)
        return self.feed_forward(x_BLM)

    def _residual(
        self, x_BLM: Tensor, sublayer: Callable[[Tensor], Tensor], norm: nn.Module, post_norm: nn.Module | None
    ) -> Tensor:
        out_BLM = sublayer(norm(x_BLM) if self.norm_first else x_BLM)
        if self.dropout:
            out_BLM = dropout(out_BLM, self.dropout, self.training)
        if post_norm is not None:
            out_BLM = post_norm(out_BLM)
        if self.norm_first:
            return x_BLM + out_BLM
        return norm(out_BLM + (x_BLM if self.alpha == 1 else self.alpha * x_BLM))


class LanguageModel(nn.Module):
    """What predicts tokens: embeddings, positions, a stack of layers and the head, with their start values.

    `Transformer` is a decoder alone, `Seq2Seq` (llama/seq2seq.py) has an encoder beside it. The weights are
    uninitialised until `init_weights` or a load.
    """

    def __init__(self, config: ModelConfig, layers: Iterable[TransformerBlock]) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.position_embeddings = None
        if config.position == "learned":
            self.position_embeddings = nn.Embedding(config.max_seq_len, config.dim)
        self.relative_bias = None
        if config.position == "t5":
            # One for all layers (T5, arXiv:1910.10683, §2.1).
            self.relative_bias = nn.Parameter(torch.empty(config.t5_buckets, config.num_heads))
        self.layers = nn.ModuleList(layers)
        self.norm = build_norm(config.norm, config.dim, config.norm_eps) if config.has_final_norm else None
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        self._attend = CausalAttend()

    def blocks(self) -> list[TransformerBlock]:
        """All of them, in the order in which a forward pass meets them."""
        return list(self.layers)  # type: ignore[arg-type]  # what a ModuleList holds is typed as any module

    def _count_positions(self, tokens_BL: Tensor, limit: str = "max_seq_len") -> Tensor:
        length, table = tokens_BL.shape[1], getattr(self.config, limit)
        if self.config.position == "learned" and length > table:
            raise ValueError(
                f"the sequence has {length} tokens, and model.{limit}={table} positions are learned; "
                "shorten it, or train with another model.position"
            )
        return torch.arange(length, device=tokens_BL.device)[None]

    def _embed(self, tokens_BL: Tensor, positions: Tensor, table: nn.Embedding | None) -> Tensor:
        x_BLM = self.tok_embeddings(tokens_BL)
        if table is not None:
            x_BLM = x_BLM + table(positions)
        if self.config.position == "sinusoidal":
            # Scaled up, so that the table does not drown the tokens (arXiv:1706.03762, §3.4).
            x_BLM = x_BLM * math.sqrt(self.config.dim) + sinusoidal(positions, self.config.dim).type_as(x_BLM)
        if self.config.residual_dropout:
            x_BLM = dropout(x_BLM, self.config.residual_dropout, self.training)
        return x_BLM

    def _rotary(self, positions: Tensor, length: int | None) -> tuple[Tensor, Tensor] | None:
        config, scaling = self.config, self.config.rope_scaling
        if config.position != "rope":
            return None
        if length is None and scaling is not None and scaling.kind == "dynamic_ntk":
            length = int(positions.max()) + 1
        frequencies, factor = rotary_frequencies(
            config.resolved_head_dim, config.rope_theta, scaling, length, positions.device
        )
        return rotary_cos_sin(positions, frequencies, factor)

    def _score_bias(self, relative: Tensor | None, bidirectional: bool = False) -> ScoreBias | None:
        if relative is not None:
            return RelativeBias(relative, self.config.t5_max_distance, bidirectional)
        return ALiBi(self.config.num_heads, bidirectional) if self.config.position == "alibi" else None

    def _predict(self, x_BLM: Tensor, output_index: Tensor | None, labels: Tensor | None) -> Tensor:
        """What `forward` returns, from the last layer's output."""
        if labels is not None and output_index is not None:
            raise ValueError("labels and output_index exclude each other; label the chosen positions only")
        if output_index is not None:
            x_BLM = x_BLM.flatten(0, 1)[output_index]
        if self.norm is not None:
            x_BLM = self.norm(x_BLM)
        if labels is not None:
            return linear_cross_entropy_sum(x_BLM, self._output_weight(), labels)
        return linear(x_BLM, self._output_weight())

    def _output_weight(self) -> Tensor:
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The fp32 start value of the parameter called `name`.

        It depends on nothing but the name, the full shape, the config and the seed: any layout of ranks starts from
        the same model. Norms are 1, biases 0, matrices N(0, std²) with `_initial_std`; a router with
        `gate_init: kaiming_uniform` is U(−1/√dim, 1/√dim) (He et al., arXiv:1502.01852, §2.2, with a = √5, as
        `nn.Linear` and DeepSeek's gate do), and so is an adapter's A, while its B is 0 (llama/lora.py).
        """
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith((".bias", ".lora_b")):
            return torch.zeros(shape)
        if name.endswith("activation.beta"):
            return torch.full(shape, self.config.swish_beta)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        moe = self.config.moe
        kaiming_gate = moe is not None and moe.gate_init == "kaiming_uniform"
        if name.endswith(".lora_a") or (kaiming_gate and name.endswith("router.weight")):
            bound = 1 / math.sqrt(shape[-1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return torch.empty(shape).normal_(0.0, self._initial_std(name, shape), generator=generator)

    def _initial_std(self, name: str, shape: torch.Size) -> float:
        """0.02, smaller by √(sub-layers) for the matrices that `config.init` names: one of each sub-layer that writes
        into the stack's residual stream, 2·layers of a decoder alone.

        residual: those that write into the residual stream, wo and w2 (GPT-2, Radford et al. 2019, §2.3). article: wo
        and w3. DeepNorm has its own: Xavier, times β but for queries and keys (arXiv:2203.00555, figure 2).
        """
        matrix, encoder = name.removesuffix(".weight").rsplit(".", 1)[-1], name.startswith("encoder_")
        if self.config.norm_placement == "deepnorm" and matrix in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
            beta = deepnorm(*self.config.stacks).of(encoder).beta
            gain = 1.0 if matrix in ("wq", "wk") else beta
            return gain * math.sqrt(2 / (shape[-1] + shape[-2]))
        scaled = ("wo", "w2") if self.config.init == "residual" else ("wo", "w3")
        return 0.02 / math.sqrt(self.config.residual_writes(encoder)) if matrix in scaled else 0.02

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets every parameter and every buffer to its start value; plain (unsharded) models only."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_weight(name, parameter.shape, seed))
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Sets the buffers alone to their start values, `initial_buffer`; sharded models, too."""
        for name, buffer in self.named_buffers():
            buffer.fill_(initial_buffer(name))


class Transformer(LanguageModel):
    """A decoder of the LLaMA family (arXiv:2302.13971), dense or mixture of experts, by its `ModelConfig`.

    docs/model.md is a guide.
    """

    generate = generate
    stream = stream

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (TransformerBlock(config, layer) for layer in range(config.num_layers)))

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        routing: RoutingRecord | None = None,
        output_index: Tensor | None = None,
        labels: Tensor | None = None,
        rope_length: int | None = None,
    ) -> Tensor:
        """Logits of the next token, or the loss of predicting it.

        Args:
            tokens_BL: `[batch, seq]` int64.
            positions: `[batch, seq]` int64; None counts from 0 in every row. Learned ones must lie below
                `max_seq_len`. Windows, ALiBi and T5's bias go by distances, which the attention itself counts.
            attend: the attention to use; None is causal attention within each row, without a cache.
            routing: collects the routers' statistics when given.
            output_index: `[N]` int64 indices into the flattened `batch·seq`; only these positions' logits are computed.
            labels: `[batch, seq]` int64, the token to predict at each position, `IGNORE_INDEX` where none is.
            rope_length: the sequence length that dynamic NTK scaling stretches to; None is the largest position + 1.

        Returns:
            `[batch, seq, vocab]`; or `[N, vocab]` with `output_index`; or with `labels` the fp32 sum of −log p(label)
            in nats over the labelled positions, which never holds all the logits at once. The losses that balance
            experts are not in it: they are functions of `routing` (llama/balance.py), which the trainer adds.

        Raises:
            ValueError: `labels` together with `output_index`, or of another shape than the tokens; or, without
                `positions`, the sequence is longer than the table of learned positions.
        """
        x_BLM = self._hidden(tokens_BL, positions, attend, routing, rope_length)
        return self._predict(x_BLM, output_index, labels)

    @torch.no_grad()
    def label_losses(
        self,
        tokens_BL: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        rope_length: int | None = None,
    ) -> Tensor:
        """−log p of each label by itself, in nats: `[batch, seq]`, at least fp32, 0 where none is predicted.

        Arguments and errors are those of `forward`, whose sum with `labels` this adds up to; there is no gradient, and
        the logits are never all in memory. Of plain models: a sharded one gathers its weights in `forward` only.
        """
        x_BLM = self._hidden(tokens_BL, positions, attend, None, rope_length)
        if self.norm is not None:
            x_BLM = self.norm(x_BLM)
        return linear_cross_entropies(x_BLM, self._output_weight(), labels)

    def _hidden(
        self,
        tokens_BL: Tensor,
        positions: Tensor | None,
        attend: Attend | None,
        routing: RoutingRecord | None,
        rope_length: int | None,
    ) -> Tensor:
        """What the last block gives, `[batch, seq, dim]`."""
        if positions is None:
            positions = self._count_positions(tokens_BL)
        x_BLM = self._embed(tokens_BL, positions, self.position_embeddings)
        bias = self._score_bias(self.relative_bias)
        context = LayerContext(attend or self._attend, self._rotary(positions, rope_length), bias)
        for block in self.layers:
            x_BLM = block(x_BLM, context, routing)
        return x_BLM
