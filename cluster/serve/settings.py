"""What a user sets of serving. Imports no Ray, so that it can be read before Ray is configured."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.serve.cost import CostCoefficients
from llama.engine import EngineConfig

APP_NAME = "caravan"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"


class AppArgs(BaseModel):
    """What is served and how, and what each replica asks of Ray.

    `model`: URI of a Hugging Face directory or of a committed export. `served_name`: its name in the API. `threads`:
    torch threads of a replica on the CPU. `accelerator_type`: Ray's name of a GPU, such as `H200`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    served_name: str = Field(default="caravan", min_length=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    engine: EngineConfig = EngineConfig()
    cost: CostCoefficients = CostCoefficients()


class BuildArgs(AppArgs):
    """What `cluster.serve.app.build` takes. `replicas`: how many there are at the start."""

    replicas: int = Field(ge=1)
