"""The update against float64 NumPy, decay included; the schedule at its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from fm_distill.config import OptimizerConfig, ScheduleConfig
from fm_distill.config.steps import total_steps
from fm_distill.train_step.optim import (
    OPTIMIZERS,
    cosine,
    decay_equivalent,
    kernel_mask,
    make_optimizer,
    make_schedule,
)

TOTAL, WARMUP = 12, 4


def numpy_schedule(t, total=TOTAL, warmup=WARMUP):
    if t < warmup:
        return t / warmup
    return 0.5 * (1 + np.cos(np.pi * (t - warmup) / max(total - 1 - warmup, 1)))


def numpy_run(params, gradients, config):
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, config.clip_norm / norm)
        for k in params:
            g = gradient[k] * scale
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
            mean, var = m[k] / (1 - config.beta1 ** (t + 1)), v[k] / (1 - config.beta2 ** (t + 1))
            direction = mean / (np.sqrt(var) + config.epsilon)
            decay = config.weight_decay * params[k] if k == "kernel" else 0.0
            rate = config.learning_rate
            if config.decay == "released":
                change = rate * direction + decay
            else:
                change = rate * (direction + decay)
            params[k] = params[k] - numpy_schedule(t) * change
    return params


@pytest.mark.parametrize("decay", ["released", "adamw"])
@pytest.mark.parametrize("size", [0.01, 10.0])  # below and above the clip
def test_update_against_numpy(decay, size):
    config = OptimizerConfig(learning_rate=0.02, weight_decay=0.1, decay=decay)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}
    gradients = [
        {k: size * rng.standard_normal(v.shape) for k, v in params.items()} for _ in range(TOTAL)
    ]
    optimizer = make_optimizer(config, cosine(TOTAL, WARMUP))
    ours = jax.tree.map(jnp.float32, params)
    state = optimizer.init(ours)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    expected = numpy_run(dict(params), gradients, config)
    for k in params:
        np.testing.assert_allclose(ours[k], expected[k], rtol=1e-4, atol=1e-5)


def test_released_decay_at_the_peak_is_not_multiplied_by_the_learning_rate():
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=1e-3)
    optimizer = make_optimizer(config, lambda step: jnp.float32(1.0))
    params = {"conv": {"kernel": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], -1e-3, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


@pytest.mark.parametrize(("total", "warmup"), [(12, 4), (100, 0), (1000, 999), (1, 0), (2, 1)])
def test_schedule_is_zero_on_the_last_step_that_runs_and_never_outside_0_to_1(total, warmup):
    values = np.array([cosine(total, warmup)(t) for t in range(total)])
    assert (values >= 0).all() and (values <= 1).all() and np.isfinite(values).all()
    if warmup:
        assert values[0] == 0.0
    if total > warmup + 1:
        assert values[-1] < 1e-6 and values[warmup] == 1.0
    expected = [numpy_schedule(t, total, warmup) for t in range(total)]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_schedule_against_numpy():
    found = [float(cosine(TOTAL, WARMUP)(t)) for t in range(TOTAL)]
    np.testing.assert_allclose(found, [numpy_schedule(t) for t in range(TOTAL)], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_on_a_parabola(name):
    config = OptimizerConfig(name=name, learning_rate=0.1)
    optimizer = make_optimizer(config, cosine(100, 5))
    params = {"kernel": jnp.array([3.0, -2.0])}
    state = optimizer.init(params)
    for _ in range(100):
        gradient = jax.tree.map(lambda x: 2 * x, params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["kernel"]).max()) < 0.5


def test_first_moment_in_bfloat16():
    config = OptimizerConfig(learning_rate=0.1, first_moment_dtype="bfloat16")
    state = make_optimizer(config, cosine(10, 1)).init({"kernel": jnp.ones(3)})
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("float32")}


def test_only_kernels_decay():
    mask = kernel_mask({"head": {"kernel": 1, "bias": 1}, "norm": {"scale": 1}})
    assert mask == {"head": {"kernel": True, "bias": False}, "norm": {"scale": False}}


def test_equivalents_are_printed():
    released = OptimizerConfig(learning_rate=3e-3, weight_decay=3e-4)
    assert "equals 0.1 in plain AdamW" in decay_equivalent(released)
    adamw = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, decay="adamw")
    assert "equals 0.0003 in the released" in decay_equivalent(adamw)


@pytest.mark.parametrize("total", [500, 10_000, 20_000])
def test_bit_hyper_rule_against_its_source(total):
    warmup, *drops, end = {
        500: (100, 200, 300, 400, 500),
        10_000: (500, 3000, 6000, 9000, 10_000),
        20_000: (500, 6000, 12_000, 18_000, 20_000),
    }[total]

    def source(step):
        if step < warmup:
            return step / warmup
        rate = 1.0
        for drop in (*drops, end):
            if drop < step:
                rate /= 10
        return rate

    schedule = make_schedule(ScheduleConfig(shape="bit_hyper_rule"), total)
    steps = np.arange(total)
    np.testing.assert_allclose(schedule(jnp.asarray(steps)), [source(t) for t in steps], rtol=1e-6)


@pytest.mark.parametrize(
    ("examples", "steps"), [(1020, 500), (19_999, 500), (20_000, 10_000), (500_000, 20_000)]
)
def test_bit_hyper_rule_goes_by_the_number_of_examples(examples, steps):
    config = tiny_config(schedule=ScheduleConfig(shape="bit_hyper_rule"))
    assert total_steps(config, examples) == steps


def test_sgd_with_momentum_and_a_faster_head_against_numpy():
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, head_learning_rate=1.0, momentum=0.9, clip_norm=None
    )
    optimizer = make_optimizer(config, lambda step: jnp.float32(1.0))
    params = {"body": {"kernel": jnp.float32(2.0)}, "head": {"kernel": jnp.float32(3.0)}}
    state = optimizer.init(params)
    body, head, momentum = 2.0, 3.0, np.zeros(2)
    for gradient in (np.array([1.0, -2.0]), np.array([0.5, 100.0])):
        momentum = gradient + 0.9 * momentum
        body, head = body - 0.1 * momentum[0], head - 1.0 * momentum[1]
        updates, state = optimizer.update(
            {"body": {"kernel": gradient[0]}, "head": {"kernel": gradient[1]}}, state, params
        )
        params = optax.apply_updates(params, updates)
    assert float(params["body"]["kernel"]) == pytest.approx(body, rel=1e-6)
    assert float(params["head"]["kernel"]) == pytest.approx(head, rel=1e-6)
