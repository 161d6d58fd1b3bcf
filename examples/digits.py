"""Handwritten digits, recognized in float32 and in FP8.

Trains a small Flax network in float32 on the 1,797 images that scikit-learn ships. Then runs its
dense layers through `jax_fp8.matmul` with each of the named recipes, and shows what FP8 changed.
Last, trains the same network in FP8.

    python examples/digits.py [--epochs 30] [--seed 0] [--out digits.png]
"""

import argparse
import pathlib
import sys
from itertools import pairwise

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import jax_fp8.nnx

# Recipes, with the granularity of the weights: what shares a scale.
RECIPES = {"tensorwise": "tensor", "rowwise": "row", "blockwise": (128, 128)}
TRAINED_WITH = "rowwise"


class Network(nnx.Module):
    def __init__(self, rngs):
        sizes = pairwise((64, 256, 256, 10))
        self.layers = nnx.List(nnx.Linear(k, n, rngs=rngs) for k, n in sizes)

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


# --- The same network in FP8: this is all there is to it ------------------------------------------


def quantize_weights(network, granularity):
    """FP8 weights and float32 biases. Flax keeps kernels as (K, N); FP8 products want (N, K)."""
    return [
        (jax_fp8.quantize(layer.kernel[...].T, granularity=granularity), layer.bias[...])
        for layer in network.layers
    ]


def forward_fp8(weights, x, recipe):
    for i, (w, bias) in enumerate(weights):
        activation = "relu" if i < len(weights) - 1 else None
        x = jax_fp8.matmul(x, w, bias=bias, activation=activation, recipe=recipe)
    return x


# --- Training -------------------------------------------------------------------------------------


@nnx.jit
def train_step(network, optimizer, x, y):
    def loss_of(network):
        return optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return loss


def train(x, y, epochs, seed, recipe=None, batch=64):
    network = Network(nnx.Rngs(seed))
    if recipe is not None:  # All that it takes to train in FP8.
        network = jax_fp8.nnx.convert(network, recipe=recipe)
    optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for _ in (bar := tqdm(range(epochs), desc=f"training in {recipe or 'float32'}", unit="epoch")):
        order = rng.permutation(len(x))[: len(x) // batch * batch].reshape(-1, batch)
        losses = [train_step(network, optimizer, x[i], y[i]) for i in order]
        bar.set_postfix(loss=f"{np.mean(losses):.4f}")
    return network


# --- Results --------------------------------------------------------------------------------------


def what_ran():
    """The implementations of the products, from the library's own account."""
    products = [plan for plan in jax_fp8.plans() if plan["operation"] == "scaled_matmul"]
    # Handlers report as they run. What is left to XLA is known from tracing, for every platform.
    ran = [plan for plan in products if plan["when"] == "run"] or products
    return ", ".join(sorted({f"{plan['implementation']} on {plan['platform']}" for plan in ran}))


def compare(name, logits, reference, labels, weights, ran):
    """One row of the table: what FP8 changed."""
    logits, error = np.asarray(logits), np.asarray(logits) - reference
    return {
        "name": name,
        "logits": logits,
        "accuracy": np.mean(logits.argmax(-1) == labels),
        "agreement": np.mean(logits.argmax(-1) == reference.argmax(-1)),
        "max": np.abs(error).max(),
        "rms": np.sqrt(np.mean(error**2)),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        "ran": ran,
    }


def print_table(rows):
    line = "{:<11}{:>9}{:>13}{:>11}{:>11}{:>11}   {}"
    print("\n" + " " * 33 + "error of the logits")
    print(line.format("", "accuracy", "same as f32", "max", "RMS", "weights", "ran as"))
    for row in rows:
        numbers = [f"{row['agreement']:.2%}", f"{row['max']:.4f}", f"{row['rms']:.4f}"]
        numbers = numbers if row is not rows[0] else [""] * 3
        numbers = [f"{row['accuracy']:.2%}", *numbers, f"{row['bytes'] / 1024:.1f} KiB"]
        print(line.format(row["name"], *numbers, row["ran"]))


def draw(path, images, labels, rows):
    """Images with predictions, disagreements first and then the closest calls; logit errors."""
    reference, *fp8 = rows
    expected = reference["logits"].argmax(-1)
    predicted = np.stack([row["logits"].argmax(-1) for row in fp8])
    differs = (predicted != expected).any(0)
    runner_up, best = np.sort(reference["logits"])[:, -2:].T
    order = np.lexsort((best - runner_up, ~differs))[:24]

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    title = f"{differs.sum()} of {len(labels)} test images: FP8 and float32 differ (red: "
    title += "/".join(row["name"] for row in fp8) + ")\nThe rest: closest calls (orange: all wrong)"
    left.suptitle(title, fontsize=10.5)
    for axes, i in zip(left.subplots(4, 6).flat, order, strict=True):
        axes.imshow(images[i], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        answers = "/".join(map(str, predicted[:, i] if differs[i] else predicted[:1, i]))
        wrong = expected[i] != labels[i]
        color = "tab:red" if differs[i] else "tab:orange" if wrong else "0.25"
        axes.set_title(f"is {labels[i]}, f32 {expected[i]}, FP8 {answers}", color=color, size=8.5)
        axes.spines[:].set(color=color, linewidth=3 if differs[i] or wrong else 0.5)

    right.suptitle("Error of the logits, FP8 - float32", fontsize=10.5)
    errors = [row["logits"] - reference["logits"] for row in fp8]
    bins = np.linspace(-1, 1, 81) * max(np.quantile(np.abs(e), 0.999) for e in errors)
    panels = right.subplots(len(fp8), 1, sharex=True, sharey=True)
    for i, (axes, row, error) in enumerate(zip(panels, fp8, errors, strict=True)):
        axes.hist(error.ravel(), bins=bins, color=f"C{i}")
        text = f"{row['name']}: RMS {row['rms']:.4f}, accuracy {row['accuracy']:.2%}"
        axes.set_title(f"{text} (float32 {reference['accuracy']:.2%})", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"error (the logits' own deviation is {reference['logits'].std():.1f})")
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and batches")
    parser.add_argument("--out", type=pathlib.Path, default="digits.png", help="the picture")
    options = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    order = np.random.default_rng(options.seed).permutation(len(x))
    training, test = np.split(order, [len(x) * 4 // 5])
    print(f"{len(training)} training and {len(test)} test images, 8 x 8 pixels")
    network = train(x[training], y[training], options.epochs, options.seed)

    with jax.default_matmul_precision("float32"):  # On a GPU the default is TF32.
        reference = np.asarray(nnx.jit(Network.__call__)(network, x[test]))
    wide = [layer.kernel[...] for layer in network.layers]
    rows = [compare("float32", reference, reference, y[test], wide, "XLA")]
    forward = jax.jit(forward_fp8, static_argnames="recipe")
    for recipe, granularity in RECIPES.items():
        weights = quantize_weights(network, granularity)  # Once, ahead of time.
        jax_fp8.clear_plans()
        logits = forward(weights, x[test], recipe).block_until_ready()
        narrow = [w for w, _ in weights]
        rows.append(compare(recipe, logits, reference, y[test], narrow, what_ran()))

    print_table(rows)
    trained = train(x[training], y[training], options.epochs, options.seed, TRAINED_WITH)
    accuracy = np.mean(nnx.jit(Network.__call__)(trained, x[test]).argmax(-1) == y[test])
    print(f"\ntrained in FP8, {TRAINED_WITH}: accuracy {accuracy:.2%}")
    device = logits.device
    print(f"\ndevice: {device.device_kind} ({device}); `jax-fp8 info` says more")
    if device.platform == "cpu":
        print("A CPU has no FP8 units: XLA multiplied the same FP8 values in float32, which shows")
        print("what FP8 does to the results. What it does for speed, this command shows on a GPU.")
    draw(options.out, x[test].reshape(-1, 8, 8), y[test], rows)
    print(f"picture: {options.out}")

    if device.platform == "gpu":
        sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
        import benchmarks.gemm

        print("\nSpeed, on this GPU:")
        print(benchmarks.gemm.table(benchmarks.gemm.run(shapes="quick")))
    return rows


if __name__ == "__main__":
    main()
