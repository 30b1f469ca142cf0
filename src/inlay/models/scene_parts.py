"""The parts of a MIDI or TripoSG checkpoint, loaded from their folders alone.

Their `model_index.json` names the modules of another package, and some `config.json` are missing or wrong: so
shapes in the files decide what a network is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from inlay.models.triposg import TripoSGTransformer, TripoSGVAE, infer_config


def weights(folder: Path) -> list[Path]:
    """The files of a component: whole, in shards, or as the `.fp16` variant where there is no other.

    Raises:
        ValueError: when there are none.
    """
    found = sorted(folder.glob("*.safetensors"))
    plain = [f for f in found if ".fp16." not in f.name]
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file")
    return plain or found


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a component's tensors, from the headers of its files."""
    out: dict[str, tuple[int, ...]] = {}
    for path in weights(folder):
        with safe_open(path, "pt") as file:
            out |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    return out


def transformer_config(
    said: Mapping[str, Any], there: Mapping[str, Sequence[int]] | None
) -> tuple[dict[str, Any], list[str]]:
    """What a transformer is, and sentences about where its `config.json` says something else.

    Args:
        said: its configuration, as far as there is one.
        there: shapes of its tensors, where they are at hand.

    Raises:
        ValueError: when it is no such transformer.
    """
    known = {k: p.default for k, p in signature(TripoSGTransformer).parameters.items()}
    out = {k: said.get(k, v) for k, v in known.items()}
    if there is None:
        return out, []
    found = infer_config(there)
    lies = [f"{k} {said[k]} (it is {v})" for k, v in found.items() if k in said and said[k] != v]
    notes = [f"the transformer's config.json says {', '.join(lies)}: its tensors decide"] if lies else []
    return out | found, notes


def vae_config(said: Mapping[str, Any], there: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What a shape VAE is; only its number of heads is not seen in its tensors.

    Raises:
        ValueError: when it is no such VAE.
    """
    known = {k: p.default for k, p in signature(TripoSGVAE).parameters.items()}
    out = {k: said.get(k, v) for k, v in known.items()}
    try:
        frequencies = (there["decoder.proj_query.weight"][1] - 3) // 6
        features = 3 + 6 * frequencies
        layers = {
            part: max(int(k.split(".")[2]) for k in there if k.startswith(f"{part}.blocks."))
            for part in ("encoder", "decoder")
        }
        return out | {
            "in_channels": there["encoder.proj_in.weight"][1] - features,
            "latent_channels": there["post_quant.weight"][1],
            "width_encoder": there["encoder.proj_in.weight"][0],
            "width_decoder": there["post_quant.weight"][0],
            "num_layers_encoder": layers["encoder"],
            "num_layers_decoder": layers["decoder"],
            "embed_frequency": frequencies,
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a TripoSG shape VAE: {error} is not there") from None


def build(kind: type[nn.Module], config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype) -> Any:
    """A network with the weights of a folder; without one on the meta device.

    Raises:
        ValueError: when its tensors are not all there, or there are others.
    """
    with torch.device("meta"):
        network = kind(**config)
    if folder is None:
        return network
    state = {k: v.to(dtype) for path in weights(folder) for k, v in load_file(path).items()}
    missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    for what, names in (("lacks", missing), ("holds unknown", unexpected)):
        if names:
            raise ValueError(f"{folder} {what} {len(names)} tensors, such as {names[0]}")
    return network.eval()


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """What a `preprocessor_config.json` does to a square picture."""

    edge: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, said: Mapping[str, Any], default: Extractor) -> Extractor:
        """From a file's values; what it does not say is the published one's."""

        def number(value: Any, fallback: int) -> int:
            if isinstance(value, Mapping):
                value = value.get("shortest_edge") or value.get("height")
            return int(value) if value else fallback

        edge = number(said.get("size"), default.edge)
        crop = number(said.get("crop_size"), default.crop) if said.get("do_center_crop", True) else edge
        mean, std = (tuple(said.get(f"image_{n}") or getattr(default, n)) for n in ("mean", "std"))
        return cls(edge, crop, mean, std)

    def __call__(self, picture: np.ndarray) -> Tensor:
        """uint8 (n, n, 3) -> float32 (3, crop, crop): bicubic, cut out of the middle, normalised."""
        small = self._cut(Image.fromarray(picture).resize((self.edge, self.edge), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(np.array(small, np.float32) / 255)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)

    def mask(self, mask: np.ndarray) -> Tensor:
        """Booleans (n, n) -> float32 (1, crop, crop) of 0 and 1, not normalised."""
        image = Image.fromarray(mask.astype(np.uint8) * 255)
        small = self._cut(image.resize((self.edge, self.edge), Image.Resampling.NEAREST))
        return torch.from_numpy(np.array(small, np.float32) / 255)[None]

    def _cut(self, image: Image.Image) -> Image.Image:
        start = (self.edge - self.crop) // 2
        return image.crop((start, start, start + self.crop, start + self.crop))


CLIP = Extractor(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""The published extractor of `image_encoder_1`."""
DINO = Extractor(512, 512, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of `image_encoder_2`."""
DINO_ALONE = Extractor(256, 224, DINO.mean, DINO.std)
"""Of TripoSG's only encoder."""


def square(pixels: np.ndarray, fill: int) -> np.ndarray:
    """Pads (h, w, ...) to a square, the picture in the middle: its camera looks along the middle."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    pad = ((top, side - height - top), (left, side - width - left), *[(0, 0)] * (pixels.ndim - 2))
    return np.pad(pixels, pad, constant_values=fill)


@dataclass
class PictureEncoders:
    """What the denoiser knows of a picture: a CLIP token (MIDI only) and DINO tokens of each object."""

    dino: nn.Module
    dino_extractor: Extractor
    clip: nn.Module | None = None
    clip_extractor: Extractor = CLIP

    def to(self, device: torch.device) -> PictureEncoders:
        """Moves the networks."""
        self.dino.to(device)
        if self.clip is not None:
            self.clip.to(device)
        return self

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, masks: Iterable[np.ndarray]) -> dict[str, Tensor]:
        """Encodes the objects of a picture.

        Args:
            picture: uint8 (h, w, 3).
            masks: bool (h, w) of each object.

        Returns:
            `clip` (n, 1, d) where there is such an encoder, and `dino` (n, m, d), float32.
        """
        device = next(self.dino.parameters()).device
        scene, found = square(picture, 255), {"clip": [], "dino": []}
        whole = self.dino_extractor(scene)
        for mask in masks:
            mask = square(mask, 0)
            alone = np.where(mask[..., None], scene, np.uint8(255))
            seen = self.dino_extractor(alone)
            if self.clip is not None:
                shown = self.clip_extractor(alone)[None].to(device)
                found["clip"].append(self.clip(pixel_values=shown).image_embeds.float())
                seen = torch.cat([seen, whole, self.dino_extractor.mask(mask)])
            hidden = self.dino(pixel_values=seen[None].to(device)).last_hidden_state
            found["dino"].append(hidden[0].float())
        return {k: torch.stack(v) for k, v in found.items() if v}


def load_dino(folder: Path, channels: int) -> tuple[nn.Module, str]:
    """A DINOv2 for so many channels, and a sentence where it had to be widened.

    MIDI shows it the object, the scene and the mask. Of a network that takes RGB alone, the kernels of the
    first layer are copied: to the scene's channels, and the red one to the mask.
    """
    from transformers import Dinov2Model

    dino: Any = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    there = dino.config.num_channels
    if there == channels:
        return dino.eval(), ""
    if (there, channels) != (3, 7):
        raise ValueError(f"{folder} takes {there} channels, not {channels}")
    embeddings = dino.embeddings.patch_embeddings
    old = embeddings.projection
    new = nn.Conv2d(7, old.out_channels, old.kernel_size, old.stride)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight, old.weight, old.weight[:, :1]], 1))
        new.bias.copy_(old.bias)  # type: ignore[union-attr]
    embeddings.projection, embeddings.num_channels, dino.config.num_channels = new, 7, 7
    why = "takes 3 channels; they were copied to 7, which is untrained: use the encoder of MIDI"
    return dino.eval(), f"{folder.name} {why}"


def load_pictures(
    dino: Path, extractor: Extractor, clip: Path | None = None, clip_extractor: Extractor = CLIP
) -> tuple[PictureEncoders, str]:
    """The encoders of pictures in float32, and a sentence where one had to be changed."""
    network, note = load_dino(dino, 7 if clip else 3)
    out = PictureEncoders(network.requires_grad_(False), extractor, clip_extractor=clip_extractor)
    if clip:
        from transformers import CLIPVisionModelWithProjection

        found: Any = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=torch.float32)
        out.clip = found.eval().requires_grad_(False)
    return out, note


def load_vae(folder: Path) -> TripoSGVAE:
    """The shape VAE, in float32: coordinates times 128 do not fit bfloat16."""
    config = vae_config(read_json(folder / "config.json"), shapes(folder))
    return build(TripoSGVAE, config, folder, torch.float32).requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file; empty where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
