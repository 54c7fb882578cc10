"""What the original feeds its products, from one float32 run: peers calibrate on it. Shapes: N tokens, I inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.quant.decoded import Job, Unavailable

Visit = Callable[[str, int, NDArray[np.float32]], None]
"""Called with a canonical weight, an expert's number (0 where there are none) and inputs [N, I]."""


def watch(job: Job, visit: Visit) -> None:
    """Run the calibration tokens through the original and hand on the input of every product with a matrix, the head's
    too."""
    try:
        import torch
        from torch import nn
    except ImportError:
        raise Unavailable("calibrating needs torch: pip install 'allotrope[train]'") from None
    from backends.torch.model import Decoder
    from backends.torch.modules import GroupedLinear, Head
    from convert.sources import open_source

    assert job.ids is not None, "calibration tokens"
    ids = np.load(job.ids)
    with open_source(job.source) as source:
        decoder = Decoder(source.spec, length=max(ids.shape[1], 1))
        decoder.load_state_dict({n: torch.from_numpy(source.tensor(n)) for n in source.names()}, assign=True)
    decoder.eval()

    def seen(name: str, experts: bool, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0].detach().flatten(0, -2).float().numpy()
        if not experts:
            visit(name, 0, x)
            return
        ends = np.cumsum(kwargs["counts"].numpy())
        for e, part in enumerate(np.split(x, ends[:-1])):
            visit(name, e, part)

    for name, module in decoder.named_modules():
        if isinstance(module, (nn.Linear, GroupedLinear, Head)):
            weight = "embed.weight" if isinstance(module, Head) and module.tied else f"{name}.weight"
            hook = partial(seen, weight, isinstance(module, GroupedLinear))
            module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        for row in ids:
            decoder(torch.from_numpy(row[None]))


def mean_squares(job: Job) -> dict[str, NDArray[np.float64]]:
    """Canonical weight to the mean square of each input [experts, I] (1 expert where there are none): llama.cpp's
    importance matrix. An expert that no token chose has ones, as in llama-imatrix."""
    sums: dict[str, dict[int, Any]] = {}
    counts: dict[str, dict[int, int]] = {}

    def visit(name: str, expert: int, x: NDArray[np.float32]) -> None:
        total, count = sums.setdefault(name, {}), counts.setdefault(name, {})
        total[expert] = total.get(expert, 0.0) + np.square(x, dtype=np.float64).sum(0)
        count[expert] = count.get(expert, 0) + len(x)

    watch(job, visit)
    return {
        name: np.stack([s / counts[name][e] if counts[name][e] else np.ones_like(s) for e, s in sorted(total.items())])
        for name, total in sums.items()
    }
