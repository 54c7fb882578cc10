"""One trainer of a Llama, which trains as many steps as each line of its input says and answers with their seconds:
`python -m benchmarks.trainer TOOL JSON`.

Every tool sees the same batches of random tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

Step = Callable[[int], float]
"""The number of a batch -> the loss of a step on it."""


def batch(size: dict[str, Any], number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[B, T + 1] random tokens."""
    rng = np.random.default_rng(number)
    return rng.integers(0, size["vocab"], (size["batch"], size["length"] + 1))


def specification(size: dict[str, Any]) -> Any:
    """The Llama as a spec."""
    from spec import parse

    return parse(
        {
            "version": 1, "name": "benchmark", "vocab_size": size["vocab"], "width": size["width"],
            "depth": size["depth"], "context": size["length"],
            "block": {
                "attention": {"heads": size["heads"], "kv_heads": size["kv_heads"]}, "mlp": {"hidden": size["hidden"]}
            },
        }
    )  # fmt: skip


def transformers(size: dict[str, Any]) -> tuple[Step, int]:
    """LlamaForCausalLM with its own loss, clipping and AdamW, as its users write a loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["width"], intermediate_size=size["hidden"],
        num_hidden_layers=size["depth"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["length"], tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def step(number: int) -> float:
        ids = torch.from_numpy(batch(size, number)[:, :-1])
        with torch.autocast("cpu", torch.bfloat16) if size["precision"] == "bfloat16" else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def allotrope(size: dict[str, Any], *, compiled: bool) -> tuple[Step, int]:
    """The trainer's own decoder, engine, clipping and optimizer."""
    import torch

    from train import config, optim, parallel
    from train.data.batches import Rows
    from train.engine import Whole

    parallel.keep_memory()
    spec = specification(size)
    ranks = parallel.Ranks(0, 1, torch.device("cpu"))
    wraps = [parallel.compile_layer] if compiled else []
    decoder, _ = parallel.build(spec, ranks, size["precision"], wraps, length=size["length"])
    decoder.init_weights(0)
    settings = config.Optimizer(lr=1e-3)
    optimizer = optim.build(decoder, spec, settings)
    engine = Whole(decoder.train(), ranks, size["precision"])

    def step(number: int) -> float:
        tokens = batch(size, number)
        loss = engine.backward([Rows(tokens[:, :-1], tokens[:, 1:], None)], 1 / tokens[:, 1:].size)
        optim.clip(decoder.parameters(), settings, optim.gradient_norm(decoder.parameters(), ranks))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step, sum(p.numel() for p in decoder.parameters())


TOOLS: dict[str, Callable[[dict[str, Any]], tuple[Step, int]]] = {
    "transformers": transformers,
    "allotrope": lambda size: allotrope(size, compiled=False),
    "allotrope, compiled": lambda size: allotrope(size, compiled=True),
}


def main() -> None:
    """Build the tool, warm up, then serve."""
    import torch

    size = json.loads(sys.argv[2])
    torch.set_num_threads(size["threads"])
    began = time.perf_counter()
    step, parameters = TOOLS[sys.argv[1]](size)
    step(0)
    first = time.perf_counter() - began
    done = 1
    for _ in range(2):
        step(done)
        done += 1
    answer: dict[str, Any] = {"parameters": parameters, "first": first}
    print(json.dumps(answer), flush=True)  # noqa: T201
    for line in sys.stdin:
        loss, began = 0.0, time.perf_counter()
        for _ in range(int(line)):
            loss = step(done)
            done += 1
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
