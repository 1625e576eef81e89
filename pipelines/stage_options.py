"""The recipe's section `stages`: how a stage is run, and which stages of the user's own there are besides ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from pipelines.section import Positive, Section
from pipelines.stage import Tries

OWN_STAGES = ("ingest", "dedup", "tokenizer", "shards", "pretrain", "evaluate", "export", "deploy")
"""Names of the project's own stages. What they do is said by the recipe's other sections."""

_NAME = r"^[a-z][a-z0-9_-]{0,39}$"
_USES = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$"

StageName = Annotated[str, Field(pattern=_NAME)]


class StageOptions(Section):
    """How a stage is run, and for one of the user's own, what it is.

    Args:
        retries: tries after one that failed; seconds of wait before the first of them, doubled for each further one.
        timeout: seconds that one try may run.
        uses: `package.module:function`, found on the import path or in the folder where the run is started. It is
            called with a `StageContext` and `config`, and returns what the artifact's manifest shall say besides.
        after: the stages whose artifacts it gets.
        config: whatever its output depends on; with `version`, which is raised when its code changes, part of the key.
        always: it leaves no artifact and is run every time.
        memory: bytes. This and the numbers of CPUs and GPUs are Ray's, for the process that it runs in.
    """

    retries: Annotated[int, Field(ge=0, le=1000)] = 0
    retry_wait: Annotated[float, Field(gt=0)] = Tries().wait
    timeout: Annotated[float, Field(gt=0)] | None = None

    uses: Annotated[str, Field(pattern=_USES)] | None = None
    after: tuple[StageName, ...] = ()
    config: dict[str, Any] = {}
    version: Positive = 1
    always: bool = False
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    memory: Annotated[int, Field(ge=0)] = 0
    accelerator_type: str | None = None

    @property
    def tries(self) -> Tries:
        return Tries(self.retries, self.retry_wait, self.timeout)

    def check(self, name: str, own: Sequence[str] = OWN_STAGES) -> None:
        """Raises ValueError unless the options fit a stage of that name; `own` are the project's in this recipe."""
        if name in own:
            defaults = StageOptions()
            for key in sorted(set(StageOptions.model_fields) - {"retries", "retry_wait", "timeout"}):
                if getattr(self, key) != getattr(defaults, key):
                    raise ValueError(
                        f"stages.{name}.{key}: {name} is a stage of the project's own, for which only retries, "
                        "retry_wait and timeout are set here; leave it out, or choose another name for yours"
                    )
        elif self.uses is None:
            raise ValueError(
                f"stages.{name}.uses: missing; name its function (package.module:function), or one of the project's "
                f"own stages: {', '.join(own)}"
            )
        if self.accelerator_type is not None and self.num_gpus == 0:
            raise ValueError(
                f"stages.{name}.accelerator_type={self.accelerator_type!r} names a GPU, but stages.{name}.num_gpus=0; "
                "set it, or leave the type out"
            )
