"""The encoder–decoder beside `torch.nn.Transformer`, and cached generation beside the uncached."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llama import MoEConfig, Seq2Seq, Seq2SeqConfig
from llama.attention import FullAttend, Scoring
from llama.config import RopeScaling
from llama.losses import IGNORE_INDEX
from llama.position import ALiBi, RelativeBias, relative_bucket
from llama.seq2seq import pad

VOCAB = 23
SMALL = Seq2SeqConfig(
    vocab_size=VOCAB, dim=24, num_layers=2, encoder_layers=3, num_heads=4, hidden_dim=40, max_seq_len=16
)
LENGTHS = torch.tensor([7, 1, 4])
ORIGINAL = {
    "norm": "layernorm",
    "attention_bias": "qkvo",
    "ffn_bias": True,
    "position": "none",
    "tie_embeddings": False,
}


def build(config: Seq2SeqConfig, scale: float = 0.3) -> Seq2Seq:
    """With weights that make a difference: the start values leave almost equal logits."""
    model = Seq2Seq(config)
    model.init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


# --- torch.nn.Transformer ---


def original(model: Seq2Seq, activation: str) -> tuple[nn.Transformer, dict[str, list[str]]]:
    """torch's with the model's weights, and which of ours make up each of its parameters."""
    config = model.config
    theirs = nn.Transformer(
        config.dim,
        config.num_heads,
        config.stacks[0],
        config.num_layers,
        config.ffn_hidden_dim,
        dropout=0.0,
        activation=activation,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_placement == "pre",
    ).to(model.tok_embeddings.weight.dtype)
    parts: dict[str, list[str]] = {}
    for name, _ in theirs.named_parameters():
        kind = name.rsplit(".", 1)[-1].removeprefix("in_proj_")
        stack, _, rest = name.partition(".")
        if rest.startswith("norm."):
            parts[name] = [f"{'encoder_' if stack == 'encoder' else ''}{rest}"]
            continue
        _, layer, place = rest.split(".", 2)
        prefix = f"{'encoder_' if stack == 'encoder' else ''}layers.{layer}"
        norms = ["attention_norm", "ffn_norm"] if stack == "encoder" else ["attention_norm", "cross_norm", "ffn_norm"]
        attention = "cross_attention" if place.startswith("multihead_attn") else "attention"
        match place.split("."):
            case [norm, _] if norm.startswith("norm"):
                parts[name] = [f"{prefix}.{norms[int(norm[-1]) - 1]}.{kind}"]
            case [linear, _] if linear.startswith("linear"):
                parts[name] = [f"{prefix}.feed_forward.w{linear[-1]}.{kind}"]
            case [_, "out_proj", _]:
                parts[name] = [f"{prefix}.{attention}.wo.{kind}"]
            case _:
                parts[name] = [f"{prefix}.{attention}.w{matrix}.{kind}" for matrix in "qkv"]
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.cat([ours[part] for part in parts[name]]))
    return theirs, parts


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("placement", "activation", "dtype"),
    [
        ("post", "relu", torch.float32),
        ("post", "relu", torch.float64),
        ("pre", "relu", torch.float32),
        ("pre", "gelu", torch.float64),
    ],
)
def test_outputs_and_gradients_are_those_of_torchs_own_transformer(
    placement: str, activation: str, dtype: torch.dtype, lengths: Tensor | None
) -> None:
    config = replace(SMALL, **ORIGINAL, norm_placement=placement, activation=activation, final_norm=placement == "post")
    model = build(config).to(dtype).train()
    theirs, parts = original(model, activation)
    source, target = tokens(3, 7), tokens(3, 5)
    hidden = None if lengths is None else torch.arange(7) >= lengths[:, None]
    out = theirs(
        model.tok_embeddings(source),
        model.tok_embeddings(target),
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=hidden,
        memory_key_padding_mask=hidden,
    )
    assert model.output is not None
    expected = out @ model.output.weight.T
    logits = model(source, target, source_lengths=lengths)
    # Float64 leaves no doubt about the formula, fp32 only the order of summation.
    close = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}
    torch.testing.assert_close(logits, expected, **close)
    weights = torch.randn_like(expected)
    theirs_shared = torch.autograd.grad((expected * weights).sum(), [model.tok_embeddings.weight, *theirs.parameters()])
    named = dict(model.named_parameters())
    ours = dict(zip(named, torch.autograd.grad((logits * weights).sum(), list(named.values())), strict=True))
    torch.testing.assert_close(ours["tok_embeddings.weight"], theirs_shared[0], **close)
    assert sum(map(len, parts.values())) == len(named) - 2  # all but embedding and head
    for gradient, names in zip(theirs_shared[1:], parts.values(), strict=True):
        torch.testing.assert_close(torch.cat([ours[name] for name in names]), gradient, **close)


# --- generation ---

POSITIONS = ("rope", "alibi", "sinusoidal", "learned", "t5", "none")
LAYERS = (
    {"norm": "rmsnorm", "norm_placement": "pre", "activation": "swiglu", "num_kv_heads": 2, "qk_norm": "head"},
    {"norm": "layernorm", "norm_placement": "post", "activation": "relu", "final_norm": True},
    {"norm": "layernorm_bessel", "norm_placement": "sandwich", "attention_softcap": 8.0},
    {"norm": "layernorm", "norm_placement": "deepnorm", "activation": "swish_learned", "attention_bias": "qkvo"},
)


@pytest.mark.parametrize(("position", "layers"), list(itertools.product(POSITIONS, LAYERS)))
def test_cached_generation_is_the_uncached_and_padding_changes_nothing(position: str, layers: dict) -> None:
    model = build(replace(SMALL, **{"position": position, "tie_embeddings": False, **layers})).double()
    source = tokens(3, 7)
    settings = {"max_tokens": 9, "bos": 1, "eos": 2}
    cached = model.generate(source, LENGTHS, **settings)
    assert cached == model.generate(source, LENGTHS, use_cache=False, **settings)
    for row, length in enumerate(LENGTHS):
        assert model.generate(source[row : row + 1, :length], **settings) == [cached[row]]
    sampled = {"temperature": 1.0, "seed": 5, **settings}
    drawn = model.generate(source, LENGTHS, **sampled)
    assert drawn == model.generate(source, LENGTHS, use_cache=False, **sampled)
    assert len({tuple(row) for row in drawn}) > 1  # by the same random numbers: the source is read


@pytest.mark.parametrize("position", POSITIONS)
def test_what_lies_in_the_padding_does_not_matter(position: str) -> None:
    model = build(replace(SMALL, position=position)).double()
    source, target = tokens(3, 7), tokens(3, 6)
    other = source.where(torch.arange(7) < LENGTHS[:, None], (source + 5) % VOCAB)
    assert not torch.equal(source, other)
    logits = model(source, target, source_lengths=LENGTHS)
    torch.testing.assert_close(logits, model(other, target, source_lengths=LENGTHS))
    alone = model(source[2:, :4], target[2:])
    torch.testing.assert_close(logits[2:], alone)


def test_generation_follows_the_logits_and_stops_with_eos() -> None:
    model = build(SMALL)
    source = tokens(2, 5)
    row = model.generate(source, max_tokens=6, bos=1, eos=VOCAB - 1)[0]
    with torch.no_grad():
        logits = model(source, torch.tensor([[1, *row[:-1]], [1] * len(row)]))
    assert row == logits[0].argmax(-1).tolist()
    stop = row[2]
    ended = model.generate(source, max_tokens=6, bos=1, eos=stop)[0]
    assert ended == row[: row.index(stop) + 1]


def test_the_memorys_keys_are_computed_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(SMALL), []
    for block in model.layers:
        wk = block.cross_attention.wk
        wk.register_forward_hook(lambda module, inputs, out: calls.append(inputs[0].shape[1]))
    model.generate(tokens(2, 5), max_tokens=4, bos=1, eos=0)
    assert calls == [5, 5]


# --- the model ---


def test_the_decoder_sees_no_later_token_and_the_encoder_all() -> None:
    model = build(SMALL)
    source, target = tokens(2, 6), tokens(2, 8)
    later, elsewhere = target.clone(), source.clone()
    later[:, 5:] = (later[:, 5:] + 1) % VOCAB
    elsewhere[:, -1] = (elsewhere[:, -1] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(source, target), model(source, later)
        memory, changed = model.encode(source), model.encode(elsewhere)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3
    assert ((memory - changed).abs().amax(-1) > 1e-4).all()


def test_labels_give_the_loss_of_the_logits() -> None:
    model = build(SMALL).double()
    source, target, labels = tokens(3, 7), tokens(3, 5), tokens(3, 5)
    labels[1, 2:] = IGNORE_INDEX
    log_p = model(source, target, source_lengths=LENGTHS).log_softmax(-1)
    expected = -sum(
        log_p[row, place, labels[row, place]]
        for row in range(3)
        for place in range(5)
        if labels[row, place] != IGNORE_INDEX
    )
    torch.testing.assert_close(model(source, target, source_lengths=LENGTHS, labels=labels), expected)


def test_an_encoders_biases_tell_both_directions() -> None:
    index = torch.arange(5)
    alibi = ALiBi(4, bidirectional=True)(index, index)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / 4) for head in range(4)])
    torch.testing.assert_close(alibi, -slopes[:, None, None] * (index[:, None] - index).abs())
    weight = torch.randn(8, 4)
    bias = RelativeBias(weight, 16, bidirectional=True)(index, index)
    for i, j in itertools.product(range(5), repeat=2):
        bucket = int(relative_bucket(torch.tensor(i - j), 8, 16, bidirectional=True))
        assert (bucket >= 4) == (j > i)
        torch.testing.assert_close(bias[:, i, j], weight[bucket])


def test_full_attention_is_the_softmax_over_what_is_no_padding() -> None:
    q, k, v = torch.randn(3, 2, 4, 6), torch.randn(3, 7, 2, 6), torch.randn(3, 7, 2, 6)
    out = FullAttend(LENGTHS)(0, q, k, v, Scoring(0.5))
    for row, length in enumerate(LENGTHS):
        for head in range(4):
            weights = (q[row, :, head] @ k[row, :length, head // 2].T * 0.5).softmax(-1)
            torch.testing.assert_close(out[row, :, head], weights @ v[row, :length, head // 2])


def test_start_values_depend_on_name_and_seed_only() -> None:
    config = replace(SMALL, dim=64, num_heads=4)
    model, again, other = Seq2Seq(config), Seq2Seq(config), Seq2Seq(config)
    for each, seed in ((model, 5), (again, 5), (other, 6)):
        each.init_weights(seed)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, model.initial_weight(name, a.shape, 5))
        assert name.endswith("norm.weight") or not torch.equal(a, c)
    # Three sub-layers in each of two decoder layers, two in each of three of the encoder.
    assert model.layers[0].cross_attention.wo.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    assert model.encoder_layers[0].attention.wo.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    assert model.layers[0].cross_attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_deepnorms_constants_are_those_of_each_stack() -> None:
    model = Seq2Seq(replace(SMALL, norm="layernorm", norm_placement="deepnorm"))
    size = 3**4 * 2  # arXiv:2203.00555, figure 2: N = 3 encoder and M = 2 decoder layers
    assert [block.alpha for block in model.encoder_layers] == pytest.approx([0.81 * size ** (1 / 16)] * 3)
    assert [block.alpha for block in model.layers] == pytest.approx([(3 * 2) ** 0.25] * 2)
    shape = torch.Size((512, 512))
    for name, beta in (("encoder_layers.0", 0.87 * size ** (-1 / 16)), ("layers.0", (12 * 2) ** -0.25)):
        std = model.initial_weight(f"{name}.attention.wo.weight", shape, 0).std().item()
        assert std == pytest.approx(beta * math.sqrt(2 / 1024), rel=0.02)


@pytest.mark.parametrize(("position", "layers"), list(zip(POSITIONS, LAYERS + LAYERS[:2], strict=True)))
def test_the_count_of_parameters_is_the_models(position: str, layers: dict) -> None:
    config = replace(SMALL, **{"position": position, "max_source_len": 9, **layers})
    assert config.num_parameters() == sum(parameter.numel() for parameter in Seq2Seq(config).parameters())


def test_flops_are_those_of_the_products_by_hand() -> None:
    config = replace(SMALL, position="none", norm="layernorm", activation="relu", tie_embeddings=False)
    dim, length = 24, 10
    attention, feed_forward, norms = 4 * dim * dim, 2 * dim * 40, 2 * dim
    encoder = 3 * (attention + feed_forward + 2 * norms) + norms
    decoder = 2 * (2 * attention + feed_forward + 3 * norms) + norms
    # 12·dim a key: scores and values, two operations each, forward and twice backward.
    attended = 12 * dim * (3 * length + 2 * length / 2 + 2 * length)
    assert config.flops_per_token(length) == pytest.approx(6 * (encoder + decoder + VOCAB * dim) + attended)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": MoEConfig(num_experts=2)}, "model.moe: an encoder–decoder has no experts; leave it out"),
        ({"sliding_window": 4}, "model.sliding_window=4: an encoder–decoder sees whole sequences; leave it out"),
        ({"rope_scaling": RopeScaling("dynamic_ntk", 2.0, 16)}, "model.rope_scaling.kind=dynamic_ntk does not serve"),
        ({"final_norm": True}, "model.final_norm=True has no effect with model.norm_placement=pre"),
        ({"encoder_layers": 0}, "model.encoder_layers=0 must be at least 1"),
        ({"max_source_len": 0}, "model.max_source_len=0 must be at least 1"),
        ({"encoder_layers": 1.5}, "model.encoder_layers=1.5 is not a whole number"),
        ({"norm": "batchnorm"}, "model.norm=batchnorm: its statistics"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        Seq2SeqConfig(**settings)
    assert str(refused.value).startswith(message)


def test_a_source_that_does_not_fit_is_refused() -> None:
    model = build(replace(SMALL, max_source_len=6, position="learned"))
    settings = {"max_tokens": 3, "bos": 1, "eos": 2}
    for source, lengths, message in (
        (tokens(1, 7), None, "more than model.max_source_len=6"),
        (tokens(1, 3) + VOCAB, None, r"ids lie in \[0, model.vocab_size=23\)"),
        (tokens(2, 3), torch.tensor([3, 0]), "give one of 1 to 3"),
        (tokens(1, 3)[0], None, r"give int64 \[batch, source\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(source, lengths, **settings)
    with pytest.raises(ValueError, match="model.max_source_len=6 positions are learned"):
        model(tokens(1, 7), tokens(1, 2))
    with pytest.raises(ValueError, match="model.max_seq_len=16 is below"):
        model.generate(tokens(1, 3), max_tokens=16, bos=1, eos=2)


def test_rows_are_padded_at_their_ends() -> None:
    padded, lengths = pad([[3, 4], [5]], 3)
    assert padded.tolist() == [[3, 4, 0], [5, 0, 0]] and lengths.tolist() == [2, 1]
    assert pad([[7]])[0].tolist() == [[7]]
    with pytest.raises(ValueError, match="a row has 2 tokens, more than length=1"):
        pad([[1, 2]], 1)
