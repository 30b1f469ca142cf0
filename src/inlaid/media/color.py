"""Conversion of wide-gamut and HDR video, and of images with an ICC profile, to sRGB.

The codes of color primaries and transfer functions are those of ITU-T H.273, which FFmpeg also uses. Every
transfer function except linear light, PQ and HLG is treated as the sRGB curve. BT.709 video is therefore not
converted.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))

D65, DCI = (0.3127, 0.3290), (0.314, 0.351)

PRIMARIES = {
    4: ("BT.470 M", ((0.670, 0.330), (0.210, 0.710), (0.140, 0.080)), (0.310, 0.316)),
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), D65),
    11: ("DCI-P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), DCI),
    12: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), D65),
}
"""Color primaries that are converted to sRGB, by code (H.273, table 2).

Each value contains a name, the chromaticities of red, green and blue, and the chromaticity of white. Codes 5,
6 and 7 (standard-definition video) are missing, because they are treated as sRGB: their colors differ from
sRGB by at most 8 of 255, and many files carry these codes by mistake.
"""

LINEAR, PQ, HLG = 8, 16, 18

TRANSFERS = {LINEAR: "linear light", PQ: "PQ (HDR)", HLG: "HLG (HDR)"}
"""Names of the transfer functions that are converted to sRGB, by code (H.273, table 3)."""

HDR = (PQ, HLG)

WHITE = 203.0
"""Luminance of SDR white in HDR video, in cd/m2 (BT.2408)."""

PEAK = 1000.0
"""Assumed peak luminance of HDR video, in cd/m2; most HDR video is mastered on displays with this peak."""


def conversion(primaries: int, transfer: int) -> str:
    """Return the name of the conversion from decoded RGB to sRGB, such as `BT.2020 PQ (HDR)`.

    The name is empty if no conversion is needed.
    """
    gamut = PRIMARIES[primaries][0] if primaries in PRIMARIES else ""
    curve = TRANSFERS.get(transfer, "")
    return " ".join(x for x in (gamut, curve) if x)


def to_srgb(pixels: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """Convert RGB or RGBA pixels to sRGB; HDR is tone-mapped with BT.2390.

    Alpha is only rounded to 8 bits.

    Args:
        pixels: uint16 (h, w, 3) or (h, w, 4), full range.
        primaries: color primaries of the video (H.273).
        transfer: transfer function of the video (H.273).

    Returns:
        uint8 of the same shape.
    """
    linear = _decoding(transfer)[pixels[..., :3]]
    if transfer == HLG:  # opto-optical transfer function of a 1000 cd/m2 display (BT.2100)
        luma = linear @ np.array((0.2627, 0.6780, 0.0593), np.float32)
        linear = linear * (np.maximum(luma, 1e-6) ** 0.2)[..., None] * np.float32(PEAK / WHITE)
    if primaries in PRIMARIES:
        linear = linear @ _matrix(primaries).T
    linear = np.maximum(linear, 0)
    if transfer in HDR:
        highest = np.maximum(linear.max(-1, keepdims=True), 1e-6)
        linear = linear * (_tone_mapped(highest) / highest)
    out = _encoding()[(np.minimum(linear, 1) * 65535 + 0.5).astype(np.uint16)]
    if pixels.shape[-1] == 4:
        alpha = ((pixels[..., 3:].astype(np.uint32) + 128) // 257).astype(np.uint8)
        out = np.concatenate([out, alpha], -1)
    return out


@cache
def _decoding(transfer: int) -> np.ndarray:
    """Return a lookup table from 16-bit code values to linear light.

    For HLG, 1.0 is the peak of the signal. For other transfer functions, 1.0 is SDR white.
    """
    x = np.arange(65536, dtype=np.float64) / 65535
    if transfer == LINEAR:
        out = x
    elif transfer == PQ:
        out = 10000 / WHITE * _pq_to_linear(x)
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        out = np.where(x <= 0.5, x * x / 3, (np.exp((x - c) / a) + b) / 12)
    else:
        out = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return out.astype(np.float32)


@cache
def _encoding() -> np.ndarray:
    """Return a lookup table from 16-bit linear light to 8-bit sRGB codes."""
    x = np.arange(65536, dtype=np.float64) / 65535
    code = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return (255 * code).round().astype(np.uint8)


def _pq_to_linear(x: np.ndarray) -> np.ndarray:
    """Convert PQ codes to linear light in [0, 1], where 1 is 10,000 cd/m2 (SMPTE ST 2084)."""
    power = x ** (1 / 78.84375)
    return (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _linear_to_pq(y: np.ndarray) -> np.ndarray:
    power = np.maximum(y, 0) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _tone_mapped(light: np.ndarray) -> np.ndarray:
    """Tone-map linear light of HDR video to SDR.

    The tone curve is the EETF of ITU-R BT.2390, section 5.4.1. In the input and the result, 1 is SDR white.
    """
    top = float(_linear_to_pq(np.array(PEAK / 10000)))
    code = np.minimum(_linear_to_pq(light.astype(np.float64) * WHITE / 10000) / top, 1)
    highest = float(_linear_to_pq(np.array(WHITE / 10000))) / top
    knee = 1.5 * highest - 0.5
    t = np.maximum(code - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * highest
    )
    mapped = np.where(code < knee, code, spline)
    return (_pq_to_linear(mapped * top) * 10000 / WHITE).astype(np.float32)


@cache
def _matrix(primaries: int) -> np.ndarray:
    """Return the matrix that converts linear RGB with the given primaries to linear sRGB.

    The matrix includes a Bradford adaptation of the white point.
    """
    _, chromaticities, white = PRIMARIES[primaries]
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    seen, wanted = bradford @ _xyz(white), bradford @ _xyz(D65)
    adapted = np.linalg.inv(bradford) @ np.diag(wanted / seen) @ bradford
    out = np.linalg.inv(_rgb_to_xyz(SRGB, D65)) @ adapted @ _rgb_to_xyz(chromaticities, white)
    return out.astype(np.float32)


def _xyz(xy: tuple[float, float]) -> np.ndarray:
    x, y = xy
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _rgb_to_xyz(primaries: tuple[tuple[float, float], ...], white: tuple[float, float]) -> np.ndarray:
    columns = np.stack([_xyz(p) for p in primaries], 1)
    return columns * np.linalg.solve(columns, _xyz(white))


# --- images -------------------------------------------------------------------------------------------------


def icc_name(image: Image.Image) -> str:
    """Return the name of an image's ICC profile, or "" if there is no profile or the profile is sRGB.

    Raises:
        ValueError: if the profile cannot be read.
    """
    raw = image.info.get("icc_profile")
    if not raw:
        return ""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(raw))).strip()
    except (ImageCms.PyCMSError, OSError, TypeError) as error:
        raise ValueError(f"its ICC profile cannot be read ({error}): remove or replace the profile") from None
    return "" if "srgb" in name.lower() else f"ICC profile {name}".strip()


def image_to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image with an ICC profile to sRGB, without changing alpha.

    An image without a profile, or with an sRGB profile, is returned unchanged.

    Raises:
        ValueError: if the profile cannot be read, or cannot be applied to the image.
    """
    if not icc_name(image):
        return image
    if image.mode in ("P", "PA", "LA", "La") or "transparency" in image.info:
        alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if alpha else "RGB")
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        gray = source.profile.xcolor_space.strip() == "GRAY"
        opaque = image.convert("L" if gray else "RGB") if gray or alpha else image
        made = ImageCms.profileToProfile(
            opaque,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError(
            f"its ICC profile cannot be applied ({error}): remove or replace the profile"
        ) from None
    assert made is not None
    if alpha:
        made.putalpha(alpha)
    made.info.pop("icc_profile", None)
    return made
