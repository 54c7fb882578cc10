"""`python -m benchmarks mfu`: the share of a GPU's peak arithmetic that training reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from spec.errors import UserError

WARM = 5
"""Steps before the timed ones: compiling, and the allocator's first rounds."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    spec: str
    batch: int
    length: int
    steps: int
    precision: str
    kernel: str
    checkpointing: str


def benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Train on random tokens. Raises `UserError` where there is no CUDA device whose peak is known."""
    import torch

    from spec import cost
    from spec.load import load
    from train import config, optim, parallel
    from train.data.batches import Rows
    from train.engine import Whole

    device = parallel.choose_device("auto")
    peak = parallel.peak_flops(device, options.precision)
    if peak is None:
        raise UserError(f"benchmarks mfu: {parallel.describe(device, 'auto')} has no known peak at {options.precision}")
    precision, _ = parallel.choose_precision(options.precision, device)
    _, why = parallel.choose_compile("true", device)
    spec = load(options.spec)
    parallel.prepare(precision)
    memory = config.Memory(checkpointing=options.checkpointing)  # type: ignore[arg-type]
    ranks = parallel.Ranks(0, 1, device)
    wraps = [parallel.recomputing(memory), parallel.compile_layer]
    decoder, _ = parallel.build(
        spec, ranks, precision, wraps, length=options.length, kernel=options.kernel, strict=True
    )
    decoder.init_weights(0)
    kernels = decoder.kernels(options.length, dtype=parallel.DTYPES[precision])
    settings = config.Optimizer(lr=1e-4)
    optimizer, engine = optim.build(decoder, spec, settings), Whole(decoder.train(), ranks, precision)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        tokens = torch.randint(spec.vocab_size, (options.batch, options.length + 1), generator=generator).numpy()
        loss = engine.backward([Rows(tokens[:, :-1], tokens[:, 1:], None)], 1 / (options.batch * options.length))
        optim.clip(decoder.parameters(), settings, optim.gradient_norm(decoder.parameters(), ranks))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # the trainer's own loop waits for each step's loss, too

    say(f"{WARM} steps to warm up, layers compiled ({why})")
    for _ in range(WARM):
        step()
    began = time.perf_counter()
    loss = 0.0
    for _ in range(options.steps):
        loss = step()
    seconds = (time.perf_counter() - began) / options.steps
    rate = options.batch * options.length / seconds
    flops = cost.training_flops(spec, options.length)
    return {
        **asdict(options),
        "device": parallel.describe(device, "auto"),
        "kernels": kernels,
        "parameters": cost.count(spec).total,
        "tokens_per_second": rate,
        "mfu": rate * flops / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "loss": loss,
        "torch": torch.__version__,
    }


def print_row(result: dict[str, Any]) -> None:
    """One line a figure."""
    from rich.console import Console

    for name, value in result.items():
        text = f"{value:.1%}" if name == "mfu" else f"{value:,.0f}" if isinstance(value, float) else str(value)
        Console(highlight=False).print(f"{name}: {text}", markup=False)
