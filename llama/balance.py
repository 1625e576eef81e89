"""What evens out the load of experts: auxiliary losses and the routing bias.

Legend: E experts, B sequences, L tokens of a sequence, T tokens, K experts chosen per token, S sums.

Two distributions over experts describe how a batch of T tokens was routed:

    load        fᵢ = (token, choice) pairs sent to expert i / (T·K)      counted, so it has no gradient
    importance  Pᵢ = mean over the T tokens of expert i's probability    differentiable

A token's probabilities are its affinities divided by their sum over all experts. Both distributions are taken over the
batch first, and only then a nonlinearity: a token may well prefer one expert, as long as the batch uses all. Every loss
is smallest when both are uniform. Padding is no token: none of the sums has it.

Where a loss is a function of the load alone, the importance stands in for its gradient (straight through): the loss is
taken of f̃ = f + P − stop_gradient(P), which has the counted value, and its slope ∂loss/∂fᵢ acts on Pᵢ.

    sums = routing_sums(record.layers.values(), kind)         # [layers, S]; sums of ranks and micro-batches add up
    loss = balance_loss(kind, RoutingStatistics(sums))        # [layers]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.config import BalanceLoss
from llama.moe import LayerRouting

_SMALLEST = 1e-6
"""Shares below this count as this inside a logarithm, so that an idle expert's gradient is large and not infinite."""
_NUMBERS = 5  # of the sums, those that are not by expert


def switch_loss(load_E: Tensor, importance_E: Tensor) -> Tensor:
    """E · Σᵢ fᵢ·Pᵢ (Switch Transformer, arXiv:2101.03961, §2.2, eq. 4–6). 1 when uniform; E when one expert has all."""
    return load_E.shape[-1] * (load_E * importance_E).sum(-1)


def sequence_losses(probabilities_BLE: Tensor, top_k: int, counted_BL: Tensor | None = None) -> Tensor:
    """`[B]`: Σᵢ fᵢ·Pᵢ within each sequence (DeepSeek-V3, arXiv:2412.19437, §2.1.2, eq. 17–20). 1 when uniform.

    fᵢ is E/(K·L) times the tokens that have expert i among their k largest affinities: by eq. 18 without the bias that
    steers the choice. With `counted_BL` (bool) a sequence is those of its tokens; 0 if there are none.
    """
    batch, length, _ = probabilities_BLE.shape
    ids = torch.topk(probabilities_BLE.detach(), top_k, dim=-1).indices
    ones = torch.ones_like(ids, dtype=probabilities_BLE.dtype)
    tokens_B1: Tensor | int = length
    if counted_BL is not None:
        ones = ones * counted_BL[..., None]
        tokens_B1 = counted_BL.sum(dim=1, keepdim=True).clamp(min=1)
        probabilities_BLE = probabilities_BLE * counted_BL[..., None]
    load_BE = torch.zeros_like(probabilities_BLE[:, 0]).scatter_add_(1, ids.view(batch, -1), ones.view(batch, -1))
    return switch_loss(load_BE / (top_k * tokens_B1), probabilities_BLE.sum(dim=1) / tokens_B1)


def importance_entropy(importance_E: Tensor) -> Tensor:
    """Σᵢ Pᵢ·ln Pᵢ: the negative entropy of the mean probabilities. −ln E when uniform; 0 when one expert has all."""
    return _negative_entropy(importance_E)


def frequency_entropy(load_E: Tensor, importance_E: Tensor) -> Tensor:
    """Σᵢ fᵢ·ln fᵢ: the negative entropy of the load, its gradient through the importance. −ln E when uniform."""
    return _negative_entropy(_straight_through(load_E, importance_E))


def kl_uniform(importance_E: Tensor) -> Tensor:
    """KL(P ‖ uniform) = Σᵢ Pᵢ·ln(E·Pᵢ). 0 when uniform; ln E when one expert has all."""
    return _negative_entropy(importance_E) + math.log(importance_E.shape[-1])


def expert_load(load_E: Tensor, importance_E: Tensor) -> Tensor:
    """CV(f)² = E · Σᵢ fᵢ² − 1: the squared coefficient of variation of the load. 0 when uniform.

    Shazeer et al., arXiv:1701.06538, appendix A, eq. 11; the variance is the mean square over the experts. Their
    load is differentiable because their router is noisy; here the gradient goes through the importance.
    """
    share_E = _straight_through(load_E, importance_E)
    return share_E.shape[-1] * share_E.square().sum(-1) - 1


def z_losses(logits_TE: Tensor) -> Tensor:
    """`[T]`: squared log-partition of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square()


def _negative_entropy(share_E: Tensor) -> Tensor:
    return (share_E * share_E.clamp(min=_SMALLEST).log()).sum(-1)


def _straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of the one, to the bit, with the gradient of the other."""
    return value.detach() + (gradient - gradient.detach())


@dataclass(frozen=True)
class RoutingStatistics:
    """What the losses are functions of, read off sums over tokens.

    `sums` is `[..., 2·E + 5]`, float64: the pairs of each expert, the probabilities of each expert, the tokens'
    entropies, the sequences' losses (0 unless the kind is per sequence), the tokens' z losses, the number of sequences
    and of tokens. Where there is no token, all means are 0.
    """

    sums: Tensor

    @property
    def num_experts(self) -> int:
        return (self.sums.shape[-1] - _NUMBERS) // 2

    @property
    def counts(self) -> Tensor:
        """`[..., E]`: (token, choice) pairs by expert."""
        return self.sums[..., : self.num_experts].detach()

    @property
    def load(self) -> Tensor:
        """`[..., E]`: f."""
        return self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def importance(self) -> Tensor:
        """`[..., E]`: P."""
        return self.sums[..., self.num_experts : -_NUMBERS] / self.tokens[..., None]

    @property
    def entropy(self) -> Tensor:
        """`[...]`: how undecided the router is, the mean over the tokens of −Σᵢ pᵢ·ln pᵢ in nats, without a gradient.
        ln E when every token likes all experts alike; 0 when each has one that it is sure of."""
        return self.sums[..., -5].detach() / self.tokens

    @property
    def sequence_loss(self) -> Tensor:
        """`[...]`: mean over the sequences."""
        return self.sums[..., -4] / self.sums[..., -2].clamp(min=1)

    @property
    def z_loss(self) -> Tensor:
        """`[...]`: mean over the tokens."""
        return self.sums[..., -3] / self.tokens

    @property
    def tokens(self) -> Tensor:
        """`[...]`: how many there are, 1 at least."""
        return self.sums[..., -1].detach().clamp(min=1)


def routing_sums(layers: Iterable[LayerRouting], kind: BalanceLoss) -> Tensor:
    """`[layers, 2·E + 5]` float64, with the graph: the sums of `RoutingStatistics`, over the tokens of this process."""
    return torch.stack([_layer_sums(layer, kind) for layer in layers])


def _layer_sums(layer: LayerRouting, kind: BalanceLoss) -> Tensor:
    probabilities_TE, counted_T = layer.probabilities_TE, layer.counted_T
    tokens, experts = probabilities_TE.shape
    z_T = z_losses(layer.logits_TE)
    entropy_T = torch.special.entr(probabilities_TE.detach()).sum(dim=-1)
    by_sequence_BLE = probabilities_TE.view(layer.num_sequences, -1, experts)
    counted_BL = None
    num_sequences, num_tokens = (
        torch.full_like(z_T[0], each, dtype=torch.float64) for each in (layer.num_sequences, tokens)
    )
    if counted_T is not None:
        z_T, entropy_T, probabilities_TE = z_T * counted_T, entropy_T * counted_T, probabilities_TE * counted_T[:, None]
        counted_BL = counted_T.view(layer.num_sequences, -1)
        num_sequences, num_tokens = counted_BL.any(dim=1).sum().double(), counted_T.sum().double()
    z_sum, entropy_sum = z_T.sum(dtype=torch.float64), entropy_T.sum(dtype=torch.float64)
    sequence_sum = torch.zeros_like(z_sum)
    if kind == "switch_sequence":
        sequence_sum = sequence_losses(by_sequence_BLE, layer.top_k, counted_BL).sum(dtype=torch.float64)
    numbers = torch.stack((entropy_sum, sequence_sum, z_sum, num_sequences, num_tokens))
    return torch.cat((layer.counts_E.double(), probabilities_TE.sum(dim=0, dtype=torch.float64), numbers))


def balance_loss(kind: BalanceLoss, statistics: RoutingStatistics) -> Tensor:
    """`[...]`: the loss of this kind, before its weight.

    Raises:
        ValueError: the kind is none of `BalanceLoss`.
    """
    match kind:
        case "switch":
            return switch_loss(statistics.load, statistics.importance)
        case "switch_sequence":
            return statistics.sequence_loss
        case "importance_entropy":
            return importance_entropy(statistics.importance)
        case "frequency_entropy":
            return frequency_entropy(statistics.load, statistics.importance)
        case "kl_uniform":
            return kl_uniform(statistics.importance)
        case "expert_load":
            return expert_load(statistics.load, statistics.importance)
    raise ValueError(f"model.moe.balance_loss={kind!r} is not one of the balance losses of llama/balance.py")


def with_total(sums: Tensor, total: Tensor) -> Tensor:
    """The sums over all ranks, with the graph of this rank's own: `total` is `sums` added up over the ranks.

    Every rank then has the gradient of the global loss by its own tokens, to the bit the same loss, and gradients that
    are summed over ranks are whole.
    """
    return _straight_through(total, sums)


def balanced_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The routing bias after a step: raised by `rate` for experts below the mean load, lowered for those above.

    Auxiliary-loss-free balancing (DeepSeek-V3, arXiv:2412.19437, §2.1.2; arXiv:2408.15664, algorithm 1).
    """
    violation_E = counts_E.mean(dim=-1, keepdim=True) - counts_E
    return bias_E + rate * torch.sign(violation_E).to(bias_E.dtype)
