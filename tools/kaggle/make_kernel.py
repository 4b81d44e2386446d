"""A Kaggle kernel from an experiment: a folder for `kaggle kernels push`, one for each session.

    python tools/kaggle/make_kernel.py experiments/flowers102.py --user ann --out flowers_1 \\
        -- --data.data-dir @ann/flowers-tfds --teacher.weights @ann/bit/BiT-R152x2-flowers.npz

Behind `--` stand options of `fm-distill train`; `@OWNER/SLUG/PATH` is a path inside a Kaggle data
set, which becomes an input, or inside the output of a kernel that `--kernel` names. Everything else
is in the notebook: the experiment's files, and the package of this checkout. Prints the line that
starts the session and the one that makes the next. Needs the extra `kits`.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import sys

import tyro

from fm_distill.cli.command import guarded, quiet
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.notebooks.packing import (
    INPUT,
    INSTALLED,
    archive,
    make_notebook,
    pack,
    read_options,
    tool_options,
)

# Source: docs/kernels.md of the repository Kaggle/kaggle-cli, February and September 2026. "Some of
# these are only available to participants of specific competitions, and some ... to Kaggle admins".
ACCELERATORS = {
    "TpuV5E8": "TPU v5e, 8 chips",
    "TpuV6E8": "TPU v6e, 8 chips",
    "TpuV38": "TPU v3, 8 cores; listed in February 2026",
    "Tpu1VmV38": "TPU VM v3, 8 cores; listed in February 2026",
    "NvidiaTeslaT4": "GPU T4",
    "NvidiaTeslaT4Highmem": "GPU T4",
    "NvidiaTeslaP100": "GPU P100; listed in February 2026",
    "NvidiaTeslaA100": "GPU A100",
    "NvidiaL4": "GPU L4",
    "NvidiaL4X1": "GPU L4",
    "NvidiaH100": "GPU H100",
    "NvidiaRtxPro6000": "GPU RTX Pro 6000",
}
# Left for the report and for saving the output.
RESERVE_HOURS = 0.25
NOTEBOOK = pathlib.Path(__file__).with_name("kaggle_notebook.py")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Behind `--`: options of `fm-distill train`."""

    # An experiment file.
    experiment: tyro.conf.Positional[str]
    # The Kaggle user whose kernel it is.
    user: str
    # The folder that is made.
    out: str
    # Of the kernel, without the number of the session; empty: fm-distill-NAME.
    slug: str = ""
    # A name from Kaggle's list.
    accelerator: str = "TpuV5E8"
    # From the start of the notebook to the end of the training.
    max_hours: float = 8.5
    # Kaggle's limit of a session: 9 hours on a TPU as users report it; not verified.
    session_hours: float = 9.0
    # From the second on, the output of the one before is continued.
    session: int = 1
    # Data sets that become inputs, as OWNER/SLUG; those named by @OWNER/SLUG do so anyway.
    dataset: tuple[str, ...] = ()
    # Further kernels whose output becomes an input, as OWNER/SLUG: of a teacher's run, say.
    kernel: tuple[str, ...] = ()
    # Models that become inputs, as OWNER/MODEL/FRAMEWORK/VARIATION/VERSION.
    model: tuple[str, ...] = ()
    # For pip, or with --no-internet OWNER/SLUG of a data set of wheels; `installed`: the image has
    # it; empty: the package of this checkout.
    package: str = ""
    # Without it, packages come from a data set of wheels.
    internet: bool = True
    # Replace what is in the folder.
    overwrite: bool = False
    # Where the inputs are, on Kaggle.
    input_dir: str = "/kaggle/input"
    # Where the output is, on Kaggle.
    work_dir: str = "/kaggle/working"


def main(arguments: list[str]) -> int:
    quiet(arguments)
    asked, own, options = tool_options(Kernel, arguments, "make_kernel.py")
    check(asked)
    config = read_options(asked.experiment, options, "make_kernel.py EXPERIMENT.py ... --")
    slug = asked.slug or "fm-distill-" + re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    check_slug(slug)
    wheels = "" if asked.internet or asked.package == INSTALLED else asked.package
    named = [found[1] for x in options if (found := INPUT.fullmatch(x))]
    datasets = [x for x in dict.fromkeys([*asked.dataset, *named, wheels]) if x]
    datasets = [x for x in datasets if x not in asked.kernel]
    previous = f"{asked.user}/{slug}-{asked.session - 1}" if asked.session > 1 else ""
    metadata = metadata_of(asked, f"{slug}-{asked.session}", datasets, previous)
    next_session = next_line(asked, own, options)
    values = {
        "NAME": config.name,
        "EXPERIMENT": pathlib.Path(asked.experiment).name,
        "OPTIONS": options,
        "SESSION": asked.session,
        "PREVIOUS": previous,
        "HOURS": asked.max_hours,
        "PACKAGE": "" if wheels else asked.package,
        "WHEELS": wheels,
        "INPUT": asked.input_dir,
        "WORK": asked.work_dir,
        "NEXT": next_session,
        "ARCHIVE": "" if asked.package else archive(),
    }
    notebook = make_notebook(NOTEBOOK, values, pack(asked.experiment))
    write(pathlib.Path(asked.out), asked.overwrite, notebook, metadata)
    print(f"start session {asked.session}:\n  {push_line(asked)}")
    print(f"when it has ended, and the run is not complete:\n  {next_session}")
    return EXIT_COMPLETE


def check(asked: Kernel) -> None:
    """Raises `UserError` for what Kaggle would refuse, or run otherwise than it was meant."""
    if asked.accelerator not in ACCELERATORS:
        known = "\n".join(f"  {name:<22}{what}" for name, what in ACCELERATORS.items())
        raise UserError(f"--accelerator is {asked.accelerator!r}; expected one of\n{known}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{2,49}", asked.user):
        raise UserError(
            f"--user is {asked.user!r}; expected the name in the address of your Kaggle profile"
        )
    if asked.session < 1:
        raise UserError(f"--session is {asked.session}; expected 1 or more")
    if not 0 < asked.max_hours <= asked.session_hours - RESERVE_HOURS:
        raise UserError(
            f"--max-hours is {asked.max_hours:g} and a session has {asked.session_hours:g} hours "
            f"(--session-hours); expected at most {asked.session_hours - RESERVE_HOURS:g}, which "
            "leaves time for the report and for saving the output"
        )
    for option, named in (("--dataset", asked.dataset), ("--kernel", asked.kernel)):
        if wrong := [x for x in named if not re.fullmatch(r"[\w-]+/[\w-]+", x)]:
            raise UserError(f"{option} is {wrong[0]!r}; expected OWNER/SLUG")
    for model in asked.model:
        if not re.fullmatch(r"[\w-]+/[\w-]+/[\w-]+/[\w.-]+/\d+", model):
            raise UserError(
                f"--model is {model!r}; expected OWNER/MODEL/FRAMEWORK/VARIATION/VERSION"
            )
    if not asked.internet and not re.fullmatch(rf"[\w-]+/[\w-]+|{INSTALLED}", asked.package):
        raise UserError(
            f"--package is {asked.package!r}; with --no-internet expected OWNER/SLUG of a Kaggle "
            "data set of wheels, as `pip wheel '.[plots]' -w wheels` makes them"
        )


def check_slug(slug: str) -> None:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) or not 5 <= len(slug) <= 46:
        raise UserError(
            f"--slug is {slug!r}; expected 5 to 46 lowercase letters and digits with single dashes "
            "between them"
        )


def metadata_of(asked: Kernel, slug: str, datasets: list[str], previous: str) -> dict[str, object]:
    """`kernel-metadata.json`.

    Source: docs/kernels_metadata.md of Kaggle/kaggle-cli. No `docker_image`: one that is pinned
    takes the place of the TPU's (issue 1197 there).
    """
    tpu = asked.accelerator.startswith("Tpu")
    return {
        "id": f"{asked.user}/{slug}",
        # Kaggle makes the slug of the title.
        "title": slug,
        "code_file": "notebook.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": "true",
        "enable_gpu": "false" if tpu else "true",
        "enable_tpu": "true" if tpu else "false",
        "enable_internet": "true" if asked.internet else "false",
        "machine_shape": asked.accelerator,
        "dataset_sources": datasets,
        "competition_sources": [],
        "kernel_sources": [x for x in (previous, *asked.kernel) if x],
        "model_sources": list(asked.model),
    }


def push_line(asked: Kernel) -> str:
    seconds = round(asked.session_hours * 3600)
    where = ["-p", asked.out, "--accelerator", asked.accelerator]
    return shlex.join(["kaggle", "kernels", "push", *where, "-t", str(seconds)])


def next_line(asked: Kernel, own: list[str], options: list[str]) -> str:
    """The line that makes and starts the session after this one."""
    out = re.sub(rf"_{asked.session}$", "", asked.out) + f"_{asked.session + 1}"
    following = dataclasses.replace(asked, session=asked.session + 1, out=out)
    # The last one counts, so what was asked for stays as it was written.
    line = ["python", "tools/kaggle/make_kernel.py", *_without(own, "--session", "--out")]
    line += ["--session", str(following.session), "--out", out]
    line += ["--", *options] if options else []
    return f"{shlex.join(line)} && {push_line(following)}"


def _without(arguments: list[str], *names: str) -> list[str]:
    """The arguments without these options and their values."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word in names:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def write(folder: pathlib.Path, overwrite: bool, notebook: str, metadata: object) -> None:
    try:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise UserError(f"--out {folder} is not empty; choose another, or give --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notebook.ipynb").write_text(notebook)
        (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
