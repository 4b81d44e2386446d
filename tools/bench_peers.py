"""Times a distillation step of this project and of its peers, in turn, as ratios.

    python tools/bench_peers.py bit|mobilenet_v3|lite [--batch 8] [--cores 2] [--rounds 10]
                                [--xla-flags FLAGS]

Each peer that is installed (PyTorch with timm; Keras on JAX) runs in a process of its own on the
same cores, with the same pair of networks, batch and float32: the teacher's forward pass, the
student's forward and backward pass, KL at a temperature, clipping and AdamW. Ours draws and renders
the views of teacher and student as well; the peers are given theirs. `--xla-flags` times our step
once more with these flags of XLA. Prints one JSON line: median seconds of a step, and the ratio to
ours of the same round, with its quartiles.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CLASSES = 102
TEMPERATURE = 2.0
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 1e-4, 1.0
WARM_STEPS = 2


class Pair(NamedTuple):
    """A teacher and a student as each library calls them; Keras has no EfficientNet-Lite."""

    ours: tuple[str, str]
    timm: tuple[str, str]
    keras: tuple[str, str] | None
    resolutions: tuple[int, int]


PAIRS = {
    "bit": Pair(
        ("bit_r101x1", "bit_r50x1"),
        ("resnetv2_101x1_bit", "resnetv2_50x1_bit"),
        ("ResNet101V2", "ResNet50V2"),  # BatchNorm, and no weight standardisation
        (128, 128),
    ),
    "mobilenet_v3": Pair(
        ("efficientnet_lite0", "mobilenet_v3_small"),
        ("tf_efficientnet_lite0", "tf_mobilenetv3_small_100"),
        None,
        (128, 96),
    ),
    "lite": Pair(
        ("efficientnet_lite0", "efficientnet_lite0"),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0"),
        None,
        (128, 128),
    ),
}
Step = Callable[[], Any]


def ours(pair: Pair, batch: int) -> Step:
    import jax
    from bench_step import random_batch

    from fm_distill.config import (
        CanvasConfig,
        Config,
        DataConfig,
        NetworkConfig,
        ObjectiveConfig,
        OptimizerConfig,
        ScheduleConfig,
        SplitConfig,
        StudentConfig,
        TeacherConfig,
    )
    from fm_distill.networks.branch import frozen_teachers
    from fm_distill.preparation.resolve import resolve_described
    from fm_distill.system.sharding import make_layout
    from fm_distill.train_step.program import make_program
    from fm_distill.training.build import build
    from fm_distill.views.draws import ViewRoot

    of_teacher, of_student = pair.resolutions
    network = NetworkConfig(model=pair.ours[0], resolution=of_teacher)
    config = Config(
        name="bench",
        batch_size=batch,
        precision="float32",
        data=DataConfig(
            source="images", train=SplitConfig(name="train"), canvas=CanvasConfig(size=160)
        ),
        student=StudentConfig(model=pair.ours[1], resolution=of_student),
        teacher=TeacherConfig(network=network),
        objective=ObjectiveConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
        ),
        schedule=ScheduleConfig(total_steps=1000),
    )
    layout = make_layout(config.mesh)
    built = build(config, resolve_described(config, (network,), CLASSES, 1000, layout))
    key = jax.random.key(0)
    state = jax.jit(built.init, out_shardings=layout.variables(built.abstract_state))(key)
    weights = tuple(x.network.init(key) for x in built.live_teachers)
    frozen = frozen_teachers(built.live_teachers, weights, layout)
    program = make_program(built.train_step, built.abstract_state, frozen, None, layout)
    examples = jax.device_put(random_batch(config), layout.batch)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(program(state, frozen, None, examples, ViewRoot(key)))

    return step


def pytorch(pair: Pair, batch: int, channels_last: bool = False) -> Step:
    import timm
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    teacher, student = (
        timm.create_model(x, num_classes=CLASSES).to(memory_format=layout) for x in pair.timm
    )
    teacher.eval()
    student.train()
    seen = [torch.randn(batch, 3, x, x).to(memory_format=layout) for x in pair.resolutions]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        with torch.inference_mode():
            target = F.log_softmax(teacher(seen[0]) / TEMPERATURE, dim=1)
        optimizer.zero_grad(set_to_none=True)
        output = F.log_softmax(student(seen[1]) / TEMPERATURE, dim=1)
        loss = F.kl_div(output, target.clone(), reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimizer.step()

    return step


def pytorch_channels_last(pair: Pair, batch: int) -> Step:
    return pytorch(pair, batch, channels_last=True)


def keras_on_jax(pair: Pair, batch: int) -> Step:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras
    import numpy as np
    import optax

    teacher, student = (
        vars(keras.applications)[name](
            weights=None, classes=CLASSES, input_shape=(x, x, 3), classifier_activation=None
        )
        for name, x in zip(pair.keras or (), pair.resolutions, strict=True)
    )
    rng = np.random.default_rng(0)
    seen = [rng.normal(size=(batch, x, x, 3)).astype(np.float32) for x in pair.resolutions]
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    )
    values = [x.value for x in student.trainable_variables]
    others = [x.value for x in student.non_trainable_variables]
    frozen = [
        [x.value for x in y] for y in (teacher.trainable_variables, teacher.non_trainable_variables)
    ]

    @jax.jit
    def update(values: Any, others: Any, moments: Any, frozen: Any, images: Any) -> Any:
        target, _ = teacher.stateless_call(*frozen, images[0], training=False)
        target = jax.nn.log_softmax(target / TEMPERATURE)

        def loss(values: Any) -> Any:
            output, changed = student.stateless_call(values, others, images[1], training=True)
            output = jax.nn.log_softmax(output / TEMPERATURE)
            return (jax.numpy.exp(target) * (target - output)).sum(axis=1).mean(), changed

        gradients, changed = jax.grad(loss, has_aux=True)(values)
        updates, moments = optimizer.update(gradients, moments, values)
        return optax.apply_updates(values, updates), changed, moments

    state = values, others, optimizer.init(values)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(*state, frozen, seen))

    return step


# What makes a step, and the packages that it needs.
PEERS: dict[str, tuple[Callable[[Pair, int], Step], tuple[str, ...]]] = {
    "fm-distill": (ours, ()),
    "pytorch": (pytorch, ("torch", "timm")),
    "pytorch-channels-last": (pytorch_channels_last, ("torch", "timm")),
    "keras-on-jax": (keras_on_jax, ("keras",)),
}
OURS = "fm-distill"


def serve(peer: str, pair: Pair, batch: int) -> None:
    """A step for each line of the standard input, its seconds to the standard output."""
    step = PEERS[peer][0](pair, batch)
    for _ in range(WARM_STEPS):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


@contextlib.contextmanager
def started(peer: str, flags: str, own: list[str]) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, *own, "--serve", peer]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.terminate()


def ask(process: subprocess.Popen) -> float:
    assert process.stdin and process.stdout
    print(file=process.stdin)
    return float(process.stdout.readline())


def installed(peer: str, pair: Pair) -> bool:
    if peer == "keras-on-jax" and pair.keras is None:
        return False
    return all(importlib.util.find_spec(x) for x in PEERS[peer][1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--xla-flags", default="")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pair = PAIRS[arguments.pair]
    if arguments.serve:
        serve(arguments.serve, pair, arguments.batch)
        return 0
    # Inherited by all: as many threads for each as there are cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    peers = {name: (name, "") for name in PEERS if installed(name, pair)}
    if arguments.xla_flags:
        peers[f"{OURS} {arguments.xla_flags}"] = OURS, arguments.xla_flags
    times: dict[str, list[float]] = {name: [] for name in peers}
    own = [arguments.pair, "--batch", str(arguments.batch)]
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(started(peer, flags, own))
            for name, (peer, flags) in peers.items()
        }
        for name, process in running.items():
            assert process.stdout
            if process.stdout.readline().strip() != "ready":
                print(f"{name} did not start; its message is above", file=sys.stderr)
                return 1
        for _ in range(arguments.rounds):
            for name, process in running.items():
                times[name].append(ask(process))
    print(json.dumps(vars(arguments) | {"step_s": medians(times), "over_ours": ratios(times)}))
    return 0


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(x), 4) for name, x in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of the ratio to ours of the same round."""
    over = {
        name: [x / y for x, y in zip(found, times[OURS], strict=True)]
        for name, found in times.items()
        if name != OURS
    }
    return {name: [round(q, 3) for q in statistics.quantiles(x, n=4)] for name, x in over.items()}


if __name__ == "__main__":
    sys.exit(main())
