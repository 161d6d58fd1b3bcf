"""The MLP of a Llama over all the devices there are: tensor and data parallel, in bf16 and in FP8.

Runs unchanged on one GPU, on several, and on several hosts:

    python examples/parallel.py
    python examples/parallel.py --model 4 --train       # 4 devices share a model, the rest data
    python examples/parallel.py --coordinator HOST:1234 --processes 2 --process 0  # elsewhere 1

The gate and up projections are divided by columns and the down projection by rows, so that one sum
over devices is all that an MLP costs in communication. With --fsdp the weights are divided over the
data axis too, and gathered for each product: in FP8. With --serve the weights are in FP8 from the
start, else they are quantized in the step. Shows the time, the memory of a device, what its program
moves between devices, and how far FP8 is from bf16.
"""

import argparse
import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_fp8

#: Width of the stream, of the inside of the MLP, and rows for each data part.
SIZES = {"70b": (8192, 28672, 4096), "8b": (4096, 14336, 4096), "tiny": (256, 512, 64)}
#: That are trained at once, one behind the other.
LAYERS = 2
ROUNDS, CALLS = 5, 10
COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


def mlp(weights, x, recipe):
    """``down(silu(gate(x)) * up(x))``; x (rows, width), weights (in, out) as Flax keeps them."""

    def dense(x, w):
        if isinstance(w, jax_fp8.ScaledArray):
            return jax_fp8.matmul(x, w, recipe=recipe)
        return jax_fp8.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe)

    hidden = jax.nn.silu(dense(x, weights["gate"])) * dense(x, weights["up"])
    return dense(hidden, weights["down"])


def gradients(weights, x, recipe):
    """Of a loss, in the weights of layers in a row, (layers, in, out)."""

    def loss(weights):
        def layer(x, weights):
            return x + mlp(weights, x, recipe), None

        return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).mean()

    return jax.grad(loss)(weights)


def operations(size, rows, train=False):
    """Of all products, in both passes where weights are trained."""
    width, hidden, _ = SIZES[size]
    return 6 * rows * width * hidden * (3 * LAYERS if train else 1)


def placed(mesh, fsdp=False, train=False):
    """Name -> how that weight, and its gradient, lies."""
    data, layers = "data" if fsdp else None, (None,) * train
    columns = NamedSharding(mesh, PartitionSpec(*layers, data, "model"))
    rows = NamedSharding(mesh, PartitionSpec(*layers, "model", data))
    return {"gate": columns, "up": columns, "down": rows}


def make(mesh, size, rows=None, **how):
    """Weights and activations of a size, each device's part made where it is; rows are of all."""
    width, hidden, each = SIZES[size]
    layers = (LAYERS,) * how.get("train", False)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3), strict=True))
    rows = rows or each * mesh.shape["data"]

    def weights():
        return {
            name: shape[0] ** -0.5 * jax.random.normal(keys[name], (*layers, *shape), jnp.bfloat16)
            for name, shape in shapes.items()
        }

    def activations():
        return jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)

    x = jax.jit(activations, out_shardings=NamedSharding(mesh, PartitionSpec("data")))()
    return jax.jit(weights, out_shardings=placed(mesh, **how))(), x


@functools.partial(jax.jit, static_argnames="recipe")
def narrow(weights, recipe):
    """The weights in FP8, (out, in), divided as they are."""
    granularity = jax_fp8.named_recipe(recipe).weight.granularity
    return {name: jax_fp8.quantize(w.T, granularity=granularity) for name, w in weights.items()}


def moved(text):
    """Collective and dtype -> MB of what they give on one device, in a compiled program."""
    sizes = {"f8e4m3fn": 1, "f8e5m2": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
    found = {}
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if not match:
            continue
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
        # Of the pair that a start gives, operands and results, the last half are the results; but
        # that of a sum gives the results alone.
        if match.group(3) and match.group(2) != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        for dtype, shape in arrays:
            key = f"{match.group(2)} {dtype}"
            count = int(np.prod([int(n) for n in shape.split(",") if n]))
            found[key] = found.get(key, 0) + 1e-6 * count * sizes.get(dtype, 4)
    return found


def measure(function, *operands, out_shardings=None):
    """(milliseconds, what it moves, MB of a device, the result)."""
    jitted = jax.jit(function, out_shardings=out_shardings)
    compiled = jitted.lower(*operands).compile()
    result = jax.block_until_ready(compiled(*operands))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = compiled(*operands)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / CALLS)
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return 1e3 * statistics.median(times), moved(compiled.as_text()), 1e-6 * used, result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, help="of the MLP; 70b on GPUs")
    add("--model", type=int, help="devices that share a model; all of them")
    add("--recipe", default="rowwise")
    add("--train", action="store_true", help="the gradients of two layers' weights, not values")
    add("--serve", action="store_true", help="weights that are in FP8 already")
    add("--fsdp", action="store_true", help="divide the weights over the data axis too")
    add("--coordinator", metavar="HOST:PORT")
    add("--processes", type=int)
    add("--process", type=int)
    arguments = parser.parse_args(argv)
    if arguments.coordinator:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    count = jax.device_count()
    model = arguments.model or count
    if count % model:
        parser.error(f"--model {model} does not divide the {count} devices")
    if arguments.serve and arguments.train:
        parser.error("weights that are in FP8 are not trained")
    on_gpu = jax.default_backend() == "gpu"
    size = arguments.size or ("70b" if on_gpu else "tiny")
    mesh = jax.make_mesh(
        (count // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    how = {"fsdp": arguments.fsdp, "train": arguments.train}
    weights, x = make(mesh, size, **how)
    step = gradients if arguments.train else mlp
    flop = operations(size, x.shape[0], arguments.train)
    reported, reference = {}, None
    for recipe in ("wide", arguments.recipe):
        if arguments.serve and recipe != "wide":
            weights = narrow(weights, recipe)
        ms, traffic, used, result = measure(
            lambda weights, x, recipe=recipe: step(weights, x, recipe),
            *(weights, x),
            out_shardings=placed(mesh, **how) if arguments.train else None,
        )
        reference = result if reference is None else reference
        error = max(jax.tree.leaves(jax.tree.map(distance, result, reference)))
        name = "bf16" if recipe == "wide" else recipe
        reported[name] = {"ms": ms, "moved": traffic, "mb": used, "error": float(error)}
        if jax.process_index() == 0:
            said = ", ".join(f"{what} {mb:.3g} MB" for what, mb in sorted(traffic.items()))
            print(
                f"{name:10} {ms:8.3f} ms {1e-9 * flop / ms:7.1f} TFLOP/s on {dict(mesh.shape)};"
                f" {used:.0f} MB a device; off by {error:.1e}; moves {said or 'nothing'}"
            )
    return reported


@jax.jit
def distance(one, other):
    """RMS of the difference over RMS."""
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.linalg.norm(one - other) / jnp.linalg.norm(other)


if __name__ == "__main__":
    main()
