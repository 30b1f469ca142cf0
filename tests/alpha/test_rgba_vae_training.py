"""RGBA VAEs: metrics, folder, loss, and training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.evaluation.rgba_vae import evaluate
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_metrics
from inlaid.networks.rgba_vae_losses import RgbaLoss
from inlaid.runs.folder import Run
from inlaid.training.loop import train
from support.rgba_vaes import disc, made, rgba_clips


@pytest.fixture
def encoded() -> None:
    """Every run has a cache of its own here."""


@pytest.fixture(scope="session")
def vae(tiny_wan: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae").eval()


# --- what is measured -------------------------------------------------------------------------------------


def measure(true: np.ndarray, got: np.ndarray) -> dict[str, float]:
    pair = (torch.from_numpy(x).permute(3, 0, 1, 2) for x in (true, got))
    return rgba_vae_metrics.report(rgba_vae_metrics.tally(*pair))


@pytest.mark.parametrize("constant", [0, 255])
def test_regions_catch_the_predictor_that_plain_errors_let_pass(constant: int) -> None:
    true = disc(radius=3, size=32)
    got = true.copy()
    got[..., 3] = constant
    shown = true if constant == 0 else np.where([0, 0, 0, 1], 255 - true, true).astype(np.uint8)
    got[..., :3] = shown[..., :3]
    found = measure(shown, got)
    assert found["alpha_mae"] < 15, "plain alpha error calls this good"
    assert found["rgb_mae"] == 0
    message = " ".join(rgba_vae_metrics.trivial(found))
    assert "in the mean of the regions" in message
    assert f"where the clips are {'opaque' if constant == 0 else 'transparent'}" in message
    assert found["alpha_mae_balanced"] > 80


def test_a_good_reconstruction_passes_and_its_numbers_are_the_obvious_ones() -> None:
    true = disc()
    again = measure(true, true)
    assert again["alpha_mae"] == again["rgb_mae"] == 0 and again["ssim_alpha"] == pytest.approx(1)
    assert rgba_vae_metrics.trivial(again) == []
    off = true.copy()
    off[..., 3] = np.clip(off[..., 3].astype(int) + 4, 0, 255)
    off[..., 0] += 6
    found = measure(true, off)
    alpha = np.abs(off[..., 3].astype(float) - true[..., 3])
    assert found["alpha_mae"] == pytest.approx(alpha.mean())
    assert found["rgb_mae"] == pytest.approx(2), "6 in one channel of three"
    assert found["alpha_mae_transparent"] == pytest.approx(4) and found["alpha_mae_opaque"] < 0.01
    assert found["alpha_psnr"] == pytest.approx(10 * np.log10(255**2 / (alpha**2).mean()), abs=1e-3)
    assert found["all_transparent_alpha_mae"] == pytest.approx(true[..., 3].mean())
    assert found["composite_psnr_worst"] <= found["composite_psnr"]


def test_color_counts_only_where_it_is_visible() -> None:
    true = disc()
    got = true.copy()
    got[true[..., 3] == 0] ^= np.array([255, 255, 255, 0], np.uint8)
    found = measure(true, got)
    assert found["rgb_mae"] == 0 and found["composite_psnr"] > 70


def test_clips_add_up() -> None:
    pairs = [(disc(seed=k), disc(seed=k + 1)) for k in range(2)]
    rows = [
        rgba_vae_metrics.tally(*(torch.from_numpy(x).permute(3, 0, 1, 2) for x in pair)) for pair in pairs
    ]
    whole = measure(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    added = rgba_vae_metrics.report(rows[0] + rows[1])
    assert added["alpha_mae_soft"] == pytest.approx(whole["alpha_mae_soft"])
    assert added["rgb_psnr"] == pytest.approx(whole["rgb_psnr"])


# --- the folder -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_keeps_the_rgba_vae(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    rgba_vae, z = made(vae), torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    name = rgba_vae_checkpoint.save(rgba_vae, tmp_path / "a")
    again = rgba_vae_checkpoint.load(tmp_path / "a", vae)
    assert all(torch.equal(a, b) for a, b in zip(rgba_vae.decode(z), again.decode(z), strict=True))
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(rgba_vae.encode(video, video), again.encode(video, video))
    assert rgba_vae_checkpoint.save(again, tmp_path / "b") == name, "the same weights have the same ID"
    assert rgba_vae_checkpoint.save(made(vae, 1), tmp_path / "c") != name
    assert rgba_vae_checkpoint.save(rgba_vae, tmp_path / "d", alpha_eps=0.0) != name
    assert rgba_vae_checkpoint.read_config(tmp_path / "a")["rank"] == {"rgb": 2, "alpha": 2}


def test_parts_of_two_rgba_vaes_do_not_mix(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    for seed in (0, 1):
        rgba_vae_checkpoint.save(made(vae, seed), tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "merge.safetensors", tmp_path / "0" / "merge.safetensors")
    with pytest.raises(ValueError, match="files of different RGBA VAEs were mixed"):
        rgba_vae_checkpoint.load(tmp_path / "0", vae)


def test_an_rgba_vae_belongs_to_its_base_vae(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    rgba_vae_checkpoint.save(made(vae), tmp_path / "rgba_vae")
    torch.manual_seed(1)
    other = AutoencoderKLWan.from_config(vae.config)
    with pytest.raises(ValueError, match="trained on another VAE"):
        rgba_vae_checkpoint.load(tmp_path / "rgba_vae", other)
    rounded = AutoencoderKLWan.from_config(vae.config)
    rounded.load_state_dict({n: t.bfloat16() for n, t in vae.state_dict().items()})
    rgba_vae_checkpoint.load(tmp_path / "rgba_vae", rounded)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not an RGBA VAE: config.json cannot be used"),
        (lambda f: (f / "config.json").write_text("{}"), "it has no rgba_vae_id"),
        (lambda f: (f / "merge.safetensors").unlink(), "without merge.safetensors"),
        (lambda f: (f / "merge.safetensors").write_bytes(b"no"), "a file of this RGBA VAE is damaged"),
        (lambda f: _change(f / "decoder_rgb_lora.safetensors"), "a file was changed"),
    ],
    ids=["no config", "no id", "no merge", "damaged", "changed"],
)
def test_a_damaged_folder_is_refused(
    vae: AutoencoderKLWan, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    rgba_vae_checkpoint.save(made(vae), tmp_path / "rgba_vae")
    damage(tmp_path / "rgba_vae")
    with pytest.raises(ValueError, match=message):
        rgba_vae_checkpoint.load(tmp_path / "rgba_vae", vae)


def _change(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, path)


# --- what it learns from ----------------------------------------------------------------------------------


def batch(n: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.stack([disc(5, seed=k) for k in range(n)])).permute(0, 4, 1, 2, 3)


def test_the_loss_is_a_function_of_its_generator_and_reaches_all_that_trains(vae: AutoencoderKLWan) -> None:
    rgba_vae = made(vae)
    draw = lambda seed, **more: rgba_vae_checkpoint.losses(  # noqa: E731
        rgba_vae, batch(), RgbaLoss(), torch.Generator().manual_seed(seed), **more
    )
    first = draw(3)
    assert torch.equal(first["loss"], draw(3)["loss"])
    assert len({float(draw(s)["loss"].detach()) for s in range(4)}) > 1, "colors are sampled"
    assert {"l1_alpha", "edge_alpha", "l1_rgb_soft", "l1_rgb_hard"} <= first.keys()
    more = draw(3, anchor=0.5, noise=0.1)
    assert more["anchor"] > 0 and not torch.equal(more["l1_alpha"], first["l1_alpha"])
    more["loss"].backward()
    trained = {n for n, p in rgba_vae.named_parameters() if not n.startswith("vae.")}
    assert {n for n, p in rgba_vae.named_parameters() if p.grad is not None and p.grad.any()} == trained
    rgba_vae.zero_grad()


@torch.no_grad()
def test_a_merge_block_may_be_initialized_as_the_encoder_s_head(vae: AutoencoderKLWan) -> None:
    rgba_vae = rgba_vae_checkpoint.new(vae, 2, 0, "encoder")
    rgb, alpha = (torch.rand(1, 3, 9, 32, 32) * 2 - 1 for _ in range(2))
    assert (rgba_vae.encode(rgb, alpha) - vae.encode(rgb).latent_dist.mode()).abs().max() < 1e-5
    assert (
        rgba_vae_checkpoint.new(vae, 2, 0).encode(rgb, alpha) - rgba_vae.encode(rgb, alpha)
    ).abs().max() > 1e-2


def test_rgba_vaes_fit_one_kind_of_vae(tiny_5b: Path) -> None:
    other = AutoencoderKLWan.from_pretrained(tiny_5b, subfolder="vae")
    with pytest.raises(ValueError, match=r"16-channel VAE of Wan 2\.1"):
        rgba_vae_checkpoint.new(other, 2, 0)


# --- training one -----------------------------------------------------------------------------------------


@pytest.fixture
def rgba_vae_recipe(recipe: Callable[..., dict], tmp_path: Path) -> Callable[..., config.Config]:
    clips = rgba_clips(tmp_path / "rgba_clips")

    def make(**changes: object) -> config.Config:
        raw = recipe(
            data__sources=str(clips),
            train__steps=4,
            train__validate_every=2,
        )
        del raw["tuner"]
        raw["rgba_vae"] = {"rank": 2}
        raw["data"] |= {"frames": 5, "cache": None}
        raw["sample"] = {}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw[section], name: value} if name else value
        return config.build(raw)

    return make


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_a_recipe_trains_an_rgba_vae_and_resumes_to_the_same_bits(
    rgba_vae_recipe: Callable[..., config.Config], vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    run = train(rgba_vae_recipe(run=str(tmp_path / "whole")))
    cached = load_file(next((run / "cache/media").rglob("*.safetensors")))
    bytewise = build_family(config.load(run)).bytewise
    assert {n for n, v in cached.items() if v.dtype is torch.uint8} == {*bytewise}, "as the estimate counts"
    rgba_vae = rgba_vae_checkpoint.load(run / "rgba_vae", vae)
    assert (run / "rgba_vae" / "README.md").is_file() and rgba_vae.rgb.rank == 2
    validation = [m for m in metrics(run) if "validation_loss" in m]
    assert [m["step"] for m in validation] == [2, 4]
    assert {
        "validation_rgb_mae",
        "validation_alpha_mae_soft",
        "validation_all_transparent_alpha_mae",
    } <= validation[0].keys()
    train(rgba_vae_recipe(run=str(tmp_path / "halves"), train__steps=4))
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "halves" / "rgba_vae")
    again = train(rgba_vae_recipe(run=str(tmp_path / "halves")))
    for file in (run / "rgba_vae").glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(again / "rgba_vae" / file.name)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours), file.name
    report = evaluate(run)
    assert report.path.is_file() and report.path.with_suffix(".png").is_file()
    assert report.values["alpha_mae"] == pytest.approx(validation[-1]["validation_alpha_mae"], abs=1e-6)
    assert any("where the clips are" in w or "regions" in w for w in report.warnings), (
        "four steps teach nothing"
    )


def test_the_merge_block_alone_learns_towards_frozen_decoders(
    rgba_vae_recipe: Callable[..., config.Config], vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    rgba_vae_checkpoint.save(made(vae), tmp_path / "start")
    section = {"train": "merge", "init_from": str(tmp_path / "start")}
    run = train(rgba_vae_recipe(run=str(tmp_path / "merge"), rgba_vae=section))
    for part, same in (("decoder_rgb_lora", True), ("decoder_alpha_lora", True), ("merge", False)):
        one, two = (load_file(f / f"{part}.safetensors") for f in (tmp_path / "start", run / "rgba_vae"))
        assert all(torch.equal(one[n], two[n]) for n in one) == same, part


def test_plain_decoders_are_no_aim(
    rgba_vae_recipe: Callable[..., config.Config], vae: AutoencoderKLWan, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"init_from: missing, and train=merge needs decoders that were"):
        rgba_vae_recipe(rgba_vae={"train": "merge"})
    rgba_vae_checkpoint.save(rgba_vae_checkpoint.new(vae, 2, 0), tmp_path / "plain")
    section = {"train": "merge", "init_from": str(tmp_path / "plain")}
    with pytest.raises(ValueError, match="are untrained and cannot decode alpha"):
        train(rgba_vae_recipe(rgba_vae=section))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": {"kind": "merged", "vae": "x"}}, "leave `alpha` out"),
        ({"sample": {"every": 2}}, "sample.every: an RGBA VAE generates no samples"),
        ({"memory": {"quantize": "int8"}}, "memory.quantize: not supported for an RGBA VAE"),
        ({"runtime": {"compile": True}}, "runtime.compile"),
        ({"runtime": {"parallel": "fsdp"}}, "runtime.parallel: an RGBA VAE trains with ddp only"),
        ({"rgba_vae": {"ranks": 3}}, "rgba_vae.ranks: unknown key; did you mean `rank`"),
        ({"rgba_vae": 3}, r"rgba_vae: needs a mapping with keys \(train, rank, init_from, init, loss"),
        ({"tuner": {"rank": 8}}, "leave `tuner` out"),
        ({"tuner": {"kind": "full"}}, "leave `tuner` out"),
        (
            {"data__sources": [{"path": "x", "prior_preservation": 1}, "y"]},
            "does not apply to training an RGBA",
        ),
    ],
)
def test_a_recipe_of_an_rgba_vae_names_conflicts(
    rgba_vae_recipe: Callable[..., config.Config], changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rgba_vae_recipe(**changes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"perceptual": "vgg.pth"}, "perceptual: vgg.pth does not exist"),
        ({"init_from": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_files_of_an_rgba_vae_must_exist(
    rgba_vae_recipe: Callable[..., config.Config], section: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(rgba_vae_recipe(rgba_vae={"rank": 2, **section}))


@pytest.mark.slow
def test_nine_terms_with_a_perceptual_network_and_a_note_without(
    rgba_vae_recipe: Callable[..., config.Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {0: (4, 3), 2: (4, 4), 5: (6, 4), 7: (6, 6)}
    weights = {f"features.{i}.weight": torch.randn(*s, 3, 3) for i, s in sizes.items()}
    weights |= {f"features.{i}.bias": torch.randn(s[0]) for i, s in sizes.items()}
    save_file(weights, tmp_path / "vgg16.safetensors")
    section = {"rank": 2, "perceptual": str(tmp_path / "vgg16.safetensors")}
    run = train(rgba_vae_recipe(run=str(tmp_path / "nine"), rgba_vae=section, train__steps=1))
    assert "three of the nine terms" not in " ".join(capsys.readouterr().err.split())
    assert sum(k.startswith("loss_") for k in metrics(run)[0]) in (0, 9)
    train(rgba_vae_recipe(run=str(tmp_path / "six"), train__steps=1))
    assert "three of the nine terms" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="not the weights of a VGG16"):
        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        train(rgba_vae_recipe(rgba_vae={**section, "perceptual": str(tmp_path / "other.safetensors")}))


def test_a_run_that_trained_an_rgba_vae_generates_no_prompts(
    rgba_vae_recipe: Callable[..., config.Config], tmp_path: Path
) -> None:
    from inlaid.generation.generate import generate

    made_config = rgba_vae_recipe()
    Path(made_config.run).mkdir()
    config.save(made_config, Path(made_config.run) / "config.yaml")
    assert Run(Path(made_config.run)).config() == made_config and made_config.rgba_vae is not None
    with pytest.raises(ValueError, match="cannot generate from prompts"):
        generate(made_config.run, ["a disc"])
    with pytest.raises(ValueError, match="nothing is trained yet"):
        evaluate(made_config.run)
