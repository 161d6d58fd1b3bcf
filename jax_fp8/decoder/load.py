"""From a checkpoint, or from random numbers, to a Decoder."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

import jax_fp8
from jax_fp8 import checkpoint
from jax_fp8.decoder.config import DecoderConfig, read_config
from jax_fp8.decoder.dense import Dense, fuse
from jax_fp8.decoder.model import Block, Decoder


class Source(Protocol):
    """Where weights come from."""

    def array(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A wide array of that name and shape."""

    def dense(self, name: str, out: int, width: int, bias: bool, *, wide: bool = False) -> Dense:
        """The product of a module; ``wide`` leaves its weight as it is."""


def load(
    folder: str | pathlib.Path,
    *,
    dtype: Any = jnp.bfloat16,
    recipe: str | jax_fp8.Recipe | None = None,
    dequantize: bool = False,
    sharding: Any = None,
    weight_only_rows: int | None = None,
    progress: bool = False,
    ignore: Iterable[str] = (),
) -> Decoder:
    """Loads a Llama-like model from a folder of the Hugging Face hub.

    Args:
      folder: with config.json and safetensors files, in any format that ``checkpoint.load`` reads.
      dtype: of the residual stream, the cache, and the weights that are wide.
      recipe: quantizes the weights of a wide checkpoint; a dynamic one, by name or as an object.
        The embedding and the head stay wide.
      dequantize: makes an FP8 checkpoint wide.
      sharding: as of ``checkpoint.load``.
      weight_only_rows: up to so many rows of input, FP8 weights are decoded and the input stays
        wide; None: as many as that is faster for on Hopper.
      progress: shows a bar.
      ignore: patterns of stored tensors to leave out, as of ``checkpoint.load``: with
        ``["*.k_scale", "*.v_scale"]`` the cache of a model that was calibrated for one in FP8 is
        wide.

    Returns:
      A Decoder.

    Raises:
      ValueError: for tensors that are missing, too many, or of other shapes than config.json says,
        and for a ``recipe`` for a checkpoint that is in FP8 already.
      NotImplementedError: for a model of another family.
    """
    found = checkpoint.load(folder, sharding=sharding, progress=progress, ignore=ignore)
    config = read_config({**found.config, **_generation(folder)})
    source = Stored(found, jnp.dtype(dtype), _recipe(recipe), dequantize, weight_only_rows)
    model = build(config, source)
    model.format = found.format
    source.check_empty()
    return model


def random(
    config: DecoderConfig,
    *,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
    recipe: str | jax_fp8.Recipe | None = None,
    weight_only_rows: int | None = None,
) -> Decoder:
    """A model of random weights, as ``load`` would make it: to measure its speed."""
    return build(config, Random(seed, jnp.dtype(dtype), _recipe(recipe), weight_only_rows))


def build(config: DecoderConfig, source: Source) -> Decoder:
    """Makes the model, layer by layer, with queries, keys and values fused, and gates and ups."""
    c, block = config, "model.layers.{}."
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def layer(index: int) -> Block:
        at = block.format(index)
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        heads = ("q_norm", "k_norm") if c.qk_norm else ()
        head_norms = [source.array(f"{attention}{n}.weight", (c.head_dim,)) for n in heads]
        return Block(
            c,
            index,
            norms=(
                source.array(f"{at}input_layernorm.weight", (c.width,)),
                source.array(f"{at}post_attention_layernorm.weight", (c.width,)),
            ),
            qkv=fuse(
                [
                    source.dense(f"{attention}{name}_proj", out, c.width, c.qkv_bias)
                    for name, out in (("q", q), ("k", kv), ("v", kv))
                ]
            ),
            o=source.dense(f"{attention}o_proj", c.width, q, c.o_bias),
            gate_up=fuse(
                [
                    source.dense(f"{mlp}{name}_proj", c.hidden, c.width, c.mlp_bias)
                    for name in ("gate", "up")
                ]
            ),
            down=source.dense(f"{mlp}down_proj", c.width, c.hidden, c.mlp_bias),
            qk_norms=(head_norms[0], head_norms[1]) if c.qk_norm else None,
        )

    head = None if c.tied else source.dense("lm_head", c.vocab_size, c.width, False, wide=True)
    return Decoder(
        c,
        embedding=source.array("model.embed_tokens.weight", (c.vocab_size, c.width)),
        blocks=[layer(index) for index in range(c.layers)],
        norm=source.array("model.norm.weight", (c.width,)),
        head=head,
    )


@dataclasses.dataclass
class Stored:
    """A checkpoint's tensors, each of which is taken once, so that its memory can go."""

    found: checkpoint.Checkpoint
    dtype: Any
    recipe: jax_fp8.Recipe | None
    dequantize: bool
    weight_only_rows: int | None

    def __post_init__(self) -> None:
        self._left = self.found.tensors
        if self.recipe is not None and self.found.format is not None and not self.dequantize:
            raise ValueError(
                f"decoder.load: the checkpoint is in FP8 ({self.found.format}) and says itself how"
                " activations are quantized; a recipe is for wide ones"
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._left:
            raise ValueError(f"decoder.load: the checkpoint has no {name}")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"decoder.load: {name} is {list(tensor.shape)}, not {list(shape)}")
        return tensor

    def array(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A wide array of that name and shape."""
        tensor = self._take(name, shape)
        if isinstance(tensor, jax_fp8.ScaledArray):
            raise NotImplementedError(f"decoder.load: {name} is in FP8")
        return tensor.astype(self.dtype)

    def dense(self, name: str, out: int, width: int, bias: bool, *, wide: bool = False) -> Dense:
        """The product of a module; ``wide`` leaves its weight as it is."""
        weight = self._take(f"{name}.weight", (out, width))
        vector = self.array(f"{name}.bias", (out,)) if bias else None
        scale = self._left.pop(f"{name}.input_scale", None)
        if isinstance(weight, jax_fp8.ScaledArray):
            if not self.dequantize:
                return Dense(
                    weight,
                    vector,
                    activation=self.found.activations[f"{name}.weight"],
                    input_scale=scale,
                    names=(name,),
                    weight_only_rows=self.weight_only_rows,
                )
            weight = _dequantize(weight, self.dtype)
        recipe = None if wide else self.recipe
        return _quantized(weight.astype(self.dtype), vector, name, recipe, self.weight_only_rows)

    def check_empty(self) -> None:
        """Raises a ValueError for tensors that the model has no use for."""
        # Old checkpoints keep the frequencies of the rotary embedding, which config.json says too;
        # tied ones may keep the head a second time.
        known = (
            (".rotary_emb.inv_freq", "lm_head.weight")
            if self.found.config.get("tie_word_embeddings")
            else (".rotary_emb.inv_freq",)
        )
        left = [name for name in self._left if not name.endswith(known)]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(f"decoder.load: the model has no {', '.join(left[:3])}{more}")


@dataclasses.dataclass
class Random:
    """Normally distributed weights, made on the device."""

    seed: int
    dtype: Any
    recipe: jax_fp8.Recipe | None
    weight_only_rows: int | None

    def __post_init__(self) -> None:
        self._key = jax.random.key(self.seed)

    def array(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """Ones, which norms are, and small numbers for the embedding."""
        return jnp.ones(shape, self.dtype) if len(shape) == 1 else self._normal(shape, 1.0)

    def dense(self, name: str, out: int, width: int, bias: bool, *, wide: bool = False) -> Dense:
        """The product of a module; ``wide`` leaves its weight as it is."""
        vector = self._normal((out,), 0.1) if bias else None
        weight = self._normal((out, width), width**-0.5)
        recipe = None if wide else self.recipe
        return _quantized(weight, vector, name, recipe, self.weight_only_rows)

    def _normal(self, shape: tuple[int, ...], deviation: float) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return _normal(key, shape, self.dtype, deviation)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    return (deviation * jax.random.normal(key, shape)).astype(dtype)


_dequantize = jax.jit(jax_fp8.dequantize, static_argnums=1)


def _quantized(
    weight: jax.Array, bias: Any, name: str, recipe: jax_fp8.Recipe | None, rows: int | None
) -> Dense:
    if recipe is None:
        return Dense(weight, bias, names=(name,))
    operand = recipe.weight
    assert operand is not None
    quantized = jax_fp8.quantize(
        weight,
        dtype=operand.dtype,
        granularity=operand.granularity,
        power_of_two=operand.power_of_two,
    )
    activation = checkpoint.Activation(recipe.activation)
    return Dense(quantized, bias, activation=activation, names=(name,), weight_only_rows=rows)


def _recipe(given: str | jax_fp8.Recipe | None) -> jax_fp8.Recipe | None:
    recipe = jax_fp8.named_recipe(given) if isinstance(given, str) else given
    if recipe is None or recipe.weight is None:
        return None
    if recipe.has_state:
        raise ValueError(
            "decoder: static and delayed scales come with a checkpoint; `jax-fp8 quantize` makes"
            " one with static scales"
        )
    return recipe


def _generation(folder: str | pathlib.Path) -> Mapping[str, Any]:
    """What generation_config.json says of the end of a text, which is what models are run with."""
    path = pathlib.Path(folder) / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: not an object")
    return {k: given[k] for k in ("eos_token_id",) if given.get(k) is not None}
