"""quantize's kernels at sizes where one way of running ends and the next begins.

Small arrays are held to numpy in test_quantize_values.py; here the definition in plain JAX, which
is held to numpy there too, is fast enough to say what comes out of large ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import pair_id

import jax_fp8

pytestmark = pytest.mark.gpu

bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def heavy(seed, shape, dtype):
    """Values whose amax is different in any row or block and never at the same place."""
    return (jax.random.normal(jax.random.key(seed), shape) ** 3).astype(dtype)


@functools.partial(jax.jit, static_argnames=("granularity", "dtype"))
def compare(x, scale, granularity, dtype):
    """How many codes, scales and amaxes differ from the definition."""
    got, want = (
        jax_fp8.quantize(
            x,
            dtype=dtype,
            granularity=granularity,
            scale=scale,
            return_amax=True,
            implementation=implementation,
        )
        for implementation in ("kernel", "xla")
    )
    # Without NaN, a value has one code.
    codes = jnp.sum(bits(got[0].data) != bits(want[0].data))
    scales = jnp.sum(got[0].scale != want[0].scale)
    return codes, scales, jnp.sum(got[1] != want[1]), jnp.isfinite(want[0].scale).all()


def check(x, granularity, dtype=ref.E4M3, scale=None):
    codes, scales, amaxes, finite = compare(x, scale, granularity, dtype)
    assert (int(codes), int(scales), int(amaxes)) == (0, 0, 0)
    assert bool(finite)


# --- Rows -----------------------------------------------------------------------------------------

# Up to 128 columns a row is a strip, up to 1024 a warp's; then 2, 4 and 8 packs a thread; beyond
# 32768 values of 16 bits it takes several thread blocks, and beyond 262144 a second read.
COLUMNS = (1, 9, 120, 128, 129, 136, 512, 520, 1024, 1025, 1032, 4096, 4097, 4104)
LONG_COLUMNS = (8200, 16384, 16392, 32768, 32776, 65544, 131080, 262144, 262152, 300_001)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_lengths_of_rows(columns, wide):
    x = heavy(0, (37, columns), wide)
    check(x, "row")
    check(x, "row", scale=jnp.full((37, 1), 0.01, jnp.float32))


# Few rows are spread over more of the device than many are.
@pytest.mark.parametrize("rows", [3, 140])
@pytest.mark.parametrize("columns", LONG_COLUMNS)
@pytest.mark.parametrize("wide", [ref.BF16, ref.F32], ids=pair_id)
def test_long_rows(rows, columns, wide):
    check(heavy(1, (rows, columns), wide), "row", ref.E5M2)


def test_a_row_has_the_scale_of_its_own_largest_value_wherever_it_is():
    columns = 40_008
    places = jnp.arange(0, columns, 41)
    x = jnp.where(jnp.arange(columns) == places[:, None], 448.0, 1.0).astype(jnp.bfloat16)
    got = jax_fp8.quantize(x, granularity="row")
    assert bool((got.scale == 1).all())
    assert bool((got.data.astype(jnp.bfloat16) == x).all())


# --- Tensors --------------------------------------------------------------------------------------


# One thread block, clusters of them, and beyond 262144 values of 16 bits the whole device.
@pytest.mark.parametrize(
    "size", [1, 1024, 4097, 16384, 16392, 65536, 262144, 262152, 262147, 1_000_000]
)
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_sizes_of_tensors(size, wide):
    x = heavy(2, (size,), wide)
    check(x, "tensor")
    check(x, "tensor", scale=jnp.full((1,), 0.01, jnp.float32))


def wave(wide):
    """Values that the device reads at once: 16 bytes for each of 512 threads of every SM."""
    return jax.devices()[0].core_count * 512 * (16 // wide.itemsize)


# What a thread holds in registers, then in shared memory, and what it reads twice. The sizes are
# those of GPUs with as much shared memory as data-center ones have; on others they are sizes.
@pytest.mark.parametrize("steps", [7, 19, 20, 21, 22, 23, 24, 44, 46, 48, 49, 50, 51, 52, 54, 80])
@pytest.mark.parametrize("wide", [ref.BF16, ref.F32], ids=pair_id)
def test_a_tensor_on_and_beyond_the_chip(steps, wide):
    step = 16 // wide.itemsize
    for size in (steps * wave(wide) - step, steps * wave(wide), steps * wave(wide) + step):
        check(heavy(3, (size,), wide), "tensor")


def test_a_large_tensor_of_odd_size():
    check(heavy(4, (8_000_001,), ref.BF16), "tensor")
    check(heavy(4, (8_000_001,), ref.F32), "tensor", ref.E5M2)


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4], ids=lambda part: f"{part}/4")
@pytest.mark.parametrize("size", [60_000, 300_000, 9_000_000, 60_000_000])
def test_the_largest_value_is_found_wherever_it_is(size, where):
    place = min(size * where // 4, size - 1)
    x = jnp.ones(size, jnp.bfloat16).at[place].set(-448.0)
    got, amax = jax_fp8.quantize(x, return_amax=True)
    assert float(got.scale[0]) == 1 and float(amax[0]) == 448
    assert bool((got.data.astype(jnp.bfloat16) == x).all())
    for value in (np.nan, -np.inf):
        got = jax_fp8.quantize(x.at[place].set(value))
        assert bool(jnp.isnan(got.scale).all() & jnp.isnan(got.data.astype(jnp.float32)).all())


@pytest.mark.parametrize("size", [1000, 65_536, 262_152, 3_000_000, 3_000_001])
@pytest.mark.parametrize("count", [2, 33])
def test_a_batch_of_tensors(size, count):
    x = heavy(5, (count, size), ref.BF16) * 2.0 ** jnp.arange(count)[:, None]
    x = x.astype(jnp.bfloat16)

    @jax.jit
    def differences(x):
        got, want = (
            jax.vmap(
                lambda x, name=name: jax_fp8.quantize(x, return_amax=True, implementation=name)
            )(x)
            for name in ("kernel", "xla")
        )
        return [
            jnp.sum(bits(got[0].data) != bits(want[0].data)),
            jnp.sum(got[0].scale != want[0].scale),
            jnp.sum(got[1] != want[1]),
            got[0].scale,
        ]

    *counts, scale = differences(x)
    assert [int(count) for count in counts] == [0, 0, 0]
    assert len(np.unique(scale)) == count


def test_one_chain_many_times_gives_the_same_bits():
    # Launches that wait for all of their thread blocks, one behind the other and side by side.
    xs = [heavy(seed, (size,), ref.BF16) for seed, size in enumerate((300_000, 5_000_000) * 4)]
    run = jax.jit(lambda xs: [jax_fp8.quantize(x, return_amax=True) for x in xs])
    want = jax.device_get(run(xs))
    for _ in range(50):
        for got, first in zip(jax.tree.leaves(run(xs)), jax.tree.leaves(want), strict=True):
            ref.assert_same_bits(got, first)


# --- More than 2^31 elements ----------------------------------------------------------------------

ROWS, PERIOD = 987_001, 113  # Rows of 17 blocks; a period fits into every 128 of them.
CODES = np.sort(ref.finite_codes(ref.E4M3).astype(np.float32))[7 : 7 + PERIOD]


@pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)
def test_more_than_2_to_the_31_elements(granularity):
    shape = (ROWS, 17 * 128)
    assert ROWS * 17 * 128 > 2**31
    table = CODES.copy()  # Values that E4M3 has, none of them the largest.
    if granularity != "tensor":
        table[50] = 448.0  # In every row and block, so that all scales are one.

    @jax.jit
    def fill():
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) * np.uint32(shape[1])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
        x = jnp.asarray(table, jnp.bfloat16)[index % PERIOD]
        return x.at[-1, -1].set(448.0)  # The last is the largest.

    x = fill()
    got = jax_fp8.quantize(x, granularity=granularity)
    assert bool((got.scale == 1).all())
    assert bool(jax.jit(lambda data, x: (data.astype(jnp.bfloat16) == x).all())(got.data, x))
