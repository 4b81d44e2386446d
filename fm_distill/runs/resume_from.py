"""`--resume-from`: a run is brought from a place that cannot be written to one that can."""

import pathlib
import shutil

from fm_distill.errors import UserError
from fm_distill.runs.integrity import DIGESTS, integrity_errors, newest_step, steps_in
from fm_distill.runs.remote import fetched, is_remote, progress_in
from fm_distill.runs.workdir import COMPUTED_FIRST, Workdir
from fm_distill.system.compilation_cache import COMPILED
from fm_distill.system.console import log, progress

# What a run consists of, beside its checkpoints, its figures and its teachers' runs.
PARTS = ("config.json", "status.json", "rollbacks.json", "metrics.jsonl", *COMPUTED_FIRST)


def copy_run(source: str, workdir: pathlib.Path) -> None:
    """Makes `workdir` a copy of the run in `source`, a path or a URL, all of it or nothing.

    Checkpoints that are not intact stay behind. Where `workdir` has the run already, and is as far,
    nothing is done, so that the same command continues it. Raises `UserError`.
    """
    if not is_remote(source):
        _check_run(pathlib.Path(source), source)
        if workdir.exists() and workdir.samefile(source):
            raise UserError(
                "--resume-from and --workdir are the same folder; leave out --resume-from"
            )
    if _is_run(workdir):
        own_progress, source_progress = _progress(workdir), _progress_there(source)
        if own_progress < source_progress:
            raise UserError(
                f"{workdir} has a run of {_steps(own_progress)}, and the one in {source} has "
                f"{_steps(source_progress)}; choose another --workdir, or leave out --resume-from"
            )
        log(f"{workdir} already has its run, with {_steps(own_progress)}: {source} is not needed")
        return
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty; --resume-from needs a new --workdir")
    if is_remote(source):
        with fetched(source, workdir) as folder:
            _check_run(folder, source)
            _copy_into(folder, source, workdir)
    else:
        _copy_into(pathlib.Path(source), source, workdir)


def _is_run(folder: pathlib.Path) -> bool:
    """Also one that was stopped while its teacher was trained, and has nothing else yet."""
    return any((x / "config.json").is_file() for x in (folder, *folder.glob("teacher*")))


def _progress(folder: pathlib.Path) -> tuple[int, int]:
    """Steps of the student, and of its teachers in the same workdir."""
    teachers = sum(newest_step(x / "checkpoints") for x in folder.glob("teacher*"))
    return newest_step(folder / "checkpoints"), teachers


def _progress_there(source: str) -> tuple[int, int]:
    return progress_in(source) if is_remote(source) else _progress(pathlib.Path(source))


def _steps(progress: tuple[int, int]) -> str:
    steps, teachers = progress
    return f"{steps:,} steps" if steps or not teachers else f"{teachers:,} steps of its teacher"


def _check_run(folder: pathlib.Path, address: str) -> None:
    if not _is_run(folder):
        raise UserError(
            f"--resume-from {address} is not the workdir of a run: it has no config.json"
        )
    for path in (folder, *folder.glob("teacher*")):
        if (path / "config.json").is_file():
            Workdir(path).stored()  # another version's run is refused before it is copied


def _copy_into(source: pathlib.Path, address: str, workdir: pathlib.Path) -> None:
    """The run in the folder `source`, which messages call `address`."""
    incoming = workdir.with_name(workdir.name + ".arriving")
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        _check_space(source, workdir)
        _copy_run(source, incoming)
        # Onto an empty folder too: the run appears completely or not at all.
        incoming.replace(workdir)
    except OSError as error:
        raise UserError(f"{address} cannot be copied to {workdir}: {error}") from None
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    log(f"{workdir} is a copy of the run in {address}")


def _copy_run(source: pathlib.Path, target: pathlib.Path) -> None:
    # Not the modes: those of a read-only place would make this one read-only.
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name in PARTS or path.name.startswith("evaluation"):
            shutil.copyfile(path, target / path.name)
        elif path.name == COMPILED or path.name == "tensorboard":
            _copy_tree(path, target / path.name)
        elif path.name.startswith("teacher") and (path / "config.json").is_file():
            _copy_run(path, target / path.name)
    steps = steps_in(source / "checkpoints")
    for step in progress(steps, "copying checkpoints", "checkpoints", len(steps)):
        checkpoint = source / "checkpoints" / str(step)
        if errors := integrity_errors(checkpoint):
            log(f"WARNING: {checkpoint} is damaged and is not copied: {errors[0]}")
            continue
        copy = target / "checkpoints" / str(step)
        _copy_tree(checkpoint, copy)
        if errors := integrity_errors(copy):
            raise OSError(f"the copy of {checkpoint} is not intact: {errors[0]}")
    if (source / "checkpoints").is_dir() and not (target / "checkpoints").exists():
        raise UserError(
            f"no checkpoint in {source / 'checkpoints'} is intact; each needs its {DIGESTS}"
        )


def _copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    # `copytree` gives folders the modes of the source, which may be read-only.
    for path in [target, *target.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def _check_space(source: pathlib.Path, workdir: pathlib.Path) -> None:
    need = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    parent = next(x for x in workdir.absolute().parents if x.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise UserError(
            f"the run in {source} needs {need / 1e9:,.2f} GB and {parent} has {free / 1e9:,.2f} GB "
            "free; choose a --workdir on another disk"
        )
