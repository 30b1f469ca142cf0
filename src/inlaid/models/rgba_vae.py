"""The RGBA VAE of Wan-Alpha (Dong et al. 2025): https://arxiv.org/abs/2509.24979.

Colour and transparency share one latent. The frozen Wan encoder reads both as RGB videos; a merge block
takes the features of its trunk, not its latents, and predicts the latent directly; two low-rank copies of the
frozen decoder split it again. Written from a description of the method.

What surprises: the latent is in the VAE's own scale, not normalised; the decoders' low-rank update is scaled
by 1 / rank; decoded colour is straight, and arbitrary where alpha is 0.
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
"""Channels of the encoder's trunk and of the latent, in the published checkpoints."""


class MergeBlock(nn.Module):
    """Trunk features of both streams -> one latent: (b, 2 width, t, h, w) -> (b, channels, t, h, w).

    Runs over the whole latent sequence at once, which equals the published form, frame by frame with a cache.
    """

    def __init__(self, width: int = WIDTH, channels: int = CHANNELS) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import (
            WanAttentionBlock,
            WanCausalConv3d,
            WanResidualBlock,
            WanRMS_norm,
        )

        super().__init__()
        self.conv_in = WanCausalConv3d(2 * width, width, 1)
        self.res = nn.ModuleList(WanResidualBlock(width, width) for _ in range(3))
        self.att = nn.ModuleList(WanAttentionBlock(width) for _ in range(2))
        self.norm_out = WanRMS_norm(width, images=False)
        self.conv_out = WanCausalConv3d(width, channels, 3, padding=1)
        for name, parameter in self.att.named_parameters():
            if ".proj." in name:  # as published; diffusers' class begins with a random projection
                nn.init.zeros_(parameter)

    def forward(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Features of colour first, of alpha second."""
        x = self.res[0](self.conv_in(torch.cat([rgb, alpha], 1)))
        for attention, residual in zip(self.att, list(self.res)[1:], strict=True):
            x = residual(attention(x))
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class DecoderLora(nn.Module):
    """A low-rank update of every convolution of a decoder, in weight space: W + B A / rank.

    peft cannot wrap Wan's causal convolutions, which are called with a cache. The effective weights are made
    once per decoding and serve all its chunks.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], rank: int = 128) -> None:
        """`shapes` maps each convolution's name to its weight's shape (out, in, *kernel)."""
        super().__init__()
        self.names = list(shapes)
        self.rank = rank
        self.a = nn.ParameterList(torch.empty(rank, *shape[1:]) for shape in shapes.values())
        self.b = nn.ParameterList(torch.zeros(shape[0], rank) for shape in shapes.values())
        for a in self.a:
            nn.init.kaiming_uniform_(a.flatten(1), a=math.sqrt(5))

    @classmethod
    def of(cls, decoder: nn.Module, rank: int = 128) -> DecoderLora:
        """For every convolution of a decoder; no change until it is trained."""
        return cls({n: m.weight.shape for n, m in convolutions(decoder)}, rank)

    def weights(self, decoder: nn.Module) -> dict[str, Tensor]:
        """Effective weights by parameter name."""
        found = dict(convolutions(decoder))
        out = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            weight = found[name].weight
            delta = (b @ a.flatten(1)).view_as(weight) / self.rank
            out[f"{name}.weight"] = weight + delta.to(weight.dtype)
        return out


def convolutions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every 2-D and 3-D convolution by name."""
    yield from ((n, m) for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))


class RgbaVae(nn.Module):
    """A frozen Wan VAE with a merge block and two low-rank decoders."""

    def __init__(self, vae: Any, merge: MergeBlock, rgb: DecoderLora, alpha: DecoderLora) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.merge, self.rgb, self.alpha = merge, rgb, alpha
        self.checkpointing = False
        """Whether decoding recomputes each latent frame in the backward pass."""

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Hard-rendered colour and alpha as videos (b, 3, t, h, w) in [-1, 1] -> latent, not normalised."""
        return self.merge(trunk(self.vae, rgb), trunk(self.vae, alpha))

    def enable_gradient_checkpointing(self, *_: Any) -> None:
        """Recompute the decoders, a latent frame at a time, in the backward pass."""
        self.checkpointing = True

    def decode(self, z: Tensor, *, checkpointing: bool | None = None) -> tuple[Tensor, Tensor]:
        """A latent -> straight colour and alpha (b, 3, t, h, w), about [-1, 1], not clamped."""
        again = self.checkpointing if checkpointing is None else checkpointing
        x = self.vae.post_quant_conv(z)
        decoder = self.vae.decoder
        rgb, alpha = (
            decode(decoder, x, lora.weights(decoder), checkpointing=again) for lora in (self.rgb, self.alpha)
        )
        return rgb, alpha


@torch.no_grad()
def trunk(vae: Any, video: Tensor) -> Tensor:
    """Features of a Wan encoder after its middle block, before its head: (b, width, t', h', w').

    Raises:
        ValueError: when the VAE is tiled, which would give features of tiles.
    """
    if vae.use_tiling:
        raise ValueError("the encoder's features cannot be taken from a tiled VAE; call disable_tiling()")
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
    """Decodes latent frames one after the other, with gradients and without a clamp.

    Args:
        decoder: of a Wan VAE.
        x: (b, c, t, h, w), after `post_quant_conv`.
        weights: by parameter name, in place of the decoder's own.
        checkpointing: recompute each chunk in the backward pass. The convolutions' caches then go in and come
            out as values, so that recomputing sees what the forward pass saw.
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
    """A merge block's parameter by its published name (after `middle.`), or None."""
    for pattern, name in _MERGE.items():
        found = re.fullmatch(pattern, released)
        if found:
            inside = found.expand(name)
            return re.sub(r"^(res|att)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) // 2}", inside)
    return None


def vae_name(original: str, residuals: int = 2) -> str | None:
    """A Wan VAE's module or parameter by its original name, as diffusers spells it, or None.

    Args:
        original: such as `decoder.upsamples.3.resample.1.weight`.
        residuals: residual blocks per stage, `num_res_blocks` of the configuration.
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
    """Names within a residual block, an attention block or a resampler."""
    found = re.match(r"residual\.([0236])(?=\.|$)", rest)
    if found:
        return _RESIDUAL[found[1]] + rest[found.end() :]
    return re.sub(r"^shortcut(?=\.|$)", "conv_shortcut", rest)


def _join(*parts: str | None) -> str | None:
    return None if None in parts else ".".join(p for p in parts if p)
