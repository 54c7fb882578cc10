"""torch against the oracle: every feature, their combinations, and the laws that need no reference."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.numpy.model import Oracle
from backends.torch import loss
from backends.torch.attention import Request, lacking, plan, preference, rounded
from backends.torch.model import Decoder
from convert.gates import gate
from parity_tests.cases import FEATURES, nmse, random_ids, random_specs, random_weights
from spec import Spec, UserError, params, parse
from spec.config import merge

torch.set_num_threads(1)  # at these sizes threads only wait for each other

EXACT = {"max": 1e-10, "nmse": 1e-20}
"""Between two float64 implementations."""


def decoder(spec: Spec, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Decoder:
    model = Decoder(spec, **options).to(dtype)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in random_weights(spec, seed).items()})
    return model.eval()


@torch.no_grad()
def run(model: Decoder, ids: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids), **{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()


def stepwise(model: Decoder, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    cache = model.new_cache(len(ids))
    chunks = torch.from_numpy(ids).split(sizes, 1)
    return torch.cat([model.step(chunk, cache) for chunk in chunks], 1).numpy()


def check_exact(value: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(value - reference).max() < EXACT["max"]
    assert nmse(value, reference) < EXACT["nmse"]


def check_against_oracle(spec: Spec, ids: np.ndarray, length: int | None = None) -> None:
    weights = random_weights(spec)
    reference = Oracle(spec, weights, length=length).logits(ids)
    check_exact(run(decoder(spec, length=length), ids), reference)
    control = nmse(Oracle(spec, weights, np.float32, length=length).logits(ids), reference)
    limit = gate("graph", "f32", control, layers=spec.depth, positions=ids.shape[1]).limit
    assert nmse(run(decoder(spec, torch.float32, length=length), ids), reference) < limit


@pytest.mark.parametrize("name", FEATURES)
def test_equals_the_oracle(name: str) -> None:
    check_against_oracle(FEATURES[name], random_ids(FEATURES[name]))


@pytest.mark.parametrize("name", ["moe", "moe_plain_scores", "moe_sigmoid"])
def test_of_experts_with_equal_scores_the_first_are_chosen(name: str) -> None:
    """Those of a router of zeros all are."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    weights |= {n: np.zeros_like(x) for n, x in weights.items() if ".router." in n}
    model, ids = decoder(spec), random_ids(spec)
    model.load_state_dict({n: torch.from_numpy(x) for n, x in weights.items()})
    check_exact(run(model, ids), Oracle(spec, weights).logits(ids))


@settings(max_examples=20, deadline=None)
@given(random_specs())
def test_equals_the_oracle_on_random_specs(spec: Spec) -> None:
    check_against_oracle(spec, random_ids(spec))


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_specs(), st.integers(0, 2**20))
def test_equals_the_oracle_on_hundreds_of_random_specs(spec: Spec, seed: int) -> None:
    ids = random_ids(spec, seed=seed)
    check_against_oracle(spec, ids)
    check_laws(spec, ids)


@pytest.mark.parametrize("name", FEATURES)
def test_every_intermediate_equals_the_oracles(name: str) -> None:
    spec, ids = FEATURES[name], random_ids(FEATURES[name])
    expected: dict[str, np.ndarray] = {}
    Oracle(spec, random_weights(spec)).logits(ids, expected)
    got: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        decoder(spec)(torch.from_numpy(ids), taps=got)
    assert got.keys() == expected.keys()
    for tap, value in expected.items():
        np.testing.assert_allclose(got[tap].numpy(), value, rtol=0, atol=EXACT["max"], err_msg=tap)


def check_laws(spec: Spec, ids: np.ndarray) -> None:
    model = decoder(spec)
    full = run(model, ids)
    tokens = ids.shape[1]
    check_exact(stepwise(model, ids, [1] * tokens), full)
    check_exact(stepwise(model, ids, [7, 1, tokens - 11, 3]), full)
    check_exact(run(model, ids[1:]), full[1:])
    changed = ids.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % spec.vocab_size
    check_exact(run(model, changed)[:, :12], full[:, :12])


@pytest.mark.parametrize("name", FEATURES)
def test_laws_hold(name: str) -> None:
    """Prefill = chunks = token by token; rows are independent; the future changes nothing."""
    check_laws(FEATURES[name], random_ids(FEATURES[name], length=24))


@settings(max_examples=10, deadline=None)
@given(random_specs())
def test_laws_hold_for_random_specs(spec: Spec) -> None:
    check_laws(spec, random_ids(spec, length=20))


@pytest.mark.parametrize(
    "name", ["rope_dynamic", "rope_longrope", "rope_longrope_short", "window_pattern", "rope_yarn"]
)
@pytest.mark.parametrize("length", [16, 17, 48])
def test_tables_are_chosen_once_by_the_declared_length(name: str, length: int) -> None:
    """On either side of the boundary (16) a session agrees with the oracle's and with itself, whatever it has seen."""
    spec, ids = FEATURES[name], random_ids(FEATURES[name], length=length)
    model = decoder(spec, length=length)
    full = run(model, ids)
    check_exact(full, Oracle(spec, random_weights(spec), length=length).logits(ids))
    check_exact(stepwise(model, ids, [9, *[1] * (length - 9)]), full)
    check_exact(run(model, ids[:, :5]), full[:, :5])


def test_the_boundary_of_length_dependent_tables_is_felt() -> None:
    for name in ("rope_dynamic", "rope_longrope"):
        spec, ids = FEATURES[name], random_ids(FEATURES[name], length=16)
        short, long = run(decoder(spec, length=16), ids), run(decoder(spec, length=17), ids)
        assert np.abs(short - long).max() > 1e-4, name


def packed(spec: Spec) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Two rows of documents: ids, segments, and the documents' lengths."""
    sizes = [[10, 1, 13], [5, 8, 11]]
    segments = np.array([np.repeat([0, 1, 2], row) for row in sizes]) + np.array([[0], [7]])
    return random_ids(spec), segments, sizes


@pytest.mark.parametrize("name", FEATURES)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    spec, model = FEATURES[name], decoder(FEATURES[name])
    ids, segments, sizes = packed(spec)
    got = run(model, ids, segments=segments)
    for row, lengths in enumerate(sizes):
        at = 0
        for n in lengths:
            check_exact(got[row : row + 1, at : at + n], run(model, ids[row : row + 1, at : at + n]))
            at += n


KERNELS = ("sdpa", "flex")
SERVED = ["llama", "mqa", "odd_heads", "attn_scale", "window", "window_pattern", "alibi_odd_heads", "alibi", "gemma2"]


@pytest.mark.parametrize("name", [*SERVED, "sinks", "attn_softcap"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_equals_the_mathematics_or_refuses(name: str, kernel: str) -> None:
    spec = FEATURES[name]
    ids, segments, _ = packed(spec)
    model, reference = decoder(spec, attention=kernel), decoder(spec, attention="math")
    if kernel == "sdpa" and any(b.attention.sinks or b.attention.softcap for b in spec.layers):
        with pytest.raises(UserError, match=r"kernel 'sdpa' cannot run .* it has no (sinks|softcap)"):
            run(model, ids)
        return
    full = run(reference, ids)
    check_exact(run(model, ids), full)
    check_exact(run(model, ids, segments=segments), run(reference, ids, segments=segments))
    check_exact(stepwise(model, ids, [9, 1, 11, 1, 2]), full)


@pytest.mark.parametrize("name", ["llama", "window", "alibi", "mqa"])
def test_gradients_do_not_depend_on_the_kernel(name: str) -> None:
    spec = FEATURES[name]
    ids, segments, _ = (torch.from_numpy(np.asarray(x)) for x in (*packed(spec)[:2], 0))
    grads = []
    for kernel in ("sdpa", "math"):
        model = decoder(spec, attention=kernel)
        model(ids, ids, segments=segments).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-9, atol=1e-10, msg=n)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["llama", "mqa", "window", "window_pattern", "attn_softcap", "sinks", "alibi", "gemma2"]
)
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "varlen"])
def test_a_gpu_kernel_is_as_exact_as_the_mathematics(name: str, kernel: str) -> None:
    """In bfloat16, against float64: at most three times the error of the reference mathematics in bfloat16."""
    spec = parse(
        merge(FEATURES[name].model_dump(exclude_unset=True), {"width": 128, "block": {"attention": {"head_dim": 32}}})
    )
    ids, segments, _ = packed(spec)
    x = {"ids": torch.from_numpy(ids).cuda(), "segments": torch.from_numpy(segments).cuda()}
    exact = run(decoder(spec), ids, segments=segments)
    error = {}
    for chosen in ("math", kernel):
        model = decoder(spec, torch.bfloat16, attention=chosen).cuda()
        try:
            with torch.no_grad():
                error[chosen] = nmse(model(**x).double().cpu().numpy(), exact)
            model(x["ids"], x["ids"], segments=x["segments"]).backward()
        except UserError:
            pytest.skip(f"{kernel} does not serve {name}")
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert error[kernel] < 3 * error["math"]


def test_the_choice_of_a_kernel_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from backends.torch import attention

    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="backends.torch.attention"):
        model = decoder(FEATURES["gemma2"], torch.float32)
        for _ in range(2):
            run(model, random_ids(FEATURES["gemma2"]))
    messages = [r.getMessage() for r in caplog.records]
    assert sorted(messages) == [
        "attention kernel math: causal attention with softcap in float32 on cpu (not sdpa: it has no softcap)",
        "attention kernel math: causal attention with window, softcap in float32 on cpu (not sdpa: it has no softcap)",
    ]


def test_flash_stays_reachable() -> None:
    """Plain causal attention, a window that covers everything, and single tokens need no mask."""
    attention = FEATURES["window"].layers[0].attention
    model = decoder(FEATURES["window"])
    step, _ = model._step(torch.zeros(2, 8, dtype=torch.long), None, None, None)
    assert plan(attention, "auto", Request(step, 0, torch.float32, False, True)).causal
    cache = model.new_cache(2)
    model.step(torch.zeros(2, 20, dtype=torch.long), cache)
    step, start = model._step(torch.zeros(2, 1, dtype=torch.long), None, None, cache)
    chosen = plan(attention, "auto", Request(step, start, torch.float32, False, False))
    assert (chosen.kernel, chosen.causal, chosen.mask) == ("sdpa", False, None)


@pytest.mark.parametrize("setting", ["flash", "flex", "varlen"])
def test_a_kernel_that_cannot_run_is_refused_in_one_line(setting: str) -> None:
    model, ids = decoder(FEATURES["llama"], attention=setting), torch.from_numpy(random_ids(FEATURES["llama"]))
    with pytest.raises(UserError, match=f"kernel '{setting}'") as e:
        model(ids)  # on a CPU: no such kernel; no backward pass; no CUDA device
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["llama", "tied", "head_bias", "logit_scale", "logit_softcap", "gemma2", "gpt2"])
@pytest.mark.parametrize("rows", [5, 7, 1000])
def test_the_loss_path_equals_the_logits_path(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, model = FEATURES[name], decoder(FEATURES[name]).train()
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", rows * spec.vocab_size)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    ids = torch.from_numpy(random_ids(spec))
    targets = ids.roll(-1, 1)
    targets[:, -1] = loss.IGNORE
    targets[0, 3:9] = loss.IGNORE
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    (expected * 0.37).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = model(ids, targets)
    (got * 0.37).backward()
    assert grads.keys() == {p.name for p in params(spec)}
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], rtol=1e-10, atol=1e-12, msg=n)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets), expected, rtol=1e-13, atol=0)


def test_the_loss_is_a_float32_sum_and_never_holds_all_logits() -> None:
    spec = FEATURES["llama"]
    model = decoder(spec, torch.bfloat16).train()
    ids = torch.from_numpy(random_ids(spec))
    seen: list[int] = []

    def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return loss.cross_entropy_sum(logits, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_ELEMENTS, "cpu", 10 * spec.vocab_size)
        patch.setattr(loss, "LEAST_ROWS", 1)
        total = model(ids, ids, criterion=criterion)
        total.backward()
    assert total.dtype == torch.float32
    assert seen == [10, 10, 10, 10, 8]
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_only_ignored_targets_cost_nothing() -> None:
    model = decoder(FEATURES["llama"]).train()
    ids = torch.from_numpy(random_ids(FEATURES["llama"]))
    total = model(ids, torch.full_like(ids, loss.IGNORE))
    total.backward()
    assert total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_dropout_drops_in_training_only() -> None:
    rates = {"dropout": 0.5, "attention": {"dropout": 0.5}, "mlp": {"dropout": 0.5}}
    base = FEATURES["llama"].model_dump(exclude_unset=True)
    spec = parse(merge(base, {"block": rates, "embedding": {"dropout": 0.1}}))
    model, ids = decoder(spec), random_ids(spec)
    plain = run(decoder(FEATURES["llama"]), ids)
    check_exact(run(model, ids), plain)
    for kernel in ("auto", "math"):
        model = decoder(spec, attention=kernel).train()
        first, second = run(model, ids), run(model, ids)
        assert np.abs(first - second).max() > 1e-3
        assert np.abs(first - plain).max() > 1e-3
    mean = np.mean([run(model, ids) for _ in range(10)])
    assert np.isfinite(mean)


def test_writing_past_the_caches_end_is_an_error() -> None:
    model, ids = decoder(FEATURES["llama"]), torch.from_numpy(random_ids(FEATURES["llama"], length=24))
    cache = model.new_cache(2, 20)
    model.step(ids[:, :18], cache)
    with pytest.raises(UserError, match=r"cache: 18 \+ 3 tokens do not fit in its 20 slots"):
        model.step(ids[:, :3], cache)
    after = model.step(ids[:, 18:20], cache)  # the refusal has changed nothing
    check_exact(after.numpy(), run(model, ids.numpy()[:, :20])[:, 18:])
    with pytest.raises(UserError, match=r"cache: 20 \+ 1 tokens"):
        model.step(ids[:, :1], cache)


def test_a_truncated_cache_forgets() -> None:
    model, ids = decoder(FEATURES["window"]), random_ids(FEATURES["window"])
    cache = model.new_cache(2)
    model.step(torch.from_numpy(ids[:, ::-1].copy()), cache)
    cache.truncate(0)
    check_exact(model.step(torch.from_numpy(ids), cache).numpy(), run(model, ids))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": torch.zeros(1, 49, dtype=torch.long)}, "49 tokens exceed the declared length of 48"),
        ({"ids": torch.zeros(4, dtype=torch.long)}, r"is not \[batch, tokens\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoder(FEATURES["llama"])(**inputs)


def test_learned_positions_bound_the_length() -> None:
    with pytest.raises(UserError, match="49 tokens need more than the 48 learned positions"):
        Decoder(FEATURES["learned"], length=49)


HALF = torch.bfloat16
H100, T4 = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("present", "dtype", "capability", "kernel"),
    [
        ((), HALF, H100, "flash"),
        (("dropout",), HALF, H100, "flash"),
        ((), torch.float32, H100, "efficient"),
        ((), torch.float16, T4, "efficient"),
        ((), torch.float64, H100, "math"),
        (("documents",), HALF, H100, "varlen"),
        (("documents", "window"), HALF, H100, "varlen"),
        (("documents",), torch.float32, H100, "flex"),
        (("window", "dropout"), HALF, H100, "efficient"),
        (("alibi",), HALF, H100, "efficient"),
        (("softcap",), HALF, H100, "flex"),
        (("sinks", "window"), HALF, H100, "flex"),
        (("softcap", "dropout"), HALF, H100, "math"),
        (("cache",), HALF, H100, "sdpa"),
    ],
)
def test_a_gpus_kernel_follows_from_features_numbers_and_capability(
    present: tuple[str, ...], dtype: torch.dtype, capability: tuple[int, int], kernel: str
) -> None:
    able = (k for k in preference(present, "cuda") if not lacking(k, present, "cuda", dtype, capability, 64, True))
    assert next(able) == kernel


def test_cudnn_never_gets_a_mask() -> None:
    """Its gradients can be NaN then."""
    for feature in ("documents", "window", "alibi"):
        assert lacking("cudnn", (feature,), "cuda", HALF, H100, 64, True) == f"it has no {feature}"
    assert lacking("cudnn", (), "cuda", HALF, H100, 64, True) is None
    assert lacking("cudnn", (), "cuda", HALF, H100, 256, True) is not None


def test_a_fallback_on_a_gpu_is_an_error_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.torch import attention as module

    a = FEATURES["gemma2"].layers[0].attention
    assert a.softcap is not None
    slots = torch.arange(8)[None]
    step = decoder(FEATURES["gemma2"])._step(slots, None, None, None)[0]

    class OnGpu(Request):
        device = torch.device("cuda")  # type: ignore[assignment]
        capability = H100  # type: ignore[assignment]

    def request(*, strict: bool) -> Request:
        return OnGpu(step, 0, torch.float64, False, True, strict=strict)

    with pytest.raises(UserError, match="no fast kernel serves causal attention with softcap in float64") as e:
        module.choose(a, "auto", request(strict=True))
    assert "--attention.kernel math" in str(e.value) and "\n" not in str(e.value)
    assert module.choose(a, "auto", request(strict=False))[0] == "math"
    assert module.choose(a, "math", request(strict=True))[0] == "math"


def test_compiled_layers_see_few_sizes_of_packed_documents() -> None:
    seen = set()
    for n in range(1, 17):
        starts = torch.linspace(0, 64, n + 1).int()
        padded, longest = rounded(starts, int(starts.diff().max()))
        assert torch.equal(padded[: n + 1], starts)
        assert bool((padded[n:] == 64).all()), "the others are empty"
        assert longest >= int(starts.diff().max())
        seen.add((len(padded), longest))
    assert len(seen) <= 2 * 5, "two for each power of two"
