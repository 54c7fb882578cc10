"""torchao's integer weight-only quantization (round to nearest), one linear layer at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from evals.quant.decoded import Decoded, Job, matrices, weights


def make(job: Job, group: int) -> Decoded:
    """int4 with a scale for `group` weights, saved by torch and read back; float16 scales, as its checkpoints have."""
    import torch
    from torch import nn

    from convert.sources import open_source

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

    width: Any = torch
    config = IntxWeightOnlyConfig(weight_dtype=width.int4, granularity=PerGroup(group))
    files: dict[str, Path] = {}
    nbytes = 0
    with open_source(job.source) as source:
        spec = source.spec
        sizes = matrices(spec)
        for i, name in enumerate(sizes):
            values = torch.from_numpy(source.tensor(name))
            if values.shape[1] % group or name == "positions.weight":
                nbytes += 2 * values.numel()
                continue
            layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.float16)
            layer.weight = nn.Parameter(values.half())
            quantize_(layer, config)
            files[name] = job.folder / f"{i:04d}.pt"
            torch.save(layer.state_dict(), files[name])
            nbytes += values.numel() // 2 + 2 * (values.numel() // group)

    def fetch(name: str) -> Any:
        if name in files:
            weight: Any = torch.load(files[name], weights_only=False)["weight"]
            return weight.dequantize().float().numpy()
        with open_source(job.source) as again:
            return again.tensor(name)

    rest = 4 * (weights(spec) - sum(sizes.values()))
    return Decoded(spec, fetch, 8 * nbytes / sum(sizes.values()), 8 * (nbytes + rest) / weights(spec))
