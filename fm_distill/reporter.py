"""What a running loop says: lines of `metrics.jsonl`, remarks, and the progress bar."""

import math
import sys
import time
from typing import Any

import jax
from jaxtyping import Array
from tqdm import tqdm

from fm_distill.errors import TrainingFailed
from fm_distill.metrics import MetricsWriter
from fm_distill.setup import Setup
from fm_distill.stopping import say


class Reporter:
    """Fetches metrics a dispatch late, so that the device never waits for the host."""

    def __init__(self, setup: Setup, writer: MetricsWriter, bar: Any, start: int):
        self.setup, self.writer, self.bar = setup, writer, bar
        self.late: tuple[int, int, dict[str, Array]] | None = None
        self.mark = start, time.monotonic()

    def dispatched(self, step: int, steps: int, metrics: dict[str, Array]) -> None:
        """Reports the dispatch before, and keeps this one for later."""
        self.catch_up()
        self.late = step, steps, metrics

    def catch_up(self) -> None:
        """Reports what is late. Raises `TrainingFailed` where its loss is not finite."""
        if self.late is None:
            return
        (step, steps, metrics), self.late = self.late, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            raise TrainingFailed(
                f"the loss is not finite at step {step:,}; the last checkpoint before it is kept. "
                "Try a lower optimizer.learning_rate, a longer schedule.warmup_steps or "
                "--precision float32"
            )
        self.bar.update(steps)
        every = self.setup.config.log.every_steps
        if step // every > (step - steps) // every or step == self.setup.total_steps:
            self._log(step, values)

    def evaluated(self, figures: dict[str, Any]) -> None:
        """Writes the figures of the validation split."""
        values = {
            "student_top1": figures["student"]["top1"],
            "student_cross_entropy": figures["student"]["cross_entropy"],
            "teacher_top1": figures["teacher"]["top1"],
            "agreement_top1": figures["agreement"]["top1"],
            "kl_train_temperature": figures["kl"]["train_temperature"],
            "kl_one": figures["kl"]["one"],
            "training_view_agreement_top1": figures["training_view"]["agreement"]["top1"],
            "training_view_kl": figures["training_view"]["kl"]["train_temperature"],
        }
        known = {name: value for name, value in values.items() if value is not None}
        step = figures["step"]
        self.writer.write(step, self._epoch(step), "validation", known)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in known.items())
        say(f"step {step:,} validation: {shown}")
        self.mark = step, time.monotonic()

    def _log(self, step: int, values: dict[str, float]) -> None:
        before, since = self.mark
        self.mark = step, time.monotonic()
        seconds = max(self.mark[1] - since, 1e-9)
        config = self.setup.config
        rate = (step - before) * config.batch_size / seconds
        shape = float(jax.device_get(self.setup.built.schedule(step - 1)))
        epoch = self._epoch(step)
        values |= {
            "learning_rate": config.optimizer.learning_rate * shape,
            "images_per_second": rate,
        }
        if self.setup.feed.skipped:
            values["corrupt_images"] = self.setup.feed.skipped
        self.writer.write(step, epoch, "train", values)
        text = f"epoch {epoch:.1f}, loss {values['loss']:.4f}, {rate:,.0f} img/s"
        self.bar.set_postfix_str(text, refresh=False)

    def _epoch(self, step: int) -> float:
        return step * self.setup.config.batch_size / len(self.setup.reader)


def progress_bar(setup: Setup, start: int) -> Any:
    """On standard error."""
    return tqdm(
        total=setup.total_steps,
        initial=start,
        unit="step",
        desc=setup.config.name,
        # A log file gets a line every half minute, a terminal ten a second.
        mininterval=0.1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
