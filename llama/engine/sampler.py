"""Logits → token ids, for all requests of a step at once.

Legend: N requests, V vocabulary.

A sampled token is the inverse of the cumulative distribution, in order of token id, at one uniform number that the
request's own generator drew. So it depends on the request's logits, parameters and seed only; and since the order of
summation is not the order of probability, rounding noise that swaps two equally likely tokens moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.engine.request import SamplingParams, TokenLogprob


def sample(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token per row.

    Args:
        logits_NV: `[N, V]`, any floating type.
        params: N.
        uniforms: N numbers in [0, 1); those of greedy rows are not used.
    """
    token_ids_N = logits_NV.argmax(dim=-1)
    rows = [row for row, param in enumerate(params) if not param.greedy]
    if rows:
        rows_S = torch.tensor(rows, device=logits_NV.device)
        probabilities_SV = _filtered_probabilities(logits_NV[rows_S].float(), [params[row] for row in rows])
        # float64: in fp32 the sum over a large vocabulary loses its tail.
        cumulative_SV = probabilities_SV.double().cumsum(dim=-1)
        uniforms_S = torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=logits_NV.device)
        threshold_S1 = (uniforms_S * cumulative_SV[:, -1])[:, None]
        # The first token whose cumulative probability exceeds the threshold has a probability above 0.
        sampled_S = torch.searchsorted(cumulative_SV, threshold_S1, right=True).squeeze(1)
        # Beyond the end only when the logits are NaN; then any token is as good, and the others must not suffer.
        token_ids_N[rows_S] = sampled_S.clamp(max=logits_NV.shape[-1] - 1)
    return token_ids_N.tolist()


def _filtered_probabilities(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities after temperature, top-k and top-p; what is filtered out is exactly 0. Rows sum to 1 or less."""
    device = logits_SV.device
    # Below fp32's range a temperature would become 0, and the largest logit 0 / 0.
    temperature_S1 = torch.tensor([[max(param.temperature, 1e-30)] for param in params], device=device)
    # The largest becomes 0: no temperature, however small, makes inf - inf.
    logits_SV = (logits_SV - logits_SV.amax(dim=-1, keepdim=True)) / temperature_S1
    cut = [row for row, param in enumerate(params) if param.top_k or param.top_p < 1]
    if cut:
        cut_C = torch.tensor(cut, device=device)
        logits_SV[cut_C] = _cut_tail(logits_SV[cut_C], [params[row] for row in cut])
    return logits_SV.softmax(dim=-1)


def _cut_tail(logits_CV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Sets to -inf what is outside the top k, then what is outside the nucleus of the rest."""
    vocab_size = logits_CV.shape[-1]
    sorted_CV, order_CV = logits_CV.sort(dim=-1, descending=True, stable=True)
    top_k_C1 = torch.tensor([[param.top_k or vocab_size] for param in params], device=logits_CV.device)
    rank_V = torch.arange(vocab_size, device=logits_CV.device)
    sorted_CV = sorted_CV.masked_fill(rank_V >= top_k_C1, -torch.inf)
    top_p_C1 = torch.tensor([[param.top_p] for param in params], device=logits_CV.device)
    probabilities_CV = sorted_CV.softmax(dim=-1)
    # Those before a token already reach top_p: it is outside. The likeliest has none before it and always stays.
    before_CV = probabilities_CV.cumsum(dim=-1) - probabilities_CV
    outside_CV = (before_CV >= top_p_C1) & (top_p_C1 < 1)
    return torch.empty_like(logits_CV).scatter_(1, order_CV, sorted_CV.masked_fill(outside_CV, -torch.inf))


def token_logprobs(
    logits_NV: Tensor, token_ids: Sequence[int], params: Sequence[SamplingParams]
) -> list[TokenLogprob | None]:
    """Log-probabilities of the chosen tokens under the unmodified distribution; None where none were asked for."""
    answers: list[TokenLogprob | None] = [None] * len(params)
    rows = [row for row, param in enumerate(params) if param.logprobs is not None]
    if not rows:
        return answers
    logprobs_RV = logits_NV[torch.tensor(rows, device=logits_NV.device)].float().log_softmax(dim=-1)
    most = max(params[row].logprobs or 0 for row in rows)
    top_RK = logprobs_RV.topk(most, dim=-1)
    for row, values_V, top_values, top_ids in zip(
        rows, logprobs_RV, top_RK.values.tolist(), top_RK.indices.tolist(), strict=True
    ):
        count = params[row].logprobs or 0
        top = dict(zip(top_ids[:count], top_values[:count], strict=True))
        answers[row] = TokenLogprob(token_ids[row], values_V[token_ids[row]].item(), top)
    return answers
