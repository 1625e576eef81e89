import json
import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama.bench import engine
from llama.bench.__main__ import main
from llama.bench.ceilings import Ceilings
from llama.bench.engine_report import Row, missed
from llama.bench.engine_settings import CHECK, MODELS, EngineBench, estimated_seconds
from llama.bench.harness import BenchError, Ratio
from llama.bench.workload import prompts
from llama.hf import load_pretrained
from llama.model import Transformer

pytest.importorskip("transformers")


def test_ours_and_transformers_get_the_same_and_are_compared_in_every_kind_of_cell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = "prefill:2x16,decode:2x32,trace"
    arguments = ["--model=tiny", "--peers=hf", f"--cells={cells}", "--generate=3", "--requests=1", "--rate=50"]
    affinity = os.sched_getaffinity(0)
    assert main(["engine", *arguments, "--require=hf=1e9", "--json"]) == 1
    assert os.sched_getaffinity(0) == affinity
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["agreement"] == {"hf": pytest.approx(1, abs=0.1)} and "minutes" in output.err
    assert [(row["cell"], row["name"]) for row in report["rows"]] == [
        (cell, name) for cell in cells.split(",") for name in ("caravan", "hf")
    ]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])
    prefill, decode, trace = report["rows"][::2]
    assert 0 < prefill["gemm_share"] < 1 and prefill["bandwidth_share"] is None
    assert 0 < decode["gemm_share"] < 1 and 0 < decode["bandwidth_share"] < 1
    assert 0 < trace["latencies"]["first_token_p50"] <= trace["latencies"]["first_token_p99"]
    (peer,) = [row for row in report["rows"] if row["name"] == "hf" and row["cell"] == "decode:2x32"]
    assert peer["ours"]["verdict"] in ("faster", "slower", "no verdict") and "cache" in peer["note"]
    assert len(report["missed"]) == 1 and report["missed"][0].startswith("decode:2x32 is ")


def test_a_peer_without_an_environment_names_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "--peers=vllm", f"--directory={tmp_path}"]) == 1
    line = f"python -m llama.bench peers vllm --directory {tmp_path}\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_peer_that_does_not_run_ends_the_bench_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An environment that is broken: it has Python and no vLLM."""
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "vllm" / "finished").touch()
    arguments = ["--model=tiny", "--cells=decode:1x16", f"--directory={tmp_path}"]
    assert main(["engine", "--peers=vllm", *arguments]) == 1
    (last,) = [line for line in capsys.readouterr().err.splitlines() if "minutes" not in line]
    assert last == "llama.bench: vllm failed: ModuleNotFoundError: No module named 'vllm'"


def test_contestants_that_compute_something_else_are_not_compared() -> None:
    ours = list(range(16))
    assert engine._check_same({"caravan": ours, "hf": [*ours[:-1], 99]}) == {"hf": 15 / 16}
    with pytest.raises(BenchError, match="vllm and caravan agree in 12% of first tokens: not the same model"):
        engine._check_same({"caravan": ours, "vllm": [0, 1, *ours[:14]]})


def test_only_decode_cells_of_the_named_peer_are_held_to_what_is_required() -> None:
    speeds = [
        ("decode:1x256", "hf", 1.4),
        ("decode:8x256", "hf", 1.6),
        ("decode:1x256", "vllm", 0.9),
        ("trace", "hf", 1),
    ]
    rows = [Row(cell, name, 1.0, ours=Ratio(*[speed] * 5)) for cell, name, speed in speeds]
    assert missed(rows, {"hf": 1.5}) == ["decode:1x256 is 1.40× hf, less than 1.5×"]
    assert missed(rows, {}) == []


def test_the_estimate_grows_with_what_is_asked_for() -> None:
    def minutes(**settings: object) -> float:
        return estimated_seconds(EngineBench(**settings), Ceilings(25.0, 100.0, 100.0)) / 60  # type: ignore[arg-type]

    assert minutes() < 10
    assert minutes() < minutes(rounds=10) and minutes() < minutes(peers="hf") < minutes(peers="hf,vllm")
    assert minutes(cells="decode:8x256") < minutes(cells="decode:8x1024") < minutes(cells="decode")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=7b"], "model='7b' is not one of 27m, 210m"),
        (["--peers=hf,sglang"], "peers='sglang' is not one of hf, llamacpp, vllm"),
        (["--rounds=3"], "rounds=3 must be at least 5"),
        (["--threads=100000"], "threads=100000 is more than the"),
        (["--cells=decode:1x4096"], "take 4136 tokens and 27m has 2048"),
        (["--rate=nan"], "rate=nan is not a rate"),
        (["--peers=hf", "--require=hf"], "require='hf' is not a peer and a number such as hf=1.5"),
        (["--peers=hf", "--require=vllm=1"], "require='vllm' is not among peers='hf'"),
        (["--peers=hf", "--require=hf=1.5", "--cells=trace"], "has none"),
    ],
)
def test_bad_settings_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_peer_of_our_own_environment_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", "hf"]) == 1
    assert "peer='hf' has no environment of its own; choose of llamacpp, vllm" in capsys.readouterr().err


def test_the_weights_tell_right_rotations_from_wrong_ones() -> None:
    config = MODELS["27m"]
    with engine._exported(config) as directory:
        right = load_pretrained(directory)
    wrong = Transformer(replace(config, rope_layout="interleaved"))
    wrong.load_state_dict(right.state_dict())
    ids_BT = torch.tensor(prompts(CHECK, config.vocab_size))
    with torch.inference_mode():
        tokens, bf16, others = (
            model.eval()(ids_BT)[:, -1].argmax(-1).tolist() for model in (right, deepcopy(right).bfloat16(), wrong)
        )
    assert engine._check_same({"caravan": tokens, "hf": bf16})["hf"] > 0.85
    with pytest.raises(BenchError, match="not the same model"):
        engine._check_same({"caravan": tokens, "hf": others})
