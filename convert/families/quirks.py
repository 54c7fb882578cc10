"""What single families' configs have besides data: older layouts, and how they fill in the kinds of their layers."""

from __future__ import annotations

from collections.abc import Callable

from backends.hf.rotary import FULL, LOCAL
from convert.families.config import Config


def alternating(every: int, key: str = "", *, first: bool = False) -> Callable[[Config, int], list[str]]:
    """Every so many layers one without a window, the last of each group (or the first). key: where config.json may
    say how many."""

    def layer_types(c: Config, depth: int) -> list[str]:
        n = c.take(key, int) if key else every
        if n is None or n < 1:
            c.bad(key, n, "is no number of layers", f"{every} is usual")
            return [FULL] * depth
        return [FULL if (i % n == 0 if first else (i + 1) % n == 0) else LOCAL for i in range(depth)]

    return layer_types


def all_windowed(c: Config, depth: int) -> list[str]:
    """Windows everywhere, if there is a window."""
    return [FULL if c.peek("sliding_window") is None else LOCAL] * depth


def windowed_from(c: Config, depth: int) -> list[str]:
    """Qwen: windows from `max_window_layers` on, if there is a window."""
    first = c.take("max_window_layers", int)
    on = c.peek("use_sliding_window") and c.peek("sliding_window") is not None
    return [LOCAL if on and first is not None and i >= first else FULL for i in range(depth)]


def windowed_where_still(c: Config, depth: int) -> list[str]:
    """SmolLM3: windows where layers do not rotate, if there is a window."""
    on = c.peek("use_sliding_window") and c.peek("sliding_window") is not None
    turning = c.peek("no_rope_layers")
    if turning is None:
        turning = [(i + 1) % c.peek("no_rope_layer_interval") for i in range(depth)]
    return [LOCAL if on and not turning[i] else FULL for i in range(depth)]


def exaone4(c: Config, depth: int) -> list[str]:
    """Every so many layers one without a window, if there is a window."""
    every = alternating(4, "sliding_window_pattern")
    return all_windowed(c, depth) if c.peek("sliding_window") is None else every(c, depth)


def gemma(c: Config) -> None:
    """`gelu` is the name that the first releases gave the tanh approximation, as transformers reads it; they had
    `hidden_activation` beside it, which is not read any more."""
    if c.peek("hidden_act") == "gelu":
        c.data["hidden_act"] = "gelu_pytorch_tanh"
    other = c.data.pop("hidden_activation", None)
    if other not in (None, c.peek("hidden_act")):
        c.bad("hidden_activation", other, f"differs from hidden_act, {c.peek('hidden_act')}", "keep hidden_act")


def gemma2(c: Config) -> None:
    """`hidden_act` and `sliding_window_size` stand beside the keys that are read."""
    c.rename("hidden_act", "hidden_activation")
    c.rename("sliding_window_size", "sliding_window")


def gemma3(c: Config) -> None:
    """What transformers 5 saves under a private name is what it was given."""
    gemma2(c)
    if "sliding_window_pattern" not in c.data and "_sliding_window_pattern" in c.data:
        c.data["sliding_window_pattern"] = c.data["_sliding_window_pattern"]


def olmo3(c: Config) -> None:
    """transformers 5 gives a base that stands outside `rope_parameters` to layers without a window alone, where
    transformers 4 gave it to all: only the usual one means the same."""
    local = c.data.get("rope_local_base_freq")
    if local is not None:
        c.bad("rope_local_base_freq", local, "is an unknown key, and unknown keys may change the function")
    theta = c.data.get("rope_theta")
    if theta is not None and not c.data.get("rope_parameters") and theta != c.defaults["rope_theta"]:
        c.bad("rope_theta", theta, "holds for all layers in transformers 4, and for some in 5",
              "say rope_parameters for each kind of layer")  # fmt: skip


def gpt2(c: Config) -> None:
    """The usual names are accepted for its own."""
    for usual, own in {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                       "max_position_embeddings": "n_positions"}.items():  # fmt: skip
        c.rename(usual, own)


def opt(c: Config) -> None:
    """Embeddings of another width are projected, which no spec has."""
    width = c.data.pop("word_embed_proj_dim", None)
    if width not in (None, c.peek("hidden_size")):
        c.bad("word_embed_proj_dim", width, f"differs from hidden_size, {c.peek('hidden_size')}", "not supported")


def cohere2(c: Config) -> None:
    """transformers computes `head_dim` anew, whatever config.json says."""
    said, width, heads = c.data.pop("head_dim", None), c.peek("hidden_size"), c.peek("num_attention_heads")
    sizes = isinstance(width, int) and isinstance(heads, int) and heads > 0
    if said is not None and sizes and said != width // heads:
        c.bad("head_dim", said, f"differs from hidden_size / num_attention_heads, {width // heads}",
              "another size is not supported")  # fmt: skip


def falcon(c: Config) -> None:
    """The newer decoder ignores `multi_query`, and has two norms unless told otherwise."""
    c.rename("n_embed", "hidden_size")
    if c.peek("new_decoder_architecture"):
        c.data["multi_query"] = False
        if c.peek("num_ln_in_parallel_attn") is None:
            c.data["num_ln_in_parallel_attn"] = 2


def mpt(c: Config) -> None:
    """Attention has an object of its own."""
    c.flatten("attn_config")
    for usual, own in {"hidden_size": "d_model", "num_hidden_layers": "n_layers",
                       "num_attention_heads": "n_heads"}.items():  # fmt: skip
        c.rename(usual, own)


def bloom(c: Config) -> None:
    """Names of the first releases."""
    for old, new in {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}.items():
        c.rename(old, new)
