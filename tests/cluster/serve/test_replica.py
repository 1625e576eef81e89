"""What a replica refuses. The rest is in test_serving."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster.serve.messages import GenerateRequest, WrongModel
from cluster.serve.replica import EngineReplica
from llama.engine import SamplingParams


def test_a_request_for_another_model_does_not_reach_the_engine():
    # Without the constructor, which wants a model and Serve; there is no engine that could be reached.
    replica = EngineReplica.__new__(EngineReplica)
    replica._engine = SimpleNamespace(weights_id="new")  # type: ignore[assignment]
    request = GenerateRequest("r", (1, 2), (), SamplingParams(), "old")
    with pytest.raises(WrongModel, match="weights new, not old"):
        asyncio.run(replica.generate(request))
