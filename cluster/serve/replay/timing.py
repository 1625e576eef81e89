"""How long a modelled engine's step takes, and how much work a request is. Seconds and tokens.

    step = fixed + prefill tokens / prefill rate + (context read by decoding requests) · per_context_token

The defaults are a mid-sized GPU's, on a model of some ten billion parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama.engine import EngineConfig
from llama.engine.scheduler import ScheduledTokens

MODELLED_ENGINE = EngineConfig(
    num_blocks=2000, block_size=512, max_batched_tokens=2048, max_running=1024, max_waiting=4096
)


@dataclass(frozen=True)
class StepTime:
    """The linear model of a step."""

    fixed_s: float = 0.012
    prefill_s_per_token: float = 1 / 32_000
    decode_s_per_context_token: float = 48e-9

    def seconds(self, scheduled: Sequence[ScheduledTokens]) -> float:
        """Of one step of the engine's scheduler."""
        prefill = context = 0
        for item in scheduled:
            if item.end - item.start == 1 and item.request.decoding:
                context += item.end
            else:
                prefill += item.end - item.start
        return self.of(prefill, context)

    def of(self, prefill_tokens: int, context_tokens: int) -> float:
        """Of a step that prefills so many tokens and whose decoding requests attend to so many."""
        return (
            self.fixed_s + self.prefill_s_per_token * prefill_tokens + self.decode_s_per_context_token * context_tokens
        )

    def work_s(self, missing_tokens: int, input_tokens: int, output_tokens: int, max_batched_tokens: int) -> float:
        """Seconds of a saturated replica that a request takes.

        There every step is a full chunk of prefill, so the fixed time is shared by its tokens; decoding adds the
        contexts it reads.
        """
        per_token = self.prefill_s_per_token + self.fixed_s / max_batched_tokens
        context = output_tokens * input_tokens + output_tokens * (output_tokens - 1) // 2
        return per_token * missing_tokens + self.decode_s_per_context_token * context
