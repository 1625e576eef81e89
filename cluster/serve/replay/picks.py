"""How long a router takes to pick."""

import time
from typing import Any

from ray.serve.request_router import RequestRouter


def time_picks(router: RequestRouter, policy: str, picks_s: list[float]) -> None:
    """Appends the seconds of each of the router's picks to `picks_s`; what it awaits meanwhile is included."""
    # The capacity queue's decision is its actor's answer, for which it has a method of its own.
    name = "_choose_replica_for_request" if policy == "capacity_queue" else "choose_replicas"
    pick = getattr(router, name)

    async def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        chosen = await pick(*args, **kwargs)
        picks_s.append(time.perf_counter() - began)
        return chosen

    setattr(router, name, timed)
