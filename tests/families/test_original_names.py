"""Original names and row orders of each family: complete, the original code's own, and the same both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inlaid import config, families
from support.clients.comfy_models import detect, network

WAN, MOCHI, COGVIDEOX = (families.get(name).original for name in ("wan", "mochi", "cogvideox"))


def published(family: str, checkpoint: str, component: str = "transformer", **smaller: int) -> nn.Module:
    """The denoiser of a published checkpoint on the meta device."""
    import diffusers

    values = dict(families.get(family).published[checkpoint][component])
    kind = getattr(diffusers, values.pop("_class_name"))
    with torch.device("meta"):
        return kind.from_config({**values, **smaller})


@pytest.mark.parametrize(
    ("family", "checkpoint", "kind", "sizes"),
    [
        ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-t2v", {"heads": 12, "ffn": 8960, "channels": 16}),
        ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan-t2v", {"heads": 40, "ffn": 13824}),
        ("wan", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan-i2v", {"channels": 36, "positions": None}),
        ("wan", "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "wan-i2v", {"positions": 514}),
        ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan-2.2", {"heads": 24, "channels": 48}),
        ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan-t2v", {"channels": 16}),
        ("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "wan-t2v", {"channels": 36, "images": False}),
        ("mochi", "genmo/mochi-1-preview", "mochi", {}),
        ("cogvideox", "THUDM/CogVideoX-5b", "cogvideox", {"heads": 48, "pairs": False, "rotary": True}),
        ("cogvideox", "THUDM/CogVideoX1.5-5B", "cogvideox", {"heads": 48, "pairs": True, "ofs": None}),
        ("cogvideox", "THUDM/CogVideoX1.5-5B-I2V", "cogvideox-i2v", {"pairs": True, "ofs": 512}),
    ],
)
def test_published_models_have_exactly_the_tensors_of_the_original_network(family, checkpoint, kind, sizes):
    fewer = {} if family == "mochi" else {"num_layers": 2}
    ours = published(family, checkpoint, **fewer).state_dict()
    assert detect({k: tuple(t.shape) for k, t in ours.items()}) is None, "diffusers names are not recognised"
    shapes = {k: tuple(t.shape) for k, t in families.get(family).original.to_original(ours).items()}
    found = detect(shapes)
    assert found is not None and found[0] == kind
    assert sizes.items() <= found[1].items()
    assert shapes == network(*found)


@pytest.mark.parametrize("checkpoint", ["THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b-I2V"])
def test_older_cogvideox_has_all_layers_of_the_original_network(checkpoint):
    ours = published("cogvideox", checkpoint, num_layers=1).state_dict()
    shapes = {k: tuple(t.shape) for k, t in COGVIDEOX.to_original(ours).items()}
    shapes.pop("patch_embed.pos_embedding", None)  # whether it is stored is a matter of the export
    found = detect(shapes)
    assert found is not None and shapes == network(*found)


@pytest.mark.parametrize(("family", "variant"), [("wan", "flf2v"), ("mochi", None), ("cogvideox", "1.5-i2v")])
def test_weights_are_the_same_after_both_directions(family, variant, tmp_path):
    from inlaid.tiny import random

    folder = random.build(family, tmp_path / "model", variant)
    model = config.Model(family=family, checkpoint=str(folder))
    denoiser = families.get(family)(model).load_denoiser(torch.float32)
    names = families.get(family).original
    state = denoiser.state_dict()
    original = names.to_original(state)
    back = names.to_diffusers(original, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_every_pair_is_found_both_ways():
    for names in (WAN, MOCHI, COGVIDEOX):
        for rename in names.renames:
            name = rename.diffusers[0].replace("*", "17")
            found = names.of_diffusers(name)
            assert found is not None and found.original == rename.original.replace("*", "17")
            assert names.of_original(found.original, found.diffusers) == found
    assert WAN.of_diffusers("blocks.0.attn3.to_q") is None and WAN.of_original("blocks.0.norm2") is None
    last = MOCHI.of_original("blocks.47.mod_y", {"transformer_blocks.47.norm1_context.linear_1"})
    assert last is not None and last.diffusers == ("transformer_blocks.47.norm1_context.linear_1",)


def test_the_halves_of_mochi_layers_are_those_of_genmos_code():
    """Genmo: first half of w1 through SiLU, times the second; last modulation: shift, then scale."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import AdaLayerNormContinuous

    torch.manual_seed(0)
    ff = FeedForward(8, inner_dim=12, activation_fn="swiglu", bias=False)
    norm = AdaLayerNormContinuous(8, 8, elementwise_affine=False, eps=1e-6)
    x, c = torch.randn(3, 8), torch.randn(3, 8)
    layer = "transformer_blocks.0.ff.net.0.proj"
    w1 = MOCHI.of_diffusers(layer).join([ff.net[0].proj.weight])
    gate, value = F.linear(x, w1).chunk(2, -1)
    torch.testing.assert_close(F.linear(F.silu(gate) * value, ff.net[2].weight), ff(x))
    mod = MOCHI.of_diffusers("norm_out.linear")
    shift, scale = F.linear(F.silu(c), mod.join([norm.linear.weight]), mod.join([norm.linear.bias])).chunk(
        2, -1
    )
    wanted = norm(x[:, None], c)[:, 0]
    torch.testing.assert_close(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift, wanted)


def test_what_has_no_place_is_named():
    with pytest.raises(ValueError, match=r"blocks.0.extra.weight has no name in the original code"):
        WAN.to_original({"blocks.0.extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"attn1.to_v.weight is missing beside .*attn1.to_q.weight"):
        MOCHI.to_original({f"transformer_blocks.0.attn1.to_{x}.weight": torch.zeros(1) for x in "qk"})
    with pytest.raises(ValueError, match=r"no layer of the original code: blocks.0.norm2.weight"):
        WAN.to_diffusers({"blocks.0.norm2.weight": torch.zeros(1)}, ())
