"""Two GPUs of one host, from one process."""

import jax
import pytest
import references as ref
from cases import codes

import jax_fp8


@pytest.mark.multigpu
def test_equal_gpus_agree(rng):
    """One compiled program for each, from one process, in turn and at once."""
    devices = jax.devices("cuda")[:2]
    if len({device.device_kind for device in devices}) > 1:
        pytest.skip("the GPUs differ")
    x, w = codes(rng, (300, 1024)), codes(rng, (512, 1024), granularity="row")

    @jax.jit
    def multiply(x, w):
        return jax_fp8.quantize(jax_fp8.scaled_matmul(x, w), granularity="row")

    for _ in range(3):
        results = [multiply(*jax.device_put((x, w), device)) for device in devices]
        for result, device in zip(results, devices, strict=True):
            assert result.data.devices() == {device}
        ref.assert_same_trees(*results)
