"""The command line. Commands import heavy modules inside their bodies, so that `--help` answers at once."""

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
    help="""Fine-tune diffusion transformers on your clips; diffusers and ComfyUI load the adapter.

    **Demo** (no download, no GPU): `inlaid demo`

    **Your own clips**: `inlaid new wan data/pets` writes a recipe, `inlaid check pets.yaml` checks the data,
    `inlaid train pets.yaml` trains; then `inlaid generate runs/pets "a corgi surfing"` and `inlaid evaluate
    runs/pets`.

    Override any value of a recipe on the command line:
    `inlaid train pets.yaml optim.lr=2e-4 train.steps=500`.""",
)

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML) or run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Values that override the recipe.", show_default=False
    ),
]
ClickException: Any = typer.BadParameter.__mro__[2]
"""Base class of typer's usage errors; the package that defines it depends on the version of typer."""

INTERRUPTED = "interrupted: finished work is kept; run the same command again to resume"

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder written by `inlaid train`.", show_default=False)
]


Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        "-i",
        help="Image-to-video: first image of each prompt, or one image for all prompts.",
        show_default=False,
    ),
]
LastImage = Annotated[
    list[Path] | None,
    typer.Option(help="Last image, for checkpoints that use a first and a last image.", show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Height x width in pixels, such as 480x832.", show_default=False),
]
Frames = Annotated[int | None, typer.Option(help="Frames.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default=False)]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", show_default=False)]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.", show_default=False)]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the first video; video i of a prompt uses seed + i.", show_default=False),
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu. Default: `runtime.device` of the recipe.")
]


def main() -> None:
    """Run a command and exit: code 2 with one message for a user's mistake, 130 for Ctrl-C.

    Only bugs of inlaid show a traceback; set INLAID_TRACEBACK to see it for user errors as well.
    """
    try:
        code = app(standalone_mode=False) or 0  # the code of a typer.Exit, or None
        if code == 130:  # some versions of typer return this for Ctrl-C
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
        if error.errno is None:  # a library's own error, not one of the system
            raise
        full = ": free disk space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _say(f"error: {error.filename or 'a file could not be written'}: {error.strerror}{full}")
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's class; torch is not imported here
            raise
        _say(f"error: {str(error).split('.')[0]}: lower data.size, data.frames or train.batch, and run again")
        sys.exit(2)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _load(path: Path, overrides: list[str] | None) -> Config:
    _quiet(bars=False)
    from inlaid import config

    loaded = config.load(path, overrides or ())  # reports mistakes before anything slow is imported
    _quiet()
    return loaded


def _quiet(bars: bool = True) -> None:
    from inlaid import console

    console.quiet()
    if bars:
        console.quiet_bars()


@app.command()
def new(
    family: Annotated[str, typer.Argument(help="Model family: wan, cogvideox, mochi or midi.")],
    clips: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Folder or manifest with clips and captions (midi: folder of scenes)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Recipe to write. Default: name of the data folder + `.yaml`."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Base model: Hub id or folder. Default: the family's smallest.")
    ] = None,
) -> None:
    """Inspect your clips and write a commented recipe that fits them."""
    _quiet(bars=False)
    from inlaid import recipes

    path = recipes.new(family, clips, out, checkpoint)
    _say(f"wrote {path}\nnext: inlaid check {path}")


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check data and recipe, and estimate memory and time. Loads no weights.

    Writes `check/report.json` and `check/contact_sheet.png` into the run folder. Exits with code 2 if there
    are errors.
    """
    config = _load(recipe, overrides)
    from inlaid import check as checks
    from inlaid.console import console

    report = checks.check(config)
    checks.print_report(report, console)
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def cache(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode clips and captions into the cache. Run it again to resume.

    `train` runs this step automatically.
    """
    config = _load(recipe, overrides)
    from inlaid import runtime, train

    with runtime.start(config) as ctx:
        clips = train.build_cache(config, train.open_family(config), train.open_run(config, ctx), ctx)
    _say(f"{clips.built.made} encoded, {clips.built.reused} already cached: {clips.store.folder}")


@app.command("train")
def train_(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a model from a recipe. Ctrl-C saves a checkpoint; run the same command again to resume.

    Fills the cache first, and validates and generates samples as the recipe says. Several processes:
    `torchrun --nproc-per-node 2 -m inlaid train RECIPE`.
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
        int, typer.Option("--count", "-n", min=1, help="Videos per prompt, with consecutive seeds.")
    ] = 1,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint such as `step-000500`, or `base` for the base model. Default: the final weights."
        ),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Scale of the adapter: 0 is the base model, 1 the trained model.")
    ] = 1.0,
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
            help="File formats of transparent videos, also apng, mkv. Default: `sample.transparent`.",
            show_default=False,
        ),
    ] = None,
    seg: Annotated[
        list[Path] | None,
        typer.Option(help="Scenes: segmentation of each --image.", show_default=False),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(help="Scenes: cells per side of the grid, a power of two.", show_default=False),
    ] = None,
    triangles: Annotated[
        int | None, typer.Option(help="Scenes: maximum number of triangles per object.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", "-o", help="Output folder, or a .glb. Default: samples/generated in the run."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Generate videos with a trained run: mp4 files, each with its settings in a JSON file beside it.

    Scenes are generated from an image and its segmentation: `inlaid generate RUN --image rgb.png --seg
    seg.png -o scene.glb`.
    """
    texts = list(prompts or [])
    if file:
        texts += _lines(file)
    if not texts and not (image and seg):
        raise ValueError("generate: no prompt; pass prompts or --file, or for scenes --image and --seg")
    if seg and len(seg) != len(image or []):
        raise ValueError(f"--seg: {len(image or [])} images need the same number of --seg, not {len(seg)}")
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
        raise ValueError(f"--file: {file} is not UTF-8 text; save it as UTF-8, one prompt per line") from None
    if not found:
        raise ValueError(f"--file: {file} contains no prompt; write one per line")
    return found


def _images(first: list[Path] | None, last: list[Path] | None, prompts: int) -> list[list[str]]:
    """Return the images of each prompt; a single image is used for all prompts."""
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
        str | None, typer.Option(help="Such as `step-000500`. Default: the final weights.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="Model to compare with: `base` or another checkpoint of the run.")
    ] = "base",
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Compare the base model and the trained model on the same prompts and seeds.

    Measures the validation loss and video metrics, and writes `report.html`.
    """
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


@app.command()
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            help="`diffusers`, `comfyui`, `kohya`, `merged` (full weights); RGBA VAE: `wan-alpha`, `comfyui`."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File or folder to write. Default: export/ in the run.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Such as `step-000500`. Default: the final weights.")
    ] = None,
    then: Annotated[
        Path | None, typer.Option(help="With `merged`: LoRA to merge on top, such as a step distillation.")
    ] = None,
) -> None:
    """Export the trained weights of a run in another program's layout, and verify the written file."""
    _quiet()
    from inlaid import exchange

    print(exchange.export(run, to, out, checkpoint, then))


@app.command("import")
def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER OUT | meshes DIR OUT",
            help="Adapter in any layout and output folder; or `meshes`, mesh folder and output folder.",
            show_default=False,
        ),
    ],
    family: Annotated[str, typer.Option(help="Model family: wan, cogvideox, mochi or midi.")] = "wan",
    checkpoint: Annotated[
        str | None, typer.Option(help="Base model; needed to check shapes and convert `dora_scale`.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha, if the file does not store it.")] = None,
    dora_scale: Annotated[
        str | None, typer.Option(help="Convention of `dora_scale` in the file: `comfyui` or `merged`.")
    ] = None,
    views: Annotated[
        int, typer.Option(min=1, help="Meshes: images rendered of each mesh, from all sides.")
    ] = 4,
    size: Annotated[int, typer.Option(min=16, help="Meshes: height and width of an image in pixels.")] = 512,
) -> None:
    """Convert another trainer's adapter to diffusers layout. Fails unless every tensor of the file is used.

    `inlaid import meshes DIR OUT` renders training scenes from the .glb, .gltf, .obj, .ply and .stl files of
    DIR.
    """
    if [str(p) for p in paths[:1]] == ["meshes"] and len(paths) == 3:
        _quiet(bars=False)
        from inlaid import scenes

        for finding in scenes.import_meshes(paths[1], paths[2], count=views, size=size):
            _say(f"{finding.severity}: {finding.name}: {finding.message}")
        print(paths[2])
        return
    if len(paths) != 2:
        raise ValueError("import: needs ADAPTER OUT, or `meshes` DIR OUT; see `inlaid import --help`")
    adapter, out = paths
    _quiet()
    from inlaid import exchange

    path, notes = exchange.convert(adapter, out, family, checkpoint, alpha, dora_scale)
    for note in notes:
        _say(f"note: {note}")
    print(path)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Adapter, cache item, checkpoint, run folder or model folder.")
    ],
) -> None:
    """Describe the content of a file or folder."""
    _quiet(bars=False)
    from inlaid import formats

    print(formats.describe(formats.inspect(path)))


@app.command()
def composite(
    foreground: Annotated[
        Path,
        typer.Argument(help="Transparent video, image, or PNGs in a folder or .zip.", show_default=False),
    ],
    background: Annotated[
        str,
        typer.Argument(help="Color (`#20a040`, `red`), `checkerboard`, image or video.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="mp4 file to write.")] = Path("composite.mp4"),
    premultiplied: Annotated[
        bool, typer.Option("--premultiplied", help="Color in the foreground is premultiplied with alpha.")
    ] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Blend in linear light; most tools blend code values.")
    ] = False,
    fps: Annotated[
        float | None, typer.Option(help="Frame rate. Default: that of the foreground, else 16.")
    ] = None,
) -> None:
    """Composite a transparent video over a color, an image or a video."""
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
        typer.Option("--out", "-o", help="Output folder. Default: `runs/demo`, `runs/demo-midi`, ..."),
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Train a DoRA instead of a LoRA.")] = False,
    family: Annotated[str, typer.Option(help="`wan` (video) or `midi` (scenes of meshes).")] = "wan",
    alpha: Annotated[
        str, typer.Option(help="`opaque`; or `merged` or `joint` for transparent clips.")
    ] = "opaque",
) -> None:
    """Run the whole workflow on a tiny trained model that ships with inlaid: no download, no GPU, minutes.

    Makes 16 clips of a subject that the model has not been trained on, or 24 scenes with a new kind of
    object, then checks, caches, trains, generates and evaluates.
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
        raise ValueError(f"--family {family} --alpha {alpha}: no such demo; choose from: {there}")
    usual, run = demos[family, alpha]
    run(folder or Path(usual), dora=dora)
