"""What an operator sets of the service, and the service made of it. The same for both shells, actor.py and app.py."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from cluster.storage import Store, has_credentials
from pipelines.section import Section
from pipelines.service.policy import RecipePolicy
from pipelines.service.queue import QueuePolicy


class ServiceSettings(Section):
    """`store` is where runs and artifacts are."""

    store: Annotated[str, Field(min_length=1)]
    token_file: str | None = None
    """Holds the token that everything but the health check needs; read when the service starts."""
    allow: tuple[str, ...] = ()
    """Places whose files a recipe may name, besides the standard library and the store."""
    modules: tuple[str, ...] = ()
    """Python modules whose functions a recipe's own stages may be."""
    caps: dict[str, Annotated[int, Field(ge=1)]] = {}
    """At most so many runs at once for each value of a tag: {user: 2}."""
    ageing_seconds: Annotated[float, Field(gt=0)] = QueuePolicy().ageing_seconds
    """A run that waits gains one step of priority in each such time."""
    may_grow_to: dict[str, Annotated[float, Field(ge=0)]] = {}
    """What an autoscaler makes of the cluster at most, by resource: {CPU: 256, GPU: 32}."""

    @model_validator(mode="after")
    def _places_are_places(self) -> Self:
        if any(has_credentials(uri) for uri in (self.store, *self.allow)):
            raise ValueError("a URI carries credentials; put them in the environment of the cluster's nodes")
        self.recipes()
        return self

    def queue(self) -> QueuePolicy:
        return QueuePolicy(dict(self.caps), self.ageing_seconds)

    def recipes(self) -> RecipePolicy:
        """Raises LocationError, a ValueError, for a place that is none."""
        return RecipePolicy(Store(self.store).uri, self.allow, self.modules)

    def token(self) -> str | None:
        """Raises TokenError."""
        from pipelines.service.door import read_token

        return None if self.token_file is None else read_token(self.token_file)
