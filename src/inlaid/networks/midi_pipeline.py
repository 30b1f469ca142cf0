"""Diffusers pipeline that generates the shape latents of a scene with MIDI or TripoSG."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from inlaid.networks.midi_image_encoders import LoadedEncoders
from inlaid.networks.triposg import TripoSGTransformer, TripoSGVAE


class ScenePipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Rectified-flow sampler for the shape latents of all objects of a scene.

    The network predicts `data - noise`. Each step therefore adds the prediction times the step size. The
    image encoders are loaded on first use. As in other diffusers pipelines, `load_lora_weights` loads
    adapters into `transformer`.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: TripoSGTransformer, vae: TripoSGVAE, shift: float = 2.0) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(shift=shift)
        self.load_encoders: Callable[[], LoadedEncoders] | None = None
        """Function that loads the image encoders; set by the code that creates the pipeline."""
        self._encoders: LoadedEncoders | None = None

    @property
    def encoders(self) -> LoadedEncoders:
        """Image encoders, loaded on first use."""
        if self._encoders is None:
            assert self.load_encoders is not None
            self._encoders = self.load_encoders()
        return self._encoders

    @torch.no_grad()
    def __call__(
        self,
        contexts: Sequence[Tensor],
        *,
        steps: int = 50,
        guidance: float = 7.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate the latents of the n objects of a scene, float32 (n, tokens, channels).

        Args:
            contexts: one or two cross-attention contexts (n, m, context width), in the order of the network's
                arguments.
            steps: number of Euler steps.
            guidance: classifier-free guidance scale; 1 or less disables guidance. The unconditional contexts
                are zeros.
            generator: CPU generator for the initial noise.
        """
        network: Any = self.transformer
        device, dtype = network.device, network.dtype
        contexts, n = [c.to(device, dtype) for c in contexts], len(contexts[0])
        groups = [n]
        if guidance > 1:
            contexts, groups = [torch.cat([torch.zeros_like(c), c]) for c in contexts], [n, n]
        shape = (n, network.config.num_tokens, network.config.in_channels)
        x = torch.randn(shape, generator=generator).to(device)
        u = 1 - torch.arange(steps, dtype=torch.float64) / steps
        shift = self.config["shift"]
        sigmas = [*(shift * u / (1 + (shift - 1) * u)).tolist(), 0.0]
        for now, following in itertools.pairwise(sigmas):
            rows = torch.cat([x] * len(groups)).to(dtype)
            times = torch.full((len(rows),), 1000 * now, device=device)
            v = network(rows, times, *contexts, groups=groups).float()
            if guidance > 1:
                without, conditioned = v.chunk(2)
                v = without + guidance * (conditioned - without)
            x = x + (now - following) * v
        return x
