"""ComfyUI's detection of a whole model from the shapes in one file, and the tensors of the network it builds.

Written from the architectures' own code: names and shapes of all parameters that the original networks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def layers(shapes: Mapping[str, object], stem: str) -> int:
    count = 0
    while any(key.startswith(f"{stem}{count}.") for key in shapes):
        count += 1
    return count


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]] | None:
    """The family and settings that ComfyUI finds, or None: "could not detect model type"."""
    if "head.modulation" in shapes:
        dim = shapes["head.modulation"][-1]
        found = {
            "dim": dim,
            "heads": dim // 128,
            "out": shapes["head.head.weight"][0] // 4,
            "ffn": shapes["blocks.0.ffn.0.weight"][0],
            "layers": layers(shapes, "blocks."),
            "channels": shapes["patch_embedding.weight"][1],
            "images": "img_emb.proj.0.bias" in shapes,
            "positions": shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None,
        }
        if "vace_patch_embedding.weight" in shapes:
            return "wan-vace", found
        if found["images"] and found["channels"] != 36:
            return None
        return ("wan-2.2" if found["out"] == 48 else "wan-i2v" if found["images"] else "wan-t2v"), found
    if "t5_yproj.weight" in shapes:
        return "mochi", {}  # nothing is taken from the shapes
    if "blocks.0.norm1.linear.weight" in shapes:
        rows, time = shapes["blocks.0.norm1.linear.weight"]
        patch = shapes["patch_embed.proj.weight"]
        found = {
            "dim": rows // 6,
            "time": time,
            "heads": rows // 6 // 64,
            "pairs": len(patch) == 2,
            "channels": patch[1] if len(patch) == 4 else patch[1] // 8,
            "text": shapes["patch_embed.text_proj.weight"][1],
            "ofs": shapes.get("ofs_embedding_linear_1.weight", (None,))[0],
            "layers": layers(shapes, "blocks."),
            "rotary": "patch_embed.pos_embedding" not in shapes,
        }
        return ("cogvideox-i2v" if found["channels"] == 32 else "cogvideox"), found
    return None


def network(kind: str, found: Mapping[str, Any]) -> Shapes:
    """Names and shapes of all tensors of the network that ComfyUI builds."""
    if kind.startswith("wan"):
        return _wan(**found)
    return _mochi() if kind == "mochi" else _cogvideox(**found)


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _wan(
    dim: int, heads: int, out: int, ffn: int, layers: int, channels: int, images: bool, positions: int | None
) -> Shapes:
    made: Shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    made |= _linear("text_embedding.0", dim, 4096) | _linear("text_embedding.2", dim, dim)
    made |= _linear("time_embedding.0", dim, 256) | _linear("time_embedding.2", dim, dim)
    made |= _linear("time_projection.1", 6 * dim, dim)
    made |= _linear("head.head", 4 * out, dim) | {"head.modulation": (1, 2, dim)}
    for i in range(layers):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                made |= _linear(f"{block}.{attention}.{name}", dim, dim)
            made |= {f"{block}.{attention}.norm_{x}.weight": (dim,) for x in "qk"}
        if images:
            made |= _linear(f"{block}.cross_attn.k_img", dim, dim)
            made |= _linear(f"{block}.cross_attn.v_img", dim, dim)
            made[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        made |= _norm(f"{block}.norm3", dim)
        made |= _linear(f"{block}.ffn.0", ffn, dim) | _linear(f"{block}.ffn.2", dim, ffn)
        made[f"{block}.modulation"] = (1, 6, dim)
    if images:
        made |= _norm("img_emb.proj.0", 1280) | _linear("img_emb.proj.1", 1280, 1280)
        made |= _linear("img_emb.proj.3", dim, 1280) | _norm("img_emb.proj.4", dim)
    if positions:
        made["img_emb.emb_pos"] = (1, positions, 1280)
    return made


def _mochi(x: int = 3072, y: int = 1536, heads: int = 24, text: int = 4096, depth: int = 48) -> Shapes:
    def hidden(width: int) -> int:
        return -(-(2 * 4 * width // 3) // 256) * 256

    made: Shapes = {"pos_frequencies": (3, heads, x // heads // 2)}
    made |= {"x_embedder.proj.weight": (x, 12, 2, 2), "x_embedder.proj.bias": (x,)}
    made |= _linear("t_embedder.mlp.0", x, 256) | _linear("t_embedder.mlp.2", x, x)
    made |= _linear("t5_y_embedder.to_kv", 2 * text, text) | _linear("t5_y_embedder.to_q", text, text)
    made |= _linear("t5_y_embedder.to_out", x, text) | _linear("t5_yproj", y, text)
    made |= _linear("final_layer.mod", 2 * x, x) | _linear("final_layer.linear", 48, x)
    for i in range(depth):
        block, last = f"blocks.{i}", i == depth - 1
        made |= _linear(f"{block}.mod_x", 4 * x, x) | _linear(f"{block}.mod_y", y if last else 4 * y, x)
        made |= _linear(f"{block}.attn.qkv_x", 3 * x, x, False) | _linear(
            f"{block}.attn.qkv_y", 3 * x, y, False
        )
        made |= {f"{block}.attn.{n}_norm_{s}.weight": (x // heads,) for n in "qk" for s in "xy"}
        made |= _linear(f"{block}.attn.proj_x", x, x)
        made |= _linear(f"{block}.mlp_x.w1", 2 * hidden(x), x, False)
        made |= _linear(f"{block}.mlp_x.w2", x, hidden(x), False)
        if not last:
            made |= _linear(f"{block}.attn.proj_y", y, x)
            made |= _linear(f"{block}.mlp_y.w1", 2 * hidden(y), y, False)
            made |= _linear(f"{block}.mlp_y.w2", y, hidden(y), False)
    return made


def _cogvideox(
    dim: int,
    time: int,
    heads: int,
    pairs: bool,
    channels: int,
    text: int,
    ofs: int | None,
    layers: int,
    rotary: bool,
) -> Shapes:
    made = _linear("patch_embed.text_proj", dim, text)
    shape = (dim, 8 * channels) if pairs else (dim, channels, 2, 2)
    made |= {"patch_embed.proj.weight": shape, "patch_embed.proj.bias": (dim,)}
    if not rotary:
        made["patch_embed.pos_embedding"] = (1, 226 + 13 * 30 * 45, dim)
    made |= _linear("time_embedding_linear_1", time, dim) | _linear("time_embedding_linear_2", time, time)
    if ofs:
        made |= _linear("ofs_embedding_linear_1", ofs, ofs) | _linear("ofs_embedding_linear_2", ofs, ofs)
    for i in range(layers):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            made |= _linear(f"{block}.{norm}.linear", 6 * dim, time) | _norm(f"{block}.{norm}.norm", dim)
        for name in ("q", "k", "v", "attn_out"):
            made |= _linear(f"{block}.{name}", dim, dim)
        made |= _norm(f"{block}.norm_q", dim // heads) | _norm(f"{block}.norm_k", dim // heads)
        made |= _linear(f"{block}.ff_proj", 4 * dim, dim) | _linear(f"{block}.ff_out", dim, 4 * dim)
    made |= _norm("norm_final", dim) | _norm("norm_out.norm", dim) | _linear("norm_out.linear", 2 * dim, time)
    return made | _linear("proj_out", 8 * 16 if pairs else 4 * 16, dim)
