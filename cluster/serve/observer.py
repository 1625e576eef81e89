"""What one ingress process sees of its requests: it keeps records, counts, and logs a line for each.

Lives on the ingress's event loop. Ray's metrics are written by a thread, every REPORT_S: a call costs microseconds,
and there are some for every request.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client.core import Metric as Family

from cluster.serve import metrics
from cluster.serve.api_error import ApiError
from cluster.serve.messages import GenerateRequest
from cluster.serve.metrics import Batch, Key, Metrics, PrometheusSink, Sink
from cluster.serve.record import Recording, Records
from cluster.serve.state import RoutingState
from llama.engine import Chunk

logger = logging.getLogger("ray.serve")

REPORT_S = 5.0  # Ray forgets a gauge that is not set for 20 s


class Observer:
    """Records, metrics and the log of one ingress process named `ingress`, which serves `model`."""

    def __init__(self, state: RoutingState, *, model: str = "", ingress: str = "") -> None:
        self.records = Records()
        self.metrics = Metrics()
        self.wanted_replicas: Callable[[], int | None] = lambda: None
        self._state = state
        self._model, self._ingress = model, ingress
        self._prometheus = PrometheusSink((model, ingress))
        self._sinks: list[Sink] = [self._prometheus]
        self._writing = asyncio.Lock()
        self._reporting: asyncio.Task[None] | None = None

    def start(self, *sinks: Sink) -> None:
        """Reports to these sinks as well, from now on. Call it on the event loop."""
        self._sinks += sinks
        self._reporting = asyncio.get_running_loop().create_task(self._report())

    def stop(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()

    # -- requests ------------------------------------------------------------------------------------------

    @contextmanager
    def following(self, request: GenerateRequest) -> Iterator[Recording]:
        """A request's life is the block; however that is left, there is a record of it then."""
        recording = Recording(request, model=self._model, ingress=self._ingress, clock=time.monotonic, now=time.time())
        status: int = 500
        outcome: str | None = "internal_error"
        try:
            yield recording
            status, outcome = 200, None
        except ApiError as error:
            status, outcome = error.status, error.code or "error"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # Who has the whole answer may go away without waiting for its end.
            status, outcome = (200, None) if recording.is_whole else (499, "cancelled")
            raise
        finally:
            record = recording.finished(status, outcome)
            self.records.add(record)
            self.metrics.record(record)
            logger.info(record.log_line())

    def chunk(self, recording: Recording, replica: str, predicted_cached_tokens: int, chunk: Chunk) -> None:
        """A chunk of a followed request has come."""
        recording.chunk(replica, predicted_cached_tokens, chunk)
        self.metrics.count(metrics.GENERATED_TOKENS, by=len(chunk.token_ids))

    def refused(self, reason: str) -> None:
        """A request is answered with an error."""
        self.metrics.count(metrics.REJECTS, reason)

    # -- who asks ------------------------------------------------------------------------------------------

    async def families(self) -> list[Family]:
        """This process's metrics as they are now."""
        await self._flush()
        return self._prometheus.families()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                await self._flush()
            except Exception:
                # Nobody awaits this task: what ended it would go unseen, and the metrics stand still.
                logger.exception("The metrics could not be reported.")

    async def _flush(self) -> None:
        async with self._writing:
            batch = self.metrics.take(self._gauges())
            await asyncio.to_thread(self._write, batch)

    def _write(self, batch: Batch) -> None:
        for sink in self._sinks:
            sink.write(batch)

    def _gauges(self) -> dict[Key, float]:
        replicas = self._state.status()
        gauges: dict[Key, float] = {
            (metrics.REPLICAS, ()): len(replicas),
            (metrics.REPLICAS_FRESH, ()): sum(status.fresh for status in replicas),
        }
        if (wanted := self.wanted_replicas()) is not None:
            gauges[metrics.REPLICAS_WANTED, ()] = wanted
        for status in replicas:
            name = (status.replica,)
            if status.load is not None:
                gauges[metrics.RUNNING, name] = status.load.running
                gauges[metrics.WAITING, name] = status.load.waiting
                gauges[metrics.PENDING_PREFILL, name] = status.load.pending_prefill_tokens * status.prefill_s_per_token
            if status.lag_s is not None:
                gauges[metrics.INDEX_LAG, name] = status.lag_s
            if status.info is not None:
                gauges[metrics.WEIGHTS, (status.replica, status.info.weights_id)] = 1
                if status.load is not None:
                    gauges[metrics.KV_USED, name] = 1 - status.load.free_blocks / status.info.num_blocks
        return gauges
