"""The real command makes a run smaller step after step, and its table is what the runs say."""

import dataclasses
import errno
import json
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from conftest import run_command
from test_train import stop_at
from tiny import NETWORK, tiny_config

from fm_distill.config import PruningConfig, with_options
from fm_distill.errors import UserError
from fm_distill.exporting.load_exported import load_exported
from fm_distill.reports.compress import _is_exported, compress
from fm_distill.reports.compression_steps import check_order, config_after, parse_step
from fm_distill.reports.compression_table import as_markdown, caption, load
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.training.train import train

BATCH_NORM = with_options(NETWORK, {"norm": "batch"})
PRUNED = "prune:structured:0.5"
BOTH = f"{PRUNED} + quantise:int8"


@pytest.fixture(scope="module")
def compressed(trained, tmp_path_factory) -> pathlib.Path:
    """The workdir of the trained run after the real command, of six steps each."""
    run = shutil.copytree(trained / "run", tmp_path_factory.mktemp("compressed") / "run")
    done = run_command(
        "compress", run, "--steps", PRUNED, "quantise:int8", "--seconds", "0.2",
        "--schedule.total-steps", "4", "--format", "onnx", "stablehlo",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run / "table.md").write_text(done.stdout)
    return run


def test_each_step_starts_from_the_one_before_and_matches_the_same_teacher(compressed):
    folder = compressed / "compressed"
    first, second = folder / "prune-structured-0.5", folder / "prune-structured-0.5+quantise-int8"
    runs = [Workdir(x).stored() for x in (compressed, first, second)]
    assert [x.resolved.student.block_widths for x in runs] == [(), (4,), (4,)]
    assert [x.resolved.student.quantisation.quantised for x in runs] == [False, False, True]
    assert [x.resolved.total_steps for x in runs] == [6, 4, 4]
    assert len({x.resolved.teacher_weights for x in runs}) == 1
    assert runs[2].config.student.weights == str(first)


def test_the_table_says_what_is_not_compared_on_the_same(compressed):
    found = load(compressed / "compressed")
    assert found is not None and "steps" not in caption(found)
    other = dataclasses.replace(found, other_views=True)
    assert "training view: the steps' views are not the run's" in caption(other)
    rows = (*found.rows[:-1], dataclasses.replace(found.rows[-1], teacher_top1=0.1))
    assert "to another teacher than the run's" in caption(dataclasses.replace(found, rows=rows))


def test_the_table_is_what_runs_and_files_say(compressed):
    folder = compressed / "compressed"
    found = load(folder)
    assert found is not None and [x.name for x in found.rows] == ["the run", PRUNED, BOTH]
    places = (
        compressed,
        folder / "prune-structured-0.5",
        folder / "prune-structured-0.5+quantise-int8",
    )
    for row, place in zip(found.rows, places, strict=True):
        figures = json.loads((place / "evaluation.json").read_text())
        assert row.top1 == figures["student"]["top1"] and row.kl_one == figures["kl"]["one"]
        assert row.agreement == figures["agreement"]["top1"]
        params = open_run(place).student.variables.params
        sizes = [np.size(x) for block in params.values() for x in _leaves(block)]
        assert row.parameters == sum(sizes)
    names = ("the_run", *(x.name for x in places[1:]))
    for files, format in zip(found.files, ("onnx", "stablehlo"), strict=True):
        assert [x.name for x in files.rows] == [x.name for x in found.rows]
        for row, place, name in zip(files.rows, places, names, strict=True):
            data = (folder / f"{name}.{format}").read_bytes()
            assert row.file_bytes == len(data)
            assert row.zipped_bytes == len(zlib.compress(data, 9)) < row.file_bytes
            assert 0 < row.median_ms <= row.p95_ms
            assert load_exported(str(folder / f"{name}.{format}")).card.network.block_widths == (
                open_run(place).network.block_widths
            )
    flops = [x.flops for x in found.rows]
    assert flops[0] > flops[1] == flops[2]  # a rounding in training is no operation of a file
    onnx = found.files[0].rows
    assert onnx[1].file_bytes < onnx[0].file_bytes
    table = (compressed / "table.md").read_text()
    assert table.strip() == as_markdown(found).strip()
    assert f"| {100 * found.rows[2].top1:.2f} |" in table
    for files in found.files:  # whose columns are told apart
        assert f"p50, ms, {files.runtime}" in table
        assert f" | {files.rows[1].median_ms:.3f} | " in table
    assert "ONNX Runtime" in found.files[0].runtime and "XLA" in found.files[1].runtime


def _leaves(tree):
    return [x for y in tree.values() for x in _leaves(y)] if isinstance(tree, dict) else [tree]


def test_what_is_done_is_not_done_again_and_the_report_shows_it(compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "run")
    step = tmp_path / "run" / "compressed" / "prune-structured-0.5"
    before = {x.name: x.stat().st_mtime_ns for x in (step / "checkpoints").iterdir()}
    done = run_command(
        "compress", tmp_path / "run", "--steps", PRUNED, "--seconds", "0.1",
        "--schedule.total-steps", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is complete: 4 steps" in done.stderr
    assert {x.name: x.stat().st_mtime_ns for x in (step / "checkpoints").iterdir()} == before
    done = run_command("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<h3>Compressed</h3>" in page and f"<th>{PRUNED}</th>" in page
    assert "alt='compressed'" in page


def test_without_litert_nothing_is_trained(trained, tmp_path, capsys, monkeypatch):
    """The extra is named before the first step."""
    from fm_distill.cli.main import main
    from fm_distill.exporting import litert_file

    find = litert_file.importlib.util.find_spec
    extra = ("tensorflow", "ai_edge_litert")
    monkeypatch.setattr(
        litert_file.importlib.util, "find_spec", lambda name: None if name in extra else find(name)
    )
    options = ("--steps", PRUNED, "--format", "tflite", "--to", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as error:
        main(["compress", str(trained / "run"), *options])
    assert error.value.code == 2 and "pip install -e '.[litert]'" in capsys.readouterr().err
    assert not [*(tmp_path / "out").iterdir()]


def test_stopped_it_goes_on(tmp_path, monkeypatch):
    config = tiny_config(student=BATCH_NORM)
    train(config, tmp_path / "run")
    stored = Workdir(tmp_path / "run").stored().config
    steps = ("prune:2:4", "quantise:int8-weights")
    arguments = (tmp_path / "run", steps, stored, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert compress(*arguments, formats=("stablehlo",), seconds=0.1) is None
    status = Workdir(tmp_path / "out" / "prune-2-4").read_status()
    assert status is not None and (status.state, status.step) == ("paused", 2)
    table = compress(*arguments, formats=("stablehlo",), seconds=0.1)
    schedule = Workdir(tmp_path / "out" / "prune-2-4").stored().config.schedule
    assert schedule.total_steps == 3  # half of the run's, since nothing was said
    assert table is not None and "prune:2:4 + quantise:int8-weights" in table
    kept = open_run(tmp_path / "out" / "prune-2-4+quantise-int8-weights").student.variables.params
    for name in ("a", "b", "c"):
        zeros = (np.asarray(kept["block1_unit01"][name]["kernel"]) == 0).mean()
        assert zeros == 0.5
    found = load(tmp_path / "out")
    assert found is not None and found.rows[1].zero_weights > 0.3 * found.rows[1].parameters
    assert found.rows[0].agreement is None  # it learned from labels, without a teacher


def test_inputs_that_do_not_come_in_fours_are_refused_before_the_first_step(tmp_path):
    train(tiny_config(student=BATCH_NORM), tmp_path / "run")
    config = Workdir(tmp_path / "run").stored().config
    steps = ("prune:structured:0.25", "prune:2:4")  # 6 of 8 channels
    with pytest.raises(UserError, match="not a multiple of 4"):
        compress(tmp_path / "run", steps, config, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        compress(tmp_path / "run", (PRUNED,), config, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_the_configs_of_steps():
    config = tiny_config()
    pruned = config_after(config, parse_step("prune:unstructured:0.8"), "a", 100)
    pruning = pruned.student.pruning
    assert (pruning.sparsity, pruning.end_step, pruning.every_steps) == (0.8, 50, 2)
    quantised = config_after(pruned, parse_step("quantise:int8"), "b", 100)
    assert quantised.student.pruning == PruningConfig(pattern="kept")
    again = config_after(quantised, parse_step("prune:1:4"), "c", 100)
    assert again.student.pruning.pattern == "1:4" and again.student.quantisation.quantised
    over = config_after(config, parse_step("prune:structured:taylor:network:0.5"), "e", 100)
    pruning = over.student.pruning
    assert (pruning.criterion, pruning.ranking, pruning.sparsity) == ("taylor", "network", 0.5)
    assert parse_step("prune:structured:network:0.5").pruning.criterion == "magnitude"
    assert parse_step("prune:structured:taylor:0.5").pruning.ranking == "block"
    wider = dataclasses.replace(config, student=dataclasses.replace(NETWORK, block_widths=(8,)))
    assert config_after(wider, parse_step(PRUNED), "d", 100).student.block_widths == ()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (("prune:structured",), "is not one of prune:structured:SHARE"),
        (("prune:unstructured:half",), "is not one of"),
        (("prune:2:4", PRUNED), "cannot follow prune:2:4"),
        (("quantise:int8", "prune:2:4", "quantise:int4-weights"), "cannot follow quantise:int8"),
    ],
)
def test_what_cannot_follow_what(steps, said):
    with pytest.raises(UserError, match=said):
        check_order(tuple(map(parse_step, steps)), PruningConfig())
    with pytest.raises(UserError, match="cannot follow the run's own pruning"):
        check_order((parse_step(PRUNED),), PruningConfig(pattern="kept"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "compress needs --steps"),
        (("--steps", "prune:structured:0.95"), "leaves none of the 8 inner channels"),
        (("--steps", "prune:unstructured:0.5"), "standardises its kernels"),
        (("--steps", PRUNED, "--log.final-evaluation", "False"), "leaves nothing to compare"),
        (("--steps", PRUNED, "--max-hours", "0"), "--max-hours is 0"),
        (("--step", PRUNED), "there is no option --step"),
        (("--steps", PRUNED, "--student.pruning.scope", "layer"), "follows from --steps"),
        (("--steps", PRUNED, "--views.central-fraction", "0.5"), "that the run was evaluated with"),
        (("--steps", PRUNED, "--data.test.name", "validation"), "data.test, views.central_fract"),
        (("--steps", PRUNED, "--seconds", "0"), "--seconds is 0"),
        (("--steps", *["prune:structured:0.1"] * 12), "12 steps have 251 characters together"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(trained, capsys, options, said):
    from fm_distill.cli.main import main

    with pytest.raises(SystemExit) as error:
        main(["compress", str(trained / "run"), *options])
    assert error.value.code == 2 and said in capsys.readouterr().err
    assert not (trained / "run" / "compressed" / "prune-structured-0.95").exists()


def test_another_run_in_the_same_folder_is_refused(compressed, tmp_path, capsys):
    """Its teacher, its weights and its config are known from what lies there."""
    from fm_distill.cli.main import main

    options = ("--steps", PRUNED, "--schedule.total-steps", "4", "--format", "stablehlo")
    shutil.copytree(compressed, tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        main(["compress", str(tmp_path / "run"), *options[:2], "--schedule.total-steps", "5"])
    assert error.value.code == 2 and "belongs to another compression" in capsys.readouterr().err
    train(tiny_config(seed=5, ema_decay=0.5), tmp_path / "other")
    start = tmp_path / "run" / "checkpoints"
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "other" / "checkpoints", start)  # as if it was trained again
    with pytest.raises(SystemExit) as error:
        main(["compress", str(tmp_path / "run"), *options])
    assert error.value.code == 2
    assert "was started from other weights or teachers" in capsys.readouterr().err


def test_a_run_that_is_not_complete_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    config = Workdir(tmp_path / "run").stored().config
    with pytest.raises(UserError, match="is not complete"):
        compress(tmp_path / "run", (PRUNED,), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "compression.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path)
    assert load(tmp_path / "none") is None


def test_a_full_disk_is_more_than_a_file_left_out(tmp_path, monkeypatch):
    def export(workdir, path, *, overwrite):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error

    monkeypatch.setattr("fm_distill.reports.compress.export", export)
    with pytest.raises(UserError, match="cannot be written"):
        _is_exported("dense", tmp_path, tmp_path / "dense.onnx")
