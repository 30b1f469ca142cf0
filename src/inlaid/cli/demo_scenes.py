"""`inlaid demo --family midi`: create 3D scenes, train a tiny model on them, and evaluate it."""

from __future__ import annotations

import time
from pathlib import Path

from inlaid import config
from inlaid.alpha.opening import build_family as open_family
from inlaid.cli.demo import run_job
from inlaid.console import progress, say
from inlaid.data.modality import modality_of
from inlaid.evaluation.evaluate import Prompt
from inlaid.media import meshes
from inlaid.tiny import midi_world
from inlaid.tiny.midi_world import SUBJECT

SCENES, VIEWS, JUDGED = 24, 4, 10
"""Number of training scenes with the new object, number of views per scene, and number of evaluation scenes
per group."""

KNOWN, REPEATS, PRIOR_PRESERVATION = 192, 4, 4
"""Number of scenes from the tiny model's pretraining domain, value of `repeats` for the new scenes, and
weight of prior preservation."""


def recipe(folder: Path, kind: str = "lora", checkpoint: str = "tiny:midi") -> dict:
    """Return the recipe (YAML configuration) of the demo."""
    return {
        "run": str(folder),
        "model": {
            "family": "midi",
            "checkpoint": checkpoint,
            "options": {"ff": True, "skip_linear": True},
        },
        "data": {
            "sources": [
                {"path": str(folder / "new"), "repeats": REPEATS},
                {"path": str(folder / "known"), "prior_preservation": PRIOR_PRESERVATION},
            ],
            "validation": 0.05,
        },
        "tuner": {"kind": kind, "rank": 64},
        "optim": {"lr": 3e-3, "warmup": 20, "schedule": "linear"},
        "train": {"steps": 800, "batch": 8, "save_every": 400, "validate_every": 400},
        "sample": {"steps": 20, "guidance": 2.0, "grid": 64},
        "memory": {"gradient_checkpointing": False},
    }


def write_scenes(folder: Path, judged: int = JUDGED) -> None:
    """Write the scenes for training and evaluation.

    There are two kinds: scenes with a new object, and scenes like those on which the tiny base model was
    pretrained.
    """
    new = [
        midi_world.turned(scene, [i, view]) if view else scene
        for i, scene in enumerate(midi_world.subject_scenes(SCENES))
        for view in range(VIEWS)
    ]
    parts = {
        "new": new,
        "known": midi_world.scenes(7, KNOWN),
        "judged/new": midi_world.subject_scenes(judged, seed=1),
        "judged/known": midi_world.scenes(8, judged, counts=(2, 3)),
    }
    with progress("make scenes", sum(map(len, parts.values())), "scene") as advance:
        for name, scenes in parts.items():
            for i, scene in enumerate(scenes):
                if not (folder / name / f"{i:03d}").is_dir():
                    midi_world.write(folder / name / f"{i:03d}", scene, seed=i)
                advance()


def prompts(folder: Path, settings: config.Config) -> list[Prompt]:
    """Return one prompt for each evaluation scene.

    The prompts form two groups: scenes with the new object, and scenes from the tiny model's pretraining
    domain.
    """
    found = []
    for group, name in (("the new kind", "judged/new"), ("the old world", "judged/known")):
        changes = {"sources": [{"path": str(folder / name)}], "validation": 0}
        raw = config.merge(settings.model_dump(mode="json"), {"data": changes})
        one = config.build(raw)
        windows = modality_of("scene").plan(one, open_family(one)).train
        found += [Prompt(f"{name} {w.caption}", group, images=w) for w in windows]
    return found


def run_demo(folder: Path, *, dora: bool = False, checkpoint: str = "tiny:midi") -> Path:
    """Run the demo for scenes: create scenes, then check, cache, train, generate and evaluate.

    The scenes contain an object that the tiny model does not know.

    Args:
        folder: run folder; an interrupted demo resumes when run again.
        dora: train a DoRA instead of a LoRA.
        checkpoint: checkpoint to train. Default: the tiny model.

    Returns:
        Path of the HTML report.

    Raises:
        ValueError: if the folder holds a different run, or if packages that scenes require are missing.
    """
    start = time.perf_counter()
    meshes.require_mesh_packages()
    say(f"{SCENES} scenes with {VIEWS} views each, with a {SUBJECT}, new to the tiny model")
    write_scenes(folder)
    made = recipe(folder, "dora" if dora else "lora", checkpoint)
    pair = [str(folder / "judged/new/000" / n) for n in ("scene_rgb.png", "seg.png")]
    return run_job(folder, made, lambda settings: prompts(folder, settings), start, pair)
