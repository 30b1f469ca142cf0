"""Wan 2.1 and 2.2 (Wan Team, 2025): https://arxiv.org/abs/2503.20314.

Supported checkpoints:

- Text-to-video: Wan 2.1 T2V, both experts of Wan 2.2 T2V-A14B, and TI2V-5B.
- Image-to-video (first image): Wan 2.1 I2V, both experts of Wan 2.2 I2V-A14B, and TI2V-5B with `task: i2v`.
- First and last image: Wan 2.1 FLF2V.

Pitfalls:

- The VAE has a mean and a standard deviation for each latent channel instead of a scaling factor.
- If the length of a clip is not 4n+1, the VAE silently drops frames.
- Text embeddings are padded to 512 tokens with zeros, not with encoded padding tokens.
- The timestep is 1000 t as a float; it is never rounded.
- Most image-to-video networks have additional input channels for a mask and for the latents of a video. This
  video contains the conditioning images, and all other frames are gray. In Wan 2.1, the network also takes
  CLIP embeddings of the images.
- TI2V-5B takes the image as its first latent frame, with t = 0 and without a loss on this frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.families.base import Family
from inlaid.families.grid import Grid
from inlaid.families.original_names import OriginalNames
from inlaid.networks import joint_attention
from inlaid.networks.sequence_parallel import SequenceParallel
from inlaid.objectives import FlowMatching

SHIFT_480P, SHIFT_720P, AREA_BETWEEN = 3.0, 5.0, 600 * 1040
"""Timestep shifts that Wan recommends for 480p and for 720p, and the area in pixels (height x width) above
which the shift for 720p is used."""

EXPERTS: Mapping[str, Any] = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
"""Entry of `model_index.json` that marks a checkpoint with two experts (high and low noise)."""

IMAGE: Mapping[str, Any] = {"in_channels": 36}
"""Transformer configuration values of image-to-video checkpoints."""

CLIP: Mapping[str, Any] = {**IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}
"""Transformer configuration values of image-to-video checkpoints that use CLIP embeddings (Wan 2.1)."""

_ATTENTION = (
    *((f"{x}", f"to_{x}") for x in "qkv"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)

_IMAGE_EMBEDDER = "condition_embedder.image_embedder"

ORIGINAL = OriginalNames(
    *((f"blocks.*.self_attn.{own}", f"blocks.*.attn1.{name}") for own, name in _ATTENTION),
    *((f"blocks.*.cross_attn.{own}", f"blocks.*.attn2.{name}") for own, name in _ATTENTION),
    ("blocks.*.cross_attn.k_img", "blocks.*.attn2.add_k_proj"),
    ("blocks.*.cross_attn.v_img", "blocks.*.attn2.add_v_proj"),
    ("blocks.*.cross_attn.norm_k_img", "blocks.*.attn2.norm_added_k"),
    ("blocks.*.ffn.0", "blocks.*.ffn.net.0.proj"),
    ("blocks.*.ffn.2", "blocks.*.ffn.net.2"),
    ("blocks.*.norm3", "blocks.*.norm2"),
    ("blocks.*.modulation", "blocks.*.scale_shift_table"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("img_emb.proj.0", f"{_IMAGE_EMBEDDER}.norm1"),
    ("img_emb.proj.1", f"{_IMAGE_EMBEDDER}.ff.net.0.proj"),
    ("img_emb.proj.3", f"{_IMAGE_EMBEDDER}.ff.net.2"),
    ("img_emb.proj.4", f"{_IMAGE_EMBEDDER}.norm2"),
    ("img_emb.emb_pos", f"{_IMAGE_EMBEDDER}.pos_embed"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("patch_embedding", "patch_embedding"),
)
"""Names in Wan's own code, which ComfyUI, musubi-tuner, DiffSynth-Studio and Wan-Alpha use. The normalization
before cross-attention is `norm3` in the original code and `norm2` in diffusers."""


KOHYA = (
    (
        *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "ffn.net.0.proj",
        "ffn.net.2",
    ),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
"""Groups of layers in each block of files with kohya's names. The second group exists in models with CLIP."""


def _published(
    heads: int, layers: int, ffn: int, channels: int = 16, image: Mapping[str, Any] = {}, **index: Any
) -> dict[str, dict[str, Any]]:
    """Return the configurations of a published checkpoint by component, so that they need not be downloaded.

    Args:
        heads: number of attention heads.
        layers: number of transformer blocks.
        ffn: hidden width of the feed-forward layers.
        channels: number of latent channels.
        image: additional transformer settings of an image-to-video model.
        index: additional entries of `model_index.json`.
    """
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
        **image,
    }
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": channels, "scale_factor_temporal": 4}
    vae["scale_factor_spatial"] = 8 if channels == 16 else 16
    kind = "WanImageToVideoPipeline" if image else "WanPipeline"
    parts = {"": {"_class_name": kind, **index}, "transformer": transformer, "vae": vae}
    if "transformer_2" in index:
        parts["transformer_2"] = transformer
    if "image_dim" in image:
        parts["image_encoder"] = {"hidden_size": 1280, "image_size": 224, "patch_size": 14}
    return parts


class Wan(Family):
    """Wan 2.1 and 2.2 family: flow matching on normalized VAE latents, cross-attention to text."""

    defaults: ClassVar[Mapping[str, Any]] = {"data": {"size": [480, 832], "frames": [81]}}
    targets: ClassVar[Sequence[str]] = (
        r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)",
        r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    )
    more_blocks: ClassVar[Sequence[str]] = ("vace_blocks",)
    convolutions: ClassVar[Sequence[str]] = ("patch_embedding",)
    video_layers: ClassVar[Sequence[str]] = (r"blocks\.\d+\.(attn1\..+|attn2\.to_(q|out\.0)|ffn\..+)",)
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _published(12, 30, 8960),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": _published(40, 40, 13824),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _published(40, 40, 13824, boundary_ratio=0.875, **EXPERTS),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _published(24, 30, 14336, 48, expand_timesteps=True),
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _published(40, 40, 13824, image=CLIP),
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _published(40, 40, 13824, image=CLIP),
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _published(
            40, 40, 13824, image={**CLIP, "pos_embed_seq_len": 514}
        ),
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _published(
            40, 40, 13824, image=IMAGE, boundary_ratio=0.9, **EXPERTS
        ),
    }
    original: ClassVar[OriginalNames] = ORIGINAL
    programs: ClassVar[Sequence[str]] = ("comfyui", "musubi", "diffsynth", "wan-alpha")
    kohya_layers: ClassVar[Sequence[Sequence[str]]] = KOHYA
    fixed_sizes: ClassVar[Mapping[str, int]] = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"text": ("padded", "short")}
    text_length: int = 512
    """Number of text tokens that the published models use in training and sampling. The default of
    `encode_prompt` in diffusers, 226, is wrong."""
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
        self.clip = self.read_config("image_encoder") if (self.transformer or {}).get("image_dim") else None
        _refuse_unsupported(self)
        assert self.vae and self.transformer
        # Early diffusers releases saved no scale factors; the defaults of the class are 8 and 4.
        self.stride = (self.vae.get("scale_factor_temporal", 4), self.vae.get("scale_factor_spatial", 8))
        if self.transformer["in_channels"] != self.vae["z_dim"] or model.task == "i2v":
            self.images = ("first", "last") if self.transformer.get("pos_embed_seq_len") else ("first",)
        patch, self.heads = self.transformer["patch_size"], self.transformer["num_attention_heads"]
        shortest = (
            1 + self.stride[0] if self.images else 1
        )  # an image is frame 1; at least one latent frame must follow
        self.grid = Grid(spatial=self.stride[1] * patch[1], temporal=self.stride[0], offset=shortest)
        self.fps = 24.0 if self.expand_timesteps else 16.0

    def export_problem(self, target: str, whole: bool) -> str | None:
        """Return why an export target cannot use these weights, or None; Wan-Alpha runs Wan 2.1 T2V only."""
        if target == "wan-alpha" and (self.images or self.two_experts or self.expand_timesteps):
            return f"Wan-Alpha runs Wan 2.1 text-to-video only, not {self.name}"
        return None

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each unsupported setting.

        Sampling during training is unsupported with two experts, because it needs both in memory.
        """
        found = super().problems(config)
        if self.two_experts and config.sample.every:
            found.append(
                "sample.every: sampling needs both experts in memory; remove it and use `inlaid generate`"
            )
        return found

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `latents` (z, t, h, w) and of the conditioning tensors (see `encode_media`).

        t is 1 + (frames - 1) / 4, h is height / 8, and w is width / 8. For TI2V-5B, h and w are height / 16
        and width / 16. For TI2V-5B with a conditioning image, t is smaller by one.
        """
        z, t, h, w = self._latent(frames, height, width)
        if not self.images:
            return {"latents": (z, t, h, w)}
        if self.expand_timesteps:
            return {"latents": (z, t - 1, h, w), "first": (z, 1, h, w)}
        found: dict[str, tuple[int, ...]] = {"latents": (z, t, h, w), "image_latents": (z, t, h, w)}
        if self.clip:
            patches = (self.clip["image_size"] // self.clip["patch_size"]) ** 2
            found["image_embeds"] = (len(self.images), 1 + patches, self.clip["hidden_size"])
        return found

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the number of video tokens; text and CLIP tokens occur only in cross-attention."""
        assert self.transformer
        _, *latent = self._latent(frames, height, width)
        return int(np.prod([n // p for n, p in zip(latent, self.transformer["patch_size"], strict=True)]))

    def _latent(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        assert self.vae
        t, s = self.stride
        return self.vae["z_dim"], 1 + (frames - 1) // t, height // s, width // s

    encoders: ClassVar[Mapping[str, Sequence[str]]] = {
        "media": ("vae", "image_encoder", "image_processor"),
        "text": ("tokenizer", "text_encoder"),
    }
    text_encoder: ClassVar[str] = "UMT5EncoderModel"

    def load_media_encoder(self, device: torch.device) -> tuple[Any, Any, Any]:
        """Load the VAE and, if the network uses CLIP, the CLIP encoder and its image processor, in float32.

        Returns:
            (VAE, CLIP encoder, image processor); the last two are None if the network does not use CLIP.
        """
        vae = super().load_media_encoder(device)
        if not self.clip:
            return vae, None, None
        from transformers import CLIPImageProcessor, CLIPVisionModel

        folders = self.folder("image_processor"), self.folder("image_encoder")
        with self.loading("image_processor"):
            processor = CLIPImageProcessor.from_pretrained(folders[0])
        with self.loading("image_encoder"):
            clip: Any = CLIPVisionModel.from_pretrained(folders[1], dtype=torch.float32)
        return vae, clip.to(device).eval().requires_grad_(False), processor

    @torch.no_grad()
    def encode_media(self, encoder: tuple[Any, Any, Any], frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a clip, uint8 (t, h, w, 3), to normalized `latents` (z, t', h', w').

        The latents are the mode of the VAE posterior. With image conditioning, the result also contains:

        - for TI2V-5B, `first` (z, 1, h', w'), the first latent frame, which is removed from `latents`;
        - for other networks, `image_latents` (z, t', h', w') of a video that contains the images and is gray
          (zero) elsewhere;
        - for networks with CLIP, `image_embeds` (1 or 2, 257, 1280), one entry per image.
        """
        assert not self.grid.problems(*frames.shape[:3]), "sizes are snapped before encoding"
        vae, clip, processor = encoder
        like = next(vae.parameters())
        mean, std = (
            torch.tensor(vae.config[k], device=like.device).view(-1, 1, 1, 1)
            for k in ("latents_mean", "latents_std")
        )

        def latents(video: Tensor) -> Tensor:
            return (vae.encode(video[None]).latent_dist.mode()[0].float() - mean) * (1 / std)

        video = torch.from_numpy(np.ascontiguousarray(frames)).to(like).permute(3, 0, 1, 2) / 127.5 - 1
        z = latents(video)
        if not self.images:
            return {"latents": z}
        if self.expand_timesteps:
            return {"latents": z[:, 1:], "first": z[:, :1]}
        at = [0, -1][: len(self.images)]
        images = torch.zeros_like(video)
        images[:, at] = video[:, at]
        item = {"latents": z, "image_latents": latents(images)}
        if clip:
            pixels = processor(images=[Image.fromarray(frames[i]) for i in at], return_tensors="pt")
            embeds = clip(pixels.pixel_values.to(like.device), output_hidden_states=True)
            item["image_embeds"] = embeds.hidden_states[-2]
        return item

    @torch.no_grad()
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode each caption to `text` (n, d), with at most 512 tokens and without padding.

        `collate` adds the padding.
        """
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

    def share_positions(self, denoiser: Any) -> None:
        """Modify the denoiser to compute rotary embeddings for one clip and use them for both clips.

        With joint alpha, color and alpha are two clips in one sequence.
        """
        joint_attention.halve(denoiser.rope, lambda x: (x[:, :, : x.shape[2] // 2],), dim=1)

    def split_sequence(self, denoiser: Any, sequence: SequenceParallel) -> None:
        """Split the video tokens over processes; see `Family.split_sequence`."""
        _split_sequence(denoiser, sequence)

    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> FlowMatching:
        """Return the flow matching objective; the default timestep shift is 3 at 480p and 5 at 720p.

        For a checkpoint with two experts, noise levels are limited to the range of the trained expert.

        Raises:
            ValueError: if the recipe's `interval` lies outside the range of the expert.
        """
        by_size = SHIFT_720P if size[0] * size[1] > AREA_BETWEEN else SHIFT_480P
        objective = FlowMatching.from_config(section, family_shift=by_size)
        if self.boundary is None:
            return objective
        side = (self.boundary, 1.0) if self.model.expert == "high" else (0.0, self.boundary)
        low, high = max(side[0], section.interval[0]), min(side[1], section.interval[1])
        if low >= high:
            own = f"{list(side)} of the {self.model.expert} expert"
            raise ValueError(f"objective.interval: {list(section.interval)} lies outside {own}")
        return replace(objective, interval=(low, high))

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """Load the denoiser; with the option `text: short`, it accepts fewer than 512 text tokens."""
        network = super().load_denoiser(dtype, meta=meta, folder=folder)
        if self.options["text"] == "short":
            from inlaid.networks.wan_unpadded_text import allow_short_text

            allow_short_text(network, self.text_length)
        return network

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return `text` (n, 512, d), padded with zeros.

        With the option `text: short`, return `text` (n, m, d). m is the first multiple of 8 above the length
        of the longest caption, at most 512.
        """
        n, rows = self.text_length, [item["text"] for item in text]
        if self.options["text"] == "short":
            n = min(
                n, 8 * (max(map(len, rows)) // 8 + 1)
            )  # multiples of 8 are faster; at least one zero is needed
        return {"text": torch.stack([nn.functional.pad(x, (0, 0, 0, n - len(x))) for x in rows])}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict noise - data.

        The network's timestep is 1000 t. TI2V-5B takes one timestep per token. It is 0 for the tokens of
        the conditioning image.
        """
        dtype = denoiser.patch_embedding.weight.dtype
        timestep, x, leading = t.float() * 1000, x_t.to(dtype), 0
        if self.expand_timesteps:
            if self.images:
                leading = 1
                x = torch.cat([cond["first"].to(dtype), x], dim=2)
            _, h, w = (n // p for n, p in zip(x.shape[2:], denoiser.config.patch_size, strict=True))
            frames = nn.functional.pad(timestep[:, None].expand(-1, x_t.shape[2]), (leading, 0))
            timestep = frames.repeat_interleave(h * w, dim=1)
        elif self.images:
            mask = torch.zeros_like(
                x[:, : self.stride[0]]
            )  # one channel per frame within a latent frame; 1 marks conditioning images
            mask[:, :, 0] = 1
            if "last" in self.images:
                mask[:, -1, -1] = 1
            x = torch.cat([x, mask, cond["image_latents"].to(dtype)], dim=1)
        image_embeds = cond["image_embeds"].flatten(0, 1).to(dtype) if self.clip else None
        text = {"encoder_hidden_states": cond["text"].to(dtype), "encoder_hidden_states_image": image_embeds}
        return denoiser(x, timestep=timestep, **text, return_dict=False)[0][:, :, leading:]

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the standard diffusers pipeline, with the VAE and CLIP in float32.

        The pipeline has no text encoder, because `sample` receives encoded text.
        """
        import diffusers

        kind = diffusers.WanImageToVideoPipeline if self.images else diffusers.WanPipeline
        vae, clip, processor = Wan.load_media_encoder(self, device)  # not the override of a family with alpha
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": vae}
        if clip:
            parts |= {"image_encoder": clip, "image_processor": processor}
        parts[self.component] = denoiser if denoiser is not None else self.load_denoiser(dtype)
        options = self.fetched_pipeline(parts)
        with self.loading("model_index.json"):
            pipe = kind.from_pretrained(self.source, torch_dtype=dtype, **options, **parts)
        return pipe.to(device)

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Load an adapter into the expert (high or low noise) that `model.expert` selects."""
        # If the network has `add_k_proj` but the adapter does not, diffusers adds zero factors, but no DoRA
        # magnitudes. Without low_cpu_mem_usage, peft initializes the layers first, and warns about layers
        # that are missing in its configuration.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
            pipeline.load_lora_weights(
                str(folder),
                adapter_name="inlaid",
                load_into_transformer_2=self.model.expert == "low",
                low_cpu_mem_usage=self.clip is None,
            )


def _split_sequence(denoiser: Any, sequence: SequenceParallel) -> None:
    """Modify a network to split its video tokens across processes.

    In Wan 2.2 TI2V-5B, each token has its own timestep, so the timesteps are split as well. Cross-attention
    needs no communication, because each process has the whole text.
    """
    from inlaid.networks.wan_self_attention import SplitSelfAttention

    def timesteps(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        t = kwargs["timestep"]
        return args, {**kwargs, "timestep": sequence.split(t, 1) if t.ndim == 2 else t}

    def tokens(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        return sequence.split(out.flatten(2), 2)[..., None, None]  # the network flattens the last three

    denoiser.register_forward_pre_hook(timesteps, with_kwargs=True)
    denoiser.patch_embedding.register_forward_hook(tokens)
    sequence.split_output(denoiser.rope, 1)
    sequence.gather_output(denoiser.proj_out, 1)
    for block in denoiser.blocks:
        block.attn1.set_processor(SplitSelfAttention(sequence))


def _refuse_unsupported(family: Wan) -> None:
    name, t, vae, task = family.model.checkpoint, family.transformer, family.vae, family.model.task
    if not family.two_experts and family.model.expert is not None:
        raise ValueError(f"model.expert: {name} has one network; leave `expert` out")
    if vae is None or t is None:
        raise ValueError(
            f"model.checkpoint: {name} has no `vae` or no `{family.component}` with a config.json"
        )
    kinds = (vae.get("_class_name"), t.get("_class_name"))
    if kinds != ("AutoencoderKLWan", "WanTransformer3DModel"):
        raise ValueError(
            f"model.family: {name} is not a Wan text-to-video or image-to-video checkpoint, "
            f"it contains {kinds[1]} and {kinds[0]}"
        )
    takes, z = t["in_channels"], vae["z_dim"]
    i2v = 2 * z + vae.get("scale_factor_temporal", 4)
    if takes != z and (takes != i2v or family.expand_timesteps):
        raise ValueError(
            f"model.checkpoint: {name} takes {takes} channels, not {z} for text-to-video or {i2v} for "
            "image-to-video: control and inpainting checkpoints are not supported"
        )
    supported = "t2v" if takes == z else "i2v"
    if task not in (None, supported) and not family.expand_timesteps:
        raise ValueError(
            f"model.task: {name} is for {supported}, not for {task}; leave `task` out, or choose a "
            f"checkpoint for {task}"
        )
    if t.get("image_dim") and family.clip is None:
        raise ValueError(
            f"model.checkpoint: {name} needs an `image_encoder` with a config.json, which is missing"
        )
    if family.two_experts and family.boundary is None:
        raise ValueError(
            f"model.checkpoint: {name} has a transformer_2 but no boundary_ratio in model_index.json"
        )
    if family.boundary is not None and not family.two_experts:
        raise ValueError(
            f"model.checkpoint: {name} sets boundary_ratio {family.boundary} but has no transformer_2; "
            "if it is a converted Wan 2.1, remove boundary_ratio from model_index.json"
        )
    if family.clip and family.options["text"] == "short":
        raise ValueError(
            f"model.options.text: {name} needs 512 text tokens to locate CLIP embeddings; leave it out"
        )
    if family.two_experts and family.model.expert is None:
        raise ValueError(
            f"model.expert: {name} has two experts; choose `high` (t >= {family.boundary}) or `low`"
        )
