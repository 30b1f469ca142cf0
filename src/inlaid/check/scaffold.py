"""`inlaid new`: write a commented recipe (YAML configuration) that suits a folder of clips or scenes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from inlaid import config, families
from inlaid.check import transparency
from inlaid.check.transparency import SupportedAlpha
from inlaid.console import progress, say
from inlaid.data.fitting import fitting_aspects, fitting_frames, fitting_size
from inlaid.data.material import Material, recognize
from inlaid.data.modality import modality_of
from inlaid.data.plan import at_rate, describe_plan
from inlaid.families import Family
from inlaid.media.kinds import Probe, available_frames

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
  sources:{sources}
"""

TEMPLATE = (
    HEAD
    + """\
  size: [{size[0]}, {size[1]}]  # height, width: multiples of {grid.spatial}
{aspects}  frames: {frames}  # {grid.temporal}n+{grid.offset} each, at {fps:g} frames per second
{windows}{validation}  caption_dropout: 0.05  # share of empty captions, for classifier-free guidance
  # trigger: zorble  # rare word added to every caption; use it in prompts to get the subject

{alpha}tuner:
  kind: {tuner}
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

TUNERS = {
    "opaque": "lora  # or dora (slower, often better) or full",
    "joint": "lora  # or dora (slower, often better)",
    "merged": "dora  # as Wan-Alpha; or lora (faster) or full",
}
"""Value of `tuner.kind` for each kind of alpha, with a YAML comment."""

PROMPTS = "  prompts:  # generated during training; `inlaid evaluate` compares them with the base model\n"

NO_PROMPTS = "  seed: 42  # without prompts and images, samples use captions and images of the first clips\n"
"""Text that replaces `PROMPTS` in a recipe if the model family needs an image for each prompt."""

Choice = Literal["auto", "opaque", "joint", "merged"]


def new_recipe(
    family: str, clips: Path, out: Path | None, checkpoint: str | None, alpha: Choice = "auto"
) -> Path:
    """Write a recipe for a folder or manifest and return its path.

    Args:
        family: name of a model family.
        clips: folder of clips, or manifest file that lists clips.
        out: path of the recipe. Default: the name of `clips` + `.yaml` in the current folder.
        checkpoint: Hub ID or folder. Default: the family's first published checkpoint.
        alpha: kind of alpha. `auto`: the clips and the checkpoint determine the kind.

    Raises:
        ValueError: if there are no readable clips, the recipe exists already, or the checkpoint does not
            support this kind of alpha.
    """
    kind = families.get(family)
    name = checkpoint or next(iter(kind.published))
    raw = {
        "run": "unused",
        "model": {"family": family, "checkpoint": name},
        "data": {"sources": str(clips), "frames": [1]},
    }
    experts = bool(kind.published.get(name, {}).get("", {}).get("transformer_2"))
    if experts:
        raw["model"]["expert"] = "high"
    if kind.modality == "scene":
        if alpha not in ("auto", "opaque"):
            raise ValueError(f"--alpha: {family} generates scenes, which have no alpha: leave --alpha out")
        return _scenes(family, kind, clips, out or Path(f"{clips.stem or 'scenes'}.yaml"), name)
    path = out or Path(f"{clips.stem or 'clips'}.yaml")
    if path.exists():
        raise ValueError(f"{path}: already exists: pass another path with --out")
    material, way, section = _alpha(config.build(raw), alpha, experts=experts)
    plan, model = material.plan, way.family if way else kind(config.build(raw).model)
    if not plan.probes:
        raise ValueError(
            "\n".join(describe_plan(plan.problems, len(plan.clips))) or f"{clips}: no clips found"
        )
    sources, probes = _timed(clips, list(plan.probes.values()), model.fps)
    size = fitting_size(model, probes)
    ratios = fitting_aspects(probes, size)
    frames = fitting_frames(probes, model)
    windows = min(8, max(available_frames(p, model.fps) // max(frames) for p in probes)) if frames else 1
    captions = list(dict.fromkeys(c.caption for c in plan.clips if c.caption))[:2] or [
        "describe the video to generate"
    ]
    steps = max(200, min(4000, 100 * len(probes)))
    others = [c for c in kind.published if c != name]
    expert = "\n  expert: high  # or low; train both, in separate runs" if experts else ""
    seen = f", {material.with_alpha} with alpha" if material.with_alpha else ""
    text = TEMPLATE.format(
        family=family,
        clips=_plain(str(clips)),
        sources=sources,
        name=path,
        run=_plain(f"runs/{path.stem}"),
        found=f"{len(probes)} clips in {plan.sources[0].layout} layout{seen}",
        checkpoint=name,
        choices=expert + ("".join(f"\n  # or {c}" for c in others) if name in kind.published else ""),
        size=size,
        grid=model.grid,
        aspects=f"  aspects: {ratios}  # each clip uses the nearest ratio\n" if ratios else "",
        frames=frames or [model.grid.snap_frames(model.grid.offset)],
        fps=model.fps,
        windows=f"  max_windows: {windows}  # maximum number of windows per long clip\n"
        if windows > 1
        else "",
        validation="" if len(probes) > 4 else "  validation: 0  # too few clips for a validation set\n",
        steps=steps,
        epochs=round(steps / len(probes)),
        every=max(50, steps // 8),
        prompts=NO_PROMPTS if model.images else PROMPTS + "".join(f"    - {_quoted(c)}\n" for c in captions),
        alpha=section,
        tuner=TUNERS[way.kind if way else "opaque"],
        sampling="" if experts else f"  every: {max(100, steps // 4)}\n",
    )
    path.write_text(_aligned(text), "utf-8")
    config.load(path)
    return path


def _alpha(
    settings: config.Config, wanted: Choice, *, experts: bool
) -> tuple[Material, SupportedAlpha | None, str]:
    """Choose the kind of alpha for a recipe, and print the choice.

    Returns:
        The plan of the clips, the kind of alpha (None for an opaque recipe), and the text of the recipe's
        `alpha` section.

    Raises:
        ValueError: if joint or merged alpha is wanted, but the checkpoint does not support it or most clips
            have no alpha.
    """
    found, refused = transparency.supported_alpha(settings, experts=experts)
    ways = found if wanted == "auto" else [way for way in found if way.kind == wanted]
    if wanted in ("joint", "merged") and not ways:
        raise ValueError("; ".join(r for r in refused if wanted in r) or "; ".join(refused))
    opaque = families.get(settings.model.family)(settings.model)
    with progress("probe", 1, "clip") as advance:
        material = recognize(
            settings.data, opaque, ways[0].family if ways else None, lambda n, of: advance(done=n, total=of)
        )
    total, count = len({c.path for c in material.plan.clips}), material.with_alpha
    if not material.transparent:
        if wanted in ("joint", "merged"):
            lines = describe_plan(material.plan.problems, len(material.plan.clips))
            why = "\n".join(lines) or f"{count} of {total} clips have alpha"
            raise ValueError(f"--alpha {wanted}: most clips have no alpha:\n{why}")
        if not count or wanted == "opaque":
            return material, None, ""
        say(f"note: {transparency.proposal(settings, count, total, experts=experts)}")
        section = (
            f"# alpha: {{kind: {ways[0].kind}}}" if ways else "# No alpha: not supported by this checkpoint"
        )
        return (
            material,
            None,
            f"{section}  # {count} of {total} clips have alpha; here it is put over white\n\n",
        )
    say(f"{count} of {total} clips have alpha: the recipe trains {ways[0].kind} alpha")
    for way in (ways[0], *(w for w in found if w.kind != ways[0].kind)):
        say(f"  {way.kind}: {transparency.CAN[way.kind]}")
        if not way.ready:
            say(f"  get its RGBA VAE first: {transparency.import_command(settings.model.checkpoint)}")
    if count < total:
        say(
            f"note: {total - count} of {total} clips have no alpha, which is an error in this run: remove "
            "them, add alpha mattes, or set data.bad_clips=quarantine"
        )
    return material, ways[0], _section(settings.model.checkpoint, ways[0], found)


def _section(checkpoint: str, way: SupportedAlpha, found: list[SupportedAlpha]) -> str:
    """Return the text of a recipe's `alpha` section, which selects `way`.

    The other kinds of alpha in `found` are added as comments.
    """
    lines = ["alpha:", f"  # {transparency.CAN[way.kind]}", f"  kind: {way.kind}"]
    if way.kind == "merged":
        lines.append(f"  vae: {way.vae}{'' if way.ready else '  # folder that this command writes:'}")
        lines += [] if way.ready else [f"  # {transparency.import_command(checkpoint)}"]
    for other in found:
        if other.kind != way.kind:
            lines += [f"  # or {other.kind}: {transparency.CAN[other.kind]}"]
            lines += [] if other.ready else [f"  #   {transparency.import_command(checkpoint)}"]
            vae = f", vae: {other.vae}" if other.kind == "merged" else ""
            lines.append(f"  #   alpha: {{kind: {other.kind}{vae}}}")
    return "\n".join(lines) + "\n\n"


def _timed(clips: Path, probes: list[Probe], fps: float) -> tuple[str, list[Probe]]:
    """Return the YAML text of `data.sources`, and the properties of the clips.

    Image sequences store no frame rate. If all other clips have the same frame rate, the text and the
    properties of the image sequences contain this frame rate.
    """
    plain = _plain(str(clips))
    untimed = sum(p.fps is None and p.frames > 1 for p in probes)
    rates = {round(float(p.fps), 2) for p in probes if p.fps}
    if not untimed:
        return f" {plain}", probes
    if len(rates) != 1:
        why = f"# {untimed} image sequences store no frame rate: {fps:g} is assumed, else set it here"
        return f"\n    path: {plain}\n    # fps: 24  {why}", probes
    rate = rates.pop()
    timed = [at_rate(p, rate) if p.fps is None and p.frames > 1 else p for p in probes]
    why = f"# frame rate of the {untimed} image sequences, which store none: that of the other clips"
    return f"\n    path: {plain}\n    fps: {rate:g}  {why}", timed


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
    """Write a recipe for a folder of scenes, and return the path of the recipe.

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
        sources=f" {_plain(str(folder))}",
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
