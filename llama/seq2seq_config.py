"""The shape of an encoder–decoder: that of its decoder, and what the encoder adds. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from llama import counts
from llama.config import ModelConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Seq2SeqConfig(ModelConfig):
    """An encoder, a decoder that attends to its output, and one vocabulary with one embedding table for both.

    Every setting of `ModelConfig` holds for both stacks alike; `num_layers` and `max_seq_len` are the decoder's. After
    construction `encoder_layers` and `max_source_len` are integers.

    Raises:
        ValueError: as `ModelConfig`, and for a setting that an encoder–decoder has no place for.
    """

    encoder_layers: int | None = None
    """None takes as many as `num_layers`."""
    max_source_len: int | None = None
    """Tokens of the longest source; None takes `max_seq_len`, the longest target's."""
    final_norm: bool = False
    """A norm after each stack also where its blocks end in one (post, deepnorm), as `torch.nn.Transformer` has it."""

    def __post_init__(self) -> None:
        for name, without in (("encoder_layers", "num_layers"), ("max_source_len", "max_seq_len")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, without))
        super().__post_init__()
        for name in ("encoder_layers", "max_source_len"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value} must be at least 1, or absent for the decoder's")
        _require(self.moe is None, "model.moe: an encoder–decoder has no experts; leave it out")
        _require(
            self.sliding_window is None,
            f"model.sliding_window={self.sliding_window}: an encoder–decoder sees whole sequences; leave it out",
        )
        _require(
            self.norm != "batchnorm",
            "model.norm=batchnorm: its statistics would be of sources' padding as well; choose another norm",
        )
        # It turns all keys anew for every length, and source and target have lengths of their own.
        _require(
            self.rope_scaling is None or self.rope_scaling.kind != "dynamic_ntk",
            "model.rope_scaling.kind=dynamic_ntk does not serve an encoder–decoder; choose another kind",
        )
        _require(
            not self.final_norm or self.norm_placement in ("post", "deepnorm"),
            f"model.final_norm=True has no effect with model.norm_placement={self.norm_placement}, which has that norm "
            "anyway; leave it out",
        )

    @property
    def source_len(self) -> int:
        """`max_source_len`, typed as what it is."""
        assert self.max_source_len is not None
        return self.max_source_len

    @property
    def stacks(self) -> tuple[int, int]:
        assert self.encoder_layers is not None
        return self.encoder_layers, self.num_layers

    @property
    def has_final_norm(self) -> bool:
        return self.final_norm or super().has_final_norm

    def residual_writes(self, encoder: bool = False) -> int:
        return 2 * self.stacks[0] if encoder else 3 * self.num_layers

    def num_parameters(self) -> int:
        """Trained parameters, tied embeddings counted once."""
        return counts.num_parameters(counts.parameter_shapes(self) | counts.encoder_shapes(self))

    def num_active_parameters(self) -> int:
        """All of them."""
        return self.num_parameters()

    def flops_per_token(self, seq_len: int, *, frozen: bool = False) -> float:
        """Forward and backward FLOPs of one trained token of a target of `seq_len` tokens and a source as long."""
        return counts.seq2seq_flops_per_token(self, seq_len, frozen)
