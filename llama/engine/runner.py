"""A scheduled step → one forward pass of the model → one token for every request that has reached its last one.

Legend: T tokens of the step, N requests that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.engine.attention import AttentionPlan, PagedAttend, PagedKVCache, SequenceSpan
from llama.engine.params import SamplingParams
from llama.engine.request import TokenLogprob
from llama.engine.sampler import sample, token_logprobs
from llama.engine.scheduler import ScheduledTokens
from llama.kernels import cpu
from llama.model import Transformer


@dataclass(frozen=True)
class StepInputs:
    """Everything a forward pass needs, copied out of the requests: these may be aborted while it runs."""

    tokens_T: Tensor
    positions_T: Tensor
    plan: AttentionPlan
    output_index_N: Tensor
    params: tuple[SamplingParams, ...]
    uniforms: tuple[float, ...]


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None


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

    def prepare(self, scheduled: Sequence[ScheduledTokens]) -> StepInputs:
        """The inputs of a step, with a random number for each request that will sample."""
        token_ids: list[int] = []
        positions: list[int] = []
        output_index: list[int] = []
        spans: list[SequenceSpan] = []
        for item in scheduled:
            token_ids += item.request.token_ids[item.start : item.end]
            positions += range(item.start, item.end)
            spans.append(SequenceSpan(item.request.table.block_ids, item.start, item.end))
            if item.samples:
                output_index.append(len(token_ids) - 1)
        sampling = [item.request for item in scheduled if item.samples]
        return StepInputs(
            tokens_T=torch.tensor(token_ids, device=self.device),
            positions_T=torch.tensor(positions, device=self.device),
            plan=AttentionPlan(spans, self.cache.block_size, self.device),
            output_index_N=torch.tensor(output_index, dtype=torch.int64, device=self.device),
            params=tuple(request.params for request in sampling),
            uniforms=tuple(0.0 if request.params.greedy else request.uniform() for request in sampling),
        )

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> list[SampledToken]:
        """Computes the step; one token for each scheduled request that samples, in their order."""
        logits_NV = self.model(
            inputs.tokens_T[None],
            positions=inputs.positions_T[None],
            attend=PagedAttend(self.cache, inputs.plan),
            output_index=inputs.output_index_N,
        )
        if not inputs.params:
            return []
        token_ids = sample(logits_NV, inputs.params, inputs.uniforms)
        logprobs = token_logprobs(logits_NV, token_ids, inputs.params)
        return [SampledToken(*pair) for pair in zip(token_ids, logprobs, strict=True)]
