"""The commands `export`, `import`, `inspect` and `composite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlaid.cli.app import RunFolder, app, echo, quiet_libraries


@app.command()
def export(
    run: RunFolder,
    to: Annotated[
        str | None,
        typer.Option(
            help="Program or format: `diffusers`, `merged` (adapter merged into the model), `comfyui`, "
            "`musubi` (or `kohya`), `diffsynth`, `wan-alpha`, `transpixeler`, `genmo`, `midi-3d`; for an "
            "RGBA VAE: `wan-alpha`, `comfyui`. Without it, the command lists the targets for the run.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File or folder to write. Default: export/ in the run folder."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint of this run, such as `step-000500`. Default: the final weights."),
    ] = None,
    then: Annotated[
        Path | None,
        typer.Option(
            help="With `merged` or --merge: LoRA to merge on top, such as a step-distillation LoRA."
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Merge the adapter into the model, and export the whole model for the program: for ComfyUI, "
            "one file.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of a whole model: `float32`, `bfloat16` or `float16`. Default: that of the "
            "trained weights; `float32` for a merged adapter.",
            show_default=False,
        ),
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="With `--then`: leave out layers of that file that the model does not have.",
        ),
    ] = False,
) -> None:
    """Export trained weights in the format of another program.

    Converted files are read back and verified. The command then prints how to load the file.
    """
    quiet_libraries()
    from inlaid.adapters.convert import export_run, export_targets

    if to is None:
        raise ValueError(f"Missing option '--to'. Targets for this run:\n{export_targets(run)}")
    print(export_run(run, to, out, checkpoint, then, merge=merge, dtype=dtype, skip_missing=skip_missing))


@app.command("import")
def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER OUT | meshes SOURCE OUT",
            help="Adapter or RGBA VAE in any format (file, folder, or OWNER/NAME/FILE on the Hub) and output "
            "folder; or `meshes`, mesh file or folder, output folder.",
            show_default=False,
        ),
    ],
    family: Annotated[str, typer.Option(help="Model family: wan, cogvideox, mochi or midi.")] = "wan",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Base model (Hub id or folder); needed to check shapes, and to convert `dora_scale`, whole "
            "biases and whole layers."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha, if the file does not store it.")] = None,
    dora_scale: Annotated[
        str | None,
        typer.Option(
            help="Definition of `dora_scale` in the file: relative to the norms of the base weights "
            "(`comfyui`), or of the updated weights as in LyCORIS (`merged`)."
        ),
    ] = None,
    expert: Annotated[
        str | None,
        typer.Option(help="`high` or `low`: expert of a checkpoint (A14B) or file with two experts."),
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing", help="With `--checkpoint`: leave out layers that the base model does not have."
        ),
    ] = False,
    views: Annotated[
        int, typer.Option(min=1, help="Meshes: number of images to render per mesh, from different sides.")
    ] = 4,
    size: Annotated[
        int, typer.Option(min=16, help="Meshes: height and width of the rendered images in pixels.")
    ] = 512,
    group: Annotated[
        str,
        typer.Option(
            help="Meshes: what forms an object: `node`, `parent` (nodes with a common parent, such as the "
            "parts of a chair) or `material`."
        ),
    ] = "parent",
    up: Annotated[
        str | None,
        typer.Option(
            help="Meshes: axis of the files that points up: x, y, z, -x, -y or -z. Default: y.",
            show_default=False,
        ),
    ] = None,
    bad_meshes: Annotated[
        str,
        typer.Option(
            help="Meshes: `skip` leaves out files and objects that cannot be used, `stop` writes nothing."
        ),
    ] = "skip",
) -> None:
    """Convert another trainer's adapter to diffusers format, or a published RGBA VAE to inlaid's format.

    Fails if a tensor of the file cannot be converted. For a file on the Hub, prints its size and license
    before the download.

    `inlaid import meshes SOURCE OUT` renders training scenes from a .glb, .gltf, .obj, .ply or .stl file, or
    from all such files in a folder and its subfolders.
    """
    if [str(p) for p in paths[:1]] == ["meshes"] and len(paths) == 3:
        quiet_libraries(bars=False)
        from inlaid.data.scenes_from_meshes import MeshOptions, import_meshes

        options = MeshOptions(views, size, group, up)  # type: ignore[arg-type]
        for finding in import_meshes(paths[1], paths[2], options, bad=bad_meshes):  # type: ignore[arg-type]
            echo(f"{finding.severity}: {finding.name}: {finding.message}")
        print(paths[2])
        return
    if len(paths) != 2:
        raise ValueError("import: needs ADAPTER OUT, or `meshes` SOURCE OUT; see `inlaid import --help`")
    adapter, out = paths
    quiet_libraries()
    from inlaid.adapters.importing import import_adapter

    path, notes = import_adapter(adapter, out, family, checkpoint, alpha, dora_scale, expert, skip_missing)
    for note in notes:
        echo(f"note: {note}")
    print(path)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Adapter, cached item, checkpoint, run folder or model folder.")
    ],
) -> None:
    """Describe the content of a file or folder."""
    quiet_libraries(bars=False)
    from inlaid.adapters.inspect import describe, inspect_path

    print(describe(inspect_path(path)))


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
        bool, typer.Option("--premultiplied", help="Color in the foreground is premultiplied by alpha.")
    ] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Blend in linear light; most tools blend gamma-encoded values.")
    ] = False,
    fps: Annotated[
        float | None, typer.Option(help="Frame rate. Default: the frame rate of the foreground, else 16.")
    ] = None,
) -> None:
    """Composite a transparent video over a background."""
    quiet_libraries(bars=False)
    from inlaid.cli.composite import composite_file

    made = composite_file(foreground, background, out, premultiplied=premultiplied, linear=linear, fps=fps)
    print(made)
