"""YAML to `Spec` and back, presets, and migration of older files."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spec.config import VERSION, Spec
from spec.errors import Problem, SpecError, UserError, nearest, problems_from

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""From a version to the function that lifts a file of that version to the next one."""


LIMIT = 1_000_000
"""Bytes of a YAML file at most."""
MAX_NODES = 100_000
"""Nodes of a document with every alias written out: a few lines of aliases of aliases can stand for billions."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-5 is a number and a repeated key is an error."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_NODES:
            words = "aliases of aliases stand for too much"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 300:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node stands for. One that contains itself stands for no end of them."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until it is counted, which it never is within itself
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (sum(_written_out(n, known) for n in inner) if isinstance(inner, list) else 0)
    return known[id(node)]


def _add_float_resolver() -> None:
    import re

    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


_add_float_resolver()
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: str, source: str, what: str = "a spec") -> dict[str, Any]:
    """A YAML mapping, or a `UserError` that names line and column, and what it should be."""
    if len(text) > LIMIT:
        raise UserError(f"{source}: {len(text):,} characters are more than such a file ever has ({LIMIT:,} are read)")
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UserError(f"{place}: not valid YAML: {e.problem or e}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply to be {what}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # the latter: a date that is none, `!!int` of a word
        raise UserError(f"{source}: not valid YAML: {str(e).splitlines()[0][:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{source}: {what} is a mapping of fields, not {type(data).__name__}")
    return data


def parse(data: dict[str, Any], source: str = "") -> Spec:
    """A `Spec` from plain data. Raises `SpecError` with every problem, each with its YAML path."""
    version = data.get("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool):
        raise SpecError([Problem("version", version, "is no whole number", f"write version: {VERSION}")], source)
    if version > VERSION:
        fix = "upgrade allotrope"
        raise SpecError([Problem("version", version, f"is newer than this program's {VERSION}", fix)], source)
    while version < VERSION:
        if version not in MIGRATIONS:
            fix = f"compare the file with `python -m spec schema` and write version: {VERSION}"
            raise SpecError([Problem("version", version, "has no migration", fix)], source)
        data = MIGRATIONS[version](data)
        version += 1
    try:
        return Spec.model_validate({**data, "version": VERSION})
    except ValidationError as e:
        raise SpecError(problems_from(e, data, Spec), source) from None


def load(source: str | Path) -> Spec:
    """A spec from a YAML file, a folder with a spec.yaml in it, or a preset's name.

    Raises `UserError` where there is no such file or preset, `SpecError` where the spec does not hold.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "spec.yaml"
    if not path.is_file():
        name = str(source)
        if name in presets():
            file = resources.files("spec") / "presets" / f"{name}.yaml"
            return parse(read_yaml(file.read_text(encoding="utf-8"), name), name)
        raise UserError(f"{source}: neither a file nor a preset ({nearest(name, presets())})")
    try:
        with path.open("rb") as f:
            text = f.read(4 * LIMIT + 1).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    return parse(read_yaml(text, str(path)), str(path))


def read_file(path: str | Path) -> str:
    """A UTF-8 file that a user named. Raises `UserError`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("spec") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def dump(spec: Spec) -> str:
    """The spec as YAML, without the fields left at their defaults; `parse(read_yaml(dump(s)))` equals `s`."""
    data = {"version": spec.version, **spec.model_dump(mode="json", exclude_unset=True)}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
