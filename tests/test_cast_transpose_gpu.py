"""cast_transpose's kernels at sizes of many tiles, against the definition in plain JAX.

Small arrays are held to numpy in test_cast_transpose_values.py, and so is the definition.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from cases import pair_id

import jax_fp8

pytestmark = pytest.mark.gpu

bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
granularities = pytest.mark.parametrize("granularity", ref.GRANULARITIES, ids=pair_id)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def heavy(seed, shape, dtype):
    """Values whose amax is different in any row or block and never at the same place."""
    return (jax.random.normal(jax.random.key(seed), shape) ** 3).astype(dtype)


@functools.partial(jax.jit, static_argnames=("granularity", "dtype", "power_of_two"))
def compare(x, scale, key, granularity, dtype, power_of_two):
    """How many codes, scales and amaxes differ from the definition."""
    got, want = (
        jax_fp8.cast_transpose(
            x,
            dtype=dtype,
            granularity=granularity,
            scale=scale,
            key=key,
            power_of_two=power_of_two,
            return_amax=granularity == "tensor",
            implementation=implementation,
        )
        for implementation in ("kernel", "xla")
    )
    # Without NaN, a value has one code.
    counts = [
        jnp.sum(bits(one.data) != bits(other.data))
        for one, other in zip(got[:2], want[:2], strict=True)
    ]
    counts += [
        jnp.sum(one.scale != other.scale) for one, other in zip(got[:2], want[:2], strict=True)
    ]
    counts += [jnp.sum(one != other) for one, other in zip(got[2:], want[2:], strict=True)]
    return counts, jnp.isfinite(want[0].scale).all() & jnp.isfinite(want[1].scale).all()


def check(x, granularity, dtype=ref.E4M3, scale=None, key=None, power_of_two=False):
    counts, finite = compare(x, scale, key, granularity, dtype, power_of_two)
    assert [int(count) for count in counts] == [0] * len(counts)
    assert bool(finite)


# More tiles than run at once on an H100 or H200, 1.5 to 3.5 times as many: of dynamic scales some
# stay on the chip, others are read again; with rows and columns the first two are one launch.
MANY_TILES = [(3001, 4104), (4, 1000, 4104), (3, 1100, 5128), (7000, 4104)]
# Whole tiles; edges of tiles whose rows or columns, or neither, can be stored 16 bytes at once; one
# band of tiles and more, a band of each number of rows; a batch; hardly more than a line.
SHAPES = [
    (2048, 4096),
    (8192, 1024),
    (4104, 1544),
    (1000, 5003),
    (5003, 1000),
    (1030, 4100),
    (129, 8200),
    (8200, 129),
    (1537, 264),
    (5, 300, 520),
    (1, 70_001),
    (70_001, 1),
    *MANY_TILES,
]


@granularities
@pytest.mark.parametrize(
    "wide, shape",
    [(ref.BF16, shape) for shape in SHAPES]
    + [(wide, shape) for wide in (ref.F32, ref.F16) for shape in SHAPES[2:5]],
    ids=pair_id,
)
def test_shapes(wide, shape, granularity):
    x = heavy(0, shape, wide)
    check(x, granularity)
    check(x, granularity, ref.E5M2, power_of_two=True)
    if granularity == "tensor":
        check(x, granularity, scale=jnp.float32(0.01))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("straight", [True, False])
def test_one_launch_of_two_turns(straight, granularity):
    # 9 rows of tiles, in bands of two: a band of each matrix has tiles without rows.
    x = heavy(6, (3, 1100, 4104), ref.BF16)

    def cast(name):
        return jax_fp8.cast_transpose(
            x,
            granularity=granularity,
            straight=straight,
            power_of_two=True,
            implementation=name,
        )

    ref.assert_same_trees(cast("kernel"), cast("xla"))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_what_stays_on_the_chip_is_one_kernel(granularity):
    pytest.importorskip("tqdm")
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
    from benchmarks import profile

    tiles = 3 * jax.devices()[0].core_count  # Of which all run at once.
    x = heavy(7, (128 * tiles, 128), ref.BF16)
    cast = jax.jit(functools.partial(jax_fp8.cast_transpose, granularity=granularity))
    jax.block_until_ready(cast(x))
    found = profile.kernels(profile.profiled(lambda: cast(x)), 1)
    assert [(kernel["name"], kernel["calls"]) for kernel in found] == [("held_kernel", 1.0)]


@granularities
@pytest.mark.parametrize("shape", [(1000, 5003), (5, 300, 520)], ids=pair_id)
@pytest.mark.parametrize("wide", ref.WIDE, ids=pair_id)
def test_stochastic_rounding(shape, wide, granularity):
    for dtype in ref.FP8:
        check(heavy(1, shape, wide), granularity, dtype, key=jax.random.key(5))


@granularities
def test_a_batch_of_matrices(granularity):
    x = heavy(2, (33, 3, 140, 400), ref.BF16) * 2.0 ** jnp.arange(33)[:, None, None, None]
    x = x.astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(3), 33)

    def cast(name):
        return jax.vmap(
            lambda x, key: jax_fp8.cast_transpose(
                x, granularity=granularity, key=key, implementation=name
            )
        )

    got, want = jax.jit(cast("kernel"))(x, keys), jax.jit(cast("xla"))(x, keys)
    ref.assert_same_trees(got, want)


@granularities
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (1030, 2050), (2047, 4095)], ids=pair_id)
def test_what_is_not_finite_is_found_wherever_it_is(granularity, value, place):
    x = heavy(4, (2048, 4096), ref.BF16).at[place].set(value)

    def cast(name):
        return jax_fp8.cast_transpose(x, granularity=granularity, implementation=name)

    ref.assert_same_trees(cast("kernel"), cast("xla"))


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4], ids=lambda part: f"{part}/4")
@pytest.mark.parametrize(
    "shape", [(300, 200), (3000, 4000), (2000, 4001), (4096, 4096), (8192, 4096)], ids=pair_id
)
def test_the_largest_value_is_found_wherever_it_is(shape, where):
    size = shape[0] * shape[1]
    x = jnp.ones(size, jnp.bfloat16).at[min(size * where // 4, size - 1)].set(-448.0)
    x = x.reshape(shape)
    for scale in (None, 1.0):
        *layouts, amax = jax_fp8.cast_transpose(x, scale=scale, return_amax=True)
        assert float(amax[0, 0]) == 448
        for layout, values in zip(layouts, (x, x.T), strict=True):
            assert float(layout.scale[0, 0]) == 1
            assert bool((layout.data.astype(jnp.bfloat16) == values).all())


def test_one_chain_many_times_gives_the_same_bits():
    xs = [heavy(seed, (1000, 1000 + 8 * seed), ref.BF16) for seed in range(4)]
    xs.append(heavy(4, MANY_TILES[0], ref.BF16))

    @jax.jit
    def run(xs):
        return [
            jax_fp8.cast_transpose(x, granularity=granularity)
            for x in xs
            for granularity in ref.GRANULARITIES
        ]

    want = jax.device_get(run(xs))
    for _ in range(30):
        ref.assert_same_trees(run(xs), want)


# --- More than 2^31 elements ----------------------------------------------------------------------

ROWS, PERIOD = 987_001, 113  # Of 17 tiles; a period fits into every 128 of them.
CODES = np.sort(ref.finite_codes(ref.E4M3).astype(np.float32))[7 : 7 + PERIOD]


@granularities
def test_more_than_2_to_the_31_elements(granularity):
    shape = (ROWS, 17 * 128)
    assert ROWS * 17 * 128 > 2**31
    table = CODES.copy()  # Values that E4M3 has, none of them the largest.
    if granularity != "tensor":
        table[50] = 448.0  # In every row, column and block, so that all scales are one.

    @jax.jit
    def fill():
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) * np.uint32(shape[1])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
        x = jnp.asarray(table, jnp.bfloat16)[index % PERIOD]
        return x.at[-1, -1].set(448.0)  # The last is the largest.

    x = fill()
    straight, transposed = jax_fp8.cast_transpose(x, granularity=granularity)
    same = jax.jit(lambda data, x: (data.astype(jnp.bfloat16) == x).all())
    assert bool((straight.scale == 1).all()) and bool(same(straight.data, x))
    assert bool((transposed.scale == 1).all())
    turned = jax.jit(lambda data, x: (x == data.astype(jnp.bfloat16).T).all())
    assert bool(turned(transposed.data, x))
