"""Adapters in the layouts of other programs."""

from __future__ import annotations

import copy

import torch

from inlaid import families

WAN = families.get("wan")


LEAVES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


ALL = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in LEAVES]


@torch.no_grad()
def run(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 4, 4, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def trained(base, *, rank=4, alpha=4, dora=False, modules=ALL, **options):
    """A network with a random adapter, as training leaves it; its tensors; its peft configuration."""
    from peft import LoraConfig, get_peft_model_state_dict

    model = copy.deepcopy(base)
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=list(modules), **options)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
            elif ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model, get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def pipeline(transformer):
    from diffusers import WanPipeline

    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def original(module: str) -> str:
    leaf = next(x for x in LEAVES if module.endswith(f".{x}"))
    return module.removesuffix(leaf) + LEAVES[leaf]


def spell(tensors, layout: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The same adapter as other programs write it; written from their documentation, not from `formats`."""
    down_up = {"lora_A": "lora_down", "lora_B": "lora_up"}
    out = {}
    for key, tensor in tensors.items():
        module, kind = key.split(".lora_")[0], "lora_" + key.split(".lora_")[1]
        part, leaf = kind.split(".")[0], "" if "magnitude" in kind else ".weight"
        flat = "lora_unet_" + original(module).replace(".", "_")
        name, suffix = {
            "diffusers": (f"transformer.{module}", kind),
            "bare": (module, kind),
            "peft": (f"base_model.model.{module}", kind),
            "comfyui": (f"diffusion_model.{original(module)}", kind),
            "comfyui-down": (f"diffusion_model.{original(module)}", down_up.get(part, part) + leaf),
            "comfyui-model": (f"model.diffusion_model.{original(module)}", kind),
            "diffsynth": (original(module), f"{part}.default{leaf or '.weight'}"),
            "wan-alpha": (f"pipe.dit.{original(module)}", f"{part}.default{leaf}"),
            "parameter": (original(module), part),
            "kohya": (flat, down_up.get(part, part) + leaf),
            "kohya-diffusers": ("lora_unet_" + module.replace(".", "_"), down_up.get(part, part) + leaf),
        }[layout]
        out[f"{name}.{suffix}"] = tensor.clone()
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(float(alpha))
    return out


LAYOUTS = {
    "diffusers": "diffusers",
    "bare": "bare",
    "peft": "peft",
    "comfyui": "comfyui",
    "comfyui-down": "comfyui",
    "comfyui-model": "comfyui",
    "diffsynth": "original",
    "wan-alpha": "original",
    "parameter": "original",
    "kohya": "kohya",
    "kohya-diffusers": "kohya",
}
