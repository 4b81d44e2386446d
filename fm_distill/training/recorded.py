"""Whether a recording holds what the teachers would output for the views of this run."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32, UInt64

from fm_distill.config import Config, ObjectiveConfig
from fm_distill.config.objective import LABELS, terms_of
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.data.feeding import Reader
from fm_distill.errors import UserError
from fm_distill.objectives.features import OF_FEATURES
from fm_distill.objectives.terms import features_of, temperature_of_rest, temperatures_of
from fm_distill.recordings.header import (
    VIEW_VERSION,
    RecordedTap,
    RecordingHeader,
    drawn_views,
    header_differences,
    rendered,
)
from fm_distill.recordings.manifest import Recording, open_recording, present, read_manifests
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import RowType
from fm_distill.recordings.view_digest import COEFFICIENT_STEP, same_views, view_digests
from fm_distill.runs.remote import fetch_recording, is_remote, recording_in
from fm_distill.runs.workdir import Workdir
from fm_distill.system.processes import broadcast_from_first, first_process
from fm_distill.views.draws import Draw, run_keys, step_draws

CHECKED_STEPS = 3  # the first one and some others, drawn by the seed
# Of the images whose views show that a random number generator is the same.
GOLDEN_SIZES = np.stack([100 + np.arange(64), 163 - np.arange(64)], axis=1).astype(np.int32)

# `(step, sizes) -> draw`, of a row each.
Draws = Callable[[int, Int32[np.ndarray, "batch 2"]], Draw]


def make_header(
    config: Config,
    resolved: ResolvedRun,
    dtype: RowType,
    top_k: int | None,
    taps: tuple[RecordedTap, ...] = (),
) -> RecordingHeader:
    """What a recording of the run of `config` depends on."""
    return RecordingHeader(
        seed=config.seed,
        batch_size=config.batch_size,
        view_law=regime_of(config).views,
        views=drawn_views(config.views),
        view_version=VIEW_VERSION,
        golden=golden_digests(config),
        data=resolved.data,
        examples=resolved.examples,
        canvas=config.data.canvas,
        teachers=resolved.teachers,
        teacher_weights=resolved.teacher_weights,
        classes=resolved.classes,
        class_names=resolved.class_names,
        precision=resolved.precision,
        target_images=resolved.target_images,
        dtype=dtype,
        top_k=top_k,
        temperature=None if top_k is None else temperature_of_rest(config.objective),
        taps=taps,
        code_files={
            x: file
            for x, file in resolved.code_files.items()
            if x in [network.model for network in resolved.teachers]
        },
    )


def refuse_another_recording(config: Config) -> None:
    """Raises `UserError` where the recording that `config` names is of another run.

    Only of what the config fixes: the data and the teachers are compared when they are open. Also
    where a teacher is a function and there is no recording.
    """
    path = recording_of(config)
    if path is None:
        return _refuse_functions(config)
    if not is_remote(path):  # one at a URL is compared when its manifests are here
        _refuse_header(config, open_recording(path).header, path)


def with_recording_here(config: Config, workdir: Workdir) -> Config:
    """`config` with the copy of a recording that lies at a URL, which is fetched into `workdir`.

    A run that has begun goes on with the copy that it has. Raises `UserError` where the recording
    is of another run, before the rest of it is fetched.
    """
    url = recording_of(config)
    if config.teacher is None or url is None or not is_remote(url):
        return config
    copy = recording_in(workdir.path)

    def check(manifests: pathlib.Path) -> None:
        _refuse_header(config, read_manifests(manifests)[0], url)

    refusal = None
    if first_process() and not (workdir.has_config() and copy.exists()):
        try:
            fetch_recording(url, workdir.path, check)
        except UserError as error:
            refusal = error
    # The others wait until it is there, or end with the first one.
    if broadcast_from_first(int(refusal is not None)):
        raise refusal or UserError(f"{url} is refused; the first process says why")
    local_config = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, recording=str(copy))
    )
    refuse_another_recording(local_config)
    return local_config


def _refuse_header(config: Config, header: RecordingHeader, place: str) -> None:
    mismatches = header_differences(header, rendered(config))
    objective = config.objective
    if header.top_k is not None:
        other_temperatures = temperatures_of(objective) - {header.temperature}
        if other_temperatures or objective.temperature_schedule.points:
            mismatches.append(
                f"objective.temperature: {header.temperature} in the recording of the top "
                f"{header.top_k}, which sums the other classes at that temperature, and "
                f"{', '.join(map(str, sorted(other_temperatures))) or 'a schedule'} in this run"
            )
        supported_kinds = {"kl", LABELS, *OF_FEATURES}
        if unsupported := [x.kind for x in terms_of(objective) if x.kind not in supported_kinds]:
            mismatches.append(
                f"objective: {', '.join(unsupported)}, and a recording of the top {header.top_k} "
                "supports only kl"
            )
        if objective.example_weights.kind == "teacher_entropy":
            mismatches.append(
                "objective.example_weights.kind: teacher_entropy is that of all classes, and the "
                f"recording has the top {header.top_k}; use teacher_distance"
            )
        if len(header.teachers) > 1 and objective.ensemble != "sum_of_distances":
            mismatches.append(
                f"objective.ensemble: {objective.ensemble} needs all classes of each teacher, and "
                f"the recording has the top {header.top_k}; use sum_of_distances"
            )
    if header.view_version != VIEW_VERSION:
        mismatches.append(
            f"the version of the views: {header.view_version} in the recording, {VIEW_VERSION} now"
        )
    mismatches += _missing_taps(objective, header)
    if mismatches:
        raise UserError(
            f"the recording in {place} belongs to another run:\n  "
            + "\n  ".join(mismatches)
            + "\ngive these values, or record this run with `fm-distill record`"
        )


def _missing_taps(objective: ObjectiveConfig, header: RecordingHeader) -> list[str]:
    """A line for each of the teacher's features that a term reads and the recording lacks."""
    tap_names = header.tap_names
    available = f"its features of {', '.join(tap_names)}" if tap_names else "no features"
    return [
        f"objective: a term reads the teacher's {tap}, and the recording has {available}; record "
        f"it with `fm-distill record --taps {' '.join(sorted({*tap_names, tap}))}` to another "
        "folder"
        for tap in features_of(objective)[1]
        if tap not in tap_names
    ]


def _refuse_functions(config: Config) -> None:
    for option, teacher in teachers_of(config):
        if teacher.function:
            raise UserError(
                f"{option}.function is called only by `fm-distill record`: record it with "
                "`fm-distill record EXPERIMENT.py --to DIR`, then train with --teacher.recording "
                "DIR"
            )


def check_recording(
    config: Config, resolved: ResolvedRun, recording: Recording, reader: Reader, period: int
) -> None:
    """Raises `UserError` where the views of this run are not those that were recorded.

    Or where a shard that it needs is missing, or one of those looked into is damaged.
    """
    header, path = recording.header, recording.path
    if missing_taps := _missing_taps(config.objective, header):
        raise UserError(f"the recording in {path} lacks a feature: {missing_taps[0]}")
    if (header.data, header.examples) != (reader.source.identity, len(reader)):
        raise UserError(
            f"the recording in {path} was made from {header.examples:,} examples of "
            f"{header.data}, and this run has {len(reader):,} of {reader.source.identity}; use "
            "the same data"
        )
    if header.target_images != resolved.target_images:
        raise UserError(
            f"the recording in {path} was made from views adapted to "
            f"{_called(header.target_images)}, and those of this run are adapted to "
            f"{_called(resolved.target_images)} (their contents, not their path); use the same "
            "views.fourier.folder, or record this run"
        )
    draws = make_draws(config)
    golden = np.array([int(x, 16) for x in header.golden], np.uint64)
    if not _same(golden, draws(0, GOLDEN_SIZES)):
        raise UserError(
            f"the views of the recording in {path} were drawn by another version of JAX or of "
            "fm-distill, which draws different ones from the same keys; its manifest names the "
            "versions"
        )
    present_shards = present(recording).shards
    if missing := [x for x in recording.shards if x.start < period and x not in present_shards]:
        raise UserError(
            f"{len(missing):,} of the shards of the recording in {path} are missing, the first "
            f"one {missing[0].name}; restore them from a copy, or run `fm-distill record` again"
        )
    taps = features_of(config.objective)[1]
    steps = RecordingReader(recording, period, taps)
    for step in checked_steps(config, period):
        recorded = steps.at(step)
        sizes = np.stack([reader[int(i)]["size"] for i in recorded.examples[0]])
        if not _same(recorded.views[0], draws(step, sizes)):
            raise UserError(
                f"the views of step {step:,} are not those of the recording in {path}: the images "
                "or their sizes differ; use the data that was recorded, or record this data"
            )


def _called(target_images: str | None) -> str:
    return "no target images" if target_images is None else f"target images {target_images[:16]}"


def checked_steps(config: Config, period: int) -> list[int]:
    """The first step of the recording, and others that the seed chooses."""
    other_steps = np.random.Generator(np.random.Philox(config.seed)).integers(
        0, period, CHECKED_STEPS - 1
    )
    return sorted({0, *map(int, other_steps)})


def _same(recorded: UInt64[np.ndarray, " batch"], draw: Draw) -> bool:
    """Whether these are digests of `draw`, up to the rounding of another device.

    A coefficient at the border of two steps may be that of all rows.
    """
    if draw.coefficients is None:
        return same_views(recorded, digests_of_draw(draw))
    offsets = (0.0, -COEFFICIENT_STEP / 4, COEFFICIENT_STEP / 4)
    draws = (dataclasses.replace(draw, coefficients=draw.coefficients + x) for x in offsets)
    return any(same_views(recorded, digests_of_draw(x)) for x in draws)


def make_draws(config: Config) -> Draws:
    """What the teachers see in a step of images of these sizes; compiled once."""
    view_sampling = regime_of(config).views

    @jax.jit
    def drawn(step: Int[jax.Array, ""], sizes: Int32[jax.Array, "batch 2"]) -> Draw:
        return step_draws(
            view_sampling, run_keys(config.seed).draws, step, sizes, config.views
        ).teacher

    return lambda step, sizes: jax.device_get(drawn(jnp.int32(step), sizes))


def digests_of_draw(draw: Draw) -> UInt64[np.ndarray, "..."]:
    return view_digests(
        draw.boxes, draw.flips, draw.coefficients, draw.partners, draw.target_images
    )


def golden_digests(config: Config) -> tuple[str, ...]:
    """Digests of draws from the seed, which another random number generator would not give."""
    digests = digests_of_draw(make_draws(config)(0, GOLDEN_SIZES))
    return tuple(f"{x:016x}" for x in digests.tolist())


def repeated(resolved: ResolvedRun, batch_size: int) -> list[str]:
    """The note on a run whose views repeat."""
    if resolved.period_steps is None:
        return []
    epochs = resolved.period_steps * batch_size / resolved.examples
    passes = resolved.total_steps / resolved.period_steps
    return [
        f"the views repeat after {resolved.period_steps:,} steps: each image has about "
        f"{epochs:.3g} different views, and the run passes {passes:.3g} times over them"
    ]
