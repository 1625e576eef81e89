"""A scheduled step → one forward pass of the model → one token for every request that has reached its last one.

Legend: T tokens of the step, N requests that sample, P prompt tokens whose log-probabilities are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from llama.engine.attention import AttentionPlan, PagedAttend, PagedKVCache, SequenceSpan
from llama.engine.request import ComputedTokens, TokenLogprob
from llama.engine.sampler import SampleInputs, sample, token_logprobs
from llama.engine.scheduler import ScheduledTokens
from llama.kernels import cpu, huge_pages
from llama.model import Transformer
from llama.upload import upload


@dataclass(frozen=True)
class StepInputs:
    """Everything a forward pass needs, copied out of the requests: these may be aborted while it runs."""

    tokens_T: Tensor
    positions_T: Tensor
    plan: AttentionPlan
    output_index: Tensor
    """`[N + P]`: the places in `tokens_T` whose logits are wanted, those that sample first."""
    sampling: tuple[SampleInputs | None, ...]
    """One for each scheduled part; None where it does not sample."""
    prompt_targets_P: Tensor
    prompt_counts: tuple[tuple[int, ...], ...]
    """For each scheduled part its share of P: how many likeliest tokens to report for each."""


class ModelRunner:
    """Owns the model and its cache tensors, on the model's device and in its dtype."""

    def __init__(self, model: Transformer, *, num_blocks: int, block_size: int) -> None:
        self.model = model.eval()
        weight = next(model.parameters())
        self.device = weight.device
        self.cache = PagedKVCache(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=weight.dtype, device=weight.device
        )
        if self.device.type == "cpu":
            cpu.ready()  # compiled now, not in the first request's time
            huge_pages.move_parameters(model)

    def prepare(self, scheduled: Sequence[ScheduledTokens], eos_ids: Collection[int] = ()) -> StepInputs:
        """The inputs of a step, with a random number for each request that will sample."""
        token_ids: list[int] = []
        positions: list[int] = []
        output_index: list[int] = []
        prompt_index: list[int] = []
        prompt_targets: list[int] = []
        prompt_counts: list[tuple[int, ...]] = []
        spans: list[SequenceSpan] = []
        for item in scheduled:
            request, offset = item.request, len(token_ids) - item.start
            token_ids += request.token_ids[item.start : item.end]
            positions += range(item.start, item.end)
            spans.append(SequenceSpan(request.table.block_ids, item.start, item.end))
            if item.samples:
                output_index.append(len(token_ids) - 1)
            targets = request.prompt_targets(item.start, item.end)
            prompt_index += (offset + target - 1 for target in targets)
            prompt_targets += (request.token_ids[target] for target in targets)
            prompt_counts.append((request.params.prompt_logprobs or 0,) * len(targets))
        vocab_size = self.model.config.vocab_size
        return StepInputs(
            tokens_T=upload(torch.tensor(token_ids), self.device),
            positions_T=upload(torch.tensor(positions), self.device),
            plan=AttentionPlan(spans, self.cache.block_size, self.device),
            output_index=upload(torch.tensor(output_index + prompt_index, dtype=torch.int64), self.device),
            sampling=tuple(
                SampleInputs.of(item.request, eos_ids, vocab_size) if item.samples else None for item in scheduled
            ),
            prompt_targets_P=upload(torch.tensor(prompt_targets, dtype=torch.int64), self.device),
            prompt_counts=tuple(prompt_counts),
        )

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> list[ComputedTokens]:
        """Computes the step; one result for each scheduled part, in their order."""
        logits = self.model(
            inputs.tokens_T[None],
            positions=inputs.positions_T[None],
            attend=PagedAttend(self.cache, inputs.plan),
            output_index=inputs.output_index,
        )
        rows = [row for row in inputs.sampling if row is not None]
        logits_NV, logits_PV = logits[: len(rows)], logits[len(rows) :]
        sampled: Iterator[tuple[int, TokenLogprob | None]] = iter(())
        if rows:
            token_ids_N = sample(logits_NV, rows)
            logprobs = token_logprobs(logits_NV, token_ids_N, [row.params.logprobs for row in rows])
            sampled = zip(token_ids_N.tolist(), logprobs, strict=True)
        prompt = iter(token_logprobs(logits_PV, inputs.prompt_targets_P, list(chain(*inputs.prompt_counts))))
        computed = []
        for row, counts in zip(inputs.sampling, inputs.prompt_counts, strict=True):
            token_id, logprob = (None, None) if row is None else next(sampled)
            scored = [entry for entry in islice(prompt, len(counts)) if entry is not None]
            computed.append(ComputedTokens(token_id, logprob, scored))
        return computed
