"""Which token comes next: pure functions on logits, shared by `llama.generate` and the engine.

Legend: N rows, V vocabulary. A setting is one number for all rows, or `[N, 1]`: one for each.

The order is that of transformers, with what only vLLM has where vLLM has it:

    1  what a constraint or `min_tokens` forbids becomes -inf    vLLM: grammar bitmask, then `min_tokens`
    2  logit bias                                                vLLM; transformers' `sequence_bias`
    3  repetition penalty                                        both
    4  frequency and presence penalty                            vLLM, by OpenAI's definition
    5  temperature; greedy takes the largest logit here          both
    6  top-k, then top-p on what is left                         both
    7  min-p                                                     transformers; vLLM has it before top-k
    8  the draw

Log-probabilities that are reported are the model's own, before all of these. What a filter removes becomes -inf. The
functions work in the type of the logits; give them fp32 or wider.

A sampled token is the inverse of the cumulative distribution, in order of token id, at one uniform number of the row's
own. So it depends on the row's logits, settings and number only; and since the order of summation is not the order of
probability, rounding noise that swaps two equally likely tokens moves nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_COLDEST = 1e-30
"""Below fp32's range a temperature would become 0, and the largest logit 0 / 0."""


def allow_only(logits_NV: Tensor, mask_NW: Tensor) -> Tensor:
    """Keeps the tokens whose bit is set: token t has bit t % 32 of word t // 32 of `mask_NW`, int32."""
    bits = torch.arange(32, dtype=torch.int32, device=mask_NW.device)
    allowed_NV = ((mask_NW[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits_NV.shape[1]]
    return logits_NV.masked_fill(~allowed_NV, -torch.inf)


def forbid(logits_NV: Tensor, forbidden_NV: Tensor) -> Tensor:
    """Removes the tokens where `forbidden_NV` is True, in a row where another is left."""
    left_NV = logits_NV.masked_fill(forbidden_NV, -torch.inf)
    return torch.where(left_NV.amax(dim=-1, keepdim=True) == -torch.inf, logits_NV, left_NV)


def penalize_repetition(logits_NV: Tensor, seen_NV: Tensor, penalty: float | Tensor) -> Tensor:
    """Logits of tokens that occurred before, divided by `penalty` where positive and multiplied by it where negative.

    CTRL, arXiv:1909.05858, §4.1, divides both; multiplying what is negative makes it less likely too, as transformers
    does. `seen_NV`: bool, True for tokens of the prompt and of the output so far.
    """
    penalized_NV = torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)
    return torch.where(seen_NV, penalized_NV, logits_NV)


def penalize_frequency(
    logits_NV: Tensor, counts_NV: Tensor, presence: float | Tensor, frequency: float | Tensor
) -> Tensor:
    """OpenAI's penalties: logits less `frequency` times a token's count, and less `presence` if that is above 0.

    Source: OpenAI's API reference, "Frequency and presence penalties". `counts_NV`: how often each token is in the
    output so far, the prompt not included.
    """
    return logits_NV - frequency * counts_NV - presence * (counts_NV > 0)


def apply_temperature(logits_NV: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits over the positive `temperature`, shifted so that a row's largest is 0."""
    divisor = torch.as_tensor(temperature, dtype=logits_NV.dtype, device=logits_NV.device).clamp(min=_COLDEST)
    # Shifted first: no temperature, however small, makes inf - inf.
    return (logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / divisor


def keep_top(logits_NV: Tensor, *, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0) -> Tensor:
    """Keeps the `top_k` likeliest tokens, and of these the nucleus: the fewest that reach `top_p` together.

    Top-k: Fan et al., arXiv:1805.04833, §5.4; 0 turns it off, and of equal logits the lower id is the likelier. Top-p:
    Holtzman et al., arXiv:1904.09751, §3.1, over what top-k left; 1 turns it off.

    Both keep so many of the likeliest tokens; the sorted logits tell how many, and the smallest of them.
    """
    rows, vocab_size = logits_NV.shape
    device = logits_NV.device
    top_k_N1 = torch.as_tensor(top_k, device=device).expand(rows, 1)
    top_k_N1 = top_k_N1.masked_fill((top_k_N1 == 0) | (top_k_N1 > vocab_size), vocab_size)
    top_p_N1 = torch.as_tensor(top_p, dtype=torch.float64, device=device).expand(rows, 1)
    sorted_NV = _descending(logits_NV)
    weights_NV = (sorted_NV - sorted_NV[:, :1]).exp()
    mass_NV = weights_NV.cumsum(dim=-1, dtype=torch.float64)
    # Those before a token already reach top_p: it is outside. The likeliest has none before it and always stays.
    wanted_N1 = torch.where(top_p_N1 < 1, top_p_N1 * mass_NV.gather(1, top_k_N1 - 1), torch.inf)
    count_N1 = (mass_NV - weights_NV < wanted_N1).sum(dim=-1, keepdim=True).clamp(min=1).minimum(top_k_N1)
    last_N1 = sorted_NV.gather(1, count_N1 - 1)
    # Of those equal to the last the lowest ids, as many as there is room for.
    equal_NV = logits_NV == last_N1
    room_N1 = count_N1 - (logits_NV > last_N1).sum(dim=-1, keepdim=True)
    excess_NV = equal_NV & (equal_NV.cumsum(dim=-1, dtype=torch.int32) > room_N1)
    return logits_NV.masked_fill((logits_NV < last_N1) | excess_NV, -torch.inf)


def _descending(logits_NV: Tensor) -> Tensor:
    """Every row sorted, the largest first."""
    if logits_NV.device.type != "cpu":
        return logits_NV.sort(dim=-1, descending=True).values
    # Twenty times as fast as torch, which finds the order too (32 rows of 32,000: 3 ms, one thread with AVX-512).
    return torch.from_numpy(np.sort(logits_NV.detach().neg().numpy(), axis=-1)).neg_()


def keep_min_p(logits_NV: Tensor, min_p: float | Tensor) -> Tensor:
    """Keeps the tokens at least `min_p` times as likely as the likeliest (Nguyen et al., arXiv:2407.01082, §3); 0 turns
    it off."""
    share = torch.as_tensor(min_p, dtype=logits_NV.dtype, device=logits_NV.device)
    return logits_NV.masked_fill(logits_NV < logits_NV.amax(dim=-1, keepdim=True) + share.log(), -torch.inf)


def draw(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """One token id a row, `[N]` int64, by `uniforms_N`: float64 numbers in [0, 1)."""
    # float64: in fp32 the sum over a large vocabulary loses its tail.
    cumulative_NV = logits_NV.softmax(dim=-1).double().cumsum(dim=-1)
    threshold_N1 = (uniforms_N * cumulative_NV[:, -1])[:, None]
    # The first token whose cumulative probability exceeds the threshold has a probability above 0.
    tokens_N = torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)
    # Beyond the end only when the logits are NaN; then any token is as good, and the other rows must not suffer.
    return tokens_N.clamp(max=logits_NV.shape[-1] - 1)
