"""Which options of a config may refer to custom code, as `FILE.py:NAME`."""

import re

from fm_distill.config import Config
from fm_distill.config.serialization import flatten
from fm_distill.config.teachers import recording_of

OPTIONS = re.compile(
    r"data(\.transfer\.\d+)?\.source|views\.crop|optimizer\.name|student\.model"
    r"|objective\.(distance|terms\.\d+\.kind)|(teacher|more_teachers\.\d+)\.(function|network\.model)"
)
# Sections of a config, by what opens them.
STUDENT = ("student",)
TEACHERS = ("teacher", "more_teachers")
NETWORKS = (*STUDENT, *TEACHERS)
IMAGES = ("data", "views")
ALL = (*NETWORKS, *IMAGES, "objective", "optimizer")


def code_options(config: Config) -> dict[str, str]:
    """The options that may name code, and their values, references or lines of tables."""
    return {
        option: str(value)
        for option, value in flatten(config).items()
        if OPTIONS.fullmatch(option) and value
    }


def named_code(config: Config, sections: tuple[str, ...] = ALL) -> tuple[str, ...]:
    """The references in some sections of `config`.

    Teachers that are functions are left out where a recording stands for them.
    """
    recorded = recording_of(config) is not None
    references = [
        reference
        for option, reference in code_options(config).items()
        if ":" in reference
        and option.partition(".")[0] in sections
        and not (recorded and option.endswith(".function"))
    ]
    return tuple(dict.fromkeys(references))
