"""Plan the dataset of a run, and store its encoded clips, captions and sample prompts in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from inlaid import config as recipe
from inlaid import families
from inlaid.console import progress, say
from inlaid.data import cache
from inlaid.data.batch import Batch
from inlaid.data.cache import Built, Cache
from inlaid.data.modality import ImageSource, Modality, NamedImage, modality_of
from inlaid.data.plan import Plan, require_usable
from inlaid.data.prompts import Prompts, resolve_sample
from inlaid.files import atomic
from inlaid.runs.folder import Run
from inlaid.runs.launch import Context

MAX_VALIDATION_CLIPS = 16
"""Maximum number of validation windows on which the validation loss is measured."""


@dataclass(frozen=True)
class CachedDataset:
    """Dataset plan of a run, and the names under which its latents and text embeddings are cached."""

    plan: Plan
    store: Cache
    media: Sequence[str]
    text: Sequence[str]
    validation_media: Sequence[str]
    validation_text: Sequence[str]
    empty: str
    """Name under which the text embedding of the empty caption is cached."""
    prompts: Prompts
    built: Built

    def validation_batches(self, family: families.Family) -> list[Batch]:
        """Return the batches for the validation loss.

        Each of the first `MAX_VALIDATION_CLIPS` validation windows is a batch.
        """
        rows = zip(self.plan.validation, self.validation_media, self.validation_text, strict=True)
        return [
            Batch.of(
                family,
                [self.store.read("media", m)],
                [self.store.read("text", t)],
                [w.clip.name],
                w.clip.name,
            )
            for w, m, t in list(rows)[:MAX_VALIDATION_CLIPS]
        ]


def _report_failed(
    config: recipe.Config,
    run: Run,
    modality: Modality,
    failed: Mapping[str, str],
    quarantined: Mapping[str, str] | None,
) -> None:
    """Report clips that cannot be used, and list them in `quarantine.json`.

    Args:
        config: the recipe.
        run: the run folder.
        modality: modality of the data; it has the word for a clip in messages, such as `scene`.
        failed: error messages of the clips that could not be encoded, by path.
        quarantined: problems of the clips that were excluded before encoding, by name; None in processes that
            write no files.

    Raises:
        ValueError: if clips could not be encoded and `data.bad_clips` is `stop`.
    """
    if failed and config.data.bad_clips == "stop":
        lines = "\n".join(f"  {k}: {v}" for k, v in sorted(failed.items()))
        raise ValueError(
            f"{len(failed)} {modality.one}(s) could not be encoded:\n{lines}\n"
            "fix or remove them, or set data.bad_clips=quarantine; the others are cached"
        )
    if quarantined is not None and (failed or quarantined):
        listed = {**quarantined, **failed}
        path = run.folder / "quarantine.json"
        with atomic(path) as part:
            part.write_text(json.dumps(listed, indent=2, ensure_ascii=False), "utf-8")
        say(f"excluded {len(listed)} {modality.one}(s) with errors; {path} lists them with the reasons")


def build_cache(
    config: recipe.Config,
    family: families.Family,
    run: Run,
    ctx: Context,
    begin: Callable[[Plan, Cache], None] | None = None,
) -> CachedDataset:
    """Plan the dataset and fill the cache: clips, captions, the empty caption and sample prompts.

    `begin` is called with the plan and the cache. At that time, the clips have been checked, and nothing has
    been encoded.

    Raises:
        ValueError: if clips have errors and `data.bad_clips` is `stop`, if no clip is left to train on, or if
            samples are requested and there are no prompts.
    """
    store = Cache(run.cache(config))
    modality = modality_of(family.modality)
    with progress("probe", 1, modality.one, show=ctx.main) as advance:
        plan = modality.plan(config, family, lambda n, of: advance(done=n, total=of), store.probes)
    quarantined = {p.name: f"{p.code}: {p.message}" for p in require_usable(plan, config.data.bad_clips)}
    windows = [*plan.train, *plan.validation]
    names = store.media_names(family, windows)
    dtype = ctx.precision if ctx.device.type == "cuda" else torch.float32
    sample = resolve_sample(config)
    asked = modality.texts(sample.prompts, sample.images) if sample.prompts or sample.images else []
    texts = asked or list(dict.fromkeys(w.caption for w in windows if w.caption))[:4]
    words = list(dict.fromkeys([*(w.words for w in windows), "", sample.negative_prompt, *texts]))
    text_names = dict(zip(words, store.text_names(family, words, dtype), strict=True))
    if begin:
        begin(plan, store)
    mine = slice(ctx.rank, None, ctx.world)
    with progress(f"cache {modality.one}s", len(names[mine]), modality.one, show=ctx.main) as advance:
        built = cache.build_media(
            store,
            family,
            windows[mine],
            names[mine],
            device=ctx.device,
            workers=config.runtime.workers,
            advance=advance,
        )
    with progress("cache text", len(words[mine]), "caption", show=ctx.main) as advance:
        cache.build_text(
            store,
            family,
            words[mine],
            list(text_names.values())[mine],
            device=ctx.device,
            dtype=dtype,
            advance=advance,
        )
    if ctx.main:
        store.remember()
    failed = {k: v for part in ctx.gather(built.failed) for k, v in part.items()}
    _report_failed(config, run, modality, failed, quarantined if ctx.main else None)
    train, validation = (
        [w for w in part if str(w.clip.path) not in failed] for part in (plan.train, plan.validation)
    )
    plan = replace(plan, train=train, validation=validation)
    if not train:
        raise ValueError(f"no {modality.one} is left to train on: " + "; ".join(failed.values()))
    name_of = dict(zip(windows, names, strict=True))
    images: list[list[NamedImage]] = []
    if family.images and sample.size and sample.frames:
        first = {w.caption: w for w in reversed([*train, *validation]) if not w.clip.embedding}
        texts = asked or [t for t in texts if t in first]
        each: Sequence[ImageSource] = sample.images or [first[t] for t in texts]
        images = [modality.read(family, e, sample) for e in each]
    if sample.every and not texts:
        raise ValueError("sample.every: precomputed latents provide no prompts; set sample.prompts")
    return CachedDataset(
        plan,
        store,
        [name_of[w] for w in plan.train],
        [text_names[w.words] for w in plan.train],
        [name_of[w] for w in plan.validation],
        [text_names[w.words] for w in plan.validation],
        text_names[""],
        Prompts(
            texts,
            [store.read("text", text_names[t]) for t in texts],
            store.read("text", text_names[sample.negative_prompt]),
            sample,
            config.data.fps or family.fps,
            images,
        ),
        built,
    )
