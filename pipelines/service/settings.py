"""What an operator sets of the service, and the service made of it. The same for both shells, actor.py and app.py."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from cluster.storage import Store, has_credentials
from pipelines.section import Section
from pipelines.service.policy import RecipePolicy
from pipelines.service.queue import QueuePolicy
from pipelines.webhook import Allowed, Receiver, WebhookError, Webhooks, of_files, read_secret


class ServiceSettings(Section):
    """`store` is where runs and artifacts are."""

    model_config = ConfigDict(hide_input_in_errors=True)
    """A webhook's path may be a secret in itself."""

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
    webhooks: Annotated[tuple[str, ...], Field(repr=False)] = ()
    """URLs that are told what happens to submitted runs (pipelines/webhook.py)."""
    webhook_secret_file: str | None = None
    """Holds the secret that deliveries are signed with; read when the service starts."""
    webhook_allow: tuple[str, ...] = ()
    """Networks that webhooks may reach, besides public addresses: 10.1.0.0/16."""
    webhook_loopback_http: bool = False
    """Webhooks may be plain http to the loopback of the service's machine."""

    @model_validator(mode="after")
    def _places_are_places(self) -> Self:
        if any(has_credentials(uri) for uri in (self.store, *self.allow)):
            raise ValueError("a URI carries credentials; put them in the environment of the cluster's nodes")
        self.recipes()
        return self

    @model_validator(mode="after")
    def _webhooks_can_be_told(self) -> Self:
        """Raises WebhookError, a ValueError."""
        if self.webhooks and self.webhook_secret_file is None:
            raise WebhookError("webhooks need webhook_secret_file, for deliveries are signed; name the secret's file")
        if not self.webhooks and (self.webhook_secret_file or self.webhook_allow or self.webhook_loopback_http):
            raise WebhookError("webhook_* settings without webhooks; name a URL, or leave them out")
        allowed = Allowed.of(self.webhook_allow, self.webhook_loopback_http)
        for url in self.webhooks:
            Receiver.parse(url, allowed)
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

    def told(self) -> Webhooks:
        """The receivers, of which there may be none. Raises WebhookError."""
        if self.webhook_secret_file is None:
            return Webhooks((), b"")
        return of_files(self.webhooks, self.webhook_secret_file, self.webhook_allow, self.webhook_loopback_http)

    def check_files(self) -> None:
        """Whether both secrets can be read, here. Raises TokenError, WebhookError."""
        self.token()
        if self.webhook_secret_file is not None:
            read_secret(self.webhook_secret_file)
