"""fused_matmul: its values against float64, what the kernels take, and what runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from around_cases import ALL, COMBINATIONS, EPS, expected, operands, quantized
from cases import on_gpu, scaled

import jax_fp8

pytestmark = pytest.mark.ends


@pytest.fixture
def implementation(quantizer):
    """Of fused_matmul: it has those of quantize."""
    return quantizer


@pytest.fixture(params=["weight_only", "rowwise"])
def recipe(request):
    return request.param


def oracle(x, w, around, recipe, implementation, eps=EPS, first=None):
    """As ``expected``, of what the recipe multiplies."""
    if recipe == "rowwise":
        multiplied = quantized(x, around.get("norm"), eps, implementation)
        # Between other operations XLA adds up a norm in another order.
        is_other = implementation == "xla" and "norm" in around
        return expected(x, w, multiplied=multiplied, is_other=is_other, **around)
    if first is None:  # In the one kernel of the GPU.
        first = ref.on_gpu() and implementation in (None, "kernel")
    return expected(x, w, first=first, eps=eps, **around)


def check(x, w, around, implementation, recipe="weight_only", first=None):
    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}
    got = jax_fp8.fused_matmul(x, w, **around, **options)
    assert got.dtype == x.dtype
    ref.assert_close(got, *oracle(x, w, around, recipe, implementation, first=first))
    return got


# --- Values ---------------------------------------------------------------------------------------


ROWS = {"weight_only": (1, 3, 4, 8), "rowwise": (1, 8, 9, 13)}


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_every_combination(implementation, recipe, rng, parts, granularity):
    # A CPU has one way for any number of rows.
    for m in ROWS[recipe] if ref.on_gpu() else ROWS[recipe][-1:]:
        check(*operands(rng, m, 300, 528, parts, granularity), implementation, recipe)


@pytest.mark.parametrize(
    "recipe, m",
    [
        *(("weight_only", m) for m in (1, 8)),
        *(("rowwise", m) for m in (2, 16)),
        *(pytest.param("weight_only", m, marks=pytest.mark.gpu) for m in range(2, 8)),
        *(pytest.param("rowwise", m, marks=pytest.mark.gpu) for m in (1, 5, 8, 9, 15)),
    ],
)
@pytest.mark.parametrize(
    "size", [(2, 16), (34, 144), (36, 1024), (6, 4096), *on_gpu((9000, 272), (1000, 5104))], ids=str
)
def test_every_end(implementation, rng, m, recipe, size):
    check(*operands(rng, m, *size, ALL), implementation, recipe)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "m, n, k", [(1, 6144, 4096), (1, 40, 24064), (4, 28672, 4096), (8, 4096, 5104)], ids=str
)
def test_the_sizes_of_models(rng, m, n, k):
    check(*operands(rng, m, n, k, ("norm", "swiglu")), "kernel")
    check(*operands(rng, m, n, k, ("residual",)), "kernel")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 6144, 4096),
        (16, 28672, 4096),
        (8, 4096, 14336),
        (16, 4096, 14336),
        (16, 136, 31744),
        (8, 70, 15376),
        (16, 9000, 9232),
        (8, 9000, 15376),
    ],
    ids=str,
)
def test_the_sizes_of_models_quantized(rng, m, n, k):
    """X that stays and X that comes in parts; tiles of one turn and of many."""
    for parts in (("norm", "swiglu"), ("residual",), ("swiglu", "bias", "residual")):
        check(*operands(rng, m, n, k, parts), "kernel", "rowwise")


def test_axes_of_rows(implementation, recipe, rng):
    x, w, around = operands(rng, 6, 40, 64, ALL)
    flat = check(x, w, around, implementation, recipe)
    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}
    for shape in ((2, 3), (6, 1), (1, 2, 3)):
        residual = around["residual"].reshape(*shape, 20)
        got = jax_fp8.fused_matmul(
            x.reshape(*shape, 64),
            w,
            **{**around, "residual": residual},
            **options,
        )
        ref.assert_same_bits(got, flat.reshape(*shape, 20))
    around["residual"] = around["residual"][0]
    one = jax_fp8.fused_matmul(x[0], w, **around, **options)
    ref.assert_same_bits(one, flat[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": ref.F16},
        {"w_dtype": ref.E5M2},
        {"granularity": (1, 128)},
        {"granularity": (128, 128)},
        {"m": 9},
        {"m": 17, "n": 36},
        {"k": 104},
        {"m": 8, "k": 8192},
    ],
    ids=str,
)
def test_what_the_one_kernel_does_not_take(rng, recipe, changed):
    given = {"m": 3, "n": 40, "k": 256, "parts": ALL, **changed}
    x, w, around = operands(rng, **given)
    for implementation in ("xla", None):
        check(x, w, around, implementation, recipe, first=False)
    if recipe == "rowwise" and changed in ({"m": 9}, {"m": 8, "k": 8192}):
        return  # That one takes it.
    with pytest.raises(NotImplementedError, match="fused_matmul: implementation 'kernel' cannot"):
        jax_fp8.fused_matmul(x, w, **around, recipe=recipe, implementation="kernel")


def test_a_wide_norm_and_biases_of_every_type(implementation, recipe, rng):
    x, w, around = operands(rng, 3, 40, 256, ("norm",))
    for dtype in ref.WIDE:
        bias = jnp.asarray(rng.standard_normal(40), dtype)
        check(x, w, {"bias": bias}, implementation, recipe)
    around["norm"] = jnp.asarray(around["norm"], jnp.float32) * 1.001
    if implementation == "kernel":
        with pytest.raises(NotImplementedError, match="a bfloat16 norm, not float32"):
            jax_fp8.fused_matmul(x, w, **around, recipe=recipe, implementation="kernel")
    else:
        check(x, w, around, implementation, recipe, first=False)


@pytest.mark.parametrize("parts", [(), ("norm",), ("swiglu",), ALL], ids="+".join)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(implementation, recipe, rng, parts, value):
    x, w, around = operands(rng, 4, 40, 256, parts)
    # No weight is 0 where the value is.
    w = scaled(w.data.at[:, 7].set(1), w.scale, "row")
    clean = check(x.at[2].set(1), w, around, implementation, recipe)
    x = x.at[2, 7].set(value)
    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}
    after = np.asarray(jax_fp8.fused_matmul(x, w, **around, **options))
    bad = after[2].astype(np.float64)
    # The gate of -inf is 0, and 0 times an infinity NaN: nothing becomes finite.
    assert not np.isfinite(bad).any()
    if "norm" in parts or recipe == "rowwise":  # Whose scale is NaN.
        assert np.isnan(bad).all()
    ref.assert_same_bits(np.delete(after, 2, 0), np.delete(np.asarray(clean), 2, 0))


def test_a_sum_of_squares_that_overflows_is_nan(implementation, recipe, rng):
    x, w, around = operands(rng, 2, 40, 256, ("norm",))
    x = x.at[1].set(1e20)
    options = {"recipe": recipe, "implementation": implementation}
    got = np.asarray(jax_fp8.fused_matmul(x, w, **around, **options))
    assert np.isfinite(got[0].astype(np.float32)).all() and np.isnan(got[1]).all()


def test_a_nan_of_the_other_operands(implementation, recipe, rng):
    x, w, around = operands(rng, 3, 40, 256, ALL)
    for name, index, (rows, columns) in (
        ("residual", (1, 5), ([1], [5])),
        ("bias", 24, (range(3), [4])),
        ("norm", 9, (range(3), range(20))),
    ):
        changed = {**around, name: around[name].at[index].set(jnp.nan)}
        options = {"recipe": recipe, "implementation": implementation}
        got = jax_fp8.fused_matmul(x, w, **changed, **options)
        want = np.zeros((3, 20), bool)
        want[np.ix_(rows, columns)] = True
        np.testing.assert_array_equal(np.isnan(np.asarray(got)), want, err_msg=name)


def test_it_is_deterministic_under_jit_and_alone(implementation, recipe, rng):
    x, w, around = operands(rng, 8, 300, 1040, ALL)
    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}

    def run(x, w, around):
        return jax_fp8.fused_matmul(x, w, **around, activation="swiglu", **options)

    around.pop("activation")
    first = run(x, w, around)
    for _ in range(3):
        ref.assert_same_bits(jax.jit(run)(x, w, around), first)


def test_no_rows_and_no_columns(implementation, recipe, rng):
    x, w, around = operands(rng, 2, 40, 64, ("norm",))
    options = {"recipe": recipe, "implementation": implementation}
    assert jax_fp8.fused_matmul(x[:0], w, **around, **options).shape == (0, 40)
    none = scaled(w.data[:0], w.scale[:0], "row")
    assert jax_fp8.fused_matmul(x, none, **options).shape == (2, 0)


# --- Transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", ["x", "residual", "x residual", "w", "norm bias", "all"])
def test_vmap_is_a_loop(implementation, recipe, rng, batched):
    names = ("x", "w", "norm", "bias", "residual") if batched == "all" else batched.split()
    made = [operands(rng, 2, 40, 64, ALL) for _ in range(3)]
    entries = [{"x": x, "w": w, **around} for x, w, around in made]
    for entry in entries:
        entry.pop("activation")

    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}

    def run(given):
        return jax_fp8.fused_matmul(**given, activation="swiglu", **options)

    def choose(entry, name):
        return (entry if name in names else entries[0])[name]

    loop = jnp.stack([run({name: choose(e, name) for name in e}) for e in entries])
    stacked = {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(e[name] for e in entries))
        if name in names
        else entries[0][name]
        for name in entries[0]
    }
    axes = ({name: 0 if name in names else None for name in stacked},)
    got = jax.vmap(run, axes)(stacked)
    if implementation == "xla":  # XLA adds up in another order.
        got, loop = got.astype(jnp.float32), loop.astype(jnp.float32)
        atol = 2.0**-7 if recipe == "weight_only" else 2.0**-3
        np.testing.assert_allclose(got, loop, rtol=2.0**-7, atol=atol)
    else:
        ref.assert_same_bits(got, loop)


def test_vmap_of_more_rows_than_the_kernel_takes(implementation, recipe, rng):
    x, w, around = operands(rng, 2, 40, 64, ("norm", "bias"))
    many = jnp.stack([x + i for i in range(9)])
    options = {"eps": EPS, "recipe": recipe, "implementation": implementation}

    def run(x):
        return jax_fp8.fused_matmul(x, w, **around, **options)

    got = jax.vmap(run)(many)
    for x, one in zip(many, got, strict=True):
        first = ref.on_gpu() and implementation == "kernel"
        ref.assert_close(one, *oracle(x, w, around, recipe, implementation, first=first))


def test_it_cannot_be_differentiated(implementation, rng):
    x, w, _ = operands(rng, 2, 40, 64, ())

    def loss(x):
        return jax_fp8.fused_matmul(x, w, implementation=implementation).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="fused_matmul: it cannot be differentiated"):
        jax.grad(loss)(x)


# --- What runs ------------------------------------------------------------------------------------


def ran(*args, **options):
    jax_fp8.clear_plans()
    jax.block_until_ready(jax_fp8.fused_matmul(*args, **options))
    return {p["operation"]: p for p in jax_fp8.plans() if p["when"] == "run"}


@pytest.mark.gpu
def test_one_kernel_is_the_default(rng):
    x, w, around = operands(rng, 8, 40, 64, ALL)
    found = ran(x, w, **around)
    assert set(found) == {"fused_matmul"}
    assert found["fused_matmul"]["implementation"] == "gemv"
    assert found["fused_matmul"]["parts"] == "norm, product, bias, swiglu, residual"
    assert set(ran(*operands(rng, 9, 40, 64, ())[:2])) == {"scaled_matmul"}


@pytest.mark.gpu
def test_a_quantization_and_a_product_are_the_default(rng):
    x, w, around = operands(rng, 16, 40, 64, ALL)
    found = ran(x, w, **around, recipe="rowwise")
    assert set(found) == {"fused_matmul"}
    assert found["fused_matmul"]["implementation"] == "small_m"
    assert found["fused_matmul"]["parts"] == "norm, quantize, product, bias, swiglu, residual"
    found = ran(*operands(rng, 17, 40, 64, ())[:2], recipe="rowwise")
    assert set(found) == {"quantize", "scaled_matmul"}  # There are too few tiles.


@pytest.mark.gpu
def test_the_product_starts_after_its_operands(rng):
    """The program writes w and x right before, others each time; one call starts early, two not."""
    x, w, around = operands(rng, 16, 4096, 4096, ("norm", "residual"))

    def together(x, w):
        return jax_fp8.fused_matmul(x, w, **around, eps=EPS, recipe="rowwise")

    def apart(x, w):
        y = jax_fp8.scaled_matmul(quantized(x, around["norm"]), w, preferred_element_type=ref.F32)
        return (y + around["residual"].astype(ref.F32)).astype(x.dtype)

    def chain(function, x, shift):
        for _ in range(4):
            x = function(x / 8, scaled(jnp.roll(w.data, shift, axis=0), w.scale, "row"))
            shift = shift + 1 + (x[0, 0] > 0)
        return x

    captured = jax.jit(chain, static_argnums=0)
    for shift in [*range(8)] * 4:
        want = captured(apart, x, shift)
        ref.assert_same_bits(captured(together, x, shift), want)
    ref.assert_same_bits(chain(together, x, shift), want)


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [75, 80, 89, 100, 120])
def test_other_gpus_take_steps(rng, forced_capability, recipe, capability):
    x, w, around = operands(rng, 5, 40, 272, ALL)
    forced_capability(capability)
    assert ran(x, w, **around, recipe=recipe)["fused_matmul"]["implementation"] == "steps"
    check(x, w, around, None, recipe, first=False)
    if capability == 100 and recipe == "weight_only":  # It would run, but was never timed there.
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match="implementation 'kernel' cannot .*9.0"):
        jax.block_until_ready(jax_fp8.fused_matmul(x, w, recipe=recipe, implementation="kernel"))


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["w", "norm"])
@pytest.mark.parametrize("offset", [1, 8, 16])
def test_parts_of_larger_buffers(rng, recipe, offset, of):
    """What does not start at a multiple of 16 bytes goes in steps, unless XLA copies it."""
    x, w, around = operands(rng, 2, 40, 272, ALL)
    part = w.data if of == "w" else around["norm"]
    flat = jnp.concatenate([jnp.zeros(offset, part.dtype), part.reshape(-1)])

    @jax.jit
    def run(flat):
        found = flat[offset:].reshape(part.shape)
        changed = {} if of == "w" else {"norm": found}
        multiplied = scaled(found, w.scale, "row") if of == "w" else w
        given = {**around, **changed}
        return jax_fp8.fused_matmul(x, multiplied, **given, eps=EPS, recipe=recipe)

    jax_fp8.clear_plans()
    got = np.asarray(run(flat))
    found = {p["implementation"] for p in jax_fp8.plans() if p["operation"] == "fused_matmul"}
    at_once = {"gemv" if recipe == "weight_only" else "small_m"}
    assert found in (at_once, {"steps"})
    assert found == at_once or offset * part.dtype.itemsize % 16
    ref.assert_close(got, *oracle(x, w, around, recipe, None, first=found == {"gemv"}))
