import json
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from pipelines.bench import data, tokenizers
from pipelines.cli_bench import bench


def test_memory_takes_no_rounds() -> None:
    result = CliRunner().invoke(bench, ["data", "--memory", "--rounds", "7"])
    assert result.exit_code == 1 and not result.stdout
    assert "--rounds=7 has no effect with --memory" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "rounds"), [([], 5), (["--memory"], 5), (["--rounds", "6"], 6)])
def test_rounds_unless_given(arguments: list[str], rounds: int) -> None:
    with patch.object(data, "measure") as measure, patch.object(data, "as_text", return_value="table"):
        assert CliRunner().invoke(bench, ["data", *arguments]).exit_code == 0
    assert measure.call_args.args[0].rounds == rounds


def test_progress_goes_to_stderr() -> None:
    result = CliRunner().invoke(
        bench, ["tokenizers", "--vocab-size", "300", "--megabytes", "0.02", "--json"], catch_exceptions=False
    )
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == list(tokenizers.KINDS)
    assert "unigram: learning from" in result.stderr and "bpe: round 5 of 5" in result.stderr
