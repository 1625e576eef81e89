"""The engine deployment: one process, one `llama.engine.Engine`, and the calls the ingress makes to it.

    generate        works on one request and returns when it is over; cancelling the call aborts it and frees its blocks
    subscribe       all that happens here, and the chunks of one ingress process's requests; a stream for each process
    flush_cache     drops every reusable block
    reconfigure     swaps the weights in place, when others are declared

Calls that are meant for one replica carry its name and are refused elsewhere, as are requests for other weights.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from torch import Tensor

from cluster.serve.broadcast import Broadcast
from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.messages import (
    Admission,
    GenerateRequest,
    ReplicaInfo,
    ReplicaLoad,
    ReplicaTarget,
    ReplicaUpdate,
    Subscription,
    WrongModel,
    WrongReplica,
)
from cluster.serve.settings import EngineOptions
from cluster.serve.weights import AnotherModel, fetch_model, shape_id, weights_id
from cluster.session import node_folder
from cluster.storage import Store
from llama.engine import CacheSnapshot, Engine, EngineConfig, EngineStats, reusable_blocks
from llama.hf import load_pretrained
from llama.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve")

LAST_CHUNK_FIRST_S = 0.005  # somebody waits for it, nobody for the end of the call; both cost Ray the same
PING_S = 1.0
GONE_S = 10.0  # an ingress process that does not answer for so long is frozen, and its outbox only grows


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica needs to start, beside the model, which `reconfigure` names. `threads`: torch threads on the CPU.
    `shape`: what every model that it loads must have, see cluster/serve/weights.py.

    `stuck_after_s`: a step that takes longer will never end, and Serve replaces the replica; a long prefill on a slow
    machine must stay below it.
    """

    family: str
    shape: str
    engine: EngineConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    use_gpu: bool = False
    stuck_after_s: float = 120.0


class EngineReplica:
    """One engine behind Serve. Deploy it with `cluster.serve.app.build`."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._server = NodeOnlyServer()
        self._config = config
        self._name = serve.get_replica_context().replica_id.unique_id
        self._reconfiguring = asyncio.Lock()
        self._failure: Exception | None = None
        self._draining = False
        self._loaded = False

    def _load_model(self, options: EngineOptions) -> None:
        self._engine, vocab_size = self._make_engine(options.model)
        self._broadcast = Broadcast(self._engine, self._load, self._current_info)
        self._engine.on_events = self._broadcast.notify
        self._info = ReplicaInfo(
            replica=self._name,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            family=self._config.family,
            model=options.model,
            revision=options.revision,
            weights_id=self._engine.weights_id,
            vocab_size=vocab_size,
            max_seq_len=self._engine.max_total_tokens,
            block_size=self._config.engine.block_size,
            num_blocks=self._engine.stats().num_blocks,
        )
        self._loaded = True

    def _make_engine(self, uri: str) -> tuple[Engine, int]:
        """The engine of the model at `uri`, and the size of its vocabulary."""
        config, started = self._config, time.monotonic()
        self._check_shape(uri)
        torch.set_num_threads(config.threads)
        directory = fetch_model(uri, node_folder("models"))
        device = _device(config.use_gpu)
        model = load_pretrained(directory, dtype=getattr(torch, config.dtype)).to(device)
        engine = Engine(model, Tokenizer.load(directory), config.engine, weights_id=weights_id(directory))
        logger.info(f"Engine of {Store(uri)} ready in {time.monotonic() - started:.1f} s on {device}.")
        return engine, model.config.vocab_size

    async def generate(self, request: GenerateRequest) -> None:
        """Works on a request until it is over; its chunks go into the asking process's subscription.

        Raises WrongModel, NotFollowed, and what `Engine.add_request` raises.
        """
        if request.weights_id != self._engine.weights_id:
            raise WrongModel(f"this replica has the weights {self._engine.weights_id}, not {request.weights_id}")
        await self._engine.prepare(request.params)
        answer = await self._broadcast.begin(request)
        try:
            cached = self._cached_blocks(request)
            self._engine.add_request(
                request.token_ids,
                request.params,
                request_id=answer.name,
                salt=request.salt,
                priority=request.priority,
                timeout_s=request.timeout_s,
                sink=self._broadcast.sink(answer),
            )
            missing = len(request.token_ids) - cached * self._config.engine.block_size
            self._broadcast.admit(Admission(request.request_id, missing, request.hashes[cached:]))
            await answer.done
        finally:
            self._engine.abort(answer.name)
            self._broadcast.end(answer)
        await asyncio.sleep(LAST_CHUNK_FIRST_S)

    def _cached_blocks(self, request: GenerateRequest) -> int:
        """Leading blocks of its prompt that it need not compute."""
        if request.params.prompt_logprobs is not None:
            return 0
        most = reusable_blocks(len(request.token_ids), self._config.engine.block_size)
        return self._engine.cached_blocks(request.hashes[:most])

    async def subscribe(self, subscription: Subscription) -> AsyncIterator[ReplicaUpdate]:
        """See `Broadcast.follow`. Ends as well when the asking process has died, which Ray does not tell us."""
        self._check(subscription)
        watch = None
        if subscription.process is not None:
            watch = asyncio.create_task(self._leave_with(subscription))
        try:
            async with aclosing(self._broadcast.follow(subscription)) as updates:
                async for update in updates:
                    yield update
        finally:
            if watch is not None:
                watch.cancel()

    async def _leave_with(self, subscription: Subscription) -> None:
        try:
            while True:
                await asyncio.sleep(PING_S)
                await asyncio.wait_for(subscription.process.__ray_ready__.remote(), GONE_S)
        except (RayError, TimeoutError) as error:
            logger.warning(f"Ingress {subscription.source} is gone ({type(error).__name__}); its requests end.")
            self._broadcast.leave(subscription.source)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call when the replica starts, and when other options are declared (see cluster/serve/declaration.py);
        the replica is not routed to before it returns. Requests that run end with the weights they began with.

        Raises what loading the weights raises; Serve then replaces the replica. If Serve's controller has died
        meanwhile and does not hear of it, the next one does by `check_health`.
        """
        options = EngineOptions(**user_config)
        async with self._reconfiguring:
            try:
                if self._loaded:
                    await self._exchange_weights(options)
                else:
                    self._load_model(options)
            except Exception as error:
                self._failure = error
                raise

    def _check_shape(self, uri: str) -> None:
        if shape_id(uri) != self._config.shape:
            raise AnotherModel(
                f"{Store(uri)} has another architecture or tokenizer than what was deployed; deploy it without --update"
            )

    async def _exchange_weights(self, options: EngineOptions) -> None:
        await asyncio.to_thread(self._check_shape, options.model)
        directory = await asyncio.to_thread(fetch_model, options.model, node_folder("models"))
        name = await asyncio.to_thread(weights_id, directory)
        if name != self._engine.weights_id:
            model = await asyncio.to_thread(load_pretrained, directory, getattr(torch, self._config.dtype))
            await self._swap(model.state_dict(), name)
            logger.info(f"Weights of {Store(options.model)} are in place of those of {Store(self._info.model)}.")
        self._info = replace(self._current_info(), model=options.model, revision=options.revision)
        self._broadcast.touch()

    async def cache(self, target: ReplicaTarget) -> CacheSnapshot:
        """What is cached, for whoever checks an index; following it is `subscribe`'s."""
        self._check(target)
        self._broadcast.publish()
        return self._engine.snapshot()

    async def flush_cache(self, target: ReplicaTarget) -> int:
        """Drops every reusable block; returns the sequence number of the event that says so."""
        self._check(target)
        self._engine.flush_cache()
        return self._engine.event_seq

    async def _swap(self, weights: Mapping[str, Tensor], name: str) -> None:
        swap = self._engine.load_weights(weights, weights_id=name)
        self._draining = True
        self._broadcast.touch()
        loop = asyncio.get_running_loop()
        swap.add_done_callback(lambda _: loop.call_soon_threadsafe(self._swapped))
        await asyncio.wrap_future(swap)

    def _swapped(self) -> None:
        self._draining = False
        self._broadcast.touch()

    async def check_health(self) -> None:
        """Serve's probe, on the event loop, so that a loop that is stuck does not answer.

        Raises EngineFailed: a step failed or does not end; or what kept the declared weights from being loaded. Serve
        then replaces the replica.
        """
        self._server.check()
        if self._failure is not None:
            raise self._failure
        self._engine.check_health(self._config.stuck_after_s)

    def _check(self, target: ReplicaTarget) -> None:
        if target.replica != self._name:
            raise WrongReplica(f"this is replica {self._name}, not {target.replica}, which has left")

    def _current_info(self) -> ReplicaInfo:
        if self._info.weights_id != self._engine.weights_id:
            self._info = replace(self._info, weights_id=self._engine.weights_id)
        return self._info

    def _load(self) -> ReplicaLoad:
        return load_of(self._engine.stats(), self._draining)


def load_of(stats: EngineStats, draining: bool = False) -> ReplicaLoad:
    """An engine's statistics, as they are reported."""
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
        draining=draining,
    )


def _device(use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        # Ray may count GPUs that torch cannot use (a declared resource, a CPU build); slow beats not at all.
        logger.warning("This replica was given a GPU, but torch sees none; it computes on the CPU.")
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
