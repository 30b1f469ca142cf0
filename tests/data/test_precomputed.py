"""Clips that another trainer has encoded: the same items as from the clips themselves, without an encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid import config, families
from inlaid.data import cache
from inlaid.data.plan import Plan, plan_dataset
from inlaid.runs.folder import Run, read_metrics
from inlaid.tiny.random import TEXT_WIDTH
from support.checkpoints import load_state
from support.commands import inlaid
from support.precomputed import CASES, Checkpoint, built, clips, encode, recipe, shape, write
from support.slow import mostly_slow, slow


@pytest.fixture
def no_vae(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function after whose call the family loads no VAE to encode with."""

    def forbid(family: str) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("an encoder was loaded")

        monkeypatch.setattr(families.get(family), "load_media_encoder", refuse)

    return forbid


@pytest.mark.parametrize(
    ("kind", "genmo"),
    [(CASES[0], False), slow(CASES[1], False), (CASES[2], False), slow(CASES[3], False), (CASES[0], True)],
)
def test_the_same_items_as_from_the_clips(
    kind: tuple[str, str],
    genmo: bool,
    checkpoint: Checkpoint,
    tmp_path: Path,
    no_vae: Callable[[str], None],
) -> None:
    family = families.get(kind[0])(config.build(recipe(kind, checkpoint, tmp_path, "x")).model)
    source = clips(tmp_path / "clips", kind, family.fps)
    raw = recipe(kind, checkpoint, tmp_path / "a", str(source), data__validation=0)
    first = built(raw)
    items = encode(raw, first, tmp_path / "precomputed", genmo)
    no_vae(kind[0])
    again = built(recipe(kind, checkpoint, tmp_path / "b", str(tmp_path / "precomputed"), data__validation=0))
    assert again.plan.sources[0].layout == "precomputed"
    assert [w.extent for w in again.plan.train] == [shape(kind)] * 3
    assert (again.built.made, again.built.reused) == (3, 0)
    for i in range(3):
        got = again.store.read("media", again.media[i])
        wanted = {k: v if k == "moments" else v[:1].expand_as(v) for k, v in items[i].items()}
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
        texts = [c.store.read("text", c.text[i])["text"] for c in (first, again)]
        assert torch.equal(*texts)
    once_more = built(
        recipe(kind, checkpoint, tmp_path / "b", str(tmp_path / "precomputed"), data__validation=0)
    )
    assert (once_more.built.made, once_more.built.reused) == (0, 3)


@pytest.fixture(params=mostly_slow(CASES[:3], CASES[2].__eq__), ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[tuple[str, str], Path]:
    """Encoded clips of random numbers in two sizes."""
    kind = request.param
    write(tmp_path / "precomputed", kind)
    return kind, tmp_path / "precomputed"


def test_the_whole_job(folder: tuple, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Check, train, resume to the same bits, draw and evaluate."""
    kind, source = folder
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe(kind, checkpoint, tmp_path / "run", str(source))), "utf-8")
    done = inlaid("check", path)
    assert done.code == 0, done.output
    assert "is read as precomputed: 4 clips of precomputed latents," in done.output
    assert "4 windows are precomputed latents: their size" in done.output
    assert not (tmp_path / "run/check/contact_sheet.png").exists()
    report = json.loads((tmp_path / "run/check/report.json").read_text("utf-8"))
    assert report["clips"] == 4 and report["contact_sheet"] is None
    assert sum(b["train"] + b["validation"] for b in report["buckets"]) == 4
    assert len(report["buckets"]) == (1 if kind[1] == "i2v" else 2)
    run = Run(tmp_path / "run")
    assert inlaid("train", path).code == 0
    wanted, _ = load_state(run.checkpoint("4"))
    shutil.rmtree(run.checkpoint("4"))
    assert inlaid("train", path).code == 0
    got, _ = load_state(run.checkpoint("4"))
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
    lines = read_metrics(run.metrics)
    assert [x["step"] for x in lines if "validation_loss" in x] == [2, 4]
    done = inlaid("evaluate", run.folder)
    assert done.code == 0, done.output
    assert "cannot be used" not in done.output and "could not be read" not in done.output


def test_encoded_clips_are_mixed_with_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kind = CASES[1]
    family = families.get(kind[0])(config.build(recipe(kind, checkpoint, tmp_path, "x")).model)
    sources = [
        {"path": str(write(tmp_path / "precomputed", kind))},
        {"path": str(clips(tmp_path / "clips", kind, family.fps)), "weight": 0.5},
    ]
    made = built(recipe(kind, checkpoint, tmp_path / "run", sources))
    assert [s.layout for s in made.plan.sources] == ["precomputed", "folder"]
    assert len(made.plan.train) == 6 and made.built.made == 7


def test_text_that_changes_is_another_item(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kind = CASES[1]
    raw = recipe(kind, checkpoint, tmp_path / "run", str(write(tmp_path / "precomputed", kind)))
    first = built(raw)
    torch.save(torch.zeros(226, TEXT_WIDTH), tmp_path / "precomputed/prompt_embeds/0.pt")
    second = built(raw)
    assert second.built.made == 0
    assert len(set(second.text + second.validation_text) - set(first.text + first.validation_text)) == 1


def plan(kind: tuple[str, str], checkpoint: Checkpoint, source: Any, **changes: Any) -> Plan:
    """What would be seen of a source."""
    settings = config.build(recipe(kind, checkpoint, Path("run"), source, **changes))
    family = families.get(kind[0])(settings.model)
    return plan_dataset(settings.data, family.grid, family.fps, 0, family=family)


def test_captions_are_names_for_prompts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "precomputed", CASES[1])
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
    assert plan(CASES[1], checkpoint, str(source)).sources[0].layout == "precomputed"
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
    named = plan(CASES[0], checkpoint, {"path": str(mixed), "layout": "precomputed"})
    assert [c.caption for c in named.clips] == ["clip number 0", "clip number 1"]


def test_new_writes_a_recipe_for_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "precomputed", CASES[1], 6)
    out = tmp_path / "r.yaml"
    done = inlaid("new", "cogvideox", source, "--checkpoint", checkpoint(*CASES[1]), "-o", out)
    assert done.code == 0, done.output
    assert "6 clips in precomputed layout" in out.read_text("utf-8")
    assert inlaid("check", out, f"run={tmp_path / 'run'}").code == 0


def test_items_are_whole_after_a_full_disk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(CASES[1], checkpoint, tmp_path / "run", str(write(tmp_path / "precomputed", CASES[1])))
    real, written = cache.save_file, []

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        real(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", full)
        with pytest.raises(ValueError, match=r"the disk is full \(No space.*\); 2 of 4 items are cached"):
            built(raw)
    assert built(raw).built.made == 2
