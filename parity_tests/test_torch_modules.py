"""The torch modules: canonical names, handles that are layers, constants, initialisation, and what Dynamo sees."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backends.torch.checkpoint import empty
from backends.torch.model import Decoder, initial
from backends.torch.modules import Norm, Rotary
from parity_tests.cases import FEATURES, random_ids
from parity_tests.test_torch import check_exact, decoder, run
from spec import Spec, params
from spec.config import Norm as NormSpec
from spec.rope import rope_tables


@pytest.mark.parametrize("name", FEATURES)
def test_parameters_have_the_canonical_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = Decoder(FEATURES[name])
    expected = {p.name: p.shape for p in params(FEATURES[name])}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == expected


# Dynamo looks at the .grad of every tensor that it is given, and torch warns of it.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def layers(model: Decoder) -> Any:
    return model.layers


def _compile(model: Decoder, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in layers(model):
        layer.compile(fullgraph=True, backend=backend)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _structures() -> list[str]:
    """One feature for each distinct graph: what lies outside the blocks or only changes a rotary table is left out."""
    rope = {"theta": True, "scaling": True}
    found: dict[str, str] = {}
    for name, spec in FEATURES.items():
        layers = [b.model_dump_json(exclude={"attention": {"position": rope}}) for b in spec.layers]
        found.setdefault(f"{spec.width} {len(set(layers))} {layers}", name)
    return list(found.values())


def _is_slow(name: str) -> bool:
    """Mixtures take the longest, and these two hold what the others have."""
    return name.startswith("moe") and name not in ("moe_sigmoid", "moe_sinks")


@dynamo
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if _is_slow(n) else n for n in _structures()])
def test_a_block_is_one_graph(name: str) -> None:
    """With gradients; equal layers and equal shapes share it."""
    spec = FEATURES[name]
    model, ids = decoder(spec).train(), torch.from_numpy(random_ids(spec, length=20))
    model(ids, ids).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _compile(model, "aot_eager")
    for _ in range(2):
        model.zero_grad()
        model(ids, ids).backward()
    assert _graphs() == len({id(b) for b in spec.layers})
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads.get(n), rtol=1e-9, atol=1e-10, msg=n)


@dynamo
def test_compiled_blocks_decode_without_recompiling() -> None:
    spec = FEATURES["gemma2"]
    model, ids = decoder(spec), random_ids(spec)
    full = run(model, ids)
    _compile(model, "aot_eager")
    cache = model.new_cache(2)
    steps = [model.step(chunk, cache) for chunk in torch.from_numpy(ids).split([9, *[1] * 15], 1)]
    check_exact(torch.cat(steps, 1).numpy(), full)
    assert _graphs() == 0


@dynamo
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside inductor
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inductor_compiles_training(name: str) -> None:
    spec = FEATURES[name]
    model, ids = decoder(spec, torch.float32).train(), torch.from_numpy(random_ids(spec))
    expected = model(ids, ids)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _compile(model, "inductor")
    got = model(ids, ids)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], rtol=1e-3, atol=1e-4, msg=n)


class Low(nn.Module):
    """A low-rank update beside a frozen layer, as LoRA libraries swap it in."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, 2, bias=False, dtype=inner.weight.dtype)
        self.up = nn.Linear(2, inner.out_features, bias=False, dtype=inner.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


def test_a_layer_can_be_swapped_for_another_module() -> None:
    spec = FEATURES["llama"]
    model, ids = decoder(spec), torch.from_numpy(random_ids(spec))
    merged = copy.deepcopy(model)
    for block, other in zip(model.layers, merged.layers, strict=True):
        for part, name in (("attn", "q"), ("attn", "o"), ("mlp", "up"), ("mlp", "down")):
            owner = getattr(block, part)
            low = Low(getattr(owner, name))
            setattr(owner, name, low)
            with torch.no_grad():
                getattr(getattr(other, part), name).weight += low.up.weight @ low.down.weight
    check_exact(run(model, ids.numpy()), run(merged, ids.numpy()))
    model(ids, ids).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_every_layer_is_called_as_a_module() -> None:
    """FSDP, tensor parallelism and activation checkpointing hang on forward hooks."""
    spec = FEATURES["gemma2"]
    model, called = decoder(spec), set[str]()
    containers = (nn.ModuleList,)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    run(model, random_ids(spec))
    silent = {n for n, m in model.named_modules() if n not in called and not isinstance(m, containers)}
    assert silent == {n for n, _ in model.named_modules() if n.endswith((".attn", ".mlp"))}


def test_half_the_heads_can_be_run_alone() -> None:
    """What tensor parallelism does: two shards of the heads whose outputs add up."""
    spec = FEATURES["sinks"]
    whole, ids = decoder(spec), torch.from_numpy(random_ids(spec))
    a = spec.layers[0].attention
    assert a.head_dim is not None
    shards = [copy.deepcopy(whole) for _ in range(2)]
    for n, shard in enumerate(shards):
        attn = layers(shard)[0].attn
        for name in ("q", "k", "v"):
            linear = getattr(attn, name)
            linear.weight = nn.Parameter(linear.weight.chunk(2)[n])
        attn.o.weight = nn.Parameter(attn.o.weight.chunk(2, 1)[n])
        attn.sinks = nn.Parameter(attn.sinks.chunk(2)[n])
    taps = [dict[str, torch.Tensor]() for _ in range(3)]
    with torch.no_grad():
        for model, t in zip([whole, *shards], taps, strict=True):
            model(ids, taps=t)
    check_exact((taps[1]["L0.attn.o"] + taps[2]["L0.attn.o"]).numpy(), taps[0]["L0.attn.o"].numpy())


@pytest.mark.parametrize("name", ["rope_yarn", "alibi"])
def test_constants_survive_casts_and_the_meta_device(name: str) -> None:
    spec = FEATURES[name]
    model = empty(spec, torch.bfloat16, "cpu")
    tables, rotaries = rope_tables(spec), [m for m in model.modules() if isinstance(m, Rotary)]
    for rotary, table in zip(rotaries, tables, strict=True):
        assert rotary.inv_freq.dtype == torch.float32
        np.testing.assert_array_equal(rotary.inv_freq.numpy(), table.inv_freq)
    if name == "alibi":
        np.testing.assert_array_equal(layers(model)[0].attn.slopes.numpy(), 2.0 ** -np.arange(2, 9, 2))
    assert model.embed.weight.dtype == torch.bfloat16


def test_norms_keep_their_statistics_in_float32() -> None:
    """A bfloat16 norm errs by its input's and output's rounding only, even where a bfloat16 sum would stall."""
    x = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    for kind in ("rmsnorm", "layernorm"):
        norm = Norm(NormSpec(kind=kind, offset=1.0, bias=True), 4096)
        exact = copy.deepcopy(norm).double()(x.double())
        got = norm.bfloat16()(x)
        assert got.dtype == torch.bfloat16
        assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all(), kind


@pytest.mark.parametrize("name", ["llama", "rms_offset", "gemma2", "gpt2", "sinks", "qk_layernorm"])
def test_initialisation_follows_the_spec(name: str) -> None:
    spec = FEATURES[name]
    model, again, other = Decoder(spec), Decoder(spec).double(), Decoder(spec)
    model.init_weights(7)
    again.init_weights(7)
    other.init_weights(8)
    states = (dict(m.named_parameters()) for m in (model, again, other))
    own, same, differs = states
    for p in params(spec):
        x = own[p.name].detach()
        torch.testing.assert_close(same[p.name].float(), x, rtol=0, atol=0)
        if p.role in ("bias", "sinks"):
            assert not x.any()
        elif p.role == "gain":
            assert len(x.unique()) == 1
        else:
            std = 0.02 / (2 * spec.depth) ** 0.5 if p.name.endswith((".o.weight", "down.weight")) else 0.02
            assert abs(x.std().item() / std - 1) < 5 / (2 * p.size) ** 0.5
            assert not torch.equal(differs[p.name], x)
    offset = spec.layers[0].norm.offset
    if spec.layers[0].norm.weight:
        assert own["layers.0.attn_norm.weight"].unique().item() == 1 - offset


def test_initial_values_of_two_parameters_differ() -> None:
    spec: Spec = FEATURES["mha"]
    q, k = (next(p for p in params(spec) if p.name == f"layers.0.attn.{n}.weight") for n in "qk")
    assert not torch.equal(initial(spec, q, 0), initial(spec, k, 0))


def test_a_tied_head_follows_its_embedding() -> None:
    model, ids = decoder(FEATURES["tied"]), random_ids(FEATURES["tied"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight *= 2
    check_exact(run(model, ids), run(decoder(FEATURES["tied"]), ids))
    model.embed.weight = nn.Parameter(twin.embed.weight.detach().clone())
    check_exact(run(model, ids), run(twin, ids))


def test_autocast_trains() -> None:
    spec = FEATURES["gemma2"]
    model, ids = decoder(spec, torch.float32).train(), torch.from_numpy(random_ids(spec))
    exact = model(ids, ids).item()
    with torch.autocast("cpu", torch.bfloat16):
        total = model(ids, ids)
    total.backward()
    assert total.dtype == torch.float32
    assert abs(total.item() / exact - 1) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("case", "part"), [("moe_sinks", "router"), ("moe_shared_gate", "shared_gate")])
def test_routers_score_in_float32(autocast: bool, case: str, part: str) -> None:
    """With 16-bit weights, and under autocast: the product too, not its sum alone."""
    spec = FEATURES[case]
    at = len(spec.layers) - 1  # the first may be dense
    model = decoder(spec, torch.float32 if autocast else torch.bfloat16)
    router: Any = model.get_submodule(f"layers.{at}.mlp.{part}")
    assert not isinstance(router, torch.nn.Linear), "PEFT's all-linear takes it"
    half = torch.randn(3, 5, spec.width, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = router(half)
    bias = () if router.bias is None else (router.bias.double(),)
    exact = torch.nn.functional.linear(half.double(), router.weight.double(), *bias)
    torch.testing.assert_close(scores, exact.float(), rtol=1e-5, atol=1e-5)
