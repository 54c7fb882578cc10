"""Running a GGUF file in llama.cpp, through its C interface."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.gguf.support import CACHES
from backends.gguf.types import TYPES
from backends.session import cache_types, exact_cache
from spec.errors import UserError

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096
"""Tokens of a session where the caller asks for none and the model allows more: the cache is allocated at once."""

_BATCH = 256
"""Tokens a call: llama.cpp reserves logits for all of them."""


@lru_cache(maxsize=1)
def _library() -> Any:
    """llama.cpp's bindings, started once, its chatter sent to `logging`."""
    from llama_cpp import llama_cpp as lib

    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an assertion would start a debugger before it aborts
    levels = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.DEBUG, 4: logging.INFO}  # errors are raised too

    @lib.llama_log_callback
    def forward(level: int, text: bytes, _: Any) -> None:
        message = text.decode(errors="replace").rstrip()
        if message and level in levels:
            _messages.append(message)
            del _messages[:-20]
            log.log(levels[level], "%s", message)

    lib.llama_log_set(forward, ctypes.c_void_p(0))
    lib.llama_backend_init()
    _callbacks.append(forward)
    return lib


_callbacks: list[Any] = []
"""ctypes callbacks must outlive their registration."""

_messages: list[str] = []
"""llama.cpp's last words, for errors."""


def _last_words() -> str:
    for word in ("error", "invalid", "missing", "unknown", "fail"):
        telling = [m for m in _messages if word in m.lower()]
        if telling:
            return telling[-1].removeprefix("llama_model_load: ")
    return "no reason given"


class Words:
    """A file's tokenizer in llama.cpp, without its weights."""

    limits = frozenset({"form", "strips", "first", "around", "next line", "overlap"})
    """What llama.cpp's tokenizers may be unable to do (`convert.verify.limits`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = self._ctx = None
        lib = self._lib = _library()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load it: {_last_words()}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    @property
    def vocab_size(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    def encode(self, text: str) -> list[int]:
        """Ids by llama.cpp's own tokenizer, special tokens and BOS policy included."""
        return self.tokenize(text, special=True)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Ids, with or without special tokens around and inside the text."""
        self._need_tokenizer()
        data = text.encode()
        room = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, room, special, special)
            if n >= 0:
                return list(buffer[:n])
            room = -n

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of the tokens, special ones left out."""
        self._need_tokenizer()
        return b"".join(self._piece(int(i)) for i in ids)

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def _need_tokenizer(self) -> None:
        if self._lib.llama_vocab_type(self._vocab) == 0:
            raise UserError(f"{self.path}: has no tokenizer: pass token ids")

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._ends

    @cached_property
    def _ends(self) -> frozenset[int]:
        lib = self._lib
        if lib.llama_vocab_type(self._vocab) == 0:
            return frozenset()
        return frozenset(i for i in range(self.vocab_size) if lib.llama_vocab_is_eog(self._vocab, i))

    def close(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class GGUFRuntime(Words):
    """A model in llama.cpp; one sequence is cached at a time. Not for several threads at once."""

    def __init__(
        self, path: Path, threads: int | None, context: int | None, exact: bool, gpu: bool, cache: str | None
    ) -> None:
        self.path, self.exact = path, exact
        exact_cache(cache, exact)
        self.cache: tuple[str, str] = ("f32", "f32") if exact else _ggml_types(cache)
        self._model = self._ctx = None
        lib = self._lib = _library()
        params = lib.llama_model_default_params()
        self.gpu = gpu and not exact and bool(lib.llama_supports_gpu_offload())
        if not self.gpu:
            params.n_gpu_layers = 0
        if exact:
            params.use_extra_bufts = False  # no repacked copies with kernels of their own
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load it: {_last_words()}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        trained = int(lib.llama_model_n_ctx_train(self._model))
        self._context = min(trained, DEFAULT_CONTEXT) if context is None else context
        if not 1 <= self._context <= trained:
            self.close()
            raise UserError(f"context={context}: must be between 1 and the model's {trained} tokens")
        if misfit := self._misfit():
            self.close()
            raise UserError(f"cache={cache!r}: {misfit}")
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        self._ctx = lib.llama_init_from_model(self._model, self._session(lib))
        if not self._ctx:
            self.close()
            raise UserError(f"{path}: llama.cpp cannot start a session: {_last_words()}")
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)
        self._used = 0

    def _session(self, lib: Any) -> Any:
        p = lib.llama_context_default_params()
        p.n_ctx = self._context
        p.n_batch = p.n_ubatch = _BATCH
        p.n_seq_max = 1
        p.n_threads = p.n_threads_batch = self.threads
        p.no_perf = True
        p.offload_kqv = p.op_offload = self.gpu
        p.type_k, p.type_v = (TYPES[t].id for t in self.cache)
        if self.exact:
            p.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its CPU kernel computes in float16
        elif any(TYPES[t].block > 1 for t in self.cache):
            p.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # nothing else reads quantized values
        return p

    def _misfit(self) -> str:
        """Why heads of this model do not fit the cache's types; nothing where they do. llama.cpp says so only in its
        log."""
        lib, arch = self._lib, self.meta("general.architecture")
        if arch == "grok" and any(TYPES[t].block > 1 for t in self.cache):
            return "llama.cpp has no flash attention for grok, and a quantized cache needs it (f16 works)"
        usual = int(lib.llama_model_n_embd(self._model)) // max(1, int(lib.llama_model_n_head(self._model)))
        for part, kind in zip(("key", "value"), self.cache, strict=True):
            keys = [f"{arch}.attention.{part}_length", f"{arch}.attention.{part}_length_swa"]
            dims = {int(n) for n in map(self.meta, keys) if n is not None} or {usual}
            block = TYPES[kind].block
            if bad := sorted(d for d in dims if d % block):
                return f"heads of {bad[0]} dimensions are no whole blocks of {block}, which {kind} has (f16 works)"
        return ""

    def cache_bytes(self) -> int:
        """Bytes that keys and values of the sequence in progress take."""
        return int(self._lib.llama_state_seq_get_size(self._ctx, 0)) if self._used else 0

    @property
    def context(self) -> int:
        return self._context

    def _check(self, ids: NDArray[np.integer], used: int) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise UserError(f"token {bad} is outside the vocabulary of {self.vocab_size}")
        if used + ids.size > self._context:
            raise UserError(
                f"{used + ids.size} tokens exceed the session's context of {self._context} (ask for a longer context)"
            )

    def _decode(self, ids: NDArray[np.integer], every: bool) -> NDArray[np.float32]:
        """Continue the cached sequence: [T] ids to logits [T, V], or [1, V] of the last token."""
        ids = np.asarray(ids).reshape(-1)
        self._check(ids, self._used)
        lib, v = self._lib, self.vocab_size
        out = np.empty((len(ids) if every else 1, v), np.float32)
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            n = len(part)
            self._batch.n_tokens = n
            for j in range(n):
                self._batch.token[j] = int(part[j])
                self._batch.pos[j] = self._used + j
                self._batch.n_seq_id[j] = 1
                self._batch.seq_id[j][0] = 0
                self._batch.logits[j] = every or start + j == len(ids) - 1
            status = lib.llama_decode(self._ctx, self._batch)
            if status:
                raise UserError(f"{self.path}: llama.cpp cannot decode (status {status}): {_last_words()}")
            self._used += n
            if every:
                flat = np.ctypeslib.as_array(lib.llama_get_logits(self._ctx), (n * v,))
                out[start : start + n] = flat.reshape(n, v)
        if not every and len(ids):
            out[0] = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._ctx, -1), (v,))
        return out

    def _reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), False)
        self._used = 0

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V]: rows one after the other, each from an empty cache."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or not ids.size:
            raise UserError(f"ids: shape {list(ids.shape)}, and [B, T] is needed")
        out = []
        for row in ids:
            self._reset()
            out.append(self._decode(row, True))
        self._reset()
        return np.stack(out)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] ids -> [V] logits after the last token."""
        if not np.size(ids):
            raise UserError("prefill: no tokens (an empty prompt needs at least a BOS token)")
        self._reset()
        return self._decode(ids, False)[0]

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] ids -> [T, V] logits."""
        return self._decode(ids, True)

    def meta(self, key: str) -> str | None:
        """A metadata value as text."""
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, room)
            if n < 0:
                return None
            if n < room:
                return buffer.value.decode(errors="replace")
            room = n + 1

    def info(self) -> dict[str, Any]:
        """What runs, where, and how."""
        import llama_cpp

        buffer = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(self._model, buffer, 256)
        return {
            "backend": "gguf",
            "runtime": f"llama-cpp-python {llama_cpp.__version__}",
            "device": "gpu" if self.gpu else "cpu",
            "precision": buffer.value.decode(),
            "carrier": self.meta("general.architecture"),
            "threads": self.threads,
            "context": self._context,
            "cache": "/".join(dict.fromkeys(self.cache)),
            "exact": self.exact,
        }

    def close(self) -> None:
        if self._ctx:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._ctx)
            self._ctx = None
        super().close()


def _ggml_types(asked: str | None) -> tuple[str, str]:
    """ggml's types of keys and values."""
    k, v = cache_types(asked or "f16", tuple(CACHES))
    return CACHES[k], CACHES[v]


def devices() -> list[str]:
    """Where llama.cpp, as it was built, can run here, best first."""
    return [*(["gpu"] if _library().llama_supports_gpu_offload() else []), "cpu"]


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    exact: bool = False,
    gpu: bool = True,
    cache: str | None = None,
) -> GGUFRuntime:
    """Open a GGUF file in llama.cpp.

    context: tokens of a session (default: the model's, at most 4096); it also selects length-dependent rotary
    tables. exact: float32 cache, no flash attention and no repacked weights, on the CPU, for parity. gpu: whether a
    llama.cpp that was built for a GPU uses it. cache: type of keys and values, one of `support.CACHES`, or keys/values
    (default: f16). Raises `UserError` where
    the file cannot be loaded; a file that breaks llama.cpp's assertions ends the process, which is why verification
    runs in a child.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return GGUFRuntime(path, threads, context, exact, gpu, cache)
