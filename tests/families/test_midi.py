"""The family of scenes: what it reads of a checkpoint, what it shows the network, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support.commands import inlaid

trimesh = pytest.importorskip("trimesh")

from inlaid import config, families
from inlaid.check import estimate
from inlaid.data.modality import modality_of
from inlaid.data.plan import describe_plan
from inlaid.data.problems import Problem
from inlaid.media import meshes
from inlaid.media.isosurface import REACH
from inlaid.media.scene import (
    MAX_OBJECTS,
    GeneratedScene,
    SceneObject,
    SceneSample,
)
from inlaid.networks import midi_image_encoders
from inlaid.networks.midi_image_encoders import CLIP, DINO, Extractor
from inlaid.networks.triposg import TOKENS
from inlaid.training.loop import train

CPU = torch.device("cpu")


def family(checkpoint: object, **options: Any) -> Any:
    return families.get("midi")(config.Model(family="midi", checkpoint=str(checkpoint), options=options))


@pytest.fixture
def copy(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A checkpoint that may be spoiled."""
    import shutil

    return shutil.copytree(checkpoint("midi", "scene"), tmp_path / "copy")


@pytest.fixture
def scene_recipe(
    checkpoint: Callable[[str, str], Path], make_scenes: Callable[..., Path], encoded: Path, tmp_path: Path
) -> Callable[..., dict]:
    def make(**changes: object) -> dict:
        raw: dict = {
            "run": str(tmp_path / "run"),
            "model": {"family": "midi", "checkpoint": str(checkpoint("midi", "scene"))},
            "data": {"sources": str(tmp_path / "scenes"), "validation": 1, "cache": str(encoded)},
            "tuner": {"kind": "lora", "rank": 4},
            "optim": {"lr": 2e-2},
            "train": {"steps": 4, "save_every": 2, "log_every": 1, "validate_every": 4, "trackers": []},
            "sample": {"steps": 2, "grid": 16},
        }
        if not (tmp_path / "scenes").is_dir():
            make_scenes()
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw.get(section, {}), name: value} if name else value
        return raw

    return make


# --- checkpoints --------------------------------------------------------------------------------------------


def test_tensors_decide_where_a_config_lies_or_is_missing(copy: Path) -> None:
    path = copy / "transformer/config.json"
    true = family(copy)
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": 64, "num_layers": 9}), "utf-8")
    lied = family(copy)
    assert lied.transformer == true.transformer and "width 64 (it is 32)" in lied.config_notes[0]
    lied.load_denoiser(torch.float32)
    path.unlink()
    (copy / "vae/config.json").unlink()
    gone = family(copy)
    assert gone.transformer["width"] == 32 and gone.transformer["num_tokens"] == TOKENS
    gone.load_denoiser(torch.float32)


def test_the_scheduler_s_shift_is_read_and_reported_where_missing(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "scheduler/scheduler_config.json"
    path.write_text('{"shift": 3.5}', "utf-8")
    objective = family(copy).objective(config.Objective(), (1, 1))
    assert objective.s == 3.5 and family(copy).about()["inlaid_shift"] == "3.5"
    path.unlink()
    assert family(copy).shift() == 2.0


def test_dino_of_three_channels_is_widened_to_seven(
    copy: Path, checkpoint: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.rmtree(copy / "image_encoder_2")
    shutil.copytree(checkpoint("midi", "triposg") / "image_encoder_dinov2", copy / "image_encoder_2")
    plain = checkpoint("midi", "triposg")
    encoder, single = (family(c).conditioning.encoders["dino"] for c in (copy, plain))
    dino = midi_image_encoders.build(encoder, copy / "image_encoder_2", torch.float32)
    assert "untrained" in capsys.readouterr().err
    old = midi_image_encoders.build(single, copy / "image_encoder_2", torch.float32)
    wide, narrow = (d.embeddings.patch_embeddings.projection.weight for d in (dino, old))
    assert torch.equal(wide, torch.cat([narrow, narrow, narrow[:, :1]], 1))
    seen = family(copy).load_image_encoders(CPU)(np.zeros((20, 30, 3), np.uint8), [np.ones((20, 30), bool)])
    assert {k: tuple(v.shape) for k, v in seen.items()} == {"clip": (1, 1, 12), "dino": (1, 17, 24)}


def test_damaged_checkpoints_say_so(copy: Path) -> None:
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("norm_out.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as norm_out\.weight"):
        family(copy).load_denoiser(torch.float32)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a TripoSG or MIDI transformer"):
        family(copy)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        family(copy)


def test_extractors_do_what_transformers_do() -> None:
    from transformers import BitImageProcessorPil, CLIPImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 255, (70, 70, 3), dtype=np.uint8)
    message = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    for kind, ours in (
        (CLIPImageProcessorPil, CLIP),
        (BitImageProcessorPil, DINO),
    ):
        stock = kind(**message, image_mean=ours.mean, image_std=ours.std, do_convert_rgb=True)
        theirs = stock(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        own = Extractor.of({**message, "image_mean": ours.mean, "image_std": ours.std}, ours)
        assert (own.normalized(own.image(pixels)[None])[0] - theirs).abs().max() < 1e-5


def test_masks_are_sampled_as_torch_nearest_does() -> None:
    """With the pixel at the center of an output pixel, DINO tokens of published weights differ by 0.2."""
    mask = np.random.default_rng(0).random((100, 100)) > 0.5
    index = (np.arange(64) * 100) // 64
    own = Extractor(64, 64, DINO.mean, DINO.std).mask(mask)
    assert own.dtype == torch.uint8 and torch.equal(own[0] == 255, torch.from_numpy(mask[index][:, index]))
    large = np.zeros((768, 768), bool)
    large[100:301, 50:402] = True
    rows, columns = (np.flatnonzero(DINO.mask(large)[0].numpy().any(axis)) for axis in (1, 0))
    assert [rows[0], rows[-1], columns[0], columns[-1]] == [67, 200, 34, 267], "1.5 pixels each"


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 61), (61, 30), (5, 3)])
def test_an_object_is_cropped_with_a_margin(height: int, width: int) -> None:
    """TripoSG's program adds a tenth of the longer side on each side, and half of the difference."""
    image, mask = np.full((200, 300, 3), 90, np.uint8), np.zeros((200, 300), bool)
    mask[20 : 20 + height, 100 : 100 + width] = True
    shown = midi_image_encoders.object_crop(np.where(mask[..., None], image, np.uint8(255)), mask)
    longest = max(height, width)
    assert {*shown.shape[:2]} <= {n + d for n in [longest + 2 * int(0.1 * longest)] for d in (0, -1)}
    rows, columns = (np.flatnonzero((shown == 90).all(-1).any(axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (height, width) and (shown == 90).all(-1).sum() == height * width
    assert rows[0] == shown.shape[0] - 1 - rows[-1] and columns[0] == shown.shape[1] - 1 - columns[-1]


def test_triposg_sees_the_object_alone_and_midi_its_place(checkpoint: Callable[[str, str], Path]) -> None:
    image, mask = np.full((400, 400, 3), 200, np.uint8), np.zeros((400, 400), bool)
    mask[300:365, 20:85] = True
    image[mask] = 40
    shares, places = {}, {}
    for variant in ("triposg", "scene"):
        encoders = family(checkpoint("midi", variant)).conditioning.encoders
        pixels = midi_image_encoders.encoder_inputs(encoders, image, [mask])["dino"][0, :3]
        dark = (pixels < 128).all(0)
        shares[variant] = float(dark.float().mean())
        places[variant] = float(torch.nonzero(dark).float().mean(0)[0] / dark.shape[0])
    assert shares["scene"] == pytest.approx(0.026, abs=0.006)
    assert shares["triposg"] > 0.65, "extractor's center crop included"
    assert places["scene"] > 0.7 and places["triposg"] == pytest.approx(0.5, abs=0.05)


def test_nearly_square_images_keep_their_proportions() -> None:
    from transformers import BitImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 255, (91, 90, 3), dtype=np.uint8)
    message = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    stock = BitImageProcessorPil(**message, image_mean=DINO.mean, image_std=DINO.std, do_convert_rgb=True)
    theirs = stock(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    own = Extractor.of({**message, "image_mean": DINO.mean, "image_std": DINO.std}, DINO)
    assert (own.normalized(own.image(pixels)[None])[0] - theirs).abs().max() < 1e-5


# --- what the network is given ------------------------------------------------------------------------------


def batch(one: Any, scenes_: int = 2, n: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    drawn = {k: torch.randn(scenes_, *s, generator=random) for k, s in one.shapes(n).items()}
    return drawn.pop("latents"), drawn


@torch.no_grad()
def test_scenes_of_a_batch_do_not_see_each_other_but_their_objects_do(
    checkpoint: Callable[[str, str], Path],
) -> None:
    one = family(checkpoint("midi", "scene"))
    network = one.load_denoiser(torch.float32)
    x, cond = batch(one)
    t = torch.tensor([0.3, 0.8])
    both = one.predict(network, x, t, cond)
    first = one.predict(network, x[:1], t[:1], {k: v[:1] for k, v in cond.items()})
    assert (both[:1] - first).abs().max() < 1e-5
    order = [2, 0, 1]
    turned = one.predict(network, x[:, order], t, {k: v[:, order] for k, v in cond.items()})
    assert (turned - both[:, order]).abs().max() < 1e-5
    moved = x.clone()
    moved[0, 1] += 1
    change = (one.predict(network, moved, t, cond) - both).abs().amax((2, 3))
    assert change[0, 0] > 1e-6 and change[1].max() == 0
    alone = family(checkpoint("midi", "scene"), multi_instance="none")
    apart = alone.load_denoiser(torch.float32)
    change = alone.predict(apart, moved, t, cond) - alone.predict(apart, x, t, cond)
    assert change[0, 0].abs().max() == 0 and change[0, 1].abs().max() > 1e-3
    raw = network(x.flatten(0, 1), 1000 * t.repeat_interleave(3), *(v.flatten(0, 1) for v in cond.values()),
                  groups=[3, 3])  # fmt: skip
    assert torch.equal(raw.view_as(x), -both), "the network predicts data - noise"


def test_both_contexts_are_dropped_together_and_crowds_are_thinned(
    checkpoint: Callable[[str, str], Path],
) -> None:
    one = family(checkpoint("midi", "scene"), image_dropout=0.3)
    item = {k: torch.ones(s) for k, s in one.stored(9).items()}
    item["moments"] = torch.arange(9.0)[:, None, None].expand_as(item["moments"]).clone()
    item["moments"][..., 8:] = -30.0
    shown, sets = [], set()
    for seed in range(200):
        drawn = one.sample_item(item, torch.Generator().manual_seed(seed))
        kept = [bool(drawn[k].any()) for k in ("clip", "dino")]
        assert kept[0] == kept[1] and len(drawn["latents"]) == MAX_OBJECTS
        shown.append(kept[0])
        sets.add(tuple(drawn["latents"][:, 0, 0].round().int().tolist()))
    assert 0.6 < np.mean(shown) < 0.8 and len(sets) > 10
    assert all(list(s) == sorted(s) for s in sets)


def test_options_and_targets_that_change_the_function_are_reported(
    checkpoint: Callable[[str, str], Path], scene_recipe: Callable[..., dict]
) -> None:
    place = checkpoint("midi", "scene")
    assert family(place, multi_instance="0, 4").blocks == [0, 4]
    assert family(place, multi_instance="all").blocks == [0, 1, 2, 3, 4]
    assert family(place, multi_instance="blocks.1").blocks == [1], "not a prefix"
    assert family(place, multi_instance="blocks.3, 0,blocks.4.attn1").blocks == [0, 3, 4]
    assert family(place, multi_instance="blocks.2.attn1.processor").blocks == [2]
    with pytest.raises(ValueError, match=r"multi_instance: `blocks\.2\.attn2` is not one of"):
        family(place, multi_instance="blocks.2.attn2")
    with pytest.raises(ValueError, match="blocks 0 to 4"):
        family(place, multi_instance="3,9")
    with pytest.raises(ValueError, match="multi_instance: `8-12` is not one of"):
        family(place, multi_instance="8-12")
    notes = family(place, multi_instance="0").notes(config.build(scene_recipe()))
    assert "in blocks [0], pretrained in blocks [1, 2]" in notes[0]
    some = config.build(scene_recipe(tuner__targets=[r"blocks\.\d+\.attn1\.to_(q|v)"]))
    assert "only some projections of attn1" in family(place).notes(some)[0]
    assert family(place).notes(config.build(scene_recipe())) == []
    targets = family(place, ff=True, skip_linear=True).targets
    assert any("ff" in t for t in targets) and any("skip_linear" in t for t in targets)


def test_keys_of_videos_are_refused(scene_recipe: Callable[..., dict]) -> None:
    raw = scene_recipe(data__frames=[9], data__caption_dropout=0.1, sample__prompts=["a chair"])
    wrong = family(raw["model"]["checkpoint"]).problems(config.build(raw))
    assert [w.split(":")[0] for w in wrong] == ["data.frames", "data.caption_dropout", "sample.prompts"]


# --- from files to a scene ----------------------------------------------------------------------------------


def test_views_of_one_scene_are_validation_together(
    scene_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    import shutil

    raw = scene_recipe()
    for i in range(4):
        source = tmp_path / "scenes" / f"scene_{i:04d}"
        other = shutil.copytree(source, tmp_path / "scenes" / f"view_{i}")
        pixels = np.array(Image.open(other / "scene_rgb.png"))
        pixels[0, 0] = i
        Image.fromarray(pixels).save(other / "scene_rgb.png")
    settings = config.build(raw, ["data.validation=3"])
    plan = modality_of("scene").plan(settings, family(raw["model"]["checkpoint"]))
    held = {w.clip.name[-1] for w in plan.validation}
    assert len(plan.validation) == 4 and len(held) == 2, "whole pairs"
    assert not held & {w.clip.name[-1] for w in plan.train}
    assert {w.extent for w in plan.train} <= {(n, 32, 32) for n in (1, 2, 3)}


def test_objects_are_generated_in_the_published_order_with_their_names(tmp_path: Path) -> None:
    """The published program sorts objects by gray value, whatever their index or color."""
    ids = np.repeat(np.arange(5, dtype=np.uint8), 8)[:, None].repeat(40, 1)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([0, 0, 0, 255, 255, 255, 10, 10, 10, 0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "seg.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "scene_rgb.png")
    gray = {1: 255, 2: 10, 4: 150}
    assert all(palette.convert("L").getpixel((0, 8 * n)) == g for n, g in gray.items())
    pair = (str(tmp_path / "scene_rgb.png"), str(tmp_path / "seg.png"))
    one: Any = SimpleNamespace(images=("picture", "segmentation"))

    def objects() -> dict[int, str]:
        return dict(modality_of("scene").read(one, pair, config.Sample())[1].objects)

    assert list(objects().items()) == [(n, f"object_{n}") for n in (2, 4, 1, 3)], "black objects last"
    (tmp_path / "scene.json").write_text('{"names": {"1": "lamp", "4": "table"}}', "utf-8")
    assert list(objects().items()) == [(2, "object_2"), (4, "table"), (1, "lamp"), (3, "object_3")]
    Image.fromarray(np.array([[[0, 0, 0], [0, 0, 255], [90, 0, 0], [0, 60, 0]]], np.uint8)).save(pair[1])
    Image.new("RGB", (4, 1)).save(pair[0])
    assert list(objects()) == [3, 1, 2], "27, 29 and 35, in RGB order 60, 255 and 90"


def test_a_generated_scene_has_the_names_and_the_order_of_its_objects(
    checkpoint: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mesh of a name is the one of its mask, and the noise follows the order."""
    from inlaid.families import midi as module

    one = family(checkpoint("midi", "scene"))
    pipe = one.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(module, "make_meshes", lambda fields, *_: {n: f.tokens for n, f in fields.items()})
    ids = np.zeros((32, 32), np.uint8)
    ids[:16], ids[16:] = 1, 2
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)

    def made(objects: dict[int, str]) -> dict[str, torch.Tensor]:
        how = {"steps": 2, "guidance": 2.0, "generator": torch.Generator().manual_seed(0)}
        return one.sample(
            pipe,
            None,
            None,
            images=[image, ids],
            objects=objects,
            grid=16,
            triangles=None,
            texture=False,
            **how,
        )

    given, other = made({1: "sofa", 2: "lamp"}), made({2: "lamp", 1: "sofa"})
    assert list(given) == ["sofa", "lamp"] and list(other) == ["lamp", "sofa"]
    assert not torch.equal(given["sofa"], given["lamp"])
    assert not torch.equal(given["sofa"], other["sofa"]), "other noise"
    only = made({2: "lamp"})
    assert list(only) == ["lamp"]


def test_the_resolution_of_meshes_is_that_of_the_checkpoint(checkpoint: Callable[[str, str], Path]) -> None:
    for variant, cells in (("scene", 256), ("triposg", 512)):
        one = family(checkpoint("midi", variant))
        assert one.resolved(config.Sample()).grid == cells
        assert one.resolved(config.Sample(grid=64)).grid == 64


@pytest.mark.slow
def test_the_way_from_scenes_to_a_glb(
    scene_recipe: Callable[..., dict], tmp_path: Path, media_root: Path
) -> None:
    import yaml

    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(scene_recipe(sample__every=4)), "utf-8")
    checked = inlaid("check", recipe)
    assert checked.code == 0 and "ready to train" in checked.output and "objects" in checked.output
    assert (tmp_path / "run/check/contact_sheet.png").is_file()
    trained = inlaid("train", recipe)
    assert trained.code == 0 and "--image rgb.png --seg seg.png" in trained.output
    samples = tmp_path / "run/samples/step-000004"
    assert {p.suffix for p in samples.iterdir()} == {".glb", ".png", ".html", ".json"}
    header = json.loads(inlaid_header(tmp_path / "run/adapter"))
    assert header["inlaid_multi_instance_blocks"] == "1,2" and header["inlaid_shift"] == "2"
    out = tmp_path / "out/bed.glb"
    pair = ["--image", media_root / "scenes/bedroom_rgb.png", "--seg", media_root / "scenes/bedroom_seg.png"]
    done = inlaid("generate", tmp_path / "run", *pair, "--output", out, "--grid", 16, "--steps", 2)
    assert done.code == 0, done.output
    stated = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert stated["grid"] == 16 and stated["texture"] is False
    assert len(stated["objects"]) + sum("empty" in n for n in stated["notes"]) == 4
    if stated["objects"]:
        assert sorted(trimesh.load_scene(out).geometry) == sorted(stated["objects"])
    assert nodes(out) == [f"object_{n}" for n in (1, 2, 3, 4)], "also of what is empty"
    page = out.with_suffix(".html").read_text("utf-8")
    assert "src=" not in page and "http" not in page.replace("http-equiv", ""), "nothing from elsewhere"
    again = inlaid("generate", tmp_path / "run", *pair, "-o", tmp_path / "again", "--grid", 16, "--steps", 2)
    assert again.code == 0
    other = next((tmp_path / "again").glob("*.glb"))
    assert other.name == "00-bedroom-rgb-seed42.glb" and other.read_bytes() == out.read_bytes()
    report = inlaid("evaluate", tmp_path / "run")
    assert report.code == 0, report.output
    found = json.loads((tmp_path / "run/report/report.json").read_text("utf-8"))
    pair_ = found["pairs"][0]
    assert pair_["group"] == "validation scenes" and set(pair_["tuned"]["metrics"]) == set(metrics())
    assert set(pair_["tuned"]["parts"]) <= {"object_1", "object_2", "object_3"}
    assert "open 3D view" in (tmp_path / "run/report/report.html").read_text("utf-8")
    assert inlaid("export", tmp_path / "run", "--to", "merged").code == 0
    assert inlaid("inspect", tmp_path / "run").code == 0


@pytest.mark.slow
def test_names_go_from_a_mesh_file_through_training_to_the_generated_glb(
    scene_recipe: Callable[..., dict], tmp_path: Path
) -> None:
    """`import meshes`, `train` and `generate` keep them; colors of the image arrive with --texture."""
    parts = {
        "table": trimesh.creation.box((1.2, 0.6, 0.8)),
        "Stuhl <2>": trimesh.creation.box((0.4, 0.9, 0.4)).apply_translation((1.2, 0.1, 0.2)),
        "lamp": trimesh.creation.cylinder(0.2, 1.0).apply_translation((-1.1, 0.2, 0.3)),
    }
    (tmp_path / "rooms").mkdir()
    for i in range(3):
        meshes.write_scene(tmp_path / f"rooms/room_{i}.glb", parts)
    imported = inlaid("import", "meshes", tmp_path / "rooms", tmp_path / "scenes", "--views", 1, "--size", 64)
    assert imported.code == 0, imported.output
    run = train(config.build(scene_recipe(train={"steps": 1, "trackers": []})))
    folder = sorted((tmp_path / "scenes").iterdir())[0]
    ids = meshes.read_ids(folder / "seg.png")
    seen = [name for i, name in enumerate(sorted(parts), 1) if (ids == i).any()]
    assert len(seen) == 3
    out = tmp_path / "made.glb"
    pair = ["--image", folder / "scene_rgb.png", "--seg", folder / "seg.png"]
    done = inlaid("generate", run, *pair, "-o", out, "--grid", 16, "--steps", 1, "--texture")
    assert done.code == 0, done.output
    assert nodes(out) == sorted(parts)
    stated = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert set(stated["objects"]) <= set(parts) and stated["texture"] is True
    assert sum("texture: " in n for n in stated["notes"]) == 1, "made, or why not"
    report = inlaid("evaluate", run)
    assert report.code == 0, report.output
    found = json.loads((run / "report/report.json").read_text("utf-8"))
    assert set(found["pairs"][0]["tuned"]["parts"]) == set(parts)


def nodes(path: Path) -> list[str]:
    """Names in a .glb, the root's aside, without its reader."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[12:16], "little")
    return sorted(n["name"] for n in json.loads(raw[20 : 20 + length])["nodes"] if n["name"] != "world")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("bedroom", 4), ("cartoon01", 5)])
def test_real_pictures_become_scenes_on_the_twin(
    name: str, count: int, scene_recipe: Callable[..., dict], tmp_path: Path, media_root: Path
) -> None:
    run = train(config.build({**scene_recipe(model__checkpoint="tiny:midi"), "train": {"steps": 1}}))
    pair = ["--image", media_root / f"scenes/{name}_rgb.png", "--seg", media_root / f"scenes/{name}_seg.png"]
    out = tmp_path / f"{name}.glb"
    done = inlaid("generate", run, *pair, "-o", out, "--grid", 32, "--steps", 10, "--guidance", 2)
    assert done.code == 0, done.output
    assert nodes(out) == [f"object_{n}" for n in range(1, count + 1)]
    there = trimesh.load_scene(out).geometry
    assert len(there) >= count - 1, "at most one is empty"
    for one in there.values():
        assert np.isfinite(one.vertices).all() and np.abs(one.vertices).max() <= REACH + 1e-5


def metrics() -> list[str]:
    from inlaid.evaluation.scene import METRICS

    return [*METRICS]


def inlaid_header(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return json.dumps(file.metadata())


def test_an_adapter_loads_without_a_run_and_brings_its_blocks(
    scene_recipe: Callable[..., dict], checkpoint: Callable[[str, str], Path]
) -> None:
    raw = scene_recipe(model__options={"multi_instance": "0,3"})
    run = train(config.build(raw))
    plain = family(checkpoint("midi", "scene"))
    network = plain.load_denoiser(torch.float32)
    x, cond = batch(plain)
    t = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        before = plain.predict(network, x, t, cond)
    network.load_lora_adapter(run / "adapter")
    assert network.multi_instance == frozenset((0, 3))
    own = family(checkpoint("midi", "scene"), multi_instance="0,3")
    pipe = own.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    own.load_adapter(pipe, run / "adapter")
    with torch.no_grad():
        after, same = (one.predict(n, x, t, cond) for one, n in ((plain, network), (own, pipe.transformer)))
    assert torch.equal(after, same)
    assert (after - before).abs().max() > 1e-4


def test_old_files_of_weights_are_imported(
    scene_recipe: Callable[..., dict], checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = train(config.build(scene_recipe()))
    tensors = load_file(run / "adapter/pytorch_lora_weights.safetensors")
    old = tmp_path / "lora-epoch-3/lora_weights.pth"
    old.parent.mkdir()
    named = {
        k.removeprefix("transformer.").replace("lora_A.", "lora_A.default."): v for k, v in tensors.items()
    }
    named = {k.replace("lora_B.", "lora_B.default."): v for k, v in named.items()}
    torch.save(named, old)
    for source, out in ((old.parent, "one"), (run / "adapter", "two")):
        done = inlaid("import", source, tmp_path / out, "--family", "midi",
                     "--checkpoint", checkpoint("midi", "scene"))  # fmt: skip
        assert done.code == 0, done.output
        made = load_file(tmp_path / out / "pytorch_lora_weights.safetensors")
        assert made.keys() == tensors.keys() and all(torch.equal(made[k], tensors[k]) for k in made)


# --- what it costs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.untraced
def test_the_plan_of_the_published_size_is_under_six_gigabytes() -> None:
    raw = {
        "run": "x", "model": {"family": "midi", "checkpoint": "VAST-AI/MIDI-3D"}, "data": {"sources": "x"},
        "tuner": {"kind": "lora", "rank": 16}, "memory": {"gradient_checkpointing": True},
    }  # fmt: skip
    settings, shape = config.build(raw), (2, 512, 512)
    found = estimate.estimate_recipe(
        family("VAST-AI/MIDI-3D"), settings, {shape: 1}, {shape: 1}, [""],
        device=torch.device("meta"), precision=torch.bfloat16, optimizer="adamw",
    )  # fmt: skip
    assert (found.parameters, found.trained) == (1_681_911_616, 935_424 * 16)
    assert found.peak < 6e9


def test_metrics_know_right_from_wrong() -> None:
    from inlaid.evaluation.scene import MISSING_DISTANCE, comparable, distance, matches_prompt, measure

    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    moved = [ball.copy().apply_translation((x, 0, 0)) for x in (-0.5, 0.5)]
    objects = [
        SceneObject(i + 1, np.ones((2, 2), bool), meshes.sample_surface(m, 4000, seed=9))
        for i, m in enumerate(moved)
    ]

    class Window:
        def read(self) -> SceneSample:
            return SceneSample("s", np.zeros((2, 2, 3), np.uint8), objects)

    good, parts = measure(
        GeneratedScene({"object_1": moved[0], "object_2": moved[1]}), SimpleNamespace(images=Window())
    )
    assert good["f_score"] > 0.99 and good["iou"] > 0.9 and good["box_iou"] > 0.9 and good["off"] < 0.02
    assert matches_prompt(good) and set(parts) == {"object_1", "object_2"}
    swapped, _ = measure(
        GeneratedScene({"object_1": moved[1], "object_2": moved[0]}), SimpleNamespace(images=Window())
    )
    assert swapped["f_score"] > 0.99 and swapped["iou"] == 0 and swapped["off"] == pytest.approx(1, abs=0.05)
    shifted = {f"object_{i + 1}": m.copy().apply_translation((0, 0.3, 0)) for i, m in enumerate(moved)}
    apart, _ = measure(GeneratedScene(shifted), SimpleNamespace(images=Window()))
    assert apart["f_score"] < 0.8 < 0.95 < apart["f_aligned"] and apart["object_f"] > 0.95
    none, parts = measure(GeneratedScene({}, ("object_1", "object_2")), SimpleNamespace(images=Window()))
    assert none["f_score"] == 0 and none["chamfer"] == MISSING_DISTANCE and not matches_prompt(none)
    assert distance(comparable(GeneratedScene({"a": ball})), comparable(GeneratedScene({"a": ball}))) == 0


def test_scene_codes_are_reported() -> None:
    stated = describe_plan([Problem("error", "no-surface", "a", "has none")], 3, noun="scene")
    assert stated[0].startswith("1 of 3 scenes lacks a surface (a: has none)")


def test_a_recipe_is_written_for_scenes(make_scenes: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_scenes()
    done = inlaid("new", "midi", folder, "--out", tmp_path / "new.yaml")
    assert done.code == 0, done.output
    text = (tmp_path / "new.yaml").read_text("utf-8")
    assert "4 scenes in folders layout" in text and "VAST-AI/TripoSG" in text
    assert config.load(tmp_path / "new.yaml").data.validation == 0
