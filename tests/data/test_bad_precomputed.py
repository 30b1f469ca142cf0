"""Whatever is wrong with encoded clips ends in one message that names the file; exit code 2, no item made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid.tiny.random import TEXT_WIDTH
from support.commands import inlaid
from support.precomputed import CASES, Checkpoint, clips, recipe, write
from support.slow import mostly_slow

MOCHI, COG, I2V, PAIRS = CASES


class Harmful:
    """What a file of unknown origin may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


Spoil = Callable[[Path], Any]


def save(name: str, content: Any) -> Spoil:
    """Puts something else into a file."""
    return lambda folder: torch.save(content, folder / name)


def cut(name: str, keep: float) -> Spoil:
    """Cuts off a file's end."""

    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * keep)])

    return change


def text(name: str, content: bytes) -> Spoil:
    """Writes a file that torch did not."""
    return lambda folder: (folder / name).write_bytes(content)


def empty(folder: Path) -> None:
    """Takes everything away."""
    for file in [*folder.rglob("*.pt")]:
        file.unlink()


def outside(folder: Path) -> None:
    """A link to what lies elsewhere."""
    (folder / "deep/0.embed.pt").rename(folder.parent / "elsewhere.pt")
    (folder / "deep/0.embed.pt").symlink_to(folder.parent / "elsewhere.pt")


LATENT, EMBED, VIDEO, PROMPT = (
    "deep/0.latent.pt",
    "deep/0.embed.pt",
    "video_latents/0.pt",
    "prompt_embeds/0.pt",
)
W = TEXT_WIDTH
MASK = torch.ones(1, 256, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """How encoded clips are spoiled, and what must be reported."""

    kind: tuple[str, str]
    spoil: Spoil
    words: tuple[str, ...]


CASES_: dict[str, Case] = {
    "no text": Case(
        MOCHI, lambda f: (f / EMBED).unlink(), ("1 of 4 clips is incomplete", EMBED, "is missing")
    ),
    "no latents": Case(
        MOCHI, lambda f: (f / LATENT).unlink(), ("is incomplete", EMBED, f"{LATENT} is missing")
    ),
    "no text of CogVideoX": Case(
        COG, lambda f: (f / PROMPT).unlink(), ("is incomplete", f"{PROMPT} is missing")
    ),
    "no image": Case(
        I2V, lambda f: (f / "image_latents/0.pt").unlink(), ("is incomplete", "image_latents/0.pt is missing")
    ),
    "image of another size": Case(
        I2V,
        save("image_latents/0.pt", torch.zeros(32, 1, 2, 4)),
        ("latents are 32 x 1 x 2 x 4, but one frame of the clip is 32 x 1 x 4 x 4", "does not fit"),
    ),
    "clip of another size than the positions": Case(
        I2V, save(VIDEO, torch.zeros(32, 3, 4, 8)), ("0.pt", "does not fit the checkpoint")
    ),
    "channels of another VAE": Case(
        MOCHI,
        save(LATENT, {"ldist": torch.zeros(1, 32, 2, 4, 6)}),
        (LATENT, "latents are 32 x 2 x 4 x 6, the checkpoint needs 24 channels"),
    ),
    "latents that are no moments": Case(
        COG,
        save(VIDEO, torch.zeros(16, 3, 4, 8)),
        ("latents are 16 x 3 x 4 x 8, the checkpoint needs 32 channels",),
    ),
    "frames before channels": Case(
        COG, save(VIDEO, torch.zeros(3, 32, 4, 8)), ("latents are 3 x 32 x 4 x 8",)
    ),
    "means and variances that differ": Case(
        MOCHI,
        save(LATENT, {"mean": torch.zeros(1, 12, 2, 4, 6), "logvar": torch.zeros(1, 12, 3, 4, 6)}),
        ("means are 12 x 2 x 4 x 6, but variances 12 x 3 x 4 x 6",),
    ),
    "an odd number of latent frames in 1.5": Case(
        PAIRS,
        save(VIDEO, torch.zeros(32, 3, 4, 8)),
        ("no clip has 3 latent frames: clip lengths are 8n+5", "does not fit the checkpoint"),
    ),
    "a size off the grid": Case(
        MOCHI,
        save(LATENT, {"ldist": torch.zeros(1, 24, 2, 5, 6)}),
        ("40x48 is not a multiple of 16", "does not fit the checkpoint"),
    ),
    "text of another width": Case(
        MOCHI,
        save(EMBED, {"prompt_embeds": torch.zeros(1, 256, 64), "prompt_attention_mask": MASK}),
        (
            LATENT,
            "text embedding is 256 x 64, the checkpoint accepts at most 256 x 32",
            "does not fit the checkpoint",
        ),
    ),
    "text that is too long": Case(
        COG,
        save(PROMPT, torch.zeros(300, W)),
        ("text embedding is 300 x 32, the checkpoint accepts at most 226 x 32",),
    ),
    "text without its padding": Case(
        COG, save(PROMPT, torch.zeros(20, W)), ("text embedding has 20 of 226 tokens and no mask",)
    ),
    "a mask of another length": Case(
        MOCHI,
        save(EMBED, {"prompt_embeds": torch.zeros(1, 256, W), "prompt_attention_mask": MASK[:, :9]}),
        ("mask has 9 entries for 256 tokens",),
    ),
    "other names": Case(
        MOCHI,
        save(LATENT, {"z": torch.zeros(1), "fps": torch.zeros(1)}),
        (LATENT, "is not latents: it contains z, fps, expected ldist or mean + logvar", "cannot be read"),
    ),
    "text in place of latents": Case(
        MOCHI,
        save(LATENT, {"y_feat": [torch.zeros(1, 256, W)], "y_mask": [MASK]}),
        ("is not latents: it contains y_feat, y_mask",),
    ),
    "a list": Case(COG, save(VIDEO, [1, 2]), ("is not latents: it contains a list, not tensors",)),
    "strings": Case(MOCHI, save(LATENT, {"ldist": "x"}), ("is not latents: it contains ldist",)),
    "a pickle that runs code": Case(
        MOCHI, save(LATENT, {"ldist": Harmful()}), (LATENT, "a pickle that calls", "not loaded")
    ),
    "an old pickle that runs code": Case(
        COG, text(VIDEO, pickle.dumps(Harmful())), ("a pickle that", "not loaded")
    ),
    "cut off": Case(MOCHI, cut(LATENT, 0.5), ("is truncated", LATENT)),
    "cut off text": Case(COG, cut(PROMPT, 0.9), ("is truncated",)),
    "an empty file": Case(COG, cut(VIDEO, 0), ("the file is empty", VIDEO)),
    "no tensors at all": Case(COG, text(VIDEO, b"<html>not found</html>"), (VIDEO, "cannot be read")),
    "all gone": Case(MOCHI, empty, ("contains no clips",)),
    "a link that leads away": Case(MOCHI, outside, ("is outside of its source", LATENT)),
}


OFTEN = [name for i, name in enumerate(CASES_) if i % 3 == 1 and name not in ("strings", "cut off")]


@pytest.mark.parametrize("case", mostly_slow(CASES_, OFTEN.__contains__))
def test_encoded_clip(
    case: str, checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    bad = CASES_[case]
    source = write(tmp_path / "precomputed", bad.kind)
    bad.spoil(source)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe(bad.kind, checkpoint, tmp_path / "run", str(source))), "utf-8")
    for command in ("check", "cache"):
        done = inlaid(command, path)
        assert done.code == 2 and "Traceback" not in done.output, done.output
        for word in bad.words:
            assert word in done.output, f"`{word}` is missing in: {done.output}"
    assert done.output.count("error: ") == 1
    assert not list((tmp_path / "run").rglob("*.safetensors")) and "harm" not in capfd.readouterr().out


def message(raw: dict, path: Path) -> str:
    """What `inlaid cache` says of a recipe that cannot work."""
    path.write_text(json.dumps(raw), "utf-8")
    done = inlaid("cache", path)
    assert done.code == 2 and "Traceback" not in done.output, done.output
    return done.output


def test_a_family_that_reads_none(tiny_wan: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "precomputed", MOCHI)
    raw = recipe(MOCHI, checkpoint, tmp_path / "run", str(source))
    raw["model"] = {"family": "wan", "checkpoint": str(tiny_wan)}
    raw["data"]["frames"] = 9
    assert "contains no clips" in (found := message(raw, tmp_path / "r.yaml"))
    assert "it contains 8 .pt files, but this model does not read any" in found
    raw["data"]["sources"] = {"path": str(source), "layout": "precomputed"}
    assert "contains no precomputed latents; this model does not read any" in message(
        raw, tmp_path / "r.yaml"
    )


def test_the_layout_of_another_family(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(write(tmp_path / "precomputed", COG))
    found = message(recipe(MOCHI, checkpoint, tmp_path / "run", source), tmp_path / "r.yaml")
    assert "it contains 8 .pt files, but this model reads NAME.latent.pt + NAME.embed.pt" in found


def test_a_root_of_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = {"path": str(write(tmp_path / "precomputed", COG)), "root": str(tmp_path)}
    found = message(recipe(COG, checkpoint, tmp_path / "run", source), tmp_path / "r.yaml")
    assert "`root` is only for manifests: remove it" in found


def test_samples_without_prompts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(write(tmp_path / "precomputed", COG))
    raw = recipe(COG, checkpoint, tmp_path / "run", source, sample__prompts=[], sample__every=2)
    assert "sample.every: precomputed latents provide no prompts" in message(raw, tmp_path / "r.yaml")


def test_numbers_that_are_not_finite(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "precomputed", COG)
    raw = recipe(COG, checkpoint, tmp_path / "run", str(source))
    torch.save(torch.full((32, 3, 4, 8), float("nan")), source / VIDEO)
    assert "0.pt: NaN or infinite values in moments" in message(raw, tmp_path / "r.yaml")
    torch.save(torch.zeros(32, 3, 4, 8), source / VIDEO)
    torch.save(torch.full((226, W), float("inf")), source / PROMPT)
    assert f"{PROMPT}: contains NaN or infinite values" in message(raw, tmp_path / "r.yaml")


def test_a_trigger_that_comes_too_late(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    source = str(write(tmp_path / "precomputed", COG))
    path.write_text(
        json.dumps(recipe(COG, checkpoint, tmp_path / "run", source, data__trigger="zorble")), "utf-8"
    )
    done = inlaid("check", path)
    assert done.code == 0
    assert "4 of 4 clips have precomputed text embeddings" in done.output and "data.trigger" in done.output


def test_bad_ones_are_left_out_when_asked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = write(tmp_path / "precomputed", MOCHI)
    cut(LATENT, 0.5)(source)
    path = tmp_path / "r.yaml"
    raw = recipe(MOCHI, checkpoint, tmp_path / "run", str(source), data__bad_clips="quarantine")
    path.write_text(json.dumps(raw), "utf-8")
    assert inlaid("cache", path).code == 0
    listed = json.loads((tmp_path / "run/quarantine.json").read_text("utf-8"))
    assert listed == {LATENT: "truncated: is truncated"}


# --- the text files of legacy scripts -----------------------------------------------------------------------


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A `--data_root` with two clips."""
    return clips(tmp_path / "root", COG, 8, 2)


LINES: dict[str, tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "other names": (
        {"prompt.txt": "a\nb\n", "list.txt": "0.mp4\n1.mp4\n"},
        {},
        ("contains no prompts.txt and videos.txt; set `caption_column` and `video_column`",),
    ),
    "a file that is not there": (
        {"prompts.txt": "a\nb\n", "videos.txt": "0.mp4\n1.mp4\n"},
        {"caption_column": "caption.txt"},
        ("set `caption_column` and `video_column` for other file names",),
    ),
    "two that could be meant": (
        {"prompts.txt": "a\nb\n", "captions.txt": "a\nb\n", "videos.txt": "0.mp4\n1.mp4\n"},
        {},
        ("contains prompts.txt and captions.txt; set `caption_column` to one of these files",),
    ),
    "counts that differ": (
        {"prompts.txt": "a\n\nb\nc\n", "videos.txt": "0.mp4\n1.mp4\n"},
        {},
        ("prompts.txt has 3 lines and videos.txt has 2",),
    ),
    "a path that leads away": (
        {"prompts.txt": "a\nb\n", "videos.txt": "0.mp4\n../1.mp4\n"},
        {},
        ("is outside of its source (../1.mp4: line 2)",),
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_text_files(case: str, legacy: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    texts, keys, words = LINES[case]
    for name, content in texts.items():
        (legacy / name).write_text(content, "utf-8")
    source = {"path": str(legacy), "layout": "lines", **keys}
    found = message(recipe(COG, checkpoint, tmp_path / "run", source), tmp_path / "r.yaml")
    for word in words:
        assert word in found, found
