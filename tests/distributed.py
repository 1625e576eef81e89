"""Runs a test body on N gloo ranks of this machine, each in its own process.

    def body(rank: int, world_size: int, argument) -> Tensor: ...      # at module level: it is pickled by name
    results = run_ranks(body, 2, argument)                             # [rank 0's value, rank 1's value]

The processes are forked from a server that has imported torch and what trains, so a group costs tenths of a second. It
has not imported Arrow, which starts a thread, and threads do not survive a fork. A rank that raises ends the others;
its traceback comes back in `RankError`. Nothing outlives the call.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 90.0
GRACE_S = 1.0
LEAVE_S = 10.0


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


def run_ranks(body: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Calls `body(rank, world_size, *args)` on every rank of a fresh gloo group and returns the values by rank.

    Values travel as `torch.save` bytes. The rendezvous store listens on a free port of the loopback.

    Raises:
        RankError: with the tracebacks of the ranks that failed, the first first, or the numbers of those that hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama.training.trainer", __name__])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = _dump(args)
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(body, rank, world_size, store.port, payload, sender), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    finished = False
    try:
        values = _collect(pipes, timeout_s)
        finished = True
        return values
    finally:
        for process in processes:
            if finished:
                process.join(timeout=LEAVE_S)
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: list[str] = []
    waiting = dict(enumerate(pipes))
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and not failures:
            raise RankError(f"ranks {sorted(waiting)} did not finish within {timeout_s:.0f} s")
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                succeeded, data = waiting.pop(rank).recv()
            except EOFError:
                succeeded, data = False, "died without a word"
            if succeeded:
                values[rank] = _load(data)
            elif not failures:
                # The others fail a moment later for want of this one; their words may help, their silence must not.
                deadline = time.monotonic() + GRACE_S
            if not succeeded:
                failures.append(f"rank {rank} of {len(pipes)}: {data}")
    if failures:
        raise RankError("\n".join(failures))
    return [values[rank] for rank in range(len(pipes))]


def _rank_main(
    body: Callable[..., Any], rank: int, world_size: int, port: int, payload: bytes, sender: Connection
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        value = body(rank, world_size, *_load(payload))
        dist.barrier()
        sender.send((True, _dump(value)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    # The bytes come from our own process.
    return torch.load(io.BytesIO(data), weights_only=False)
