"""What would become of an engine's requests if no other came: the engine's schedule, rolled forward in closed form.

A light twin of the scheduler, without a block manager: decodes first, then prefill chunks in order while the budget
lasts, then waiting requests while blocks are free. Between the end of one decode and the next nothing changes, so those
steps are summed and not stepped through: a rollout costs O(chunks + requests · log requests).
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.serve.replay.timing import StepTime


@dataclass
class Job:
    """An unfinished request: tokens still to prefill, tokens in the context when it decodes, tokens still to generate.

    `blocks`: what it must newly hold to start; 0 for one that has started.
    """

    missing: int
    context: int
    output: int
    blocks: int = 0
    started: bool = False


def rollout(
    jobs: Iterable[Job], *, start_s: float, free_blocks: int, max_batched_tokens: int, timing: StepTime
) -> list[tuple[float, float]]:
    """(first token, end) of every job, in order; a job that decodes already has its first token at `start_s`.

    Args:
        start_s: when the next step can begin.
    """
    jobs = list(jobs)
    times = [(start_s, start_s)] * len(jobs)
    prefills: deque[int] = deque()
    waiting: deque[int] = deque()
    decoding: list[tuple[int, int]] = []  # (decode step after which it ends, job)
    context = steps = 0
    now = start_s
    for index, job in enumerate(jobs):
        if not job.started:
            waiting.append(index)
        elif job.missing > 0:
            prefills.append(index)
        elif job.output > 0:
            heapq.heappush(decoding, (job.output, index))
            context += job.context
    missing = [job.missing for job in jobs]
    while prefills or waiting or decoding:
        chunk, first = 0, []
        budget = max_batched_tokens - len(decoding)
        while budget > 0 and (prefills or waiting):
            if not prefills:
                job = jobs[waiting[0]]
                # One that needs more than there is starts alone.
                if job.blocks > free_blocks and (decoding or chunk):
                    break
                free_blocks -= job.blocks
                prefills.append(waiting.popleft())
            index = prefills[0]
            taken = min(budget, missing[index])
            missing[index] -= taken
            budget -= taken
            chunk += taken
            if missing[index] == 0:
                first.append(prefills.popleft())
        if chunk:
            count = 1
            now += timing.of(chunk, context)
        else:
            count = decoding[0][0] - steps
            grown = len(decoding) * (count * (count - 1) // 2)
            now += count * timing.fixed_s + timing.decode_s_per_context_token * (count * context + grown)
        steps += count
        context += count * len(decoding)
        while decoding and decoding[0][0] <= steps:
            _, index = heapq.heappop(decoding)
            job = jobs[index]
            times[index] = (times[index][0], now)
            context -= job.context + job.output
            free_blocks += job.blocks
        for index in first:
            job = jobs[index]
            times[index] = (now, now)
            if job.output > 1:
                heapq.heappush(decoding, (steps + job.output - 1, index))
                context += job.context + 1
                # Its `output` was counted from the first token on.
                jobs[index] = Job(0, job.context + 1, job.output - 1, job.blocks, True)
            else:
                free_blocks += job.blocks
    return times
