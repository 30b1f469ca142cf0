"""Alpha support of a checkpoint: joint alpha (two clips) or merged alpha (one latent)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.alpha.rgba_vae import locate_rgba_vae
from inlaid.families import Family

RGBA_VAE = "rgba_vae"
"""Folder to which the proposed command imports an RGBA VAE."""

TINY = "tiny:wan"
"""RGBA VAE that ships with inlaid."""

CAN: Mapping[str, str] = {
    "joint": "two clips in one sequence; no other files; twice the tokens; not in ComfyUI",
    "merged": "one latent, as Wan-Alpha; half the tokens of joint; also in ComfyUI; needs an RGBA VAE",
}
"""What each kind of alpha can do, in one line."""


@dataclass(frozen=True)
class SupportedAlpha:
    """Way to train with transparency that a checkpoint supports: `joint` or `merged` alpha."""

    kind: Literal["joint", "merged"]
    family: Family
    """Model family that trains with this kind of alpha."""
    vae: str = ""
    """RGBA VAE of merged alpha: an existing one, or the folder to which the published one is imported."""
    ready: bool = True
    """False if the RGBA VAE has to be imported or trained first."""


def import_command(checkpoint: str) -> str:
    """Return the command that imports the published RGBA VAE for a checkpoint."""
    return f"inlaid import htdong/Wan-Alpha-VAE/Wan-Alpha-VAE.bin {RGBA_VAE} --checkpoint {checkpoint}"


def supported_alpha(
    settings: config.Config, *, experts: bool = False
) -> tuple[list[SupportedAlpha], list[str]]:
    """Return the kinds of alpha that the checkpoint of a recipe supports, the recommended one first.

    Merged alpha needs half the tokens, so it is recommended if an RGBA VAE exists. Otherwise, joint alpha is
    recommended.

    Args:
        settings: the recipe; its `alpha` section is ignored.
        experts: True if the checkpoint has two experts (one network for high noise, one for low noise). Joint
            alpha is then not supported, because it can sample with only one network.

    Returns:
        The supported kinds, and a message for each kind that is not supported.
    """
    found: list[SupportedAlpha] = []
    refused: list[str] = []
    vae = next((v for v in (TINY, RGBA_VAE) if _exists(settings, v)), "")
    for section in (config.Merged(kind="merged", vae=vae or TINY), config.Joint(kind="joint")):
        try:
            if experts and section.kind == "joint":
                raise ValueError("alpha.kind: joint alpha cannot sample the two experts of this checkpoint")
            family = build_family(settings.model_copy(update={"alpha": section, "rgba_vae": None}))
        except ValueError as error:
            refused.append(str(error))
            continue
        merged = section.kind == "merged"
        found.append(
            SupportedAlpha(section.kind, family, (vae or RGBA_VAE) if merged else "", bool(vae) or not merged)
        )
    found.sort(key=lambda way: not way.ready)
    return found, refused


def _exists(settings: config.Config, vae: str) -> bool:
    """Return True if an RGBA VAE is available, and contains the parts that encode.

    The tiny RGBA VAE ships with inlaid, but fits the tiny checkpoint only.
    """
    from inlaid.networks import rgba_vae_checkpoint

    if vae == TINY:
        return settings.model.checkpoint == TINY
    try:
        facts: dict[str, Any] = rgba_vae_checkpoint.read_config(locate_rgba_vae(vae))
    except ValueError:
        return False
    return Path(vae).is_dir() and "merge" in facts.get("parts", ["merge"])


def proposal(settings: config.Config, count: int, total: int, *, experts: bool = False) -> str:
    """Return a note for a run without alpha whose clips have alpha.

    The note lists the kinds of alpha that the checkpoint supports, and describes each of them.

    Args:
        settings: the recipe.
        count: number of clips with alpha.
        total: number of clips.
        experts: True if the checkpoint has two experts (one network for high noise, one for low noise).
    """
    found, refused = supported_alpha(settings, experts=experts)
    have = f"{count} of {total} clips {'has' if count == 1 else 'have'} alpha, and this run is opaque"
    if not found:
        return f"{have}; this checkpoint does not support alpha ({'; '.join(dict.fromkeys(refused))})"
    lines = []
    for way in found:
        vae = "" if way.kind == "joint" else f" alpha.vae={way.vae}"
        first = "" if way.ready else f"; get one with `{import_command(settings.model.checkpoint)}`"
        lines.append(f"  alpha.kind={way.kind}{vae}: {CAN[way.kind]}{first}")
    return "\n".join([f"{have}; to train on alpha, set", *lines])
