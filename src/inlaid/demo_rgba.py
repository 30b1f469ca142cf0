"""`inlaid demo --alpha`: the main job with transparency, on the tiny models that ship with the package."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from inlaid import demo, demo_joint, rgba
from inlaid.console import progress, say
from inlaid.evaluate import Prompt
from inlaid.twins import rgba_judge, rgba_world, world

KNOWN, REPEATS = 240, 16
"""Transparent clips of what the twin knows as opaque ones, and how often those of the new subject are shown
for each of these: what it learns is also that backgrounds are clear."""

INTRO = (
    f"{demo.CLIPS} transparent clips of a subject that the tiny model has never seen: a star called zorble, "
    "half solid, half glass"
)
STEPS = 900


def recipe(folder: Path, tuner: str = "lora") -> dict:
    """The demo's recipe; of the opaque one only clips, `alpha` and what they need differ."""
    made = demo.recipe(folder, tuner)
    made["alpha"] = {"kind": "merged", "codec": "twin:wan", "colors": 1}
    made["data"]["sources"] = [
        {"path": str(folder / "clips"), "repeats": REPEATS},
        {"path": str(folder / "known")},  # on nothing, which is new: not to be preserved, but learned
    ]
    made["tuner"]["rank"] = 96
    made["train"] |= {"steps": STEPS, "save_every": STEPS // 2, "validate_every": STEPS // 3}
    made["sample"]["prompts"] = [p for p, _ in rgba_world.subject_prompts(2, 1)]
    return made


def prompts(n: int) -> list[Prompt]:
    """Prompts for the new subject and for the old world on nothing, with the judge of each."""
    new = [
        Prompt(t, demo.SUBJECT, lambda frames: rgba_judge.judge_subject(frames).both, truth=_again)
        for t, _ in rgba_world.subject_prompts(n, 2)
    ]
    old = [
        Prompt(t, demo.OLD, lambda frames, s=s: rgba_judge.judge_world(frames, s))
        for t, s in rgba_world.world_prompts(n, 2)
    ]
    return [*new, *old]


def _again(frames: np.ndarray) -> np.ndarray:
    """The matte of the subject where it fits a clip best."""
    return (rgba_judge.rerender(frames)[0] * 255).round().astype(np.uint8)


def write_clips(folder: Path) -> None:
    """Writes `clips`, of a subject that the twin has never seen, and `known`, of its world, with captions.

    The subject's as PNGs in a .zip, which are exact, the known ones as arrays.
    """
    with progress("make clips", demo.CLIPS + KNOWN, "clip") as advance:
        for name, clips in (
            ("clips", rgba_world.subject_clips(demo.CLIPS)),
            ("known", rgba_world.clips(7, KNOWN)),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, clip in enumerate(clips):
                if name == "clips":
                    rgba.write(folder / name / f"{i:02d}.zip", clip.frames, world.FPS)
                else:
                    np.savez(folder / name / f"{i:03d}.npz", frames=clip.frames, fps=world.FPS)
                stem = f"{i:02d}" if name == "clips" else f"{i:03d}"
                (folder / name / f"{stem}.txt").write_text(clip.caption + "\n", "utf-8")
                advance()


def merged(folder: Path, *, dora: bool = False) -> Path:
    """Makes transparent clips of a new subject, then checks, caches, trains, generates and evaluates.

    Args:
        folder: run folder; run it again to go on where it stopped.
        dora: train a DoRA instead of a LoRA.

    Returns:
        The report, a page that opens in any browser.

    Raises:
        ValueError: when the folder holds another run.
    """
    start = time.perf_counter()
    say(INTRO)
    write_clips(folder)
    made = recipe(folder, "dora" if dora else "lora")
    return demo.job(folder, made, lambda _: prompts(demo.PROMPTS), start)


def joint(folder: Path, *, dora: bool = False) -> Path:
    """The same for joint transparency, on clips of the twin's own world: see `demo_joint`."""
    start = time.perf_counter()
    say(demo_joint.INTRO)
    demo_joint.write_clips(folder)
    made = demo_joint.recipe(folder, "dora" if dora else "lora")
    return demo.job(folder, made, lambda _: demo_joint.prompts(demo_joint.PROMPTS), start)
