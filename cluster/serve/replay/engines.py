"""What the replicas of a replay on Serve run: modelled engines, or real ones."""

from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replay.timing import MODELLED_ENGINE, StepTime
from llama.engine import Engine, EngineConfig
from llama.hf import load_pretrained

AnyEngine: TypeAlias = Engine | ModelledEngine


@dataclass(frozen=True)
class ModelledSpec:
    """An engine that sleeps. Make it on the event loop that it is to run on."""

    config: EngineConfig = MODELLED_ENGINE
    timing: StepTime = field(default_factory=StepTime)

    def make(self) -> AnyEngine:
        return ModelledEngine(self.config, self.timing)


@dataclass(frozen=True)
class RealSpec:
    """An engine that computes, on one thread, with the model in a folder. `weights_id` names it."""

    directory: str
    config: EngineConfig
    weights_id: str = "real"

    def make(self) -> AnyEngine:
        torch.set_num_threads(1)
        return Engine(load_pretrained(self.directory), None, self.config, weights_id=self.weights_id)


EngineSpec: TypeAlias = ModelledSpec | RealSpec
