"""DecoderConfig: what a config.json of the Llama, Qwen and Mistral families says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_fp8.decoder.rope import Rope, is_positive, read_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

#: Ten times what the deepest models have: a number that only costs memory is no model's.
_MOST_LAYERS = 2000

#: What a config.json leaves out, by family: the defaults under which its checkpoints were saved.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
      vocab_size: tokens.
      width: of the residual stream.
      hidden: width inside of the MLP.
      layers: blocks.
      heads: of the queries.
      kv_heads: of the keys and values, which groups of queries share.
      head_dim: width of a head.
      eps: of the RMSNorms.
      rope: the rotary embedding.
      windows: for each layer, how many positions it attends to, or None for all.
      max_length: positions that the model was made for.
      qkv_bias: whether the projections to queries, keys and values have one.
      o_bias: whether the projection of what was attended to has one.
      mlp_bias: whether the MLP's projections have one.
      qk_norm: whether queries and keys are normalized, head by head.
      tied: whether the output head is the embedding.
      eos: the tokens that end a text.
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    max_length: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    eos: tuple[int, ...] = ()


def read_config(given: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json, as ``json`` loads it.

    Raises:
      NotImplementedError: for another family, and for what no model of these families has.
      ValueError: for a field that is missing, or not what it must be.
    """
    family = given.get("model_type")
    if family not in FAMILIES:
        raise NotImplementedError(f"config.json: model_type {family!r}; accepted are {FAMILIES}")
    # Null is no default: it says that a field is as if it were not there.
    left_out = {name: value for name, value in _DEFAULTS[family].items() if name not in given}
    fields = _Fields(left_out | {name: v for name, v in given.items() if v is not None})
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise NotImplementedError(f"config.json: hidden_act {activation!r}; accepted is 'silu'")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError("config.json: partial_rotary_factor other than 1")
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    head_dim = fields.count("head_dim", width // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: {heads} heads of width {head_dim} for {kv_heads} of keys and values:"
            " the width must be even, and heads a multiple"
        )
    layers = fields.count("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ValueError(
            f"config.json: num_hidden_layers must be at most {_MOST_LAYERS}, got {layers}"
        )
    max_length = fields.count("max_position_embeddings", 2048)
    window = fields.get("sliding_window")
    own_bias = fields.flag("attention_bias")
    return DecoderConfig(
        vocab_size=fields.count("vocab_size"),
        width=width,
        hidden=fields.count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(fields, max_length),
        windows=_windows(family, fields, layers, window),
        max_length=max_length,
        qkv_bias=family == "qwen2" or (family != "mistral" and own_bias),
        o_bias=family in ("llama", "qwen3") and own_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tied=fields.flag("tie_word_embeddings"),
        eos=_tokens(fields.get("eos_token_id", ())),
    )


class _Fields(dict[str, Any]):
    """A config's fields, checked as they are asked for."""

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(f"config.json: {name} must be an int >= 1 of 31 bits, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not is_positive(value):
            raise ValueError(f"config.json: {name} must be a number > 0, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} must be true or false, got {value!r}")
        return value


def _windows(family: str, fields: _Fields, layers: int, window: Any) -> tuple[int | None, ...]:
    if window is not None:
        window = fields.count("sliding_window")
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (window,) * layers
    if not fields.flag("use_sliding_window"):
        return (None,) * layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.count("max_window_layers")
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in known for kind in kinds)
    ):
        raise ValueError(
            f"config.json: layer_types must say 'full_attention' or 'sliding_attention' for each"
            f" of {layers} layers, got {kinds!r}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _tokens(given: Any) -> tuple[int, ...]:
    tokens = tuple(given) if isinstance(given, list | tuple) else (given,)
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise ValueError(
                f"config.json: eos_token_id must be a token or a list of them, got {given!r}"
            )
    return tokens
