"""The decoder on a GPU: cuDNN's attention and the FP8 kernels, against float32 on the host."""

import decoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import logits, stored, tokens_of

pytest.importorskip("flax")
pytest.importorskip("safetensors")

from flax import nnx

import jax_fp8
from jax_fp8 import decoder

pytestmark = pytest.mark.gpu

LENGTHS = np.array([40, 64, 3])
#: RMS error over RMS of the logits. bfloat16 rounds to 2^-9, some 20 times on the way; FP8 rounds
#: weights and activations of eight products to 2^-4 / sqrt(3), 0.72 of that on average.
BOUNDS = {None: 0.03, "rowwise": 0.15, "tensorwise": 0.15, "blockwise": 0.15, "weight_only": 0.11}


def written(model, texts, lengths, steps):
    """Logits (B, steps + 1, vocabulary) after each prompt and each of the tokens that follow."""
    graph, state = nnx.split(model)

    @jax.jit
    def prompt(state, tokens, lengths, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.hidden(tokens, cache, decoder.Prompt(lengths, tokens.shape[1]))
        return model.logits(hidden), cache

    @jax.jit
    def step(state, token, cache):
        model = nnx.merge(graph, state)
        at = decoder.Step(cache.lengths)
        hidden, cache = model.hidden(token[:, None], cache, at, one_call=True)
        return model.logits(hidden[:, 0]), cache

    rows, size = np.arange(len(texts)), int(lengths.max())
    cache = decoder.empty_cache(model.config, len(texts), size + steps, model.dtype)
    whole, cache = prompt(state, texts[:, :size], jnp.asarray(lengths), cache)
    found = [np.asarray(whole)[rows, lengths - 1]]
    for index in range(steps):
        new, cache = step(state, texts[rows, lengths + index], cache)
        found.append(np.asarray(new))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("rows", [0, 4], ids=["quantized", "decoded"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("recipe", BOUNDS)
def test_prompts_and_steps(recipe, window, rows):
    if recipe is None and rows:
        pytest.skip("it has nothing to decode")
    given = cases.config("mistral", sliding_window=window, hidden_size=128, head_dim=64)
    weights = cases.tensors(given)
    texts = tokens_of((3, 72))
    with jax.default_device(jax.devices("cpu")[0]):
        whole = logits(stored(given, weights), texts)
    options = {"recipe": recipe, "dtype": jnp.bfloat16, "weight_only_rows": rows}
    jax_fp8.clear_plans()
    found = written(stored(given, weights, **options), texts, LENGTHS, 6)
    # Products of few rows have their neighbours in them.
    fused = {p["implementation"] for p in jax_fp8.plans() if p["operation"] == "fused_matmul"}
    if rows:
        assert fused == ({"gemv"} if recipe not in (None, "blockwise") else set())
    else:
        assert fused == ({"small_m"} if recipe == "rowwise" else set())
    at = np.arange(3)[:, None], LENGTHS[:, None] - 1 + np.arange(7)
    want = whole[at]
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.mean() < BOUNDS[recipe] and error.max() < 2 * BOUNDS[recipe]


def test_text(tmp_path):
    """From a folder, a batch, several times: the same tokens each time."""
    folder = cases.write(tmp_path / "model")
    model = decoder.load(folder, recipe="rowwise")
    prompts = [[5, 6, 7], [20, 21, 22, 23, 24], [40]]
    generator = decoder.Generator(model, positions=32)
    one, two = (np.stack(list(generator.stream(prompts, 8, eos=()))) for _ in range(2))
    assert np.array_equal(one, two) and (one >= 0).all()
