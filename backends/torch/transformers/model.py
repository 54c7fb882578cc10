"""The decoder as a `PreTrainedModel`: our modules under their canonical names, the shared forward pass, transformers'
faces around them.

Shapes: B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from backends.torch.attention import Request, plan
from backends.torch.model import angles_in, assemble, computed_in, initial
from backends.torch.modules import Constants, Head, Router
from backends.torch.ops import TorchOps
from backends.torch.transformers.config import CONFIG, SPEC, AllotropeConfig
from backends.torch.transformers.past import Inputs, past_layers, place, restarts
from spec import forward
from spec.config import Block, Spec
from spec.errors import UserError, nearest
from spec.load import load
from spec.ops import Step
from spec.params import params

KERNELS = {"sdpa": "auto", "eager": "math", "flex_attention": "flex"}
"""transformers' `attn_implementation` -> our attention setting."""

LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What the loss takes besides logits and labels."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What packing collators pass to flash kernels: the documents, which position_ids tell already."""


class _Ops(TorchOps):
    """Operations that keep each layer's output, and run layers under activation checkpointing."""

    outputs: list[Tensor] | None = None
    recompute: Callable[..., Tensor] | None = None
    every: int = 1

    def call(
        self, i: int, b: Block, w: Any, x: Tensor, step: Step[Tensor], rotation: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        if self.outputs is not None:
            self.outputs.append(x)
        if self.recompute is None or i % self.every:
            return super().call(i, b, w, x, step, rotation, cache)
        return self.recompute(lambda h: w(self, h, step, rotation, None)[0], x), None


class Backbone(nn.Module):
    """A model without its head, as losses call it that never hold all logits (TRL's). Owns no parameters."""

    _tp_plan = _pp_plan = None

    def __init__(self, model: AllotropeForCausalLM) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: a registered submodule would name every weight twice

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """The model's inputs -> hidden states after the final norm [B, T, D]."""
        return self._model[0].hidden(*args, **kwargs)


class AllotropeForCausalLM(PreTrainedModel, GenerationMixin):
    """A spec's decoder with its language-modelling head. Parameters bear the canonical names of `spec.params`."""

    config: AllotropeConfig
    config_class = AllotropeConfig
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own convention)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _input_embed_layer = "embed"
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True

    embed: nn.Embedding
    layers: nn.ModuleList
    head: Head
    rope: nn.ModuleList

    def __init__(self, config: AllotropeConfig) -> None:
        super().__init__(config)
        self.kinds = assemble(self, self.spec, self.spec.context)
        self.gradient_checkpointing, self._checkpoint_every = False, 1
        self.post_init()

    @property
    def spec(self) -> Spec:
        """What the model computes."""
        return self.config.parsed

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return Backbone(self)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **packed: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm [B, T, D]; see `forward`."""
        for name in packed:
            if name not in PACKED:
                raise UserError(f"{name}: this model reads no such argument ({nearest(name, ARGUMENTS)})")
            if position_ids is None:
                raise UserError(f"{name}: documents of a packed row are told by position_ids (give them too)")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise UserError("input_ids, inputs_embeds: give one of the two")
        if output_attentions or self.config.output_attentions:
            raise UserError("output_attentions: attention kernels keep no probabilities (leave it out)")
        self._follow()
        spec, device = self.spec, given.device
        recompute = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        documents = attention_mask is None and position_ids is not None and restarts(position_ids)
        if use_cache and past_key_values is None and recompute is None and not documents:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and recompute is not None:
            raise UserError("past_key_values: activation checkpointing recomputes layers, which would append twice")
        shape = (given.shape[0], given.shape[1])
        inputs = place(shape, device, attention_mask, position_ids, past_key_values, spec.context)
        ops = self._ops(inputs, device)
        ops.recompute, ops.every = recompute, self._checkpoint_every
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            ops.outputs = []
        cache = None
        if past_key_values is not None:
            cache = past_layers(past_key_values, inputs, [b.attention.window for b in spec.layers])
        w: Any = self
        if inputs_embeds is not None:
            w = SimpleNamespace(**{**self._modules, "embed": lambda _: inputs_embeds})
        tables: Any = self.rope
        x, _ = forward.hidden(ops, spec, w, given, inputs.step, tables, cache)
        outputs = None if ops.outputs is None else (*ops.outputs, x)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=outputs)

    def _ops(self, inputs: Inputs, device: torch.device) -> _Ops:
        weight = self.embed.weight
        name = self.config._attn_implementation or "sdpa"
        if name not in KERNELS:
            raise UserError(f"attn_implementation: {name} is none of this model's ({nearest(name, KERNELS)})")
        request = Request(inputs.step, inputs.start, computed_in(weight, device), self.training,
                          torch.is_grad_enabled(), inputs.keys)  # fmt: skip
        return _Ops([plan(a, KERNELS[name], request) for a in self.kinds], self.training, angles_in(weight))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] (or inputs_embeds [B, T, D], before the spec's embedding scale) -> logits [B, T, V].

        attention_mask [B, past + T] marks padding, on either side or both; a padded row's logits are the row's own.
        position_ids [B, T] default to a token's place in its row; without a mask, where they begin again another
        document does. labels [B, T] are shifted here; `num_items_in_batch` and the loss's other arguments are
        transformers' own. Raises `UserError` for sequences beyond the context, and for arguments that nothing reads.
        """
        loss = {name: more.pop(name) for name in LOSS if name in more}
        out = self.hidden(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                          output_hidden_states, output_attentions, **more)  # fmt: skip
        x = cast("Tensor", out.last_hidden_state)
        y = forward.logits(TorchOps((), self.training), self.spec, self, slice_logits_to_keep(x, logits_to_keep))
        value = None
        if labels is not None or loss.get("shift_labels") is not None:
            value = self.loss_function(logits=y, labels=labels, vocab_size=self.spec.vocab_size, **loss)
        return CausalLMOutputWithPast(
            loss=value, logits=y, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def _follow(self) -> None:
        """A tied head reads the embedding that the model has now, which an adapter may have replaced."""
        if not self.head.tied:
            return
        if self.embed.weight.device.type == "meta":
            raise UserError("device_map: the head is tied to embed, which is offloaded (keep embed on a device)")
        kind = type(self.embed).__name__
        if not isinstance(self.embed, nn.Embedding) and kind != "ModulesToSaveWrapper":
            raise UserError(
                f"embed: the head is tied to it, and would not follow its adapter ({kind}); leave embed out of the "
                "target modules, or train it whole with modules_to_save=['embed']"
            )
        self.head.tie(self.embed)

    # What transformers asks of a model

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = cast("Head", new_embeddings)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Static caches too get the plain mask of padding."""
        return attention_mask

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        self.gradient_checkpointing, self._checkpoint_every = enable, every_n_layers
        self._gradient_checkpointing_func = gradient_checkpointing_func

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill what no checkpoint filled: parameters as `spec.init` says, and the constants, to which transformers
        gives memory and no values. Parameters of adapters are none of ours."""
        for module in self.modules():
            if isinstance(module, Constants):
                module.restore()
        own = dict(self.named_parameters())
        for p in params(self.spec):
            if p.name in own and not getattr(own[p.name], "_is_hf_initialized", False):
                own[p.name].copy_(initial(self.spec, p, _seed()))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Another vocabulary size, in the spec too. New rows are the mean of the old ones, or as the spec initialises
        them (`mean_resizing=False`)."""
        old, head = self.config.vocab_size, self.head
        rows = new_num_tokens or old
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != old:
            self.config.spec = {**self.config.spec, "vocab_size": rows}
            sized = {p.name: p for p in params(self.spec)}
            owned = [("embed.weight", self.embed), ("head.weight", head), ("head.bias", head)]
            for name, owner in owned if not head.tied else (owned[0], owned[2]):
                leaf = name.rpartition(".")[2]
                if name in sized:
                    more = None if mean_resizing else initial(self.spec, sized[name], _seed())
                    setattr(owner, leaf, _resized(getattr(owner, leaf), rows, more))
            self.embed.num_embeddings = rows
        return self.embed

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """The model of a folder: one of `save_pretrained`, or one that `python -m train` wrote.

        Raises `UserError` where a tensor is missing or belongs to nothing, and where spec.yaml and config.json
        contradict each other.
        """
        where = pretrained_model_name_or_path
        beside = Path(str(where)) / SPEC
        if beside.is_file() and not beside.with_name(CONFIG).is_file():
            # transformers would look for what ends a text in the config.json that is not there
            config = kwargs.setdefault("config", AllotropeConfig.from_pretrained(where))
            kwargs.setdefault("generation_config", GenerationConfig.from_model_config(config))
        loaded: Any = super().from_pretrained(where, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = [f"{where}: {name}: missing" for name in sorted(info["missing_keys"])]
        problems += [f"{where}: {name}: the spec has no such tensor" for name in sorted(info["unexpected_keys"])]
        if problems:
            raise UserError("\n".join(problems))
        if beside.is_file() and load(beside) != model.spec:
            raise UserError(f"{where}: {SPEC} and config.json hold two specs (save the model again, or remove one)")
        one_accelerator(getattr(model, "hf_device_map", {}))
        for module in model.modules():
            if isinstance(module, Router) and module.correction is not None:
                module.correction.requires_grad_(False)  # transformers lets every tensor that it loads be trained
        return (model, info) if output_loading_info else model


def one_accelerator(device_map: Mapping[str, Any]) -> None:
    """Raises `UserError` where layers are spread over several: masks and rotations are made once, on one."""
    used = {torch.device(where) for where in device_map.values() if where != "disk"} - {torch.device("cpu")}
    if len(used) > 1:
        names = ", ".join(sorted(map(str, used)))
        raise UserError(f"device_map: layers lie on {names}; use one ({{'': 0}}), and offload the rest to cpu")


def _seed() -> int:
    """From torch's generator: `torch.manual_seed` governs new weights as it does elsewhere."""
    return int(torch.randint(2**31, (), device="cpu"))


def _resized(old: Tensor, rows: int, fresh: Tensor | None) -> nn.Parameter:
    """The first rows of `old`, and below them those of `fresh`, or the mean of the old ones."""
    kept = old.detach()[:rows]
    new = old.detach().new_empty(rows, *old.shape[1:])
    new[: len(kept)] = kept
    new[len(kept) :] = old.detach().float().mean(0) if fresh is None else fresh[len(kept) :]
    return nn.Parameter(new, requires_grad=old.requires_grad)


ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
             "output_hidden_states", "logits_to_keep", *LOSS)  # fmt: skip
