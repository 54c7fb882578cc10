"""One study: the original scored once, then every variant, each in a process of its own, kept so that it goes on."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.calibrate.sample import Sample, sample
from convert.calibrate.settings import TOKENS
from evals.compare import SESSION, WINDOW
from evals.quant.decoded import weights
from evals.quant.variants import OURS, Variant
from evals.quant.worker import clustered_error
from evals.reference import Windows, cut
from spec.config import Spec
from spec.errors import UserError

BASELINES = ("llama.cpp-q4_k_m-imatrix", "q4_k_m-importance", "llama.cpp-q4_k_m", "q4_k_m")
"""What others are compared with where nothing is said: the first of these that was measured."""
WINDOWS = 16
"""At least so many windows are scored, whose spread gives the standard errors."""
LOGITS = 128 << 20
"""Bytes of one window's logits, at most."""
LEAST = 256
"""Tokens that a study needs."""
PACKAGES = ("allotrope", "llama-cpp-python", "gguf", "mlx", "mlx-lm", "onnxruntime", "torch", "torchao", "numpy")

CODE = ("evals.quant.worker", "evals.quant.decoded", "evals.quant.base", "evals.quant.activations", "evals.reference",
        "convert.verify.metrics")  # fmt: skip
"""Modules that every result depends on, besides what made it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure, and with what."""

    text: str
    tokens: int = 8192
    calibrate: str = "stdlib"
    baseline: str | None = None
    threads: int | None = None
    keep: bool = False
    """Whether the files of every variant stay."""


def run(source: Path, variants: Sequence[Variant], options: Options, out: Path, say: Say) -> dict[str, Any]:
    """Score every variant. Results lie in `out`/cache from the moment they exist, and a later run takes them from
    there. Raises `UserError` for bad input, before any work; a variant that cannot be made is a row with its reason.
    """
    study = _prepare(source, options, out, variants)
    rows = []
    with _alone(study.folder, out):
        for i, v in enumerate(variants):
            say(f"{v.name} ({i + 1} of {len(variants)})")
            rows.append({"name": v.name, "by": v.by, **study.result(v, say)})
        study.tidy()
    measured = {r["name"]: r for r in rows if "kl_mean" in r}
    chosen = options.baseline or next((b for b in BASELINES if b in measured), None)
    if chosen is not None and chosen in measured:
        compare(list(measured.values()), study, chosen)
    original = study.original(list(measured.values()))
    for r in rows:
        r.pop("key", None)
    return {
        "source": str(source),
        "spec_hash": study.spec.hash,
        "weights": weights(study.spec),
        "tokens": int(study.windows.ids.size),
        "window": int(study.windows.ids.shape[1]),
        "text": options.text,
        "calibrated_on": options.calibrate if any(v.calibrated for v in variants) else None,
        "baseline": chosen if chosen in measured else None,
        "original": original,
        "versions": _versions(),
        "rows": rows,
    }


@dataclass(frozen=True)
class Study:
    """A text's windows, where their results lie, and how to get them."""

    source: Path
    spec: Spec
    windows: Windows
    calibration: Sample | None
    """What peers calibrate on: the text as `--effort good` reads it."""
    options: Options
    folder: Path
    """Of everything that depends on the original and the tokens."""
    state: str
    """What a calibrated result depends on besides."""
    session: int

    def result(self, v: Variant, say: Say) -> dict[str, Any]:
        """A variant's row: kept from before, or made now."""
        if v.absent:
            return {"reason": f"needs {', '.join(v.absent)}, not installed"}
        key = v.key(f"{_code(v)} {self.state if v.calibrated else ''}")
        kept, tokens = self.folder / f"{key}.json", self.folder / f"{key}.npz"
        if not (kept.exists() and tokens.exists()):
            self._reference(say)
            files = self.folder / v.name
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir()
            shared = self.folder / "originals"
            shared.mkdir(exist_ok=True)
            ids = self.folder / "calibration.npy"
            if self.calibration is not None:
                np.save(ids, self.calibration.ids)
            job = {
                "kind": "variant", "maker": v.maker, "settings": v.settings, "source": str(self.source),
                "folder": str(files), "shared": str(shared), "text": self.options.calibrate,
                "calibration": str(ids) if v.calibrated else None, "tokens": str(tokens), **self._common(),
            }  # fmt: skip
            answer = self._work(job, kept, v.name)
            if not self.options.keep:
                shutil.rmtree(files, ignore_errors=True)
            if "kl_mean" not in answer:
                kept.unlink(missing_ok=True)  # what is missing may be there next time
                return answer
        return {"key": key, **json.loads(kept.read_text(encoding="utf-8"))}

    def _common(self) -> dict[str, Any]:
        return {
            "ids": str(self.folder / "ids.npy"), "reference": str(self.folder / "reference.npy"),
            "session": self.session, "threads": self.options.threads,
        }  # fmt: skip

    def _reference(self, say: Say) -> None:
        """The original's logits, once."""
        done = self.folder / "reference.json"
        if done.exists() and (self.folder / "reference.npy").exists():
            return
        need = 4 * self.windows.ids.size * self.spec.vocab_size
        free = shutil.disk_usage(self.folder).free
        if need > 0.9 * free:
            where = f"{free / 1e9:.1f} GB are free in {self.folder} (fewer tokens, or another --out)"
            raise UserError(f"--tokens {self.options.tokens}: the logits take {need / 1e9:.1f} GB, and {where}")
        say("the original's logits")
        np.save(self.folder / "ids.npy", self.windows.ids)
        answer = self._work({"kind": "reference", "source": str(self.source), **self._common()}, done, "original")
        if "how" not in answer:
            raise UserError(f"{self.source}: its logits could not be computed: {answer['reason']}")

    def _work(self, job: dict[str, Any], answer: Path, name: str) -> dict[str, Any]:
        from convert.verify import last_words

        request = self.folder / f"{name}.job.json"
        request.write_text(json.dumps(job), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if self.options.threads:
            env["OMP_NUM_THREADS"] = str(self.options.threads)
        command = [sys.executable, "-m", "evals.quant.worker", str(request), str(answer)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
        finally:
            request.unlink(missing_ok=True)
        if done.returncode != 0 or not answer.exists():
            return {"reason": f"ended with status {done.returncode}{last_words(done.stderr)}"}
        return json.loads(answer.read_text(encoding="utf-8"))

    def tokens(self, row: dict[str, Any]) -> dict[str, Any]:
        """Every token's numbers of a row that was measured."""
        with np.load(self.folder / f"{row['key']}.npz") as found:
            return dict(found)

    def original(self, rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
        """The original's own perplexity; none where nothing was measured."""
        if not rows:
            return None
        nll = self.tokens(rows[0])["nll_ref"]
        return {"nll": float(nll.mean()), "perplexity": float(np.exp(nll.mean())), "nll_se": clustered_error(nll)}

    def tidy(self) -> None:
        """Delete the large files once everything is measured; the results stay."""
        if self.options.keep:
            return
        for name in ("reference.npy", "reference.json", "calibration.npy"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "originals", ignore_errors=True)


@contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """One study at a time in a folder."""
    with (folder / "lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another study of the same model and text writes there") from None
        yield


def compare(rows: Sequence[dict[str, Any]], study: Study, baseline: str) -> None:
    """Add to every row its ratio to the baseline's mean KL and the difference of their mean losses, with standard
    errors of the paired values (the ratio's by the delta method)."""
    base = study.tokens(next(r for r in rows if r["name"] == baseline))
    for row in rows:
        own = study.tokens(row)
        ratio = own["kl"].mean() / base["kl"].mean() if base["kl"].mean() > 0 else float("nan")
        spread = (own["kl"] - ratio * base["kl"]) / base["kl"].mean() if base["kl"].mean() > 0 else own["kl"] * 0
        row["against"] = {
            "kl_ratio": float(ratio),
            "kl_ratio_se": clustered_error(spread),
            "kl_difference": float((own["kl"] - base["kl"]).mean()),
            "kl_difference_se": clustered_error(own["kl"] - base["kl"]),
            "nll_difference": float((own["nll"] - base["nll"]).mean()),
            "nll_difference_se": clustered_error(own["nll"] - base["nll"]),
        }


def _prepare(source: Path, options: Options, out: Path, variants: Sequence[Variant]) -> Study:
    """Everything that can be refused before any work."""
    from convert.sources import open_source
    from convert.verify.sample import read_text

    if options.tokens < LEAST:
        raise UserError(f"--tokens {options.tokens}: at least {LEAST}, so that there are standard errors")
    if options.baseline is not None and options.baseline not in [v.name for v in variants]:
        names = ", ".join(v.name for v in variants)
        raise UserError(f"--baseline {options.baseline}: is none of what is measured ({names})")
    try:
        text = read_text(options.text)
    except UserError as e:
        raise UserError(f"--text {e}") from None
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    opened = open_source(source)
    with opened:
        spec, tokenizer = opened.spec, opened.tokenizer
        if tokenizer is None:
            raise UserError(f"{source}: no tokenizer, and a text needs one (put tokenizer.json beside the weights)")
        window = max(16, min(WINDOW, LOGITS // (4 * spec.vocab_size), options.tokens // WINDOWS))
        windows = cut(spec, tokenizer, text, options.tokens, window)
        calibrating = any(v.calibrated for v in variants)
        read = [sample(spec, tokenizer, options.calibrate, n) for n in sorted(TOKENS.values())] if calibrating else []
        digest = hashlib.sha256(windows.ids.tobytes())
        digest.update(f"{windows.ids.shape} {spec.hash} {opened.hash()}".encode())
    folder = out / "cache" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None
    session = min(spec.context, max(window, SESSION))
    state = " ".join(s.hash for s in read)
    return Study(source, spec, windows, read[0] if read else None, options, folder, state, session)


def _code(v: Variant) -> str:
    """Hash of what decides a result besides its settings: versions of the packages, and the very code."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(json.dumps(_versions()).encode())
    files = [root / f"{m.replace('.', '/')}.py" for m in (v.maker, *CODE)]
    if v.maker == OURS:
        files += [f for part in ("convert", "backends", "spec") for f in sorted((root / part).rglob("*.py"))]
    for file in files:
        if "tests" not in file.parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
