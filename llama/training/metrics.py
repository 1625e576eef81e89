"""What a training run reports. Plain data: `dataclasses.asdict` of either is JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks; every rank is given the same values."""

    step: int
    """Optimizer steps done, this one included."""
    steps: int
    """Of the whole run."""
    loss: float
    """Mean cross-entropy of the step's tokens, nats per token; auxiliary losses not included."""
    learning_rate: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Tokens trained on since step 0, padding not among them."""
    tokens_per_second: float
    """Over all ranks, since the previous report; checkpoints take their time of it, validation does not."""
    mfu: float | None
    """Model FLOPs utilisation: the arithmetic that `tokens_per_second` needs (`ModelConfig.flops_per_token`) over the
    peak of all ranks' devices (llama/training/peak.py); None where that is not known."""
    memory_bytes: int
    """The most that a rank has held so far: of an accelerator what tensors took, of the CPU the resident size."""
    samples: int
    """Sequences taken from the data since step 0."""
    epoch: float | None
    """Passes over the data that they make, with the fraction; None where the loader does not know."""
    checkpoint_seconds: float
    """Time the steps stood still for checkpoints since the previous report."""
    val_loss: float | None
    """Mean cross-entropy of the validation rows after this step, nats per token; None where it was not measured."""
    balance_loss: float | None
    """Mean over the MoE layers, before its weight; None for a dense model. When routing is uniform it is 1 for switch
    and switch_sequence, −ln(experts) for the entropies, 0 for kl_uniform and expert_load, and never below that where
    load and probabilities agree."""
    z_loss: float | None
    expert_load: dict[int, list[float]]
    """By MoE layer: each expert's share of the step's (token, choice) pairs."""
    router_entropy: dict[int, float]
    """By MoE layer: the mean over the step's tokens of the entropy of the router's probabilities, in nats:
    ln(experts) when it prefers none, 0 when it is sure of one."""
    all_to_all_bytes: int
    """Bytes of token rows that crossed between ranks in this step, forward and backward, over all ranks."""
    skipped_steps: int
    """Steps without an update, since step 0: the gradient was not finite, or an outlier (llama/training/skip.py)."""
    failed_checkpoints: int = 0
    """Checkpoints that were due and could not be written, since step 0."""


@dataclass(frozen=True)
class TrainSummary:
    """A finished run, or one part of it: the last after a resume, or one that was told to stop."""

    step: int
    finished: bool
    """Whether all steps are done; False for a part that stopped early, with its checkpoint if one could be written."""
    resumed_step: int
    """Step of the checkpoint that this part went on from; 0 for a fresh start."""
    loss: float | None
    """Of the last step, nats per token, whichever part took it; None when it is not finite or not known."""
    tokens: int
    """Since step 0."""
    tokens_per_second: float | None
    """Of this part, first step and checkpoints included, validation not; None when no step was left to do."""
    seconds: float
    """Of this part's steps, with checkpoints and validation."""
    checkpoint_seconds: float
    """Time the steps stood still for checkpoints: copying, and waiting for the previous save."""
    all_to_all_bytes: int
    """Of this part, over all ranks."""
    skipped_steps: int
    failed_checkpoints: int = 0
    val_loss: float | None = None
    """After the last step; None without validation, or when it is not finite."""
    validation_seconds: float = 0.0
    """Of this part's steps."""
