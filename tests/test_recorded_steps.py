"""The first hundred steps from a recording in float32 are those of the live teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_accelerator_paths import matching

from fm_distill.config import LogConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from fm_distill.config.regime import regime_of
from fm_distill.data.resident import ResidentSteps
from fm_distill.data.splits import open_data
from fm_distill.networks.branch import step_views
from fm_distill.networks.loading import load_networks
from fm_distill.preparation.resolve import resolve
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.runs.state import init_state
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.loss import make_loss
from fm_distill.train_step.step import make_update
from fm_distill.train_step.teach import make_teach
from fm_distill.training.record import record
from fm_distill.training.setup import prepare

STEPS = 100


def remembering(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with the last gradient and update in its state."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.init(params), zeros, zeros

    def update(gradients, state, params):
        updates, inner = optimizer.update(gradients, state[0], params)
        return updates, (inner, gradients, updates)

    return optax.GradientTransformation(init, update)


def apart(one, other):
    """The norm of the difference of two trees, relative to that of the first."""
    return optax.global_norm(jax.tree.map(jnp.subtract, one, other)) / optax.global_norm(one)


@pytest.mark.slow
def test_the_first_hundred_steps_are_those_of_the_live_teacher(tmp_path):
    """In one program, each step from the state of the live teacher's student before it."""
    config = matching(
        tmp_path,
        MeshConfig(data=1),
        # Adam divides by what it saw: with the usual epsilon its first updates are signs, of
        # gradients of 1e-9 too.
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4, epsilon=1e-5),
        schedule=ScheduleConfig(total_steps=2 * STEPS, warmup_steps=0),
        log=LogConfig(evaluate_every_steps=0, tensorboard=False, final_evaluation=False),
    )
    folder = tmp_path / "recording"
    assert record(config, folder, Stop(), steps=(0, STEPS), dtype="float32").complete
    layout = make_layout(config.mesh)
    data, _ = open_data(config)
    networks = load_networks(config, tmp_path, data.train.classes, data.train.class_names)
    resolved = resolve(config, data.facts, networks.facts, layout)
    setup, _ = prepare(config, resolved, data, networks, layout, tmp_path)
    built, classes = setup.built, resolved.classes

    read = RecordingReader(open_recording(folder), STEPS).steps(0)
    steps = [next(read) for _ in range(STEPS)]
    recorded = jax.tree.map(lambda *x: np.concatenate(x), *steps)
    ids = setup.feed.ids(np.arange(STEPS))
    np.testing.assert_array_equal(recorded.examples, ids)

    optimizer = remembering(built.optimizer)
    update = make_update(make_loss(config, built.student, STEPS), optimizer)
    live = make_teach("teachers", built.teachers, classes, config.objective)
    replayed = make_teach("recording", (), classes, config.objective)
    law = regime_of(config).views
    key = setup.keys.draws

    @jax.jit
    def program(state, frozen, pixels, fed):
        def step(state, fed):
            batch = dataclasses.replace(pixels.at(fed.ids), recorded=fed.recorded)
            branches = built.student, built.teachers
            seen = step_views(law, config.views, *branches, batch, key, state.step)
            after, metrics = update(state, seen.student, live(frozen, batch, seen))
            other, others = update(state, seen.student, replayed((), batch, seen))
            loss = apart(metrics["loss"], others["loss"])
            _, *moved = (apart(*x) for x in zip(after.opt_state, other.opt_state, strict=True))
            return after, (loss, *moved, metrics["loss"])

        return jax.lax.scan(step, state, fed)

    state = init_state(setup.keys.init, built.student.network, optimizer, None)
    fed = ResidentSteps(jnp.asarray(ids), recorded.rows)
    _, (*found, losses) = program(state, setup.teachers.frozen, setup.feed.data, fed)
    # Below, a KL in float32 is the difference of larger numbers, and less exact than 1e-6 itself.
    assert 0.3 < losses[-1] < losses[0] and np.isfinite(losses).all()
    for name, difference in zip(("loss", "gradient", "update"), found, strict=True):
        assert np.max(difference) < 1e-6, name
