"""Evidence from a run's config, status and log, before anything is opened."""

import numpy as np

from fm_distill.config.objective import terms_of
from fm_distill.diagnosis.evidence import Log, Setting
from fm_distill.objectives.curves import progress_of, value_at
from fm_distill.runs.history import History
from fm_distill.runs.stored_run import StoredRun
from fm_distill.runs.workdir import Workdir
from fm_distill.train_step.step import ADAPTER_GRADIENT, TERM_COSINE, TERM_GRADIENT
from fm_distill.training.rollback import read_rollbacks


def setting_of(stored: StoredRun, workdir: Workdir, step: int, complete: bool) -> Setting:
    """What the run was asked for, and how far it is."""
    config, resolved = stored.config, stored.resolved
    objective, status = config.objective, workdir.read_status()
    progress = progress_of(max(step - 1, 0), resolved.total_steps)
    views, curves = (
        config.views,
        [objective.temperature_schedule, *(x.schedule for x in terms_of(objective))],
    )
    return Setting(
        teaching=config.teaching,
        step=step,
        total_steps=resolved.total_steps,
        warmup_steps=config.schedule.warmup_steps,
        temperature=objective.temperature
        * float(value_at(objective.temperature_schedule, progress)),
        complete=complete,
        keeps_statistics=config.student.keep_statistics,
        ends_with_central_statistics=config.student.final_statistics == "central",
        failure=status.reason if status is not None and status.state == "failed" else "",
        rollbacks=len(read_rollbacks(workdir)),
        comparable=not any(x.points for x in curves)
        and not any(
            (views.smallest_area_points, views.resolution_points, views.mixup_strength_points)
        ),
    )


def log_of(history: History, batch_size: int) -> Log:
    """The lines of `train` as arrays."""
    lines = [x for x in history.lines if x["split"] == "train"]

    def column(name: str) -> np.ndarray:
        values = (x.get(name) for x in lines)
        return np.array([np.nan if x is None else float(x) for x in values])

    def named(prefix: str) -> list[str]:
        names = (x.removeprefix(prefix) for line in lines for x in line if x.startswith(prefix))
        return list(dict.fromkeys(names))

    return Log(
        step=column("step"),
        loss=column("loss"),
        learning_rate=column("learning_rate"),
        update_norm=column("update_norm"),
        gradient_norm=column("gradient_norm"),
        seconds=np.diff(column("step"), prepend=0) * batch_size / column("images_per_second"),
        data_wait=column("data_wait"),
        terms={x: column(f"weight_{x}") * column(f"term_{x}") for x in named("term_")},
        adapter_gradients={x: column(ADAPTER_GRADIENT + x) for x in named(ADAPTER_GRADIENT)},
        term_gradients={x: column(TERM_GRADIENT + x) for x in named(TERM_GRADIENT)},
        term_cosines={x: column(TERM_COSINE + x) for x in named(TERM_COSINE)},
    )
