"""Serve's REST interface, through Ray's own client: it knows the cluster's authentication."""

from typing import Any

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.dashboard.utils import ray_address_to_api_server_url

from cluster.serve.errors import DeployFailed, ServeError, last_line


class ServeClient(ServeSubmissionClient):
    """`GET`, `PUT` and scaling of applications; errors in one line."""

    @classmethod
    def of_this_cluster(cls) -> "ServeClient":
        """From inside the cluster. Raises ValueError, RuntimeError or OSError when the dashboard does not answer."""
        return cls(ray_address_to_api_server_url(ray.get_runtime_context().gcs_address))

    def details(self) -> dict[str, Any]:
        """What Serve says of itself and its applications. Raises ServeError when it does not answer."""
        try:
            return self.get_serve_details()
        except (RuntimeError, OSError) as error:
            raise ServeError(f"Serve does not answer: {last_line(str(error))}") from error

    def declare(self, apps: dict[str, dict[str, Any]], http_options: dict[str, Any]) -> None:
        """States which applications run. Raises DeployFailed when Serve refuses."""
        # HeadOnly: the endpoint is one address; proxies on other nodes would be more of them.
        config = {"proxy_location": "HeadOnly", "http_options": http_options, "applications": list(apps.values())}
        try:
            self.deploy_applications(config)
        except RuntimeError as error:
            raise DeployFailed(f"Serve refuses the application: {last_line(str(error))}") from error

    def scale(self, app: str, deployment: str, replicas: int) -> None:
        """Sets a deployment's number of replicas. Raises DeployFailed when Serve refuses."""
        path = f"/api/v1/applications/{app}/deployments/{deployment}/scale"
        response = self._do_request("POST", path, json_data={"target_num_replicas": replicas})
        if response.status_code != 200:
            raise DeployFailed(f"Serve refuses to scale {app} to {replicas} replicas: {response.text}")
