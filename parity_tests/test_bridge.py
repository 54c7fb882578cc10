"""The decoder as a transformers model against our own: logits, padding, caches, generation, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.torch.model import Decoder
from backends.torch.runtime import TorchRuntime
from parity_tests.cases import FEATURES, random_ids, random_weights
from spec import Spec, UserError

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from backends.torch.transformers import AllotropeConfig, AllotropeForCausalLM
from backends.torch.transformers.past import place

torch.set_num_threads(1)

EXACT = 1e-10
"""Between two float64 paths."""
T, SHORT = 24, 17
"""Tokens of the first row and of the second, which is padded."""


def weights(spec: Spec) -> dict[str, Tensor]:
    return {name: torch.from_numpy(w) for name, w in random_weights(spec).items()}


def build(spec: Spec, dtype: torch.dtype = torch.float64) -> Any:
    """Any: transformers types `generate` by a protocol that none of its own models satisfies."""
    model: Any = AllotropeForCausalLM(AllotropeConfig(spec=spec))
    model.to(dtype).load_state_dict(weights(spec))
    return model.eval()


def decoder(spec: Spec, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(spec).to(dtype)
    model.load_state_dict(weights(spec))
    return model.eval()


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor, slice]:
    """A batch whose second row has SHORT tokens, its mask, and the place of those tokens."""
    place = slice(T - SHORT, T) if side == "left" else slice(0, SHORT)
    out, mask = ids.clone(), torch.ones_like(ids)
    out[1], mask[1] = 0, 0
    out[1, place], mask[1, place] = ids[1, :SHORT], 1
    return out, mask, place


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_logits_are_the_decoders_however_rows_are_padded(name: str) -> None:
    spec, ids = FEATURES[name], torch.from_numpy(random_ids(FEATURES[name], 2, T))
    ours, model = decoder(spec)(ids), build(spec)
    assert (model(ids).logits - ours).abs().max() < EXACT
    for side in ("left", "right"):
        batch, mask, place = padded(ids, side)
        for use_cache in (False, True):
            out = model(batch, attention_mask=mask, use_cache=use_cache).logits
            assert (out[0] - ours[0]).abs().max() < EXACT
            assert (out[1, place] - ours[1, :SHORT]).abs().max() < EXACT


@pytest.mark.parametrize("name", ["llama", "window_pattern", "alibi", "sinks", "attn_softcap", "learned_offset", "moe"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_chunks_through_a_cache_are_one_pass(name: str, kind: str) -> None:
    """Padded rows included, and a hole: tokens after right padding."""
    spec, ids = FEATURES[name], torch.from_numpy(random_ids(FEATURES[name], 2, T))
    model = build(spec)
    for side in ("left", "right"):
        batch, mask, _ = padded(ids, side)
        more = torch.from_numpy(random_ids(spec, 2, 4, seed=9))
        past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
        model(batch[:, :9], attention_mask=mask[:, :9], past_key_values=past)
        model(batch[:, 9:], attention_mask=mask, past_key_values=past)
        full = torch.cat([mask, torch.ones_like(more)], 1)
        got = [model(more[:, :1], attention_mask=full[:, : T + 1], past_key_values=past).logits]
        got += [model(more[:, 1:], attention_mask=full, past_key_values=past).logits]
        for row, tokens in enumerate((ids[0], ids[1, :SHORT])):
            alone = model(torch.cat([tokens, more[row]])[None]).logits[0, -4:]
            assert (torch.cat(got, 1)[row] - alone).abs().max() < EXACT


@pytest.mark.parametrize("name", ["llama", "window", "alibi", "learned", "sinks"])
@torch.no_grad()
def test_holes_in_a_row_are_closed(name: str) -> None:
    """As virtual tokens before left padding leave them, or tokens after right padding."""
    spec = FEATURES[name]
    ids, model = torch.from_numpy(random_ids(spec, 3, T)), build(spec)
    mask = (torch.rand(3, T, generator=torch.Generator().manual_seed(4)) < 0.7).long()
    out = model(ids, attention_mask=mask).logits
    for row, seen in enumerate(mask == 1):
        assert (out[row, seen] - model(ids[row, seen][None]).logits[0]).abs().max() < EXACT


def test_a_packed_step_has_one_run_a_document() -> None:
    """As the kernels for documents count them."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.rand(2, 6, generator=generator) < 0.7).long()
        step = place((2, 6), torch.device("cpu"), mask, None, None, 48).step
        if step.layout == "packed":
            assert step.segments is not None
            for row in step.segments.tolist():
                runs = [k for k, _ in itertools.groupby(row)]
                assert runs.count(1) <= 1


@pytest.mark.parametrize("name", ["llama", "window", "alibi"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    spec = FEATURES[name]
    ids, model = torch.from_numpy(random_ids(spec, 1, T)), build(spec)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    row = model(ids, position_ids=positions).logits
    alone = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], 1)
    assert (row - alone).abs().max() < EXACT


@torch.no_grad()
def test_embeddings_stand_for_ids_and_hidden_states_are_every_layers() -> None:
    spec = FEATURES["gemma2"]
    ids, model, taps = torch.from_numpy(random_ids(spec)), build(spec), {}
    ours = decoder(spec)(ids, taps=taps)
    out = model(inputs_embeds=model.get_input_embeddings()(ids), output_hidden_states=True, logits_to_keep=3)
    assert (out.logits - ours[:, -3:]).abs().max() < EXACT
    names = ["embed", *(f"L{i}.out" for i in range(spec.depth - 1)), "final_norm"]
    assert all((a - taps[n]).abs().max() < EXACT for a, n in zip(out.hidden_states, names, strict=True))


GENERATED = ["llama", "tied", "window_pattern", "alibi", "learned", "rope_dynamic", "sinks", "moe"]


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation_is_the_runtimes(name: str) -> None:
    """With every kind of cache and none, alone and in a left-padded batch."""
    spec, new = FEATURES[name], 10
    model, runtime = build(spec, torch.float32), TorchRuntime(decoder(spec, torch.float32))
    ids = random_ids(spec, 2, 9)
    rows = [ids[0], ids[1, :5]]
    want = []
    for row in rows:
        tokens = [int(np.argmax(runtime.prefill(row)))]
        while len(tokens) < new:
            tokens.append(int(np.argmax(runtime.step(np.array(tokens[-1:]))[-1])))
        want.append(tokens)
    batch, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for n, row in enumerate(rows):
        batch[n, 9 - len(row) :], mask[n, 9 - len(row) :] = torch.from_numpy(row), 1
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        together = model.generate(batch, attention_mask=mask, **options, **cache)
        assert together[:, 9:].tolist() == want
        alone = model.generate(torch.from_numpy(ids[:1]), **options, **cache)
        assert alone[0, 9:].tolist() == want[0]
    embeds = model.get_input_embeddings()(batch)
    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **options).tolist() == want
    drafted = model.generate(torch.from_numpy(ids[:1]), prompt_lookup_num_tokens=3, **options)
    assert drafted[0, 9:].tolist() == want[0]


def test_beams_and_samples_of_a_padded_batch_are_each_rows_own() -> None:
    spec = FEATURES["window_pattern"]
    model, ids = build(spec), torch.from_numpy(random_ids(spec, 2, 9))
    batch = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    beams: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **beams)
    assert together[:, 12:].tolist() == [model.generate(row[None], **beams)[0, 9:].tolist() for row in ids]
    sampled: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    runs = []
    for inputs in ((batch, mask), (ids, torch.ones_like(ids))):
        torch.manual_seed(3)
        out = model.generate(inputs[0], attention_mask=inputs[1], **sampled)
        runs.append(out[:, -6:].tolist())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["llama", "tied", "logit_softcap", "moe"])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_loss_and_gradients_are_our_trainers(name: str, checkpointed: int) -> None:
    """transformers' loss in float32 against our chunked one; with every layer recomputed, every other, or none."""
    spec = FEATURES[name]
    ids = torch.from_numpy(random_ids(spec, 2, T))
    labels = ids.clone()
    labels[1, SHORT:] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    ours, model = decoder(spec, torch.float32).train(), build(spec, torch.float32).train()
    if checkpointed:
        model.activation_checkpointing_enable(every_n_layers=checkpointed)
    valid = int((targets != -100).sum())
    loss = ours(ids, targets) / valid
    loss.backward()
    theirs = model(ids, labels=labels, num_items_in_batch=valid).loss
    theirs.backward()
    assert torch.allclose(theirs, loss, rtol=1e-6)
    assert torch.allclose(model(ids, labels=labels).loss, loss, rtol=1e-6)
    for (n, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None
            continue
        assert q.grad is not None and (q.grad - p.grad).abs().max() < 1e-5 * p.grad.abs().max(), n


IDS = torch.zeros(1, 4, dtype=torch.long)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give one of the two"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, 32)}, "give one of the two"),
    "long": ({"input_ids": torch.zeros(1, 49, dtype=torch.long)}, "49 tokens exceed the spec's context of 48"),
    "far": ({"input_ids": IDS, "position_ids": torch.tensor([[45, 46, 47, 48]])}, "49 tokens exceed"),
    "flat positions": ({"input_ids": IDS, "position_ids": torch.arange(4)}, "position_ids: shape"),
    "positions": ({"input_ids": IDS, "position_ids": torch.zeros(2, 4).long()}, r"position_ids: shape \(2, 4\)"),
    "mask": ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, r"is not \[1, 4\]"),
    "matrix": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 4, 4)}, "queries by keys"),
    "probabilities": ({"input_ids": IDS, "output_attentions": True}, "output_attentions"),
    "unknown": ({"input_ids": IDS, "atention_mask": 1}, "did you mean attention_mask"),
    "packing": ({"input_ids": IDS, "seq_idx": 1}, "told by position_ids"),
}


@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_name(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(FEATURES["llama"])(**inputs)


def test_a_cache_that_drops_keys_is_refused() -> None:
    from transformers import MistralConfig

    past = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    with pytest.raises(UserError, match="layer 0 slides"):
        build(FEATURES["llama"])(torch.zeros(1, 4, dtype=torch.long), past_key_values=past)
