"""Leaving GGUF: files without our own spec, as llama.cpp's tools write them, read back and converted to everything."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers, processors

import backends
from backends.base import QuantizedTensor, Tokenizer
from backends.gguf import build, pretokenizers
from backends.gguf.carriers import CARRIERS
from backends.gguf.container import read_header, read_rows, read_split
from backends.gguf.fit import examine
from backends.gguf.pack import unpack
from backends.gguf.runtime import Words
from backends.gguf.vocabulary import ALIASES, ONLY_READ, read_vocabulary
from backends.numpy.model import Oracle
from convert.pipeline import convert, convert_all
from convert.sources import Source, open_source
from convert.tokenizers import token_count
from convert.verify.tokens import check_tokenizer
from parity_tests.cases import FEATURES, nmse, random_ids, random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from parity_tests.gguf_specs import spec_for, write_file
from parity_tests.test_gguf_tokenizer import SEQUENCE, completed, sized, split, spm, trained
from parity_tests.tokenizer_shop import FAMILIES, family
from spec import Spec
from spec.config import MoE, Rope
from spec.errors import UserError

SAME = 1e-12
"""NMSE of float64 logits between the weights and what came back: only divisors of frequencies, which a file holds in
float32, and gains with an added offset, which it holds rounded, may cost anything (measured: at most 2e-14)."""


def alien(path: Path, out: Path) -> Path:
    """A copy whose spec and receipt nobody finds: it is read as a file of another program."""
    data = path.read_bytes()
    for ours in (b"allotrope.spec", b"allotrope.receipt"):
        assert data.count(ours) >= 1
        data = data.replace(ours, ours.replace(b"allo", b"poly"))
    out.write_bytes(data)
    return out


def quantized(path: Path, out: Path, kind: int) -> Path:
    """A copy that llama.cpp's own tool quantized."""
    from llama_cpp import llama_cpp as lib

    options = lib.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, 1
    assert lib.llama_model_quantize(os.fsencode(path), os.fsencode(out), ctypes.pointer(options)) == 0
    return out


def whole(source: Source) -> dict[str, np.ndarray[Any, Any]]:
    return {n: source.tensor(n) for n in source.names()}


def by_formula(spec: Spec) -> bool:
    """Whether nothing in the spec comes back in other words: rotary scalings that are written as divisors."""
    kinds = {p.scaling.kind for b in spec.layers if isinstance(p := b.attention.position, Rope) and p.scaling}
    return not kinds & {"longrope", "yarn", "dynamic"} and spec.embedding.positions is None


SEEDS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda c: c.arch)
def test_every_architecture_comes_back_as_the_same_function(carrier: Any, seed: int, tmp_path: Path) -> None:
    spec = spec_for(carrier, seed)
    weights = random_weights(spec, seed)
    path = write_file(spec, weights, tmp_path / "ours.gguf", fit=examine(spec, carrier))
    with open_source(alien(path, tmp_path / "m.gguf")) as source:
        ids = random_ids(spec, 1, 60, seed)
        got, want = Oracle(source.spec, whole(source)).logits(ids), Oracle(spec, weights).logits(ids)
        assert nmse(got, want) <= SAME
        for a, b in zip(source.spec.layers, spec.layers, strict=True):
            assert (a.placement, a.attention.heads, a.attention.window) == (
                b.placement, b.attention.heads, b.attention.window,
            )  # fmt: skip
            assert isinstance(a.mlp, MoE) == isinstance(b.mlp, MoE)
        if by_formula(spec) and carrier.arch != "gptneox":  # its two norms may have been one
            assert source.spec.model_copy(update={"name": spec.name}).hash == spec.hash


FOLDED = {
    "rms_offset": SAME, "rope_partial": SAME, "rope_dynamic": SAME, "rope_llama3": SAME, "rope_yarn": SAME,
    "rope_longrope": SAME, "nope_per_layer": SAME, "layernorm_no_weight": SAME, "logit_scale": SAME, "sinks": SAME,
    "local_theta": SAME, "alibi_odd_heads": SAME,
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_what_was_folded_is_still_the_same_function(name: str, tmp_path: Path) -> None:
    """Through the file's own spec the very weights come back, and without it weights that compute the same."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write_file(spec, weights, tmp_path / "ours.gguf")
    ids = random_ids(spec, 1, 47)
    want = Oracle(spec, weights).logits(ids)
    with open_source(path) as source:
        assert source.spec.hash == spec.hash and any("the spec that the file carries" in n for n in source.notes)
        for n, x in whole(source).items():
            np.testing.assert_allclose(x, weights[n], rtol=0, atol=2.0**-24 * (name == "rms_offset"))
    with open_source(alien(path, tmp_path / "m.gguf")) as source:
        assert nmse(Oracle(source.spec, whole(source)).logits(ids), want) <= (1e-10 if name == "rms_offset" else SAME)


def test_a_rounded_fold_stays_where_it_is(tmp_path: Path) -> None:
    """A scale of the logits that is no power of two went into the final norm in float32."""
    spec = FEATURES["llama"].model_copy(update={"head": FEATURES["llama"].head.model_copy(update={"scale": 0.3})})
    spec = Spec.model_validate(spec.model_dump(exclude_unset=True))
    weights, ids = random_weights(spec), random_ids(spec, 1, 40)
    plain = next(c for c in CARRIERS if c.arch == "llama")
    with open_source(write_file(spec, weights, tmp_path / "m.gguf", fit=examine(spec, plain))) as source:
        assert source.spec.head.scale is None
        assert any("it stays there" in n for n in source.notes)
        got = Oracle(source.spec, whole(source)).logits(ids)
    assert nmse(got, Oracle(spec, weights).logits(ids)) < 1e-13


def prepared(name: str) -> tuple[HFTokenizer, Tokenizer]:
    """A tokenizer as the writer takes it."""
    if name in SEQUENCE:
        pre, options, _ = SEQUENCE[name]
        if isinstance(pre, list):
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            pre = pre_tokenizers.Sequence([*pre, level])
        t = trained(pre, **options)
        return t, Tokenizer(json.loads(t.to_str()), eos="<|endoftext|>", pad="<|pad|>", chat_template="{{ messages }}")
    prefix, complete = name == "scores-prefix", name != "rules"
    data = completed(spm(prefix)) if complete else spm(prefix)
    data["post_processor"] = json.loads(processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    ).__getstate__())  # fmt: skip
    return HFTokenizer.from_str(json.dumps(data)), Tokenizer(data, bos="<s>", eos="</s>", unk="<unk>", add_bos=True)


def compare(t: HFTokenizer, tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """What is read from a file makes llama.cpp's ids of every text."""
    spec = sized(t.get_vocab_size() + 5)
    write_file(spec, random_weights(spec), path, tokenizer=tokenizer)
    found = read_vocabulary(read_header(path).keys, spec.vocab_size, "m.gguf")
    assert found is not None
    with Words(path) as words:
        check = check_tokenizer(words, found)
    assert check.status == "PASS", check.reason
    assert check.details["different"] == 0 and check.details["round_trips"] > 400
    return found


@pytest.mark.parametrize("name", [*SEQUENCE, "rules", "scores", "scores-prefix"])
def test_a_tokenizer_comes_back_with_the_same_ids(name: str, tmp_path: Path) -> None:
    t, tokenizer = prepared(name)
    found = compare(t, tokenizer, tmp_path / "m.gguf")
    assert (found.eos, found.pad, found.chat_template) == (tokenizer.eos, tokenizer.pad, tokenizer.chat_template)
    assert found.add_bos == tokenizer.add_bos and not found.add_eos
    assert HFTokenizer.from_str(json.dumps(found.json)).get_vocab() == t.get_vocab()


SHOP = [n for n in FAMILIES if n not in ("t5", "mt5")]  # llama.cpp applies their table of characters otherwise
QUICK = ("llama3", "phi3", "plain_unigram")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHOP])
def test_every_family_of_tokenizers_comes_back(name: str, tmp_path: Path) -> None:
    tokenizer = family(name)
    spec = sized(token_count(tokenizer))
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=tokenizer)
    found = read_vocabulary(read_header(tmp_path / "m.gguf").keys, spec.vocab_size, "m.gguf")
    assert found is not None and found.eos == tokenizer.eos
    with Words(tmp_path / "m.gguf") as words:
        check = check_tokenizer(words, found)
    assert check.status == "PASS", check.reason


@pytest.mark.slow
@pytest.mark.parametrize("known", pretokenizers.KNOWN, ids=lambda p: p.name)
def test_every_pre_tokenizer_comes_back(known: Any, tmp_path: Path) -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre = pre_tokenizers.Sequence([*(split(e) for e in known.expressions), level])
    t = trained(pre, ignore_merges=known.ignore_merges)
    compare(t, Tokenizer(json.loads(t.to_str()), eos="<|endoftext|>"), tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("alias", [*ALIASES, *ONLY_READ])
def test_every_other_name_of_a_pre_tokenizer_means_what_the_table_says(
    alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with that name, and the merges of any tokenizer of bytes."""
    ours = build.tokenizer_metadata
    monkeypatch.setattr(build, "tokenizer_metadata", lambda *a: {**ours(*a), "tokenizer.ggml.pre": alias})
    t, tokenizer = prepared("gpt2")
    compare(t, tokenizer, tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files of one model that llama.cpp's own tool quantized, by type."""
    folder = tmp_path_factory.mktemp("tools")
    source = write_checkpoint(folder / "source", llama())
    convert(source, "gguf", "f32", folder / "ours.gguf", verify=False)
    plain = alien(folder / "ours.gguf", folder / "f32.gguf")
    kinds = {"f32": 0, "q4_0": 2, "q8_0": 7, "q4_k_m": 15}

    def made(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else quantized(plain, path, kinds[name])

    return made


def codes(path: Path, name: str) -> QuantizedTensor:
    info = read_header(path).tensors[name]
    with path.open("rb") as f:
        found = unpack(read_rows(f, info, 0, info.rows), info.type)
    assert isinstance(found, QuantizedTensor)
    return found


@pytest.mark.parametrize(("kind", "level"), [("q4_0", "q4"), ("q8_0", "q8")])
def test_codes_and_scales_go_on_bit_for_bit(kind: str, level: str, tools: Any, tmp_path: Path) -> None:
    """Into GGUF as the same bytes, and into every other container as the same codes and scales, of either sign."""
    path = tools(kind)
    targets = ["gguf", "mlx", "onnx", "hf"]
    results = convert_all(path, targets, level, tmp_path, verify=False)
    theirs, ours = read_split(path).tensors, read_split(results[0].out).tensors
    held = [n for n, t in theirs.items() if t.type == kind]
    assert len(held) >= 15
    for name in held:
        a, b = theirs[name], ours[name]
        with a.file.open("rb") as f, b.file.open("rb") as g:
            assert np.array_equal(read_rows(f, a, 0, a.rows), read_rows(g, b, 0, b.rows)), name
    want = codes(path, "blk.1.ffn_down.weight")
    assert (want.scales < 0).any() == (kind == "q4_0")
    for result in results:
        artifact = backends.part(backends.get(result.backend), "read").open_artifact(result.out)
        got = artifact.rows("layers.1.mlp.down.weight", 0, 256)
        assert isinstance(got, QuantizedTensor) and got.bits == want.bits, result.backend
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.scales, want.scales)


def test_four_bits_in_eight_are_the_same_weights(tools: Any, tmp_path: Path) -> None:
    path = tools("q4_0")
    out = convert(path, "gguf", "q8", tmp_path / "m.gguf").out
    want, got = codes(path, "blk.0.attn_v.weight"), codes(out, "blk.0.attn_v.weight")
    assert (want.bits, got.bits) == (4, 8)
    np.testing.assert_array_equal(got.dequantize(), want.dequantize())


@pytest.mark.parametrize("target", ["onnx", *(pytest.param(t, marks=pytest.mark.slow) for t in ("mlx", "hf", "gguf"))])
def test_a_file_of_llama_cpp_becomes_a_verified_artifact(target: str, tools: Any, tmp_path: Path) -> None:
    """Q4_0 with a Q6_K head, whose rows are rounded again."""
    out = tmp_path / ("m.gguf" if target == "gguf" else "m")
    result = convert(tools("q4_0"), target, "q4", out)
    assert result.report is not None and {str(c.status) for c in result.report.checks} == {"PASS"}
    words = next(c for c in result.report.checks if c.name == "tokenizer")
    assert "llama.cpp's ids of the source too" in words.reason


@pytest.mark.slow
@pytest.mark.parametrize("target", ["mlx", "onnx", "hf", "coreml"])
@pytest.mark.parametrize(("kind", "level"), [("q8_0", "q8"), ("q4_k_m", "q8"), ("f32", "f16")])
def test_every_type_becomes_a_verified_artifact(target: str, kind: str, level: str, tools: Any, tmp_path: Path) -> None:
    if target == "coreml":
        pytest.importorskip("coremltools")
    out = tmp_path / ("m.mlpackage" if target == "coreml" else "m")
    result = convert(tools(kind), target, level, out)
    assert result.report is not None and result.report.ok


def test_scales_that_a_target_would_round_are_refused(tools: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--compute bf16: embed\.weight keeps the scales .* mlx would round"):
        convert(tools("q4_0"), "mlx", "q4", tmp_path / "m", options={"compute": "bf16"})
    with pytest.raises(UserError, match=r"--to tensorrt: .* negative"):
        convert(tools("q4_0"), "tensorrt", "q4", tmp_path / "m")
    assert not any(tmp_path.iterdir())


def edited(path: Path, out: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    out.write_bytes(data.replace(old, new))
    return out


WRONG = {
    "missing": ((b"blk.0.ffn_down.weight", b"blk.0.ffn_town.weight"),
                ["1 tensor is missing: blk.0.ffn_down.weight", "belongs to nothing in the model: blk.0.ffn_town"]),
    "key": ((b"llama.vocab_size", b"llama.vocal_size"), ["llama.vocal_size: 384 is an unknown key"]),
    "architecture": ((b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gamma"), ["'gamma' is none that is read"]),
    "tokenizer": ((b"\x04\0\0\0\0\0\0\0dbrx", b"\x04\0\0\0\0\0\0\0dbrz"),
                  ["tokenizer.ggml.pre: 'dbrz' is no pre-tokenizer that is read (did you mean dbrx?)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_known_is_named(name: str, tools: Any, tmp_path: Path) -> None:
    (old, new), messages = WRONG[name]
    with pytest.raises(UserError) as error:
        open_source(edited(tools("f32"), tmp_path / "m.gguf", old, new))
    assert all(m in str(error.value) for m in messages)


def test_a_gain_for_each_head_is_refused_by_name(tmp_path: Path) -> None:
    """StableLM's files hold one for each head; a spec has one for all."""
    spec = next(s for c in CARRIERS if c.arch == "stablelm" for n in range(20)
                if (s := spec_for(c, n)).layers[0].attention.qk_norm is not None)  # fmt: skip
    fit = examine(spec, next(c for c in CARRIERS if c.arch == "stablelm"))
    path = write_file(spec, random_weights(spec), tmp_path / "ours.gguf", fit=fit)
    other = alien(path, tmp_path / "m.gguf")
    info = read_header(other).tensors["blk.0.attn_q_norm.weight"]
    with other.open("r+b") as f:
        f.seek(info.offset)
        f.write(np.float32(9.0).tobytes())
    with open_source(other) as source, pytest.raises(UserError, match=r"blk\.0\.attn_q_norm\.weight: a gain for each"):
        source.tensor("layers.0.attn.q_norm.weight")


def test_a_weight_that_is_no_number_is_named(tools: Any, tmp_path: Path) -> None:
    path = edited(tools("q8_0"), tmp_path / "m.gguf", b"blk.0.", b"blk.0.")
    info = read_header(path).tensors["blk.0.attn_v.weight"]
    with path.open("r+b") as f:
        f.seek(info.offset + 3 * info.row_bytes)
        f.write(np.float16("nan").tobytes())
    with open_source(path) as source, pytest.raises(UserError, match=r"layers\.0\.attn\.v\.weight: nan at row 3"):
        list(source.values("layers.0.attn.v.weight"))
    with pytest.raises(UserError, match="nan at row 3"):
        convert(path, "gguf", "q8", tmp_path / "out.gguf", verify=False)
    assert not (tmp_path / "out.gguf").exists()


def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    path = alien(write_file(spec, random_weights(spec), tmp_path / "ours.gguf"), tmp_path / "m.gguf")
    with open_source(path) as source:
        assert source.tokenizer is None and source.name == "m"
        assert source.dtypes() == {"f32": len(source.names())}
