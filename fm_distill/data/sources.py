"""Where images come from. To add one: a function `(DataConfig, split name) -> Source` and a line in
`SOURCES`. A source is random access and can be sent to a reader process."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from fm_distill.config import DataConfig
from fm_distill.errors import UserError
from fm_distill.system.references import entry

UNLABELLED = -1
# In the package of scikit-learn.
DIGITS = "datasets/data/digits.csv.gz"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Raw(NamedTuple):
    """One example as it lies on disk."""

    image: bytes | np.ndarray  # encoded, or pixels
    label: int  # UNLABELLED where there is none
    name: str  # for messages


@runtime_checkable
class Source(Protocol):
    """A split of a data set."""

    @property
    def classes(self) -> int | None: ...  # None: unlabelled
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def identity(self) -> str: ...  # which images these are, wherever they are stored
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Raw: ...


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: 1797 real images of 8 x 8, enlarged to 32 x 32.

    They are ordered by writer, and the splits are consecutive: no writer of the test images is in
    train. One writer is in train and validation, and one in validation and test.
    Enlarged, since a crop of whole pixels of an 8 x 8 image has too few positions.
    """

    images: np.ndarray
    labels: np.ndarray
    identity: str
    classes: int | None = 10
    class_names: tuple[str, ...] | None = tuple("0123456789")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Raw:
        return Raw(self.images[index], int(self.labels[index]), f"{self.identity}[{index}]")


def _digits_table() -> Float[np.ndarray, "digits 65"]:
    """64 pixels of 0 to 16 and the label. As `load_digits`, whose import takes a second longer."""
    spec = importlib.util.find_spec("sklearn")
    path = pathlib.Path(spec.origin).parent / DIGITS if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("data.source=digits needs scikit-learn: pip install -e '.[quickstart]'")
    return np.loadtxt(path, delimiter=",")


def digits(config: DataConfig, name: str) -> Source:
    from PIL import Image

    table = _digits_table()
    labels = table[:, -1].astype(np.int64)
    total = len(table)
    test, validation = total * 20 // 100, total * 10 // 100
    train = total - test - validation
    ranges = {
        "train": slice(0, train),
        "validation": slice(train, train + validation),
        "test": slice(train + validation, total),
    }
    split, from_percent, to_percent = _percentages(name)
    if split not in ranges:
        raise UserError(f"the digits have no split {split!r}; expected one of {', '.join(ranges)}")
    rows = np.arange(total)[ranges[split]]
    rows = rows[len(rows) * from_percent // 100 : len(rows) * to_percent // 100]
    if not len(rows):
        raise UserError(f"the split {name!r} of the digits has no image; choose a larger range")
    pixels = table[rows, :-1].reshape(-1, 8, 8)
    grey = (pixels * (255 / 16)).round().astype(np.uint8)
    enlarged = [
        np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR)) for x in grey
    ]
    return Digits(np.stack(enlarged), labels[rows], f"digits/{name}")


def _percentages(name: str) -> tuple[str, int, int]:
    """A split's name and its part in percent, written as TFDS writes it: `train[40%:80%]`."""
    match = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", name)
    if not match:
        raise UserError(f"the digits have no split {name!r}; expected e.g. train[40%:80%]")
    split, start, stop = match.groups()
    return split, min(int(start or 0), 100), min(int(stop or 100), 100)


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared TFDS data set, read without TensorFlow."""

    records: Any
    image_key: str
    label_key: str | None
    classes: int | None
    class_names: tuple[str, ...] | None
    identity: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Raw:
        record = self.records[index]
        label = int(record[self.label_key]) if self.label_key else UNLABELLED
        return Raw(record[self.image_key], label, f"{self.identity}[{index}]")


def tfds(config: DataConfig, name: str) -> Source:
    import tensorflow_datasets

    folder_text = f" in {config.data_dir}" if config.data_dir else ""
    builder = _tfds_builder(config, folder_text)
    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tensorflow_datasets.features.Image)]
    labels = [
        k for k, f in features.items() if isinstance(f, tensorflow_datasets.features.ClassLabel)
    ]
    if not images:
        raise UserError(f"the TFDS data set {config.name} has no images; it has {list(features)}")
    label_key = "label" if "label" in labels else (labels[0] if labels else None)
    try:
        records = builder.as_data_source(
            split=name,
            decoders={images[0]: tensorflow_datasets.decode.SkipDecoding()},
        )
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{config.name}{folder_text} has no split {name!r}; it has "
            f"{', '.join(builder.info.splits)} ({str(error).splitlines()[0]})"
        ) from None
    except NotImplementedError:
        raise UserError(
            f"{config.name}{folder_text} is prepared as {builder.info.file_format}, which has no "
            f"random access; prepare it again:\n{_prepare_line(config)}"
        ) from None
    classes = features[label_key].num_classes if label_key else None
    names = tuple(features[label_key].names) if label_key and features[label_key].names else None
    identity = f"{config.name}/{builder.version}/{name}"
    return Tfds(records, images[0], label_key, classes, names, identity)


def _prepare_line(config: DataConfig) -> str:
    folder = f" --data_dir={config.data_dir}" if config.data_dir else ""
    return (
        f"  pip install -e '.[prepare]' && "
        f"tfds build {config.name} --file_format=array_record{folder}"
    )


def _tfds_builder(config: DataConfig, where: str) -> Any:
    import tensorflow_datasets

    if not config.name:
        raise UserError("data.source=tfds needs data.name, e.g. oxford_flowers102")
    if config.data_dir and not pathlib.Path(config.data_dir).is_dir():
        raise UserError(f"data.data_dir {config.data_dir} is not a folder")
    try:
        builder = tensorflow_datasets.builder(config.name, data_dir=config.data_dir or None)
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise UserError(
            f"TFDS knows no data set {config.name!r}, and none is prepared{where}; "
            "see https://www.tensorflow.org/datasets/catalog"
        ) from None
    except ImportError as error:
        raise UserError(
            f"TFDS cannot load {config.name} ({error}); prepare it:\n{_prepare_line(config)}"
        ) from None
    # as_data_source would start a download of its own accord.
    if not builder.is_prepared():
        raise UserError(
            f"the TFDS data set {config.name} is not prepared{where}; prepare it once, with "
            f"TensorFlow (reading it needs none):\n{_prepare_line(config)}"
        )
    return builder


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files, labelled by their folder or not at all."""

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    identity: str

    @property
    def classes(self) -> int | None:
        return len(self.class_names) if self.class_names else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Raw:
        path = self.paths[index]
        label = self.labels[index] if self.labels else UNLABELLED
        return Raw(pathlib.Path(path).read_bytes(), label, path)


def class_folders(config: DataConfig, name: str) -> Source:
    """`DATA_DIR/SPLIT/CLASS/**/image`, classes in alphabetical order."""
    root = _folder(config, name)
    classes = sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    if not classes:
        raise UserError(
            f"{root} has no class folders; expected {root}/CLASS/IMAGE, or use data.source=images "
            "for images without labels"
        )
    labelled_paths = [
        (path, label) for label, c in enumerate(classes) for path in image_paths(root / c)
    ]
    if not labelled_paths:
        raise UserError(f"the class folders of {root} hold no images ({', '.join(SUFFIXES)})")
    paths, labels = zip(*labelled_paths, strict=True)
    return Files(
        tuple(map(str, paths)), labels, tuple(classes), _identity(root, paths, tuple(classes))
    )


def images(config: DataConfig, name: str) -> Source:
    """`DATA_DIR/SPLIT/**/image`, without labels: enough to distil."""
    root = _folder(config, name)
    paths = image_paths(root)
    if not paths:
        raise UserError(f"{root} holds no images ({', '.join(SUFFIXES)})")
    return Files(tuple(map(str, paths)), None, None, _identity(root, paths, ()))


def _folder(config: DataConfig, name: str) -> pathlib.Path:
    if not config.data_dir:
        raise UserError(f"data.source={config.source} needs data.data_dir, a folder")
    root = pathlib.Path(config.data_dir) / name
    if not root.is_dir():
        raise UserError(f"there is no folder {root} (data.data_dir / the split's name)")
    return root


def image_paths(root: pathlib.Path) -> list[pathlib.Path]:
    paths = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in paths if not path.name.startswith("."))


def _identity(root: pathlib.Path, paths: Any, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(classes).encode())
    for path in paths:
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return f"files/{digest.hexdigest()[:16]}"


SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "tfds": tfds,
    "class_folders": class_folders,
    "images": images,
    "digits": digits,
}


def open_source(config: DataConfig, name: str) -> Source:
    """The split of the data set that it calls `name`. Raises `UserError`."""
    source = entry(SOURCES, config.source, "data.source")(config, name)
    if len(source) == 0:
        raise UserError(f"{source.identity} is empty")
    if config.classes and source.classes and source.classes != config.classes:
        raise UserError(
            f"data.classes is {config.classes}, but the labels of {source.identity} have "
            f"{source.classes} classes"
        )
    return source
