"""Generation of videos and 3D scenes from prompts, with the trained weights of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlaid import config as recipe
from inlaid import families
from inlaid.adapters.of_run import BASE, load_into_pipeline, trained_folder
from inlaid.alpha.opening import build_family
from inlaid.console import progress, say
from inlaid.data.modality import modality_of
from inlaid.data.prompts import Prompts, encode_prompts, resolve_sample
from inlaid.files import atomic
from inlaid.networks.rgba_vae_checkpoint import FOLDER
from inlaid.runs.folder import Run, environment
from inlaid.runs.launch import Context, start_processes

STRONGEST = 100.0
"""Maximum scale of an adapter."""


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
    """Generate videos or 3D scenes with the trained weights of a run.

    Args:
        run: run folder.
        prompts: one or more prompts; empty for scenes.
        images: conditioning images of each video or scene. An image-to-video checkpoint takes the first frame
            and, if it requires one, the last frame. A scene takes an input image and a segmentation.
        count: outputs per prompt or scene image; output i uses seed + i.
        checkpoint: checkpoint of the run, such as `step-000500` or `500`, or `base` for the base model.
            Default: the final weights.
        strength: scale of the adapter: 0 is the base model, 1 the fine-tuned model. The effect is linear for
            LoRA but not for DoRA. Must be 0 or 1 after full fine-tuning.
        out: output folder. Default: `samples/generated` in the run.
        device: same values as `runtime.device`. Default: the recipe's device.
        overrides: fields of the recipe's `sample` section: size, frames, steps, guidance, seed,
            negative_prompt, transparent; for scenes also grid, triangles and texture.

    Returns:
        Paths of the mp4 files (glb for scenes). Each has a JSON file beside it. For the paths of the
        additional files with alpha, see `outputs`.

    Raises:
        ValueError: if an argument is invalid, or the run or its weights cannot be used.
    """
    if not all(p.strip() for p in prompts) or not (prompts or images):
        raise ValueError("generate: prompt is missing or empty")
    if not abs(strength) <= STRONGEST:
        raise ValueError(
            f"generate: strength {strength} is not a number from -{STRONGEST:g} to {STRONGEST:g}, such as 0.5"
        )
    place = Run(Path(run))
    config = place.config()
    values: dict[str, Any] = {"world_size": None, "device": device or config.runtime.device}
    config = recipe.build(recipe.merge(json.loads(config.model_dump_json()), {"runtime": values}))
    family = build_family(config)
    if config.rgba_vae is not None:
        raise ValueError(
            f"{run}: this run trained an RGBA VAE, which cannot generate from prompts: set alpha.vae to "
            f"{place.folder / FOLDER} in a recipe that trains the denoiser, or view reconstructions "
            "with `inlaid evaluate`"
        )
    prompts = modality_of(family.modality).texts(prompts, images)
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
    if folder.suffix == ".glb" and modality_of(family.modality).makes == "scene":
        if len(prompts) * count > 1:
            raise ValueError(
                f"generate: {folder} is one file for {len(prompts) * count} scenes; pass a folder"
            )
        folder, name = folder.parent, folder.stem
    if folder.is_file():
        raise ValueError(f"generate: {folder} is a file; pass a folder with --out")
    weights = None if checkpoint == BASE or strength == 0 else trained_folder(place, checkpoint, family)
    with start_processes(config) as ctx:
        encoded = encode_prompts(config, family, place, prompts, sample, ctx, images)
        pipeline = load_pipeline(config, family, weights, strength, ctx)
        about = {"checkpoint": checkpoint or "adapter", "strength": strength, "run": str(run)}
        return generate_samples(family, pipeline, encoded, folder, about, count=count, name=name)


def load_pipeline(
    config: recipe.Config,
    family: families.Family,
    folder: Path | None,
    strength: float,
    ctx: Context,
) -> Any:
    """Return a pipeline with the trained weights of `folder`, or with the base model if `folder` is None.

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
    load_into_pipeline(family, pipeline, folder)
    if strength != 1:
        family.set_strength(pipeline, strength)
        if config.tuner.kind == "dora":
            say("note: DoRA is not linear in its strength; 0.5 is not half the effect")
    return pipeline


def generate_samples(
    family: families.Family,
    pipeline: Any,
    prompts: Prompts,
    folder: Path | None,
    about: Mapping[str, Any],
    *,
    count: int = 1,
    show: bool = True,
    name: str | None = None,
    on_output: Callable[[int, int, Any], None] | None = None,
) -> list[Path]:
    """Generate `count` videos or scenes per prompt, and write each to a file with a JSON file beside it.

    Args:
        family: family of the pipeline.
        pipeline: result of `load_pipeline`.
        prompts: encoded prompts and sampling settings.
        folder: output folder, created if missing. If None, nothing is written, as in processes that only
            hold a shard of the weights.
        about: additional values for each JSON file.
        count: outputs per prompt.
        show: show a progress bar.
        name: file name without extension, for a single output. Default: prompt index, prompt and seed.
        on_output: callback for each written output. Its arguments are the prompt index, the output index and
            the result of `Family.sample`.

    Returns:
        Paths of the written files.
    """
    pipeline.set_progress_bar_config(disable=True)
    sample, paths, modality = prompts.sample, [], modality_of(family.modality)
    assert sample.size and sample.frames
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with progress("generate", len(prompts.texts) * count, modality.makes, show=show) as advance:
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
                    **modality.asked(sample, images),
                )
                advance()
                if folder is None:
                    continue
                settings = modality.settings(sample, prompts.fps)
                stem = folder / (name or f"{i:02d}-{slug(text)}-seed{sample.seed + j}")
                path, facts = modality.write(stem, made, sample, prompts.fps)
                values = {"prompt": text, "seed": sample.seed + j, **settings, **facts, **about}
                if images:
                    values["images"] = [each.name for each in images]
                values |= {"versions": environment()["packages"]}
                with atomic(path.with_suffix(".json")) as part:
                    part.write_text(json.dumps(values, indent=2, ensure_ascii=False), "utf-8")
                paths.append(path)
                if on_output:
                    on_output(i, j, made)
    return paths


def outputs(path: Path) -> list[Path]:
    """Return all files of a generated video: the files with alpha that its JSON file lists, then the mp4."""
    values = json.loads(path.with_suffix(".json").read_text("utf-8"))
    return [*(path.with_name(name) for name in values.get("files", ())), path]


def slug(text: str) -> str:
    """Convert the start of a prompt to text for a file name, such as `a-red-car`.

    The result has at most 40 characters: a-z, 0-9 and hyphens. It is `prompt` if the prompt has no letters
    from a to z and no digits.
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "prompt"
