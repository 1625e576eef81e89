"""A small sweep for the tests."""

from typing import Any

import yaml

from pipelines.sweep.config import SweepConfig

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": [{"uri": "stdlib"}]},
    "tokenizer": {"vocab_size": 300},
    "model": {"dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64},
    "train": {
        "steps": 4,
        "global_batch": 2,
        "micro_batch": 2,
        "seq_len": 32,
        "schedule": {"warmup_steps": 1},
        "validate_every": 2,
    },
}


def sweep(**keys: Any) -> SweepConfig:
    given = {"name": "s", "recipe": RECIPE, "grid": {"model.norm": ["rmsnorm", "layernorm"]}, "seeds": [0, 1], **keys}
    return SweepConfig.from_yaml(yaml.safe_dump(given))
