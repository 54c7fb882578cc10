"""Graphs that are wrong on purpose: the graph check must see every one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from backends.onnx import build, graph
from backends.onnx.contrib import OrtOps
from backends.onnx.portable import PortableOps
from parity_tests.artifacts import check_graph, write
from parity_tests.cases import random_weights
from parity_tests.test_onnx import wide
from spec import Spec
from spec.errors import UserError


def _with(attend: Any, **change: float) -> Any:
    """The fused attention with numbers of its layer changed."""

    def changed(self: Any, q: Any, k: Any, v: Any, step: Any, cache: Any, rotation: Any, a: Any, w: Any) -> Any:
        fields = {n: getattr(a, n) + by for n, by in change.items() if getattr(a, n) is not None}
        return attend(self, q, k, v, step, cache, rotation, a.model_copy(update=fields), w)

    return changed


def _without(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    plain = graph.handles

    def handles(spec: Spec) -> Any:
        w = plain(spec)
        for layer in w.layers:
            setattr(layer.attn, field, None)
        return w

    monkeypatch.setattr(graph, "handles", handles)


def _stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build.constants
    monkeypatch.setattr(
        build, "constants", lambda spec: ((n, at, rows * np.float32(1.001)) for n, at, rows in plain(spec))
    )


def _raised_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PortableOps.normed

    def normed(self: PortableOps, x: Any, gain: Any, bias: Any, norm: Any) -> Any:
        return plain(self, x, gain, bias, norm.model_copy(update={"eps": 2 * norm.eps}))

    monkeypatch.setattr(PortableOps, "normed", normed)


def _shifted(**change: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(OrtOps, "attend", _with(OrtOps.attend, **change))


MUTANTS: dict[str, tuple[Any, str]] = {
    "window": (_shifted(window=1), "window"),
    "scale": (_shifted(scale=0.001), "llama"),
    "softcap": (_shifted(softcap=0.02), "attn_softcap"),
    "sinks": (lambda m: _without(m, "sinks"), "sinks"),
    "slopes": (lambda m: _without(m, "slopes"), "alibi"),
    "tables": (_stretched, "llama"),
    "eps": (_raised_eps, "llama"),
    "clip": (lambda m: m.setattr(PortableOps, "clip", lambda self, x, low, high: x), "clip"),
}
"""Graphs that are wrong on purpose, and a feature in which it shows."""


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_graph_is_seen(mutant: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, name = MUTANTS[mutant]
    spec = wide(name, head_dim)
    seed(monkeypatch)
    write("onnx", spec, random_weights(spec), tmp_path / "m")
    with pytest.raises((AssertionError, UserError)):
        check_graph("onnx", tmp_path / "m", threads=1)
