"""Running a folder in transformers. B batch, T tokens, V vocab."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.folder import marked_spec, read_mark
from backends.hf.rotary import chosen_by_length
from backends.session import NOT_BEGUN, Session, session_length
from backends.text import Text
from spec.errors import UserError, nearest

log = logging.getLogger(__name__)

DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Where config.json says the context."""


class HuggingFaceRuntime(Session):
    """One model with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(self, path: Path, model: Any, context: int, longest: int, exact: bool, pinned: str) -> None:
        super().__init__(path, Text.read(path), int(model.config.vocab_size), context, longest)
        self.path, self.exact, self._pinned = path, exact, pinned
        self.model: Any = model
        self._device = model.device
        self._cache: Any = None
        self._used = 0

    def _ids(self, ids: NDArray[np.integer], dims: int, used: int) -> Any:
        import torch

        return torch.from_numpy(self.checked(ids, dims, used)).to(self._device)

    def _forward(self, ids: Any, **options: Any) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            return self.model(ids, **options).logits.float().cpu().numpy()

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V], no cache kept."""
        return self._forward(self._ids(ids, 2, 0), use_cache=False)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        from transformers import DynamicCache

        first = self._ids(ids, 1, 0)
        self._cache = DynamicCache(config=self.model.config)
        self._used = 0
        return self._continue(first, keep=1)[0]

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [T, V]."""
        if self._cache is None:
            raise UserError(NOT_BEGUN)
        return self._continue(self._ids(ids, 1, self._used), keep=0)

    def _continue(self, ids: Any, keep: int) -> NDArray[np.float32]:
        out = self._forward(ids[None], past_key_values=self._cache, use_cache=True, logits_to_keep=keep)[0]
        self._used += len(ids)
        return out

    def info(self) -> dict[str, Any]:
        """What runs, where, and how."""
        import torch
        import transformers

        config = self.model.config
        out = {
            "backend": "hf",
            "runtime": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "device": str(self._device),
            "precision": str(self.model.dtype).removeprefix("torch."),
            "carrier": config.model_type,
            "attention": config._attn_implementation,
            "threads": torch.get_num_threads(),
            "context": self._context,
            "exact": self.exact,
        }
        return {**out, "rope": self._pinned} if self._pinned else out

    def close(self) -> None:
        """Let go of the model."""
        self._cache = self.model = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' and compressed-tensors' progress bars to the log."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        if said.getvalue().strip():
            log.debug("%s", said.getvalue().strip())


def _limit(path: Path, config: Any) -> tuple[int, int | None]:
    """Tokens that the model is meant for, and the length at which LongRoPE changes its list."""
    mark = read_mark(path)
    if mark.get("backend") == "hf":
        spec = marked_spec(mark, path)
        return spec.context, chosen_by_length(spec)
    found = (getattr(config, name, None) for name in LENGTHS)
    return next((int(n) for n in found if isinstance(n, int)), 2048), None


def _whole(path: Path, report: dict[str, Any]) -> None:
    """transformers fills in what it does not find and drops what it does not know, and only logs it."""
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds"), ("mismatched_keys", "misshapes")):
        found = sorted(str(k) for k in report.get(kind) or ())
        if found:
            more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
            raise UserError(f"{path}: its weights are not its config.json's model: it {what} {found[0]}{more}")


def _pin(config: Any, boundary: int | None, context: int) -> str:
    """LongRoPE's long list at every length, for a session that reaches beyond the original context: transformers would
    change lists in the middle of a cached sequence."""
    if boundary is None or context <= boundary:
        return ""
    rope = config.rope_parameters
    rope["short_factor"] = list(rope["long_factor"])
    return f"long factors (a session of {context} tokens)"


def devices() -> list[str]:
    """Where torch, and so transformers, can run here, best first."""
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    exact: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
) -> HuggingFaceRuntime:
    """Open a folder in transformers.

    context: tokens of a session (default: the model's); it also chooses LongRoPE's list. exact: float32 throughout.
    device: torch's name (default: a CUDA device where there is one). dtype: `f32`, `bf16`, `f16`, `f64` (default: what
    config.json says). attention: transformers' implementation by its name (default: transformers' choice). Raises
    `UserError`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no folder with a config.json")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: no such precision ({nearest(dtype, DTYPES)})")
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads={threads}: must be at least 1")
        torch.set_num_threads(threads)
    auto: Any = AutoModelForCausalLM
    chosen = "float32" if exact else DTYPES[dtype] if dtype else "auto"
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            limit, boundary = _limit(path, config)
            tokens = session_length(context, limit)
            pinned = _pin(config, boundary, tokens)
            more = {"attn_implementation": attention} if attention else {}
            model, report = auto.from_pretrained(
                path, config=config, dtype=chosen, local_files_only=True, use_safetensors=True,
                output_loading_info=True, **more,
            )  # fmt: skip
            _whole(path, report)
            model = model.to(where).eval()
            with torch.inference_mode():  # packed weights are unpacked by the first pass
                model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), use_cache=False)
    except UserError:
        raise
    except Exception as e:  # transformers raises whatever its parts do
        raise UserError(f"{path}: transformers cannot load it: {' '.join(str(e).split())[:300]}") from e
    return HuggingFaceRuntime(path, model, tokens, limit, exact, pinned)
