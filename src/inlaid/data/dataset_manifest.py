"""Files of a prepared dataset: manifests, captions, and the list of finished files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlaid.data.dataset_formats import Cut, Target, endings, latent_files
from inlaid.data.layouts import PREPARED
from inlaid.families.base import Family
from inlaid.files import append, atomic
from inlaid.reading import parse_json, read_text

STATE = ".prepare"
"""Folder in the output with the settings, the list of finished files, and the clips' properties."""

MANIFESTS: Mapping[Target, str] = {
    "clips": PREPARED,
    "npz": "train.jsonl",
    "rgba-pairs": "metadata.csv",
    "latents": PREPARED,
}
"""Manifest of each format. `clips` and `latents` also have one text file per caption."""


def read_done(out: Path) -> dict[str, dict[str, Any]]:
    """Return the finished parts of clips, by name: their keys, files and captions.

    Lines that a killed run left incomplete are skipped.
    """
    file = out / STATE / "done.jsonl"
    rows = {}
    for line in read_text(file).splitlines() if file.is_file() else ():
        try:
            row = parse_json(line)
            rows[row["name"]] = {
                "key": str(row["key"]),
                "files": dict(row["files"]),
                "caption": row["caption"],
            }
        except (ValueError, LookupError, TypeError):
            continue
    return rows


def record(out: Path, cut: Cut, files: Mapping[str, int]) -> None:
    """Append a row to the list of finished cuts (exported windows of clips).

    The row contains the sizes of the files. If the list contains several rows for a cut, the last one counts.
    """
    row = {"name": cut.name, "key": cut.key, "files": dict(files), "caption": cut.window.caption}
    append(out / STATE / "done.jsonl", json.dumps(row, ensure_ascii=False) + "\n")


def is_finished(out: Path, row: Mapping[str, Any] | None, cut: Cut) -> bool:
    """Return True if the files of a window are already written.

    The files must have the recorded sizes. The settings and the source files must not have changed since.

    Args:
        out: folder of the dataset.
        row: record of the written window, or None if there is no record.
        cut: window to write.
    """
    if row is None or row["key"] != cut.key or not row["files"]:
        return False
    return all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in row["files"].items()
    )


def finish_dataset(out: Path, target: Target, cuts: Sequence[Cut], family: Family) -> list[str]:
    """Write the captions and the manifest of a dataset to the folder `out`.

    If the user has edited a caption in `out`, the edited caption is kept.

    Returns:
        Notes about edited captions, and about files of earlier runs that are no longer part of the dataset.
    """
    notes = []
    done = read_done(out)
    edited = 0
    rows = []
    there = _captions_in(out, target)
    for cut in cuts:
        source = cut.window.caption
        text = there.get(cut.name, source) if target in ("npz", "rgba-pairs") else source
        file = _caption_file(out, target, cut.name, family)
        if file is not None and file.is_file():
            text = read_text(file).strip()
        recorded = done.get(cut.name, {}).get("caption", source)
        if text != source and text == recorded:
            text = source  # the caption of the source has changed since
        if recorded != source:
            record(out, cut, done[cut.name]["files"])
        edited += text != source
        if file is not None and text and not (file.is_file() and read_text(file).strip() == text):
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as part:
                part.write_text(f"{text}\n", "utf-8")
        rows.append(_row(cut, target, text, family))
    content = (
        _table(rows)
        if target == "rgba-pairs"
        else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    manifest = out / MANIFESTS[target]
    if not manifest.is_file() or read_text(manifest) != content.replace("\r\n", "\n"):
        with atomic(manifest) as part:
            part.write_text(content, "utf-8", newline="")
    if edited:
        notes.append(f"{edited} captions were edited in {out}: they are kept")
    old = sorted(n for name in set(done) - {c.name for c in cuts} for n in done[name]["files"])
    old = [n for n in old if (out / n).is_file()]
    if old:
        more = f" and {len(old) - 5} more" if len(old) > 5 else ""
        notes.append(
            f"{len(old)} files of earlier runs are no longer in the source ({', '.join(old[:5])}{more}): "
            f"delete them from {out}"
        )
    return notes


def _caption_file(out: Path, target: Target, name: str, family: Family) -> Path | None:
    if target == "latents":
        assert family.single.precomputed
        return latent_files(out, family.single.precomputed, name)[2]
    return out / f"{name}.txt" if target == "clips" else None


def _row(cut: Cut, target: Target, caption: str, family: Family) -> dict[str, Any]:
    """Return the manifest row of a cut, a part of a clip that is written to files.

    The row contains the file names, the caption, the source clip, the start, the size and the frame rate.
    """
    window = cut.window
    frames, height, width = window.extent
    origin = {
        "source": window.clip.name,
        "start": window.start,
        "frames": frames,
        "fps": window.fps,
        "height": height,
        "width": width,
    }
    if target == "rgba-pairs":
        color, alpha = (f"{cut.name}{end}" for end in endings(target))
        return {"video_rgb": color, "video_alpha": alpha, "prompt": caption, **origin}
    if target == "npz":
        return {"video": f"{cut.name}.npz", "prompt": caption or None, **origin}
    if target == "clips":
        return {"file_name": f"{cut.name}.mp4", "caption": caption or None, **origin}
    assert family.single.precomputed
    latents = latent_files(Path(), family.single.precomputed, cut.name)[0]
    return {"latents": latents.as_posix(), "caption": caption, **origin}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _captions_in(out: Path, target: Target) -> dict[str, str]:
    """Return the captions in an existing manifest; keys are file names without suffix.

    The result is empty if there is no manifest, or if `target` is neither `npz` nor `rgba-pairs`.
    """
    file = out / MANIFESTS[target]
    if target not in ("npz", "rgba-pairs") or not file.is_file():
        return {}
    text = read_text(file)
    try:
        if target == "npz":
            found = {r["video"].removesuffix(".npz"): r["prompt"] for r in map(parse_json, text.splitlines())}
        else:
            end = endings(target)[0]
            found = {r["video_rgb"].removesuffix(end): r["prompt"] for r in csv.DictReader(io.StringIO(text))}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{file}: is damaged: correct or delete it, and run again") from None
    return {name: caption or "" for name, caption in found.items()}
