"""The examples hold, and what their comments claim is so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from backends import support
from spec import load
from spec.cost import count

EXAMPLES = Path(__file__).resolve().parents[1]
SPECS = sorted(EXAMPLES.glob("*.yaml"))
CARRIERS = {"local-global": "olmo2", "long-context": "llama"}


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_llama_cpp_carries_it_at_every_portable_level(path: Path) -> None:
    spec = load(path)
    for level in ("f32", "f16", "q8", "q4"):
        found = support("gguf", spec, level)
        assert (found.refusals, found.carrier) == ((), CARRIERS[path.stem])


def test_sizes_are_as_said() -> None:
    assert round(count(load(EXAMPLES / "long-context.yaml")).total / 1e6) == 29


def test_the_window_is_local_in_three_of_four_layers() -> None:
    windows = [b.attention.window for b in load(EXAMPLES / "local-global.yaml").layers]
    assert windows == [128, 128, 128, None] * 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_valid_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o100, "executable"


def test_the_billion_is_one_and_its_run_is_valid() -> None:
    from train import config

    assert count(load(EXAMPLES / "billion")).total == 1_010_911_232
    run = config.layered(config.read(EXAMPLES / "billion" / "run.yaml"))
    assert (run.spec, run.compile, run.attention.kernel) == ("examples/billion", "true", "flash")
