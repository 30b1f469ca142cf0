"""The commands before training: `prepare`, `new`, `check` and `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlaid.cli.app import Overrides, Recipe, Size, app, echo, load_recipe, quiet_libraries

Prepared = Annotated[
    str,
    typer.Option(
        "--as",
        help="`clips`: mp4 with captions in .txt. `npz`: uint8 arrays with train.jsonl. `rgba-pairs`: "
        "_rgb.mp4 and _alpha.mp4 with metadata.csv. `latents`: precomputed latents and text embeddings.",
    ),
]

ClipFrames = Annotated[
    int | None,
    typer.Option(min=1, help="Frames per clip. Default: the family's length, less for shorter clips."),
]

Rate = Annotated[float | None, typer.Option(help="Frames per second. Default: the frame rate of the family.")]

Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Minimum distance of two clips in frames. Default: `--frames`, no overlap."),
]

MaxClips = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of clips per video, spread evenly. Default: all.")
]

Crop = Annotated[
    str | None,
    typer.Option(metavar="W:H:X:Y", help="Region to use, in source pixels, as FFmpeg's filter `crop`."),
]

Background = Annotated[
    str | None, typer.Option(help="Color of transparent pixels: `grow` (default), `blur` or `keep`.")
]

Quality = Annotated[
    int, typer.Option(min=0, max=51, help="CRF of color videos: 0 is lossless, 51 is the worst quality.")
]

Encoder = Annotated[
    str | None,
    typer.Option(help="Latents: Hub id or folder with VAE and text encoder. Default: the family's first."),
]


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder or manifest of clips, or a recipe.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    overrides: Overrides = None,
    target: Prepared = "clips",
    size: Size = None,
    frames: ClipFrames = None,
    fps: Rate = None,
    stride: Stride = None,
    max_clips: MaxClips = None,
    start: Annotated[float, typer.Option(min=0, help="Skip this many seconds of each video.")] = 0.0,
    end: Annotated[
        float | None, typer.Option(min=0, help="Use each video up to this second. Default: its end.")
    ] = None,
    crop: Crop = None,
    sequence_fps: Annotated[
        float | None, typer.Option(help="Frame rate of image sequences. Default: `--fps`.")
    ] = None,
    decontaminate: Annotated[
        bool, typer.Option("--decontaminate", help="Remove background color from soft edges.")
    ] = False,
    background: Background = None,
    crf: Quality = 17,
    family: Annotated[
        str | None, typer.Option(help="Model family for the defaults. Default: wan; for latents mochi.")
    ] = None,
    checkpoint: Encoder = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes. Default: the number of cores.")
    ] = None,
) -> None:
    """Cut long videos into clips and write a dataset that trainers read.

    Frames are read as in training: they are selected by timestamp, rotated as players display them, and
    converted to sRGB. Files that cannot be read are reported and left out. Run the same command again to
    resume. `inlaid check` reads the result.
    """
    quiet_libraries()
    from inlaid.cli.prepare import prepare_clips

    values = {
        "data.size": size and f"[{size.lower().replace('x', ', ')}]",
        "data.frames": frames,
        "data.fps": fps,
        "data.stride": stride,
        "data.max_windows": max_clips,
        "data.matte.background": background,
        "data.matte.decontaminate": "true" if decontaminate else None,
    }
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    lines = prepare_clips(
        source,
        out,
        target,
        [*given, *(overrides or ())],
        part=(start, end, crop),
        sequence_fps=sequence_fps,
        crf=crf,
        family=family or ("mochi" if target == "latents" else "wan"),
        checkpoint=checkpoint,
        workers=workers,
    )
    for line in lines:
        echo(line)


@app.command()
def new(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Model family: wan, cogvideox, mochi or midi.")
    ],
    clips: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Folder or manifest of clips with captions (midi: folder of scenes)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Recipe to write. Default: name of the data folder + `.yaml`."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Base model to train: Hub id or folder. Default: the family's smallest model."),
    ] = None,
    alpha: Annotated[
        str,
        typer.Option(
            help="Kind of alpha: `opaque`, `joint` or `merged`. `auto` trains on alpha if at least half of "
            "the clips have it."
        ),
    ] = "auto",
) -> None:
    """Inspect your clips and write a commented recipe that fits them."""
    if alpha not in ("auto", "opaque", "joint", "merged"):
        raise ValueError(f"--alpha: `{alpha}` is not one of auto, opaque, joint, merged")
    quiet_libraries(bars=False)
    from inlaid.check.scaffold import new_recipe

    path = new_recipe(family, clips, out, checkpoint, alpha)  # type: ignore[arg-type] - checked above
    echo(f"wrote {path}\nnext: inlaid check {path}")


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    vram: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Compare memory settings for a GPU with this many GB, such as 24, and show the fastest "
            "setting that fits.",
        ),
    ] = None,
) -> None:
    """Check data and recipe, and estimate memory and time. Loads no weights.

    Writes `check/report.json` and `check/contact_sheet.png` into the run folder. Exits with code 2 if there
    are errors.
    """
    config = load_recipe(recipe, overrides)
    from inlaid.check.check import check_recipe, print_report
    from inlaid.console import console

    report = check_recipe(config, vram)
    print_report(report, console)
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def cache(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode clips and captions into the cache. Run the same command again to resume.

    `train` also does this automatically.
    """
    config = load_recipe(recipe, overrides)
    from inlaid.alpha.opening import open_family
    from inlaid.data.prepare import build_cache
    from inlaid.runs.folder import open_run
    from inlaid.runs.launch import start_processes

    with start_processes(config) as ctx, open_run(config, ctx) as run:
        clips = build_cache(config, open_family(config), run, ctx, lambda *_: run.begin(config, ctx))
    echo(f"{clips.built.made} encoded, {clips.built.reused} already cached: {clips.store.folder}")
