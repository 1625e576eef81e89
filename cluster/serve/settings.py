"""What a user sets of serving. Imports no Ray, so that it can be read before Ray is configured."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cluster.serve.cost import CostCoefficients
from llama.engine import EngineConfig

APP_NAME = "caravan"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"


class AppArgs(BaseModel):
    """What is served and how, and what each replica asks of Ray.

    `model`: URI of a Hugging Face directory or of a committed export; no credentials in it, for Ray keeps and shows
    these settings. `served_name`: its name in the API. `threads`:
    torch threads of a replica on the CPU. `accelerator_type`: Ray's name of a GPU, such as `H200`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

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
    def _has_no_credentials(cls, model: str) -> str:
        parts = urlsplit(model) if "://" in model else None
        credentials, _, host = parts.netloc.rpartition("@") if parts else ("", "", "")
        if parts and credentials not in ("", "anonymous"):
            raise ValueError(
                f"model={parts.scheme}://***@{host}{parts.path} carries credentials; leave them out and set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on the cluster's nodes"
            )
        return model


class BuildArgs(AppArgs):
    """What `cluster.serve.app.build` takes. `replicas`: how many there are at the start."""

    replicas: int = Field(ge=1)
