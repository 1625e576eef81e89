"""Evidence that the published description of the API tells the truth, and that no request makes the server fail.

    python tests/evidence/schemathesis_api.py [--examples 40] [--seed 1]

Starts a tiny model on Ray Serve and lets schemathesis, in an environment of its own (.cache/tools), send what
`/openapi.json` allows and what it forbids to every operation: bodies at the edges of every member, and random ones. All
of its checks hold: no 5xx, no answer, status, header or media type that is not described, nothing accepted that is
described as wrong. Two exceptions, of which the first is checked by tests/cluster/serve/test_openapi.py:

    positive_data_acceptance  a description cannot say which members contradict each other (`min_tokens` above
                              `max_tokens`, a regex that is none), so what it allows may be refused, with 400
    504                       is what a `timeout_s` of next to nothing asks for

Exits non-zero when something is found. About two minutes on two cores, the first time one more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama.engine import EngineConfig  # noqa: E402
from tests.evidence.schemathesis_tools import check_api  # noqa: E402
from tests.evidence.serving_tools import served  # noqa: E402

ENGINE = EngineConfig(num_blocks=12, max_batched_tokens=256, max_running=32)
"""A short context: many of the requests ask for as much as there is, 128 times."""
SETTINGS = """
[phases.stateful]
enabled = false

[checks]
positive_data_acceptance.enabled = false
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=40, help="random requests for each operation and kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with served(replicas=1, engine=ENGINE) as (url, _):
        sys.exit(check_api(f"{url}/openapi.json", SETTINGS, examples=arguments.examples, seed=arguments.seed))


if __name__ == "__main__":
    main()
