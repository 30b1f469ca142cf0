"""Merged alpha: training on latents of an RGBA VAE; import and export of published RGBA VAEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlaid import config
from inlaid.adapters.adapter import WEIGHTS
from inlaid.adapters.convert import export_run
from inlaid.adapters.importing import import_adapter
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.layers import layer_shapes
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.of_run import trained_folder
from inlaid.adapters.read import read_adapter
from inlaid.alpha.opening import build_family
from inlaid.data.cache import Cache
from inlaid.data.prompts import encode_prompts, resolve_sample
from inlaid.generation.generate import load_pipeline
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_published
from inlaid.networks.rgba_vae import DecoderLora, MergeBlock, RgbaVae
from inlaid.networks.rgba_vae_losses import COLORS, hard_render
from inlaid.networks.rgba_vae_published import HALVES, TARGETS
from inlaid.runs.folder import Run, read_header
from inlaid.runs.launch import start_processes
from inlaid.training.loop import train
from support.rgba_vaes import disc, made, rgba_clips
from support.slow import slow


@pytest.fixture(scope="module")
def vae(tiny_wan: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae").eval()


@pytest.fixture(scope="module")
def rgba_vaes(vae: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rgba_vaes")
    for seed in (0, 1):
        rgba_vae_checkpoint.save(made(vae, seed), folder / str(seed))
    return [folder / "0", folder / "1"]


@pytest.fixture
def merged(
    recipe: Callable[..., dict], rgba_vaes: list[Path], tmp_path: Path
) -> Callable[..., config.Config]:
    clips = rgba_clips(tmp_path / "rgba_clips")

    def make(**changes: object) -> config.Config:
        raw = recipe(
            alpha={"kind": "merged", "vae": str(rgba_vaes[0]), "colors": 2}, data__sources=str(clips)
        )
        raw["data"] |= {"frames": 5}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw[section], name: value} if name else value
        return config.build(raw)

    return make


# --- the family -------------------------------------------------------------------------------------------


def test_latents_are_the_rgba_vae_s_over_several_colors(
    merged: Callable[..., config.Config], rgba_vaes: list[Path], vae: AutoencoderKLWan
) -> None:
    family: Any = build_family(merged(alpha__colors=3))
    encoder = family.load_media_encoder(torch.device("cpu"))
    frames = disc(5)
    item = family.encode_media(encoder, frames)
    assert {k: tuple(v.shape) for k, v in item.items()} == family.stored(5, 32, 32)
    rgba_vae = rgba_vae_checkpoint.load(rgba_vaes[0], vae)
    rgb, of_alpha = rgba_vae_checkpoint.to_video(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
    mean, std = (torch.tensor(vae.config[k]).view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    with torch.no_grad():
        every = [
            (rgba_vae.encode(hard_render(rgb, of_alpha, torch.tensor(c)), of_alpha)[0] - mean) / std
            for c in COLORS
        ]
    which = [min(range(8), key=lambda i: (every[i] - z).abs().max()) for z in item["latents"]]
    assert len(set(which)) == 3
    assert all(torch.allclose(every[i], z, atol=1e-5) for i, z in zip(which, item["latents"], strict=True))
    assert torch.equal(family.encode_media(encoder, frames)["latents"], item["latents"]), (
        "of the content alone"
    )
    drawn = {
        float(family.sample_item(item, torch.Generator().manual_seed(k))["latents"].sum().item())
        for k in range(20)
    }
    assert len(drawn) == 3
    with pytest.raises(ValueError, match="clip without alpha"):
        family.encode_media(encoder, frames[..., :3])


def test_cached_clips_are_named_by_rgba_vae_and_colors(
    merged: Callable[..., config.Config], rgba_vaes: list[Path], tmp_path: Path
) -> None:
    from inlaid.data.plan import plan_dataset

    names = set()
    for changes in ({}, {"alpha__vae": str(rgba_vaes[1])}, {"alpha__colors": 1}):
        made_config = merged(**changes)
        family = build_family(made_config)
        plan = plan_dataset(made_config.data, family.grid, family.fps, 0, family=family)
        names.add(Cache(tmp_path / "cache").media_names(family, plan.train)[0])
    assert len(names) == 3


@pytest.mark.slow
def test_a_run_trains_and_generates_with_its_rgba_vae_alone(
    merged: Callable[..., config.Config], rgba_vaes: list[Path], tmp_path: Path
) -> None:
    run = train(merged(tuner={"kind": "dora", "rank": 2}))
    header = read_header(run / "adapter" / WEIGHTS)
    assert header["inlaid_alpha"] == "merged"
    assert header["inlaid_rgba_vae"] == rgba_vae_checkpoint.read_config(rgba_vaes[0])["rgba_vae_id"]
    place, made_config = Run(run), Run(run).config()
    family = build_family(made_config)
    folder = trained_folder(place, None, family)
    with start_processes(made_config) as ctx:
        sample = resolve_sample(made_config)
        encoded = encode_prompts(made_config, family, place, ["a disc"], sample, ctx)
        pipeline = load_pipeline(made_config, family, folder, 1.0, ctx)
        pipeline.set_progress_bar_config(disable=True)
        size, frames = sample.size, sample.frames
        assert size and frames
        drawn = [
            family.sample(
                pipeline,
                encoded.items[0],
                encoded.negative,
                size=size,
                frames=frames,
                steps=2,
                guidance=1.0,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in (1, 1, 2)
        ]
    assert drawn[0].shape == (5, 32, 32, 4) and drawn[0].dtype == np.uint8
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="the adapter was trained with RGBA VAE"):
        trained_folder(place, None, build_family(merged(alpha__vae=str(rgba_vaes[1]))))
    opaque = merged(alpha={"kind": "opaque"})
    with pytest.raises(ValueError, match=r"trained with alpha\.kind=merged"):
        trained_folder(place, None, build_family(opaque))
    with pytest.raises(ValueError, match=r"started with another recipe:\n.*alpha\.vae"):
        train(merged(tuner={"kind": "dora", "rank": 2}, alpha__vae=str(rgba_vaes[1])))


def test_an_rgba_vae_may_have_colors_of_its_own(
    merged: Callable[..., config.Config], vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    rgba_vae_checkpoint.save(made(vae), tmp_path / "gray", colors=[[-0.5, -0.5, -0.5]])
    family: Any = build_family(merged(alpha__vae=str(tmp_path / "gray"), alpha__colors=4))
    item = family.encode_media(family.load_media_encoder(torch.device("cpu")), disc(5))
    assert tuple(item["latents"].shape) == family.stored(5, 32, 32)["latents"] == (1, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "wan", "variant": "ti2v"}, "has 48 channels"),
        ({"family": "wan", "variant": "i2v"}, "merged supports text-to-video only"),
        ({"family": "cogvideox", "variant": None}, "16-channel VAE of Wan 2.1"),
    ],
    ids=["48 channels", "from images", "another family"],
)
def test_other_checkpoints_are_refused(
    merged: Callable[..., config.Config],
    checkpoint: Callable[[str, str], Path],
    model: dict,
    message: str,
) -> None:
    from inlaid.tiny import random

    variant = model["variant"] or next(v for f, v in random.cases() if f == model["family"])
    path = checkpoint(model["family"], variant)
    made_config = merged(model={"family": model["family"], "checkpoint": str(path)})
    with pytest.raises(ValueError, match=message):
        build_family(made_config)


@pytest.mark.parametrize(
    ("rgba_vae", "message"),
    [
        ("nowhere", "nowhere is not a folder"),
        ("tiny:mochi", "no RGBA VAE of a tiny model"),
        (".", "is not an RGBA VAE"),
    ],
)
def test_alpha_vae_must_be_an_rgba_vae(
    merged: Callable[..., config.Config],
    rgba_vae: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_family(merged(alpha__vae=rgba_vae))


# --- published files --------------------------------------------------------------------------------------


@pytest.fixture
def rgba_vae(vae: AutoencoderKLWan) -> RgbaVae:
    return made(vae)


Z = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))


def write(rgba_vae: RgbaVae, layout: str, folder: Path) -> Path:
    """A synthetic file, or folder, of a published layout."""
    folder.mkdir(parents=True)
    if layout == "comfyui":
        for half, tensors in rgba_vae_published.folded_layout(rgba_vae).items():
            save_file(tensors, folder / f"wan_alpha_2.1_vae_{half}.safetensors")
        return folder
    tensors = rgba_vae_published.decoder_layout(rgba_vae)
    if layout == "lightning":  # peft's base weights beside the update, and what else was trained
        base = rgba_vae_published.whole_layout(rgba_vae)
        for name in [n for n in tensors if ".lora_A." in n]:
            layer = name.removesuffix(".lora_A.default.weight")
            tensors[f"{layer}.base_layer.weight"] = base[f"{layer.removesuffix('.conv3D')}.weight"]
        tensors = {"state_dict": {**tensors, "loss.weight": torch.ones(1)}}  # type: ignore[dict-item]
    if layout in ("whole", "folded whole"):
        tensors = rgba_vae_published.whole_layout(rgba_vae)
    if layout == "folded whole":
        tensors = {n: t for n, t in tensors.items() if n.startswith("middle.")}
        for group, half in zip(("vae_fgr", "vae_pha"), HALVES, strict=True):
            tensors |= {
                f"{group}.{n}": t for n, t in rgba_vae_published.folded_layout(rgba_vae)[half].items()
            }
    torch.save(tensors, folder / "decoder.bin")
    return folder / "decoder.bin"


@torch.no_grad()
@pytest.mark.parametrize("layout", ["decoder", "lightning", slow("whole"), "folded whole", "comfyui"])
def test_every_layout_imports_and_does_the_same(
    rgba_vae: RgbaVae, tiny_wan: Path, vae: AutoencoderKLWan, layout: str, tmp_path: Path
) -> None:
    path = write(rgba_vae, layout, tmp_path / "in")
    out, notes = import_adapter(path, tmp_path / "out", "wan", str(tiny_wan))
    again = rgba_vae_checkpoint.load(out, vae)
    for one, two in zip(rgba_vae.decode(Z), again.decode(Z), strict=True):
        assert (one - two).abs().max() <= (1e-4 if "folded" in layout or layout == "comfyui" else 0)
    assert "RGBA VAE" in notes[0]
    whole = layout.endswith("whole")
    assert rgba_vae_checkpoint.read_config(out)["parts"] == (
        ["merge", "rgb", "alpha"] if whole else ["rgb", "alpha"]
    )
    assert any("no merge block" in n for n in notes) != whole
    if whole:
        assert "groups found: vae_fgr, vae_pha, middle" in notes
        for name, tensor in rgba_vae.merge.state_dict().items():
            assert torch.equal(tensor, again.merge.state_dict()[name])
    if layout == "lightning":
        assert any("1 other tensors were ignored, such as loss.weight" in n for n in notes)
    assert inspect_path(out).kind == "RGBA VAE"
    assert "rgba_vae_id" in describe(inspect_path(out))


def _without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


def _other_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    a = "vae_fgr.decoder.conv1.conv3D.lora_A.default.weight"
    b = a.replace("lora_A", "lora_B")
    return {**tensors, a: torch.cat([tensors[a]] * 2), b: torch.cat([tensors[b]] * 2, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("vae_pha."), "a decoder is missing.*no tensors vae_pha"),
        (_without("vae_fgr."), "a decoder is missing.*no tensors vae_fgr"),
        (_without("conv1.conv3D.lora_B"), "factors are missing, such as conv_in.lora_B"),
        (
            lambda t: {**t, "vae_fgr.decoder.extra.lora_A.default.weight": torch.ones(2, 2)},
            "match no part of an RGBA VAE",
        ),
        (lambda t: {**t, "middle.block.extra.weight": torch.ones(2)}, "match no part of an RGBA VAE"),
        (_other_rank, "ranks differ"),
        (lambda t: {n: torch.cat([x, x], 1) if "lora_A" in n else x for n, x in t.items()}, "this VAE needs"),
        (lambda t: {n: [1] for n in t}, "is not a mapping of names to tensors"),
    ],
    ids=["no alpha", "no color", "no factor", "extra", "extra merge", "rank", "width", "no tensors"],
)
def test_wrong_decoders_are_refused_with_a_sentence(
    rgba_vae: RgbaVae, tiny_wan: Path, vae: AutoencoderKLWan, change: Any, message: str, tmp_path: Path
) -> None:
    torch.save(change(rgba_vae_published.decoder_layout(rgba_vae)), tmp_path / "decoder.bin")
    with pytest.raises(ValueError, match=message):
        rgba_vae_published.convert(tmp_path / "decoder.bin", tmp_path / "out", vae)
    assert not (tmp_path / "out").exists()


def test_wrong_pairs_of_folded_decoders_are_refused(
    rgba_vae: RgbaVae, vae: AutoencoderKLWan, tiny_wan: Path, tmp_path: Path
) -> None:
    folder = write(rgba_vae, "comfyui", tmp_path / "pair")
    one = next(folder.glob("*alpha_channel*"))
    torch.manual_seed(3)
    other = AutoencoderKLWan.from_config(vae.config)
    with pytest.raises(ValueError, match="use another --checkpoint"):
        rgba_vae_published.convert(folder, tmp_path / "out", other)
    one.rename(tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match="the file with `alpha_channel` in its name is missing"):
        import_adapter(folder, tmp_path / "out", "wan", str(tiny_wan))
    with pytest.raises(ValueError, match="put both into one folder, with `rgb_channel` and `alpha_channel`"):
        import_adapter(tmp_path / "decoder.safetensors", tmp_path / "out", "wan", str(tiny_wan))
    with pytest.raises(ValueError, match="pass it with --checkpoint"):
        import_adapter(folder, tmp_path / "out", "wan")


def test_a_whole_vae_of_another_base_is_refused(
    rgba_vae: RgbaVae, vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    path = write(rgba_vae, "whole", tmp_path / "in")
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=r"made for another VAE: .* is not the checkpoint's"):
        rgba_vae_published.convert(path, tmp_path / "out", AutoencoderKLWan.from_config(vae.config))


def test_decoders_without_a_merge_block_decode_and_cannot_encode(
    rgba_vae: RgbaVae, vae: AutoencoderKLWan, merged: Callable[..., config.Config], tmp_path: Path
) -> None:
    rgba_vae_published.convert(write(rgba_vae, "decoder", tmp_path / "in"), tmp_path / "half", vae)
    family = build_family(merged(alpha__vae=str(tmp_path / "half")))
    with pytest.raises(ValueError, match=r"no merge block.*train: merge, init_from:"):
        family.load_media_encoder(torch.device("cpu"))
    assert hasattr(
        family.pipeline(denoiser=None, device=torch.device("cpu"), dtype=torch.float32), "rgba_vae"
    )


@torch.no_grad()
@pytest.mark.parametrize("to", TARGETS)
def test_exports_come_back(rgba_vae: RgbaVae, vae: AutoencoderKLWan, to: str, tmp_path: Path) -> None:
    out = rgba_vae_published.export(rgba_vae, to, tmp_path / to)
    names = {p.name for p in out.iterdir()}
    if to == "comfyui":
        assert names == {"vae_rgb_channel.safetensors", "vae_alpha_channel.safetensors"}
        rgba_vae_published.convert(out, tmp_path / "again", vae)
    else:
        assert names == {"decoder.safetensors", "vae.safetensors", "decoder.bin"}
        torch_file = torch.load(out / "decoder.bin", weights_only=True)
        decoders = load_file(out / "decoder.safetensors")
        assert torch_file.keys() == decoders.keys()
        assert all(torch.equal(torch_file[n], decoders[n]) for n in decoders)
        layers = [n for n in load_file(out / "decoder.safetensors") if "vae_pha" in n and "lora_A" in n]
        convolutions = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)]
        assert len(layers) == len(convolutions), "each convolution has one original name"
        rgba_vae_published.convert(out / "vae.safetensors", tmp_path / "again", vae)
    again = rgba_vae_checkpoint.load(tmp_path / "again", vae)
    for one, two in zip(rgba_vae.decode(Z), again.decode(Z), strict=True):
        assert (one - two).abs().mean() <= (0.02 * one.abs().mean() if to == "comfyui" else 0), (
            "bfloat16 rounds"
        )
    with pytest.raises(ValueError, match="exported to wan-alpha or comfyui"):
        rgba_vae_published.export(rgba_vae, "gguf", tmp_path / "x")


def test_published_names_at_full_width() -> None:
    with torch.device("meta"):
        merge = MergeBlock()
        vae: Any = AutoencoderKLWan()
    assert sum(p.numel() for p in merge.parameters()) == 25_537_552
    names = rgba_vae_published.original_names(2, 4)
    assert {n.rpartition(".")[0] for n in vae.state_dict()} <= names.keys()
    assert len(set(names.values())) == len(names)
    rgba_vae = RgbaVae(vae, merge, *(DecoderLora.of(vae.decoder, 4) for _ in range(2)))
    layout = rgba_vae_published.decoder_layout(rgba_vae)
    assert sum("vae_fgr." in n and ".lora_A." in n for n in layout) == 38
    assert layout["vae_pha.decoder.upsamples.3.time_conv.conv3D.lora_B.default.weight"].ndim == 5
    assert layout["vae_pha.decoder.middle.1.to_qkv.lora_A.default.weight"].ndim == 4
    released = {f"middle.{rgba_vae_published._released(n)}" for n in merge.state_dict()}
    assert "middle.block.middle.0.residual.2.weight" in released and "middle.block.head.0.gamma" in released


# --- what comes first -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dora_is_merged_before_a_lora_that_distils_steps(
    recipe: Callable[..., dict], tiny_wan: Path, tmp_path: Path
) -> None:
    dora = train(config.build(recipe(run=str(tmp_path / "dora"), tuner={"kind": "dora", "rank": 2})))
    lora = train(config.build(recipe(run=str(tmp_path / "lora"), train__steps=3)))
    step = lora / "adapter"
    out = export_run(dora, "merged", tmp_path / "both", then=step)
    family = build_family(Run(dora).config())
    networks = []
    for order in ((dora, lora), (lora, dora)):
        network = family.load_denoiser(torch.float32)
        for run in order:
            merge_adapter(network, read_adapter(run / "adapter", family, shapes=layer_shapes(network)))
        networks.append(network.state_dict())
    written = type(network).from_pretrained(out).state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(written[n], networks[0][n]) for n in written), "DoRA first, then LoRA"
    assert any((networks[0][n] - networks[1][n]).abs().max() > 1e-6 for n in written), "the order matters"
    with pytest.raises(ValueError, match="is a DoRA, which rescales the rows"):
        export_run(lora, "merged", tmp_path / "wrong", then=dora / "adapter")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match="--then: "):
        export_run(dora, "comfyui", tmp_path / "x", then=step)
