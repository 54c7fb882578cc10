"""Our trainer and transformers' LlamaForCausalLM: the same weights, batches, optimizer and schedule, the same losses.

The bound: both compute in float32, in another order of sums; a step's gradients differ by 1e-6 of their norm. Adam
divides by the gradients' size, so roundings grow where gradients are near zero. Measured on the two runs below: the
largest difference of a step's loss is 9e-8 of it in 25 steps. It grows with the steps, as any rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from backends.torch.model import Decoder
from spec import load
from spec.config import Spec
from train import config, optim, session
from train.config import TrainConfig
from train.data.feed import feed
from train.parallel import Ranks
from train.watch import history

Options = Callable[..., dict[str, Any]]

NAMES = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj",
    "o": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "layers": "model.layers",
}  # fmt: skip
"""Parts of canonical names, as a Llama of transformers calls them."""


def theirs(spec: Spec, c: TrainConfig) -> list[float]:
    """The losses of a loop as users of transformers write it."""
    transformers = pytest.importorskip("transformers")
    a, m = spec.layers[0].attention, spec.layers[0].mlp
    hf = transformers.LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.width, intermediate_size=m.hidden, head_dim=a.head_dim,
        num_hidden_layers=spec.depth, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, rms_norm_eps=1e-5,
        max_position_embeddings=spec.context, tie_word_embeddings=spec.head.tied, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(hf).train()
    first = Decoder(spec)
    first.init_weights(c.seed)
    values = {".".join(NAMES.get(part, part) for part in n.split(".")): p.detach() for n, p in first.named_parameters()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if spec.head.tied else [])

    decays = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)

    quiet, ranks = Console(file=StringIO()), Ranks(0, 1, torch.device("cpu"))
    _, tokens = session.text(c, spec, quiet)
    batches, _ = feed(c, tokens, spec.context, ranks)
    losses = []
    for step in range(1, c.steps + 1):
        [rows], _ = batches.next(c.batch.sequences, c.batch.sequences)
        ids, targets = torch.from_numpy(rows.ids), torch.from_numpy(rows.targets)
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = c.optimizer.peak * optim.factor(c, step, batches.state.tokens)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _compare(given: dict[str, Any], out: Path, bound: float) -> tuple[list[float], list[float]]:
    c = config.layered(given)
    session.train(c, console=Console(file=StringIO()))
    ours = [m["loss"] for m in history(out / "training" / "train.jsonl")]
    expected = theirs(load(c.spec), c)
    assert len(ours) == len(expected) == c.steps
    apart = max(abs(a / b - 1) for a, b in zip(ours, expected, strict=True))
    print(f"largest difference {apart:.1e}; last losses {ours[-1]:.5f} and {expected[-1]:.5f}")  # noqa: T201
    assert apart < bound
    assert ours[-1] < ours[0] - 0.5
    return ours, expected


def test_a_short_run_has_the_losses_of_transformers(options: Options, spec_file: Path, tmp_path: Path) -> None:
    spec_file.write_text(spec_file.read_text(encoding="utf-8").replace("dropout: 0.1", "dropout: 0"), encoding="utf-8")
    _compare(options(steps=25), tmp_path / "run", 2e-6)


@pytest.mark.slow
def test_two_hundred_steps_on_the_embedded_corpus_have_the_losses_of_transformers(tmp_path: Path) -> None:
    """`tiny` on the standard library's source. After some 30 steps rounding alone leads two runs apart, so the gate is
    twice what it does between our own runs: accumulating, and with another attention kernel."""
    common = {"steps": 200, "device": "cpu", "validation": {"every": 200}}
    roundings: dict[str, dict[str, Any]] = {
        "run": {},
        "accumulated": {"batch": {"sequences": 4, "micro": 1}},
        "math": {"attention": {"kernel": "math"}},
    }
    curves: list[list[float]] = []
    for name, more in roundings.items():
        c = config.layered({**common, **more, "out": str(tmp_path / name)})
        session.train(c, console=Console(file=StringIO()))
        curves.append([m["loss"] for m in history(tmp_path / name / "training" / "train.jsonl")])
    ours, *controls = curves
    alone = config.layered(common)
    expected = theirs(load(alone.spec), alone)
    for measure in (_apart, _ends_apart):
        noise = max(measure(ours, x) for x in controls)
        found = measure(ours, expected)
        print(f"{measure.__name__}: {found:.1e}, by rounding alone {noise:.1e}")  # noqa: T201
        assert found <= 2 * noise
    assert _apart(ours[:25], expected[:25]) < 1e-5


def _apart(a: list[float], b: list[float]) -> float:
    """The largest difference of a step's loss, as a share of it."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def _ends_apart(a: list[float], b: list[float]) -> float:
    """The difference of the mean of the last 20 losses, as a share of it."""
    return abs(sum(a[-20:]) / sum(b[-20:]) - 1)
