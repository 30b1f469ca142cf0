"""Encoded clips of joint transparency: pairs in two folders, or both clips joined in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.data import precomputed
from inlaid.data.plan import plan_dataset
from inlaid.media.kinds import MediaError
from inlaid.tiny.random import TEXT_WIDTH
from support.precomputed import CASES, Checkpoint, built, cogvideox, mochi, recipe, shape

PAIRS = CASES[:2]
both = pytest.mark.parametrize("kind", PAIRS, ids="-".join)


def moments(kind: tuple[str, str], seed: int) -> Tensor:
    frames, height, width = shape(kind)
    channels, stride = (24, 6) if kind[0] == "mochi" else (32, 4)
    size = (channels, 1 + (frames - 1) // stride, height // 8, width // 8)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, kind: tuple[str, str], joined: bool, n: int = 3) -> list[tuple[Tensor, Tensor]]:
    out = []
    for i in range(n):
        clips = moments(kind, i), moments(kind, 100 + i)
        text = torch.randn(226 if kind[0] == "cogvideox" else 5, TEXT_WIDTH)
        put = cogvideox if kind[0] == "cogvideox" else mochi
        if joined:
            put(folder, str(i), torch.cat(clips, 1), text)
        elif kind[0] == "mochi":
            mochi(folder / "rgb", str(i), clips[0], text, genmo=i == 1)
            mochi(folder / "alpha", str(i), clips[1], text)
        else:
            cogvideox(folder, str(i), clips[0], text)
            (folder / "alpha_latents").mkdir(exist_ok=True)
            torch.save(clips[1], folder / f"alpha_latents/{i}.pt")
        out.append(clips)
    return out


def settings(kind: tuple[str, str], checkpoint: Checkpoint, run: Path, source: Path) -> dict[str, Any]:
    raw = recipe(kind, checkpoint, run, str(source), data__validation=0)
    return {**raw, "alpha": {"kind": "joint"}}


@both
@pytest.mark.parametrize("joined", [False, True], ids=["pairs", "joined"])
def test_both_clips_are_read(
    kind: tuple[str, str], joined: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    clips = write(tmp_path / "clips", kind, joined)
    made = built(settings(kind, checkpoint, tmp_path / "run", tmp_path / "clips"))
    assert (
        made.plan.sources[0].layout == "precomputed"
        and [w.extent for w in made.plan.train] == [shape(kind)] * 3
    )
    family = build_family(config.build(settings(kind, checkpoint, tmp_path / "run", tmp_path)))
    for name, wanted in zip(made.media, clips, strict=True):
        item = made.store.read("media", name)
        assert {k: tuple(v.shape) for k, v in item.items()} == family.stored(*shape(kind))
        pairs = zip((item["moments"], item["alpha_moments"]), wanted, strict=True)
        assert all(torch.equal(a, b.half()) for a, b in pairs)
        assert family.sample_item(item, torch.Generator())["latents"].shape[1] == 2 * wanted[0].shape[1]


def problems(kind: tuple[str, str], checkpoint: Checkpoint, source: Path) -> str:
    raw = config.build(settings(kind, checkpoint, Path("run"), source))
    family = build_family(raw)
    return str(plan_dataset(raw.data, family.grid, family.fps, 0, family=family).problems)


def alpha_of(folder: Path, kind: tuple[str, str], name: str) -> Path:
    return folder / (f"alpha/{name}.latent.pt" if kind[0] == "mochi" else f"alpha_latents/{name}.pt")


@both
def test_a_missing_half(kind: tuple[str, str], checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path, kind, joined=False)
    missing = alpha_of(tmp_path, kind, "1")
    missing.unlink()
    assert f"{missing.relative_to(tmp_path)} is missing" in problems(kind, checkpoint, tmp_path)


@both
def test_alpha_of_another_clip(kind: tuple[str, str], checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path, kind, joined=False)
    wide = torch.cat([moments(kind, 5)] * 2, 3)
    torch.save({"ldist": wide[None]} if kind[0] == "mochi" else wide, alpha_of(tmp_path, kind, "2"))
    message = problems(kind, checkpoint, tmp_path)
    assert "the color latents are" in message and "2." in message


def test_one_clip_is_not_two(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kind = PAIRS[1]
    path = tmp_path / "video_latents/0.pt"
    path.parent.mkdir()
    torch.save(moments(kind, 0), path)
    family = build_family(config.build(settings(kind, checkpoint, tmp_path / "run", tmp_path)))
    with pytest.raises(MediaError, match="has 3 latent frames: color and alpha"):
        precomputed.read_item(family, [path])
