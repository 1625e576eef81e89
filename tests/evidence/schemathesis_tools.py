"""schemathesis in an environment of its own (.cache/tools): what the evidence of both APIs has in common."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.evidence.serving_tools import environment, tool_variables

PACKAGES = ("schemathesis==4.32.5",)
# Python 3.11 cannot parse in two threads, as hypothesis does (CPython 106905)
_COMMON = """
workers = 1
request-timeout = 300
headers = {{ {headers} }}

[generation]
max-examples = {examples}
"""


def check_api(description: str, settings: str, *, examples: int, seed: int, token: str | None = None) -> int:
    """Sends what the description at this URL allows and forbids to every operation, with these settings (TOML) beside
    the common ones; returns the exit code, 0 when nothing is found."""
    headers = f'Authorization = "Bearer {token}"' if token else ""
    programs = environment("schemathesis", *PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "schemathesis.toml")
        config.write_text(_COMMON.format(examples=examples, headers=headers) + settings)
        command = [programs / "schemathesis", "--config-file", config, "run", description]
        command += ["--continue-on-failure", "--seed", str(seed), "--no-color"]
        return subprocess.run(command, cwd=folder, env=tool_variables(), check=False).returncode
