"""Serve's REST interface, through Ray's own client: it knows the cluster's authentication."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.dashboard.utils import ray_address_to_api_server_url

from cluster.serve.errors import DeployFailed, ServeError, telling_line

ANSWER_S = 120.0
"""A dashboard that hangs is not waited for longer. Serve itself gives its proxies a minute to start."""


class ServeClient(ServeSubmissionClient):
    """`GET`, `PUT` and scaling of applications; errors in one line."""

    @classmethod
    def of_this_cluster(cls) -> "ServeClient":
        """From inside the cluster. Raises ValueError, RuntimeError or OSError when the dashboard does not answer."""
        return cls(ray_address_to_api_server_url(ray.get_runtime_context().gcs_address))

    def details(self) -> dict[str, Any]:
        """What Serve says of itself and its applications. Raises ServeError when it does not answer."""
        with _in_one_line("Serve does not answer", ServeError):
            return self.get_serve_details()

    def declare(self, apps: dict[str, dict[str, Any]], http_options: dict[str, Any]) -> None:
        """States which applications run. Raises DeployFailed when Serve refuses, ServeError when it does not answer."""
        # HeadOnly: the endpoint is one address; proxies on other nodes would be more of them.
        config = {"proxy_location": "HeadOnly", "http_options": http_options, "applications": list(apps.values())}
        with _in_one_line("Serve refuses the application", DeployFailed):
            self.deploy_applications(config)

    def scale(self, app: str, deployment: str, replicas: int) -> None:
        """Sets a deployment's number of replicas. Raises DeployFailed when Serve refuses, ServeError when it does not
        answer."""
        path = f"/api/v1/applications/{app}/deployments/{deployment}/scale"
        with _in_one_line(f"Serve refuses to scale {app} to {replicas} replicas", DeployFailed):
            response = self._do_request("POST", path, json_data={"target_num_replicas": replicas})
            if response.status_code != 200:
                self._raise_error(response)

    def remove_all(self) -> None:
        """Ends every application, and Serve. Raises ServeError when it does not."""
        with _in_one_line("Serve does not end", ServeError):
            self.delete_applications()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": ANSWER_S, **options})


@contextmanager
def _in_one_line(what: str, refusal: type[ServeError]) -> Iterator[None]:
    """Ray's client raises RuntimeError for an answer that says no, and an OSError when there is none."""
    try:
        yield
    except OSError as error:
        raise ServeError(f"the Ray dashboard does not answer: {telling_line(str(error))}; see that it runs") from error
    except RuntimeError as error:
        raise refusal(f"{what}: {telling_line(str(error))}") from error
