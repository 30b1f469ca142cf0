"""Video metrics on clips whose answer is known, and `evaluate` on a tiny random Wan."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inlay.evaluate import video


def texture(h: int = 64, w: int = 64, seed: int = 0, smooth: int = 2) -> np.ndarray:
    """A smooth random picture, uint8 (h, w, 3)."""
    x = np.random.default_rng(seed).random((h, w))
    for _ in range(smooth):
        x = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 0) + np.roll(x, -1, 1)) / 5
    x = (x - x.min()) / (x.max() - x.min())
    return (x[..., None] * 200 + 28).round().astype(np.uint8).repeat(3, axis=2)


def sliding(dy: int, dx: int, frames: int = 9, size: int = 64) -> np.ndarray:
    """A window that slides over a large picture, so that new pixels enter at the edges."""
    big = texture(size * 3, size * 3)
    at = [(size + dy * k, size + dx * k) for k in range(frames)]
    return np.stack([big[y : y + size, x : x + size] for y, x in at])


def still(frames: int = 9) -> np.ndarray:
    return np.repeat(texture()[None], frames, axis=0)


def grey(levels: np.ndarray | list[float], size: int = 32) -> np.ndarray:
    """Flat frames, one per level."""
    return np.tile(np.asarray(levels, np.uint8)[:, None, None, None], (1, size, size, 3))


def noise(deviation: float, frames: int = 33, seed: int = 0) -> np.ndarray:
    y = np.random.default_rng(seed).normal(128, deviation, (frames, 64, 64, 1))
    return y.round().clip(0, 255).astype(np.uint8).repeat(3, axis=3)


def test_a_still_has_nothing_but_sharpness() -> None:
    found = video.measure(still())
    assert found["motion"] == 0 and found["flicker"] == 0 and found["consistency"] == pytest.approx(1)
    assert found["sharpness"] > 0


def test_measure_is_the_single_functions() -> None:
    clip = sliding(1, 2)
    single = {
        "motion": 100 * video.motion(clip),
        "flicker": 100 * video.flicker(clip),
        "consistency": video.consistency(clip),
        "sharpness": video.sharpness(clip),
    }
    assert video.measure(clip) == pytest.approx(single, rel=1e-6)
    assert single.keys() == video.METRICS.keys()


@pytest.mark.parametrize("step", [(0, 1), (2, 0), (3, -4), (-5, 5)])
def test_motion_is_the_displacement(step: tuple[int, int]) -> None:
    diagonal = 64 * math.sqrt(2)
    found = video.motion(sliding(*step)) * diagonal
    assert found == pytest.approx(math.hypot(*step), rel=0.2), "all but the strip that enters"


def test_motion_of_a_part_is_that_part_of_it() -> None:
    clip = np.full((9, 64, 64, 3), 40, np.uint8)
    square = texture(16, 16, seed=3, smooth=1)
    for k in range(9):
        clip[k, 24:40, 8 + 3 * k : 24 + 3 * k] = square
    found = video.motion(clip) * 64 * math.sqrt(2)
    assert 0.5 * 3 * (16 / 64) ** 2 < found < 2 * 3 * (16 / 64) ** 2


def test_slow_motion_counts() -> None:
    fast = sliding(0, 1, frames=9)
    slow = fast[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]]
    assert video.motion(slow) == pytest.approx(video.motion(fast) / 3, rel=0.25)


def test_noise_and_brightness_do_not_move() -> None:
    assert video.motion(noise(10)) < 0.0002
    assert video.motion(grey([100, 140] * 5)) == 0


def test_motion_is_the_same_at_every_size() -> None:
    small = sliding(0, 2)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    assert video.motion(large) == pytest.approx(video.motion(small), rel=0.15)


def test_flicker_of_alternating_brightness_is_its_step() -> None:
    assert video.flicker(grey([100, 110] * 8)) == pytest.approx(10 / 255, rel=1e-5)


def test_flicker_of_noise_is_its_deviation_over_root_pi() -> None:
    assert video.flicker(noise(8)) == pytest.approx(8 / 255 / math.sqrt(math.pi), rel=0.03)


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param(grey(np.linspace(0, 250, 11)), id="fade"),
        pytest.param(np.concatenate([grey([20] * 4), grey([220] * 4)]), id="cut"),
        pytest.param(grey([10, 200]), id="two frames"),
        pytest.param(grey([10]), id="one frame"),
    ],
)
def test_what_changes_but_does_not_come_back_is_no_flicker(clip: np.ndarray) -> None:
    assert video.flicker(clip) == 0


def test_motion_is_hardly_flicker_and_flicker_shows_through_motion() -> None:
    moving = sliding(2, -1)
    shaken = moving.astype(int) + np.where(np.arange(9) % 2, 12, 0)[:, None, None, None]
    assert video.flicker(moving) < 0.002
    assert video.flicker(shaken.clip(0, 255).astype(np.uint8)) == pytest.approx(12 / 255, rel=0.25)
    assert np.abs(np.diff(video.luma(moving), axis=0)).mean() > 0.02, (
        "which neighbours' difference would call flicker"
    )


def test_consistency() -> None:
    assert video.consistency(sliding(3, 2)) > 0.95
    assert video.consistency(noise(30)) < 0.4
    unrelated = np.stack([texture(seed=k) for k in range(6)])
    assert video.consistency(unrelated) < 0.75
    assert video.consistency(grey([50] * 4)) == 1
    mixed = np.concatenate([grey([50], 64), still(1)])
    assert video.consistency(mixed) == 0


def test_sharpness() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, axis=3)
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (1, 64, 1, 3))
    assert video.sharpness(board) == pytest.approx(1020**2, rel=1e-4)
    assert video.sharpness(ramp) == pytest.approx(0, abs=1e-4)
    assert video.sharpness(texture(smooth=6)[None]) < 0.3 * video.sharpness(texture(smooth=1)[None])


def test_distance() -> None:
    black, white = grey([0] * 3), grey([255] * 3)
    assert video.distance(black, black) == 0
    assert video.distance(black, white) == 1
    assert video.distance(black, grey([51] * 3)) == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (1, 1, 1, 3), (5, 200, 30, 3), (4, 33, 17, 3)])
def test_odd_shapes_are_measured(shape: tuple[int, ...]) -> None:
    clip = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    assert all(math.isfinite(v) for v in video.measure(clip).values())
