"""Results of an evaluation: metrics, a verdict in plain text, `report.json` and `report.html`.

`report.json` is for programs, and `report.html` is for people. The module `page` renders the HTML. The report
folder is written atomically.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inlaid.evaluation import scene
from inlaid.evaluation.metrics import alpha, video
from inlaid.evaluation.metrics.metric import Metric

if TYPE_CHECKING:
    from rich.table import Table


FORMAT = 1
"""Format version of `report.json`, increased when the meaning of a field changes."""

METRICS: Mapping[str, Metric] = {**video.METRICS, **alpha.METRICS, **alpha.TRUTH, **scene.METRICS}
"""Descriptions of the metrics of all modalities, by metric name."""

MIN_LOSS_CHANGE = 0.01
"""Minimum relative change of the validation loss; smaller changes do not count as a change."""

MIN_MATCH_CHANGE = 0.2
"""Minimum change of the share of outputs that match their prompts; smaller changes do not count as a
change."""

MIN_DIFFERENCE = 0.002
"""Mean difference below which two videos count as identical in appearance. It is a share of the value range:
0.002 is half a level of 255."""

FULL_COVERAGE = 99.9
"""Mean alpha in percent above which a video counts as fully opaque. Below 100 minus this value, it counts as
fully transparent."""

MIN_CHECKPOINT_GAIN = 0.02
"""Minimum relative decrease of the validation loss for which an earlier checkpoint is recommended."""


@dataclass(frozen=True)
class Output:
    """Video or scene that a model generated, with its metrics."""

    file: str
    """Path of the output, relative to the report folder. A PNG preview is beside it, with the same name
    except for the suffix."""
    metrics: Mapping[str, float]
    """Metrics of the output by name. A transparent video also has `alpha.METRICS`, and `alpha.TRUTH` if its
    true alpha is known."""
    matches_prompt: bool | None = None
    """True if the output matches its prompt, according to the function `Prompt.judge` or a metric. None if
    neither can decide."""
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metrics of each object of a scene, by object name."""


@dataclass(frozen=True)
class Pair:
    """Outputs of the base model and of the fine-tuned model for the same prompt and seed."""

    prompt: str
    group: str
    seed: int
    base: Output
    tuned: Output
    distance: float
    """Difference between the two outputs, from 0 to 1: the mean absolute difference for videos, and
    `scene.distance` for scenes."""


@dataclass(frozen=True)
class ValidationLoss:
    """Losses of the base model and the fine-tuned model on the same validation clips, with the same noise."""

    clips: Sequence[str]
    quantiles: Sequence[float]
    """Quantiles of the noise level in training. Losses are measured at these quantiles."""
    levels: Sequence[float]
    """Noise levels t of these quantiles, in [0, 1]."""
    base: Sequence[Sequence[float]]
    """Losses (clips, quantiles) of the base model. The field `tuned` contains the losses of the fine-tuned
    model."""
    tuned: Sequence[Sequence[float]]
    noun: str = "clip"
    """Word for a validation example, in the singular: `clip` or `scene`."""

    @property
    def means(self) -> tuple[float, float]:
        """Mean losses of the base model and of the fine-tuned model."""
        return float(np.mean(self.base)), float(np.mean(self.tuned))

    @property
    def change(self) -> float:
        """Relative change of the mean loss from the base to the fine-tuned model; negative is better."""
        base, tuned = self.means
        return tuned / base - 1

    @property
    def better(self) -> int:
        """Number of clips on which the fine-tuned model has a lower mean loss than the base model."""
        return int((np.mean(self.tuned, axis=1) < np.mean(self.base, axis=1)).sum())


@dataclass(frozen=True)
class Group:
    """Results of a group of prompts: mean metrics, and numbers of outputs that match their prompts."""

    name: str
    videos: int
    base: Mapping[str, float]
    tuned: Mapping[str, float]
    distance: float
    judged: int
    """Number of pairs in which both outputs were checked against the prompt."""
    base_matches: int
    tuned_matches: int

    @property
    def match_gain(self) -> float:
        """Share of outputs that match their prompt: fine-tuned model minus base model, in [-1, 1].

        The result is 0 if no outputs were checked.
        """
        return (self.tuned_matches - self.base_matches) / self.judged if self.judged else 0.0


@dataclass(frozen=True)
class Verdict:
    """Conclusion of an evaluation in plain text."""

    tone: Literal["good", "unclear", "bad"]
    headline: str
    reasons: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """Complete results of an evaluation, as written to `report.json` and `report.html`."""

    run: str
    """Name of the run folder."""
    folder: Path
    """Path of the report folder."""
    names: tuple[str, str]
    """Names of the two compared models: `base` or a checkpoint for the first, `tuned` or a checkpoint for the
    second."""
    step: int | None
    """Training step of the fine-tuned model; None if unknown."""
    pairs: Sequence[Pair]
    validation: ValidationLoss | None
    training: Mapping[str, float] | None
    """Mean metrics of some training clips, as a reference for both models."""
    sampling: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Recipe of the run."""
    environment: Mapping[str, Any]
    adapter: Mapping[str, str]
    """Values that describe the trained weights, such as kind and rank, by label."""
    curves: Sequence[Mapping[str, float]] = ()
    """Records of the run's `metrics.jsonl`, for the charts."""
    notes: Sequence[str] = ()
    """Sentences about measurements that are missing or incomplete, with the reasons."""
    created: str = ""
    seconds: float = 0.0
    makes: str = "video"
    """Word for an output, in the singular: `video` or `scene`."""
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", assess(self))

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Descriptions of the metrics that all outputs have, in display order."""
        return shared_metrics([v for p in self.pairs for v in (p.base, p.tuned)])

    @property
    def path(self) -> Path:
        """Path of the HTML page."""
        return self.folder / "report.html"

    @property
    def groups(self) -> list[Group]:
        """Mean metrics of each prompt group, in the order of the prompts."""
        names = dict.fromkeys(p.group for p in self.pairs)
        return [summarize(name, [p for p in self.pairs if p.group == name]) for name in names]

    @property
    def total(self) -> Group | None:
        """Mean metrics over all pairs of outputs (base and fine-tuned model); None if there are no pairs."""
        return summarize("all", self.pairs) if self.pairs else None


def shared_metrics(outputs: Sequence[Output]) -> Mapping[str, Metric]:
    """Return the metrics that all outputs have; keys are the names of the metrics."""
    return {k: m for k, m in METRICS.items() if all(k in output.metrics for output in outputs)}


def summarize(name: str, pairs: Sequence[Pair]) -> Group:
    """Return the mean metrics of a prompt group, and how many outputs match their prompts.

    `pairs` contains at least one pair.
    """
    judged = [p for p in pairs if p.base.matches_prompt is not None and p.tuned.matches_prompt is not None]

    def means(outputs: Sequence[Output]) -> dict[str, float]:
        names = shared_metrics(outputs)
        return {k: float(np.mean([output.metrics[k] for output in outputs])) for k in names}

    return Group(
        name,
        len(pairs),
        means([p.base for p in pairs]),
        means([p.tuned for p in pairs]),
        float(np.mean([p.distance for p in pairs])),
        len(judged),
        sum(bool(p.base.matches_prompt) for p in judged),
        sum(bool(p.tuned.matches_prompt) for p in judged),
    )


# --- verdict ------------------------------------------------------------------------------------------------


def assess(report: Report) -> Verdict:
    """Return the verdict on a report.

    The share of outputs that match their prompts takes precedence over the validation loss.
    """
    loss, total = report.validation, report.total
    reasons, warnings = [], [*_metric_warnings(report), *_checkpoint_warnings(report), *report.notes]
    base, tuned = report.names
    for group in report.groups:
        if group.judged:
            of = f"{group.tuned_matches} of {group.judged} {tuned} {report.makes}s match the prompt"
            name = f"{group.name}: " if group.name else ""
            reasons.append(f"{name}{of}, {group.base_matches} of {group.judged} {base} {report.makes}s")
    if loss is not None:
        reasons.append(_loss_sentence(loss))
        if len(loss.clips) < 3:
            warnings.append(
                f"Only {count_of(len(loss.clips), f'validation {loss.noun}')} measured: unreliable result."
            )
    if total and total.distance < MIN_DIFFERENCE:
        same = "are identical in every pixel" if total.distance == 0 else "look identical"
        return Verdict(
            "bad",
            f"Nothing changed: the {report.makes}s of {base} and {tuned} {same}.",
            _sentences(reasons),
            warnings,
        )
    improved = [g for g in report.groups if g.match_gain >= MIN_MATCH_CHANGE]
    regressed = [g for g in report.groups if g.match_gain <= -MIN_MATCH_CHANGE]
    warnings = [*_regressions(regressed, report.makes), *warnings]
    tone, headline = _headline(loss, improved, regressed, f"{report.makes}s")
    return Verdict(tone, headline, _sentences(reasons), warnings)


def _headline(
    loss: ValidationLoss | None, improved: list[Group], regressed: list[Group], made: str
) -> tuple[Any, str]:
    worse = loss is not None and loss.change >= MIN_LOSS_CHANGE
    better = loss is not None and loss.change <= -MIN_LOSS_CHANGE and loss.better * 2 > len(loss.clips)
    if improved:
        best = max(improved, key=lambda g: g.match_gain)
        it = f"Improved {best.name}".rstrip()
        of = f"{best.tuned_matches} of {best.judged} {made} match the prompt"
        if regressed:
            return "unclear", f"{it}, but other prompts got worse: {of}, with fewer matches elsewhere."
        if worse:
            return "unclear", f"{it}, but validation loss rose: {of}."
        return "good", f"{it}: {of}, {best.base_matches} before training."
    if regressed:
        return "bad", f"Worse: fewer {made} match the prompt than before training."
    if loss is None:
        return "unclear", f"No validation loss: there are no validation clips. Compare the {made}."
    if better:
        return "good", f"Improved: validation loss fell {_percent(-loss.change)}."
    if worse:
        return "bad", f"The model does not generalize: validation loss rose {_percent(loss.change)}."
    if abs(loss.change) >= MIN_LOSS_CHANGE:
        return (
            "unclear",
            f"Unclear: validation loss fell {_percent(-loss.change)}, but not on most {loss.noun}s.",
        )
    return "unclear", f"Unclear: validation loss hardly changed ({signed(loss.change)})."


def _loss_sentence(loss: ValidationLoss) -> str:
    base, tuned = loss.means
    return (
        f"validation loss changed from {base:.4f} to {tuned:.4f} ({signed(loss.change)}), "
        f"lower on {loss.better} of {count_of(len(loss.clips), loss.noun)}"
    )


def _metric_warnings(report: Report) -> list[str]:
    """Return warnings about metrics of the fine-tuned model's videos.

    A metric causes a warning if it is much worse than for the base model and for the training clips. Fully
    opaque or fully transparent videos also cause warnings.
    """
    total, wanted = report.total, report.training or {}
    if total is None or total.distance < MIN_DIFFERENCE or report.makes != "video":
        return []
    out = []
    a, b = total.base, total.tuned
    if (
        b["flicker"] > max(1.5 * a["flicker"], 1.5 * wanted.get("flicker", 0))
        and b["flicker"] - a["flicker"] > 0.1
    ):
        out.append(f"The videos flicker more than before: {a['flicker']:.2f} to {b['flicker']:.2f} %.")
    for name, what in (("motion", "have much less motion"), ("sharpness", "are much blurrier")):
        if b[name] < 0.5 * min(a[name], wanted.get(name, np.inf)):
            digits = METRICS[name].digits
            out.append(f"The videos {what} than before: {name} {a[name]:.{digits}f} to {b[name]:.{digits}f}.")
    if b["consistency"] < min(a["consistency"], wanted.get("consistency", 1)) - 0.05:
        out.append(
            f"Frames are less consistent: consistency {a['consistency']:.3f} to {b['consistency']:.3f}."
        )
    covers = [p.tuned.metrics["coverage"] for p in report.pairs if "coverage" in p.tuned.metrics]
    opaque, transparent = sum(c > FULL_COVERAGE for c in covers), sum(c < 100 - FULL_COVERAGE for c in covers)
    for what, count in (("opaque", opaque), ("transparent", transparent)):
        if count:
            out.append(f"{count} of {len(covers)} videos are fully {what}: no usable alpha.")
    return out


def _checkpoint_warnings(report: Report) -> list[str]:
    """Return warnings about the validation losses that were logged during training.

    The first warning reports that the loss was lower at an earlier step. The second warning reports that the
    evaluation measured a different loss than training at the same step. One possible reason is that the clips
    have changed since.
    """
    curve = {int(x["step"]): x["validation_loss"] for x in report.curves if "validation_loss" in x}
    here = (
        report.step
        if report.step in curve
        else max((s for s in curve if s <= (report.step or 0)), default=None)
    )
    if report.validation is None or here is None:
        return []
    out = []
    best = min(curve, key=lambda s: curve[s])
    if best < here and curve[best] < (1 - MIN_CHECKPOINT_GAIN) * curve[here]:
        rise = curve[here] / curve[best] - 1
        out.append(
            f"Validation loss was lowest at step {best} and has risen {_percent(rise)} since: "
            "try a checkpoint near that step."
        )
    measured = report.validation.means[1]
    if here == report.step and abs(measured / curve[here] - 1) > MIN_LOSS_CHANGE:
        out.append(
            f"Training measured a validation loss of {curve[here]:.4f} at step {here}, this evaluation "
            f"{measured:.4f}: if the clips have changed since, some may have been used for training."
        )
    return out


def _regressions(regressed: Sequence[Group], makes: str) -> list[str]:
    return [
        "Worse on prompts"
        + (f" \N{LEFT DOUBLE QUOTATION MARK}{g.name}\N{RIGHT DOUBLE QUOTATION MARK}" if g.name else "")
        + f": {g.tuned_matches} of {g.judged} {makes}s match the "
        f"prompt, {g.base_matches} before training."
        for g in regressed
    ]


def _sentences(texts: Sequence[str]) -> list[str]:
    return [f"{t[0].upper()}{t[1:]}." for t in texts]


def count_of(n: int, what: str) -> str:
    """Format a count with its noun, such as `1 clip` or `2 clips`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def signed(share: float) -> str:
    """Format a relative change as a percentage with its sign; the minus sign is U+2212."""
    return f"{share:+.1%}".replace("-", "\N{MINUS SIGN}")


# --- files and terminal -------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Convert the report to JSON-compatible values."""
    values = asdict(report)
    del values["folder"], values["curves"]
    values["names"] = {"base": report.names[0], "tuned": report.names[1]}
    values["groups"] = [asdict(g) for g in [*report.groups, *([report.total] if report.total else [])]]
    if report.validation:
        base, tuned = report.validation.means
        values["validation"] |= {"base_mean": base, "tuned_mean": tuned, "change": report.validation.change}
    return {"format": FORMAT, "verdict": values.pop("verdict"), **values}


def format_value(metric: str, value: float) -> str:
    """Format the value of a metric; `METRICS` sets the number of digits."""
    return f"{value:.{METRICS[metric].digits}f}"


def summary_table(report: Report) -> Table:
    """Return the report as a table, at most 80 columns wide.

    The table has two rows per group of prompts: one for each of the two compared models.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    options: Any = {
        "title_justify": "left",
        "caption_justify": "left",
        "title_style": "bold",
        "caption_style": "",
    }
    options |= {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(title=escape(report.verdict.headline), caption=_caption(report), **options)
    total, groups = report.total, report.groups
    judged = total is not None and total.judged > 0
    metrics = {k: m for k, m in report.metrics.items() if m.brief}
    if "coverage" in metrics:  # all metrics exceed 80 columns
        metrics = {k: metrics[k] for k in ("motion", "coverage", "alpha_flicker", "haze")}
    table.add_column(f"group ({report.makes}s)")
    for name in ("model", *(["judge ok"] if judged else []), *(m.brief for m in metrics.values()), "differ"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for group in [*groups, *([total] if total and len(groups) != 1 else [])]:
        sides = ((group.base, group.base_matches), (group.tuned, group.tuned_matches))
        for i, (name, (values, yes)) in enumerate(zip(report.names, sides, strict=True)):
            cells = ["" if i else escape(f"{group.name or 'prompts'} ({group.videos})"), name]
            if judged:
                cells.append(f"{yes} of {group.judged}" if group.judged else "")
            cells += [format_value(k, values[k]) for k in metrics]
            table.add_row(*cells, f"{group.distance:.1%}" if i else "", end_section=i == 1)
    if report.training:
        gap = [""] if judged else []
        table.add_row(
            "training clips",
            "",
            *gap,
            *(format_value(k, report.training[k]) if k in report.training else "" for k in metrics),
            "",
        )
    return table


def _caption(report: Report) -> str:
    from rich.markup import escape

    lines = [] if report.validation is None else _sentences([_loss_sentence(report.validation)])
    return escape("\n".join([*lines, *(f"! {w}" for w in report.verdict.warnings)]))
