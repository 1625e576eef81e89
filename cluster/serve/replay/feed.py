"""What a simulated replica tells the router's state: the items of a subscription, without Ray."""

import asyncio
from collections.abc import Callable

from cluster.serve.messages import Admission, GenerateRequest, ReplicaInfo, ReplicaUpdate
from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replica import load_of
from cluster.serve.state import RoutingState
from llama.engine import reusable_blocks


class Feed:
    """Makes one replica's updates: everything since the last one."""

    def __init__(self, replica: str, engine: ModelledEngine, state: RoutingState) -> None:
        self._replica = replica
        self._engine = engine
        self._state = state
        self.lags_s: list[float] = []
        """From cache events until the state knew of them."""
        self._loop = asyncio.get_running_loop()
        self._admitted: list[Admission] = []
        self._prefilled: list[str] = []
        engine.drain_events()
        self._epoch = engine.snapshot().epoch

    def first(self) -> None:
        """The item that a subscription begins with; at once."""
        engine = self._engine
        info = ReplicaInfo(
            replica=self._replica,
            pid=0,
            node_id="",
            weights_id=engine.weights_id,
            vocab_size=engine.vocab_size,
            max_seq_len=engine.max_total_tokens,
            block_size=engine.config.block_size,
            num_blocks=engine.config.num_blocks,
        )
        self._state.apply_update(
            self._replica, ReplicaUpdate(self._epoch, load_of(engine.stats()), snapshot=engine.snapshot(), info=info)
        )

    def arrived(self, request: GenerateRequest) -> None:
        """A request has reached the replica."""
        size = self._engine.config.block_size
        cached = min(self._engine.cached_blocks(request.hashes), reusable_blocks(len(request.token_ids), size))
        missing = len(request.token_ids) - cached * size
        self._admitted.append(Admission(request.request_id, missing, request.hashes[cached:]))

    def prefilled(self, request_id: str) -> None:
        """A request's prefill is over, or it has ended before."""
        self._prefilled.append(request_id)

    def next(self) -> Callable[[], None]:
        """Takes what there is; the result, called when it arrives, applies it."""
        update = ReplicaUpdate(
            self._epoch,
            load_of(self._engine.stats()),
            events=tuple(self._engine.drain_events()),
            admitted=tuple(self._admitted),
            prefilled=tuple(self._prefilled),
        )
        self._admitted.clear()
        self._prefilled.clear()

        sent = self._loop.time()

        def apply() -> None:
            if update.events:
                self.lags_s.append(self._loop.time() - sent)
            if not self._state.apply_update(self._replica, update):
                raise RuntimeError(f"simulated events of {self._replica} were lost: a defect of the simulation")

        return apply
