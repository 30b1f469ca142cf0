"""Clips that another trainer has encoded: the same items as from the clips themselves, without an encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commands import inlaid
from inlaid import cache, config, data, families, media, runtime, train
from inlaid.runtime import Context, Run
from inlaid.twins import tiny

CPU = Context(torch.device("cpu"), torch.float32, "adamw")
SHAPES = {"mochi": (7, 32, 48), "5b": (9, 32, 64), "2b": (9, 48, 32), "1.5": (13, 32, 64), "i2v": (9, 32, 32)}
"""Frames, height and width of the clips."""
CASES = [("mochi", "t2v"), ("cogvideox", "5b"), ("cogvideox", "i2v"), ("cogvideox", "1.5")]

Checkpoint = Callable[[str, str], Path]


def mochi(folder: Path, name: str, moments: Tensor, text: Tensor, genmo: bool = False) -> None:
    """Files as finetrainers writes them, or genmo: raw moments in bfloat16, text padded to 256 tokens."""
    n, width = text.shape
    padded, mask = torch.zeros(1, 256, width), torch.zeros(1, 256, dtype=torch.bool)
    padded[0, :n], mask[0, :n] = text, True
    mean, logvar = moments[None].chunk(2, dim=1)
    latent = {"mean": mean, "logvar": logvar} if genmo else {"ldist": moments[None]}
    embed = {"prompt_embeds": padded, "prompt_attention_mask": mask}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(latent, folder / f"{name}.latent.pt")
    torch.save({"y_feat": [padded], "y_mask": [mask]} if genmo else embed, folder / f"{name}.embed.pt")


def cogvideox(folder: Path, name: str, moments: Tensor, text: Tensor, image: Tensor | None = None) -> None:
    """Files as the CogVideoX scripts of finetrainers write them: bare tensors in folders of their own."""
    parts = {"video_latents": moments, "prompt_embeds": text, "image_latents": image}
    for part, tensor in parts.items():
        if tensor is not None:
            (folder / part).mkdir(parents=True, exist_ok=True)
            torch.save(tensor, folder / part / f"{name}.pt")


def shape(kind: tuple[str, str]) -> tuple[int, int, int]:
    return SHAPES[kind[1] if kind[0] == "cogvideox" else kind[0]]


def recipe(kind: tuple[str, str], checkpoint: Checkpoint, run: Path, source: Any, **changes: Any) -> dict:
    """A small complete recipe; keyword `section__key` changes a value."""
    frames, *size = shape(kind)
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {**tiny.model(*kind), "checkpoint": str(checkpoint(*kind))},
        "data": {"sources": source, "size": size, "frames": frames, "held_out": 1, "caption_dropout": 0.5},
        "tuner": {"kind": "lora", "rank": 2},
        "optim": {"lr": 1e-2},
        "train": {"steps": 4, "save_every": 2, "log_every": 1, "validate_every": 2, "trackers": []},
        "sample": {"prompts": ["a cat"], "steps": 2},
    }
    if kind[1].endswith("i2v"):
        picture = run.parent / "start.png"
        if not picture.exists():
            from PIL import Image

            Image.new("RGB", (64, 64), "teal").save(picture)
        raw["sample"]["images"] = [str(picture)]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw.get(section, {}), name: value}
    return raw


def built(raw: dict) -> train.Clips:
    settings = config.build(raw)
    return train.build_cache(settings, train.open_family(settings), train.open_run(settings, CPU), CPU)


def clips(folder: Path, kind: tuple[str, str], fps: float, n: int = 3) -> Path:
    """Clips of exactly the size and rate that is asked for."""
    folder.mkdir()
    frames, height, width = shape(kind)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
        media.write_video(folder / f"{i}.mp4", pixels, fps)
        (folder / f"{i}.txt").write_text(f"clip number {i}", "utf-8")
    return folder


def encode(raw: dict, made: train.Clips, folder: Path, genmo: bool = False) -> list[Mapping[str, Tensor]]:
    """Writes what is cached as another trainer would have, and gives the items."""
    family = families.get(raw["model"]["family"])(config.build(raw).model)
    items = []
    for window, name, text in zip(made.plan.train, made.media, made.text, strict=True):
        item, stem = made.store.read("media", name), Path(window.clip.name).stem
        items.append(item)
        words = made.store.read("text", text)["text"]
        if raw["model"]["family"] == "mochi":
            mochi(folder, stem, item["moments"], words, genmo)
        else:
            cogvideox(folder, stem, item["moments"], words, item["image"][0] if family.images else None)
    return items


@pytest.fixture
def no_vae(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function after whose call the family loads no VAE to encode with."""

    def forbid(family: str) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("an encoder was loaded")

        monkeypatch.setattr(families.get(family), "load_media_encoder", refuse)

    return forbid


@pytest.mark.parametrize(("kind", "genmo"), [*((kind, False) for kind in CASES), (CASES[0], True)])
def test_the_same_items_as_from_the_clips(
    kind: tuple[str, str],
    genmo: bool,
    checkpoint: Checkpoint,
    tmp_path: Path,
    no_vae: Callable[[str], None],
) -> None:
    family = families.get(kind[0])(config.build(recipe(kind, checkpoint, tmp_path, "x")).model)
    source = clips(tmp_path / "clips", kind, family.fps)
    raw = recipe(kind, checkpoint, tmp_path / "a", str(source), data__held_out=0)
    first = built(raw)
    items = encode(raw, first, tmp_path / "encoded", genmo)
    no_vae(kind[0])
    again = built(recipe(kind, checkpoint, tmp_path / "b", str(tmp_path / "encoded"), data__held_out=0))
    assert again.plan.sources[0].layout == "encoded"
    assert [w.shape for w in again.plan.train] == [shape(kind)] * 3
    assert (again.built.made, again.built.reused) == (3, 0)
    for i in range(3):
        got = again.store.read("media", again.media[i])
        wanted = {k: v if k == "moments" else v[:1].expand_as(v) for k, v in items[i].items()}
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
        texts = [c.store.read("text", c.text[i])["text"] for c in (first, again)]
        assert torch.equal(*texts)
    once_more = built(recipe(kind, checkpoint, tmp_path / "b", str(tmp_path / "encoded"), data__held_out=0))
    assert (once_more.built.made, once_more.built.reused) == (0, 3)


@pytest.fixture(params=CASES[:3], ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[tuple[str, str], Path]:
    """Encoded clips of random numbers in two sizes."""
    kind = request.param
    write(tmp_path / "encoded", kind)
    return kind, tmp_path / "encoded"


def write(folder: Path, kind: tuple[str, str], n: int = 4) -> Path:
    """Random encoded clips; the last is of another size where the checkpoint has any."""
    frames, height, width = shape(kind)
    t = 1 + (frames - 1) // (6 if kind[0] == "mochi" else 4)
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        wide = 2 * width if i == n - 1 and kind[1] != "i2v" else width
        size = (height // 8, wide // 8)
        if kind[0] == "mochi":
            text = torch.randn(5 + i, tiny.TEXT_WIDTH, generator=generator)
            moments = torch.randn(24, t, *size, generator=generator).bfloat16()
            mochi(folder, f"deep/{i}", moments, text, genmo=i % 2 == 1)
        else:
            text = torch.randn(226, tiny.TEXT_WIDTH, generator=generator)
            moments = torch.randn(32, t, *size, generator=generator)
            cogvideox(folder, str(i), moments, text, moments[:, :1].clone() if kind[1] == "i2v" else None)
    return folder


def test_the_whole_job(folder: tuple, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Check, train, resume to the same bits, draw and evaluate."""
    kind, source = folder
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe(kind, checkpoint, tmp_path / "run", str(source))), "utf-8")
    done = inlaid("check", path)
    assert done.code == 0, done.said
    assert "is read as encoded: 4 clips of precomputed latents," in done.said
    assert "4 windows are precomputed latents: their size" in done.said
    assert not (tmp_path / "run/check/contact_sheet.png").exists()
    report = json.loads((tmp_path / "run/check/report.json").read_text("utf-8"))
    assert report["clips"] == 4 and report["contact_sheet"] is None
    assert sum(b["train"] + b["held_out"] for b in report["buckets"]) == 4
    assert len(report["buckets"]) == (1 if kind[1] == "i2v" else 2)
    run = Run(tmp_path / "run")
    assert inlaid("train", path).code == 0
    wanted, _ = runtime.load_state(run.checkpoint("4"))
    shutil.rmtree(run.checkpoint("4"))
    assert inlaid("train", path).code == 0
    got, _ = runtime.load_state(run.checkpoint("4"))
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
    lines = runtime.read_metrics(run.metrics)
    assert [x["step"] for x in lines if "held_out_loss" in x] == [2, 4]
    done = inlaid("evaluate", run.folder)
    assert done.code == 0, done.said
    assert "cannot be used" not in done.said and "could not be read" not in done.said


def test_encoded_clips_are_mixed_with_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kind = CASES[1]
    family = families.get(kind[0])(config.build(recipe(kind, checkpoint, tmp_path, "x")).model)
    sources = [
        {"path": str(write(tmp_path / "encoded", kind))},
        {"path": str(clips(tmp_path / "clips", kind, family.fps)), "weight": 0.5},
    ]
    made = built(recipe(kind, checkpoint, tmp_path / "run", sources))
    assert [s.layout for s in made.plan.sources] == ["encoded", "folder"]
    assert len(made.plan.train) == 6 and made.built.made == 7


def test_text_that_changes_is_another_item(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kind = CASES[1]
    raw = recipe(kind, checkpoint, tmp_path / "run", str(write(tmp_path / "encoded", kind)))
    first = built(raw)
    torch.save(torch.zeros(226, tiny.TEXT_WIDTH), tmp_path / "encoded/prompt_embeds/0.pt")
    second = built(raw)
    assert second.built.made == 0
    assert len(set(second.text + second.held_out_text) - set(first.text + first.held_out_text)) == 1


def plan(kind: tuple[str, str], checkpoint: Checkpoint, source: Any, **changes: Any) -> data.Plan:
    """What would be seen of a source."""
    settings = config.build(recipe(kind, checkpoint, Path("run"), source, **changes))
    family = families.get(kind[0])(settings.model)
    return data.plan(settings.data, family.grid, family.fps, 0, family=family)


def test_captions_are_names_for_prompts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "encoded", CASES[1])
    (source / "prompts").mkdir()
    (source / "prompts/1.txt").write_text("a red\nfox", "utf-8")
    made = plan(CASES[1], checkpoint, str(source))
    assert [c.caption for c in made.clips] == ["", "a red fox", "", ""]
    assert [c.name for c in made.clips] == [f"video_latents/{i}.pt" for i in range(4)]
    raw = recipe(CASES[1], checkpoint, tmp_path / "run", str(source), sample__prompts=[])
    assert built(raw).prompts.texts == ["a red fox"]


def test_clips_beside_their_latents_are_not_encoded_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A Mochi folder after `embed`, and the output of CogVideoX's precompute, hold the clips too."""
    family = families.get("cogvideox")(config.build(recipe(CASES[1], checkpoint, tmp_path, "x")).model)
    source = write(tmp_path / "cog", CASES[1], 3)
    clips(source / "videos", CASES[1], family.fps)
    for file in (source / "videos").glob("*.txt"):
        file.write_text('{"prompt": "x"}', "utf-8")
    (source / "images").mkdir()
    (source / "images/0.png").write_bytes(b"png")
    (source / "prompts.txt").write_text("a\nb\nc\n", "utf-8")
    (source / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\nvideos/2.mp4\n", "utf-8")
    (source / "data.jsonl").write_text("{}\n", "utf-8")
    assert plan(CASES[1], checkpoint, str(source)).sources[0].layout == "encoded"
    lines = plan(CASES[1], checkpoint, {"path": str(source), "layout": "lines"})
    assert [w.clip.kind for w in lines.train] == ["video"] * 2
    mixed = write(tmp_path / "mochi", CASES[0], 2)
    clips(tmp_path / "more", CASES[0], 30)
    for i in range(3):
        for end in ("mp4", "txt"):
            (tmp_path / f"more/{i}.{end}").rename(mixed / f"deep/{i}.{end}")
    unclear = plan(CASES[0], checkpoint, str(mixed)).problems
    options = "2 clips of precomputed latents, NAME.latent.pt + NAME.embed.pt; 3 clips"
    assert f"is ambiguous: it contains {options}" in str(unclear)
    named = plan(CASES[0], checkpoint, {"path": str(mixed), "layout": "encoded"})
    assert [c.caption for c in named.clips] == ["clip number 0", "clip number 1"]


def test_new_writes_a_recipe_for_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "encoded", CASES[1], 6)
    out = tmp_path / "r.yaml"
    done = inlaid("new", "cogvideox", source, "--checkpoint", checkpoint(*CASES[1]), "-o", out)
    assert done.code == 0, done.said
    assert "6 clips in encoded layout" in out.read_text("utf-8")
    assert inlaid("check", out, f"run={tmp_path / 'run'}").code == 0


def test_items_are_whole_after_a_full_disk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(CASES[1], checkpoint, tmp_path / "run", str(write(tmp_path / "encoded", CASES[1])))
    real, written = cache.save_file, []

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        real(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", full)
        with pytest.raises(ValueError, match="the disk is full; 2 of 4 items are cached and stay"):
            built(raw)
    assert built(raw).built.made == 2
