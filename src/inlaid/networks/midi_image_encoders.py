"""Image encoders of MIDI and TripoSG: CLIP (MIDI only) and DINO embeddings of each object in an image.

The encoders are models of the transformers library. They are frozen by default, and their outputs are cached.
If an encoder is trained, its preprocessed input images are cached instead, and the encoder runs inside the
denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inlaid.console import once
from inlaid.networks.triposg import TripoSGTransformer

VERSION = "images 2"
"""Version of the preprocessing, part of cache keys; increase it when the result of `encoder_inputs`
changes."""

MARGIN = 0.1
"""White margin on each side of a cropped object, as a fraction of the longer side of the object."""

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
"""Default configuration of MIDI's CLIP encoder (`image_encoder_1`): ViT-L/14, as published."""

DINO_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
"""Default configuration of the DINO encoders of MIDI (`image_encoder_2`) and TripoSG: DINOv2-large."""

DROPOUT = {
    "clip": ("attention_dropout",),
    "dino": ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
}
"""Names of the dropout rates in the encoder configurations. All rates are set to 0, as published."""

PROJECTIONS = r"(q_proj|k_proj|v_proj|out_proj|o_proj|query|key|value|attention\.output\.dense)"
"""Regular expression for the names of the encoders' attention projections; the names depend on the version of
the transformers library."""


@dataclass(frozen=True)
class Extractor:
    """Preprocessing of a square image for an encoder: resize, center crop and normalization.

    The settings are those of `preprocessor_config.json`.
    """

    edge: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], default: Extractor) -> Extractor:
        """Create the image preprocessing from the content of `preprocessor_config.json`.

        Missing values are taken from `default`.
        """

        def number(value: Any, fallback: int) -> int:
            if isinstance(value, Mapping):
                value = value.get("shortest_edge") or value.get("height")
            return int(value) if value else fallback

        edge = number(config.get("size"), default.edge)
        crop = number(config.get("crop_size"), default.crop) if config.get("do_center_crop", True) else edge
        mean, std = (tuple(config.get(f"image_{n}") or getattr(default, n)) for n in ("mean", "std"))
        return cls(edge, crop, mean, std)

    def image(self, pixels: np.ndarray) -> Tensor:
        """Resize (bicubic) and center-crop an image from uint8 (h, w, 3) to uint8 (3, crop, crop)."""
        image, short = Image.fromarray(pixels), min(pixels.shape[:2])
        width, height = (self.edge * side // short for side in image.size)
        resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        return self._center(torch.from_numpy(resized).permute(2, 0, 1))

    def mask(self, mask: np.ndarray) -> Tensor:
        """Convert a mask, bool (n, n), to uint8 (1, crop, crop) with the values 0 and 255.

        As in the published pipeline, torch resizes the mask with nearest neighbor, and the center is cropped.
        Pillow would select other pixels.
        """
        pixels = torch.from_numpy(mask.astype(np.uint8) * 255)[None, None]
        return self._center(nn.functional.interpolate(pixels, (self.edge, self.edge), mode="nearest")[0])

    def normalized(self, pixels: Tensor) -> Tensor:
        """Convert images from uint8 (n, channels, h, w) to normalized float32.

        The first 3 or 6 channels are one or two RGB images. They are normalized by mean and std. A 7th
        channel is a mask with values 0 and 255. It is divided by 255.
        """
        mean, std = ([*x, *x, y][: pixels.shape[1]] for x, y in ((self.mean, 0.0), (self.std, 1.0)))
        shift, scale = (torch.tensor(x, device=pixels.device).view(1, -1, 1, 1) for x in (mean, std))
        return (pixels.float() / 255 - shift) / scale

    def _center(self, image: Tensor) -> Tensor:
        """Crop the center of an image (channels, h, w)."""
        top, left = ((side - self.crop) // 2 for side in image.shape[1:])
        return image[:, top : top + self.crop, left : left + self.crop]


CLIP = Extractor(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Preprocessing of MIDI's CLIP encoder (`image_encoder_1`), as published."""

DINO = Extractor(512, 512, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Preprocessing of MIDI's DINO encoder (`image_encoder_2`), as published."""

DINO_SINGLE = Extractor(256, 224, DINO.mean, DINO.std)
"""Preprocessing of TripoSG's DINO encoder, as published."""


@dataclass(frozen=True)
class ImageEncoder:
    """Description of one image encoder of a checkpoint, without its weights."""

    kind: Literal["clip", "dino"]
    name: str
    """Name of the encoder's folder in the checkpoint. If the encoder is trained, its submodule in the
    transformer has the same name (see `add_encoders`)."""
    extractor: Extractor
    channels: int
    """Number of input channels: 3 (RGB of the object), or 7 (also RGB of the whole image, and the object's
    mask)."""
    config: Mapping[str, Any]
    """Contents of the encoder's `config.json`; missing values are filled in from the published
    configuration."""
    crops: bool = False
    """True if the input image shows only the object, enlarged to fill the image, as published for TripoSG.
    False if it shows the object at its place in the whole image, as published for MIDI-3D."""

    @property
    def patches(self) -> int:
        """Number of patch tokens that DINO returns for an image, without the class token."""
        return (self.extractor.crop // self.config["patch_size"]) ** 2


@dataclass(frozen=True)
class ImageConditioning:
    """All image encoders of a checkpoint, and the subset that is trained.

    The keys are `clip` and `dino`. Their order is the order in which the transformer takes the outputs of the
    encoders.
    """

    encoders: Mapping[str, ImageEncoder]
    trained: Mapping[str, ImageEncoder]
    """Encoders that are trained. The cache stores their input images instead of their outputs."""

    @classmethod
    def of(
        cls, read: Callable[[str], Mapping[str, Any] | None], single: bool, chosen: str
    ) -> ImageConditioning:
        """Describe the image encoders of a checkpoint, using its configuration files.

        Args:
            read: function that takes the name of a component and returns its configuration, or None if it has
                none.
            single: True if DINO is the only encoder, as in TripoSG.
            chosen: encoders to train: `frozen` (none), `dino`, `clip` or `both`.

        Raises:
            ValueError: if a chosen encoder is not in the checkpoint.
        """
        if single and chosen in ("clip", "both"):
            raise ValueError("model.options.image_encoders: this checkpoint has DINO only: set it to dino")

        def encoder(kind: Literal["clip", "dino"], end: str, usual: Extractor, channels: int) -> ImageEncoder:
            extractor = Extractor.of(read(f"feature_extractor_{end}") or {}, usual)
            config = {
                **(CLIP_LARGE if kind == "clip" else DINO_LARGE),
                **(read(f"image_encoder_{end}") or {}),
            }
            return ImageEncoder(kind, f"image_encoder_{end}", extractor, channels, config, crops=single)

        two = () if single else (encoder("clip", "1", CLIP, 3), encoder("dino", "2", DINO, 7))
        encoders = {e.kind: e for e in two or (encoder("dino", "dinov2", DINO_SINGLE, 3),)}
        return cls(encoders, {kind: e for kind, e in encoders.items() if chosen in (kind, "both")})

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the checkpoint components that determine the cached image conditioning.

        For a frozen encoder, these are the encoder and its preprocessing; for a trained encoder, only the
        preprocessing.
        """
        pairs = [(e, e.name.replace("image_encoder", "feature_extractor")) for e in self.encoders.values()]
        found = [[extractor] if e.kind in self.trained else [e.name, extractor] for e, extractor in pairs]
        return tuple(name for names in reversed(found) for name in names)

    @property
    def targets(self) -> tuple[str, ...]:
        """Adapter targets: regular expressions that match the attention projections of trained encoders.

        The tuple is empty if no encoder is trained.
        """
        names = "|".join(e.name for e in self.trained.values())
        return (rf"({names})\..*\.{PROJECTIONS}",) if names else ()

    def shapes(self, n: int, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the tensor shapes of the image conditioning, by tensor name.

        A frozen encoder has tokens: (n, 1, d) for `clip` or (n, m, d) for `dino`. A trained encoder has
        images (n, channels, s, s) instead. If any encoder is trained, there is also the scalar `conditioned`.
        It is 0 if the image conditioning is dropped, else 1.

        Args:
            n: number of objects.
            widths: token width d of each encoder.
        """
        out: dict[str, tuple[int, ...]] = {}
        for (kind, encoder), width in zip(self.encoders.items(), widths, strict=True):
            out[kind] = (n, 1 if kind == "clip" else encoder.patches + 1, width)
            if kind in self.trained:
                out[kind] = (n, encoder.channels, encoder.extractor.crop, encoder.extractor.crop)
        return {**out, **({"conditioned": ()} if self.trained else {})}

    def select(self, item: Mapping[str, Tensor], kept: Tensor, conditioned: bool) -> dict[str, Tensor]:
        """Return the image conditioning of some objects of a scene.

        Args:
            item: cached tensors of the scene.
            kept: indices of the objects.
            conditioned: False to drop the image conditioning. The tokens of frozen encoders are then zero.
                The images for trained encoders are kept in both cases.

        Returns:
            The tensors by encoder. If an encoder is trained, the entry `conditioned` tells the network to use
            the images (1) or to ignore them (0).
        """
        out = {k: item[k][kept] if k in self.trained else item[k][kept] * conditioned for k in self.encoders}
        return {**out, **({"conditioned": torch.tensor(float(conditioned))} if self.trained else {})}

    def rows(self, cond: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Convert the image conditioning of b scenes with n objects each to arguments of the transformer.

        The first result has one entry for each encoder: its cross-attention context or, if the encoder is
        trained, its input images. Entries are flattened from (b, n, ...) to (b * n, ...). The second result
        contains further keyword arguments.
        """
        rows = {k: cond[k].flatten(0, 1) for k in self.encoders}
        contexts = [v if k in self.trained else v.to(dtype) for k, v in rows.items()]
        n = len(contexts[0]) // len(cond[next(iter(rows))])
        return contexts, {"conditioned": cond["conditioned"].repeat_interleave(n)} if self.trained else {}


def square(pixels: np.ndarray, fill: int) -> np.ndarray:
    """Pad an image (h, w, ...) to a square with the value `fill`. The image stays in the center."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    pad = ((top, side - height - top), (left, side - width - left), *[(0, 0)] * (pixels.ndim - 2))
    return np.pad(pixels, pad, constant_values=fill)


def object_crop(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Crop an image to an object and add a white margin, as in the published code of TripoSG.

    Args:
        image: uint8 (h, w, 3), white outside the object.
        mask: mask of the object, bool (h, w); not empty.

    Returns:
        uint8 (n, m, 3) with the object in the center. n and m are equal, or differ by one pixel.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = image.shape[:2]
    longest = max(height, width)
    border = int(longest * MARGIN)
    top, left = (int(border + (longest - side) / 2) for side in (height, width))
    return np.pad(image, ((top, top), (left, left), (0, 0)), constant_values=255)


def encode(encoder: ImageEncoder, network: nn.Module, pixels: Tensor) -> Tensor:
    """Encode preprocessed images, uint8 (n, channels, h, w), with CLIP or DINO.

    CLIP returns one token per image, (n, 1, d); DINO returns m tokens per image, (n, m, d).
    """
    weight = next(network.parameters())
    inputs = encoder.extractor.normalized(pixels.to(weight.device)).to(weight.dtype)
    out: Any = network(pixel_values=inputs)
    return out.image_embeds[:, None] if encoder.kind == "clip" else out.last_hidden_state


def encoder_inputs(
    encoders: Mapping[str, ImageEncoder], image: np.ndarray, masks: Iterable[np.ndarray]
) -> dict[str, Tensor]:
    """Return the preprocessed input images of each encoder for the objects in an image.

    Args:
        encoders: encoders by kind (`clip`, `dino`).
        image: uint8 (h, w, 3).
        masks: one mask per object, bool (h, w).

    Returns:
        Input images by kind of encoder, uint8 (n, channels, s, s). They show the object on a white
        background, at its place in the image or cropped (see `ImageEncoder.crops`). Inputs with 7 channels
        also contain the whole image and the mask.
    """
    scene = square(image, 255)
    whole = {kind: each.extractor.image(scene) for kind, each in encoders.items() if each.channels == 7}
    found: dict[str, list[Tensor]] = {kind: [] for kind in encoders}
    for mask in masks:
        mask = square(mask, 0)
        masked = np.where(mask[..., None], scene, np.uint8(255))
        for kind, encoder in encoders.items():
            shown = object_crop(masked, mask) if encoder.crops else masked
            parts = [encoder.extractor.image(shown)]
            if kind in whole:
                parts += [whole[kind], encoder.extractor.mask(mask)]
            found[kind].append(torch.cat(parts))
    return {kind: torch.stack(each) for kind, each in found.items()}


@dataclass(frozen=True)
class LoadedEncoders:
    """Image encoders of a checkpoint, and the networks that are loaded, both by kind (`clip`, `dino`)."""

    encoders: Mapping[str, ImageEncoder]
    networks: Mapping[str, nn.Module]

    @torch.no_grad()
    def __call__(self, image: np.ndarray, masks: Iterable[np.ndarray]) -> dict[str, Tensor]:
        """Encode the n objects in an image.

        Args:
            image: uint8 (h, w, 3).
            masks: one mask per object, bool (h, w).

        Returns:
            Float32 embeddings: `dino` (n, m, d) with m tokens per object, and `clip` (n, 1, d) if the
            checkpoint has a CLIP encoder. If the network of an encoder is not loaded, the result contains
            the encoder's input instead (see `encoder_inputs`).
        """
        out = encoder_inputs(self.encoders, image, masks)
        for kind, network in self.networks.items():
            encoder = self.encoders[kind]
            out[kind] = torch.cat([encode(encoder, network, each[None]).float() for each in out[kind]])
        return out


def add_encoders(network: TripoSGTransformer, encoders: Mapping[int, tuple[ImageEncoder, nn.Module]]) -> None:
    """Add image encoders to a transformer as submodules, so that they are trained with it.

    The names of the submodules are the names of the encoders in the checkpoint. The transformer then also
    accepts images, uint8 (rows, channels, h, w), in place of cross-attention contexts, and encodes them. It
    accepts a new argument `conditioned` (rows,). The value 0 replaces the encoded image of a row by zeros
    (for classifier-free guidance). The value 1 keeps it.

    Args:
        network: the transformer.
        encoders: the settings of each encoder and the encoder itself, by the index of the cross-attention
            context that it produces.
    """

    def encode_contexts(
        _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        x, t, *contexts = args
        conditioned = options.pop("conditioned", None)
        for index, (encoder, _) in encoders.items():
            if contexts[index].ndim == 4:
                tokens = encode(encoder, network.get_submodule(encoder.name), contexts[index])
                contexts[index] = (
                    tokens if conditioned is None else tokens * conditioned.to(tokens.dtype)[:, None, None]
                )
        return (x, t, *contexts), options

    for encoder, module in encoders.values():
        network.add_module(encoder.name, module)
    # Patch embeddings are computed in the storage dtype of the weights, so the encoders must not be cast.
    names = [encoder.name for encoder, _ in encoders.values()]
    network._skip_layerwise_casting_patterns = [*network._skip_layerwise_casting_patterns, *names]
    network.register_forward_pre_hook(encode_contexts, with_kwargs=True)


def build(encoder: ImageEncoder, folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """Build a frozen image encoder, and load the weights in `folder`.

    Without a folder, the encoder is built on the meta device.

    The DINO encoder of MIDI has 7 input channels: RGB of the object, RGB of the scene, and the mask. Weights
    for 3 input channels are extended to 7, with a warning. In the first layer, both RGB images then use the
    kernels of the 3 channels. The mask uses the kernel of the red channel.

    Raises:
        ValueError: if the weights have any other number of input channels.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    kinds: Any = {
        "clip": (CLIPVisionModelWithProjection, CLIPVisionConfig),
        "dino": (Dinov2Model, Dinov2Config),
    }
    kind, config = kinds[encoder.kind]
    no_dropout = dict.fromkeys(DROPOUT[encoder.kind], 0.0)
    if folder is None:
        with torch.device("meta"):
            network = kind(
                config.from_dict({**encoder.config, "num_channels": encoder.channels, **no_dropout})
            ).to(dtype)
    else:
        network = kind.from_pretrained(folder, dtype=dtype, **no_dropout)
    channels = network.config.num_channels
    if (channels, encoder.channels) == (3, 7):
        embeddings = network.embeddings.patch_embeddings
        old = embeddings.projection
        new = nn.Conv2d(7, old.out_channels, old.kernel_size, old.stride, dtype=dtype)
        with torch.no_grad():
            new.weight.copy_(torch.cat([old.weight, old.weight, old.weight[:, :1]], 1))
            new.bias.copy_(old.bias)  # type: ignore[union-attr]
        embeddings.projection, embeddings.num_channels, network.config.num_channels = new, 7, 7
        why = "has 3 input channels, copied to 7, which is untrained: use the encoder of MIDI"
        once(f"warning: {encoder.name} {why}")
    elif channels != encoder.channels:
        raise ValueError(f"{folder} has {channels} input channels, expected {encoder.channels}")
    return network.eval().requires_grad_(False)
