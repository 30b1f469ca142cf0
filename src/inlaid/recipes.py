"""`inlaid new`: looks at clips and writes a commented recipe that fits them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from inlaid import config, data, families, media, mediums
from inlaid.families import Family, Grid

ASPECTS = ("16:9", "4:3", "1:1", "3:4", "9:16")
"""Ratios that clips of mixed shapes are sorted into."""

TEMPLATE = """\
# Made by `inlaid new {family} {clips}` from {found}.
# Next: inlaid check {name}     what is there, what is wrong, what it will cost
#       inlaid train {name}     run it again to go on where it stopped
# Every key: docs/reference/config.md. Any value can be changed on the command line: optim.lr=2e-4

run: {run}  # everything is written here

model:
  family: {family}
  checkpoint: {checkpoint}{choices}

data:
  sources: {clips}
  size: [{size[0]}, {size[1]}]  # height, width: multiples of {grid.spatial}
{aspects}  frames: {frames}  # {grid.temporal}n+{grid.offset} each, at {fps:g} frames per second
{windows}{held_out}  caption_dropout: 0.05  # now and then the empty caption, so that guidance keeps working
  # trigger: zorble  # a rare word put before every caption, to call the subject by

{alpha}tuner:
  kind: lora  # or dora (slower, often better), or full
  rank: 32

optim:
  lr: 1.0e-4
  warmup: 20

train:
  steps: {steps}  # about {epochs} times each clip
  save_every: {every}
  validate_every: {every}

sample:
{prompts}{sampling}"""

TRANSPARENT = """\
# alpha:
#   kind: joint  # or merged: {} files have alpha or are mattes; opaque runs put them on white, or aside

"""

PROMPTS = "  prompts:  # drawn during training; compared with the base by `inlaid evaluate`\n"
PICTURES = "  seed: 42  # without prompts and images, the first clips are drawn from their own\n"
"""What stands for prompts where each needs an image."""


def new(family: str, clips: Path, out: Path | None, checkpoint: str | None) -> Path:
    """Writes a recipe.

    Args:
        family: name of a model family.
        clips: folder or manifest.
        out: where to. Default: the name of `clips` + `.yaml` in the current folder.
        checkpoint: Hub id or folder. Default: the family's first published one.

    Raises:
        ValueError: when there are no readable clips, or the recipe exists already.
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
    if kind.medium == "scene":
        return _scenes(family, kind, clips, out or Path(f"{clips.stem or 'scenes'}.yaml"), name)
    model = kind(config.build(raw).model)
    plan = data.plan(config.build(raw).data, model.grid, model.fps, 0, family=model)
    probes = list(plan.probes.values())
    if not probes:
        raise ValueError(
            "\n".join(data.describe(plan.problems, len(plan.clips))) or f"{clips}: no clips found"
        )
    path = out or Path(f"{clips.stem or 'clips'}.yaml")
    if path.exists():
        raise ValueError(f"{path} exists; name another with --out")
    size = _size(model, probes)
    ratios = _aspects(probes, size)
    frames = _frames(probes, model)
    windows = min(8, max(media.available(p, model.fps) // max(frames) for p in probes))
    captions = list(dict.fromkeys(c.caption for c in plan.clips if c.caption))[:2] or [
        "describe what you want to see"
    ]
    steps = max(200, min(4000, 100 * len(probes)))
    others = [c for c in kind.published if c != name]
    clear = len({p.name for p in plan.problems if p.code in ("transparent", "matte")})
    expert = "\n  expert: high  # or low: each is trained on its own; train both" if experts else ""
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
        aspects=f"  aspects: {ratios}  # each clip goes to the nearest\n" if ratios else "",
        frames=frames,
        fps=model.fps,
        windows=f"  max_windows: {windows}  # long clips are seen at up to so many places\n"
        if windows > 1
        else "",
        held_out="" if len(probes) > 4 else "  held_out: 0  # too few clips to keep one apart\n",
        steps=steps,
        epochs=round(steps / len(probes)),
        every=max(50, steps // 8),
        prompts=PICTURES if model.images else PROMPTS + "".join(f"    - {_quoted(c)}\n" for c in captions),
        alpha=TRANSPARENT.format(clear) if clear else "",
        sampling="" if experts else f"  every: {max(100, steps // 4)}\n",
    )
    path.write_text(_aligned(text), "utf-8")
    config.load(path)
    return path


SCENES = """\
# Made by `inlaid new {family} {clips}` from {found}.
# Next: inlaid check {name}     what is there, what is wrong, what it will cost
#       inlaid train {name}     run it again to go on where it stopped
# Every key: docs/reference/config.md. Any value can be changed on the command line: optim.lr=2e-4

run: {run}  # everything is written here

model:
  family: {family}
  checkpoint: {checkpoint}{choices}

data:
  sources: {clips}
{held_out}
tuner:
  kind: lora  # or dora (slower, often better), or full
  rank: 16

optim:
  lr: 5.0e-5
  warmup: 20

train:
  steps: {steps}  # about {epochs} times each scene
  save_every: {every}
  validate_every: {every}

sample:
  every: {sampled}  # held-out and other scenes, drawn from their own pictures
"""


def _scenes(family: str, kind: type[Family], folder: Path, path: Path, name: str) -> Path:
    """Writes a recipe for scenes.

    Raises:
        ValueError: when there are no scenes that can be read, or the recipe exists already.
    """
    raw = {"run": "unused", "model": {"family": family, "checkpoint": name}, "data": {"sources": str(folder)}}
    settings = config.build(raw)
    plan = mediums.of(kind.medium).plan(settings, kind(settings.model))
    count = len(plan.train) + len(plan.held_out)
    if not count:
        raise ValueError("\n".join(data.describe(plan.problems, len(plan.clips), noun=plan.noun)))
    if path.exists():
        raise ValueError(f"{path} exists; name another with --out")
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
        held_out="" if count > 4 else "  held_out: 0  # too few scenes to keep one apart\n",
        steps=steps,
        epochs=round(steps / count),
        every=max(50, steps // 8),
        sampled=max(100, steps // 4),
    )
    path.write_text(_aligned(text), "utf-8")
    config.load(path)
    return path


def _aligned(text: str) -> str:
    """Comments behind values, one under the other."""
    lines = []
    for line in text.splitlines():
        value, mark, comment = line.partition("  # ")
        lines.append(f"{value:<40}  # {comment}" if mark and value.strip() else line)
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A path as YAML: bare where it can be."""
    return text if re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", text) and text[0] not in "-" else _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _size(model: Family, probes: list[media.Probe]) -> tuple[int, int]:
    """The family's size, or 704p for checkpoints with a larger grid; portrait or smaller where most are."""
    height, width = (704, 1280) if model.grid.spatial > 16 else model.defaults["data"]["size"]
    typical = sorted(p.height * p.width for p in probes)[len(probes) // 2]
    scale = min(1.0, math.sqrt(typical / (height * width)))
    if sum(p.height > p.width for p in probes) * 2 > len(probes):
        height, width = width, height
    if scale < 0.9:
        middle = sorted(p.height / p.width for p in probes)[len(probes) // 2]
        height, width = math.sqrt(typical * middle), math.sqrt(typical / middle)
    return model.grid.snap_size(height, width)


def _aspects(probes: list[media.Probe], size: tuple[int, int]) -> list[str]:
    """No ratios where one size suits nearly all clips, else the standard ones that are there."""

    def off(probe: media.Probe, ratio: float) -> float:
        return abs(math.log(probe.width / probe.height / ratio))

    if sum(off(p, size[1] / size[0]) > math.log(1 / (1 - data.CROPPED)) for p in probes) * 20 <= len(probes):
        return []
    value = {a: float(a.split(":")[0]) / float(a.split(":")[1]) for a in ASPECTS}
    nearest = {min(ASPECTS, key=lambda a, p=p: off(p, value[a])) for p in probes}
    return [a for a in ASPECTS if a in nearest]


def _frames(probes: list[media.Probe], model: Family) -> list[int]:
    """The family's length, and for shorter clips the longest that they fill, so that none is left out."""
    grid: Grid = model.grid
    longest = grid.snap_frames(max(model.defaults["data"]["frames"]))
    fills = {min(longest, grid.snap_frames(media.available(p, model.fps))) for p in probes}
    ordered = sorted(n for n in fills if n)
    while len(ordered) > 4:  # the shortest and longest stay, the closest neighbours go
        gaps = [ordered[i + 1] / ordered[i] for i in range(len(ordered) - 1)]
        ordered.pop(max(1, gaps.index(min(gaps))))
    return ordered
