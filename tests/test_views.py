"""The draw against TensorFlow's own sampler, the renderer against a float64 reference."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_distill.config import CanvasConfig, MeshConfig, ViewConfig
from fm_distill.data.images import decode, on_canvas, shrink
from fm_distill.system.sharding import make_layout
from fm_distill.views.crops import CROPS
from fm_distill.views.draws import Draw, ViewRoot, draw, mix, step_draws
from fm_distill.views.rendering import CentralCrop, InputSpec, render, render_central
from fm_distill.views.sampling import _gathered, _multiplied, _places, sample

# Quantiles 20, 40, 60 and 80 % of 20,000 draws of tf.image.sample_distorted_bounding_box
# (area 0.05-1, aspect 0.75-1.33), for images of (height, width): area share, aspect, and
# top / height and left / width of the box where it is not the whole side.
TENSORFLOW = {
    (160, 160): {
        "area": (0.13137, 0.25531, 0.41836, 0.62531),
        "aspect": (0.86275, 0.97977, 1.09804, 1.21296),
    },
    (160, 213): {
        "area": (0.12254, 0.23272, 0.37711, 0.55178),
        "aspect": (0.86408, 0.98214, 1.09677, 1.21120),
    },
    (240, 160): {
        "area": (0.11479, 0.20854, 0.32724, 0.47333),
        "aspect": (0.86223, 0.97917, 1.09412, 1.21311),
    },
}


def boxes(law: str, size: tuple[int, int], count: int = 20_000) -> np.ndarray:
    sizes = jnp.tile(jnp.array([size]), (count, 1))
    return np.asarray(CROPS[law](jax.random.key(0), sizes, ViewConfig(), 0.05))


@pytest.mark.parametrize("size", TENSORFLOW)
def test_tensorflow_crop_has_the_law_of_tensorflow(size):
    top, left, height, width = boxes("tensorflow", size).T
    probabilities = (0.2, 0.4, 0.6, 0.8)
    area = np.quantile(height * width / (size[0] * size[1]), probabilities)
    aspect = np.quantile(width / height, probabilities)
    np.testing.assert_allclose(area, TENSORFLOW[size]["area"], atol=0.012)
    np.testing.assert_allclose(aspect, TENSORFLOW[size]["aspect"], atol=0.012)
    # Offsets are uniform over what is left.
    for offset, length, side in ((top, height, size[0]), (left, width, size[1])):
        free = side - length
        share = offset[free > 20] / free[free > 20]
        np.testing.assert_allclose(np.quantile(share, probabilities), probabilities, atol=0.02)


def test_torchvision_crop_is_area_uniform():
    _, _, height, width = boxes("torchvision", (160, 160)).T
    area = height * width / 160**2
    # Uniform in 0.05-1, less the largest ones whose aspect does not fit.
    assert 0.45 < area.mean() < 0.54
    assert boxes("tensorflow", (160, 160))[:, 2:].prod(axis=1).mean() / 160**2 < 0.40


@pytest.mark.parametrize("law", CROPS)
@pytest.mark.parametrize("size", [(160, 213), (32, 32), (8, 8), (1, 1), (3, 200), (200, 3)])
def test_boxes_are_whole_pixels_inside_the_image(law, size):
    found = boxes(law, size, 2000)
    np.testing.assert_array_equal(found, np.round(found))
    assert (found[:, :2] >= 0).all() and (found[:, 2:] >= 1).all()
    assert (found[:, :2] + found[:, 2:] <= np.array(size)).all()


def reference(canvas, box, flip, resolution):
    """Crop, then TensorFlow's resize (bilinear, half-pixel centres), one pixel at a time."""
    top, left, height, width = (float(x) for x in box)
    low, high = (top, left), (top + height - 1, left + width - 1)
    out = np.zeros((resolution, resolution, 3))
    for i in range(resolution):
        for j in range(resolution):
            column = resolution - 1 - j if flip else j
            y = min(max(top + (i + 0.5) * height / resolution - 0.5, low[0]), high[0])
            x = min(max(left + (column + 0.5) * width / resolution - 0.5, low[1]), high[1])
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            y1, x1 = min(y0 + 1, int(np.ceil(high[0]))), min(x0 + 1, int(np.ceil(high[1])))
            fy, fx = y - y0, x - x0
            upper = canvas[y0, x0] * (1 - fx) + canvas[y0, x1] * fx
            lower = canvas[y1, x0] * (1 - fx) + canvas[y1, x1] * fx
            out[i, j] = upper * (1 - fy) + lower * fy
    return out


RANGES = {
    "minus_one_one": lambda x: x / 255 * 2 - 1,
    "zero_one": lambda x: x / 255,
    "imagenet": lambda x: (
        (x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    ),
}


@pytest.mark.parametrize("resolution", [7, 24])
@pytest.mark.parametrize("input_range", RANGES)
def test_render_is_crop_then_bilinear_resize(resolution, input_range):
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 256, (4, 20, 20, 3), np.uint8)
    found = Draw(
        boxes=jnp.array(
            [[0, 0, 20, 20], [3, 2, 9, 14], [10, 12, 1, 2], [5, 0, 15, 6]], jnp.float32
        ),
        flips=jnp.array([False, True, False, True]),
        coefficients=jnp.full(4, 0.75),
        partners=None,
    )
    images = np.asarray(render(found, jnp.asarray(canvases), InputSpec(resolution, input_range)))
    plain = [
        RANGES[input_range](reference(c.astype(np.float64), b, f, resolution))
        for c, b, f in zip(canvases, found.boxes, found.flips, strict=True)
    ]
    expected = [0.75 * plain[i] + 0.25 * plain[i - 1] for i in range(4)]
    np.testing.assert_allclose(images, expected, atol=2e-5)


def test_a_view_is_rounded_before_it_is_mixed():
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    boxes = jnp.array([[3, 2, 9, 14], [5, 0, 15, 6]], jnp.float32)
    found = Draw(boxes, jnp.array([False, True]), jnp.ones(2), None)
    rounded = InputSpec(7, "zero_one", "uint8")
    alone = np.asarray(render(found, jnp.asarray(canvases), rounded)) * 255
    plain = np.stack([reference(*x, 7) for x in zip(canvases, boxes, found.flips, strict=True)])
    between = np.abs(plain % 1 - 0.5) < 1e-3  # where single precision may go either way
    np.testing.assert_allclose(alone[~between], np.round(plain)[~between], atol=1e-4)
    np.testing.assert_allclose(alone, np.round(alone), atol=1e-4)
    mixed = dataclasses.replace(found, coefficients=jnp.full(2, 0.75))
    both = np.asarray(render(mixed, jnp.asarray(canvases), rounded)) * 255
    np.testing.assert_allclose(both, 0.75 * alone + 0.25 * alone[::-1], atol=1e-4)
    central = (
        render_central(jnp.asarray(canvases), jnp.full((2, 2), 20), CentralCrop(0.8), rounded) * 255
    )
    np.testing.assert_allclose(central, np.round(central), atol=1e-4)


# Made with TensorFlow by `tools/make_central_views.py`.
CENTRAL_VIEWS = dict(np.load(pathlib.Path(__file__).parent / "data" / "central_views.npz"))


def central_view(name: str, canvas_size: int, resize: str = "bilinear") -> np.ndarray:
    """Our view for the stored one of `name`, METHOD_HEIGHT_WIDTH_RESOLUTION_FRACTION."""
    _, height, width, resolution, fraction = name.split("_")
    canvas = CanvasConfig(size=canvas_size)
    pixels = shrink(decode(CENTRAL_VIEWS[f"image_{height}_{width}"]), canvas)
    canvases = jnp.asarray(on_canvas(pixels, canvas.side)[None])
    sizes = jnp.array([pixels.shape[:2]])
    input_spec = InputSpec(int(resolution), "zero_one")
    crop = CentralCrop(float(fraction), resize)
    return np.asarray(render_central(canvases, sizes, crop, input_spec))[0] * 255


@pytest.mark.parametrize("name", [x for x in CENTRAL_VIEWS if x.startswith("bilinear")])
def test_central_view_is_tensorflows(name):
    found = central_view(name, canvas_size=60)
    np.testing.assert_allclose(found, CENTRAL_VIEWS[name], atol=2e-3)


@pytest.mark.parametrize("canvas_size", [20, 200])
@pytest.mark.parametrize("name", [x for x in CENTRAL_VIEWS if x.startswith("area")])
def test_central_view_lies_where_the_released_one_does(name, canvas_size):
    """Smooth images on a canvas that shrinks them, and on one that does not, against `area`."""
    difference = np.abs(central_view(name, canvas_size) - CENTRAL_VIEWS[name])
    assert difference.mean() < 4  # grey levels; 18 with half a pixel between them


@pytest.mark.parametrize("name", [x for x in CENTRAL_VIEWS if x.startswith("area")])
def test_central_view_by_area_is_tensorflows(name):
    found = central_view(name, canvas_size=200, resize="area")
    np.testing.assert_allclose(found, CENTRAL_VIEWS[name], atol=2e-3)


@pytest.mark.parametrize(("height", "width"), [(20, 27), (9, 13), (40, 31)])
def test_area_is_the_integral_over_each_pixel(height, width):
    """By the sums of whole rows and columns; larger and smaller than the image, odd margins."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    canvas = np.full((1, 48, 48, 3), 255, np.uint8)
    canvas[0, :height, :width] = image
    crop, spec = CentralCrop(0.8, "area"), InputSpec(16, "zero_one")
    found = render_central(jnp.asarray(canvas), jnp.array([[height, width]]), crop, spec)
    sums = np.pad(image.astype(np.float64), ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    for axis, size in enumerate((height, width)):
        resized = round(size * 20 / min(height, width))
        edges = ((resized - 16) // 2 + np.arange(17)) * size / resized
        columns = np.moveaxis(sums, axis, 0).reshape(size + 1, -1)
        at = np.stack([np.interp(edges, np.arange(size + 1), x) for x in columns.T], axis=1)
        rest = np.moveaxis(sums, axis, 0).shape[1:]
        sums = np.moveaxis(np.diff(at, axis=0).reshape(16, *rest) * resized / size, 0, axis)
    np.testing.assert_allclose(np.asarray(found)[0] * 255, sums, atol=2e-3)


@pytest.mark.parametrize("resolution", [5, 24, 40])
def test_both_ways_of_sampling_agree(resolution):
    """Matrix products, as on accelerators, and gathering, as on a CPU; at all edges of a canvas."""
    rng = np.random.Generator(np.random.Philox(8))
    side, batch = 30, 64
    canvases = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    start = rng.uniform(0, 20, (batch, 2)).astype(np.float32)
    length = rng.uniform(0.5, 1, (batch, 2)).astype(np.float32) * (side - start)
    start[:8], length[:8] = 0, side  # the whole canvas
    start[8:16] = np.floor(start[8:16])
    boxes = np.concatenate([start, length], axis=1)
    low, high = start, start + length - 1
    low[16:24], high[16:24] = 0, side - 1  # clamped to the image alone, as in evaluation
    flips = rng.random(batch) < 0.5
    places = [jnp.asarray(x) for x in (boxes, low, high)]
    rows, columns = (_places(axis, resolution, *places) for axis in (0, 1))
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    one, other = (jax.jit(x)(canvases, rows, columns) for x in (_gathered, _multiplied))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_gathering_stays_on_its_device():
    layout = make_layout(MeshConfig())
    shapes, dtypes = [(16, 30, 30, 3), (16, 8), (16, 8)], ["uint8", "float32", "float32"]
    arguments = map(jax.ShapeDtypeStruct, shapes, dtypes)
    sampling = jax.jit(_gathered, in_shardings=layout.batch)
    assert "all-" not in sampling.lower(*arguments).compile().as_text()


def test_accelerators_multiply_and_a_cpu_gathers():
    sampling = jax.jit(lambda *x: sample(*x, 8))
    shapes = [(2, 9, 9, 3), (2, 4), (2, 2), (2, 2), (2,)]
    dtypes = ["uint8", "float32", "float32", "float32", "bool"]
    traced = sampling.trace(*map(jax.ShapeDtypeStruct, shapes, dtypes))
    for platform, gathers in (("tpu", False), ("cuda", False), ("cpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.gather" in text) == gathers
        assert ("stablehlo.dot_general" in text) != gathers


def test_what_lies_beside_an_image_on_its_canvas_is_never_seen():
    canvases = np.full((64, 20, 20, 3), 255, np.uint8)
    canvases[:, :9, :13] = 100
    sizes = jnp.tile(jnp.array([[9, 13]]), (64, 1))
    drawn = draw(jax.random.key(3), sizes, ViewConfig())
    input_spec = InputSpec(16, "zero_one")
    for images in (
        render(drawn, jnp.asarray(canvases), input_spec),
        render_central(jnp.asarray(canvases), sizes, CentralCrop(1.0), input_spec),
    ):
        np.testing.assert_allclose(images, 100 / 255, atol=1e-6)


def test_mixup_coefficient_is_folded_uniform_one_a_batch():
    sizes = jnp.full((8, 2), 32)
    keys = jax.random.split(jax.random.key(0), 4000)
    a = jax.vmap(lambda k: draw(k, sizes, ViewConfig()).coefficients)(keys)
    assert (a == a[:, :1]).all()
    # max(a, 1 - a) of a uniform a is uniform in 0.5-1 (big_vision: 0.500 / 0.7506 / 1.000).
    np.testing.assert_allclose(
        np.quantile(a[:, 0], [0.1, 0.5, 0.9]), [0.55, 0.75, 0.95], atol=0.015
    )


def test_mixup_choices():
    sizes = jnp.full((64, 2), 32)
    key = jax.random.key(0)
    example = draw(key, sizes, ViewConfig(mixup="example", mixup_fold=False))
    assert np.unique(example.coefficients).size > 60 and example.coefficients.min() < 0.5
    assert draw(key, sizes, ViewConfig(mixup="none")).coefficients is None
    permuted = draw(key, sizes, ViewConfig(mixup_partner="permutation"))
    assert sorted(permuted.partners.tolist()) == list(range(64))
    values = jnp.arange(64.0)
    rolled = draw(key, sizes, ViewConfig())
    a = rolled.coefficients[0]
    np.testing.assert_allclose(mix(rolled, values)[5], a * 5 + (1 - a) * 4, rtol=1e-6)
    np.testing.assert_allclose(mix(rolled, values)[0], (1 - a) * 63, rtol=1e-6)


def test_flip_probability():
    sizes = jnp.full((4000, 2), 32)
    for p in (0.0, 0.5, 1.0):
        flips = draw(jax.random.key(1), sizes, ViewConfig(flip_probability=p)).flips
        assert abs(flips.mean() - p) < 0.03


@pytest.mark.parametrize("partner", ["roll", "permutation"])
def test_a_draw_does_not_depend_on_devices(partner):
    config = ViewConfig(mixup_partner=partner)
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 256, (16, 20, 20, 3), np.uint8)
    sizes = rng.integers(8, 21, (16, 2)).astype(np.int32)

    def view(sizes, canvases):
        drawn = draw(jax.random.key(5), sizes, config)
        return drawn, render(drawn, canvases, InputSpec(8, "zero_one"))

    seen = []
    for devices in (1, 8):
        batch = make_layout(MeshConfig(data=devices)).batch
        drawn, images = jax.jit(view)(*jax.device_put((sizes, canvases), batch))
        seen.append((dataclasses.asdict(drawn), np.asarray(images)))
    jax.tree.map(np.testing.assert_array_equal, seen[0][0], seen[1][0])
    np.testing.assert_allclose(seen[0][1], seen[1][1], atol=1e-6)


POINTS = ViewConfig(
    smallest_area_points=((10, 0.6), (30, 0.1)), mixup_strength_points=((0, 0.0), (20, 1.0))
)


@pytest.mark.parametrize(
    ("step", "smallest", "strength"),
    [(0, 0.6, 0.0), (10, 0.6, 0.5), (15, 0.475, 0.75), (30, 0.1, 1.0), (99, 0.1, 1.0)],
)
@pytest.mark.parametrize("law", ["mixed", "independent"])
def test_crops_and_mixup_follow_their_points(law, step, smallest, strength):
    """As drawn with the value of the step written down; in the graph the same."""
    sizes = jnp.full((64, 2), 200)
    root = ViewRoot(jax.random.key(2))
    found = step_draws(law, root, step, sizes, POINTS)
    constant = step_draws(law, root, step, sizes, ViewConfig(crop_area=(smallest, 1.0)))
    for now, fixed in zip(found[:2], constant[:2], strict=True):
        np.testing.assert_array_equal(now.boxes, fixed.boxes)
        if law == "independent":
            assert now.coefficients is None
            continue
        weaker = 1 - strength * (1 - np.asarray(fixed.coefficients, np.float64))
        np.testing.assert_allclose(now.coefficients, weaker, rtol=1e-6)
    traced = jax.jit(lambda x: step_draws(law, root, x, sizes, POINTS).student)(jnp.int32(step))
    np.testing.assert_allclose(traced.boxes, found.student.boxes, atol=1)


@pytest.mark.parametrize("crop", ["tensorflow", "torchvision"])
def test_no_crop_is_smaller_than_its_step_allows(crop):
    config = dataclasses.replace(POINTS, crop=crop, crop_aspect=(1.0, 1.0))
    sizes = jnp.full((2000, 2), 200)
    for step, smallest in ((0, 0.6), (20, 0.35), (40, 0.1)):
        boxes = step_draws("mixed", ViewRoot(jax.random.key(3)), step, sizes, config).student.boxes
        areas = np.asarray(boxes[:, 2] * boxes[:, 3]) / 200**2
        assert smallest - 0.01 < areas.min() < smallest + 0.02


def reduced_and_enlarged(box: np.ndarray, pixels: int, resolution: int) -> np.ndarray:
    """In float64, an axis after the other: means of intervals, then lines between their centres."""
    for _ in range(2):
        size = len(box)
        cells = min(pixels, size)
        sums = np.concatenate([np.zeros((1, *box.shape[1:])), np.cumsum(box, axis=0)])
        columns = sums.reshape(size + 1, -1).T
        edges = np.arange(cells + 1) * size / cells
        at = np.stack([np.interp(edges, np.arange(size + 1), x) for x in columns])
        means = np.diff(at) * cells / size
        centres = (np.arange(resolution) + 0.5) * cells / resolution - 0.5
        lines = np.stack([np.interp(centres, np.arange(cells), x) for x in means], axis=1)
        box = np.swapaxes(lines.reshape(resolution, *box.shape[1:]), 0, 1)
    return box


@pytest.mark.parametrize("resolution", [16, 24])
def test_crops_are_reduced_to_the_pixels_of_their_step(resolution):
    """Both networks see as many; that of 16 pixels is left alone when its own are reached."""
    rng = np.random.Generator(np.random.Philox(4))
    canvases = jnp.asarray(rng.integers(0, 256, (8, 40, 40, 3), dtype=np.uint8))
    config = ViewConfig(
        resolution_points=((0, 6.0), (10, 16.0)), flip_probability=0.5, mixup="none"
    )
    sizes = jnp.full((8, 2), 40)
    seen = jax.jit(lambda step: render_of(config, step, canvases, sizes, resolution))
    for step, pixels in ((0, 6), (5, 11), (10, 16)):
        drawn = step_draws("mixed", ViewRoot(jax.random.key(1)), step, sizes, config).student
        assert drawn.resolution == pixels
        found = np.asarray(seen(jnp.int32(step)))
        if pixels == resolution:
            plain = dataclasses.replace(drawn, resolution=None)
            expected = render(plain, canvases, InputSpec(resolution, "zero_one"))
            np.testing.assert_allclose(found, expected, atol=1e-6)
            continue
        for i, (top, left, height, width) in enumerate(np.asarray(drawn.boxes, int)):
            box = np.asarray(canvases)[i, top : top + height, left : left + width].astype(
                np.float64
            )
            expected = reduced_and_enlarged(box, pixels, resolution)
            expected = expected[:, ::-1] if drawn.flips[i] else expected
            np.testing.assert_allclose(found[i] * 255, expected, atol=2e-3)


def render_of(config, step, canvases, sizes, resolution):
    drawn = step_draws("mixed", ViewRoot(jax.random.key(1)), step, sizes, config).student
    return render(drawn, canvases, InputSpec(resolution, "zero_one"))


def test_reduced_crops_do_not_depend_on_devices():
    config = ViewConfig(resolution_points=((0, 6.0),))
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 256, (16, 20, 20, 3), np.uint8)
    sizes = rng.integers(8, 21, (16, 2)).astype(np.int32)
    seen = []
    for devices in (1, 8):
        batch = make_layout(MeshConfig(data=devices)).batch
        view = jax.jit(lambda sizes, canvases: render_of(config, 3, canvases, sizes, 8))
        seen.append(np.asarray(view(*jax.device_put((sizes, canvases), batch))))
    np.testing.assert_allclose(*seen, atol=1e-6)
