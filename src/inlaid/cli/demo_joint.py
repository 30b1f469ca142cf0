"""`inlaid demo --alpha joint`: train the tiny model to generate an alpha clip together with each color clip.

Joint alpha puts color and alpha as two clips into one token sequence. The adapter applies to the alpha tokens
only, so the color clips stay in the tiny model's pretraining domain. The training clips are therefore from
the same domain. They are rendered, so their alpha is known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inlaid.console import progress
from inlaid.evaluation.evaluate import Prompt
from inlaid.tiny import judge, world
from inlaid.tiny.world import FPS

INTRO = "96 clips of the tiny model's pretraining domain with alpha: color is kept, and alpha is trained"

CLIPS, VALIDATION, PROMPTS = 96, 4, 20
"""Number of RGBA clips, number of validation clips among them, and number of evaluation prompts."""


def recipe(folder: Path, tuner: str = "lora") -> dict:
    """Return the recipe (YAML configuration) of the demo."""
    return {
        "run": str(folder),
        "model": {"family": "wan", "checkpoint": "tiny:wan", "options": {"text": "short"}},
        "data": {
            "sources": str(folder / "clips"),
            "size": [64, 64],
            "frames": 17,
            "caption_dropout": 0.15,
            "validation": VALIDATION,
            "matte": {"background": "keep"},  # the tiny model keeps generating backgrounds
        },
        "tuner": {"kind": tuner, "rank": 64},
        "alpha": {"kind": "joint"},
        "optim": {"lr": 3e-3, "warmup": 20, "schedule": "linear"},
        "train": {"steps": 500, "batch": 8, "save_every": 250, "validate_every": 250},
        "sample": {"prompts": [p for p, _ in world.world_prompts(2, 1)], "steps": 20, "guidance": 2.0},
        "memory": {"gradient_checkpointing": False},
    }


def write_clips(folder: Path) -> None:
    """Write the training clips and their captions to the subfolder `clips` of `folder`.

    The clips show shapes on backgrounds. They are stored as .npz arrays with straight alpha.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    with progress("make clips", CLIPS, "clip") as advance:
        for i, scene in enumerate(world.scenes(7, CLIPS)):
            frames, matte = world.render_with_mask(scene, i)
            straight = np.concatenate([frames, (matte[..., None] * 255).round().astype(np.uint8)], -1)
            np.savez_compressed(folder / "clips" / f"{i:02d}.npz", frames=straight, fps=FPS)
            (folder / "clips" / f"{i:02d}.txt").write_text(world.caption(scene, i) + "\n", "utf-8")
            advance()


def prompts(n: int) -> list[Prompt]:
    """Return `n` evaluation prompts. Each has a function that compares the generated alpha with the color.

    The prompts describe combinations of shape, color and motion that no training clip shows.
    """
    return [Prompt(text, "alpha as in color", judge.judge_alpha) for text, _ in world.world_prompts(n, 2)]
