"""Tiny model with alpha: its judge, and the shipped RGBA VAE."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models.rgba import load_vae, reconstruct

from inlaid.networks import rgba_vae_checkpoint
from inlaid.tiny import rgba_judge, rgba_vae_path, rgba_world
from inlaid.tiny.world import FRAMES, SIZE
from support.slow import slow

TRUE = [clip.frames for clip in rgba_world.subject_clips(4, seed=5)]


def changed(clip: np.ndarray, how: str) -> np.ndarray:
    """A clip of the subject with one thing wrong."""
    out = clip.copy()
    color, alpha = out[..., :3], out[..., 3]
    orange = color[..., 0].astype(int) - color[..., 2] > 60
    if how == "red for orange":
        color[orange] = (230, 30, 30)
    elif how == "one color":
        color[:] = (155, 60, 210)
    elif how == "mixed all over":
        color[:] = np.where(np.indices(alpha.shape).sum(0)[..., None] % 2, (255, 150, 30), (155, 60, 210))
    elif how == "all solid":
        alpha[alpha > 40] = 255
    elif how == "opaque ground":
        alpha[:] = 255
    elif how == "nothing":
        alpha[:] = 0
    elif how == "matte elsewhere":
        alpha[:] = np.roll(alpha, 14, axis=2)
    return out


def test_the_judge_knows_the_subject() -> None:
    assert all(rgba_judge.judge_subject(clip).both for clip in TRUE)


@pytest.mark.parametrize(
    ("how", "which"),
    [
        ("red for orange", "subject"),
        slow("one color", "subject"),
        slow("mixed all over", "subject"),
        ("all solid", "alpha"),
        slow("opaque ground", "alpha"),
        ("nothing", "alpha"),
        slow("matte elsewhere", "subject"),
    ],
)
def test_the_judge_rejects_one_thing_wrong(how: str, which: str) -> None:
    for clip in TRUE:
        verdict = rgba_judge.judge_subject(changed(clip, how))
        assert not getattr(verdict, which) and not verdict.both, how


@pytest.mark.slow  # see `red for orange`
def test_the_judge_rejects_the_old_world() -> None:
    assert not any(rgba_judge.judge_subject(c.frames).both for c in rgba_world.clips(1, 6, validation=True))


def test_the_shipped_rgba_vae_keeps_color_and_alpha() -> None:
    """A clip is reconstructed here; the report that ships is of 32, by the same command."""
    torch.manual_seed(0)
    stated = json.loads((rgba_vae_path("wan") / "REPORT.json").read_text("utf-8"))
    assert stated["rgba_vae_id"] == rgba_vae_checkpoint.read_config(rgba_vae_path("wan"))["rgba_vae_id"]
    shown = stated["world"]
    assert shown["clips"] >= 32 and shown["alpha_mae"] < 5 and shown["rgb_mae"] < 10
    assert shown["alpha_mae"] < min(shown[f"all_{n}_alpha_mae"] for n in ("opaque", "transparent")) / 5
    rgba_vae = rgba_vae_checkpoint.load(rgba_vae_path("wan"), load_vae())
    clips = np.stack([c.frames for c in rgba_world.clips(1, 1, validation=True)])
    again = reconstruct(rgba_vae, clips).astype(np.float32)
    assert again.shape == (1, FRAMES, SIZE, SIZE, 4)
    assert np.abs(again[..., 3] - clips[..., 3]).mean() < 5
