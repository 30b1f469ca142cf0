"""`inlaid demo --alpha`: the workflow for transparent videos, with tiny models that ship with inlaid."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from inlaid.cli import demo, demo_joint
from inlaid.cli.demo import CLIPS, OLD, PROMPTS, SUBJECT, run_job
from inlaid.console import progress, say
from inlaid.evaluation.evaluate import Prompt
from inlaid.media import rgba
from inlaid.tiny import rgba_judge, rgba_world
from inlaid.tiny.world import FPS

KNOWN, REPEATS = 240, 16
"""Number of RGBA clips from the tiny model's pretraining domain, and value of `repeats` for the clips of the
new subject.

The clips from the pretraining domain are needed to train transparent backgrounds, because the tiny model was
pretrained on opaque clips."""

INTRO = (
    f"{CLIPS} transparent clips of a subject that is new to the tiny model: a star called zorble, "
    "half opaque, half translucent"
)

STEPS = 900


def recipe(folder: Path, tuner: str = "lora") -> dict:
    """Return the recipe (YAML configuration) of the demo with merged alpha.

    It is the recipe of `inlaid demo` with RGBA clips, merged alpha, another rank, more steps and other
    prompts.
    """
    made = demo.recipe(folder, tuner)
    made["alpha"] = {"kind": "merged", "vae": "tiny:wan", "colors": 1}
    made["data"]["sources"] = [
        {"path": str(folder / "clips"), "repeats": REPEATS},
        {"path": str(folder / "known")},  # no prior preservation: transparent backgrounds are new
    ]
    made["tuner"]["rank"] = 96
    made["train"] |= {"steps": STEPS, "save_every": STEPS // 2, "validate_every": STEPS // 3}
    made["sample"]["prompts"] = [p for p, _ in rgba_world.subject_prompts(2, 1)]
    return made


def prompts(n: int) -> list[Prompt]:
    """Return `n` prompts for the subject that the demo trains, and `n` for the model's pretraining domain.

    Each prompt has a function that checks the generated RGBA clip.
    """
    new = [
        Prompt(t, SUBJECT, lambda frames: rgba_judge.judge_subject(frames).both, truth=_again)
        for t, _ in rgba_world.subject_prompts(n, 2)
    ]
    old = [
        Prompt(t, OLD, lambda frames, s=s: rgba_judge.judge_world(frames, s))
        for t, s in rgba_world.world_prompts(n, 2)
    ]
    return [*new, *old]


def _again(frames: np.ndarray) -> np.ndarray:
    """Return the alpha that a generated clip of the subject should have, uint8 (t, h, w).

    It is the alpha of a new rendering of the subject. Position, size and angle are estimated from the frames.
    """
    return (rgba_judge.rerender(frames)[0] * 255).round().astype(np.uint8)


def write_clips(folder: Path) -> None:
    """Write the transparent training clips, each with a caption file.

    The folder `clips` gets clips of the new subject, as .zip files of lossless PNGs. The folder `known` gets
    clips of subjects that the tiny model knows from pretraining, as .npz files.
    """
    with progress("make clips", CLIPS + KNOWN, "clip") as advance:
        for name, clips in (
            ("clips", rgba_world.subject_clips(CLIPS)),
            ("known", rgba_world.clips(7, KNOWN)),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, clip in enumerate(clips):
                if name == "clips":
                    rgba.write_rgba(folder / name / f"{i:02d}.zip", clip.frames, FPS)
                else:
                    np.savez(folder / name / f"{i:03d}.npz", frames=clip.frames, fps=FPS)
                stem = f"{i:02d}" if name == "clips" else f"{i:03d}"
                (folder / name / f"{stem}.txt").write_text(clip.caption + "\n", "utf-8")
                advance()


def merged(folder: Path, *, dora: bool = False) -> Path:
    """Run the demo of merged alpha, in which one latent represents color and alpha.

    Create transparent clips of a new subject, then check, cache, train, generate and evaluate.

    Args:
        folder: run folder; an interrupted demo resumes when run again.
        dora: train a DoRA instead of a LoRA.

    Returns:
        Path of the HTML report.

    Raises:
        ValueError: if the folder holds a different run.
    """
    start = time.perf_counter()
    say(INTRO)
    write_clips(folder)
    made = recipe(folder, "dora" if dora else "lora")
    return run_job(folder, made, lambda _: prompts(PROMPTS), start)


def joint(folder: Path, *, dora: bool = False) -> Path:
    """Run the demo of joint alpha, in which color and alpha are two clips; see `demo_joint`.

    Arguments, result and errors are the same as in `merged`.
    """
    start = time.perf_counter()
    say(demo_joint.INTRO)
    demo_joint.write_clips(folder)
    made = demo_joint.recipe(folder, "dora" if dora else "lora")
    return run_job(folder, made, lambda _: demo_joint.prompts(demo_joint.PROMPTS), start)
