"""What `fm-distill compress` measured, as JSON, as a table and as a picture."""

import dataclasses
import pathlib

import msgspec

from fm_distill.errors import UserError
from fm_distill.reports import plots
from fm_distill.reports.pareto import front
from fm_distill.reports.sweep_table import markdown_lines
from fm_distill.system.console import log
from fm_distill.system.files import replacing

FIGURES = "compression.json"
PICTURE = "compression.svg"
# In the workdir of the run that was compressed.
FOLDER = "compressed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionRow:
    """A student: the run's own, or that of a step after all steps before it."""

    name: str
    split: str
    top1: float | None  # None of a split without labels
    teacher_top1: float | None
    # None of a run that learned from labels without a teacher.
    agreement: float | None
    kl_one: float | None  # nats, at temperature 1
    training_view_agreement: float | None
    parameters: int
    zero_weights: int  # of the parameters
    flops: int | None  # of an image


@dataclasses.dataclass(frozen=True)
class FileFigures:
    """The exported file of a student, its card included; None where it could not be written."""

    name: str  # of the student
    file_bytes: int | None = None
    zipped_bytes: int | None = None
    median_ms: float | None = None  # at batch 1
    p95_ms: float | None = None  # the 95th percentile


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one format, a line for each student, run by their own runtime."""

    runtime: str
    rows: tuple[FileFigures, ...]


@dataclasses.dataclass(frozen=True)
class Compression:
    """A run and its steps, whose files of all formats were timed in one go."""

    device: str
    rows: tuple[CompressionRow, ...]
    files: tuple[Files, ...]
    # Whether the steps saw other views than the run.
    other_views: bool = False


HEADS = (
    "student", "top-1, %", "agreement, %", "KL, nats", "agreement, training view, %", "parameters",
    "of them zero, %", "MFLOPs",
)  # fmt: skip
FILE_HEADS = ("file, kB", "zipped, kB", "p50, ms", "p95, ms")


def heads(found: Compression) -> list[str]:
    """With those of the files, by runtime where there are several."""
    several_formats = len(found.files) > 1
    file_heads = (
        f"{head}, {files.runtime}" if several_formats else head
        for files in found.files
        for head in FILE_HEADS
    )
    return [*HEADS, *file_heads]


def table_rows(found: Compression) -> list[list[str]]:
    """A line for each student, under `heads`."""
    return [
        [
            *_quality_cells(row),
            *(cell for files in found.files for cell in _file_cells(files.rows[i])),
        ]
        for i, row in enumerate(found.rows)
    ]


def _scaled(value: float | int | None, factor: float | int, digits: int) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def _file_cells(file: FileFigures) -> list[str]:
    return [
        _scaled(file.file_bytes, 1e-3, 1),
        _scaled(file.zipped_bytes, 1e-3, 1),
        _scaled(file.median_ms, 1, 3),
        _scaled(file.p95_ms, 1, 3),
    ]


def _quality_cells(row: CompressionRow) -> list[str]:
    return [
        row.name,
        _scaled(row.top1, 100, 2),
        _scaled(row.agreement, 100, 2),
        _scaled(row.kl_one, 1, 4),
        _scaled(row.training_view_agreement, 100, 2),
        f"{row.parameters:,}",
        _scaled(row.zero_weights / row.parameters, 100, 1),
        _scaled(row.flops, 1e-6, 2),
    ]


def as_markdown(found: Compression) -> str:
    """A line for each student."""
    return "\n".join([*markdown_lines(heads(found), table_rows(found)), "", caption(found)])


def caption(found: Compression) -> str:
    """Where the figures come from."""
    row = found.rows[0]
    teacher_text = (
        "" if row.teacher_top1 is None else f"; the teacher has {100 * row.teacher_top1:.2f} %"
    )
    runtimes = ", ".join(files.runtime for files in found.files)
    notes = [f"On the {row.split} split{teacher_text}."]
    if any(x.teacher_top1 != row.teacher_top1 for x in found.rows):
        notes.append("Agreement and KL of the steps are to another teacher than the run's.")
    if found.other_views:
        notes.append("Agreement on the training view: the steps' views are not the run's.")
    notes.append(f"Latency: {runtimes}, batch 1, {found.device}.")
    return " ".join(notes)


def picture(found: Compression) -> bytes:
    """SVG: accuracy, without labels agreement, against bytes and latency of the first files."""
    labelled = all(row.top1 is not None for row in found.rows)
    points = [
        (row.name, 100 * quality, file.file_bytes / 1e3, file.median_ms)
        for row, file in zip(found.rows, found.files[0].rows, strict=True)
        if (quality := row.top1 if labelled else row.agreement) is not None
        and file.file_bytes is not None
        and file.median_ms is not None
    ]
    if not points:
        raise UserError("no student has both a file and an accuracy or agreement")
    names, qualities, sizes, times = zip(*points, strict=True)
    costs = {"file, kB": sizes, "latency p50, ms": times}
    panels = {
        cost_name: plots.Tradeoff(values, tuple(front(qualities, values)))
        for cost_name, values in costs.items()
    }
    teacher_top1 = found.rows[0].teacher_top1 if labelled else None
    return plots.tradeoffs(
        names,
        qualities,
        [0.0] * len(points),
        panels,
        "top-1, %" if labelled else "agreement with the teacher, %",
        None if teacher_top1 is None else 100 * teacher_top1,
    )


def save(found: Compression, folder: pathlib.Path) -> None:
    """Writes both files into `folder`, each completely or not at all."""
    files = {FIGURES: msgspec.json.format(msgspec.json.encode(found))}
    try:
        files[PICTURE] = picture(found)
    except UserError as error:
        log(f"WARNING: the picture is not drawn: {error}")
        (folder / PICTURE).unlink(missing_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as temporary_path:
            temporary_path.write_bytes(content)


def load(folder: pathlib.Path) -> Compression | None:
    """What `save` wrote; None where it wrote nothing. Raises `UserError` where it is damaged."""
    path = folder / FIGURES
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Compression)
    except msgspec.DecodeError as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}); run `fm-distill compress` again"
        ) from None
