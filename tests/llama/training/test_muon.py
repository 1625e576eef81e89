"""Muon against torch's own in one process, and against itself over shards."""

from dataclasses import replace

import pytest
import torch

from llama.model import Transformer
from llama.training.config import OptimizerConfig, ParallelConfig
from llama.training.mesh import build_mesh, local
from llama.training.muon import block_matrices, orthogonalise
from llama.training.optim import build_optimizer, optimizer_tensors
from llama.training.parallel import apply_parallel, init_sharded_weights
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, MOE, difference, whole

CONFIG = OptimizerConfig(kind="muon", lr=1e-2, momentum=0.9, weight_decay=0.1)


def float64_newton_schulz(matrix):
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_orthogonalise_follows_the_formula_matrix_by_matrix(shape):
    torch.manual_seed(0)
    bank = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    expected = torch.stack([float64_newton_schulz(matrix) for matrix in bank])
    found = orthogonalise(bank, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalise(bank, torch.bfloat16).double(), expected, rtol=0, atol=0.03)
    assert torch.linalg.svdvals(found)[:, : min(shape) // 2].sub(1).abs().max() < 0.4


def test_a_matrix_of_zeros_stays_one():
    assert orthogonalise(torch.zeros(2, 4, 8), torch.float32).count_nonzero() == 0


def test_matrices_of_the_blocks_go_to_muon_and_the_rest_to_adamw():
    model = Transformer(replace(MOE, moe=replace(MOE.moe, shared_gate=True), tie_embeddings=False, qk_norm="head"))
    matrices = block_matrices(model)
    names = {name.split(".", 2)[2] for name, parameter in model.named_parameters() if parameter in matrices}
    assert names == (
        {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
        | {f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
        | {f"feed_forward.shared.{w}.weight" for w in ("w1", "w2", "w3")}
        | {f"feed_forward.experts.{w}" for w in ("w1", "w2", "w3")}
    )
    optimizer = build_optimizer(model, CONFIG)
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(model.parameters()))
    keys = {name.rsplit(".", 1)[1] for name in optimizer_tensors(model, optimizer)}
    assert keys == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


def set_gradients(model, step):
    for name, parameter in model.named_parameters():
        gradient = model.initial_weight(name + ".gradient", parameter.shape, step)
        if parameter is not local(parameter):
            gradient = torch.distributed.tensor.distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.grad = gradient


def steps(model, optimizer):
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    return {name: whole(tensor) for name, tensor in model.state_dict().items()} | {
        name: whole(tensor) for name, tensor in optimizer_tensors(model, optimizer).items()
    }


def plain(model_config):
    model = Transformer(model_config)
    model.init_weights(0)
    return model


def test_three_steps_equal_torchs_muon_and_adamw():
    ours, theirs = plain(MOE), plain(MOE)
    start = {name: whole(parameter) for name, parameter in ours.named_parameters()}
    found = steps(ours, build_optimizer(ours, CONFIG))
    inside = block_matrices(theirs)
    # An expert's matrix is one of its own to torch, so banks are given to it in pieces.
    pieces = {p: [torch.nn.Parameter(m) for m in (p.detach() if p.ndim == 3 else [p.detach()])] for p in inside}
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    muon = torch.optim.Muon(
        [piece for each in pieces.values() for piece in each],
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        **settings,
    )
    for step in range(3):
        set_gradients(theirs, step)
        for parameter, each in pieces.items():
            for piece, gradient in zip(each, parameter.grad if parameter.ndim == 3 else [parameter.grad], strict=True):
                piece.grad = gradient
        muon.step()
    for name, parameter in theirs.named_parameters():
        if parameter in inside:
            # torch iterates in bf16, whatever the device.
            moved, expected = found[name] - start[name], parameter.detach() - start[name]
            assert difference(moved, expected) < 0.05, name
            cosine = torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)
            assert cosine > 0.9995, name
            momenta = torch.stack([muon.state[piece]["momentum_buffer"] for piece in pieces[parameter]])
            assert torch.equal(found[f"{name}.momentum_buffer"].view_as(momenta), momenta)


def test_an_update_has_the_size_of_adamws():
    """0.2 in root mean square (arXiv:2502.16982, §2.2), whatever the shape."""
    model = plain(MOE)
    start = {name: whole(parameter) for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, replace(CONFIG, weight_decay=0.0))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    matrices = block_matrices(model)
    for name, parameter in model.named_parameters():
        if parameter in matrices:
            update = (parameter.detach() - start[name]).square().mean().sqrt() / CONFIG.lr
            narrow = min(parameter.shape[-2:]) / max(parameter.shape[-2:])
            assert update.item() == pytest.approx(0.2, rel=0.35), (name, narrow)


def test_a_model_without_matrices_to_train_is_refused():
    model = plain(DENSE)
    for parameter in block_matrices(model):
        parameter.requires_grad = False
    with pytest.raises(ValueError, match=r"train\.optimizer\.kind=muon .* set train\.optimizer\.kind=adamw"):
        build_optimizer(model, CONFIG)


def test_what_is_frozen_has_no_state():
    model = plain(MOE)
    model.tok_embeddings.weight.requires_grad = False
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
        assert not any(name.startswith("tok_embeddings") for name in optimizer_tensors(model, optimizer))


def sharded(rank, world_size, cases):
    results = []
    for model_config, parallel in cases:
        with torch.device("meta"):
            model = Transformer(model_config)
        apply_parallel(model, build_mesh(parallel, world_size, "cpu"), "fp32")
        init_sharded_weights(model, 0, torch.device("cpu"))
        results.append(steps(model, build_optimizer(model, CONFIG)))
    return results


@pytest.mark.integration
def test_over_shards_it_equals_one_process():
    # 40 rows over four ranks, but 48 of the feed-forward; six experts do not divide and are cut through.
    uneven = replace(MOE, dim=40, num_heads=10, moe=replace(MOE.moe, num_experts=6))
    few = replace(DENSE, head_dim=2, num_kv_heads=1)  # two rows of keys: the last ranks have none
    cases = [
        (DENSE, ParallelConfig(dp_replicate=4)),
        (MOE, ParallelConfig(dp_replicate=2, ep=2)),
        (MOE, ParallelConfig(ep=2)),
        (uneven, ParallelConfig()),
        (few, ParallelConfig()),
    ]
    for ranks in run_ranks(sharded, 4, cases):
        for (model_config, _), found in zip(cases, ranks, strict=True):
            model = plain(model_config)
            expected = steps(model, build_optimizer(model, CONFIG))
            assert found.keys() == expected.keys()
            off = {name: difference(found[name], value) for name, value in expected.items()}
            assert max(off.values()) <= 1e-6, {name: value for name, value in off.items() if value > 1e-6}
