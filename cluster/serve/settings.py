"""What a user sets of serving. Imports no Ray, so that it can be read before Ray is configured."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.serve.cost import CostCoefficients
from llama.engine import EngineConfig

APP_NAME = "caravan"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"
ROUTER = "cluster.serve.router.CacheAwareRouter"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class BuildArgs(_Settings):
    """What `cluster.serve.app.build` takes: what cannot change while the processes run.

    `model`: URI of a Hugging Face directory or of a committed export; no credentials in it, for Ray keeps and shows
    these settings. `served_name`: its name in the API. `threads`:
    torch threads of a replica on the CPU. `accelerator_type`: Ray's name of a GPU, such as `H200`.
    """

    model: str
    served_name: str = Field(default="caravan", min_length=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    engine: EngineConfig = EngineConfig()
    cost: CostCoefficients = CostCoefficients()

    @field_validator("model")
    @classmethod
    def _model_has_no_credentials(cls, model: str) -> str:
        return without_credentials("model", model)


class IngressOptions(_Settings):
    """What every ingress process obeys from the moment it changes; no process restarts for it.

    `api_keys`: URI of the file of keys; None: no key is asked for. `cors_origins`: web origins that may call.
    `max_wait_s`: seconds that a request may be predicted to wait for its first token, where it does not say so itself.
    `min_replicas`, `max_replicas`: between which the number of replicas follows the load; None: it does not. `listen`:
    host and port that they answer on themselves (see cluster/serve/listener.py); None: Serve's proxy alone answers.
    """

    api_keys: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_wait_s: float | None = Field(default=None, gt=0)
    min_replicas: int | None = Field(default=None, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    listen: tuple[str, int] | None = None

    @field_validator("api_keys")
    @classmethod
    def _keys_have_no_credentials(cls, api_keys: str | None) -> str | None:
        return None if api_keys is None else without_credentials("api_keys", api_keys)

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_exact(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_origin, origins))

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        low, high = self.min_replicas, self.max_replicas
        if (low is None) != (high is None):
            raise ValueError(f"min_replicas={low} and max_replicas={high}: give both, or neither")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_replicas={low} is more than max_replicas={high}; exchange them")
        return self


class EngineOptions(_Settings):
    """What every replica has loaded, or loads while it runs. `revision` tells apart two loads from the same place."""

    model: str
    revision: int = 0


class AppArgs(BuildArgs, IngressOptions):
    """All that is set of an application. `ingresses`: processes that answer HTTP, each with a router of its own."""

    ingresses: int = Field(default=1, ge=1)

    def build_args(self) -> BuildArgs:
        return BuildArgs(**{name: getattr(self, name) for name in BuildArgs.model_fields})

    def ingress_options(self) -> IngressOptions:
        return IngressOptions(**{name: getattr(self, name) for name in IngressOptions.model_fields})


def without_credentials(name: str, uri: str) -> str:
    """`uri`, unless it carries credentials. Raises ValueError, which does not show them."""
    parts = urlsplit(uri) if "://" in uri else None
    credentials, _, host = parts.netloc.rpartition("@") if parts else ("", "", "")
    if parts and credentials not in ("", "anonymous"):
        raise ValueError(
            f"{name}={parts.scheme}://***@{host}{parts.path} carries credentials; leave them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on the cluster's nodes"
        )
    return uri


def check_origin(origin: str) -> str:
    """Raises ValueError unless it is one exact origin, as a browser sends it: `https://chat.example.org`."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or origin != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(f"cors_origins: {origin!r} is no origin; write it as https://host or https://host:port")
    if "*" in origin or "@" in origin or origin != origin.lower():
        raise ValueError(f"cors_origins: {origin!r} is not exact; name each origin, in lower case")
    return origin
