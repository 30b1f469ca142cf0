"""The cache: content-addressed, atomic, verified, resumable."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inlaid import config
from inlaid.alpha.opening import open_family
from inlaid.data import cache
from inlaid.data.cache import Cache, ahead, identity
from inlaid.data.prepare import CachedDataset, build_cache
from inlaid.media import video
from inlaid.runs.folder import Run, open_run, read_header
from inlaid.runs.launch import Context
from inlaid.training.loop import train
from support import videos

CPU = Context(torch.device("cpu"), torch.float32, "adamw")


@pytest.fixture
def encoded() -> None:
    """Every run has a cache of its own here."""


def build(raw: dict) -> CachedDataset:
    settings = config.build(raw)
    with open_run(settings, CPU) as run:
        return build_cache(settings, open_family(settings), run, CPU, lambda *_: run.begin(settings, CPU))


def files(raw: dict, kind: str) -> list[Path]:
    return sorted((Run(Path(raw["run"])).cache(config.build(raw)) / kind).rglob("*.safetensors"))


def test_media_text_the_empty_caption_and_prompts_are_cached_once(recipe: Callable[..., dict]) -> None:
    raw = recipe(sample__prompts=["clip number 1", "something new"])
    first, second = build(raw), build(raw)
    assert (first.built.made, first.built.reused) == (4, 0)
    assert (second.built.made, second.built.reused) == (0, 4)
    captions = {read_header(f)["caption"] for f in files(raw, "text")}
    assert captions == {"", "something new", *(f"clip number {i}" for i in range(4))}
    item = first.store.read("media", first.media[0])
    assert item["latents"].dtype == torch.float16 and item["latents"].shape == (16, 3, 4, 4)


def test_what_decides_the_numbers_decides_the_name(recipe: Callable[..., dict], tmp_path: Path) -> None:
    shared = {"data__cache": str(tmp_path / "shared")}
    one = build(recipe(**shared))
    assert set(build(recipe(run=str(tmp_path / "b"), **shared)).media) == set(one.media)
    assert not set(build(recipe(data__size=[48, 32], **shared, run=str(tmp_path / "c"))).media) & set(
        one.media
    )
    assert not set(build(recipe(data__fps=8, data__frames=5, **shared, run=str(tmp_path / "d"))).media) & set(
        one.media
    )
    clip = tmp_path / "clips/00.mp4"
    content = clip.read_bytes()
    clip.write_bytes(content + b"\0\0\0\x08free")
    changed = build(recipe(run=str(tmp_path / "e"), **shared))
    assert changed.built.made == 1


def test_another_encoder_is_another_item(recipe: Callable[..., dict], tiny_wan: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_wan, copy)
    shared = {"data__cache": str(tmp_path / "shared")}
    one = build(recipe(**shared))
    same = build(recipe(model__checkpoint=str(copy), run=str(tmp_path / "b"), **shared))
    assert same.built.made == 0, "the same files elsewhere are the same encoder"
    vae = json.loads((copy / "vae/config.json").read_text("utf-8"))
    vae["latents_std"][0] = 2.0
    (copy / "vae/config.json").write_text(json.dumps(vae), "utf-8")
    other = build(recipe(model__checkpoint=str(copy), run=str(tmp_path / "c"), **shared))
    assert not set(other.media) & set(one.media)
    assert set(other.text) == set(one.text) or other.text


@pytest.mark.slow  # see `test_damaged_item_is_encoded_again`
def test_a_truncated_item_is_made_again(recipe: Callable[..., dict]) -> None:
    raw = recipe()
    build(raw)
    broken = files(raw, "media")[0]
    whole, wanted = broken.read_bytes(), load_file(broken)["latents"].clone()  # not a view of the file
    for cut in (0, 4, 40, len(whole) - 1):
        broken.write_bytes(whole[:cut])
        assert build(raw).built.made == 1
        assert torch.equal(load_file(broken)["latents"], wanted)


@pytest.mark.slow  # see `test_item_that_was_changed`
def test_a_changed_item_stops_with_its_name(recipe: Callable[..., dict]) -> None:
    raw = recipe()
    build(raw)
    broken = files(raw, "media")[0]
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{broken.name}: cached item was modified.*delete the file and run again"
    ):
        train(config.build(raw))


def test_an_item_under_the_name_of_another_is_encoded_again(recipe: Callable[..., dict]) -> None:
    raw = recipe()
    first = build(raw)
    one, two = files(raw, "media")[:2]
    right = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=f"{one.name}: this file is the cached item media/{two.stem}, not"):
        first.store.read("media", one.stem)
    assert build(raw).built.made == 1 and one.read_bytes() == right


@pytest.mark.slow  # see `test_cache_that_cannot_be_written`
def test_a_full_disk_keeps_what_is_there(
    recipe: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, written, real = recipe(data__cache=str(tmp_path / "cache")), [], cache.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError(
                f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"
            )
        written.append(path)
        real(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", full)
        with pytest.raises(
            ValueError,
            match=r"the disk is full \(No space.*\); 2 of 4 items are cached and kept\. Free",
        ):
            build(raw)
    assert len(files(raw, "media")) == 2 and not list(Path(raw["run"]).rglob(".tmp-*"))
    assert build(raw).built.made == 2


@pytest.mark.slow  # see test_bad_clips.py
def test_bad_clips_stop_or_are_quarantined(recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = recipe(data__cache=str(tmp_path / "cache"))
    (tmp_path / "clips/02.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"02\.mp4"):
        build(raw)
    clips = build(recipe(data__bad_clips="quarantine", data__cache=str(tmp_path / "cache")))
    assert clips.built.made == 3
    listed = json.loads((tmp_path / "run/quarantine.json").read_text("utf-8"))
    assert list(listed) == ["02.mp4"]


def test_results_come_in_order_and_errors_are_results() -> None:
    def job(i: int) -> Callable[[], int]:
        return lambda: 10 // (3 - i)

    for workers in (0, 1, 4):
        got = list(ahead((job(i) for i in range(6)), workers))
        assert [g if isinstance(g, int) else type(g) for g in got] == [3, 5, 10, ZeroDivisionError, -10, -5]


def test_identity_depends_on_every_part() -> None:
    names = {identity(1, "a"), identity(1, "b"), identity(2, "a"), identity("1", "a"), identity(1, ["a"])}
    assert len(names) == 5 and identity(1, "a") == identity(1, "a")


def test_a_damaged_memo_is_only_a_memo(tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text("{broken", "utf-8")
    file = tmp_path / "x"
    file.write_text("hello", "utf-8")
    store = Cache(tmp_path)
    assert store.content(file).startswith("2cf24dba5fb0a30e")
    store.remember()
    assert Cache(tmp_path).probes._hashes


def test_a_probe_is_remembered_until_its_file_changes(tmp_path, monkeypatch) -> None:
    path = videos.write(tmp_path / "v.mp4", 12, 24)
    looked: list[Path] = []
    probe = video.probe
    monkeypatch.setattr(video, "probe", lambda p: (looked.append(p), probe(p))[1])
    store = Cache(tmp_path / "cache")
    assert store.probes.probe(path) == probe(path)
    store.remember()
    assert Cache(tmp_path / "cache").probes.probe(path) == probe(path) and len(looked) == 1
    videos.write(path, 16, 24)
    assert Cache(tmp_path / "cache").probes.probe(path).frames == 16 and len(looked) == 2
    for broken in ("{", "[]", json.dumps({k: {"fps": "x"} for k in store.probes._probes})):
        (tmp_path / "cache/probes.json").write_text(broken, "utf-8")
        assert Cache(tmp_path / "cache").probes.probe(path).frames == 16
    path.unlink()
    with pytest.raises(ValueError, match=r"v\.mp4"):
        store.probes.probe(path)
