"""`inlaid new`: write a commented recipe with settings that suit a folder of clips or scenes."""

from __future__ import annotations

import math
import re
from pathlib import Path

from inlaid import config, families
from inlaid.console import progress
from inlaid.data.checks import CROPPED
from inlaid.data.modality import modality_of
from inlaid.data.plan import describe_plan, plan_dataset
from inlaid.families import Family, Grid
from inlaid.media.kinds import Probe, available_frames

ASPECTS = ("16:9", "4:3", "1:1", "3:4", "9:16")
"""Aspect ratios that a recipe can list in `data.aspects` if the clips have different aspect ratios."""

HEAD = """\
# Made by `inlaid new {family} {clips}` from {found}.
# Next: inlaid check {name}     report clips, problems, memory and time
#       inlaid train {name}     train; run the same command again to resume
# All keys: docs/reference/config.md. Override any key on the command line: optim.lr=2e-4

run: {run}  # folder of all output

model:
  family: {family}
  checkpoint: {checkpoint}{choices}

data:
  sources: {clips}
"""

TEMPLATE = (
    HEAD
    + """\
  size: [{size[0]}, {size[1]}]  # height, width: multiples of {grid.spatial}
{aspects}  frames: {frames}  # {grid.temporal}n+{grid.offset} each, at {fps:g} frames per second
{windows}{validation}  caption_dropout: 0.05  # share of empty captions, for classifier-free guidance
  # trigger: zorble  # rare word added to every caption; use it in prompts to get the subject

{alpha}tuner:
  kind: lora  # or dora (slower, often better) or full
  rank: 32

optim:
  lr: 1.0e-4
  warmup: 20

train:
  steps: {steps}  # each clip is used about {epochs} times
  save_every: {every}
  validate_every: {every}

sample:
{prompts}{sampling}"""
)

TRANSPARENT = """\
# alpha:
#   kind: joint  # or merged; {} files have alpha or are alpha mattes (opaque runs: over white, or left out)

"""

PROMPTS = "  prompts:  # generated during training; `inlaid evaluate` compares them with the base model\n"

NO_PROMPTS = "  seed: 42  # without prompts and images, samples use captions and images of the first clips\n"
"""Text that replaces `PROMPTS` in a recipe if the model family needs an image for each prompt."""


def new_recipe(family: str, clips: Path, out: Path | None, checkpoint: str | None) -> Path:
    """Write a recipe for a folder or manifest and return its path.

    Args:
        family: name of a model family.
        clips: folder of clips, or manifest file that lists clips.
        out: path of the recipe. Default: the name of `clips` + `.yaml` in the current folder.
        checkpoint: Hub ID or folder. Default: the family's first published checkpoint.

    Raises:
        ValueError: if there are no readable clips, or if the recipe already exists.
    """
    kind = families.get(family)
    name = checkpoint or next(iter(kind.published))
    raw = {
        "run": "unused",
        "model": {"family": family, "checkpoint": name},
        "data": {"sources": str(clips), "frames": [1]},
    }
    experts = kind.published.get(name, {}).get("", {}).get("transformer_2")
    if experts:
        raw["model"]["expert"] = "high"
    if kind.modality == "scene":
        return _scenes(family, kind, clips, out or Path(f"{clips.stem or 'scenes'}.yaml"), name)
    model = kind(config.build(raw).model)
    with progress("probe", 1, "clip") as advance:
        plan = plan_dataset(
            config.build(raw).data,
            model.grid,
            model.fps,
            0,
            lambda done, total: advance(done=done, total=total),
            family=model,
        )
    probes = list(plan.probes.values())
    if not probes:
        raise ValueError(
            "\n".join(describe_plan(plan.problems, len(plan.clips))) or f"{clips}: no clips found"
        )
    path = out or Path(f"{clips.stem or 'clips'}.yaml")
    if path.exists():
        raise ValueError(f"{path}: already exists: pass another path with --out")
    size = _size(model, probes)
    ratios = _aspects(probes, size)
    frames = _frames(probes, model)
    windows = min(8, max(available_frames(p, model.fps) // max(frames) for p in probes))
    captions = list(dict.fromkeys(c.caption for c in plan.clips if c.caption))[:2] or [
        "describe the video to generate"
    ]
    steps = max(200, min(4000, 100 * len(probes)))
    others = [c for c in kind.published if c != name]
    with_alpha = len({p.name for p in plan.problems if p.code in ("transparent", "matte")})
    expert = "\n  expert: high  # or low; train both, in separate runs" if experts else ""
    text = TEMPLATE.format(
        family=family,
        clips=_plain(str(clips)),
        name=path,
        run=_plain(f"runs/{path.stem}"),
        found=f"{len(probes)} clips in {plan.sources[0].layout} layout",
        checkpoint=name,
        choices=expert + ("".join(f"\n  # or {c}" for c in others) if name in kind.published else ""),
        size=size,
        grid=model.grid,
        aspects=f"  aspects: {ratios}  # each clip uses the nearest ratio\n" if ratios else "",
        frames=frames,
        fps=model.fps,
        windows=f"  max_windows: {windows}  # maximum number of windows per long clip\n"
        if windows > 1
        else "",
        validation="" if len(probes) > 4 else "  validation: 0  # too few clips for a validation set\n",
        steps=steps,
        epochs=round(steps / len(probes)),
        every=max(50, steps // 8),
        prompts=NO_PROMPTS if model.images else PROMPTS + "".join(f"    - {_quoted(c)}\n" for c in captions),
        alpha=TRANSPARENT.format(with_alpha) if with_alpha else "",
        sampling="" if experts else f"  every: {max(100, steps // 4)}\n",
    )
    path.write_text(_aligned(text), "utf-8")
    config.load(path)
    return path


SCENES = (
    HEAD
    + """\
{validation}
tuner:
  kind: lora  # or dora (slower, often better) or full
  rank: 16

optim:
  lr: 5.0e-5
  warmup: 20

train:
  steps: {steps}  # each scene is used about {epochs} times
  save_every: {every}
  validate_every: {every}

sample:
  every: {sampled}  # generates validation and training scenes from their input images
"""
)


def _scenes(family: str, kind: type[Family], folder: Path, path: Path, name: str) -> Path:
    """Write a recipe for a folder of scenes and return its path.

    Raises:
        ValueError: if there are no readable scenes, or if the recipe already exists.
    """
    raw = {"run": "unused", "model": {"family": family, "checkpoint": name}, "data": {"sources": str(folder)}}
    settings = config.build(raw)
    modality, model = modality_of(kind.modality), kind(settings.model)
    with progress("probe", 1, modality.one) as advance:
        plan = modality.plan(settings, model, lambda done, total: advance(done=done, total=total))
    count = len(plan.train) + len(plan.validation)
    if not count:
        raise ValueError("\n".join(describe_plan(plan.problems, len(plan.clips), noun=plan.noun)))
    if path.exists():
        raise ValueError(f"{path}: already exists: pass another path with --out")
    steps = max(200, min(4000, 50 * count))
    others = [c for c in kind.published if c != name]
    text = SCENES.format(
        family=family,
        clips=_plain(str(folder)),
        name=path,
        run=_plain(f"runs/{path.stem}"),
        found=f"{count} scenes in {plan.sources[0].layout} layout",
        checkpoint=name,
        choices="".join(f"\n  # or {c}" for c in others) if name in kind.published else "",
        validation="" if count > 4 else "  validation: 0  # too few scenes for a validation set\n",
        steps=steps,
        epochs=round(steps / count),
        every=max(50, steps // 8),
        sampled=max(100, steps // 4),
    )
    path.write_text(_aligned(text), "utf-8")
    config.load(path)
    return path


def _aligned(text: str) -> str:
    """Align the trailing comments of a YAML text."""
    lines = []
    for line in text.splitlines():
        value, mark, comment = line.partition("  # ")
        lines.append(f"{value:<40}  # {comment}" if mark and value.strip() else line)
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Return a path as a YAML scalar, quoted only if necessary."""
    return text if re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", text) and text[0] not in "-" else _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _size(model: Family, probes: list[Probe]) -> tuple[int, int]:
    """Return the height and width for a recipe: the default size of the family, adapted to the clips.

    The default is 704 x 1280 in families whose sizes are multiples of more than 16 pixels. It is turned to
    portrait if most clips are portrait. If the clips are smaller, the result has their median area and median
    aspect ratio.
    """
    height, width = (704, 1280) if model.grid.spatial > 16 else model.defaults["data"]["size"]
    typical = sorted(p.height * p.width for p in probes)[len(probes) // 2]
    scale = min(1.0, math.sqrt(typical / (height * width)))
    if sum(p.height > p.width for p in probes) * 2 > len(probes):
        height, width = width, height
    if scale < 0.9:
        middle = sorted(p.height / p.width for p in probes)[len(probes) // 2]
        height, width = math.sqrt(typical * middle), math.sqrt(typical / middle)
    return model.grid.snap_size(height, width)


def _aspects(probes: list[Probe], size: tuple[int, int]) -> list[str]:
    """Return the ratios in `ASPECTS` that are nearest to the clips; empty if `size` fits 95 % of clips."""

    def off(probe: Probe, ratio: float) -> float:
        return abs(math.log(probe.width / probe.height / ratio))

    if sum(off(p, size[1] / size[0]) > math.log(1 / (1 - CROPPED)) for p in probes) * 20 <= len(probes):
        return []
    value = {a: float(a.split(":")[0]) / float(a.split(":")[1]) for a in ASPECTS}
    nearest = {min(ASPECTS, key=lambda a, p=p: off(p, value[a])) for p in probes}
    return [a for a in ASPECTS if a in nearest]


def _frames(probes: list[Probe], model: Family) -> list[int]:
    """Return up to four valid frame counts that suit the lengths of the clips, in increasing order.

    None of the counts is larger than the default of the family.
    """
    grid: Grid = model.grid
    longest = grid.snap_frames(max(model.defaults["data"]["frames"]))
    fills = {min(longest, grid.snap_frames(available_frames(p, model.fps))) for p in probes}
    ordered = sorted(n for n in fills if n)
    while len(ordered) > 4:  # keep shortest and longest, remove one of the two closest neighbors
        gaps = [ordered[i + 1] / ordered[i] for i in range(len(ordered) - 1)]
        ordered.pop(max(1, gaps.index(min(gaps))))
    return ordered
