"""genai_config.json: what onnxruntime-genai needs to know of the graph."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from backends.folder import PLAIN_CLASS, end_ids, token_id, write_json
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.layout import MODEL
from backends.tokens import CL100K, GPT2, O200K, QWEN2, steps
from spec.config import Spec

log = logging.getLogger(__name__)

CONFIG = "genai_config.json"

TYPE = "decoder"
"""The model type: all of onnxruntime-genai's decoders take one path, which the graph's inputs decide."""

LENGTH = 4096
"""Tokens of a session that does not ask for more: shared caches are allocated at once."""


_ENGLISH = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
SPLITS = frozenset({
    GPT2, GPT2.removesuffix(r"|\s+"), QWEN2, CL100K, O200K, QWEN2.replace(*_ENGLISH), CL100K.replace(*_ENGLISH),
})  # fmt: skip
"""Expressions that its tokenizer was seen to split by as `tokenizers` does."""


UNREAD = "TokenizersOnly"
"""No class that it knows: it says so and opens no tokenizer, where it would open a wrong one."""


def tokenizer_class(tokenizer: Tokenizer | None) -> str:
    """The class that tokenizer_config.json names. Of those that it knows, Gemma's alone lets a BPE on characters merge
    what the rules say (others keep digits apart and cut long texts)."""
    if unread(tokenizer):
        return UNREAD
    characters = tokenizer is not None and tokenizer.json["model"].get("byte_fallback")
    return "GemmaTokenizer" if characters else PLAIN_CLASS


def unread(tokenizer: Tokenizer | None) -> str:
    """What of a tokenizer onnxruntime-genai reads otherwise; nothing where it has the same ids."""
    if tokenizer is None:
        return ""
    model = tokenizer.json["model"]
    if model.get("type", "BPE") != "BPE":
        return f"a {model['type']} model"
    if any(t.get("single_word") for t in tokenizer.json.get("added_tokens") or []):
        return "added tokens that are found as whole words alone (single_word)"
    for s in steps(tokenizer.json.get("pre_tokenizer"), "pretokenizers"):
        match s:
            case {"type": "Split", "pattern": {"Regex": expression}} if not model.get("byte_fallback"):
                if expression not in SPLITS:
                    return f"the expression {expression}"
            case {"type": "Digits", "individual_digits": True} | {"type": "ByteLevel", "add_prefix_space": False}:
                pass
            case {"type": "Metaspace", "prepend_scheme": "never"} if model.get("byte_fallback"):
                pass
            case {"type": "Split", "pattern": {"String": " "}} if model.get("byte_fallback"):
                pass  # there are no spaces left
            case _:
                return f"the pre-tokenizer {s['type']}"
    return ""


def write_config(folder: Path, spec: Spec, tokenizer: Tokenizer | None, *, profile: str, compute: str) -> None:
    """Write the file."""
    if why := unread(tokenizer):
        log.warning("onnxruntime-genai's tokenizer does not have %s: pass it ids from `tokenizers`", why)
    write_json(folder / CONFIG, config(spec, tokenizer, profile, compute))


def config(spec: Spec, tokenizer: Tokenizer | None, profile: str, compute: str) -> dict[str, Any]:
    """Its content."""
    a = spec.layers[0].attention
    kinds = [kernel(b.attention, profile, compute) for b in spec.layers]
    ends = end_ids(tokenizer)
    bos, pad = (token_id(tokenizer, getattr(tokenizer, r)) if tokenizer else None for r in ("bos", "pad"))
    provider = [] if compute == "f32" else [{"cuda": {}}]
    past, present = ("past_key_values.%d.", "present.%d.")
    return {
        "model": {
            "type": TYPE,
            "vocab_size": spec.vocab_size,
            "context_length": spec.context,
            "bos_token_id": bos if bos is not None else 0,
            "eos_token_id": (ends if len(ends) > 1 else ends[0]) if ends else [],
            "pad_token_id": pad if pad is not None else (ends[0] if ends else 0),
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": provider},
                "hidden_size": spec.width,
                "head_size": a.head_dim,
                "num_attention_heads": a.heads,
                "num_key_value_heads": a.kv_heads,
                "num_hidden_layers": spec.depth,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": f"{past}key",
                    "past_value_names": f"{past}value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{present}key",
                    "present_value_names": f"{present}value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": min(spec.context, LENGTH),
            "min_length": 0,
            "past_present_share_buffer": all(k is Kernel.GROUPED for k in kinds),
        },
    }
