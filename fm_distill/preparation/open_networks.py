"""The networks of a run, and whether a teacher without a head suits it.

A published body, such as DINOv2's, has features and no logits: it teaches a run all of whose
terms read features, or labels.
"""

import pathlib
from collections.abc import Iterator

from fm_distill.config import Config
from fm_distill.config.objective import BY_DIFFICULTY, LABELS, terms_of
from fm_distill.config.teachers import teachers_of
from fm_distill.data.splits import Data
from fm_distill.errors import UserError
from fm_distill.networks.loading import Networks, load_networks
from fm_distill.objectives.features import OF_FEATURES
from fm_distill.runs.metric_table import BY_NAME


def open_networks(config: Config, workdir: pathlib.Path, data: Data) -> Networks:
    """`load_networks` with the classes of `data`.

    Raises `UserError` also where a teacher has no head and the run needs its logits.
    """
    train = data.train
    networks = load_networks(config, workdir, train.classes, train.class_names)
    for i, teacher in enumerate(networks.teachers):
        if not teacher.has_head and (
            problem := next(_wrong(config, teachers_of(config)[i].option), "")
        ):
            raise UserError(problem)
    return networks


def _wrong(config: Config, option: str) -> Iterator[str]:
    """What the run needs of the teacher that `option` gives, which has no head."""
    objective, metric = config.objective, config.checkpoint.keep_best
    kinds = [term.kind for term in terms_of(objective)]
    for kind in kinds:
        if kind not in OF_FEATURES and kind != LABELS:
            yield (
                f"the term {kind} reads the teacher's logits, and {option} has no head: use terms "
                "of its features alone (objective.terms, such as bank_similarity), or weights "
                "with a head, for example of a run that was started from these "
                "(--student.weights)"
            )
    if not OF_FEATURES & {*kinds}:
        yield (
            f"{option} has no head, and no term reads its features: leave it out, or give "
            "objective.terms one of features, such as bank_similarity"
        )
    if objective.example_weights.kind in BY_DIFFICULTY:
        yield (
            f"objective.example_weights.kind={objective.example_weights.kind} needs the teacher's "
            f"logits, and {option} has no head: weight by class, or leave it out"
        )
    if config.teacher and config.teacher.quantisation.quantised:
        yield (
            f"{option}.quantisation is checked by the teacher's classes, and it has no head; "
            "leave it out"
        )
    if metric and BY_NAME[metric].path[0] != "student":
        yield (
            f"checkpoint.keep_best={metric} compares with the teacher's logits, and {option} has "
            "no head; use student_top1"
        )
