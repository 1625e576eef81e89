"""The deploy stage: the exported model behind replicas and router, and real conversations with it.

It leaves no artifact and runs every time. Whether the endpoint stays is the caller's choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from cluster.artifact import Artifact
from cluster.serve import control
from cluster.serve.settings import AppArgs, IngressOptions
from cluster.storage import JSON
from pipelines.recipe import RequestsConfig, ServeConfig
from pipelines.stage import Stage, StageContext

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

REPORT = "deploy.json"

# The topic comes first: conversations then differ from their first block on, and spread over the replicas.
_SYSTEM = "{topic} is the module in question. Write short answers about it and keep to what its source says."
_TOPICS = ("json", "asyncio", "pathlib", "logging", "threading", "socket", "email", "unittest")
_QUESTIONS = (
    "What does the module {topic} do, and which function of it would you call first?",
    "Show the signature of that function and say what it returns.",
    "Which exception does it raise when its argument is wrong?",
    "Write one line that uses it.",
)


@dataclass(frozen=True)
class Turn:
    """One answered request: tokens of its prompt, how many of them the router foresaw and the replica found in its
    cache, and the seconds until the first token."""

    conversation: int
    turn: int
    replica: str
    prompt_tokens: int
    predicted_cached_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_seconds: float


def deploy_stage(name: str, config: ServeConfig, dtype: str, dashboard_url: str, keep: bool) -> Stage:
    """The stage `deploy`, downstream of `export`; always runs. With `keep` the endpoint is left running."""
    return Stage(
        "deploy", 1, config, partial(_deploy, name, config, dtype, dashboard_url, keep), ("export",), always=True
    )


def app_args(
    name: str,
    config: ServeConfig,
    model_uri: str,
    dtype: str,
    options: IngressOptions | None = None,
    ingresses: int = 1,
) -> AppArgs:
    """What the recipe's `serve` section, and the options of a command, ask of the application."""
    return AppArgs(
        **dict(options or IngressOptions()),
        ingresses=ingresses,
        model=model_uri,
        served_name=name,
        cpus_per_replica=config.cpus_per_replica,
        gpus_per_replica=config.gpus_per_replica,
        accelerator_type=config.accelerator_type,
        threads=max(1, int(config.cpus_per_replica)),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        engine=config.engine,
    )


def _deploy(
    name: str, config: ServeConfig, dtype: str, dashboard_url: str, keep: bool, context: StageContext
) -> dict[str, JSON]:
    export: Artifact = context.inputs["export"]
    control.check_can_deploy(dashboard_url, config.port, replace=keep)
    context.emit(f"starting {config.replicas} replicas")
    try:
        endpoint = control.deploy(
            app_args(name, config, export.store.uri, dtype),
            replicas=config.replicas,
            dashboard_url=dashboard_url,
            runtime_env=control.shipped_runtime_env(),
            nodes=control.cluster_nodes(),
            port=config.port,
        )
        turns = converse(f"{endpoint.url}/v1", name, config.requests, partial(_report, context))
    except BaseException:
        if not keep:  # so there was no endpoint before: what is there now is ours
            with suppress(control.ServeError):
                control.undeploy(dashboard_url=dashboard_url)
        raise
    if not keep:
        context.emit("removing the replicas")
        control.undeploy(dashboard_url=dashboard_url)
    report: dict[str, Any] = {
        "url": endpoint.url,
        "kept": keep,
        "requests": len(turns),
        "replicas": len({turn.replica for turn in turns}),
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
        "predicted_cached_tokens": sum(turn.predicted_cached_tokens for turn in turns),
        "cached_tokens": sum(turn.cached_tokens for turn in turns),
        "turns": [asdict(turn) for turn in turns],
    }
    context.run_dir.write_json(REPORT, report)
    return report


def _report(context: StageContext, turn: Turn) -> None:
    context.emit(
        f"conversation {turn.conversation + 1} turn {turn.turn + 1}: replica {turn.replica}, "
        f"{turn.prompt_tokens} prompt tokens, cached {turn.predicted_cached_tokens} predicted {turn.cached_tokens} "
        f"actual, first token after {1000 * turn.first_token_seconds:.0f} ms"
    )


def converse(
    base_url: str, model: str, config: RequestsConfig, on_turn: Callable[[Turn], None] = lambda turn: None
) -> list[Turn]:
    """Holds the recipe's conversations through the `openai` client, streaming, interleaved turn by turn.

    A conversation that fills the model's context ends there, one turn short.
    """
    from openai import BadRequestError, OpenAI  # a second to import, which only this needs

    client = OpenAI(base_url=base_url, api_key="unused", max_retries=2)
    histories: dict[int, list[dict[str, str]]] = {
        number: [{"role": "system", "content": _SYSTEM.format(topic=_topic(number))}]
        for number in range(config.conversations)
    }
    turns: list[Turn] = []
    for number in range(config.turns):
        for conversation, history in list(histories.items()):
            question = _QUESTIONS[number % len(_QUESTIONS)].format(topic=_topic(conversation))
            history.append({"role": "user", "content": question})
            try:
                turn, answer = _ask(client, model, history, config.max_tokens, conversation, number)
            except BadRequestError as error:
                if error.code != "context_length_exceeded":
                    raise
                del histories[conversation]
                continue
            history.append({"role": "assistant", "content": answer})
            turns.append(turn)
            on_turn(turn)
    return turns


def _topic(conversation: int) -> str:
    return _TOPICS[conversation % len(_TOPICS)]


def _ask(
    client: openai.OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int, conversation: int, number: int
) -> tuple[Turn, str]:
    started, first = time.perf_counter(), 0.0
    pieces: list[str] = []
    stream = client.chat.completions.create(
        model=model,
        messages=cast("list[ChatCompletionMessageParam]", messages),
        max_tokens=max_tokens,
        temperature=0.8,
        seed=conversation,
        stream=True,
        stream_options={"include_usage": True},
    )
    last: Any = None
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            pieces.append(chunk.choices[0].delta.content)
        last = chunk
    route = last.caravan
    turn = Turn(
        conversation=conversation,
        turn=number,
        replica=route["replica"],
        prompt_tokens=last.usage.prompt_tokens,
        predicted_cached_tokens=route["predicted_cached_tokens"],
        cached_tokens=route["cached_tokens"],
        completion_tokens=last.usage.completion_tokens,
        first_token_seconds=first,
    )
    return turn, "".join(pieces)
