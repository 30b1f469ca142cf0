"""The commands. Each is a thin function: heavy imports happen inside, so that help answers at once."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from inlaid.config import Config

app = typer.Typer(
    name="inlaid",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Teach diffusion transformers a new subject: from a folder of clips to an adapter that others load.

    **See it work** (no download, no GPU): `inlaid demo`

    **Your own clips**: `inlaid new wan data/pets` writes a recipe, `inlaid check pets.yaml` looks at the data,
    `inlaid train pets.yaml` trains; then `inlaid generate runs/pets "a corgi surfing"` and `inlaid evaluate
    runs/pets`.

    Any value of a recipe can be changed on the command line:
    `inlaid train pets.yaml optim.lr=2e-4 train.steps=500`.""",
)

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML), or a run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe.", show_default=False),
]
ClickException: Any = typer.BadParameter.__mro__[2]
"""The base of typer's usage errors; which package it comes from depends on typer's version."""

INTERRUPTED = "interrupted: what is finished stays; run the same command again to go on"

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder, as `inlaid train` made it.", show_default=False)
]


Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        "-i",
        help="Image-to-video: the first image of each prompt, or one for all.",
        show_default=False,
    ),
]
LastImage = Annotated[
    list[Path] | None,
    typer.Option(
        help="The last image, for checkpoints that take a first and a last one.", show_default=False
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="Height x width, such as 480x832.", show_default=False)
]
Frames = Annotated[int | None, typer.Option(help="Frames.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default=False)]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", show_default=False)]
Negative = Annotated[str | None, typer.Option(help="What to steer away from.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of the first video.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. Default: the recipe's.")]


def main() -> None:
    """Runs a command; a user's mistake is one message and exit code 2, Ctrl-C is 130.

    Only our own mistakes show a traceback.
    """
    try:
        code = app(standalone_mode=False) or 0  # the code of a typer.Exit, or None
        if code == 130:  # what some versions of typer make of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _say(f"\n{INTERRUPTED}")
        sys.exit(130)
    except ValueError as error:
        if os.environ.get("INLAID_TRACEBACK"):
            raise
        _say(f"error: {error}")
        sys.exit(2)
    except ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # a library's way to say something else
            raise
        full = ": free space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _say(f"error: {error.filename or 'a file could not be written'}: {error.strerror}{full}")
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported here
            raise
        _say(f"error: {str(error).split('.')[0]}: lower data.size, data.frames or train.batch, and run again")
        sys.exit(2)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _load(path: Path, overrides: list[str] | None) -> Config:
    _quiet(bars=False)
    from inlaid import config

    loaded = config.load(path, overrides or ())  # a mistake is told before anything slow is imported
    _quiet()
    return loaded


def _quiet(bars: bool = True) -> None:
    from inlaid import console

    console.quiet()
    if bars:
        console.quiet_bars()


@app.command()
def new(
    family: Annotated[str, typer.Argument(help="Model family: `wan`.")],
    clips: Annotated[
        Path, typer.Argument(metavar="DATA", help="Folder or manifest with clips and captions.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Recipe to write. Default: the folder's name + `.yaml`."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Hub id or folder. Default: the family's smallest.")
    ] = None,
) -> None:
    """Look at your clips and write a commented recipe that fits them."""
    _quiet(bars=False)
    from inlaid import recipes

    path = recipes.new(family, clips, out, checkpoint)
    _say(f"wrote {path}\nnext: inlaid check {path}")


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Show what is there, what is wrong with it, what the model will see and what it costs. Loads no weights.

    Writes `check/report.json` and `check/contact_sheet.png` into the run folder; exit code 2 when there are
    errors.
    """
    config = _load(recipe, overrides)
    from inlaid import check as checks
    from inlaid.console import console

    report = checks.check(config)
    checks.print_report(report, console)
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def cache(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode clips and captions; `train` does it too when needed. Run it again to go on where it stopped."""
    config = _load(recipe, overrides)
    from inlaid import runtime, train

    with runtime.start(config) as ctx:
        clips = train.build_cache(config, train.open_family(config), train.open_run(config, ctx), ctx)
    _say(f"{clips.built.made} encoded, {clips.built.reused} there already: {clips.store.folder}")


@app.command("train")
def train_(recipe: Recipe, overrides: Overrides = None) -> None:
    """Cache, train, sample and measure. Run it again to go on; Ctrl-C saves first.

    Several processes: `torchrun --nproc-per-node 2 -m inlaid train RECIPE`.
    """
    config = _load(recipe, overrides)
    from inlaid import train

    try:
        run = train.train(config)
    except KeyboardInterrupt as stop:
        _say(str(stop) or INTERRUPTED)
        sys.exit(130)
    if int(os.environ.get("RANK", "0")) == 0:
        from inlaid import families, mediums

        asks = mediums.of(families.get(config.model.family).medium).asks
        drawn = "" if config.tuner.kind == "codec" else f"inlaid generate {run} {asks}   or   "
        _say(f"{run}\nnext: {drawn}inlaid evaluate {run}")


@app.command("generate")
def generate_(
    run: RunFolder,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text file with one prompt per line.")
    ] = None,
    image: Image = None,
    last_image: LastImage = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Videos of each prompt, with seeds one apart.")
    ] = 1,
    checkpoint: Annotated[
        str | None, typer.Option(help="`step-000500`, or `base` for the untuned model.")
    ] = None,
    strength: Annotated[float, typer.Option(help="0 is the base, 1 what was trained.")] = 1.0,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    seed: Seed = None,
    transparent: Annotated[
        str | None,
        typer.Option(
            metavar="mov,webm,png",
            help="Files of each video in a transparent run, also apng, mkv. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    seg: Annotated[
        list[Path] | None,
        typer.Option(help="Scenes: the segmentation of each --image.", show_default=False),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="Scenes: cells per side of the box.", show_default=False)
    ] = None,
    triangles: Annotated[
        int | None, typer.Option(help="Scenes: most triangles of an object.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", "-o", help="Folder, or a .glb. Default: samples/generated in the run."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Make videos with what a run has learned: mp4 with a JSON of all settings beside each.

    Scenes are made from pictures: `inlaid generate RUN --image rgb.png --seg seg.png -o scene.glb`.
    """
    texts = list(prompts or [])
    if file:
        texts += _lines(file)
    if not texts and not (image and seg):
        raise ValueError("generate: give a prompt, or --file with one per line; of scenes --image and --seg")
    if seg and len(seg) != len(image or []):
        raise ValueError(f"--seg: {len(image or [])} pictures need as many segmentations, not {len(seg)}")
    pairs = [[str(a), str(b)] for a, b in zip(image or [], seg or [], strict=True)] if seg else None
    area = _size(size)
    _quiet()
    from inlaid.generate import generate, outputs

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
        found = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--file: {file} is not UTF-8 text; save it as such, one prompt per line") from None
    if not found:
        raise ValueError(f"--file: {file} holds no prompt; write one per line")
    return found


def _images(first: list[Path] | None, last: list[Path] | None, prompts: int) -> list[list[str]]:
    """The images of each prompt; one that is given once counts for all."""
    parts = [each * prompts if len(each) == 1 else each for each in (first or [], last or []) if each]
    wrong = [len(each) for each in parts if len(each) != prompts]
    if wrong or (last and not first):
        raise ValueError(
            f"--image: {prompts} prompt(s) need one image, or {prompts}, and as many last images if any"
        )
    return [[str(path) for path in each] for each in zip(*parts, strict=True)]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"--size: `{text}` is not HEIGHTxWIDTH, such as 480x832")
    return int(parts[0]), int(parts[1])


@app.command("evaluate")
def evaluate_(
    run: RunFolder,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts, one per line. Default: the recipe's.")
    ] = None,
    image: Image = None,
    last_image: LastImage = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Videos of each prompt.")] = 1,
    checkpoint: Annotated[str | None, typer.Option(help="`step-000500`. Default: the run's adapter.")] = None,
    against: Annotated[
        str, typer.Option(help="What to compare with: `base` or another checkpoint.")
    ] = "base",
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Compare base and tuned side by side, same seeds: held-out loss, video metrics, `report.html`."""
    _quiet()
    from inlaid.console import console
    from inlaid.evaluate import Prompt, codec, evaluate, summary_table
    from inlaid.runtime import Run

    if Run(run).config().tuner.kind == "codec":
        found = codec.evaluate(run, checkpoint=checkpoint, device=device)
        console.print(codec.table(found))
        for line in codec.text(found):
            _say(line)
        print(found.path)
        return
    if (image or last_image) and not file:
        raise ValueError("--image: goes with --file; the recipe's own prompts have theirs in sample.images")
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


@app.command()
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            help="`diffusers`, `comfyui`, `kohya`, `merged` (full weights); a codec: `wan-alpha`, `comfyui`."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File or folder. Default: export/ in the run.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="`step-000500`. Default: the run's adapter.")] = None,
    then: Annotated[
        Path | None, typer.Option(help="With `merged`: a LoRA on top, such as one that distils steps.")
    ] = None,
) -> None:
    """Write what a run has trained in another program's layout, read it back, and compare."""
    _quiet()
    from inlaid import exchange

    print(exchange.export(run, to, out, checkpoint, then))


@app.command("import")
def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER OUT | meshes DIR OUT",
            help="An adapter in any layout and the folder to write; or `meshes` and two folders.",
            show_default=False,
        ),
    ],
    family: Annotated[str, typer.Option(help="Model family.")] = "wan",
    checkpoint: Annotated[
        str | None, typer.Option(help="Base checkpoint: checks shapes, converts `dora_scale`.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha, where the file has none.")] = None,
    dora_scale: Annotated[
        str | None, typer.Option(help="`comfyui` or `merged`: what a `dora_scale` is relative to.")
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Meshes: pictures of each, all round.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Meshes: side of a picture in pixels.")] = 512,
) -> None:
    """Convert another trainer's adapter to diffusers layout; every tensor is used, or nothing is written.

    `inlaid import meshes DIR OUT` makes training scenes of the .glb, .gltf, .obj, .ply and .stl files of DIR.
    """
    if [str(p) for p in paths[:1]] == ["meshes"] and len(paths) == 3:
        _quiet(bars=False)
        from inlaid import scenes

        for finding in scenes.import_meshes(paths[1], paths[2], count=views, size=size):
            _say(f"{finding.severity}: {finding.name}: {finding.message}")
        print(paths[2])
        return
    if len(paths) != 2:
        raise ValueError("import: give an adapter and a folder to write, or `meshes`, a folder and a folder")
    adapter, out = paths
    _quiet()
    from inlaid import exchange

    path, notes = exchange.convert(adapter, out, family, checkpoint, alpha, dora_scale)
    for note in notes:
        _say(f"note: {note}")
    print(path)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Adapter, cached item, checkpoint, run or model folder.")],
) -> None:
    """Say what is in a file or folder."""
    _quiet(bars=False)
    from inlaid import formats

    print(formats.describe(formats.inspect(path)))


@app.command()
def composite(
    foreground: Annotated[
        Path,
        typer.Argument(help="Transparent video, .zip or folder of PNGs, image.", show_default=False),
    ],
    background: Annotated[
        str,
        typer.Argument(help="`#20a040`, `red`, `checkerboard`, an image or a video.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="mp4 to write.")] = Path("composite.mp4"),
    premultiplied: Annotated[
        bool, typer.Option("--premultiplied", help="Colour was multiplied with alpha already.")
    ] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Mix light, not code values; most tools do not.")
    ] = False,
    fps: Annotated[float | None, typer.Option(help="Frame rate. Default: the foreground's, or 16.")] = None,
) -> None:
    """Put transparent video over a colour, an image or a video."""
    _quiet(bars=False)
    from inlaid import rgba

    made = rgba.composite_file(
        foreground, background, out, premultiplied=premultiplied, linear=linear, fps=fps
    )
    print(made)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write. Default: `runs/demo`, `runs/demo-midi` and so on."),
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Train a DoRA instead of a LoRA.")] = False,
    family: Annotated[str, typer.Option(help="`wan`, clips; or `midi`, scenes of meshes.")] = "wan",
    alpha: Annotated[
        str, typer.Option(help="`opaque`, or transparent clips: `merged` or `joint`.")
    ] = "opaque",
) -> None:
    """The whole main job on a tiny trained model that ships with inlaid: no download, no GPU, minutes.

    Makes 16 clips of a subject that the model has never seen, or 24 scenes with a new kind of object, then
    checks, caches, trains, generates and evaluates.
    """
    _quiet()
    from inlaid import demo, demo_rgba, demo_scenes

    demos = {
        ("wan", "opaque"): ("runs/demo", demo.demo),
        ("wan", "merged"): ("runs/demo-merged", demo_rgba.merged),
        ("wan", "joint"): ("runs/demo-joint", demo_rgba.joint),
        ("midi", "opaque"): ("runs/demo-midi", demo_scenes.demo),
    }
    if (family, alpha) not in demos:
        there = ", ".join(f"--family {f} --alpha {a}" for f, a in demos)
        raise ValueError(f"--family {family} --alpha {alpha}: there is no such demo, but {there}")
    usual, run = demos[family, alpha]
    run(folder or Path(usual), dora=dora)
