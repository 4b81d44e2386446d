"""Paths that only accelerators take, on simulated devices: several steps a dispatch, bfloat16,
sharded parameters; each to the end of a run, and stopped and resumed to the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disturb import arrays_of
from test_step import with_random_head
from test_train import lines_of, same_bits, stop_at
from tiny import NETWORK, tiny_config

from fm_distill.config import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherConfig,
)
from fm_distill.models import build_network
from fm_distill.runs.integrity import steps_in
from fm_distill.training import train as training
from fm_distill.training.loop import Loop
from fm_distill.training.train import train
from fm_distill.weights.card import only_network
from fm_distill.weights.names import in_naming


def matching(folder, mesh, **changes):
    """A run on the mesh, with a teacher of random weights in a file."""
    network = only_network(NETWORK)
    variables = jax.jit(build_network(network, 10, jnp.dtype("float32")).init)(jax.random.key(5))
    tensors = in_naming("bit_original", network, with_random_head(variables))
    np.savez(folder / "teacher.npz", **tensors)
    return tiny_config(
        teacher=TeacherConfig(weights=str(folder / "teacher.npz"), network=network),
        objective=ObjectiveConfig(temperature=2.0),
        ema_decay=0.5,
        mesh=mesh,
        **changes,
    )


class Killed(Exception):
    """As if the process had been killed."""


def kill_in_dispatch(monkeypatch, number: int):
    """The run ends in the middle of its `number`th dispatch from now on, counted from 1."""
    dispatch, calls = Loop._dispatch, []

    def killed(self, *arguments):
        calls.append(0)
        if len(calls) == number:
            raise Killed
        return dispatch(self, *arguments)

    monkeypatch.setattr(Loop, "_dispatch", killed)


def test_several_steps_a_dispatch_log_save_evaluate_and_resume(tmp_path, monkeypatch):
    """Dispatches end after steps 4, 8, 9 and 10: what is due in between is done there."""
    config = matching(
        tmp_path,
        MeshConfig(data=1),
        steps_per_dispatch=4,
        schedule=ScheduleConfig(total_steps=10, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=3, keep=9),
        log=LogConfig(every_steps=2, evaluate_every_steps=5, tensorboard=False),
    )
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert train(config, whole).complete
    lines = lines_of(whole)
    assert [x["step"] for x in lines if x["split"] == "train"] == [4, 8, 10]
    assert [x["step"] for x in lines if x["split"] == "validation"] == [8, 10]
    assert sorted(steps_in(whole / "checkpoints")) == [4, 8, 9, 10]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_dispatch(patch, 2)
        train(config, pieces)
    assert steps_in(pieces / "checkpoints") == [4]
    for end in (8, 9):  # between dispatches, and among the single steps at the end
        with monkeypatch.context() as patch:
            stop_at(patch, 0)
            assert train(config, pieces).step == end
    assert train(config, pieces).complete
    same_bits(whole, pieces)
    assert lines_of(pieces) == lines


@pytest.mark.slow
def test_bfloat16_to_the_end_and_resumed(tmp_path, monkeypatch):
    optimizer = OptimizerConfig(learning_rate=3e-3, first_moment_dtype="bfloat16")
    config = matching(tmp_path, MeshConfig(data=1), precision="bfloat16", optimizer=optimizer)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    figures = train(config, whole).evaluation
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(config, pieces).step == 3
    assert train(config, pieces).evaluation == figures
    same_bits(whole, pieces)
    assert lines_of(whole) == lines_of(pieces)
    assert json.loads((whole / "config.json").read_text())["resolved"]["precision"] == "bfloat16"
    # Parameters stay float32; the first moment is stored as it was asked for.
    dtypes = {name: array.dtype for name, array in arrays_of(whole).items()}
    assert {x for name, x in dtypes.items() if ".mu" in name} == {jnp.dtype("bfloat16")}
    assert {x for name, x in dtypes.items() if "params" in name} == {np.dtype("float32")}


def test_sharded_parameters_pass_through_checkpoint_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("fm_distill.system.sharding.FSDP_SMALLEST", 64)
    config = matching(tmp_path, MeshConfig(data=2, fsdp=4))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    figures = train(config, whole).evaluation
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(config, pieces).step == 3
    restored = []
    first_state = training.first_state

    def watched(setup, workdir, start):
        restored.append(first_state(setup, workdir, start))
        jax.block_until_ready(restored)
        return jax.tree.map(jnp.copy, restored[0])  # the run gives its state away

    with monkeypatch.context() as patch:
        patch.setattr("fm_distill.training.train.first_state", watched)
        assert train(config, pieces).evaluation == figures
    # Never whole on one device: parameters, average and optimizer lie in quarters.
    for tree in (restored[0].student.params, restored[0].ema.params, restored[0].opt_state[1].mu):
        kernel = tree["root"]["kernel"]
        assert kernel.shape == (3, 3, 3, 8)
        assert kernel.addressable_shards[0].data.shape == (3, 3, 3, 2)
    same_bits(whole, pieces)
    assert lines_of(whole) == lines_of(pieces)
