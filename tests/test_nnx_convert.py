"""convert and calibrate: whole nnx models in FP8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references as ref
from flax import nnx
from flax_cases import assert_product, assert_same_structure, samples
from flax_models import Model, loss_of, paths, some_tokens

import jax_fp8
import jax_fp8.nnx as fp8

STOCHASTIC = jax_fp8.named_recipe("rowwise", stochastic_rounding=True)
ATTENTION = [f"attention/{name}" for name in ("key", "out", "query", "value")]


def recipes_of(model):
    """By path: the name of each FP8 layer's recipe."""
    names = {recipe: name for name, recipe in jax_fp8._src.recipe.RECIPES.items()}
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, fp8.DotGeneral):
            found["/".join(map(str, path[:-1]))] = names.get(node.recipe, "other")
    return found


def all_layers(blocks=(0, 1)):
    return {f"blocks/{i}/{name}" for i in blocks for name in (*ATTENTION, "mlp/up", "mlp/down")}


def transformer():
    return Model(count=2, attention=True)


def mlp(recipe="tensorwise"):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(32, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 8, rngs=rngs))
    return fp8.convert(model, recipe=recipe)


# --- What is converted ----------------------------------------------------------------------------


def test_one_line():
    model, plain = transformer(), transformer()
    assert fp8.convert(model, recipe="rowwise") is model
    # The third block is the first: it is converted once. Embedding and head stay as they are.
    assert recipes_of(model) == dict.fromkeys(all_layers(), "rowwise")
    assert model.lm_head.dot_general is jax.lax.dot_general
    assert type(model.blocks[0].mlp["up"]) is nnx.Linear
    assert paths(nnx.state(model)) == paths(nnx.state(plain))
    ref.assert_same_trees(nnx.state(model), nnx.state(plain))


def test_where_decides_alone():
    model = fp8.convert(transformer(), where=lambda path, layer: path[-1] in ("lm_head", "up"))
    want = {"lm_head", "blocks/0/mlp/up", "blocks/1/mlp/up"}
    assert recipes_of(model) == dict.fromkeys(want, "tensorwise")
    model = fp8.convert(transformer(), lambda path, layer: isinstance(layer, nnx.Einsum), "delayed")
    assert set(recipes_of(model)) == {"blocks/0/mlp/down", "blocks/1/mlp/down"}


@pytest.mark.parametrize(
    "name, is_wide",
    [("head", True), ("lm_head", True), ("Logits", True), ("logits_dense", True), ("heads", True),
     ("classifier", True), ("patch_embed", True), ("embedding_out", True), ("unembed", True),
     ("classification_head", True), ("output_head", True), ("logitdense", True), ("logit", True),
     ("output", True), ("output_layer", True), ("output_projection", True), ("out", False),
     ("out_proj", False), ("output_gate", False), ("query", False), ("multihead", False),
     ("headroom", False), ("overhead", False), ("logit_scale", False)],
)  # fmt: skip
def test_embeddings_and_heads_by_name(name, is_wide):
    for layers in (
        {name: nnx.Linear(4, 4, rngs=nnx.Rngs(0))},
        {name: nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0))])},
    ):
        model = nnx.Dict(other=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), **layers)
        assert (len(recipes_of(fp8.convert(model))) == 1) == is_wide


def test_output_is_a_head_only_on_top():
    def inner():
        dense = nnx.Dict(dense=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        return nnx.Dict(output=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), attention=nnx.Dict(output=dense))

    model = nnx.Dict(layers=nnx.List([inner()]), **inner())
    want = {"layers/0/output", "layers/0/attention/output/dense", "attention/output/dense"}
    assert set(recipes_of(fp8.convert(model))) == want


def test_rules():
    rules = [("attention/out", None), ("blocks/0/attention", "rowwise"), (r"mlp|head$", "delayed")]
    model = fp8.convert(transformer(), recipe=rules)
    assert recipes_of(model) == {
        "blocks/0/attention/query": "rowwise",
        "blocks/0/attention/key": "rowwise",
        "blocks/0/attention/value": "rowwise",
        **{f"blocks/{i}/mlp/{name}": "delayed" for i in (0, 1) for name in ("up", "down")},
        "lm_head": "delayed",
    }
    # A pattern that is found everywhere takes heads as well, but for a rule before it.
    model = fp8.convert(transformer(), recipe=[(".*", "rowwise")])
    assert set(recipes_of(model)) == {*all_layers(), "lm_head"}
    model = fp8.convert(transformer(), recipe=[("head$", None), (".*", "rowwise")])
    assert set(recipes_of(model)) == all_layers()
    # With where as well, both decide.
    model = fp8.convert(transformer(), lambda path, layer: path[1] == 1, [("mlp", "blockwise")])
    assert recipes_of(model) == dict.fromkeys(["blocks/1/mlp/down", "blocks/1/mlp/up"], "blockwise")


def test_converting_again():
    model = fp8.convert(transformer(), recipe="delayed")
    before = paths(nnx.state(transformer()))
    assert len(paths(nnx.state(model))) == len(before) + 2 * len(all_layers())
    fp8.convert(model, recipe="blockwise")
    assert recipes_of(model) == dict.fromkeys(all_layers(), "blockwise")
    fp8.convert(model, recipe=[("mlp", None), ("query", "rowwise")])
    assert len(recipes_of(model)) == len(all_layers()) - 4
    fp8.convert(model, recipe=None)
    assert recipes_of(model) == {}
    assert paths(nnx.state(model)) == before
    layers = model.blocks[0]
    assert layers.attention.query.dot_general is None
    assert layers.mlp["up"].dot_general is jax.lax.dot_general
    assert layers.mlp["down"].einsum_op is jnp.einsum


def test_one_layer_and_trees_of_models():
    layer = fp8.convert(nnx.LinearGeneral(32, 8, rngs=nnx.Rngs(0)))
    assert_product(layer(samples((6, 32))), "mk,kn->mn", samples((6, 32)), layer.kernel[...])
    layers = {"a": nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "b": [nnx.Linear(4, 4, rngs=nnx.Rngs(0))]}
    assert set(recipes_of(fp8.convert(layers))) == {"a", "b/0"}
    # A subclass keeps its own ways.
    lora = nnx.LoRALinear(32, 8, lora_rank=2, rngs=nnx.Rngs(0))
    wide = nnx.LoRALinear(32, 8, lora_rank=2, rngs=nnx.Rngs(0))
    assert type(fp8.convert(lora)) is nnx.LoRALinear
    assert_same_structure(lora(samples((6, 32))), wide(samples((6, 32))))


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, scanned",
    [("delayed", True), ("delayed", False), (STOCHASTIC, True)],
    ids=["delayed, scanned", "delayed", "stochastic"],
)
def test_training(recipe, scanned):
    model = Model(count=2 if scanned else 1, scanned=scanned)
    parameters = paths(nnx.state(model))
    fp8.convert(model, recipe=recipe, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    tokens = some_tokens()

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return loss, gradients

    losses = []
    for _ in range(4):
        loss, gradients = step(model, optimizer, tokens)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert paths(gradients) == parameters == paths(nnx.state(model, nnx.Param))
    product = (model.blocks if scanned else model.blocks[0]).mlp["up"].dot_general
    stack = (2,) if scanned else ()
    if recipe == "delayed":
        # Four steps, in each of which the first block of a List runs twice.
        steps = 4 if scanned else 8
        for amaxes, known in ((product.activation_amax, steps), (product.weight_amax, steps + 1)):
            assert amaxes.shape == (*stack, 16)
            assert np.all(np.count_nonzero(amaxes[...], axis=-1) == known)
    if recipe is STOCHASTIC:
        assert product.stream.count[...].tolist() == [4, 4]
        keys = jax.random.key_data(product.stream.key[...])
        assert np.any(keys[0] != keys[1])


def test_amaxes_of_stacked_layers_start_from_their_own_kernels():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.LinearGeneral(8, (2, 4), rngs=rngs)

    layers = fp8.convert(make(nnx.Rngs(0)), recipe="delayed")
    largest = jnp.max(jnp.abs(layers.kernel[...]), axis=(1, 2, 3))
    assert layers.dot_general.weight_amax.shape == (3, 16)
    ref.assert_same_bits(layers.dot_general.weight_amax[:, 0], largest)


def test_eval_is_for_jax_transforms_of_any_kind():
    """With frozen amaxes nothing is updated, so a function that is pure to JAX may run it."""
    x = samples((6, 32))
    layer = fp8.convert(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), recipe="delayed")
    layer(x)
    layer.eval()
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    ref.assert_same_bits(run(state, x), layer(x))


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
def test_micro_batches_in_a_scan(recipe):
    model = fp8.convert(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), recipe=recipe)
    graphdef, params, amaxes = nnx.split(model, nnx.Param, ...)
    xs = samples((3, 6, 32))

    def loss(params, amaxes, x):
        merged = nnx.merge(graphdef, params, amaxes, copy=True)
        return jnp.square(merged(x)).sum(), nnx.state(merged, fp8.ScalingVariable)

    def accumulate(carry, x):
        total, amaxes = carry
        gradient, amaxes = jax.grad(loss, has_aux=True)(params, amaxes, x)
        return (jax.tree.map(jnp.add, total, gradient), amaxes), None

    (total, amaxes), _ = jax.jit(
        lambda xs: jax.lax.scan(accumulate, (jax.tree.map(jnp.zeros_like, params), amaxes), xs)
    )(xs)
    gradient = nnx.jit(nnx.grad(lambda model, x: jnp.square(model(x)).sum()))
    each = [gradient(model, x) for x in xs]
    want = jax.tree.map(lambda *leaves: sum(leaves), *each)
    for one, other in zip(jax.tree.leaves(total), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    ref.assert_same_trees(amaxes, nnx.state(model, fp8.ScalingVariable))
    if recipe == "delayed":
        of_activations, of_weights = (
            amaxes["dot_general"][f"{name}_amax"][...] for name in ("activation", "weight")
        )
        ref.assert_same_bits(of_activations[:3], jnp.max(jnp.abs(xs), axis=(1, 2))[::-1])
        assert np.count_nonzero(of_weights == jnp.max(jnp.abs(model.kernel[...]))) == 4


@pytest.mark.parametrize("recipe", ["delayed", "static"])
def test_accumulation_in_the_optimizer(recipe):
    """The optimizer touches no amax, and donated buffers change nothing."""
    xs = jnp.asarray([1.0, 3.0, 0.5, 2.0])[:, None, None] * samples((4, 6, 32))
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    rule = optax.MultiSteps(rule, every_k_schedule=2)
    dynamic = nnx.Optimizer(mlp("rowwise"), rule, wrt=nnx.Param)

    def largest(x):
        return jnp.max(jnp.abs(x))

    def amaxes_of(model):
        return nnx.state(model, fp8.ScalingVariable)

    def train(donated):
        model = mlp(recipe)
        if recipe == "static":
            fp8.calibrate(model, xs[:1])
        optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
        assert_same_structure(
            nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(dynamic))
        )
        buffers = jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))
        start = jax.tree.map(np.array, amaxes_of(model))

        @functools.partial(nnx.jit, donate_argnums=donated)
        def step(model, optimizer, x):
            def loss(model):
                hidden = model.layers[1](model.layers[0](x))
                return jnp.square(model.layers[2](hidden) - 1).mean(), largest(hidden)

            (value, of_hidden), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
            kernels = [largest(model.layers[i].kernel[...]) for i in (0, 2)]
            before = jax.tree.leaves(amaxes_of(model))
            optimizer.update(model, gradients)
            after = jax.tree.leaves(amaxes_of(model))
            assert all(one is other for one, other in zip(before, after, strict=True))
            return value, {"activation": [largest(x), of_hidden], "weight": kernels}

        steps = [step(model, optimizer, x) for x in xs]
        assert all(buffer.is_deleted() == bool(donated) for buffer in buffers)
        return start, model, (steps, nnx.state(model), nnx.state(optimizer))

    start, model, results = train(donated=(0, 1))
    kept = train(donated=())[-1]
    for one, other in zip(*map(jax.tree.leaves, (results, kept)), strict=True):
        # Another program, of which XLA may round other sums.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    seen = [amaxes for _, amaxes in results[0]]
    kernels = [amaxes["weight"][0] for amaxes in seen]
    assert kernels[0] == kernels[1] != kernels[2] == kernels[3]
    for i in (0, 2):
        for name, amaxes in start["layers"][i]["dot_general"].items():
            before = amaxes[...].tolist()
            own = [float(one[name.removesuffix("_amax")][i // 2]) for one in reversed(seen)]
            want = [*own, *before][: len(before)] if recipe == "delayed" else before
            assert getattr(model.layers[i].dot_general, name)[...].tolist() == want


# --- Static scales --------------------------------------------------------------------------------


def test_calibrate():
    model = fp8.convert(Model(count=2, scanned=True), recipe="static")
    tokens = some_tokens()
    assert jnp.isnan(nnx.jit(loss_of)(model, tokens))  # In a program no one can know.
    forward = nnx.jit(lambda model, batch: model(batch))
    assert fp8.calibrate(model, [tokens, some_tokens(1)], forward) is model
    loss = nnx.jit(loss_of)(model, tokens)
    plain = nnx.jit(loss_of)(Model(count=2, scanned=True), tokens)
    assert loss != plain and abs(loss - plain) < 0.02 * plain
    product = model.blocks.mlp["up"].dot_general
    embedded = [jnp.max(jnp.abs(model.embed(batch))) for batch in (tokens, some_tokens(1))]
    assert product.activation_amax[0, 0] == max(embedded)
    assert product.activation_amax.shape == (2, 1) and product.weight_amax is None
    assert not product.calibrating


def test_calibrate_takes_the_largest_and_goes_on_from_there():
    model, x = mlp("static"), samples((6, 32))
    with pytest.raises(ValueError, match="static scale of the activation has not been calibrated"):
        model(x)
    largest = float(jnp.max(jnp.abs(x)))
    first = model.layers[0]
    fp8.calibrate(model, [x, 2 * x, 0.5 * x])
    assert first.dot_general.activation_amax[...].tolist() == [2 * largest]
    fp8.calibrate(model, iter([x]))
    assert first.dot_general.activation_amax[...].tolist() == [2 * largest]
    want = first(x) - first.bias[...]
    assert_product(want, "mk,kn->mn", x, first.kernel[...], amaxes=(2 * largest, None))
    model(8 * x)
    assert first.dot_general.activation_amax[...].tolist() == [2 * largest]


def test_a_calibration_that_fails_leaves_no_trace():
    model = mlp("static")

    def fail(model, batch):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        fp8.calibrate(model, [1], fail)
    assert not model.layers[0].dot_general.calibrating


# --- Errors ---------------------------------------------------------------------------------------


def refuses(error, message, *args, **options):
    with pytest.raises(error, match=message):
        fp8.convert(*args, **options)


def test_errors():
    model, none = transformer(), lambda path, layer: False
    refuses(ValueError, "unknown recipe 'rowise'; named ones are", model, recipe="rowise")
    refuses(ValueError, "unknown recipe 'no'", model, recipe=[("x", "no"), ("mlp", "rowwise")])
    refuses(ValueError, r"'\(' is no regular expression", model, recipe=[("(", None)])
    refuses(TypeError, "a rule is .pattern of paths, recipe or None.", model, recipe=["mlp"])
    refuses(TypeError, "recipe must be a name or a Recipe, got int", model, recipe=8)
    refuses(ValueError, "no layer was picked.*blocks/0/attention/key", model, where=none)
    refuses(ValueError, "no layer was picked", model, recipe=[("no such", "rowwise")])
    refuses(ValueError, "are: none", nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    refuses(ValueError, "and needs rngs", model, recipe=STOCHASTIC)
    assert recipes_of(model) == {}


def test_products_of_the_users_own():
    def product(*args, **options):
        return jax.lax.dot_general(*args, **options)

    rngs = nnx.Rngs(0)
    for own in (
        nnx.Linear(4, 4, dot_general=product, rngs=rngs),
        nnx.LinearGeneral(4, 4, dot_general_cls=lambda: product, rngs=rngs),
    ):
        model = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs), b=own)
        refuses(ValueError, "nnx.convert: b has a product of its own", model)
        assert recipes_of(model) == {}
        assert set(recipes_of(fp8.convert(model, lambda path, layer: path == ("a",)))) == {"a"}


def test_calibrate_errors():
    with pytest.raises(ValueError, match="the model has no static scales"):
        fp8.calibrate(mlp("rowwise"), [samples((6, 32))])
    with pytest.raises(ValueError, match="there were no batches"):
        fp8.calibrate(mlp("static"), [])
