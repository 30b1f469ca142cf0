"""The command-line application, and options that several commands share.

Slow imports happen inside the commands, so that `--help` prints at once. Help is plain text, because
importing rich for formatted help would take as long as all other imports together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inlaid.text import printable

if TYPE_CHECKING:
    from inlaid.config import Config


app = typer.Typer(
    name="inlaid",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Fine-tune diffusion transformers on your clips. diffusers and ComfyUI load the adapter.

    Demo (no download, no GPU): `inlaid demo`

    Your own clips: `inlaid new wan data/pets` writes a recipe, `inlaid check pets.yaml` checks the data, and
    `inlaid train pets.yaml` trains. Then use `inlaid generate runs/pets "a corgi surfing"` and `inlaid
    evaluate runs/pets`.

    Override any value of a recipe on the command line:
    `inlaid train pets.yaml optim.lr=2e-4 train.steps=500`.""",
)

Recipe = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe (YAML) or run folder.", show_default=False)
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that override the recipe.", show_default=False),
]

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

Frames = Annotated[int | None, typer.Option(help="Number of frames.", show_default=False)]

Steps = Annotated[int | None, typer.Option(help="Number of denoising steps.", show_default=False)]

Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.", show_default=False)]

Negative = Annotated[str | None, typer.Option(help="Negative prompt.", show_default=False)]

Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the first video; video i of a prompt uses seed + i.", show_default=False),
]

Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu. Default: `runtime.device` of the recipe.")
]


def echo(text: str) -> None:
    """Print a message to stderr; stdout contains results only."""
    print(printable(text), file=sys.stderr)


def load_recipe(path: Path, overrides: list[str] | None) -> Config:
    """Load a recipe (YAML configuration) from a file or run folder, and silence library messages."""
    quiet_libraries(bars=False)
    from inlaid import config

    loaded = config.load(path, overrides or ())  # reports mistakes before anything slow is imported
    quiet_libraries()
    return loaded


def quiet_libraries(bars: bool = True) -> None:
    """Silence warnings of libraries such as diffusers and, if `bars` is true, their progress bars.

    Silencing the progress bars imports the libraries.
    """
    from inlaid.console import quiet, quiet_bars

    quiet()
    if bars:
        quiet_bars()
