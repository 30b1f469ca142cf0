"""`inlaid demo --family midi`: the main job on scenes, on the tiny trained model that ships with inlaid."""

from __future__ import annotations

import time
from pathlib import Path

from inlaid import config, mediums, mesh
from inlaid.alpha import family as open_family
from inlaid.console import progress, say
from inlaid.demo import job
from inlaid.evaluate import Prompt
from inlaid.twins import midi_world as world

SCENES, VIEWS, JUDGED = 24, 4, 10
"""Scenes of the new kind, pictures of each from different sides, as `inlaid import meshes` makes them, and
scenes of each group that are judged, which were not trained on."""

KNOWN, REPEATS, PRESERVE = 192, 4, 4
"""Scenes of what the twin knows already, how often pictures of the new ones are shown for each of these, and
the weight of leaving the known ones as they were."""


def recipe(folder: Path, kind: str = "lora", checkpoint: str = "twin:midi") -> dict:
    """The demo's recipe: what someone with a folder of scenes would write, for the twin's size."""
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
                {"path": str(folder / "known"), "preserve": PRESERVE},
            ],
            "held_out": 0.05,
        },
        "tuner": {"kind": kind, "rank": 64},
        "optim": {"lr": 3e-3, "warmup": 20, "schedule": "linear"},
        "train": {"steps": 800, "batch": 8, "save_every": 400, "validate_every": 400},
        "sample": {"steps": 20, "guidance": 2.0, "grid": 64},
        "memory": {"gradient_checkpointing": False},
    }


def write_scenes(folder: Path, judged: int = JUDGED) -> None:
    """Writes scenes of a kind that the twin has never seen, and of its world: to learn from, and to judge."""
    new = [
        world.turned(scene, [i, view]) if view else scene
        for i, scene in enumerate(world.subject_scenes(SCENES))
        for view in range(VIEWS)
    ]
    parts = {
        "new": new,
        "known": world.scenes(7, KNOWN),
        "judged/new": world.subject_scenes(judged, seed=1),
        "judged/known": world.scenes(8, judged, counts=(2, 3)),
    }
    with progress("make scenes", sum(map(len, parts.values())), "scene") as advance:
        for name, scenes in parts.items():
            for i, scene in enumerate(scenes):
                if not (folder / name / f"{i:03d}").is_dir():
                    world.write(folder / name / f"{i:03d}", scene, seed=i)
                advance()


def prompts(folder: Path, settings: config.Config) -> list[Prompt]:
    """The scenes that are judged, in two groups."""
    found = []
    for group, name in (("the new kind", "judged/new"), ("the old world", "judged/known")):
        changes = {"sources": [{"path": str(folder / name)}], "held_out": 0}
        raw = config.merge(settings.model_dump(mode="json"), {"data": changes})
        one = config.build(raw)
        windows = mediums.of("scene").plan(one, open_family(one)).train
        found += [Prompt(f"{name} {w.caption}", group, images=w) for w in windows]
    return found


def demo(folder: Path, *, dora: bool = False, checkpoint: str = "twin:midi") -> Path:
    """Makes scenes with a new kind of thing, then checks, caches, trains, generates and evaluates.

    Args:
        folder: run folder; run it again to go on where it stopped.
        dora: train a DoRA instead of a LoRA.
        checkpoint: another than the twin.

    Returns:
        The report, a page that opens in any browser.

    Raises:
        ValueError: when the folder holds another run, or packages for scenes are missing.
    """
    start = time.perf_counter()
    mesh.require()
    say(f"{SCENES} scenes, {VIEWS} pictures of each, with a {world.SUBJECT}: new to the tiny model")
    write_scenes(folder)
    made = recipe(folder, "dora" if dora else "lora", checkpoint)
    pair = [str(folder / "judged/new/000" / n) for n in ("scene_rgb.png", "seg.png")]
    return job(folder, made, lambda settings: prompts(folder, settings), start, pair)
