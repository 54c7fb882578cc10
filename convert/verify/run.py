"""The verification itself, inside the child process: opens artifact and source, runs the checks, keeps the journal."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import NotComparable, Runtime
from backends.numpy.model import Oracle
from convert import levels
from convert.verify import numeric, sample
from convert.verify.packing import check_packing
from convert.verify.report import Check, Report, Status, dumps
from convert.verify.stock import check_client, check_genai, check_stock
from convert.verify.tokens import Texts, check_tokenizer
from convert.verify.weights import source_weights
from spec.config import Spec
from spec.errors import UserError

log = logging.getLogger(__name__)
Array = NDArray[Any]

VERIFIABLE: tuple[str, ...] = tuple(b.name for b in backends.REGISTRY if backends.has(b, "read"))
"""Backends whose artifacts can be decoded."""

DRAWS = 4
"""Sets of random tokens that the graph check tries with mixtures of experts."""
PATIENCE = 300
"""Seconds for what tokenizers make of texts, which are short: a hundred times what the slowest one needs."""
QUICK = 200_000_000
"""Weights up to which the original's forward is float64 too; beyond, float32 (its rounding is a millionth of the
mildest quantization's cost)."""


class Shipped(Protocol):
    """An artifact opened for verification: what a backend's door provides."""

    spec: Spec
    """The spec as the shipped graph computes it (exact folds included)."""

    @property
    def precision(self) -> str:
        """The coarsest rounding that the runtime applies while it computes, a key of `gates.UNIT`."""
        ...

    @property
    def session(self) -> int | None:
        """The session length whose rotary tables are fixed in the artifact; none where the runtime chooses."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where clients that read it by transformers' AutoTokenizer look; none for other formats."""
        ...

    @property
    def genai(self) -> Path | None:
        """Where onnxruntime-genai, with a tokenizer of its own, looks; none for other formats."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether an interpreter stands in for the hardware that the artifact is for."""
        ...

    def weights(self, name: str) -> Any:
        """The dequantized weights as the graph uses them: array-like, `Typed` where the runtime rounds inputs."""
        ...

    def stored(self) -> Any:
        """What `packing.check_packing` reads."""
        ...

    def load(self, context: int) -> Runtime:
        """The runtime with its stock settings."""
        ...

    def emulate(self, ids: Array, length: int) -> numeric.Emulation:
        """The artifact's weights on ids [1, T], exactly and with its runtime's roundings."""
        ...

    def twin(self, folder: Path) -> Twin:
        """The same graph in float32, for the graph check."""
        ...


@dataclass(frozen=True)
class Twin:
    """A small float32 artifact of the same graph."""

    spec: Spec
    weights: Callable[[str], Any]
    runtime: Runtime
    what: str
    length: int
    """Tokens of the session that its rotary tables are for."""
    tables: bool = False
    """Whether its GELU is llama.cpp's float16 table."""
    emulated: bool = False
    """Whether an interpreter runs it."""


def door(backend: str) -> Any:
    """How to open a backend's artifacts. Raises `UserError` for backends that nothing can decode."""
    if backend == "gguf":
        from convert.verify.gguf import Door as GGUFDoor

        return GGUFDoor()
    if backend in VERIFIABLE:
        from convert.verify.artifact import Door

        return Door(backends.get(backend))
    raise UserError(f"{backend}: its artifacts cannot be verified (verifiable: {', '.join(VERIFIABLE)})")


def describe(artifact: Path, backend: str | None = None) -> tuple[str, str]:
    """The backend of an artifact and the level that its receipt declares. Raises `UserError`."""
    if not artifact.exists():
        raise UserError(f"{artifact}: no such file or folder")
    found = backends.get(backend) if backend else backends.recognise(artifact, backends.REGISTRY)
    if found is None:
        raise UserError(f"{artifact}: not an artifact of any backend ({', '.join(b.name for b in backends.REGISTRY)})")
    return found.name, door(found.name).level_of(artifact)


@dataclass(frozen=True)
class Ran:
    """What the stock runtime answered."""

    info: dict[str, Any]
    context: int
    logits: Array
    """[1, T, V] of all ids at once."""
    stepped: Array
    """[1, t, V] of the ids in pieces, at the positions `tokens`."""
    tokens: slice
    words: Check
    """Its tokenizer's verdict."""


@dataclass
class Session:
    """What the checks share; everything expensive is made once, when first asked for."""

    source: Any
    """As `convert.sources.open_source` returns it."""
    shipped: Shipped
    level: str
    text: str | None = None
    """What the numeric checks run on; none: the standard library."""

    @cached_property
    def ids(self) -> Array:
        spec: Spec = self.source.spec
        return sample.token_ids(spec, self.source.tokenizer, self.text, sample.affordable(spec))

    @cached_property
    def ran(self) -> Ran:
        """Everything that is asked of the stock runtime, which is closed again: its copy of the weights and the
        oracle's memory are not needed at once."""
        with self.shipped.load(min(self.source.spec.context, self.ids.shape[1] + 8)) as runtime:
            stepped, tokens = numeric.stepwise(runtime, self.ids)
            try:
                words = check_tokenizer(runtime, self.source.tokenizer)
            except Exception as e:  # a tokenizer that is missing or breaks is that check's verdict, not the runtime's
                words = _failed("tokenizer", e)
            return Ran(runtime.info(), runtime.context, runtime.logits(self.ids), stepped, tokens, words)

    @property
    def length(self) -> int:
        """Tokens of the session that the rotary tables are for."""
        return self.shipped.session or self.ran.context

    @cached_property
    def emulation(self) -> numeric.Emulation:
        return self.shipped.emulate(self.ids, self.length)

    @cached_property
    def graphs(self) -> tuple[Check, Check]:
        """The twin all at once, and the twin in pieces."""
        with tempfile.TemporaryDirectory(prefix="twin-") as folder:
            twin = self.shipped.twin(Path(folder))
            with twin.runtime as runtime:
                ids, graph = _certain(twin)
                whole = numeric.check_graph(runtime.logits(ids), graph, twin.what)
                if graph.certain < ids.shape[1]:
                    whole = replace(whole, flags=(*whole.flags, *_unleft(twin.spec, graph.certain)))
                until = graph.certain if graph.certain > numeric.CERTAIN else ids.shape[1]
                stepped, tokens = numeric.stepwise(runtime, ids, until)
                what = f"prefill {tokens.start + 1}, then token by token to {tokens.stop}, in float32"
                pieces = numeric.check_graph(stepped, graph, what, "invariants", tokens)
                return (_emulated(whole), _emulated(pieces)) if twin.emulated else (whole, pieces)

    def packing(self) -> Check:
        return check_packing(self.shipped.stored(), self.source)

    def runtime(self) -> Check:
        start = time.perf_counter()
        info = self.ran.info
        what = ", ".join(str(info[k]) for k in ("runtime", "device", "precision") if k in info)
        return Check("runtime", Status.PASS, reason=what, details={**info, "seconds": time.perf_counter() - start})

    def graph(self) -> Check:
        return self.graphs[0]

    def arithmetic(self) -> Check:
        what = f"the runtime as shipped against float64 on the same dequantized weights, {self.ids.shape[1]} tokens"
        spec, precision = self.shipped.spec, self.shipped.precision
        check = numeric.check_arithmetic(self.ran.logits, self.emulation, spec.depth, precision, what)
        return replace(check, flags=(*check.flags, *_unleft(spec, max(self.ids.shape[1], _reach(spec)))))

    def invariants(self) -> Check:
        """The worse of the twin's cache, behind a float32 gate, and the stock runtime's."""
        ran, spec, precision = self.ran, self.shipped.spec, self.shipped.precision
        stock = numeric.check_cached(ran.stepped, ran.tokens, self.emulation, spec.depth, precision)
        twin = self.graphs[1]
        grave = {Status.FAIL: 2, Status.NOT_RUN: 1}
        worse, other = sorted((twin, stock), key=lambda c: (grave.get(c.status, 0), c.margin or 0), reverse=True)
        also = {"measured": other.measured, "gate": other.gate, "what": other.reason}
        return replace(worse, details={**worse.details, "also": also})

    def quality(self) -> Check:
        spec: Spec = self.source.spec
        size = sum(int(np.prod(self.source.shape(n))) for n in self.source.names())
        dtype = np.float64 if size <= QUICK else np.float32
        original = Oracle(spec, source_weights(self.source), dtype, self.length).logits(self.ids)
        check = numeric.check_quality(self.ran.logits, original, self.ids, self.level)
        if self.source.tokenizer is None:
            check = replace(check, flags=(*check.flags, "random tokens, since the source has no tokenizer"))
        return check

    def tokenizer(self) -> Check:
        words = self.ran.words
        if words.status is Status.PASS and self.source.path.suffix == ".gguf":
            words = check_client(self.source.path, self.source.tokenizer, words)
        if words.status is Status.PASS and self.shipped.folder is not None:
            if find_spec("transformers") is None:
                flag = "not compared with transformers, which is not installed"
                return replace(words, flags=(*words.flags, flag))
            return check_stock(self.shipped.folder, self.source.tokenizer) or words
        if words.status is Status.PASS and self.shipped.genai is not None:
            return check_genai(self.shipped.genai, self.source.tokenizer, words)
        return words


def _unleft(spec: Spec, compared: int) -> tuple[str, ...]:
    """What to tell where no compared token lies beyond the longest window."""
    longest = max((b.attention.window or 0 for b in spec.layers), default=0)
    return (f"the window of {longest} tokens is not left: {compared} were compared",) if longest >= compared else ()


def _reach(spec: Spec) -> int:
    """Tokens of the graph check: past every window that is not too long, and past the runtime's block sizes."""
    windows = [b.attention.window for b in spec.layers if b.attention.window is not None]
    return min(max([64, *(w + 16 for w in windows if w <= 512)]), spec.context - 1)


def _certain(twin: Twin) -> tuple[Array, numeric.Graph]:
    """Random tokens for the graph check and what must come out, drawn again where a router is near a tie."""
    best: tuple[Array, numeric.Graph] | None = None
    for seed in range(1, 1 + DRAWS):
        ids = _twin_ids(twin.spec, seed)
        graph = numeric.graph_reference(twin.spec, twin.weights, ids, twin.tables, twin.length)
        if best is None or graph.certain > best[1].certain:
            best = ids, graph
        if graph.certain == ids.shape[1]:
            break
    assert best is not None, "at least one draw"
    return best


def _twin_ids(spec: Spec, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (1, _reach(spec)))


CHECKS: tuple[str, ...] = ("packing", "runtime", "graph", "arithmetic", "invariants", "quality", "tokenizer")
"""In order: cheap before dear, and each needs only what those before it have shown."""
RAN = ("runtime", "graph", "arithmetic", "invariants", "quality")
"""What an interpreter can only emulate."""


def run(
    artifact: Path,
    backend: str,
    source_path: str | Path,
    level: str,
    text: Path | None,
    threads: int | None,
    journal: Path,
    adapters: Sequence[str | Path] = (),
    rounding: Path | None = None,
    imatrix: Path | None = None,
) -> Report:
    """Run every check and write each to the journal as it ends. A `UserError` goes there too."""
    from convert.sources import open_source

    report = Report(str(artifact), backend, level, str(source_path))
    with journal.open("a", encoding="utf-8") as out:

        def tell(**event: Any) -> None:
            out.write(dumps(event) + "\n")
            out.flush()

        try:
            if not artifact.exists():
                raise UserError(f"{artifact}: no such file or folder")
            source = open_source(source_path, adapters, rounding, imatrix)
            lead = None if text is None else sample.read_text(text)
            opener = door(backend)
            level = levels.check(level, backends.part(backends.get(backend), "support").levels())
        except UserError as e:
            tell(error=str(e))
            return report
        step = "tokenizer"
        try:
            if source.tokenizer is not None:  # its expressions are somebody else's: tried before all that waits for it
                tell(start=step, limit=PATIENCE)
                sample.token_ids(source.spec, source.tokenizer, lead, sample.affordable(source.spec))
                Texts.of(source.tokenizer, 300).probe()
            step = "opening"
            tell(start=step, limit=None)
            shipped = opener.open_artifact(artifact, source.spec, level, threads, source.held)
            if source.importance is not None and hasattr(shipped.artifact, "importance"):
                shipped.artifact.importance = source.importance.means
            session = Session(source, shipped, level, lead)
            tell(facts={"tokens": int(session.ids.size), "versions": opener.versions()})
        except Exception as e:
            report.checks.append(_failed(step, e))
            tell(check=asdict(report.checks[-1]))
            tell(done=True)
            return report
        for name in CHECKS:
            tell(start=name, limit=PATIENCE if name == "tokenizer" else None)
            try:
                if any(c.name == "runtime" for c in report.failures):
                    check = Check(name, Status.NOT_RUN, reason="the runtime does not run the artifact")
                else:
                    check = getattr(session, name)()
            except NotComparable as e:
                check = Check(name, Status.NOT_RUN, reason=str(e))
            except Exception as e:
                log.debug("%s", name, exc_info=True)
                check = _failed(name, e)
            if shipped.emulated and name in RAN:
                check = _emulated(check)
            report.checks.append(check)
            tell(check=asdict(check))
        tell(done=True)
    return report


def _emulated(check: Check) -> Check:
    return replace(check, status=Status.EMULATED) if check.status is Status.PASS else check


def _failed(name: str, e: Exception) -> Check:
    kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
    return Check(name, Status.FAIL, reason=kind + (" ".join(str(e).split()) or "no message")[:300])
