"""Generation with the standard diffusers pipeline of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid.families.other_programs import OtherPrograms

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn


class Sampling(OtherPrograms):
    """Base class of `Family`. Its methods generate samples with the model's diffusers pipeline."""

    images: Sequence[str] = ()
    """Names of the conditioning images of a clip, in the order that `sample` expects, such as `first` and
    `last` for the first and the last frame. Empty for text-to-video."""

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the encoded captions of a batch. `predict` takes the result as part of `cond`."""
        import torch

        return {name: torch.stack([item[name] for item in text]) for name in text[0]}

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the standard diffusers pipeline with the given denoiser.

        If `denoiser` is None, the checkpoint's own denoiser is loaded with `dtype`. All components have the
        dtype of the denoiser. The pipeline has no text encoder, because `sample` receives encoded text.
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
        """Generate a video, uint8 (t, h, w, `channels`), with the standard diffusers pipeline.

        `text` and `negative` are encoded prompts from `encode_text`. `images` are conditioning images, uint8
        (h, w, 3), in the order of the attribute `Family.images`.
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
        """Run the standard diffusers pipeline and return the video (t, h, w, 3) with values in [0, 1].

        Sampling starts from `noise` (c, t, h, w). If `noise` is None, the pipeline samples the initial noise.
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
        """Convert noise (c, t, h, w) to the layout of the diffusers pipeline's argument `latents`."""
        return noise[None]

    def pipeline_inputs(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
    ) -> dict[str, Any]:
        """Return the diffusers pipeline's arguments for encoded prompts and conditioning images.

        The prompt embeddings have the dtype of the denoiser.
        """
        from PIL import Image

        device, dtype = pipeline._execution_device, getattr(pipeline, self.component).dtype
        cond, uncond = (self.collate([item])["text"].to(device, dtype) for item in (text, negative))
        names = {"first": "image", "last": "last_image"}
        inputs = {names[n]: Image.fromarray(i) for n, i in zip(self.images, images, strict=True)}
        return {"prompt_embeds": cond, "negative_prompt_embeds": uncond, **inputs}

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Load an adapter into a pipeline under the name `inlaid`.

        The adapter is the file `pytorch_lora_weights.safetensors` in `folder`.
        """
        pipeline.load_lora_weights(str(folder), adapter_name="inlaid")

    def set_strength(self, pipeline: Any, strength: float) -> None:
        """Set the scale of the loaded adapter: 1 as trained, 0 to disable its low-rank update."""
        pipeline.set_adapters(["inlaid"], [strength])


def as_bytes(video: np.ndarray) -> np.ndarray:
    """Convert a video with values in [0, 1] to uint8 by rounding."""
    return (video * 255).round().clip(0, 255).astype("uint8")
