"""Names and layouts of weights in transformers' mixtures of experts.

Files on the Hub, and what `save_pretrained` writes, mostly hold each expert apart; transformers keeps them stacked in
memory, and may save them so: both are read, the first is written. GPT-OSS's files are stacked and transposed.
"""

from __future__ import annotations

from backends.hf.names import GLU, LAYERS, MODEL, NEIGHBOURS, POST, PRE, SEPARATE, Rows, table
from spec.layout import Concat, Interleave, Op, Rule, Split, Stack, StackExperts, Transpose

GATE, UP, DOWN, ROUTER = (f"layers.{{i}}.mlp.{n}" for n in ("experts.gate", "experts.up", "experts.down", "router"))
Table = tuple[Rule, ...]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("w1", "w3", "w2")


def apart(at: str, names: tuple[str, ...] = PROJECTIONS) -> Table:
    """Three matrices for each expert. at: what the experts of a layer are called."""
    return tuple(
        Rule(f"{part}.weight", f"{LAYERS}{at}.{{e}}.{name}.weight", Split())
        for part, name in zip((GATE, UP, DOWN), names, strict=True)
    )


def stacked(gate_up: str, down: str) -> Table:
    """[E, 2 * F, D], every expert's gate above its up, and [E, D, F]."""
    return (
        Rule((f"{GATE}.weight", f"{UP}.weight"), LAYERS + gate_up, StackExperts()),
        Rule(f"{DOWN}.weight", LAYERS + down, StackExperts()),
    )


def router(weight: str, correction: str = "", *ops: Op) -> Table:
    rules = [Rule(f"{ROUTER}.weight", LAYERS + weight)]
    if correction:
        rules.append(Rule(f"{ROUTER}.correction", LAYERS + correction, *ops))
    return tuple(rules)


def layers(**blocks: str | tuple[str | Op, ...]) -> Rows:
    """Rows of a shared expert: `gate`, `up`, `down` (or `gate_up`), `scalar`."""
    names = {"gate": "mlp.shared.gate", "up": "mlp.shared.up", "down": "mlp.shared.down",
             "gate_up": "mlp.shared.gate mlp.shared.up", "scalar": "mlp.shared_gate"}  # fmt: skip
    return {names[n]: target for n, target in blocks.items()}


def shared_at(at: str) -> Rows:
    return layers(gate=f"{at}.gate_proj", up=f"{at}.up_proj", down=f"{at}.down_proj")


EXPERTS = apart("mlp.experts")
STACKED = stacked("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
GATE_ROUTER = router("mlp.gate.weight")

_ATTENTION = table(MODEL, LAYERS, {**PRE, **SEPARATE})
_BLOCK_SPARSE = apart("block_sparse_moe.experts", MIXTRAL_NAMES)
MIXTRAL = (*_ATTENTION, *router("block_sparse_moe.gate.weight"), *_BLOCK_SPARSE)
MIXTRAL_STACKED = (*_ATTENTION, *GATE_ROUTER, *STACKED)
MINIMAX = (*_ATTENTION, *router("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
           *_BLOCK_SPARSE)  # fmt: skip
MINIMAX_STACKED = (*_ATTENTION, *router("mlp.gate.weight", "mlp.e_score_correction_bias"), *STACKED)

_QWEN = (*table(MODEL, LAYERS, {**PRE, **SEPARATE, **GLU, **shared_at("mlp.shared_expert"),
                               **layers(scalar="mlp.shared_expert_gate")}), *GATE_ROUTER)  # fmt: skip
QWEN = (*_QWEN, *EXPERTS)
"""Qwen2-MoE, Qwen3-MoE, OLMoE."""
QWEN_STACKED = (*_QWEN, *STACKED)

_FLEX = (*table(MODEL, LAYERS, {**POST, **SEPARATE}), *GATE_ROUTER)
FLEX = (*_FLEX, *EXPERTS)
FLEX_STACKED = (*_FLEX, *STACKED)

CORRECTED = "mlp.gate.e_score_correction_bias"
_DEEPSEEK = table(MODEL, LAYERS, {**PRE, **SEPARATE, **GLU, **shared_at("mlp.shared_experts")})
DEEPSEEK = (*_DEEPSEEK, *router("mlp.gate.weight", CORRECTED), *EXPERTS)
"""DeepSeek-V3's feed-forward part: GLM-4-MoE, dots1, Solar Open."""
DEEPSEEK_STACKED = (*_DEEPSEEK, *router("mlp.gate.weight", CORRECTED), *STACKED)
EXAONE = (*_DEEPSEEK, *router("mlp.gate.weight", "mlp.e_score_correction_bias"), *EXPERTS)

_ERNIE = table(MODEL, LAYERS, {**PRE, **NEIGHBOURS, **GLU, **shared_at("mlp.shared_experts")})
ERNIE = (*_ERNIE, *router("mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias", Stack()), *EXPERTS)
ERNIE_STACKED = (*_ERNIE, *router("mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias", Stack()),
                 *STACKED)  # fmt: skip

_GRANITE = table(
    MODEL, LAYERS,
    {**PRE, **SEPARATE, **layers(gate_up=("shared_mlp.input_linear", Concat()), down="shared_mlp.output_linear")},
    sinks="self_attn.sinks",
)  # fmt: skip
GRANITE = (*_GRANITE, *router("block_sparse_moe.router.layer.weight"),
           *stacked("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"))  # fmt: skip
GRANITE_STACKED = (*_GRANITE, *router("block_sparse_moe.router.weight"),
                   *stacked("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"))  # fmt: skip


def _gpt_oss(end: str, *last: Op) -> Table:
    """gate and up in turn, [E, D, 2 * F] and [E, F, D]; biases [E, 2 * F] and [E, D]. end: of the weights' names."""
    at = f"{LAYERS}mlp.experts."
    return (
        *table(MODEL, LAYERS, {**PRE, **SEPARATE, "mlp.router": "mlp.router"}, sinks="self_attn.sinks"),
        Rule((f"{GATE}.weight", f"{UP}.weight"), f"{at}gate_up_proj{end}", Interleave(), StackExperts(), *last),
        Rule((f"{GATE}.bias", f"{UP}.bias"), f"{at}gate_up_proj_bias", Interleave(), StackExperts()),
        Rule(f"{DOWN}.weight", f"{at}down_proj{end}", StackExperts(), *last),
        Rule(f"{DOWN}.bias", f"{at}down_proj_bias", StackExperts()),
    )


GPT_OSS = _gpt_oss("", Transpose())
GPT_OSS_BLOCKS = _gpt_oss("_blocks")
"""MXFP4 on the way in: rows are those of the products."""
