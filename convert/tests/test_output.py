"""Folders as artifacts: replaced only whole, only when asked, and only where a conversion of ours made them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends import get
from backends.folder import MARK, write_json
from convert import output
from spec.errors import UserError

MLX = get("mlx")


def artifact(path: Path, text: str = "old", backend: str = "mlx") -> Path:
    path.mkdir()
    (path / "weights").write_text(text)
    write_json(path / MARK, {"backend": backend})
    return path


def content(path: Path) -> str:
    return (path / "weights").read_text()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    output.check(out, MLX, force=True)
    with output.reserved(out) as partial:
        artifact(partial, "new")
        assert content(out) == "old"
        output.publish(partial, out)
    assert content(out) == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")

    def fail() -> None:
        with output.reserved(out) as partial:
            artifact(partial, "new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert content(out) == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_made_for_what_fails_are_gone_and_those_that_were_there_stay(tmp_path: Path) -> None:
    def fail(out: Path, *, beside: bool = False) -> None:
        with output.reserved(out) as partial:
            partial.write_text("half")
            if beside:
                (out.parent / "theirs").touch()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b" / "m.gguf", tmp_path / "there" / "m.gguf"):
        with pytest.raises(KeyboardInterrupt):
            fail(out)
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and not any((tmp_path / "there").iterdir())
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "c" / "d" / "m.gguf", beside=True)
    assert [p.name for p in (tmp_path / "c" / "d").iterdir()] == ["theirs"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = artifact(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(output.PARTIAL):
            raise OSError(28, os.strerror(28))
        return rename(self, target)

    with output.reserved(out) as partial:
        artifact(partial, "new")
        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(UserError, match="No space left"):
            output.publish(partial, out)
    assert content(out) == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_is_mended_by_the_next_conversion(tmp_path: Path) -> None:
    out = artifact(tmp_path / "out")
    out.rename(tmp_path / f"out{output.REPLACED}")
    artifact(tmp_path / f"out{output.PARTIAL}", "new")
    with output.reserved(out):
        assert content(out) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is no mlx artifact of ours, so it is not replaced"):
        output.check(mine, MLX, force=True)
    with pytest.raises(UserError, match=r"is no mlx artifact of ours"):
        output.check(artifact(tmp_path / "other", backend="onnx"), MLX, force=True)
    (tmp_path / "link").symlink_to(artifact(tmp_path / "linked"))
    with pytest.raises(UserError, match=r"is a symbolic link"):
        output.check(tmp_path / "link", MLX, force=True)


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exists; --force replaces it"):
        output.check(artifact(tmp_path / "out"), MLX, force=False)


def test_a_package_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    package = tmp_path / "theirs.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no coreml artifact of ours"):
        output.check(package, get("coreml"), force=True)
    output.receipt_beside(package).write_text("{}")
    output.check(package, get("coreml"), force=True)


@pytest.mark.parametrize("out", [".", "", "..", "a/.."])
def test_an_artifact_needs_a_name(out: str) -> None:
    with pytest.raises(UserError, match=r"is no name for an artifact"):
        output.check(Path(out), MLX, force=True)


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = artifact(tmp_path / "out")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(output.PARTIAL):
            raise KeyboardInterrupt
        return rename(self, target)

    with output.reserved(out) as partial:
        artifact(partial, "new")
        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            output.publish(partial, out)
    assert content(out) == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_package_keeps_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("model", "empty"):
        with pytest.raises(UserError, match=r"must end with .mlpackage"):
            output.check(tmp_path / name, get("coreml"), force=True)
