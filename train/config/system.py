"""How the arithmetic is spread over devices, and in which numbers it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator

from spec.config import Model
from spec.errors import Problem
from train.config.fields import Fraction, Size, unused

if TYPE_CHECKING:
    from train.config.top import TrainConfig


class Parallel(Model):
    """Degrees of parallelism; their product is the number of ranks."""

    dp: Size | None = None
    """Ranks that share the batch, weights sharded among them (FSDP2); none = ranks / (replicate * tp * pp)."""
    replicate: Size = 1
    """Copies of each such group, gradients summed between them (HSDP)."""
    tp: Size = 1
    """Ranks that share each layer: heads and inner widths, and the sequence outside of them."""
    pp: Size = 1
    """Stages of consecutive layers, each on ranks of its own."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of the forward and backward passes of a pipeline."""
    ep: Size = 1
    """Ranks that share a layer's experts; they are taken from dp and tp."""


class Memory(Model):
    """What is kept for the backward pass, and where."""

    checkpointing: Literal["none", "full", "selective", "budget"] = "none"
    """Activations that are computed again in the backward pass: `none`; of whole layers (`full`); all but the results
    in `memory.save` (`selective`); what costs least time within `memory.budget` (`budget`, needs compiled layers)."""
    every: Size = 1
    """Every how many layers one is recomputed."""
    save: Annotated[tuple[Literal["matmul", "attention"], ...], Parameter(negative="")] = ("matmul", "attention")
    """What selective checkpointing keeps: products with weights, what attention kernels give."""
    budget: Fraction = 0.5
    """Share of a layer's activations that `budget` keeps: 0 recomputes all of them, 1 none."""
    offload: bool = False
    """Whether weights, gradients and moments stay in the CPU's memory while they are not used (CUDA and XPU)."""


class Kernels(Model):
    """Which attention kernel runs. What a kernel can't do is said before the first step."""

    kernel: Literal["auto", "flash", "efficient", "cudnn", "flex", "varlen", "math"] = "auto"
    """`auto` chooses by what attention must do and by the device. `flash`, `efficient` and `cudnn` are those of torch's
    scaled_dot_product_attention; `math` is the reference, which holds all scores in memory."""
    allow_fallback: bool = False
    """Whether `auto` may take `math` on a GPU where no fast kernel serves, rather than end."""


def _switch(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "true", "false"], BeforeValidator(_switch)]
"""`true`, `false`, or whichever pays."""

Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16", "fp8"]


def problems(c: TrainConfig) -> list[Problem]:
    """What contradicts itself in memory, precision and compiling."""
    out: list[Problem] = []
    m = c.memory
    if m.checkpointing == "budget" and c.compile == "false":
        fix = "compile true, or memory.checkpointing selective"
        out.append(Problem("memory.checkpointing", m.checkpointing, "is decided while compiling, which is off", fix))
    own = {"none": (), "full": ("every",), "selective": ("every", "save"), "budget": ("budget",)}
    others = tuple(name for name in ("every", "save", "budget") if name not in own[m.checkpointing])
    out += unused("memory", m, others, f"does nothing with memory.checkpointing={m.checkpointing}")
    if m.checkpointing == "selective" and not m.save:
        fix = "memory.checkpointing full, or name matmul or attention"
        out.append(Problem("memory.save", m.save, "keeps nothing", fix))
    if c.precision == "fp8" and c.parallel.tp > 1:
        fix = "parallel.tp 1, or precision bfloat16"
        out.append(Problem("precision", c.precision, "does not go together with tensor parallelism", fix))
    return out
