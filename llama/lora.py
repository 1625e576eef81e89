"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685), applied to a plain model.

    apply_lora(model, LoraConfig(rank=8, alpha=16))      # before it is sharded; the model's own weights are frozen
    merge_lora(model)                                    # plain linear layers again, the adapters added in

An adapted layer computes W·x + b + (alpha / rank)·B·A·x (§4.1) with A `[rank, in]` and B `[out, rank]`. It is still an
`nn.Linear` with two parameters more, `lora_a` and `lora_b`, so the model's own parameters keep their names: whatever
reads or shards the plain model does the same with the adapted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from llama.counts import parameter_shapes
from llama.linear import Linear, linear

if TYPE_CHECKING:
    from llama.config import ModelConfig
    from llama.model import LanguageModel

ModelT = TypeVar("ModelT", bound="LanguageModel")
Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
_MATRICES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class LoraConfig:
    """Which linear layers get an adapter, and of what size.

    Raises:
        ValueError: a setting is out of range; names field, value and remedy.
    """

    rank: int = 8
    alpha: int = 16
    """The adapter counts alpha / rank times."""
    dropout: float = 0.0
    """Probability of dropping an element of an adapter's input in training."""
    targets: tuple[Target, ...] = ("wq", "wk", "wv", "wo")
    """wq, wk, wv, wo of attention; w1, w2, w3 of dense feed-forwards and shared experts, never of routed experts."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists
        if self.rank < 1:
            raise ValueError(f"train.lora.rank={self.rank} must be at least 1; 8 is usual")
        if self.alpha < 1:
            raise ValueError(f"train.lora.alpha={self.alpha} must be at least 1; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"train.lora.dropout={self.dropout} must lie in [0, 1); 0 turns it off")
        known = get_args(Target)
        if not self.targets or len(set(self.targets)) < len(self.targets) or set(self.targets) - set(known):
            raise ValueError(f"train.lora.targets={list(self.targets)} must be some of {', '.join(known)}, each once")


class LoraLinear(Linear):
    """A linear layer with an adapter beside its weight, which it takes over from `base`."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        self.scale = config.alpha / config.rank
        like = base.weight.detach()
        self.lora_a = nn.Parameter(like.new_empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(like.new_empty(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        out = super().forward(x)
        if self.config.dropout:
            x = dropout(x, self.config.dropout, self.training)
        return out + linear(linear(x, self.lora_a), self.lora_b) * self.scale


def check_targets(model: ModelConfig, config: LoraConfig) -> None:
    """Raises ValueError if the model has no linear layer of a target's name; names it."""
    names = parameter_shapes(model)
    for target in config.targets:
        if not any(name.endswith(f".{target}.weight") for name in names):
            banks = any(name.endswith(f".experts.{target}") for name in names)
            raise ValueError(
                f"train.lora.targets has {target}, and this model has no such linear layer"
                f"{': its experts are banks, which take no adapter' if banks else ''}; leave it out"
            )


def apply_lora(model: ModelT, config: LoraConfig) -> ModelT:
    """Puts adapters on a plain model in place and freezes all else.

    The adapters are uninitialised, as a `Transformer` is: `init_weights`, `init_sharded_weights` or `init_adapters`
    start A from U(−1/√in, 1/√in) (Kaiming-uniform with a = √5, as PEFT does) and B from zero.

    Raises:
        ValueError: as `check_targets`.
    """
    check_targets(model.config, config)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name in config.targets and isinstance(layer, nn.Linear):
                setattr(module, name, LoraLinear(layer, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(_MATRICES))
    return model


@torch.no_grad()
def init_adapters(model: LanguageModel, seed: int) -> None:
    """Sets the adapters of a plain model to their start values; the rest stays."""
    for name, parameter in model.named_parameters():
        if name.endswith(_MATRICES):
            parameter.copy_(model.initial_weight(name, parameter.shape, seed))


@torch.no_grad()
def merge_lora(model: ModelT) -> ModelT:
    """Adds every adapter into its layer's weight, W + (alpha / rank)·B·A, in place: a plain model again.

    The sum is taken in fp32 at least. All parameters can be trained afterwards.
    """
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoraLinear):
                setattr(module, name, _merged(layer))
    return model.requires_grad_()


def _merged(layer: LoraLinear) -> Linear:
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    delta = layer.lora_b.to(wide) @ layer.lora_a.to(wide) * layer.scale
    layer.weight.copy_(layer.weight.to(wide) + delta)
    plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name, in the model's order; empty without adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its adapters, by the names it has without them; shares memory."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_MATRICES)}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, sharing memory: the whole state, or with adapters nothing but them."""
    state = model.state_dict()
    adapters = {name: tensor for name, tensor in state.items() if name.endswith(_MATRICES)}
    return adapters or state
