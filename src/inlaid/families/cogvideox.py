"""CogVideoX 1.0 and 1.5 (Yang et al. 2024): https://arxiv.org/abs/2408.06072.

Supported checkpoints: 2B, 5B, 5B-I2V, 1.5-5B and 1.5-5B-I2V.

Pitfalls:

- The network takes latents with frames before channels, and attends to all text tokens, including padding.
  The published checkpoints have 226 text tokens (`max_text_seq_length` of the transformer).
- The network predicts v on a schedule of 1000 integer timesteps.
- Latents are samples of the VAE posterior, so the cache stores the posterior's means and log-variances.
- In 1.5, a token covers two latent frames, so clips have 8n+5 frames.
- 1.5-I2V was trained with image latents *divided* by the scaling factor. The network input
  `ofs` is always 2.
- Image-to-video (I2V) training adds noise to the pixels of the image. Adding noise to latents is not
  equivalent, so the cache stores several encodings of the image, each with different noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.families.base import Family, PrecomputedLayout
from inlaid.families.grid import Grid
from inlaid.families.original_names import OriginalNames
from inlaid.families.other_programs import JointLayout
from inlaid.networks.joint_attention import CogVideoXJointAttention, halve_cogvideox
from inlaid.networks.sequence_parallel import SequenceParallel
from inlaid.objectives import VPrediction

COPIES = 4
"""Number of encodings of the first frame in the cache, each with different noise. A training sample uses one
of these encodings."""

IMAGE_DROPOUT = 0.05
"""Probability that the image latents of a training sample are replaced by zeros."""


_BLOCK = (
    *((x, f"attn1.to_{x}") for x in "qkv"),
    ("attn_out", "attn1.to_out.0"),
    ("norm_q", "attn1.norm_q"),
    ("norm_k", "attn1.norm_k"),
    ("ff_proj", "ff.net.0.proj"),
    ("ff_out", "ff.net.2"),
    *((name, name) for name in ("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm")),
)

_SAME = ("proj", "text_proj", "pos_embedding")

ORIGINAL = OriginalNames(
    *((f"blocks.*.{own}", f"transformer_blocks.*.{name}") for own, name in _BLOCK),
    *((f"{x}_embedding_linear_{i}", f"{x}_embedding.linear_{i}") for x in ("time", "ofs") for i in (1, 2)),
    *((f"patch_embed.{name}", f"patch_embed.{name}") for name in _SAME),
    *((name, name) for name in ("norm_final", "norm_out.linear", "norm_out.norm", "proj_out")),
)
"""Layer names in ComfyUI. CogVideoX's training code has other names, which no supported program uses."""


def _published(heads: int, *, pairs: bool = False, image: bool = False) -> dict[str, dict[str, Any]]:
    """Return the configuration of each component of a published checkpoint; nothing is downloaded.

    Args:
        heads: number of attention heads: 30 for 2B, 48 for 5B.
        pairs: True for CogVideoX 1.5, in which a token covers two latent frames.
        image: True for image-to-video.
    """
    large = heads == 48
    transformer = {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": heads}
    transformer |= {"num_layers": 42 if large else 30, "in_channels": 32 if image else 16}
    transformer |= {"use_rotary_positional_embeddings": large}
    transformer |= {"use_learned_positional_embeddings": image and not pairs}
    if pairs:
        transformer |= {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 512 if image else None}
        transformer |= {"sample_frames": 81, "sample_height": 300, "sample_width": 300}
    vae = {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7 if large else 1.15258426}
    vae |= {"invert_scale_latents": image and pairs}
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler |= {"snr_shift_scale": 1.0 if large else 3.0}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


class CogVideoX(Family):
    """CogVideoX family: v-prediction on VAE posterior samples; text and video tokens form one sequence."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "data": {"size": [480, 720], "frames": [49]},
        "sample": {"steps": 50, "guidance": 6.0},
    }
    targets: ClassVar[Sequence[str]] = (r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",)
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "THUDM/CogVideoX-5b": _published(48),
        "THUDM/CogVideoX-2b": _published(30),
        "THUDM/CogVideoX-5b-I2V": _published(48, image=True),
        "THUDM/CogVideoX1.5-5B": _published(48, pairs=True),
        "THUDM/CogVideoX1.5-5B-I2V": _published(48, pairs=True, image=True),
    }
    convolutions: ClassVar[Sequence[str]] = (r"patch_embed\.proj",)
    video_layers: ClassVar[Sequence[str]] = (r"transformer_blocks\.\d+\.(attn1\.to_.+|ff\.net\..+)",)
    joint_attention: ClassVar[Any] = CogVideoXJointAttention
    original: ClassVar[OriginalNames] = ORIGINAL
    programs: ClassVar[Sequence[str]] = ("comfyui", "transpixeler")
    fixed_sizes: ClassVar[Mapping[str, int]] = {"attention_head_dim": 64}
    joint_layout: ClassVar[JointLayout | None] = JointLayout(
        key="transformer.transformer_blocks.{block}.{layer}.lora_{factor}.weight",
        layers={f"attn1.{name}": f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")},
        factors=("A", "B"),
        rule="bias",
        vector="domain_emb",
        torch_file=False,
        width=3072,
    )
    widths: ClassVar[Mapping[int, str]] = {1920: "CogVideoX 2B", 3072: "CogVideoX 5B"}

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

        usual = {k: p.default for k, p in signature(CogVideoXTransformer3DModel).parameters.items()}
        self.transformer = c = usual | (self.read_config("transformer") or {})
        self.vae, self.scheduler = (self.read_config(part) or {} for part in ("vae", "scheduler"))
        self._refuse_unsupported()
        self.text_length = self.text_before = int(c["max_text_seq_length"])
        scheduler: Any = CogVideoXDDIMScheduler.from_config(self.scheduler)
        self.native = VPrediction(tuple(scheduler.alphas_cumprod.tolist()))
        self.images = ("first",) if c["in_channels"] == 32 else ()
        latents = ["video_latents/*.pt", *["image_latents/*.pt" for _ in self.images]]
        self.precomputed = PrecomputedLayout(latents, "prompt_embeds/*.pt", "prompts/*.txt", "videos/*")
        task = "i2v" if self.images else "t2v"
        if model.task not in (None, task) or model.expert is not None:
            key = "expert" if model.expert else "task"
            raise ValueError(f"model.{key}: {model.checkpoint} is one {task} network; leave `{key}` out")
        self.pair, self.heads = c["patch_size_t"] or 1, c["num_attention_heads"]
        self.fps = 16.0 if self.pair == 2 else 8.0
        self.largest = (8 * c["sample_height"], 8 * c["sample_width"])
        only = (c["sample_frames"], *self.largest) if c["use_learned_positional_embeddings"] else None
        self.grid = Grid(16, 4 * self.pair, 4 * self.pair - 3, only)
        self._tables: dict[tuple[Any, ...], Any] = {}

    def _refuse_unsupported(self) -> None:
        name, c, vae = self.model.checkpoint, self.transformer, self.vae
        kinds = (c.get("_class_name"), vae.get("_class_name"))
        if kinds != ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"):
            raise ValueError(
                f"model.family: {name} is not a CogVideoX checkpoint, it contains {kinds[0]} and {kinds[1]}"
            )
        if c["in_channels"] not in (16, 32) or c["out_channels"] != 16:
            raise ValueError(
                f"model.checkpoint: {name} has {c['in_channels']} input and {c['out_channels']} output "
                "channels; supported are 16 (text-to-video) or 32 (image-to-video) input and 16 output"
            )
        if self.scheduler.get("prediction_type") != "v_prediction":
            raise ValueError(
                f"model.checkpoint: its prediction_type is {self.scheduler.get('prediction_type')}, not "
                "v_prediction as CogVideoX needs; copy the folder `scheduler` of the original checkpoint"
            )

    def export_problem(self, target: str, whole: bool) -> str | None:
        """Return why a program cannot use an adapter or a model based on this checkpoint; None if it can.

        TransPixeler supports text-to-video with CogVideoX-5B only. ComfyUI does not support models with both
        rotary and learned positional embeddings.
        """
        c = self.transformer
        rotary, learned = (c[f"use_{x}_positional_embeddings"] for x in ("rotary", "learned"))
        if target == "transpixeler" and (not rotary or self.pair == 2 or self.images):
            return f"TransPixeler runs CogVideoX-5B text-to-video only, not {self.name}"
        if target == "comfyui" and whole and rotary and learned:
            return (
                f"{self.name} has rotary and learned positional embeddings, but ComfyUI runs a CogVideoX "
                "model with one or the other"
            )
        return None

    def comfyui_tensors(self) -> Mapping[str, Tensor]:
        """Return the sinusoidal positional embeddings of CogVideoX 2B, (1, text + video tokens, d).

        Diffusers does not save this tensor. If it is missing, ComfyUI uses rotary embeddings. The result is
        empty for models with rotary embeddings.
        """
        if self.transformer["use_rotary_positional_embeddings"]:
            return {}
        from diffusers.models.embeddings import get_3d_sincos_pos_embed

        c = self.transformer
        width, height = (c[f"sample_{side}"] // c["patch_size"] for side in ("width", "height"))
        video = get_3d_sincos_pos_embed(
            c["num_attention_heads"] * c["attention_head_dim"],
            (width, height),
            (c["sample_frames"] - 1) // c["temporal_compression_ratio"] + 1,
            c["spatial_interpolation_scale"],
            c["temporal_interpolation_scale"],
            output_type="pt",
        )
        table = nn.functional.pad(video.flatten(0, 1).float(), (0, 0, c["max_text_seq_length"], 0))[None]
        return {"patch_embed.pos_embedding": table}

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each unsupported setting, such as a size above the maximum of CogVideoX 1.5.

        CogVideoX 1.5 has a maximum because it takes rotary embeddings from a table of fixed size.
        """
        found = super().problems(config)
        for section, size in (("data", config.data.size), ("sample", config.sample.size or (0, 0))):
            if self.pair == 2 and (size[0] > self.largest[0] or size[1] > self.largest[1]):
                limit, asked = ("x".join(map(str, s)) for s in (self.largest, size))
                found.append(f"{section}: {asked} exceeds {limit}, the largest size of the model; use less")
        return found

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `latents` (16, t, h, w) and, for image-to-video, of `image` (16, 1, h, w)."""
        latents = (16, 1 + (frames - 1) // 4, height // 8, width // 8)
        return {"latents": latents} | ({"image": (16, 1, *latents[2:])} if self.images else {})

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the cached tensors.

        `moments` is (32, t, h, w). For image-to-video, `image` is (4, 32, 1, h, w): the image is encoded four
        times, each time with different noise. Both tensors hold means and log-variances of the VAE posterior.
        """
        _, *latent = self.shapes(frames, height, width)["latents"]
        image = {"image": (COPIES, 32, 1, *latent[1:])} if self.images else {}
        return {"moments": (32, *latent), **image}

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the length of the token sequence: the text tokens plus the video tokens."""
        _, t, h, w = self.shapes(frames, height, width)["latents"]
        return self.text_length + t // self.pair * (h // 2) * (w // 2)

    # --- encoding for the cache -----------------------------------------------------------------------------

    @torch.no_grad()
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a clip, uint8 (t, h, w, 3), and noisy copies of its first frame (image-to-video only).

        Returns:
            Means and log-variances of the VAE posteriors, with the shapes that `stored` returns.
        """
        assert not self.grid.problems(*frames.shape[:3]), "sizes are snapped before encoding"
        like = next(encoder.parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2) / 255 * 2 - 1
        inputs = [pixels, *(noised(pixels[:, :1]) if self.images else [])]
        found = [encoder.encode(v[None].to(like)).latent_dist.parameters[0].float() for v in inputs]
        return {"moments": found[0], **({"image": torch.stack(found[1:])} if self.images else {})}

    @torch.no_grad()
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode each caption to `text` (`text_length`, d).

        The result includes padding tokens, because the network attends to them.
        """
        tokenizer, model = encoder
        options = {"padding": "max_length", "max_length": self.text_length, "truncation": True}
        ids = tokenizer(list(captions), return_tensors="pt", **options).input_ids
        hidden = model(ids.to(next(model.parameters()).device)).last_hidden_state
        return [{"text": h.clone()} for h in hidden]

    # --- training and generation ----------------------------------------------------------------------------

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Sample `latents` and, for image-to-video, `image` from the VAE posteriors, and scale them.

        The cache contains several encodings of the first frame, each with different noise. One of them is
        chosen at random for `image`. With probability `IMAGE_DROPOUT`, `image` is zero.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        def sample(moments: Tensor) -> Tensor:
            return DiagonalGaussianDistribution(moments[None].float()).sample(generator)[0]

        scale = self.vae["scaling_factor"]
        out = {"latents": sample(item["moments"]) * scale}
        if self.images:
            chosen = int(torch.randint(len(item["image"]), (1,), generator=generator))
            kept = float(torch.rand(1, generator=generator)) >= IMAGE_DROPOUT
            by = 1 / scale if self.vae.get("invert_scale_latents") else scale
            out["image"] = sample(item["image"][chosen]) * by * kept
        return out

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """Load the transformer; the positional embeddings of CogVideoX 2B are cached for each clip size."""
        network: Any = super().load_denoiser(dtype, meta=meta, folder=folder)
        embed = network.patch_embed
        embed._get_positional_embeddings = lru_cache(16)(embed._get_positional_embeddings)
        return network

    def share_positions(self, denoiser: Any) -> None:
        """Modify the denoiser so that tokens of alpha have the same positional embeddings as tokens of color.

        This applies to rotary embeddings and to the sinusoidal embeddings of CogVideoX-2B.
        """
        halve_cogvideox(denoiser)

    def split_sequence(self, denoiser: Any, sequence: SequenceParallel) -> None:
        """Split the video tokens over processes; see `Family.split_sequence`.

        Hooks split the rotary embeddings and the output of the patch embedding. The text tokens come first in
        this output, and are not split.
        """

        def rotary(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            found = kwargs.get("image_rotary_emb")
            own = found and tuple(sequence.split(x, 0) for x in found)
            return args, {**kwargs, "image_rotary_emb": own}

        def tokens(_: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
            text = args[0].shape[1]
            return torch.cat([out[:, :text], sequence.split(out[:, text:], 1)], 1)

        denoiser.register_forward_pre_hook(rotary, with_kwargs=True)
        denoiser.patch_embed.register_forward_hook(tokens)
        sequence.gather_output(denoiser.proj_out, 1)
        for block in denoiser.transformer_blocks:
            rule: Any = getattr(block.attn1.processor, "rule", "open")
            block.attn1.set_processor(CogVideoXJointAttention(rule, sequence))

    def pipeline_latents(self, noise: Tensor, pipeline: Any) -> Tensor:
        """Convert noise (c, t, h, w) to (1, t, c, h, w), with the dtype of the transformer."""
        return noise.transpose(0, 1)[None].to(pipeline.transformer.dtype)

    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> VPrediction:
        """Return the v-prediction objective with the checkpoint's noise schedule."""
        return VPrediction.from_config(section, torch.tensor(self.native.alphas_cumprod))

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the network's prediction of v for noisy latents `x_t` at the noise levels `t`.

        For image-to-video, the network takes the image latents as additional channels. These channels contain
        the image in the first latent frame, and zeros in all other frames.
        """
        dtype, x, c = denoiser.dtype, x_t, self.transformer
        if self.images:
            rest = (0, 0, 0, 0, 0, x_t.shape[2] - 1)
            x = torch.cat([x_t, nn.functional.pad(cond["image"].to(x_t), rest)], 1)
        v = denoiser(
            x.transpose(1, 2).to(dtype),
            cond["text"].to(dtype),
            self.native.index(t),
            ofs=x_t.new_full((1,), 2.0) if c["ofs_embed_dim"] else None,
            image_rotary_emb=self._rotary(tuple(x_t.shape[2:]), x_t.device),
            return_dict=False,
        )[0]
        return v.transpose(1, 2)

    def _rotary(self, latent: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the rotary embeddings (cosines, sines) for latents (t, h, w); None if the network has none.

        They are computed as in the diffusers pipelines, and cached for each size.
        """
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        c, (t, *grid) = self.transformer, (latent[0] // self.pair, latent[1] // 2, latent[2] // 2)
        if not c["use_rotary_positional_embeddings"]:
            return None
        if (latent, device) not in self._tables:
            base = (c["sample_height"] // 2, c["sample_width"] // 2)
            how: dict[str, Any] = {"crops_coords": None, "grid_type": "slice", "max_size": base}
            if self.pair == 1:
                how = {"crops_coords": get_resize_crop_region_for_grid(grid, base[1], base[0])}
            self._tables[latent, device] = get_3d_rotary_pos_embed(
                c["attention_head_dim"], grid_size=grid, temporal_size=t, device=device, **how
            )
        return self._tables[latent, device]

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the standard diffusers pipeline with VAE tiling enabled, as the model cards recommend."""
        pipe = super().pipeline(denoiser=denoiser, device=device, dtype=dtype)
        pipe.vae.enable_tiling()
        return pipe


def noised(frame: Tensor) -> Tensor:
    """Add Gaussian noise to copies of a frame (3, 1, h, w); return (COPIES, 3, 1, h, w).

    The standard deviation of the noise is sampled for each copy as exp(-3 + 0.5 z), with z from N(0, 1), as
    in pretraining. The random seed is a hash of the frame, so the result is reproducible.
    """
    seed = int.from_bytes(hashlib.sha256(frame.numpy().tobytes()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.exp(-3 + 0.5 * torch.randn(COPIES, 1, 1, 1, 1, generator=generator))
    return frame + sigma * torch.randn(COPIES, *frame.shape, generator=generator)
