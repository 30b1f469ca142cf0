"""Nine loss terms of the RGBA VAE, and the composites that they compare (Dong et al. 2025, section 3.2).

Videos are (b, 3, t, h, w) in [-1, 1]. Alpha is also a video: -1 is transparent, 1 is opaque. A soft composite
blends color and a background color by alpha. In a hard composite, a background color replaces transparent
pixels, and all other pixels keep their color.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlaid.config.sections import ALPHA_EPS
from inlaid.files import load_torch

COLORS = tuple(product((-1.0, 1.0), repeat=3))
"""Corners of the RGB cube in [-1, 1], from which background colors are sampled."""


def soft_render(rgb: Tensor, alpha: Tensor, color: Tensor) -> Tensor:
    """Blend `rgb` and a background color (3,) by alpha.

    The result is rgb * a + color * (1 - a) with a = (alpha + 1) / 2.
    """
    a = (alpha + 1) / 2
    return rgb * a + _background(color, rgb) * (1 - a)


def hard_render(rgb: Tensor, alpha: Tensor, color: Tensor, *, eps: float = ALPHA_EPS) -> Tensor:
    """Replace the color of transparent pixels with a background color (3,).

    `alpha` is in [-1, 1]. Pixels are transparent if (alpha + 1) / 2 <= eps. No gradient flows to `alpha`.
    """
    visible = (alpha.detach() + 1) / 2 > eps
    return torch.where(visible, rgb, _background(color, rgb).to(rgb.dtype))


def _background(color: Tensor, like: Tensor) -> Tensor:
    return color.to(like).view(1, 3, 1, 1, 1)


def luma(x: Tensor) -> Tensor:
    """Convert an RGB video to grayscale, (b, 1, t, h, w), with the studio-range weights of BT.601."""
    weights = torch.tensor([65.738, 129.057, 25.064], device=x.device, dtype=x.dtype) / 256
    return (x * weights.view(1, 3, 1, 1, 1)).sum(1, keepdim=True)


Edge = Literal["sobel", "central"]

_SMOOTH: dict[str, tuple[float, float, float]] = {"sobel": (1.0, 2.0, 1.0), "central": (0.0, 1.0, 0.0)}


def edges(x: Tensor, kind: Edge) -> Tensor:
    """Return the gradient magnitude (b, 1, t, h, w) of each frame of a video, computed in grayscale.

    `kind` selects the Sobel filter or central differences. The frames are padded with zeros.
    """
    gray = luma(x)
    flat = gray.transpose(1, 2).flatten(0, 1)
    slope = torch.tensor([-1.0, 0.0, 1.0], device=x.device, dtype=x.dtype)
    smooth = torch.tensor(_SMOOTH[kind], device=x.device, dtype=x.dtype)
    along_x = torch.outer(smooth, slope)
    kernels = torch.stack([along_x, along_x.T])[:, None]
    gradient = nn.functional.conv2d(flat, kernels, padding=1)
    return (gradient.square().sum(1) + 1e-6).sqrt().view_as(gray)


class Perceptual(nn.Module):
    """Feature network of the perceptual loss: the first two stages of VGG16 (Simonyan & Zisserman 2014).

    Its output is the last activation of the second stage. Weights have the names of torchvision's file,
    `features.{0,2,5,7}.{weight,bias}`. Numbers of channels are inferred from the tensors. If `imagenet` is
    true, frames are normalized with the mean and std of ImageNet.
    """

    def __init__(self, weights: dict[str, Tensor], *, imagenet: bool) -> None:
        super().__init__()

        def convolution(index: int) -> nn.Conv2d:
            weight, bias = (weights[f"features.{index}.{n}"] for n in ("weight", "bias"))
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            return layer

        first, second, third, fourth = (convolution(i) for i in (0, 2, 5, 7))
        self.features = nn.Sequential(
            first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), third, nn.ReLU(), fourth, nn.ReLU()
        ).requires_grad_(False)
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @classmethod
    def load(cls, path: Path, *, imagenet: bool) -> Perceptual:
        """Load the network from a local `.safetensors` or `.pth` file.

        Raises:
            ValueError: if the file is missing, or does not contain the weights of a VGG16.
        """
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(path)
            else:
                weights = load_torch(path)
            return cls(weights, imagenet=imagenet)
        except Exception as error:
            raise ValueError(
                f"{path}: not the weights of a VGG16 ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "use torchvision's vgg16 file, or set rgba_vae.perceptual: none"
            ) from None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of all frames of a video (b, 3, t, h, w) in [-1, 1].

        The result is (b * t, channels, h / 2, w / 2).
        """
        frames = ((x + 1) / 2).transpose(1, 2).flatten(0, 1)
        return self.features((frames - self.mean) / self.std)  # type: ignore[operator]


@dataclass(frozen=True)
class RgbaLoss:
    """Nine loss terms: L1, perceptual and edge errors of alpha, of a soft composite and of a hard composite.

    A soft composite blends color and a background color by alpha. In a hard composite, a background color
    replaces transparent pixels, and all other pixels keep their color.

    The preset `paper` uses Sobel edges and the root mean square error of the perceptual features. The preset
    `reference` uses central differences and the mean squared error of the features, as in the released
    trainer of Wan-Alpha. By default, training with `paper` normalizes the input of `perceptual` by the mean
    and std of ImageNet. Training with `reference` does not normalize it.
    """

    preset: Literal["paper", "reference"] = "paper"
    perceptual: Callable[[Tensor], Tensor] | None = None
    """Feature network of the perceptual terms, such as `Perceptual`; None omits these three terms."""
    alpha_eps: float = ALPHA_EPS
    edge: Edge | None = None
    """Filter of the edge terms; None selects the filter of the preset."""
    hard_mask: Literal["reconstructed", "true"] = "reconstructed"
    """Which alpha, reconstructed or true, selects the transparent pixels in the hard composite of the
    reconstruction. In transparent regions, reconstructed alpha fluctuates around the threshold; true alpha
    does not."""

    def __call__(
        self, rgb: Tensor, alpha: Tensor, true_rgb: Tensor, true_alpha: Tensor, hard: Tensor, soft: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss terms by name; the entry `loss` is their sum.

        Args:
            rgb: reconstructed straight color.
            alpha: reconstructed alpha.
            true_rgb: straight color of the original clip.
            true_alpha: alpha of the original clip.
            hard: background color (3,) of the hard composites, in which it replaces transparent pixels.
            soft: background color (3,) of the soft composites, in which it is blended with color by alpha.
        """
        eps = self.alpha_eps
        mask = alpha if self.hard_mask == "reconstructed" else true_alpha
        pairs = {
            "alpha": (alpha, true_alpha),
            "rgb_soft": (soft_render(rgb, alpha, soft), soft_render(true_rgb, true_alpha, soft)),
            "rgb_hard": (
                hard_render(rgb, mask, hard, eps=eps),
                hard_render(true_rgb, true_alpha, hard, eps=eps),
            ),
        }
        terms: dict[str, Tensor] = {}
        kind: Edge = self.edge or ("sobel" if self.preset == "paper" else "central")
        for name, (got, true) in pairs.items():
            got, true = got.float(), true.float()
            terms[f"l1_{name}"] = (got - true).abs().mean()
            terms[f"edge_{name}"] = (edges(got, kind) - edges(true, kind)).abs().mean()
            if self.perceptual is not None:
                difference = self.perceptual(got) - self.perceptual(true)
                square = difference.square().mean()
                terms[f"perceptual_{name}"] = (
                    square if self.preset == "reference" else (square + 1e-12).sqrt()
                )
        return {**terms, "loss": torch.stack(list(terms.values())).sum()}


def sample_colors(
    generator: torch.Generator, n: int = 3, among: Sequence[Sequence[float]] = COLORS
) -> list[Tensor]:
    """Sample `n` background colors from `among`, with replacement; each color is (3,) in [-1, 1]."""
    picks: Any = torch.randint(len(among), (n,), generator=generator).tolist()
    return [torch.tensor(among[i]) for i in picks]
