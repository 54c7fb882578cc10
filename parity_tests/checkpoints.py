"""Small checkpoints on disk: a spec, random weights that leave nothing idle, and a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.verify.sample import corpus
from parity_tests.cases import BASE, random_weights
from spec import Spec, parse
from spec.config import merge
from spec.load import dump

VOCAB = 384
"""Byte-level BPE: three special tokens, 256 bytes, and merges."""

PRE_TOKENIZER = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
"""The split of Llama 3, which llama.cpp knows as `llama-bpe`."""


@cache
def tokenizer_json(vocab: int = VOCAB) -> str:
    """A tokenizer.json trained on the standard library: the same on every call."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus()[:60_000]], trainer)
    return tokenizer.to_str()


def llama(**patch: Any) -> Spec:
    """A small Llama whose widths suit every quantized type: width 256, a vocabulary of `VOCAB`."""
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "width": 256,
        "depth": 2,
        "context": 128,
        "block": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 64}, "mlp": {"hidden": 512}},
    }
    return parse(merge(merge(BASE, base), patch))


def write_checkpoint(
    folder: Path, spec: Spec, weights: dict[str, np.ndarray] | None = None, *, tokenizer: bool = True, bos: bool = True
) -> Path:
    """Write a checkpoint folder as the trainer does, and return it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(dump(spec), encoding="utf-8")
    save_file(weights or random_weights(spec), folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "add_bos_token": bos}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
