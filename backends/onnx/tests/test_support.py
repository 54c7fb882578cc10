"""What is carried, by which operator, as a user is told before anything is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.onnx.kernels import Kernel, kernel
from backends.onnx.support import HOLDS, OPTIONS, bits, levels, support
from parity_tests.cases import FEATURES
from spec import load
from spec.load import presets

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_every_preset_is_carried_at_every_level(name: str, profile: str) -> None:
    for compute, held in HOLDS.items():
        for level in levels():
            got = support(load(name), level, profile=profile, compute=compute)
            assert got.ok is (level in held)
            assert got.ok or "again" in got.refusals[0]


def test_presets_run_in_the_fused_attention() -> None:
    for name in presets():
        kinds = {kernel(b.attention, "ort") for b in load(name).layers}
        assert kinds == {Kernel.GROUPED}, name


def test_refusals_name_what_works() -> None:
    spec = FEATURES["llama"]
    assert "did you mean q4" in support(spec, "q4_k").refusals[0] or "known" in support(spec, "q4_k").refusals[0]
    assert "did you mean portable" in support(spec, "q4", profile="portabel").refusals[0]
    assert support(spec, "f32", compute="f16").refusals == (
        "compute: f16 would round the weights of level f32 again (try --compute f32, or --quant f16)",
    )


def test_int8_activations_are_refused_where_nothing_rounds_them() -> None:
    spec = FEATURES["llama"]
    assert support(spec, "q8", activations="int8").ok and support(spec, "f16", activations="float").ok
    for options, fix in (({"profile": "portable"}, "--profile ort"), ({"compute": "f16"}, "--compute f32")):
        (refusal,) = support(spec, "q8", activations="int8", **options).refusals
        assert refusal.startswith("activations: int8 is ") and refusal.endswith(f"({fix})")
    (refusal,) = support(spec, "f16", activations="int8").refusals
    assert refusal == "activations: int8 is for products with q8 or q4 weights, and f16 has none (leave it out)"
    (refusal,) = support(spec, "q8", activations="int4").refusals
    assert refusal.startswith("activations: int4 is no choice")


def test_float_activations_leave_no_case_for_eight_bits_in_the_fused_experts() -> None:
    spec = load("qwen3-30b-a3b")
    assert support(spec, "q8").carrier == "ort: 48 x GroupQueryAttention, 48 x QMoE"
    assert support(spec, "q8", activations="float").carrier.endswith("48 x Loop over experts")


def test_notes_say_what_a_user_should_know() -> None:
    assert "widths [36] are no multiples of 32" in " ".join(support(FEATURES["uneven_width"], "q4").notes)
    assert "rotary tables for 131072 tokens take 34 MB" in " ".join(support(load("llama-3.2-1b"), "q4").notes)
    assert support(FEATURES["llama"], "q4").notes == ()


def test_experts_are_counted_by_what_runs_them() -> None:
    """Any number of them is carried: each token passes its own alone."""
    spec = load("qwen3-30b-a3b")
    assert support(spec, "q4").carrier == "ort: 48 x GroupQueryAttention, 48 x QMoE"
    assert support(spec, "f16").carrier.endswith("48 x Loop over experts")
    assert support(spec, "q4", profile="portable").carrier == "portable: 48 x Attention, 48 x Loop over experts"
    assert "no case for QMoE" in support(FEATURES["moe"], "q4").notes[-1]


def test_bits_count_scales() -> None:
    assert [bits(level) for level in levels()] == [32, 16, 16, 8.5, 4.5, 4.125]
    assert [o.default for o in OPTIONS] == ["ort", "f32", ""]


def isolated(code: str, *absent: str) -> str:
    """Output of a program that cannot import some packages."""
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_support_and_size_need_no_onnx() -> None:
    code = (
        "from spec import load\nfrom convert.recipe import plan\nfrom backends.onnx.support import support\n"
        "from backends.onnx.build import size\ns = load('tiny')\n"
        "print(support(s, 'q4').carrier, size(s, plan(s, 'q4'), None) > 0)"
    )
    out = isolated(code, "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "torch")
    assert out.startswith("ort: ") and out.endswith("GroupQueryAttention True")


def test_converting_and_running_need_neither_torch_nor_genai(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxruntime")
    code = (
        "from pathlib import Path\nfrom parity_tests.artifacts import write, check_graph\n"
        "from parity_tests.cases import FEATURES, random_weights\n"
        f"spec, path = FEATURES['gemma2'], Path({str(tmp_path / 'm')!r})\n"
        "write('onnx', spec, random_weights(spec), path, 'q4')\ncheck_graph('onnx', path, threads=1)\nprint('ok')"
    )
    absent = ("torch", "transformers", "onnxruntime_genai", "onnxscript", "gguf", "llama_cpp", "mlx", "coremltools")
    assert isolated(code, *absent) == "ok"
