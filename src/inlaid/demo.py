"""`inlaid demo`: the whole main job in public, on the tiny trained model that ships with the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml

from inlaid import check, config, media
from inlaid.console import console, progress, say
from inlaid.evaluate import Prompt, evaluate, summary_table
from inlaid.generate import generate
from inlaid.train import train
from inlaid.twins import judge, world

SUBJECT, OLD = "the new subject", "the old world"
"""Groups of prompts in the demo's table."""

CLIPS, PROMPTS = 16, 10
"""Clips that are learned from, and prompts of each group that are judged."""

KNOWN, REPEATS, PRESERVE = 320, 30, 6
"""Clips of what the twin knows already, how often the new ones are shown for each of these, and the weight of
leaving the known ones as they were. Without them the twin forgets the rest of its small world."""


def recipe(folder: Path, kind: str = "lora") -> dict:
    """The demo's recipe: what someone with a folder of clips would write, for the twin's size."""
    return {
        "run": str(folder),
        "model": {"family": "wan", "checkpoint": "twin:wan", "options": {"text": "short"}},
        "data": {
            "sources": [
                {"path": str(folder / "clips"), "repeats": REPEATS},
                {"path": str(folder / "known"), "preserve": PRESERVE},
            ],
            "size": [64, 64],
            "frames": 17,
            "caption_dropout": 0.15,
            "held_out": 0.033,
        },
        "tuner": {"kind": kind, "rank": 64},
        "optim": {"lr": 3e-3, "warmup": 20, "schedule": "linear"},
        "train": {"steps": 800, "batch": 12, "save_every": 400, "validate_every": 200},
        "sample": {"prompts": [p for p, _ in world.subject_prompts(2, 1)], "steps": 20, "guidance": 2.0},
        "memory": {"gradient_checkpointing": False},
    }


def prompts(n: int) -> list[Prompt]:
    """Prompts for the new subject and for the old world, with the judge of each; none was trained on."""
    new = [Prompt(t, SUBJECT, judge.judge_subject) for t, _ in world.subject_prompts(n, 2)]
    old = [
        Prompt(t, OLD, lambda frames, s=s: judge.judge_scene(frames, s)["all"])
        for t, s in world.world_prompts(n, 2)
    ]
    return [*new, *old]


def write_clips(folder: Path) -> None:
    """Writes `clips`, of a subject that the twin has never seen, and `known`, of its world, with captions.

    An mp4 halves the resolution of colour, and the twin would unlearn its sharp outlines: the clips of the
    subject are enlarged to twice their size, and what is known is written as arrays.
    """
    scenes = world.scenes(7, KNOWN)
    known = [(world.render(scene, i), world.caption(scene, i)) for i, scene in enumerate(scenes)]
    with progress("make clips", CLIPS + KNOWN, "clip") as advance:
        for name, clips in (("clips", world.subject_clips(CLIPS, 0)), ("known", known)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, (frames, caption) in enumerate(clips):
                if name == "clips":
                    large = frames.repeat(2, axis=1).repeat(2, axis=2)
                    media.write_video(folder / name / f"{i:02d}.mp4", large, world.FPS, crf=8)
                else:
                    np.savez_compressed(folder / name / f"{i:02d}.npz", frames=frames, fps=world.FPS)
                (folder / name / f"{i:02d}.txt").write_text(caption + "\n", "utf-8")
                advance()


def demo(folder: Path, *, dora: bool = False) -> Path:
    """Makes clips of a new subject, then checks, caches, trains, generates and evaluates.

    Args:
        folder: run folder; run it again to go on where it stopped.
        dora: train a DoRA instead of a LoRA.

    Returns:
        The report, a page that opens in any browser.

    Raises:
        ValueError: when the folder holds another run.
    """
    start = time.perf_counter()
    say(f"{CLIPS} clips of a subject that the tiny model has never seen: a two-coloured star called zorble")
    write_clips(folder)
    return job(folder, recipe(folder, "dora" if dora else "lora"), lambda _: prompts(PROMPTS), start)


def job(
    folder: Path,
    made: dict,
    asked: Callable[[config.Config], list[Prompt]],
    start: float,
    pair: Sequence[str] = (),
) -> Path:
    """Checks, caches, trains, generates and evaluates: what every demo does once its examples are there.

    Args:
        folder: run folder.
        made: the recipe.
        asked: prompts of the evaluation, from the settings.
        start: when the demo began, by `time.perf_counter`.
        pair: picture and segmentation to generate from; without, the first prompt is taken.

    Returns:
        The report, a page that opens in any browser.
    """
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    settings = config.load(path)
    title(f"inlaid check {path}")
    report = check.check(settings)
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
    say(f"{time.perf_counter() - start:.0f} s in all. Open in a browser:")
    print(result.path)
    return result.path


def title(command: str) -> None:
    """A line with the command that comes next."""
    console.rule(f"[bold]{command}", align="left")
