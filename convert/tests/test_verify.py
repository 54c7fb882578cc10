"""A verification from outside: the child process, its verdicts, and what a user sees of broken artifacts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

from convert.pipeline import convert
from convert.verify import Check, Report, Status, verify, watch
from convert.verify.run import CHECKS
from parity_tests.checkpoints import llama, write_checkpoint
from parity_tests.gguf_mutants import Editor
from spec.errors import UserError

SPEC = llama(width=64, depth=1, context=64, block={"attention": {"head_dim": 16}, "mlp": {"hidden": 96}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "checkpoint", SPEC)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    out = checkpoint.parent / "model.q8.gguf"
    convert(checkpoint, "gguf", "q8", out, verify=False)
    return out


def test_every_check_runs_and_is_told_as_it_ends(artifact: Path, checkpoint: Path) -> None:
    told: list[str] = []
    report = verify(artifact, "gguf", checkpoint, "q8", threads=1, on_check=lambda c: told.append(c.name))
    assert report.ok, [c for c in report.checks if c.status is not Status.PASS]
    assert tuple(told) == CHECKS == tuple(c.name for c in report.checks)
    assert report.tokens == 63 and report.seconds > 0 and "llama-cpp-python" in report.versions
    for name in ("graph", "arithmetic", "invariants"):
        margin = report[name].margin
        assert margin is not None and 0 < margin < 1


def test_the_command_says_the_same(artifact: Path, checkpoint: Path) -> None:
    """Level and backend come from the artifact itself."""
    command = [sys.executable, "-m", "convert.verify", str(artifact), "--source", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = Report.from_dict(json.loads(done.stdout))
    assert report.ok and report.level == "q8"


def test_the_wrong_level_fails_packing(artifact: Path, checkpoint: Path) -> None:
    report = verify(artifact, "gguf", checkpoint, "f16", threads=1)
    assert report["packing"].status is Status.FAIL
    assert "is stored as q8_0, the recipe says f16" in report["packing"].reason


def test_another_checkpoint_fails_packing(artifact: Path, tmp_path: Path) -> None:
    from parity_tests.cases import random_weights

    other = write_checkpoint(tmp_path / "other", SPEC, random_weights(SPEC, 5))
    report = verify(artifact, "gguf", other, "q8", threads=1)
    assert [c.name for c in report.failures] == ["packing"], "the file itself is sound"
    assert report["quality"].flags, "and very far from this checkpoint"


def test_an_artifact_that_the_runtime_refuses_fails_once(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(artifact.read_bytes())
    editor = Editor(broken)
    editor.scalar("attention.head_count", lambda x: 2 * x)
    editor.close()
    report = verify(broken, "gguf", checkpoint, "q8", threads=1)
    assert [c.name for c in report.failures] == ["runtime"]
    assert {report[n].status for n in CHECKS[2:]} == {Status.NOT_RUN}


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_artifact_fails(artifact: Path, checkpoint: Path, tmp_path: Path, keep: float) -> None:
    data = artifact.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    report = verify(broken, "gguf", checkpoint, "q8", threads=1)
    assert not report.ok and report.checks[0].name == "opening"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{artifact}", "gguf", "nowhere", "q8"), "nowhere: no such folder"),
        (("nowhere.gguf", "gguf", "{checkpoint}", "q8"), "nowhere.gguf: no such file"),
        (("{artifact}", "torch", "{checkpoint}", "q8"), "torch: its artifacts cannot be verified"),
        (("{artifact}", "gguf", "{checkpoint}", "q8", "nowhere.txt"), "nowhere.txt: No such file"),
    ],
)
def test_what_the_user_can_fix_is_raised(
    arguments: tuple[str, ...], message: str, artifact: Path, checkpoint: Path
) -> None:
    filled = [a.format(artifact=artifact, checkpoint=checkpoint) for a in arguments]
    with pytest.raises(UserError, match=message):
        verify(*filled)


def test_a_tokenizer_that_its_library_breaks_on_fails(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The library's panic is no `Exception`."""
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, source)
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    hostile = {"type": "Split", "pattern": {"Regex": "(a|aa)+b"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [hostile, data["pre_tokenizer"]]}
    (source / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    report = verify(artifact, "gguf", source, "q8", threads=1)
    assert [c.status for c in report.checks] == [Status.FAIL]
    reason = report["tokenizer"].reason
    assert "the source's tokenizer: `tokenizers` breaks on 'aaaa" in reason and "retry-limit" in reason, reason


def test_an_unknown_level_is_one_line(artifact: Path, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "convert.verify", str(artifact), "--source", str(checkpoint), "--level", "q3_z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "q3_z" in done.stderr


CHILD = """
import json, os, sys
out = open(sys.argv[-1], "a")
print(json.dumps({"start": "packing"}), file=out)
print(json.dumps({"check": {"name": "packing", "status": "PASS", "measured": 0, "gate": 0}}), file=out)
print(json.dumps({"start": "graph"}), file=out, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("print('ops.cpp:1: GGML_ASSERT(n > 0) failed', file=sys.stderr, flush=True); os.abort()", "killed by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("os._exit(3)", "ended with status 3"),
        (
            "import time; print(json.dumps({'start': 'graph', 'limit': 0.2}), file=out, flush=True); time.sleep(99)",
            "took more than 0.2 seconds",
        ),
    ],
)
def test_a_dead_child_fails_the_check_it_died_in(end: str, reason: str) -> None:
    told: list[Check] = []
    report = watch(["-c", CHILD + end], Report("a.gguf", "gguf", "q8", "s"), told.append)
    assert [c.status for c in report.checks] == [Status.PASS, Status.FAIL] == [c.status for c in told]
    assert report["graph"].reason.startswith(f"the runtime {'was ' if 'killed' in reason else ''}{reason} during graph")
    assert ("GGML_ASSERT(n > 0) failed" in report["graph"].reason) == ("SIGABRT" in reason)
    assert not report.ok
