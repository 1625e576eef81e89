"""`CaravanForCausalLM`: every model of this library as a `transformers` model. Needs transformers.

Importing this module registers it with the Auto classes, so that

    import llama.hf_model
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)

loads what `llama.hf.save_pretrained` wrote of a model that no architecture of transformers expresses. It trains under
`transformers.Trainer` and generates. Generation computes the whole sequence anew for each token; `Transformer.generate`
and llama/engine keep a cache. Training takes the language model's loss only: auxiliary losses and bias balancing of a
mixture of experts belong to llama/training. Batch norms' running statistics follow each forward pass in training.
Gradient checkpointing is not supported, and transformers refuses it.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llama.attention import CausalAttend
from llama.config import ModelConfig
from llama.hf_caravan import CARAVAN_MODEL_TYPE, CARAVAN_NAME, model_config_from_json
from llama.losses import IGNORE_INDEX
from llama.model import Transformer, initial_buffer
from llama.norm import batch_norms, batch_statistics, update_running


class CaravanConfig(PreTrainedConfig):
    """A `ModelConfig` in transformers' clothes.

    Args:
        model: the settings of the `ModelConfig` by name, as `dataclasses.asdict` gives them; None is the default model.

    Raises:
        ValueError: an unknown setting, or settings that contradict each other.
        AttributeError: another name for a setting of `model`, such as `hidden_size`; only `vocab_size` can be set.
    """

    model_type = CARAVAN_MODEL_TYPE

    model: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        settings = ModelConfig() if self.model is None else model_config_from_json(self.model)
        self.model = asdict(settings)
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        return model_config_from_json(self.model)

    # What tools around transformers look for.

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.model = asdict(replace(self.model_config, vocab_size=value))

    @property
    def hidden_size(self) -> int:
        return self.model_config.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.model_config.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.model_config.num_heads

    @property
    def tie_word_embeddings(self) -> bool:
        return self.model_config.tie_embeddings

    @property
    def max_position_embeddings(self) -> int:
        return self.model_config.max_seq_len


class CaravanForCausalLM(PreTrainedModel, GenerationMixin):
    """Our `Transformer` behind transformers' interface; its parameters lie under `model.`."""

    config_class = CaravanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    """Trainer hands `num_items_in_batch` to `forward`."""
    _keep_in_fp32_modules_strict = ["expert_bias", "running_mean", "running_var"]

    def __init__(self, config: CaravanConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.model_config)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Our own start values, from torch's global generator; what a checkpoint has filled is left alone."""
        seed = int(torch.randint(2**31, (), device="cpu"))
        for name, parameter in self.model.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(self.model.initial_weight(name, parameter.shape, seed))
        for name, buffer in self.model.named_buffers():
            if not getattr(buffer, "_is_hf_initialized", False):
                buffer.fill_(initial_buffer(name))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # tokens have no other
        self.model.tok_embeddings = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits, and the loss when `labels` are given.

        A padded row computes what it would alone: positions count from its first real token, nothing attends to
        padding, and no token is predicted from it. Only dynamic NTK scaling goes by the longest row of the batch.

        Args:
            input_ids: `[batch, seq]` int64.
            attention_mask: `[batch, seq]`, 1 for tokens and 0 for padding, which may stand on either side of a row.
            labels: `[batch, seq]` int64, usually `input_ids` themselves: position i learns to predict labels[i + 1];
                -100 is not predicted.
            num_items_in_batch: divides the summed loss in place of the number of labels, for accumulated batches.
            logits_to_keep: compute the logits of the last so many positions only; 0 of all.
            return_dict: False returns a tuple.

        Returns:
            `logits`, `[batch, seq or logits_to_keep, vocab]`, and `loss`, the mean −log p(label) in nats, fp32.

        Raises:
            ValueError: the mask has another shape or a hole, or `labels` come with `logits_to_keep`.
        """
        positions, attend = None, None
        if attention_mask is not None:
            positions, attend = _padding(input_ids, attention_mask)
        if logits_to_keep and labels is not None:
            raise ValueError(f"logits_to_keep={logits_to_keep} with labels; the loss needs all logits, leave it 0")
        output_index = None
        if logits_to_keep:
            flat = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
            output_index = flat[:, -logits_to_keep:].flatten()
        logits = self.model(input_ids, positions=positions, attend=attend, output_index=output_index)
        logits = logits.view(input_ids.shape[0], -1, logits.shape[-1])
        if self.training and (norms := batch_norms(self.model)):
            update_running(norms, batch_statistics(norms))
        loss = None
        if labels is not None:
            loss = _loss(logits, labels, attention_mask, num_items_in_batch)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]  # only ever called by name
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **unused: Any
    ) -> dict[str, Any]:
        """The whole sequence for every token; there is no cache to prepare."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor | None, CausalAttend | None]:
    """Positions and attention that a mask calls for; None where the usual ones do.

    Padding behind a row needs nothing: what comes before does not see it.
    """
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}; give one "
            "value to a token"
        )
    real_BL = attention_mask.bool()
    begins_BL = real_BL.clone()
    begins_BL[:, 1:] &= ~real_BL[:, :-1]
    if bool((begins_BL.sum(dim=1) > 1).any()):
        raise ValueError("attention_mask has padding between tokens; it may stand before or after them only")
    if not bool(begins_BL[:, 1:].any()):
        return None, None
    # Padding is a document of its own, so that its rows see something and stay finite.
    return (real_BL.cumsum(dim=1) - 1).clamp(min=0), CausalAttend(documents=real_BL.long())


def _loss(
    logits_BLV: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor:
    targets = labels[:, 1:]
    if attention_mask is not None:
        targets = targets.masked_fill(attention_mask[:, :-1] == 0, IGNORE_INDEX)
    total = cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / count


AutoConfig.register(CARAVAN_MODEL_TYPE, CaravanConfig, exist_ok=True)
AutoModelForCausalLM.register(CaravanConfig, CaravanForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the models in this table and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CARAVAN_MODEL_TYPE] = CARAVAN_NAME
