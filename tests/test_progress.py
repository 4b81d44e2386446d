"""Progress in a file: a line now and then, of a clock that the test turns; no pieces of bars."""

import contextlib

import pytest

from fm_distill.system.console import LINE_EVERY_S, ProgressLines, progress, steps_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_line_now_and_then_and_one_at_the_end(capsys):
    clock = Clock()
    with contextlib.closing(ProgressLines("digits", "steps", 400, 100, clock)) as lines:
        for i in range(30):
            clock.now += LINE_EVERY_S / 10
            lines.update(10, "loss 0.5" if i % 5 == 0 else "")
    written = capsys.readouterr().err.splitlines()
    # Ten updates make a line; 3 s for 10 steps.
    assert written == [
        "digits: 200 of 400 steps (50%), loss 0.5, about 1.0 minutes left",
        "digits: 300 of 400 steps (75%), loss 0.5, about 0.5 minutes left",
        "digits: 400 of 400 steps (100%), loss 0.5, about 0.0 minutes left",
    ]


def test_what_ends_between_two_lines_has_a_last_one(capsys):
    clock = Clock()
    with contextlib.closing(ProgressLines("copying", "files", 11, clock=clock)) as lines:
        for _ in range(11):
            clock.now += LINE_EVERY_S / 10
            lines.update(1)
    written = capsys.readouterr().err.splitlines()
    assert [x.split(" of ")[0] for x in written] == ["copying: 10", "copying: 11"]


def test_the_first_step_which_compiles_is_no_pace(capsys):
    clock = Clock()
    with contextlib.closing(ProgressLines("digits", "steps", 61, clock=clock)) as lines:
        for seconds in (60, 30):
            clock.now += seconds
            lines.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "digits: 1 of 61 steps (2%)",
        "digits: 2 of 61 steps (3%), about 29.5 minutes left",
    ]


@pytest.mark.parametrize("show", [True, False])
def test_something_short_leaves_nothing_in_a_file(capsys, show):
    assert list(progress(range(5), "reading", "checkpoints", 5)) == list(range(5))
    with contextlib.closing(steps_progress("digits", 10, 0, show)) as bar:
        bar.update(10, "loss 0.5")
    assert capsys.readouterr() == ("", "")
