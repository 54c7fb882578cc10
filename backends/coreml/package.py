"""The `.mlpackage` folder: where things lie, the metadata, and the tokenizer's own item.

A package is a manifest and items. Core ML compiles the root model and its weights and leaves other items alone, so the
tokenizer is an item beside them: the artifact is whole in itself, and what Xcode compiles stays small.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from backends.coreml.library import coremltools
from backends.folder import end_ids, token_id, write_json, write_tokenizer
from spec.config import Spec
from spec.errors import UserError

DATA = "Data"
AUTHOR = "com.apple.CoreML"
OURS = "allotrope"
MODEL = Path(DATA) / AUTHOR / "model.mlmodel"
WEIGHTS = Path(DATA) / AUTHOR / "weights"
TOKENIZER = Path(DATA) / OURS / "tokenizer"
"""tokenizer.json, tokenizer_config.json, config.json, ...: the folder that swift-transformers opens."""
MANIFEST = "Manifest.json"
DATE = "com.github.apple.coremltools.conversion_date"


def key(name: str) -> str:
    """Our user-defined metadata: `spec`, `level`, `compute`, `options`, `receipt`."""
    return f"{OURS}.{name}"


def read_model(path: Path) -> Any:
    """The parsed model of a package (`Model_pb2.Model`). Raises `UserError`."""
    ct = coremltools()
    file = path / MODEL
    model = ct.proto.Model_pb2.Model()
    try:
        model.ParseFromString(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}") from None
    except Exception as e:  # protobuf's DecodeError, by whichever implementation is installed
        raise UserError(f"{file}: not a Core ML model ({type(e).__name__})") from None
    if model.WhichOneof("Type") != "mlProgram":
        raise UserError(f"{path}: not an ML program")
    return model


def write_model(path: Path, model: Any) -> None:
    """Replace a package's model in one step; the weights stay as they are."""
    file = path / MODEL
    staged = file.with_name(file.name + ".partial")
    with staged.open("wb") as f:
        f.write(model.SerializeToString(deterministic=True))
        f.flush()
        os.fsync(f.fileno())
    staged.replace(file)


def metadata(model: Any, path: Path, name: str) -> str:
    """One of our metadata values. Raises `UserError` where another program wrote the package."""
    held = model.description.metadata.userDefined
    if key(name) not in held:
        raise UserError(f"{path}: has no {key(name)} in its metadata: not converted by this program")
    return held[key(name)]


def complete(path: Path, tokenizer: Tokenizer | None, spec: Spec) -> None:
    """Write the tokenizer's item, and the manifest that names every item, with identifiers that depend on nothing."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    items = list(manifest["itemInfoEntries"].values())
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    if tokenizer is not None:
        folder = path / TOKENIZER
        folder.mkdir(parents=True)
        write_tokenizer(folder, tokenizer, spec.context)
        write_json(folder / "config.json", _config(tokenizer, spec))
        about = {"author": OURS, "description": "Tokenizer", "name": TOKENIZER.name}
        items.append({**about, "path": TOKENIZER.relative_to(DATA).as_posix()})
    items.sort(key=lambda i: i["path"])
    named = {str(uuid.uuid5(uuid.NAMESPACE_URL, i["path"])).upper(): i for i in items}
    manifest["itemInfoEntries"] = named
    manifest["rootModelIdentifier"] = next(i for i, item in named.items() if item["path"] == root)
    write_json(path / MANIFEST, manifest)


def _config(tokenizer: Tokenizer, spec: Spec) -> dict[str, Any]:
    """config.json, without which swift-transformers opens no tokenizer folder."""
    ends = end_ids(tokenizer)
    out: dict[str, Any] = {"vocab_size": spec.vocab_size, "max_position_embeddings": spec.context}
    out |= {"eos_token_id": ends[0]} if ends else {}
    bos = token_id(tokenizer, tokenizer.bos)
    return out | ({} if bos is None else {"bos_token_id": bos})
