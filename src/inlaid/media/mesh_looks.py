"""Look of a mesh (vertex colors, materials, textures), and colors of points on its triangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from inlaid import limits
from inlaid.reading import cause_of

LARGEST = 2048
"""Maximum side of a texture in pixels; larger textures are scaled down, which also avoids aliasing."""


def to_linear(values: np.ndarray) -> np.ndarray:
    """Convert colors from sRGB to linear light, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb(values: np.ndarray) -> np.ndarray:
    """Convert colors from linear light to sRGB, both in [0, 1] (IEC 61966-2-1)."""
    clipped = values.clip(0, 1)
    return np.where(clipped <= 0.0031308, clipped * 12.92, 1.055 * clipped ** (1 / 2.4) - 0.055)


@dataclass(frozen=True)
class Texture:
    """Image that is mapped onto triangles."""

    pixels: np.ndarray
    """Color in sRGB, and alpha, uint8 (h, w, 4)."""
    wrap: tuple[str, str] = ("repeat", "repeat")
    """Wrap modes beyond [0, 1] along x and y: `repeat`, `clamp` or `mirror`."""

    @classmethod
    def of(cls, image: Image.Image, wrap: tuple[str, str] = ("repeat", "repeat")) -> Texture:
        """Create a texture from an sRGB image, scaled down if a side is longer than `LARGEST`."""
        image = image.convert("RGBA")
        image.thumbnail((LARGEST, LARGEST))
        return cls(np.asarray(image), wrap)

    def at(self, uv: np.ndarray) -> np.ndarray:
        """Return linear RGB and alpha at texture coordinates (n, 2), by bilinear interpolation: (n, 4).

        The image spans the coordinates 0 to 1, with the origin at the top left.
        """
        linear, alpha = to_linear(np.arange(256) / 255), np.arange(256) / 255
        height, width = self.pixels.shape[:2]
        x, y = uv[:, 0] * width - 0.5, uv[:, 1] * height - 0.5
        left, top = np.floor(x), np.floor(y)
        fx, fy = (x - left)[:, None], (y - top)[:, None]
        out = np.zeros((len(uv), 4))
        for dx, wx in ((0, 1 - fx), (1, fx)):
            for dy, wy in ((0, 1 - fy), (1, fy)):
                columns = _wrapped(left + dx, width, self.wrap[0])
                rows = _wrapped(top + dy, height, self.wrap[1])
                found = self.pixels[rows, columns]
                out += wx * wy * np.concatenate([linear[found[:, :3]], alpha[found[:, 3:]]], -1)
        return out


def texture_of(
    image: Image.Image, material: str, notes: list[str], wrap: tuple[str, str] = ("repeat", "repeat")
) -> Texture | None:
    """Return the texture of a material; `wrap` contains the wrap mode of each texture axis.

    If the image is too large or cannot be decoded, append a message to `notes` and return None.
    """
    try:
        pixels = image.width * image.height
        if large := limits.PIXELS.exceeded(pixels, f"has {pixels / 1e6:.0f} megapixels"):
            raise ValueError(large)
        return Texture.of(image, wrap)
    except Exception as error:  # Pillow decodes here, and raises many kinds of errors
        notes.append(f"the texture of material `{material}` cannot be read ({cause_of(error)})")
        return None


def _wrapped(index: np.ndarray, size: int, how: str) -> np.ndarray:
    """Map pixel indices to the range 0 to `size` - 1.

    The wrap mode `how` is `clamp`, `mirror` or `repeat`.
    """
    if how == "clamp":
        return index.clip(0, size - 1).astype(np.int64)
    if how == "mirror":
        turn = np.mod(index, 2 * size)
        return np.minimum(turn, 2 * size - 1 - turn).astype(np.int64)
    return np.mod(index, size).astype(np.int64)


@dataclass(frozen=True)
class Look:
    """Colors, textures and transparency of a mesh with m triangles."""

    colors: np.ndarray
    """Linear color and alpha of each corner in [0, 1], float32 (m, 3, 4); multiplied by the texture."""
    uv: np.ndarray
    """Texture coordinates of each corner, float32 (m, 3, 2), with the origin at the top left."""
    texture: np.ndarray
    """For each triangle, its index into `textures`, or -1 for no texture: int (m,)."""
    cutoff: np.ndarray
    """Alpha below which each triangle is invisible, float32 (m,); 0 for opaque triangles."""
    textures: tuple[Texture, ...] = ()

    @classmethod
    def plain(cls, colors: np.ndarray) -> Look:
        """Return a look without textures.

        `colors` (m, 3, 4) contains the linear color and alpha of each corner of the m triangles.
        """
        m = len(colors)
        zeros = np.zeros((m, 3, 2), np.float32)
        return cls(colors.astype(np.float32), zeros, np.full(m, -1), np.zeros(m, np.float32))

    @classmethod
    def joined(cls, looks: Sequence[Look]) -> Look:
        """Concatenate the looks of several meshes; textures that they share are stored once."""
        textures: dict[int, Texture] = {}
        indices = []
        for look in looks:
            textures |= {id(texture): texture for texture in look.textures}
            places = [[*textures].index(id(texture)) for texture in look.textures]
            indices.append(np.array([*places, -1])[look.texture])  # index -1 is the last
        return cls(
            np.concatenate([look.colors for look in looks]),
            np.concatenate([look.uv for look in looks]),
            np.concatenate(indices),
            np.concatenate([look.cutoff for look in looks]),
            tuple(textures.values()),
        )

    def of(self, faces: np.ndarray) -> Look:
        """Return the colors of the triangles selected by `faces`, a mask or indices."""
        return replace(
            self,
            colors=self.colors[faces],
            uv=self.uv[faces],
            texture=self.texture[faces],
            cutoff=self.cutoff[faces],
        )

    def turned(self, faces: np.ndarray) -> Look:
        """Return a copy in which some triangles have their corners in reverse order.

        `faces` selects the triangles, bool (m,).
        """
        colors, uv = self.colors.copy(), self.uv.copy()
        colors[faces], uv[faces] = colors[faces][:, ::-1], uv[faces][:, ::-1]
        return replace(self, colors=colors, uv=uv)

    def at(self, faces: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the colors of points on triangles.

        Args:
            faces: index of each point's triangle, int (n,).
            weights: barycentric coordinates of each point, (n, 3).

        Returns:
            sRGB colors in [0, 1], (n, 3), and whether each point is visible, bool (n,). A point is visible if
            its alpha reaches the alpha cutoff of its triangle.
        """
        colors = np.einsum("nc,ncd->nd", weights, self.colors[faces])
        uv = np.einsum("nc,ncd->nd", weights, self.uv[faces])
        for i, texture in enumerate(self.textures):
            own = self.texture[faces] == i
            if own.any():
                colors[own] *= texture.at(uv[own])
        return to_srgb(colors[:, :3]), colors[:, 3] >= self.cutoff[faces]
