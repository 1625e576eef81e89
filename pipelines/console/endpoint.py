"""The endpoint that is deployed on the cluster, for the console: looked at and scaled."""

from __future__ import annotations

import time

from cluster.serve import control
from pipelines.serve_status import Look, look


class Endpoints:
    """`dashboard_url`: of the Ray cluster that serves."""

    def __init__(self, dashboard_url: str) -> None:
        self._dashboard_url = dashboard_url

    def look(self, api_key: str | None, before: Look | None) -> Look:
        """The application now; speeds are told from the look `before`. Raises ServeError, NotDeployed of them."""
        return look(control.status(dashboard_url=self._dashboard_url, api_key=api_key), time.monotonic(), before)

    def scale(self, replicas: int) -> bool:
        """Once they are there; whether autoscaling was on. Raises ServeError, and ValueError below 1."""
        return control.scale(replicas, dashboard_url=self._dashboard_url)
