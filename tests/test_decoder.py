"""The decoder: its configuration, its products, its cache, how it is loaded."""

import dataclasses
import json

import decoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import run_script

pytest.importorskip("flax")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from flax import nnx

import jax_fp8
from jax_fp8 import checkpoint, decoder
from jax_fp8.decoder.dense import Dense, Parallel, fuse

pytestmark = pytest.mark.ends

RECIPES = ("tensorwise", "rowwise", "blockwise", "weight_only")


def stored(given, weights, **options):
    """The model of a wide checkpoint that is in memory."""
    from jax_fp8.decoder.load import Stored, _recipe, build

    tensors = {name: jnp.asarray(value) for name, value in weights.items()}
    found = checkpoint.Checkpoint(given, tensors, {}, None)
    dtype, recipe = options.get("dtype", jnp.float32), _recipe(options.get("recipe"))
    source = Stored(found, jnp.dtype(dtype), recipe, False, options.get("weight_only_rows", 0))
    model = build(decoder.read_config(given), source)
    source.check_empty()
    return model


def logits(model, tokens, lengths=None, one_call=False):
    """Of all tokens (B, T) at once."""
    size = tokens.shape[1]
    lengths = jnp.full(len(tokens), size) if lengths is None else jnp.asarray(lengths)

    @jax.jit
    def run(state, tokens, lengths):
        model = nnx.merge(graph, state)
        cache = decoder.empty_cache(model.config, len(tokens), size, model.dtype)
        at = decoder.Prompt(lengths, size)
        hidden, _ = model.hidden(tokens, cache, at, one_call=one_call)
        return model.logits(hidden)

    graph, state = nnx.split(model)
    return np.asarray(run(state, tokens, lengths))


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(3, cases.VOCABULARY, shape).astype(np.int32)


# --- config.json ----------------------------------------------------------------------------------


def test_config():
    given = cases.config("qwen3", tie_word_embeddings=True, eos_token_id=[5, 7], rope_theta=1e6)
    found = decoder.read_config(given)
    assert (found.width, found.hidden, found.layers) == (64, 160, 2)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 32)
    assert found.qk_norm and found.tied and not found.qkv_bias
    assert found.eos == (5, 7) and found.rope.theta == 1e6


@pytest.mark.parametrize(
    "family, changed, windows",
    [
        ("llama", {"sliding_window": 8}, (None, None)),
        ("mistral", {"sliding_window": 8}, (8, 8)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {"sliding_window": 8}, (None, None)),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (None, 8),
        ),
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, None),
        ),
    ],
)
def test_windows(family, changed, windows):
    assert decoder.read_config(cases.config(family, **changed)).windows == windows


@pytest.mark.parametrize(
    "changed, error, said",
    [
        ({"model_type": "gpt2"}, NotImplementedError, "model_type 'gpt2'"),
        ({"model_type": None}, NotImplementedError, "model_type None"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope"}}, NotImplementedError, "rope_type 'longrope'"),
        (
            {"rope_parameters": {"full": {"rope_theta": 1}}},
            NotImplementedError,
            "each kind of layer",
        ),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "factor of the rope_type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ValueError, "must be a number > 0"),
        ({"rope_scaling": [2.0]}, ValueError, "must be an object"),
        ({"hidden_size": "64"}, ValueError, "hidden_size must be an int"),
        ({"hidden_size": True}, ValueError, "hidden_size must be an int"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be an int >= 1"),
        ({"num_key_value_heads": 3}, ValueError, "4 heads of width 32 for 3"),
        ({"rms_norm_eps": -1}, ValueError, "rms_norm_eps must be a number > 0"),
        ({"tie_word_embeddings": "no"}, ValueError, "must be true or false"),
        ({"eos_token_id": "x"}, ValueError, "eos_token_id"),
        ({"eos_token_id": [2, True]}, ValueError, "eos_token_id"),
        ({"eos_token_id": 2**40}, ValueError, "eos_token_id"),
        ({"num_hidden_layers": 10**12}, ValueError, "num_hidden_layers must be an int"),
        ({"num_hidden_layers": 10**6}, ValueError, "num_hidden_layers must be at most"),
    ],
)
def test_configs_that_are_refused(changed, error, said):
    with pytest.raises(error, match=said):
        decoder.read_config(cases.config(**changed))


@pytest.mark.parametrize("kinds", [3, [["full_attention"], "x"], "ab", {}, ["full_attention"]])
def test_layer_types_that_are_refused(kinds):
    given = cases.config("qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    with pytest.raises(ValueError, match="layer_types must say"):
        decoder.read_config(given)


ROPES = (
    {"type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_configs_at_random(family):
    """One of another value somewhere is read or refused, as is declared, and nothing else."""
    rng = np.random.default_rng(len(family))
    values = [
        None,
        True,
        -1,
        0,
        1,
        2**64,
        10**400,
        1e300,
        -0.5,
        "",
        "x",
        [],
        [1],
        [[1]],
        {},
        {"a": 1},
    ]
    refused = 0
    for i in range(400):
        given = cases.config(
            family,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"],
            rope_scaling=dict(ROPES[i % len(ROPES)]),
        )
        node = given["rope_scaling"] if rng.integers(3) == 0 else given
        key = list(node)[int(rng.integers(len(node)))]
        node[key] = values[int(rng.integers(len(values)))]
        try:
            decoder.read_config(given)
        except (ValueError, NotImplementedError):
            refused += 1
    assert 100 < refused < 400


def test_what_a_config_leaves_out():
    """A field that is not there is the family's; one that is null is not there for anyone."""
    given = cases.config("qwen2")
    del given["num_key_value_heads"], given["max_position_embeddings"]
    found = decoder.read_config({**given, "num_attention_heads": 32})
    assert (found.kv_heads, found.max_length) == (32, 32768)
    assert decoder.read_config({**given, "num_key_value_heads": None}).kv_heads == cases.HEADS


# --- Products -------------------------------------------------------------------------------------


def quantized(shape, granularity="row", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jax_fp8.quantize(jnp.asarray(values), granularity=granularity)


def operand(granularity="row", **options):
    return checkpoint.Activation(jax_fp8.Operand(granularity=granularity, **options))


def test_an_input_is_quantized_as_the_checkpoint_says():
    w, x = quantized((24, 128)), jnp.asarray(np.random.default_rng(1).normal(size=(3, 128)))
    x = x.astype(jnp.float32)
    for granularity in ("tensor", "row", (1, 128)):
        y = Dense(w, activation=operand(granularity))(x)
        want = jax_fp8.scaled_matmul(
            jax_fp8.quantize(x, granularity=granularity), w, preferred_element_type=jnp.float32
        )
        assert np.array_equal(y, want)
    scale = jnp.float32(0.01)
    y = Dense(w, activation=operand("tensor", scaling="static"), input_scale=scale)(x)
    want = jax_fp8.scaled_matmul(
        jax_fp8.quantize(x, scale=scale), w, preferred_element_type=jnp.float32
    )
    assert np.array_equal(y, want)


def test_scales_that_are_powers_of_two():
    w, x = quantized((24, 256)), jnp.asarray(np.random.default_rng(1).normal(size=(3, 256)))
    y = Dense(w, activation=operand((1, 128), power_of_two=True))(x.astype(jnp.float32))
    xq = jax_fp8.quantize(x.astype(jnp.float32), granularity=(1, 128), power_of_two=True)
    assert (np.frexp(xq.scale)[0] == 0.5).all()
    assert np.array_equal(y, jax_fp8.scaled_matmul(xq, w, preferred_element_type=jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wide_inputs(dtype):
    """No activation in the checkpoint, or few rows: the input is not rounded to FP8."""
    w, x = quantized((24, 128)), jnp.asarray(np.random.default_rng(1).normal(size=(1, 128)), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(jax_fp8.dequantize(w), np.float64).T
    step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-5
    for dense in (Dense(w), Dense(w, activation=operand(), weight_only_rows=1)):
        error = np.abs(np.asarray(dense(x), np.float64) - exact).max()
        is_rounded = dense.activation.operand is not None and dtype == jnp.float32
        assert (error > 1e-3) if is_rounded else (error <= step * np.abs(exact).max())


@pytest.mark.parametrize("granularity, most", [("tensor", 8), ("row", 8), ((128, 128), 1)])
def test_up_to_which_rows_inputs_stay_wide(granularity, most):
    """As many as that is faster for, where nothing is said."""
    w = jax_fp8.quantize(jnp.ones((128, 128)), granularity=granularity)
    dense = Dense(w, activation=operand((1, 128) if most == 1 else "row"))
    inputs = [jnp.ones((rows, 128), jnp.bfloat16) for rows in (most, most + 1)]
    assert [dense.quantization(x) is None for x in inputs] == [True, False]
    assert Dense(w, activation=operand(), weight_only_rows=0).quantization(inputs[0]) is not None


def test_a_bound_on_the_amax():
    """FBGEMM's: a row's scale is that of the bound at most, and what lies beyond saturates."""
    w = quantized((8, 16))
    x = jnp.stack([jnp.linspace(-100.0, 100.0, 16), jnp.linspace(-1.0, 1.0, 16), jnp.zeros(16)])
    activation = dataclasses.replace(operand(), bound=10.0)
    y = Dense(w, activation=activation)(x)
    xq = jax_fp8.quantize(
        x, granularity="row", scale=jnp.array([[10.0], [1.0], [2.0**-126 * 448]]) / 448
    )
    want = jax_fp8.scaled_matmul(xq, w, preferred_element_type=jnp.float32)
    assert np.array_equal(y, want)
    assert float(jax_fp8.dequantize(xq)[0].max()) == pytest.approx(10.0)


@pytest.mark.parametrize("granularity", ["tensor", "row", (128, 128), None])
def test_fused_products_are_the_products(granularity):
    shapes = [(128, 256), (256, 256), (64, 256)]
    if granularity is None:
        rng = np.random.default_rng(0)
        weights = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
        activation = None
    else:
        weights = [quantized(shape, granularity, seed) for seed, shape in enumerate(shapes)]
        activation = operand((1, 128) if granularity == (128, 128) else granularity)
    biases = [jnp.full(shape[0], i, jnp.float32) for i, shape in enumerate(shapes)]
    parts = [
        Dense(weight, bias, activation=activation, names=(str(i),))
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]
    fused = fuse(parts)
    x = jnp.asarray(np.random.default_rng(9).standard_normal((5, 256)), jnp.float32)
    assert isinstance(fused, Dense) and fused.names == ("0", "1", "2")
    want = jnp.concatenate([part(x) for part in parts], axis=-1)
    np.testing.assert_allclose(fused(x), want, rtol=1e-5, atol=1e-4)


def test_what_cannot_be_one_product():
    x = jnp.ones((2, 256), jnp.float32)
    blocks = [quantized((size, 256), (128, 128)) for size in (64, 128)]
    tall = quantized((128, 256), (128, 128)), quantized((128, 256), "tensor")
    cases = [
        [Dense(w, activation=operand((1, 128))) for w in blocks],
        [Dense(w, activation=operand((1, 128))) for w in tall],
        [Dense(w, activation=operand((1, 128))) for w in tall[::-1]],
        [Dense(quantized((8, 256)), activation=operand()), Dense(jnp.ones((8, 256)))],
    ]
    for parts in cases:
        fused = fuse(parts)
        assert isinstance(fused, Parallel)
        want = jnp.concatenate([part(x) for part in parts], axis=-1)
        options = fused.quantization(x)
        given = x if options is None else jax_fp8.quantize(x, **options)
        assert np.array_equal(fused(given, jnp.float32), want)


def test_static_scales_of_one_input():
    parts = [
        Dense(
            quantized((8, 32), "tensor", seed),
            activation=operand("tensor", scaling="static"),
            input_scale=jnp.float32(scale),
        )
        for seed, scale in enumerate((0.5, 2.0))
    ]
    assert float(fuse(parts).input_scale[...]) == 2.0


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, window", [("llama", None), ("mistral", 5)])
def test_a_cache_changes_nothing(family, window):
    """Texts of several lengths, padded, and then token by token: as each of them at once."""
    given = cases.config(family, sliding_window=window)
    model = stored(given, cases.tensors(given))
    texts = tokens_of((3, 12))
    lengths = np.array([3, 7, 1])
    generator = decoder.Generator(model, positions=16)
    whole = logits(model, texts)
    token, written = generator.prefill([text[:n] for text, n in zip(texts, lengths, strict=True)])
    rows = np.arange(3)
    assert np.array_equal(token, whole[rows, lengths - 1].argmax(-1))
    for step in range(1, 5):  # What follows is given, and not what was chosen.
        given = jnp.asarray(texts[rows, lengths + step - 1], jnp.int32)
        token, written = generator.step(dataclasses.replace(written, token=given))
        assert np.array_equal(token, whole[rows, lengths + step - 1].argmax(-1))
    assert written.cache.lengths.tolist() == (lengths + 4).tolist()
    assert int(written.count) == 5 and np.array_equal(written.token, token)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_layers(recipe):
    given = cases.config("qwen2")
    weights = cases.tensors(given)
    texts = tokens_of((2, 20))
    wide = logits(stored(given, weights), texts)
    dtype = jnp.bfloat16 if recipe == "weight_only" else jnp.float32
    model = stored(given, weights, recipe=recipe, dtype=dtype)
    found = logits(model, texts)
    # Weights and activations have 3 bits behind the point: each product's relative error is about
    # 2^-4.5 / sqrt(3) of each, and the layers add up.
    error = np.linalg.norm(found - wide) / np.linalg.norm(wide)
    assert 1e-3 < error < 0.12
    kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model.blocks))}
    assert jnp.dtype(jnp.float8_e4m3fn) in kinds
    assert model.head.scale is None and model.embedding[...].dtype == dtype


def test_a_row_of_a_batch_does_not_depend_on_the_others():
    given = cases.config()
    model = stored(given, cases.tensors(given), recipe="rowwise")
    texts = tokens_of((2, 9))
    alone = logits(model, texts[:1])
    padded = np.concatenate([texts, np.zeros((2, 7), np.int32)], axis=1)
    np.testing.assert_allclose(logits(model, padded, [9, 9])[:1, :9], alone, rtol=1e-4, atol=1e-4)


def test_static_scales_from_a_calibration(tmp_path):
    folder = cases.write(tmp_path / "model")
    text = "The quick brown fox jumps over the lazy dog, again and again."
    found = decoder.calibrate(folder, text, dtype=jnp.float32, window=32)
    projections = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = {f"model.layers.{i}.{name}" for i in range(cases.LAYERS) for name in projections}
    assert names <= set(found) and all(found[name] > 0 for name in names)
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.self_attn.v_proj"]
    # The input of the first projection can be had from the embedding alone.
    weights = cases.tensors(cases.config())
    ids = decoder.read_tokenizer(folder).encode(text).ids
    x = weights["model.embed_tokens.weight"][ids].astype(np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    amax = np.abs(x * weights["model.layers.0.input_layernorm.weight"]).max()
    assert found["model.layers.0.self_attn.q_proj"] == pytest.approx(amax, rel=1e-5)
    with pytest.raises(ValueError, match="the text is empty"):
        decoder.calibrate(folder, "")
    weights["model.embed_tokens.weight"][ids[3]] = np.nan
    broken = cases.write(tmp_path / "broken", weights=weights)
    with pytest.raises(ValueError, match=r"the input of .* is not finite"):
        decoder.calibrate(broken, text, dtype=jnp.float32, window=32)


def test_scores(tmp_path):
    given = cases.config()
    model = stored(given, cases.tensors(given))
    text = tokens_of(21)
    found = decoder.score(model, text.tolist(), window=8)
    assert found.losses.shape == found.predictions.shape == (7 + 7 + 4,)
    one = logits(model, text[None, 8:16])[0]
    chances = one - np.log(np.exp(one.astype(np.float64)).sum(-1, keepdims=True))
    want = -chances[np.arange(7), text[9:16]]
    np.testing.assert_allclose(found.losses[7:14], want, rtol=1e-4)
    assert np.array_equal(found.predictions[7:14], one[:-1].argmax(-1))
    assert found.perplexity == pytest.approx(np.exp(found.losses.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        decoder.score(model, [5])


# --- Loading --------------------------------------------------------------------------------------


def test_load(tmp_path):
    folder = cases.write(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    model = decoder.load(folder, dtype=jnp.float32)
    given = cases.config()
    assert model.config.eos == (2, 9) and model.format is None
    texts = tokens_of((1, 6))
    assert np.array_equal(logits(model, texts), logits(stored(given, cases.tensors(given)), texts))
    assert decoder.load(folder).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.norm.weight"), "the checkpoint has no model.norm.weight"),
        (
            lambda t: t.update({"model.new.weight": np.zeros(3)}),
            "the model has no model.new.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight is \[3\], not \[64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, said):
    given = cases.config()
    weights = cases.tensors(given)
    change(weights)
    with pytest.raises(ValueError, match=said):
        stored(given, weights)


def test_what_old_checkpoints_have_too():
    given = cases.config(tie_word_embeddings=True)
    weights = cases.tensors(given)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    stored(given, weights)


@pytest.mark.parametrize("recipe", ["static", "delayed"])
def test_recipes_with_state_are_refused(recipe, tmp_path):
    folder = cases.write(tmp_path / "model")
    with pytest.raises(ValueError, match="static and delayed scales come with a checkpoint"):
        decoder.load(folder, recipe=recipe)


def test_random_models():
    config = decoder.read_config(cases.config("qwen2"))
    one, two = (decoder.random(config, seed=3, recipe="rowwise") for _ in range(2))
    texts = tokens_of((1, 5))
    found = logits(one, texts)
    assert np.isfinite(found).all() and np.array_equal(found, logits(two, texts))
    assert one.blocks[0].qkv.values.dtype == jnp.float8_e4m3fn


def test_the_core_does_not_need_flax():
    """The decoder is a program on top of the library; nothing below imports it."""
    said = "import sys, jax_fp8; print([n for n in sys.modules if n.split('.')[0] == 'flax'])"
    assert run_script(said).strip() == "[]"
