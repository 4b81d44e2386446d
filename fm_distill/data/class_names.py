"""Names of classes where the data themselves have none."""

import pathlib

from fm_distill.config import DataConfig
from fm_distill.errors import UserError

# The 1,000 classes of ILSVRC 2012 in the order of their synsets, which is that of published heads.
# Source: WordNet's first lemma of each synset, with an addition where it is not unique.
IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")
FILE = "a text file with one name per line"


def named_classes(data: DataConfig) -> tuple[str, ...] | None:
    """The names that `data.class_names` gives, in the order of the classes; None without it.

    Raises `UserError` where the file cannot be read or names a class twice.
    """
    if data.class_names is None:
        return None
    path = IMAGENET if data.class_names == "imagenet" else pathlib.Path(data.class_names)
    return read_names(path, f"data.class_names={data.class_names}", f"`imagenet` or {FILE}")


def read_names(path: pathlib.Path, option: str, expected: str = FILE) -> tuple[str, ...]:
    """The lines of a text file with one name per line; `option` asks for it, as `expected`.

    Raises `UserError` where it cannot be read or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} cannot be read ({error}); expected {expected}") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names classes more than once: {', '.join(duplicates[:5])}")
    return names
