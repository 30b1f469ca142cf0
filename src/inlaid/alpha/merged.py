"""Merged alpha (Wan-Alpha, Dong et al. 2025): an RGBA VAE encodes color and alpha in one latent.

The network, the objective and the sampling are the same as without alpha; only the latents differ. Latents of
different RGBA VAEs are incompatible. The ID of the RGBA VAE is therefore part of the cache key. It is also
stored in the header of adapter files, and checked when an adapter is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid import config as recipe
from inlaid.alpha.composed import Composed
from inlaid.alpha.rgba_vae import locate_rgba_vae, require_wan_vae
from inlaid.console import once

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.families.base import Family
    from inlaid.networks.rgba_vae import RgbaVae


SHIFT = "inlaid_noise_shift"
"""Header key of an adapter file; its value is the `alpha.noise_shift` with which the adapter was trained."""

ELLIPSE = "ellipse"
"""Name of the cached tensor (t, h, w) that describes where the subject is: 1 at its center, 0 far away."""

HEADER = "inlaid_rgba_vae"
"""Header key of an adapter file; its value is the ID of the RGBA VAE with which the adapter was trained."""


class Merged(Composed):
    """Model family with merged alpha: each latent of the RGBA VAE represents both color and alpha."""

    def __init__(self, opaque: Family, section: recipe.Merged) -> None:
        from inlaid.networks import rgba_vae_checkpoint

        super().__init__(opaque)
        model = opaque.model
        require_wan_vae(self)
        if self.images:
            raise ValueError(
                f"alpha.kind: merged supports text-to-video only, but {model.checkpoint} is conditioned on "
                "images: use a text-to-video checkpoint"
            )
        self.section, self.vae_folder = section, locate_rgba_vae(section.vae)
        self.facts = rgba_vae_checkpoint.read_config(self.vae_folder)
        self.noise_shift = self._noise_shift()
        shifted = (ELLIPSE,) if self.noise_shift else ()
        self.media_key = ("merged", self.rgba_vae_id, str(section.colors), *shifted)

    def _noise_shift(self) -> float:
        """Return `alpha.noise_shift`.

        If it is unset, return the value stored with the RGBA VAE. If no value is stored, return 0.
        """
        found = self.section.noise_shift
        return float(self.facts.get("noise_shift", 0) if found is None else found)

    @property
    def rgba_vae_id(self) -> str:
        """ID of the RGBA VAE that encodes the latents."""
        return str(self.facts["rgba_vae_id"])

    def about(self) -> dict[str, str]:
        """Return the metadata for the adapter's file header, including the ID of the RGBA VAE."""
        shift = {SHIFT: f"{self.noise_shift:g}"} if self.noise_shift else {}
        return {**self.opaque.about(), "inlaid_alpha": "merged", HEADER: self.rgba_vae_id, **shift}

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each unsupported recipe setting, such as an invalid `alpha.noise_mask`."""
        from inlaid.alpha.noise_shift import read_mask

        found, mask = self.opaque.problems(config), self.section.noise_mask
        if mask and not self.noise_shift:
            found.append("alpha.noise_mask: alpha.noise_shift is 0, so no noise is shifted; remove the mask")
        elif mask:
            try:
                read_mask(Path(mask).expanduser(), self.stride)
            except ValueError as error:
                found.append(f"alpha.noise_mask: {error}")
        return found

    # --- before the cache ---------------------------------------------------------------------------------

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a cached clip's tensors, by name.

        `latents` has shape (colors, z, t, h, w). Each clip is encoded over several background colors, and
        each training sample uses one of these encodings. If the noise is shifted, `ellipse` has shape (t, h,
        w).
        """
        shape = self.shapes(frames, height, width)["latents"]
        colors = min(self.section.colors, len(self.facts.get("colors", range(8))))
        return self._with_ellipse((colors, *shape))

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of `latents`, (z, t, h, w).

        If the noise outside the subject is shifted, also return the shape of `ellipse`, (t, h, w). This
        tensor marks the subject.
        """
        return self._with_ellipse(self.opaque.shapes(frames, height, width)["latents"])

    def _with_ellipse(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"latents": latents, **({ELLIPSE: latents[-3:]} if self.noise_shift else {})}

    def load_media_encoder(self, device: torch.device) -> RgbaVae:
        """Load the RGBA VAE in float32, with the checkpoint's VAE as its base.

        Raises:
            ValueError: if the RGBA VAE lacks a merge block, without which it cannot encode.
        """
        import torch

        from inlaid.networks import rgba_vae_checkpoint

        if "merge" not in self.facts.get("parts", ["merge"]):
            raise ValueError(
                f"{self.vae_folder}: this RGBA VAE has no merge block, so it can decode but not encode "
                f"clips; train one with rgba_vae: {{train: merge, init_from: {self.vae_folder}}}"
            )
        vae = self.load("vae", torch.float32)
        return rgba_vae_checkpoint.load(self.vae_folder, vae).to(device).eval().requires_grad_(False)

    def encode_media(self, encoder: RgbaVae, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a straight RGBA clip, uint8 (t, h, w, 4), over several background colors.

        The result contains `latents` (colors, z, t', h', w'), normalized with the mean and standard deviation
        of each channel. It also contains `ellipse` (t', h', w') if `alpha.noise_shift` is above 0. A hash of
        the clip selects the background colors, so the result is reproducible.

        Raises:
            ValueError: if the clip has no alpha channel.
        """
        import numpy as np
        import torch

        from inlaid.alpha.noise_shift import ellipses
        from inlaid.networks import rgba_vae_checkpoint
        from inlaid.networks.rgba_vae import trunk
        from inlaid.networks.rgba_vae_losses import COLORS, hard_render

        if frames.shape[-1] != 4:
            raise ValueError("clip without alpha: a recipe with alpha.kind=merged trains on RGBA clips")
        pixels = np.ascontiguousarray(frames)
        seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "little") >> 1
        colors = self.facts.get("colors", COLORS)
        order = torch.randperm(len(colors), generator=torch.Generator().manual_seed(seed)).tolist()
        device = encoder.merge.conv_in.weight.device
        video = torch.from_numpy(pixels).to(device).permute(3, 0, 1, 2)[None]
        rgb, alpha = rgba_vae_checkpoint.to_video(video)
        with torch.no_grad():
            of_alpha = trunk(encoder.vae, alpha)
            found = []
            for which in order[: self.section.colors]:
                color = torch.tensor(colors[which])
                seen = hard_render(rgb, alpha, color, eps=float(self.facts.get("alpha_eps", 0)))
                found.append(encoder.merge(trunk(encoder.vae, seen), of_alpha)[0])
            mean, std = statistics(encoder.vae, device)
            item = {"latents": (torch.stack(found).float() - mean) / std}
        if self.noise_shift:
            item[ELLIPSE] = torch.from_numpy(ellipses(pixels[..., 3], self.stride))
        return item

    # --- after the cache ----------------------------------------------------------------------------------

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return a training sample: the `latents` (z, t, h, w) of the clip over one background color.

        The cache contains the clip encoded over several background colors; one of them is chosen at random.
        """
        import torch

        which = int(torch.randint(len(item["latents"]), (), generator=generator))
        return {**item, "latents": item["latents"][which]}

    def shift_noise(self, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Add `noise_shift` * (1 - ellipse) to the noise.

        The ellipse `cond["ellipse"]` is 1 at the center of the subject and near 0 far from it.
        """
        from inlaid.alpha.noise_shift import shifted

        return shifted(noise, cond[ELLIPSE], self.noise_shift) if self.noise_shift else noise

    def _start(self, frames: int, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the initial noise as the pipeline argument `latents`; empty if `alpha.noise_shift` is 0.

        The noise is the pipeline's own noise for this generator, plus `alpha.noise_shift` away from the
        subject.
        """
        import torch

        from inlaid.alpha.noise_shift import centered, read_mask

        if not self.noise_shift:
            return {}
        shape = self.shapes(frames, *size)
        mask = self.section.noise_mask
        where = read_mask(Path(mask).expanduser(), self.stride) if mask else centered(shape[ELLIPSE])
        noise = torch.randn((1, *shape["latents"]), generator=generator)
        return {"latents": self.shift_noise(noise, {ELLIPSE: torch.from_numpy(where.copy())[None]})}

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the diffusers pipeline, with the RGBA VAE in its attribute `rgba_vae`."""
        from inlaid.networks import rgba_vae_checkpoint

        pipe = self.opaque.pipeline(denoiser=denoiser, device=device, dtype=dtype)
        vae = rgba_vae_checkpoint.load(self.vae_folder, pipe.vae).to(device)
        pipe.rgba_vae = vae.eval().requires_grad_(False)
        return pipe

    def sample(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        size: tuple[int, int],
        frames: int,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        images: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """Generate a transparent video: run the diffusers pipeline and decode its latents with the RGBA VAE.

        Returns:
            uint8 (t, h, w, 4), straight alpha. Color is arbitrary where alpha is 0.
        """
        import torch

        from inlaid.networks import rgba_vae_checkpoint

        z = pipeline(
            **self.pipeline_inputs(pipeline, text, negative, images),
            **self._start(frames, size, generator),
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="latent",
        ).frames
        rgba_vae = pipeline.rgba_vae
        mean, std = statistics(rgba_vae.vae, z.device)
        with torch.no_grad():
            pixels = rgba_vae_checkpoint.to_pixels(*rgba_vae.decode(z.float() * std + mean))[0]
        return pixels.permute(1, 2, 3, 0).cpu().numpy()

    def accept(self, header: Mapping[str, str]) -> None:
        """Check that an adapter was trained with the RGBA VAE that this run uses.

        If only `alpha.noise_shift` differs, a note is printed.

        Args:
            header: file header of the adapter.

        Raises:
            ValueError: if the adapter was trained with another RGBA VAE, or without one.
        """
        said = header.get(HEADER)
        if said != self.rgba_vae_id:
            was = f"was trained with RGBA VAE {said}" if said else "was trained without an RGBA VAE"
            raise ValueError(
                f"the adapter {was}, but alpha.vae is {self.rgba_vae_id}, whose latents are incompatible: "
                "use the RGBA VAE that the adapter was trained with"
            )
        trained = float(header.get(SHIFT, 0))
        if trained != self.noise_shift:
            once(
                f"note: the adapter was trained with alpha.noise_shift {trained:g}, but it is "
                f"{self.noise_shift:g}: transparency may be worse; set alpha.noise_shift: {trained:g}"
            )


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each latent channel of a Wan VAE, both (z, 1, 1, 1)."""
    import torch

    mean, std = (
        torch.tensor(vae.config[k], device=device).view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std")
    )
    return mean, std
