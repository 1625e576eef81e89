"""The `caravan` command that talks to an endpoint."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli_serve import OperatorKeyOption, dashboard_url
from pipelines.screen import AddressOption, JsonOption, err, out, print_error, print_json

if TYPE_CHECKING:
    from pipelines.chat import Said

ANEW = "/new"


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Say this and end with the answer; without it go on until Ctrl-D.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The endpoint [default: what is deployed on the cluster]")] = None,
    model: Annotated[str | None, typer.Option(help="[default: the first that the endpoint has]")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    address: AddressOption = None,
    api_key: OperatorKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model. Ctrl-C ends an answer, /new forgets what was said, Ctrl-D ends the talk."""
    from cluster.serve import control
    from cluster.serve.errors import ServeError
    from pipelines.chat import served_model

    if url is None:
        url = control.status(dashboard_url=dashboard_url(address), api_key=api_key).endpoint.url
    url = url.rstrip("/").removesuffix("/v1")
    talk = _Talk(url, model or served_model(url, api_key), system, max_tokens, api_key, as_json)
    if message is not None:
        talk.say(message)
        return
    for line in _lines():
        if line == ANEW:
            talk.forget()
            continue
        try:
            talk.say(line)
        except ServeError as error:
            print_error(str(error))  # what was said before still counts; this line does not
        except KeyboardInterrupt:
            out.print()


class _Talk:
    """What was said so far. A message whose answer fails, or is interrupted, was not said."""

    def __init__(
        self, url: str, model: str, system: str | None, max_tokens: int, api_key: str | None, as_json: bool
    ) -> None:
        self._url, self._model, self._max_tokens, self._api_key = url, model, max_tokens, api_key
        self._as_json = as_json
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._begin)

    def forget(self) -> None:
        self._messages = list(self._begin)

    def say(self, text: str) -> None:
        """Prints the answer as it comes. Raises ServeError."""
        asked = [*self._messages, {"role": "user", "content": text}]
        answer, counts = asyncio.run(self._listen(asked))
        if self._as_json:
            print_json(
                {"text": answer} | ({} if counts is None else {k: v for k, v in asdict(counts).items() if v != ""})
            )
        else:
            print(flush=True)
            if counts is not None:
                err.print(counts.counts(), style="dim", highlight=False)
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    async def _listen(self, asked: list[dict[str, str]]) -> tuple[str, Said | None]:
        from pipelines.chat import converse

        answer, counts = "", None
        async for piece in converse(self._url, self._model, asked, self._api_key, self._max_tokens):
            answer += piece.text
            if piece.prompt_tokens is not None:
                counts = piece
            if not self._as_json:
                sys.stdout.write(shown(piece.text))
                sys.stdout.flush()
        return answer, counts


def shown(text: str) -> str:
    """What a model says is not to command the terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)


def _lines() -> Iterator[str]:
    """What is typed, or comes over a pipe, until its end; empty lines say nothing."""
    with suppress(ImportError):
        import readline  # noqa: F401  the arrows go back in what was typed
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
