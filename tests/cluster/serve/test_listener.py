"""Several processes' worth of listeners on one port, and what becomes of a request whose client leaves."""

import asyncio
import contextlib

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.serve.listener import Listener
from tests.conftest import find_free_port


class _App:
    """Says its name; `slow` takes until its client leaves, `stream` sends for ever, `broken` fails in mid-stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cancelled: list[str] = []
        routes = [Route(f"/{each.__name__}", each, methods=["POST"]) for each in (self.who, self.slow, self.stream)]
        self.app = Starlette(routes=[*routes, Route("/broken", self.broken, methods=["POST"])])

    async def who(self, http: Request) -> Response:
        return JSONResponse({"name": self.name, "body": (await http.body()).decode()})

    async def slow(self, http: Request) -> Response:
        await http.body()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.append("slow")
            raise
        return Response()

    async def stream(self, http: Request) -> Response:
        async def pieces():
            try:
                while True:
                    yield "piece\n"
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.cancelled.append("stream")
                raise

        return StreamingResponse(pieces())

    async def broken(self, http: Request) -> Response:
        async def pieces():
            yield "piece\n"
            raise RuntimeError("broken")

        return StreamingResponse(pieces())


async def _who(url: str) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
        answer = (await http.post(f"{url}/who", content="x" * 300_000)).json()
        assert answer["body"] == "x" * 300_000
        return answer["name"]


def test_listeners_share_a_port_and_one_that_closes_takes_nobody_with_it():
    async def run() -> None:
        port = find_free_port()
        url = f"http://127.0.0.1:{port}"
        one, two = (Listener(_App(name).app) for name in ("one", "two"))
        for listener in (one, two):
            await listener.listen(("127.0.0.1", port))
            await listener.listen(("127.0.0.1", port))  # again is no error
        await asyncio.sleep(0.2)
        assert {await _who(url) for _ in range(40)} == {"one", "two"}
        await one.close()
        assert {await _who(url) for _ in range(20)} == {"two"}
        await two.listen(None)
        with pytest.raises(httpx.ConnectError):
            await _who(url)

    asyncio.run(run())


def test_a_request_ends_with_its_client_and_a_failure_breaks_the_connection():
    async def run() -> None:
        app, port = _App("one"), find_free_port()
        listener, url = Listener(app.app), f"http://127.0.0.1:{port}"
        await listener.listen(("127.0.0.1", port))
        await asyncio.sleep(0.2)
        async with httpx.AsyncClient(trust_env=False, timeout=0.3) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(f"{url}/slow")
            async with http.stream("POST", f"{url}/stream") as response:
                await anext(response.aiter_lines())
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post(f"{url}/broken")
        for _ in range(100):
            await asyncio.sleep(0.01)
        assert app.cancelled == ["slow", "stream"]
        await listener.close()

    asyncio.run(run())


def test_closing_lets_what_is_under_way_end():
    async def run() -> None:
        async def wait(http: Request) -> Response:
            await asyncio.sleep(0.5)
            return Response("whole")

        listener, port = Listener(Starlette(routes=[Route("/", wait)])), find_free_port()
        await listener.listen(("127.0.0.1", port))
        await asyncio.sleep(0.2)
        async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
            asked = asyncio.create_task(http.get(f"http://127.0.0.1:{port}/"))
            await asyncio.sleep(0.2)
            await listener.close()
            assert (await asked).text == "whole"

    asyncio.run(run())


def test_an_address_of_another_machine_is_left_to_others(caplog):
    async def run() -> None:
        listener = Listener(_App("one").app)
        await listener.listen(("192.0.2.1", 8000))
        await listener.close()

    with caplog.at_level("WARNING", logger="ray.serve"):
        asyncio.run(run())
    assert "does not listen on 192.0.2.1:8000" in caplog.text


def test_headers_without_end_are_cut_off_and_long_bodies_are_not():
    async def run() -> None:
        port = find_free_port()
        listener = Listener(_App("one").app)
        await listener.listen(("127.0.0.1", port))
        await asyncio.sleep(0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(b"POST /who HTTP/1.1\r\nHost: x\r\nContent-Length: 600000\r\n\r\n" + b"x" * 600_000)
        writer.write(b"POST /who HTTP/1.1\r\nHost: x\r\nX-Long: ")  # on the same connection
        await asyncio.wait_for(reader.readuntil(b'x"}'), 5)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 8 << 20 and not reader.at_eof():
                writer.write(b"a" * 65_536)
                await writer.drain()
                sent += 65_536
                await asyncio.sleep(0)
        assert sent < 2 << 20
        with contextlib.suppress(ConnectionError):
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400")
        writer.close()
        await listener.close()

    asyncio.run(run())
