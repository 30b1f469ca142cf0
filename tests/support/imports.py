"""Adapter files as other programs write them, each with its effect by the formula that the program uses.

Nothing here uses inlaid: names, factors and products are written from the programs' own layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WAN = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
ROOT = {
    "proj_out": "head.head",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "patch_embedding": "patch_embedding",
}
LAYERS = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in list(WAN)[:8] + list(WAN)[10:]]


def original(module: str) -> str:
    """Name of a layer of Wan in its own code."""
    if module in ROOT:
        return ROOT[module]
    leaf = next(x for x in WAN if module.endswith(f".{x}"))
    return module.removesuffix(leaf) + WAN[leaf]


@dataclass
class Case:
    """A file, its effect by parameter, and the options of its import."""

    path: Path
    effect: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    """Effects by folder, of a file with two experts."""
    says: str = ""
    """Text that a note of the import contains."""


class Make:
    """Random tensors for the layers of a network, and files of them."""

    def __init__(self, network: nn.Module, folder: Path, seed: int = 0) -> None:
        self.network, self.folder = network, folder
        self.generator = torch.Generator().manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) * 0.3

    def weight(self, module: str) -> Tensor:
        return self.network.get_submodule(module).weight.detach().clone()

    def lora(self, module: str, rank: int = 3) -> tuple[Tensor, Tensor]:
        """Factors A (r, in, ...) and B (out, r, 1, ...) of a layer."""
        w = self.weight(module)
        return self.rand(rank, *w.shape[1:]), self.rand(w.shape[0], rank, *[1] * (w.ndim - 2))

    def save(self, tensors: Mapping[str, Tensor], name: str = "a.safetensors", header: Any = None) -> Path:
        path = self.folder / name
        if path.suffix == ".safetensors":
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=header)
        else:
            torch.save(dict(tensors), path)
        return path

    def config(self, **values: Any) -> None:
        """`adapter_config.json` of peft."""
        values = {"peft_type": "LORA", "bias": "none", "use_dora": False, **values}
        (self.folder / "adapter_config.json").write_text(json.dumps(values))


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * (b.flatten(1).double() @ a.flatten(1).double()).float().reshape(b.shape[0], *a.shape[1:])


Spell = Callable[[str], str]

SPELLINGS: dict[str, tuple[Spell, str, str]] = {
    "diffusers": (lambda m: f"transformer.{m}", "lora_A.weight", "lora_B.weight"),
    "comfyui": (lambda m: f"diffusion_model.{original(m)}", "lora_A.weight", "lora_B.weight"),
    "comfyui, dotted factors": (
        lambda m: f"diffusion_model.{original(m)}",
        "lora.down.weight",
        "lora.up.weight",
    ),
    "SimpleTuner comfyui": (lambda m: f"diffusion_model.{m}", "lora_A.weight", "lora_B.weight"),
    "SimpleTuner lycoris": (
        lambda m: "lycoris_" + m.replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "ai-toolkit flat": (
        lambda m: "lycoris_" + original(m).replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "OneTrainer": (
        lambda m: "lora_transformer_" + m.replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "musubi": (
        lambda m: "lora_unet_" + original(m).replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "Wan-Fun": (
        lambda m: "lora_unet__" + original(m).replace(".", "_"),
        "lora_down.weight",
        "lora_up.weight",
    ),
    "DiffSynth pipe.dit": (
        lambda m: f"pipe.dit.{original(m)}",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
    "DiffSynth dit": (lambda m: f"dit.{original(m)}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft, original names": (
        lambda m: f"base_model.model.{original(m)}",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "peft of a wrapped network": (
        lambda m: f"base_model.model.transformer.{m}",
        "lora_A.weight",
        "lora_B.weight",
    ),
}


def spelled(make: Make, spelling: str, modules: list[str] = LAYERS, alpha: float = 7.0) -> Case:
    """A LoRA of rank 3, 2 in one layer, with `.alpha` of each layer."""
    name, down, up = SPELLINGS[spelling]
    tensors, effect = {}, {}
    for i, module in enumerate(modules):
        a, b = make.lora(module, 2 if i == 1 else 3)
        tensors[f"{name(module)}.{down}"], tensors[f"{name(module)}.{up}"] = a, b
        tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
        effect[f"{module}.weight"] = product(a, b, alpha / a.shape[0])
    return Case(make.save(tensors), effect)


# --- peft folders -------------------------------------------------------------------------------------------


def peft_bin(make: Make) -> Case:
    tensors, effect = {}, {}
    for module in LAYERS:
        a, b = make.lora(module, 8)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        effect[f"{module}.weight"] = product(a, b, 32 / 8)
    make.save(tensors, "adapter_model.bin")
    make.config(r=8, lora_alpha=32)
    return Case(make.folder, effect)


def patterns(make: Make, *, originals: bool, rslora: bool = False) -> Case:
    """Ranks and alphas by peft's pattern rule on the names in the file; the first pattern wins."""
    ends = {"q": ("self_attn.q", "attn1.to_q"), "ffn": (r"1\.ffn\.2", r"1\.ffn\.net\.2")}
    i = 0 if originals else 1
    ranks = {ends["q"][i]: 2, ends["ffn"][i]: 5}
    alphas = {ends["ffn"][i]: 1.5, ends["q"][i]: 6, "q|to_q": 100, "nothing": 3}
    tensors, effect = {}, {}
    for module in LAYERS:
        rank = 2 if module.endswith("attn1.to_q") else 5 if module == "blocks.1.ffn.net.2" else 4
        value = 6 if rank == 2 else 1.5 if rank == 5 else 100 if module.endswith("attn2.to_q") else 9
        a, b = make.lora(module, rank)
        name = f"base_model.model.{original(module) if originals else module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        scale = value / rank**0.5 if rslora else value / rank
        effect[f"{module}.weight"] = product(a, b, scale)
    if not originals:
        alphas = {k.replace("q|to_q", "to_q"): v for k, v in alphas.items()}
    make.save(tensors, "adapter_model.safetensors")
    make.config(r=4, lora_alpha=9, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    return Case(
        make.folder, effect, says="1 patterns of alpha_pattern apply to no layer of the file (nothing)"
    )


def of_peft(make: Make, **options: Any) -> Case:
    """A network that peft itself trained, saved by peft; the effect is that of peft's own merge."""
    import copy

    from peft import LoraConfig, get_peft_model

    before = {k: v.clone() for k, v in make.network.state_dict().items()}
    options = {"r": 3, "lora_alpha": 7, "target_modules": LAYERS, **options}
    model = get_peft_model(copy.deepcopy(make.network), LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=make.generator)
    model.save_pretrained(str(make.folder))
    merged = model.merge_and_unload().state_dict()
    changed = {k: merged[k] - v for k, v in before.items() if not torch.equal(merged[k], v)}
    return Case(make.folder, changed)


# --- alpha, shapes, experts ---------------------------------------------------------------------------------


def plain_alpha(make: Make, key: str) -> Case:
    tensors, effect = {}, {}
    for module in LAYERS:
        a, b = make.lora(module, 8)
        tensors[f"diffusion_model.{original(module)}.lora_A.weight"] = a
        tensors[f"diffusion_model.{original(module)}.lora_B.weight"] = b
        effect[f"{module}.weight"] = product(a, b, 4 / 8)
    return Case(make.save(tensors, header={key: "4.0", "ss_network_dim": "8"}), effect, says=key)


def odd_shapes(make: Make, flat_convolution: bool) -> Case:
    """Factors of linear layers with two more axes, and of the 3-D convolution with or without its kernel."""
    tensors, effect = {}, {}
    for module in [*LAYERS, "patch_embedding"]:
        a, b = make.lora(module)
        effect[f"{module}.weight"] = product(a, b, 7 / 3)
        if a.ndim == 2:
            a, b = a[:, :, None, None], b[:, :, None, None]
        elif flat_convolution:
            a, b = a.flatten(1), b.flatten(1)
        name = "lora_unet_" + original(module).replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = torch.tensor(7.0)
    return Case(make.save(tensors), effect)


EXPERTS = {
    "diffusers": ("transformer.", "transformer_2.", lambda m: m),
    "ai-toolkit": ("diffusion_model.transformer_1.", "diffusion_model.transformer_2.", original),
}


def experts(make: Make, program: str, which: tuple[str, ...]) -> Case:
    high, low, spell = EXPERTS[program]
    tensors, effects, header = {}, {}, {}
    for expert in which:
        prefix, alpha = (high, 5) if expert == "high" else (low, 2)
        effects[expert] = {}
        for module in LAYERS:
            a, b = make.lora(module)
            tensors[f"{prefix}{spell(module)}.lora_A.weight"] = a
            tensors[f"{prefix}{spell(module)}.lora_B.weight"] = b
            if program != "diffusers":
                tensors[f"{prefix}{spell(module)}.alpha"] = torch.tensor(float(alpha))
            effects[expert][f"{module}.weight"] = product(a, b, alpha / 3)
        header |= {f"{prefix}r": 3, f"{prefix}lora_alpha": alpha, f"{prefix}peft_type": "LORA"}
    about = {"lora_adapter_metadata": json.dumps(header)} if program == "diffusers" else None
    path = make.save(tensors, header=about)
    if len(which) == 1:
        says = "load_into_transformer_2=True" if which == ("low",) else ""
        return Case(path, effects[which[0]], says=says)
    return Case(path, {}, parts=effects, says="adapters of two experts")


# --- LyCORIS ------------------------------------------------------------------------------------------------


def _first(n: int, factor: int) -> int:
    """LyCORIS: the factor if it divides the dimension, else the largest divisor up to it and to the root."""
    if factor > 0 and n % factor == 0:
        return factor
    limit = n if factor == -1 else factor
    return max(d for d in range(1, int(n**0.5) + 1) if n % d == 0 and d <= limit)


def lokr(make: Make, spelling: str, **how: Any) -> Case:
    """LoKr: scale alpha / r if a factor is decomposed, else 1 (LyCORIS), or always alpha / r (peft)."""
    rank, alpha, full = how.get("rank", 2), how.get("alpha", 5.0), how.get("full", False)
    dtype, rule, both = how.get("dtype", torch.float32), how.get("rule", "lycoris"), how.get("both", False)
    factors = how.get("factors", {"attn": 4, "ffn": 4})
    name = SPELLINGS[spelling][0]
    tensors, effect = {}, {}
    for module in LAYERS:
        n_out, n_in = make.weight(module).shape
        factor = factors["ffn" if ".ffn." in module else "attn"]
        o1, i1 = _first(n_out, factor), _first(n_in, factor)
        o2, i2, own = n_out // o1, n_in // i1, {}
        if both:
            own["lokr_w1_a"], own["lokr_w1_b"] = make.rand(o1, rank), make.rand(rank, i1)
        else:
            own["lokr_w1"] = make.rand(o1, i1)
        if full:
            own["lokr_w2"] = make.rand(o2, i2)
        else:
            own["lokr_w2_a"], own["lokr_w2_b"] = make.rand(o2, rank), make.rand(rank, i2)
        own = {k: v.to(dtype) for k, v in own.items()}
        tensors |= {f"{name(module)}.{k}": v for k, v in own.items()}
        if rule == "lycoris":
            tensors[f"{name(module)}.alpha"] = torch.tensor(alpha).to(dtype)
        d = {k: v.double() for k, v in own.items()}
        w1 = d["lokr_w1"] if "lokr_w1" in d else d["lokr_w1_a"] @ d["lokr_w1_b"]
        w2 = d["lokr_w2"] if "lokr_w2" in d else d["lokr_w2_a"] @ d["lokr_w2_b"]
        scale = 1.0 if rule == "lycoris" and full and not both else alpha / rank
        effect[f"{module}.weight"] = (scale * torch.kron(w1, w2)).float()
    if rule == "lycoris":
        return Case(make.save(tensors), effect, says=how.get("says", "LoKr"))
    make.save(tensors, "adapter_model.safetensors")
    make.config(peft_type="LOKR", r=rank, alpha=alpha, decompose_factor=4)
    return Case(make.folder, effect, says="LoKr")


def loha(make: Make, spelling: str, *, ranks: tuple[int, int] = (2, 2), alphas: tuple[float, float]) -> Case:
    name, tensors, effect = SPELLINGS[spelling][0], {}, {}
    for i, module in enumerate(LAYERS):
        (n_out, n_in), rank, alpha = make.weight(module).shape, ranks[i % 2], alphas[i % 2]
        own = {f"hada_w{k}_a": make.rand(n_out, rank) for k in (1, 2)}
        own |= {f"hada_w{k}_b": make.rand(rank, n_in) for k in (1, 2)}
        tensors |= {f"{name(module)}.{k}": v for k, v in own.items()}
        tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
        first, second = (own[f"hada_w{k}_a"].double() @ own[f"hada_w{k}_b"].double() for k in (1, 2))
        effect[f"{module}.weight"] = (alpha / rank * first * second).float()
    return Case(make.save(tensors), effect, says="LoHa")


# --- DoRA ---------------------------------------------------------------------------------------------------


def dora_scale(make: Make, rule: str, *, partial: bool = False, columns: bool = False) -> Case:
    """`dora_scale` by ComfyUI's formula or LyCORIS's, per row or per column, in all layers or in some."""
    tensors, effect = {}, {}
    name, down, up = SPELLINGS["comfyui" if rule == "comfyui" else "OneTrainer"]
    for i, module in enumerate(LAYERS):
        (a, b), w = make.lora(module), make.weight(module)
        tensors[f"{name(module)}.{down}"], tensors[f"{name(module)}.{up}"] = a, b
        tensors[f"{name(module)}.alpha"] = torch.tensor(7.0)
        merged = w + product(a, b, 7 / 3)
        if partial and i % 2:
            effect[f"{module}.weight"] = merged - w
            continue
        axis = 0 if columns else 1
        norm = (w if rule == "comfyui" else merged).norm(dim=axis, keepdim=True)
        m = w.norm(dim=axis, keepdim=True) * (0.8 + 0.4 * torch.rand(norm.shape, generator=make.generator))
        tensors[f"{name(module)}.dora_scale"] = m
        effect[f"{module}.weight"] = merged * m / norm - w
    options = {} if columns else {"dora_scale": rule}
    return Case(make.save(tensors), effect, options)


# --- Mochi, CogVideoX and MIDI ------------------------------------------------------------------------------


def genmo(make: Make, kind: str) -> Case:
    """genmo's own LoRA: rows of B in thirds for query, key, value, which share A; alpha in the settings."""
    tensors, effect = {}, {}
    width, text = 64, make.weight("transformer_blocks.0.attn1.add_q_proj").shape[1]
    for i in range(2):
        block = f"transformer_blocks.{i}.attn1"
        fused = {
            "qkv_x": (width, [f"to_{x}" for x in "qkv"]),
            "qkv_y": (text, [f"add_{x}_proj" for x in "qkv"]),
        }
        for name, (n_in, layers) in fused.items():
            a, b = make.rand(4, n_in), make.rand(3 * width, 4)
            tensors[f"blocks.{i}.attn.{name}.lora_A"], tensors[f"blocks.{i}.attn.{name}.lora_B"] = a, b
            for k, layer in enumerate(layers):
                effect[f"{block}.{layer}.weight"] = product(a, b[k * width : (k + 1) * width], 6 / 4)
        for name, layer in [("proj_x", "to_out.0")] + ([("proj_y", "to_add_out")] if i == 0 else []):
            a, b = make.lora(f"{block}.{layer}", 2)
            tensors[f"blocks.{i}.attn.{name}.lora_A"], tensors[f"blocks.{i}.attn.{name}.lora_B"] = a, b
            effect[f"{block}.{layer}.weight"] = product(a, b, 5 / 2)
    settings = {
        "qkv_proj_lora_rank": 4,
        "qkv_proj_lora_alpha": 6,
        "out_proj_lora_rank": 2,
        "out_proj_lora_alpha": 5,
    }
    if kind == "safetensors":
        return Case(make.save(tensors, header={"kwargs": json.dumps(settings)}), effect, says="genmo")
    path = make.folder / "lora.pt"
    torch.save({"state_dict": tensors, "kwargs": settings}, path)
    return Case(path, effect, says="genmo")


def mochi_comfyui(make: Make) -> Case:
    """Names of genmo under `diffusion_model.`: block-diagonal qkv, and layers with exchanged halves."""
    tensors, effect = {}, {}
    for i in range(2):
        block = f"transformer_blocks.{i}"
        own = {
            f"{block}.attn1.to_{x}": make.lora(f"{block}.attn1.to_{x}", r)
            for x, r in zip("qkv", (2, 3, 1), strict=True)
        }
        effect |= {f"{m}.weight": product(a, b, 1.0) for m, (a, b) in own.items()}
        name = f"diffusion_model.blocks.{i}.attn.qkv_x"
        tensors[f"{name}.lora_A.weight"] = torch.cat([a for a, _ in own.values()])
        tensors[f"{name}.lora_B.weight"] = torch.block_diag(*[b for _, b in own.values()])
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
        swapped = {f"blocks.{i}.mlp_x.w1": f"{block}.ff.net.0.proj"}
        swapped |= {"final_layer.mod": "norm_out.linear"} if i == 0 else {}
        for theirs, module in swapped.items():
            a, b = make.lora(module)
            first, second = b.chunk(2)
            tensors[f"diffusion_model.{theirs}.lora_A.weight"] = a
            tensors[f"diffusion_model.{theirs}.lora_B.weight"] = torch.cat([second, first])
            tensors[f"diffusion_model.{theirs}.alpha"] = torch.tensor(7.0)
            effect[f"{module}.weight"] = product(a, b, 7 / 3)
        last = {0: "norm1_context.linear", 1: "norm1_context.linear_1"}[i]
        for theirs, ours in {"mlp_x.w2": "ff.net.2", "mod_x": "norm1.linear", "mod_y": last}.items():
            a, b = make.lora(f"{block}.{ours}")
            tensors[f"diffusion_model.blocks.{i}.{theirs}.lora_A.weight"] = a
            tensors[f"diffusion_model.blocks.{i}.{theirs}.lora_B.weight"] = b
            tensors[f"diffusion_model.blocks.{i}.{theirs}.alpha"] = torch.tensor(7.0)
            effect[f"{block}.{ours}.weight"] = product(a, b, 7 / 3)
    return Case(make.save(tensors), effect)


def sat(make: Make, wrapped: str) -> Case:
    """SAT: a whole checkpoint with lists of factors; alpha 1 is passed."""
    tensors, effect = {}, {}
    prefix = "model.diffusion_model.transformer.layers"
    for i in range(2):
        block = f"transformer_blocks.{i}.attn1"
        for k, layer in enumerate(("to_q", "to_k", "to_v")):
            a, b = make.lora(f"{block}.{layer}", 4)
            tensors[f"{prefix}.{i}.attention.query_key_value.matrix_A.{k}"] = a
            tensors[f"{prefix}.{i}.attention.query_key_value.matrix_B.{k}"] = b
            effect[f"{block}.{layer}.weight"] = product(a, b, 1 / 4)
        a, b = make.lora(f"{block}.to_out.0", 4)
        tensors[f"{prefix}.{i}.attention.dense.matrix_A.0"] = a
        tensors[f"{prefix}.{i}.attention.dense.matrix_B.0"] = b
        effect[f"{block}.to_out.0.weight"] = product(a, b, 1 / 4)
        tensors[f"{prefix}.{i}.attention.query_key_value.original.weight"] = make.rand(96, 32)
    path = make.folder / "mp_rank_00_model_states.pt"
    torch.save({wrapped: tensors, "step": 3} if wrapped else tensors, path)
    return Case(path, effect, {"alpha": 1.0}, says="2 other tensors of the checkpoint")


COG = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
}


def cogvideox(make: Make, program: str) -> Case:
    tensors, effect = {}, {}
    names = {
        f"transformer_blocks.{i}.{ours}": (
            f"diffusion_model.blocks.{i}.{theirs}"
            if program == "comfyui"
            else f"lora_unet_transformer_blocks_{i}_{ours.replace('.', '_')}"
        )
        for i in range(2)
        for ours, theirs in COG.items()
    }
    if program == "comfyui":
        names["time_embedding.linear_1"] = "diffusion_model.time_embedding_linear_1"
        names["patch_embed.text_proj"] = "diffusion_model.patch_embed.text_proj"
    for module, name in names.items():
        a, b = make.lora(module)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = torch.tensor(7.0)
        effect[f"{module}.weight"] = product(a, b, 7 / 3)
    return Case(make.save(tensors), effect)


def midi(make: Make, prefix: str, adapter: str, wrapped: str, name: str = "lora_weights.pth") -> Case:
    modules = [
        n
        for n, m in make.network.named_modules()
        if isinstance(m, nn.Linear) and (".attn" in n or ".ff." in n or "skip_linear" in n)
    ]
    assert any("skip_linear" in n for n in modules)
    tensors, effect = {}, {}
    for module in modules:
        a, b = make.lora(module, 4)
        tensors[f"{prefix}{module}.lora_A{adapter}.weight"] = a
        tensors[f"{prefix}{module}.lora_B{adapter}.weight"] = b
        effect[f"{module}.weight"] = product(a, b, 1.0)
    place = make.folder / "lora-final"
    place.mkdir()
    torch.save({wrapped: tensors} if wrapped else tensors, place / name)
    return Case(place, effect, says="alpha = rank is assumed")
