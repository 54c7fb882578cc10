"""A spec in tables and as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from spec import cost
from spec.config import Alibi, Block, FeedForward, MoE, Norm, Rope, Spec
from spec.levels import CODES
from spec.load import load, presets
from spec.params import params


class Carried(Protocol):
    """A line of `backends.targets`, as far as printing needs it."""

    @property
    def backend(self) -> str: ...
    @property
    def levels(self) -> tuple[str, ...]: ...
    @property
    def carrier(self) -> str: ...
    @property
    def folds(self) -> tuple[str, ...]: ...
    @property
    def refusals(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def facts(spec: Spec, length: int | None = None) -> dict[str, Any]:
    """Everything that `show` knows, as JSON can hold it. Sizes in bytes, at sequences of `length` tokens."""
    length = length or spec.context
    n = cost.count(spec)
    parts = {name: getattr(n, name) for name in cost.Parameters.__dataclass_fields__}
    return {
        "spec": spec.model_dump(mode="json", exclude={"block", "pattern", "overrides"}),
        "layers": [b.model_dump(mode="json") for b in spec.layers],
        "hash": spec.hash,
        "length": length,
        "parameters": {**parts, "total": n.total},
        "flops_per_token": {"forward": cost.flops(spec, length), "training": cost.training_flops(spec, length)},
        "kv_cache_16bit": {
            "bytes_per_token": cost.cache_bytes_per_token(spec),
            "bytes": cost.cache_bytes(spec, length),
        },
        "training_bytes": {
            "state": cost.training_bytes(spec),
            "activations_f32": cost.activation_bytes(spec, length, 4),
            "activations_bf16": cost.activation_bytes(spec, length, 2),
        },
        "weight_bytes": {level: cost.weight_bytes(spec, level) for level in cost.BITS},
    }


def size(n: float) -> str:
    """Bytes for people: 1,000 bytes are a kB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" or n >= 99.95 else f"{n:.1f} {unit}"


def short(n: float) -> str:
    """A count for people: 1.24 G."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if n < 999.5 or unit == " P":
            break
        n /= 1000
    return f"{n:.0f}{unit}" if not unit or n >= 99.95 else f"{n:.2f}{unit}" if n < 9.995 else f"{n:.1f}{unit}"


def ranges(indices: Sequence[int]) -> str:
    """Layer numbers in words: `all` is the caller's business; 0, 2, 4, 5..9."""
    out: list[str] = []
    start = previous = indices[0]
    for i in [*indices[1:], None]:
        if i is not None and i == previous + 1:
            previous = i
            continue
        out.append(f"{start}" if start == previous else f"{start}..{previous}")
        if i is not None:
            start = previous = i
    return ", ".join(out)


def _kinds(spec: Spec) -> list[tuple[Block, list[int]]]:
    """The distinct layers and where they are."""
    out: dict[Block, list[int]] = {}
    for i, b in enumerate(spec.layers):
        out.setdefault(b, []).append(i)
    return list(out.items())


def _norm(n: Norm) -> str:
    text = f"{n.kind} eps {n.eps:g}"
    text += "" if n.weight else ", no gain"
    text += f", gain {n.offset:g} + w" if n.offset else ""
    return text + (", bias" if n.bias else "")


def _biases(names: dict[str, bool]) -> str:
    on = [name for name, present in names.items() if present]
    return f"bias on {' '.join(on)}" if on else ""


def _join(parts: Iterable[str]) -> str:
    return ", ".join(p for p in parts if p)


def _attention(b: Block) -> str:
    a = b.attention
    heads = f"{a.heads} heads of {a.head_dim}"
    if a.kv_heads != a.heads:
        heads += f", {a.kv_heads} for keys and values"
    qk = f"QK-norm per {a.qk_norm.over}, {_norm(a.qk_norm)}" if a.qk_norm else ""
    natural = a.scale == (a.head_dim or 1) ** -0.5
    return _join(
        [
            heads,
            f"window {a.window:,}" if a.window else "global",
            qk,
            "" if natural else f"scale {a.scale:g}",
            f"softcap {a.softcap:g}" if a.softcap else "",
            f"clip {a.clip:g}" if a.clip else "",
            "sinks" if a.sinks else "",
            _biases(a.bias.model_dump()),
            f"dropout {a.dropout:g}" if a.dropout else "",
        ]
    )


def _position(b: Block) -> str:
    match b.attention.position:
        case Rope() as r:
            text = f"RoPE theta {r.theta:,.0f}"
            text += f", {r.fraction:g} of the head" if r.fraction != 1 else ""
            if r.scaling is not None:
                fields = {k: v for k, v in r.scaling.model_dump().items() if k != "kind" and v is not None}
                shown = _join(
                    f"{k} {len(v)} values" if isinstance(v, tuple) else f"{k} {v:g}" for k, v in fields.items()
                )
                text += f", {r.scaling.kind} scaling ({shown})"
            return text
        case Alibi() as a:
            return f"ALiBi, max bias {a.max_bias:g}"
        case _:
            return "none"


def _mlp(b: Block) -> str:
    m = b.mlp
    one = _feed_forward(m)
    if not isinstance(m, MoE):
        return one
    r = m.router
    extras = [
        "not renormalised" if not r.renormalise else "", f"x {r.scale:g}" if r.scale != 1 else "",
        "with a bias" if r.bias else "", "with a correction" if r.correction else "",
    ]  # fmt: skip
    shared = m.shared and f"a shared one, hidden {m.shared.hidden:,}" + (" behind a gate" if m.shared.gate else "")
    router = _join([f"{m.router.top_k} of {m.experts:,} experts by {r.score}", *extras])
    return f"{router}; each {one}" + (f"; {shared}" if shared else "")


def _feed_forward(m: FeedForward) -> str:
    kind = f"{m.activation} gate, hidden {m.hidden:,}" if m.gated else f"{m.activation}, hidden {m.hidden:,}, no gate"
    clamped = f"alpha {m.alpha:g}, limit {m.limit:g}" if m.activation == "clamped_swiglu" else ""
    return _join([kind, clamped, _biases(m.bias.model_dump()), f"dropout {m.dropout:g}" if m.dropout else ""])


def _residual(b: Block) -> str:
    parallel = "attention and MLP in parallel" + (" under one norm" if b.shared_norm else "") if b.parallel else ""
    scale = f"branches x {b.residual_scale:g}" if b.residual_scale != 1 else ""
    return _join([f"{b.placement}-norm" if b.placement != "sandwich" else "sandwich norms", _norm(b.norm), parallel,
                  scale, f"dropout {b.dropout:g}" if b.dropout else ""])  # fmt: skip


def _embedding(spec: Spec) -> str:
    e = spec.embedding
    positions = f"{spec.position_rows:,} learned positions" if e.positions else ""
    if e.positions and e.positions.offset:
        positions += f" (offset {e.positions.offset})"
    return _join([f"{spec.vocab_size:,} x {spec.width:,}", f"x {e.scale:g}" if e.scale else "", positions,
                  _norm(e.norm) if e.norm else "", f"dropout {e.dropout:g}" if e.dropout else ""])  # fmt: skip


def _head(spec: Spec) -> str:
    h = spec.head
    return _join(["tied to the embedding" if h.tied else "its own matrix", "bias" if h.bias else "",
                  f"x {h.scale:g}" if h.scale else "", f"softcap {h.softcap:g}" if h.softcap else ""])  # fmt: skip


def _table(title: str, *columns: str, header: bool = True) -> Table:
    """A table whose columns are right-aligned where their heading ends with `>`."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=header,
                  pad_edge=False)  # fmt: skip
    for c in columns:
        table.add_column(c.removesuffix(">"), justify="right" if c.endswith(">") else "left", overflow="fold")
    return table


def _console() -> Console:
    import shutil

    # A pipe has no width; a program that reads these tables would rather have long lines than broken ones.
    console = Console(highlight=False)
    return (
        console if console.is_terminal else Console(highlight=False, width=max(120, shutil.get_terminal_size().columns))
    )


def print_facts(spec: Spec, length: int | None = None) -> None:
    """`python -m spec show`."""
    length = length or spec.context
    console, data = _console(), facts(spec, length)
    total = data["parameters"]["total"]

    t = _table(
        f"{spec.name}: {short(total)} parameters, {spec.depth} layers of width {spec.width:,}", "", "", header=False
    )
    t.add_row("context", f"{spec.context:,} tokens")
    t.add_row("embedding", _embedding(spec))
    for b, where in _kinds(spec):
        place = (
            "layers"
            if len(where) == spec.depth
            else f"layers {ranges(where)}"
            if len(where) > 1
            else f"layer {where[0]}"
        )
        t.add_row(place, _residual(b))
        t.add_row("  attention", _attention(b))
        t.add_row("  positions", _position(b))
        t.add_row("  MLP", _mlp(b))
    t.add_row("final norm", _norm(spec.final_norm) if spec.final_norm else "none")
    t.add_row("head", _head(spec))
    t.add_row("hash", spec.hash[:16])
    console.print(t)

    t = _table("Parameters", "part", "count>", "share>")
    for name, n in data["parameters"].items():
        if n and name != "total":
            t.add_row(name, f"{n:,}", f"{n / total:.1%}")
    t.add_section()
    t.add_row("total", f"{total:,}", "")
    if (active := cost.active(spec)) != total:
        t.add_row("used by a token", f"{active:,}", f"{active / total:.1%}")
    console.print(t)

    t = _table(f"Cost at {length:,} tokens", "", ">", header=False)
    work, cache, train = data["flops_per_token"], data["kv_cache_16bit"], data["training_bytes"]
    t.add_row("forward", f"{short(work['forward'])}FLOP a token")
    t.add_row("training", f"{short(work['training'])}FLOP a token")
    t.add_row("KV cache, 16 bit", f"{size(cache['bytes_per_token'])} a token, {size(cache['bytes'])} at most")
    t.add_row("training state (float32 weights, gradients, AdamW)", size(train["state"]))
    t.add_row("activations of one sequence, float32 / bf16 (estimate)",
              f"{size(train['activations_f32'])} / {size(train['activations_bf16'])}")  # fmt: skip
    console.print(t)

    t = _table("Memory to run", "level", "weights>", "bits/weight>", "with the cache>")
    for level, n in data["weight_bytes"].items():
        bound = "<= " if CODES.get(level) == 4 else ""
        t.add_row(level, bound + size(n), f"{bound}{8 * n / total:.2f}", bound + size(n + cache["bytes"]))
    console.print(t)


def print_params(spec: Spec) -> None:
    """`python -m spec params`."""
    t = _table(f"{spec.name}: {cost.count(spec).total:,} parameters", "name", "shape>", "size>", "role")
    for p in params(spec):
        t.add_row(p.name, " x ".join(f"{n:,}" for n in p.shape), f"{p.size:,}", p.role)
    _console().print(t)


def preset_rows() -> list[dict[str, Any]]:
    """Every preset with its size and the sentence at the top of its file."""
    rows: list[dict[str, Any]] = []
    for name in presets():
        first = (resources.files("spec") / "presets" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        total = cost.count(load(name)).total
        rows.append({"name": name, "parameters": total, "about": first.removeprefix("#").strip()})
    return sorted(rows, key=lambda r: r["parameters"])


def print_presets() -> None:
    """`python -m spec list`."""
    t = _table("Presets", "name", "parameters>", "what it is")
    for r in preset_rows():
        t.add_row(r["name"], f"{r['parameters']:,}", r["about"])
    _console().print(t)


def print_targets(
    source: str, found: Sequence[Carried], *, every: bool = False, brief: bool = False, console: Console | None = None
) -> None:
    """`python -m spec targets`. Unless `every`, levels that differ only in how they mix types share a line; `brief`
    leaves out notes, which say nothing of what is carried."""
    t = _table(f"Targets of {source}", "backend", "carried by", "levels", "how, or why not")
    groups: dict[tuple[str, ...], list[Carried]] = {}
    for n, row in enumerate(found):
        same = [_without_level(r) for r in row.refusals] or [row.carrier, *row.folds]
        groups.setdefault((row.backend, str(n) if every else "", *same), []).append(row)
    for rows in groups.values():
        first = rows[0]
        notes = [] if brief else [note for note in first.notes if all(note in r.notes for r in rows)]
        refusals = [r if len(rows) == 1 else _without_level(r) for r in first.refusals]
        t.add_row(
            first.backend,
            "refused" if refusals else first.carrier,
            " ".join(level for r in rows for level in r.levels),
            "\n".join([*refusals, *first.folds, *notes]) or "as it is",
        )
    console = console or _console()
    console.print(t)
    if not (every or brief):
        console.print(f"python -m spec targets {source} --quant LEVEL says more about one level.")


def _without_level(refusal: str) -> str:
    """A refusal that names a level, with neither the name nor the alternative for it."""
    return re.sub(r"^level: \S+ (.*?)(?: \(try .*\))?$", r"level: \1", refusal)
