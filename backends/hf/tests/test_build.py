"""The writer: any order, any blocks, nothing lost, nothing left behind; and what a damaged folder says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import load
from backends.base import Planned, QuantizedTensor
from backends.folder import read_mark
from backends.hf import store
from backends.hf.build import SCALES, size, stamp, writer
from backends.hf.carriers import BY_ARCH
from backends.hf.fit import choose
from backends.hf.read import open_artifact
from backends.hf.store import codes_of, pack, unpack
from backends.hf.support import bits, levels, support
from convert.quantize import quantize
from convert.recipe import plan
from convert.stream import rounded
from parity_tests.cases import BASE, FEATURES, random_weights
from spec import Spec, UserError, params, parse
from spec import load as load_spec
from spec.config import merge
from spec.layout import Layout
from spec.levels import CODES, GROUPS


def write(
    spec: Spec, weights: Any, path: Path, block: int, level: str = "f32", backwards: bool = False
) -> dict[str, bytes]:
    planned = plan(spec, level)
    out = writer(spec, planned, None, path, level=level, metadata={}, threads=2)
    for p in sorted(planned, key=lambda p: p.name, reverse=backwards):
        x = weights[p.name]
        step = block if x.ndim > 1 else len(x)
        starts = range(0, len(x), step)
        for start in reversed(starts) if backwards else starts:
            out.write(p.name, start, rounded(p.name, p.level, start, x[start : start + step]))
    out.close({"a": 1})
    return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("name", ["llama", "rope_partial", "gpt2", "norm_sandwich", "neox"])
def test_blocks_and_their_order_change_nothing(name: str, level: str, tmp_path: Path) -> None:
    spec = FEATURES[name]
    weights = random_weights(spec)
    whole = write(spec, weights, tmp_path / "a", 10_000, level)
    assert write(spec, weights, tmp_path / "b", 5, level, backwards=True) == whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "rope_partial", "norm_sandwich"])
def test_safetensors_reads_what_was_written(name: str, tmp_path: Path) -> None:
    """An independent reader sees every tensor as the table of names arranges it."""
    from safetensors.numpy import load_file

    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    write(spec, weights, tmp_path / "m", 7)
    found = load_file(tmp_path / "m" / "model.safetensors")
    fit = choose(spec)
    for bound in Layout(fit.carrier.rules, fit.spec).rules:
        want = bound.apply([weights[p.name] for p in bound.canonical])
        for external, value in zip(bound.external, want, strict=True):
            np.testing.assert_array_equal(found[external], value)


def test_compressed_tensors_unpacks_the_codes_that_went_in() -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for width in (4, 8):
        low = -(1 << (width - 1))
        codes = np.random.default_rng(0).integers(low, -low, (5, 96)).astype(np.int8)
        words = pack(codes, width)
        theirs = helpers.pack_to_int32(torch.from_numpy(codes), width).numpy()
        np.testing.assert_array_equal(words.view(np.int32), theirs)
        np.testing.assert_array_equal(unpack(words, width), codes)


@pytest.mark.parametrize("level", GROUPS)
def test_codes_come_back_from_products(level: str) -> None:
    """Codes of 0 and scales at both ends of float16 too."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 256)) * np.exp(rng.uniform(-14, 6, (64, 1)))).astype(np.float32)
    q = quantize(x, CODES[level], GROUPS[level])
    x = q.dequantize()
    if q.bits == 4:
        np.testing.assert_array_equal(x.astype(np.float16).astype(np.float32), x)
    back = codes_of(x, q.scales, level)
    assert isinstance(back, QuantizedTensor)
    np.testing.assert_array_equal(back.codes, q.codes)
    at = np.unravel_index(np.abs(x).argmax(), x.shape)
    for wrong in (np.nextafter(x[at], np.float32(np.inf)), np.float32(np.nan), x[at] * 300):
        y = x.copy()
        y[at] = wrong
        assert codes_of(y, q.scales, level) is y


def test_a_missing_row_is_our_bug(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, plan(spec, "f32"), None, tmp_path / "m", level="f32", metadata={}, threads=1)
    with pytest.raises(AssertionError, match="rows missing"):
        out.close({})
    out.abort()
    assert not (tmp_path / "m").exists()


def test_the_mark_comes_last_and_is_stamped(tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m"
    before = write(spec, random_weights(spec), path, 64)
    stamp(path, {"parity": "measured"})
    assert read_mark(path)["receipt"] == {"parity": "measured"}
    artifact = open_artifact(path)
    assert artifact.source.hash == spec.hash and artifact.level == "f32"
    assert (path / "model.safetensors").read_bytes() == before["model.safetensors"]


@pytest.mark.parametrize("level", ["f32", "f16", "q4"])
def test_the_announced_size_is_about_the_size(level: str, tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "window_pattern"):
        spec = FEATURES[name]
        files = write(spec, random_weights(spec), tmp_path / name, 64, level)
        total = sum(map(len, files.values()))
        spare = size(spec, plan(spec, level), None) - total  # room for a real receipt
        assert 0 <= spare < 4000 + 160 * len(plan(spec, level))


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    spec, weights = FEATURES["llama"], random_weights(FEATURES["llama"])
    monkeypatch.setattr(store, "SHARD", 8_000)
    path = tmp_path / "m"
    files = write(spec, weights, path, 7, "q4")
    shards = [n for n in files if n.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors" not in files
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == set(shards)
    monkeypatch.undo()
    artifact = open_artifact(path)
    assert artifact.problems(plan(spec, "q4")) == {}
    got = artifact.rows("layers.1.mlp.down.weight", 3, 9)
    want = quantize(weights["layers.1.mlp.down.weight"][3:9], got.bits if isinstance(got, QuantizedTensor) else 0)
    assert isinstance(got, QuantizedTensor) and np.array_equal(got.codes, want.codes)
    with load(path) as runtime:
        assert np.isfinite(runtime.logits(np.arange(6)[None])).all()


def test_a_full_disk_shows_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    spec = FEATURES["llama"]
    with pytest.raises(UserError, match=r"No space left on device: needs 0\.\d MB"):
        writer(spec, plan(spec, "f32"), None, tmp_path / "m", level="f32", metadata={}, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = FEATURES["llama"]
    with pytest.raises(UserError) as e:
        writer(spec, plan(spec, "f32"), None, tmp_path / "file" / "m", level="f32", metadata={}, threads=1)
    assert "\n" not in str(e.value)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="File exists"):
        writer(spec, plan(spec, "f32"), None, mine, level="f32", metadata={}, threads=1)
    assert (mine / "thesis.txt").read_text() == "x"


def test_a_gain_beyond_float16_is_refused(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, plan(spec, "f16"), None, tmp_path / "m", level="f16", metadata={}, threads=1)
    with pytest.raises(UserError, match=r"final_norm\.weight: a value of 100000 is beyond f16: use --quant f32"):
        out.write("final_norm.weight", 0, np.full(32, 1e5, np.float32))
    out.abort()


@pytest.mark.parametrize("level", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFF800000])
def test_what_is_no_number_is_called_so(bits: int, level: str, tmp_path: Path) -> None:
    """Every level, though a NaN of all ones would round to a bfloat16 zero."""
    spec = FEATURES["llama"]
    out = writer(spec, plan(spec, level), None, tmp_path / "m", level=level, metadata={}, threads=1)
    with pytest.raises(UserError, match=r"final_norm\.weight: a value is (nan|-inf): the source is damaged$"):
        out.write("final_norm.weight", 0, np.full(32, bits, np.uint32).view(np.float32))
    out.abort()


def _damaged(path: Path, what: str) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if what == "truncated":
        file.write_bytes(bytes(data[:-5]))
    elif what == "garbage":
        file.write_bytes(b"\x10" + bytes(7) + b"not a header at all")
    elif what == "gone":
        file.unlink()
    elif what == "config":
        (path / "config.json").write_text("{")
    elif what == "foreign":
        (path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif what == "other":
        (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    else:
        (path / "allotrope.json").unlink()


@pytest.mark.parametrize("what", ["truncated", "garbage", "gone", "config", "foreign", "other", "mark"])
def test_a_damaged_folder_is_one_line(what: str, tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m"
    write(spec, random_weights(spec), path, 64)
    _damaged(path, what)
    with pytest.raises(UserError) as e:
        open_artifact(path)
    assert "\n" not in str(e.value)
    if what != "mark":
        pytest.importorskip("transformers")
        with pytest.raises(UserError) as e:
            load(path, "hf")
        assert "\n" not in str(e.value)


def _change(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_what_was_changed_afterwards_is_named(tmp_path: Path) -> None:
    spec, path = FEATURES["rms_no_weight"], tmp_path / "m"
    write(spec, random_weights(spec), path, 64)
    planned = plan(spec, "f32")
    assert open_artifact(path).problems(planned) == {}
    _change(path, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10001.0})
    assert set(open_artifact(path).problems(planned)) == {
        "config.json rms_norm_eps",
        "config.json rope_parameters.rope_theta",
    }
    halved = [Planned(p.name, p.shape, "f16") if p.name == "embed.weight" else p for p in planned]
    assert "model.embed_tokens.weight" in open_artifact(path).problems(halved)
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(np.ones(32, np.float32).tobytes(), np.full(32, 2, np.float32).tobytes(), 1))
    _change(path, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert "is not 1 throughout" in str(open_artifact(path).problems(planned))


def test_what_was_added_or_taken_away_is_named(tmp_path: Path) -> None:
    """config.json is compared whole, and files that a client would read besides."""
    spec, path = FEATURES["gpt2"], tmp_path / "m"
    write(spec, random_weights(spec), path, 64)
    planned, kept = plan(spec, "f32"), (path / "config.json").read_text()
    _change(path, scale_attn_by_inverse_layer_idx=True)
    found = open_artifact(path).problems(planned)
    assert found == {"config.json scale_attn_by_inverse_layer_idx": "does not belong there"}
    (path / "config.json").write_text(json.dumps({k: v for k, v in json.loads(kept).items() if k != "n_inner"}))
    assert open_artifact(path).problems(planned) == {"config.json n_inner": "is missing"}
    (path / "config.json").write_text(kept)
    (path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert list(open_artifact(path).problems(planned)) == ["generation_config.json"]


def test_an_index_that_points_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m"
    monkeypatch.setattr(store, "SHARD", 8_000)
    write(spec, random_weights(spec), path, 64)
    index = path / "model.safetensors.index.json"
    assert open_artifact(path).problems(plan(spec, "f32")) == {}
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = data["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(data))
    assert "model.safetensors.index.json" in open_artifact(path).problems(plan(spec, "f32"))
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="clients take the first"):
        open_artifact(path)


def test_the_scales_beside_belong_to_the_folder(tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m"
    write(spec, random_weights(spec), path, 64, "q4")
    (path / SCALES).unlink()
    with pytest.raises(UserError, match="No such file"):
        open_artifact(path)


def test_support_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['compressed_tensors'] = None\n"
        "from spec import load\nfrom backends.hf.support import support\nimport backends.hf.build, backends.hf.read\n"
        "print(support(load('gpt2'), 'q4').carrier)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.stdout.strip() == "gpt2"


def test_a_refusal_names_the_field_its_value_and_what_comes_nearest() -> None:
    got = support(FEATURES["attn_softcap"], "f32")
    assert got.refusals[0].startswith("block.attention.softcap: 2")
    assert "nearest: vaultgemma" in got.refusals[0] and "embedding.scale" in got.refusals[0]
    assert "known: bf16, f16, f32, q4, q4-g128, q8" in support(FEATURES["llama"], "q5").refusals[0]
    assert len(support(FEATURES["gemma2"], "f32").refusals) == 1
    assert all(bits(level) > 4 for level in levels())


@pytest.mark.parametrize(("level", "told"), [("f16", "float16"), ("bf16", "bfloat16"), ("q8", "float32")])
def test_config_json_asks_for_the_dtype_that_holds_the_weights(level: str, told: str, tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    write(spec, random_weights(spec), tmp_path / "m", 64, level)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == told


def test_alibi_that_transformers_would_round_is_refused_in_16_bits() -> None:
    """BLOOM adds slope * position in the model's dtype: its error grows with the position (bfloat16: 1e-2 at 1500)."""
    from parity_tests.hf_specs import spec_for

    spec = spec_for(BY_ARCH["bloom"][0], 0)
    assert [level for level in levels() if support(spec, level).ok] == ["f32", "q8", "q4", "q4-g128"]
    assert "rounds ALiBi" in support(spec, "bf16").refusals[0]
    assert all(support(spec_for(BY_ARCH["mpt"][0], 0), level).ok for level in levels())


def test_mistakes_at_run_time_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    spec, path = FEATURES["llama"], tmp_path / "m"
    write(spec, random_weights(spec), path, 64)
    with load(path, "hf", context=20) as runtime:
        assert (runtime.context, runtime.vocab_size) == (20, 97)
        ids = np.arange(19)
        with pytest.raises(UserError, match="no sequence to continue"):
            runtime.step(ids[:1])
        for bad, message in (
            (np.array([97]), r"beyond the vocabulary of 97"), (np.array([-1]), "beyond the vocabulary"),
            (np.array([], int), "is needed"), (np.arange(21), "21 tokens exceed the session's context of 20"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=message):
                runtime.prefill(bad)
            with pytest.raises(UserError, match=message):
                runtime.logits(bad[None])
        first = runtime.prefill(ids)
        assert runtime.step(np.array([3])).shape == (1, 97)
        with pytest.raises(UserError, match="21 tokens exceed"):
            runtime.step(np.array([3]))
        np.testing.assert_allclose(runtime.prefill(ids), first, rtol=0, atol=0)
        with pytest.raises(UserError, match=r"no tokenizer\.json"):
            runtime.encode("x")
    for options in ({"context": 0}, {"context": 49}, {"threads": 0}, {"dtype": "f12"}, {"attention": "none such"}):
        with pytest.raises(UserError) as e:
            load(path, "hf", **options)
        assert "\n" not in str(e.value)


def test_every_preset_has_a_size() -> None:
    for name in ("llama-3.2-1b", "gemma-2-2b", "gpt2"):
        spec = load_spec(name)
        weights = sum(p.size for p in params(spec))
        assert size(spec, plan(spec, "f16"), None) == pytest.approx(2 * weights, rel=0.02)


def test_specs_of_one_function_keep_their_own_initialisation_and_dropout(tmp_path: Path) -> None:
    """The choice of a carrier is remembered by function; what config.json says of training is the spec's own."""
    for n, (std, dropout) in enumerate([(0.02, 0.0), (0.05, 0.1)]):
        patch = {"init": {"std": std}, "block": {"attention": {"dropout": dropout}}}
        spec = parse(merge(BASE, patch))
        assert choose(spec).source is spec
        path = tmp_path / str(n)
        write(spec, random_weights(spec), path, 64)
        config = json.loads((path / "config.json").read_text())
        assert (config["initializer_range"], config["attention_dropout"]) == (std, dropout)
        assert open_artifact(path).problems(plan(spec, "f32")) == {}
