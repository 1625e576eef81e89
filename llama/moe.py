"""Mixture of experts: router, grouped experts, shared experts.

Legend: B batch, L sequence, T = B·L tokens, K chosen experts, N = T·K rows, E experts, M model dimension,
H hidden dimension of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm, linear, silu

from llama.config import ModelConfig
from llama.dispatch import Dispatch, LocalDispatch
from llama.feed_forward import FeedForward


@dataclass
class LayerRouting:
    """What the router of one layer decided in one forward pass."""

    logits_TE: Tensor
    """fp32, with its graph."""
    probabilities_TE: Tensor
    """fp32, with its graph: softmax of the logits over all experts."""
    counts_E: Tensor
    """int64: (token, choice) pairs sent to each expert."""


class RoutingRecord:
    """Collects every layer's routing of a forward pass, keyed by layer.

    Given to `Transformer.forward` by whoever needs the statistics (the trainer); a model that is not asked for them
    keeps none, so that evaluation is never counted. A recomputed layer overwrites its own entry. Not a dataclass: FSDP
    copies every dataclass it finds among a block's arguments, and the layers would write into the copies.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerRouting] = {}


class Router(nn.Module):
    """Token-choice top-k: softmax over experts, the k largest of probability + bias, weighted by probability.

    The bias steers the choice only (DeepSeek-V3, arXiv:2412.19437, §2.1.2, eq. 16); it is all zero unless training
    balances with it. The arithmetic is fp32 under autocast (Switch Transformer, arXiv:2101.03961, §2.4).
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, normalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.expert_bias: Tensor
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns ids `[T, K]` int64, weights `[T, K]`, logits and probabilities `[T, E]`; all but the ids fp32."""
        with torch.autocast(x_TM.device.type, enabled=False):
            logits_TE = linear(x_TM.float(), self.weight.float())
            probabilities_TE = logits_TE.softmax(dim=-1)
            ids_TK = torch.topk(probabilities_TE.detach() + self.expert_bias, self.top_k, dim=-1).indices
            weights_TK = probabilities_TE.gather(1, ids_TK)
            if self.normalize:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return ids_TK, weights_TK, logits_TE, probabilities_TE


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Experts(nn.Module):
    """A bank of SwiGLU experts, computed by grouped GEMM over rows sorted by expert.

    Under expert parallelism the parameters are DTensors and each rank computes its own slice of the bank.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    def forward(self, x_NM: Tensor, counts_E: Tensor) -> Tensor:
        """`x_NM` holds `counts_E[e]` rows for local expert e, in order of e; returns `[N, M]`."""
        w1, w3, w2 = (_local(w) for w in (self.w1, self.w3, self.w2))
        if torch.is_autocast_enabled(x_NM.device.type):
            # grouped_mm is not on autocast's list: cast as autocast would.
            dtype = torch.get_autocast_dtype(x_NM.device.type)
            x_NM, w1, w3, w2 = (t.to(dtype) for t in (x_NM, w1, w3, w2))
        if not self._aligned(w1.element_size()):
            return self._loop(x_NM, counts_E, w1, w3, w2)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_NH = grouped_mm(x_NM, w1.transpose(1, 2), offs=ends_E)
        up_NH = grouped_mm(x_NM, w3.transpose(1, 2), offs=ends_E)
        return grouped_mm(silu(gate_NH) * up_NH, w2.transpose(1, 2), offs=ends_E)

    def _aligned(self, element_size: int) -> bool:
        """grouped_mm wants every row to start at a multiple of 16 bytes."""
        return all(size * element_size % 16 == 0 for size in self.w1.shape[1:])

    @staticmethod
    def _loop(x_NM: Tensor, counts_E: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        ends = [0, *counts_E.cumsum(0).tolist()]
        answers = [
            linear(silu(linear(x_NM[begin:end], w1[e])) * linear(x_NM[begin:end], w3[e]), w2[e])
            for e, (begin, end) in enumerate(pairwise(ends))
        ]
        return torch.cat(answers)


class MoE(nn.Module):
    """Routed experts, dropless, plus shared experts that see every token (DeepSeekMoE, arXiv:2401.06066, eq. 9)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe
        if moe is None or moe.expert_hidden_dim is None:
            raise ValueError("model.moe is absent; a MoE layer needs it, use FeedForward for a dense one")
        self.layer = layer
        self.router = Router(config.dim, moe.num_experts, moe.top_k, moe.normalize_top_k)
        self.experts = Experts(moe.num_experts, config.dim, moe.expert_hidden_dim)
        shared_dim = moe.num_shared_experts * moe.expert_hidden_dim
        self.shared = FeedForward(config.dim, shared_dim) if shared_dim else None
        self.dispatch: Dispatch = LocalDispatch(moe.num_experts)

    def forward(self, x_BLM: Tensor, routing: RoutingRecord | None = None) -> Tensor:
        """`[batch, seq, dim]` → `[batch, seq, dim]`; writes this layer's statistics into `routing` when given."""
        x_TM = x_BLM.reshape(-1, x_BLM.shape[-1])
        ids_TK, weights_TK, logits_TE, probabilities_TE = self.router(x_TM)
        if routing is not None:
            counts_E = torch.bincount(ids_TK.reshape(-1), minlength=logits_TE.shape[1])
            routing.layers[self.layer] = LayerRouting(logits_TE, probabilities_TE, counts_E)
        out_TM = self.dispatch(self.experts, x_TM, ids_TK, weights_TK)
        if self.shared is not None:
            out_TM = out_TM + self.shared(x_TM)
        return out_TM.view_as(x_BLM)
