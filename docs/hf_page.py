"""The generated page docs/hf.md: its hand-written part, then the table in backends/hf/carriers.py."""

from __future__ import annotations

from pathlib import Path

from backends.hf.carriers import CARRIERS, SCALINGS, Carrier

HEADINGS = ("architecture", "norm", "positions", "attention", "MLP", "embedding and head")


def page(note: str) -> str:
    """docs/hf.md. note: the line that says where it comes from."""
    head = (Path(__file__).parent / "heads" / "hf.md").read_text(encoding="utf-8")
    rows = [_row(HEADINGS), _row(["---"] * len(HEADINGS))]
    rows += [_row([f"`{c.arch}`", *(", ".join(filter(None, cell)) or "-" for cell in _cells(c))]) for c in CARRIERS]
    return note + head + "\n" + "\n".join(rows) + "\n"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _need(need: str, label: str) -> str:
    return {"no": "", "optional": f"{label}?", "required": label}[need]


def _if(value: object, label: str) -> str:
    return label if value else ""


def _cells(c: Carrier) -> tuple[tuple[str, ...], ...]:
    rotates = c.rope != "none"
    still = {"no": "", "list": "none in any layer", "theta": "none in any layer", "global": "none without a window",
             "windowed": "none without a window, where others have one"}[c.no_position]  # fmt: skip
    biases = {part for _, parts in c.biases for part in parts.split()}
    return (
        (
            f"{c.placement} {c.norm}",
            _if(c.norm_bias, "bias"),
            _if(not c.norm_weight, "no gain"),
            _if(c.offset, "1 + gain"),
            _if(set(c.flow) != {"sequential"}, "flow: " + "/".join(c.flow)),
            _if(c.embed_norm, "one after the embedding"),
        ),
        (
            _if(rotates, "RoPE"),
            _if(c.partial, "partial"),
            _if(rotates, "any scaling" if c.scaling == SCALINGS else "scaling: " + " ".join(sorted(c.scaling))),
            {"": "", "window": "settings for windows", "layer": "theta per layer"}[c.rope_by],
            still,
            _if(c.alibi, "ALiBi"),
            _if(c.positions is not None, f"learned (offset {c.positions})"),
        ),
        (
            _if(c.square, "heads x head_dim = width"),
            _if(c.divisible, "heads divide width"),
            _if(not c.gqa, "no GQA"),
            _if(biases & set("qkvo"), "bias: " + " ".join(n for n in "qkvo" if n in biases)),
            _need(c.qk_norm, f"QK-{c.qk_kind} over {c.qk_over}"),
            {"": "", "value": "scale", "inverse_square": "scale n^-0.5"}[c.scale],
            _if(c.softcap, "softcap"),
            _if(c.clip, "clip"),
            _need(c.sinks, "sinks"),
            {"no": "", "all": "one window", "layers": "window per layer"}[c.window],
        ),
        (
            ("gated" if c.gated else "plain") + f" {c.activation or 'any'}",
            _if(c.lacks, "no " + " ".join(sorted(c.lacks))),
            _if(biases & {"gate", "up", "down"}, "bias"),
            _if(c.hidden_times, f"hidden = {c.hidden_times} x width"),
            *_experts(c),
        ),
        (
            _if(c.embed_scale, "embedding x sqrt(width)" if c.embed_scale == "sqrt_width" else "embedding scale"),
            _if(c.residual_scale, "residual scale"),
            _if(c.logit_scale, "logit scale"),
            _if(c.logit_softcap, "logit softcap"),
            _if("head" in biases, "head bias"),
        ),
    )


def _experts(c: Carrier) -> tuple[str, ...]:
    m = c.mixture
    if m is None:
        return ()
    dense = {"none": "in all layers", "first": "after dense layers", "steps": "in any layers", "list": "in any layers",
             "span": "in regular layers"}[m.dense]  # fmt: skip
    return (
        f"experts {dense}",
        f"{m.score} router" + _if(m.bias, " with bias") + _if(m.correction, " with correction"),
        "renormalise?" if m.renormalise else "renormalise",
        _if(m.scale, "scale"),
        _need(m.shared, "shared expert") + _if(m.shared_gate, " with gate"),
    )
