"""From a request's token ids to what the engines are asked."""

import secrets
from collections.abc import Sequence

from fastapi import Request

from cluster.serve.callers import arrived_of, caller_of, meter_of, request_id_of
from cluster.serve.messages import GenerateRequest, ReplicaInfo
from cluster.serve.protocol import SamplingRequest
from llama.engine import SamplingParams, generation_root, hash_blocks


def unique_name(http: Request) -> str:
    """The response's `X-Request-Id`, and a random part: a client may send the same one twice."""
    return f"{request_id_of(http)}-{secrets.token_hex(4)}"


def generate_requests(
    http: Request,
    name: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    body: SamplingRequest,
    info: ReplicaInfo,
    max_wait_s: float | None = None,
) -> list[GenerateRequest]:
    """One for each prompt; of several, each has its number in its id. `max_wait_s`: where the body does not say.

    Raises ApiError: 403 and 429, where the caller may not ask for so much.
    """
    caller = caller_of(http)
    priority = caller.priority_for(body.priority)
    meter_of(http).prompt(sum(map(len, prompts)))
    root = generation_root(info.weights_id, "", caller.salt)
    return [
        GenerateRequest(
            request_id=f"{name}-{number}" if len(prompts) > 1 else name,
            token_ids=tuple(token_ids),
            hashes=tuple(hash_blocks(root, token_ids, info.block_size)),
            params=params,
            weights_id=info.weights_id,
            caller=caller.name,
            arrived=arrived_of(http),
            salt=caller.salt,
            priority=priority,
            timeout_s=body.timeout_s,
            max_wait_s=max_wait_s if body.max_wait_s is None else body.max_wait_s,
        )
        for number, token_ids in enumerate(prompts)
    ]
