"""Generation of videos or scenes from a run folder and prompts, through the stock pipeline.

Also used for samples during training.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from inlaid import CallableModule, alpha, cache, families, formats, lycoris, mediums, runtime
from inlaid import config as recipe
from inlaid.console import progress, say
from inlaid.mediums import Images, Picture
from inlaid.objectives import FlowMatching
from inlaid.runtime import Run

BASE = "base"
"""Checkpoint name of the base model."""


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts with their sampling settings."""

    texts: Sequence[str]
    items: Sequence[Mapping[str, Tensor]]
    negative: Mapping[str, Tensor]
    sample: recipe.Sample
    fps: float
    images: Sequence[Sequence[Picture]] = ()
    """Input images of each prompt; empty if the family takes none."""


def resolve_sample(config: recipe.Config, **overrides: Any) -> recipe.Sample:
    """Return the `sample` section with overrides that are not None, and size and frames taken from `data`."""
    given = {k: v for k, v in overrides.items() if v is not None}
    try:
        sample = recipe.Sample.model_validate({**config.sample.model_dump(), **given})
    except ValidationError as error:
        raise ValueError(recipe.explain(error, "options", section="sample")) from None
    return sample.model_copy(
        update={"size": sample.size or config.data.size, "frames": sample.frames or max(config.data.frames)}
    )


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    images: Sequence[Sequence[str]] = (),
    count: int = 1,
    checkpoint: str | None = None,
    strength: float = 1.0,
    out: Path | None = None,
    device: str | None = None,
    **overrides: Any,
) -> list[Path]:
    """Generate videos or scenes with the trained weights of a run.

    Args:
        run: run folder.
        prompts: one or more prompts.
        images: for image-to-video, the first image of each prompt and the last image if the checkpoint takes
            it; for scenes, input image and segmentation.
        count: videos per prompt; video i uses seed + i.
        checkpoint: `step-000500` or `500`; `base` for the base model. Default: the run's final adapter.
        strength: 0 is the base model, 1 the trained model. Linear for LoRA, not for DoRA; 0 or 1 after full
            fine-tuning.
        out: output folder. Default: `samples/generated` in the run.
        device: same values as `runtime.device`. Default: the recipe's device.
        overrides: fields of the recipe's `sample` section: size, frames, steps, guidance, seed,
            negative_prompt, transparent.

    Returns:
        Paths of the mp4 files (glb for scenes). Each has a JSON file beside it; in a transparent run also the
        files listed by `outputs`.

    Raises:
        ValueError: for any problem the user can fix.
    """
    if not all(p.strip() for p in prompts) or not (prompts or images):
        raise ValueError("generate: needs a prompt that is not empty")
    if not math.isfinite(strength):
        raise ValueError(f"generate: strength {strength} is not a finite number such as 0.5")
    place = Run(Path(run))
    config = place.config()
    values: dict[str, Any] = {"world_size": None, "device": device or config.runtime.device}
    config = recipe.build(recipe.merge(json.loads(config.model_dump_json()), {"runtime": values}))
    family = alpha.family(config)
    if isinstance(config.tuner, recipe.Codec):
        raise ValueError(
            f"{run}: this run trained an RGBA VAE, which cannot generate from prompts: set alpha.vae to "
            f"{place.folder / 'codec'} in a recipe that trains the denoiser, or view reconstructions "
            "with `inlaid evaluate`"
        )
    prompts = mediums.of(family.medium).texts(prompts, images)
    sample = resolve_sample(config, **overrides)
    wrong = family.grid.problems(sample.frames or 1, *(sample.size or (1, 1)))
    if overrides.get("transparent") and family.channels != 4:
        wrong.append(f"--transparent: {run} has alpha.kind: opaque, so its videos have no alpha; omit it")
    wrong += [f"--image: {p}" for p in family.missing_images(len(prompts), images)]
    if wrong:
        raise ValueError("generate: " + "; ".join(wrong))
    if config.tuner.kind == "full" and strength not in (0, 1):
        raise ValueError(
            f"generate: strength {strength:g} is not possible for a full fine-tune; use 0 or 1, or train a "
            "LoRA"
        )
    folder = out or place.folder / "samples" / "generated"
    name = None
    if folder.suffix == ".glb" and mediums.of(family.medium).makes == "scene":
        if len(prompts) * count > 1:
            raise ValueError(
                f"generate: {folder} is one file for {len(prompts) * count} scenes; pass a folder"
            )
        folder, name = folder.parent, folder.stem
    if folder.is_file():
        raise ValueError(f"generate: {folder} is a file; pass a folder with --out")
    weights = None if checkpoint == BASE or strength == 0 else trained(place, checkpoint, family)
    with runtime.start(config) as ctx:
        encoded = encode(config, family, place, prompts, sample, ctx, images)
        pipeline = load_pipeline(config, family, weights, strength, ctx)
        about = {"checkpoint": checkpoint or "adapter", "strength": strength, "run": str(run)}
        return draw(family, pipeline, encoded, folder, about, count=count, name=name)


def encode(
    config: recipe.Config,
    family: families.Family,
    run: Run,
    prompts: Sequence[str],
    sample: recipe.Sample,
    ctx: runtime.Context,
    images: Sequence[Images] = (),
) -> Prompts:
    """Encode prompts through the run's cache and read their images; cached prompts need no text encoder."""
    medium = mediums.of(family.medium)
    pictures = [medium.read(family, each, sample) for each in images]
    store = cache.Cache(run.cache(config))
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


def trained(run: Run, checkpoint: str | None, family: families.Family) -> Path:
    """Return the folder of the trained weights of a run or of one of its checkpoints.

    Adapters are validated here, before anything large is loaded: a pipeline would reject them late or not at
    all.

    Raises:
        ValueError: if nothing is trained yet, or the adapter is damaged or belongs to a different network.
    """
    if checkpoint is not None:
        folder = run.checkpoint(checkpoint) / "adapter"
    elif run.adapter.is_dir():
        folder = run.adapter
    elif run.checkpoints():
        newest = run.checkpoints()[-1]
        say(f"the run is not finished; using checkpoint {newest.name}")
        folder = newest / "adapter"
    else:
        raise ValueError(
            f"{run.folder}: nothing is trained yet; run `inlaid train` first, or use --checkpoint base"
        )
    if run.config().tuner.kind != "full":
        network = family.load_denoiser(torch.float32, meta=True)
        if not lycoris.load(network, folder):
            formats.read(folder, family, shapes=formats.shapes(network))
            for name, part in formats.companions(network).items():
                formats.read(folder / name, family, shapes=formats.shapes(part))
        try:
            for file in folder.glob("*.safetensors"):
                family.accept(runtime.header(file))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    return folder


def load_pipeline(
    config: recipe.Config,
    family: families.Family,
    folder: Path | None,
    strength: float,
    ctx: runtime.Context,
) -> Any:
    """Return the stock pipeline with the trained weights in `folder`, or of the base model if it is None.

    Raises:
        ValueError: if the pipeline does not accept the weights.
    """
    options: dict[str, Any] = {"device": ctx.device, "dtype": ctx.precision}
    if folder is None:
        return family.pipeline(denoiser=None, **options)
    if config.tuner.kind == "full":
        denoiser = family.load_denoiser(ctx.precision, folder=folder)
        return family.pipeline(denoiser=denoiser, **options)
    pipeline = family.pipeline(denoiser=None, **options)
    put(family, pipeline, folder)
    if strength != 1:
        family.weaken(pipeline, strength)
        if config.tuner.kind == "dora":
            say("note: DoRA is not linear in its strength; 0.5 is not half the effect")
    return pipeline


def put(family: families.Family, pipeline: Any, folder: Path) -> None:
    """Load an adapter into a stock pipeline, under the name `inlaid`.

    Raises:
        ValueError: if the pipeline does not accept the adapter.
    """
    network = getattr(pipeline, family.component)
    if not lycoris.load(network, folder):
        family.load_adapter(pipeline, folder)
        for name, part in formats.companions(network).items():
            formats.attach(part, formats.read(folder / name, family, shapes=formats.shapes(part)))
    if not pipeline.get_list_adapters():
        raise ValueError(
            f"{folder}: the pipeline loaded no weights from it; `inlaid inspect {folder}` lists its content"
        )


def draw(
    family: families.Family,
    pipeline: Any,
    prompts: Prompts,
    folder: Path | None,
    about: Mapping[str, Any],
    *,
    count: int = 1,
    show: bool = True,
    name: str | None = None,
    seen: Callable[[int, int, Any], None] | None = None,
) -> list[Path]:
    """Generate `count` outputs per prompt and write each in the format of its modality, with a JSON file.

    Args:
        family: family of the pipeline.
        pipeline: result of `load_pipeline`.
        prompts: encoded prompts and sampling settings.
        folder: output folder, created if missing. None writes nothing, for processes that only hold a shard
            of the weights.
        about: additional values for each JSON file.
        count: outputs per prompt.
        show: show a progress bar.
        name: file name without suffix, for a single output. Default: number, prompt and seed.
        seen: callback with (prompt index, output index, result of `Family.sample`) for each output.

    Returns:
        Paths of the written files.
    """
    pipeline.set_progress_bar_config(disable=True)
    sample, paths, medium = prompts.sample, [], mediums.of(family.medium)
    assert sample.size and sample.frames
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with progress("draw", len(prompts.texts) * count, medium.makes, show=show) as advance:
        for i, (text, item) in enumerate(zip(prompts.texts, prompts.items, strict=True)):
            images = prompts.images[i] if prompts.images else ()
            for j in range(count):
                made = family.sample(
                    pipeline,
                    item,
                    prompts.negative,
                    size=sample.size,
                    frames=sample.frames,
                    steps=sample.steps,
                    guidance=sample.guidance,
                    generator=torch.Generator().manual_seed(sample.seed + j),
                    images=[each.pixels for each in images],
                    **medium.asked(sample),
                )
                if folder is None:
                    continue
                settings = medium.settings(sample, prompts.fps)
                stem = folder / (name or f"{i:02d}-{slug(text)}-seed{sample.seed + j}")
                path, facts = medium.write(stem, made, sample, prompts.fps)
                values = {"prompt": text, "seed": sample.seed + j, **settings, **facts, **about}
                if images:
                    values["images"] = [each.name for each in images]
                values |= {"versions": runtime.environment()["packages"]}
                path.with_suffix(".json").write_text(
                    json.dumps(values, indent=2, ensure_ascii=False), "utf-8"
                )
                paths.append(path)
                if seen:
                    seen(i, j, made)
                advance()
    return paths


def outputs(path: Path) -> list[Path]:
    """Return the files with alpha of a generated video, as listed in its JSON file, then the mp4 file."""
    values = json.loads(path.with_suffix(".json").read_text("utf-8"))
    return [*(path.with_name(name) for name in values.get("files", ())), path]


def slug(text: str) -> str:
    """Return the first words of a prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "prompt"


def card(
    config: recipe.Config, family: families.Family, step: int, prompts: Sequence[str], objective: object
) -> str:
    """Return the model card of a run."""
    if isinstance(config.tuner, recipe.Codec):
        return alpha.codec.card(config, config.tuner, family.name, step)
    what = "" if isinstance(objective, FlowMatching) else "v-prediction on the checkpoint's schedule"
    return formats.model_card(
        config,
        step=step,
        prompts=list(prompts) if family.text_length else [],
        task=mediums.of(family.medium).task(family),
        objective=what,
        warnings=family.warnings(),
    )


sys.modules[__name__].__class__ = CallableModule
