"""Training a codec: the family whose network is the RGBA VAE itself, and whose items are pixels.

The loop stays as it is. An item is a clip as straight RGBA uint8, so after the cache no video is decoded
again; the frozen encoder runs in the step, because the background colour behind each clip is drawn anew at
every showing. There is no text and no noise level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid import config as recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.models.rgba_vae import RgbaVae


class CodecTraining:
    """Stands before `Wan` where the recipe's tuner is a codec."""

    channels = 4
    encoders: Mapping[str, Sequence[str]] = {"media": (), "text": ()}
    images: Sequence[str] = ()
    media_key = ("pixels",)
    bytewise = ("latents",)

    def __init__(self, model: recipe.Model, section: recipe.Codec) -> None:
        super().__init__(model)  # type: ignore[call-arg]
        refuse(self)
        self.codec = section
        self.images = ()

    def about(self) -> dict[str, str]:
        """See `Family.about`."""
        return {"inlaid_base": self.name}  # type: ignore[attr-defined]

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """`latents` are the pixels, (4, t, h, w)."""
        return {"latents": (4, frames, height, width)}

    def load_media_encoder(self, device: torch.device) -> None:
        """Nothing: pixels are kept as they are."""

    def encode_media(self, encoder: None, frames: np.ndarray) -> dict[str, Tensor]:
        """uint8 (t, h, w, 4) -> `latents` uint8 (4, t, h, w)."""
        import numpy as np
        import torch

        if frames.shape[-1] != 4:
            raise ValueError(
                "it has no alpha; a codec learns from transparent clips: a file with alpha, or NAME_rgb and "
                "NAME_alpha beside each other"
            )
        return {"latents": torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))}

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: a codec reads no text."""

    def encode_text(self, encoder: None, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Nothing of each."""
        return [{} for _ in captions]

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """No conditions."""
        return {}

    def load_denoiser(self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None) -> RgbaVae:
        """The RGBA VAE, in float32: of the recipe's `start`, of `folder`, or untrained."""
        import diffusers
        import torch

        from inlaid.models import rgba_codec

        start = folder or (Path(self.codec.start) if self.codec.start else None)
        if meta:
            with torch.device("meta"):
                vae = diffusers.AutoencoderKLWan.from_config(self.vae)  # type: ignore[attr-defined]
                return rgba_codec.new(vae, self.codec.rank, 0)
        vae = self.load("vae", torch.float32)  # type: ignore[attr-defined]
        if start is None:
            return rgba_codec.new(vae, self.codec.rank, 0)
        loaded = rgba_codec.load(locate(str(start)), vae)
        if self.codec.train == "merge" and not any(b.any() for b in loaded.alpha.b):
            raise ValueError(
                f"tuner.start: the decoders of {start} are the VAE's own still, which know no alpha; use "
                "train=merge+decoders"
            )
        return loaded

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Pixels of any type -> reconstructed colour and alpha (n, 4, t, h, w), about [-1, 1]."""
        import torch

        codec: Any = denoiser
        video = x_t.to(codec.merge.conv_in.weight.dtype)
        rgb, alpha = codec.decode(codec.encode(video[:, :3], video[:, 3:].expand(-1, 3, -1, -1, -1)))
        return torch.cat([rgb, alpha.mean(1, keepdim=True)], 1)

    def problems(self, config: recipe.Config) -> list[str]:
        """Sizes, and what a perceptual network or a codec to begin with lacks."""
        found = [
            f"data: {p}"
            for frames in config.data.frames
            for p in self.grid.problems(frames, *config.data.size)  # type: ignore[attr-defined]
        ]
        try:
            if self.codec.start:
                from inlaid.models import rgba_codec

                rgba_codec.read_config(locate(self.codec.start))
            if self.codec.perceptual != "none":
                perceptual_file(self.codec.perceptual)
        except ValueError as error:
            found.append(f"tuner: {error}")
        return found


def refuse(family: Any) -> None:
    """Refuses families whose latents the method does not fit.

    Raises:
        ValueError: saying which it fits.
    """
    vae = getattr(family, "vae", None) or {}
    z = vae.get("z_dim")
    if vae.get("_class_name") != "AutoencoderKLWan" or z != 16 or vae.get("patch_size"):
        has = f"{family.model.checkpoint} has {z} channels" if z else f"{family.model.family} has another VAE"
        raise ValueError(
            "alpha.kind: merged alpha needs the 16-channel VAE of Wan 2.1 or Wan 2.2 A14B; "
            f"{has}: use alpha.kind=joint, or another checkpoint"
        )


def locate(codec: str) -> Path:
    """The folder of a codec; `twin:wan` is the one that ships with inlaid, a run's is its `codec`.

    Raises:
        ValueError: when it is not there.
    """
    from inlaid import twins

    if codec.startswith("twin:"):
        return twins.codec(codec.removeprefix("twin:"))
    path = Path(codec).expanduser()
    if (path / "codec" / "config.json").is_file() and not (path / "merge.safetensors").is_file():
        return path / "codec"
    if not path.is_dir():
        raise ValueError(
            f"{codec} is no folder: name the `codec` folder of a run that trained one, or of `inlaid import`, "
            "or twin:wan"
        )
    return path


def perceptual_file(name: str) -> Path:
    """A perceptual network's file: local, or `OWNER/NAME/FILE` on the Hub.

    Raises:
        ValueError: when it is not to be had.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    parts = name.split("/")
    how = "give the path of torchvision's vgg16 file, OWNER/NAME/FILE on the Hub, or none"
    if len(parts) < 3 or name.startswith((".", "/", "~")):
        raise ValueError(f"perceptual: {name} is not there; {how}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as error:
        raise ValueError(
            f"perceptual: {name} is no local file and could not be read from the Hub "
            f"({type(error).__name__}); {how}"
        ) from None


def card(config: recipe.Config, section: recipe.Codec, base: str, step: int) -> str:
    """The README of a codec's folder."""
    data, optim = config.data, config.optim
    settings = {
        "VAE of": base,
        "steps": step,
        "samples seen": step * config.train.batch * config.train.accumulate,
        "trained": section.train,
        "rank of the decoders": section.rank,
        "loss": section.loss + (", without its perceptual terms" if section.perceptual == "none" else ""),
        "alpha that counts as clear": f"{section.alpha_eps:.4f}",
        "size": f"{data.size[0]} x {data.size[1]}, {', '.join(map(str, data.frames))} frames",
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}",
    }
    lines = [
        "---\nlibrary_name: inlaid\ntags: [inlaid, wan, rgba, vae]\n---\n",
        f"# RGBA codec for the VAE of {base}\n",
        "A merge block and two low-rank decoders: colour and alpha of a transparent clip in one latent.\n",
        "```yaml\nalpha: {kind: merged, codec: path/to/this/folder}\n```\n",
        "| setting | value |\n|---|---|",
        *[f"| {k} | {v} |" for k, v in settings.items()],
    ]
    return "\n".join(lines) + "\n"
