"""Every file of a workdir, damaged in every way: a sentence or a repair, never a traceback."""

import json
import pathlib
import shutil

import pytest
from conftest import CACHE, write_experiment

from fm_distill.cli.main import main
from fm_distill.runs.history import read_history
from fm_distill.runs.workdir import Workdir

CHANGES = (
    "mesh=MeshConfig(data=1), schedule=ScheduleConfig(total_steps=4, warmup_steps=1), "
    "log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False)"
)
WRONG_TYPES = ("null", "[]", "{}", "3", '"text"')


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Commands in this process leave its compilation cache where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment and the workdir of its complete run, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    experiment = write_experiment(folder / "x.py", CHANGES)
    with pytest.raises(SystemExit) as left:
        main(["train", str(experiment), "--workdir", str(folder / "run")])
    assert left.value.code == 0
    return folder


def command(capsys, *arguments) -> tuple[int, str]:
    """Exit code and all that was printed; any other exception is the traceback of a user."""
    with pytest.raises(SystemExit) as left:
        main([str(x) for x in arguments])
    printed = capsys.readouterr()
    return left.value.code, printed.out + printed.err


def wrong_fields(text: str) -> str:
    """Each field of a JSON object with a value of a type that it never has."""
    return json.dumps({name: {"not": ["this"]} for name in json.loads(text)})


def damage(path: pathlib.Path, how: str) -> None:
    contents = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "truncated":
        path.write_bytes(contents[: len(contents) // 2])
    elif how == "wrong fields":
        path.write_text(wrong_fields(contents.decode()))
    else:
        path.write_bytes({"empty": b"", "not JSON": b"\xff\x00{"}.get(how, how.encode()))


def contents_of(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    # The lock is opened for writing by whoever asks for it.
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def one_array(checkpoint: pathlib.Path) -> str:
    """The largest file of a checkpoint."""
    files = (x for x in checkpoint.rglob("*") if x.is_file())
    return max(files, key=lambda x: x.stat().st_size).relative_to(checkpoint.parents[1]).as_posix()


WAYS = ("empty", "truncated", "not JSON", "missing", "folder")
JSON_WAYS = (*WAYS, "wrong fields", *WRONG_TYPES)
CASES = [
    *(("config.json", how) for how in JSON_WAYS),
    *(("status.json", how) for how in JSON_WAYS),
    *(("evaluation.json", how) for how in JSON_WAYS),
    *(("checkpoints/4/digests.json", how) for how in JSON_WAYS),
    *(("array", how) for how in WAYS),
    *(("metrics.jsonl", how) for how in (*WAYS, *WRONG_TYPES)),
    *(("rollbacks.json", how) for how in (*WAYS, *WRONG_TYPES, '[{"at_step": 4}]')),
    *(("lock", how) for how in WAYS),
]
# One wrong type stands for all where a case takes seconds.
SLOW_CASES = [case for case in CASES if case[1] not in WRONG_TYPES[1:]]
READ = ("config.json", "status.json", "checkpoints/4/digests.json", "array")


@pytest.fixture
def damaged(made, tmp_path, request):
    """A copy of the run, in which one file is damaged."""
    name, how = request.param
    run = shutil.copytree(made / "run", tmp_path / "run")
    if name == "rollbacks.json":
        (run / name).write_text("[]")
    if name in ("rollbacks.json", "metrics.jsonl"):  # a complete run does not read them
        text = (run / "status.json").read_text()
        (run / "status.json").write_text(text.replace('"complete"', '"paused"'))
    damage(run / (one_array(run / "checkpoints" / "4") if name == "array" else name), how)
    return run


@pytest.mark.parametrize("damaged", CASES, indirect=True, ids=lambda x: f"{x[0]}-{x[1]}")
def test_status_says_it(damaged, capsys):
    before = contents_of(damaged)
    code, printed = command(capsys, "status", damaged)
    assert code in (0, 2) and "Traceback" not in printed, printed
    assert contents_of(damaged) == before
    # Complete is only what can be evaluated.
    intact = "checkpoint 4: intact" in printed
    assert intact or "complete\n" not in printed


@pytest.mark.parametrize("damaged", SLOW_CASES, indirect=True, ids=lambda x: f"{x[0]}-{x[1]}")
def test_train_repairs_or_refuses_it(damaged, made, capsys):
    before = contents_of(damaged)
    code, printed = command(capsys, "train", made / "x.py", "--workdir", damaged)
    assert code in (0, 2), printed
    after = contents_of(damaged)
    if code == 2:
        assert after == before
        return
    # Only what is damaged is made again; what is whole stays as it was.
    whole = {x for x in before if "checkpoints/2" in x.as_posix()} | {damaged / "config.json"}
    assert {x: after[x] for x in whole} == {x: before[x] for x in whole}
    assert command(capsys, "status", damaged)[1].startswith("complete\n")


@pytest.mark.parametrize(
    "damaged",
    [case for case in SLOW_CASES if case[0] in READ],
    indirect=True,
    ids=lambda x: f"{x[0]}-{x[1]}",
)
def test_evaluate_reads_what_is_whole(damaged, capsys):
    before = contents_of(damaged)
    code, printed = command(capsys, "evaluate", damaged, "--json")
    assert code in (0, 2), printed
    assert contents_of(damaged) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("evaluation.json", {"student": {"top1": 0.5, "top5": "x", "ece": [1]}}),
        ("evaluation.json", {"retention_interval": [None, 1]}),
        ("config.json", {"resolved": {"class_names": ["one"]}}),
        ("config.json", {"resolved": {"classes": -1}}),
    ],
)
def test_values_that_no_run_has(made, tmp_path, capsys, name, change):
    run = shutil.copytree(made / "run", tmp_path / "run")
    tree = json.loads((run / name).read_text())
    for field, value in change.items():
        tree[field] = tree[field] | value if isinstance(value, dict) else value
    (run / name).write_text(json.dumps(tree))
    before = contents_of(run)
    code, printed = command(capsys, "report", run, "--out", tmp_path / "page.html")
    if name == "config.json":
        assert code == 2 and "is damaged: it has" in printed
    else:
        assert code == 0 and "evaluation.json is damaged and is ignored" in printed
    assert contents_of(run) == before


def test_lines_without_a_finite_step_are_left_out(tmp_path):
    good = {"step": 4, "epoch": 0.1, "split": "train", "loss": float("nan")}
    wrong = [good | {"step": float("nan")}, good | {"epoch": float("inf")}, good | {"step": None}]
    text = "".join(json.dumps(x) + "\n" for x in (good, *wrong))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [x["step"] for x in read_history(tmp_path).lines] == [4]


def test_a_lost_status_is_read_off_config_and_checkpoints(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "status.json").unlink()
    code, printed = command(capsys, "status", run)
    assert code == 0 and "step 4 of 4" in printed


def test_a_complete_run_without_checkpoints(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    before = contents_of(run)
    code, printed = command(capsys, "status", run)
    assert code == 0 and "it was complete, but its checkpoint 4 is not intact" in printed
    code, printed = command(capsys, "train", made / "x.py", "--workdir", run)
    assert code == 2 and "no longer has a checkpoint" in printed
    assert contents_of(run) == before


def test_status_while_the_teacher_comes_first(made, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert command(capsys, "status", run)[0] == 2
    teacher = shutil.copytree(made / "run", run / "teacher")
    said = json.loads((teacher / "status.json").read_text()) | {"state": "paused", "step": 2}
    (teacher / "status.json").write_text(json.dumps(said))
    code, printed = command(capsys, "status", run)
    assert code == 0
    assert printed.startswith(
        f"paused: its teacher in {teacher} is trained first, after 2 of 4 steps\n"
    )
    with Workdir(run).locked():
        assert command(capsys, "status", run)[1].startswith("running: its teacher in")
    Workdir(run).set_status("paused", 0, 6, "stopped by SIGTERM")
    printed = command(capsys, "status", run)[1]
    assert printed.startswith("paused: stopped by SIGTERM; its teacher in")
    assert "step 0 of 6" in printed
