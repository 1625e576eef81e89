"""Mixture of experts: router, grouped experts, shared experts. What evens out their load: llama/balance.py.

Legend: B batch, L sequence, T = B·L tokens, K chosen experts, R rows sorted by expert, E experts, M model dimension,
H hidden dimension of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm

from llama.activation import build_activation, gated_product
from llama.autocast import autocast_dtype, autocast_off
from llama.config import ModelConfig, MoEConfig
from llama.dispatch import Dispatch, LocalDispatch, count_by_expert
from llama.feed_forward import FeedForward
from llama.linear import Linear, linear


@dataclass
class LayerRouting:
    """What the router of one layer decided in one forward pass."""

    logits_TE: Tensor
    """At least fp32, with its graph."""
    probabilities_TE: Tensor
    """At least fp32, with its graph: the affinities of each token, divided by their sum over all experts."""
    counts_E: Tensor
    """int64: (token, choice) pairs by the expert that the router chose, those over a capacity included, padding not."""
    top_k: int
    num_sequences: int
    """The tokens are those of this many sequences of one length, one after the other."""
    counted_T: Tensor | None = None
    """bool: which tokens are no padding; None if none of them is."""


class RoutingRecord:
    """Collects every layer's routing of a forward pass, keyed by layer.

    Given to `Transformer.forward` by whoever needs the statistics (the trainer); a model that is not asked for them
    keeps none, so that evaluation is never counted. A recomputed layer overwrites its own entry (of
    `torch.utils.checkpoint` only the non-reentrant kind keeps the statistics' graph). Not a dataclass: FSDP
    copies every dataclass it finds among a block's arguments, and the layers would write into the copies.

    Args:
        counted_BL: bool `[batch, seq]`: which positions are no padding; None if none of them is.
    """

    def __init__(self, counted_BL: Tensor | None = None) -> None:
        self.layers: dict[int, LayerRouting] = {}
        self.counted_T = None if counted_BL is None else counted_BL.reshape(-1)


class Router(nn.Module):
    """Token-choice top-k by affinity: the softmax of the logits over all experts, or each logit's sigmoid.

    The k experts of largest affinity + bias are chosen. A choice weighs its affinity, which is divided by the sum of
    the chosen ones if `normalize_top_k`, times `route_scale`. The bias steers the choice only (DeepSeek-V3,
    arXiv:2412.19437, §2.1.2, eq. 13–16); it is all zero unless training balances with it. The arithmetic is at least
    fp32, under autocast too (Switch Transformer, arXiv:2101.03961, §2.4).
    """

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts, dtype=torch.float32))
        self.expert_bias: Tensor
        self.score = moe.score
        self.top_k = moe.top_k
        self.normalize = moe.normalize_top_k
        self.route_scale = moe.route_scale

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns ids `[T, K]` int64, weights `[T, K]`, logits and affinities `[T, E]`."""
        with autocast_off(x_TM):
            dtype = torch.promote_types(x_TM.dtype, torch.float32)
            logits_TE = linear(x_TM.to(dtype), self.weight.to(dtype))
            affinities_TE = logits_TE.softmax(dim=-1) if self.score == "softmax" else logits_TE.sigmoid()
            ids_TK = torch.topk(affinities_TE.detach() + self.expert_bias, self.top_k, dim=-1).indices
            weights_TK = affinities_TE.gather(1, ids_TK)
            if self.normalize:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-12)
            if self.route_scale != 1:
                weights_TK = weights_TK * self.route_scale
        return ids_TK, weights_TK, logits_TE, affinities_TE

    def probabilities(self, affinities_TE: Tensor) -> Tensor:
        """Affinities that sum to 1 over the experts (DeepSeek-V3, arXiv:2412.19437, §2.1.2, eq. 19)."""
        if self.score == "softmax":
            return affinities_TE
        return affinities_TE / affinities_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Experts(nn.Module):
    """A bank of feed-forwards without biases, computed by grouped GEMM over rows sorted by expert.

    Under expert parallelism the parameters are DTensors and each rank computes its own slice of the bank. A gradient
    that arrives must be dense: grouped GEMM cannot read an expanded one, as a bare `.sum()` gives.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        if moe is None or moe.expert_hidden_dim is None:
            raise ValueError("model.moe is absent; experts need it, use FeedForward for a dense layer")
        inner, outer = (moe.num_experts, moe.expert_hidden_dim, config.dim), (moe.num_experts, config.dim)
        self.w1 = nn.Parameter(torch.empty(inner))
        self.w3 = nn.Parameter(torch.empty(inner)) if config.gated else None
        self.w2 = nn.Parameter(torch.empty(*outer, moe.expert_hidden_dim))
        self.activation = build_activation(config.activation, config.swish_beta)

    def forward(self, x_RM: Tensor, counts_E: Tensor) -> Tensor:
        """`x_RM` holds `counts_E[e]` rows for local expert e, in order of e; returns `[R, M]`."""
        w1, w2 = _local(self.w1), _local(self.w2)
        w3 = None if self.w3 is None else _local(self.w3)
        dtype = autocast_dtype(x_RM)
        if dtype is not None:
            # grouped_mm is not on autocast's list: cast as autocast would.
            x_RM, w1, w2 = x_RM.to(dtype), w1.to(dtype), w2.to(dtype)
            w3 = None if w3 is None else w3.to(dtype)
        multiply = _looped if _kernel_rows(x_RM) or not _aligned(w1) else _grouped
        ends_E = counts_E.cumsum(0)
        gate_RH = multiply(x_RM, w1, ends_E)
        if w3 is not None:
            hidden_RH = gated_product(self.activation, gate_RH, multiply(x_RM, w3, ends_E))
        else:
            # An fp32 parameter of the activation, a learned β, would widen what grouped_mm wants of one type.
            hidden_RH = self.activation(gate_RH).to(x_RM.dtype)
        return multiply(hidden_RH, w2, ends_E)


def _aligned(weight: Tensor) -> bool:
    """grouped_mm wants every row to start at a multiple of 16 bytes, and knows no float64; compiled, only bf16."""
    rows_fit = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if torch.compiler.is_compiling():
        return rows_fit and weight.dtype == torch.bfloat16
    return rows_fit and weight.dtype != torch.float64


def _kernel_rows(x_RM: Tensor) -> bool:
    """Whether they are for the CPU's own kernel (llama/linear.py): expert by expert it beats grouped_mm."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x_RM.is_cpu and x_RM.dtype == torch.bfloat16


def _grouped(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E.to(torch.int32))


@torch.compiler.disable  # a compiler would make a variant for every way the rows fall
def _looped(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same, expert by expert."""
    ends = [0, *ends_E.tolist()]
    return torch.cat([linear(x_RI[begin:end], weight_EOI[e]) for e, (begin, end) in enumerate(pairwise(ends))])


class MoE(nn.Module):
    """Routed experts, plus shared experts that see every token (DeepSeekMoE, arXiv:2401.06066, eq. 9).

    The shared experts are one feed-forward; with a `shared_gate` its answer is multiplied by sigmoid(gate·x), as
    the released Qwen2-MoE models do. In training a capacity bounds what each expert takes of one forward
    pass; a pair over it adds nothing, and the token's other choices keep their weights.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe
        if moe is None:
            raise ValueError("model.moe is absent; a MoE layer needs it, use FeedForward for a dense one")
        self.layer = layer
        self.capacity_factor = moe.capacity_factor
        self.router = Router(config.dim, moe)
        self.experts = Experts(config)
        self.shared = FeedForward(config, moe.shared_hidden_dim) if moe.shared_hidden_dim else None
        self.shared_gate = Linear(config.dim, 1, bias=False) if moe.shared_gate else None
        self.dispatch: Dispatch = LocalDispatch(moe.num_experts)

    def forward(self, x_BLM: Tensor, routing: RoutingRecord | None = None) -> Tensor:
        """`[batch, seq, dim]` → `[batch, seq, dim]`; writes this layer's statistics into `routing` when given."""
        x_TM = x_BLM.reshape(-1, x_BLM.shape[-1])
        ids_TK, weights_TK, logits_TE, affinities_TE = self.router(x_TM)
        if routing is not None:
            routing.layers[self.layer] = LayerRouting(
                logits_TE,
                self.router.probabilities(affinities_TE),
                count_by_expert(ids_TK, logits_TE.shape[1], routing.counted_T),
                self.router.top_k,
                num_sequences=x_BLM.shape[0],
                counted_T=routing.counted_T,
            )
        dtype = autocast_dtype(x_TM)
        if dtype is not None:
            # Once, instead of by every matrix, and before the rows are copied out K times.
            x_TM = x_TM.to(dtype)
        out_TM = self.dispatch(self.experts, x_TM, ids_TK, weights_TK, self._capacity(ids_TK))
        if self.shared is not None:
            shared_TM = self.shared(x_TM)
            if self.shared_gate is not None:
                shared_TM = self.shared_gate(x_TM).sigmoid() * shared_TM
            out_TM = out_TM + shared_TM
        return out_TM.view(x_BLM.shape)

    def _capacity(self, ids_TK: Tensor) -> int | None:
        """Rows that an expert takes of this forward pass (Switch Transformer, arXiv:2101.03961, §2.2, eq. 3)."""
        if self.capacity_factor is None or not self.training:
            return None
        share = self.capacity_factor * ids_TK.numel() / self.router.expert_bias.numel()
        return math.ceil(round(share, 9))  # 1.1 · 100 is a little more than 110 in binary
