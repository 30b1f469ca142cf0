"""Wan 2.1 and 2.2 text-to-video (Wan Team, 2025): https://arxiv.org/abs/2503.20314.

Covers Wan 2.1 T2V 1.3B and 14B, both experts of Wan 2.2 T2V-A14B, and Wan 2.2 TI2V-5B in text-to-video mode.
What surprises: the VAE has no scaling factor but a mean and a deviation per channel; text is 512 tokens, zero
(not encoded padding) past its end; the model's clock is 1000 t as float, never rounded; and the VAE silently
truncates lengths other than 4n+1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from inlay import config as recipe
from inlay.families.base import Family, Grid
from inlay.objectives import FlowMatching

SHIFT_480P, SHIFT_720P, AREA_BETWEEN = 3.0, 5.0, 600 * 1040
"""Noise-level shift by size (Wan's advice), and the area in pixels that divides the two."""


def _published(
    heads: int, layers: int, ffn: int, channels: int = 16, **index: Any
) -> dict[str, dict[str, Any]]:
    """Configuration of a published checkpoint, so that `check` and its estimates need no download."""
    transformer = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": channels, "scale_factor_temporal": 4}
    vae["scale_factor_spatial"] = 8 if channels == 16 else 16
    second = {"transformer_2": transformer} if "transformer_2" in index else {}
    return {"": {"_class_name": "WanPipeline", **index}, "transformer": transformer, "vae": vae, **second}


class Wan(Family):
    """Wan 2.1 / 2.2: flow matching on normalised VAE latents, text by cross-attention."""

    defaults: ClassVar[Mapping[str, Any]] = {"data": {"size": [480, 832], "frames": [81]}}
    targets: ClassVar[Sequence[str]] = (
        r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)",
        r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    )
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _published(12, 30, 8960),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": _published(40, 40, 13824),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _published(
            40, 40, 13824, boundary_ratio=0.875, transformer_2=["diffusers", "WanTransformer3DModel"]
        ),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _published(24, 30, 14336, 48, expand_timesteps=True),
    }
    original_names: ClassVar[Sequence[tuple[str, str]]] = (
        ("self_attn.q", "attn1.to_q"),
        ("self_attn.k", "attn1.to_k"),
        ("self_attn.v", "attn1.to_v"),
        ("self_attn.o", "attn1.to_out.0"),
        ("cross_attn.q", "attn2.to_q"),
        ("cross_attn.k", "attn2.to_k"),
        ("cross_attn.v", "attn2.to_v"),
        ("cross_attn.o", "attn2.to_out.0"),
        ("cross_attn.k_img", "attn2.add_k_proj"),
        ("cross_attn.v_img", "attn2.add_v_proj"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("head.head", "proj_out"),
        ("patch_embedding", "patch_embedding"),
    )
    text_length: ClassVar[int] = 512
    """As the published models were trained and are sampled; `encode_prompt`'s own default of 226 is wrong."""
    widths: ClassVar[Mapping[int, str]] = {1536: "Wan 1.3B", 3072: "Wan 5B", 5120: "Wan 14B"}

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        index = self.read_config("") or {}
        self.vae = self.read_config("vae")
        self.boundary: float | None = index.get("boundary_ratio")
        self.expand_timesteps = bool(index.get("expand_timesteps", False))
        self.two_experts = (index.get("transformer_2") or [None])[0] is not None
        self.component = "transformer_2" if model.expert == "low" else "transformer"
        self.transformer = self.read_config(self.component)
        self._refuse_unsupported()
        assert self.vae and self.transformer
        # Early diffusers releases wrote no scale factors; the class's own defaults are 8 and 4.
        self.stride = (self.vae.get("scale_factor_temporal", 4), self.vae.get("scale_factor_spatial", 8))
        patch = self.transformer["patch_size"]
        self.grid = Grid(spatial=self.stride[1] * patch[1], temporal=self.stride[0])
        self.fps = 24.0 if self.expand_timesteps else 16.0

    def _refuse_unsupported(self) -> None:
        name, t = self.model.checkpoint, self.transformer
        if not self.two_experts and self.model.expert is not None:
            raise ValueError(f"model.expert: {name} has one network; leave `expert` out")
        if self.vae is None or t is None:
            raise ValueError(
                f"model.checkpoint: {name} has no `vae` or no `{self.component}` with a config.json"
            )
        kinds = (self.vae.get("_class_name"), t.get("_class_name"))
        if kinds != ("AutoencoderKLWan", "WanTransformer3DModel"):
            raise ValueError(
                f"model.family: {name} is not a Wan text-to-video checkpoint, "
                f"it holds {kinds[1]} and {kinds[0]}"
            )
        if t["in_channels"] != self.vae["z_dim"]:
            raise ValueError(
                f"model.checkpoint: {name} takes {t['in_channels']} channels for a "
                f"{self.vae['z_dim']}-channel VAE: an image-to-video or control checkpoint, which this "
                "family does not train; use its text-to-video sibling"
            )
        if self.two_experts and self.boundary is None:
            raise ValueError(
                f"model.checkpoint: {name} has a transformer_2 but no boundary_ratio in model_index.json"
            )
        if self.boundary is not None and not self.two_experts:
            raise ValueError(
                f"model.checkpoint: {name} sets boundary_ratio {self.boundary} but has no transformer_2; "
                "a converted Wan 2.1 does not need it: remove boundary_ratio from model_index.json"
            )
        if self.two_experts and self.model.expert is None:
            raise ValueError(
                f"model.expert: {name} has two experts; choose `high` (t >= {self.boundary}) or `low`"
            )

    def problems(self, config: recipe.Config) -> list[str]:
        """Adds what two experts forbid: sampling in training would need both in memory."""
        found = super().problems(config)
        if self.two_experts and config.sample.every:
            found.append(
                "sample.every: sampling needs both experts in memory; leave it out and use `inlay generate`"
            )
        return found

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """`latents` (z, 1 + (frames - 1) / 4, height / 8, width / 8), strides as the VAE's configuration."""
        assert self.vae
        t, s = self.stride
        return {"latents": (self.vae["z_dim"], 1 + (frames - 1) // t, height // s, width // s)}

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Video tokens; text is attended to apart."""
        assert self.transformer
        _, *latent = self.shapes(frames, height, width)["latents"]
        return int(np.prod([n // p for n, p in zip(latent, self.transformer["patch_size"], strict=True)]))

    # --- before the cache ---------------------------------------------------------------------------------

    encoders: ClassVar[Mapping[str, Sequence[str]]] = {
        "media": ("vae",),
        "text": ("tokenizer", "text_encoder"),
    }

    def load_media_encoder(self, device: torch.device) -> nn.Module:
        """The VAE in float32."""
        from diffusers import AutoencoderKLWan

        return self._load(AutoencoderKLWan, "vae", torch.float32).to(device).eval().requires_grad_(False)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
        """The tokenizer and the umT5 encoder."""
        from transformers import AutoTokenizer, UMT5EncoderModel

        options: dict[str, Any] = {"revision": self.model.revision}
        with self.loading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.source, subfolder="tokenizer", **options)
        with self.loading("text_encoder"):
            encoder: Any = UMT5EncoderModel.from_pretrained(
                self.source, subfolder="text_encoder", dtype=dtype, **options
            )
        return tokenizer, encoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """uint8 (t, h, w, 3) -> `latents` (c, t', h', w'): the mode, (z - mean) / std per channel."""
        assert not self.grid.problems(*frames.shape[:3]), "sizes are snapped before encoding"
        parameter = next(encoder.parameters())
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(parameter.device).permute(3, 0, 1, 2)[None]
        z = encoder.encode(x.to(parameter.dtype) / 127.5 - 1).latent_dist.mode()[0].float()
        mean, std = (
            torch.tensor(encoder.config[k], device=z.device).view(-1, 1, 1, 1)
            for k in ("latents_mean", "latents_std")
        )
        return {"latents": (z - mean) / std}

    @torch.no_grad()
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Captions -> `text` (n, d) each, n <= 512 real tokens; `collate` adds the zeros."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokenizer, model = encoder
        device = next(model.parameters()).device
        ids = tokenizer(
            [prompt_clean(c) for c in captions],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        hidden = model(ids.input_ids.to(device), ids.attention_mask.to(device)).last_hidden_state
        lengths = ids.attention_mask.sum(1).tolist()
        return [{"text": h[:n].clone()} for h, n in zip(hidden, lengths, strict=True)]

    # --- after the cache ----------------------------------------------------------------------------------

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """The transformer, or the expert that the recipe names; norms and time embedding stay float32."""
        from diffusers import WanTransformer3DModel

        if meta:
            with torch.device("meta"):
                assert self.transformer
                return cast(nn.Module, WanTransformer3DModel.from_config(self.transformer))
        if folder is not None:
            with self.loading("", folder):
                return WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
        return self._load(WanTransformer3DModel, self.component, dtype)

    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> FlowMatching:
        """Flow matching; shift 3 at 480p and 5 at 720p; an expert sees its own side of the boundary."""
        by_size = SHIFT_720P if size[0] * size[1] > AREA_BETWEEN else SHIFT_480P
        objective = FlowMatching.from_config(section, family_shift=by_size)
        if self.boundary is None:
            return objective
        side = (self.boundary, 1.0) if self.model.expert == "high" else (0.0, self.boundary)
        low, high = max(side[0], section.interval[0]), min(side[1], section.interval[1])
        if low >= high:
            raise ValueError(
                f"objective.interval: {list(section.interval)} lies outside the {self.model.expert} expert's "
                f"{list(side)}"
            )
        return replace(objective, interval=(low, high))

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`text` (n, 512, d), zero past each caption's length."""
        padded = [
            nn.functional.pad(item["text"], (0, 0, 0, self.text_length - len(item["text"]))) for item in text
        ]
        return {"text": torch.stack(padded)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Noise - data. The model's clock is 1000 t; TI2V-5B takes one per token."""
        dtype = denoiser.patch_embedding.weight.dtype
        timestep = t.float() * 1000
        if self.expand_timesteps:
            tokens = np.prod([n // p for n, p in zip(x_t.shape[2:], denoiser.config.patch_size, strict=True)])
            timestep = timestep[:, None].expand(-1, int(tokens))
        return denoiser(x_t.to(dtype), timestep, cond["text"].to(dtype), return_dict=False)[0]

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """The stock WanPipeline without its text encoder: `sample` brings encoded text. VAE in float32."""
        from diffusers import WanPipeline

        parts: dict[str, Any] = {
            "text_encoder": None,
            "tokenizer": None,
            "vae": self.load_media_encoder(device),
        }
        parts[self.component] = denoiser if denoiser is not None else self.load_denoiser(dtype)
        with self.loading("model_index.json"):
            pipe = WanPipeline.from_pretrained(
                self.source, revision=self.model.revision, torch_dtype=dtype, **parts
            )
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
        """Runs the stock pipeline on encoded text -> uint8 (t, h, w, 3)."""
        cond, uncond = (
            self.collate([item])["text"].to(pipeline._execution_device) for item in (text, negative)
        )
        video = pipeline(
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).frames[0]
        return (video * 255).round().clip(0, 255).astype(np.uint8)

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Loads an adapter into the network that it was trained on."""
        pipeline.load_lora_weights(
            str(folder), adapter_name="inlay", load_into_transformer_2=self.model.expert == "low"
        )

    def _load(self, kind: Any, component: str, dtype: torch.dtype) -> Any:
        with self.loading(component):
            network = kind.from_pretrained(
                self.source, subfolder=component, revision=self.model.revision, torch_dtype=dtype
            )
            missing = [n for n, p in network.named_parameters() if p.is_meta]
            if missing:
                raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
        return network
