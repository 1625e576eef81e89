"""Evidence that the published description of the service's API tells the truth, and that no request makes it fail.

    python tests/evidence/schemathesis_service.py [--part listener | cluster] [--examples 40] [--seed 1]

Lets schemathesis, in an environment of its own (.cache/tools), send what `/api/openapi.json` allows and what it forbids
to every operation of a service with a token, and follow its answers from one operation to the next, as far as the
deletion of a run. All of its checks hold: no 5xx, no answer, status, header or media type that is not described,
nothing accepted that is described as wrong, nothing refused that is described as right, other methods answered with 405
and the right `Allow`, nothing done without the token, no run found that was deleted, none lost that was made.

    listener   the application behind uvicorn on loopback, over a local store; its jobs begin and end without a cluster
    cluster    the service of `caravan up`, whose runs are jobs of a Ray cluster; a tenth of the examples

One exception: whether a recipe can be run no description can say, so `POST /api/runs` may refuse with 400 what it
allows. Exits non-zero when something is found. About four minutes on two cores, the first time one more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import uvicorn  # noqa: E402

from cluster.storage import Store  # noqa: E402
from pipelines.runs import RunError  # noqa: E402
from pipelines.service.api import build_api  # noqa: E402
from pipelines.service.loop import Orchestrator  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.schemathesis_tools import check_api  # noqa: E402
from tests.pipelines.service.fakes import FakeCluster  # noqa: E402

TOKEN = "only-for-this-evidence"
SETTINGS = """
[[operations]]
include-name = "POST /api/runs"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "409"]
"""


@contextmanager
def listening(folder: Path) -> Iterator[str]:
    """The service over a store in the folder; its jobs take half a second."""
    store = Store(folder / "store")
    cluster = FakeCluster(store)
    service = Orchestrator(store, cluster, cluster, tick_seconds=0.1)
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.5):
            for job in cluster.live():
                try:
                    cluster.begin(job.id) if job.status == "PENDING" else cluster.end(job.id)
                except RunError:  # deleted meanwhile
                    cluster.set(job.id, "STOPPED")

    config = uvicorn.Config(
        build_api(service, TOKEN, local_only=True), port=find_free_port(), log_level="warning", ws="none"
    )
    server = uvicorn.Server(config)
    threads = [threading.Thread(target=work), threading.Thread(target=server.run)]
    service.start()
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        over.set()
        server.should_exit = True
        for thread in threads:
            thread.join()
        service.close()


@contextmanager
def on_a_cluster(folder: Path) -> Iterator[str]:
    """The service of `caravan up`."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["CARAVAN_HOME"] = str(folder / "home")
    caravan = [sys.executable, "-m", "pipelines.cli"]

    def run(*words: str) -> str:
        line = [*caravan, *words]
        return subprocess.run(
            line, env=environment, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    record = json.loads(run("up", "--num-cpus", "2", "--token-file", str(token), "--json"))
    try:
        yield record["service_url"]
    finally:
        run("down")


PARTS = {"listener": (listening, 1.0), "cluster": (on_a_cluster, 0.1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--examples", type=int, default=40, help="random requests for each operation and kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failed = []
    for part in arguments.part or PARTS:
        serve, share = PARTS[part]
        with tempfile.TemporaryDirectory() as folder, serve(Path(folder).resolve()) as url:
            examples = max(1, round(share * arguments.examples))
            if check_api(f"{url}/api/openapi.json", SETTINGS, examples=examples, seed=arguments.seed, token=TOKEN):
                failed.append(part)
    sys.exit(f"schemathesis found something: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
