"""Code that the config of a run in a workdir names, refused or not before any of it is run."""

import pathlib

from fm_distill.config import Config
from fm_distill.config.code import ALL, named_code
from fm_distill.config.resolved import ResolvedRun
from fm_distill.runs.stored_run import StoredRun
from fm_distill.system.foreign_code import refuse_foreign_code
from fm_distill.system.references import is_reference


def refuse_code_of_run(
    stored: StoredRun,
    path: pathlib.Path,
    sections: tuple[str, ...] = ALL,
    config: Config | None = None,
) -> None:
    """Raises `UserError` where code of the run in `path` may not be run; see `foreign_code`.

    Asked is what `sections` of its config name, and its networks. What `config`, with options of
    its user's, names otherwise is the user's own.
    """
    stored_references = named_code(stored.config)
    requested = [x for x in named_code(config or stored.config, sections) if x in stored_references]
    networks = _networks(stored.resolved, sections)
    references = dict.fromkeys((*networks, *requested))
    run_name = f"the run in {path}"
    refuse_foreign_code(references, stored.resolved.code_files, run_name, path)


def _networks(resolved: ResolvedRun, sections: tuple[str, ...]) -> list[str]:
    student = [resolved.student] if "student" in sections else []
    teachers = resolved.teachers if "teacher" in sections else ()
    return [x.model for x in (*student, *teachers) if is_reference(x.model)]
