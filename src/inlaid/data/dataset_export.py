"""`inlaid prepare`: cut long videos into clips, and write them in a format that trainers read.

Frames are read exactly as for training. The hidden folder `.prepare` in the output records the settings and
the finished files, so that an interrupted run continues with the missing files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inlaid import config, families
from inlaid.alpha.opening import build_family
from inlaid.console import progress
from inlaid.data import rgba_clips
from inlaid.data.cache import identity
from inlaid.data.clips import Clip, VideoWindow
from inlaid.data.dataset_formats import Crop, Cut, Target, Written
from inlaid.data.dataset_manifest import MANIFESTS, STATE, finish_dataset, is_finished, read_done, record
from inlaid.data.dataset_workers import encode_cuts, write_cuts
from inlaid.data.fitting import fitting_aspects, fitting_frames, fitting_size
from inlaid.data.material import recognize
from inlaid.data.plan import Plan, describe_plan, plan_dataset
from inlaid.data.probes import CachedProbes, file_state
from inlaid.data.problems import KINDS, SOURCE_CODES, Problem
from inlaid.data.rgba_clips import ClipInspection
from inlaid.families import Family
from inlaid.files import atomic, sweep
from inlaid.media.kinds import MediaError, Probe
from inlaid.reading import parse_json, read_text

VERSION = 1
"""Version of the written content; increase it when the same settings give other files."""

READERS = 4
"""Maximum number of threads that read clips while latents are made."""

KEYS = {
    "data.frames": "--frames",
    "data.size": "--size",
    "data.fps": "--fps",
}
"""Command-line options that replace recipe keys in messages."""


@dataclass(frozen=True)
class Part:
    """Part of each source clip that is exported: a range of time and a region of the frame."""

    start: float = 0.0
    """Seconds from the first frame."""
    end: float | None = None
    """Seconds from the first frame; None is the end of the clip."""
    crop: Crop | None = None
    """Region of the displayed frame; None is the whole frame."""


WHOLE = Part()


@dataclass
class Prepared:
    """Result of `prepare_dataset`."""

    written: int = 0
    """Number of windows that this run wrote."""
    kept: int = 0
    """Number of windows that earlier runs wrote."""
    left_out: list[str] = field(default_factory=list)
    """Messages about the clips that were left out, one per kind of problem."""
    notes: list[str] = field(default_factory=list)


def prepare_dataset(
    source: Path,
    out: Path,
    target: Target,
    *,
    family: str,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    part: Part = WHOLE,
    sequence_fps: float | None = None,
    crf: int = 17,
    workers: int | None = None,
) -> Prepared:
    """Cut the clips of a source into windows and write them to a folder.

    Args:
        source: folder or manifest of clips, or a recipe (YAML configuration). The recipe's sections `model`,
            `data` and `alpha` are used.
        out: output folder: new, empty, or written by the same command before.
        target: format of the output.
        family: model family that determines the default size, length and frame rate. Ignored for a recipe.
        checkpoint: base model, whose VAE and text encoder are used if the output contains latents. Default:
            the first published checkpoint of the family. Ignored for a recipe.
        overrides: recipe settings, such as `data.frames=81`.
        part: part of each clip to use.
        sequence_fps: frame rate of image sequences. Default: the frame rate of the output.
        crf: constant rate factor of color videos, 0 (lossless) to 51.
        workers: number of processes that read and write clips. Default: the number of cores.

    Raises:
        ValueError: if the source has no usable clips, the output folder contains other files, or an option
            is invalid.
        OSError: if a file cannot be written.
    """
    settings, given = _settings(source, family, checkpoint, overrides, target)
    if sequence_fps is not None:
        sources = [s.model_copy(update={"fps": sequence_fps}) for s in settings.data.sources]
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"sources": sources})})
    _check_place(settings, out)
    workers = (os.cpu_count() or 1) if workers is None else workers
    opaque, transparent = _families(settings, target)
    rate = sequence_fps or settings.data.fps or opaque.fps
    probes = _Probes(out / STATE, part, float(rate))
    before = _read_state(out)
    plan, settings, used = _plan(settings, given, opaque, transparent, target, probes, before)
    now = _described(target, settings, used, part, crf)
    _check_unchanged(out, before, now)
    notes = _check_sizes(settings, used, target)
    cuts = _cuts(plan, part, crf, target, probes)
    stopping = [p for p in plan.errors if p.code in SOURCE_CODES]
    if stopping or not cuts:
        raise ValueError("\n".join(_described_problems(stopping or plan.errors, plan)))
    made = Prepared(notes=notes)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if not before:
        with atomic(out / STATE / "settings.json") as file:
            file.write_text(json.dumps({"settings": now}, indent=2), "utf-8")
    probes.save()
    failed = _write(settings, used, out, target, cuts, workers, crf, made)
    problems = [*plan.errors, *_problems_of(cuts, failed)]
    if target != "latents":
        bare = [p for p in problems if p.code in UNCAPTIONED]
        problems = [p for p in problems if p.code not in UNCAPTIONED]
        made.notes += _described_problems(bare, plan)
    made.left_out = _described_problems(problems, plan)
    made.notes += _described_problems([p for p in plan.problems if p.severity == "warning"], plan)
    whole = [c for c in cuts if c.name not in failed]
    if not whole:
        raise ValueError("\n".join(made.left_out))
    made.notes += finish_dataset(out, target, whole, used)
    return made


UNCAPTIONED = ("no-caption", "empty-caption")
"""Problem codes of clips without a usable caption. They are written, except as latents."""


# --- settings and state -------------------------------------------------------------------------------------


def _settings(
    source: Path, family: str, checkpoint: str | None, overrides: Sequence[str], target: Target
) -> tuple[config.Config, frozenset[str]]:
    """Return the recipe, and the names of the settings that the user has chosen.

    All other settings may be adapted to the clips. A name is a key of the section `data`, or `alpha` for the
    whole section `alpha`.
    """
    recipe = source.suffix.lower() in (".yaml", ".yml") or (source / "config.yaml").is_file()
    given = {text.partition("=")[0].strip().removeprefix("data.") for text in overrides}
    given |= {"alpha"} if any(key.startswith("alpha.") for key in given) else set()
    if recipe:
        fixed = {"size", "frames", "aspects", "alpha"}
        return config.load(source, [*overrides, "data.validation=0"]), frozenset({*given, *fixed})
    name = checkpoint or next(iter(families.get(family).published))
    data = {"sources": str(source), "max_windows": 1_000_000, "validation": 0}
    raw: dict[str, Any] = {"run": "prepare", "model": {"family": family, "checkpoint": name}, "data": data}
    if families.get(family).published.get(name, {}).get("", {}).get("transformer_2"):
        raw["model"]["expert"] = "high"
    settings = config.build(raw, overrides, name="prepare")
    if families.get(family).modality != "video":
        raise ValueError(f"--family: {family} is trained on scenes, not clips: use wan, cogvideox or mochi")
    if target == "latents" and families.get(family)(settings.model).precomputed is None:
        raise ValueError(
            f"--family: no trainer of {family} reads precomputed latents: use mochi or cogvideox"
        )
    return settings, frozenset(given)


def _families(settings: config.Config, target: Target) -> tuple[Family, Family | None]:
    """Return two model families for the checkpoint of a recipe: without alpha, and with joint alpha.

    The second is None if `target` is `clips`, or if the checkpoint does not support joint alpha.

    Raises:
        ValueError: if the checkpoint does not support the output format `target`.
    """
    opaque = families.get(settings.model.family)(settings.model)
    if target == "latents" and opaque.images:
        raise ValueError(
            f"{settings.model.checkpoint}: is conditioned on images, and latents of images are not written: "
            "use a text-to-video checkpoint"
        )
    if target == "clips":
        return opaque, None
    joint = settings.model_copy(update={"alpha": config.Joint(kind="joint"), "rgba_vae": None})
    try:
        return opaque, build_family(joint)
    except ValueError:
        if target == "rgba-pairs":
            raise
        return opaque, None


def _plan(
    settings: config.Config,
    given: frozenset[str],
    opaque: Family,
    transparent: Family | None,
    target: Target,
    probes: _Probes,
    before: Mapping[str, Any],
) -> tuple[Plan, config.Config, Family]:
    """Plan the windows.

    If the size, the aspect ratios or the lengths are not in `given`, they are taken from `before` or chosen
    to suit the clips.

    Returns:
        The plan, the recipe with the chosen values, and the family (`opaque` or `transparent`).
    """
    data = settings.data
    with progress("probe", 1, "clip") as advance:
        looked = data.model_copy(update={"frames": [1]})
        bar = {"progress": lambda n, of: advance(done=n, total=of), "probes": probes}
        fixed = opaque if target == "clips" else transparent if target == "rgba-pairs" else None
        if fixed is None and "alpha" in given:
            fixed = opaque if settings.alpha.kind == "opaque" or not transparent else transparent
        if fixed:
            plan = plan_dataset(looked, fixed.grid, fixed.fps, 0, family=fixed, **bar)
            used = fixed
        else:
            material = recognize(looked, opaque, transparent, **bar)
            plan, used = material.plan, transparent if material.transparent and transparent else opaque
    found = list(plan.probes.values())
    kept: dict[str, Any] = dict(before.get("settings", {}))
    chosen: dict[str, Any] = {}
    if found:
        size = fitting_size(used, found)
        chosen = {
            "size": kept.get("size", size),
            "aspects": kept.get("aspects", [] if "size" in given else fitting_aspects(found, size)),
            "frames": kept.get("frames", fitting_frames(found, used, data.fps) or list(data.frames)),
        }
    update = {k: v for k, v in chosen.items() if k not in given}
    data = config.Data.model_validate({**data.model_dump(), **update, "fps": data.fps or used.fps})
    plan = plan_dataset(data, used.grid, used.fps, 0, family=used, probes=probes, uncaptioned=True)
    if any(c.embedding for c in plan.clips):
        raise ValueError("the source contains precomputed latents, which have no pixels: use the videos")
    return plan, settings.model_copy(update={"data": data}), used


def _described(
    target: Target, settings: config.Config, family: Family, part: Part, crf: int
) -> dict[str, Any]:
    """Return all settings that determine the written files, as JSON values."""
    data = settings.data.model_dump(exclude={"sources", "cache", "validation", "bad_clips"})
    model = settings.model.model_dump() if target == "latents" else None
    rates = [source.fps for source in settings.data.sources]
    found = {
        "version": VERSION,
        "as": target,
        **data,
        **asdict(part),
        "crf": crf,
        "model": model,
        "rates": rates,
    }
    return json.loads(json.dumps({**found, "channels": family.channels}))


def _read_state(out: Path) -> dict[str, Any]:
    """Return the settings that are recorded in an output folder; empty if the folder is new.

    Raises:
        ValueError: if the folder contains other files, or the record is damaged.
    """
    file = out / STATE / "settings.json"
    if file.is_file():
        state = parse_json(read_text(file))
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise ValueError(f"{file}: is damaged: delete {out / STATE}, and all files are written again")
        return state
    if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise ValueError(
            f"{out}: is not empty and was not written by `inlaid prepare`: choose another folder"
        )
    return {}


def _check_unchanged(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a folder was prepared with the settings of this run.

    Args:
        out: the prepared folder.
        before: stored description of the earlier run; empty if there was none.
        now: settings of this run.

    Raises:
        ValueError: if a setting differs.
    """
    old = before.get("settings", now)
    changed = [f"  {k} was {old.get(k)}, is {now[k]}" for k in now if old.get(k) != now[k]]
    if changed:
        lines = "\n".join(changed)
        raise ValueError(
            f"{out}: was prepared with other settings:\n{lines}\n"
            "restore them to continue, or choose another folder"
        )


def _check_sizes(settings: config.Config, family: Family, target: Target) -> list[str]:
    """Return notes about clip sizes that the family does not support.

    Raises:
        ValueError: if latents are written and the family does not support the sizes, or if mp4 files are
            written and the height or width is odd.
    """
    data = settings.data
    wrong = [p for n in data.frames for p in family.grid.problems(n, *data.size)]
    wrong = [f"{settings.model.family}: {p}" for p in dict.fromkeys(wrong)]
    if wrong and target == "latents":
        raise ValueError("\n".join(wrong))
    if target in ("clips", "rgba-pairs") and not data.aspects and any(n % 2 for n in data.size):
        raise ValueError(f"--size: mp4 needs an even height and width, got {data.size[0]}x{data.size[1]}")
    return wrong


def _check_place(settings: config.Config, out: Path) -> None:
    """Check that the output folder is allowed.

    It must not be a source folder, be inside a source folder, or be the folder of a source manifest.

    Raises:
        ValueError: if the folder is not allowed.
    """
    for each in settings.data.sources:
        path, place = Path(each.path).expanduser().resolve(), out.resolve()
        folder = path if path.is_dir() else path.parent
        if place == folder or (path.is_dir() and place.is_relative_to(path)):
            raise ValueError(f"{out}: is in the source {each.path}: choose a folder outside of it")


class _Probes(CachedProbes):
    """Reader of clip properties that describe only the time range and the crop to export.

    `whole` contains the height and width of each clip before cropping.
    """

    def __init__(self, folder: Path, part: Part, fps: float) -> None:
        super().__init__(folder)
        self.part, self.fps = part, fps
        self.whole: dict[Path, tuple[int, int]] = {}

    def probe(self, path: Path) -> Probe:
        """Return the properties of a clip, limited to the part that is used."""
        return self._of_part(path, super().probe(path))

    def inspect(self, color: Path, alpha: Path | None = None) -> ClipInspection:
        """Return the properties of the exported part of an RGBA clip, and the alpha of the whole clip."""
        found = super().inspect(color, alpha)
        return replace(found, probe=self._of_part(color, found.probe))

    def _of_part(self, path: Path, probe: Probe) -> Probe:
        part, crop = self.part, self.part.crop
        self.whole[path] = probe.height, probe.width
        if part.start or part.end is not None:
            fps = float(probe.fps or self.fps)
            there = probe.duration or probe.frames / fps
            length = min(there, there if part.end is None else part.end) - part.start
            if length <= 0:
                raise MediaError(path, f"ends at {there:.2f} s, before --start {part.start:g}", "too-short")
            frames = max(1, round(length * fps))
            probe = replace(probe, frames=frames, duration=length if probe.fps else probe.duration)
        if crop:
            if crop.x + crop.width > probe.width or crop.y + crop.height > probe.height:
                raise MediaError(path, f"is {probe.width}x{probe.height}, --crop exceeds this size")
            probe = replace(probe, height=crop.height, width=crop.width)
        return probe


# --- cutting ------------------------------------------------------------------------------------------------


def _cuts(plan: Plan, part: Part, crf: int, target: Target, probes: _Probes) -> list[Cut]:
    """Return a cut (a window with a unique name, to be written to files) for each training window of a plan.

    Equal windows give one cut. With the target `latents`, windows of clips without captions are left out.
    """
    windows: dict[Path, list[VideoWindow]] = {}
    for window in plan.train:
        assert isinstance(window, VideoWindow)
        if target != "latents" or window.clip.caption:
            windows.setdefault(window.clip.path, []).append(window)
    names = _names([found[0].clip for found in windows.values()])
    cuts = []
    for path, found in windows.items():
        files = [file_state(f) for f in found[0].clip.files]
        for i, window in enumerate(sorted(dict.fromkeys(found), key=lambda w: w.start)):
            window = replace(window, start=round(window.start + part.start, 9))
            crop = part.crop and asdict(part.crop)
            words = window.caption if target == "latents" else None
            key = identity(VERSION, target, window.key, crop, crf, words, *files)
            cuts.append(Cut(f"{names[path]}-{i:03d}", window, key, probes.whole[path], part.crop))
    return cuts


def _names(clips: Sequence[Clip]) -> dict[Path, str]:
    """Return a unique name for each clip: its folders and file name, joined by `_`.

    The suffix is included only if names would be equal without it.
    """

    def plain(clip: Clip) -> str:
        name = rgba_clips.stem(clip.path)
        ends = [e for e in rgba_clips.COLORS if name.endswith(e)] if clip.matte else []
        above = clip.name.rpartition("/")[0].replace("/", "_")
        return "_".join(filter(None, (above, name.removesuffix(ends[0]) if ends else name)))

    counts = Counter(plain(c).casefold() for c in clips)
    out: dict[Path, str] = {}
    taken: set[str] = set()
    for clip in clips:
        name = plain(clip)
        if counts[name.casefold()] > 1:
            name = f"{name}_{clip.path.suffix[1:]}" if clip.path.suffix else name
        unique, i = name, 2
        while unique.casefold() in taken:
            unique, i = f"{name}_{i}", i + 1
        taken.add(unique.casefold())
        out[clip.path] = unique
    return out


def _write(
    settings: config.Config,
    family: Family,
    out: Path,
    target: Target,
    cuts: Sequence[Cut],
    workers: int,
    crf: int,
    made: Prepared,
) -> dict[str, Written]:
    """Write the cuts (parts of clips) that are not written yet, and update the counts in `made`.

    Returns:
        Results of the cuts that failed, by name of the cut.
    """
    done = read_done(out)
    missing = [c for c in cuts if not is_finished(out, done.get(c.name), c)]
    made.kept = len(cuts) - len(missing)
    named = {c.name: c for c in cuts}
    failed: dict[str, Written] = {}
    if target == "latents":
        results = encode_cuts(settings, family, missing, out, min(workers, READERS))
    else:
        results = write_cuts(missing, out, target, crf, workers)
    with progress("prepare", len(cuts), "clip", done=made.kept) as advance:
        for result in results:
            if result.problem:
                failed[result.name] = result
            else:
                record(out, named[result.name], result.files)
                made.written += 1
            advance()
    return failed


def _problems_of(cuts: Sequence[Cut], failed: Mapping[str, Written]) -> list[Problem]:
    """Return one problem for each clip with a window that could not be written."""
    clips: dict[Path, list[Cut]] = {}
    for cut in cuts:
        clips.setdefault(cut.window.clip.path, []).append(cut)
    out = []
    for parts in clips.values():
        bad = [c for c in parts if c.name in failed]
        if bad:
            first, clip = failed[bad[0].name], bad[0].window.clip
            code = first.code if first.code in KINDS else "unreadable"
            where = f"{len(bad)} of {len(parts)} parts, the first from {bad[0].window.start:.2f} s"
            out.append(Problem("error", code, clip.name, f"{where}: {first.problem}", clip.source))
    return out


def _described_problems(problems: Sequence[Problem], plan: Plan) -> list[str]:
    """Return one message per kind of problem. Messages name command-line options instead of recipe keys."""
    total = max(len(plan.clips), sum(s.clips for s in plan.sources))
    lines = describe_plan(problems, total, most=8)
    for key, option in KEYS.items():
        lines = [line.replace(key, option) for line in lines]
    return lines


def report(made: Prepared, out: Path, target: Target) -> list[str]:
    """Return the lines that `inlaid prepare` prints."""
    total = made.written + made.kept
    lines = [f"note: {note}" for note in made.notes]
    lines += [f"left out: {line}" for line in made.left_out]
    before = f", {made.kept} of them before" if made.kept else ""
    lines.append(f"{total} clips{before}: {out / MANIFESTS[target]}")
    return lines
