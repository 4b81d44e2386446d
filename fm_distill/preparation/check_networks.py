"""The checks of networks and teachers, as far as the config describes them."""

from collections.abc import Iterator

from fm_distill.config import Config, NetworkConfig, TeacherConfig, with_quantisation
from fm_distill.config.bounds import out_of_bounds
from fm_distill.config.choices import not_a_choice
from fm_distill.config.networks import FUNCTION
from fm_distill.config.regime import regime_of
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.errors import UserError
from fm_distill.models import MODELS, check_network, is_own
from fm_distill.preparation.input_moments import wrong_moments


def wrong_network(option: str, network: NetworkConfig) -> Iterator[str]:
    """A sentence for each thing that is wrong with the network that `option` sets."""
    custom = is_own(network.model)
    problems = [] if custom else list(not_a_choice(f"{option}.model", network.model, MODELS))
    yield from problems
    yield from wrong_moments(option, network)
    if not problems and not any(out_of_bounds(network)):
        try:
            check_network(network)
        except (ValueError, UserError) as error:
            yield f"{option}: {error}"


def wrong_teachers(config: Config) -> Iterator[str]:
    """A sentence for each thing that is wrong with the teachers, and with how they are used."""
    if config.objective.target == "teacher" and config.teacher is None:
        yield (
            "objective.target=teacher needs a teacher: give teacher.weights, teacher.experiment, "
            "teacher.workdir or teacher.recording, or use objective.target=labels"
        )
    if config.more_teachers and config.teacher is None:
        yield (
            "more_teachers are added to a teacher, and there is none; give the first one as teacher"
        )
    for option, teacher in teachers_of(config):
        yield from _wrong_teacher(option, teacher)
    yield from _wrong_use_of_quantised(config)
    if recording_of(config) is not None:
        yield from _wrong_with_recording(config)


def _wrong_teacher(option: str, teacher: TeacherConfig) -> Iterator[str]:
    if teacher.function:
        yield from _wrong_function(option, teacher)
    elif teacher.network:
        if teacher.network.input_range == "adapt":
            yield (
                f"{option}.network.input_range=adapt: a teacher keeps the input range that it was "
                "trained with; use auto (a run, or an export, with adapt brings its own moments)"
            )
        yield from wrong_network(f"{option}.network", teacher.network)
        if teacher.network.quantisation.quantised:
            yield (
                f"{option}.network.quantisation: a network that is loaded from weights alone has "
                "no ranges of activations; leave it out, calibrate them on training views with "
                f"{option}.quantisation, or give the run of a quantised student as "
                f"{option}.workdir"
            )
    if teacher.quantisation.quantised:
        yield from _wrong_quantisation(option, teacher)
    if teacher.recording and option != "teacher":
        yield f"{option}.recording: a recording holds all teachers; give it as teacher.recording"
    if teacher.weights and (teacher.experiment or teacher.workdir):
        yield (
            f"{option}.weights and a teacher's run ({option}.experiment, {option}.workdir) exclude "
            f"each other; keep one (`--{option}.experiment None` drops the file's)"
        )


def _wrong_quantisation(option: str, teacher: TeacherConfig) -> Iterator[str]:
    quantisation = teacher.quantisation
    if teacher.function:
        yield (
            f"{option}.quantisation quantises layers of a network, and {option}.function is "
            "called as it is; leave out one of them"
        )
    elif "none" in (quantisation.weights, quantisation.activations):
        yield (
            f"{option}.quantisation has weights={quantisation.weights} and "
            f"activations={quantisation.activations}, which does not make a teacher faster: give "
            "both, or neither"
        )
    elif teacher.network and not (
        any(out_of_bounds(teacher.network))
        or any(wrong_network(f"{option}.network", teacher.network))
    ):
        yield from wrong_network(option, with_quantisation(teacher.network, quantisation))


def _wrong_use_of_quantised(config: Config) -> Iterator[str]:
    options = [x.option for x in teachers_of(config) if x.config.quantisation.quantised]
    if not options:
        return
    option = options[0]
    if recording_of(config) is not None:
        yield (
            f"{option}.quantisation belongs to the recording, which holds the teacher's outputs; "
            "leave it out, and give it to `fm-distill record`"
        )
    elif (targets := regime_of(config).targets) != "teachers":
        reasons = {"labels": "labels teach", "table": "teaching=fixed runs each teacher only once"}
        yield (
            f"{option}.quantisation is for a teacher that runs in each step, and "
            f"{reasons[targets]}; leave it out"
        )


def _wrong_function(option: str, teacher: TeacherConfig) -> Iterator[str]:
    network = teacher.network
    if network is None or network.model != FUNCTION or network.input_range in ("auto", "adapt"):
        yield (
            f"{option}.function needs to know its images: give {option}.network = "
            f"NetworkConfig(model={FUNCTION!r}, resolution=..., input_range='imagenet')"
        )
    if teacher.weights or teacher.experiment or teacher.workdir:
        yield (
            f"{option}.function and the teacher's weights or run ({option}.weights, "
            f"{option}.experiment, {option}.workdir) exclude each other; keep one"
        )


def _wrong_with_recording(config: Config) -> Iterator[str]:
    if config.objective.target == "labels":
        yield (
            "teacher.recording teaches, and objective.target=labels learns from labels; leave out "
            "one of them (`--teacher.recording None`)"
        )
    if config.teaching == "fixed":
        yield (
            "teaching=fixed computes its targets once by itself, and needs no teacher.recording; "
            "leave it out"
        )
    if config.divergence.action == "skip":
        yield (
            "divergence.action=skip leaves out batches, and a recording holds those of each step; "
            "use stop or slow"
        )
