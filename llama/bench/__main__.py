"""`python -m llama.bench train|moe-layer|engine`: the benchmarks of model and engine, without Ray."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.bench import engine, moe_layer, peers, train
from llama.bench.harness import BenchError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llama.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, settings, text in (
        ("train", train.TrainBench, "a training step beside Hugging Face transformers'"),
        ("moe-layer", moe_layer.MoELayerBench, "a MoE layer beside a dense one of the same active FLOPs"),
        ("engine", engine.EngineBench, "the inference engine beside transformers, llama.cpp and vLLM"),
    ):
        command = commands.add_parser(name, help=text)
        for field in fields(settings):
            option = f"--{field.name.replace('_', '-')}"
            if isinstance(field.default, bool):
                command.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
                continue
            command.add_argument(option, type=type(field.default), default=field.default, help=f"[{field.default}]")
        command.add_argument("--json", action="store_true", help="print JSON")
    environments = commands.add_parser("peers", help="make the environments of the engine's peers, with pip")
    environments.add_argument("names", nargs="+", metavar="NAME", help="llamacpp (a build of some minutes), vllm")
    environments.add_argument("--directory", type=Path, default=peers.DIRECTORY, help=f"[{peers.DIRECTORY}]")
    # A contestant's process is this command again.
    alone = commands.choices["train"]
    alone.add_argument("--only", choices=train.ALL, help=argparse.SUPPRESS)
    alone.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser


def _settings(kind: Any, options: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "moe-layer":
            layer_report = moe_layer.measure(_settings(moe_layer.MoELayerBench, options))
            print(json.dumps(moe_layer.as_json(layer_report)) if options.json else moe_layer.as_text(layer_report))
            return 0
        if options.command == "peers":
            for name in options.names:
                print(peers.make(name, options.directory))
            return 0
        if options.command == "engine":
            engine_report = engine.measure(_settings(engine.EngineBench, options), _say)
            print(json.dumps(engine.as_json(engine_report)) if options.json else engine.as_text(engine_report))
            return 1 if engine_report.missed else 0
        bench = _settings(train.TrainBench, options)
        if options.only:
            train.compete(bench, options.only, options.directory)
            return 0
        report = train.measure(bench)
        print(json.dumps(train.as_json(report)) if options.json else train.as_text(report))
        return 0
    except KeyboardInterrupt:
        return 130
    except BenchError as error:
        print(f"llama.bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # A signal unwinds the stack, which ends the contestants and removes their weights.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
