"""The JSON Schema of a spec file, for editors and other programs."""

from __future__ import annotations

import copy
from typing import Any

from spec.config import VERSION, Spec

_REF = "#/$defs/"
_PARTIAL = "Partial"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the YAML that `spec.parse` takes.

    It says more than pydantic's own: biases may be one boolean, and the entries of `pattern` and `overrides` are
    blocks in which every field is optional.
    """
    schema = Spec.model_json_schema()
    defs = schema["$defs"]
    _booleans(schema)
    for name in _reachable("Block", defs):
        defs[_PARTIAL + name] = _partial(defs[name])
    block = {"$ref": f"{_REF}{_PARTIAL}Block"}
    schema["properties"]["pattern"]["items"] = block
    schema["properties"]["overrides"]["additionalProperties"] = block
    schema["properties"]["version"]["const"] = VERSION
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _booleans(node: Any) -> None:
    """`bias: true` stands for all of them."""
    if isinstance(node, dict):
        for name, field in node.get("properties", {}).items():
            if name == "bias" and "$ref" in field:
                node["properties"][name] = {"anyOf": [{"$ref": field.pop("$ref")}, {"type": "boolean"}], **field}
        for value in node.values():
            _booleans(value)
    elif isinstance(node, list):
        for value in node:
            _booleans(value)


def _refs(node: Any) -> set[str]:
    if isinstance(node, dict):
        here = {node["$ref"].removeprefix(_REF)} if "$ref" in node else set()
        return here.union(*(_refs(v) for v in node.values()))
    return set[str]().union(*(_refs(v) for v in node)) if isinstance(node, list) else set()


def _reachable(name: str, defs: dict[str, Any]) -> list[str]:
    found, queue = {name}, [name]
    while queue:
        new = _refs(defs[queue.pop()]) - found
        found |= new
        queue += new
    return sorted(found)


def _partial(node: Any) -> Any:
    """The same definition with nothing required and no defaults, pointing to other partial definitions."""
    if isinstance(node, list):
        return [_partial(v) for v in node]
    if not isinstance(node, dict):
        return copy.deepcopy(node)
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key == "$ref":
            out[key] = _REF + _PARTIAL + value.removeprefix(_REF)
        elif key == "oneOf":  # without its `kind` a mapping may fit several: what it is laid over decides
            out["anyOf"] = _partial(value)
        elif key not in ("required", "default", "discriminator"):
            out[key] = _partial(value)
    return out
