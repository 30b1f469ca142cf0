"""`inlaid demo`: the complete workflow on a pretrained tiny model that ships with the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml

from inlaid import config
from inlaid.check import check
from inlaid.console import console, progress, say
from inlaid.evaluation.evaluate import Prompt, evaluate
from inlaid.evaluation.report import summary_table
from inlaid.generation.generate import generate
from inlaid.media import video
from inlaid.tiny import judge, world
from inlaid.tiny.world import FPS
from inlaid.training.loop import train

SUBJECT, OLD = "the new subject", "the old world"
"""Names of the two prompt groups in the demo's report."""

CLIPS, PROMPTS = 16, 10
"""Number of training clips, and number of evaluation prompts per group."""

KNOWN, REPEATS, PRIOR_PRESERVATION = 320, 30, 6
"""Number of clips from the tiny model's pretraining domain, value of `repeats` for the new clips, and weight
of prior preservation.

Without prior preservation, the tiny model forgets its pretraining domain."""


def recipe(folder: Path, kind: str = "lora") -> dict:
    """Return the recipe (YAML configuration) of the demo; `kind` is the adapter kind, such as `lora`."""
    return {
        "run": str(folder),
        "model": {"family": "wan", "checkpoint": "tiny:wan", "options": {"text": "short"}},
        "data": {
            "sources": [
                {"path": str(folder / "clips"), "repeats": REPEATS},
                {"path": str(folder / "known"), "prior_preservation": PRIOR_PRESERVATION},
            ],
            "size": [64, 64],
            "frames": 17,
            "caption_dropout": 0.15,
            "validation": 0.033,
        },
        "tuner": {"kind": kind, "rank": 64},
        "optim": {"lr": 3e-3, "warmup": 20, "schedule": "linear"},
        "train": {"steps": 800, "batch": 12, "save_every": 400, "validate_every": 200},
        "sample": {"prompts": [p for p, _ in world.subject_prompts(2, 1)], "steps": 20, "guidance": 2.0},
        "memory": {"gradient_checkpointing": False},
    }


def prompts(n: int) -> list[Prompt]:
    """Return `n` prompts for the subject that the demo trains, and `n` for the model's pretraining domain.

    Each prompt has a function that checks the generated video. None of the prompts is used for training.
    """
    new = [Prompt(t, SUBJECT, judge.judge_subject) for t, _ in world.subject_prompts(n, 2)]
    old = [
        Prompt(t, OLD, lambda frames, s=s: judge.judge_scene(frames, s)["all"])
        for t, s in world.world_prompts(n, 2)
    ]
    return [*new, *old]


def write_clips(folder: Path) -> None:
    """Write the training clips with captions.

    The folder `clips` contains clips of the new subject. The folder `known` contains clips like those on
    which the tiny base model was pretrained. H.264 with 4:2:0 chroma subsampling would blur the outlines.
    Clips of the subject are therefore enlarged to twice their size, and the other clips are stored as arrays.
    """
    scenes = world.scenes(7, KNOWN)
    known = [(world.render(scene, i), world.caption(scene, i)) for i, scene in enumerate(scenes)]
    with progress("make clips", CLIPS + KNOWN, "clip") as advance:
        for name, clips in (("clips", world.subject_clips(CLIPS, 0)), ("known", known)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, (frames, caption) in enumerate(clips):
                if name == "clips":
                    large = frames.repeat(2, axis=1).repeat(2, axis=2)
                    video.write_video(folder / name / f"{i:02d}.mp4", large, FPS, crf=8)
                else:
                    np.savez_compressed(folder / name / f"{i:02d}.npz", frames=frames, fps=FPS)
                (folder / name / f"{i:02d}.txt").write_text(caption + "\n", "utf-8")
                advance()


def run_demo(folder: Path, *, dora: bool = False) -> Path:
    """Create clips of a new subject, then check, cache, train, generate and evaluate.

    Args:
        folder: run folder; an interrupted demo resumes when run again.
        dora: train a DoRA instead of a LoRA.

    Returns:
        Path of the HTML report.

    Raises:
        ValueError: if the folder holds a different run.
    """
    start = time.perf_counter()
    say(f"{CLIPS} clips of a subject that is new to the tiny model: a two-colored star called zorble")
    write_clips(folder)
    return run_job(folder, recipe(folder, "dora" if dora else "lora"), lambda _: prompts(PROMPTS), start)


def run_job(
    folder: Path,
    made: dict,
    asked: Callable[[config.Config], list[Prompt]],
    start: float,
    pair: Sequence[str] = (),
) -> Path:
    """Run the steps that all demos share: check the recipe, train, generate and evaluate.

    Args:
        folder: run folder, which already contains the training data.
        made: the recipe, as a dict.
        asked: function that returns the evaluation prompts; its argument is the loaded recipe.
        start: start time of the demo, from `time.perf_counter`.
        pair: image and segmentation from which a scene is generated; empty for videos.

    Returns:
        Path of the HTML report.
    """
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    settings = config.load(path)
    title(f"inlaid check {path}")
    report = check.check_recipe(settings)
    check.print_report(report, console)
    title(f"inlaid train {path}")
    train(settings)
    prompt = settings.sample.prompts[:1]
    what = f"--image {pair[0]} --seg {pair[1]}" if pair else f'"{prompt[0]}"'
    title(f"inlaid generate {folder} {what}")
    for file in generate(folder, prompt, images=[pair] if pair else []):
        say(str(file))
    title(f"inlaid evaluate {folder}")
    result = evaluate(folder, prompts=asked(settings))
    console.print(summary_table(result))
    say(f"Total time {time.perf_counter() - start:.0f} s. Report, open in a browser:")
    print(result.path)
    return result.path


def title(command: str) -> None:
    """Print the next command as a heading."""
    console.rule(f"[bold]{command}", align="left")
