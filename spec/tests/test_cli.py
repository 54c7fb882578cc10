"""`python -m spec`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spec import dump, load, presets
from spec.cli import main


def run(*args: str) -> int:
    """The exit status of a command line."""
    try:
        main(args)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    return 0


def output(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert run(*args) == 0
    return json.loads(capsys.readouterr().out)


BROKEN = "vocab_size: 8\nwidth: 4\ndepth: 1\ncontext: 4\nblock: {attention: {heads: 3}, mlp: {hidden: 0}}\n"


def test_check_says_everything_at_once_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("colour: red\n" + BROKEN, encoding="utf-8")
    assert run("check", "tiny", str(file)) == 2
    out, err = capsys.readouterr()
    assert out == "tiny: a valid spec of 3,410,176 parameters\n"
    assert err.splitlines() == [
        f"{file}: block.mlp.hidden: 0 input should be greater than or equal to 1",
        f"{file}: colour: is not a field (known: block, context, depth, embedding, final_norm, head, init, name, "
        "overrides, pattern, version, vocab_size, width)",
    ]


def test_check_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(BROKEN.replace("hidden: 0", "hidden: 4"), encoding="utf-8")
    assert run("check", str(file), "tiny", "nope", "--json") == 2
    bad, good, absent = json.loads(capsys.readouterr().out)
    fix = {
        "path": "block.attention.heads",
        "value": 3,
        "rule": "does not divide width=4",
        "fix": "set attention.head_dim",
    }
    assert (bad["ok"], bad["problems"][0]) == (False, fix)
    assert (good["ok"], good["parameters"], good["hash"]) == (True, 3_410_176, load("tiny").hash)
    assert absent["ok"] is False


@pytest.mark.parametrize("name", presets())
def test_show_prints_every_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", name) == 0
    text = capsys.readouterr().out
    facts = output(capsys, "show", name, "--json")
    assert f"{facts['parameters']['total']:,}" in text
    assert len(facts["layers"]) == facts["spec"]["depth"]


def test_show_measures_at_the_length_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    facts = output(capsys, "show", "tiny", "--length", "100", "--json")
    assert facts["kv_cache_16bit"] == {"bytes_per_token": 2048, "bytes": 204_800}
    assert run("show", "tiny", "--length", "0") == 2
    assert capsys.readouterr().err == "--length: 0 must be at least 1\n"


def test_params(capsys: pytest.CaptureFixture[str]) -> None:
    rows = output(capsys, "params", "gpt2", "--json")
    assert rows[1] == {"name": "positions.weight", "shape": [1024, 768], "role": "embedding", "size": 786_432}
    assert run("params", "gpt2") == 0
    assert all(r["name"] in text for text in [capsys.readouterr().out] for r in rows)


def test_schema_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.json"
    assert run("schema", "-o", str(file)) == 0
    assert run("schema") == 0
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(capsys.readouterr().out)
    assert run("schema", "-o", str(tmp_path / "no" / "s.json")) == 2


def test_list_knows_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    rows = output(capsys, "list", "--json")
    assert sorted(r["name"] for r in rows) == presets()
    assert all(r["about"] for r in rows)


def test_targets_agree_with_what_each_backend_says(capsys: pytest.CaptureFixture[str]) -> None:
    from backends import REGISTRY, support

    rows = output(capsys, "targets", "tiny", "--json")
    assert rows
    seen = set()
    for row in rows:
        for level in row["levels"]:
            said = support(row["backend"], load("tiny"), level)
            assert (said.ok, list(said.refusals)) == (row["ok"], row["refusals"])
            seen.add((row["backend"], level))
    assert len(seen) == sum(len(r["levels"]) for r in rows), "each level once"
    assert {b for b, _ in seen} <= {b.name for b in REGISTRY}
    assert run("targets", "tiny", "--to", "gufg") == 2
    assert "did you mean gguf?" in capsys.readouterr().err
    assert run("targets", "tiny", "--quant", "q4_k_n") == 2
    assert capsys.readouterr().err.startswith("q4_k_n: no such precision level")


def test_unknown_presets_and_commands_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "lama") == 2
    assert "neither a file nor a preset" in capsys.readouterr().err
    assert run("shwo", "tiny") == 2


def test_answers_quickly_and_without_torch() -> None:
    code = (
        "import atexit, sys, spec.cli\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "spec.cli.main(['show', 'tiny', '--json'])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
    # 0.5 s on an idle machine; the limit leaves room for a busy one.
    assert time.perf_counter() - start < 5


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(dump(load("tiny")), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "spec", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
