"""The encoder–decoder (Vaswani et al., arXiv:1706.03762, §3.1), of the decoder's own blocks.

Legend: B batch, S tokens of a source, L of a target, M model dimension, H query heads, G key/value heads, D head
dimension, V vocabulary, N chosen positions.

    source_BS ──embed──▶ encoder blocks ──▶ memory_BSM
                                                │ keys and values, of each layer its own
    target_BL ──embed──▶ blocks: attention, attention to the memory, feed-forward ──▶ logits_BLV

The encoder's attention sees all of the source, the decoder's the target so far. Positions are of a stack's own
sequence: what attends to the memory has none, for a distance between a token of the target and one of the source means
nothing. Like the decoder alone, it knows of no cache, process group or sharding: a cache of the target's keys comes in
as `attend`, the memory's keys and values are kept in a `SourceContext`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama.attention import Attend, Attention, FullAttend, LayerContext, ScoreBias
from llama.generate import evaluating, generate
from llama.linear import linears
from llama.model import LanguageModel, TransformerBlock
from llama.moe import RoutingRecord
from llama.norm import build_norm
from llama.seq2seq_config import Seq2SeqConfig

KeysValues = tuple[Tensor, Tensor]
"""Of the memory, `[B, S, G, D]` each."""


class SourceContext(LayerContext):
    """What the decoder's layers share besides: how they attend to the memory, and what they keep of it.

    Args:
        kept: keys and values of the memory by layer, which a layer computes when they are not there; None keeps none.
    """

    def __init__(
        self,
        attend: Attend,
        rotary: tuple[Tensor, Tensor] | None,
        bias: ScoreBias | None,
        attend_source: Attend,
        kept: dict[int, KeysValues] | None = None,
    ) -> None:
        super().__init__(attend, rotary, bias)
        self.attend_source = attend_source
        self.kept = kept


class CrossAttention(Attention):
    """Queries of the target, keys and values of the memory (arXiv:1706.03762, §3.2.3); without positions."""

    def forward(self, x_BLM: Tensor, context: LayerContext, memory_BSM: Tensor | None = None) -> Tensor:
        """`[B, L, M]`, to a memory `[B, S, M]` → `[B, L, M]`; `context` is a `SourceContext`."""
        assert isinstance(context, SourceContext) and memory_BSM is not None
        q_BLHD = self._heads(self.wq(x_BLM), self.q_norm)
        if context.kept is None:
            k_BSGD, v_BSGD = self._keys_values(memory_BSM)
        else:
            if self.layer not in context.kept:
                context.kept[self.layer] = self._keys_values(memory_BSM)
            k_BSGD, v_BSGD = context.kept[self.layer]
        out_BLHD = context.attend_source(self.layer, q_BLHD, k_BSGD, v_BSGD, self._scoring(None))
        return self.wo(out_BLHD.flatten(-2))

    def _keys_values(self, memory_BSM: Tensor) -> KeysValues:
        k_BSN, v_BSN = linears(memory_BSM, self.wk, self.wv)
        return self._heads(k_BSN, self.k_norm), v_BSN.unflatten(-1, (-1, self.head_dim))


class CrossBlock(TransformerBlock):
    """A block with attention to the memory between its two sub-layers, on the same residual stream."""

    def __init__(self, config: Seq2SeqConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.cross_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.cross_attention = CrossAttention(config, layer)
        self.cross_post_norm = None
        if config.norm_placement == "sandwich":
            self.cross_post_norm = build_norm(config.norm, config.dim, config.norm_eps)

    def forward(
        self, x_BLM: Tensor, context: LayerContext, routing: RoutingRecord | None, memory_BSM: Tensor | None = None
    ) -> Tensor:
        # The memory is an argument of its own: FSDP looks there for what gets a gradient.
        x_BLM = self._attend(x_BLM, context)
        x_BLM = self._residual(
            x_BLM, lambda x: self.cross_attention(x, context, memory_BSM), self.cross_norm, self.cross_post_norm
        )
        return self._feed_forward(x_BLM, routing)


class Seq2Seq(LanguageModel):
    """An encoder–decoder by its `Seq2SeqConfig`; source and target share vocabulary, embeddings and settings.

    docs/model.md is a guide.
    """

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config, (CrossBlock(config, layer) for layer in range(config.num_layers)))
        self.encoder_position_embeddings = None
        if config.position == "learned":
            self.encoder_position_embeddings = nn.Embedding(config.source_len, config.dim)
        self.encoder_relative_bias = None
        if config.position == "t5":
            self.encoder_relative_bias = nn.Parameter(torch.empty(config.t5_buckets, config.num_heads))
        self.encoder_layers = nn.ModuleList(
            TransformerBlock(config, layer, encoder=True) for layer in range(config.stacks[0])
        )
        self.encoder_norm = None
        if config.has_final_norm:
            self.encoder_norm = build_norm(config.norm, config.dim, config.norm_eps)

    def blocks(self) -> list[TransformerBlock]:
        return [*self.encoder_layers, *super().blocks()]  # type: ignore[list-item]  # as there

    def forward(
        self,
        source_BS: Tensor,
        target_BL: Tensor,
        *,
        source_lengths: Tensor | None = None,
        attend: Attend | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of the target's next token (teacher forcing), or the loss of predicting it.

        Args:
            source_BS: `[batch, source]` int64.
            target_BL: `[batch, seq]` int64: the target from its begin token on, shifted by one against `labels`.
            source_lengths: `[batch]` int64: tokens of each source, at least one, before the padding at its end, which
                changes nothing; None: there is none.
            attend: the decoder's causal attention; None is `CausalAttend`.
            labels: `[batch, seq]` int64, `IGNORE_INDEX` where nothing is predicted.

        Returns:
            `[batch, seq, vocab]`, or with `labels` the fp32 sum of −log p(label) in nats, as `Transformer.forward`.

        Raises:
            ValueError: labels of another shape than the target, or a sequence longer than its table of positions.
        """
        memory_BSM = self.encode(source_BS, source_lengths)
        return self.decode(target_BL, memory_BSM, source_lengths, attend=attend, labels=labels)

    def encode(self, source_BS: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """The encoder's output, the memory: `[batch, source, dim]`; at padding it is anything."""
        positions = self._count_positions(source_BS, "max_source_len")
        x_BSM = self._embed(source_BS, positions, self.encoder_position_embeddings)
        bias = self._score_bias(self.encoder_relative_bias, bidirectional=True)
        context = LayerContext(FullAttend(source_lengths), self._rotary(positions, None), bias)
        for block in self.encoder_layers:
            x_BSM = block(x_BSM, context, None)
        return x_BSM if self.encoder_norm is None else self.encoder_norm(x_BSM)

    def decode(
        self,
        target_BL: Tensor,
        memory_BSM: Tensor,
        source_lengths: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        kept: dict[int, KeysValues] | None = None,
        output_index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The decoder over a memory of `encode`; what is not of `forward` is as in `Transformer.forward`.

        Args:
            kept: the memory's keys and values, empty at first: filled by the first call, read by the next.
        """
        if positions is None:
            positions = self._count_positions(target_BL)
        x_BLM = self._embed(target_BL, positions, self.position_embeddings)
        context = SourceContext(
            attend or self._attend,
            self._rotary(positions, None),
            self._score_bias(self.relative_bias),
            FullAttend(source_lengths),
            kept,
        )
        for block in self.layers:
            x_BLM = block(x_BLM, context, None, memory_BSM)
        return self._predict(x_BLM, output_index, labels)

    def generate(
        self,
        source: Tensor,
        source_lengths: Tensor | None = None,
        *,
        max_tokens: int,
        bos: int,
        eos: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | None = None,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """A target for each source, without `bos`; `eos` is the last token of one that ended before `max_tokens`.

        The source is encoded once. With the cache a step costs the forward pass of one token: the target's keys and
        values grow, the memory's are computed once a layer; `use_cache=False` computes all of them anew.

        Args:
            source, source_lengths: as for `forward`; `pad` makes them of lists.
            temperature: 0 is greedy. This, `top_k`, `top_p` and `seed` are those of `llama.generate.generate`.

        Raises:
            ValueError: an argument is out of range, the source is longer than `model.max_source_len` or names a token
                that the model has not, or the target and its begin token do not fit into `model.max_seq_len`.
        """
        source = source.to(self.tok_embeddings.weight.device)
        self._check_source(source, source_lengths)
        with torch.inference_mode(), evaluating(self):
            lengths = None if source_lengths is None else source_lengths.to(source.device)
            bound = BoundDecoder(self, self.encode(source, lengths), lengths, {} if use_cache else None)
        rows: list[list[int]] = generate(  # type: ignore[assignment]  # a batch gives a list of lists
            bound,
            [[bos]] * len(source),
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=(eos,),
            seed=seed,
            use_cache=use_cache,
        )
        return rows

    def _check_source(self, source_BS: Tensor, lengths_B: Tensor | None) -> None:
        if source_BS.dim() != 2 or source_BS.dtype != torch.int64 or not source_BS.numel():
            raise ValueError(
                f"source is {source_BS.dtype} of shape {list(source_BS.shape)}; give int64 [batch, source], both at "
                "least 1"
            )
        if source_BS.shape[1] > self.config.source_len:
            raise ValueError(
                f"source has {source_BS.shape[1]} tokens, more than model.max_source_len={self.config.source_len}; "
                "shorten it"
            )
        lowest, highest = (int(bound) for bound in source_BS.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"source has the token id {lowest if lowest < 0 else highest}; ids lie in [0, model.vocab_size="
                f"{self.config.vocab_size})"
            )
        if lengths_B is None:
            return
        if lengths_B.shape != source_BS.shape[:1] or lengths_B.min() < 1 or lengths_B.max() > source_BS.shape[1]:
            raise ValueError(
                f"source_lengths={lengths_B.tolist()} do not fit a source of shape {list(source_BS.shape)}; give one "
                f"of 1 to {source_BS.shape[1]} for each row"
            )


class BoundDecoder(nn.Module):
    """A `Seq2Seq` and a memory: a decoder that `llama.generate.generate` continues."""

    def __init__(
        self, model: Seq2Seq, memory: Tensor, lengths: Tensor | None, kept: dict[int, KeysValues] | None
    ) -> None:
        super().__init__()
        self.model, self.config, self.tok_embeddings = model, model.config, model.tok_embeddings
        self._memory, self._lengths, self._kept = memory, lengths, kept

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions: Tensor,
        attend: Attend | None,
        output_index: Tensor,
        rope_length: int,  # for dynamic NTK scaling, which an encoder–decoder does without
    ) -> Tensor:
        return self.model.decode(
            tokens_BL,
            self._memory,
            self._lengths,
            positions=positions,
            attend=attend,
            kept=self._kept,
            output_index=output_index,
        )


def pad(rows: Sequence[Sequence[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids, one list a row, as `[batch, length]` int64 with zeros at the end, and their lengths `[batch]`.

    `length` None is the longest row's. Raises ValueError for a row that is longer.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    longest = max((len(row) for row in rows), default=0)
    if length is not None and longest > length:
        raise ValueError(f"a row has {longest} tokens, more than length={length}; shorten it")
    padded = torch.zeros(len(rows), longest if length is None else length, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded, lengths
