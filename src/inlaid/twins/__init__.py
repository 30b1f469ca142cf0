"""Twins: tiny trained checkpoints that ship with the package, in the real classes and file layout."""

from __future__ import annotations

from pathlib import Path

_FOLDERS = {"wan": "wan_t2v", "midi": "midi_scenes"}


def path(name: str) -> Path:
    """Folder of a shipped twin, ready for `from_pretrained`.

    Args:
        name: "wan", a Wan 2.1 text-to-video pipeline for 17 frames of 64 x 64; "midi", a MIDI-3D checkpoint
            for scenes of 1 to 4 things.

    Raises:
        ValueError: No twin has this name.
    """
    if name not in _FOLDERS:
        raise ValueError(f"no twin is called {name!r}: there is {', '.join(_FOLDERS)}")
    return Path(__file__).parent / _FOLDERS[name]


def codec(name: str) -> Path:
    """Folder of the RGBA codec of a shipped twin.

    Raises:
        ValueError: No twin of this name has one.
    """
    if name != "wan":
        raise ValueError(f"no codec of a twin is called {name!r}: there is wan")
    return Path(__file__).parent / "wan_rgba"
