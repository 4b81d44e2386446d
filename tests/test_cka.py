"""CKA against float64 NumPy in the form of Song et al. 2012, and what it promises."""

import jax.numpy as jnp
import numpy as np
import pytest

from fm_distill.diagnosis.cka import centred_gram, hsic, ratio


def in_song_form(x, y):
    """The unbiased HSIC of Song et al. 2012 (JMLR 13), equation 5, of linear kernels."""
    n = len(x)
    a, b = (z.reshape(n, -1) @ z.reshape(n, -1).T for z in (x, y))
    np.fill_diagonal(a, 0)
    np.fill_diagonal(b, 0)
    one = np.ones(n)
    rest = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ a @ b @ one
    return (np.trace(a @ b) + rest) / (n * (n - 3))


def biased(x, y):
    """The usual CKA, of column-centred features."""
    x, y = (z - z.mean(0) for z in (x, y))
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def cka(batches) -> float:
    """Of pairs of features, as the probes add them up."""
    sums = np.zeros(3)
    for x, y in batches:
        a, b = (centred_gram(jnp.asarray(z, jnp.float32)) for z in (x, y))
        pairs = (([a], [b]), ([a], [a]), ([b], [b]))
        sums += [float(hsic(*pair)[0, 0]) for pair in pairs]
    return float(ratio(sums[:1, None], sums[1:2], sums[2:])[0, 0])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_hsic_is_songs(rng):
    """Of maps and vectors, far from zero, in float32."""
    maps = [rng.standard_normal((9, 4, 4, 3)) + 5, rng.standard_normal((9, 2, 2, 5)) - 20]
    vectors = [rng.standard_normal((9, 7)) + 100]
    grams = [[centred_gram(jnp.float32(x)) for x in side] for side in (maps, vectors)]
    found = np.asarray(hsic(*grams))
    assert found.shape == (2, 1)
    expected = [[in_song_form(x, y) for y in vectors] for x in maps]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    own = float(hsic(grams[0][:1], grams[0][:1])[0, 0])
    assert own == pytest.approx(in_song_form(maps[0], maps[0]), rel=1e-4)


def test_independent_features_have_none(rng):
    """Where the biased estimate of as many channels as examples has a half."""
    pairs = [rng.standard_normal((2, 32, 64)) for _ in range(16)]
    assert abs(cka(pairs)) < 0.05
    assert np.mean([biased(x, y) for x, y in pairs]) > 0.5


def test_equal_features_have_one_whatever_their_rotation_scale_and_shift(rng):
    x = rng.standard_normal((3, 16, 6)) * [5, 3, 1, 1, 0.3, 0.1]
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    assert cka([(y, y) for y in x]) == pytest.approx(1, abs=1e-5)
    assert cka([(y, -7 * y @ rotation + 11) for y in x]) == pytest.approx(1, abs=1e-4)
    # No invariance to any linear map: that would make all wide layers alike.
    assert cka([(y, y * [0.1, 0.1, 1, 1, 5, 5]) for y in x]) < 0.5


def test_batches_are_summed_before_the_ratio(rng):
    """Each with its own n (n - 3): batches may differ in size."""
    mixing = rng.standard_normal((5, 4))
    xs = [rng.standard_normal((n, 5)) * size for n, size in ((4, 1.0), (9, 3.0), (30, 1.0))]
    batches = [(x, x @ mixing + rng.standard_normal((len(x), 4))) for x in xs]
    between, one, other = (
        sum(in_song_form(pair[i], pair[j]) for pair in batches) for i, j in ((0, 1), (0, 0), (1, 1))
    )
    assert cka(batches) == pytest.approx(between / np.sqrt(one * other), rel=1e-4)
    ratios = [
        in_song_form(x, y) / np.sqrt(in_song_form(x, x) * in_song_form(y, y)) for x, y in batches
    ]
    assert cka(batches) != pytest.approx(np.mean(ratios), rel=1e-2)


def test_a_constant_feature_has_no_value(rng):
    x = rng.standard_normal((8, 3))
    assert np.isnan(cka([(x, np.ones((8, 2)))]))
