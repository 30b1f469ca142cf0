"""`inlay demo --alpha`: the main job with transparency, on the tiny models that ship with the package."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import yaml

from inlay import check, config, demo, demo_joint, rgba
from inlay.console import console, progress, say
from inlay.evaluate import Prompt, evaluate, summary_table
from inlay.generate import generate
from inlay.train import train
from inlay.twins import rgba_judge, rgba_world, world

KNOWN, REPEATS = 240, 16
"""Transparent clips of what the twin knows as opaque ones, and how often those of the new subject are shown
for each of these: what it learns is also that backgrounds are clear."""

INTRO = (
    f"{demo.CLIPS} transparent clips of a subject that the tiny model has never seen: a star called zorble, "
    "half solid, half glass"
)
STEPS = 600

KINDS = ("merged", "joint")
"""Kinds of `alpha` that the twin has all parts for."""


def recipe(folder: Path, kind: str = "merged", tuner: str = "lora") -> dict:
    """The demo's recipe; of the opaque one only clips, `alpha` and what they need differ."""
    made = demo.recipe(folder, tuner)
    made["alpha"] = {"kind": kind, **({"codec": "twin:wan", "colors": 1} if kind == "merged" else {})}
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


def run(folder: Path, kind: str = "merged", *, dora: bool = False) -> Path:
    """Makes transparent clips of a new subject, then checks, caches, trains, generates and evaluates.

    Args:
        folder: run folder; run it again to go on where it stopped.
        kind: one of `KINDS`.
        dora: train a DoRA instead of a LoRA.

    Returns:
        The report, a page that opens in any browser.

    Raises:
        ValueError: when the kind is unknown, or the folder holds another run.
    """
    if kind not in KINDS:
        raise ValueError(f"--alpha: `{kind}` is not one of opaque, {', '.join(KINDS)}")
    start, tuner, joint = time.perf_counter(), "dora" if dora else "lora", kind == "joint"
    say(demo_joint.INTRO if joint else INTRO)
    (demo_joint.write_clips if joint else write_clips)(folder)
    path, asked = folder / "recipe.yaml", (demo_joint if joint else demo).PROMPTS
    made = demo_joint.recipe(folder, tuner) if joint else recipe(folder, kind, tuner)
    path.write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    settings = config.load(path)
    demo.title(f"inlay check {path}")
    check.print_report(check.check(settings), console)
    demo.title(f"inlay train {path}")
    train(settings)
    demo.title(f'inlay generate {folder} "{settings.sample.prompts[0]}"')
    for file in generate(folder, settings.sample.prompts[:1]):
        say(str(file))
    demo.title(f"inlay evaluate {folder}")
    result = evaluate(folder, prompts=(demo_joint.prompts if joint else prompts)(asked))
    console.print(summary_table(result))
    say(f"{time.perf_counter() - start:.0f} s in all. Open in a browser:")
    print(result.path)
    return result.path
