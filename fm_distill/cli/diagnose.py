"""The command `fm-distill diagnose`."""

import dataclasses
import json

from fm_distill.cli.command import first_run
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.preparation.parse_options import OverConfig, parse_over


@dataclasses.dataclass(frozen=True)
class _Diagnose(OverConfig):
    """What is wrong with a run: named causes, with the evidence and what to change."""

    out: str = ""
    """Also write a page there, with the picture of CKA."""
    examples: int = 1024
    """Training examples that are examined: those of the newest steps."""
    overwrite: bool = False
    """Replace the page that is there."""
    json: bool = False
    """Print one JSON object."""


def diagnose_command(arguments: list[str]) -> int:
    from fm_distill.diagnosis.diagnose import as_json, diagnose
    from fm_distill.diagnosis.page import refuse_place, text, write_page

    workdir, stored, remaining = first_run(arguments, "diagnose DIR")
    options = parse_over(_Diagnose, stored, remaining, f"diagnose {workdir}")
    if options.examples < 1:
        raise UserError(f"--examples is {options.examples}; expected 1 or more")
    if options.out:
        refuse_place(options.out, options.overwrite)
    diagnosis = diagnose(workdir, options.config, options.examples)
    # First, so that it is not lost where the page cannot be written.
    print(json.dumps(as_json(diagnosis)) if options.json else text(diagnosis), flush=True)
    if options.out:
        write_page(diagnosis, options.out, options.overwrite)
    return EXIT_COMPLETE
