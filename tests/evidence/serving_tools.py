"""What the evidence of serving with other people's programs needs: their environments, and something to call."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.serve import control  # noqa: E402
from cluster.serve.settings import AppArgs  # noqa: E402
from llama.engine import EngineConfig  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402

MODEL = "tiny"
ENGINE = EngineConfig(num_blocks=1024, max_batched_tokens=512, max_running=32)


def environment(name: str, *packages: str) -> Path:
    """The `bin` of a virtual environment of these packages, under .cache; made anew when they change."""
    folder = REPOSITORY / ".cache" / "tools" / name
    finished = folder / "packages"
    if not finished.exists() or finished.read_text() != "\n".join(packages):
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        finished.write_text("\n".join(packages))
    return folder / "bin"


def tool_variables() -> dict[str, str]:
    """For a program of such an environment: nothing of ours on its path, nothing fetched from a hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}


@contextmanager
def served(replicas: int = 2, engine: EngineConfig = ENGINE) -> Iterator[tuple[str, Path]]:
    """A tiny random model on Ray Serve; yields the endpoint's URL and the model's directory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        model = save_tiny_model(folder / "model")
        with local_ray(folder) as dashboard_url:
            endpoint = control.deploy(
                AppArgs(model=str(model), served_name=MODEL, cpus_per_replica=0.1, engine=engine),
                replicas=replicas,
                dashboard_url=dashboard_url,
                runtime_env=control.shipped_runtime_env(),
                port=find_free_port(),
            )
            yield endpoint.url, model
