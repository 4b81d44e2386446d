"""Times the forms of a convolution against XLA's own, as ratios within one process.

    python tools/bench_convolutions.py [--rounds 10]

Prints one JSON line for each shape (batch, pixels a side, channels in, channels out, kernel,
stride): the median over rounds of the time of value and both gradients by XLA's convolution,
divided by that of the form that `fm_distill.models.convolutions` takes on this backend.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_distill.cli.command import guarded
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.models.convolutions import convolve

SHAPES = [
    (32, 2, 512, 512, 3, 1),
    (32, 4, 256, 512, 3, 2),
    (32, 4, 256, 256, 3, 1),
    (32, 8, 128, 128, 3, 1),
    (8, 8, 256, 256, 3, 1),
    (8, 16, 128, 128, 3, 1),
    (32, 4, 512, 2048, 1, 1),
    (32, 16, 64, 256, 1, 1),
]


def xla(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    around = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def compiled(form: Callable[..., Any], images: jax.Array, kernel: jax.Array, stride: int) -> Any:
    def value_and_gradients(images: jax.Array, kernel: jax.Array) -> Any:
        out, backward = jax.vjp(lambda x, k: form(x, k, stride), images, kernel)
        return out, backward(out)

    return jax.jit(value_and_gradients).lower(images, kernel).compile()


def main(own: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args(own).rounds
    for batch, side, inputs, outputs, size, stride in SHAPES:
        images = jax.random.normal(jax.random.key(0), (batch, side, side, inputs), jnp.float32)
        kernel = jax.random.normal(jax.random.key(1), (size, size, inputs, outputs), jnp.float32)
        forms = [compiled(form, images, kernel, stride) for form in (xla, convolve)]
        ratios = []
        for _ in range(rounds + 1):
            seconds = []
            for form in forms:
                start = time.perf_counter()
                jax.block_until_ready(form(images, kernel))
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        kept = ratios[1:]  # the first round allocates
        print(
            json.dumps(
                {
                    "shape": [batch, side, inputs, outputs, size, stride],
                    "device": jax.devices()[0].device_kind,
                    "xla_over_ours": round(statistics.median(kept), 2),
                    "min_max": [round(min(kept), 2), round(max(kept), 2)],
                }
            ),
            flush=True,
        )
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
