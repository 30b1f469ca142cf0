"""`inlaid prepare`: all formats, read back; frames by counter; resumed, parallel, and with bad files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.data import dataset_export, dataset_formats, dataset_workers, precomputed
from inlaid.data.dataset_export import Part, prepare_dataset
from inlaid.data.dataset_formats import Crop
from inlaid.data.plan import plan_dataset
from inlaid.media import rgba, video
from inlaid.media.arrays import load_array
from inlaid.tiny import random
from support import rgba_clips as make
from support import videos
from support.commands import files, inlaid
from support.slow import slow

SIZE = (32, 64)
SMALL = ("data.size=[32, 64]", "data.frames=9", "data.fps=16")


def long(
    folder: Path, name: str = "long.mp4", n: int = 96, fps: float = 24, caption: str | None = "a counter"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = videos.write(folder / name, n, fps, (64, 128))
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


def prepare(source: Path, out: Path, target: Any = "clips", *overrides: str, **how: Any) -> Any:
    how = {"family": "wan", "workers": 0, **how}
    return prepare_dataset(source, out, target, overrides=overrides or SMALL, **how)


def rows(out: Path, name: str = "prepared.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]


def whole(path: Path, frames: int = 9, fps: float = 16) -> list[int]:
    return videos.numbers(video.read_frames(path, 0, frames, fps, SIZE))


# --- frames and formats -------------------------------------------------------------------------------------


def test_clips_have_the_right_frames_and_captions(tmp_path: Path) -> None:
    long(tmp_path / "in")
    made = prepare(tmp_path / "in", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert made.written == 7 and len(found) == 7, "4 s at 16 fps are 64 frames: 7 windows of 9"
    for i, row in enumerate(found):
        path = tmp_path / "out" / row["file_name"]
        assert row["file_name"] == f"long-{i:03d}.mp4" and row["source"] == "long.mp4"
        expected = [int((row["start"] + k / 16) * 24 + 0.499) for k in range(9)]
        assert whole(path) == expected and path.with_suffix(".txt").read_text().strip() == "a counter"
        assert video.probe(path).fps == 16 and video.probe(path).frames == 9
    settings = config.build(
        {
            "run": str(tmp_path / "run"),
            "model": {"family": "wan", "checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
            "data": {"sources": str(tmp_path / "out"), "size": list(SIZE), "frames": 9, "validation": 0},
        }
    )
    plan = plan_dataset(settings.data, build_family(settings).grid, 16, 0)
    assert not plan.problems and len(plan.train) == 7 and plan.sources[0].layout == "folder"
    first = whole(tmp_path / "out" / found[0]["file_name"])
    assert videos.numbers(plan.train[0].read()) == first, "training reads the same frames"


def test_start_end_stride_and_number(tmp_path: Path) -> None:
    long(tmp_path / "in")
    part = Part(start=1.0, end=2.5)
    prepare(tmp_path / "in", tmp_path / "out", "clips", *SMALL, "data.stride=5", part=part)
    starts = [r["start"] for r in rows(tmp_path / "out")]
    assert starts == [1.0, 1.3125, 1.625, 1.9375], "24 frames at 16 fps, 9 each, 5 apart"
    assert whole(tmp_path / "out/long-000.mp4")[0] == 24
    prepare(tmp_path / "in", tmp_path / "two", "clips", *SMALL, "data.max_windows=2")
    assert len(rows(tmp_path / "two")) == 2
    with pytest.raises(ValueError, match=r"long\.mp4: ends at 4\.00 s, before --start 9"):
        prepare(tmp_path / "in", tmp_path / "none", part=Part(start=9.0))


@pytest.mark.parametrize("crop", [Crop(32, 32, 96, 0), Crop(64, 32, 32, 32), Crop(16, 8, 4, 52)])
def test_a_region_is_cut_out(tmp_path: Path, crop: Crop) -> None:
    def draw(k: int, size: tuple[int, int]) -> np.ndarray:
        out = np.zeros((*size, 3), np.uint8)
        out[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width] = 250
        return out

    (tmp_path / "in").mkdir()
    videos.write(tmp_path / "in/a.mp4", 24, 16, (64, 128), draw=draw, options={"crf": "1"})
    for name, size in (("small", (16, 16)), ("large", (96, 96))):
        overrides = (f"data.size={list(size)}", "data.frames=9")
        prepare(tmp_path / "in", tmp_path / name, "npz", *overrides, part=Part(crop=crop))
        pixels = np.load(tmp_path / name / "a-000.npz")["frames"]
        assert pixels.shape == (9, *size, 3)
        inner = pixels[:, 2:-2, 2:-2]
        assert np.median(inner) > 235 and (inner > 128).mean() > 0.95
    with pytest.raises(ValueError, match="--crop exceeds this size"):
        prepare(tmp_path / "in", tmp_path / "no", part=Part(crop=Crop(200, 16, 0, 0)))


@pytest.mark.slow
def test_a_region_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long(tmp_path / "in")
    at_once, parts = tmp_path / "a", tmp_path / "b"
    where = Part(crop=Crop(128, 32, 0, 16))
    prepare(tmp_path / "in", at_once, "npz", *SMALL, part=where)
    monkeypatch.setattr(dataset_formats, "CHUNK", 3 * 64 * 128 * 3)
    prepare(tmp_path / "in", parts, "npz", *SMALL, part=where)
    for file in at_once.glob("*.npz"):
        assert np.array_equal(np.load(file)["frames"], np.load(parts / file.name)["frames"])


def test_arrays_have_exactly_the_training_pixels(tmp_path: Path) -> None:
    source = long(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out", "npz")
    for row in rows(tmp_path / "out", "train.jsonl"):
        pixels, fps = load_array(tmp_path / "out" / row["video"])
        wanted = video.read_frames(source, row["start"], 9, 16, SIZE)
        assert np.array_equal(np.stack([pixels[i] for i in range(9)]), wanted) and fps == 16
        assert row["prompt"] == "a counter"


def test_pairs(tmp_path: Path) -> None:
    clip = make.clip(size=(32, 64), frames=18)
    (tmp_path / "in").mkdir()
    rgba.write_rgba(tmp_path / "in/a.mov", clip, 16)
    (tmp_path / "in/a.txt").write_text("a disc, with a comma")
    made = prepare(tmp_path / "in", tmp_path / "out", "rgba-pairs")
    assert made.written == 2
    with (tmp_path / "out/metadata.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [r["prompt"] for r in table] == ["a disc, with a comma"] * 2
    assert table[0]["video_rgb"] == "a-000_rgb.mp4" and table[0]["video_alpha"] == "a-000_alpha.mp4"
    start = round(float(table[0]["start"]) * 16)
    alpha = video.read_frames(tmp_path / "out/a-000_alpha.mp4", 0, 9, 16, SIZE)[..., 0]
    color = video.read_frames(tmp_path / "out/a-000_rgb.mp4", 0, 9, 16, SIZE)
    wanted = clip[start : start + 9]
    assert np.abs(alpha.astype(int) - wanted[..., 3]).mean() < 0.6
    seen = wanted[..., 3] > 64
    assert np.abs(color.astype(int) - wanted[..., :3])[seen].mean() < 4, "4:2:0"
    assert (alpha[wanted[..., 3] == 0] > 2).mean() < 0.005, "no residue in empty regions"


def test_pairs_are_cleaned_as_asked(tmp_path: Path) -> None:
    """A white disc with a green rim on green: decontaminated, the rim is white."""
    clip = make.clip(size=(32, 64))
    clip[..., :3] = np.where(clip[..., 3:] >= 243, 255, [0, 255, 0])
    (tmp_path / "in").mkdir()
    make.video(tmp_path / "in/a.mov", clip, 16, "png", "rgba")
    colors = {}
    for name, more in (
        ("kept", ("data.matte.background=keep",)),
        ("clean", ("data.matte.decontaminate=true",)),
    ):
        prepare(tmp_path / "in", tmp_path / name, "npz", *SMALL, *more)
        pixels = np.load(tmp_path / name / "a-000.npz")["frames"]
        assert pixels.shape[-1] == 4
        soft = (pixels[..., 3] > 20) & (pixels[..., 3] < 230)
        colors[name] = pixels[..., :3][soft].mean(0)
    assert colors["kept"][0] < 60 and colors["clean"][0] > 230


@pytest.mark.parametrize("kind", [("mochi", "t2v"), slow(("cogvideox", "5b"))], ids="-".join)
@pytest.mark.parametrize("alpha", [slow(False), True], ids=["opaque", "joint"])
def test_latents_are_those_that_training_computes(
    kind: tuple[str, str], alpha: bool, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    frames = 7 if kind[0] == "mochi" else 9
    fps = 30 if kind[0] == "mochi" else 8
    (tmp_path / "in").mkdir()
    if alpha:
        rgba.write_rgba(tmp_path / "in/a.mov", make.clip(size=(32, 48), frames=2 * frames), fps)
    else:
        videos.write(tmp_path / "in/a.mp4", 2 * frames, fps, (32, 48))
    (tmp_path / "in/a.txt").write_text("a word or two")
    (tmp_path / "in/b.mp4").write_bytes(
        (tmp_path / "in").joinpath("a.mov" if alpha else "a.mp4").read_bytes()
    )
    folder = str(checkpoint(*kind))
    overrides = ("data.size=[32, 48]", f"data.frames={frames}")
    made = prepare(
        tmp_path / "in", tmp_path / "out", "latents", *overrides, family=kind[0], checkpoint=folder
    )
    assert made.written == 2 and "b.mp4" in made.left_out[0] and "no caption" in made.left_out[0]
    raw: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "model": {**random.model(*kind), "checkpoint": folder},
        "data": {"sources": str(tmp_path / "out"), "size": [32, 48], "frames": frames, "validation": 0},
        "alpha": {"kind": "joint" if alpha else "opaque"},
    }
    settings = config.build(raw)
    family = build_family(settings)
    plan = plan_dataset(settings.data, family.grid, family.fps, 0, family=family)
    assert not plan.errors and [c.caption for c in plan.clips] == ["a word or two"] * 2
    start = rows(tmp_path / "out")[0]["start"]
    data = settings.data.model_copy(update={"sources": [config.Source(path=str(tmp_path / "in"))]})
    clips = plan_dataset(data, family.grid, family.fps, 0, family=family, uncaptioned=True)
    window = next(w for w in clips.train if w.clip.name.startswith("a."))
    pixels = replace(window, start=start).read()
    with torch.no_grad():
        item = family.encode_media(family.load_media_encoder(torch.device("cpu")), pixels)
    there = precomputed.read_item(family, plan.clips[0].latents)
    assert there.keys() == item.keys()
    rounding = 0.005 if kind[0] == "mochi" else 1e-6  # bfloat16, as the published trainers
    for name, value in item.items():
        assert (there[name] - value).abs().max() <= rounding * value.abs().max()
    words = family.encode_text(
        family.load_text_encoder(torch.device("cpu"), torch.float32), ["a word or two"]
    )
    assert plan.clips[0].embedding is not None
    assert torch.equal(precomputed.read_text_item(family, plan.clips[0].embedding)["text"], words[0]["text"])
    if kind[0] == "mochi":
        latent = torch.load(tmp_path / "out/a-000.latent.pt", weights_only=True)
        embed = torch.load(tmp_path / "out/a-000.embed.pt", weights_only=True)
        assert (
            latent["ldist"].shape == (1, 24, 4 if alpha else 2, 4, 6)
            and latent["ldist"].dtype == torch.bfloat16
        )
        assert (
            embed["prompt_embeds"].shape[:2] == (1, 256)
            and embed["prompt_attention_mask"].dtype == torch.bool
        )


def test_what_cannot_be_latents_is_refused(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> None:
    long(tmp_path / "in")
    with pytest.raises(ValueError, match="no trainer of wan reads precomputed latents"):
        prepare(tmp_path / "in", tmp_path / "out", "latents")
    i2v = str(checkpoint("cogvideox", "i2v"))
    with pytest.raises(ValueError, match="conditioned on images"):
        prepare(tmp_path / "in", tmp_path / "out", "latents", family="cogvideox", checkpoint=i2v)
    mochi = str(checkpoint("mochi", "t2v"))
    with pytest.raises(ValueError, match="8 frames is not 6n\\+1: use 7 or 13"):
        how = {"family": "mochi", "checkpoint": mochi}
        prepare(tmp_path / "in", tmp_path / "out", "latents", "data.size=[32, 48]", "data.frames=8", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["metadata.csv", "train.jsonl", "", "press"])
def test_real_clips_in_every_layout(media_root: Path, tmp_path: Path, layout: str) -> None:
    source = media_root / "press" if layout == "press" else media_root / "clips" / layout
    if layout == "":
        shutil.copytree(media_root / "clips", tmp_path / "lines")
        for name in ("metadata.csv", "train.jsonl"):
            (tmp_path / "lines" / name).unlink()
        source = tmp_path / "lines"
    overrides = ("data.size=[48, 80]", "data.frames=9", "data.fps=8", "data.max_windows=2")
    prepare(source, tmp_path / "clips", "clips", *overrides)
    prepare(tmp_path / "clips", tmp_path / "arrays", "npz", *overrides)
    back = prepare(tmp_path / "arrays", tmp_path / "again", "clips", *overrides)
    assert back.written == 4 and not back.left_out
    captions = [r["caption"] for r in rows(tmp_path / "clips")]
    assert captions == [r["prompt"] for r in rows(tmp_path / "arrays", "train.jsonl")]
    assert captions == [r["caption"] for r in rows(tmp_path / "again")] and all(captions)
    with pytest.raises(ValueError, match=r"2 of 2 clips have no alpha"):
        prepare(source, tmp_path / "pairs", "rgba-pairs", *overrides)


# --- resuming and parallel work -----------------------------------------------------------------------------


def test_finished_files_are_not_written_again(tmp_path: Path) -> None:
    long(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir() if p.is_file()}
    (tmp_path / "out/long-003.mp4").unlink()
    (tmp_path / "out/long-004.mp4").write_bytes(b"half")
    again = prepare(tmp_path / "in", tmp_path / "out")
    assert (again.written, again.kept) == (2, 5)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before}
    assert {p.name for p in before if before[p] != after[p]} == {"long-003.mp4", "long-004.mp4"}
    assert whole(tmp_path / "out/long-004.mp4")


def test_changed_sources_are_written_again_and_old_files_are_named(tmp_path: Path) -> None:
    long(tmp_path / "in", "a.mp4")
    long(tmp_path / "in", "b.mp4")
    prepare(tmp_path / "in", tmp_path / "out")
    long(tmp_path / "in", "a.mp4", n=48)
    (tmp_path / "in/b.mp4").unlink()
    made = prepare(tmp_path / "in", tmp_path / "out")
    assert made.written == 3 and made.kept == 0
    assert any("11 files of earlier runs are no longer in the source (a-003.mp4" in n for n in made.notes)
    assert [r["file_name"] for r in rows(tmp_path / "out")] == ["a-000.mp4", "a-001.mp4", "a-002.mp4"]


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    long(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"frames was \[9\], is \[5\]"):
        prepare(
            tmp_path / "in", tmp_path / "out", "clips", "data.size=[32, 64]", "data.frames=5", "data.fps=16"
        )
    before = files(tmp_path / "in")
    with pytest.raises(ValueError, match="is not empty and was not written by"):
        prepare(tmp_path / "out", tmp_path / "in")
    for place in (tmp_path / "in", tmp_path / "in/deep"):
        with pytest.raises(ValueError, match="is in the source"):
            prepare(tmp_path / "in", place)
    assert files(tmp_path / "in") == before


def test_edited_captions_are_kept(tmp_path: Path) -> None:
    source = long(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/long-001.txt").write_text("zero to nine, edited\n")
    source.with_suffix(".txt").write_text("a new caption")
    made = prepare(tmp_path / "in", tmp_path / "out")
    captions = [r["caption"] for r in rows(tmp_path / "out")]
    assert captions == ["a new caption", "zero to nine, edited", *["a new caption"] * 5]
    assert (tmp_path / "out/long-000.txt").read_text().strip() == "a new caption"
    assert made.kept == 7 and "1 captions were edited" in " ".join(made.notes)
    source.with_suffix(".txt").write_text("a third caption")
    prepare(tmp_path / "in", tmp_path / "out")
    captions = [r["caption"] for r in rows(tmp_path / "out")]
    assert captions == ["a third caption", "zero to nine, edited", *["a third caption"] * 5]


def test_sizes_and_lengths_fit_the_clips_and_stay(tmp_path: Path) -> None:
    long(tmp_path / "in", n=48)
    prepare(tmp_path / "in", tmp_path / "out", "clips", "data.fps=16")
    row = rows(tmp_path / "out")[0]
    assert (row["frames"], row["height"], row["width"]) == (29, 64, 128), "2 s at 16 fps, 4n+1"
    long(tmp_path / "in", "b.mp4", n=96)
    prepare(tmp_path / "in", tmp_path / "out", "clips", "data.fps=16")
    assert {r["frames"] for r in rows(tmp_path / "out")} == {29}, (
        "a longer clip changes nothing that is there"
    )


def test_clips_of_the_same_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    long(tmp_path / "in", "a.mp4", n=30)
    long(tmp_path / "in", "A.mkv", n=30)
    long(tmp_path / "in/sub", "a.mp4", n=30)
    long(tmp_path / "in", "sub_a.mp4", n=30)
    prepare(tmp_path / "in", tmp_path / "out", "clips", *SMALL, "data.max_windows=1")
    names = [r["file_name"] for r in rows(tmp_path / "out")]
    assert len({n.casefold() for n in names}) == 4 == len(list((tmp_path / "out").glob("*.mp4")))


def test_bad_files_are_named_counted_and_left_out(tmp_path: Path) -> None:
    folder = long(tmp_path / "in", "good.mp4").parent
    long(folder, "bare.mp4", caption=None)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.txt").write_text("broken")
    long(folder, "short.mp4", n=3)
    damaged = bytearray(long(folder, "damaged.mp4", n=240).read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 400] = bytes(400)
    (folder / "damaged.mp4").write_bytes(damaged)
    made = prepare(folder, tmp_path / "out")
    text = "\n".join(made.left_out)
    assert (
        "2 of 5 clips cannot be read (broken.mp4: " in text and "1 of 5 clips is too short (short.mp4" in text
    )
    assert "--frames" in text and "data.frames" not in text
    assert "damaged.mp4: 2 of 17 parts, the first from 6.44 s" in text
    assert any("bare.mp4" in n and "no caption" in n for n in made.notes)
    names = {r["file_name"].partition("-")[0] for r in rows(tmp_path / "out")}
    assert names == {"good", "bare", "damaged"}
    assert not (tmp_path / "out/bare-000.txt").exists()


def test_a_source_without_usable_clips_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.mp4"):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_processes_write_the_same_files(tmp_path: Path) -> None:
    long(tmp_path / "in")
    (tmp_path / "in/b.mp4").write_bytes(b"no video")
    (tmp_path / "in/b.txt").write_text("b")
    prepare(tmp_path / "in", tmp_path / "one")
    made = prepare(tmp_path / "in", tmp_path / "two", workers=2)
    assert made.written == 7 and "b.mp4" in made.left_out[0]
    visible = {k: v for k, v in files(tmp_path / "one").items() if not k.startswith(".prepare")}
    assert visible == {k: v for k, v in files(tmp_path / "two").items() if not k.startswith(".prepare")}


def _dies(cut: Any, *_: Any) -> Any:
    if "002" in cut.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return dataset_formats.Written(cut.name, {"x": 1})


@pytest.mark.slow
def test_a_process_that_dies_costs_one_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_workers, "write_cut", _dies)
    long(tmp_path / "in")
    made = prepare(tmp_path / "in", tmp_path / "out", workers=2)
    assert made.written == 6 and "long.mp4: 1 of 7 parts, the first from" in made.left_out[0]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    for i in range(4):
        long(tmp_path / "in", f"{i}.mp4", n=240)
    command = [sys.executable, "-m", "inlaid", "prepare", str(tmp_path / "in"), str(tmp_path / "out")]
    command += ["--size", "64x128", "--frames", "5", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.mp4"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(2)
    here = Path(f"/proc/{process.pid}")
    assert not here.exists()
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    recorded = {
        json.loads(x)["name"] for x in (tmp_path / "out/.prepare/done.jsonl").read_text().splitlines()
    }
    assert 5 <= len(first) < 128
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(recorded)} of them before" in done.stderr
    kept = [p for p in first if p.stem in recorded]
    assert all(p.stat().st_mtime_ns == first[p] for p in kept)
    assert len(rows(tmp_path / "out")) == len(list((tmp_path / "out").glob("*.mp4"))) == 128
    assert not list((tmp_path / "out").glob(".tmp*"))


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_and_its_mistakes(tmp_path: Path) -> None:
    source = long(tmp_path / "in").parent
    options = ["--size", "32x64", "--frames", 9, "--fps", 16, "--workers", 0]
    done = inlaid("prepare", source, tmp_path / "out", "--as", "npz", *options, "--crop", "128:32:0:16")
    assert done.code == 0 and "7 clips:" in done.output and "train.jsonl" in done.output
    again = inlaid("prepare", source, tmp_path / "out", "--as", "npz", *options, "--crop", "128:32:0:16")
    assert "7 clips, 7 of them before" in again.output
    for arguments, says in (
        (["--as", "gif"], "--as: `gif` is not one of clips, npz, rgba-pairs, latents"),
        (["--crop", "1,2,3,4"], "--crop: `1,2,3,4` is not W:H:X:Y"),
        (["--start", 3, "--end", 2], "--end: 2 is not after --start 3"),
        (["--size", "big"], "data.size"),
        (["--family", "midi"], "--family: midi is trained on scenes"),
        (["data.no=1"], "data.no: unknown key"),
    ):
        done = inlaid("prepare", source, tmp_path / "no", *arguments)
        assert done.code == 2 and says in done.output, done.output
    assert not (tmp_path / "no").exists()


def test_a_recipe_is_a_source(recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = recipe(data__max_windows=1)
    (tmp_path / "r.yaml").write_text(json.dumps(raw), "utf-8")
    made = prepare_dataset(tmp_path / "r.yaml", tmp_path / "out", "clips", family="wan", workers=0)
    found = rows(tmp_path / "out")
    assert made.written == 4 and {(r["frames"], r["height"], r["width"]) for r in found} == {(9, 32, 32)}
    assert dataset_export.MANIFESTS["clips"] == "prepared.jsonl"


# --- every layout to every format, and back -----------------------------------------------------------------


def layout_of(kind: str, folder: Path) -> Path:
    """Two clips with counters and alpha mattes beside them, in a layout of the example data."""
    rows = [("videos/a.mp4", 'first, with "quotes"'), ("videos/b.mp4", "second")]
    matte = np.linspace(190, 255, 128).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    for name, _ in rows:
        long(folder / "videos", Path(name).name, n=48, caption=None)
        place = folder / f"{name[:-4]}_alpha.mp4"
        videos.write(place, 48, 24, (64, 128), draw=lambda *_: matte, options={"crf": "4"})
    if kind == "lines":
        (folder / "videos.txt").write_text("\n".join(n for n, _ in rows))
        (folder / "prompts.txt").write_text("\n".join(c for _, c in rows))
        return folder
    file = folder / {"csv": "metadata.csv", "jsonl": "train.jsonl"}[kind]
    with file.open("w", newline="") as out:
        if kind == "csv":
            csv.writer(out).writerows([("video", "caption"), *rows])
        else:
            out.writelines(json.dumps({"video": n, "prompt": c}) + "\n" for n, c in rows)
    return file


def counted(out: Path, target: str) -> tuple[list[list[int]], list[str]]:
    """The numbers that the written frames show, and the captions, in the order of the manifest."""
    found = []
    if target == "clips":
        table = rows(out)
        found = [whole(out / r["file_name"]) for r in table]
        return found, [r["caption"] for r in table]
    if target == "npz":
        table = rows(out, "train.jsonl")
        arrays = [np.load(out / r["video"])["frames"] for r in table]
        assert all(a.shape == (9, *SIZE, 4) and abs(int(a[..., 0, 3].mean()) - 190) < 6 for a in arrays)
        return [videos.numbers(a[..., :3]) for a in arrays], [r["prompt"] for r in table]
    with (out / "metadata.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [whole(out / r["video_rgb"]) for r in table], [r["prompt"] for r in table]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lines", "csv", "jsonl"])
def test_every_layout_to_every_format_and_back(
    kind: str, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = layout_of(kind, tmp_path / "in")
    formats: dict[str, Path] = {}
    for target in ("clips", "npz", "rgba-pairs"):
        formats[target] = tmp_path / target
        made = prepare(source, formats[target], target)
        assert made.written == 6 and not made.left_out, "32 frames at 16 fps: three windows of each clip"
    expected, captions = counted(formats["clips"], "clips")
    starts = [r["start"] for r in rows(formats["clips"])]
    assert expected == [[int((s + k / 16) * 24 + 0.499) for k in range(9)] for s in starts]
    assert captions == ['first, with "quotes"'] * 3 + ["second"] * 3
    for target in ("npz", "rgba-pairs"):
        assert counted(formats[target], target) == (expected, captions)
    for first, second in (("clips", "clips"), ("npz", "rgba-pairs"), ("rgba-pairs", "npz"), ("npz", "clips")):
        back = tmp_path / f"{first}-{second}"
        made = prepare(formats[first], back, second)
        assert made.written == 6 and not made.left_out and counted(back, second) == (expected, captions)
    how = {"family": "mochi", "checkpoint": str(checkpoint("mochi", "t2v"))}
    for name in ("clips", "npz", "rgba-pairs"):
        overrides = ("data.size=[32, 64]", "data.frames=7", "data.fps=16")
        latents = tmp_path / f"latents-{name}"
        made = prepare(formats[name], latents, "latents", *overrides, **how)
        shape = (1, 24, 2 if name == "clips" else 4, 4, 8)
        files = sorted(latents.glob("*.latent.pt"))
        assert made.written == 6 == len(files) and not made.left_out
        assert all(torch.load(f, weights_only=True)["ldist"].shape == shape for f in files)
        assert [r["caption"] for r in rows(latents)] == captions
