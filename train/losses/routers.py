"""The routers of a model with experts: their losses, their correction, and the figures that show their balance.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from backends.torch.balance import MORE, Balance
from backends.torch.model import Decoder
from backends.torch.modules import Router
from spec.config import MoE, Spec
from spec.errors import UserError
from train.config import Experts
from train.parallel import Ranks

BALANCE = 0.01
"""Weight of the balance loss where nothing else is asked (Fedus et al. 2021)."""


def check(spec: Spec, config: Experts) -> None:
    """Raise `UserError` where `config` asks for what the spec does not have."""
    mixtures = {i: b.mlp for i, b in enumerate(spec.layers) if isinstance(b.mlp, MoE)}
    asked = [name for name in Experts.model_fields if getattr(config, name)]
    if asked and not mixtures:
        raise UserError(f"experts.{asked[0]}: {spec.name} has no experts (leave it out)")
    without = [i for i, m in mixtures.items() if not m.router.correction]
    if config.bias_update and without:
        raise UserError(
            f"experts.bias_update: moves the routers' corrections, and layers[{without[0]}].mlp.router.correction is "
            "false (set router: {correction: true} in the spec, or experts.balance)"
        )


def weight(config: Experts) -> float:
    """That of the balance loss."""
    if config.balance is not None:
        return config.balance
    return 0.0 if config.bias_update else BALANCE


def routing(spec: Spec, config: Experts) -> str:
    """What is done for the balance of experts, in words behind a loss; nothing for a spec without them."""
    if not any(isinstance(b.mlp, MoE) for b in spec.layers):
        return ""
    terms = {"balance": weight(config), "z": config.z, "bias update": config.bias_update}
    return "; experts: " + (", ".join(f"{name} {value:g}" for name, value in terms.items() if value) or "no balancing")


class Routers:
    """The routers of a decoder, or of a pipeline's stage; every stage reports on all layers."""

    def __init__(self, decoder: Decoder, config: Experts, ranks: Ranks) -> None:
        mixtures = [i for i, b in enumerate(decoder.spec.layers) if isinstance(b.mlp, MoE)]
        sizes = [b.mlp.experts for b in decoder.spec.layers if isinstance(b.mlp, MoE)]
        self.layers, self.ranks, self.step_size = mixtures, ranks, config.bias_update
        self.sizes = torch.tensor(sizes, device=ranks.device)
        self.balance = decoder.balance = Balance(weight(config), config.z, ranks.device)
        self.own = {mixtures.index(i): _router(decoder, i) for i in mixtures if i in decoder.span}
        for n, router in self.own.items():
            router.statistics = torch.zeros(sizes[n] + MORE, device=ranks.device, requires_grad=True)
        self.loads = torch.empty(0)
        """[L, E] choices that fell on each expert in the last step, over all ranks."""
        self._widest = max(sizes)

    @torch.no_grad()
    def collect(self, valid: int, layers: bool) -> tuple[float, dict[str, float]]:
        """What the routers added to the loss of the last step's `valid` targets, a token, and figures over all ranks;
        with `layers` those of each layer too."""
        sums = torch.zeros(len(self.layers), self._widest + MORE, device=self.ranks.device)
        for n, router in self.own.items():
            leaf = router.statistics
            assert leaf is not None
            experts = len(leaf) - MORE
            if leaf.grad is not None:
                sums[n, :experts], sums[n, -MORE:] = leaf.grad[:experts], leaf.grad[experts:]
            leaf.grad = None
        if self.ranks.world > 1:
            dist.all_reduce(sums)
        self.loads = sums[:, :-MORE]
        imbalance = self.loads.amax(1) / (self.loads.sum(1) / self.sizes).clamp(min=1e-9)
        unused = self.sizes.sum() - (self.loads > 0).sum()
        count = len(self.layers)
        others = sums[:, -MORE:].sum(0) / max(1, valid) / count
        means = [imbalance.mean(), imbalance.amax(), unused / self.sizes.sum(), *others]
        values = torch.cat([torch.stack(means), imbalance]).tolist()
        figures = {f"experts/{name}": v for name, v in zip(FIGURES, values, strict=False)}
        if layers:
            figures |= {f"experts/imbalance/L{i}": v for i, v in zip(self.layers, values[len(means) :], strict=True)}
        return count * (self.balance.balance * values[4] + self.balance.z * values[5]), figures

    @torch.no_grad()
    def correct(self) -> None:
        """Move each router's correction by `bias_update` towards the experts that the last step's tokens chose less
        than their share: b += u sign(mean load - load) (Wang et al. 2024, "Auxiliary-loss-free load balancing")."""
        if not self.step_size:
            return
        for n, router in self.own.items():
            assert router.correction is not None and router.statistics is not None, "checked"
            loads = self.loads[n, : len(router.statistics) - MORE]
            step = self.step_size * (loads.mean() - loads).sign().to(router.correction.dtype)
            router.correction.add_(step)


FIGURES = ("imbalance", "imbalance_worst", "unused", "entropy", "balance", "z")
"""Mean over layers of the largest load over the mean load, and the worst layer's; share of experts that no token chose;
nats of a token's scores; the balance loss and the z-loss of a layer, before their weights."""


def routers_of(decoder: Decoder, config: Experts, ranks: Ranks) -> Routers | None:
    """The routers of a model that has experts. Raises `UserError` as `check` does."""
    check(decoder.spec, config)
    return Routers(decoder, config, ranks) if any(isinstance(b.mlp, MoE) for b in decoder.spec.layers) else None


def _router(decoder: Decoder, layer: int) -> Router:
    return next(m for m in decoder.layers[layer].modules() if isinstance(m, Router))
