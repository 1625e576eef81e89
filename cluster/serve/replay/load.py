"""How fast a trace must come to load so many replicas so much. Pure.

Load is offered work over capacity: seconds of a saturated replica that the requests take, over the seconds in which
they come, times the replicas. What a cache saves is no work; how much that is depends on the policy, so it is taken to
be what the best one saves, the oracle.
"""

from collections.abc import Sequence

from cluster.serve.replay.timing import StepTime
from cluster.serve.replay.trace import Prompts, TraceRequest, scaled
from llama.engine import EngineConfig


def offered_work_s(
    requests: Sequence[TraceRequest], hit_rate: float, timing: StepTime, engine: EngineConfig, prompts: Prompts
) -> float:
    """Seconds of one saturated replica that the requests take when `hit_rate` of their prompts is cached."""
    total = 0.0
    for request in requests:
        length = prompts.length(request)
        missing = round(length * (1 - hit_rate))
        total += timing.work_s(missing, length, prompts.output(request), engine.max_batched_tokens)
    return total


def at_load(requests: Sequence[TraceRequest], load: float, replicas: int, work_s: float) -> list[TraceRequest]:
    """The requests with their stamps scaled, so that their work is `load` times what the replicas can do meanwhile."""
    return scaled(requests, work_s / (load * replicas) / duration_s(requests))


def offered_load(requests: Sequence[TraceRequest], replicas: int, work_s: float) -> float:
    """What `at_load` was asked for, of scaled requests."""
    return work_s / (replicas * duration_s(requests))


def duration_s(requests: Sequence[TraceRequest]) -> float:
    """Seconds in which the requests come; a single one, or many at once, take an instant."""
    return max(requests[-1].at - requests[0].at, 1e-3)


def within(requests: Sequence[TraceRequest], seconds: float, load: float, replicas: int, work_s: float) -> int:
    """How many of the first requests come within `seconds` at this load; at least one."""
    return max(1, min(len(requests), int(len(requests) * seconds * load * replicas / work_s)))


def endless_hit_rate(requests: Sequence[TraceRequest], prompts: Prompts) -> float:
    """The share of the prompts that one cache without bounds would have, if every answer came at once."""
    seen: set[int] = set()
    cached = total = 0
    for request in requests:
        known = 0
        while known < len(request.hash_ids) and request.hash_ids[known] in seen:
            known += 1
        seen.update(request.hash_ids)
        length = prompts.length(request)
        cached += min(known * prompts.tokens_per_id, length - 1)
        total += length
    return cached / total
