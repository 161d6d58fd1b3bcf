"""Writing text: sampling, generation, the command."""

import decoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from test_decoder import logits, stored, tokens_of

import jax_fp8
from jax_fp8 import checkpoint, decoder
from jax_fp8.__main__ import main
from jax_fp8.decoder import dense, measure
from jax_fp8.decoder.dense import Dense, Parallel

pytestmark = pytest.mark.ends

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], jnp.float32))


def drawn(how, count=400):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: decoder.sample(LOGITS, key, how))(keys))


def test_the_most_likely():
    assert decoder.sample(LOGITS, jax.random.key(0), decoder.Sampling()).tolist() == [0, 3]


@pytest.mark.parametrize(
    "how, first",
    [
        (decoder.Sampling(1.0), {0, 1, 2, 3}),
        (decoder.Sampling(1.0, top_k=2), {0, 1}),
        (decoder.Sampling(1.0, top_k=9), {0, 1, 2, 3}),
        (decoder.Sampling(1.0, top_p=0.75), {0, 1, 2}),
        (decoder.Sampling(1.0, top_p=0.6), {0, 1}),
        (decoder.Sampling(1.0, top_p=1e-6), {0}),
        (decoder.Sampling(1.0, top_k=3, top_p=0.5), {0, 1}),
        (decoder.Sampling(1e-3), {0}),
    ],
)
def test_which_tokens_can_come(how, first):
    found = drawn(how)
    assert set(found[:, 0]) == first
    assert set(found[:, 1]) == {3 - token for token in first}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_how_often_they_come(temperature):
    found = drawn(decoder.Sampling(temperature), 4000)[:, 0]
    chances = np.array([0.4, 0.3, 0.2, 0.1]) ** (1 / temperature)
    chances /= chances.sum()
    counted = np.bincount(found, minlength=4) / len(found)
    # Five standard deviations of a count.
    assert (np.abs(counted - chances) < 5 * np.sqrt(chances * (1 - chances) / len(found))).all()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
    ],
)
def test_samplings_that_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        decoder.Sampling(**options)


# --- Generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.write(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return decoder.load(folder, dtype=jnp.float32)


PROMPTS = [[5, 6, 7], [20, 21, 22, 23, 24], [40]]


def test_a_batch_writes_what_each_would_alone(model):
    generator = decoder.Generator(model, positions=32)
    together = np.stack(list(generator.stream(PROMPTS, 8, eos=())), axis=1)
    assert together.shape == (3, 8) and (together >= 0).all()
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = [int(token[0]) for token in generator.stream([prompt], 8, eos=())]
        assert alone == row.tolist()


def test_a_text_ends(model):
    generator = decoder.Generator(model, positions=32)
    whole = np.stack(list(generator.stream(PROMPTS, 8, eos=())), axis=1)
    end = int(whole[0, 2])
    found = np.stack(list(generator.stream(PROMPTS, 8, eos=(end,))), axis=1)
    for row, full in zip(found, whole, strict=True):
        stop = full.tolist().index(end) + 1 if end in full else len(full)
        assert row[:stop].tolist() == full[: len(row)][:stop].tolist()
        assert (row[stop:] == -1).all()
    assert len(list(generator.stream(PROMPTS[:1], 8, eos=(end,)))) == 1 + whole[0].tolist().index(
        end
    )


def test_a_step_has_no_result_that_lies_elsewhere(model):
    """A result of its own would move each time, and with it the CUDA graph of the step."""
    generator = decoder.Generator(model, positions=32)
    _, written = generator.prefill([[5, 6, 7], [40]])
    found = generator._step.lower(generator._weights, written, generator._key).compile()
    sizes = found.memory_analysis()
    # The table of results is one too.
    elsewhere = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    assert elsewhere == 8 * len(jax.tree.leaves(written))
    token, after = generator.step(written)
    assert written.cache.keys[0].is_deleted() and not token.is_deleted()
    assert np.array_equal(token, after.token)


def test_sampled_texts_depend_on_the_seed_alone(model):
    def written(seed):
        how = decoder.Sampling(1.0, top_k=20)
        generator = decoder.Generator(model, positions=32, sampling=how, seed=seed)
        return [token.tolist() for token in generator.stream(PROMPTS, 8, eos=())]

    assert written(1) == written(1) != written(2)


def test_nan_is_told(folder):
    model = decoder.load(folder, dtype=jnp.float32)
    model.norm[...] = model.norm[...].at[0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        list(decoder.Generator(model, positions=16).stream([[3, 4]], 4))


@pytest.mark.parametrize(
    "prompts, count, said",
    [
        ([], 4, "there must be a prompt"),
        ([[]], 4, "each prompt needs a token"),
        ([[1] * 30], 4, "34, and there are 32 positions"),
        ([[1]], 0, "count must be >= 1"),
        ([[96]], 4, "tokens must be from 0 to 95, got 0 to 96"),
        ([[-1]], 4, "tokens must be from 0 to 95"),
    ],
)
def test_prompts_that_are_refused(model, prompts, count, said):
    with pytest.raises(ValueError, match=said):
        list(decoder.Generator(model, positions=32).stream(prompts, count))


def test_positions_that_are_refused(model):
    with pytest.raises(ValueError, match="made for 256 positions, got 257"):
        decoder.Generator(model, positions=257)


def test_dynamic_rope_reads_on():
    """Past the length that the model was made for, up to the factor; padding is no length."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    given = cases.config(rope_scaling=rope, max_position_embeddings=16)
    model = decoder.random(decoder.read_config(given), dtype=jnp.float32)
    with pytest.raises(ValueError, match="made for 64 positions, got 65"):
        decoder.Generator(model, positions=65)
    text = np.arange(3, 33, dtype=np.int32)[None]
    padded = np.pad(text, ((0, 0), (0, 34)))
    alone = logits(model, text)
    np.testing.assert_allclose(logits(model, padded, [30])[:, :30], alone, rtol=0, atol=1e-4)
    # At 64 the waves are longer.
    assert np.abs(logits(model, padded, [64])[:, :30] - alone).max() > 1e-2


# --- Text and the command -------------------------------------------------------------------------


def test_text_comes_in_whole_characters(folder):
    tokenizer = decoder.read_tokenizer(folder)
    stream = decoder.TextStream(tokenizer)
    text = "".join(stream.add(token) for token in tokenizer.encode("Some text.").ids)
    assert text == "Some text."
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not there"):
        decoder.read_tokenizer(folder.parent)


def test_a_character_of_several_tokens(tmp_path):
    """Comes when its last byte has, and nothing of it before."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    stream = decoder.TextStream(tokenizer)
    parts = [stream.add(token) for token in tokenizer.encode("aé€😀b").ids]
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_a_text_is_printed_as_it_comes(folder, capsys):
    """Of one prompt each token at once, of several each text when it has ended."""
    from jax_fp8.decoder.command import _Printer

    tokenizer = decoder.read_tokenizer(folder)
    a, b = tokenizer.encode("ab").ids
    printer = _Printer(tokenizer, ["Hi"])
    said = [capsys.readouterr().out]
    for token in (a, b):
        printer.add(np.array([token]))
        said.append(capsys.readouterr().out)
    assert "".join(said) == "Hiab" and said[0] == "Hi" and said[1]
    printer = _Printer(tokenizer, ["Hi", "Ho"])
    printer.add(np.array([a, b]))
    assert capsys.readouterr().out == ""
    printer.add(np.array([b, -1]))
    assert capsys.readouterr().out == "[1] Hob\n"
    printer.close()
    assert capsys.readouterr().out == "[0] Hiab\n"


def test_the_command_leaves_out_what_it_is_told_to(tmp_path, capsys):
    given = cases.config()
    scales = {"model.layers.0.self_attn.k_proj.k_scale": np.ones(1, np.float32)}
    cases.write(tmp_path / "model", given, cases.tensors(given) | scales)
    command = ["generate", str(tmp_path / "model"), "Hello", "--max-new-tokens", "2"]
    assert main(command) == 1
    assert "k_proj.k_scale" in capsys.readouterr().err
    assert main([*command, "--ignore", "*.k_scale", "*.v_scale"]) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_the_command_writes(folder, capsys):
    options = ["--dtype", "float32", "--max-new-tokens", "6"]
    assert main(["generate", str(folder), "Hello", *options]) == 0
    said = capsys.readouterr()
    tokenizer = decoder.read_tokenizer(folder)
    generator = decoder.Generator(decoder.load(folder, dtype=jnp.float32), positions=11)
    prompt = tokenizer.encode("Hello").ids
    tokens = [int(token[0]) for token in generator.stream([prompt], 6)]
    assert said.out == "Hello" + tokenizer.decode([token for token in tokens if token >= 0]) + "\n"
    assert "prefill 5 tokens" in said.err and "weights 0.00 GiB" in said.err


def test_the_command_writes_one_token(folder, capsys):
    assert main(["generate", str(folder), "Hello", "--max-new-tokens", "1"]) == 0
    assert len(capsys.readouterr().out) == len("Hello") + 2


def test_the_command_writes_a_batch(folder, capsys):
    options = ["--max-new-tokens", "4", "--recipe", "rowwise", "--temperature", "1"]
    assert main(["generate", str(folder), "Hello", "Ab", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[:6] for line in lines) == ["[0] He", "[1] Ab"]


def test_the_command_compares(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    options = ["--compare", "--text", str(text), "--max-new-tokens", "4"]
    assert main(["generate", str(folder), "Hello", *options]) == 0
    header, wide, fp8 = capsys.readouterr().out.splitlines()
    columns = ["prefill", "decode", "weights", "memory", "perplexity", "agreement"]
    assert header.split() == columns
    assert wide.split()[0] == "bfloat16" and wide.split()[-2:] == ["100.0", "%"]
    assert fp8.split()[0] == "FP8" and 50 < float(fp8.split()[-2]) <= 100
    perplexities = [float(line.split()[-3]) for line in (wide, fp8)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.1)


def test_the_command_compares_what_the_device_says_of_memory(folder, monkeypatch, capsys):
    """A CPU says nothing: there it is weights and cache, which are next to nothing here."""
    options = ["generate", str(folder), "Hello", "--compare", "--max-new-tokens", "2"]
    assert main(options) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines] == [["0.00", "GiB"]] * 2
    used = iter([5 << 30, 0, 3 << 29, 0])
    monkeypatch.setattr(measure, "_memory_stats", lambda model: {"bytes_in_use": next(used)})
    assert main(options) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines] == [["5.00", "GiB"], ["1.50", "GiB"]]


@pytest.mark.parametrize("parallel", [None, 0, 1], ids=["all", "all but the first", "all but one"])
@pytest.mark.parametrize(
    "family, recipe", [("llama", "weight_only"), ("llama", "rowwise"), ("qwen2", "weight_only")]
)
def test_products_of_few_rows_have_their_neighbours_in_them(family, recipe, parallel):
    """The same logits, but for roundings to bfloat16, whose places differ."""
    given = cases.config(family)
    weights = cases.tensors(given)
    options = {"recipe": recipe, "dtype": jnp.bfloat16}
    texts = tokens_of((2, 4))
    few_rows = {"weight_only_rows": 8} if recipe == "weight_only" else {"weight_only_rows": 0}
    with pytest.MonkeyPatch.context() as patch:  # In one call or in several.
        patch.setattr(Dense, "fused_recipe", lambda *args, **options: None)
        want = logits(stored(given, weights, **options, **few_rows), texts).astype(np.float32)
    model = stored(given, weights, **options, **few_rows)
    if parallel is not None:  # Its parts are products for themselves; this block fuses nothing.
        model.blocks[parallel].qkv = Parallel([model.blocks[parallel].qkv])
    most = 8 if recipe == "weight_only" else 16
    few, many = (jnp.zeros((rows, model.config.width), jnp.bfloat16) for rows in (most, most + 1))
    fuses = [index != parallel for index in range(len(model.blocks))]
    assert [b.fused_recipe(few) for b in model.blocks] == [recipe if f else None for f in fuses]
    assert model.blocks[-1].fused_recipe(many) is None
    # In several calls rows that are quantized would be brought together, where a mesh divides them.
    apart = [recipe if f and recipe == "weight_only" else None for f in fuses]
    assert [b.fused_recipe(few, one_call=False) for b in model.blocks] == apart
    for one_call in (False, True) if recipe == "weight_only" else (True,):
        with pytest.MonkeyPatch.context() as patch:
            counts, run = [], jax_fp8.fused_chain

            def chain(x, links, run=run, counts=counts, expected=one_call, **options):
                assert options["one_call"] is expected
                counts.append(len(links))
                return run(x, links, **options)

            patch.setattr(jax_fp8, "fused_chain", chain)
            found = logits(model, texts, one_call=one_call).astype(np.float32)
        # A first product, where no block before has multiplied it, and from attention to attention.
        firsts = [f and not (i and fuses[i - 1]) for i, f in enumerate(fuses)]
        each = zip(firsts, fuses, [*fuses[1:], False], strict=True)
        assert counts == [n for a, b, c in each for n in [1] * a + [3 + c] * b]
        assert not np.array_equal(found, want)
        # Another rounding to bfloat16 may be another one to FP8.
        bound = 0.02 if recipe == "weight_only" else 0.06
        assert np.linalg.norm(found - want) < bound * np.linalg.norm(want)


def test_products_of_many_rows_have_their_neighbours_in_them(monkeypatch):
    given = cases.config("llama")
    options = {"recipe": "rowwise", "dtype": jnp.bfloat16, "weight_only_rows": 0}
    model, texts = stored(given, cases.tensors(given), **options), tokens_of((4, 12))
    want = logits(model, texts, one_call=True).astype(np.float32)
    counts, run = [], jax_fp8.fused_chain

    def chain(x, links, **options):
        counts.append(len(links))
        return run(x, links, **options)

    monkeypatch.setattr(jax_fp8, "fused_chain", chain)
    monkeypatch.setattr(dense, "FUSED_MANY_ROWS", 48)
    logits(model, texts)  # In several calls it is not taken.
    assert not counts
    found = logits(model, texts, one_call=True).astype(np.float32)
    assert counts == [1, *[4] * (len(model.blocks) - 1), 3]
    assert not np.array_equal(found, want)
    assert np.linalg.norm(found - want) < 0.06 * np.linalg.norm(want)


def test_what_products_of_few_rows_do_not_take(monkeypatch):
    weight = jax_fp8.quantize(jnp.ones((32, 8192)), granularity="row")
    rows = jnp.zeros((17, 8192), jnp.bfloat16)
    wide = Dense(weight, weight_only_rows=64)
    assert wide.fused_recipe(rows[:8]) and not wide.fused_recipe(rows[:9])
    assert wide.fused_recipe(rows[:5], norm=True) and not wide.fused_recipe(rows[:6], norm=True)
    assert not wide.fused_recipe(rows[:8].astype("float32"))
    e5m2 = Dense(jax_fp8.quantize(jnp.ones((32, 64)), dtype=jnp.float8_e5m2), weight_only_rows=64)
    assert not e5m2.fused_recipe(rows[:8, :64])

    def quantizing(**options):
        activation = checkpoint.Activation(jax_fp8.Operand(**{"granularity": "row", **options}))
        return Dense(weight, activation=activation, weight_only_rows=0)

    monkeypatch.setattr(dense, "_is_hopper_or_no_gpu", lambda: True)
    assert quantizing().fused_recipe(rows[:16], norm=True) and not quantizing().fused_recipe(rows)
    long = Dense(
        jax_fp8.quantize(jnp.ones((32, 18448)), granularity="row"),
        activation=quantizing().activation,
        weight_only_rows=0,
    )
    assert not long.fused_recipe(jnp.zeros((2, 18448), jnp.bfloat16))
    for options in ({"granularity": "tensor"}, {"dtype": jnp.float8_e5m2}, {"power_of_two": True}):
        assert not quantizing(**options).fused_recipe(rows[:2]), options

    def static(granularity):
        options = {"input_scale": jnp.full((), 0.5), "weight_only_rows": 0}
        return Dense(weight, activation=quantizing(granularity=granularity).activation, **options)

    assert not static("row").fused_recipe(rows[:2])
    assert static("tensor").fused_recipe(rows[:2]) == "static"
    assert static("tensor").link(recipe="static").scale == 0.5
    many = jnp.zeros((dense.FUSED_MANY_ROWS, 8192), jnp.bfloat16)
    assert quantizing().fused_recipe(many, norm=True) == "rowwise"
    assert not quantizing().fused_recipe(many[:-1])
    monkeypatch.setattr(dense, "_is_hopper_or_no_gpu", lambda: False)
    assert not quantizing().fused_recipe(rows[:16])
