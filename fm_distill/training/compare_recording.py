"""Recorded outputs compared with the teachers' outputs on this machine."""

import jax
import jax.numpy as jnp
import numpy as np

from fm_distill.array_tree import AnyArray
from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.data.feeding import Reader, stack
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch
from fm_distill.objectives.distances import kl_divergence
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import TargetRows, decode
from fm_distill.system.sharding import Layout
from fm_distill.training.record_program import make_record_program
from fm_distill.training.recorded import checked_steps
from fm_distill.views.draws import ViewRoot


def compare_with_teachers(
    config: Config,
    teachers: tuple[Branch, ...],
    frozen: tuple[Variables, ...],
    recording: RecordingReader,
    reader: Reader,
    layout: Layout,
    root: ViewRoot,
) -> str:
    """How far the recorded outputs of some steps are from the teachers' outputs on this machine."""
    view_sampling = regime_of(config).views
    program = make_record_program(config, view_sampling, teachers, layout, taps=recording.taps)
    steps = checked_steps(config, recording.period_steps)
    comparisons, deviations = [], list[float]()
    for step in steps:
        recorded = jax.tree.map(lambda x: x[0], recording.at(step))
        batch = stack([reader[i] for i in recorded.examples.tolist()])
        batch = jax.device_put(batch, layout.batch)
        outputs = program(frozen, None, batch, root, jnp.int32(step))
        assert outputs.logits is not None
        comparisons.append(compared(recorded.rows, tuple(jnp.moveaxis(outputs.logits[0], 1, 0))))
        pairs = [(x, outputs.features[name][0]) for name, x in recorded.rows.features.items()]
        deviations += [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs]
    difference, kl, agreement = np.array(comparisons).T
    step_numbers = ", ".join(f"{x:,}" for x in steps)
    logits = (
        f"the recording compared with the teachers on this machine, in steps {step_numbers}: "
        f"logits differ by at most {difference.max():.2g}, KL {kl.mean():.2g} nats, agreement "
        f"{agreement.mean():.2%}"
    )
    if not recording.taps:
        return logits
    taps = ", ".join(recording.taps)
    return (
        f"{logits}; features of {taps} by at most {max(deviations):.2g} of their largest magnitude"
    )


def compared(found: TargetRows, logits: tuple[AnyArray, ...]) -> tuple[float, float, float]:
    """Largest difference, mean KL in nats and agreement of recorded logits with present ones."""
    if found.indices is not None:
        logits = tuple(
            jnp.take_along_axis(x, jnp.asarray(found.indices[:, i].astype(np.int32)), axis=-1)
            for i, x in enumerate(logits)
        )
        recorded_logits = tuple(x[..., :-1] for x in decode(found))
    else:
        recorded_logits = decode(found)
    pairs = list(zip(recorded_logits, logits, strict=True))
    difference = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    kl = float(np.mean([kl_divergence(a, b).mean() for a, b in pairs]))
    agreement = float(np.mean([(a.argmax(-1) == b.argmax(-1)).mean() for a, b in pairs]))
    return difference, kl, agreement
