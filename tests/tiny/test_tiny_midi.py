"""The MIDI tiny: its world is exact and a function of its seed, and what ships does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from tiny_models import midi_data, midi_dit, midi_images, midi_vae, training
from tiny_models.midi import normalize
from tiny_models.midi_data import SHIFT, Scenes
from tiny_models.midi_dit import TRANSFORMER
from tiny_models.midi_report import TinyModel, judge, load, obedience, reconstruction, true_surface
from tiny_models.midi_vae import CONFIG, TOKENS
from tiny_models.training import MuonAdamW, load_state, run

from inlaid.data import scenes
from inlaid.media import mesh_render
from inlaid.media.mesh_render import View
from inlaid.media.meshes import flipped
from inlaid.networks.triposg import TripoSGVAE
from inlaid.tiny import midi_solids, midi_world, path
from inlaid.tiny.midi_solids import Solid, Thing, bounds, distance
from inlaid.tiny.midi_world import FIELD, KINDS, PINK, SUBJECT

# --- the world ----------------------------------------------------------------------------------------------


def test_scenes_are_functions_of_their_seed() -> None:
    assert midi_world.scenes(0, 8)[:5] == midi_world.scenes(0, 5)
    assert midi_world.scenes(0, 3, start=4) == midi_world.scenes(0, 7)[4:]
    assert not set(midi_world.scenes(0, 20)) & set(midi_world.scenes(1, 20))
    assert [len(s.things) for s in midi_world.scenes(3, 6, counts=(2, 3))] == [2, 3, 2, 3, 2, 3]
    image, ids = midi_world.render(midi_world.scenes(0, 2)[1], 48)
    again, same = midi_world.render(midi_world.scenes(0, 2)[1], 48)
    assert np.array_equal(image, again) and np.array_equal(ids, same)


def test_the_subject_is_only_in_its_own_scenes() -> None:
    kinds = {t.kind for s in midi_world.scenes(0, 60) for t in s.things}
    assert kinds == set(KINDS)
    taught, held = midi_world.subject_scenes(), midi_world.subject_scenes(seed=1)
    assert len(taught) == 24 and not set(taught) & set(held)
    assert all(s.things[0].kind == SUBJECT for s in (*taught, *held))


def test_scenes_are_normalised_and_their_things_stand_apart_on_one_floor() -> None:
    for scene in (*midi_world.scenes(2, 12), *midi_world.subject_scenes(3)):
        boxes = np.stack([bounds(t) for t in scene.things])
        low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
        assert (high - low).max() == pytest.approx(1.9)
        assert np.allclose(low + high, 0, atol=1e-6)
        assert np.allclose(boxes[:, 0, 1], low[1])
        for one in scene.things:
            points = midi_solids.surface(one, 300, 0)[:, :3]
            assert all(distance(t, points).min() > 0 for t in scene.things if t is not one)


@pytest.mark.parametrize("kind", [*KINDS, SUBJECT, "wild"])
def test_surfaces_lie_on_their_things_and_normals_point_out(kind: str) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        thing = midi_world.wild(seed) if kind == "wild" else midi_world.make(kind, PINK, rng)
        surface = midi_solids.surface(thing, 4000, seed).astype(np.float64)
        points, normals = surface[:, :3], surface[:, 3:]
        assert np.abs(distance(thing, points)).max() < 1e-6
        assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
        assert (distance(thing, points + 1e-4 * normals) > 0).mean() > 0.995
        assert (distance(thing, points - 1e-4 * normals) < 0).mean() > 0.995
        low, high = bounds(thing)
        assert (points > low - 1e-6).all() and (points < high + 1e-6).all()
        assert np.ptp(points, axis=0) == pytest.approx(high - low, abs=0.12)
        assert not flipped(surface)


def _solid_mesh(solid: Solid) -> trimesh.Trimesh:
    make = trimesh.creation
    s = solid.size
    upright = trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0])  # its axis is z, ours y
    lying = trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0])
    if solid.kind == "box":
        return make.box(2 * np.array(s))
    if solid.kind == "sphere":
        return make.icosphere(4, s[0])
    if solid.kind == "cylinder":
        return make.cylinder(s[0], 2 * s[1], sections=64).apply_transform(upright)
    if solid.kind == "torus":
        return make.torus(s[0], s[1], 64, 48).apply_transform(upright)
    if solid.kind == "cone":
        cone = make.cone(s[0], 2 * s[1], sections=64).apply_transform(upright)
        return cone.apply_translation([0, -s[1], 0])
    capsule = make.capsule(2 * s[1], s[0], count=[64, 64])
    return capsule.apply_translation(-capsule.bounds.mean(0)).apply_transform(lying)


def _mesh(thing: Thing) -> trimesh.Trimesh:
    parts = [_solid_mesh(s).apply_translation(s.offset) for s in thing.solids]
    turn = trimesh.transformations.rotation_matrix(thing.yaw, [0, 1, 0])
    return trimesh.util.concatenate(parts).apply_transform(turn).apply_translation(thing.place)


def test_pictures_and_numbers_are_those_of_another_renderer() -> None:
    for scene in (*midi_world.scenes(7, 8), midi_world.subject_scenes(1)[0]):
        meshes = [_mesh(t) for t in scene.things]
        for one, thing in zip(meshes, scene.things, strict=True):
            assert one.bounds == pytest.approx(bounds(thing), abs=0.01)
        view = View(scene.azimuth, scene.elevation, scene.distance, FIELD)
        image, expected = mesh_render.render(meshes, view, 96, [t.color for t in scene.things])
        ours, ids = midi_world.render(scene, 96)
        assert (ids == expected).mean() > 0.99
        assert set(np.unique(ids)) == set(range(len(meshes) + 1))
        both = (ids == expected) & (ids > 0)
        assert np.abs(ours[both].astype(float) - image[both]).mean() < 30
        assert (ours[ids == 0] == 255).all()


def test_written_scenes_are_read_as_they_are(tmp_path: Path) -> None:
    drawn = midi_world.scenes(4, 4)
    for k, scene in enumerate(drawn):
        midi_world.write(tmp_path / f"scene_{k:04d}", scene, size=64)
    found = scenes.find_scenes(tmp_path)
    assert found.findings == [] and len(found.scenes) == 4
    for scene, one in zip(drawn, found.scenes, strict=True):
        sample = one.read()
        assert sample.notes == ()
        assert len(sample.objects) == len(scene.things)
        for thing, read in zip(scene.things, sample.objects, strict=True):
            assert np.abs(distance(thing, read.surface[:, :3])).max() < 1e-5


# --- its training -------------------------------------------------------------------------------------------


def test_scores_tell_right_from_wrong() -> None:
    held = midi_world.scenes(5, 4, counts=(2, 3))
    true = [[true_surface(t, 1) for t in s.things] for s in held]
    right = judge(held, true)
    assert right["f_score"] > 0.99 and right["placed"] == 1 and right["off"] < 0.05
    moved = judge(held, [[o + np.array([0.3, 0, 0]) for o in objects] for objects in true])
    assert moved["f_score"] < 0.6 and moved["placed"] == 0
    assert moved["off"] == pytest.approx(0.3, abs=0.05)
    nothing = judge(held, [[None for _ in objects] for objects in true])
    assert nothing["f_score"] == 0 and nothing["placed"] == 0


def test_normalised_latents_decode_to_the_same_field() -> None:
    torch.manual_seed(0)
    vae = TripoSGVAE(**CONFIG).eval()
    thing = midi_world.scenes(0, 1)[0].things[0]
    surfaces = [midi_solids.surface(thing, 256, k) for k in range(3)]
    places = torch.rand(3, 50, 3)
    with torch.no_grad():
        mean, logvar = midi_vae.moments(vae, surfaces, 0).chunk(2, -1)
        field = vae.field(vae.tokens(mean), places)
        shift, scale = mean.mean((0, 1)), mean.std((0, 1))
        normalize(vae, shift, scale)
        normal, narrower = midi_vae.moments(vae, surfaces, 0).chunk(2, -1)
        assert torch.allclose(normal, (mean - shift) / scale, atol=1e-4)
        assert torch.allclose(narrower, logvar - 2 * scale.log(), atol=1e-4)
        assert torch.allclose(vae.field(vae.tokens(normal), places), field, atol=1e-4)


def test_pictures_are_what_the_processors_make() -> None:
    image, ids = midi_world.render(midi_world.scenes(0, 3)[2], 128)
    shown = midi_images.encoder_inputs(image, ids)
    alone = [np.where((ids == n)[..., None], image, np.uint8(255)) for n in range(1, 4)]
    for name, processor, given in zip(("clip", "own"), midi_images.processors(), (alone, alone), strict=True):
        raw = processor(images=given, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
        assert np.array_equal(shown[name], raw)
    assert [int(m.sum()) > 0 for m in shown["mask"]] == [True] * 3


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenes:
    monkeypatch.setattr(midi_data, "PIECE", 6)
    torch.manual_seed(0)
    midi_data.cache(tmp_path, TripoSGVAE(**CONFIG).eval(), 6, 0)
    return Scenes(tmp_path, 6)


def test_batches_are_functions_of_their_number(data: Scenes) -> None:
    first, again, other = (data.batch(step, 4, 2, 0.5) for step in (3, 3, 4))
    assert torch.equal(first.x0, again.x0) and torch.equal(first.noise, again.noise)
    assert first.groups == again.groups and not (
        first.x0.shape == other.x0.shape and torch.equal(first.x0, other.x0)
    )
    assert sum(first.groups) == len(first.x0) == 2 * len(first.kept)
    start = 0
    for size in first.groups:  # one noise level per scene
        assert len(set(first.sigma[start : start + size].tolist())) == 1
        start += size
    assert abs(float(data.moments.chunk(2, -1)[0].mean())) < 1e-3


def test_all_that_is_trained_gets_a_gradient(data: Scenes) -> None:
    model = midi_dit.build()
    midi_dit.loss(model, data.batch(0, 4, 1, 0.0)).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # who asks one token has no choice
    alone = re.compile(r"blocks\.\d+\.(attn2\.(to_q|norm_q|norm_k)|norm2)\.")
    idle = {n for n in idle if "mask_token" not in n and "bias" not in n and not alone.search(n)}
    assert idle == set()


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def train(name: str, until: int = 9) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))

        def make(step: int) -> torch.Tensor:
            if step == until:
                raise InterruptedError
            return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

        def losses(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (net(x) - x[:, :2]).square().mean()}

        optimizer = MuonAdamW(net.named_parameters(), 0.02, 1e-3)
        file = run("test", tmp_path / name, net, optimizer, 9, make, losses)
        return load_state(file)[1]["average"]

    whole = train("whole")
    with pytest.raises(InterruptedError):
        train("parts", until=4)
    parts = train("parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


# --- what ships ---------------------------------------------------------------------------------------------


def test_the_shipped_folder_is_small_and_laid_out_as_the_published_one() -> None:
    files = [file for file in path("midi").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    names = {file.relative_to(path("midi")).as_posix() for file in files}
    assert names >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(
            f"{p}/{f}"
            for p in ("transformer", "vae")
            for f in ("config.json", "diffusion_pytorch_model.safetensors")
        ),
        *(f"image_encoder_{k}/{f}" for k in (1, 2) for f in ("config.json", "model.safetensors")),
        *(f"feature_extractor_{k}/preprocessor_config.json" for k in (1, 2)),
    }


@pytest.fixture(scope="module")
def tiny_midi() -> TinyModel:
    return load(path("midi"))


def test_the_shipped_model_loads_in_float32(tiny_midi: TinyModel) -> None:
    parts = (tiny_midi.dit, tiny_midi.vae, tiny_midi.clip, tiny_midi.dino)
    assert {part.dtype for part in parts} == {torch.float32}
    assert tiny_midi.dino.config.num_channels == 7
    assert tiny_midi.dit.multi_instance == set(TRANSFORMER["multi_instance"])
    assert tiny_midi.tokens == TOKENS and tiny_midi.shift == SHIFT


def test_the_shipped_vae_keeps_shapes_it_never_saw(tiny_midi: TinyModel) -> None:
    things = [thing for scene in midi_world.scenes(9, 1) for thing in scene.things]
    assert np.mean(reconstruction(tiny_midi.vae, tiny_midi.tokens, things)) > 0.8


def test_the_shipped_twin_finds_scenes_in_pictures(tiny_midi: TinyModel) -> None:
    found = obedience(tiny_midi, midi_world.scenes(9, 2, counts=(2, 3)), steps=12)
    assert found["f_score"] > 0.65
    assert found["placed"] > 0.6
