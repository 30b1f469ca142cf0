"""Reconstruction metrics of RGBA clips, compared with baselines that predict constant values.

An RGBA VAE that decodes every clip as fully transparent has a small mean error of alpha if subjects are
small. The error is therefore also reported separately for three regions: pixels whose true alpha is opaque,
soft (partly transparent) or transparent. `balanced` is the mean error over the regions that contain pixels.
If all three regions contain pixels, it is large for every constant alpha. Errors are on the scale 0-255.

`tally` reduces each clip to a vector of sums. The vectors can be added over clips of different sizes and over
processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.config.sections import ALPHA_EPS

REGIONS = ("opaque", "soft", "transparent")

GUESSES = ("all opaque", "all transparent", "mean")
"""Names of the baselines, which predict a constant alpha: 255, 0, or the mean alpha of the clip."""

COLORS = tuple(product((0.0, 255.0), repeat=3))

COLUMNS = (
    *(f"pixels {r}" for r in REGIONS),
    *(f"{who} {r}" for who in ("rgba_vae", *GUESSES) for r in REGIONS),
    *("visible", "rgb", "rgb mean", "rgb square", "alpha square"),
    *(f"composite {i}" for i in range(len(COLORS))),
    *("clips", "ssim alpha", "ssim composite"),
)
"""Names of the entries in the vector that `tally` returns: pixel counts and absolute errors of alpha by
region, errors of color in visible pixels, squared errors, the number of clips, and SSIM."""


def regions(alpha: Any, eps: float = ALPHA_EPS) -> dict[str, Any]:
    """Return boolean masks of the opaque, soft (partly transparent) and transparent pixels, by name.

    Pixels are transparent if alpha <= 255 * eps, and opaque if alpha >= 255 - 255 * eps. 255 * eps is rounded
    to an integer. `alpha` is an array or a tensor with values in 0-255.
    """
    level = round(255 * eps)
    opaque, transparent = alpha >= 255 - level, alpha <= level
    return {"opaque": opaque, "soft": ~(opaque | transparent), "transparent": transparent}


def tally(true: Tensor, got: Tensor) -> Tensor:
    """Return a vector of measurements of one clip: float64, one value per entry of `COLUMNS`.

    Most values are pixel counts or sums of errors over pixels. To compute metrics, add the vectors of all
    clips and pass the total to `report`.

    Args:
        true: original clip, RGBA uint8 (4, t, h, w) with straight alpha.
        got: reconstructed clip, in the same format.
    """
    true, got = true.float(), got.float()
    alpha, guess = true[3], got[3]
    masks = regions(alpha)
    errors = {"rgba_vae": (guess - alpha).abs()}
    values = (torch.full_like(alpha[:1, :1, :1], v) for v in (255.0, 0.0, float(alpha.mean())))
    errors |= {who: (v - alpha).abs() for who, v in zip(GUESSES, values, strict=True)}
    sums = [m.sum() for m in masks.values()] + [
        (e * m).sum() for e in errors.values() for m in masks.values()
    ]
    visible = ~masks["transparent"]
    difference = (got[:3] - true[:3]) * visible
    middle = (true[:3] * visible).sum((1, 2, 3), keepdim=True) / visible.sum().clamp_min(1)
    sums += [
        visible.sum(),
        difference.abs().sum() / 3,
        ((true[:3] - middle) * visible).abs().sum() / 3,
        difference.square().sum() / 3,
        (guess - alpha).square().sum(),
    ]
    similar = []
    for color in COLORS:
        ground = torch.tensor(color, device=true.device).view(3, 1, 1, 1)
        pair = [ground + (x[:3] - ground) * (x[3:] / 255) for x in (true, got)]
        sums.append((pair[0] - pair[1]).square().sum() / 3)
        if len(set(color)) == 1:
            similar.append(ssim(*pair))
    sums += [torch.ones(()), ssim(true[3:], got[3:]), torch.stack(similar).mean()]
    return torch.stack([torch.as_tensor(s, dtype=torch.float64, device=true.device) for s in sums])


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean SSIM (Wang et al. 2004) of two videos (c, t, h, w) in 0-255, with 7 x 7 windows."""

    def mean(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.transpose(0, 1), min(7, *x.shape[-2:]), 1)

    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean()


def report(sums: Tensor) -> dict[str, float]:
    """Return the metrics of a set of clips by name.

    Alpha is compared with the ground truth in all pixels, and in the regions opaque, soft and transparent.
    Regions without pixels are omitted. The metrics are:

    - `alpha_mae`, `alpha_mae_REGION` and `alpha_mae_balanced`: mean absolute error of alpha over all pixels,
      over one region, and averaged over the regions. The same errors of a baseline with constant alpha have a
      prefix, such as `all_transparent_`.
    - `rgb_mae`: mean absolute error of color in visible pixels.
    - `mean_rgb_mae`: the same error for a baseline that predicts the clip's mean color.
    - `rgb_psnr` and `alpha_psnr`: PSNR in dB.
    - `composite_psnr` and `composite_psnr_worst`: PSNR of composites over eight background colors, overall
      and for the worst color.
    - `ssim_alpha`: SSIM of alpha.
    - `ssim_composite`: SSIM of composites over black and white.

    Args:
        sums: sum over all clips of the vectors from `tally`.
    """
    value = dict(zip(COLUMNS, sums.double().tolist(), strict=True))
    pixels = {r: value[f"pixels {r}"] for r in REGIONS}
    there = [r for r in REGIONS if pixels[r]]
    total = max(1.0, sum(pixels.values()))
    out: dict[str, float] = {}
    for who in ("rgba_vae", *GUESSES):
        name = "" if who == "rgba_vae" else f"{who.replace(' ', '_')}_"
        each = {r: value[f"{who} {r}"] / pixels[r] for r in there}
        out[f"{name}alpha_mae"] = sum(value[f"{who} {r}"] for r in REGIONS) / total
        out |= {f"{name}alpha_mae_{r}": v for r, v in each.items()}
        out[f"{name}alpha_mae_balanced"] = sum(each.values()) / max(1, len(each))
    visible, clips = max(1.0, value["visible"]), max(1.0, value["clips"])
    out |= {"rgb_mae": value["rgb"] / visible, "mean_rgb_mae": value["rgb mean"] / visible}
    grounds = [value[f"composite {i}"] / total for i in range(len(COLORS))]
    squares = {
        "rgb_psnr": value["rgb square"] / visible,
        "alpha_psnr": value["alpha square"] / total,
        "composite_psnr": sum(grounds) / len(grounds),
        "composite_psnr_worst": max(grounds),
    }
    out |= {n: float(10 * torch.log10(torch.tensor(255.0**2 / max(s, 1e-3)))) for n, s in squares.items()}
    return out | {n: value[n.replace("_", " ")] / clips for n in ("ssim_alpha", "ssim_composite")}


def trivial(found: Mapping[str, float]) -> list[str]:
    """Return a warning for each baseline that alpha hardly beats, and for each region with a large error.

    The baselines are `GUESSES`. Alpha hardly beats a baseline if `alpha_mae_balanced` exceeds half of the
    baseline's value. The regions are `REGIONS`. An error is large if the mean absolute error of alpha exceeds
    64 of 255.

    Args:
        found: metrics from `report`.
    """
    out = []
    for who in GUESSES:
        name = who.replace(" ", "_")
        if found["alpha_mae_balanced"] > found[f"{name}_alpha_mae_balanced"] / 2:
            out.append(
                f"alpha is hardly better than the baseline `{who}` in the mean of the regions: mean absolute "
                f"error {found['alpha_mae_balanced']:.1f} of 255, baseline "
                f"{found[f'{name}_alpha_mae_balanced']:.1f}"
            )
    for region in REGIONS:
        error = found.get(f"alpha_mae_{region}", 0.0)
        if error > 64:
            out.append(f"mean absolute error of alpha is {error:.0f} of 255 where the clips are {region}")
    return out
