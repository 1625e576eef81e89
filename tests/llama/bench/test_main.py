import json

import pytest

from llama.bench import train
from llama.bench.__main__ import main

pytest.importorskip("transformers")


def test_ours_and_the_peer_start_at_the_same_loss_and_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model=tiny-moe", "--precision=fp32", "--batch=1", "--seq-len=16", "--rounds=5", "--steps=1"]
    assert main(["train", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == list(train.TrainBench().contestants)
    assert report["rows"][0]["versus_peer"]["verdict"] in ("faster", "slower", "no verdict")
    assert all(row["tokens_per_second"] > 0 and row["peak_mib"] > 1 for row in report["rows"])
    assert report["losses"]["caravan"] == pytest.approx(report["losses"]["transformers"], rel=1e-5)
    assert report["expert_backend"] in ("eager", "batched_mm", "grouped_mm")


def test_contestants_that_compute_something_else_are_not_compared() -> None:
    with pytest.raises(train.BenchError, match=r"caravan starts at loss 7\.6005, transformers at 7\.6"):
        train._check_same({"caravan": 7.6005, "transformers": 7.6})


def test_the_cost_of_routing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["moe-layer", "--model=tiny-moe", "--tokens=64", "--rounds=5"]) == 0
    assert "dense of hidden size 576" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model=llama-9"], "model='llama-9' is not one of tiny"),
        (["train", "--device=gpu"], "device='gpu' is not there; use cpu"),
        (["train", "--model=llama-3-70b"], "model='llama-3-70b' takes about 3154 GiB"),
        (["train", "--rounds=2"], "rounds=2 must be at least 5"),
        (["train", "--seq-len=4096"], "seq_len=4096 is longer than small's max_seq_len=2048"),
        (["moe-layer", "--tokens=0"], "tokens=0 must be at least 1"),
        (["moe-layer", "--precision=fp16"], "precision='fp16' is not one of"),
        (["moe-layer", "--model=small"], "model='small' is not one of those with experts: tiny-moe"),
    ],
)
def test_bad_settings_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
