"""Comparison of a fine-tuned model with its base model: validation loss, metrics and an HTML report.

Both models generate with the standard diffusers pipeline, the same prompts and the same seeds. Both losses
are computed with the same validation clips and noise. Every difference is therefore an effect of training.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from inlaid import config as recipe
from inlaid import families
from inlaid.adapters.adapter import KINDS, WEIGHTS
from inlaid.adapters.inspect import inspect_path
from inlaid.adapters.of_run import BASE, load_into_pipeline, trained_folder
from inlaid.alpha.opening import open_family
from inlaid.console import progress, say
from inlaid.data.batch import Batch
from inlaid.data.clips import Window
from inlaid.data.modality import ImageSource, modality_of
from inlaid.data.prepare import CachedDataset, build_cache
from inlaid.data.prompts import Prompts, encode_prompts, resolve_sample
from inlaid.evaluation.report import Output, Pair, Report, ValidationLoss, Verdict, as_json, summary_table
from inlaid.evaluation.video import measure_frames
from inlaid.files import atomic
from inlaid.generation.generate import generate_samples
from inlaid.media import compositing
from inlaid.media.contact_sheet import SheetRow, contact_sheet
from inlaid.runs.folder import Run, environment, read_header, read_metrics
from inlaid.runs.launch import Context, start_processes
from inlaid.training.steps import QUANTILES, DenoisingStep

__all__ = ["Output", "Pair", "Prompt", "Report", "ValidationLoss", "Verdict", "evaluate", "summary_table"]

REFERENCE_CLIPS = 4
"""Number of training clips whose metrics are measured as a reference."""

SAMPLING = ("size", "frames", "steps", "guidance", "negative_prompt", "seed")
"""Fields of the recipe's `sample` section that arguments of `evaluate` can override."""


@dataclass(frozen=True)
class Prompt:
    """Prompt of an evaluation, with its group and an optional function that checks the output."""

    text: str
    group: str = ""
    judge: Callable[[np.ndarray], bool] | None = None
    """Function that returns True if the output matches the prompt. Its argument is a video, uint8 (t, h, w,
    3). A transparent video is straight RGBA, uint8 (t, h, w, 4)."""
    images: ImageSource = ()
    """Conditioning images for image-to-video: image files, or a training example whose frames are used."""
    truth: Callable[[np.ndarray], np.ndarray] | None = None
    """Function that takes a generated RGBA video and returns its true alpha, uint8 (t, h, w). None if the
    true alpha is unknown, or if the run has no alpha."""


def evaluate(
    run: str | Path,
    *,
    against: str = BASE,
    checkpoint: str | None = None,
    prompts: Sequence[Prompt] | None = None,
    count: int = 1,
    group_by: bool = True,
    per_group: int = 2,
    limit: int = 24,
    device: str | None = None,
    **overrides: Any,
) -> Report:
    """Compare the fine-tuned model of a run with another model, and write `report/` in the run folder.

    Args:
        run: run folder.
        against: the other model: `base` for the base model, or a checkpoint of the run.
        checkpoint: checkpoint to evaluate, such as `step-000500` or `500`. Default: the run's final weights.
        prompts: prompts to generate. Default: `default_prompts`, or `ground_truth_prompts` for scenes.
        count: number of outputs per prompt; output i uses the seed `sample.seed` + i.
        group_by: add captions of each group to the default prompts. A group is a value in the manifest column
            `group_column` of a data source.
        per_group: number of captions per group; captions of validation clips come first.
        limit: maximum number of prompts if `prompts` is None.
        device: device name as in `runtime.device`. Default: the recipe's device.
        overrides: fields of the recipe's `sample` section to change; `SAMPLING` lists the allowed fields.

    Raises:
        ValueError: for any problem that the user can fix.
    """
    began = time.perf_counter()
    place = Run(Path(run))
    config = _config(place, device, overrides)
    if config.rgba_vae is not None:
        raise ValueError(
            f"evaluate: {run} trained an RGBA VAE, which has no prompts; use inlaid.evaluation.rgba_vae"
        )
    family = open_family(config)
    sides = _sides(place, family, against, checkpoint)
    with start_processes(config) as ctx:
        if ctx.world > 1:
            raise ValueError("evaluate: does not support several processes; start it without torchrun")
        clips, notes = _clips(config, family, place, ctx)
        metrics = metrics_of(family.modality)
        if prompts is not None:
            chosen = list(prompts)
        elif metrics.HAS_GROUND_TRUTH:
            chosen = ground_truth_prompts(clips)
        else:
            chosen = default_prompts(config, clips, group_by, per_group)
        if prompts is None and len(chosen) > limit:
            notes.append(f"Generated for {limit} of {len(chosen)} prompts; raise `limit` to include more.")
            chosen = _limited(chosen, limit)
        _check_prompts(chosen, family, metrics)
        texts, images = [p.text for p in chosen], [p.images for p in chosen]
        encoded = encode_prompts(config, family, place, texts, config.sample, ctx, images)
        step = DenoisingStep(family, family.objective(config.objective, config.data.size))
        with atomic(place.folder / "report") as folder, TemporaryDirectory(prefix="inlaid-") as scratch:
            folder.mkdir(parents=True)
            reference = None if metrics.HAS_GROUND_TRUTH else _reference_metrics(place, clips, folder, notes)
            comparison = _Comparison(chosen, encoded, count, folder, Path(scratch), metrics)
            batches = clips.validation_batches(family) if clips else []
            for side, (denoiser, pipeline) in zip(sides, _networks(config, family, sides, ctx), strict=True):
                comparison.measure_loss(side, step, denoiser, batches, ctx.device)
                comparison.generate(side, family, pipeline)
            report = Report(
                run=place.folder.resolve().name,
                folder=place.folder / "report",
                names=(sides[0].name, sides[1].name),
                step=sides[1].step,
                pairs=comparison.pairs(),
                validation=comparison.validation(step, batches),
                training=reference,
                sampling=_sampling(family, encoded),
                settings=json.loads(config.model_dump_json()),
                environment=_environment(ctx),
                adapter=_facts(config, sides[1].folder),
                curves=read_metrics(place.metrics),
                notes=notes,
                created=f"{datetime.now():%Y-%m-%d %H:%M}",
                seconds=time.perf_counter() - began,
                makes=modality_of(family.modality).makes,
            )
            save_report(report, folder)
    return report


class ModalityMetrics(Protocol):
    """Interface of the modules `inlaid.evaluation.video` and `inlaid.evaluation.scene`.

    Each of these modules measures the outputs of one modality.
    """

    HAS_GROUND_TRUTH: bool
    """True if each example has a single correct output. The default prompts are then the validation
    examples."""

    def measure(self, output: Any, prompt: Prompt) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Return two mappings: the metrics of an output, and the metrics of its parts by part name.

        The parts of a scene are its objects. A video has no parts.
        """
        ...

    def matches_prompt(self, metrics: Mapping[str, float]) -> bool | None:
        """Return whether an output matches its prompt, according to its metrics.

        The result is None if the modality has no metric for this.
        """
        ...

    def comparable(self, output: Any) -> np.ndarray:
        """Convert an output to an array, for comparison with `distance`."""
        ...

    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return the difference of two outputs, from 0 to 1. Both are arrays that `comparable` returned."""
        ...

    def preview(self, output: Any) -> Image.Image:
        """Render a preview image of an output."""
        ...


def metrics_of(modality: str) -> ModalityMetrics:
    """Return the evaluation module of a modality."""
    return cast(ModalityMetrics, importlib.import_module(f"inlaid.evaluation.{modality}"))


def _check_prompts(prompts: Sequence[Prompt], family: families.Family, metrics: ModalityMetrics) -> None:
    if not prompts or not all(p.text.strip() for p in prompts):
        raise ValueError("evaluate: no prompts, or an empty prompt: pass `prompts` or set sample.prompts")
    images = [p.images for p in prompts if not isinstance(p.images, Window)]
    if metrics.HAS_GROUND_TRUTH and images:
        raise ValueError(
            "evaluate: a scene is measured against its true surfaces: pass scenes, not image files"
        )
    problems = family.missing_images(len(images), [each for each in images if each])
    if problems:
        raise ValueError(f"evaluate: {problems[0]}")


def default_prompts(
    config: recipe.Config, clips: CachedDataset | None, group_by: bool, per_group: int
) -> list[Prompt]:
    """Return the default prompts of an evaluation.

    They are the recipe's sample prompts, followed by captions of each group of clips. Captions of validation
    clips have priority. If this gives no prompt, the first captions of the dataset are used.

    Args:
        config: the recipe.
        clips: the dataset, or None.
        group_by: True to add the captions of groups.
        per_group: number of captions of each group.
    """
    groups: dict[str, dict[str, Window]] = {}
    windows: list[Window] = [*clips.plan.validation, *clips.plan.train] if clips else []
    for window in windows if group_by else ():
        if window.clip.group:
            groups.setdefault(window.clip.group, {}).setdefault(window.caption, window)
    images = config.sample.images or [()] * len(config.sample.prompts)
    from_recipe = [
        Prompt(text, images=each)
        for text, each in dict(zip(config.sample.prompts, images, strict=True)).items()
    ]
    known = {p.text for p in from_recipe}
    from_groups = [
        Prompt(text, group, images=captions[text])
        for group, captions in sorted(groups.items())
        for text in [c for c in captions if c not in known][:per_group]
    ]
    if from_recipe or from_groups or clips is None:
        return [*from_recipe, *from_groups]
    first_windows = {w.caption: w for w in reversed(windows)}
    return [Prompt(text, images=first_windows.get(text, ())) for text in clips.prompts.texts]


def ground_truth_prompts(clips: CachedDataset | None) -> list[Prompt]:
    """Return the validation examples as prompts, or the training examples if there is no validation data.

    Used for scenes, because each scene has a single correct output.
    """
    if clips is None:
        return []
    validation = clips.plan.validation
    group = "validation scenes" if validation else "training scenes"
    return [Prompt(w.caption, group, images=w) for w in validation or clips.plan.train]


def _limited(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """Select `limit` prompts in their original order, with about equally many from each group."""
    turn: dict[str, int] = {}
    rank = []
    for i, prompt in enumerate(prompts):
        turn[prompt.group] = turn.get(prompt.group, 0) + 1
        rank.append((turn[prompt.group], i))
    return [prompts[i] for i in sorted(i for _, i in sorted(rank)[:limit])]


# --- models to compare --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One of the two models that an evaluation compares."""

    role: str
    """Role of the model, `base` or `tuned`; also the name of its folder in the report."""
    name: str
    folder: Path | None
    """Folder of the trained weights; None for the base model."""
    step: int | None


def _config(place: Run, device: str | None, overrides: dict[str, Any]) -> recipe.Config:
    """Return the run's recipe for evaluation in one process.

    `overrides` replace sampling settings. `device` replaces the device of the recipe, unless it is None.
    """
    wrong = [k for k in overrides if k not in SAMPLING]
    if wrong:
        raise ValueError(f"evaluate: unknown setting `{wrong[0]}`; available: {', '.join(SAMPLING)}")
    config = place.config()
    sample = resolve_sample(config, **overrides)
    values = {"sample": json.loads(sample.model_dump_json()), "runtime": {"world_size": None}}
    if device:
        values["runtime"]["device"] = device
    return recipe.build(recipe.merge(json.loads(config.model_dump_json()), values))


def _sides(place: Run, family: families.Family, against: str, checkpoint: str | None) -> tuple[_Side, _Side]:
    def side(role: str, wanted: str | None) -> _Side:
        if wanted == BASE:
            return _Side(role, BASE, None, 0)
        folder = trained_folder(place, wanted, family)
        name = folder.parent.name if folder.parent.name.startswith("step-") else "tuned"
        header = read_header(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
        newest = place.checkpoints()[-1:]
        number = name if name != "tuned" else header.get("inlaid_step") or (newest[0].name if newest else "")
        step = number.removeprefix("step-")
        return _Side(role, name, folder, int(step) if step.isdigit() else None)

    sides = side("base", against), side("tuned", checkpoint)
    if sides[0].folder == sides[1].folder:
        raise ValueError(
            f"evaluate: {sides[1].name} would be compared with itself; choose a different `checkpoint`"
        )
    return sides


def _networks(
    config: recipe.Config, family: families.Family, sides: Sequence[_Side], ctx: Context
) -> Iterator[tuple[nn.Module, Any]]:
    """Yield (denoiser, pipeline) for each of the two models.

    Models with adapters share one denoiser. After full fine-tuning, each model has its own denoiser.
    """
    full = config.tuner.kind == "full"
    denoiser: nn.Module | None = None
    pipeline: Any = None
    for side in sides:
        if denoiser is None or full:
            say(
                f"loading {config.model.checkpoint}"
                if side.folder is None or not full
                else f"loading {side.folder}"
            )
            denoiser = pipeline = None  # free memory first: two networks may not fit
            denoiser = (
                family.load_denoiser(ctx.precision, folder=side.folder if full else None)
                .to(ctx.device)
                .eval()
            )
            pipeline = family.pipeline(denoiser=denoiser, device=ctx.device, dtype=ctx.precision)
        elif pipeline.get_list_adapters():
            pipeline.unload_lora_weights()
        if side.folder is not None and not full:
            load_into_pipeline(family, pipeline, side.folder)
        yield denoiser, pipeline


def _clips(
    config: recipe.Config, family: families.Family, place: Run, ctx: Context
) -> tuple[CachedDataset | None, list[str]]:
    """Return the cached dataset of the run and a list of notes.

    If the training clips can no longer be used, the dataset is None and a note gives the reason.
    """
    try:
        return build_cache(config, family, place, ctx), []
    except ValueError as error:
        note = f"No validation loss: the training clips can no longer be used. {error}"
        say(note)
        return None, [" ".join(note.split())]


def _reference_metrics(
    place: Run, clips: CachedDataset | None, folder: Path, notes: list[str]
) -> dict[str, float] | None:
    """Return the mean metrics of up to `REFERENCE_CLIPS` training clips, or None if no clip can be measured.

    Also write a contact sheet of training clips to `folder`. For each clip that cannot be read, append a
    message to `notes`.
    """
    sheet = place.folder / "check" / "contact_sheet.png"
    if sheet.is_file():
        shutil.copyfile(sheet, folder / "clips.png")
    if clips is None:
        return None
    windows = [w for w in clips.plan.train if not w.clip.embedding]
    if not windows:
        return None
    chosen = np.unique(np.linspace(0, len(windows) - 1, REFERENCE_CLIPS).round().astype(int))
    found, rows = [], []
    with progress("read clips", len(chosen), "clip") as advance:
        for window in (windows[i] for i in chosen):
            advance()
            try:
                frames = window.read()
            except ValueError as error:
                notes.append(f"A training clip could not be read: {error}")
                continue
            found.append(measure_frames(frames))
            frames = compositing.preview(frames) if frames.shape[-1] == 4 else frames
            rows.append(SheetRow(window.clip.name, window.caption, frames))
    if rows and not sheet.is_file():
        contact_sheet(rows, folder / "clips.png", title="Training clips")
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]} if found else None


def _facts(config: recipe.Config, folder: Path | None) -> dict[str, str]:
    """Return labels and values that describe the trained weights in the report, such as the rank."""
    tuner = config.tuner
    if tuner.kind == "full":
        trained = "some weights" if tuner.targets else "all weights"
    else:
        trained = f"{KINDS[tuner.kind]}, rank {tuner.rank}"
    return {"trained": trained, **(inspect_path(folder).facts if folder else {})}


def _sampling(family: families.Family, encoded: Prompts) -> dict[str, Any]:
    """Return the sampling settings of the generated outputs, for the report."""
    if family.modality != "video":
        return modality_of(family.modality).settings(encoded.sample, encoded.fps)
    return {**{k: getattr(encoded.sample, k) for k in SAMPLING}, "fps": encoded.fps}


def _environment(ctx: Context) -> dict[str, Any]:
    precision = str(ctx.precision).removeprefix("torch.")
    return {**environment(), "device": str(ctx.device), "precision": precision}


# --- measurements -------------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    """Outputs and losses of the base model and of the fine-tuned model, for the same prompts and clips.

    The outputs of the base model must be generated first.
    """

    prompts: Sequence[Prompt]
    encoded: Prompts
    count: int
    folder: Path
    """Output folder, with one subfolder of videos per model."""
    scratch: Path
    """Temporary folder for the base model's outputs, because two sets of long videos may not fit in
    memory."""
    metrics: ModalityMetrics
    _losses: dict[str, list[list[float]]] = field(default_factory=dict)
    _outputs: dict[str, list[Output]] = field(default_factory=dict)
    _distances: list[float] = field(default_factory=list)

    def measure_loss(
        self,
        side: _Side,
        step: DenoisingStep,
        denoiser: nn.Module,
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        """Compute the validation loss of the base model or of the fine-tuned model."""
        self._losses[side.role] = []
        noun = modality_of(step.family.modality).one
        with progress(f"loss, {side.name}", len(batches), noun, show=bool(batches)) as advance:
            for batch in batches:
                self._losses[side.role] += step.validation(denoiser, [batch], device).tolist()
                advance()

    def generate(self, side: _Side, family: families.Family, pipeline: Any) -> None:
        """Generate the outputs of one of the two models, measure them, and save preview images."""
        found: list[tuple[dict[str, float], Any, bool | None, Image.Image]] = []

        def receive(i: int, j: int, output: Any) -> None:
            prompt = self.prompts[i]
            metrics, parts = self.metrics.measure(output, prompt)
            matches = self.metrics.matches_prompt(metrics)
            if prompt.judge is not None:
                matches = bool(prompt.judge(output))
            found.append((metrics, parts, matches, self.metrics.preview(output)))
            path, array = self.scratch / f"{i}-{j}.npy", self.metrics.comparable(output)
            if side.role == "base":
                np.save(path, array)
            else:
                self._distances.append(self.metrics.distance(np.load(path), array))
                path.unlink()

        about = {"checkpoint": side.name, "strength": 0.0 if side.folder is None else 1.0}
        out = self.folder / side.role
        paths = generate_samples(
            family, pipeline, self.encoded, out, about, count=self.count, on_output=receive
        )
        self._outputs[side.role] = []
        for path, (metrics, parts, matches, image) in zip(paths, found, strict=True):
            image.save(path.with_suffix(".png"))
            name = path.relative_to(self.folder).as_posix()
            self._outputs[side.role].append(Output(name, metrics, matches, parts))

    def pairs(self) -> list[Pair]:
        """Pair the outputs of the base model and the tuned model by prompt and seed."""
        first = self.encoded.sample.seed
        each = [(p, first + j) for p in self.prompts for j in range(self.count)]
        columns = zip(each, self._outputs["base"], self._outputs["tuned"], self._distances, strict=True)
        return [Pair(p.text, p.group, seed, a, b, d) for (p, seed), a, b, d in columns]

    def validation(self, step: DenoisingStep, batches: Sequence[Batch]) -> ValidationLoss | None:
        """Return the validation losses of the base model and of the fine-tuned model.

        Return None if there are no validation clips.
        """
        if not batches:
            return None
        names = [name for b in batches for name in b.names]
        levels = step.objective.quantile(torch.tensor(QUANTILES)).tolist()
        noun = modality_of(step.family.modality).one
        return ValidationLoss(
            names, list(QUANTILES), levels, self._losses["base"], self._losses["tuned"], noun
        )


def save_report(report: Report, folder: Path) -> None:
    """Write `report.json` and `report.html` to a folder that already contains the videos."""
    from inlaid.evaluation.page import render

    text = json.dumps(as_json(report), indent=2, ensure_ascii=False, default=str)
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "report.html").write_text(render(report, folder), "utf-8")
