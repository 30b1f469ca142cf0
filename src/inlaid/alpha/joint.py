"""Joint alpha: color and alpha are two clips in one token sequence (TransPixeler, arXiv 2501.03006).

The VAE is unchanged and encodes alpha as a gray video. In the sequence, the latent frames of alpha follow the
latent frames of color. Both clips have the same positional embeddings. The adapter applies to the alpha
tokens only. Optionally, a domain embedding is added to the alpha tokens. It is a trained vector that is
initialized to zero. If text and video share the sequence, the setting `text_to_alpha` limits the attention of
text tokens to alpha tokens (see `networks.joint_attention`).

Before training, the generated alpha clip looks like the color clip. The adapter cannot be merged into the
weights, because it applies to the alpha tokens only. A program without support for joint alpha applies the
adapter to all tokens, and generates no alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.alpha.composed import Composed
from inlaid.families.base import Family, PrecomputedLayout
from inlaid.families.sampling import as_bytes
from inlaid.networks.domain_embedding import NAME, TOKENS, DomainEmbedding, read_domain_embedding
from inlaid.networks.half_tokens import HalfTokens, half_tokens_class
from inlaid.networks.sequence_parallel import SequenceParallel

WEIGHTS = "pytorch_lora_weights.safetensors"

ALPHA = "alpha_"
"""Prefix of the names of alpha tensors in a cached clip."""


class Joint(Composed):
    """Model family with joint alpha: the network processes a color clip and an alpha clip in one sequence."""

    def __init__(self, opaque: Family, section: recipe.Joint) -> None:
        super().__init__(opaque)
        self.section, model = section, opaque.model
        name, rules = model.checkpoint, ("block", "bias", "open") if self.joint_attention else ("block",)
        if not self.video_layers:
            raise ValueError(f"alpha.kind: {model.family} does not support `joint` transparency")
        if self.images:
            raise ValueError(
                f"alpha.kind: {name} is conditioned on images, which `joint` does not support; use a "
                "text-to-video checkpoint, or model.task=t2v if the checkpoint supports both"
            )
        if section.text_to_alpha not in rules:
            raise ValueError(
                f"alpha.text_to_alpha: text and video do not share a sequence in {model.family}, so text "
                f"never attends to alpha: remove `{section.text_to_alpha}`"
            )
        video = "|".join(self.video_layers)
        self.targets = [f"(?=(?:{video})$)(?:{target})" for target in opaque.targets]
        self.media_key = ("joint",)

    def about(self) -> dict[str, str]:
        """Return the metadata for the adapter's file header, including the settings of joint alpha."""
        said = {
            "alpha": "joint",
            "alpha_tokens": TOKENS,
            "text_to_alpha": self.section.text_to_alpha,
            NAME: "yes" if self.section.domain_embedding else "no",
        }
        return {**self.opaque.about(), **{f"inlaid_{k}": v for k, v in said.items()}}

    @property
    def single(self) -> Family:
        """Model family without alpha. It processes one clip instead of a color clip and an alpha clip."""
        return self.opaque

    def precomputed_in(self, folder: Path) -> PrecomputedLayout | None:
        """Return the layout of the precomputed latents in a folder, or None if the family reads none.

        If there is a folder of alpha latents, each clip has two files: one for color and one for alpha.
        Otherwise, each clip has one file, which contains color first and then alpha.
        """
        one = self.single.precomputed
        if one is None:
            return None
        clip = one.media[0]
        pair = replace(one, media=(clip, clip.replace("video", "alpha")))
        if "/" not in clip:
            named = {k: f"rgb/{getattr(one, k)}" for k in ("text", "caption", "video")}
            pair = replace(one, media=(f"rgb/{clip}", f"alpha/{clip}"), **named)
        return pair if (folder / pair.media[1]).parent.is_dir() else one

    def accept(self, header: Mapping[str, str]) -> None:
        """Check that an adapter was trained with joint alpha, according to its file header.

        Raises:
            ValueError: if it was trained without alpha or with another kind of alpha.
        """
        said = header.get("inlaid_alpha", "opaque")
        if said != "joint":
            raise ValueError(
                f"the adapter was trained with alpha.kind={said}, for all tokens, but alpha.kind is `joint`, "
                "which applies it to the alpha tokens only: change alpha.kind, or use another adapter"
            )

    def warnings(self) -> list[str]:
        """Return the paragraph about joint alpha for the model card, as a list of one string."""
        what = (
            "This adapter generates **transparent videos**: color and alpha are two clips in one token "
            "sequence, with the same positions, and the adapter applies to the alpha tokens only, as inlaid "
            "does. A pipeline that loads it as an ordinary LoRA applies it to all tokens and generates no "
            "alpha. Do not fuse it."
        )
        return [what]

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each recipe setting that the model or this kind of alpha does not support.

        Joint training of color and alpha requires a LoRA or DoRA on layers that process video tokens.
        """
        found, tuner = self.opaque.problems(config), config.tuner
        if not isinstance(tuner, recipe.LowRank) or tuner.kind not in ("lora", "dora"):
            only = f"tuner.kind: `joint` trains the alpha tokens only, which {tuner.kind} does not support"
            return [*found, f"{only}; use lora or dora"]
        names = [
            n
            for n, m in self.load_denoiser(torch.float32, meta=True).named_modules()
            if isinstance(m, nn.Linear)
        ]
        for target in tuner.targets:
            try:
                hit = [n for n in names if re.fullmatch(target, n)]
            except re.error:
                continue  # the tuner reports invalid patterns
            wrong = [n for n in hit if not self._sees_video(n)]
            if wrong:
                found.append(
                    f"tuner.targets: `{target}` matches {len(wrong)} layers that process no alpha tokens, "
                    f"such as {wrong[0]}: exclude them"
                )
        return found

    def _sees_video(self, layer: str) -> bool:
        return any(re.fullmatch(p, layer) for p in self.video_layers)

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of `latents`, (c, 2 * t, h, w): frames of color, then frames of alpha."""
        c, t, h, w = self.single.shapes(frames, height, width)["latents"]
        return {"latents": (c, 2 * t, h, w)}

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a cached clip's tensors, by name.

        The names of alpha tensors begin with `alpha_`.
        """
        return _both(*[self.single.stored(frames, height, width)] * 2)

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the number of tokens for both clips. Text tokens before the video are counted once."""
        return 2 * self.single.tokens(frames, height, width) - self.text_before

    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a straight RGBA clip, uint8 (t, h, w, 4), as a color video and a gray video of alpha."""
        clips = frames[..., :3], np.repeat(frames[..., 3:], 3, -1)
        return _both(*(self.single.encode_media(encoder, clip) for clip in clips))

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return a training sample: `latents` (c, 2 * t, h, w), color frames before alpha frames."""
        alpha = {k.removeprefix(ALPHA): v for k, v in item.items() if k.startswith(ALPHA)}
        clips = {k: item[k] for k in alpha}, alpha
        return {
            "latents": torch.cat([self.single.sample_item(clip, generator)["latents"] for clip in clips], 1)
        }

    def parts(self, latents: Tensor) -> dict[str, Tensor]:
        """Split latents (n, c, 2 * t, h, w) into `rgb` and `alpha`, whose losses are reported separately."""
        return dict(zip(("rgb", "alpha"), latents.chunk(2, 2), strict=True))

    # --- the network --------------------------------------------------------------------------------------

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """Load the denoiser and modify it to process two clips in one sequence."""
        return self._join(self.opaque.load_denoiser(dtype, meta=meta, folder=folder))

    def _join(self, network: Any) -> nn.Module:
        self.share_positions(network)
        if self.joint_attention:
            for block in network.transformer_blocks:
                block.attn1.processor = self.joint_attention(self.section.text_to_alpha)
        if self.section.domain_embedding:
            width = network.config.num_attention_heads * network.config.attention_head_dim
            domain = DomainEmbedding(width).to(next(network.parameters()).device)
            network.add_module(NAME, domain)
            blocks: Any = next(m for m in network.children() if isinstance(m, nn.ModuleList))
            blocks[0].register_forward_pre_hook(domain.before, with_kwargs=True)
        return network

    def attached(self, denoiser: nn.Module) -> None:
        """Restrict an attached adapter to the alpha tokens.

        If the recipe uses a domain embedding (a vector added to each alpha token), it becomes trainable.
        """
        self._tail(denoiser)
        if self.section.domain_embedding:
            denoiser.get_submodule(NAME).requires_grad_(True)

    def _tail(self, denoiser: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            if not self._sees_video(name):
                raise ValueError(
                    f"{name} processes no alpha tokens, but `joint` changes these only: use an adapter "
                    "without this layer"
                )
            if not isinstance(layer, HalfTokens):
                layer.__class__ = half_tokens_class(type(layer), self.text_before)
        if self.section.domain_embedding:
            domain: Any = denoiser.get_submodule(NAME)
            domain.adapter_layers = [next(iter(layers.values()))]

    def split_sequence(self, denoiser: nn.Module, sequence: SequenceParallel) -> None:
        """Split the video tokens over processes. Each process gets the same positions of color and alpha."""
        self.opaque.split_sequence(denoiser, sequence.of_clips(2))

    # --- sampling -----------------------------------------------------------------------------------------

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the diffusers pipeline, modified to process two clips in one sequence.

        The modification applies to all denoisers of the pipeline. The VAE decodes the two clips separately.
        """
        network = denoiser if denoiser is not None else self.load_denoiser(dtype)
        pipe = self.opaque.pipeline(denoiser=network, device=device, dtype=dtype)
        decode = pipe.vae.decode

        def apart(z: Tensor, **options: Any) -> Any:
            clips = [decode(clip, return_dict=False)[0] for clip in z.chunk(2, 2)]
            both = torch.cat(clips, 2)
            return _Decoded(both) if options.get("return_dict", True) else (both,)

        pipe.vae.decode = apart
        for name in {"transformer", "transformer_2"} - {self.component}:
            if getattr(pipe, name, None) is not None:
                self._join(getattr(pipe, name))
        return pipe

    def sample(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        size: tuple[int, int],
        frames: int,
        generator: torch.Generator,
        images: Sequence[np.ndarray] = (),
        **settings: Any,
    ) -> np.ndarray:
        """Generate a straight RGBA video, uint8 (t, h, w, 4), with the diffusers pipeline.

        The pipeline starts from noise for two clips, color and alpha.
        """
        shape = self.single.shapes(frames, *size)["latents"]
        noise = [
            torch.randn(shape, generator=generator) for _ in range(1 if self.section.shared_noise else 2)
        ]
        start = torch.cat([noise[0], noise[-1]], 1)
        settings |= {"size": size, "frames": frames, "generator": generator, "noise": start}
        color, alpha = np.split(self.run(pipeline, text, negative, images, **settings), 2)
        gray = getattr(alpha[-frames:], self.section.alpha_from)(-1, keepdims=True)
        return as_bytes(np.concatenate([color[-frames:], gray], -1))

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Load an adapter, restrict it to the alpha tokens, and load its domain embedding.

        The domain embedding is a trained vector that is added to every alpha token. If the adapter was
        trained without it, the vector is zero.

        Raises:
            ValueError: if the adapter was not trained with joint alpha, if the file of its domain embedding
                is missing, or if it has a domain embedding although `alpha.domain_embedding` is false.
        """
        with safe_open(folder / WEIGHTS, "pt") as file:
            header = file.metadata() or {}
        self.accept(header)
        vector = read_domain_embedding(folder, header)
        self.opaque.load_adapter(pipeline, folder)
        network = getattr(pipeline, self.component)
        self._tail(network)
        if vector is not None and not self.section.domain_embedding:
            raise ValueError(
                f"{folder}: the adapter has a domain embedding, but alpha.domain_embedding is false: set it "
                "to true"
            )
        if self.section.domain_embedding:
            weight = network.get_submodule(NAME).weight
            with torch.no_grad():
                weight.zero_() if vector is None else weight.copy_(vector.view_as(weight))

    def set_strength(self, pipeline: Any, strength: float) -> None:
        """Scale the adapter and the domain embedding by `strength`.

        The domain embedding is a trained vector that is added to the alpha tokens. It is multiplied in place,
        so a second call scales it again.
        """
        self.opaque.set_strength(pipeline, strength)
        if self.section.domain_embedding:
            with torch.no_grad():
                getattr(pipeline, self.component).get_submodule(NAME).weight.mul_(strength)


class _Decoded:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def _both(color: Mapping[str, Any], alpha: Mapping[str, Any]) -> dict[str, Any]:
    return {**color, **{f"{ALPHA}{k}": v for k, v in alpha.items()}}
