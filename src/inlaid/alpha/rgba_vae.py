"""Training of an RGBA VAE in place of a denoiser, and lookup of RGBA VAE folders.

The cache stores each clip as straight RGBA uint8, so no video file is decoded during training. The frozen
encoder runs in the training step, because each step samples new background colors. Text and timesteps are not
used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid import config as recipe
from inlaid.alpha.composed import Composed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.families.base import Family
    from inlaid.networks.rgba_vae import RgbaVae


class RgbaVaeFamily(Composed):
    """Model family that trains an RGBA VAE: the inputs are RGBA pixels, and the network is the RGBA VAE."""

    encoders: Mapping[str, Sequence[str]] = {"media": (), "text": ()}
    images: Sequence[str] = ()
    media_key = ("pixels",)
    bytewise = ("latents",)

    def __init__(self, opaque: Family, section: recipe.RgbaVae) -> None:
        super().__init__(opaque)
        require_wan_vae(self)
        self.section = section
        self.images = ()

    def about(self) -> dict[str, str]:
        """Return the metadata for the file header of the trained weights: the name of the base checkpoint."""
        return {"inlaid_base": self.name}

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of `latents`, which are RGBA pixels in this family: (4, t, h, w)."""
        return {"latents": (4, frames, height, width)}

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the cached tensor `latents`, which contains RGBA pixels: (4, t, h, w)."""
        return self.shapes(frames, height, width)

    def load_media_encoder(self, device: torch.device) -> None:
        """Return None, because pixels are cached without encoding."""

    def encode_media(self, encoder: None, frames: np.ndarray) -> dict[str, Tensor]:
        """Return RGBA pixels (t, h, w, 4) as the entry `latents`, uint8 (4, t, h, w), without encoding.

        Raises:
            ValueError: if the clip has no alpha channel.
        """
        import numpy as np
        import torch

        if frames.shape[-1] != 4:
            raise ValueError(
                "clip without alpha: an RGBA VAE trains on RGBA clips; use a file with an alpha channel, or "
                "a pair NAME_rgb and NAME_alpha in one folder"
            )
        return {"latents": torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))}

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> None:
        """Return None, because an RGBA VAE has no text input."""

    def encode_text(self, encoder: None, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return an empty mapping for each caption, because an RGBA VAE has no text input."""
        return [{} for _ in captions]

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return an empty mapping, because an RGBA VAE has no conditioning inputs."""
        return {}

    def load_denoiser(self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None) -> RgbaVae:
        """Load an RGBA VAE in float32, or create a new one if there is none to load.

        The RGBA VAE is loaded from `folder` or, if that is None, from the setting `rgba_vae.init_from`.
        If `meta` is true, a new RGBA VAE is created on the meta device.

        Raises:
            ValueError: if `rgba_vae.train` is `merge` and the loaded decoders are untrained.
        """
        import diffusers
        import torch

        from inlaid.networks import rgba_vae_checkpoint

        start = str(folder) if folder else self.section.init_from
        if meta:
            with torch.device("meta"):
                vae = diffusers.AutoencoderKLWan.from_config(self.vae)
                width, rank = None, self.section.rank
                if start is not None:
                    facts = rgba_vae_checkpoint.read_config(locate_rgba_vae(start))
                    width, rank = facts.get("width"), facts.get("rank", {}).get("rgb", rank)
                return rgba_vae_checkpoint.new(vae, rank, 0, width=width)
        vae = self.load("vae", torch.float32)
        if start is None:
            return rgba_vae_checkpoint.new(vae, self.section.rank, 0)
        loaded = rgba_vae_checkpoint.load(locate_rgba_vae(start), vae)
        if self.section.train == "merge" and not any(b.any() for b in loaded.alpha.b):
            raise ValueError(
                f"rgba_vae.init_from: the decoders of {start} are untrained and cannot decode alpha; set "
                "rgba_vae.train: merge+decoders"
            )
        return loaded

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Encode and decode RGBA clips; return straight color and alpha (n, 4, t, h, w), not clamped.

        `x_t` contains the RGBA clips, (n, 4, t, h, w) in [-1, 1], of any dtype; `t` and `cond` are not used.
        """
        import torch

        vae: Any = denoiser
        video = x_t.to(vae.merge.conv_in.weight.dtype)
        rgb, alpha = vae.decode(vae.encode(video[:, :3], video[:, 3:].expand(-1, 3, -1, -1, -1)))
        return torch.cat([rgb, alpha.mean(1, keepdim=True)], 1)

    def problems(self, config: recipe.Config) -> list[str]:
        """Return messages about invalid clip sizes and invalid settings of the section `rgba_vae`."""
        found = [
            f"data: {p}"
            for frames in config.data.frames
            for p in self.grid.problems(frames, *config.data.size)
        ]
        try:
            if self.section.init_from:
                from inlaid.networks import rgba_vae_checkpoint

                rgba_vae_checkpoint.read_config(locate_rgba_vae(self.section.init_from))
            if self.section.perceptual != "none":
                perceptual_file(self.section.perceptual)
        except ValueError as error:
            found.append(f"rgba_vae: {error}")
        return found


def require_wan_vae(family: Any) -> None:
    """Check that a model family uses the 16-channel VAE of Wan, on which RGBA VAEs are based.

    Raises:
        ValueError: if the family uses another VAE.
    """
    vae = getattr(family, "vae", None) or {}
    z = vae.get("z_dim")
    if vae.get("_class_name") != "AutoencoderKLWan" or z != 16 or vae.get("patch_size"):
        has = f"{family.model.checkpoint} has {z} channels" if z else f"{family.model.family} has another VAE"
        raise ValueError(
            "alpha.kind: merged alpha requires the 16-channel VAE of Wan 2.1 or Wan 2.2 A14B; "
            f"{has}: use alpha.kind=joint, or another checkpoint"
        )


def locate_rgba_vae(where: str) -> Path:
    """Return the folder of an RGBA VAE.

    Args:
        where: the folder itself, the folder of a run that trained an RGBA VAE, or `tiny:wan` for the
            RGBA VAE that ships with inlaid.

    Raises:
        ValueError: if the folder does not exist.
    """
    from inlaid import tiny
    from inlaid.networks.rgba_vae_checkpoint import FOLDER

    if where.startswith("tiny:"):
        return tiny.rgba_vae_path(where.removeprefix("tiny:"))
    path = Path(where).expanduser()
    if (path / FOLDER / "config.json").is_file() and not (path / "merge.safetensors").is_file():
        return path / FOLDER
    if not path.is_dir():
        raise ValueError(
            f"{where} is not a folder: use a run that trained an RGBA VAE, a folder from `inlaid import`, "
            "or tiny:wan"
        )
    return path


def perceptual_file(name: str) -> Path:
    """Return the local path of the VGG16 weights for the perceptual loss. Download the file if needed.

    Args:
        name: local path, or `OWNER/NAME/FILE` on the Hub.

    Raises:
        ValueError: if the file does not exist or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    parts = name.split("/")
    how = "use the path of torchvision's vgg16 file, OWNER/NAME/FILE on the Hub, or none"
    if len(parts) < 3 or name.startswith((".", "/", "~")):
        raise ValueError(f"perceptual: {name} does not exist; {how}")
    from inlaid.families import hub

    try:
        return hub.fetch_file("/".join(parts[:2]), "/".join(parts[2:]))
    except hub.HubError as error:
        raise ValueError(f"perceptual: {name} is not a local file, and {error}; {how}") from None
