"""TripoSG and MIDI networks against the reference's numbers, and what they owe by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inlaid.networks.triposg import (
    MULTI_INSTANCE_BLOCKS,
    Attention,
    TripoSGTransformer,
    TripoSGVAE,
    choose_points,
    infer_config,
    sample_posterior,
)

LIMIT = 1e-5


def golden(root: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict]:
    path = root / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    parts = (
        {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)}
        for p in ("weights.", "inputs.", "outputs.")
    )
    return *parts, settings  # type: ignore[return-value]


def build(weights: dict[str, Tensor], multi_instance: tuple[int, ...]) -> TripoSGTransformer:
    model = TripoSGTransformer(
        **infer_config({k: v.shape for k, v in weights.items()}), multi_instance=multi_instance
    )
    model.load_state_dict(weights)
    return model.eval()


def off(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def test_midi_is_the_reference_s(goldens_root: Path) -> None:
    weights, x, y, settings = golden(goldens_root, "midi_dit")
    model = build(weights, tuple(settings["mi_blocks"]))
    args = [x[k] for k in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_2")]
    assert off(model(*args), y["plain"]) < LIMIT
    assert off(model(*args[:2], x["ctx3.encoder_hidden_states"], args[3]), y["plain_ctx3"]) < LIMIT
    n, p = settings["num_instances_infer"], settings["num_instances_per_batch"]
    assert off(model(*args, groups=[n] * (len(args[0]) // n)), y["mi_infer"]) < LIMIT
    doubled = [x[f"cfg.{k}"] for k in ("hidden_states", "timestep")]
    doubled += [x[f"cfg.encoder_hidden_states{s}"] for s in ("", "_2")]
    assert off(model(*doubled, groups=[n, n]), y["mi_infer_cfg"]) < LIMIT
    uneven = [g for m in settings["num_instances_train"] for g in (m, *[1] * (p - m))]
    assert off(model(*args, groups=uneven), y["mi_train"]) < LIMIT
    assert off(y["mi_train"], y["plain"]) > 1e-3, "groups matter"


@torch.no_grad()
def test_triposg_is_the_reference_s(goldens_root: Path) -> None:
    weights, x, y, settings = golden(goldens_root, "triposg_dit")
    model = build(weights, ())
    args = [x[k] for k in ("hidden_states", "timestep", "encoder_hidden_states")]
    assert model.config.cross_attention_2_dim is None
    assert off(model(*args), y["sample"]) < LIMIT
    scaled = model(*args, scales=(settings["cross_attention_scale"], 1.0))
    assert off(scaled, y["sample_cross_scale"]) < LIMIT


@torch.no_grad()
def test_the_shape_vae_is_the_reference_s(goldens_root: Path) -> None:
    weights, x, y, settings = golden(goldens_root, "triposg_vae")
    names = ("latent_channels", "num_attention_heads", "width_encoder", "width_decoder")
    names += ("num_layers_encoder", "num_layers_decoder", "in_channels", "embed_frequency")
    vae = TripoSGVAE(**{n: settings[n] for n in names}).eval()
    vae.load_state_dict(weights)
    surface = x["surface"]
    queries = torch.stack([s[i] for s, i in zip(surface, x["query_indices"], strict=True)])
    moments = vae.encode(surface, queries)
    mean, logvar = moments.chunk(2, -1)
    assert off(mean, y["mean"]) < LIMIT and off(logvar, y["logvar"]) < LIMIT
    drawn = sample_posterior(moments, x["eps"])
    assert off(drawn, y["sample"]) < LIMIT
    for latents, name in ((drawn, "field_of_sample"), (mean, "field_of_mean")):
        assert off(vae.field(vae.tokens(latents), x["points"]), y[name][..., 0]) < LIMIT
    chunked = vae.field(vae.tokens(mean), x["points"], chunk=3)
    assert off(chunked, y["field_of_mean_chunked"][..., 0]) < LIMIT
    for row, expected in zip(surface.numpy(), x["query_indices"].numpy(), strict=True):
        assert np.array_equal(choose_points(row, settings["num_tokens"], settings["numpy_seed"]), expected)


def test_published_sizes_and_names(goldens_root: Path) -> None:
    manifest = json.loads((goldens_root.parent / "spec" / "midi3d_keys.json").read_text("utf-8"))
    with torch.device("meta"):
        midi, vae = TripoSGTransformer(), TripoSGVAE()
        single = TripoSGTransformer(cross_attention_dim=1024, cross_attention_2_dim=None, multi_instance=())
    for network, name in ((midi, "midi3d_transformer"), (vae, "vae")):
        assert {k: list(v.shape) for k, v in network.state_dict().items()} == manifest[name]
    assert sum(p.numel() for p in midi.parameters()) == 1_681_911_616
    assert sum(p.numel() for p in vae.parameters()) == 242_662_017
    assert sum(p.numel() for p in single.parameters()) == 1_439_556_160
    assert len(single.state_dict()) == 554
    shapes = {k: tuple(v.shape) for k, v in midi.state_dict().items()}
    assert infer_config(shapes) == {k: midi.config[k] for k in infer_config(shapes)}
    assert midi.config.multi_instance == MULTI_INSTANCE_BLOCKS
    with pytest.raises(ValueError, match="not a TripoSG"):
        infer_config({"proj_in.weight": (8, 4)})


def tiny(**changes: object) -> TripoSGTransformer:
    torch.manual_seed(0)
    options: dict = {
        "num_attention_heads": 2,
        "width": 16,
        "in_channels": 4,
        "num_layers": 5,
        "cross_attention_dim": 6,
        "cross_attention_2_dim": 8,
        "multi_instance": (1, 2, 3),
    }
    return TripoSGTransformer(**{**options, **changes}).eval()


def rows(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 7, 4), torch.full((n,), 400.0), torch.randn(n, 1, 6), torch.randn(n, 5, 8)


@torch.no_grad()
def test_instances_of_a_scene() -> None:
    model, args = tiny(), rows(3)
    alone = model(*args)
    assert off(model(*args, groups=[1, 1, 1]), alone) < 1e-6, "one instance is plain attention"
    together = model(*args, groups=[3])
    assert off(together, alone) > 1e-3
    turned = model(*(a[[2, 0, 1]] for a in args), groups=[3])
    assert off(turned, together[[2, 0, 1]]) < 1e-6, "order within a scene does not matter"
    padded = model(*(torch.cat([a, a[:1]]) for a in args), groups=[3, 1])
    assert off(padded[:3], together) < 1e-6, "a padded row changes no other"
    assert off(tiny(multi_instance=())(*args, groups=[3]), alone) == 0
    with pytest.raises(AssertionError, match="do not make"):
        model(*args, groups=[2])


def test_blocks_are_chosen_by_whole_index() -> None:
    model = tiny(num_layers=13, multi_instance=(1,))
    seen = []
    for i, block in enumerate(model.blocks):
        block.attn1.register_forward_pre_hook(
            lambda m, a, k, i=i: seen.append((i, k.get("groups"))), with_kwargs=True
        )
    with torch.no_grad():
        model(*rows(2), groups=[2])
    assert [i for i, g in seen if g] == [1], "1 is neither 10, 11 nor 12"


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*rows(3), groups=[2, 1]).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_token_is_looked_at_as_by_attention() -> None:
    """What is asked of a single token does not matter, and its gradient is 0, not what rounding leaves."""
    attention = Attention(12, 2, 8, qk_norm=True)
    x, context = torch.randn(3, 5, 12), torch.randn(3, 1, 8)
    out = attention(x, context)
    out.square().mean().backward()
    for weight in (attention.to_q.weight, attention.norm_q.weight, attention.norm_k.weight):  # type: ignore[union-attr]
        assert weight.grad is not None and not weight.grad.any()
    with torch.no_grad():
        twice = attention(x, context.repeat(1, 2, 1))  # two equal tokens, through attention
    assert torch.allclose(out, twice, atol=1e-6) and attention.to_v.weight.grad.any()  # type: ignore[union-attr]


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = TripoSGTransformer.from_pretrained(tmp_path, disable_mmap=True)
    with torch.no_grad():
        assert off(model(*rows(2), groups=[2]), again(*rows(2), groups=[2])) == 0
    assert tuple(again.config.multi_instance) == (1, 2, 3)


def test_heads_run_across_the_projections() -> None:
    """An adapter on `to_q` alone would change values of one head and queries of another."""
    attention = Attention(12, 2)
    x = torch.randn(1, 3, 12)
    with torch.no_grad():
        before = attention(x)
        attention.to_q.weight[8:12] += 1  # the third part of head 0: its values
        after = attention(x)
        attention.to_out[0].weight.copy_(torch.eye(12))
    assert off(before, after) > 1e-3
    u = torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], -1).view(1, 3, 2, 18)
    q, k, v = u.transpose(1, 2).chunk(3, -1)
    plain = torch.softmax(q @ k.mT / 6**0.5, -1) @ v
    assert off(attention(x) - attention.to_out[0].bias, plain.transpose(1, 2).flatten(2)) < 1e-6


def test_an_unknown_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="published embedding"):
        TripoSGVAE(embed_include_pi=True)
