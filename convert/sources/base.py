"""A source of canonical tensors: what converters, verification and loaders read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats, Tokenizer, Values, content_hash
from convert.recipe import Held
from convert.sources.store import Store
from spec.config import Spec
from spec.errors import UserError
from spec.layout import Layout
from spec.params import params

if TYPE_CHECKING:
    from convert.calibrate.imatrix import Importance
    from convert.calibrate.store import Rounding

BLOCK = 1 << 21
"""Weights in a row block: 8 MiB as float32."""


class Source:
    """A checkpoint, open: its spec, its tokenizer, and a lazy stream of canonical tensors in row blocks.

    `aliases` are external tensors that must equal a canonical one (a tied head that was stored all the same); they
    are compared while the canonical one streams. `ignored` is a pattern of external tensors that hold no weights.
    Raises `UserError` that lists every missing, unclaimed and misshapen tensor.
    """

    def __init__(
        self,
        path: Path,
        spec: Spec,
        layout: Layout,
        tensors: Store,
        tokenizer: Tokenizer | None,
        *,
        aliases: dict[str, str] | None = None,
        ignored: str = r"(?!)",
        notes: Sequence[str] = (),
        adapters: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.path, self.spec, self.tokenizer = path, spec, tokenizer
        self.notes: list[str] = list(notes)
        """What a user should know though nothing is lost."""
        self.choices: dict[str, dict[str, str]] = {}
        """Options of backends that bring it back to where it came from, by backend."""
        self.adapters = tuple(dict(a) for a in adapters)
        """Name and sha256 of each adapter that is merged into what is read."""
        self.rounding: Rounding | None = None
        """The calibrated codes that `values` yields."""
        self.importance: Importance | None = None
        """What the inputs of its matrices count: measured with the codes, or read from a file."""
        self._layout, self._tensors = layout, tensors
        self._params = {p.name: p for p in params(spec)}
        self._aliases = {c: e for e, c in (aliases or {}).items() if e in tensors.entries}
        self._check(ignored)
        self._check_vocabulary()

    def names(self) -> list[str]:
        """Canonical names, in canonical order."""
        return list(self._params)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor."""
        return self._params[name].shape

    @property
    def name(self) -> str:
        """What it is called: its folder, or the repository of a folder in the Hub's cache."""
        found = self.origin
        own = self.path.resolve()
        if found:
            return found["repo"].split("/")[-1]
        return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", own.name)

    @property
    def origin(self) -> dict[str, str] | None:
        """Repository and commit of a folder in the Hub's cache, which is called after them."""
        return hub_origin(self.path)

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(p.size for p in self._params.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored."""
        return self._tensors.nbytes

    def dtypes(self) -> dict[str, int]:
        """How many tensors come in each dtype."""
        found = [self._tensors.entries[n].dtype.lower() for n in self._layout.external]
        return {d: found.count(d) for d in sorted(set(found))}

    def rows(self, name: str) -> int:
        """Rows of one block: as many as 8 MiB hold, and whole heads of q and k, whose rows some formats permute."""
        shape = self.shape(name)
        rows = max(1, BLOCK // prod(shape[1:]))
        if re.fullmatch(r"layers\.\d+\.attn\.[qk]\.weight", name):
            head_dim = self.spec.layers[int(name.split(".")[1])].attention.head_dim
            assert head_dim is not None, "a resolved layer"
            rows = max(head_dim, rows // head_dim * head_dim)
        return min(rows, shape[0])

    def blocks(self, name: str, rows: int | None = None) -> Iterator[tuple[int, Floats]]:
        """(first row, float32 rows) of a tensor, in order, `rows` at a time (default: about 8 MiB).

        Raises `UserError` at a NaN or infinity, naming tensor and row, and at an alias that differs.
        """
        total, step = self.shape(name)[0], rows or self.rows(name)
        for start in range(0, total, step):
            stop = min(total, start + step)
            with np.errstate(all="ignore"):  # a product of two tensors that is no number is named below
                block = self._layout.read(name, start, stop, self._tensors.fetch)
            _finite(self._label(name), start, block)
            alias = self._aliases.get(name)
            if alias is not None and not np.array_equal(block, self._tensors.fetch(alias, start, stop)):
                raise UserError(f"{alias}: differs from {self._label(name)}, and the model ties the two "
                                "(tie_word_embeddings: false would keep both)")  # fmt: skip
            yield start, block

    @property
    def held(self) -> Held:
        """What it holds as codes and scales."""
        return getattr(self._tensors, "held", None) or Held()

    def attach(self, rounding: Rounding) -> None:
        """Let `values` yield the codes of a calibrated rounding of this source. Raises `UserError` where it is one of
        another model."""
        from convert.calibrate.imatrix import measured

        rounding.check(self.spec)
        self.rounding, self.importance = rounding, measured(rounding)

    def values(self, name: str, rows: int | None = None) -> Iterator[tuple[int, Values]]:
        """`blocks` as they are stored: the codes and scales of an attached rounding, or the source's own, where there
        are some."""
        if self.rounding is not None and name in self.rounding:
            fetch = self.rounding.rows
        elif name in self.held.levels:
            fetch = self._tensors.coded  # type: ignore[attr-defined]
        else:
            yield from self.blocks(name, rows)
            return
        total, step = self.shape(name)[0], rows or self.rows(name)
        for start in range(0, total, step):
            block = fetch(name, start, min(total, start + step))
            _finite(self._label(name), start, block.scales)
            yield start, block

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A whole tensor, float32."""
        out = np.empty(self.shape(name), np.float32)
        for start, block in self.blocks(name):
            out[start : start + len(block)] = block
        return out

    def hash(self) -> str:
        """SHA-256 over every canonical tensor's values, whatever dtype and files they came in (reads all of them)."""
        return weights_hash((n, content_hash(b for _, b in self.blocks(n))) for n in self.names())

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()
        if self.rounding is not None:
            self.rounding.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _label(self, name: str) -> str:
        outside = self._layout.of[name].external
        return name if outside == (name,) else f"{name} ({', '.join(outside)})"

    def _check(self, ignored: str) -> None:
        have, want = self._tensors.entries, self._layout.external
        problems = []
        missing = [n for n in want if n not in have]
        if missing:
            head = self._layout.of["head.weight"].external if "head.weight" in self._layout.of else ()
            hint = " (the config says that the head is not tied to the embedding)" if head == (*missing,) else ""
            problems.append(f"{several(len(missing), 'tensor is', 'tensors are')} missing: {collapse(missing)}{hint}")
        skip = re.compile(ignored)
        extra = [n for n in have if n not in want and n not in self._aliases.values() and not skip.fullmatch(n)]
        if extra:
            problems.append(f"{several(len(extra), 'tensor belongs', 'tensors belong')} to nothing in the model: "
                            f"{collapse(extra)}")  # fmt: skip
        problems += [
            f"{n}: shape {list(have[n].shape)}, the model needs {list(shape)}"
            for n, shape in want.items()
            if n in have and have[n].shape != shape
        ]
        for canonical, alias in self._aliases.items():
            if have[alias].shape != self.shape(canonical):
                problems.append(f"{alias}: shape {list(have[alias].shape)}, the tied {canonical} has "
                                f"{list(self.shape(canonical))}")  # fmt: skip
        used = [*(n for n in want if n in have), *self._aliases.values()]
        for dtype in sorted({have[n].dtype for n in used if not have[n].readable}):
            names = [n for n in used if have[n].dtype == dtype and not have[n].readable]
            problems.append(f"{several(len(names), 'tensor is', 'tensors are')} {dtype} (F32, F16 and BF16 are read): "
                            f"{collapse(names)}")  # fmt: skip
        if problems:
            raise UserError("\n".join(f"{self.path}: {p}" for p in problems))

    def _check_vocabulary(self) -> None:
        if self.tokenizer is None:
            self.notes.append("no tokenizer: the artifact takes token ids only")
            return
        from convert.tokenizers import token_count

        tokens, rows = token_count(self.tokenizer), self.spec.vocab_size
        if tokens > rows:
            raise UserError(f"{self.path}: the tokenizer has {tokens} tokens and the embedding {rows} rows; "
                            "the tokenizer is another model's, or the embedding was not resized")  # fmt: skip
        if tokens < rows:
            self.notes.append(f"{rows - tokens} embedding rows have no token (padding)")


def _finite(label: str, start: int, block: Floats) -> None:
    if np.isfinite(block).all():
        return
    row, *column = (int(i) for i in np.argwhere(~np.isfinite(block))[0])
    value = block[(row, *column)]
    at = f"row {start + row}" + (f", column {column[0]}" if column else "")
    raise UserError(f"{label}: {value} at {at}; the checkpoint is damaged or its training diverged")


def several(n: int, one: str, more: str) -> str:
    """A count with its words: `1 tensor is`, `2 tensors are`."""
    return f"{n} {one if n == 1 else more}"


def collapse(names: Iterable[str]) -> str:
    """Names with the numbers of layers and experts folded together: `layers.{0..15}.mlp.experts.{0..7}.up.weight`."""
    shown = list(names)
    for place in reversed(range(PLACES)):  # from the last one: what an earlier one folds has equal ranges after it
        groups: dict[tuple[str, str], list[int]] = {}
        for n in shown:
            found = next(islice(NUMBERS.finditer(n), place, None), None)
            key = (n[: found.start()], n[found.end() :]) if found else (n, "")
            groups.setdefault(key, []).extend([int(found[0])] if found else [])
        shown = [before + _ranges(sorted(set(i))) + after for (before, after), i in groups.items()]
    return ", ".join(shown)


NUMBERS = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")
PLACES = 3
"""Numbers of a name that are folded."""


def _ranges(numbers: list[int]) -> str:
    """`{0..2,5}`; a number alone as it is."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in out)
    return f"{{{text}}}" if len(numbers) > 1 else text


def hub_origin(folder: Path) -> dict[str, str] | None:
    """Repository and commit that a folder of the Hub's cache holds: models--OWNER--NAME/snapshots/COMMIT."""
    folder = folder.resolve()
    found = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots":
        return None
    return {"repo": found[1].replace("--", "/", 1), "revision": folder.name}


def weights_hash(tensors: Iterator[tuple[str, str]]) -> str:
    """One hash over the (name, hash) of every tensor, in canonical order."""
    whole = hashlib.sha256()
    for name, digest in tensors:
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()
