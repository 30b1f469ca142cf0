"""Interface of a model family, through which the rest of the package uses an architecture.

A family converts between the conventions of its model and those of the package, in which pixels are uint8
(t, h, w, c), latents are normalized and (c, t, h, w) per sample, and time runs from 0 (data) to 1 (noise).
Only families know schedulers, scaling factors and module names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid.families.checkpoint import Checkpoint
from inlaid.families.grid import Grid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.objectives import Objective


@dataclass(frozen=True)
class PrecomputedLayout:
    """File layout of another trainer's precomputed latents: path patterns in which `*` is the clip's name."""

    media: Sequence[str]
    """Latents of the clip, whose file name is the clip's name, then latents of its conditioning images."""
    text: str
    """Text embeddings of the clip."""
    caption: str = "*.txt"
    """Caption of the clip, if the trainer stored it."""
    video: str = "*"
    """Source video of the clip, without file extension."""

    @property
    def description(self) -> str:
        """Layout as text, for messages."""
        return " + ".join((*self.media, self.text)).replace("*", "NAME")


class Family(Checkpoint, ABC):
    """Base class of model families: an architecture and its conventions.

    The constructor reads configuration files, never weights.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Recipe values that differ from the defaults of the sections, as a nested mapping."""
    targets: Sequence[str]
    """Default adapter targets: regular expressions over full module names."""
    encoders: ClassVar[Mapping[str, Sequence[str]]] = {
        "media": ("vae",),
        "text": ("tokenizer", "text_encoder"),
    }
    """Components of the checkpoint that encode `media` and `text`; their files are part of the cache key."""
    original_names: ClassVar[Sequence[tuple[str, str]]] = ()
    """Pairs of module names inside a block or at the root: (name in the original code, name in diffusers)."""
    widths: ClassVar[Mapping[int, str]] = {}
    """Names of the published model sizes by hidden width, for messages."""
    text_length: ClassVar[int]
    """Maximum number of text tokens of the network."""
    fps: float
    """Frame rate of the training data of the published checkpoint."""
    modality: ClassVar[str] = "video"
    """Modality of inputs and outputs: `video` or `scene`."""
    choices: ClassVar[Mapping[str, Sequence[str | int | float | bool]]] = {}
    """Options specific to the family (`model.options` in a recipe) and their allowed values, the default
    first. If an option changes the result of `encode_media`, `media_key` must include it."""
    channels: int = 3
    """Channels of the clips that `encode_media` accepts and `sample` returns: 3 for RGB, 4 for straight
    RGBA."""
    media_key: Sequence[str] = ()
    """Settings that determine the values of a cached clip, in addition to the files of the encoder."""
    bytewise: Sequence[str] = ()
    """Names of the tensors of a cached clip that have one byte per value, such as pixels; all others have
    two bytes per value."""
    images: Sequence[str] = ()
    """Conditioning images of a clip, in the order of `sample`: none, `first`, or `first` and `last`."""
    video_layers: ClassVar[Sequence[str]] = ()
    """Linear layers that process all video tokens, as regular expressions over full module names. Joint alpha
    adapts only these layers. Empty if the family does not support joint alpha."""
    text_before: ClassVar[int] = 0
    """Number of text tokens that precede the video tokens in the layers of `video_layers`."""
    joint_attention: ClassVar[Any] = None
    """Factory that returns an attention processor for a `networks.joint_attention.Rule`; None if text and
    video do not share a sequence."""
    grid: Grid
    precomputed: PrecomputedLayout | None = None
    """Layout of the precomputed latents that this family reads, if any. The files contain VAE moments, one
    file for each entry of `stored`."""

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        self.options = _chosen(model, self.choices)

    @property
    def single(self) -> Family:
        """The family for one clip: self; with joint alpha (two clips in one sequence), the wrapped family."""
        return self

    def precomputed_in(self, folder: Path) -> PrecomputedLayout | None:
        """Return the layout of the precomputed latents in a folder, or None if the family reads none."""
        return self.precomputed

    def about(self) -> dict[str, str]:
        """Return the header metadata that records what a weights file was trained on."""
        return {"inlaid_base": self.name, **{f"inlaid_{k}": str(v) for k, v in self.options.items()}}

    def warnings(self) -> list[str]:
        """Return paragraphs for the model card about limitations in using the trained weights."""
        return []

    def accept(self, header: Mapping[str, str]) -> None:
        """Check the header of an adapter against this family.

        Raises:
            ValueError: if the adapter requires other settings, such as another kind of alpha.
        """
        kind = header.get("inlaid_alpha")
        if kind and self.channels == 3:
            raise ValueError(
                f"this adapter was trained with alpha.kind={kind} and gives only noise without it"
            )

    @abstractmethod
    def shapes(self, length: int, height: int, width: int, /) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a clip's `latents` (c, t, h, w) and conditioning tensors; see `sample_item`.

        The arguments are the fields of an `Extent`.

        Args:
            length: number of frames of a video, or of objects in a scene.
            height: in pixels.
            width: in pixels.
        """

    def stored(self, length: int, height: int, width: int, /) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that `encode_media` returns for a clip and the cache stores."""
        return self.shapes(length, height, width)

    @abstractmethod
    def tokens(self, length: int, height: int, width: int, /) -> int:
        """Return the sequence length of the denoiser's self-attention, in tokens."""

    def load_media_encoder(self, device: torch.device) -> Any:
        """Load the `encoder` argument of `encode_media`, by default the VAE in float32."""
        import torch

        return self.load("vae", torch.float32).to(device).eval().requires_grad_(False)

    @abstractmethod
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode uint8 (t, h, w, `channels`) to the float32 tensors that the cache stores."""

    @abstractmethod
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode each caption to an item with `text` (n, d), without padding if the network masks padding."""

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return a training sample of a cached clip: normalized `latents` and conditioning tensors.

        All random choices (a sample of the posterior, a noised or dropped image) use `generator`, so they
        depend only on the seed and the index of the micro-batch.
        """
        return dict(item)

    def share_positions(self, denoiser: nn.Module) -> None:
        """Modify the denoiser to use the same positions for two clips in one sequence.

        Called for joint alpha, so only in families with `video_layers`.
        """
        raise NotImplementedError

    def attached(self, denoiser: nn.Module) -> None:
        """Hook called after an adapter is attached, for example to make further parameters trainable."""

    @abstractmethod
    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> Objective:
        """Return the training objective of the published checkpoint, changed by a recipe section.

        Args:
            section: `objective` section of the recipe.
            size: height and width of the clips in pixels.
        """

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Collate the text items of a batch to the text tensors in the `cond` of `predict`."""
        import torch

        return {name: torch.stack([item[name] for item in text]) for name in text[0]}

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict noise - data (flow matching) or v (v-prediction), in the package's conventions.

        Args:
            denoiser: from `load_denoiser`.
            x_t: noisy latents (n, c, t, h, w).
            t: (n,), 0 = data, 1 = noise.
            cond: text tensors from `collate`, and the stacked conditioning tensors from `sample_item`.
        """

    def parts(self, latents: Tensor) -> dict[str, Tensor]:
        """Split latents (n, c, t, h, w) into named parts with separately reported losses; empty if none."""
        return {}

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the stock diffusers pipeline with `denoiser`, or with the checkpoint's own if it is None.

        All components have the dtype of the denoiser. The pipeline has no text encoder, because `sample`
        receives encoded text.
        """
        from diffusers import DiffusionPipeline

        network: Any = denoiser if denoiser is not None else self.load_denoiser(dtype)
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, self.component: network}
        options = {"torch_dtype": network.dtype, **self.fetched_pipeline(parts)}
        with self.loading("model_index.json"):
            pipe = DiffusionPipeline.from_pretrained(self.source, **options, **parts)
        return pipe.to(device)

    def sample(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        size: tuple[int, int],
        frames: int,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        images: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """Generate a video, uint8 (t, h, w, `channels`), with the stock pipeline.

        `text` and `negative` are items from `encode_text`; `images` are uint8 (h, w, 3), in the order of the
        attribute `images`.
        """
        settings = {"size": size, "frames": frames, "steps": steps, "guidance": guidance}
        video = self.run(pipeline, text, negative, images, generator=generator, **settings)
        # For an even number of latent frames, some decoders return a few extra frames at the start.
        return as_bytes(video[-frames:])

    def run(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
        *,
        size: tuple[int, int],
        frames: int,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """Run the stock pipeline and return the video (t, h, w, 3) in [0, 1].

        Sampling starts from `noise` (c, t, h, w); if it is None, the pipeline samples the noise.
        """
        start = {} if noise is None else {"latents": self.pipeline_latents(noise, pipeline)}
        return pipeline(
            **self.pipeline_inputs(pipeline, text, negative, images),
            **start,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).frames[0]

    def pipeline_latents(self, noise: Tensor, pipeline: Any) -> Tensor:
        """Convert noise (c, t, h, w) to the layout of the stock pipeline's argument `latents`."""
        return noise[None]

    def pipeline_inputs(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
    ) -> dict[str, Any]:
        """Return the pipeline arguments for encoded text, in the dtype of the denoiser, and for images."""
        from PIL import Image

        device, dtype = pipeline._execution_device, getattr(pipeline, self.component).dtype
        cond, uncond = (self.collate([item])["text"].to(device, dtype) for item in (text, negative))
        names = {"first": "image", "last": "last_image"}
        inputs = {names[n]: Image.fromarray(i) for n, i in zip(self.images, images, strict=True)}
        return {"prompt_embeds": cond, "negative_prompt_embeds": uncond, **inputs}

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Load `pytorch_lora_weights.safetensors` from a folder into a pipeline, as adapter `inlaid`."""
        pipeline.load_lora_weights(str(folder), adapter_name="inlaid")

    def set_strength(self, pipeline: Any, strength: float) -> None:
        """Set the scale of the loaded adapter: 1 as trained, 0 without its low-rank update."""
        pipeline.set_adapters(["inlaid"], [strength])

    def problems(self, config: recipe.Config) -> list[str]:
        """Return messages about settings of a recipe that this checkpoint does not support, if any."""
        data, sample = config.data, config.sample
        sizes = [("data", frames, data.size) for frames in data.frames]
        if sample.frames or sample.size:
            sizes.append(("sample", sample.frames or max(data.frames), sample.size or data.size))
        found = [f"{section}: {p}" for section, n, size in sizes for p in self.grid.problems(n, *size)]
        found += [f"sample.images: {p}" for p in self.missing_images(len(sample.prompts), sample.images)]
        if config.alpha.kind == "opaque" and data.matte != recipe.Matte():
            found.append("data.matte: an opaque run reads no alpha mattes; remove it, or set alpha.kind")
        try:
            self.objective(config.objective, data.size)
        except ValueError as error:
            found.append(str(error))
        return list(dict.fromkeys(found))

    def notes(self, config: recipe.Config) -> list[str]:
        """Return messages about settings of a recipe that are valid but unusual."""
        return []

    def missing_images(self, prompts: int, images: Sequence[Sequence[str]]) -> list[str]:
        """Return messages about missing, unexpected or unreadable prompt images; empty if all are valid."""
        name = self.model.checkpoint
        if not self.images:
            return [f"{name} is text-to-video and uses no images; leave images out"] if images else []
        what = " and a ".join(f"{each} image" for each in self.images)
        if prompts != len(images):
            return [f"{name} needs a {what} for each prompt: {prompts} prompts, {len(images)} with images"]
        wrong = [f"prompt {i} has {len(g)}" for i, g in enumerate(images, 1) if len(g) != len(self.images)]
        if wrong:
            return [f"{name} needs a {what} for each prompt: {', '.join(wrong)}"]
        return _unreadable(dict.fromkeys(Path(file) for each in images for file in each))


def _unreadable(images: Iterable[Path]) -> list[str]:
    """Return messages about files that are not images."""
    from inlaid.media.kinds import IMAGES
    from inlaid.media.video import probe

    found = []
    for path in images:
        try:
            if path.suffix.lower() not in IMAGES:
                raise ValueError(f"{path}: not an image; use a file such as start.png")
            probe(path)
        except ValueError as error:
            found.append(str(error))
    return found


def as_bytes(video: np.ndarray) -> np.ndarray:
    """Convert a video in [0, 1] to uint8, with rounding."""
    return (video * 255).round().clip(0, 255).astype("uint8")


def _chosen(model: recipe.Model, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the value of each family option: that of the recipe, or the default.

    Raises:
        ValueError: if the recipe sets an unknown option or value.
    """
    wrong = []
    for key, value in model.options.items():
        if key not in choices:
            has = f"its options are {', '.join(choices)}" if choices else "it has none, leave it out"
            wrong.append(f"model.options.{key}: {model.family} has no such option; {has}")
        elif value not in choices[key]:
            values = ", ".join(map(str, choices[key]))
            wrong.append(f"model.options.{key}: `{value}` is not one of {values}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return {key: model.options.get(key, values[0]) for key, values in choices.items()}
