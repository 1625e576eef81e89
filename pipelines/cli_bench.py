"""The `caravan bench` commands."""

from __future__ import annotations

import signal
from typing import Annotated, Any, Literal

import typer

from pipelines.screen import JsonOption, err, fail, out, print_json, terminate

bench = typer.Typer(
    help="Measures Caravan beside the libraries one would otherwise use, both in the same run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RoundsOption = Annotated[int, typer.Option(help="At least 5.")]


@bench.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help="Preset: small, small-moe, ...")] = "small",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="bf16 or fp32")] = "bf16",
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    rounds: RoundsOption = 7,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a contestant in each round.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="With train.compile.")] = False,
    expert_backend: Annotated[
        str, typer.Option(help="The peer's experts backend [default: the fastest by trial]")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Times a training step beside Hugging Face transformers', interleaved in one run; needs no cluster."""
    from llama.bench import train

    signal.signal(signal.SIGTERM, terminate)
    report = train.measure(
        train.TrainBench(model, precision, batch, accumulate, seq_len, rounds, steps, threads, device)
    )
    _print(train.as_json(report) if as_json else train.as_text(report))


@bench.command("engine")
def bench_engine(
    model: Annotated[str, typer.Option(help="27m, 210m or a preset.")] = "27m",
    peers: Annotated[str, typer.Option(help="Any of hf, llamacpp, vllm, with commas.")] = "",
    cells: Annotated[str, typer.Option(help="Such as decode:8x1024,prefill,trace [default: all]")] = "",
    rounds: RoundsOption = 5,
    generate: Annotated[int, typer.Option(help="Steps of a decode cell.")] = 32,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    requests: Annotated[int, typer.Option(help="Requests of the trace.")] = 32,
    rate: Annotated[float, typer.Option(help="Its arrivals a second [default: what suits the model]")] = 0.0,
    directory: Annotated[str, typer.Option(help="Folder of the peers' environments.")] = ".cache/peers",
    require: Annotated[
        str, typer.Option(help="Least speed over a peer in every decode cell, such as hf=1.5; less exits with 1.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Times the inference engine beside transformers, llama.cpp and vLLM, interleaved in one run; needs no cluster."""
    from llama.bench import engine

    signal.signal(signal.SIGTERM, terminate)
    settings = engine.EngineBench(model, peers, cells, rounds, generate, threads, requests, rate, directory, require)
    report = engine.measure(settings, _say)
    _print(engine.as_json(report) if as_json else engine.as_text(report))
    if report.missed:
        raise typer.Exit(1)


@bench.command("data")
def bench_data(
    megabytes: Annotated[int, typer.Option(help="Text to encode, pack and write, 10⁶ bytes each.")] = 200,
    rounds: Annotated[int | None, typer.Option(help="At least 5.", show_default="5")] = None,
    workers: Annotated[int, typer.Option(help="CPUs of the local Ray, and threads of the peer.")] = 2,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the BPE.")] = 16_384,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    memory: Annotated[bool, typer.Option("--memory", help="One turn each, for the memory alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Times the shards stage beside plain tokenizers and pyarrow, interleaved in one run, on a local Ray of its own."""
    from pipelines.bench import data

    if memory and rounds is not None:
        fail(f"--rounds={rounds} has no effect with --memory, where each takes one turn; leave one of the two out")
    rounds = data.DataBench.rounds if rounds is None else rounds
    settings = data.DataBench(megabytes, rounds, workers, vocab_size, seq_len, memory_only=memory)
    signal.signal(signal.SIGTERM, terminate)
    report = data.measure(settings, _say)
    _print(data.as_json(report) if as_json else data.as_text(report))


@bench.command("checkpoint")
def bench_checkpoint(
    model: Annotated[str, typer.Option(help="Preset: tiny, small, ...")] = "small",
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    rounds: RoundsOption = 10,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    store: Annotated[str, typer.Option(help="Folder or URI to write to [default: a temporary folder]")] = "",
    as_json: JsonOption = False,
) -> None:
    """Times training steps without, with asynchronous and with synchronous checkpoints, interleaved; needs no
    cluster."""
    from pipelines.bench import checkpoint

    signal.signal(signal.SIGTERM, terminate)
    report = checkpoint.measure(checkpoint.CheckpointBench(model, batch, seq_len, every, rounds, threads, store), _say)
    _print(checkpoint.as_json(report) if as_json else checkpoint.as_text(report))


@bench.command("tokenizers")
def bench_tokenizers(
    text: Annotated[
        list[str] | None, typer.Option(help="NAME=URI of a text to add, or in place of english, chinese or code.")
    ] = None,
    tokenizer: Annotated[
        list[str] | None, typer.Option(help="An existing tokenizer to add: its folder or tokenizer.json.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of those that are learned.")] = 8192,
    megabytes: Annotated[float, typer.Option(help="Of each text at most, 10⁶ bytes each.")] = 4.0,
    rounds: RoundsOption = 5,
    as_json: JsonOption = False,
) -> None:
    """Trains BPE, WordPiece and Unigram on one sample and compares them on held-out text; needs no cluster."""
    from pipelines.bench import tokenizers

    texts = [entry.partition("=") for entry in text or []]
    for name, equals, uri in texts:
        if not (name and equals and uri):
            fail(f"--text {name + equals + uri!r} is not of the form NAME=URI")
    settings = tokenizers.TokenizerBench(
        tuple((name, uri) for name, _, uri in texts), tuple(tokenizer or ()), vocab_size, megabytes, rounds
    )
    report = tokenizers.measure(settings, _say)
    _print(tokenizers.as_json(report) if as_json else tokenizers.as_text(report))


@bench.command("router")
def bench_router(
    trace: Annotated[str | None, typer.Option(help="File in Mooncake's format [default: one is made up]")] = None,
    replicas: Annotated[int, typer.Option(help="Replicas of every policy.")] = 4,
    mode: Annotated[Literal["sim", "modelled", "real"], typer.Option(help="sim, modelled or real")] = "sim",
    seconds: Annotated[float | None, typer.Option(help="Of traffic, at most.", show_default="no limit")] = None,
    requests: Annotated[int, typer.Option(help="The trace's first ones, at most.")] = 1500,
    policies: Annotated[str, typer.Option(help="Such as caravan,prefix_affinity [default: all]")] = "",
    load: Annotated[float, typer.Option(help="Offered work over what the replicas can do.")] = 0.8,
    stamps: Annotated[
        Literal["raw", "spread"], typer.Option(help="As recorded, in bursts, or spread inside their 3 s grid.")
    ] = "raw",
    burst: Annotated[int, typer.Option(help="Requests that come at once in a trace that is made up.")] = 1,
    deadline: Annotated[float, typer.Option(help="Seconds to the first token, for goodput.")] = 5.0,
    repeat: Annotated[int, typer.Option(help="Runs of caravan and of the best peer, to know the noise.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes of sim [default: one on each CPU]", show_default=False)] = 0,
    together: Annotated[int, typer.Option(help="Policies that run on Serve at a time.")] = 3,
    peers_settings: Annotated[
        Literal["all", "best"],
        typer.Option("--settings", help="Of a class; on Serve, only the best of sim if told so."),
    ] = "all",
    model: Annotated[str | None, typer.Option(help="Of real engines [default: a small random one]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Replays a trace under several routing policies, Ray's own beside Caravan's."""
    from pipelines.bench import router
    from pipelines.bench.router_report import as_text

    names = tuple(name.strip() for name in policies.split(",") if name.strip())
    wanted = router.RouterBench(
        trace=trace,
        replicas=replicas,
        mode=mode,
        seconds=seconds,
        requests=requests,
        policies=names,
        load=load,
        stamps=stamps,
        burst=burst,
        deadline=deadline,
        repeat=repeat,
        seed=seed,
        jobs=jobs,
        together=together,
        settings=peers_settings,
        model=model,
    )
    signal.signal(signal.SIGTERM, terminate)
    report = router.measure(wanted, _say)
    _print(report if as_json else as_text(report))


def _say(message: str) -> None:
    """Progress, on stderr: stdout is the result's alone."""
    err.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


def _print(report: dict[str, Any] | str) -> None:
    if isinstance(report, str):
        out.print(report, markup=False, highlight=False, soft_wrap=True)
    else:
        print_json(report)
