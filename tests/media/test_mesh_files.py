"""Mesh files: which parts form an object, names, looks, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")

from inlaid.media import mesh_files
from inlaid.media.mesh_files import CONTAINER, read_objects
from inlaid.media.mesh_looks import Look, to_linear, to_srgb
from support.gltf import CORNERS, SQUARE, Builder

BOX = trimesh.creation.box([1, 1, 1])


def names(path: Path, group: Any = "parent") -> list[str]:
    return [one.name for one in read_objects(path, group)[0]]


def colors(path: Path, index: int = 0) -> np.ndarray:
    """sRGB in 255 of the four corners of the square, in its order."""
    one = read_objects(path)[0][index]
    assert one.look is not None
    found, _ = one.look.at(np.array([0, 0, 0, 1]), np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1.0]]))
    return 255 * found


# --- objects and names --------------------------------------------------------------------------------------


def tree(path: Path, nodes: dict[str, Any]) -> Path:
    """A file of nested nodes; a leaf is a square, {} an empty node."""
    built = Builder()
    square = built.mesh(built.primitive())

    def add(name: str, content: Any) -> int:
        if content == "mesh":
            return built.node(name, mesh=square)
        return built.node(name, children=[add(n, c) for n, c in content.items()])

    roots = [add(n, c) for n, c in nodes.items()]
    built.header["scenes"] = [{"nodes": roots}]
    return built.write(path)


CHAIR = {"seat": "mesh", "leg1": "mesh", "leg2": "mesh"}


@pytest.mark.parametrize(
    ("nodes", "parent", "node"),
    [
        ({"table": "mesh", "chair": CHAIR}, ["chair", "table"], ["leg1", "leg2", "seat", "table"]),
        ({"world": {"table": "mesh", "chair": CHAIR}}, ["chair", "table"], ["leg1", "leg2", "seat", "table"]),
        ({"chair": CHAIR}, ["chair"], ["leg1", "leg2", "seat"]),
        ({"chair": {"legs": {"a": "mesh", "b": "mesh"}, "seat": "mesh"}}, ["chair"], ["a", "b", "seat"]),
        (
            {"Sketchfab_model": {"x12.fbx": {"RootNode": {"chair": CHAIR, "lamp": {"Object_4": "mesh"}}}}},
            ["chair", "lamp"],
            ["Object_4", "leg1", "leg2", "seat"],
        ),
        ({"Scene": {"Collection": {"a": "mesh"}, "Collection.001": {"b": "mesh"}}}, ["a", "b"], ["a", "b"]),
        ({"": {"a": "mesh", "b": "mesh"}}, ["a", "b"], ["a", "b"]),
        ({"chair": "mesh", "Chair": "mesh"}, ["Chair", "chair"], ["Chair", "chair"]),
        ({"chair": {"chair": "mesh"}, "x": {"chair": "mesh"}}, ["chair", "x"], ["chair", "chair"]),
    ],
)
def test_nodes_with_a_common_parent_are_an_object(
    nodes: dict[str, Any], parent: list[str], node: list[str], tmp_path: Path
) -> None:
    path = tree(tmp_path / "x.glb", nodes)
    assert (names(path), names(path, "node")) == (parent, node)
    assert names(path, "material") == [""]


def test_one_object_of_many_parts_is_stated(tmp_path: Path) -> None:
    assert read_objects(tree(tmp_path / "a.glb", {"chair": CHAIR}))[1] == [
        "its 3 parts are one object, `chair`; with --group node, each is an object"
    ]
    assert read_objects(tree(tmp_path / "b.glb", {"chair": {"seat": "mesh"}}))[1] == []


@pytest.mark.parametrize("name", ["world", "world_1", "Scene.001", "RootNode", "a.fbx", "", "3", "root node"])
def test_names_of_containers(name: str) -> None:
    assert CONTAINER.fullmatch(name)


@pytest.mark.parametrize("name", ["chair", "Object_4", "worldmap", "Scenery", "rooted tree", "box.1"])
def test_names_of_objects(name: str) -> None:
    assert not CONTAINER.fullmatch(name)


def test_all_primitives_of_a_node_are_one_object_and_materials_can_be(tmp_path: Path) -> None:
    built = Builder()
    built.header["materials"] = [{"name": "wood"}, {"name": "steel"}, {}]
    parts = [built.primitive(SQUARE + np.array([0, 0, i], "f4"), i) for i in (0, 1, 2)]
    two = built.mesh(*parts, name="desk")
    other = built.mesh(built.primitive(SQUARE, 1), name="pole")
    built.header["scenes"] = [{"nodes": [built.node(None, mesh=two), built.node("lamp", mesh=other)]}]
    path = built.write(tmp_path / "x.gltf")
    desk, lamp = read_objects(path, "node")[0]
    assert (desk.name, lamp.name, len(desk.triangles), len(lamp.triangles)) == ("desk", "lamp", 6, 2)
    assert names(path, "material") == ["", "steel", "wood"]
    steel = next(o for o in read_objects(path, "material")[0] if o.name == "steel")
    assert len(steel.triangles) == 4


def test_node_transforms_and_mirrored_nodes(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    mirror = np.diag([-2.0, 1, 1, 1])
    mirror[0, 3] = 5
    scene.add_geometry(BOX, node_name="there", transform=mirror)
    scene.export(tmp_path / "x.glb")
    (one,) = read_objects(tmp_path / "x.glb")[0]
    corners = one.triangles
    assert np.allclose([corners.min((0, 1)), corners.max((0, 1))], [[4, -0.5, -0.5], [6, 0.5, 0.5]])
    volume = (corners[:, 0] * np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume == pytest.approx(2), "triangles still face outward"


OBJ = """
mtllib a.mtl
o table
g top
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
usemtl red
f 1 2 3 4
g legs
usemtl blue
v 0 0 5
v\t1 0 5
  v 1 1 5
f -3 -2 \\
  -1
o chair
v 0 0 9
v 1 0 9
v 1 1 9
v 0 1 9
v 2 2 9
usemtl red
f -5//1 -4//1 -3//1
f -5//1 -3//1 -2//1 -1//1
o table
f 5 6 7
vn 0 0 1
"""


def test_obj_groups_and_relative_indices(tmp_path: Path) -> None:
    path = tmp_path / "x.obj"
    path.write_text(OBJ)
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    chair, table = read_objects(path)[0]
    assert (chair.name, table.name) == ("chair", "table")
    assert (chair.triangles[..., 2] == 9).all() and len(chair.triangles) == 3
    assert sorted({*table.triangles[..., 2].ravel()}) == [0, 5] and len(table.triangles) == 4
    assert names(path, "node") == ["chair", "legs", "table", "top"]
    assert names(path, "material") == ["blue", "red"]
    path.write_text(OBJ.replace("\no ", "\n# "))
    assert names(path) == ["legs", "top"], "g where there is no o"
    path.write_text("\n".join(line for line in OBJ.splitlines() if line[:2] not in ("o ", "g ", "us", "mt")))
    assert names(path) == ["x"]


def test_stl_and_ply(tmp_path: Path) -> None:
    BOX.export(tmp_path / "crate.stl")
    BOX.export(tmp_path / "crate.ply")
    assert names(tmp_path / "crate.stl") == names(tmp_path / "crate.ply") == ["crate"]
    face = (
        "facet normal 0 0 1\nouter loop\nvertex 0 0 {0}\nvertex 1 0 {0}\nvertex 0 1 {0}\nendloop\nendfacet\n"
    )
    solids = "".join(f"solid {n}\n{face.format(i)}endsolid {n}\n" for i, n in enumerate(("lid", "pot")))
    (tmp_path / "two.stl").write_text(solids)
    found = read_objects(tmp_path / "two.stl", "node")[0]
    assert [o.triangles[0, 0, 2] for o in found] == [0, 1] and [o.name for o in found] == ["lid", "pot"]


# --- looks --------------------------------------------------------------------------------------------------


def png(pixels: list[list[tuple[int, ...]]]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).save(out, "PNG")
    return out.getvalue()


QUARTERS = png([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]])
"""Red and green above blue and white."""

WANT = np.array([[0, 0, 255], [255, 255, 255], [0, 255, 0], [255, 0, 0]])
"""Colors of the corners of the square, from the lower left."""

INNER = (CORNERS * 0.5 + 0.25).astype("f4")
"""Coordinates of the centers of the four pixels."""


def textured(
    path: Path, texture: dict[str, Any] | None = None, uv: np.ndarray = INNER, **material: Any
) -> Path:
    built = Builder()
    built.header["images"] = [{"bufferView": built.view(QUARTERS), "mimeType": "image/png"}]
    built.header["samplers"] = [{"wrapS": 33071, "wrapT": 33648}]
    built.header["textures"] = [{"source": 0, "sampler": 0}]
    named = {"baseColorTexture": {"index": 0, **(texture or {})}, **material}
    built.header["materials"] = [{"pbrMetallicRoughness": named}]
    zero = np.zeros((4, 2), "f4")
    first, second = (zero, uv) if (texture or {}).get("texCoord") else (uv, zero)
    built.node("x", mesh=built.mesh(built.primitive(SQUARE, 0, TEXCOORD_0=first, TEXCOORD_1=second)))
    return built.write(path)


def test_gltf_textures(tmp_path: Path) -> None:
    assert np.allclose(colors(textured(tmp_path / "a.glb")), WANT, atol=1)
    assert np.allclose(colors(textured(tmp_path / "b.gltf", {"texCoord": 1})), WANT, atol=1)
    half = to_srgb(np.array([0.5]))[0] * 255
    factor = colors(textured(tmp_path / "c.glb", baseColorFactor=[0.5, 0.5, 0.5, 1]))
    assert np.allclose(factor, WANT * half / 255, atol=1), "linear light"
    shift = {"extensions": {"KHR_texture_transform": {"offset": [0.5, 0], "scale": [0.5, 1]}}}
    moved = INNER * [2, 1] - [1, 0]
    assert np.allclose(colors(textured(tmp_path / "d.glb", shift, moved.astype("f4"))), WANT, atol=1)
    far = INNER + np.array([[-1, 0], [1, 0], [1, 0], [-1, 0]], "f4")
    assert np.allclose(colors(textured(tmp_path / "e.glb", uv=far)), WANT, atol=1), "clamped along x"
    far = np.array([[0.25, 1.25], [0.75, 1.25], [0.75, -0.25], [0.25, -0.25]], "f4")
    assert np.allclose(colors(textured(tmp_path / "f.glb", uv=far)), WANT, atol=1), "mirrored along y"


def test_a_texture_turned_by_90_degrees(tmp_path: Path) -> None:
    turn = {"extensions": {"KHR_texture_transform": {"rotation": np.pi / 2, "offset": [0, 1]}}}
    found = colors(textured(tmp_path / "a.glb", turn))
    # (u, v) -> (v, 1 - u): the lower left corner (0.25, 0.75) reads (0.75, 0.75), white
    assert np.allclose(found, [[255, 255, 255], [0, 255, 0], [255, 0, 0], [0, 0, 255]], atol=1)


@pytest.mark.parametrize("kind", ["f4", "u1", "u2"])
@pytest.mark.parametrize("material", [None, 0])
def test_vertex_colors_of_every_type_are_linear(kind: str, material: int | None, tmp_path: Path) -> None:
    linear = np.array([[1, 0, 0], [0, 1, 0], [0.2, 0.2, 0.2], [0.5, 0.25, 0.125]])
    most = 1 if kind == "f4" else np.iinfo(kind).max
    built = Builder()
    built.header["materials"] = [{"name": "white"}]
    stored = (linear * most).round(0 if kind != "f4" else 9).astype(kind)
    built.node("x", mesh=built.mesh(built.primitive(SQUARE, material, COLOR_0=stored)))
    found = colors(built.write(tmp_path / "x.glb"))
    assert np.allclose(found, 255 * to_srgb(linear), atol=2)


def test_trimesh_stores_colors_in_srgb(tmp_path: Path) -> None:
    mesh = BOX.copy()
    mesh.visual.face_colors = [150, 100, 60, 255]
    scene = trimesh.Scene()
    scene.add_geometry(mesh, node_name="a")
    plain = trimesh.visual.material.PBRMaterial(baseColorFactor=[60, 90, 160, 255])
    other = BOX.copy()
    other.visual = trimesh.visual.TextureVisuals(material=plain)
    scene.add_geometry(other, node_name="b")
    scene.export(tmp_path / "x.glb")
    assert np.allclose(colors(tmp_path / "x.glb", 0), [150, 100, 60], atol=1)
    assert np.allclose(colors(tmp_path / "x.glb", 1), [60, 90, 160], atol=1)


def square_obj(folder: Path, texture: str, library: str = "x.mtl") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"v {x} {y} {z}" for x, y, z in SQUARE] + [f"vt {u} {1 - v}" for u, v in INNER]
    (folder / "x.obj").write_text(
        "\n".join([f"mtllib {library}", "o a", *lines, "usemtl skin", "f 1/1 2/2 3/3", "f 1/1 3/3 4/4", ""])
    )
    (folder / "x.mtl").write_text(f"newmtl skin\nKd 0.8 0.8 0.8\nmap_Kd {texture}\n")
    (folder / "my skin.png").write_bytes(QUARTERS)
    (folder / "skin.png").write_bytes(QUARTERS)
    return folder / "x.obj"


@pytest.mark.parametrize(
    "texture",
    [
        "skin.png",
        "my skin.png",
        "my%20skin.png",
        "-s 1 1 1 skin.png",
        "C:\\Users\\me\\skin.png",
        ".\\skin.png",
    ],
)
def test_obj_textures(texture: str, tmp_path: Path) -> None:
    path = square_obj(tmp_path / "in", texture)
    assert np.allclose(colors(path), WANT, atol=1)
    assert read_objects(path)[1] == []


def test_obj_colors_and_several_material_files(tmp_path: Path) -> None:
    path = square_obj(tmp_path / "in", "skin.png", "y.mtl\nmtllib x.mtl")
    (tmp_path / "in/y.mtl").write_text("newmtl other\nKd 0.5 0.25 0\n")
    path.write_text(path.read_text() + "o b\nusemtl other\nf 1 2 3\nf 1 3 4\n")
    assert np.allclose(colors(path, 0), WANT, atol=1)
    assert np.allclose(colors(path, 1), [127.5, 63.75, 0], atol=1), "Kd is sRGB"


def test_materials_are_converted_once(tmp_path: Path) -> None:
    path = square_obj(tmp_path / "in", "skin.png")
    path.write_text(path.read_text() + "o b\nf 1/1 3/3 4/4\no c\nusemtl none\nf 1 2 3\n")
    a, b, c = (one.look for one in read_objects(path)[0])
    assert a and b and a.textures[0] is b.textures[0] and c is None
    both = Look.joined([a, Look.plain(np.ones((1, 3, 4))), b])
    assert len(both.textures) == 1 and both.texture.tolist() == [0, 0, -1, 0]


def test_ply_colors(tmp_path: Path) -> None:
    paint = np.array([[255, 0, 0, 255], [0, 255, 0, 255], [9, 90, 200, 255], [80, 80, 80, 255]], np.uint8)
    mesh = trimesh.Trimesh(SQUARE, [[0, 1, 2], [0, 2, 3]], vertex_colors=paint, process=False)
    mesh.export(tmp_path / "x.ply")
    assert np.allclose(colors(tmp_path / "x.ply"), paint[:, :3], atol=1)


def test_transparent_texels_are_not_seen(tmp_path: Path) -> None:
    from inlaid.media.mesh_render import View, render

    built = Builder()
    leaf = png([[(0, 255, 0, 255), (0, 255, 0, 0)]])
    built.header["images"] = [{"bufferView": built.view(leaf), "mimeType": "image/png"}]
    built.header["textures"] = [{"source": 0}]
    material = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    built.header["materials"] = [
        {**material, "alphaMode": "MASK"},
        material,
        {**material, "alphaMode": "BLEND"},
    ]
    nodes = []
    for i in range(3):
        square = built.primitive(
            (SQUARE * [0.3, 0.3, 1] + [0.8 * i - 0.8, 0, 0]).astype("f4"), i, TEXCOORD_0=CORNERS
        )
        nodes.append(built.node(f"{'abc'[i]}", mesh=built.mesh(square)))
    back = built.primitive((SQUARE * [1.4, 0.4, 1] + [0, 0, -0.5]).astype("f4"))
    nodes.append(built.node("wall", mesh=built.mesh(back)))
    built.header["scenes"] = [{"nodes": nodes}]
    found = read_objects(built.write(tmp_path / "x.glb"))[0]
    meshes = [
        trimesh.Trimesh(
            o.triangles.reshape(-1, 3), np.arange(o.triangles.size // 3).reshape(-1, 3), process=False
        )
        for o in found
    ]
    image, ids = render(meshes, View(0, 0), 128, looks=[o.look for o in found])
    seen = [(ids == n).sum() for n in (1, 2, 3)]
    assert seen[1] == pytest.approx(2 * seen[0], rel=0.2) and 1.5 * seen[0] < seen[2] <= seen[1]
    assert (ids == 4).sum() > seen[0], "the wall is seen through the leaf"
    assert (image[ids == 1][:, 1] > image[ids == 1][:, 0]).all()


def test_color_conversion_is_its_inverse() -> None:
    values = np.linspace(0, 1, 256)
    assert np.allclose(to_srgb(to_linear(values)), values) and to_linear(np.array([0.5]))[0] == pytest.approx(
        0.214041
    )


# --- other files and what is refused ------------------------------------------------------------------------


def test_external_buffers_and_textures(tmp_path: Path) -> None:
    built = Builder()
    built.header["images"] = [{"uri": "my%20skin.png"}]
    built.header["textures"] = [{"source": 0}]
    built.header["materials"] = [{"name": "skin", "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    built.node("x", mesh=built.mesh(built.primitive(SQUARE, 0, TEXCOORD_0=INNER)))
    path = built.write(tmp_path / "in/x.gltf", "my%20data.bin")
    with pytest.raises(ValueError, match=r"my%20data\.bin: does not exist"):
        read_objects(path)
    (tmp_path / "in/my data.bin").write_bytes(built.data)
    (one,), notes = read_objects(path)
    assert one.look is not None and len(notes) == 2
    assert notes == [
        "the texture of material `skin` cannot be read", "`my%20skin.png` does not exist",
    ]  # fmt: skip
    (tmp_path / "in/my skin.png").write_bytes(b"no")
    assert "is not an image" in read_objects(path)[1][1]
    (tmp_path / "in/my skin.png").write_bytes(QUARTERS)
    assert np.allclose(colors(path), WANT, atol=1) and read_objects(path)[1] == []


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(QUARTERS)
    path = square_obj(tmp_path / "in", "../secret.png")
    (one,), notes = read_objects(path)
    assert one.look is not None and any("`../secret.png` is outside" in n for n in notes)
    assert not one.look.textures
    (tmp_path / "in/skin.png").unlink()
    (tmp_path / "in/skin.png").symlink_to(tmp_path / "secret.png")
    square_obj(tmp_path / "in2", "x")
    (tmp_path / "in/x.mtl").write_text("newmtl skin\nmap_Kd skin.png\n")
    assert any("is a link to" in n for n in read_objects(path)[1])


def header(path: Path, change: Any) -> Path:
    built = Builder()
    built.node("x", mesh=built.mesh(built.primitive()))
    change(built.header)
    return built.write(path)


REFUSED: dict[str, tuple[Any, str]] = {
    "compression": (
        lambda h: h.update(extensionsRequired=["KHR_draco_mesh_compression"]),
        "requires the glTF extension KHR_draco_mesh_compression",
    ),
    "sparse": (lambda h: h["accessors"][0].update(sparse={}), "has sparse accessors"),
    "a claim": (
        lambda h: h["accessors"].append({"count": 10**12, "componentType": 5126, "type": "VEC3"}),
        "above the limit of 4",
    ),
    "copies": (
        lambda h: (
            h.update(nodes=[{"mesh": 0} for _ in range(30)]), h.update(scenes=[{"nodes": list(range(30))}])
        ),
        "triangles, above the limit",
    ),
    "an index": (lambda h: h["accessors"][1].update(bufferView=0), "is not a mesh"),
    "no triangles": (lambda h: h["meshes"][0]["primitives"][0].update(mode=0), "has no triangles"),
    "version 1": (lambda h: h.update(asset={"version": "1.0"}), "is not a mesh"),
    "an endless tree": (
        lambda h: h.update(nodes=[{"mesh": 0, "children": [1]}, {"children": [0]}]), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_gltf_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAID_MAX_TRIANGLES", "50")
    change, says = REFUSED[name]
    path = header(tmp_path / "x.glb", change)
    if says is None:  # ends, with or without an error
        try:
            read_objects(path)
        except ValueError as error:
            assert "x.glb" in str(error)
        return
    with pytest.raises(ValueError, match=says) as error:
        read_objects(path)
    assert "x.glb" in str(error.value)


def test_parts_that_are_left_out_are_stated(tmp_path: Path) -> None:
    def change(h: dict[str, Any]) -> None:
        first = h["meshes"][0]["primitives"][0]
        h["meshes"][0]["primitives"] += [{**first, "mode": 1}, {**first, "mode": 6}]
        h["extensionsUsed"] = ["EXT_mesh_gpu_instancing"]

    notes = read_objects(header(tmp_path / "x.glb", change))[1]
    assert [n.split(" ")[1] for n in notes] == ["triangle", "parts", "is"]


def test_cameras_and_files_without_scenes(tmp_path: Path) -> None:
    def change(h: dict[str, Any]) -> None:
        h["cameras"] = [{"type": "perspective", "perspective": {"yfov": 1.0, "znear": 0.1}}]
        h["nodes"] = [{"camera": 0, "name": "eye", "children": [1]}, {"mesh": 0, "name": "lens"}]
        del h["scenes"]

    path = header(tmp_path / "x.glb", change)
    assert names(path, "node") == ["lens"] and names(path) == ["eye"]


def test_other_scenes_and_skeletons_are_stated(tmp_path: Path) -> None:
    def change(h: dict[str, Any]) -> None:
        h["nodes"].append({"mesh": 0, "name": "other"})
        h.update(scenes=[{"nodes": [0]}, {"nodes": [1]}], skins=[{"joints": [0]}], scene=1)

    found, notes = read_objects(header(tmp_path / "x.glb", change))
    assert [o.name for o in found] == ["other"]
    assert notes == [
        "contains 2 scenes, only the default one is imported",
        "has a skeleton: the mesh is imported without its pose",
    ]


@pytest.mark.parametrize("keep", [4, 11, 30, 300, -40])
def test_truncated_files(keep: int, tmp_path: Path) -> None:
    path = header(tmp_path / "x.glb", lambda h: None)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.glb"):
        read_objects(path)


@pytest.mark.parametrize("suffix", mesh_files.FILES)
@pytest.mark.parametrize(
    "content", [b"", b"no", b"\x00" * 200, b"ply\nformat ascii 1.0\n", b"[" * 4000, b"solid"]
)
def test_other_content(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\{suffix}"):
        read_objects(tmp_path / f"x{suffix}")


def test_quantized_meshes(tmp_path: Path) -> None:
    built = Builder()
    points = (SQUARE * 32767).astype("i2")
    square = built.primitive()
    square["attributes"]["POSITION"] = built.array(points, normalized=True)
    built.header["extensionsRequired"] = ["KHR_mesh_quantization"]
    built.node("x", mesh=built.mesh(square), scale=[2, 2, 2])
    (one,) = read_objects(built.write(tmp_path / "x.glb"))[0]
    assert np.allclose(np.ptp(one.triangles, axis=(0, 1)), [4, 4, 0], atol=1e-3)


def test_notes_name_no_file_twice(tmp_path: Path) -> None:
    path = square_obj(tmp_path / "in", "gone.png")
    notes = read_objects(path)[1]
    assert len(notes) == len(set(notes)) == 1 and json.dumps(notes).count("gone.png") == 1
