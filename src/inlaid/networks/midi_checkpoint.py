"""Loader of the components of a MIDI or TripoSG checkpoint.

diffusers cannot load these checkpoints: `model_index.json` refers to classes of another package, and some
`config.json` files are missing or wrong. Network configurations are therefore inferred from tensor shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from inlaid.networks.triposg import TripoSGTransformer, TripoSGVAE, infer_config
from inlaid.reading import parse_json, read_text, reading


def weight_files(folder: Path) -> list[Path]:
    """Return the sorted paths of the .safetensors files of a component.

    Files with `.fp16.` in the name are returned only if there are no others.

    Raises:
        ValueError: if the folder has no .safetensors file.
    """
    found = sorted(folder.glob("*.safetensors"))
    plain = [f for f in found if ".fp16." not in f.name]
    if not found:
        raise ValueError(f"{folder} has no .safetensors file: download the checkpoint again")
    return plain or found


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's tensors by tensor name, without loading the tensors."""
    out: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            out |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    return out


def transformer_config(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a transformer, and warnings about wrong values in its `config.json`.

    Args:
        config: contents of `config.json`; empty if the file is missing.
        shapes: tensor shapes by name; None if unknown. They take precedence over `config`.

    Raises:
        ValueError: if the tensors are not those of a TripoSG or MIDI transformer.
    """
    known = {k: p.default for k, p in signature(TripoSGTransformer).parameters.items()}
    out = {k: config.get(k, v) for k, v in known.items()}
    if shapes is None:
        return out, []
    found = infer_config(shapes)
    wrong = [f"{k} {config[k]} (it is {v})" for k, v in found.items() if k in config and config[k] != v]
    notes = (
        [f"the transformer's config.json has {', '.join(wrong)}: using the tensor shapes"] if wrong else []
    )
    return out | found, notes


def vae_config(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Infer the configuration of a shape VAE from its tensor shapes.

    Values that shapes do not determine, such as the number of attention heads, are taken from `config`.

    Raises:
        ValueError: if the tensors are not those of a TripoSG VAE.
    """
    known = {k: p.default for k, p in signature(TripoSGVAE).parameters.items()}
    out = {k: config.get(k, v) for k, v in known.items()}
    try:
        frequencies = (shapes["decoder.proj_query.weight"][1] - 3) // 6
        features = 3 + 6 * frequencies
        layers = {
            part: max(int(k.split(".")[2]) for k in shapes if k.startswith(f"{part}.blocks."))
            for part in ("encoder", "decoder")
        }
        return out | {
            "in_channels": shapes["encoder.proj_in.weight"][1] - features,
            "latent_channels": shapes["post_quant.weight"][1],
            "width_encoder": shapes["encoder.proj_in.weight"][0],
            "width_decoder": shapes["post_quant.weight"][0],
            "num_layers_encoder": layers["encoder"],
            "num_layers_decoder": layers["decoder"],
            "embed_frequency": frequencies,
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a TripoSG shape VAE: {error} is missing") from None


def build(kind: type[nn.Module], config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype) -> Any:
    """Build a network with the weights in `folder`; without a folder, build it on the meta device.

    Raises:
        ValueError: if tensors are missing or unknown.
    """
    with torch.device("meta"):
        network = kind(**config)
    if folder is None:
        return network
    state = {k: v.to(dtype) for path in weight_files(folder) for k, v in load_file(path).items()}
    missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    for what, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            raise ValueError(f"{folder} {what} {len(names)} tensors, such as {names[0]}")
    return network.eval()


def load_vae(folder: Path) -> TripoSGVAE:
    """Load the frozen shape VAE in float32.

    bfloat16 is not precise enough for the VAE's frequency embedding, which multiplies coordinates by up to
    128.
    """
    config = vae_config(read_json(folder / "config.json"), tensor_shapes(folder))
    return build(TripoSGVAE, config, folder, torch.float32).requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; return an empty mapping if the file does not exist.

    Raises:
        FileError: if the file does not contain a JSON object.
    """
    with reading(path, what="a JSON object"):
        found = parse_json(read_text(path)) if path.is_file() else {}
        if not isinstance(found, dict):
            raise TypeError(f"found {type(found).__name__}")
        return found
