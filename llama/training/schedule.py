"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from llama.training.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `steps`.

    Warm-up: peak·(step + 1)/warmup_steps, so that no step is wasted at 0. After it, with p the share of the remaining
    steps that are done once this one is: peak·(r + (1 − r)·½(1 + cos πp)) for cosine (SGDR, Loshchilov & Hutter,
    arXiv:1608.03983, eq. 5), peak·(1 − (1 − r)·p) for linear, peak for constant; r = min_lr_ratio is reached by the
    last step. wsd (MiniCPM, arXiv:2404.06395, §4) stays at the peak, then falls as linear does, p being the share done
    of the last `decay_ratio` of all steps. A warm-up longer than the run is cut off by its end.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    begin = config.warmup_steps
    if config.kind == "wsd":
        begin = max(begin, steps - max(1, round(config.decay_ratio * steps)))
    progress = min(1.0, max(0, step + 1 - begin) / max(1, steps - begin))
    floor = config.min_lr_ratio
    match config.kind:
        case "cosine":
            return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        case "linear" | "wsd":
            return peak * (1 - (1 - floor) * progress)
        case "constant":
            return peak
