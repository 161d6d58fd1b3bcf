"""Small checkpoints for the tests of the decoder."""

import json

import numpy as np
from safetensors.numpy import save_file

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 160, 4, 2, 32, 2, 96


def config(family="llama", **changed):
    """A config.json."""
    return {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "eos_token_id": 2,
        **changed,
    }


def tensors(given, seed=0, dtype=np.float32):
    """Random weights for a config, by the names of the hub."""
    rng = np.random.default_rng(seed)
    width, hidden, dim = given["hidden_size"], given["intermediate_size"], given["head_dim"]
    q, kv = given["num_attention_heads"] * dim, given["num_key_value_heads"] * dim
    family, own_bias = given["model_type"], given.get("attention_bias", False)
    found = {}

    def add(name, *shape, around=0.0, deviation=None):
        deviation = shape[-1] ** -0.5 if deviation is None else deviation
        found[name] = (around + deviation * rng.standard_normal(shape)).astype(dtype)

    add("model.embed_tokens.weight", given["vocab_size"], width, deviation=1.0)
    for i in range(given["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}{name}.weight", width, around=1.0, deviation=0.2)
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            add(f"{at}self_attn.{name}_proj.weight", out, width)
            if family == "qwen2" or own_bias:
                add(f"{at}self_attn.{name}_proj.bias", out, deviation=0.3)
        add(f"{at}self_attn.o_proj.weight", width, q)
        if own_bias:
            add(f"{at}self_attn.o_proj.bias", width, deviation=0.3)
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                add(f"{at}self_attn.{name}.weight", dim, around=1.0, deviation=0.2)
        for name in ("gate", "up"):
            add(f"{at}mlp.{name}_proj.weight", hidden, width)
        add(f"{at}mlp.down_proj.weight", width, hidden)
    add("model.norm.weight", width, around=1.0, deviation=0.2)
    if not given.get("tie_word_embeddings"):
        add("lm_head.weight", given["vocab_size"], width)
    return found


def write(folder, given=None, weights=None):
    """A folder as the hub has it, with a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    given = config() if given is None else given
    (folder / "config.json").write_text(json.dumps(given))
    save_file(tensors(given) if weights is None else weights, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """Printable ASCII, a token for each, behind three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    characters = [chr(code) for code in range(32, 125)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
