import asyncio
import time

import pytest

from cluster.serve.replay.virtual_time import Deadlock, VirtualTimeLoop, run


def test_time_passes_where_nobody_waits():
    async def main() -> list[tuple[str, float]]:
        loop, log = asyncio.get_running_loop(), []

        async def ticks(name: str, period: float) -> None:
            for _ in range(3):
                await asyncio.sleep(period)
                log.append((name, loop.time()))

        loop.call_later(2500.0, lambda: log.append(("later", loop.time())))
        await asyncio.gather(ticks("a", 1000.0), ticks("b", 1500.0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.create_future(), 500.0)
        log.append(("end", loop.time()))
        return log

    began = time.monotonic()
    log = run(main())
    assert time.monotonic() - began < 60
    # At 3000 b set its timer first.
    assert log == [
        ("a", 1000.0), ("b", 1500.0), ("a", 2000.0), ("later", 2500.0), ("b", 3000.0), ("a", 3000.0), ("b", 4500.0),
        ("end", 5000.0),
    ]  # fmt: skip


def test_blocking_makes_others_late():
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        late = loop.create_future()
        loop.call_later(1.0, lambda: late.set_result(loop.time()))
        loop.block(5.0)
        return await late

    assert run(main()) == 5.0


def test_a_deadlock_is_an_error_and_no_hang():
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(main())
