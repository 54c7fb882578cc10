"""The tokenizer check in clients that read a folder's tokenizer by rules of their own: transformers' AutoTokenizer
(mlx-lm and vLLM use it too), onnxruntime-genai, and llama.cpp where a GGUF file is the source."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from convert.gates import TOKENIZER_DIFFERENCES
from convert.verify import limits
from convert.verify.report import Check, Status
from convert.verify.tokens import Compared, Texts, check_tokenizer, compare

GENAI = "genai_config.json"


def _failed(client: str, found: Compared, more: str = "") -> Check:
    reason = f"{client}: {found.reason}{more}"
    return Check("tokenizer", Status.FAIL, len(found.wrong), TOKENIZER_DIFFERENCES, reason)


def check_stock(folder: Path, tokenizer: Tokenizer, count: int = 100) -> Check | None:
    """The ids that transformers' AutoTokenizer makes of a folder, since it builds some model types' tokenizers by rules
    of its own, and its chat template. None where they are equal."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kind = f"transformers' AutoTokenizer ({type(stock).__name__})"
    found = compare(Texts.of(tokenizer, count), lambda text: list(stock(text).input_ids), frozenset())
    if found.wrong:
        return _failed(kind, found)
    told = stock.chat_template
    told = told if isinstance(told, dict) else {} if told is None else {"default": told}
    meant = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    if told != meant | tokenizer.templates or any(getattr(stock, n) != t for n, t in names.items()):
        return Check("tokenizer", Status.FAIL, 1, 0, f"{kind}: another chat template, BOS or EOS than the source's")
    return None


def check_client(path: Path, tokenizer: Tokenizer | None, found: Check) -> Check:
    """`found`, or what llama.cpp, whose file the source is, makes otherwise of a text."""
    if importlib.util.find_spec("llama_cpp") is None:
        return replace(found, flags=(*found.flags, "not compared with llama.cpp, which is not installed"))
    from backends.gguf.runtime import Words

    with Words(path) as words:
        check = check_tokenizer(words, tokenizer)
    if check.status is Status.PASS:
        return replace(found, reason=f"{found.reason}; llama.cpp's ids of the source too")
    return replace(check, reason=f"the source in llama.cpp: {check.reason}")


def check_genai(folder: Path, tokenizer: Tokenizer, found: Check, count: int = 200) -> Check:
    """`found`, or what onnxruntime-genai makes otherwise of a text: it has a tokenizer of its own, which it reads from
    tokenizer.json. It puts nothing around a text, by design."""
    from backends.onnx.genai import unread

    if unread(tokenizer):
        return replace(found, flags=(*found.flags, "onnxruntime-genai opens no such tokenizer: pass it token ids"))
    if importlib.util.find_spec("onnxruntime_genai") is None or importlib.util.find_spec("onnx") is None:
        return replace(found, flags=(*found.flags, "not compared with onnxruntime-genai, which is not installed"))
    same = genai(folder, Texts.of(tokenizer, count))
    if same.wrong:
        return _failed("onnxruntime-genai", same)
    flags = tuple(f"onnxruntime-genai's tokenizer: {flag}" for flag in same.flags)
    return replace(found, flags=(*found.flags, *flags), reason=f"{found.reason}; onnxruntime-genai's ids too")


def genai(folder: Path, texts: Texts) -> Compared:
    """What onnxruntime-genai's tokenizer makes of texts, from a folder's files."""
    og: Any = importlib.import_module("onnxruntime_genai")  # a native module without types
    with tempfile.TemporaryDirectory(prefix="genai-") as name:
        for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
            shutil.copy(file, name)
        stub(Path(name))
        words = og.Tokenizer(og.Model(name))
        return compare(texts, lambda text: [int(i) for i in words.encode(text)], limits.GENAI, bare=True)


def stub(folder: Path) -> None:
    """A model of one node in place of the one that genai_config.json names: genai opens no tokenizer without a model,
    and the real one may be large."""
    import onnx
    from onnx import TensorProto, helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)], "stub",
                              [ids], [logits])  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "stub.onnx"
    )
    config = json.loads((folder / GENAI).read_text(encoding="utf-8"))
    config["model"]["decoder"] |= {"filename": "stub.onnx", "session_options": {}}
    (folder / GENAI).write_text(json.dumps(config), encoding="utf-8")
