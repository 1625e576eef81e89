"""Logits → token ids, for all requests of a step at once; what is done to the logits is `llama.sampling`'s.

Every row is computed by itself, from its logits, its settings and its random number. Only rows that use a feature pay
for it, and a greedy row without any costs an argmax. What is copied to the device goes there without waiting.

Legend: N requests, S of them sampled or changed (not plainly greedy), R of these that use a feature, P single logits of
theirs, V vocabulary, W words of a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from llama.engine.constraint import Constraint, mask_words
from llama.engine.params import SamplingParams
from llama.engine.request import Request, TokenLogprob
from llama.sampling import (
    allow_only,
    apply_temperature,
    draw,
    forbid,
    keep_min_p,
    keep_top,
    penalize_frequency,
    penalize_repetition,
)
from llama.upload import upload


@dataclass(frozen=True)
class SampleInputs:
    """What choosing one request's next token needs, copied out of the request."""

    params: SamplingParams
    uniform: float = 0.0
    """In [0, 1); not used by greedy."""
    prompt_ids: Sequence[int] = ()
    """Wanted with a repetition penalty."""
    output_ids: Sequence[int] = ()
    """Wanted with any penalty."""
    forbidden_ids: Sequence[int] = ()
    """Tokens of the vocabulary that must not come yet."""
    constraint: Constraint | None = None

    @classmethod
    def of(cls, request: Request, eos_ids: Collection[int], vocab_size: int) -> SampleInputs:
        """Takes the request's random number for this token if it needs one."""
        params, start = request.params, request.num_prompt_tokens
        repetition = params.repetition_penalty != 1
        frequency = bool(params.presence_penalty or params.frequency_penalty)
        forbidden: set[int] = set()
        if request.num_generated < params.min_tokens:
            forbidden = set(params.stop_token_ids) if params.ignore_eos else {*params.stop_token_ids, *eos_ids}
        return cls(
            params,
            uniform=0.0 if params.greedy else request.uniform(),
            prompt_ids=request.token_ids[:start] if repetition else (),
            output_ids=request.token_ids[start:] if repetition or frequency else (),
            forbidden_ids=[token_id for token_id in forbidden if token_id < vocab_size],
            constraint=request.constraint,
        )

    @property
    def plain(self) -> bool:
        """The model's likeliest token is the one."""
        return (
            self.params.greedy
            and not self.penalized
            and not (self.params.logit_bias or self.forbidden_ids or self.constraint)
        )

    @property
    def penalized(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)


def sample(logits_NV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    """One token a row, `[N]` int64 on the logits' device; `logits_NV`: `[N, V]`, any floating type.

    A row whose constraint has no token to go on with gets any; `Constraint.advance` refuses it.
    """
    token_ids_N = logits_NV.max(dim=-1).indices  # on a CPU several times as fast as argmax
    chosen = [place for place, row in enumerate(rows) if not row.plain]
    if not chosen:
        return token_ids_N
    rows = [rows[place] for place in chosen]
    chosen_S = _tensor(chosen, torch.int64, logits_NV.device)
    logits_SV = logits_NV[chosen_S].float()
    logits_SV = _where(logits_SV, rows, lambda row: row.constraint is not None, _constrain)
    logits_SV = _where(logits_SV, rows, lambda row: bool(row.forbidden_ids), _forbid)
    logits_SV = _where(logits_SV, rows, lambda row: bool(row.params.logit_bias), _add_bias)
    logits_SV = _where(logits_SV, rows, lambda row: row.penalized, _penalize)
    sampled = [place for place, row in enumerate(rows) if not row.params.greedy]
    if len(sampled) == len(rows):
        tokens_S = _draw(logits_SV, rows)
    else:
        tokens_S = logits_SV.argmax(dim=-1)
        if sampled:
            sampled_R = _tensor(sampled, torch.int64, logits_NV.device)
            tokens_S[sampled_R] = _draw(logits_SV[sampled_R], [rows[place] for place in sampled])
    token_ids_N[chosen_S] = tokens_S
    return token_ids_N


Change = Callable[[Tensor, Sequence[SampleInputs]], Tensor]


def _where(
    logits_SV: Tensor, rows: Sequence[SampleInputs], wanted: Callable[[SampleInputs], bool], change: Change
) -> Tensor:
    """The logits with `change` done to the rows that want it; may write into them."""
    places = [place for place, row in enumerate(rows) if wanted(row)]
    if not places:
        return logits_SV
    if len(places) == len(rows):
        return change(logits_SV, rows)
    places_R = _tensor(places, torch.int64, logits_SV.device)
    logits_SV[places_R] = change(logits_SV[places_R], [rows[place] for place in places])
    return logits_SV


def _constrain(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    masks_RW = torch.empty(len(rows), mask_words(logits_RV.shape[1]), dtype=torch.int32)
    for row, mask_W in zip(rows, masks_RW, strict=True):
        assert row.constraint is not None
        if not row.constraint.fill(mask_W):
            mask_W.fill_(-1)
    return allow_only(logits_RV, upload(masks_RW, logits_RV.device))


def _forbid(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    forbidden_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
    _, places_P = _places([row.forbidden_ids for row in rows], logits_RV)
    forbidden_RV.view(-1).index_fill_(0, places_P, True)
    return forbid(logits_RV, forbidden_RV)


def _add_bias(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    _, places_P = _places([list(row.params.logit_bias) for row in rows], logits_RV)
    values = [value for row in rows for value in row.params.logit_bias.values()]
    logits_RV.view(-1).index_add_(0, places_P, _tensor(values, logits_RV.dtype, logits_RV.device))
    return logits_RV


def _penalize(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    """Changes the P logits of tokens that are in the rows' texts, which are few beside the vocabulary."""
    outputs = [Counter(row.output_ids) for row in rows]
    prompts = [set(row.prompt_ids) - output.keys() for row, output in zip(rows, outputs, strict=True)]
    tokens = [[*output, *prompt] for output, prompt in zip(outputs, prompts, strict=True)]
    counts: list[int] = []
    for output, prompt in zip(outputs, prompts, strict=True):
        counts += [*output.values(), *(0,) * len(prompt)]
    counts_P = _tensor(counts, logits_RV.dtype, logits_RV.device)
    row_P, places_P = _places(tokens, logits_RV)
    repetition_P, presence_P, frequency_P = (
        _setting(name, rows, logits_RV).squeeze(1)[row_P]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    flat = logits_RV.view(-1)
    logits_P = flat[places_P]
    logits_P = penalize_repetition(logits_P, torch.ones_like(logits_P, dtype=torch.bool), repetition_P)
    flat[places_P] = penalize_frequency(logits_P, counts_P, presence_P, frequency_P)
    return logits_RV


def _draw(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    logits_RV = apply_temperature(logits_RV, _setting("temperature", rows, logits_RV))
    # Sorting is dear.
    logits_RV = _where(logits_RV, rows, lambda row: bool(row.params.top_k) or row.params.top_p < 1, _keep_top)
    logits_RV = _where(logits_RV, rows, lambda row: row.params.min_p > 0, _keep_min_p)
    return draw(logits_RV, _tensor([row.uniform for row in rows], torch.float64, logits_RV.device))


def _keep_top(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    top_k_R1 = _tensor([[row.params.top_k] for row in rows], torch.int64, logits_RV.device)
    return keep_top(logits_RV, top_k=top_k_R1, top_p=_setting("top_p", rows, logits_RV))


def _keep_min_p(logits_RV: Tensor, rows: Sequence[SampleInputs]) -> Tensor:
    return keep_min_p(logits_RV, _setting("min_p", rows, logits_RV))


def _setting(name: str, rows: Sequence[SampleInputs], logits_RV: Tensor) -> Tensor:
    """`[R, 1]`."""
    return _tensor([[getattr(row.params, name)] for row in rows], logits_RV.dtype, logits_RV.device)


def _places(token_ids: Sequence[Sequence[int]], logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each token, one row after the other, and its place in `logits_RV.flatten()`."""
    lengths_R = torch.tensor([len(ids) for ids in token_ids])
    row_P = torch.repeat_interleave(torch.arange(len(token_ids)), lengths_R)
    places_P = row_P * logits_RV.shape[1] + torch.tensor([*chain(*token_ids)], dtype=torch.int64)
    return upload(row_P, logits_RV.device), upload(places_P, logits_RV.device)


def _tensor(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=dtype), device)


def token_logprobs(logits_NV: Tensor, token_ids_N: Tensor, counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """Log-probabilities of tokens under the unmodified distribution, and the `counts` likeliest beside them; None where
    the count is None."""
    answers: list[TokenLogprob | None] = [None] * len(counts)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return answers
    rows_R = _tensor(rows, torch.int64, logits_NV.device)
    token_ids_R = token_ids_N[rows_R]
    logprobs_RV = logits_NV[rows_R].float().log_softmax(dim=-1)
    logprobs_R = logprobs_RV.gather(1, token_ids_R[:, None]).squeeze(1)
    most = max(count or 0 for count in counts)
    top_RK = logprobs_RV.topk(most, dim=-1)
    columns = (token_ids_R, logprobs_R, top_RK.indices, top_RK.values)
    for row, token_id, logprob, top_ids, top_values in zip(rows, *(column.tolist() for column in columns), strict=True):
        count = counts[row] or 0
        answers[row] = TokenLogprob(token_id, logprob, dict(zip(top_ids[:count], top_values[:count], strict=True)))
    return answers
