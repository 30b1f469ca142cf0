"""Mochi 1 (Genmo 2024): https://github.com/genmoai/mochi.

Pitfalls:

- The model's timestep is 1000 (1 - t), where t is 1 for noise. The model predicts data - noise.
- Latents are samples of the VAE posterior, so the cache stores the posterior's means and log-variances.
- Latents are normalized per channel. Other public trainers omitted the normalization.
- The unconditional input has no text tokens at all; it is not the encoding of "".
- The text encoder T5 runs in float32.
- If the length of a clip is not 6n+1, the VAE silently drops frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.families.base import Family, PrecomputedLayout
from inlaid.families.grid import Grid
from inlaid.families.original_names import OriginalNames, Rename
from inlaid.families.other_programs import JointLayout
from inlaid.networks.joint_attention import MochiJointAttention, halve, mochi
from inlaid.networks.sequence_parallel import SequenceParallel
from inlaid.objectives import FlowMatching

TOO_FEW = "sample.steps: the sampling schedule of Mochi has two parts; use 2 steps or more"


_BLOCK = (
    ("proj_x", "to_out.0"),
    ("proj_y", "to_add_out"),
    ("q_norm_x", "norm_q"),
    ("k_norm_x", "norm_k"),
    ("q_norm_y", "norm_added_q"),
    ("k_norm_y", "norm_added_k"),
)

ORIGINAL = OriginalNames(
    *((f"blocks.*.attn.{own}", f"transformer_blocks.*.attn1.{name}") for own, name in _BLOCK),
    ("blocks.*.mlp_x.w2", "transformer_blocks.*.ff.net.2"),
    ("blocks.*.mlp_y.w2", "transformer_blocks.*.ff_context.net.2"),
    ("blocks.*.mod_x", "transformer_blocks.*.norm1.linear"),
    ("blocks.*.mod_y", "transformer_blocks.*.norm1_context.linear"),
    ("blocks.*.mod_y", "transformer_blocks.*.norm1_context.linear_1"),  # in the last block
    ("x_embedder.proj", "patch_embed.proj"),
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *((f"t5_y_embedder.{name}", f"time_embed.pooler.{name}") for name in ("to_q", "to_kv", "to_out")),
    ("t5_yproj", "time_embed.caption_proj"),
    ("final_layer.linear", "proj_out"),
    ("pos_frequencies", "pos_frequencies"),
    fused=(
        Rename("blocks.*.attn.qkv_x", tuple(f"transformer_blocks.*.attn1.to_{x}" for x in "qkv")),
        Rename("blocks.*.attn.qkv_y", tuple(f"transformer_blocks.*.attn1.add_{x}_proj" for x in "qkv")),
        Rename("blocks.*.mlp_x.w1", ("transformer_blocks.*.ff.net.0.proj",), swapped=True),
        Rename("blocks.*.mlp_y.w1", ("transformer_blocks.*.ff_context.net.0.proj",), swapped=True),
        Rename("final_layer.mod", ("norm_out.linear",), swapped=True),
    ),
)
"""Names in genmo's own code, which ComfyUI also uses. Query, key and value are one layer. The two halves of a
gated layer (gate and value) and of the last modulation (shift and scale) are in the opposite order."""


class Mochi(Family):
    """Mochi 1 family: flow matching on normalized VAE latents, joint attention over text and video tokens."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "data": {"size": [480, 848], "frames": [37]},
        "objective": {"preset": "uniform"},
        "sample": {"steps": 64, "guidance": 6.0},
    }
    targets: ClassVar[Sequence[str]] = (r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",)
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "genmo/mochi-1-preview": {
            "transformer": {"_class_name": "MochiTransformer3DModel"},
            "vae": {"_class_name": "AutoencoderKLMochi"},
        }
    }
    original: ClassVar[OriginalNames] = ORIGINAL
    programs: ClassVar[Sequence[str]] = ("comfyui", "genmo", "transpixeler")
    fixed_sizes: ClassVar[Mapping[str, int]] = {
        "num_layers": 48,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
    }
    joint_layout: ClassVar[JointLayout | None] = JointLayout(
        key="block_{block}.{layer}.{factor}.weight",
        layers={"attn1.to_out.0": "to_out_lora", **{f"attn1.to_{x}": f"to_{x}_lora" for x in "qkv"}},
        factors=("0", "1"),
        rule="block",
        vector=None,
        torch_file=True,
        width=3072,
    )
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"latent_space": ("normalized", "raw")}
    convolutions: ClassVar[Sequence[str]] = (r"patch_embed\.proj",)
    video_layers: ClassVar[Sequence[str]] = (
        r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
    )
    joint_attention: ClassVar[Any] = MochiJointAttention
    text_length: int = 256
    widths: ClassVar[Mapping[int, str]] = {3072: "Mochi 1"}
    fps, grid = 30.0, Grid(spatial=16, temporal=6)
    precomputed = PrecomputedLayout(
        ("*.latent.pt",),
        "*.embed.pt",
        moments_key="ldist",
        text_keys=("prompt_embeds", "prompt_attention_mask"),
    )

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        name = model.checkpoint
        self.vae, transformer = (self.read_config(part) or {} for part in ("vae", "transformer"))
        kinds = (transformer.get("_class_name"), self.vae.get("_class_name"))
        if kinds != ("MochiTransformer3DModel", "AutoencoderKLMochi"):
            raise ValueError(
                f"model.family: {name} is not a Mochi checkpoint, it contains {kinds[0]} and {kinds[1]}"
            )
        channels = transformer.get("in_channels", 12), self.vae.get("latent_channels", 12)
        if channels != (12, 12):
            raise ValueError(
                f"model.checkpoint: {name} takes {channels[0]} channels for a {channels[1]}-channel VAE; "
                "only Mochi text-to-video, with 12 and 12, is supported"
            )
        self.text_length = int(transformer.get("max_sequence_length", self.text_length))
        self.heads = transformer.get("num_attention_heads", 24)
        if model.task not in (None, "t2v") or model.expert is not None:
            key = "expert" if model.expert else "task"
            raise ValueError(f"model.{key}: {name} has one network, for t2v; leave `{key}` out")

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each unsupported setting, such as fewer than two sampling steps.

        Mochi's sampling schedule has two parts, so it needs at least two steps.
        """
        return super().problems(config) + ([TOO_FEW] if config.sample.steps < 2 else [])

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of `latents`, which is (12, 1 + (frames - 1) / 6, height / 8, width / 8)."""
        return {"latents": (12, 1 + (frames - 1) // 6, height // 8, width // 8)}

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the cached tensor `moments`, (24, t, h, w).

        It holds means and log-variances of the VAE posterior.
        """
        return {"moments": (24, *self.shapes(frames, height, width)["latents"][1:])}

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the number of video tokens; the text tokens are not counted."""
        _, t, h, w = self.shapes(frames, height, width)["latents"]
        return t * (h // 2) * (w // 2)

    # --- encoding for the cache -----------------------------------------------------------------------------

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load the tokenizer and the T5 text encoder, always in float32.

        `dtype` is ignored: the output in bfloat16 differs too much from the output in float32.
        """
        return super().load_text_encoder(device, torch.float32)

    @torch.no_grad()
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a clip, uint8 (t, h, w, 3), to `moments` (24, t', h', w').

        `moments` contains the means and log-variances of the VAE posterior. On CUDA, the VAE computes in
        bfloat16, as in the reference implementations.
        """
        assert not self.grid.problems(*frames.shape[:3]), "sizes are snapped before encoding"
        device = next(encoder.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return {"moments": encoder.encode(x).latent_dist.parameters[0].float()}

    @torch.no_grad()
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode each caption to `text` (n, d), without padding.

        n is the number of tokens, at most `text_length`; it is 0 for an empty caption.
        """
        tokenizer, model = encoder
        options = {"padding": "max_length", "max_length": self.text_length, "truncation": True}
        ids = tokenizer(list(captions), return_tensors="pt", **options).to(next(model.parameters()).device)
        hidden = model(ids.input_ids, attention_mask=ids.attention_mask.bool())[0]
        lengths = [
            int(n) if c.strip() else 0 for n, c in zip(ids.attention_mask.sum(1), captions, strict=True)
        ]
        return [{"text": h[:n].clone()} for h, n in zip(hidden, lengths, strict=True)]

    # --- training and generation ----------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> list[Tensor]:
        """Mean and standard deviation of each latent channel, both of shape (12, 1, 1, 1).

        Values that the VAE's configuration lacks are taken from the published VAE.
        """
        from diffusers import AutoencoderKLMochi

        known = inspect.signature(AutoencoderKLMochi.__init__).parameters
        found = [self.vae.get(k, known[k].default) for k in ("latents_mean", "latents_std")]
        return [torch.tensor(values).view(-1, 1, 1, 1) for values in found]

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return `latents`, a normalized sample of the VAE posterior.

        With the option `latent_space: raw`, the sample is not normalized.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        z = DiagonalGaussianDistribution(item["moments"][None].float()).sample(generator)[0]
        if self.options["latent_space"] == "raw":
            return {"latents": z}
        mean, std = self.statistics
        return {"latents": (z - mean) / std}

    def load_denoiser(self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None) -> Any:
        """Load the transformer and replace its attention by an implementation that can be compiled.

        The replacement has no data-dependent shapes. Positional embeddings are computed in float32.
        """
        from diffusers import MochiTransformer3DModel

        kind: Any = MochiTransformer3DModel
        kind._keep_in_fp32_modules = ["pos_frequencies"]  # bfloat16 angles are wrong at far positions
        network: Any = super().load_denoiser(dtype, meta=meta, folder=folder)
        network.rope._create_rope = rotation
        network.time_embed.pooler.register_forward_pre_hook(partial(_unmasked, length=self.text_length))
        for block in network.transformer_blocks:
            block.attn1.processor = mochi
        return network

    def share_positions(self, denoiser: Any) -> None:
        """Modify the denoiser to use the same rotary embeddings for the color clip and the alpha clip.

        With joint alpha, the two clips are in one sequence. The embeddings are computed for one clip only.
        """
        halve(denoiser.rope, lambda f, frames, *size: (f, frames // 2, *size), dim=0)

    def split_sequence(self, denoiser: Any, sequence: SequenceParallel) -> None:
        """Split the video tokens over processes; see `Family.split_sequence`."""
        samples = 1

        def count(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal samples
            samples = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        def tokens(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            return sequence.split(out.unflatten(0, (samples, -1)).flatten(1, 2), 1)  # out: (n * t, h * w, d)

        denoiser.register_forward_pre_hook(count, with_kwargs=True)
        denoiser.patch_embed.register_forward_hook(tokens)
        sequence.split_output(denoiser.rope, 0)
        sequence.gather_output(denoiser.proj_out, 1)
        for block in denoiser.transformer_blocks:
            rule: Any = getattr(block.attn1.processor, "rule", "open")
            block.attn1.processor = MochiJointAttention(rule, sequence)

    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> FlowMatching:
        """Return the flow matching objective; by default, the timestep is not shifted."""
        return FlowMatching.from_config(section, family_shift=1.0)

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return `text` (n, m, d), padded to the longest caption in the batch.

        If the lengths differ, also return `mask` (n, m), True for tokens that are not padding.
        """
        lengths = [len(item["text"]) for item in text]
        found = {"text": nn.utils.rnn.pad_sequence([item["text"] for item in text], batch_first=True)}
        if len(set(lengths)) > 1:
            found["mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return found

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict noise - data; the network takes the timestep 1000 (1 - t) and returns data - noise."""
        x, text = x_t.to(denoiser.dtype), cond["text"].to(denoiser.dtype)
        # In float32, (1 - t) * 1000 is 12.49999 for t = 0.9875. The stock scheduler has this error of 6e-5.
        timestep = (1000 - (t if t.dtype is torch.float64 else t.float()) * 1000).float()
        return -denoiser(x, text, timestep, cond.get("mask"), return_dict=False)[0]

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the standard diffusers pipeline.

        With the option `latent_space: raw`, the pipeline decodes latents without denormalization.
        """
        pipe = super().pipeline(denoiser=denoiser, device=device, dtype=dtype)
        if self.options["latent_space"] == "raw":
            pipe.vae.register_to_config(latents_mean=None, latents_std=None)
        return pipe

    def run(self, pipeline: Any, *args: Any, steps: int, **options: Any) -> np.ndarray:
        """Run the diffusers pipeline with autocast.

        The networks compute in the denoiser's dtype. The sampler computes in float32.

        Raises:
            ValueError: if `steps` is less than 2.
        """
        if steps < 2:
            raise ValueError(TOO_FEW)
        dtype, device = pipeline.transformer.dtype, pipeline._execution_device
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            return super().run(pipeline, *args, steps=steps, **options)

    def pipeline_inputs(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
    ) -> dict[str, Any]:
        """Return prompt embeddings padded to `text_length` tokens, and their attention masks.

        The embedding of an empty prompt is zero, and its mask is False for all tokens.
        """
        found = {}
        for prefix, item in {"": text, "negative_": negative}.items():
            words = item["text"][None].float().to(pipeline._execution_device)
            embeds, mask = padded(words, self.text_length)
            found |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}
        return found


def rotation(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary embedding for v video tokens, both (v, heads, d / 2).

    This function replaces a method of diffusers, because autocast to float32 in that method supports neither
    CPU nor meta tensors.

    Args:
        frequencies: learned frequencies, (axes, heads, d / 2).
        positions: coordinates of the video tokens, (v, axes).
    """
    device = "cpu" if frequencies.is_meta else frequencies.device.type
    with torch.autocast(device, enabled=False):
        angles = torch.einsum("va,ahf->vhf", positions.float(), frequencies.float())
    return angles.cos(), angles.sin()


def padded(text: Tensor, length: int = Mochi.text_length) -> tuple[Tensor, Tensor]:
    """Pad text embeddings (n, m, d) with zeros to (n, length, d).

    Returns:
        The padded embeddings, and the mask (n, length) of valid tokens.
    """
    mask = torch.arange(length, device=text.device) < text.shape[1]
    return nn.functional.pad(text, (0, 0, 0, length - text.shape[1])), mask.expand(len(text), -1)


def _unmasked(
    pooler: nn.Module, args: tuple[Tensor, Tensor | None], *, length: int
) -> tuple[Tensor, Tensor | None]:
    """Pre-forward hook of the text pooler: if there is no mask, pad text embeddings and create their mask.

    The text is padded to `length` tokens. The output is bit-identical to the output for padded text.
    """
    return padded(args[0], length) if args[1] is None else args
