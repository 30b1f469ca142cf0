"""The same functions at other sizes than those of the goldens, against arithmetic that is written out here.

| case | sizes here | sizes of the goldens |
|---|---|---|
| merge block | features 24, width 20, 16 channels, latents 3 x 5 x 4 | features 32, width 32, 4 channels |
| decoder updates | base width 5, rank 5, 16 channels, latents 2 x 3 x 5 | width 6, rank 3, 4 channels |
| DoRA | width 36, 3 heads, ffn 60, rank 7 | width 48, 4 heads, ffn 96, rank 4 |
| joint alpha (CogVideoX) | 21 text tokens, width 48, rank 5 | (226 text tokens in published checkpoints) |
| losses | 1 x 3 x 12 x 20, feature widths 5, 7, 4, 3 | 1 x 5 x 16 x 24, 6, 6, 8, 8 |

The limits are those of the goldens.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, CogVideoXPipeline
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import save_file
from torch import Tensor

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.read import read_adapter
from inlaid.alpha.opening import build_family
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_published
from inlaid.networks.rgba_vae import RgbaVae, trunk
from inlaid.networks.rgba_vae_losses import Perceptual, RgbaLoss
from inlaid.tiny import random
from support.rgba_vaes import made

LIMIT = 1e-5


def vae_of(width: int, blocks: int = 1) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=width,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=blocks,
        temperal_downsample=[False, True, True],
    ).eval()


# --- merge block --------------------------------------------------------------------------------------------


def released_merge(features: int, width: int, channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A merge block under its published names."""

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / max(1, int(np.prod(shape[1:]))) ** 0.5

    out = {"conv1.weight": weights(width, 2 * features, 1, 1, 1), "conv1.bias": weights(width)}
    for i in (0, 2, 4):
        for j in (0, 3):
            out[f"middle.{i}.residual.{j}.gamma"] = 1 + 0.3 * weights(width, 1, 1, 1)
        for j in (2, 6):
            out[f"middle.{i}.residual.{j}.weight"] = weights(width, width, 3, 3, 3)
            out[f"middle.{i}.residual.{j}.bias"] = weights(width)
    for i in (1, 3):
        out[f"middle.{i}.norm.gamma"] = 1 + 0.3 * weights(width, 1, 1)
        for name, n in (("to_qkv", 3 * width), ("proj", width)):
            out |= {
                f"middle.{i}.{name}.weight": weights(n, width, 1, 1),
                f"middle.{i}.{name}.bias": weights(n),
            }
    out |= {"head.0.gamma": 1 + 0.3 * weights(width, 1, 1, 1)}
    out |= {"head.2.weight": weights(channels, width, 3, 3, 3), "head.2.bias": weights(channels)}
    return {f"middle.block.{k}": v for k, v in out.items()}


def merged_by_hand(w: dict[str, Tensor], rgb: Tensor, alpha: Tensor) -> Tensor:
    """The table of layers in the specification, in plain tensor arithmetic."""
    w = {k.removeprefix("middle.block."): v for k, v in w.items()}

    def norm(x: Tensor, gamma: Tensor) -> Tensor:
        scale = x.shape[1] ** 0.5 / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        return x * scale * gamma.view(1, -1, *[1] * (x.ndim - 2))

    def causal(x: Tensor, name: str) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w[f"{name}.weight"], w[f"{name}.bias"])

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def residual(x: Tensor, i: int) -> Tensor:
        y = causal(silu(norm(x, w[f"middle.{i}.residual.0.gamma"])), f"middle.{i}.residual.2")
        return x + causal(silu(norm(y, w[f"middle.{i}.residual.3.gamma"])), f"middle.{i}.residual.6")

    def attention(x: Tensor, i: int) -> Tensor:
        n, c, t, h, width = x.shape
        frames = x.transpose(1, 2).reshape(n * t, c, h * width)
        y = norm(frames, w[f"middle.{i}.norm.gamma"])
        qkv = w[f"middle.{i}.to_qkv.weight"][:, :, 0, 0] @ y + w[f"middle.{i}.to_qkv.bias"][:, None]
        q, k, v = qkv.chunk(3, 1)
        weights = (q.transpose(1, 2) @ k / c**0.5).softmax(-1)
        out = w[f"middle.{i}.proj.weight"][:, :, 0, 0] @ (v @ weights.transpose(1, 2))
        out = out + w[f"middle.{i}.proj.bias"][:, None] + frames
        return out.reshape(n, t, c, h, width).transpose(1, 2)

    x = torch.einsum("oi,bithw->bothw", w["conv1.weight"][:, :, 0, 0, 0], torch.cat([rgb, alpha], 1))
    x = residual(x + w["conv1.bias"].view(1, -1, 1, 1, 1), 0)
    x = residual(attention(x, 1), 2)
    x = residual(attention(x, 3), 4)
    return causal(silu(norm(x, w["head.0.gamma"])), "head.2")


@torch.no_grad()
def test_a_published_merge_block_of_another_width(tmp_path: Path) -> None:
    vae = vae_of(6)
    generator = torch.Generator().manual_seed(1)
    merge = released_merge(24, 20, 16, generator)
    torch.save(rgba_vae_published.decoder_layout(made(vae, rank=3)) | merge, tmp_path / "Wan-Alpha-VAE.bin")
    notes = rgba_vae_published.convert(tmp_path / "Wan-Alpha-VAE.bin", tmp_path / "out", vae)
    assert "groups found: vae_fgr, vae_pha, middle" in notes
    whole = rgba_vae_checkpoint.load(tmp_path / "out", vae)
    said = rgba_vae_checkpoint.read_config(tmp_path / "out")
    assert (said["features"], said["width"], said["rank"]) == (24, 20, {"rgb": 3, "alpha": 3})
    rgb, alpha = torch.randn(2, 1, 24, 3, 5, 4, generator=generator)
    wanted = merged_by_hand(merge, rgb, alpha)
    assert (whole.merge(rgb, alpha) - wanted).abs().max() < LIMIT and wanted.std() > 0.1
    assert (whole.merge(alpha, rgb) - wanted).abs().max() > 0.1, "color comes first"
    video = torch.rand(1, 3, 5, 32, 24, generator=generator) * 2 - 1
    wanted = merged_by_hand(merge, trunk(vae, video), trunk(vae, -video))
    assert (whole.encode(video, -video) - wanted).abs().max() < LIMIT
    exported = rgba_vae_published.whole_layout(whole)
    assert all(torch.equal(exported[k], v) for k, v in merge.items()), "and out again"


def test_a_merge_block_for_other_features_is_refused(tmp_path: Path) -> None:
    """Even one that claims a width for which no memory is left."""
    vae = vae_of(6)
    decoders = rgba_vae_published.decoder_layout(made(vae, rank=3))
    for features, change in ((32, {}), (24, {"middle.block.conv1.bias": torch.zeros(1).expand(400_000)})):
        merge = released_merge(features, 20, 16, torch.Generator().manual_seed(1)) | change
        torch.save(decoders | merge, tmp_path / "vae.bin")
        with pytest.raises(ValueError, match=r"merge block does not fit: .* this VAE needs"):
            rgba_vae_published.convert(tmp_path / "vae.bin", tmp_path / "out", vae)


# --- decoder updates ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoder_updates_of_another_rank_and_width(tmp_path: Path) -> None:
    """Against the stock VAE with W + B A / r in its weights, from the published file."""
    vae = vae_of(5, blocks=2)
    source = made(vae, seed=4, rank=5)
    published = rgba_vae_published.decoder_layout(source)
    torch.save(published, tmp_path / "decoder.bin")
    rgba_vae_published.convert(tmp_path / "decoder.bin", tmp_path / "out", vae)
    whole: RgbaVae = rgba_vae_checkpoint.load(tmp_path / "out", vae)
    z = 0.3 * torch.randn(1, 16, 2, 3, 5, generator=torch.Generator().manual_seed(2))
    for group, found in zip(("vae_fgr", "vae_pha"), whole.decode(z), strict=True):
        stock, used = vae_of(5, blocks=2), 0
        original = rgba_vae_published.original_names(2, 4)
        for name, module in stock.decoder.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                infix = ".conv3D" if module.weight.ndim == 5 else ""
                key = f"{group}.{original[f'decoder.{name}']}{infix}"
                a, b = (published[f"{key}.lora_{s}.default.weight"] for s in "AB")
                rank = b.shape[1]
                assert rank == len(a) == 5
                module.weight += (b.reshape(len(b), rank) @ a.reshape(rank, -1) / rank).view_as(module.weight)
                used += 1
        assert used == 38
        wanted = stock.decode(z).sample
        assert (found.clamp(-1, 1) - wanted).abs().max() < 2e-5 and wanted.abs().max() > 0.05
    assert (whole.decode(z)[0] - whole.decode(z)[1]).abs().max() > 1e-2


# --- DoRA ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dora_of_another_width_and_rank(tmp_path: Path) -> None:
    """m / |W + B A| (W + B A), with a norm for each row, from a file with the published names."""
    random.build("wan", tmp_path / "wan", heads=3, head=12, layers=1, ffn=60)
    family = families.get("wan")(config.Model(family="wan", checkpoint=str(tmp_path / "wan")))
    network: Any = family.load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(3)
    names = {"self_attn": "attn1", "cross_attn": "attn2"}
    layers = {
        f"{theirs}.{leaf}": f"{ours}.{'to_out.0' if leaf == 'o' else f'to_{leaf}'}"
        for theirs, ours in names.items()
        for leaf in "qkvo"
    } | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    tensors, wanted = {}, {}
    for theirs, ours in layers.items():
        weight = network.get_submodule(f"blocks.0.{ours}").weight
        a = torch.randn(7, weight.shape[1], generator=generator) / 7
        b = torch.randn(weight.shape[0], 7, generator=generator) / 7
        m = weight.norm(dim=1) * (1 + 0.2 * torch.randn(len(weight), generator=generator))
        for end, tensor in (
            ("A.default.weight", a),
            ("B.default.weight", b),
            ("magnitude_vector.default.weight", m),
        ):
            tensors[f"blocks.0.{theirs}.lora_{end}"] = tensor
        moved = weight.double() + b.double() @ a.double()
        wanted[ours] = moved * (m.double() / moved.norm(dim=1))[:, None]
    save_file(tensors, tmp_path / "epoch.safetensors")
    merge_adapter(network, read_adapter(tmp_path / "epoch.safetensors", family))
    for ours, weight in wanted.items():
        assert (network.get_submodule(f"blocks.0.{ours}").weight - weight).abs().max() < LIMIT, ours


# --- joint alpha --------------------------------------------------------------------------------------------

TEXT, RANK = 21, 5


class ByHand:
    """Attention of CogVideoX with a mask of all pairs of tokens, and updates of the alpha tokens."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        z = torch.cat([encoder_hidden_states, hidden_states], 1)
        half = hidden_states.shape[1] // 2
        start = TEXT + half

        def layer(x: Tensor, name: str) -> Tensor:
            a, b = self.layers[name]
            out = getattr(attn, name)(x) if name != "to_out.0" else attn.to_out[0](x)
            update = x[:, start:] @ a.T @ b.T / RANK
            return torch.cat([out[:, :start], out[:, start:] + update], 1)

        q, k, v = (layer(z, f"to_{n}").unflatten(-1, (attn.heads, -1)).transpose(1, 2) for n in "qkv")
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :, :TEXT], apply_rotary_emb(x[:, :, TEXT:], image_rotary_emb)], 2)
                for x in (q, k)
            )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits[:, :, :TEXT, start:] = float("-inf")
        out = layer((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), "to_out.0")
        return out[:, TEXT:], out[:, :TEXT]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["5b", "2b"])
def test_joint_alpha_with_another_text_length_and_rank(variant: str, tmp_path: Path) -> None:
    folder = random.build("cogvideox", tmp_path / "model", variant, heads=3, text=TEXT)
    raw = {
        "run": "x",
        "model": {"family": "cogvideox", "checkpoint": str(folder)},
        "data": {"sources": "x"},
        "alpha": {"kind": "joint"},
    }
    family: Any = build_family(config.build(raw))
    assert (family.text_length, family.text_before) == (TEXT, TEXT)
    generator = torch.Generator().manual_seed(5)
    denoiser = family.load_denoiser(torch.float32).eval()
    tuners.attach(config.LowRank(rank=RANK, alpha=1), family.targets, denoiser, seed=1)
    family.attached(denoiser)
    for name, p in denoiser.named_parameters():
        if "lora_B" in name or "domain_embedding" in name:
            p.copy_(torch.randn(p.shape, generator=generator))
    text = family.encode_text(
        family.load_text_encoder(torch.device("cpu"), torch.float32), ["a cat", "x" * 60]
    )
    assert [tuple(item["text"].shape) for item in text] == [(TEXT, 32)] * 2, "padded and cut to the length"
    shape = family.shapes(5, 32, 48)["latents"]
    x, t = torch.randn(2, *shape, generator=generator), torch.tensor([0.3, 0.8])
    found = family.predict(denoiser, x, t, family.collate(text))

    pipe = CogVideoXPipeline.from_pretrained(folder)
    stock = pipe.transformer.eval()
    weights = dict(denoiser.named_parameters())
    for i, block in enumerate(stock.transformer_blocks):
        path = f"transformer_blocks.{i}.attn1"
        block.attn1.processor = ByHand(
            {
                n: [weights[f"{path}.{n}.lora_{s}.default.weight"] for s in "AB"]
                for n in ("to_q", "to_k", "to_v", "to_out.0")
            }
        )
    embed = stock.patch_embed.forward

    def apart(words: Tensor, clips: Tensor) -> Tensor:
        one, two = (embed(words, clip) for clip in clips.chunk(2, 1))
        return torch.cat([one, two[:, TEXT:] + weights["domain_embedding.weight"]], 1)

    stock.patch_embed.forward = apart
    rotary = None
    if variant == "5b":
        single = pipe._prepare_rotary_positional_embeddings(32, 48, shape[1] // 2, torch.device("cpu"))
        rotary = tuple(torch.cat([part, part]) for part in single)
    step = (t * 1000).round().long() - 1
    words = torch.stack([item["text"] for item in text])
    wanted = stock(x.transpose(1, 2), words, step, image_rotary_emb=rotary, return_dict=False)[0].transpose(
        1, 2
    )
    assert (found - wanted).abs().max() < LIMIT and wanted.std() > 0.1


# --- losses -------------------------------------------------------------------------------------------------


def test_losses_of_another_size() -> None:
    """The nine terms of the released trainer, in numpy."""
    rng = np.random.default_rng(7)
    widths = (3, 5, 7, 4, 3)
    features = {}
    for index, (a, b) in zip((0, 2, 5, 7), pairwise(widths), strict=True):
        features[f"features.{index}.weight"] = rng.normal(size=(b, a, 3, 3)) / (3 * a**0.5)
        features[f"features.{index}.bias"] = rng.normal(size=b) / 3
    rgb, alpha, true_rgb, true_alpha = rng.uniform(-1, 1, (4, 1, 3, 3, 12, 20))
    true_alpha[:, :, :, :6] = -1
    hard, soft = np.array([1, -1, 1.0]), np.array([-1, -1, 1.0])

    def conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        h, w = x.shape[1:]
        return sum(
            np.einsum("oi,ihw->ohw", weight[:, :, i, j], padded[:, i : i + h, j : j + w])
            for i in range(3)
            for j in range(3)
        )

    def vgg(frame: np.ndarray) -> np.ndarray:
        x = (frame + 1) / 2
        for index in (0, 2, 5, 7):
            x = (
                conv(x, features[f"features.{index}.weight"])
                + features[f"features.{index}.bias"][:, None, None]
            )
            x = np.maximum(x, 0)
            if index == 2:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
        return x

    def edge(frame: np.ndarray) -> np.ndarray:
        gray = np.pad(np.tensordot(np.array([65.738, 129.057, 25.064]) / 256, frame, 1), 1)
        dx, dy = gray[1:-1, 2:] - gray[1:-1, :-2], gray[2:, 1:-1] - gray[:-2, 1:-1]
        return np.sqrt(dx**2 + dy**2 + 1e-6)

    def over(color: np.ndarray, opacity: np.ndarray, back: np.ndarray, *, strict: bool) -> np.ndarray:
        a = (opacity + 1) / 2
        a = (a > 0).astype(float) if strict else a
        return color * a + back[:, None, None, None] * (1 - a)

    pairs = {
        "alpha": (alpha, true_alpha),
        "rgb_soft": (over(rgb, alpha, soft, strict=False), over(true_rgb, true_alpha, soft, strict=False)),
        "rgb_hard": (over(rgb, alpha, hard, strict=True), over(true_rgb, true_alpha, hard, strict=True)),
    }
    wanted = {}
    for name, (one, two) in pairs.items():
        frames = [
            (a, b) for a, b in zip(one[0].transpose(1, 0, 2, 3), two[0].transpose(1, 0, 2, 3), strict=True)
        ]
        wanted[f"l1_{name}"] = np.abs(one - two).mean()
        wanted[f"edge_{name}"] = np.mean([np.abs(edge(a) - edge(b)).mean() for a, b in frames])
        wanted[f"perceptual_{name}"] = np.mean([np.square(vgg(a) - vgg(b)).mean() for a, b in frames])
    wanted["loss"] = sum(wanted.values())
    tensors = {k: torch.tensor(v, dtype=torch.float32) for k, v in features.items()}
    given = [torch.tensor(x, dtype=torch.float32) for x in (rgb, alpha, true_rgb, true_alpha, hard, soft)]
    found = RgbaLoss("reference", Perceptual(tensors, imagenet=False), alpha_eps=0)(*given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, abs=LIMIT), name
