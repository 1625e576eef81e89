"""A Ray of our own on loopback, for the tests and the evidence of serving."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants

from cluster.head import prepare_environment
from tests.conftest import find_free_port

ROOT = Path(__file__).parents[3]


@contextmanager
def local_ray(folder: Path, num_cpus: int = 2, modules: Sequence[Path] = ()) -> Iterator[str]:
    """With fake GPUs; yields the dashboard's URL. `modules`: packages that its workers get beside ours."""
    with pytest.MonkeyPatch.context() as patch:
        # Not in the repository: Ray's processes must find our packages because they are shipped, not by accident.
        patch.chdir(folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)  # put back at the end
        prepare_environment(loopback=True)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(_without_repository()))
        port = find_free_port()
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            num_cpus=num_cpus,
            num_gpus=3,
            resources={"accelerator_type:T4": 1},
            runtime_env={"py_modules": [str(ROOT / "llama"), str(ROOT / "cluster"), *map(str, modules)]},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()


def _without_repository() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
