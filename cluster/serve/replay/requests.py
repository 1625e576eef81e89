"""A trace's requests as the policies get them."""

from dataclasses import dataclass

from cluster.serve.messages import GenerateRequest
from cluster.serve.replay.trace import Prompts, TraceRequest
from llama.engine import SamplingParams, generation_root, hash_blocks

HASHING = ("caravan", "caravan_perfect", "oracle")
"""Policies that are told the hashes of a prompt's blocks."""


@dataclass(frozen=True)
class TextRequest(GenerateRequest):
    """With the prompt's text: what Ray's affinity router looks for."""

    prompt: str = ""


def make_request(
    policy: str, number: int, traced: TraceRequest, prompts: Prompts, block_size: int, weights_id: str
) -> GenerateRequest:
    """The request with the hashes of its blocks, or for Ray's affinity router with its text; others need neither."""
    tokens = tuple(prompts.tokens(traced))
    params = SamplingParams(max_tokens=prompts.output(traced), ignore_eos=True)
    name = f"request-{number}"
    if policy == "prefix_affinity":
        return TextRequest(name, tokens, (), params, weights_id, prompt=prompts.text(traced))
    hashes: tuple[bytes, ...] = ()
    if policy in HASHING:
        hashes = tuple(hash_blocks(generation_root(weights_id), tokens, block_size))
    return GenerateRequest(name, tokens, hashes, params, weights_id)
