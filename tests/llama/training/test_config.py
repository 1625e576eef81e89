from dataclasses import asdict, replace

import pytest
from pydantic import TypeAdapter, ValidationError

from llama.lora import LoraConfig
from llama.training.config import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig


def test_accumulation_fills_the_global_batch():
    config = TrainConfig(global_batch=48, micro_batch=4)
    assert [config.accumulation_steps(world_size) for world_size in (1, 2, 3, 12)] == [12, 6, 4, 1]


def test_a_global_batch_that_does_not_split_names_its_fields():
    with pytest.raises(ValueError, match=r"train\.global_batch=16 .*train\.micro_batch=8 times 3 workers.*24"):
        TrainConfig(global_batch=16, micro_batch=8).accumulation_steps(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(lr=0), r"train\.optimizer\.lr=0"),
        (lambda: OptimizerConfig(beta2=1.0), r"train\.optimizer\.beta2=1\.0"),
        (lambda: OptimizerConfig(grad_clip=-1), r"train\.optimizer\.grad_clip=-1"),
        (lambda: OptimizerConfig(kind="sgd"), r"train\.optimizer\.kind='sgd'.*adamw"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(momentum=0.9), r"train\.optimizer\.momentum=0\.9 is Muon's"),
        (lambda: OptimizerConfig(skip_sigma=-1), r"train\.optimizer\.skip_sigma=-1"),
        (lambda: OptimizerConfig(skip_sigma=6, skip_window=3), r"train\.optimizer\.skip_window=3"),
        (lambda: OptimizerConfig(skip_window=64), r"train\.optimizer\.skip_window=64 has no use"),
        (lambda: ScheduleConfig(kind="wsd", decay_ratio=0), r"train\.schedule\.decay_ratio=0"),
        (lambda: ScheduleConfig(decay_ratio=0.2), r"train\.schedule\.decay_ratio=0\.2 .*kind=wsd"),
        (lambda: ScheduleConfig(warmup_steps=-1), r"train\.schedule\.warmup_steps=-1"),
        (lambda: ScheduleConfig(min_lr_ratio=2), r"train\.schedule\.min_lr_ratio=2"),
        (lambda: ScheduleConfig(kind="constant", min_lr_ratio=0.5), r"train\.schedule\.min_lr_ratio=0\.5 has no use"),
        (lambda: ScheduleConfig(kind="step"), r"train\.schedule\.kind='step'.*cosine"),  # type: ignore[arg-type]
        (lambda: ParallelConfig(dp_shard=0), r"train\.parallel\.dp_shard=0"),
        (lambda: ParallelConfig(ep=0), r"train\.parallel\.ep=0"),
        (lambda: TrainConfig(steps=0), r"train\.steps=0"),
        (lambda: TrainConfig(global_batch=10, micro_batch=4), r"train\.global_batch=10 .*train\.micro_batch=4"),
        (lambda: TrainConfig(precision="fp16"), r"train\.precision='fp16'"),  # type: ignore[arg-type]
        (
            lambda: TrainConfig(lora=LoraConfig(), optimizer=OptimizerConfig(kind="muon")),
            r"train\.optimizer\.kind=muon .*train\.lora",
        ),
        (lambda: TrainConfig(checkpoint_every=-1), r"train\.checkpoint_every=-1"),
        (lambda: TrainConfig(seed=-1), r"train\.seed=-1"),
        (lambda: TrainConfig(keep_every=-1), r"train\.keep_every=-1 .*0 turns it off"),
        (lambda: TrainConfig(validate_every=-1), r"train\.validate_every=-1"),
        (lambda: TrainConfig(validate_rows=0), r"train\.validate_rows=0"),
        (lambda: TrainConfig(validate_rows=8), r"train\.validate_rows=8 has no use without train\.validate_every"),
        (lambda: TrainConfig(keep_best=1), r"train\.keep_best=1 .*set train\.validate_every to a divisor"),
        (lambda: TrainConfig(keep_best=1, validate_every=20), r"train\.keep_best=1 .*checkpoint_every=50"),
    ],
)
def test_errors_name_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pydantic_reads_it_back_and_refuses_unknown_keys():
    config = replace(TrainConfig(steps=7), parallel=ParallelConfig(ep=2), optimizer=OptimizerConfig(lr=1e-4))
    adapter = TypeAdapter(TrainConfig)
    assert adapter.validate_python(asdict(config)) == config
    with pytest.raises(ValidationError, match=r"optimizer\.learning_rate"):
        adapter.validate_python({"optimizer": {"learning_rate": 1}})
