"""Lookup, validation and loading of the trained weights of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from inlaid import families
from inlaid.adapters import lycoris
from inlaid.adapters.layers import companions, layer_shapes
from inlaid.adapters.merge import attach_adapter
from inlaid.adapters.read import read_adapter
from inlaid.console import say
from inlaid.runs.folder import Run, read_header

BASE = "base"
"""Value of `checkpoint` that selects the base model without trained weights."""


def trained_folder(run: Run, checkpoint: str | None, family: families.Family) -> Path:
    """Return the folder with the trained weights of a run.

    If `checkpoint` is None, the final weights are used. If the run is not finished, the newest checkpoint is
    used instead. An adapter is validated here, before large files are loaded, because a pipeline would reject
    an invalid adapter late or not at all.

    Raises:
        ValueError: if the run has no trained weights, or the adapter is damaged or does not fit the family.
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
            read_adapter(folder, family, shapes=layer_shapes(network))
            for name, part in companions(network).items():
                read_adapter(folder / name, family, shapes=layer_shapes(part))
        try:
            for file in folder.glob("*.safetensors"):
                family.accept(read_header(file))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    return folder


def load_into_pipeline(family: families.Family, pipeline: Any, folder: Path) -> None:
    """Load a LoRA, DoRA, LoKr or LoHa adapter into a pipeline, under the name `inlaid`.

    Raises:
        ValueError: if the adapter does not fit the network, or if nothing was loaded from the folder.
    """
    network = getattr(pipeline, family.component)
    if not lycoris.load(network, folder):
        family.load_adapter(pipeline, folder)
        for name, part in companions(network).items():
            attach_adapter(part, read_adapter(folder / name, family, shapes=layer_shapes(part)))
    if not pipeline.get_list_adapters():
        raise ValueError(
            f"{folder}: the pipeline loaded no weights from it; `inlaid inspect {folder}` lists its content"
        )
