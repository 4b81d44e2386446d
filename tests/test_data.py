"""Order, decoding, canvases, sources, and the two ways of feeding."""

import dataclasses
import io
import re

import jax
import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from tiny import tiny_config

from fm_distill import load_experiment
from fm_distill.config import CanvasConfig, DataConfig, MeshConfig, SplitConfig
from fm_distill.data.feeding import Reader, StreamingFeed, evaluation_batches
from fm_distill.data.images import CorruptImage, decode, shrink
from fm_distill.data.order import epoch_permutation, example_ids
from fm_distill.data.resident import ResidentFeed, feeding_note, is_resident
from fm_distill.data.sources import Raw, open_source
from fm_distill.errors import UserError
from fm_distill.system.sharding import make_layout


def test_each_epoch_has_each_example_once_and_another_order():
    ids = example_ids(3, np.arange(300), 100).reshape(3, 100)
    for epoch in ids:
        assert sorted(epoch) == list(range(100))
    assert (ids[0] != ids[1]).any()
    assert (example_ids(4, np.arange(100), 100) != ids[0]).any()


def test_order_is_a_function_of_the_position_alone():
    whole = example_ids(0, np.arange(500), 77)
    for start in (0, 76, 77, 100, 499):
        np.testing.assert_array_equal(example_ids(0, np.arange(start, 500), 77), whole[start:])
    # For ever: a checkpoint of an older version must go on with the same order.
    np.testing.assert_array_equal(epoch_permutation(0, 0, 8), [0, 2, 1, 5, 4, 3, 6, 7])
    np.testing.assert_array_equal(epoch_permutation(1, 2, 8), [4, 2, 0, 6, 1, 5, 7, 3])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_kinds_of_images_become_rgb():
    ramp = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    grey = Image.fromarray(ramp)
    three = np.repeat(ramp[..., None], 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(decode(encoded(grey))), three)
    np.testing.assert_array_equal(np.asarray(decode(ramp)), three)
    np.testing.assert_array_equal(np.asarray(decode(ramp[..., None])), three)
    np.testing.assert_array_equal(np.asarray(decode(encoded(grey.convert("P")))), three)
    wide = Image.fromarray(ramp.astype(np.uint16) * 256 + 17)
    np.testing.assert_array_equal(np.asarray(decode(encoded(wide))), three)
    np.testing.assert_array_equal(np.asarray(decode(encoded(grey.convert("1"))))[..., 0] % 255, 0)


def test_transparent_pixels_lie_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    found = np.asarray(decode(encoded(Image.fromarray(pixels))))
    np.testing.assert_array_equal(found[0, 0], (10, 20, 30))
    np.testing.assert_array_equal(found[1, 1], (255, 255, 255))


def test_exif_rotation_is_applied():
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize("cut", [0, 10, 200, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_images_are_corrupt(cut, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(CorruptImage):
        decode(data[: cut if isinstance(cut, int) else int(len(data) * cut)])


@pytest.mark.parametrize(
    ("fit", "size", "expected"),
    [
        ("long", (100, 50), (40, 20)),
        ("short", (100, 50), (60, 30)),  # 80 x 40 would not fit the canvas of 60
        ("short", (50, 60), (40, 48)),
        ("short", (30, 20), (30, 20)),  # never enlarged
        ("long", (500, 1), (40, 1)),
    ],
)
def test_images_keep_their_aspect_on_the_canvas(fit, size, expected):
    canvas = CanvasConfig(size=40, fit=fit, max_aspect=1.5)
    image = Image.fromarray(np.zeros((*size, 3), np.uint8))
    assert shrink(image, canvas).shape[:2] == expected
    assert max(expected) <= canvas.side


@pytest.fixture
def folders(tmp_path):
    """train/{cat,dog} with 5 and 4 images; one of them broken in `broken`."""
    rng = np.random.default_rng(0)
    for split, broken in (("train", False), ("broken", True)):
        for name, count in (("cat", 5), ("dog", 4)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8)
                data = encoded(Image.fromarray(pixels), "JPEG")
                if broken and (name, i) == ("cat", 2):
                    data = data[:100]
                (tmp_path / split / name / f"{i}.jpg").write_bytes(data)
    (tmp_path / "empty").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def data_config(folder, source="class_folders", **changes) -> DataConfig:
    return DataConfig(
        source=source,
        data_dir=str(folder),
        train=SplitConfig(name="train"),
        canvas=CanvasConfig(size=16, fit="long"),
        **changes,
    )


def test_class_folders(folders):
    source = open_source(data_config(folders), "train")
    assert len(source) == 9 and source.class_names == ("cat", "dog")
    assert [source[i].label for i in range(9)] == [0] * 5 + [1] * 4


def test_unlabelled_folder(folders):
    source = open_source(data_config(folders, "images"), "train")
    assert len(source) == 9 and source.classes is None and source[3].label == -1


def test_a_moved_folder_is_the_same_data_and_another_is_not(folders, tmp_path):
    before = open_source(data_config(folders), "train").identity
    moved = tmp_path / "moved"
    (folders / "train").rename(moved)
    assert open_source(data_config(tmp_path), "moved").identity == before
    (moved / "cat" / "0.jpg").unlink()
    assert open_source(data_config(tmp_path), "moved").identity != before


@pytest.mark.parametrize(
    ("source", "split", "said"),
    [
        ("class_folders", "none", "there is no folder"),
        ("class_folders", "empty", "no class folders"),
        ("images", "empty", "holds no images"),
    ],
)
def test_wrong_folders(folders, source, split, said):
    with pytest.raises(UserError, match=said):
        open_source(data_config(folders, source), split)


def test_digits_are_split_by_writer():
    config = tiny_config().data
    sizes = [len(open_source(config, s)) for s in ("train", "validation", "test")]
    assert sizes == [1259, 179, 359]
    from sklearn.datasets import load_digits

    theirs = load_digits()
    sources = [open_source(config, s) for s in ("train", "validation", "test")]
    labels = [source[i].label for source in sources for i in range(len(source))]
    assert labels == theirs.target.tolist()
    images = np.stack([source[i].image for source in sources for i in range(len(source))])
    grey = np.rint(theirs.images * 255 / 16)
    np.testing.assert_array_equal(images[:, ::31, ::31], grey[:, ::7, ::7])  # the corners
    with pytest.raises(UserError, match="no split"):
        open_source(config, "dev")
    owners = [open_source(config, x) for x in ("train[:40%]", "train[40%:80%]", "train[80%:]")]
    assert [len(x) for x in owners] == [503, 504, 252]
    assert len({x.identity for x in owners}) == 3
    parts = [source[i].label for source in owners for i in range(len(source))]
    assert parts == theirs.target[:1259].tolist()


def test_owners_and_the_test_split_share_no_writer():
    """Each writer filled in a form, which begins with 0 to 9, three times."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    begin = [*map(int, [*range(10)] * 3)]
    forms = [i for i in range(len(labels) - 29) if labels[i : i + 30].tolist() == begin]

    def rows(experiment):
        name = load_experiment(f"experiments/{experiment}.py").data.train.name
        first, last = re.fullmatch(r"train(?:\[(\d*)%?:(\d*)%?\])?", name).groups()
        return int(first or 0) * 1259 // 100, int(last or 100) * 1259 // 100

    parts = [rows(x) for x in ("owner_a", "owner_b", "owners")]
    assert parts == [(0, 516), (516, 1019), (1032, 1259)]
    for (_, end), (start, _) in zip(parts, [*parts[1:], (1438, 1797)], strict=True):
        assert any(end <= form <= start for form in forms)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "oxford_flowers102"}, "tfds build oxford_flowers102 --file_format=array_record"),
        ({"name": "no_such_set"}, "knows no data set 'no_such_set'"),
        ({"name": ""}, "needs data.name"),
        ({"name": "mnist", "data_dir": "/no/such/place"}, "is not a folder"),
    ],
)
def test_tfds_that_is_not_there(tmp_path, changes, said):
    config = dataclasses.replace(data_config(tmp_path, "tfds"), **changes)
    with pytest.raises(UserError, match=said):
        open_source(config, "train")


@pytest.mark.skipif(not (SHARED / "data/tfds").is_dir(), reason="needs the prepared Flowers-102")
def test_tfds_flowers():
    config = dataclasses.replace(
        data_config(SHARED / "data/tfds", "tfds"), name="oxford_flowers102", classes=102
    )
    source = open_source(config, "train")
    assert len(source) == 1020 and source.classes == 102
    assert len(open_source(config, "train[:10%]")) == 102
    item = Reader(source, config, 102)[0]
    assert item["size"].tolist() == [12, 16] and item["label"] == 72
    with pytest.raises(UserError, match=r"has no split 'dev'.*train"):
        open_source(config, "dev")


def reader(folders, split="broken", corrupt="skip") -> Reader:
    config = data_config(folders, corrupt=corrupt)
    return Reader(open_source(config, split), config, 2)


def stream(feed, data, start, steps):
    """Canvases of each step, whichever way they are fed."""
    seen = []
    for fed in feed.feed(start, iter([1] * steps)):
        batch = fed if data is None else data.at(fed.ids[0])
        seen.append(jax.tree.map(np.asarray, batch))
    return seen


def feeds(reader, batch_size=8, workers=0):
    layout = make_layout(MeshConfig())
    resident = ResidentFeed(reader, 0, batch_size, layout.replicated, layout.ids)
    reader = dataclasses.replace(reader, config=dataclasses.replace(reader.config, workers=workers))
    return resident, StreamingFeed(reader, 0, batch_size, 6, layout.batch)


def test_resident_and_streaming_feed_the_same_bits_from_any_step(folders):
    resident, streaming = feeds(reader(folders))
    a = stream(resident, resident.data, 0, 6)
    for start in (0, 4):
        b = stream(streaming, None, start, 6 - start)
        jax.tree.map(np.testing.assert_array_equal, a[start:], b)
    # 48 positions of 9 examples, one of them broken: replaced, and counted.
    assert resident.skipped == 1 and streaming.skipped >= 5


def test_worker_processes_feed_the_same_bits():
    config = tiny_config().data
    resident, streaming = feeds(Reader(open_source(config, "train"), config, 10), workers=2)
    a, b = stream(resident, resident.data, 0, 6), stream(streaming, None, 0, 6)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_corrupt_image_is_named(folders):
    with pytest.raises(UserError, match=r"cat/2\.jpg is not a complete image.*--data.corrupt skip"):
        feeds(reader(folders, corrupt="stop"))
    layout = make_layout(MeshConfig())
    streaming = StreamingFeed(reader(folders, corrupt="stop"), 0, 8, 6, layout.batch)
    with pytest.raises(UserError, match=r"cat/2\.jpg is not a complete image"):
        stream(streaming, None, 0, 6)


@dataclasses.dataclass(frozen=True)
class Mislabelled:
    classes: int | None = 3
    class_names: tuple[str, ...] | None = None
    identity: str = "mislabelled"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Raw:
        return Raw(np.zeros((8, 8, 3), np.uint8), 3 if index == 2 else 0, f"mislabelled[{index}]")


def test_a_label_out_of_range_is_named(folders):
    with pytest.raises(UserError, match=r"mislabelled\[2\] has the label 3; expected 0 to 2"):
        feeds(Reader(Mislabelled(), data_config(folders), 3))


@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_evaluation_has_every_example_once(folders, batch_size):
    batches = list(evaluation_batches(reader(folders), batch_size))
    assert all(mask.shape == (batch_size,) for _, mask in batches)
    kept = np.concatenate([batch.labels[mask] for batch, mask in batches])
    assert kept.tolist() == [0] * 4 + [1] * 4  # the broken one is left out
    assert len(batches) == -(-9 // batch_size)


def test_auto_says_what_fits():
    config = tiny_config().data
    assert is_resident(config, 1259)
    assert "1,259 canvases need 0.01 GB" in feeding_note(config, 1259)
    large = dataclasses.replace(config, canvas=CanvasConfig(size=512))
    assert not is_resident(large, 1_281_167)
    assert is_resident(dataclasses.replace(large, feeding="resident"), 1_281_167)
