"""The memory levers change what is kept at a time, and no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from jax.extend.core import ClosedJaxpr, Jaxpr
from test_step import DRAWS, gradients_of, matching_config, random_batch, with_random_head
from tiny import LARGER, NETWORK, resolved_run, smallest, tiny_config

from fm_distill.config import MemoryConfig, MeshConfig, NetworkConfig, ObjectiveConfig, with_options
from fm_distill.data.batch import Batch
from fm_distill.data.resident import Resident, ResidentSteps
from fm_distill.errors import UserError
from fm_distill.models import CONVOLUTION, MODELS, UNIT, build_network
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.train_step.memory import REMATERIALISE, in_parts
from fm_distill.train_step.program import make_program
from fm_distill.training.build import build

LEVERS = [
    MemoryConfig(accumulate=4),
    MemoryConfig(teacher_parts=4),
    MemoryConfig(rematerialise="norms"),
    MemoryConfig(rematerialise="units"),
    MemoryConfig(accumulate=2, teacher_parts=8, rematerialise="units"),
]
TEACHER = with_options(dataclasses.replace(NETWORK, resolution=20), {"depths": (1, 1)})


def one_step(memory: MemoryConfig, config=None, batch: Batch | None = None):
    """Gradient and metrics of one step, of a teacher with a picture of its own."""
    config = config or matching_config()
    teachers = (TEACHER,) if config.objective.target == "teacher" else ()
    built = build(config, resolved_run(config, teachers))
    state = built.init(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    frozen = tuple(
        branch.network.freeze(with_random_head(branch.network.init(jax.random.key(5)), 3))
        for branch in built.live_teachers
    )
    branches = built.student, built.live_teachers
    return gradients_of(config, state, branches, frozen, batch or random_batch(), memory)


def same(a, b):
    """Within float32's error of sums in another order."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-4), a, b)


@pytest.mark.parametrize("memory", LEVERS, ids=str)
def test_the_gradient_is_the_same(memory):
    plain, with_lever = one_step(MemoryConfig()), one_step(memory)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain[0]))
    assert largest > 0.1
    same(plain, with_lever)


def test_the_gradient_of_labels_is_the_same():
    config = tiny_config(objective=ObjectiveConfig(target="labels", label_smoothing=0.1))
    same(one_step(MemoryConfig(), config), one_step(MemoryConfig(accumulate=4), config))


@pytest.mark.parametrize("memory", [LEVERS[0], LEVERS[-1]], ids=str)
def test_eight_devices_accumulate_what_one_does_at_once(memory):
    """In the program that `train` runs, with the data in device memory and large arrays split."""
    batch = random_batch(64)
    states = []
    for mesh, levers in ((MeshConfig(data=1), MemoryConfig()), (MeshConfig(fsdp=2), memory)):
        config = matching_config(memory=levers, batch_size=64)
        layout = make_layout(mesh)
        built = build(config, resolved_run(config, (TEACHER,), layout))
        shapes = built.abstract_state
        state = jax.jit(built.init, out_shardings=layout.variables(shapes))(jax.random.key(0))
        frozen = (built.teachers[0].network.init(jax.random.key(5)),)
        frozen = (built.teachers[0].network.freeze(with_random_head(frozen[0], 3)),)
        frozen = jax.device_put(frozen, layout.variables(frozen))
        data = jax.device_put(Resident.of(batch), layout.replicated)
        program = make_program(built.train_step, shapes, frozen, data, layout)
        fed = jax.device_put(ResidentSteps(np.arange(64, dtype=np.int32)[None]), layout.ids)
        root = jax.device_put(DRAWS, layout.replicated)
        for _ in range(2):  # the schedule's first step is zero
            state, metrics = program(state, frozen, data, fed, root)
        states.append(jax.device_get((state.student, state.opt_state, metrics)))
    moved = np.abs(states[0][0].params["head"]["kernel"]).max()
    assert moved > 1e-4
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-3), states[0], states[1]
    )


def test_parts_come_back_in_order():
    values = np.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(in_parts(lambda x: 2 * x, 3, values), 2 * values)


def test_accumulation_with_batch_norm_is_refused():
    student = with_options(NETWORK, {"norm": "batch"})
    layout = make_layout(MeshConfig(data=1))
    config = matching_config(student=student, memory=MemoryConfig(accumulate=2))
    with pytest.raises(UserError, match=r"memory\.accumulate=2 would give bit's BatchNorm"):
        build(config, resolved_run(config, (TEACHER,), layout))
    # Statistics that are kept do not differ, and the other levers are no harm.
    kept = dataclasses.replace(student, keep_statistics=True, weights="x.npz")
    build(
        dataclasses.replace(config, student=kept),
        resolved_run(dataclasses.replace(config, student=kept), (TEACHER,), layout),
    )
    other = MemoryConfig(teacher_parts=2, rematerialise="units")
    build(
        dataclasses.replace(config, memory=other),
        resolved_run(dataclasses.replace(config, memory=other), (TEACHER,), layout),
    )


def test_batch_norm_learns_the_same_statistics_with_the_levers_that_it_has():
    student = with_options(NETWORK, {"norm": "batch"})
    states = []
    for memory in (MemoryConfig(), MemoryConfig(teacher_parts=4, rematerialise="units")):
        config = matching_config(student=student, memory=memory)
        built = build(config, resolved_run(config, (TEACHER,)))
        state = built.init(jax.random.key(0))
        frozen = (built.teachers[0].network.init(jax.random.key(5)),)
        frozen = (built.teachers[0].network.freeze(frozen[0]),)
        state, _ = jax.jit(built.train_step)(state, frozen, random_batch(), DRAWS)
        states.append(state.student.statistics)
    assert np.abs(states[0]["norm"]["mean"]).max() > 1e-3
    same(*states)


@pytest.mark.parametrize("lever", ["accumulate", "teacher_parts"])
def test_a_batch_that_has_no_such_parts_is_refused(lever):
    config = tiny_config(batch_size=40, memory=MemoryConfig(**{lever: 3}))
    said = rf"8 devices of the mesh \(data=8, fsdp=1\) times memory\.{lever}=3; use 24 or 48"
    with pytest.raises(UserError, match=said):
        check_batch_size(config, make_layout(MeshConfig()))


def test_unknown_and_senseless_levers_are_refused(tmp_path):
    experiment = write_experiment(tmp_path / "tiny.py")
    for option, value, said in (
        ("rematerialise", "all", "memory.rematerialise is 'all'; expected one of"),
        ("accumulate", "0", "memory.accumulate is 0; expected a number above zero"),
        ("teacher-parts", "-1", "memory.teacher_parts is -1; expected a number above zero"),
    ):
        done = run_command("show", experiment, f"--memory.{option}", value)
        assert done.returncode == 2 and said in done.stderr


def convolutions(memory: MemoryConfig) -> int:
    config = matching_config(memory=memory)
    built = build(config, resolved_run(config, ()))

    def gradient(state, batch):
        config_labels = dataclasses.replace(config, objective=ObjectiveConfig(target="labels"))
        step = build(config_labels, resolved_run(config_labels, ())).train_step
        return step(state, (), batch, DRAWS)[0]

    return counted(jax.make_jaxpr(gradient)(built.abstract_state, random_batch()))


def counted(value) -> int:
    """Convolutions in a traced function. Its text has those once that several layers share."""
    if isinstance(value, ClosedJaxpr):
        return counted(value.jaxpr)
    if isinstance(value, tuple | list):
        return sum(map(counted, value))
    if not isinstance(value, Jaxpr):
        return 0
    own = sum(x.primitive.name == "conv_general_dilated" for x in value.eqns)
    return own + sum(counted([*x.params.values()]) for x in value.eqns)


def test_rematerialisation_computes_again():
    """Convolutions are computed again where only units are kept, and not where they are kept."""
    counts = {what: convolutions(MemoryConfig(rematerialise=what)) for what in REMATERIALISE}
    # Five kernels: forward, to each kernel, and to each input but the pictures.
    assert counts["units"] > counts["norms"] == counts["nothing"] == 5 + 5 + 4


@pytest.mark.parametrize(
    "model", [m for m in MODELS if not m.startswith("bit_r") and not LARGER.match(m)]
)
def test_every_network_names_what_can_be_kept(model):
    options = {"depths": (1,)} if model == "bit" else {}
    config = NetworkConfig(model=model, resolution=smallest(model), options=options)
    network = build_network(config, 5, jnp.dtype("float32"))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
    text = str(jax.make_jaxpr(lambda v, x: network.apply(v, x, train=True))(variables, images))
    for name in (CONVOLUTION, UNIT):
        assert f"name[name={name}]" in text
