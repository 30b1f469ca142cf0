"""How well RGBA clips are reconstructed, beside what costs nothing: predicting one alpha everywhere.

A plain mean error of alpha lets a codec pass that says "clear" everywhere, wherever the subject is small. So
the error is told by region, opaque, soft and clear of the true alpha, and `balanced` is the mean of the
three, which no constant can make small. Everything is on 0-255.

A clip becomes a vector of sums: clips add up whatever their sizes, and whichever process measured them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor, nn

CLEAR, OPAQUE = 2, 253
"""Alpha up to the first counts as clear, from the second on as opaque."""

REGIONS = ("opaque", "soft", "clear")
GUESSES = ("all opaque", "all clear", "mean")
"""Alphas that cost nothing: 255, 0, and the clip's own mean."""

COLORS = tuple(product((0.0, 255.0), repeat=3))

COLUMNS = (
    *(f"pixels {r}" for r in REGIONS),
    *(f"{who} {r}" for who in ("codec", *GUESSES) for r in REGIONS),
    *("visible", "rgb", "rgb mean", "rgb square", "alpha square"),
    *(f"composite {i}" for i in range(len(COLORS))),
    *("clips", "ssim alpha", "ssim composite"),
)
"""What `tally` sums: pixels and absolute errors of alpha by region, errors of colour where it is visible,
squared errors, and structural similarities."""


def tally(true: Tensor, got: Tensor) -> Tensor:
    """Sums over one clip, both uint8 (4, t, h, w), straight: float64, one number for each of `COLUMNS`."""
    true, got = true.float(), got.float()
    alpha, guess = true[3], got[3]
    masks = (alpha >= OPAQUE, (alpha > CLEAR) & (alpha < OPAQUE), alpha <= CLEAR)
    errors = {"codec": (guess - alpha).abs()}
    values = (torch.full_like(alpha[:1, :1, :1], v) for v in (255.0, 0.0, float(alpha.mean())))
    errors |= {who: (v - alpha).abs() for who, v in zip(GUESSES, values, strict=True)}
    sums = [m.sum() for m in masks] + [(e * m).sum() for e in errors.values() for m in masks]
    visible = alpha > CLEAR
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
    """Structural similarity (Wang et al. 2004) of (c, t, h, w) on 0-255, windows of 7 x 7, mean of all."""

    def mean(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.transpose(0, 1), min(7, *x.shape[-2:]), 1)

    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean()


def report(sums: Tensor) -> dict[str, float]:
    """Named numbers of added-up `tally` vectors; regions that no clip has are left out.

    `alpha_mae`, `alpha_mae_REGION`, `alpha_mae_balanced`, the same for each of `GUESSES` (such as
    `all_clear_alpha_mae_opaque`), `rgb_mae` where alpha is visible and of the clips' mean colour, PSNR in dB
    of colour, alpha and composites on the eight corners of the colour cube, mean and worst, and SSIM of
    alpha and of the composites on black and white.
    """
    value = dict(zip(COLUMNS, sums.double().tolist(), strict=True))
    pixels = {r: value[f"pixels {r}"] for r in REGIONS}
    there = [r for r in REGIONS if pixels[r]]
    total = max(1.0, sum(pixels.values()))
    out: dict[str, float] = {}
    for who in ("codec", *GUESSES):
        name = "" if who == "codec" else f"{who.replace(' ', '_')}_"
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
    """Sentences about a codec that does little more than predict one alpha everywhere; else empty.

    Args:
        found: from `report`.
    """
    out = []
    for who in GUESSES:
        name = who.replace(" ", "_")
        if found["alpha_mae_balanced"] > found[f"{name}_alpha_mae_balanced"] / 2:
            out.append(
                f"alpha is hardly better than {who} in the mean of regions: "
                f"{found['alpha_mae_balanced']:.1f} of 255, and {found[f'{name}_alpha_mae_balanced']:.1f}"
            )
    for region in REGIONS:
        error = found.get(f"alpha_mae_{region}", 0.0)
        if error > 64:
            out.append(f"alpha is off by {error:.0f} of 255 where the clips are {region}")
    return out
