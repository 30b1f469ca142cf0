"""Textures from the input image: the camera is found, colors arrive where the image shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")

from scipy.ndimage import binary_erosion

from inlaid.media.mesh_render import View, render
from inlaid.media.meshes import write_scene
from inlaid.media.texture import Camera, fit_camera, textured

VIEW = View(200, 10, 4.2, 40)


@pytest.fixture(scope="module")
def meshes() -> dict[str, trimesh.Trimesh]:
    turn = trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0])
    cone = trimesh.creation.cone(0.3, 0.8).apply_transform(turn)
    return {
        "box": trimesh.creation.box((0.5, 0.7, 0.4)).apply_translation((-0.6, -0.1, 0.2)),
        "ball": trimesh.creation.icosphere(4, 0.3).apply_translation((0.3, -0.2, 0.5)),
        "cone": cone.subdivide().subdivide().apply_translation((0.4, -0.5, -0.5)),
    }


@pytest.fixture(scope="module")
def picture(meshes: dict[str, trimesh.Trimesh]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An image in which red grows to the right and green downward, and the masks."""
    ids = render(list(meshes.values()), VIEW, 128)[1]
    y, x = np.mgrid[:128, :128]
    image = np.stack([2 * x, 2 * y, np.full_like(x, 128)], -1).astype(np.uint8)
    return image, {name: ids == i for i, name in enumerate(meshes, 1)}


def test_a_camera_projects_as_the_renderer_does(meshes: dict[str, trimesh.Trimesh]) -> None:
    camera = Camera(VIEW)
    origins, rays = VIEW.rays(32)
    assert all(np.allclose(a, b) for a, b in zip(camera.rays(32), (origins, rays), strict=True))
    moved = Camera(VIEW, (0.2, -0.1))
    for one in (camera, moved):
        origins, rays = one.rays(32)
        place, distance = one.project(origins + 3.7 * rays)
        y, x = np.divmod(np.arange(32 * 32), 32)
        assert np.allclose(place, (np.stack([x, y], -1) + 0.5) / 16 - 1) and np.allclose(distance, 3.7)


@pytest.mark.slow
def test_the_camera_of_a_rendered_image_is_found(
    meshes: dict[str, trimesh.Trimesh], picture: tuple[np.ndarray, dict[str, np.ndarray]]
) -> None:
    camera, overlap = fit_camera(meshes, picture[1])
    assert overlap > 0.85
    vertices = np.concatenate([m.vertices for m in meshes.values()])
    error = np.abs(camera.project(vertices)[0] - Camera(VIEW).project(vertices)[0]).mean() * 64
    assert error < 2.0, "pixels of 128"


@pytest.mark.slow
def test_seen_vertices_take_their_place_in_the_image(
    meshes: dict[str, trimesh.Trimesh],
    picture: tuple[np.ndarray, dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    image, masks = picture
    wide = np.pad(image, ((0, 0), (10, 22), (0, 0)))
    out, note = textured(meshes, wide, {n: np.pad(m, ((0, 0), (10, 22))) for n, m in masks.items()})
    assert note.startswith("texture: silhouettes overlap the masks by ") and "of the surface is seen" in note
    ball = out["ball"]
    size = np.array(wide.shape[1::-1])
    place = (ball.visual.uv * [1, -1] + [0, 1]) * size - [10, 0]
    true = (Camera(VIEW).project(ball.vertices)[0] + 1) * 64
    toward = (ball.vertex_normals * (VIEW.rays(1)[0][0] - ball.vertices)).sum(-1) > 1.5
    assert np.abs(place - true)[toward].max() < 6.0 and np.abs(place - true)[toward].mean() < 2.0
    column, row = np.floor(place).astype(int).clip(0, 127).T
    assert masks["ball"][row, column].mean() > 0.99, "nothing of the background or of other objects"
    whole = np.any([binary_erosion(m, iterations=2) for m in masks.values()], 0)
    inner = np.pad(whole, ((0, 0), (10, 22)))
    assert inner.sum() > 500
    read = trimesh.load(write_scene(tmp_path / "s.glb", out), process=False)
    assert sorted(read.geometry) == ["ball", "box", "cone"]
    for one in read.geometry.values():
        texture = np.asarray(one.visual.material.baseColorTexture.convert("RGB"))
        assert texture.shape == wide.shape and np.array_equal(texture[inner], wide[inner])
        assert not np.array_equal(texture, wide), "the background is filled from the objects"
    raw = (tmp_path / "s.glb").read_bytes()
    assert raw.count(b"\x89PNG") == 1, "one image for all objects"


def test_no_texture_where_nothing_fits(
    meshes: dict[str, trimesh.Trimesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlaid.media import texture

    monkeypatch.setattr(texture, "STARTS", 0)
    masks = {n: np.zeros((64, 64), bool) for n in meshes}
    for i, mask in enumerate(masks.values()):
        mask[20 * i : 20 * i + 3, 60 - 20 * i : 64 - 20 * i] = True
    out, note = textured(meshes, np.zeros((64, 64, 3), np.uint8), masks)
    assert out == meshes and note.startswith("no texture: no camera matches the masks (the best")
    assert textured({}, np.zeros((64, 64, 3), np.uint8), {}) == ({}, "no texture: there is no mesh")
