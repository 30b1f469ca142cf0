"""Tiny trained models that are part of the inlaid package.

They have the same model classes and the same file layout as the full models.
"""

from __future__ import annotations

from pathlib import Path

_FOLDERS = {"wan": "wan_t2v", "midi": "midi_scenes"}


def path(name: str) -> Path:
    """Return the folder of a tiny model, in the file layout of the full model.

    Args:
        name: "wan", a Wan 2.1 text-to-video pipeline for 17 frames of 64 x 64; or "midi", a MIDI-3D
            checkpoint for scenes of 1 to 4 objects.

    Raises:
        ValueError: if there is no tiny model of this name.
    """
    if name not in _FOLDERS:
        raise ValueError(f"there is no tiny model {name!r}: use {', '.join(_FOLDERS)}")
    return Path(__file__).parent / _FOLDERS[name]


def rgba_vae_path(name: str) -> Path:
    """Return the folder of the RGBA VAE for a tiny model.

    Raises:
        ValueError: if there is no RGBA VAE for this tiny model.
    """
    if name != "wan":
        raise ValueError(f"there is no RGBA VAE of a tiny model {name!r}: use wan")
    return Path(__file__).parent / "wan_rgba"
