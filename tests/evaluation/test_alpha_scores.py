"""Mattes against the truth and without it; what learned nothing is caught where the mean lets it pass."""

from __future__ import annotations

import numpy as np
import pytest

from inlaid.evaluation.metrics import alpha_scores
from inlaid.evaluation.metrics.alpha import METRICS, TRUTH, against, measure
from inlaid.media import rgba
from inlaid.networks.rgba_vae_metrics import GUESSES
from support import rgba_clips as make


def small_subject(seed: int = 0) -> np.ndarray:
    """A matte that covers under 5 % of the picture, with soft edges."""
    alpha = np.zeros((5, 96, 128), np.uint8)
    alpha[:, 10:42, 20:84] = make.clip(seed, 5)[..., 3]
    return alpha


def blurred(alpha: np.ndarray) -> np.ndarray:
    """A matte as a good predictor might give it."""
    soft = alpha.astype(np.float32)
    soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, 1, 2) + np.roll(soft, -1, 1)) / 4
    return soft.round().clip(0, 255).astype(np.uint8)


def test_a_perfect_matte_has_no_error() -> None:
    truth = small_subject()
    s = alpha_scores.score(truth, truth)
    assert (s.mae, s.mse, s.gradient, s.temporal, s.iou, s.balanced) == (0, 0, 0, 0, 1, 0)


def test_predictors_that_learned_nothing_pass_the_mean_and_not_the_regions() -> None:
    truth = small_subject()
    trivial = alpha_scores.baselines(truth)
    assert list(trivial) == list(GUESSES)
    nothing = trivial["all transparent"]
    assert nothing.mae < 15, "the threshold that guides quote is met by predicting nothing at all"
    assert (nothing.opaque, nothing.transparent) == pytest.approx((255, 0), abs=0.1) and nothing.iou == 0
    for name in GUESSES:
        assert alpha_scores.faults(trivial[name], trivial), name
    opaque = 255 - truth
    assert alpha_scores.baselines(opaque)["all opaque"].mae < 15
    assert alpha_scores.faults(alpha_scores.baselines(opaque)["all opaque"], alpha_scores.baselines(opaque))
    good = alpha_scores.score(blurred(truth), truth)
    assert alpha_scores.faults(good, trivial) == []
    assert good.mae < nothing.mae and good.balanced < 30
    dim = (truth * 0.45).astype(np.uint8)
    found = alpha_scores.faults(alpha_scores.score(dim, truth), trivial)
    assert any("in the opaque region" in f for f in found), "half of the subject is gone"


def test_regions_share_all_pixels_once() -> None:
    masks = alpha_scores.regions(small_subject())
    assert (np.sum([*masks.values()], 0) == 1).all()
    assert all(m.any() for m in masks.values())
    solid = alpha_scores.score(np.zeros((1, 4, 4), np.uint8), np.full((1, 4, 4), 255, np.uint8))
    assert solid.transparent is None and solid.soft is None and solid.balanced == 255


def test_errors_measure_what_they_say() -> None:
    truth = small_subject()
    shifted = np.roll(truth, 2, 2)
    flat = np.where(truth > 0, truth, 5).astype(np.uint8)
    late = np.concatenate([truth[:1], truth[:-1]])
    scores = {
        k: alpha_scores.score(v, truth) for k, v in {"shifted": shifted, "flat": flat, "late": late}.items()
    }
    assert scores["shifted"].gradient > 4 * scores["flat"].gradient
    assert scores["late"].temporal > 1 and scores["flat"].temporal < 1
    assert scores["flat"].transparent == pytest.approx(5, abs=0.2) and scores["flat"].opaque == 0
    assert scores["shifted"].iou < 1 == scores["flat"].iou
    assert scores["shifted"].mse == pytest.approx(((shifted / 255 - truth / 255) ** 2).mean(), rel=1e-4)


# --- without the truth --------------------------------------------------------------------------------------


def test_measures_without_truth() -> None:
    good = make.clip(size=(64, 96))
    good[..., :3] = np.where(good[..., 3:] > 127, (220, 60, 40), (20, 30, 90))
    m = measure(good)
    assert list(m) == list(METRICS)
    assert 5 < m["coverage"] < 60 and 1 < m["soft"] < 30
    assert m["haze"] == 0 and m["edges"] > 95 and m["alpha_flicker"] < 0.3

    hazy = good.copy()
    hazy[..., 3] = np.maximum(hazy[..., 3], 40)
    assert measure(hazy)["haze"] == pytest.approx(100 * 40 / 255, abs=0.5)

    jumping = good.copy()
    jumping[1::2, ..., 3] = (jumping[1::2, ..., 3] * 0.7).astype(np.uint8)
    assert measure(jumping)["alpha_flicker"] > 5 * max(m["alpha_flicker"], 0.1)

    elsewhere = good.copy()
    elsewhere[..., :3] = np.roll(good[..., :3], 30, 2)
    assert measure(elsewhere)["edges"] < 40
    plain = good.copy()
    plain[..., 3] = 255
    assert measure(plain)["edges"] == 0 and measure(plain)["coverage"] == 100


def test_against_a_known_truth() -> None:
    truth = make.clip()
    found = truth.copy()
    found[..., 3] = 0
    error = against(found, truth[..., 3])
    assert list(error) == list(TRUTH)
    assert error["alpha_regions"] > 120 > error["alpha_error"]
    assert against(truth, truth[..., 3]) == {"alpha_error": 0, "alpha_regions": 0}


def test_widening_is_a_square_and_stops_at_the_rim() -> None:
    mask = np.zeros((1, 9, 12), bool)
    mask[0, 1, 3] = True
    wide = rgba.widened(mask, 2)
    assert wide.sum() == 4 * 5 and wide[0, :4, 1:6].all()
    assert rgba.widened(mask, 40).all()
