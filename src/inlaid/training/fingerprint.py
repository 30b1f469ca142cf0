"""Fingerprint of the data of a run: what a checkpoint was trained on, and how the data differ now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inlaid import config as recipe
from inlaid.data.cache import Cache, identity
from inlaid.data.plan import Plan

Fingerprint = dict[str, Any]
"""`sources`: per source its path, and its clips by name with content hash, caption, windows and split;
`excluded`: names of the clips that could not be encoded."""

SHOWN = 5
"""Number of names in a message."""


def fingerprint(
    plan: Plan, store: Cache, sources: Sequence[recipe.Source], planned: Fingerprint | None = None
) -> Fingerprint:
    """Return the fingerprint of a plan.

    Args:
        plan: the windows of the run.
        store: cache, which memoizes the content hashes of files.
        sources: the recipe's `data.sources`.
        planned: fingerprint before clips were encoded; clips that `plan` does not contain are excluded.
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
    """Return one line per kind of difference and source; empty if the data are the same.

    Args:
        old: fingerprint in a checkpoint.
        new: fingerprint of the data now.
        encoded: False if `new` may contain clips that cannot be encoded.
    """
    ignored = () if encoded else old["excluded"]
    out = []
    for i, source in enumerate(new["sources"]):
        before = old["sources"][i]["clips"] if i < len(old["sources"]) else {}
        now = {k: v for k, v in source["clips"].items() if k not in ignored}
        out += [f"{source['path']}: {line}" for line in _of_source(before, now)]
    return out


def _of_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences between the clips of a source before and now."""
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
