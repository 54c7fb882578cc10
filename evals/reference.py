"""The original's logits, once for all artifacts, on disk. Shapes: N windows, T tokens, V vocab."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spec.config import Spec
from spec.errors import UserError
from spec.params import params

if TYPE_CHECKING:
    from backends.base import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """A text cut into windows that are scored independently."""

    ids: NDArray[np.int64]
    """[N, T]"""
    bytes_per_token: float
    """UTF-8 bytes of the text that a token stands for, on average."""


def cut(spec: Spec, tokenizer: Tokenizer, text: str, tokens: int, window: int) -> Windows:
    """The text's first `tokens` tokens in windows of at most `window`, each within the model's context."""
    from convert.verify.sample import open_tokenizer

    encoding = open_tokenizer(tokenizer).encode(text[: 24 * tokens], add_special_tokens=False)
    length = max(2, min(window, spec.context, tokens))
    count = min(tokens, len(encoding.ids)) // length
    if count == 0:
        raise UserError(f"the text has {len(encoding.ids)} tokens, fewer than a window of {length} (give a longer one)")
    used = count * length
    covered = text[encoding.offsets[0][0] : encoding.offsets[used - 1][1]]
    ids = np.asarray(encoding.ids[:used], dtype=np.int64).reshape(count, length)
    if ids.max() >= spec.vocab_size:
        raise UserError(f"the tokenizer yields token {ids.max()}, and the model has {spec.vocab_size}")
    return Windows(ids, len(covered.encode()) / used)


def reference_logits(source: Any, ids: NDArray[np.int64], out: Path, session: int, tick: Callable[[], None]) -> str:
    """Write the original's float32 logits [N, T, V] to `out` (.npy) and say what computed them.

    source: as `convert.sources.open_source` returns it. session: its length in tokens, which selects length-dependent
    rotary tables, as it does in the artifacts' runtimes. PyTorch where installed and the model fits in memory, else the
    NumPy forward in float32, which asks for weights layer by layer.
    """
    spec: Spec = source.spec
    shape = (*ids.shape, spec.vocab_size)
    target = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
    name, logits = forward(source, session)
    for i, row in enumerate(ids):
        target[i] = logits(row[None])[0]
        tick()
    target.flush()
    return name


def forward(source: Any, session: int) -> tuple[str, Callable[[NDArray[np.int64]], Any]]:
    """What computes a source's float32 logits, and the function from ids [B, T] to them [B, T, V]."""
    return _torch(source, session) or _numpy(source, session)


def _torch(source: Any, session: int) -> tuple[str, Callable[[NDArray[np.int64]], Any]] | None:
    if importlib.util.find_spec("torch") is None:
        return None
    spec: Spec = source.spec
    need = 4 * sum(p.size for p in params(spec))
    if need > 0.5 * _available():
        log.info("the float32 reference takes %.1f GB: streaming it through NumPy instead of PyTorch", need / 1e9)
        return None
    import torch

    from backends.torch.model import Decoder

    decoder = Decoder(spec, length=session)
    state = {n: torch.from_numpy(np.array(source.tensor(n), dtype=np.float32)) for n in source.names()}
    decoder.load_state_dict(state, assign=True)
    decoder.eval()

    def logits(ids: NDArray[np.int64]) -> Any:
        with torch.inference_mode():
            return decoder(torch.from_numpy(ids)).float().numpy()

    return f"PyTorch {torch.__version__}, float32", logits


def _numpy(source: Any, session: int) -> tuple[str, Callable[[NDArray[np.int64]], Any]]:
    from backends.numpy.model import Oracle
    from convert.verify.weights import source_weights

    oracle = Oracle(source.spec, source_weights(source), np.float32, session)
    return "NumPy, float32", oracle.logits


def _available() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4e9
