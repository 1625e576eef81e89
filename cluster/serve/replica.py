"""The engine deployment: one process, one `llama.engine.Engine`, and the calls the ingress makes to it.

    generate    one request's tokens, as a stream; the caller's going away aborts it and frees its blocks
    subscribe   the prefix cache from a snapshot onwards, and the load; a stream for each ingress process
    flush_cache drops every reusable block

Calls that are meant for one replica carry its name and are refused elsewhere, as are requests for another model.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import ray
import torch
from ray import serve

from cluster.serve.broadcast import Broadcast
from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.messages import (
    GenerateRequest,
    ReplicaChunk,
    ReplicaInfo,
    ReplicaLoad,
    ReplicaTarget,
    ReplicaUpdate,
    WrongModel,
    WrongReplica,
)
from cluster.serve.settings import EngineOptions
from cluster.serve.weights import fetch_model, weights_id
from cluster.session import node_folder
from cluster.storage import Store
from llama.engine import Chunk, Engine, EngineConfig, EngineFailed
from llama.hf import load_pretrained
from llama.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")

HEARTBEAT_S = 0.5
SUBSCRIPTION_S = 30.0
COALESCE_S = 0.003


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica needs to start. `threads`: torch threads on the CPU."""

    model: str
    family: str
    engine: EngineConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    use_gpu: bool = False


class EngineReplica:
    """One engine behind Serve. Deploy it with `cluster.serve.app.build`."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._server = NodeOnlyServer()
        torch.set_num_threads(config.threads)
        started = time.monotonic()
        directory = fetch_model(config.model, node_folder("models"))
        device = _device(config.use_gpu)
        model = load_pretrained(directory, dtype=getattr(torch, config.dtype)).to(device)
        self._config = config
        self._engine = Engine(model, Tokenizer.load(directory), config.engine, weights_id=weights_id(directory))
        self._broadcast = Broadcast(self._engine)
        self._engine.on_events = self._broadcast.notify
        self._failure: EngineFailed | None = None
        self._name = serve.get_replica_context().replica_id.unique_id
        self._info = ReplicaInfo(
            replica=self._name,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            family=config.family,
            model=config.model,
            weights_id=self._engine.weights_id,
            vocab_size=model.config.vocab_size,
            max_seq_len=self._engine.max_total_tokens,
            block_size=config.engine.block_size,
            num_blocks=self._engine.stats().num_blocks,
        )
        logger.info(f"Engine of {Store(config.model)} ready in {time.monotonic() - started:.1f} s on {device}.")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[ReplicaChunk]:
        """Streams a request's chunks; closing it aborts the request.

        Raises WrongModel, and what `Engine.stream` raises.
        """
        if request.weights_id != self._info.weights_id:
            raise WrongModel(f"this is a replica of model {self._info.weights_id}, not {request.weights_id}")
        stream = self._engine.stream(request.token_ids, request.params, request_id=request.request_id)
        try:
            async with aclosing(cast(AsyncGenerator[Chunk, None], stream)) as chunks:
                async for chunk in chunks:
                    yield ReplicaChunk(self._name, chunk)
        except EngineFailed as error:
            self._failure = error
            raise

    async def subscribe(self, target: ReplicaTarget) -> AsyncIterator[ReplicaUpdate]:
        """A snapshot, then events as they come, and the load at least every HEARTBEAT_S.

        Ends after SUBSCRIPTION_S, for the subscriber to come again: Ray does not tell us when its process has died,
        and a stream that nobody reads would keep this replica from draining.
        """
        self._check(target)
        subscriber, snapshot = self._broadcast.subscribe()
        try:
            yield ReplicaUpdate(snapshot.epoch, self._load(), snapshot=snapshot, info=self._info)
            deadline = time.monotonic() + SUBSCRIPTION_S
            while time.monotonic() < deadline:
                events = await subscriber.take(HEARTBEAT_S)
                yield ReplicaUpdate(snapshot.epoch, self._load(), events=tuple(events))
                await asyncio.sleep(COALESCE_S)
        finally:
            self._broadcast.unsubscribe(subscriber)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call when the replica starts, and when other options are declared (see cluster/serve/declaration.py);
        the replica is not routed to before it returns. Requests that run end with the weights they began with.

        Raises what loading the weights raises; Serve then replaces the replica.
        """
        options = EngineOptions(**user_config)
        directory = await asyncio.to_thread(fetch_model, options.model, node_folder("models"))
        name = await asyncio.to_thread(weights_id, directory)
        if name != self._info.weights_id:
            model = await asyncio.to_thread(load_pretrained, directory, getattr(torch, self._config.dtype))
            await asyncio.wrap_future(self._engine.load_weights(model.state_dict(), weights_id=name))
            logger.info(f"Weights of {Store(options.model)} are in place of those of {Store(self._info.model)}.")
        self._info = replace(self._info, model=options.model, weights_id=name)

    async def flush_cache(self, target: ReplicaTarget) -> int:
        """Drops every reusable block; returns the sequence number of the event that says so."""
        self._check(target)
        self._engine.flush_cache()
        return self._engine.event_seq

    def check_health(self) -> None:
        """Serve's probe. Raises once the engine's step loop has died; Serve then replaces the replica."""
        self._server.check()
        if self._failure is not None:
            raise self._failure

    def _check(self, target: ReplicaTarget) -> None:
        if target.replica != self._name:
            raise WrongReplica(f"this is replica {self._name}, not {target.replica}, which has left")

    def _load(self) -> ReplicaLoad:
        stats = self._engine.stats()
        return ReplicaLoad(
            running=stats.running,
            waiting=stats.waiting,
            free_blocks=stats.free_blocks,
            pending_prefill_tokens=stats.pending_prefill_tokens,
            decode_context_tokens=stats.decode_context_tokens,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            generated_tokens=stats.generated_tokens,
            preemptions=stats.preemptions,
        )


def _device(use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        # Ray may count GPUs that torch cannot use (a declared resource, a CPU build); slow beats not at all.
        logger.warning("This replica was given a GPU, but torch sees none; it computes on the CPU.")
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
