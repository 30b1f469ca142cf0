"""Dataset plan: clips of all data sources, windows (training and validation examples), and problems."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from inlaid import config
from inlaid.data import precomputed, sequences
from inlaid.data.captions import long_texts
from inlaid.data.checks import clip_problems, duplicates, outliers
from inlaid.data.clips import Clip, Window
from inlaid.data.layouts import Found, find_clips
from inlaid.data.probes import Probes
from inlaid.data.problems import FOLDER_CURE, KINDS, MANIFEST_CURE, SOURCE_CODES, Problem
from inlaid.data.rgba_clips import ClipInspection
from inlaid.data.windows import clip_windows, sizes
from inlaid.families.base import Family
from inlaid.families.grid import Grid
from inlaid.files import sha256
from inlaid.media.kinds import MediaError, Probe
from inlaid.media.rgba import AlphaStats
from inlaid.reading import FileError, reading
from inlaid.text import printable


@dataclass(frozen=True)
class SourceReport:
    """Summary of one data source."""

    path: str
    layout: str
    why: str
    """The reason for choosing this layout, for messages."""
    clips: int = 0
    """Number of clips found, including unusable clips."""
    usable: int = 0
    """Number of clips from which at least one window is used."""
    windows: int = 0
    """Number of training windows."""
    validation: int = 0
    """Number of validation windows."""
    seconds: float = 0.0
    """Total duration of the readable clips, in seconds."""
    repeats: int = 1
    weight: float = 1.0

    @property
    def uses(self) -> float:
        """Mean number of times that each window is used per epoch."""
        return self.repeats * self.weight


@dataclass(frozen=True)
class Plan:
    """Dataset plan: clips, training windows, validation windows, and problems."""

    clips: list[Clip]
    """All clips found, including unusable clips."""
    train: list[Window]
    validation: list[Window]
    problems: list[Problem]
    sources: list[SourceReport]
    probes: dict[Path, Probe] = field(default_factory=dict)
    alphas: dict[Path, AlphaStats] = field(default_factory=dict)
    """Alpha statistics of each clip, by path; empty if the run trains without alpha."""
    noun: str = "clip"
    """Word for a training example in messages, such as `clip`."""

    @property
    def errors(self) -> list[Problem]:
        """Problems that stop the run.

        If `data.bad_clips` is `quarantine`, a problem of a single clip excludes this clip instead.
        """
        return [p for p in self.problems if p.severity == "error"]


# --- the plan -----------------------------------------------------------------------------------------------


def plan_dataset(
    data: config.Data,
    grid: Grid,
    fps: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    family: Family | None = None,
    probes: Probes | None = None,
    uncaptioned: bool = False,
) -> Plan:
    """Probe every clip, select the windows to train and validate on, and collect problems.

    Only a few frames of each video are decoded.

    Args:
        data: the recipe's `data` section; its `fps` overrides the argument `fps`.
        grid: frame counts and sizes that the model family supports.
        fps: the model family's frame rate.
        seed: seed of the validation split.
        progress: called with (done, total) while files are probed.
        family: model family of the run; determines the layout of precomputed latents, and whether clips need
            alpha.
        probes: reader of file properties, such as `CachedProbes`. Default: a reader without a cache.
        uncaptioned: also select windows of clips without a caption. The missing caption is still reported.
    """
    fps = float(data.fps or fps)
    patterns = [family.precomputed_in(Path(s.path).expanduser()) if family else None for s in data.sources]
    channels = family.channels if family else 3
    found = [find_clips(source, i, patterns[i], channels) for i, source in enumerate(data.sources)]
    problems = [p for f in found for p in f.problems]
    clips = [c for f in found for c in f.clips]
    results, failed = _probe_all(clips, progress, family, fps, probes or Probes())
    probed = {p: each.probe if isinstance(each, ClipInspection) else each for p, each in results.items()}
    alphas = {p: each.alpha for p, each in results.items() if isinstance(each, ClipInspection)}
    problems += failed + outliers(clips, alphas) + _gaps(clips)
    buckets = sizes(data, grid)
    windows: dict[int, Sequence[Window]] = {}
    shown = dict(probed)
    for i, clip in enumerate(clips):
        if clip.path in probed:
            probe, alpha = probed[clip.path], alphas.get(clip.path)
            if (rate := data.sources[clip.source].fps) and probe.fps is None and probe.frames > 1:
                clip, probe = replace(clip, rate=rate), at_rate(probe, rate)
                shown[clip.path] = probe
            made = clip_windows(clip, probe, data, buckets, fps, alpha)
            problems += clip_problems(clip, probe, data, fps, made[0].extent[1:] if made else None, alpha)
            if made and (clip.caption or clip.embedding or uncaptioned):
                windows[i] = made
    if family:
        problems += _long_captions(family, windows)
    content = (probes or Probes()).content
    return assemble_plan(data, seed, found, windows, problems, shown, alphas=alphas, content=content)


def at_rate(probe: Probe, rate: float) -> Probe:
    """Return the properties of a clip without timestamps, played at `rate` frames per second."""
    fps = Fraction(rate).limit_denominator(1001)
    return replace(probe, fps=fps, interval=1 / rate, duration=probe.frames / rate)


def _gaps(clips: Sequence[Clip]) -> list[Problem]:
    """Return a warning for each image sequence whose frame numbers have gaps."""
    out = []
    for clip in clips:
        lost = sequences.missing_frames([f.name for f in clip.files]) if clip.kind == "frames" else 0
        if lost > 0:
            message = f"{lost} of {lost + len(clip.files)} frame numbers"
            out.append(Problem("warning", "gaps", clip.name, message, clip.source))
    return out


def _long_captions(family: Family, windows: Mapping[int, Sequence[Window]]) -> list[Problem]:
    """Return a warning for each caption that is too long for the model.

    Prefix and trigger word count toward the length.
    """
    firsts = [made[0] for made in windows.values() if not made[0].clip.embedding]
    long = long_texts(family, [w.caption for w in firsts])
    return [
        Problem("warning", "long-caption", w.clip.name, long[w.caption], w.clip.source)
        for w in firsts
        if w.caption in long
    ]


def assemble_plan(
    data: config.Data,
    seed: int,
    found: Sequence[Found],
    windows: Mapping[int, Sequence[Window]],
    problems: list[Problem],
    probes: dict[Path, Probe],
    alike: Callable[[Sequence[Clip]], Mapping[Path, str]] | None = None,
    noun: str = "clip",
    alphas: dict[Path, AlphaStats] | None = None,
    content: Callable[[Path], str] = sha256,
) -> Plan:
    """Split the windows into training and validation, and return the dataset plan.

    Args:
        data: the recipe's `data` section.
        seed: seed of the validation split.
        found: clips and problems of each data source.
        windows: windows of each usable clip, by the clip's index among all clips found.
        problems: problems found so far; new problems are appended to this list.
        probes: properties of each readable clip, by path.
        alike: function that maps clips to group labels, by path; clips with equal labels stay on the same
            side of the split. Default: clips with equal content form a group.
        noun: word for a training example in messages, such as `clip`.
        alphas: alpha statistics of each clip, by path.
        content: function that returns the content hash of a file.
    """
    clips = [c for f in found for c in f.clips]
    usable = [clips[i] for i in windows]
    copies, doubled = duplicates(usable, content)
    problems += doubled
    held, held_problems = _split_validation(usable, alike(usable) if alike else copies, data.validation, seed)
    problems += held_problems
    train = [w for i, ws in windows.items() for w in ws if clips[i].path not in held]
    out = [w for i, ws in windows.items() for w in ws if clips[i].path in held]
    reports = [
        SourceReport(
            path=source.path,
            layout=f.layout,
            why=f.why,
            clips=f.count,
            usable=sum(clips[i].source == index for i in windows),
            windows=sum(w.clip.source == index for w in train),
            validation=sum(w.clip.source == index for w in out),
            seconds=sum(probes[c.path].duration for c in f.clips if c.path in probes),
            repeats=source.repeats,
            weight=source.weight,
        )
        for index, (source, f) in enumerate(zip(data.sources, found, strict=True))
    ]
    order = list(KINDS)
    problems.sort(key=lambda p: (p.severity, order.index(p.code), p.source, p.name))
    return Plan(clips, train, out, problems, reports, probes, alphas or {}, noun)


def _probe_all(
    clips: Sequence[Clip],
    progress: Callable[[int, int], None] | None,
    family: Family | None,
    fps: float,
    probes: Probes,
) -> tuple[dict[Path, Probe | ClipInspection], list[Problem]]:
    """Probe every clip once, in several threads; return the properties by path, and problems."""
    first = {c.path: c for c in reversed(clips)}
    results: dict[Path, Probe | ClipInspection] = {}
    problems = [
        Problem("error", "pair", c.name, "it is listed with two different alpha mattes", c.source)
        for c in clips
        if c.matte != first[c.path].matte
    ]

    def probe(path: Path) -> Probe | ClipInspection | FileError:
        clip = first[path]
        try:
            with reading(path, MediaError):
                if not (clip.embedding and family):
                    alpha = family and family.channels == 4
                    return probes.inspect(path, clip.matte) if alpha else probes.probe(path)
                frames, height, width = precomputed.inspect_item(family, clip.latents, clip.embedding)
                rate = Fraction(fps).limit_denominator(1000)
                return Probe(frames, rate, height, width, frames / fps, 1 / fps)
        except FileError as error:
            return error
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, (path, result) in enumerate(zip(first, pool.map(probe, first), strict=True), 1):
            if isinstance(result, FileError):
                clip = first[path]
                problems.append(Problem("error", result.code, clip.name, result.cause, clip.source))
            else:
                results[path] = result
            if progress:
                progress(done, len(first))
    return results, problems


def _split_validation(
    clips: Sequence[Clip], marks: Mapping[Path, str], wanted: float, seed: int
) -> tuple[set[Path], list[Problem]]:
    """Select the validation clips; return their paths, and problems with the setting.

    `wanted` is the number of clips, or their share if it is below 1. Clips with equal labels in `marks`, such
    as content hashes, form a group, which is never split. Groups are taken in the order of a hash of `seed`
    and a clip name.
    """
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[marks[clip.path]].append(clip)
    count = math.floor(wanted * len(clips) + 0.5) if wanted < 1 else int(wanted)
    if not clips or not count:
        return set(), []
    if count >= len(clips):
        message = f"data.validation={wanted:g} of {len(clips)} clips leaves none to train on: lower it"
        return set(), [Problem("error", "validation", "data.validation", message)]

    def rank(group: list[Clip]) -> bytes:
        return hashlib.sha256(f"{seed}\0{min(c.name for c in group)}".encode()).digest()

    held: list[Clip] = []
    for group in sorted(groups.values(), key=rank):
        if len(held) < count and len(held) + len(group) < len(clips):
            held += group
    return {c.path for c in held}, []


def describe_plan(problems: Sequence[Problem], total: int, most: int = 5, noun: str = "clip") -> list[str]:
    """Return messages that describe problems. Clips with the same kind of problem share a message.

    Example: `2 of 40 clips have no caption (07.mp4, 12.mp4): add a .txt beside each`.

    Args:
        problems: the problems to describe.
        total: number of clips in the dataset.
        most: maximum number of clip names in a message.
        noun: word for a training example.
    """
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.code].append(problem)
    out = []
    for code in sorted(groups, key=list(KINDS).index):
        group, says = groups[code], KINDS[code]
        if code in SOURCE_CODES:
            out += [f"{p.name}: {p.message}" if code == "layout" else p.message for p in group]
            continue
        names = [printable(": ".join(filter(None, (p.name, p.message))), lines=False) for p in group[:most]]
        more = f" and {len(group) - most} more" if len(group) > most else ""
        joined = ("; " if any(p.message for p in group[:most]) else ", ").join(names)
        verb = says.one if len(group) == 1 else says.many
        cure = MANIFEST_CURE if says.cure == FOLDER_CURE and any(p.message for p in group) else says.cure
        out.append(f"{len(group)} of {total} {noun}s {verb} ({joined}{more}): {cure}")
    return out


def require_usable(plan: Plan, bad_clips: Literal["stop", "quarantine"]) -> list[Problem]:
    """Raise an error if the run cannot start with this dataset plan.

    If `bad_clips` is `stop`, any error in the plan prevents the run. If it is `quarantine`, clips with errors
    are excluded. The run is then prevented only by an error of a data source, an error of the validation
    split, or a plan without training windows.

    Returns:
        The errors of excluded clips, for the caller to record; empty if the plan has no errors.

    Raises:
        ValueError: if the run cannot start; the message summarizes the errors.
    """
    total = sum(s.clips for s in plan.sources)
    stops = [p for p in plan.errors if bad_clips == "stop" or p.code in SOURCE_CODES]
    if stops or not plan.train:
        raise ValueError("\n".join(describe_plan(stops or plan.errors, total, noun=plan.noun)))
    return plan.errors
