"""A checkpoint folder run by torch. B batch, T tokens, V vocab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.session import NOT_BEGUN, Session
from backends.text import Text
from backends.torch.cache import Cache
from backends.torch.checkpoint import load_decoder
from backends.torch.model import Decoder
from spec.errors import UserError, nearest

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


class TorchRuntime(Session):
    """One decoder with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(self, decoder: Decoder, text: Text | None = None, name: str = "decoder") -> None:
        super().__init__(name, text, decoder.spec.vocab_size, decoder.length)
        self.decoder = decoder.eval()
        self._device = decoder.embed.weight.device
        self._cache: Cache | None = None

    def _ids(self, ids: NDArray[np.integer], dims: int, used: int = 0) -> Tensor:
        return torch.from_numpy(self.checked(ids, dims, used)).to(self._device)

    @torch.no_grad()
    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V], no cache kept."""
        return _float32(self.decoder(self._ids(ids, 2)))

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        self._cache = None  # the old one's memory first
        logits, self._cache = self.decoder.prefill_cache(self._ids(ids, 1)[None])
        return _float32(logits[0])

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [T, V]."""
        if self._cache is None:
            raise UserError(NOT_BEGUN)
        return _float32(self.decoder.step(self._ids(ids, 1, self._cache.length)[None], self._cache)[0])

    def info(self) -> dict[str, Any]:
        """Backend, device, precision, versions, parameters."""
        d = self.decoder
        dtype = d.embed.weight.dtype
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return {
            "backend": "torch",
            "version": torch.__version__,
            "device": device,
            "precision": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "attention": d.attention,
            "parameters": sum(p.numel() for p in d.parameters()),
            "context": self.context,
        }

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None


def _float32(x: Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()


def devices() -> list[str]:
    """Where torch can run here, best first."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    context: int | None = None,
    attention: str = "auto",
) -> TorchRuntime:
    """Open a checkpoint folder.

    device: `cpu`, `cuda`, `mps`, ... (default: a CUDA device where there is one). dtype: `f32`, `bf16`, `f16`, `f64`
    (default: the stored one on an accelerator, float32 on the CPU). context: tokens of the longest sequence (default:
    the spec's), which sizes the cache and chooses length-dependent rotary tables. Raises `UserError`.
    """
    path = Path(path)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r}: no such precision ({nearest(dtype, DTYPES)})")
        dtype = DTYPES[dtype]
    if context is not None and context < 1:
        raise UserError(f"context={context}: must be at least 1")
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads={threads}: must be at least 1")
        torch.set_num_threads(threads)
    where = _device(device)
    if dtype is None and where.type == "cpu":
        dtype = torch.float32
    decoder = load_decoder(path, dtype, where, length=context, attention=attention)
    return TorchRuntime(decoder, Text.read(path), str(path))


def _device(name: str | None) -> torch.device:
    try:
        where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device={name!r}: torch cannot use it: {str(e).splitlines()[0]}") from None
    return where
