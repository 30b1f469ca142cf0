"""Loaders of adapter files of ten programs: (base weights, file) -> (new weights, unused keys).

The weights are tensors by the names of the program, with biases. Each loader is written from the
description of the program's lookup and arithmetic, in float32, and skips, drops or fails as the program does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Result = tuple[State, list[str]]

UP_DOWN = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


def flat(tensor: Tensor) -> Tensor:
    return tensor.float().flatten(1)


def _comfy_names(key: str, family: str) -> list[str]:
    """All names under which ComfyUI looks for an adapter of a weight."""
    if not key.endswith(".weight"):
        return [f"diffusion_model.{key}"]
    name = key.removesuffix(".weight")
    names = [f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")]
    return [*names, name] if family == "mochi" else names


def comfy(base: Mapping[str, Tensor], file: Mapping[str, Tensor], family: str = "wan") -> Result:
    """ComfyUI core, loader of adapters."""
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    for key, weight in base.items():
        for name in _comfy_names(key, family):
            patched = _comfy_patch(weight.float(), file, name, left)
            if patched is not None and patched.numel() == weight.numel():
                new[key] = patched.reshape(weight.shape)
            bias = f"{name}.diff_b"
            if bias in file:
                left.discard(bias)
                key_of_bias = key.removesuffix(".weight") + ".bias"
                new[key_of_bias] = new[key_of_bias] + file[bias].float().reshape(base[key_of_bias].shape)
    return new, sorted(left)


def _comfy_patch(weight: Tensor, file: Mapping[str, Tensor], name: str, left: set[str]) -> Tensor | None:
    def take(part: str) -> Tensor | None:
        if f"{name}{part}" in file:
            left.discard(f"{name}{part}")
        found = file.get(f"{name}{part}")
        return None if found is None else found.float()

    alpha, dora = take(".alpha"), take(".dora_scale")
    delta = None
    for up, down in UP_DOWN:
        if f"{name}{up}" in file:
            a, b = take(down), take(up)
            assert a is not None and b is not None, f"KeyError: {name}{down}"
            delta = flat(b) @ flat(a) * (1.0 if alpha is None else alpha.item() / a.shape[0])
    if delta is None and (f"{name}.lokr_w1" in file or f"{name}.lokr_w1_a" in file):
        dim, factors = None, []
        for i in (1, 2):
            whole, a, b = take(f".lokr_w{i}"), take(f".lokr_w{i}_a"), take(f".lokr_w{i}_b")
            if whole is None:
                assert a is not None and b is not None
                whole, dim = a @ b, b.shape[0]
            factors.append(whole)
        delta = torch.kron(*factors) * (alpha.item() / dim if alpha is not None and dim else 1.0)
    if delta is None and f"{name}.hada_w1_a" in file:
        w1a, w1b, w2a, w2b = (take(f".hada_w{i}_{x}") for i in (1, 2) for x in "ab")
        delta = (w1a @ w1b) * (w2a @ w2b) * (1.0 if alpha is None else alpha.item() / w1b.shape[0])
    full = take(".diff")
    if full is not None:
        delta = flat(full) if full.ndim > 1 else full[:, None]
    if delta is None:
        return None
    if delta.numel() != weight.numel():
        return None  # ERROR in the log, the layer stays as it is
    result = weight + delta.reshape(weight.shape)
    if dora is None:
        return result
    if dora.shape[0] == weight.shape[0]:
        if dora.ndim not in (2, weight.ndim):
            return None
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    scaled = result * (dora / (norm + torch.finfo(torch.float32).eps))
    return scaled if scaled.shape == weight.shape else None


def musubi(base: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> Result:
    """musubi-tuner, Wan. The first key decides the kind."""
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    marks = {"lora_down": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr"}
    kind = next((marks[m] for k in file for m in marks if m in k), None)
    for key, weight in base.items():
        if not key.endswith(".weight") or kind is None:
            continue
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")

        def take(part: str, name: str = name) -> Tensor | None:
            left.discard(f"{name}.{part}")
            return file.get(f"{name}.{part}")

        delta = None
        if kind == "lora" and f"{name}.lora_down.weight" in file:
            a, b, alpha = take("lora_down.weight"), take("lora_up.weight"), take("alpha")
            assert a is not None and b is not None
            if weight.ndim == 5:
                raise RuntimeError("shape of patch_embedding")
            scale = a.shape[0] if alpha is None else alpha.item()
            delta = flat(b) @ flat(a) * scale / a.shape[0]
        elif kind == "loha" and f"{name}.hada_w1_a" in file:
            parts = [take(f"hada_w{i}_{x}") for i in (1, 2) for x in "ab"]
            alpha = take("alpha")
            w1a, w1b, w2a, w2b = (p.float() for p in parts if p is not None)
            rank = w1b.shape[0]
            delta = (w1a @ w1b) * (w2a @ w2b) * ((rank if alpha is None else alpha.item()) / rank)
        elif kind == "lokr" and f"{name}.lokr_w1" in file:
            w1, w2, a, b, alpha = (take(p) for p in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"))
            assert w1 is not None
            scale = 1.0
            if w2 is None:
                assert a is not None and b is not None
                w2, scale = (
                    a.float() @ b.float(),
                    (b.shape[0] if alpha is None else alpha.item()) / b.shape[0],
                )
            delta = torch.kron(w1.float(), w2.float()) * scale
        if delta is not None:
            new[key] = weight + delta.reshape(weight.shape)
    return new, sorted(left)


def diffsynth(base: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> Result:
    """DiffSynth-Studio. What is not a factor of a known module is dropped without a message."""
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    for key in file:
        up = ".lora_B." if ".lora_B." in key else ".lora_up." if ".lora_up." in key else None
        if up is None:
            continue
        name, _, rest = key.partition(up)
        down = key.replace(up, {".lora_B.": ".lora_A.", ".lora_up.": ".lora_down."}[up])
        assert rest in ("weight", "default.weight")
        module = name.removeprefix("diffusion_model.")
        weight = base.get(f"{module}.weight")
        if weight is None:
            continue
        alpha = file.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / file[down].shape[0]
        new[f"{module}.weight"] = weight + scale * file[key].float() @ file[down].float()  # 2-D or it fails
        left -= {key, down, f"{name}.alpha"}
    return new, sorted(left)


def load_dora(base: Mapping[str, Tensor], file: Mapping[str, Tensor], ratio: float = 1.0) -> Result:
    """Wan-Alpha, `load_dora`: three tensors for each layer or a KeyError; no alpha."""
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    plain = {}
    for key, tensor in file.items():
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?\.weight", key)
        if found:
            plain[f"{found[1].removeprefix('diffusion_model.')}.{found[2]}"] = (key, tensor.float())
    for name in {k.rpartition(".")[0] for k in file if ".lora_B." in k}:
        module = re.sub(r"\.lora_B.*", "", name).removeprefix("diffusion_model.")
        (ka, a), (kb, b), (km, m) = (
            plain[f"{module}.{part}"] for part in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        weight = base[f"{module}.weight"] + ratio * b @ a
        norm = weight.norm(dim=1, keepdim=True).clamp_min(1e-8)
        new[f"{module}.weight"] = m.reshape(-1, 1) / norm * weight
        left -= {ka, kb, km}
    return new, sorted(left)


def lightx2v(base: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> Result:
    """Wan-Alpha's loader of LightX2V adapters: alpha is ignored, wrong shapes are skipped."""
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    for prefix in ("diffusion_model.", ""):
        for key in base:
            module = key.rpartition(".")[0]
            for up, down in ((".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")):
                names = f"{prefix}{module}{up}", f"{prefix}{module}{down}"
                if key.endswith(".weight") and all(n in file for n in names):
                    delta = file[names[0]].float() @ file[names[1]].float()
                    if delta.shape == base[key].shape:
                        new[key] = new[key] + delta
                        left -= set(names)
            for part, target in ((".diff", ".weight"), (".diff_b", ".bias")):
                name = f"{prefix}{module}{part}"
                if name in file and key == f"{module}{target}":
                    new[key] = new[key] + file[name].float()
                    left.discard(name)
    if len(left) == len(file):
        raise AssertionError("no layer was found")
    return new, sorted(left)


def transpixeler(
    family: str, blocks: int, file: Mapping[str, Tensor], rank: int = 128, alpha: float = 1.0
) -> tuple[dict[str, Tensor], Tensor | None, list[str]]:
    """TransPixeler, CogVideoX (`cogvideox`) or Mochi: the updates of alpha tokens by layer, and the vector.

    All four layers of all blocks must be in the file at the rank of the script: KeyError or a size mismatch.
    """
    state, left, updates = dict(file), set(file), {}
    vector = None
    if family == "cogvideox":
        vector = state["domain_emb"]
        assert vector.ndim == 3, "1-D fails in expand"
        left.discard("domain_emb")
    for i in range(blocks):
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            if family == "cogvideox":
                own = "to_out.0" if layer == "to_out" else layer
                names = [f"transformer.transformer_blocks.{i}.attn1.{own}.lora_{x}.weight" for x in "AB"]
            else:
                names = [f"block_{i}.{layer}_lora.{x}.weight" for x in (0, 1)]
            a, b = (state[name] for name in names)
            if a.shape[0] != rank or b.shape[1] != rank:
                raise RuntimeError(f"size mismatch: {tuple(a.shape)}")
            updates[f"{i}.{layer}"] = alpha / rank * b @ a
            left -= set(names)
    return updates, vector, sorted(left)


def genmo(base: Mapping[str, Tensor], file: Mapping[str, Tensor], header: Mapping[str, str]) -> Result:
    """genmo's Mochi: one rank for all fused and one for all output layers, both in the header."""
    settings = json.loads(header["kwargs"])
    new, left = {k: t.clone() for k, t in base.items()}, set(file)
    for key, weight in base.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.(qkv|proj)_[xy])\.weight", key)
        if not found or f"{found[1]}.lora_A" not in file:
            continue
        prefix = {"qkv": "qkv_proj", "proj": "out_proj"}[found[2]]
        rank, alpha = settings[f"{prefix}_lora_rank"], settings[f"{prefix}_lora_alpha"]
        a, b = file[f"{found[1]}.lora_A"], file[f"{found[1]}.lora_B"]
        assert a.dtype == b.dtype == torch.float32
        if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise RuntimeError("size mismatch")
        new[key] = weight + alpha / rank * b @ a
        left -= {f"{found[1]}.lora_A", f"{found[1]}.lora_B"}
    return new, sorted(left)


def kijai_wan(base: Mapping[str, Tensor], file: Mapping[str, Tensor], merge: bool = True) -> Result:
    """WanVideoWrapper, later tree: renames, then ComfyUI's lookup, or without merging only LoRA factors."""
    renamed = {}
    for key, tensor in file.items():
        name = key.replace(".default.", ".")
        for old, new in (("base_model.model.", ""), ("pipe.dit.", ""), ("transformer.", "diffusion_model.")):
            name = new + name.removeprefix(old) if name.startswith(old) else name
        name = f"diffusion_model.{name}" if name.startswith("blocks.") else name
        name = name.replace(".attn1.", ".cross_attn.").replace(".attn2.", ".cross_attn.")  # both: a trap
        for old, new in ((".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o.")):
            name = name.replace(old, new)
        renamed[name] = tensor
    if not merge:
        kept = (".lora_A.weight", ".lora_B.weight", ".lora_up.weight", ".lora_down.weight", ".alpha")
        renamed = {k: t for k, t in renamed.items() if k.endswith(kept)}
    return comfy(base, renamed)
