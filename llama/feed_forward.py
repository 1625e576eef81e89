"""The dense feed-forward network, gated or not."""

from __future__ import annotations

from torch import Tensor, nn

from llama.activation import build_activation, gated_product
from llama.config import ModelConfig
from llama.linear import Linear, linears


class FeedForward(nn.Module):
    """w2(σ(w1·x)), or gated w2(σ(w1·x) ⊙ w3·x) with w1 the gate (Shazeer, arXiv:2002.05202, eq. 2 and 4-6).

    σ is the activation of the config, which also says whether there is a gate and whether the matrices have biases
    (Shazeer leaves them out).
    """

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, hidden_dim, bias=config.ffn_bias)
        self.w3 = Linear(config.dim, hidden_dim, bias=config.ffn_bias) if config.gated else None
        self.w2 = Linear(hidden_dim, config.dim, bias=config.ffn_bias)
        self.activation = build_activation(config.activation, config.swish_beta)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` → `[..., dim]`."""
        if self.w3 is None:
            return self.w2(self.activation(self.w1(x)))
        return self.w2(gated_product(self.activation, *linears(x, self.w1, self.w3)))
