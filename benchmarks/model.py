"""A Llama with random weights as a Hugging Face folder: `python -m benchmarks.model FOLDER MILLIONS`.

Everything is deterministic. The tokenizer is a SentencePiece BPE trained on the standard library, given both as
tokenizer.model (which llama.cpp's converter reads) and as tokenizer.json.
"""

from __future__ import annotations

import io
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 8192
SPECIAL = ("<unk>", "<s>", "</s>")


def dimensions(millions: int) -> dict[str, int]:
    """Width, depth and hidden width of about that many parameters, with widths that every ggml type divides."""
    width = next(w for w in (256, 512, 1024, 2048, 4096) if w >= 4096 or _size(w, 1) * 12 > millions * 1e6)
    depth = max(1, round((millions * 1e6 - 2 * VOCAB * width) / (_size(width, 1) - 2 * VOCAB * width)))
    return {"width": width, "depth": depth, "hidden": width * 5 // 2, "heads": width // 64, "kv_heads": width // 256}


def _size(width: int, depth: int) -> int:
    attention = 2 * width * width + 2 * width * width // 4
    return 2 * VOCAB * width + depth * (attention + 3 * width * (width * 5 // 2))


def write(folder: Path, millions: int) -> int:
    """Write the folder; returns the number of parameters."""
    d = dimensions(millions)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "vocab_size": VOCAB,
        "hidden_size": d["width"], "intermediate_size": d["hidden"], "num_hidden_layers": d["depth"],
        "num_attention_heads": d["heads"], "num_key_value_heads": d["kv_heads"], "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _tokenizer(folder)
    return _weights(folder / "model.safetensors", d)


def _shapes(d: dict[str, int]) -> dict[str, tuple[int, ...]]:
    w, h, kv = d["width"], d["hidden"], d["kv_heads"] * 64
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, w)}
    for i in range(d["depth"]):
        layer = {
            "input_layernorm": (w,), "self_attn.q_proj": (w, w), "self_attn.k_proj": (kv, w),
            "self_attn.v_proj": (kv, w), "self_attn.o_proj": (w, w), "post_attention_layernorm": (w,),
            "mlp.gate_proj": (h, w), "mlp.up_proj": (h, w), "mlp.down_proj": (w, h),
        }  # fmt: skip
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out | {"model.norm.weight": (w,), "lm_head.weight": (VOCAB, w)}


def _weights(path: Path, d: dict[str, int]) -> int:
    """A safetensors file, tensor by tensor: an eight-byte length, a JSON header, the data."""
    header: dict[str, Any] = {}
    offset = total = 0
    for name, shape in _shapes(d).items():
        n = int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + 2 * n]}
        offset, total = offset + 2 * n, total + n
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for shape in _shapes(d).values():
            values = rng.standard_normal(shape, np.float32)
            values = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
            f.write(values.astype(np.float16).tobytes())
    return total


def _tokenizer(folder: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = (line for p in files for line in p.read_text(encoding="utf-8", errors="replace").splitlines() if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        input_sentence_size=30000, shuffle_input_sentence=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(VOCAB)}
    bpe = models.BPE(vocab=vocab, merges=_merges(vocab), unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer", "unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece numbers its BPE pieces in order of merging: every split into two pieces is a merge, ranked by the
    piece that it makes."""
    out: list[tuple[int, int, int, str, str]] = []
    for piece, rank in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                out.append((rank, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(out)]


if __name__ == "__main__":
    sys.stdout.write(f"{write(Path(sys.argv[1]), int(sys.argv[2]))}\n")
