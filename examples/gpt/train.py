"""Trains the GPT in bf16 or with a recipe, and measures it."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import jax_fp8.nnx
from benchmarks import hlo, timing
from gpt import data, peer, recipes
from gpt.model import GPT, Block, Config

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and for how long.

    Attributes:
      config: the model.
      batch: sequences of a step.
      steps: of the optimizer.
      rate: the peak of the learning rate.
      validated: sequences of the validation, each time.
      validations: how often, spread evenly; the last is behind the last step.
      seed: of the weights and of the batches.
      report: steps between two looks at the device, which runs ahead of the host meanwhile.
      compiler: options of XLA's.
      devices: that share the batch; each has all of the model.
    """

    config: Config = Config()
    batch: int = 16
    steps: int = 1000
    rate: float = 6e-4
    validated: int = 256
    validations: int = 5
    seed: int = 0
    report: int = 20
    compiler: dict[str, Any] = dataclasses.field(default_factory=dict)
    devices: int = 1


#: 100m and wide are for a GPU; wide is to be timed, and need not learn much.
PRESETS = {
    "100m": Training(),
    "wide": Training(
        Config(width=4096, hidden=11008, heads=32, layers=2, unroll=2),
        batch=32,
        steps=60,
        rate=1e-4,
        validated=64,
        validations=1,
        report=10,
    ),
    "tiny": Training(
        Config(width=64, hidden=128, heads=2, layers=2, length=64),
        batch=8,
        steps=40,
        rate=3e-3,
        validated=16,
        validations=2,
        report=10,
        compiler={"xla_backend_optimization_level": 0},  # A CPU compiles longer than it runs.
    ),
}


# --- The model and its optimizer ------------------------------------------------------------------


def build(training: Training, recipe: str) -> GPT:
    """The model of a seed; the same weights for every recipe."""
    model = nnx.jit(lambda: GPT(training.config, nnx.Rngs(training.seed)))()
    return recipes.convert(model, recipe)


def optimizer_of(training: Training, model: GPT) -> nnx.Optimizer:
    """AdamW with warmup, cosine decay to a tenth and clipped gradients; norms do not decay."""
    warmup = max(1, training.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, training.rate, warmup, training.steps, 0.1 * training.rate
    )

    def decays(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), parameters
        )

    rule = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=decays),
    )
    return nnx.Optimizer(model, rule, wrt=nnx.Param)


def loss_of(model: GPT, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of each next byte, in nats; tokens are (batch, length + 1)."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def windows(corpus: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """The sequences that start there: int32 (batch, length + 1)."""
    cut = jax.vmap(lambda start: lax.dynamic_slice(corpus, (start,), (length + 1,)))
    return cut(starts).astype(jnp.int32)


def train_step(model: GPT, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step, which changes the model and the optimizer; the loss before it."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


# --- A run ----------------------------------------------------------------------------------------


class Run:
    """A model in training, compiled for its devices, with the corpus on each."""

    def __init__(self, training: Training, recipe: str, corpus: data.Corpus) -> None:
        self.training, self.recipe = training, recipe
        self.losses: list[float] = []
        self.seconds: list[float] = []
        batch, length = training.batch, training.config.length
        axis_types = (AxisType.Auto,)
        devices = jax.devices()[: training.devices]
        self._mesh = jax.make_mesh((training.devices,), ("data",), axis_types, devices=devices)
        self._corpus = self._on_all(jnp.asarray(corpus.training))
        self._held_out = self._on_all(jnp.asarray(corpus.validation))
        size = len(corpus.training)
        starts = data.starts(size, training.steps, batch, length, training.seed)
        self._starts = self._on_all(jnp.asarray(starts))
        grid = data.grid(len(corpus.validation), length, training.validated)
        count = max(1, len(grid) // batch)  # Of whole batches, which are all compiled alike.
        self._grid = self._on_all(jnp.asarray(grid[: count * batch]).reshape(count, -1))
        calibrations = 1 + training.steps // recipes.CALIBRATED_EVERY
        ahead = data.starts(size, calibrations, batch, length, training.seed + 1)
        self._ahead = iter(self._on_all(jnp.asarray(ahead)))

        model = build(training, recipe)
        self._graph, state = nnx.split((model, optimizer_of(training, model)))
        self._state = self._on_all(state)
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        start = time.perf_counter()
        self._step = self._compiled_step()
        self.compile_s = time.perf_counter() - start
        self._calibrate, self._evaluate = self._calibration(), self._evaluation()

    def _on_all(self, tree: Any) -> Any:
        """Puts arrays on every device."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def _stays_on_all(self, tree: Any) -> Any:
        """Says in a program that arrays are on every device."""
        return lax.with_sharding_constraint(tree, NamedSharding(self._mesh, PartitionSpec()))

    def _windows(self, corpus: jax.Array, starts: jax.Array) -> jax.Array:
        """The batch, of which each device has its part."""
        tokens = windows(corpus, starts, self.training.config.length)
        # Not device_put, which inside of a program leaves the layout to XLA.
        divided = NamedSharding(self._mesh, PartitionSpec("data"))
        return lax.with_sharding_constraint(tokens, divided)

    def _compiled_step(self) -> Any:
        step_of = functools.partial(peer.train_step, loss_of)
        step_of = step_of if self.recipe == recipes.FLAX else train_step

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, corpus: jax.Array, starts: jax.Array, i: jax.Array) -> Any:
            model, optimizer = nnx.merge(self._graph, state)
            loss = step_of(model, optimizer, self._windows(corpus, starts[i]))
            return self._stays_on_all((nnx.state((model, optimizer)), loss))

        lowered = step.lower(self._state, self._corpus, self._starts, jnp.int32(0))
        return lowered.compile(self.training.compiler)

    def _calibration(self) -> Any:
        @functools.partial(jax.jit, donate_argnums=0, compiler_options=self.training.compiler)
        def calibrate(state: Any, corpus: jax.Array, starts: jax.Array) -> Any:
            model, optimizer = nnx.merge(self._graph, state)
            jax_fp8.nnx.calibrate(model, [self._windows(corpus, starts)[:, :-1]])
            return self._stays_on_all(nnx.state((model, optimizer)))

        return calibrate

    def _evaluation(self) -> Any:
        @functools.partial(jax.jit, compiler_options=self.training.compiler)
        def evaluate(state: Any, corpus: jax.Array, starts: jax.Array) -> jax.Array:
            model, _ = nnx.merge(self._graph, state)
            model.eval()  # Delayed scales are taken as they are.
            return self._stays_on_all(loss_of(model, self._windows(corpus, starts)))

        return evaluate

    def advance(self, steps: int) -> None:
        """Trains on, and notes the losses and how long it took."""
        losses: list[jax.Array] = []
        lost, start = 0.0, time.perf_counter()
        for i in range(len(self.losses), len(self.losses) + steps):
            if recipes.is_calibrated(self.recipe) and i % recipes.CALIBRATED_EVERY == 0:
                lost += self._take_amaxes(losses)
            self._state, loss = self._step(self._state, self._corpus, self._starts, np.int32(i))
            losses.append(loss)
        self.losses += np.asarray(jnp.stack(losses)).tolist()
        self.seconds.append((time.perf_counter() - start - lost) / steps)

    def _take_amaxes(self, losses: list[jax.Array]) -> float:
        """Calibrates on a batch that is not trained on; how long that took."""
        jax.block_until_ready(losses)
        start = time.perf_counter()
        self._state = self._calibrate(self._state, self._corpus, next(self._ahead))
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def validate(self) -> float:
        """The loss on what is held out."""
        losses = [self._evaluate(self._state, self._held_out, starts) for starts in self._grid]
        return float(jnp.stack(losses).mean())

    @property
    def step_ms(self) -> float:
        """The median over all but the first steps, in which kernels are chosen and loaded."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)

    @property
    def text(self) -> str:
        """Of the compiled step."""
        return str(self._step.as_text())

    @property
    def megabytes(self) -> float:
        """That a device needs for a step, the state included."""
        memory = self._step.memory_analysis()
        return 1e-6 * (memory.argument_size_in_bytes + memory.temp_size_in_bytes)

    def facts(self) -> Row:
        """Of the compiled step."""
        memory = self._step.memory_analysis()
        return {
            "parameters": self.parameters,
            "multiplied": hlo.products(self.text),
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            "compile_s": round(self.compile_s, 1),
        }


def train(training: Training, recipe: str, corpus: data.Corpus, alone: bool = True) -> Row:
    """Trains from the seed.

    Args:
      training: the problem.
      recipe: of ``recipes.NAMES``.
      corpus: what it learns.
      alone: whether its dense layers are timed alone too, where there is a GPU.

    Returns:
      ``losses`` (the mean over each ``report`` steps), ``validation_losses`` with the
      ``validated_at`` steps, ``training_loss`` (the mean of the last tenth) and
      ``validation_loss`` (the last), ``step_ms``, ``dense_ms`` (the layers that are FP8, alone),
      and what ``Run.facts`` states.
    """
    with tqdm(total=training.steps, desc=recipe, unit="step", mininterval=1.0) as bar:
        bar.set_postfix_str("compiling")
        run = Run(training, recipe, corpus)
        count = training.validations
        at = sorted({max(1, training.steps * (i + 1) // count) for i in range(count)})
        validations = []
        while (done := len(run.losses)) < training.steps:
            stop = min([done + training.report, *(step for step in at if step > done)])
            run.advance(stop - done)
            bar.update(stop - done)
            if stop in at:
                validations.append(run.validate())
            said = f"loss {np.mean(run.losses[done:stop]):.3f}"
            bar.set_postfix_str(f"{said}, held out {validations[-1]:.3f}" if validations else said)
    each = training.report
    last = run.losses[-max(1, training.steps // 10) :]
    return {
        "step_ms": run.step_ms,
        "dense_ms": dense_ms(training, recipe) if alone and timing.on_gpu() else None,
        "training_loss": float(np.mean(last)),
        "validation_loss": validations[-1],
        "validated_at": at,
        "validation_losses": validations,
        "losses": [
            round(float(np.mean(run.losses[i : i + each])), 5)
            for i in range(0, training.steps, each)
        ],
        **run.facts(),
    }


def time_steps(training: Training, recipe: str, corpus: data.Corpus, steps: int = 60) -> float:
    """The milliseconds of a step, from a few."""
    run = Run(training, recipe, corpus)
    for _ in range(max(2, steps // training.report)):
        run.advance(training.report)
    return run.step_ms


# --- The dense layers alone -----------------------------------------------------------------------


def dense_share(training: Training) -> float:
    """The share of the operations of all products that is the layers' that a recipe converts."""
    config = training.config
    dense = 2 * config.layers * sum(k * n for k, n in config.weights.values())
    head = 2 * config.width * config.vocabulary
    # Of a causal attention, half; two products.
    attention = config.layers * 4 * config.length * config.width / 2
    return dense / (dense + head + attention)


def dense_ms(training: Training, recipe: str, repeats: int = 10) -> float:
    """Milliseconds of values and gradients of all dense layers of a step, each layer alone."""
    config, total = training.config, 0.0
    block = recipes.convert(nnx.jit(lambda: Block(config, nnx.Rngs(0)))(), recipe)
    tokens = training.batch * config.length
    for name, (k, n) in config.weights.items():
        x, dy = (
            jax.random.normal(jax.random.key(i), (tokens, size), config.dtype)
            for i, size in enumerate((k, n))
        )
        layer, wrt = getattr(block, name), recipes.differentiated(recipe)
        if recipes.is_calibrated(recipe):
            jax_fp8.nnx.calibrate(layer, [x])
        graph, parameters, rest = nnx.split(layer, wrt, ...)

        def call(parameters: Any, rest: Any, x: jax.Array, dy: jax.Array, graph=graph) -> Any:
            def forward(parameters: Any, x: jax.Array) -> jax.Array:
                return nnx.merge(graph, parameters, rest, copy=True)(x)

            y, pull = jax.vjp(forward, parameters, x)
            return y, pull(dy)

        jitted = jax.jit(call)
        operands = (parameters, rest, x, dy)
        for _ in range(3):
            jax.block_until_ready(jitted(*operands))
        start = time.perf_counter()
        for _ in range(repeats):
            result = jitted(*operands)
        jax.block_until_ready(result)
        total += 1e3 * (time.perf_counter() - start) / repeats
    return config.layers * total
