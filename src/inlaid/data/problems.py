"""Problems of a dataset: codes, severities, messages and fixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

FOLDER_CURE = "add a .txt beside each"

MANIFEST_CURE = "add a caption to each, as UTF-8 text"

CHOSEN_BY_TIME = "nothing to do, frames are selected by time"


@dataclass(frozen=True)
class Problem:
    """Problem in a dataset. Most problems concern one clip.

    The code `layout` concerns a whole data source. The code `validation` concerns the validation split.
    """

    severity: Severity
    code: str
    name: str
    """Name of the clip or of the data source."""
    message: str
    """Details; empty if the code is sufficient."""
    source: int = 0


@dataclass(frozen=True)
class Kind:
    """Template of the messages for a problem code.

    `one` is the predicate for one clip, such as "has no caption". `many` is the predicate for several clips,
    such as "have no caption". `cure` describes the fix. A message also contains the number and the names of
    the clips.

    Example: `3 of 40 clips have no caption (...): add a .txt beside each`.
    """

    severity: Severity
    one: str
    many: str
    cure: str = ""


KINDS: dict[str, Kind] = {
    "layout": Kind("error", "", ""),
    "validation": Kind("error", "", ""),
    "outside": Kind(
        "error",
        "is outside of its source",
        "are outside of their source",
        "copy the files into the source, or set `path` or `root` to a folder that contains them",
    ),
    "run": Kind(
        "warning", "is a run folder", "are run folders", "nothing to do, its files are not read as data"
    ),
    "missing": Kind("error", "does not exist", "do not exist", "correct the manifest or `root`"),
    "row": Kind("error", "has a broken row", "have a broken row", "correct the manifest"),
    "no-caption": Kind("error", "has no caption", "have no caption", FOLDER_CURE),
    "empty-caption": Kind("error", "has an empty caption", "have an empty caption", "describe the clip"),
    "unreadable": Kind("error", "cannot be read", "cannot be read", "convert or remove the file"),
    "truncated": Kind("error", "is truncated", "are truncated", "copy the file again or trim its end"),
    "unfitting": Kind(
        "error",
        "does not fit the checkpoint",
        "do not fit the checkpoint",
        "encode again for model.checkpoint, or remove",
    ),
    "pair": Kind(
        "error",
        "does not match its alpha matte",
        "do not match their alpha mattes",
        "trim and scale both files in the same way, inlaid does not trim them",
    ),
    "no-alpha": Kind(
        "error",
        "has no alpha",
        "have no alpha",
        "add an alpha matte, NAME_alpha.mp4 beside NAME.mp4, or remove",
    ),
    "constant-alpha": Kind(
        "error",
        "has constant alpha",
        "have constant alpha",
        "export again with transparency, or remove",
    ),
    "half": Kind("error", "is incomplete", "are incomplete", "encode again, or remove the remaining files"),
    "too-short": Kind(
        "error", "is too short", "are too short", "remove, or add a smaller length to data.frames"
    ),
    "gaps": Kind(
        "warning",
        "is an image sequence with missing frames",
        "are image sequences with missing frames",
        "render the missing frames, or split the sequence: the motion jumps there",
    ),
    "long-caption": Kind(
        "warning",
        "has a caption that is too long",
        "have captions that are too long",
        "shorten it, with the important words first",
    ),
    "image": Kind("error", "is an image", "are images", "add 1 to data.frames to train on images too"),
    "duplicate": Kind("warning", "is a copy", "are copies", "keep one copy, or set `repeats`"),
    "odd-size": Kind(
        "warning", "has an odd size", "have an odd size", "nothing to do, clips are scaled and cropped"
    ),
    "variable-rate": Kind(
        "warning", "has a variable frame rate", "have a variable frame rate", CHOSEN_BY_TIME
    ),
    "slow": Kind(
        "warning",
        "is slower than data.fps",
        "are slower than data.fps",
        "lower data.fps or set data.slow=keep",
    ),
    "upscaled": Kind("warning", "is enlarged", "are enlarged", "lower data.size or use larger clips"),
    "cropped": Kind(
        "warning", "is cropped a lot", "are cropped a lot", "add a closer aspect ratio to data.aspects"
    ),
    "fixed-caption": Kind(
        "warning",
        "has a precomputed text embedding",
        "have precomputed text embeddings",
        "data.trigger and data.caption_prefix do not apply: add them to the caption and encode it again",
    ),
    "no-image": Kind("error", "has no input image", "have no input image", "add scene_rgb.png"),
    "no-segmentation": Kind("error", "has no segmentation", "have no segmentation", "add seg.png"),
    "no-surface": Kind(
        "error", "lacks a surface", "lack surfaces", "add surface_ID.npy for each visible object"
    ),
    "names": Kind(
        "error",
        "has unexpected file names",
        "have unexpected file names",
        "use surface_ID.npy, or surface.npy for a single object",
    ),
    "image-size": Kind(
        "error",
        "differs in size from its segmentation",
        "differ in size from their segmentations",
        "save image and segmentation in the same size",
    ),
    "several": Kind(
        "error",
        "has surfaces that do not match its objects",
        "have surfaces that do not match their objects",
        "save one surface per object",
    ),
    "absent": Kind("error", "lacks an object", "lack objects", "correct seg.png"),
    "hidden": Kind(
        "error",
        "has no visible object",
        "have no visible object",
        "use a view in which the objects are larger",
    ),
    "pickle": Kind(
        "error",
        "contains a pickle that could run code",
        "contain pickles that could run code",
        "save the arrays with numpy.savez",
    ),
    "surface": Kind("error", "has a broken surface", "have broken surfaces", "sample the mesh again"),
    "outside-box": Kind(
        "error",
        "exceeds the box",
        "exceed the box",
        "normalize the whole scene with one transform, longest side 1.9",
    ),
    "unaligned": Kind(
        "warning",
        "has objects normalized separately",
        "have objects normalized separately",
        "keep all objects in the frame of the scene",
    ),
    "flipped": Kind(
        "warning", "has normals that point inward", "have normals that point inward", "flip the normals"
    ),
    "sparse": Kind("warning", "has few points", "have few points", "sample about 20,480 per object"),
    "estimated": Kind("warning", "has no normals", "have no normals", "save them: (n, 6)"),
    "fourth-column": Kind(
        "warning", "has a fourth column", "have a fourth column", "save normals instead: (n, 6)"
    ),
    "small": Kind("warning", "has tiny objects", "have tiny objects", "tiny objects are not trained on"),
    "unseen": Kind(
        "warning",
        "has objects that are not visible",
        "have objects that are not visible",
        "nothing to do, hidden objects are not trained on in this view",
    ),
    "bare": Kind(
        "warning",
        "has objects without a surface",
        "have objects without a surface",
        "objects without a surface are not trained on",
    ),
    "crowded": Kind(
        "warning",
        "has many objects",
        "have many objects",
        "each step trains on a random subset of the objects",
    ),
    "transparent": Kind(
        "warning", "is transparent", "are transparent", "composited over white, this run is opaque"
    ),
    "matte": Kind(
        "warning",
        "is an alpha matte",
        "are alpha mattes",
        "left out, this run is opaque: set alpha.kind=joint or merged to train on them",
    ),
    "inverted": Kind(
        "warning",
        "looks inverted",
        "look inverted",
        "set data.matte.invert=true if white means transparent",
    ),
    "limited": Kind(
        "warning",
        "has no alpha outside 14 to 237",
        "have no alpha outside 14 to 237",
        "set data.matte.limited=true if the alpha mattes have limited range, 16 to 235",
    ),
    "premultiplied": Kind(
        "warning",
        "looks premultiplied",
        "look premultiplied",
        "color is divided by alpha; if that is wrong, set data.matte.premultiplied=true or false",
    ),
    "unclear-color": Kind(
        "warning",
        "does not show whether its color is premultiplied",
        "do not show whether their color is premultiplied",
        "read as straight: set data.matte.premultiplied=true if the edges look too dark on the contact "
        "sheet, else false",
    ),
    "residue": Kind(
        "warning",
        "has a background that is nearly but not fully transparent",
        "have backgrounds that are nearly but not fully transparent",
        "set data.matte.snap=2 to remove residue of lossy compression",
    ),
    "odd-alpha": Kind(
        "warning",
        "has unusual alpha",
        "have unusual alpha",
        "inspect the contact sheet",
    ),
    "hdr": Kind(
        "warning",
        "is HDR",
        "are HDR",
        "nothing to do, tone-mapped to SDR by BT.2390; grade to SDR yourself for full control",
    ),
}
"""All problem codes, in the order in which they are reported."""

SOURCE_CODES = ("layout", "validation")
"""Codes of problems that do not concern a single clip. They stop a run even if `data.bad_clips` is
`quarantine`, which otherwise excludes clips with errors."""
