"""AllToAllDispatch against LocalDispatch over all tokens in one process."""

import pytest
import torch
import torch.distributed as dist

from llama.all_to_all import AllToAllDispatch
from llama.config import ModelConfig, MoEConfig
from llama.dispatch import LocalDispatch
from llama.moe import Experts
from tests.distributed import run_ranks

pytestmark = pytest.mark.integration

EXPERTS, DIM, HIDDEN, TOP_K = 4, 8, 12, 2
ROUTINGS = {
    "mixed": [[0, 3], [1, 2], [2, 0], [3, 1], [0, 2], [3, 0], [2, 3], [1, 0], [0, 1], [2, 1]],
    "all to rank 0": [[0, 1]] * 10,
    "all to one expert of rank 1": [[3, 2]] * 10,
    "nobody travels": [[0, 1]] * 4 + [[2, 3]] * 6,
}
TOKENS = (4, 6)  # of rank 0 and rank 1
ROUTINGS |= {"capacity of 2": ROUTINGS["mixed"], "capacity of 1": ROUTINGS["all to one expert of rank 1"]}
CAPACITIES = dict.fromkeys(ROUTINGS) | {"capacity of 2": 2, "capacity of 1": 1}


def build(num_experts):
    return Experts(ModelConfig(dim=DIM, num_heads=2, moe=MoEConfig(num_experts, expert_hidden_dim=HIDDEN)))


def problem():
    generator = torch.Generator().manual_seed(0)
    experts = build(EXPERTS)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(sum(TOKENS), DIM, generator=generator)
    weights = torch.rand(sum(TOKENS), TOP_K, generator=generator)
    goal = torch.randn(sum(TOKENS), DIM, generator=generator)
    return experts, x, weights, goal


def travel(rank: int, world_size: int) -> dict:
    results = {}
    for name, routing in ROUTINGS.items():
        everything, x, weights, goal = problem()
        mine = slice(0, TOKENS[0]) if rank == 0 else slice(TOKENS[0], None)
        slice_of_bank = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
        experts = build(EXPERTS // 2)
        for target, source in zip(experts.parameters(), everything.parameters(), strict=True):
            target.data.copy_(source.data[slice_of_bank])
        x, weights = x[mine].requires_grad_(), weights[mine].requires_grad_()
        dispatch = AllToAllDispatch(dist.group.WORLD, EXPERTS)
        y = dispatch(experts, x, torch.tensor(routing)[mine], weights, CAPACITIES[name])
        forward_bytes = dispatch.bytes_sent
        (y * goal[mine]).sum().backward()
        results[name] = {
            "y": y.detach(),
            "x": x.grad,
            "weights": weights.grad,
            "experts": [parameter.grad for parameter in experts.parameters()],
            "bytes": (forward_bytes, dispatch.bytes_sent),
        }
    with pytest.raises(ValueError, match=r"model\.moe\.num_experts=5 is not divisible by train\.parallel\.ep=2"):
        AllToAllDispatch(dist.group.WORLD, 5)
    return results


@pytest.fixture(scope="module")
def travelled():
    return run_ranks(travel, 2)


@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_one_process(travelled, name):
    experts, x, weights, goal = problem()
    x.requires_grad_(), weights.requires_grad_()
    local, routing = LocalDispatch(EXPERTS), torch.tensor(ROUTINGS[name])
    # A capacity bounds what one rank sends, so the one process takes the ranks' tokens apart.
    parts = (slice(0, TOKENS[0]), slice(TOKENS[0], None)) if CAPACITIES[name] else (slice(None),)
    y = torch.cat([local(experts, x[part], routing[part], weights[part], CAPACITIES[name]) for part in parts])
    (y * goal).sum().backward()
    first, second = (ranks[name] for ranks in travelled)
    for key, expected in (("y", y.detach()), ("x", x.grad), ("weights", weights.grad)):
        torch.testing.assert_close(torch.cat((first[key], second[key])), expected)
    for index, parameter in enumerate(experts.parameters()):
        torch.testing.assert_close(torch.cat((first["experts"][index], second["experts"][index])), parameter.grad)


@pytest.mark.parametrize("name", ROUTINGS)
def test_counts_the_bytes_that_left(travelled, name):
    away = []
    for rank, tokens in enumerate((ROUTINGS[name][: TOKENS[0]], ROUTINGS[name][TOKENS[0] :])):
        pairs = [sum(ids.count(e) for ids in tokens) for e in range(EXPERTS)]
        kept = [min(count, CAPACITIES[name] or count) for count in pairs]
        away.append(sum(kept[:2] if rank else kept[2:]))
    row = DIM * 4
    for rank in (0, 1):
        # Forward: our tokens go out, the other rank's answers go back; backward: the same two again.
        forward = (away[rank] + away[1 - rank]) * row
        assert travelled[rank][name]["bytes"] == (forward, 2 * forward)
