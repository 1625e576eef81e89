"""A model that takes no time: random weights, and a vocabulary of this file."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.config import ModelConfig
from llama.hf import save_pretrained
from llama.model import Transformer
from llama.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_SEQ_LEN = 512


def save_tiny_model(directory: Path, seed: int = 0, dim: int = 64) -> Path:
    """Writes it as a Hugging Face directory; it answers in ordinary tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer = Tokenizer(backend)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=dim,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=MAX_SEQ_LEN,
        tie_embeddings=False,
    )
    model = Transformer(config)
    model.init_weights(seed=seed)
    save_pretrained(model, directory, tokenizer)
    return directory
