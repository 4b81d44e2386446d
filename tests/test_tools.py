"""The tools that read finished runs: a table and a picture."""

import json
import subprocess
import sys

import batch_norm_views
import bench_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import save_file
from same_bits import main as same_bits
from test_accelerator_paths import matching
from tiny import NETWORK

from fm_distill.config import CheckpointConfig, MeshConfig, with_options
from fm_distill.diagnosis.opened import examine
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.models import Variables
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.open_run import open_run
from fm_distill.runs.state import TrainState
from fm_distill.system.sharding import make_layout
from fm_distill.training.train import train
from fm_distill.views.rendering import CentralCrop, render_central


def run_tool(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def write_run(folder, shift):
    folder.mkdir()
    lines = [{"step": 1, "epoch": 0.1, "split": "train", "loss": 1.0}]
    lines += [
        {"step": s, "epoch": s / 10, "split": "validation", "student_top1": s / 100 + shift}
        for s in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_curves_are_drawn(tmp_path):
    a, b = write_run(tmp_path / "a", 0.0), write_run(tmp_path / "b", 0.1)
    drawn = run_tool("plot_runs.py", tmp_path / "one.png", f"both={a},{b}", f"a={a}")
    assert drawn.returncode == 0, drawn.stderr
    picture = Image.open(tmp_path / "one.png").convert("RGB")
    # The lines have colours; the frame, the grid and the text have none.
    assert sum(max(pixel) - min(pixel) > 60 for pixel in picture.getdata()) > 500
    wrong = run_tool("plot_runs.py", tmp_path / "two.png", f"x={tmp_path}/none")
    assert wrong.returncode == 1 and "not the workdir of a run" in wrong.stderr


def test_finished_runs_are_compared(trained, tmp_path):
    runs = (f"one={trained / 'run'}", f"two={trained / 'run'}")
    kept = tmp_path / "kept.json"
    found = run_tool("compare_runs.py", "--save", kept, *runs)
    assert found.returncode == 0, found.stderr
    figures, speed = found.stdout.split("\n\n")
    assert len(figures.splitlines()) == 4 and figures.splitlines()[2].startswith("| one | 1 |")
    logged = [json.loads(x) for x in (trained / "run/metrics.jsonl").read_text().splitlines()]
    speeds = [x["images_per_second"] for x in logged if x["split"] == "train"]
    assert speed.splitlines()[2] == f"| one | run | {np.median(speeds):,.0f} |"
    assert run_tool("compare_runs.py", kept).stdout == found.stdout
    wrong = run_tool("compare_runs.py", f"x={tmp_path}")
    assert wrong.returncode == 2 and "not complete" in wrong.stderr
    kept.write_text("[{}]")
    wrong = run_tool("compare_runs.py", kept)
    assert wrong.returncode == 2 and "is not a file of compare_runs.py --save" in wrong.stderr


def test_the_table_of_a_compression_is_printed_again(tmp_path):
    found = run_tool("compression_table.py", ROOT / "experiments/results/digits_compression")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("\n| ") == 3 and "| the run | 98.05 | 98.33 |" in found.stdout
    wrong = run_tool("compression_table.py", tmp_path)
    assert wrong.returncode == 2 and "has no compression.json" in wrong.stderr


def checkpointed(folder, mesh, change="", loss=2.5):
    """A workdir with a small checkpoint that lies on `mesh`; `change` names what differs."""
    one = jnp.ones(8, jnp.bfloat16), jnp.zeros(4)
    parts = {"params": one, "statistics": one, "ema": one}
    if change:
        first, second = parts[change]
        parts[change] = first, -second  # minus zero: equal, and not the same bits
    params, statistics, ema = ({"kernel": x, "bias": y} for x, y in parts.values())
    student = Variables({"head": params}, {"norm": statistics})
    state = TrainState(jnp.int32(3), student, ({"mu": params},), Variables({"head": ema}, {}))
    layout = make_layout(mesh)
    state = jax.device_put(state, layout.variables(state))
    writer = CheckpointWriter(folder / "checkpoints", CheckpointConfig(), ())
    writer.save(state, {"step": 3})
    writer.wait()
    line = {"step": 3, "split": "train", "loss": loss, "images_per_second": hash(folder)}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.parametrize(
    ("change", "part"), [("params", "student"), ("statistics", "student"), ("ema", "ema")]
)
def test_one_bit_of_a_student_is_seen(tmp_path, monkeypatch, capsys, change, part):
    monkeypatch.setattr("fm_distill.system.sharding.FSDP_SMALLEST", 1)
    a = checkpointed(tmp_path / "a", MeshConfig(data=1))
    b = checkpointed(tmp_path / "b", MeshConfig(fsdp=2))
    assert same_bits([str(a), str(b)]) == 0
    assert "student: 4 the same" in capsys.readouterr().out
    assert same_bits([str(a), str(checkpointed(tmp_path / "c", MeshConfig(), change))]) == 1
    said = capsys.readouterr().out
    assert f"{part}: 1 differ" in said and "bias: by up to 0" in said


def test_one_logged_number_and_one_exported_tensor_are_seen(tmp_path, capsys):
    a = checkpointed(tmp_path / "a", MeshConfig(data=1))
    b = checkpointed(tmp_path / "b", MeshConfig(data=1), loss=2.5000001)
    assert same_bits([str(a), str(b)]) == 1
    assert "step 3, train, loss: 2.5 against 2.5000001" in capsys.readouterr().out
    for name, values in (("a", [1, 0]), ("b", [1, 0]), ("c", [1, -0.0]), ("d", [1])):
        save_file({"kernel": np.float32(values)}, tmp_path / f"{name}.safetensors")
    a, b, c, d = (str(tmp_path / f"{x}.safetensors") for x in "abcd")
    assert [same_bits([a, x]) for x in (b, c, d)] == [0, 1, 1]


def test_what_cannot_be_compared_bit_for_bit_is_refused(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\0")
    for pair, said in (
        ([tmp_path / "none", tmp_path], "does not exist"),
        ([tmp_path, tmp_path], "has no checkpoint"),
        ([tmp_path, tmp_path / "cut.safetensors"], "two of a kind"),
        ([tmp_path / "cut.safetensors"] * 2, "is not a safetensors file"),
        ([tmp_path], "expected two workdirs"),
    ):
        with pytest.raises(UserError, match=said):
            same_bits(list(map(str, pair)))
    assert run_tool("same_bits.py", tmp_path, tmp_path).returncode == 2


def test_figures_of_runs_are_collected_and_shown(trained, tmp_path):
    out = tmp_path / "figures.json"
    for _ in range(2):  # a run of the same name is replaced
        done = run_tool("patience.py", "collect", out, trained / "run")
        assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    figures = json.loads((trained / "run" / "evaluation.json").read_text())
    assert row["teaching"] == "function_matching"
    assert row["student_top1"] == figures["student"]["top1"]
    assert row["teacher_top1"] == figures["teacher"]["top1"]
    assert (row["agreement"], row["kl"]) == (figures["agreement"]["top1"], figures["kl"]["one"])
    assert row["epochs"] == round(6 * 16 / 1259, 1)
    assert row["recorded_epochs"] is None
    out.write_text(json.dumps([row | {"seed": i, "student_top1": i / 10} for i in (1, 3)]))
    line = run_tool("patience.py", "table", out).stdout.splitlines()[-1]
    assert line.startswith(
        "| bit at 16 | function matching | kept | 0 | 0 | 2 | 20.0 (10.0 to 30.0) |"
    )
    labels = row | {"teaching": "labels", "seed": 3, "student_top1": 0.25}
    out.write_text(json.dumps([*json.loads(out.read_text()), labels]))
    line = run_tool("patience.py", "ahead", out).stdout.splitlines()[-1]
    assert line == "| bit at 16 | kept | 0 | 3 | 30.00 | 25.00 | 5.0 |"
    drawn = run_tool("patience.py", "plot", out, tmp_path / "one.png")
    assert drawn.returncode == 0, drawn.stderr
    picture = Image.open(tmp_path / "one.png").convert("RGB")
    assert sum(max(pixel) - min(pixel) > 60 for pixel in picture.getdata()) > 20
    wrong = run_tool("patience.py", "collect", out, tmp_path)
    assert wrong.returncode == 1 and "is not the workdir of a run" in wrong.stderr


@pytest.mark.slow
def test_moments_of_other_views(tmp_path, capsys):
    """The first norm's are those of the root's output, by NumPy."""
    student = with_options(NETWORK, {"norm": "batch"})
    config = matching(tmp_path, MeshConfig(data=1), student=student)
    train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    examined = examine(run, run.config)
    found = batch_norm_views.moments_of_views(examined, 2)
    of_batches = []
    for _, _, batch in examined.batches(examined.steps(32)):
        view = render_central(
            batch.canvases, batch.sizes, CentralCrop.of(config.views), examined.student.input_spec
        )
        network = examined.student.network
        root = network.apply(examined.evaluated, view, train=True, features=("root",))
        rows = np.float64(root.features["root"]).reshape(-1, 8)
        of_batches.append((rows.mean(0), rows.var(0)))
    mean, variance = np.mean(of_batches, axis=0)
    kept = found["central views"]["block1_unit01"]["a_norm"]
    np.testing.assert_allclose(kept["mean"], mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(kept["var"], variance, rtol=1e-2, atol=1e-3)
    other = found["training views"]["block1_unit01"]["a_norm"]
    assert np.abs(other["var"] - kept["var"]).max() > 0.01
    out = str(tmp_path / "results.json")
    assert batch_norm_views.main(["collect", out, "validation", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert batch_norm_views.main(["table", out]) == 0
    lines = [x.strip("| ").split(" | ") for x in capsys.readouterr().out.splitlines()[2:]]
    assert [x[2] for x in lines] == ["as kept", "central views", "training views"]
    figures = evaluate(tmp_path / "run", "validation")
    assert lines[0][3] == f"{100 * figures['student']['top1']:.2f}"
    assert lines[0][5] == f"{figures['kl']['one']:.4f}" != lines[1][5]


def test_peers_are_compared_round_by_round():
    """Quartiles of the ratios, and not the ratio of the medians."""
    times = {"fm-distill": [1.0, 2.0, 4.0, 1.0], "pytorch": [2.0, 2.0, 2.0, 3.0]}
    assert bench_peers.ratios(times) == {"pytorch": [0.625, 1.5, 2.75]}
    assert bench_peers.medians(times) == {"fm-distill": 1.5, "pytorch": 2.0}


@pytest.mark.slow
def test_the_own_step_is_timed_where_no_peer_is():
    done = run_tool("bench_peers.py", "mobilenet_v3", "--batch", 2, "--rounds", 2, "--cores", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step_s"]["fm-distill"] > 0
