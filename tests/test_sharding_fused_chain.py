"""fused_chain over meshes: in one call rows are divided, in separate calls all that can be."""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.ends

SCRIPT = """
from around_cases import EPS, operands
from jax_fp8 import Link

x, w, around = operands(rng, 8, 64, 64, ("residual",))
_, up, norm = operands(rng, 8, 256, 64, ("norm", "swiglu"))
_, down, _ = operands(rng, 8, 64, 128, ())
one_call = ONE_CALL

def run(x, residual, weights):
    o, up, down = weights
    links = [Link(o, residual=residual), Link(up, **norm, eps=EPS), Link(down, residual=0)]
    return jax_fp8.fused_chain(x, links, one_call=one_call)

whole = jax.jit(run)(x, around["residual"], (w, up, down))
want = [np.asarray(y).astype(np.float32) for y in whole]
for name, of_x, of_up, of_down, moved in CASES:
    with jax.set_mesh(mesh):
        def lies(w, data, scale=()):
            return jax_fp8.ScaledArray(
                put(w.data, mesh, *data), put(w.scale, mesh, *scale), w.granularity
            )
        weights = lies(w, ()), lies(up, of_up, of_up[:1]), lies(down, of_down)
        placed = put(x, mesh, *of_x), put(around["residual"], mesh, *of_x), weights
        assert counted(run, *placed) == moved, (name, counted(run, *placed))
        found = jax.jit(run)(*placed)
        for got, expected in zip(found, want):
            np.testing.assert_allclose(np.asarray(got).astype(np.float32), expected, 0.02, 0.1)
            assert (*got.sharding.spec, None)[:1] == (of_x or (None,))[:1], (name, got.sharding)
"""


@KINDS
def test_one_call(kind):
    cases = """[
    ("rows", ("a",), (), (), {}),
    ("weights", (), ("b",), (None, "b"), {"all-gather fp8": 2, "all-gather f32": 1}),
]"""
    check(SCRIPT.replace("CASES", cases).replace("ONE_CALL", "True"), kind)


@KINDS
def test_separate_calls(kind):
    """Of few rows the sums are brought together for a SwiGLU, and weights stay where they lie."""
    cases = """[
    ("rows", ("a",), (), (), {}),
    ("weights", (), ("b",), (None, "b"), {"all-gather f32": 1, "all-reduce f32": 1}),
]"""
    check(SCRIPT.replace("CASES", cases).replace("ONE_CALL", "False"), kind)
