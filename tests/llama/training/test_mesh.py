import pytest

from llama.training.config import ParallelConfig
from llama.training.mesh import plan_mesh


def test_what_is_left_goes_to_sharding():
    plan = plan_mesh(ParallelConfig(dp_replicate=2, ep=2), 8)
    assert (plan.dp_replicate, plan.dp_shard, plan.efsdp, plan.ep, plan.world_size) == (2, 4, 2, 2, 8)


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (ParallelConfig(ep=3), 2, r"train\.parallel\.ep=3 does not divide dp_shard=2"),
        (ParallelConfig(dp_replicate=3), 4, r"train\.parallel\.dp_replicate=3 does not divide the 4 workers"),
        (ParallelConfig(dp_shard=4), 2, r"train\.parallel\.dp_shard=4 .* 2 workers; set train\.parallel\.dp_shard=2"),
        (ParallelConfig(dp_replicate=2, ep=2), 2, r"train\.parallel\.ep=2 does not divide dp_shard=1 \(2 workers"),
    ],
)
def test_errors_name_fields_and_remedy(parallel, world_size, message):
    with pytest.raises(ValueError, match=message):
        plan_mesh(parallel, world_size)
