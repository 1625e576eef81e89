"""Commands of `caravan` in the process of the test."""

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.pipelines.test_cli import run_cli


def type_here(home: Path, *arguments: object, code: int = 0) -> str:
    """What a command prints, on stderr if it fails as `code` says it must: for a command that only asks or tells
    another process. One of its own would take seconds, to import what is here already."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("CARAVAN_HOME", str(home))
        ended = run_cli(patch, *arguments)
    assert ended == code, err.getvalue()
    return (err if code else out).getvalue()
