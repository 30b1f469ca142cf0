"""The commands before training: `new`, `check` and `cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlaid.cli.app import Overrides, Recipe, app, echo, load_recipe, quiet_libraries


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
) -> None:
    """Inspect your clips and write a commented recipe that fits them."""
    quiet_libraries(bars=False)
    from inlaid.check.scaffold import new_recipe

    path = new_recipe(family, clips, out, checkpoint)
    echo(f"wrote {path}\nnext: inlaid check {path}")


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check data and recipe, and estimate memory and time. Loads no weights.

    Writes `check/report.json` and `check/contact_sheet.png` into the run folder. Exits with code 2 if there
    are errors.
    """
    config = load_recipe(recipe, overrides)
    from inlaid.check.check import check_recipe, print_report
    from inlaid.console import console

    report = check_recipe(config)
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
