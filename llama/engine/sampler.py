"""Logits → token ids, for all requests of a step at once; how a token is chosen is `llama.sampling`'s.

Legend: N requests, S of them sampled (not greedy), C of these filtered, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.engine.params import SamplingParams
from llama.engine.request import TokenLogprob
from llama.sampling import apply_temperature, draw, keep_top


def sample(logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token per row.

    Args:
        logits_NV: `[N, V]`, any floating type.
        params: N.
        uniforms: N numbers in [0, 1); those of greedy rows are not used.
    """
    device = logits_NV.device
    token_ids_N = logits_NV.argmax(dim=-1)
    rows = [row for row, param in enumerate(params) if not param.greedy]
    if rows:
        rows_S = torch.tensor(rows, device=device)
        temperature_S1 = torch.tensor([[params[row].temperature] for row in rows], device=device)
        logits_SV = apply_temperature(logits_NV[rows_S].float(), temperature_S1)
        cut = [place for place, row in enumerate(rows) if params[row].top_k or params[row].top_p < 1]
        if cut:  # sorting is dear
            cut_C = torch.tensor(cut, device=device)
            top_k_C1 = torch.tensor([[params[rows[place]].top_k] for place in cut], device=device)
            top_p_C1 = torch.tensor([[params[rows[place]].top_p] for place in cut], device=device)
            logits_SV[cut_C] = keep_top(logits_SV[cut_C], top_k=top_k_C1, top_p=top_p_C1)
        uniforms_S = torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=device)
        token_ids_N[rows_S] = draw(logits_SV, uniforms_S)
    return token_ids_N.tolist()


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
