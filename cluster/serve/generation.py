"""From a request's token ids to what the engines are asked."""

import re
import secrets
from collections.abc import Sequence

from fastapi import Request

from cluster.serve.messages import GenerateRequest, ReplicaInfo
from cluster.serve.protocol import SamplingRequest
from llama.engine import SamplingParams, generation_root, hash_blocks

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


def request_id(http: Request) -> str:
    """`X-Request-Id` if it can be a name, and a random part: a client may send the same one twice."""
    given = http.headers.get("x-request-id", "")
    return f"{given}-{secrets.token_hex(4)}" if _SANE_ID.fullmatch(given) else secrets.token_hex(16)


def generate_requests(
    name: str, prompts: Sequence[Sequence[int]], params: SamplingParams, body: SamplingRequest, info: ReplicaInfo
) -> list[GenerateRequest]:
    """One for each prompt; of several, each has its number in its id."""
    root = generation_root(info.weights_id)
    return [
        GenerateRequest(
            request_id=f"{name}-{number}" if len(prompts) > 1 else name,
            token_ids=tuple(token_ids),
            hashes=tuple(hash_blocks(root, token_ids, info.block_size)),
            params=params,
            weights_id=info.weights_id,
            priority=body.priority or 0,
            timeout_s=body.timeout_s,
            max_wait_s=body.max_wait_s,
        )
        for number, token_ids in enumerate(prompts)
    ]
