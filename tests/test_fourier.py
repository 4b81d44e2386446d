"""Fourier domain adaptation: the pictures, who sees them, and what a run keeps of its targets."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_experiment
from PIL import Image
from test_accelerator_paths import matching
from test_cli import refused
from test_recordings import QUIET, learning, nearly_the_same, record_now
from test_step import pooled_network
from test_train import same_bits, stop_at
from tiny import resolved_run, tiny_config

from fm_distill.config import Config, FourierConfig, MeshConfig, ScheduleConfig, ViewConfig
from fm_distill.config.serialization import changed
from fm_distill.data.batch import Batch
from fm_distill.data.target_images import low_amplitudes, open_targets, spectra, spectra_note
from fm_distill.errors import UserError
from fm_distill.evaluation.evaluate import evaluation_views
from fm_distill.networks.branch import Branch, step_views
from fm_distill.planning.compile_step import root_of
from fm_distill.preparation.check import check
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.view_digest import same_views, view_digests
from fm_distill.reports import view_samples
from fm_distill.reports.view_samples import sample_views
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import make_layout
from fm_distill.training.train import train
from fm_distill.views.draws import TARGETS, ViewRoot, draw, step_draws
from fm_distill.views.fourier import with_amplitudes
from fm_distill.views.rendering import InputSpec, render

KEY = jax.random.key(11)
ON = FourierConfig(folder="not read", beta=0.2)
SIZES = jnp.full((16, 2), 24)
BILINEAR = Image.Resampling.BILINEAR


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth ones with noise, within uint8's range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.sin(2 * np.pi * (a * y + b * x + c))
        for a, b, c in zip(
            *rng.uniform(-1.5, 1.5, (2, 3 * count)), rng.random(3 * count), strict=True
        )
    ]
    smooth = np.moveaxis(np.reshape(waves, (count, 3, side, side)), 1, -1)
    noisy = rng.integers(60, 190, (count, 1, 1, 3)) + 30 * smooth
    return np.clip(noisy + rng.normal(0, 12, smooth.shape), 0, 255).round().astype(np.uint8)


def authors(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """`FDA_source_to_target_np` of YanchaoYang/FDA in float64, of (side, side, 3)."""
    of_source, of_target = (
        np.fft.fft2(np.float64(x).transpose(2, 0, 1), axes=(-2, -1)) for x in (source, target)
    )
    low = np.fft.fftshift(np.abs(of_source), axes=(-2, -1))
    theirs = np.fft.fftshift(np.abs(of_target), axes=(-2, -1))
    _, h, w = low.shape
    b = np.floor(np.amin((h, w)) * beta).astype(int)
    c_h, c_w = np.floor(h / 2.0).astype(int), np.floor(w / 2.0).astype(int)
    rows, columns = slice(c_h - b, c_h + b + 1), slice(c_w - b, c_w + b + 1)
    low[:, rows, columns] = theirs[:, rows, columns]
    low = np.fft.ifftshift(low, axes=(-2, -1))
    found = np.fft.ifft2(low * np.exp(1j * np.angle(of_source)), axes=(-2, -1))
    return np.real(found).transpose(1, 2, 0)


def amplitudes(targets: np.ndarray, beta: float) -> jnp.ndarray:
    found = [low_amplitudes(Image.fromarray(x), beta, targets.shape[1]) for x in targets]
    return jnp.asarray(np.stack(found), jnp.float32)


def fourier(sources: np.ndarray, targets: np.ndarray, beta: float) -> np.ndarray:
    return np.asarray(with_amplitudes(jnp.asarray(sources, jnp.float32), amplitudes(targets, beta)))


@pytest.mark.parametrize(
    ("side", "beta"), [(16, 0.01), (16, 0.1), (17, 0.3), (24, 0.09), (16, 0.5), (17, 0.5)]
)
def test_pictures_are_those_of_the_authors_code(side, beta):
    sources, targets = pictures(4, side, 0), pictures(4, side, 1)
    expected = np.stack([authors(x, y, beta) for x, y in zip(sources, targets, strict=True)])
    inside = expected.clip(0, 255)
    found = fourier(sources, targets, beta)
    np.testing.assert_allclose(found, inside, atol=2e-3)
    assert np.abs(found - sources).mean() > 5


def test_it_is_cut_off_where_no_image_lies():
    """A bright source with a brighter target: a deployed image has nothing beyond 255."""
    sources, targets = (
        np.uint8([[[[200] * 3, [250] * 3]] * 2]),
        np.full((1, 2, 2, 3), 250, np.uint8),
    )
    assert authors(sources[0], targets[0], 0.01).max() == pytest.approx(275)
    np.testing.assert_allclose(fourier(sources, targets, 0.01)[0, :, :, 0], [[225, 255]] * 2)


def test_a_small_beta_changes_the_mean_alone():
    sources, targets = pictures(4, 16, 2), pictures(4, 16, 3)
    moved = fourier(sources, targets, 0.06) - sources  # 0.96 of a frequency
    expected = (targets.mean((1, 2)) - sources.mean((1, 2)))[:, None, None]
    assert np.abs(expected).max() > 20
    np.testing.assert_allclose(moved, np.broadcast_to(expected, moved.shape), atol=1e-3)


@pytest.mark.parametrize("beta", [0.01, 0.2, 0.5])
def test_a_picture_that_is_its_own_target_stays(beta):
    sources = pictures(4, 16, 4)
    np.testing.assert_allclose(fourier(sources, sources, beta), sources, atol=1e-3)


def test_a_flat_picture_has_no_phase_but_that_of_zero():
    """Rounding alone would give its frequencies any phase, another on other devices."""
    targets = pictures(3, 16, 5)
    sources = np.stack([np.full((16, 16, 3), x, np.uint8) for x in (0, 7, 255)])
    expected = np.stack([authors(np.zeros_like(x), x, 0.1) for x in targets])
    np.testing.assert_allclose(fourier(sources, targets, 0.1), expected.clip(0, 255), atol=2e-3)


@pytest.mark.parametrize("law", ["mixed", "unmixed", "independent"])
def test_both_networks_have_the_same_target_and_nothing_else_is_drawn_otherwise(law):
    off = step_draws(law, ViewRoot(KEY), 3, SIZES, ViewConfig())
    on = step_draws(law, ViewRoot(KEY), 3, SIZES, ViewConfig(fourier=ON))
    for before, now in zip(off[:2], on[:2], strict=True):
        assert before.target_images is None
        again = dataclasses.replace(now, target_images=None)
        jax.tree.map(np.testing.assert_array_equal, before, again)
        np.testing.assert_array_equal(now.target_images, on.student.target_images)
    assert np.array_equal(on.student.boxes, on.teacher.boxes) == (law != "independent")
    other = step_draws(law, ViewRoot(KEY), 4, SIZES, ViewConfig(fourier=ON))
    assert not np.array_equal(other.student.target_images, on.student.target_images)


def test_targets_have_a_key_of_their_own():
    """Folding a small number into a key gives one of those that it is split into."""
    own = jax.random.key_data(jax.random.fold_in(KEY, TARGETS))
    others = jax.random.key_data(jax.random.split(KEY, 4)).tolist()
    assert jax.random.key_data(jax.random.fold_in(KEY, 2)).tolist() in others
    assert own.tolist() not in others


def test_targets_are_uniform_and_as_many_views_as_asked_for_are_adapted():
    config = ViewConfig(fourier=dataclasses.replace(ON, probability=0.25))
    sizes = jnp.full((8192, 2), 24)
    targets = np.asarray(step_draws("mixed", ViewRoot(KEY), 0, sizes, config).student.target_images)
    chosen = targets[targets >= 0]
    assert len(chosen) / len(targets) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(np.bincount(chosen % 5) / len(chosen), 0.2, atol=0.04)


def test_evaluation_never_sees_it():
    """Neither the central view nor its training view; with spectra it could not be rendered."""
    branch = Branch(pooled_network(), InputSpec(16, "zero_one"))
    batch = Batch(pictures(4, 24, 6), np.full((4, 2), 24, np.int32), np.zeros(4, np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    usual, on = (
        evaluation_views(
            branch, (branch,), ViewConfig(fourier=x), batch, jnp.ones(4, bool), jnp.int32(0)
        )
        for x in (FourierConfig(), ON)
    )
    jax.tree.map(np.testing.assert_array_equal, usual.views, on.views)
    assert draw(KEY, SIZES, ViewConfig(fourier=ON)).target_images is None


def grey(view: np.ndarray, input_spec: InputSpec) -> np.ndarray:
    """On uint8's scale."""
    mean, deviation = input_spec.moments
    return np.float64(view) * np.array(deviation) + np.array(mean)


def test_teacher_and_student_see_the_authors_pictures_on_one_device_and_on_eight():
    """Each at its own resolution, the same target; where none is drawn, the view as without."""
    config = ViewConfig(fourier=dataclasses.replace(ON, probability=0.75), mixup="none")
    specs = InputSpec(16, "zero_one"), InputSpec(24, "minus_one_one", "uint8")
    student, teacher = (Branch(pooled_network(), x) for x in specs)
    batch = Batch(pictures(16, 24, 7), np.full((16, 2), 24, np.int32), np.zeros(16, np.int32))
    images = [Image.fromarray(x) for x in pictures(3, 40, 8)]
    low = {
        side: np.stack([low_amplitudes(x, ON.beta, side) for x in images]).astype(np.float32)
        for side in (16, 24)
    }

    def views(batch, root):
        found = step_views("mixed", config, student, (teacher,), batch, root, 5)
        return found.draw, found.student, found.teachers[teacher.input_spec]

    seen = []
    for devices in (1, 8):
        layout = make_layout(MeshConfig(data=devices))
        put = (
            jax.device_put(batch, layout.batch),
            jax.device_put(ViewRoot(KEY, low), layout.replicated),
        )
        compiled = jax.jit(views).lower(*put).compile()
        assert "all-gather" not in compiled.as_text()  # no picture goes from device to device
        seen.append(jax.device_get(compiled(*put)))
    drawn = seen[0][0]
    assert {*(drawn.target_images % 3)[drawn.target_images >= 0].tolist()} == {0, 1, 2}
    assert 0 < (drawn.target_images < 0).sum() < 16
    plain = jax.tree.map(jnp.asarray, dataclasses.replace(drawn, target_images=None))
    for spec, one, eight in zip(specs, seen[0][1:], seen[1][1:], strict=True):
        floats = InputSpec(spec.resolution, "zero_one")
        expected = grey(render(plain, jnp.asarray(batch.canvases), floats), floats)
        for row, target in enumerate(drawn.target_images):
            if target >= 0:
                image = images[target % 3].resize((spec.resolution,) * 2, BILINEAR)
                adapted_row = authors(expected[row], np.asarray(image), ON.beta)
                expected[row] = adapted_row.clip(0, 255)
        rounded = spec.input_rounding == "uint8"
        for found in (grey(one, spec), grey(eight, spec)):
            np.testing.assert_allclose(found, expected, atol=0.51 if rounded else 2e-3)
        if rounded:
            np.testing.assert_allclose(grey(one, spec), np.rint(grey(one, spec)), atol=1e-4)


def write_targets(folder, seed: int = 9, count: int = 3) -> str:
    """Of other sizes than the canvases; in folders, and beside what is no image."""
    for i, image in enumerate(pictures(count, 20, seed)):
        place = folder / f"set{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 20 - i]).save(place / f"{i}.png")
    (folder / "about.txt").write_text("no image")
    return str(folder)


def test_a_folder_is_known_by_what_its_images_are(tmp_path):
    one, moved = (FourierConfig(folder=write_targets(tmp_path / x)) for x in ("one", "moved"))
    found = open_targets(one)
    assert len(found.paths) == 3 and found.digest == open_targets(moved).digest
    (tmp_path / "one" / "about.txt").unlink()
    assert open_targets(one).digest == found.digest
    of_targets = spectra(found, 0.1, {16, 24})
    assert {x: y.shape for x, y in of_targets.items()} == {16: (3, 3, 3, 3), 24: (3, 5, 5, 3)}
    image = Image.open(found.paths[1]).resize((24, 24), BILINEAR)
    np.testing.assert_allclose(
        of_targets[24][1, 2, 2], np.float64(image).sum((0, 1)), rtol=1e-6
    )  # the lowest frequency is the sum of the pixels
    (note,) = spectra_note(of_targets)
    assert "3 x 3 at 16 px, 5 x 5 at 24 px" in note and "3 target images" in note
    assert open_targets(FourierConfig()) is None and spectra_note(None) == []
    write_targets(tmp_path / "moved", seed=10)
    assert open_targets(moved).digest != found.digest


def test_greyscale_and_transparent_targets_are_read_as_canvases_are(tmp_path):
    grey_levels = pictures(1, 16, 12)[0, :, :, 0]
    Image.fromarray(grey_levels).save(tmp_path / "grey.png")
    low = spectra(open_targets(FourierConfig(folder=str(tmp_path))), 0.1, {16})[16]
    np.testing.assert_array_equal(low[..., 0], low[..., 2])
    Image.fromarray(grey_levels).convert("LA").save(tmp_path / "grey.png")
    again = spectra(open_targets(FourierConfig(folder=str(tmp_path))), 0.1, {16})[16]
    np.testing.assert_array_equal(low, again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--views.fourier.folder", "FOLDER/none"], "'FOLDER/none', which does not exist"),
        (["--views.fourier.folder", ""], "views.fourier.folder is '', which does not exist"),
        (["--views.fourier.folder", "FOLDER/empty"], "FOLDER/empty holds no images"),
        (["--views.fourier.folder", "FOLDER/broken"], "broken/a.png is not a complete image"),
        (["--views.fourier.beta", "0.2"], "views.fourier.beta is 0.2, and there are no target"),
        (["--views.fourier.probability", "0.5"], "views.fourier.probability is 0.5, and there"),
        (["--views.fourier.folder", "FOLDER", "--views.fourier.beta", "0.6"],
         "views.fourier.beta is 0.6; expected more than 0, and 0.5 or less"),
        (["--views.fourier.folder", "FOLDER", "--views.fourier.beta", "0"],
         "views.fourier.beta is 0.0; expected more than 0, and 0.5 or less"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(tmp_path, capsys, options, said):
    write_targets(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    experiment = write_experiment(tmp_path / "tiny.py")
    options = [x.replace("FOLDER", str(tmp_path)) for x in options]
    error = refused(capsys, "train", experiment, "--workdir", tmp_path / "run", *options)
    _, sentence = error.strip().splitlines()  # behind that of the cache of programs
    assert said.replace("FOLDER", str(tmp_path)) in sentence
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_answered_before_the_training_is_refused(tmp_path):
    config = dataclasses.replace(
        matching(tmp_path, MeshConfig()), teaching="fixed", views=ViewConfig(fourier=ON)
    )
    with pytest.raises(UserError, match="with teaching=fixed the teacher runs before"):
        check(config)


def test_a_plan_has_the_shapes_of_the_run(tmp_path):
    config = matching(tmp_path, MeshConfig(data=1), views=ViewConfig(fourier=ON))
    run = resolved_run(config, (config.teacher.network,))
    assert root_of(tiny_config(), run).spectra is None
    assert root_of(config, run).spectra[16].shape == (1, 7, 7, 3)


def test_a_view_digest_knows_the_target():
    boxes, flips = np.ones((8, 4), np.float32), np.zeros(8, bool)
    digests = [view_digests(boxes, flips, None, None, x) for x in (None, np.zeros(8, int))]
    other = view_digests(boxes, flips, None, None, np.ones(8, int))
    assert not same_views(*digests) and not same_views(digests[1], other)
    np.testing.assert_array_equal(digests[0], view_digests(boxes, flips, None, None))


def adapting(folder, **changes) -> Config:
    """A run of four steps with a teacher, in dispatches of two."""
    views = FourierConfig(folder=write_targets(folder / "targets"), beta=0.2)
    config = matching(folder, MeshConfig(data=1), log=QUIET, steps_per_dispatch=2)
    return dataclasses.replace(
        config,
        views=dataclasses.replace(config.views, fourier=views),
        schedule=ScheduleConfig(total_steps=4),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a run with its live teacher, its folder, and its recording."""
    folder = tmp_path_factory.mktemp("fourier")
    config = adapting(folder)
    assert train(config, folder / "live").complete
    record_now(config, folder / "recording", dtype="float32")
    return config, folder


def test_the_run_and_its_recording_know_the_targets_by_their_contents(run):
    config, folder = run
    stored = Workdir(folder / "live").stored()
    digest = open_targets(config.views.fourier).digest
    assert stored.resolved.target_images == digest
    header = open_recording(folder / "recording").header
    assert header.target_images == digest
    assert header.views.fourier == FourierConfig(beta=0.2)  # and not by their place
    without = dataclasses.replace(header, target_images=None)
    assert without.identity != header.identity


def test_the_picture_of_the_views_shows_what_was_seen(run, monkeypatch):
    config, folder = run
    monkeypatch.setattr(view_samples, "STEPS", 1)
    place = Workdir(folder / "live")
    shown = sample_views(config, place)
    np.testing.assert_array_equal(shown.seen[0].pictures, shown.seen[1].pictures)
    plain = dataclasses.replace(config, views=ViewConfig(central_fraction=1.0))
    usual = sample_views(plain, place)
    assert np.abs(np.float64(shown.seen[0].pictures) - usual.seen[0].pictures).mean() > 5
    shutil.move(folder / "targets", folder / "away")
    try:
        with pytest.raises(UserError, match="which does not exist"):
            sample_views(config, place)
    finally:
        shutil.move(folder / "away", folder / "targets")


def test_recorded_streamed_and_on_eight_devices_it_is_the_same_run(run, tmp_path):
    config, folder = run
    config = learning(config, folder / "recording", mesh=MeshConfig(data=8), steps_per_dispatch=1)
    config = changed(config, {"data.feeding": "streaming", "log.every_steps": 2})
    train(config, tmp_path / "run")
    nearly_the_same(folder / "live", tmp_path / "run")


def test_it_goes_on_in_the_same_bits_with_the_same_targets_elsewhere(run, tmp_path, monkeypatch):
    config, folder = run
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        assert not train(config, tmp_path / "pieces").complete
    others = changed(config, {"views.fourier.folder": write_targets(tmp_path / "others", 10)})
    with pytest.raises(
        UserError, match=r"another run:\n  target_images: \w+ in the workdir, \w+ no"
    ):
        train(others, tmp_path / "pieces")
    shutil.copytree(folder / "targets", tmp_path / "targets")
    moved = changed(config, {"views.fourier.folder": str(tmp_path / "targets")})
    assert train(moved, tmp_path / "pieces").complete
    same_bits(folder / "live", tmp_path / "pieces")


def test_a_recording_of_other_targets_is_refused(run, tmp_path):
    config, folder = run
    others = changed(config, {"views.fourier.folder": write_targets(tmp_path / "others", 10)})
    with pytest.raises(
        UserError, match=r"was made from views adapted to target images \w+, and th"
    ):
        train(learning(others, folder / "recording"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other_beta = changed(config, {"views.fourier.beta": 0.1})
    with pytest.raises(UserError, match=r"another run:\n  views\.fourier\.beta: 0\.2 in the"):
        train(learning(other_beta, folder / "recording"), tmp_path / "run")
    with pytest.raises(UserError, match=r"the target images of views\.fourier: \w+ in the"):
        record_now(others, folder / "recording", dtype="float32")
