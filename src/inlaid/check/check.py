"""`inlaid check`: report data sources, problems and buckets, and estimate memory and time.

A bucket is a group of training examples with equal length and size. No model weights are loaded. The header
and the end of every clip are read. A few clips are decoded for the contact sheet. If the run trains on alpha,
several frames of every clip are decoded to measure alpha.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from inlaid import config as recipe
from inlaid import families
from inlaid.alpha.opening import build_family
from inlaid.check import ladder
from inlaid.check.estimate import Estimate, estimate_recipe
from inlaid.check.ladder import size_text
from inlaid.check.transparency import proposal
from inlaid.console import progress
from inlaid.data.captions import long_texts
from inlaid.data.layouts import find_clips
from inlaid.data.modality import Modality, modality_of
from inlaid.data.plan import Plan, SourceReport, describe_plan
from inlaid.data.probes import CachedProbes, read_memo, write_memo
from inlaid.data.problems import Problem
from inlaid.data.sampler import make_sampler
from inlaid.families.grid import Extent
from inlaid.files import atomic
from inlaid.media.kinds import MediaError
from inlaid.media.rgba import AlphaStats
from inlaid.runs.folder import Run
from inlaid.runs.launch import Devices, resolve_devices
from inlaid.training import memory
from inlaid.training.cautions import cautions, length_cautions
from inlaid.training.schedule import make_schedule
from inlaid.training.trained import trained_by

ROWS = 12
"""Maximum number of rows on the contact sheet and in the table of alpha statistics."""


@dataclass(frozen=True)
class Bucket:
    """Group of windows (clips or segments of clips) with equal length and size."""

    extent: Extent
    train: int
    """Number of windows for training."""
    validation: int
    """Number of windows for validation."""
    batches: int
    """Number of batches per epoch, which also depends on the repeats and weights of the data sources."""
    latent: tuple[int, ...]
    """Shape of the latents of one window."""
    tokens: int
    """Number of tokens that the denoiser processes for one window."""


@dataclass(frozen=True)
class Report:
    """Results of `inlaid check`."""

    run: str
    family: str
    checkpoint: str
    steps: int
    clips: int
    problems: list[Problem]
    """Problems with clips and sources."""
    mistakes: list[str]
    """Messages about problems that prevent training with this recipe and checkpoint."""
    sources: list[SourceReport]
    buckets: list[Bucket]
    estimate: Estimate | None
    """Estimated resources; None if the recipe has mistakes or if there are no training windows."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Messages about valid but probably unintended settings, and about an unreachable Hugging Face Hub."""
    alphas: dict[str, AlphaStats] = field(default_factory=dict)
    """Alpha statistics by clip name; empty if the recipe trains without alpha."""
    conversions: dict[str, str] = field(default_factory=dict)
    """Pixel conversions that decoding applies, by clip name, such as `deinterlaced; mirrored`."""
    contact_sheet: str | None = None
    modality: str = "video"
    vram: float | None = None
    """GPU memory in GB for which `ladder` was computed."""
    ladder: list[ladder.Rung] = field(default_factory=list)
    """Memory settings from the fastest to the smallest; empty unless GPU memory was given."""

    @property
    def ok(self) -> bool:
        """True if training can start: no mistakes in the recipe and no errors in the data."""
        return not self.mistakes and not any(p.severity == "error" for p in self.problems)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        peak = {} if self.estimate is None else {"peak": self.estimate.peak}
        out = {"ok": self.ok, **asdict(self)}
        out["buckets"] = [{**b["extent"]._asdict(), **b} for b in out["buckets"]]
        for bucket in out["buckets"]:
            del bucket["extent"]
        if self.estimate is not None:
            out["estimate"] = {**out["estimate"], **peak}
        return json.dumps(out, indent=2, ensure_ascii=False)


def check_recipe(config: recipe.Config, vram: float | None = None) -> Report:
    """Check the data and the recipe, and write the files `report.json` and `contact_sheet.png`.

    The files are written to the folder `check` of the run. With `vram`, GPU memory in GB, the report also
    compares memory settings.

    Raises:
        ValueError: if the family is unknown or the checkpoint's configuration cannot be read.
    """
    family = build_family(config)
    modality = modality_of(family.modality)
    probes = CachedProbes(Run(Path(config.run)).cache(config))
    with progress("probe", 1, modality.one) as advance:
        plan = modality.plan(config, family, lambda done, of: advance(done=done, total=of), probes)
    probes.save()
    mistakes = family.problems(config)
    buckets = _buckets(config, family, plan) if plan.train and not mistakes else []
    estimate, notes = None, _notes(config, family, plan)
    rungs: list[ladder.Rung] = []
    length = _steps(config, plan)
    parts = [c for part in family.encoders.values() for c in part]
    hub = family.availability([*parts, *([family.component] if config.rgba_vae is None else [])])
    warnings: list[str] = []
    if hub:
        found = {"note": notes, "warning": warnings, "error": mistakes}[hub.severity]
        found.append(f"model.checkpoint: {hub.text}")
    if buckets:
        try:
            warnings += _cautions(config, family, length)
            memo_file = Run(Path(config.run)).cache(config) / "estimates.json"
            memo = read_memo(memo_file)
            estimate, more = _estimate(config, family, plan, buckets, memo)
            if vram:
                rungs = _ladder(config, family, buckets, vram, memo)
            write_memo(memo_file, memo)
            notes += more
        except ValueError as error:
            mistakes.append(str(error))
    folder = Path(config.run) / "check"
    report = Report(
        run=config.run,
        family=config.model.family,
        checkpoint=config.model.checkpoint,
        steps=length,
        clips=sum(s.clips for s in plan.sources),
        problems=plan.problems,
        mistakes=mistakes,
        sources=plan.sources,
        buckets=buckets,
        estimate=estimate,
        notes=notes,
        warnings=warnings,
        alphas={c.name: plan.alphas[c.path] for c in plan.clips if c.path in plan.alphas},
        conversions={
            c.name: plan.probes[c.path].conversions
            for c in plan.clips
            if c.path in plan.probes and plan.probes[c.path].conversions
        },
        modality=family.modality,
        vram=vram,
        ladder=rungs,
    )
    if plan.train and (estimate or not buckets):  # sizes that cannot be estimated take minutes to draw
        sheet, damaged = _contact_sheet(config, modality, plan, folder / "contact_sheet.png")
        report = replace(report, contact_sheet=sheet or None, problems=[*damaged, *report.problems])
    with atomic(folder / "report.json") as part:
        part.write_text(report.to_json(), "utf-8")
    return report


def _buckets(config: recipe.Config, family: families.Family, plan: Plan) -> list[Bucket]:
    train, validation = (Counter(w.extent for w in part) for part in (plan.train, plan.validation))
    sampler = make_sampler(plan.train, config.data.sources, config.train.batch, config.seed)
    epoch = (sampler.batch(k) for k in range(len(sampler)))
    batches = Counter(plan.train[rows[0]].extent for rows in epoch)
    return [
        Bucket(e, train[e], validation[e], batches[e], family.shapes(*e)["latents"], family.tokens(*e))
        for e in sorted({*train, *validation}, key=lambda e: (e[0], e.width / e.height))
    ]


def _notes(config: recipe.Config, family: families.Family, plan: Plan) -> list[str]:
    """Return notes about the run for the user. None of them requires a change."""
    notes = [*family.notes(config), *_alpha_note(config, family, plan)]
    if not plan.train:
        return notes
    clips = {w.clip.path for w in (*plan.train, *plan.validation)}
    if not plan.validation:
        copies = sum(p.code == "duplicate" for p in plan.problems)
        few = f"there are only {len(clips)} {plan.noun}s"
        if copies + 1 >= len(clips) > 1:
            few = f"all {len(clips)} {plan.noun}s are copies of one, and copies stay on the same side"
        why = "data.validation is 0" if not config.data.validation else few
        notes.append(f"no validation {plan.noun}s ({why}): no validation loss is computed")
    sampler = make_sampler(plan.train, config.data.sources, config.train.batch, config.seed)
    schedule = make_schedule(config, len(sampler), config.train.accumulate)
    epochs = float(schedule.steps / schedule.epoch)
    notes.append(
        f"{schedule.steps:,} steps are {epochs:,.1f} epochs of {len(sampler):,} batches, on one device"
    )
    ready = sum(bool(w.clip.embedding) for w in (*plan.train, *plan.validation))
    if ready:
        image = ", their image latents lack the noise that is added before encoding" if family.images else ""
        notes.append(
            f"{ready} windows are precomputed latents: their size and length are fixed{image}, and they are "
            "not on the contact sheet"
        )
    for text, why in long_texts(family, [*config.sample.prompts, config.sample.negative_prompt]).items():
        notes.append(f"sample.prompts: `{text[:40]}...` has {why}")
    notes += _conversions(plan)
    timed = [
        c for c in plan.clips if c.path in plan.probes and not c.embedding and family.modality == "video"
    ]
    untimed = [c for c in timed if plan.probes[c.path].fps is None and plan.probes[c.path].frames > 1]
    if untimed:
        notes.append(
            f"{len(untimed)} of {len(plan.clips)} clips store no frame rate ({untimed[0].name}): each "
            f"frame is used at {config.data.fps or family.fps:g} fps; set `fps` of the source if they have "
            "another rate"
        )
    assumed = sum(p.untagged for p in plan.probes.values())
    if assumed:
        notes.append(
            f"{assumed} of {len(plan.probes)} files do not specify a color matrix: BT.709 is assumed from "
            "1280 columns or 720 lines on, else BT.601"
        )
    return notes


def _steps(config: recipe.Config, plan: Plan) -> int:
    """Return the number of optimizer steps on one device.

    The result is 0 if the recipe sets a number of epochs but there are no training windows.
    """
    if not plan.train:
        return config.train.steps or 0
    sampler = make_sampler(plan.train, config.data.sources, config.train.batch, config.seed)
    return make_schedule(config, len(sampler), config.train.accumulate).steps


def _alpha_note(config: recipe.Config, family: families.Family, plan: Plan) -> list[str]:
    """Return a note about the ways to train on alpha.

    The list is empty if the recipe already trains on alpha, or if no clip has alpha.
    """
    if family.modality != "video" or config.alpha.kind != "opaque" or config.rgba_vae is not None:
        return []
    names = {(p.source, p.name) for p in plan.problems if p.code in ("transparent", "matte")}
    if not names and not plan.probes:  # perhaps only pairs, of which a run without alpha reads none
        mattes = [c for i, s in enumerate(config.data.sources) for c in find_clips(s, i, None, 4).clips]
        names = {(c.source, c.name) for c in mattes if c.matte}
    experts = config.model.expert is not None
    total = max(len(plan.clips), len(names))
    return [proposal(config, len(names), total, experts=experts)] if names else []


def _cautions(config: recipe.Config, family: families.Family, steps: int) -> list[str]:
    """Return warnings about settings of the recipe that probably do not suit this network."""
    import torch

    network = family.load_denoiser(torch.float32, meta=True)
    found = cautions(config, network, trained_by(config, family).select(network))
    return [*found, *length_cautions(config, steps)]


def _conversions(plan: Plan) -> list[str]:
    """Return one message per pixel conversion, such as deinterlacing, with the clips that it applies to."""
    found: dict[str, list[str]] = defaultdict(list)
    for clip in plan.clips:
        if clip.path in plan.probes:
            for what in filter(None, plan.probes[clip.path].conversions.split("; ")):
                found[what].append(clip.name)
    listed = {what: ", ".join(names[:5]) for what, names in found.items()}
    return [
        f"{what}: {len(names)} of {len(plan.clips)} {plan.noun}s ({listed[what]}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''})"
        for what, names in found.items()
    ]


def _estimate(
    config: recipe.Config,
    family: families.Family,
    plan: Plan,
    buckets: Sequence[Bucket],
    memo: dict[str, Any],
) -> tuple[Estimate, list[str]]:
    import torch

    notes: list[str] = []
    try:
        place = resolve_devices(config, Devices.here())
        device, precision, optimizer = torch.device(place.device), place.precision, place.optimizer
        notes += [*place.notes, *memory.problems(config, device, precision)]
    except ValueError as error:
        device, optimizer = torch.device("meta"), config.optim.name
        precision = torch.float32 if config.runtime.precision == "float32" else torch.bfloat16
        notes.append(f"{error}; memory is estimated in {precision}".replace("torch.", ""))
    windows = (*plan.train, *plan.validation)
    estimate = estimate_recipe(
        family,
        config,
        {b.extent: b.batches for b in buckets if b.batches},
        {b.extent: b.train + b.validation for b in buckets},
        sorted({str(w.words) for w in windows} | set(config.sample.prompts)),
        device=device,
        precision=precision,
        optimizer=optimizer,
        memo=memo,
    )
    if estimate.capacity and estimate.peak > 0.95 * estimate.capacity:
        notes.append(
            f"training needs about {size_text(estimate.peak)} and {estimate.device} has "
            f"{size_text(estimate.capacity)}: {_memory_savings(config, device.type)}"
        )
    return estimate, notes


def _ladder(
    config: recipe.Config,
    family: families.Family,
    buckets: Sequence[Bucket],
    vram: float,
    memo: dict[str, Any],
) -> list[ladder.Rung]:
    """Return the memory settings of a GPU with `vram` GB for the largest clips, with a progress bar."""
    largest = max((b.extent for b in buckets), key=lambda e: family.tokens(*e))
    with progress("memory", len(ladder.LADDER), "setting") as advance:
        return ladder.climb(family, config, largest, vram, memo=memo, advance=advance)


def _memory_savings(config: recipe.Config, device: str) -> str:
    ways = [] if config.memory.gradient_checkpointing else ["set memory.gradient_checkpointing=true"]
    if device == "cuda" and not config.memory.offload and isinstance(config.tuner, recipe.LowRank):
        ways += ["set memory.offload=all"]
    ways += ["lower train.batch and raise train.accumulate"] if config.train.batch > 1 else []
    ways += ["train an adapter (tuner.kind=lora)"] if isinstance(config.tuner, recipe.Full) else []
    return ", ".join([*ways, "use a smaller data.size or fewer data.frames"])


def _contact_sheet(
    config: recipe.Config, modality: Modality, plan: Plan, path: Path
) -> tuple[str, list[Problem]]:
    """Write a contact sheet of evenly spaced training windows; return its path and the read errors.

    The path is empty if no window can be read.
    """
    there = [w for w in plan.train if not w.clip.embedding]
    picked = [there[i * len(there) // ROWS] for i in range(ROWS)] if len(there) > ROWS else there
    rows, problems = [], []
    with progress("contact sheet", len(picked), modality.one) as advance:
        for window in picked:
            try:
                rows.append((window, window.read()))
            except MediaError as error:
                problems.append(
                    Problem("error", error.code, window.clip.name, error.cause, window.clip.source)
                )
            finally:
                advance()
    if not rows:
        return "", problems
    title = f"Training data of {config.run} ({len(rows)} of {len(plan.train)} {modality.columns[2]})"
    modality.sheet(rows, path, title)
    return str(path), problems


# --- printing ---------------------------------------------------------------------------------------------


LEFT = ("memory settings", "source", "layout", "size", "image size", "latent", "alpha", "looks")
"""Columns of tables that are aligned to the left."""


def print_report(report: Report, console: Console) -> None:
    """Print a report to a console: sources, buckets, estimate, notes, and problems last."""
    console.print(Text.assemble(("check ", "bold"), f"{report.run}: {report.family}, {report.checkpoint}\n"))
    rows = [
        (
            _short(s.path),
            s.layout,
            s.clips,
            s.usable,
            s.windows,
            s.validation,
            f"{s.seconds:.1f}",
            f"{s.uses:g}",
        )
        for s in report.sources
    ]
    examples = f"{modality_of(report.modality).one}s"
    columns = ("source", "layout", examples, "usable", "windows", "validation", "seconds", "uses")
    console.print(_table(columns, rows))
    for source in report.sources:
        console.print(Text(f"  {_short(source.path)} is read as {source.layout}: {source.why}", "dim"))
    console.print()
    if report.buckets:
        rows = [
            (
                b.extent[0],
                _by((b.extent.height, b.extent.width)),
                b.train,
                b.validation,
                b.batches,
                _by(b.latent),
                f"{b.tokens:,}",
            )
            for b in report.buckets
        ]
        length, size, count = modality_of(report.modality).columns
        columns = (length, size, count, "validation", "batches", "latent", "tokens")
        console.print(_table(columns, rows))
    if report.alphas:
        _print_alphas(report.alphas, console)
    if report.estimate is not None:
        _print_estimate(report.estimate, report.steps, console)
    if report.ladder and report.vram:
        _print_ladder(report.ladder, report.vram, console)
    for note in report.notes:
        console.print(Text(f"note: {note}", "cyan"))
    for line in report.warnings:
        console.print(Text(f"warning: {line}", "yellow"))
    for severity, style in (("warning", "yellow"), ("error", "red")):
        found = [p for p in report.problems if p.severity == severity]
        for line in describe_plan(found, report.clips, most=8, noun=modality_of(report.modality).one):
            console.print(Text(f"{severity}: {line}", style))
    for mistake in report.mistakes:
        console.print(Text(f"error: {mistake}", "red"))
    if report.contact_sheet:
        console.print(Text(f"\ncontact sheet: {report.contact_sheet}"))
    errors = len(report.mistakes) + sum(p.severity == "error" for p in report.problems)
    warnings = len(report.warnings) + sum(p.severity == "warning" for p in report.problems)
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    verdict, style = ("ready to train", "bold green") if report.ok else ("not ready", "bold red")
    console.print(Text(f"{verdict}: {counts}", style))


def _print_alphas(alphas: Mapping[str, AlphaStats], console: Console) -> None:
    """Print the alpha statistics of the first clips, and the mean over all clips.

    The statistics are measured before alpha is cleaned up.
    """
    rows = [(_short(name), *_alpha_cells(a), a.looks) for name, a in list(alphas.items())[:ROWS]]
    if len(alphas) > 1:
        mean = [sum(getattr(a, key) for a in alphas.values()) / len(alphas) for key in _SHARES]
        left = len(alphas) - len(rows)
        rows.append(
            (f"all {len(alphas)}", *(f"{v:.1%}" for v in mean), "", f"{left} more clips" if left else "")
        )
    columns = ("alpha", "coverage", "soft", "residue", "color where transparent", "range", "looks")
    console.print(_table(columns, rows))
    console.print()


_SHARES = ("coverage", "soft", "residue", "colored")


def _alpha_cells(found: AlphaStats) -> list[str]:
    return [*(f"{getattr(found, key):.1%}" for key in _SHARES), f"{found.lowest}-{found.highest}"]


def _short(path: str) -> str:
    parts = Path(path).parts
    return path if len(path) <= 30 or len(parts) < 3 else str(Path("…", *parts[-2:]))


def _by(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        left = column in (
            "memory settings",
            "source",
            "layout",
            "size",
            "image size",
            "latent",
            "alpha",
            "looks",
        )
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _print_estimate(estimate: Estimate, steps: int, console: Console) -> None:
    rows = [(name, size_text(size)) for name, size in estimate.memory.items() if size]
    rows += [("memory while training", f"{size_text(estimate.peak)} on {estimate.device}")]
    rows += [
        (
            "cache on disk",
            f"{size_text(sum(estimate.cache.values()))} (clips {size_text(estimate.cache['clips'])})",
        )
    ]
    if estimate.seconds:
        rows += [("one step", " to ".join(_time(s) for s in estimate.seconds))]
        rows += [(f"all {steps:,} steps", " to ".join(_time(s * steps) for s in estimate.seconds))]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row()
    for name, value in rows:
        style = "dim" if name in estimate.memory else "bold"
        table.add_row(Text(name, style), Text(value, style))
    console.print(table)
    for line in estimate.how:
        console.print(Text(f"  {line}", style="dim"))
    console.print()


def _print_ladder(rungs: Sequence[ladder.Rung], vram: float, console: Console) -> None:
    best, first = ladder.choose(rungs), min((r.seconds for r in rungs if not r.problem), default=0.0)
    rows = []
    for rung in rungs:
        shown = ["-", "-", "-", "refused"]
        if not rung.problem:
            fits = "no" if not rung.fits else "chosen" if rung is best else "yes"
            shown = [size_text(rung.peak), f"{rung.seconds / first:.2f}", _time(rung.seconds), fits]
        rows.append((rung.text, *shown))
    columns = ("memory settings", "memory", "time", "on an H100", f"fits in {vram:g} GB")
    console.print(_table(columns, rows))
    console.print(Text(f"  {ladder.explain(rungs, vram)}", style="bold"))
    console.print(
        Text("  predicted: memory by a simulated step; time by counted operations and bytes at the rates of "
             "an H100, relative to the fastest setting", style="dim")
    )  # fmt: skip
    for reason in dict.fromkeys(r.problem for r in rungs if r.problem):
        console.print(Text(f"  refused: {reason}", style="dim"))
    console.print()


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
