"""Fingerprint of a run's data. A checkpoint stores it, so that a resumed run detects changed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inlaid import config as recipe
from inlaid.data.cache import Cache, identity
from inlaid.data.plan import Plan

Fingerprint = dict[str, Any]
"""JSON values that identify the data of a run: `sources` and `excluded`.

`sources` is a list with one entry per data source. An entry contains the path of the source, and its clips by
name. For each clip, the content hash, caption, windows and split (training or validation) are stored.
`excluded` is a list of the names of clips that could not be encoded.
"""

SHOWN = 5
"""Maximum number of clip names listed in a message."""


def fingerprint(
    plan: Plan, store: Cache, sources: Sequence[recipe.Source], planned: Fingerprint | None = None
) -> Fingerprint:
    """Return the fingerprint of the clips that a run uses: JSON values that identify the clips.

    Args:
        plan: training and validation windows (clips or parts of clips) of the run.
        store: cache, which also stores the content hashes of files.
        sources: the recipe's `data.sources`.
        planned: fingerprint of all planned clips, computed before they were encoded. Clips that are in it but
            not in `plan` are listed as `excluded`.
    """
    out: list[dict[str, Any]] = [{"path": source.path, "clips": {}} for source in sources]
    for split, windows in (("training", plan.train), ("validation", plan.validation)):
        for window in windows:
            clip, caption = window.clip, window.words
            clips = out[clip.source]["clips"]
            if clip.name not in clips:
                content = [store.content(file) for file in clip.files]
                text = caption if isinstance(caption, str) else f"embedding {store.content(caption)}"
                about = {"content": identity(*content), "caption": text, "windows": [], "split": split}
                clips[clip.name] = about
            clips[clip.name]["windows"].append(identity(*window.key)[:12])
    before = planned["sources"] if planned else []
    excluded = [n for a, b in zip(before, out, strict=False) for n in a["clips"] if n not in b["clips"]]
    return {"sources": out, "excluded": excluded}


def differences(old: Fingerprint, new: Fingerprint, *, encoded: bool = True) -> list[str]:
    """Return messages about changed data: one message per data source and kind of change.

    Args:
        old: fingerprint in a checkpoint.
        new: fingerprint of the current data.
        encoded: True if all clips in `new` have been encoded. If False, clips that could not be encoded for
            `old` are ignored.
    """
    ignored = () if encoded else old["excluded"]
    out = []
    for i, source in enumerate(new["sources"]):
        before = old["sources"][i]["clips"] if i < len(old["sources"]) else {}
        now = {k: v for k, v in source["clips"].items() if k not in ignored}
        out += [f"{source['path']}: {line}" for line in _of_source(before, now)]
    return out


def _of_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return messages about changed clips of one data source, one message per kind of change."""
    removed, added = [n for n in old if n not in new], [n for n in new if n not in old]
    renamed = []
    for name in removed:
        same = next((n for n in added if new[n] == old[name]), None)
        if same:
            added.remove(same)
            renamed.append((name, same))
    gone = {name for name, _ in renamed}
    both = [n for n in new if n in old]
    captions = [n for n in both if old[n]["caption"] != new[n]["caption"]]
    content = [n for n in both if old[n]["content"] != new[n]["content"]]
    windows = [n for n in both if n not in content and old[n]["windows"] != new[n]["windows"]]
    split = [f"{n} is now a {new[n]['split']} clip" for n in both if old[n]["split"] != new[n]["split"]]
    texts = [f"{n}: `{_short(old[n]['caption'])}` is now `{_short(new[n]['caption'])}`" for n in captions]
    found = [
        ("removed", [n for n in removed if n not in gone]),
        ("added", added),
        ("renamed", [f"{a} is now {b}" for a, b in renamed]),
        ("with another caption", texts),
        ("with other content", content),
        ("cut into other windows", windows),
        ("in the other part of the split", split),
    ]
    return [f"{len(names)} clip(s) {what}: {_some(names)}" for what, names in found if names]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ("; " if any(" " in n for n in names) else ", ").join(names[:SHOWN]) + more


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
