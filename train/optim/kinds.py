"""The optimizers by name: which library has each, and what it works on.

A library optimizer gets plain tensors alone, never a DTensor: this rank's shards where it works element by element, and
whole matrices, each on the rank that owns it, where it needs them whole.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from spec.errors import MissingDependency, UserError
from train.config import Optimizer

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them: params, lr, weight_decay."""

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices where torch has one kernel for all parameters."""


@dataclass(frozen=True)
class Kind:
    """An optimizer."""

    make: Callable[[Groups, Optimizer], torch.optim.Optimizer]
    whole: bool = False
    """Whether it needs whole tensors, of a mixture those of each expert."""
    hidden: bool = False
    """Whether it takes the matrices between embedding and head alone; AdamW takes the rest."""
    package: str = "torch"
    """What it comes from."""
    settings: tuple[str, ...] = ()
    """What lies in its state and is configuration."""


def _given(value: Any) -> Any:
    assert value is not None, "a field that this optimizer has"
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao tells of each of its kernels that this machine can't load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _fused(groups: Groups) -> bool:
    return all(p.device.type in FUSED for g in groups for p in g["params"])


def adamw(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), torch's."""
    return torch.optim.AdamW(groups, betas=_given(o.betas), eps=_given(o.eps), fused=_fused(groups))


def _sgd(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """SGD with momentum (Sutskever et al. 2013), torch's. Its weight decay joins the gradient."""
    return torch.optim.SGD(
        groups, momentum=_given(o.momentum), nesterov=_given(o.nesterov), fused=_fused(groups), lr=o.peak
    )


def _muon(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024; scaled to AdamW's step size as in Liu et al. 2025), torch's."""
    return torch.optim.Muon(groups, momentum=_given(o.momentum), nesterov=_given(o.nesterov), **_given(o.options))


def _adafactor(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018), torch's."""
    return torch.optim.Adafactor(groups, **_given(o.options))


def _lion(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023), pytorch_optimizer's."""
    from pytorch_optimizer import Lion

    return Lion(groups, betas=_given(o.betas))


def _soap(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024), pytorch_optimizer's. Its first step only looks at the gradient."""
    from pytorch_optimizer import SOAP

    return SOAP(groups, betas=_given(o.betas), eps=_given(o.eps), **_given(o.options))


def _adamw8bit(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (Dettmers et al. 2022), torchao's."""
    with _quiet():
        from train.optim.eightbit import AdamW8bit
    return AdamW8bit(groups, betas=_given(o.betas), eps=_given(o.eps))


KINDS: Mapping[str, Kind] = {
    "adamw": Kind(adamw),
    "adamw8bit": Kind(_adamw8bit, package="torchao"),
    "muon": Kind(_muon, whole=True, hidden=True),
    "lion": Kind(_lion, package="pytorch_optimizer"),
    "soap": Kind(
        _soap,
        whole=True,
        hidden=True,
        package="pytorch_optimizer",
        settings=("precondition_frequency", "shampoo_beta"),
    ),
    "adafactor": Kind(_adafactor, whole=True),
    "sgd": Kind(_sgd),
}


def kind(o: Optimizer) -> Kind:
    """The chosen optimizer. Raises `MissingDependency` where its package is not installed, and `UserError` where a file
    of the user's is broken or has none of that name."""
    if o.kind not in KINDS:
        return Kind(_users(o.kind), whole=True)
    found = KINDS[o.kind]
    if importlib.util.find_spec(found.package) is None:
        hint = "pip install 'allotrope[optimizers]'"
        raise MissingDependency(f"optimizer.kind: {o.kind} needs {found.package}: {hint}")
    return found


def check(o: Optimizer) -> None:
    """Raises `UserError` for what `kind` refuses, and for values that the library refuses, before there is a model."""
    made = kind(o)
    if o.kind not in KINDS:
        return
    try:
        made.make([{"params": [torch.zeros(8, 8)], "lr": o.peak, "weight_decay": o.weight_decay or 0.0}], o)
    except (ValueError, TypeError, RuntimeError) as e:
        raise UserError(f"optimizer: {o.kind} refuses its settings: {' '.join(str(e).split())[:200]}") from None


def _users(name: str) -> Callable[[Groups, Optimizer], torch.optim.Optimizer]:
    """`path/to/file.py:name`, called with parameter groups and `optimizer.options`. It sees whole tensors, so that it
    need not know of shards."""
    from train.plugins import load

    make = load("optimizer.kind", name)

    def build(groups: Groups, o: Optimizer) -> torch.optim.Optimizer:
        try:
            made = make(groups, lr=o.peak, **_given(o.options))
        except TypeError as e:
            raise UserError(f"optimizer.kind: {name} was called with groups, lr and optimizer.options: {e}") from None
        if not isinstance(made, torch.optim.Optimizer):
            raise UserError(f"optimizer.kind: {name} made a {type(made).__name__}, no torch.optim.Optimizer")
        if o.weight_decay and "weight_decay" not in made.defaults:
            raise UserError(f"optimizer.weight_decay: {o.weight_decay}, and {name} has none (leave it out)")
        return made

    return build
