"""fused_chain over meshes: in one call rows are divided, in separate calls all that can be."""

import pytest
from mesh_cases import KINDS, check

pytestmark = pytest.mark.ends

SCRIPT = """
from around_cases import EPS, operands
from jax_fp8 import ChainLink as Link

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


def test_a_decoder_whose_weights_are_divided():
    """Its products are separate calls, which multiply them where they lie."""
    pytest.importorskip("flax")
    check(
        """
import decoder_cases as cases
from flax import nnx
from jax_fp8 import decoder

model = decoder.random(decoder.read_config(cases.config("llama")), recipe="weight_only")
graph, state = nnx.split(model)
asked, run = [], jax_fp8.fused_chain
def chain(x, links, *, one_call, **options):
    asked.append(one_call)
    return run(x, links, one_call=one_call, **options)
jax_fp8.fused_chain = chain

def tokens_of(lies):
    asked.clear()
    model = nnx.merge(graph, jax.tree.map(lies, state))
    generator = decoder.Generator(model, positions=16)
    return [int(token[0]) for token in generator.stream([[3, 4, 5]], 3, eos=())]

def divided(x):
    is_weight = x.dtype == jnp.float8_e4m3fn and x.shape[0] % 2 == 0
    return put(x, mesh, *(("a",) if is_weight else ()))

for lies, one_call in ((lambda x: x, True), (lambda x: put(x, mesh), True), (np.asarray, True),
                       (divided, False)):
    tokens = tokens_of(lies)
    assert len(tokens) == 3 and min(tokens) >= 0 and set(asked) == {one_call}, (tokens, asked)
""",
        "Auto",
    )
