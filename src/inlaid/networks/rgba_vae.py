"""RGBA VAE of Wan-Alpha (Dong et al. 2025, https://arxiv.org/abs/2509.24979) for transparent clips.

Color and alpha share one latent. The frozen Wan encoder processes color and alpha separately, each as an RGB
video. A trained merge block maps both outputs of the encoder's middle block to the shared latent; the
encoder's own latents are not used. The frozen decoder decodes the latent twice: with one low-rank update
(LoRA) to color, with another to alpha. This implementation was written from a description of the method.

Latents are not normalized by the mean and std of the VAE. The low-rank updates are scaled by 1 / rank.
Decoded color is straight (not premultiplied), and arbitrary where alpha is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

WIDTH, CHANNELS = 384, 16
"""Channels of the encoder features, and channels of the latent, in the published checkpoints."""


class MergeBlock(nn.Module):
    """Network that merges the encoder features of color and alpha into one latent.

    It processes all latent frames at once. The published implementation processes one frame at a time with a
    cache; the result is the same.
    """

    def __init__(self, width: int = WIDTH, channels: int = CHANNELS, features: int | None = None) -> None:
        """Create a merge block.

        Args:
            width: number of channels of its hidden layers.
            channels: number of channels of the latent.
            features: number of channels of the color features; the alpha features have as many. Default:
                `width`, as in the published checkpoints.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import (
            WanAttentionBlock,
            WanCausalConv3d,
            WanResidualBlock,
            WanRMS_norm,
        )

        super().__init__()
        self.conv_in = WanCausalConv3d(2 * (features or width), width, 1)
        self.res = nn.ModuleList(WanResidualBlock(width, width) for _ in range(3))
        self.att = nn.ModuleList(WanAttentionBlock(width) for _ in range(2))
        self.norm_out = WanRMS_norm(width, images=False)
        self.conv_out = WanCausalConv3d(width, channels, 3, padding=1)
        for name, parameter in self.att.named_parameters():
            if ".proj." in name:  # as published; diffusers initializes the projection randomly
                nn.init.zeros_(parameter)

    def forward(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Merge color and alpha features (b, features, t, h, w) into one tensor (b, channels, t, h, w)."""
        x = self.res[0](self.conv_in(torch.cat([rgb, alpha], 1)))
        for attention, residual in zip(self.att, list(self.res)[1:], strict=True):
            x = residual(attention(x))
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class DecoderLora(nn.Module):
    """Low-rank update (LoRA) of all convolutions of a decoder: weight W becomes W + B A / rank.

    peft cannot wrap Wan's causal convolutions, because they are called with a cache. The updated weights are
    computed once per clip and used for all latent frames of the clip.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], rank: int = 128) -> None:
        """Create the low-rank factors: A is random and B is zero.

        `shapes` maps the names of convolutions to weight shapes (out, in, *kernel).
        """
        super().__init__()
        self.names = list(shapes)
        self.rank = rank
        self.a = nn.ParameterList(torch.empty(rank, *shape[1:]) for shape in shapes.values())
        self.b = nn.ParameterList(torch.zeros(shape[0], rank) for shape in shapes.values())
        for a in self.a:
            nn.init.kaiming_uniform_(a.flatten(1), a=math.sqrt(5))

    @classmethod
    def of(cls, decoder: nn.Module, rank: int = 128) -> DecoderLora:
        """Create the low-rank update of a decoder; the update is zero until it is trained."""
        return cls({n: m.weight.shape for n, m in convolutions(decoder)}, rank)

    def weights(self, decoder: nn.Module) -> dict[str, Tensor]:
        """Return the decoder's convolution weights with the update added, by parameter name."""
        found = dict(convolutions(decoder))
        out = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            weight = found[name].weight
            delta = (b @ a.flatten(1)).view_as(weight) / self.rank
            out[f"{name}.weight"] = weight + delta.to(weight.dtype)
        return out


def convolutions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each 2-D or 3-D convolution in a module."""
    yield from ((n, m) for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))


class RgbaVae(nn.Module):
    """Frozen Wan VAE with a merge block and two low-rank updates of the decoder.

    The merge block computes one latent from color and alpha. The decoder decodes color with one update, and
    alpha with the other.
    """

    def __init__(self, vae: Any, merge: MergeBlock, rgb: DecoderLora, alpha: DecoderLora) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.merge, self.rgb, self.alpha = merge, rgb, alpha
        self.checkpointing = False
        """True if `decode` uses gradient checkpointing, one latent frame at a time."""

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Encode color and alpha, each (b, 3, t, h, w) in [-1, 1], to one latent (b, c, t', h', w').

        Transparent pixels of `rgb` must have a background color (see `hard_render`). The latent is not
        normalized.
        """
        return self.merge(trunk(self.vae, rgb), trunk(self.vae, alpha))

    def enable_gradient_checkpointing(self, *_: Any) -> None:
        """Enable gradient checkpointing in `decode`; each latent frame is a separate segment."""
        self.checkpointing = True

    def decode(self, z: Tensor, *, checkpointing: bool | None = None) -> tuple[Tensor, Tensor]:
        """Decode an unnormalized latent to color and alpha, each (b, 3, t, h, w).

        Color is straight (not premultiplied). Values are not clamped to [-1, 1].

        Args:
            z: latent.
            checkpointing: use gradient checkpointing. Default: the attribute `checkpointing`.
        """
        again = self.checkpointing if checkpointing is None else checkpointing
        x = self.vae.post_quant_conv(z)
        decoder = self.vae.decoder
        rgb, alpha = (
            decode(decoder, x, lora.weights(decoder), checkpointing=again) for lora in (self.rgb, self.alpha)
        )
        return rgb, alpha


@torch.no_grad()
def trunk(vae: Any, video: Tensor) -> Tensor:
    """Encode a video and return the output of the Wan encoder's middle block, (b, width, t', h', w').

    The head of the encoder computes latents from this output.

    Raises:
        ValueError: if tiling is enabled, because the features would be computed per tile.
    """
    if vae.use_tiling:
        raise ValueError("encoder features are not available from a tiled VAE; call disable_tiling()")
    chunks: list[Tensor] = []
    hook = vae.encoder.mid_block.register_forward_hook(lambda module, args, output: chunks.append(output))
    try:
        vae.encode(video)
    finally:
        hook.remove()
    return torch.cat(chunks, 2)


def decode(
    decoder: nn.Module, x: Tensor, weights: Mapping[str, Tensor], *, checkpointing: bool = False
) -> Tensor:
    """Decode latents with a Wan decoder, one latent frame at a time.

    The result has gradients and is not clamped.

    Args:
        decoder: decoder of a Wan VAE.
        x: latents (b, c, t, h, w), after `post_quant_conv`.
        weights: parameters by name, used instead of those of the decoder.
        checkpointing: use gradient checkpointing for each latent frame. The checkpointed function takes the
            caches of the convolutions as arguments and returns new caches. The recomputation therefore uses
            the same caches as the forward pass.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    slots = sum(isinstance(m, WanCausalConv3d) for m in decoder.modules())

    def run(chunk: Tensor, cache: tuple[Any, ...], first: bool) -> tuple[Tensor, tuple[Any, ...]]:
        after = list(cache)
        values = {"feat_cache": after, "feat_idx": [0], "first_chunk": first}
        return functional_call(decoder, dict(weights), (chunk,), values), tuple(after)

    cache: tuple[Any, ...] = (None,) * slots
    out = []
    for i in range(x.shape[2]):
        args = (x[:, :, i : i + 1], cache, i == 0)
        frames, cache = checkpoint(run, *args, use_reentrant=False) if checkpointing else run(*args)
        out.append(frames)
    return torch.cat(out, 2)


# --- published names ----------------------------------------------------------------------------------------

_MERGE = {
    r"block\.conv1\.(weight|bias)": r"conv_in.\1",
    r"block\.head\.0\.gamma": "norm_out.gamma",
    r"block\.head\.2\.(weight|bias)": r"conv_out.\1",
    r"block\.middle\.([024])\.residual\.0\.gamma": r"res.\1.norm1.gamma",
    r"block\.middle\.([024])\.residual\.2\.(weight|bias)": r"res.\1.conv1.\2",
    r"block\.middle\.([024])\.residual\.3\.gamma": r"res.\1.norm2.gamma",
    r"block\.middle\.([024])\.residual\.6\.(weight|bias)": r"res.\1.conv2.\2",
    r"block\.middle\.([13])\.(norm\.gamma|to_qkv\.weight|to_qkv\.bias|proj\.weight|proj\.bias)": r"att.\1.\2",
}

_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}


def merge_name(released: str) -> str | None:
    """Convert a parameter name of Wan-Alpha's published checkpoints to the name in `MergeBlock`.

    `released` is the published name without the prefix `middle.`. The result is None if the name is unknown.
    """
    for pattern, name in _MERGE.items():
        found = re.fullmatch(pattern, released)
        if found:
            inside = found.expand(name)
            return re.sub(r"^(res|att)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) // 2}", inside)
    return None


def vae_name(original: str, residuals: int = 2) -> str | None:
    """Convert the original name of a Wan VAE's module or parameter to its diffusers name.

    The result is None if the name is unknown.

    Args:
        original: name in Wan's original checkpoint, such as `decoder.upsamples.3.resample.1.weight`.
        residuals: number of residual blocks per stage, `num_res_blocks` in the configuration.
    """
    top = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    part, _, rest = original.partition(".")
    if part in top:
        return f"{top[part]}.{rest}" if rest else top[part]
    if part not in ("encoder", "decoder"):
        return None
    block, _, rest = rest.partition(".")
    if block == "conv1":
        return _join(part, "conv_in", rest)
    index, _, rest = rest.partition(".")
    if block == "head":
        return _join(part, {"0": "norm_out", "2": "conv_out"}.get(index), rest)
    if block == "middle":
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}.get(index)
        return _join(part, place and f"mid_block.{place}", _inside(rest))
    if block == "downsamples" and part == "encoder":
        return _join(part, f"down_blocks.{index}", _inside(rest))
    if block == "upsamples" and part == "decoder" and index.isdigit():
        stage, at = divmod(int(index), residuals + 2)
        place = f"resnets.{at}" if at <= residuals else "upsamplers.0"
        return _join(part, f"up_blocks.{stage}.{place}", _inside(rest))
    return None


def _inside(rest: str) -> str:
    """Convert the name of a parameter inside a block from the original code to diffusers.

    `rest` is the original name without the prefix of the block, such as `residual.0.gamma`. The block is a
    residual block, an attention block or a resampler.
    """
    found = re.match(r"residual\.([0236])(?=\.|$)", rest)
    if found:
        return _RESIDUAL[found[1]] + rest[found.end() :]
    return re.sub(r"^shortcut(?=\.|$)", "conv_shortcut", rest)


def _join(*parts: str | None) -> str | None:
    return None if None in parts else ".".join(p for p in parts if p)
