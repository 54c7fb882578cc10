"""LoRA adapters in PEFT's format: what the folder says, matched with a model's tensors.

PEFT names the modules of the Hugging Face model, so this works on external tensors: fused projections and transposed
ones are as the adapter has them. `lora.py` merges while rows are read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.sources import torchbin
from convert.sources.base import collapse, hub_origin, several
from convert.sources.files import harmless, open_file, present, read_json
from convert.sources.lora import Adapted, Change, Copied
from convert.sources.safetensors import Tensors
from convert.sources.store import Store
from spec.config import Spec
from spec.errors import UserError
from spec.layout import Layout, Rule
from spec.load import parse

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_USED = """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora target_modules exclude_modules
    modules_to_save layers_to_transform
    """
_IGNORED = """
    base_model_name_or_path revision task_type inference_mode auto_mapping peft_version lora_dropout bias lora_bias
    fan_in_fan_out layers_pattern megatron_config megatron_core eva_config runtime_config qalora_group_size
    init_lora_weights loftq_config corda_config lora_ga_config
    """
USED, IGNORED = frozenset(_USED.split()), frozenset(_IGNORED.split())
"""Keys that are read here; keys that training and kernels read, and those whose word the tensors have (`bias`,
`fan_in_fan_out`)."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_qalora": (False,), "alora_invocation_tokens": (None,), "target_parameters": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "ensure_weight_tying": (None, False),
}  # fmt: skip
"""Keys that change what an adapter computes: read at these values, refused by name at others."""
FIXES = {"target_parameters": "; merge it with PEFT's merge_and_unload and save_pretrained, and convert that folder"}
"""What to do about one that is refused."""
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""init_lora_weights that leave the base model's weights alone."""
KINDS: Mapping[str, tuple[type, ...]] = {
    "use_rslora": (bool,), "use_dora": (bool,), "target_modules": (list, str), "exclude_modules": (list, str),
    "modules_to_save": (list,),
}  # fmt: skip
PATTERN = r"(.*\.)?({})$"
"""What surrounds a module's pattern."""
PREFIXES = ("model", "transformer", "gpt_neox", "language_model", "module")
"""What a name may begin with that a folder does not have."""
LEAVES = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\."
    r"(?P<leaf>lora_(?:A|B)(?:\.default)?\.weight|lora_B(?:\.default)?\.bias|lora_embedding_(?:A|B)(?:\.default)?|"
    r"lora_magnitude_vector(?:\.default)?(?:\.weight)?|weight|bias)"
)
ROLES = {
    "weight": "replaced", "bias": "replaced", "lora_B.bias": "bias", "lora_A.weight": "right",
    "lora_B.weight": "left", "lora_embedding_A": "right", "lora_embedding_B": "left",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
"""The field of a `Change` that each leaf is."""


@dataclass
class Adapter:
    """An adapter folder whose config.json holds; no tensor is matched with a model yet."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    sha256: str

    @property
    def named(self) -> dict[str, str]:
        """Name and hash, for the receipt; repository and commit where it comes from the Hub's cache."""
        origin = hub_origin(self.path) or {}
        name = origin["repo"].split("/")[-1] if origin else self.path.resolve().name
        return {"name": name, "sha256": self.sha256, **origin}

    def modules(self) -> Iterator[tuple[str, str, str]]:
        """(tensor, module, leaf) of every tensor whose name is understood."""
        for name in self.tensors.entries:
            found = LEAVES.fullmatch(name)
            if found:
                yield name, found["module"], found["leaf"].replace(".default", "")

    def scale(self, module: str, rank: int) -> tuple[float, str]:
        """The factor of B A for a module, and what is wrong with its rank."""
        declared = self._pattern("rank_pattern", module, self.config["r"])
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        wrong = "" if declared == rank else f"rank {rank}, adapter_config.json says {declared}"
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank), wrong

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        for pattern, value in (self.config.get(key) or {}).items():
            found = harmless(pattern, PATTERN)
            assert found is not None, "checked when it was opened"
            if found.match(module):
                return value
        return default


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter's folder and check its config. Raises `UserError` with every key that is not understood."""
    if not folder.is_dir():
        raise UserError(f"--adapter {folder}: no such folder")
    if not present(folder / CONFIG):
        raise UserError(f"--adapter {folder}: no {CONFIG} in it (PEFT's save_pretrained writes one)")
    source = folder / CONFIG
    config = read_json(source)
    problems = list(_problems(config))
    if problems:
        raise UserError("\n".join(f"{source}: {p}" for p in problems))
    if present(folder / WEIGHTS):
        name, tensors = WEIGHTS, Tensors(folder, WEIGHTS)
    elif present(folder / BIN):
        name, tensors = BIN, Tensors(folder, BIN, torchbin.read)
    else:
        raise UserError(f"--adapter {folder}: neither {WEIGHTS} nor {BIN} is in it")
    return Adapter(folder, config, tensors, _sha256(source, folder / name))


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type: {str(kind)[:40]!r} is no LoRA, which alone can be merged here"
    for key, value in config.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            yield f"{key}: {str(value)[:80]} changes what the adapter computes and is not read{FIXES.get(key, '')}"
        elif key not in USED | IGNORED and key not in NEUTRAL:
            yield f"{key[:80]} is an unknown key, and unknown keys may change what the adapter computes"
    if config.get("init_lora_weights") not in INITIAL:
        yield (f"init_lora_weights: {str(config['init_lora_weights'])[:40]!r} trains against a changed base model; "
               "save the adapter with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip
    if type(config.get("r")) is not int or config["r"] < 1:
        yield f"r: {str(config.get('r'))[:40]} is no rank"
    if not _number(config.get("lora_alpha")):
        yield f"lora_alpha: {str(config.get('lora_alpha'))[:40]} is no number"
    for key, kinds in KINDS.items():
        if not isinstance(config.get(key), (*kinds, type(None))):
            yield f"{key}: {str(config[key])[:40]} is no {' or '.join(k.__name__ for k in kinds)}"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            yield f"{key}: is no mapping of modules to numbers"
            continue
        for pattern, value in patterns.items():
            if harmless(pattern, PATTERN) is None:
                yield f"{key}: {pattern[:80]!r} is no pattern that is read (a name, or a plain regular expression)"
            if not _number(value) or (key == "rank_pattern" and type(value) is not int):
                yield f"{key}: {pattern[:80]}: {str(value)[:40]} is no number"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with os.fdopen(open_file(path), "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


@dataclass
class Plan:
    """An adapter matched with a model: what changes, by external tensor, and everything that does not fit."""

    changes: dict[str, Change] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def touches(adapter: Adapter, externals: Sequence[str]) -> bool:
    """Whether it changes one of these tensors."""
    ends = _by_end(externals)
    return any(_resolve(f"{module}.weight", externals, ends) for _, module, _ in adapter.modules())


def plan(adapter: Adapter, layout: Layout) -> Plan:
    """Match an adapter's tensors with a model's."""
    out, shapes = Plan(), layout.external
    ends = _by_end(shapes)
    turned = {n for b in layout.rules if b.transposed for n in b.external}
    unknown = set(adapter.tensors.entries) - {name for name, _, _ in adapter.modules()}
    strangers: list[str] = list(unknown)
    for name, module, leaf in adapter.modules():
        target = _resolve(f"{module}.{'bias' if leaf in ('bias', 'lora_B.bias') else 'weight'}", shapes, ends)
        if target is None:
            strangers.append(name)
            continue
        change = out.changes.setdefault(target, Change())
        role = ROLES[leaf]
        if getattr(change, role) is not None:
            out.problems.append(f"{name}: {getattr(change, role)} is the same tensor's")
        setattr(change, role, name)
        change.transposed |= target in turned or leaf.startswith("lora_embedding")
        if role in ("left", "bias"):
            change.scale = _scale(adapter, name.removesuffix("bias") + "weight" * (role == "bias"), module, out)
    if strangers:
        out.problems.append(f"{several(len(strangers), 'tensor belongs', 'tensors belong')} to no module of the model: "
                            f"{collapse(sorted(strangers))}")  # fmt: skip
    for target, change in out.changes.items():
        out.problems += _mismatch(adapter, target, change, shapes[target])
    out.problems += _untouched(adapter, out.changes, shapes)
    return out


def _scale(adapter: Adapter, b: str, module: str, out: Plan) -> float:
    shape = adapter.tensors.entries[b].shape if b in adapter.tensors.entries else ()
    if len(shape) != 2 or not shape[1]:
        return 1.0  # `_mismatch` names it
    scale, wrong = adapter.scale(module, shape[1])
    if wrong and f"{module}: {wrong}" not in out.problems:
        out.problems.append(f"{module}: {wrong}")
    return scale


def _mismatch(adapter: Adapter, target: str, c: Change, shape: tuple[int, ...]) -> Iterator[str]:
    have = adapter.tensors.entries
    for name in filter(None, (c.replaced, c.left, c.right, c.bias, c.magnitude)):
        if not have[name].readable:
            yield f"{name}: {have[name].dtype}, and F32, F16 and BF16 are read"
    for name in filter(None, (c.replaced, c.bias)):
        if have[name].shape != shape:
            yield f"{name}: shape {list(have[name].shape)}, the model's {target} has {list(shape)}"
    if c.left is None and c.right is None:
        if c.magnitude is not None:
            yield f"{c.magnitude}: without lora_A and lora_B"
        return
    if c.left is None or c.right is None:
        yield f"{c.left or c.right}: its other half (lora_{'B' if c.left is None else 'A'}) is missing"
        return
    b, a = have[c.left].shape, have[c.right].shape
    if len(shape) != 2:
        yield f"{c.left}: {target} is no matrix but {list(shape)}"
        return
    out, into = shape[::-1] if c.transposed else shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != (out, into):
        yield f"{c.left}: shapes {list(b)} and {list(a)} of lora_B and lora_A make no [{out}, {into}] for {target}"
    dora = bool(adapter.config.get("use_dora"))
    if dora != (c.magnitude is not None):
        what = "has no lora_magnitude_vector" if dora else "has a lora_magnitude_vector"
        yield f"{target}: {what}, and use_dora is {str(dora).lower()}"
    elif c.magnitude is not None and math.prod(have[c.magnitude].shape) != out:
        yield f"{c.magnitude}: {list(have[c.magnitude].shape)} magnitudes for {out} outputs"


def _untouched(adapter: Adapter, changes: Mapping[str, Change], shapes: Mapping[str, Any]) -> Iterator[str]:
    """Modules that the config names and the adapter has nothing for: an incomplete copy."""
    config = adapter.config
    named, excluded, kept = (config.get(k) or [] for k in ("target_modules", "exclude_modules", "modules_to_save"))
    if not isinstance(named, list) or isinstance(excluded, str) or config.get("layers_to_transform") is not None:
        named = []
    named, kept = _words(named), _words(kept)
    left = kept | _words(excluded)
    apart = any(".experts." in n for n in changes)  # in transformers 5 experts are no modules that PEFT would find
    alone = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(".weight") and n not in changes}
    matrices = [m for m, s in alone.items() if len(s) == 2 and (apart or ".experts." not in m)]
    for key, modules in (
        ("target_modules", [m for m in matrices if _ends(m, named) and not _ends(m, left)]),
        ("modules_to_save", [m for m in alone if _ends(m, kept)]),
    ):
        if modules:
            yield (f"{several(len(modules), 'module is', 'modules are')} among {key}, and the adapter has nothing for "
                   f"{'it' if len(modules) == 1 else 'them'}: {collapse(modules)}")  # fmt: skip


def _tails(name: str) -> Iterator[str]:
    """A name, and what is left of it without its first parts."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _words(names: Iterable[object]) -> frozenset[str]:
    return frozenset(n for n in names if isinstance(n, str))


def _ends(module: str, names: frozenset[str]) -> bool:
    return not names.isdisjoint(_tails(module))


def _by_end(externals: Iterable[str]) -> dict[str, str | None]:
    """Tensors by every end of their names; none for an end that several have."""
    out: dict[str, str | None] = {}
    for name in externals:
        for tail in _tails(name):
            out[tail] = None if tail in out else name
    return out


def _resolve(name: str, externals: Sequence[str] | Mapping[str, Any], ends: Mapping[str, str | None]) -> str | None:
    """The model's tensor that an adapter's name means. A wrapper may have put a prefix before it, or the folder may
    have been written without the prefix of its base model. ends: `_by_end` of the tensors."""
    if name in externals:
        return name
    first, _, inner = name.partition(".")
    if first in PREFIXES and inner in externals:
        return inner
    return ends.get(name)


def merge(
    folders: Sequence[Path], store: Store, spec: Spec, rules: Sequence[Rule]
) -> tuple[Store, Spec, list[dict[str, str]], list[str]]:
    """A store with adapters merged one after another, the spec, what they are for the receipt, and notes.

    An adapter that changes the embedding or the head of a tied model was trained with both apart, so the spec comes
    back untied. Raises `UserError` with every tensor of an adapter that does not fit.
    """
    if not folders:
        return store, spec, [], []
    adapters = [open_adapter(f) for f in folders]
    notes = [f"adapter {a.named['name']} merged in float32" for a in adapters]
    ends = [next(r.external[0] for r in rules if r.canonical == (n,)) for n in ("embed.weight", "head.weight")]
    if spec.head.tied and any(touches(a, ends) for a in adapters):
        spec, store = _untied(spec), Copied(store, *ends)
        notes.append(f"{ends[1]} is stored apart from {ends[0]}, since the adapter changes one without the other")
    layout = Layout(rules, spec)
    for a in adapters:
        found = plan(a, layout)
        if found.problems:
            raise UserError("\n".join(f"--adapter {a.path}: {p}" for p in found.problems))
        store = Adapted(store, a.tensors, found.changes)
    return store, spec, [a.named for a in adapters], notes


def _untied(spec: Spec) -> Spec:
    data = {"version": spec.version, **spec.model_dump(mode="json", exclude_unset=True)}
    return parse({**data, "head": {**data.get("head", {}), "tied": False}})
