"""The clients that people use, on folders as a conversion leaves them: mlx_lm.load, generate, batches, CLI, server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import backends
from backends.generate import generate
from backends.numpy.model import Oracle
from backends.numpy.ops import NumpyOps
from convert import gates
from convert.pipeline import convert
from convert.verify.emulate import to_int8
from convert.verify.numeric import emulate_dtype
from parity_tests.artifacts import opened, values
from parity_tests.cases import nmse
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec

PROMPT = "def main(argv):\n    "
TOKENS = 16

NATIVE = {"width": 64, "block": {"attention": {"heads": 3, "kv_heads": 1, "head_dim": 32}, "mlp": {"hidden": 96}}}
BUNDLED = {
    **NATIVE, "depth": 3, "head": {"tied": True}, "pattern": [
        {"attention": {"window": 8, "sinks": True}}, {"attention": {"softcap": 9.0}},
        {"attention": {"window": 5, "position": {"kind": "alibi"}}},
    ],
}  # fmt: skip


def trusting(path: Path) -> bool:
    return (path / "model.py").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Verified conversions: native and bundled, q4, in float32 so that greedy texts may be compared, and in float16."""
    root, out = tmp_path_factory.mktemp("mlx"), {}
    for name, patch in (("native", NATIVE), ("bundled", BUNDLED)):
        source = write_checkpoint(root / f"{name}-source", llama(**patch))
        for compute in ("f32", "f16"):
            result = convert(source, "mlx", "q4", root / f"{name}-{compute}", options={"compute": compute})
            assert result.report is not None and {c.name for c in result.report.checks} >= {"graph", "tokenizer"}
            assert result.support.carrier == ("mistral" if name == "native" else "model.py")
            out[f"{name}-{compute}"] = result.out
    return out


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, str]:
    """The greedy text of our own runtime."""
    out = {}
    for name, path in folders.items():
        with backends.load(path) as runtime:
            ids = runtime.encode(PROMPT)
            out[name] = "".join(generate(runtime, ids, max_tokens=TOKENS, temperature=0))
    return out


@pytest.mark.parametrize("compute", ["f32", "f16"])
@pytest.mark.parametrize("name", ["native", "bundled"])
def test_greedy_continuation_equals_the_oracle(name: str, compute: str, folders: dict[str, Path]) -> None:
    """mlx-lm's logits are within the gate of its arithmetic, and its tokens are the oracle's best wherever that is
    decided: where the two best logits are further apart than six standard deviations of an error at that gate."""
    path = folders[f"{name}-{compute}"]
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=trusting(path))[:2]
    prompt = tokenizer.encode(PROMPT)
    with backends.load(path) as runtime:
        assert prompt == runtime.encode(PROMPT)
    found = [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=40, prefill_step_size=4)]
    artifact = opened("mlx", path)
    ids = np.array([*prompt, *found])[None]
    emulation = emulate_dtype(artifact.spec, values(artifact), ids[:, :-1], artifact.spec.context, artifact.arithmetic)
    tokens, depth = ids.size - 1, artifact.spec.depth
    limit = gates.gate("arithmetic", compute, emulation.control(tokens), layers=depth, positions=tokens).limit
    if (name, compute) == ("native", "f16"):  # the CPU's kernels sum in float16 too, which the control does not
        limit = gates.bound(compute, depth, tokens)
    assert nmse(np.array(model(mx.array(ids[:, :-1])).astype(mx.float32)), emulation.exact) <= limit
    exact = emulation.exact[0, len(prompt) - 1 :]
    second, best = np.sort(exact, -1)[:, -2:].T
    decided = best - second > 6 * np.sqrt(2 * limit * np.square(exact).mean())
    assert decided.sum() >= len(found) / 2
    assert (exact.argmax(-1) == found)[decided].all()
    assert set(tokenizer.eos_token_ids) == {tokenizer.convert_tokens_to_ids("<|eos|>")}


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"router": {"top_k": 2}},
    "model.py": {"router": {"top_k": 2, "score": "sigmoid", "correction": True}, "shared": {"hidden": 64}},
}
"""Experts by what carries them."""


@pytest.mark.parametrize("carrier", MIXTURES)
def test_mixtures_generate_what_our_runtime_does(carrier: str, tmp_path: Path) -> None:
    """Loaded and run by mlx-lm, quantized: a prompt whose experts are sorted, then token by token."""
    mlp = {"kind": "moe", "experts": 6, "hidden": 64, **MIXTURES[carrier]}
    source = write_checkpoint(tmp_path / "source", llama(width=64, block={"attention": {"head_dim": 16}, "mlp": mlp}))
    result = convert(source, "mlx", "q4", tmp_path / "moe", options={"compute": "f32"}, verify=False)
    assert result.support.carrier == carrier
    model, tokenizer = mlx_lm.load(str(result.out), trust_remote_code=trusting(result.out))[:2]
    prompt = tokenizer.encode(PROMPT * 3)
    assert 2 * len(prompt) >= 64
    found = [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS)]
    with backends.load(result.out) as runtime:
        assert prompt == runtime.encode(PROMPT * 3)
        logits, ours = runtime.prefill(np.array(prompt)), []
        for _ in range(TOKENS):
            ours.append(int(logits.argmax()))
            logits = runtime.step(np.array(ours[-1:]))[0]
    assert found == ours


def test_the_bundled_model_runs_in_batches(folders: dict[str, Path]) -> None:
    """Prompts of uneven lengths, padded by mlx-lm, past windows: every row as if alone."""
    path = folders["bundled-f32"]
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)[:2]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, n).tolist() for n in (3, 17, 9, 30)]
    alone = [[int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=24)] for p in prompts]
    tokenizer.eos_token_ids = set()
    together = batch_generate(model, tokenizer, prompts, max_tokens=24, return_token_ids=True).token_ids
    assert [[int(t) for t in row] for row in together or []] == alone


def test_the_bundled_model_resumes_a_saved_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    path = folders["bundled-f32"]
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)[:2]
    prompt = tokenizer.encode(PROMPT * 4)
    whole = [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=8)]
    cache = make_prompt_cache(model)
    model(mx.array(prompt[:-3])[None], cache=cache)
    save_prompt_cache(str(tmp_path / "prompt.safetensors"), cache)
    again = load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    rest = [int(t) for t, _ in generate_step(mx.array(prompt[-3:]), model, max_tokens=8, prompt_cache=again)]
    assert rest == whole


class EightBits(NumpyOps):
    """The oracle with keys and values in blocks of 32 symmetric int8 codes."""

    def mix(self, q: Any, k: Any, v: Any, step: Any, key_slots: Any, a: Any, w: Any) -> Any:
        return super().mix(q, to_int8(k), to_int8(v), step, key_slots, a, w)


def test_the_bundled_model_takes_a_quantized_cache(tmp_path: Path) -> None:
    """mlx-lm's --kv-bits: the error is that of keys and values in 8 bits. MLX's steps, from the least to the largest of
    32, are no wider than those of the symmetric codes that the control has."""
    spec = llama(head={"softcap": 30.0}, block={"attention": {"window": None}})
    source = write_checkpoint(tmp_path / "source", spec)
    path = convert(source, "mlx", "q8", tmp_path / "m", options={"compute": "f32"}, verify=False).out
    model, tokenizer = mlx_lm.load(str(path), trust_remote_code=True)[:2]
    prompt = tokenizer.encode(PROMPT * 4)
    caches = [QuantizedKVCache(group_size=32, bits=8) for _ in spec.layers]
    got, ids = np.array(model(mx.array(prompt)[None], cache=caches)), np.array(prompt)[None]
    weights = values(opened("mlx", path))
    exact = Oracle(spec, weights).logits(ids)
    control = nmse(Oracle(spec, weights, ops=EightBits()).logits(ids), exact)
    gate = gates.gate("arithmetic", "int8", control, layers=spec.depth, positions=ids.size)
    assert gate.usable and 0.1 * gate.control <= nmse(got, exact) <= gate.limit
    settings: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    first = next(generate_step(mx.array(prompt), model, max_tokens=1, **settings))[0]
    assert int(first) == got[0, -1].argmax()


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.mark.parametrize("name", [pytest.param("native", marks=pytest.mark.slow), "bundled"])
def test_the_command_line_generates(name: str, folders: dict[str, Path], expected: dict[str, str]) -> None:
    path = folders[f"{name}-f32"]
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(path), "--prompt", PROMPT]
    command += ["--max-tokens", str(TOKENS), "--temp", "0", *(["--trust-remote-code"] if trusting(path) else [])]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=path.parent, env=environment(), timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("==========\n")[1]
    assert text.removesuffix("\n") == expected[f"{name}-f32"]


@contextmanager
def served(path: Path) -> Iterator[str]:
    """mlx_lm.server on a free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), *(["--trust-remote-code"] if trusting(path) else [])]
    log = path.parent / f"{path.name}.log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out, cwd=path.parent, env=environment()) as p,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
                        break
                except OSError:
                    assert p.poll() is None, log.read_text()
                    time.sleep(0.1)
            yield url
        finally:
            p.terminate()


@pytest.mark.parametrize("name", ["native", "bundled"])
def test_the_server_answers(name: str, folders: dict[str, Path], expected: dict[str, str]) -> None:
    path = folders[f"{name}-f32"]
    body: dict[str, Any] = {"model": "default_model", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    with served(path) as url:
        request = urllib.request.Request(  # noqa: S310
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            found = json.load(answer)
    assert found["choices"][0]["text"] == expected[f"{name}-f32"]


def test_specs_of_these_tests_are_what_they_say() -> None:
    spec: Spec = llama(**BUNDLED)
    assert [b.attention.window for b in spec.layers] == [8, None, 5]
