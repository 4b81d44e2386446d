"""`fm-distill plan`: the real TPU compiler on small pairs, and its text, counts and refusals."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_command, write_experiment
from jax.sharding import NamedSharding, PartitionSpec
from tiny import resolved_run, tiny_config

from fm_distill import plan as plan_function
from fm_distill.config import (
    CanvasConfig,
    MemoryConfig,
    MeshConfig,
    NetworkConfig,
    ObjectiveConfig,
    QuantisationConfig,
    StudentConfig,
    TeacherConfig,
)
from fm_distill.errors import UserError
from fm_distill.planning.compile_step import Request, abstract, batch_of, flops, root_of
from fm_distill.planning.hlo import read
from fm_distill.planning.movers import largest_movers
from fm_distill.planning.plan import COMPILER_ENVIRONMENT, variants
from fm_distill.planning.topologies import CHIPS, known_topologies, topology
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build

STUDENT = StudentConfig(model="bit", resolution=48, options={"depths": (1,), "width": 1.0})
TEACHER = NetworkConfig(model="bit", resolution=64, options={"depths": (1, 1), "width": 4.0})
NEEDS_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, has wheels for Linux on x86-64 only",
)


def pair(**changes):
    """A student and a larger teacher at two resolutions, on enough examples to see a copy."""
    config = tiny_config(
        batch_size=256,
        student=STUDENT,
        teacher=TeacherConfig(network=TEACHER),
        objective=ObjectiveConfig(temperature=2.0),
        **changes,
    )
    data = dataclasses.replace(config.data, canvas=CanvasConfig(size=64))
    return dataclasses.replace(config, data=data)


def state_bytes(config) -> tuple[int, int]:
    """Of the student's state and of the frozen teacher in bfloat16."""
    layout = make_layout(MeshConfig(data=1))
    built = build(
        dataclasses.replace(config, precision="bfloat16"),
        resolved_run(dataclasses.replace(config, precision="bfloat16"), (TEACHER,), layout),
    )
    teacher = built.teachers[0].network
    frozen = jax.eval_shape(teacher.freeze, jax.eval_shape(teacher.init, jax.random.key(0)))
    return tuple(
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (built.abstract_state, frozen)
    )


@functools.cache
def planned_pair(name):
    """Of the pair with 20,000 examples in device memory."""
    return plan_function(pair(), name, num_examples=20_000)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["v3-8", pytest.param("v5e-8", marks=pytest.mark.slow)])
def test_the_compiled_step_is_as_it_should_be(name):
    found = planned_pair(name)
    assert found.compiles and found.fits and found.devices == 8
    assert found.feeding == "resident" and found.steps_per_dispatch == 16
    # Gradients are reduced together, statistics of the loss may come extra; one example of each
    # picture moves between neighbours for the mixup.
    assert 1 <= found.collectives["all-reduce"] <= 2
    assert found.collectives["collective-permute"] <= 2
    assert set(found.collectives) == {"all-reduce", "collective-permute"}
    assert found.host_transfers == 0
    # One state and one teacher: tiles are padded, but nothing is there twice.
    state, teacher = state_bytes(pair())
    need = state + teacher
    assert state <= found.donated_bytes < state + 1e6
    assert need <= found.memory_bytes.arguments < 1.3 * need
    # A copy of the data, as a TPU makes of NHWC, would be among the temporaries.
    assert found.memory_bytes.resident_data > 20_000 * 3 * 96**2
    assert found.memory_bytes.temporaries < 0.5 * found.memory_bytes.resident_data
    assert found.memory_bytes.capacity == CHIPS[name.partition("-")[0]].memory_bytes
    assert 0 < found.flops["views"] < 0.03 * found.flops["total"]
    parts = sum(found.flops[x] for x in ("teacher", "student", "views"))
    assert parts == pytest.approx(found.flops["total"], rel=1e-6)
    # What moves the most memory, with lines of this package.
    assert {"teacher", "student", "student, backwards"} <= {x.part for x in found.movers}
    assert sum(x.share for x in found.movers) <= 1 + 1e-9
    assert found.movers[0].bytes == max(x.bytes for x in found.movers)
    assert sum(x.bytes for x in found.movers) < 1.5 * found.hbm_bytes
    for mover in found.movers:
        file, _, line = mover.place.rpartition(":")
        assert not file or len((ROOT / file).read_text().splitlines()) >= int(line)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e-8", "v6e-8"])
def test_a_teacher_in_eight_bits_is_planned(name):
    """Its kernels take half of bfloat16's memory, and its products half of the time."""
    eight = QuantisationConfig(weights="int8", activations="int8")
    config = dataclasses.replace(pair(), teacher=TeacherConfig(network=TEACHER, quantisation=eight))
    found = plan_function(config, name, num_examples=20_000)
    plain = plan_function(pair(), name, num_examples=20_000)
    assert found.compiles
    _, teacher = state_bytes(pair())
    saved = plain.memory_bytes.arguments - found.memory_bytes.arguments
    assert saved == pytest.approx(teacher / 2, rel=0.1)
    assert found.flops["teacher"] == pytest.approx(plain.flops["teacher"], rel=0.1)
    chip, total = CHIPS[name.partition("-")[0]], found.flops["total"]
    computing = (total - found.flops["teacher"] / 2) / 8 / chip.peak_flops
    bound = max(computing, found.hbm_bytes / chip.bandwidth)
    assert found.step_seconds.lower_bound == pytest.approx(bound)


@NEEDS_COMPILER
def test_times_follow_from_the_counts():
    found, chip = planned_pair("v3-8"), CHIPS["v3"]
    computing = found.flops["total"] / 8 / chip.peak_flops
    bound = max(computing, found.hbm_bytes / chip.bandwidth)
    assert found.step_seconds.lower_bound == pytest.approx(bound)
    assert found.step_seconds.expected > bound
    assert found.images_per_second == pytest.approx(256 / found.step_seconds.expected)
    assert found.hours == pytest.approx(6 * found.step_seconds.expected / 3600)
    assert found.sessions == 1 and found.weeks == pytest.approx(found.hours / 20)
    # Each number of the activations moves at least once: those of one step, not of sixteen.
    activations = 32 * 3 * 48**2 * 2
    assert 10 * activations < found.hbm_bytes < 16e9


@NEEDS_COMPILER
@pytest.mark.slow
def test_levers_save_memory_and_loops_are_counted():
    def planned(memory):
        student = StudentConfig(
            model="bit", resolution=64, options={"depths": (2,), "width": 1.0, "stem": "small"}
        )
        return plan_function(tiny_config(batch_size=512, student=student, memory=memory), "v3-8")

    plain = planned(MemoryConfig())
    found = planned(MemoryConfig(accumulate=4, rematerialise="units"))
    assert found.memory_bytes.temporaries < 0.5 * plain.memory_bytes.temporaries
    # Bodies of loops counted once would be a quarter.
    assert 0.8 * plain.hbm_bytes < found.hbm_bytes < 2 * plain.hbm_bytes
    assert found.flops["views"] == plain.flops["views"]
    assert found.flops["student"] > 1.1 * plain.flops["student"]


@NEEDS_COMPILER
def test_what_does_not_fit_says_what_does(tmp_path):
    """20 GB of data that were to lie in device memory; read as needed, the run fits."""
    experiment = write_experiment(tmp_path / "tiny.py")
    words = ("plan", experiment, "--topology", "v3-8", "--num-examples", "5000000", "--json")
    done = run_command(*words, "--data.feeding", "resident")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert not found["fits"] and found["fits_with"] == {"data.feeding": "streaming"}
    assert found["memory_bytes"]["resident_data"] > found["memory_bytes"]["capacity"]
    compiling = "compiling, usually a minute, for v3-8"
    trying = "does not fit; trying --data.feeding streaming"
    assert done.stderr.splitlines() == [compiling, trying, compiling]


KEYS = {
    *("topology", "devices", "compiles", "fits", "memory_bytes", "flops", "hbm_bytes"),
    *("collectives", "host_transfers", "step_seconds", "images_per_second", "hours", "sessions"),
}


def test_a_cpu_has_no_capacity_and_no_bound(tmp_path):
    experiment = write_experiment(tmp_path / "tiny.py")
    done = run_command("plan", experiment, "--topology", "cpu:8", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "compiling, usually a minute, for cpu:8\n"
    found = json.loads(done.stdout)
    assert found.keys() >= KEYS and found["devices"] == 8
    assert set(found["memory_bytes"]) == {
        "arguments", "temporaries", "resident_data", "capacity",
    }  # fmt: skip
    assert found["memory_bytes"]["capacity"] is None and found["fits"]
    assert set(found["flops"]) == {"total", "teacher", "student", "views"}
    assert found["step_seconds"] == {"lower_bound": None, "expected": None}
    assert found["hours"] is None and found["sessions"] is None
    write_experiment(
        tmp_path / "student.py",
        'teacher=TeacherConfig(experiment="tiny.py"), objective=ObjectiveConfig()',
    )
    said = run_command("plan", tmp_path / "student.py", "--topology", "cpu:2").stdout
    assert said.startswith("cpu:2: 2 devices, resident feeding, 1 steps per dispatch\n")
    assert "excluding the teacher's training: plan " in said
    assert "with `fm-distill record` the teacher runs once: " in said
    # 6 steps of 16 rows: 10 classes in two bytes, the offset, the example and its digest.
    recorded = run_command(
        "plan", tmp_path / "student.py", "--topology", "cpu:2", "--json",
        "--teacher.recording", "not/here",
    )  # fmt: skip
    found = json.loads(recorded.stdout)
    assert found["recording"] is None and found["flops"]["teacher"] == 0
    live = run_command("plan", tmp_path / "student.py", "--topology", "cpu:2", "--json")
    found = json.loads(live.stdout)
    assert found["recording"]["bytes"] == 6 * 16 * (10 * 2 + 4 + 12)
    assert found["recording"]["taps"] == []
    assert found["flops"]["teacher"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--topology", "v7-8"), "--topology v7-8 is not known; expected one of v2-8, v2-32"),
        (("--topology", "v3-9"), "or cpu:N for N simulated devices"),
        ((), "plan needs --topology"),
        (("--topology", "cpu:3"), "batch_size=16 is not divisible by the 3 devices"),
        (("--topology", "cpu:8", "--max-hours", "0"), "--max-hours is 0"),
        (("--topology", "cpu:8", "--num-examples", "-5"), "--num-examples is -5"),
        (("--topology", "cpu:8", "--data.train.examples", "None"), "give --num-examples N"),
        (("--topology", "cpu:8", "--data.classes", "None"), "give --data.classes N"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, options, said):
    experiment = write_experiment(tmp_path / "tiny.py")
    done = run_command("plan", experiment, *options)
    *before, message = done.stderr.splitlines()
    assert done.returncode == 2 and said in message
    # Whether the batch can be divided is known where the devices are.
    assert before in ([], ["compiling, usually a minute, for cpu:3"])


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fm-distill\[tpu\]'"):
        plan_function(tiny_config(), "v3-8")


def test_a_teacher_without_a_known_network_is_refused():
    config = tiny_config(
        objective=ObjectiveConfig(), teacher=TeacherConfig(weights="gone.safetensors")
    )
    with pytest.raises(UserError, match=r"give --teacher\.network\.model"):
        plan_function(config, "cpu:1")


def test_the_callers_jax_is_not_touched():
    """Whoever has a TPU keeps it: planning starts no backend here."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from tiny import tiny_config\nfrom fm_distill import plan\n"
        "assert plan(tiny_config(), 'cpu:2').fits\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_topologies_are_as_people_name_them():
    devices = {name: topology(name).devices for name in known_topologies()}
    expected = {"v2-8": 8, "v3-8": 8, "v4-8": 4, "v5e-1": 1, "v5e-8": 8, "v5p-8": 4}
    expected |= {"v6e-1": 1, "v6e-8": 8, "v3-32": 32, "v5e-256": 256, "v4-64": 32}
    assert expected.items() <= devices.items()
    assert topology("V3-8") == topology("v3-8")


@NEEDS_COMPILER
def test_the_compiler_knows_every_topology():
    """Devices and the kind of chip, for all names of the table."""
    code = (
        "import json, sys\nfrom jax.experimental import topologies\n"
        "from fm_distill.planning.topologies import known_topologies, topology\n"
        "print(json.dumps({n: len(topologies.get_topology_desc(**topology(n).compiler).devices)"
        " for n in known_topologies()}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | COMPILER_ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: topology(name).devices for name in known_topologies()}


def test_flops_are_those_that_timm_counts():
    """timm's benchmark table: 4.23 billion multiply-adds for an image of 224 px in R50x1."""
    network = NetworkConfig(model="bit_r50x1", resolution=224)
    config = tiny_config(batch_size=8, objective=ObjectiveConfig())
    config = dataclasses.replace(config, teacher=TeacherConfig(network=network))
    request = Request(config, (network,), 1000, 1259, topology("cpu:1"))
    layout = make_layout(MeshConfig(data=1))
    resolved = resolved_run(config, (network,), layout, classes=1000)
    built = build(config, resolved)
    root = root_of(config, resolved)
    teacher = built.teachers[0].network
    frozen = (jax.eval_shape(teacher.freeze, jax.eval_shape(teacher.init, root.key)),)
    arguments = (built.abstract_state, frozen, batch_of(request), root)
    found = flops(config, resolved, arguments)
    # XLA leaves out the products with the zeros of the padding: 6 % here.
    assert 0.92 * 8 * 2 * 4.23e9 < found["teacher"] < 8 * 2 * 4.23e9


def test_loops_and_collectives_are_counted_by_how_often_they_run():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("x",)))

    def step(carry, _):
        inner = jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ c), carry)
        return jax.lax.with_sharding_constraint(inner + inner.sum(), split), None

    def program(x):
        return jax.lax.scan(step, x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(program, in_shardings=split, out_shardings=whole).lower(x).compile()
    found = read(compiled.as_text())
    collectives = found.collectives()
    assert collectives["all-reduce"] == 7
    # The product needs the whole matrix, in each of the inner steps.
    assert collectives["all-gather"] >= 21
    assert found.host_transfers() == 0
    assert 7 < found.loops_factor() <= 21


def test_bytes_are_those_of_the_operands_and_results_with_their_line():
    """A product of three matrices a step of a loop, and one row of a buffer that it updates."""

    def step(carry, i):
        x, y, buffer = carry
        product = x @ y  # this line
        return (product, y, buffer.at[i].set(product[0])), None

    def program(x, y, buffer):
        return jax.lax.scan(step, (x, y, buffer), jnp.arange(7))[0]

    shapes = *(abstract((64, 64), jnp.float32),) * 2, abstract((700, 64), jnp.float32)
    compiled = jax.jit(program, donate_argnums=(0, 1, 2)).lower(*shapes).compile()
    text = compiled.as_text()
    found = largest_movers(text, read(text), steps=7)
    line = 1 + inspect.getsource(step).splitlines().index("        product = x @ y  # this line")
    place = f"test_plan.py:{step.__code__.co_firstlineno + line - 1}"
    product = next(x for x in found if x.operation == "dot_general")
    assert (product.place, product.count, product.bytes) == (place, 1.0, 3 * 4 * 64 * 64)
    # The buffer has 179,200 bytes, and each step writes a row of it.
    rest = [x for x in found if x.place not in (place, "")]
    assert 256 < sum(x.bytes for x in rest) < 2000


def test_memory_on_the_chip_does_not_count():
    text = """HloModule m

ENTRY %main (a: f32[256], b: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %b = f32[256]{0} parameter(1)
  %start = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[256]{0:S(1)} copy-done(%start)
  ROOT %sum = f32[256]{0} add(%done, %b), metadata={op_name="jit(f)/update/add" source_file="/x/fm_distill/y.py" source_line=3}
}
"""  # noqa: E501
    (found,) = largest_movers(text, read(text), steps=1)
    # The copy reads 1,024 bytes for the sum, which reads and writes twice as many.
    assert (found.bytes, found.count) == (3 * 1024, 2.0)
    assert (found.part, found.operation, found.place) == ("update", "add", "fm_distill/y.py:3")


def test_a_callback_is_seen():
    def noisy(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), jnp.float32), x)

    compiled = jax.jit(noisy).lower(abstract((4,), jnp.float32)).compile()
    assert read(compiled.as_text()).host_transfers() > 0


def test_variants_keep_what_was_asked_for():
    config = pair(memory=MemoryConfig(rematerialise="norms"))
    found = variants(config, 8)
    assert found[0][1].memory == MemoryConfig(teacher_parts=4, rematerialise="norms")
    assert found[-1][1].mesh.fsdp == 8
    for options, variant in found:
        assert {x.partition(".")[0] for x in options} <= {"memory", "mesh"}
        assert variant.batch_size == config.batch_size
