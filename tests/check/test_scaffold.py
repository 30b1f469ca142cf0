"""`inlaid new` recognizes clips with alpha, sequences and pairs, and writes a recipe that `check` accepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from inlaid import config
from inlaid.check import transparency
from inlaid.check.check import check_recipe
from inlaid.check.scaffold import new_recipe
from inlaid.media import rgba
from support import rgba_clips as make
from support.commands import inlaid
from support.slow import slow

SIZE = (32, 32)


def captioned(path: Path) -> None:
    (path.parent / f"{path.name.partition('.')[0]}.txt").write_text(f"about {path.stem}", "utf-8")


def movs(folder: Path, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        captioned(rgba.write_rgba(folder / f"m{i}.mov", make.clip(i, 18, SIZE), 24))
    return folder


def sequences(folder: Path, n: int) -> Path:
    for i in range(n):
        make.images(folder / f"s{i}", make.clip(i, 18, SIZE))
        captioned(folder / f"s{i}")
    return folder


def arrays(folder: Path, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        np.savez(folder / f"z{i}.npz", frames=make.clip(i, 12, SIZE), fps=np.float32(16))
        captioned(folder / f"z{i}.npz")
    return folder


def flat(folder: Path, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        for k, pixels in enumerate(make.clip(i, 12, SIZE)):
            Image.fromarray(pixels).save(folder / f"flat{i}.{1001 + k}.png")
        captioned(folder / f"flat{i}.png")
    return folder


def pairs(folder: Path, n: int) -> Path:
    for i in range(n):
        make.pair(folder, f"p{i}", make.clip(i, 12, SIZE))
    return folder


def table(folder: Path, n: int) -> Path:
    pairs(folder, n)
    rows = [f"p{i}_rgb.mkv,p{i}_alpha.mkv,caption {i}" for i in range(n)]
    (folder / "metadata.csv").write_text("\n".join(["video_rgb,video_alpha,prompt", *rows]), "utf-8")
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder / "metadata.csv"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "material", [slow(movs), slow(sequences), slow(flat), slow(pairs), slow(arrays), table]
)
def test_material_with_alpha_gives_a_transparent_recipe_that_check_accepts(
    material: Callable[[Path, int], Path], tiny_wan: Path, tmp_path: Path, capsys: Any
) -> None:
    data = material(tmp_path / "data", 2)
    made = new_recipe("wan", data, tmp_path / "r.yaml", str(tiny_wan))
    recipe = read(made)
    assert recipe["alpha"] == {"kind": "joint"} and recipe["tuner"]["kind"] == "lora"
    assert "2 clips in" in made.read_text("utf-8") and "2 with alpha" in made.read_text("utf-8")
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 of 2 clips have alpha: the recipe trains joint alpha" in printed
    assert f"merged: {transparency.CAN['merged']}" in printed
    assert f"get its RGBA VAE first: {transparency.import_command(str(tiny_wan))}" in printed
    assert "inlaid import htdong/Wan-Alpha-VAE/Wan-Alpha-VAE.bin rgba_vae --checkpoint" in printed
    report = check_recipe(config.load(made, [f"run={tmp_path / 'run'}"]))
    assert report.ok and report.clips == 2 and report.sources[0].usable == 2


def test_a_folder_of_an_effects_artist(tiny_wan: Path, tmp_path: Path) -> None:
    """ProRes, sequences in folders and side by side, one without a caption, as make_shots.py writes them."""
    shots = flat(sequences(movs(tmp_path / "shots", 3), 2), 2)
    (shots / "m1.txt").unlink()
    made = new_recipe("wan", shots, tmp_path / "r.yaml", str(tiny_wan))
    recipe = read(made)
    assert recipe["data"]["sources"] == {"path": str(shots), "fps": 24}, (
        "sequences run at the rate of the videos"
    )
    assert recipe["data"]["frames"] == [5, 9], "of 18 and 12 frames at 24 fps, sampled at 16"
    report = check_recipe(config.load(made, [f"run={tmp_path / 'run'}"]))
    errors = [(p.code, p.name) for p in report.problems if p.severity == "error"]
    assert errors == [("no-caption", "m1.mov")] and report.clips == 7
    assert not report.mistakes and not any("store no frame rate" in n for n in report.notes)
    report = check_recipe(config.load(made, [f"run={tmp_path / 'run'}", f"data.sources={shots}"]))
    note = next(n for n in report.notes if "store no frame rate" in n)
    assert (
        note.startswith("4 of 7 clips store no frame rate (flat0.####.png)") and "is used at 16 fps" in note
    )


def test_clips_without_alpha_in_a_transparent_recipe_are_reported(
    make_clips: Any, tiny_wan: Path, tmp_path: Path, capsys: Any
) -> None:
    new_recipe("wan", movs(make_clips(1), 2), tmp_path / "r.yaml", str(tiny_wan))
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        "2 of 3 clips have alpha" in printed
        and "note: 1 of 3 clips have no alpha, which is an error" in printed
    )


def test_opaque_clips_give_an_opaque_recipe(make_clips: Any, tiny_wan: Path, tmp_path: Path) -> None:
    text = new_recipe("wan", make_clips(2), tmp_path / "r.yaml", str(tiny_wan)).read_text("utf-8")
    assert "alpha" not in text


def test_few_clips_with_alpha_stay_opaque_and_are_reported(
    make_clips: Any, tiny_wan: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = movs(make_clips(2), 1)
    made = new_recipe("wan", folder, tmp_path / "r.yaml", str(tiny_wan))
    assert "alpha" not in read(made) and "1 of 3 clips have alpha" in made.read_text("utf-8")
    assert "1 of 3 clips has alpha, and this run is opaque" in capsys.readouterr().err
    with pytest.raises(ValueError, match="most clips have no alpha"):
        new_recipe("wan", folder, tmp_path / "s.yaml", str(tiny_wan), "joint")


def test_opaque_alpha_channels_are_not_transparent(tiny_wan: Path, tmp_path: Path) -> None:
    solid = np.concatenate([make.clip(0, 9, SIZE)[..., :3], np.full((9, *SIZE, 1), 255, np.uint8)], -1)
    (tmp_path / "d").mkdir()
    captioned(make.video(tmp_path / "d/a.mov", solid, 16, "png", "rgba"))
    assert "alpha" not in read(new_recipe("wan", tmp_path / "d", tmp_path / "r.yaml", str(tiny_wan)))


def test_the_kind_of_alpha_can_be_chosen(tiny_wan: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = movs(tmp_path / "data", 2)
    made = new_recipe("wan", data, Path("m.yaml"), str(tiny_wan), "merged")
    assert (
        read(made)["alpha"] == {"kind": "merged", "vae": "rgba_vae"} and read(made)["tuner"]["kind"] == "dora"
    )
    assert "alpha" not in read(new_recipe("wan", data, Path("o.yaml"), str(tiny_wan), "opaque"))
    from inlaid import tiny

    shutil.copytree(tiny.rgba_vae_path("wan"), "rgba_vae")
    auto = new_recipe("wan", data, Path("a.yaml"), str(tiny_wan))
    assert read(auto)["alpha"] == {"kind": "merged", "vae": "rgba_vae"}, "the RGBA VAE is there now"
    done = inlaid("new", "wan", data, "--alpha", "both")
    assert done.code == 2 and "--alpha: `both` is not one of auto, opaque, joint, merged" in done.output


def test_the_shipped_model_gets_the_shipped_rgba_vae(tmp_path: Path) -> None:
    made = new_recipe("wan", movs(tmp_path / "data", 1), tmp_path / "r.yaml", "tiny:wan")
    assert read(made)["alpha"] == {"kind": "merged", "vae": "tiny:wan"}


def test_checkpoints_without_alpha_say_why(tmp_path: Path, capsys: Any) -> None:
    data = movs(tmp_path / "data", 1)
    i2v = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    made = new_recipe("wan", data, tmp_path / "r.yaml", i2v)
    printed = " ".join(capsys.readouterr().err.split())
    assert "alpha" not in read(made) and "this checkpoint does not support alpha" in printed
    assert "conditioned on images" in printed
    with pytest.raises(ValueError, match="conditioned on images"):
        new_recipe("wan", data, tmp_path / "s.yaml", i2v, "joint")


def test_two_experts_get_merged_alpha(tmp_path: Path) -> None:
    made = new_recipe("wan", movs(tmp_path / "d", 1), tmp_path / "r.yaml", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert read(made)["alpha"] == {"kind": "merged", "vae": "rgba_vae"}


def test_check_proposes_alpha_for_an_opaque_recipe(recipe: Any, tmp_path: Path) -> None:
    data = table(tmp_path / "pairs", 2)
    for source in (movs(tmp_path / "movs", 2), data):
        report = check_recipe(config.build(recipe(data__sources=str(source))))
        note = next(n for n in report.notes if "this run is opaque" in n)
        assert note.startswith("2 of 2 clips have alpha") and "alpha.kind=joint" in note
        assert "alpha.kind=merged alpha.vae=rgba_vae" in note and "inlaid import" in note
    assert json.loads(report.to_json())["ok"] is False, "no column of clips for an opaque run"
