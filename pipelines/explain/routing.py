"""Where the router of each layer sends the tokens of a text.

Legend: T tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llama.model import Transformer
from llama.moe import MoE
from llama.tokenizer import Tokenizer
from pipelines.explain.pieces import encoded, labels, learned_from
from pipelines.explain.presets import chosen_preset
from pipelines.explain.registry import ExplainError, Explanation, Options
from pipelines.figures import drawable, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PRESET = "tiny-moe"
_TEXT = "The river ran past the mill, and the mill ran as long as the river did: day and night, night and day."
_TOKENS, _LAYERS = 48, 4
"""At most so many are drawn."""
_PARAMETERS = 100_000_000
_NAME_CHARS = 40
_MERGES = 64


@dataclass(frozen=True)
class Routing:
    model: str
    """Whose routers they are."""
    trained: bool
    tokens: list[str]
    ids: list[int]
    further_tokens: int
    """Of the text, behind those that are drawn."""
    top_k: int
    weights_TE: dict[int, np.ndarray]
    """By layer: the weight of each chosen expert, 0 where it is not chosen."""
    chosen_TE: dict[int, np.ndarray]
    """By layer, bool."""


def route(name: str, model: Transformer, tokenizer: Tokenizer, text: str, trained: bool) -> Routing:
    """Raises ExplainError if the model has no experts, or the text no tokens."""
    moe = model.config.moe
    if moe is None:
        raise ExplainError(f"{name} has no experts to route to; take a mixture of experts")
    ids = encoded(tokenizer, text)
    drawn = ids[: min(_TOKENS, model.config.max_seq_len)]
    decisions: dict[int, tuple[Tensor, ...]] = {}
    hooks = []
    for block in model.layers:
        if isinstance(block.feed_forward, MoE):
            layer = block.feed_forward.layer

            def keep(router: nn.Module, inputs: object, output: tuple[Tensor, ...], layer: int = layer) -> None:
                decisions[layer] = output

            hooks.append(block.feed_forward.router.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(torch.tensor([drawn]), output_index=torch.tensor([len(drawn) - 1]))
    for hook in hooks:
        hook.remove()
    weights: dict[int, np.ndarray] = {}
    chosen: dict[int, np.ndarray] = {}
    for layer, (ids_TK, weights_TK, *_) in decisions.items():
        empty = torch.zeros(len(drawn), moe.num_experts, dtype=torch.float64)
        weights[layer] = empty.scatter(1, ids_TK, weights_TK.double()).numpy()
        chosen[layer] = empty.scatter(1, ids_TK, 1.0).bool().numpy()
    return Routing(name, trained, labels(tokenizer, drawn), drawn, len(ids) - len(drawn), moe.top_k, weights, chosen)


def untrained(preset: str | None, text: str, seed: int = 0) -> tuple[str, Transformer, Tokenizer]:
    """A preset's model at its start values, with a tokenizer learned from the text itself.

    Raises ExplainError: the preset has no experts, or so many weights that drawing them would take minutes.
    """
    name, config = chosen_preset(preset, _PRESET)
    if config.moe is None:
        raise ExplainError(f"--preset={name} has no experts; take a mixture of experts, such as {_PRESET}")
    if config.num_parameters() > _PARAMETERS:
        raise ExplainError(
            f"--preset={name} has {config.num_parameters():,} weights, too many to start at random for a picture; take "
            f"{_PRESET}, or trained ones by --model"
        )
    tokenizer = learned_from(text, _MERGES)
    model = Transformer(replace(config, vocab_size=tokenizer.vocab_size))
    model.init_weights(seed)
    return name, model, tokenizer


def repeated_alike(routing: Routing) -> dict[int, float | None]:
    """By layer, of the tokens that occur before: the share that goes to the same experts as at the first place."""
    places = defaultdict(list)
    for place, token_id in enumerate(routing.ids):
        places[token_id].append(place)
    pairs = [(first, again) for first, *others in places.values() for again in others]
    return {
        layer: sum(bool((chosen[a] == chosen[b]).all()) for a, b in pairs) / len(pairs) if pairs else None
        for layer, chosen in routing.chosen_TE.items()
    }


def drawn_layers(layers: list[int]) -> list[int]:
    """At most four of them, the first and the last among them, evenly spread."""
    if len(layers) <= _LAYERS:
        return layers
    return [layers[round(place)] for place in np.linspace(0, len(layers) - 1, _LAYERS)]


def draw(routing: Routing) -> Figure:
    layers = drawn_layers(list(routing.weights_TE))
    experts = routing.weights_TE[layers[0]].shape[1]
    height = min(max(0.3 * experts, 1.1), 2.6)
    figure = new_figure(10, 2.2 + len(layers) * height)
    rows = figure.subplots(len(layers), 2, width_ratios=(9, 1), squeeze=False, sharey="row")
    chosen = np.concatenate([routing.weights_TE[layer][routing.chosen_TE[layer]] for layer in layers])
    busiest = max(routing.chosen_TE[layer].mean(axis=0).max() for layer in layers) / routing.top_k
    places = np.arange(len(routing.tokens))
    for (heat, load), layer in zip(rows, layers, strict=True):
        weights_TE, chosen_TE = routing.weights_TE[layer], routing.chosen_TE[layer]
        shown_ET = np.ma.masked_array(weights_TE, ~chosen_TE).T
        image = heat.imshow(
            shown_ET, cmap="viridis", vmin=chosen.min(), vmax=chosen.max(), aspect="auto", interpolation="nearest"
        )
        heat.set_facecolor("0.95")
        heat.set_ylabel(f"layer {layer}\nexpert", fontsize=9)
        if experts <= 16:
            heat.set_yticks(range(experts))
        heat.set_xticks(places - 0.5, minor=True)
        heat.grid(which="minor", axis="x", color="white", linewidth=0.5)
        heat.tick_params(which="minor", length=0)
        heat.tick_params(labelsize=8)
        heat.set_xticks(places, [])
        load.barh(range(experts), 100 * chosen_TE.mean(axis=0) / routing.top_k, color="tab:blue", height=0.8)
        load.axvline(100 / experts, color="tab:gray", linestyle="--", linewidth=1)
        load.tick_params(labelsize=8, labelleft=False)
        load.set_xlim(0, 105 * busiest)
    names = [drawable(token, "DejaVu Sans Mono") for token in routing.tokens]
    heat.set_xticks(places, names, rotation=90, fontsize=9, family="DejaVu Sans Mono", parse_math=False)
    heat.set_xlabel("tokens of the text, in order", fontsize=9)
    rows[0, 1].set_title("load", fontsize=9)
    load.set_xlabel("% of choices\n(dashed: even)", fontsize=8)
    figure.colorbar(image, ax=rows[:, 1], label="weight of a chosen expert")
    state = "trained" if routing.trained else "at the start values"
    name = routing.model if len(routing.model) <= _NAME_CHARS else f"…{routing.model[1 - _NAME_CHARS :]}"
    title = f"Routing of {drawable(name)}, {state}: each token's {routing.top_k} of {experts} experts"
    figure.suptitle(title, parse_math=False)
    return figure


def explain(options: Options) -> Explanation:
    text = _TEXT if options.text is None else options.text
    loaded = options.model
    if loaded is None:
        routing = route(*untrained(options.preset, text), text, trained=False)
    elif options.preset is not None:
        raise ExplainError(f"--preset={options.preset} and --model name two models; give one of them")
    else:
        routing = route(loaded.name, loaded.model, loaded.tokenizer, text, trained=True)
    experts = next(iter(routing.chosen_TE.values())).shape[1]
    busiest = {layer: chosen.mean(axis=0).max() / routing.top_k for layer, chosen in routing.chosen_TE.items()}
    lines = [
        f"{len(routing.tokens)} tokens, {len(routing.chosen_TE)} layers of {experts} experts, {routing.top_k} to a "
        "token; what is not coloured is not computed.",
        f"The busiest expert of a layer takes {min(busiest.values()):.0%} to {max(busiest.values()):.0%} of the "
        f"choices; even would be {1 / experts:.0%}.",
    ]
    alike = [share for share in repeated_alike(routing).values() if share is not None]
    if alike:
        lines.append(
            f"Where a token occurs again, it goes to the same experts as at first in {alike[0]:.0%} of the cases in "
            f"the first of these layers and in {alike[-1]:.0%} in the last; in the others its context has decided."
        )
    if routing.further_tokens:
        lines.append(f"The text goes on for {routing.further_tokens} tokens that are not shown.")
    return Explanation(routing, tuple(lines), {"routing": lambda: draw(routing)})
