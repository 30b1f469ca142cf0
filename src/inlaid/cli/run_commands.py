"""The commands `train`, `generate` and `evaluate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from inlaid.cli.app import (
    INTERRUPTED,
    Device,
    Frames,
    Guidance,
    Image,
    LastImage,
    Negative,
    Overrides,
    Recipe,
    RunFolder,
    Seed,
    Size,
    Steps,
    app,
    echo,
    load_recipe,
    quiet_libraries,
)
from inlaid.reading import FileError, read_text


@app.command("train")
def train_(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a model from a recipe. Ctrl-C saves a checkpoint; run the same command again to resume.

    Clips and captions that are not in the cache are encoded first. Validation and samples follow the settings
    of the recipe. To use several processes: `torchrun --nproc-per-node 2 -m inlaid train RECIPE`.
    """
    config = load_recipe(recipe, overrides)
    from inlaid.training.loop import train

    try:
        run = train(config)
    except KeyboardInterrupt as stop:
        echo(str(stop) or INTERRUPTED)
        sys.exit(130)
    if int(os.environ.get("RANK", "0")) == 0:
        from inlaid import families
        from inlaid.data.modality import modality_of
        from inlaid.runs.folder import Run

        asks = modality_of(families.get(config.model.family).modality).asks
        samples = f"inlaid generate {run} {asks}   or   " if Run(run).adapter.is_dir() else ""
        echo(f"{run}\nnext: {samples}inlaid evaluate {run}")


Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPTS", help="One or more prompts.", show_default=False)
]

Strength = Annotated[
    float,
    typer.Option(help="Scale of the adapter: 1 is the fine-tuned model; for a LoRA, 0 is the base model."),
]

Grid = Annotated[
    int | None,
    typer.Option(help="Scenes: cells per side of each object's box, a power of two.", show_default=False),
]

Triangles = Annotated[
    int | None, typer.Option(help="Scenes: maximum number of triangles per object.", show_default=False)
]

Texture = Annotated[
    bool | None,
    typer.Option("--texture", help="Scenes: project the input image onto the meshes.", show_default=False),
]

Transparent = Annotated[
    str | None,
    typer.Option(
        metavar="mov,webm,png",
        help="File formats of transparent videos, separated by commas: mov, webm, pair, png, apng, mkv. "
        "Default: `sample.transparent`.",
        show_default=False,
    ),
]


@app.command("generate")
def generate_(
    run: RunFolder,
    prompts: Prompts = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text file with one prompt per line.")
    ] = None,
    image: Image = None,
    last_image: LastImage = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Videos per prompt, with consecutive seeds.")
    ] = 1,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of this run, such as `step-000500`, or `base` for the base model. "
            "Default: the final weights."
        ),
    ] = None,
    strength: Strength = 1.0,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    seed: Seed = None,
    transparent: Transparent = None,
    seg: Annotated[
        list[Path] | None,
        typer.Option(help="Scenes: segmentation image of each --image.", show_default=False),
    ] = None,
    grid: Grid = None,
    triangles: Triangles = None,
    texture: Texture = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            "-o",
            help="Output folder, or a .glb file. Default: samples/generated in the run folder.",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Generate videos or 3D scenes with the trained weights of a run.

    Writes mp4 files, each with a JSON file of its settings beside it. Scenes are generated from an image and
    its segmentation: `inlaid generate RUN --image rgb.png --seg seg.png -o scene.glb`.
    """
    texts = list(prompts or [])
    for text in (*texts, negative or ""):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"the prompt {text!r} is not UTF-8 text: enter it in UTF-8")
    if file:
        texts += _lines(file)
    if not texts and not (image and seg):
        raise ValueError("generate: no prompt; pass prompts or --file, or for scenes --image and --seg")
    if seg and len(seg) != len(image or []):
        raise ValueError(f"--seg: {len(image or [])} images need the same number of --seg, not {len(seg)}")
    pairs = [[str(a), str(b)] for a, b in zip(image or [], seg or [], strict=True)] if seg else None
    area = _size(size)
    quiet_libraries()
    from inlaid.generation.generate import generate, outputs

    made = generate(
        run,
        texts,
        images=pairs or _images(image, last_image, len(texts)),
        count=count,
        checkpoint=checkpoint,
        strength=strength,
        out=out,
        device=device,
        grid=grid,
        triangles=triangles,
        texture=texture,
        size=area,
        frames=frames,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        seed=seed,
        transparent=transparent.split(",") if transparent else None,
    )
    print("\n".join(str(file) for path in made for file in outputs(path)))


def _lines(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except FileError as error:
        raise ValueError(f"--file: {error}; one prompt per line") from None
    if not found:
        raise ValueError(f"--file: {file} contains no prompt; write one per line")
    return found


def _images(first: list[Path] | None, last: list[Path] | None, prompts: int) -> list[list[str]]:
    """Return the image files of each prompt: the first image, and the last image if one is given.

    A single first or last image is used for all prompts.
    """
    parts = [each * prompts if len(each) == 1 else each for each in (first or [], last or []) if each]
    wrong = [len(each) for each in parts if len(each) != prompts]
    if wrong or (last and not first):
        raise ValueError(
            f"--image: {prompts} prompt(s) need one --image, or {prompts}; the same holds for --last-image"
        )
    return [[str(path) for path in each] for each in zip(*parts, strict=True)]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"--size: `{text}` is not HEIGHTxWIDTH; write for example 480x832")
    return int(parts[0]), int(parts[1])


@app.command("evaluate")
def evaluate_(
    run: RunFolder,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Text file with one prompt per line. Default: the prompts of the recipe."
        ),
    ] = None,
    image: Image = None,
    last_image: LastImage = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Videos per prompt.")] = 1,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint of this run, such as `step-000500`. Default: the final weights."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Model to compare with: `base`, or a checkpoint of this run.")
    ] = "base",
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Compare the base model and the fine-tuned model.

    Generates with the same prompts and seeds, computes the validation loss and video metrics, and writes
    `report/report.html` in the run folder.
    """
    quiet_libraries()
    from inlaid.console import console
    from inlaid.evaluation import rgba_vae
    from inlaid.evaluation.evaluate import Prompt, evaluate
    from inlaid.evaluation.report import summary_table
    from inlaid.runs.folder import Run

    if Run(run).config().rgba_vae is not None:
        found = rgba_vae.evaluate(run, checkpoint=checkpoint, device=device)
        console.print(rgba_vae.table(found))
        for line in rgba_vae.text(found):
            echo(line)
        print(found.path)
        return
    if (image or last_image) and not file:
        raise ValueError("--image: needs --file; images for the prompts of the recipe are sample.images")
    texts = _lines(file) if file else []
    images = _images(image, last_image, len(texts)) or [[]] * len(texts)
    prompts = [Prompt(t, images=each) for t, each in zip(texts, images, strict=True)] or None
    report = evaluate(
        run,
        against=against,
        checkpoint=checkpoint,
        prompts=prompts,
        count=count,
        device=device,
        size=_size(size),
        frames=frames,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        seed=seed,
    )
    console.print(summary_table(report))
    print(report.path)
