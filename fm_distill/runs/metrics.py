"""What a run writes while it runs: `metrics.jsonl` and TensorBoard files.

Each line of `metrics.jsonl` is one object: `step` (steps done), `epoch`, `split` (`train` or
`validation`) and numbers by name. A resumed run first drops the lines beyond its checkpoint, so
that each step stands there once.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType

from tensorboardX import SummaryWriter

from fm_distill.system.files import replacing


class MetricsWriter:
    """Appends to `metrics.jsonl` and, unless turned off, to TensorBoard files beside it."""

    def __init__(
        self,
        path: pathlib.Path | None,
        resumed_step: int,
        tensorboard: bool,
        evaluation_pending: bool = False,
    ):
        """Without a path nothing is written: of several processes one writes.

        `evaluation_pending`: the evaluation at `resumed_step` is done anew.
        """
        self._file = self._board = None
        if path is None:
            return
        _drop_after(path, resumed_step, evaluation_pending)
        self._file = path.open("a", buffering=1)  # a reader sees each line at once
        if tensorboard:
            folder = str(path.parent / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=resumed_step + 1)

    def write(
        self, step: int, epoch: float, split: str, values: Mapping[str, float | None]
    ) -> None:
        """Writes one line; numbers that are not finite become null, as JSON lacks them."""
        numbers = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        record = {"step": step, "epoch": round(epoch, 4), "split": split} | numbers
        if self._file:
            self._file.write(json.dumps(record) + "\n")
        if self._board:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Hands all to the operating system: before a checkpoint that counts on these lines."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board:
            self._board.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def _drop_after(path: pathlib.Path, step: int, evaluation_pending: bool) -> None:
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept_lines = [line for line in lines if _order(line) <= (step, not evaluation_pending)]
    if len(kept_lines) < len(lines):
        with replacing(path) as temporary:
            temporary.write_text("".join(kept_lines))


def _order(line: str) -> tuple[float, bool]:
    """Step, and whether it is an evaluation; a line that a crash cut short belongs to no step."""
    try:
        record = json.loads(line) if line.endswith("\n") else {"step": math.inf}
        return float(record["step"]), record.get("split") == "validation"
    except (ValueError, KeyError, TypeError, AttributeError):
        return math.inf, False
