"""Properties of the whole step: same view, frozen teacher, same numbers on any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import NETWORK, logits_of, resolved_run, tiny_config, train_step_of

from fm_distill.config import MemoryConfig, MeshConfig, ObjectiveConfig, ViewConfig, with_options
from fm_distill.data.batch import Batch
from fm_distill.data.resident import Resident, ResidentSteps
from fm_distill.errors import UserError
from fm_distill.models import Network, Output, Variables
from fm_distill.networks.branch import Branch, freeze_on_devices
from fm_distill.objectives.distances import kl_divergence
from fm_distill.objectives.terms import Targets
from fm_distill.runs.state import TrainState, init_state
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.program import make_program
from fm_distill.train_step.step import make_update
from fm_distill.training.build import build
from fm_distill.views.draws import ViewRoot, draw
from fm_distill.views.rendering import InputSpec, render

KEY = jax.random.key(7)
DRAWS = ViewRoot(KEY)


def random_batch(count=16, side=24, classes=10) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, 256, (count, side, side, 3), np.uint8),
        rng.integers(side // 2, side + 1, (count, 2)).astype(np.int32),
        rng.integers(0, classes, count).astype(np.int32),
    )


def matching_config(**changes):
    return tiny_config(objective=ObjectiveConfig(temperature=2.0), views=ViewConfig(), **changes)


def with_random_head(variables: Variables, seed=0) -> Variables:
    """The head starts at zero; most properties need one that is not."""
    head = variables.params["head"]
    kernel = jax.random.normal(jax.random.key(seed), head["kernel"].shape)
    return Variables(variables.params | {"head": head | {"kernel": kernel}}, variables.statistics)


def gradients_of(config, state, branches, frozen, batch, memory=MemoryConfig()):
    """The step's gradient, by an optimizer that returns it as the new parameters."""
    keep = optax.GradientTransformation(
        lambda params: (), lambda g, s, params: (jax.tree.map(jnp.subtract, g, params), s)
    )
    student, teachers = branches
    step = train_step_of(student, teachers, keep, config.views, config.objective, 8, memory=memory)
    state = dataclasses.replace(state, opt_state=())
    new, metrics = jax.jit(step)(state, frozen, batch, DRAWS)
    return new.student.params, metrics


def test_student_equal_to_teacher_has_no_loss_and_no_gradient():
    config = matching_config()
    layout = make_layout(MeshConfig(data=1))
    built = build(config, resolved_run(config, (NETWORK,), layout))
    state = built.init(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    frozen = (built.teachers[0].network.freeze(state.student),)
    branches = built.student, built.teachers
    gradients, metrics = gradients_of(config, state, branches, frozen, random_batch())
    assert abs(metrics["loss"]) < 1e-6 and metrics["agreement"] == 1.0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) < 1e-5
    # The same with another teacher is no zero: the check above can fail.
    other = (built.teachers[0].network.freeze(with_random_head(state.student, 1)),)
    gradients, metrics = gradients_of(config, state, branches, other, random_batch())
    assert metrics["loss"] > 0.1
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-2


def pooled_network(classes=5) -> Network:
    """Means over a 4 x 4 grid, then a dense layer: what it says of a linear image does not depend
    on the resolution, but on box, flip and mixture it does."""

    def apply(variables, images, *, train, features=()):
        n, r, _, c = images.shape
        grid = images.reshape(n, 4, r // 4, 4, r // 4, c).mean(axis=(2, 4))
        logits = grid.reshape(n, -1) @ variables.params["kernel"]
        return Output(logits, {}, variables.statistics)

    def init(key):
        return Variables({"kernel": 3 * jax.random.normal(key, (48, classes))}, {})

    def apply_frozen(frozen, images, *, features=()):
        return apply(frozen, images, train=False, features=features)

    return Network(classes, init, apply, lambda variables: variables, apply_frozen)


def ramps(count=16, side=64) -> Batch:
    """Images whose values are linear in the place, each with slopes of its own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    slopes = rng.integers(-2, 3, (count, 2, 3)) / 2
    values = slopes[:, 0, None, None] * y[..., None] + slopes[:, 1, None, None] * x[..., None]
    canvases = np.round(values + 127).clip(0, 255).astype(np.uint8)
    assert np.abs(canvases - values - 127).max() <= 0.5
    return Batch(canvases, np.full((count, 2), side, np.int32), np.zeros(count, np.int32))


def test_both_see_the_same_region_flip_and_mixture_at_different_resolutions():
    network = pooled_network()
    # Crops of more pixels than the resolution, so that no sample is clamped to the edge.
    config = matching_config()
    config = dataclasses.replace(config, views=ViewConfig(crop_area=(0.6, 1.0)))
    student = Branch(network, InputSpec(16, "minus_one_one"))
    teacher = Branch(network, InputSpec(32, "minus_one_one"))
    variables = network.init(jax.random.key(0))
    state = TrainState(jnp.int32(0), variables, (), None)
    for step in range(3):
        state = dataclasses.replace(state, step=jnp.int32(step))
        gradients, metrics = gradients_of(
            config, state, (student, (teacher,)), (variables,), ramps()
        )
        # uint8 rounds the ramps by up to half a grey level.
        assert abs(metrics["loss"]) < 2e-4 and metrics["agreement"] == 1.0
        assert float(jnp.abs(gradients["kernel"]).max()) < 2e-2
    # A teacher that sees another draw is no zero by far.
    canvases, sizes = jnp.asarray(ramps().canvases), jnp.full((16, 2), 64)
    logits = []
    for seed, branch in ((7, teacher), (8, student)):
        images = render(
            draw(jax.random.key(seed), sizes, config.views), canvases, branch.input_spec
        )
        logits.append(logits_of(network, variables, images))
    assert kl_divergence(*logits, 2.0).mean() > 0.05


def test_two_networks_with_the_same_picture_share_one_rendering():
    def products(teacher):
        config = matching_config()
        built = build(config, resolved_run(config, (teacher,)))
        state = built.abstract_state
        frozen = (jax.eval_shape(built.teachers[0].network.freeze, state.student),)
        text = str(jax.make_jaxpr(built.train_step)(state, frozen, random_batch(), DRAWS))
        return text.count("Precision.HIGHEST")

    batch, input_spec = random_batch(), InputSpec(16, "minus_one_one")
    drawn = draw(KEY, jnp.asarray(batch.sizes), ViewConfig())
    text = str(jax.make_jaxpr(lambda x: render(drawn, x, input_spec))(batch.canvases))
    a_rendering = text.count("Precision.HIGHEST")
    same = products(NETWORK)
    other = products(dataclasses.replace(NETWORK, resolution=20))
    assert a_rendering > 0 and other == same + a_rendering


def run_steps(layout, config, resident: bool, dispatches, batches: Batch, norm="group"):
    """State and metrics after the steps, with the program that `train` runs."""
    config = dataclasses.replace(config, student=with_options(config.student, {"norm": norm}))
    built = build(config, resolved_run(config, (NETWORK,), layout))
    teacher = with_random_head(build_teacher(built))
    frozen = (freeze_on_devices(built.teachers[0].network, teacher, layout),)
    shapes = built.abstract_state
    init = jax.jit(built.init, out_shardings=layout.variables(shapes))
    state = init(jax.random.key(0))
    root = jax.device_put(DRAWS, layout.replicated)
    data = jax.device_put(Resident.of(batches), layout.replicated) if resident else None
    program = make_program(built.train_step, shapes, frozen, data, layout)
    size, start = config.batch_size, 0
    for steps in dispatches:
        ids = np.arange(start, start + steps * size).reshape(steps, size) % len(batches.labels)
        start += steps * size
        if resident:
            fed = jax.device_put(ResidentSteps(ids.astype(np.int32)), layout.ids)
        else:
            fed = jax.device_put(jax.tree.map(lambda x, i=ids[0]: x[i], batches), layout.batch)
        state, metrics = program(state, frozen, data, fed, root)
    return jax.device_get(state), jax.device_get(metrics), frozen, program


def build_teacher(built):
    return built.teachers[0].network.init(jax.random.key(5))


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_one_device_and_eight_agree_on_a_step(norm):
    one, eight = (
        run_steps(make_layout(mesh), matching_config(), False, [1, 1], random_batch(), norm)
        for mesh in (MeshConfig(data=1), MeshConfig(data=4, fsdp=2))
    )
    close(one[0].student, eight[0].student)
    close(one[1], eight[1], 1e-4)
    if norm == "batch":  # statistics of the global batch, and they moved
        moved = one[0].student.statistics["norm"]["mean"]
        assert np.abs(moved).max() > 1e-3


def test_fsdp_shards_what_is_large():
    layout = make_layout(MeshConfig(data=2, fsdp=4))
    shapes = {"large": jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32)}
    shapes["small"] = jax.ShapeDtypeStruct((64,), jnp.float32)
    found = layout.variables(shapes)
    assert tuple(found["large"].spec) == (None, None, None, "fsdp")
    assert tuple(found["small"].spec) == ()


def test_resident_and_streaming_agree_on_a_step():
    layout = make_layout(MeshConfig())
    a = run_steps(layout, matching_config(), True, [1], random_batch())
    b = run_steps(layout, matching_config(), False, [1], random_batch())
    close(a[0].student, b[0].student)
    close(a[1], b[1], 1e-4)


def test_several_steps_a_dispatch_are_the_same_steps():
    layout = make_layout(MeshConfig(data=1))
    many = random_batch(48)
    a = run_steps(layout, matching_config(), True, [3], many)
    b = run_steps(layout, matching_config(), True, [1, 1, 1], many)
    assert a[0].step == b[0].step == 3
    close(a[0].student, b[0].student, 1e-3)  # a loop rounds differently, and Adam enlarges that


def test_each_program_compiles_once_and_gives_only_its_state_away():
    layout = make_layout(MeshConfig())
    for resident in (True, False):
        _, _, frozen, program = run_steps(
            layout, matching_config(), resident, [1, 1, 1], random_batch()
        )
        assert program._cache_size() == 1
        assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


def test_labels_need_no_teacher_and_are_mixed_with_the_images():
    config = tiny_config(views=ViewConfig())
    built = build(config, resolved_run(config, ()))
    state = built.init(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    batch = random_batch()
    _, metrics = jax.jit(built.train_step)(state, (), batch, DRAWS)
    drawn = draw(jax.random.fold_in(KEY, 0), jnp.asarray(batch.sizes), config.views)
    images = render(drawn, jnp.asarray(batch.canvases), built.student.input_spec)
    logits = np.float64(logits_of(built.student.network, state.student, images, train=True))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    a = float(drawn.coefficients[0])
    own, other = log_p[np.arange(16), batch.labels], log_p[np.arange(16), np.roll(batch.labels, 1)]
    np.testing.assert_allclose(metrics["loss"], -(a * own + (1 - a) * other).mean(), rtol=1e-5)


def test_t_squared_multiplies_loss_and_gradient():
    config = matching_config()
    built = build(config, resolved_run(config, (NETWORK,)))
    state = built.init(jax.random.key(0))
    frozen = (built.teachers[0].network.freeze(with_random_head(state.student)),)
    branches = built.student, built.teachers
    plain = dataclasses.replace(
        config, objective=ObjectiveConfig(temperature=2.0, temperature_squared=False)
    )
    with_square, a = gradients_of(config, state, branches, frozen, random_batch())
    without, b = gradients_of(plain, state, branches, frozen, random_batch())
    np.testing.assert_allclose(a["loss"], 4 * b["loss"], rtol=1e-5)
    close(with_square, jax.tree.map(lambda x: 4 * x, without), 1e-5)


def test_average_of_the_student():
    config = matching_config(ema_decay=0.5)
    built = build(config, resolved_run(config, (NETWORK,)))
    state = built.init(jax.random.key(0))
    frozen = (built.teachers[0].network.freeze(with_random_head(state.student)),)
    state = dataclasses.replace(state, step=jnp.int32(1))
    expected = state.student
    step = jax.jit(built.train_step)
    for _ in range(3):
        state, _ = step(state, frozen, random_batch(), DRAWS)
        expected = jax.tree.map(lambda e, x: 0.5 * e + 0.5 * x, expected, state.student)
    close(state.ema, expected, 1e-6)
    assert float(jnp.abs(state.ema.params["head"]["kernel"]).max()) > 0


def test_a_loss_that_was_not_finite_within_a_dispatch_is_reported():
    def train_step(state, teachers, batch, root):
        loss = jnp.where(state.step == 1, jnp.inf, 1.0)
        metrics = {"loss": loss, "gradient_norm": jnp.ones(()), "update_norm": jnp.ones(())}
        return dataclasses.replace(state, step=state.step + 1), metrics

    state = TrainState(jnp.int32(0), Variables({}, {}), (), None)
    layout = make_layout(MeshConfig(data=1))
    data = Resident.of(random_batch())
    program = make_program(train_step, state, (), data, layout)
    fed = ResidentSteps(np.zeros((3, 8), np.int32))
    assert np.isnan(program(state, (), data, fed, DRAWS)[1]["loss"])


def test_init_is_a_function_of_the_key():
    built = build(matching_config(), resolved_run(matching_config(), (NETWORK,)))
    a, b, c = (
        init_state(jax.random.key(k), built.student.network, built.optimizer, None)
        for k in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (a.student.params["root"]["kernel"] != c.student.params["root"]["kernel"]).any()


def test_an_average_that_would_not_move_is_refused():
    config = tiny_config(ema_decay=0.5)
    built = build(config, resolved_run(config))
    update = make_update(built.loss, built.optimizer)
    view, labels = jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 10))
    with pytest.raises(UserError, match="an average that would never move; give ema_decay"):
        update(built.init(jax.random.key(0)), view, Targets(labels=labels))
