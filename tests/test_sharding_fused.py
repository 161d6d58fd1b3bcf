"""The fused producers over meshes: the values of one device, and what docs/jax.md says moves."""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.ends

#: As functions of x, a residual, a weight and a bias, and how many of these go with x's last axis.
FUNCTIONS = """
def functions(**options):
    return {
        "rms_norm": (lambda x, r, w, b: jax_fp8.rms_norm_quantize(x, w, **options), 2),
        "rms_norm and residual": (
            lambda x, r, w, b: jax_fp8.rms_norm_quantize(x, w, residual=r, **options), 3
        ),
        "layer_norm": (lambda x, r, w, b: jax_fp8.layer_norm_quantize(x, w, b, **options), 3),
        "layer_norm and residual": (
            lambda x, r, w, b: jax_fp8.layer_norm_quantize(x, w, b, residual=r, **options), 4
        ),
        "swiglu": (lambda x, r, w, b: jax_fp8.swiglu_quantize(x, **options), 1),
        "gelu": (lambda x, r, w, b: jax_fp8.gelu_quantize(x, **options), 0),
    }

def padded(spec, length=3):
    return (*spec, *(None,) * length)[:length]
"""

DIVIDED = """
x, residual = rng.standard_normal((2, 8, 16, 1024)).astype(np.float32)
x[0, 0, 0] = 100.0  # The amax is on one device.
vectors = rng.standard_normal((2, 1024)).astype(np.float32)
PLACES = (
    P("a"), P(None, "b"), P("a", "b"), P(("a", "b")),
    P(None, None, "a"), P(None, "b", "a"), P("b", None, "a"), P(None, None, ("a", "b")),
)
# The definition in plain JAX takes long to compile, and divides as the kernel does.
places = PLACES if implementation else PLACES[2::3]
granularity = options.get("granularity", "tensor")
for name, (function, brought) in functions(implementation=implementation, **options).items():
    run = jax.jit(function)
    want = jax.tree.map(np.asarray, run(x, residual, *vectors))
    for spec in places:
        *others, last = padded(spec)
        if name != "gelu":  # The last axis is brought together, of all that have it.
            gathered, last = brought if last else 0, None
        else:
            gathered = 0
        # What of x is under one scale may be on several devices, each of which has an amax.
        shared = {"tensor": (*others, last), "row": (last,)}.get(granularity, ())
        amaxes = 1 if any(shared) and "scale" not in options else 0
        stated = {"all-gather f32": gathered, AMAX: amaxes}
        with jax.set_mesh(mesh):
            of_vectors = spec[2:]
            operands = (
                *(put(array, mesh, *spec) for array in (x, residual)),
                *(put(array, mesh, *of_vectors) for array in vectors),
            )
            found = counted(function, *operands)
            assert found == {k: n for k, n in stated.items() if n}, (name, spec, found)
            got = run(*operands)
            ref.assert_same_trees(got, want)
            of_scale = {
                "tensor": (None,) * 3, "row": (*others, None), (1, 128): (*others, last)
            }[granularity]
            lie = [padded(leaf.sharding.spec) for leaf in jax.tree.leaves(got)]
            assert lie[:2] == [(*others, last), of_scale], (name, spec, lie)
            assert lie[2:] == [(*others, last)] * len(lie[2:]), (name, spec, lie)
"""


@KINDS
@pytest.mark.parametrize("implementation", ["kernel", None])
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "tensor"},
        {"granularity": "row"},
        {"granularity": (1, 128)},
        {"scale": 0.05},
    ],
    ids=["tensor", "row", "block", "static"],
)
def test_what_moves(kind, implementation, options):
    check(f"{implementation = }\n{options = }\n" + FUNCTIONS + DIVIDED, kind)


@KINDS
def test_scales_of_parts(kind):
    """The largest of them is that of all, but for parts that are zero, whose own is 1."""
    check(
        FUNCTIONS
        + """
zero = np.zeros((16, 512), np.float32)
tiny, small, one, nan, inf = (zero.copy() for _ in range(5))
tiny[3, 5] = 1e-38  # The scale is 2^-126, and the data zero.
small[3, 5] = 0.25
one[3, 5], one[4] = 448.0, 1.0  # The scale is 1.
nan[3, 5], inf[3, 5] = np.nan, np.inf
weight = np.ones(512, np.float32)
for granularity in ("tensor", "row"):
    named = functions(granularity=granularity, implementation="kernel")
    for x in (zero, tiny, small, one, nan, inf):
        for name in ("gelu", "swiglu", "rms_norm and residual", "layer_norm"):
            function = jax.jit(named[name][0])
            x = x.astype(jnp.bfloat16)  # The sum with the residual is rounded.
            r = (x * 0.3).astype(jnp.bfloat16)
            want = jax.tree.map(np.asarray, function(x, r, weight, weight))
            for spec in (P("a", "b"), P(None, ("a", "b"))):
                with jax.set_mesh(mesh):
                    placed = put(x, mesh, *spec), put(r, mesh, *spec)
                    ref.assert_same_trees(function(*placed, weight, weight), want)
""",
        kind,
    )


@KINDS
def test_vmap(kind):
    """Entries that are on different devices have scales of their own."""
    check(
        FUNCTIONS
        + """
x = rng.standard_normal((4, 16, 256)).astype(np.float32)
x *= np.array([1, 30, 0.02, 5], np.float32)[:, None, None]
weights = rng.standard_normal((4, 256)).astype(np.float32)
for granularity in ("tensor", "row"):
    # Of the kernel: XLA's own values may be off by an ulp where it compiles another program.
    named = functions(granularity=granularity, implementation="kernel")
    cases = (
        ("layer_norm and residual", (0, 0, 0, None), weights, weights[0]),
        ("rms_norm", (0, 0, None, None), weights[0], weights[0]),
        ("swiglu", (0, 0, None, None), weights[0], weights[0]),
        ("gelu", (0, 0, None, None), weights[0], weights[0]),
    )
    for name, axes, *vectors in cases:
        function = jax.jit(jax.vmap(named[name][0], axes))
        want = jax.tree.map(np.asarray, function(x, x, *vectors))
        for spec in (P("a"), P(None, "b"), P("a", "b"), P("a", None, "b")):
            with jax.set_mesh(mesh):
                placed = [put(v, mesh, *spec[:1]) if v.ndim > 1 else v for v in vectors]
                operand = put(x, mesh, *spec)
                ref.assert_same_trees(function(operand, operand, *placed), want)
""",
        kind,
    )


@KINDS
def test_operands_that_lie_on_no_mesh(kind):
    check(
        FUNCTIONS
        + """
x = rng.standard_normal((16, 512)).astype(np.float32)
named = functions(granularity="row")
wants = {
    name: jax.tree.map(np.asarray, function(x, x, x[0], x[1]))
    for name, (function, _) in named.items()
}
with jax.set_mesh(mesh):
    for name, (function, _) in named.items():
        ref.assert_same_trees(jax.jit(function)(x, x, x[0], x[1]), wants[name])
        ref.assert_same_trees(function(x, x, x[0], x[1]), wants[name])
""",
        kind,
    )


@KINDS
def test_operands_that_lie_otherwise(kind):
    """A scale or a residual that does not lie as x does is brought there."""
    check(
        FUNCTIONS
        + """
x, residual = rng.standard_normal((2, 16, 512)).astype(np.float32)
weight = np.ones(512, np.float32)
scale = np.exp(rng.standard_normal((16, 1)) - 3).astype(np.float32)
def norm(x, residual, scale):
    return jax_fp8.rms_norm_quantize(
        x, weight, residual=residual, granularity="row", scale=scale, implementation="kernel"
    )

want = jax.tree.map(np.asarray, jax.jit(norm)(x, residual, scale))
for others in (("b", "b"), ("a", None), (("b", "a"), "a"), (None, ("a", "b"))):
    with jax.set_mesh(mesh):
        operands = put(x, mesh, "a"), *(
            put(array, mesh, axes) for array, axes in zip((residual, scale), others)
        )
        got = jax.jit(norm)(*operands)
        ref.assert_same_trees(got, want)
        if kind == AxisType.Explicit:
            assert {leaf.sharding.spec for leaf in jax.tree.leaves(got)} == {P("a", None)}
""",
        kind,
    )


@KINDS
def test_axes_that_do_not_come_out_even(kind):
    """Half blocks are brought together; rows that cannot be divided so are JAX's own error."""
    check(
        """
x = rng.standard_normal((12, 384)).astype(np.float32)
def gelu(x):
    return jax_fp8.gelu_quantize(x, granularity=(1, 128), implementation="kernel")

want = jax.tree.map(np.asarray, gelu(x))
with jax.set_mesh(mesh):
    operand = put(x, mesh, "b", "a")
    assert counted(gelu, operand) == {"all-gather f32": 1}
    ref.assert_same_trees(jax.jit(gelu)(operand), want)
    message = message_of(lambda: put(x, mesh, ("a", "b")))
    assert "Error: " in message and "partitioned 8 times" in message, message
    assert "evenly divide" in message, message
""",
        kind,
    )


def test_operands_on_two_meshes():
    check(
        """
other = jax.make_mesh((8,), ("c",), axis_types=(AxisType.Explicit,))
x, scale = np.ones((16, 512), np.float32), np.ones((16, 1), np.float32)
def gelu(x, scale):
    return jax_fp8.gelu_quantize(x, granularity="row", scale=scale)

for function in (gelu, jax.jit(gelu)):
    message = message_of(function, put(x, mesh, "a"), put(scale, other, "c"))
    assert message == (
        "ValueError: all operands must lie on one mesh, got float32[16@c,1] on {'c': 8} and others"
        " on {'a': 2, 'b': 4}"
    ), message
""",
        "Explicit",
    )
