"""Preparation of sampling: settings with defaults filled in, and text embeddings of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from inlaid import config as recipe
from inlaid import families
from inlaid.console import progress, say
from inlaid.data import cache
from inlaid.data.cache import Cache
from inlaid.data.captions import long_texts
from inlaid.data.modality import ImageSource, NamedImage, modality_of
from inlaid.runs.folder import Run
from inlaid.runs.launch import Context


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts with the settings for sampling."""

    texts: Sequence[str]
    items: Sequence[Mapping[str, Tensor]]
    negative: Mapping[str, Tensor]
    sample: recipe.Sample
    fps: float
    images: Sequence[Sequence[NamedImage]] = ()
    """Conditioning images of each prompt; empty if the model family takes no images."""


def resolve_sample(config: recipe.Config, **overrides: Any) -> recipe.Sample:
    """Return the `sample` section of a recipe, after applying overrides.

    If the section sets no size, it gets the size of the `data` section. If it sets no number of frames, it
    gets the largest number of frames in the `data` section. Overrides that are None are ignored.

    Raises:
        ValueError: if an override is invalid.
    """
    given = {k: v for k, v in overrides.items() if v is not None}
    try:
        sample = recipe.Sample.model_validate({**config.sample.model_dump(), **given})
    except ValidationError as error:
        raise ValueError(recipe.explain(error, "options", section="sample")) from None
    return sample.model_copy(
        update={"size": sample.size or config.data.size, "frames": sample.frames or max(config.data.frames)}
    )


def encode_prompts(
    config: recipe.Config,
    family: families.Family,
    run: Run,
    prompts: Sequence[str],
    sample: recipe.Sample,
    ctx: Context,
    images: Sequence[ImageSource] = (),
) -> Prompts:
    """Encode prompts and read their conditioning images.

    Text embeddings are read from and written to the run's cache; the text encoder is loaded only if a prompt
    is not cached.
    """
    modality, sample = modality_of(family.modality), family.resolved(sample)
    pictures = [modality.read(family, each, sample) for each in images]
    for text, why in long_texts(family, [*prompts, sample.negative_prompt]).items():
        say(f"warning: the prompt `{text[:40]}...` has {why}", show=ctx.main)
    store = Cache(run.cache(config))
    dtype = ctx.precision if ctx.device.type == "cuda" else torch.float32
    texts = list(dict.fromkeys([*prompts, sample.negative_prompt]))
    names = dict(zip(texts, store.text_names(family, texts, dtype), strict=True))
    with progress("encode prompts", len(texts), "prompt") as advance:
        cache.build_text(
            store, family, texts, list(names.values()), device=ctx.device, dtype=dtype, advance=advance
        )
    store.remember()
    items = [store.read("text", names[p]) for p in prompts]
    return Prompts(
        prompts,
        items,
        store.read("text", names[sample.negative_prompt]),
        sample,
        config.data.fps or family.fps,
        pictures,
    )
