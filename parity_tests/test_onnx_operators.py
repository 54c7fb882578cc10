"""The graphs themselves: standard operators, fused ones against their defaults, padding, caches of fixed length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort

from backends.numpy.model import Oracle
from backends.onnx.build import GraphWriter
from backends.onnx.contrib import OrtOps
from backends.onnx.portable import PortableOps
from backends.onnx.read import GraphReader
from convert.recipe import plan
from convert.stream import rounded
from parity_tests.artifacts import EXACT, write
from parity_tests.cases import FEATURES, nmse, random_ids, random_weights
from parity_tests.checkpoints import llama
from parity_tests.test_onnx import wide
from spec import Spec
from spec.ops import Ops

Feed = dict[str, Any]


def session(folder: Path) -> Any:
    """Plain ONNX Runtime, as anyone would open the file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def empty(spec: Spec, batch: int, slots: int = 0, fill: float = 0.0) -> Feed:
    """Caches as the graph takes them in."""
    return {
        f"past_key_values.{i}.{kind}": np.full(
            (batch, b.attention.kv_heads or 0, slots, b.attention.head_dim or 0), fill, np.float32
        )
        for i, b in enumerate(spec.layers)
        for kind in ("key", "value")
    }


def logits(folder: Path, spec: Spec, ids: np.ndarray) -> np.ndarray:
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty(spec, len(ids))}
    return session(folder).run(["logits"], feed)[0]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("level", ["q4", pytest.param("f32", marks=SLOW), pytest.param("q8", marks=SLOW)])
@pytest.mark.parametrize("name", FEATURES)
def test_the_portable_graph_is_standard_onnx(name: str, level: str, tmp_path: Path) -> None:
    spec = FEATURES[name]
    write("onnx", spec, random_weights(spec), tmp_path / "m", level, profile="portable")
    file = str(tmp_path / "m/model.onnx")
    onnx.checker.check_model(file, full_check=True)
    onnx.shape_inference.infer_shapes_path(file, str(tmp_path / "inferred.onnx"), strict_mode=True, check_type=True)
    model = onnx.load(file, load_external_data=False)
    assert {n.domain for n in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    inferred = onnx.load(str(tmp_path / "inferred.onnx"), load_external_data=False).graph
    assert len({v.name for v in inferred.value_info}) >= len(model.graph.node) - len(model.graph.output)


def test_nodes_and_values_have_the_names_of_the_taps(tmp_path: Path) -> None:
    spec = FEATURES["qwen3"]
    write("onnx", spec, random_weights(spec), tmp_path / "m", profile="portable")
    graph = onnx.load(str(tmp_path / "m/model.onnx"), load_external_data=False).graph
    taps: dict[str, Any] = {}
    Oracle(spec, random_weights(spec)).logits(random_ids(spec, 1, 4), taps)
    assert set(taps) <= {o for n in graph.node for o in n.output}
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names) and all(names)


def test_the_default_profile_uses_the_fused_operators(tmp_path: Path) -> None:
    spec = llama(head={"tied": True})
    write("onnx", spec, random_weights(spec), tmp_path / "m", "q4")
    graph = onnx.load(str(tmp_path / "m/model.onnx"), load_external_data=False).graph
    count = Counter(n.op_type for n in graph.node if n.domain == "com.microsoft")
    assert count == {
        "GroupQueryAttention": 2, "MatMulNBits": 2 * 7 + 1, "GatherBlockQuantized": 1,
        "SkipSimplifiedLayerNormalization": 2, "QuickGelu": 2,
    }  # fmt: skip
    levels = [a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4] * 15


OVERRIDES: dict[str, tuple[Any, list[Spec]]] = {
    "add_norm": (Ops.add_norm, [FEATURES[n] for n in ("llama", "rms_offset", "layernorm_bias", "layernorm_no_weight")]),
    "act": (PortableOps.act, [FEATURES[n] for n in ("llama", "quick_gelu")]),
    "norm": (PortableOps.norm, [FEATURES[n] for n in ("qk_norm_head", "qk_layernorm", "rms_no_weight")]),
    "attend": (
        Ops.attend,
        [
            *(wide(n, 16) for n in ("llama", "mqa", "window", "sinks", "attn_softcap", "nope_per_layer", "rope_yarn")),
            *(wide(n, 32) for n in ("rope_partial", "gemma2", "odd_heads", "local_theta")),
        ],
    ),
}
"""Fused operators, the composition that each stands for, and specs that exercise it."""


@pytest.mark.parametrize(
    ("name", "spec"), [pytest.param(n, s, id=f"{n}-{s.name}") for n, (_, specs) in OVERRIDES.items() for s in specs]
)
def test_a_fused_operator_equals_its_default(
    name: str, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, ids = random_weights(spec), random_ids(spec, 3, 30)
    write("onnx", spec, weights, tmp_path / "fused")
    monkeypatch.setattr(OrtOps, name, OVERRIDES[name][0])
    write("onnx", spec, weights, tmp_path / "default")
    kinds = [
        Counter(n.op_type for n in onnx.load(str(tmp_path / f / "model.onnx"), load_external_data=False).graph.node)
        for f in ("fused", "default")
    ]
    assert name == "norm" or kinds[0] != kinds[1], "the override is what differs"
    got = [logits(tmp_path / f, spec, ids) for f in ("fused", "default")]
    assert nmse(got[0], got[1]) < 1e-12


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("name", ["tied", "all_bias"])
def test_fused_products_and_look_ups_equal_their_defaults(name: str, level: str, tmp_path: Path) -> None:
    """MatMulNBits under accuracy level 1 and GatherBlockQuantized against DequantizeLinear and MatMul."""
    import backends

    spec, ids = FEATURES[name], random_ids(FEATURES[name], 2, 20)
    got = []
    for profile in ("ort", "portable"):
        write("onnx", spec, random_weights(spec), tmp_path / profile, level, profile=profile)
        with backends.load(tmp_path / profile, exact=True, threads=1) as runtime:
            got.append(runtime.logits(ids))
    assert nmse(got[0], got[1]) < 1e-12


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("level", ["f32", "f16", "q8", "q4"])
def test_a_tied_embedding_lies_in_the_file_once(level: str, profile: str, tmp_path: Path) -> None:
    tied, untied = llama(head={"tied": True}), llama()
    for name, spec in (("tied", tied), ("untied", untied)):
        write("onnx", spec, random_weights(spec), tmp_path / name, level, profile=profile)
    data = [(tmp_path / n / "model.onnx.data").stat().st_size for n in ("untied", "tied")]
    stored = {"f32": 4.0, "f16": 2.0, "q8": 8.5 / 8 + 2 / 32, "q4": 8.5 / 8 + 2 / 32}[level]
    assert data[0] - data[1] >= 0.5 * tied.vocab_size * tied.width * stored
    reader = GraphReader(tmp_path / "tied", tied, "portable" if profile == "portable" else "ort")
    spans = {(f.offset, f.nbytes) for n, f in reader.initializers.items() if n.startswith("embed.weight")}
    assert len(spans) == (1 if level in ("f32", "f16") else 2), "codes and scales, whatever the views"


SIDES = {"right": slice(0, 9), "left": slice(7, 16), "both": slice(3, 12)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "window_pattern", "sinks", "alibi", "learned", "gpt2"])
def test_padding_changes_nothing(name: str, side: str, tmp_path: Path) -> None:
    check_padding(FEATURES[name], side, tmp_path / "m", "portable")


@pytest.mark.parametrize("name", ["llama", "window", "sinks", "nope_per_layer"])
def test_padding_on_the_right_changes_nothing_in_the_fused_attention(name: str, tmp_path: Path) -> None:
    check_padding(wide(name, 16), "right", tmp_path / "m", "ort")


def test_the_fused_attention_refuses_padding_on_the_left(tmp_path: Path) -> None:
    for name in ("llama", "learned"):
        with pytest.raises(Exception, match="total_sequence_length"):
            check_padding(wide(name, 16), "left", tmp_path / name, "ort")


def check_padding(spec: Spec, side: str, path: Path, profile: str) -> None:
    """A padded row beside a longer one: both as the oracle computes them alone, then four more tokens."""
    weights = random_weights(spec)
    write("onnx", spec, weights, path, profile=profile)
    run, oracle = session(path), Oracle(spec, weights)
    long, short = random_ids(spec, 2, 20)
    at = SIDES[side]
    ids, mask = np.full((2, 16), 3), np.zeros((2, 16), np.int64)
    ids[0], mask[0] = long[:16], 1
    ids[1, at], mask[1, at] = short[:9], 1
    y, *caches = run.run(None, {"input_ids": ids, "attention_mask": mask, **empty(spec, 2)})
    assert nmse(y[0], oracle.logits(long[None, :16])[0]) <= EXACT
    assert nmse(y[1, at], oracle.logits(short[None, :9])[0]) <= EXACT
    for t in range(4):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
        feed = {"input_ids": np.stack([long[16 + t :][:1], short[9 + t :][:1]]), "attention_mask": mask}
        y, *caches = run.run(None, feed | dict(zip(empty(spec, 2), caches, strict=True)))
        for got, tokens in ((y[0, 0], long[: 17 + t]), (y[1, 0], short[: 10 + t])):
            assert nmse(got, oracle.logits(tokens[None])[0, -1]) <= 4 * EXACT
    assert all(np.isfinite(c).all() for c in caches), "padding leaves no NaN behind"


@pytest.mark.parametrize("level", ["f32", "q4"])
@pytest.mark.parametrize("name", ["llama", "tied", "window_pattern", "sinks", "attn_softcap", "alibi", "learned"])
def test_caches_of_fixed_length_match_the_oracle(name: str, level: str, tmp_path: Path) -> None:
    """What TensorRT builds from; whatever lay in the caches before does not matter."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    planned = plan(spec, level)
    writer = GraphWriter(spec, planned, tmp_path / "m", cache="static", rows_first=False)
    for p in planned:
        writer.write(p.name, 0, rounded(p.name, p.level, 0, weights[p.name]))
    writer.close()
    onnx.checker.check_model(str(tmp_path / "m/model.onnx"), full_check=True)
    reader = GraphReader(tmp_path / "m", spec, "portable")
    assert reader.problems(planned, "f32") == {}
    stored = {p.name: reader.rows(p.name, 0, p.shape[0]) for p in planned}
    dense: Any = {n: v if isinstance(v, np.ndarray) else v.dequantize() for n, v in stored.items()}
    run, ids, parts, at = session(tmp_path / "m"), random_ids(spec, 3, 40), [], 0
    caches = empty(spec, 3, spec.context, 1e4)
    for n in (9, 1, 20, 1, 9):
        feed = {"input_ids": ids[:, at : at + n], "write_indices": np.full(3, at), **caches}
        feed["attention_mask"] = np.ones((3, at + n), np.int64)
        y, *after = run.run(None, feed)
        parts.append(y)
        caches, at = dict(zip(caches, after, strict=True)), at + n
    assert nmse(np.concatenate(parts, 1), Oracle(spec, dense).logits(ids)) <= EXACT
