"""The tools that read finished runs: a table and a picture."""

import json
import subprocess
import sys

from conftest import ROOT
from PIL import Image


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
    found = run_tool("compare_runs.py", f"one={trained / 'run'}", f"two={trained / 'run'}")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| one | 1 |")
    wrong = run_tool("compare_runs.py", f"x={tmp_path}")
    assert wrong.returncode == 1 and "not complete" in wrong.stderr
