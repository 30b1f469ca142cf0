"""Wan-Alpha v2's mean-shifted noise: where the subject is, in training, in sampling, and from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inlaid import config
from inlaid.alpha import noise_shift
from inlaid.alpha.opening import build_family, open_family
from inlaid.data.batch import Batch
from inlaid.media import rgba
from inlaid.networks import rgba_vae_checkpoint
from inlaid.objectives import FlowMatching
from inlaid.training.steps import DenoisingStep
from support import rgba_clips as make
from support.rgba_vaes import disc, made, rgba_clips

STRIDE = (4, 8)


def filled(
    shape: tuple[int, int], center: tuple[float, float], half: tuple[float, float], turn: float
) -> np.ndarray:
    """Alpha of a filled ellipse that is turned by `turn` radians: uint8 (h, w)."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    x, y = x - center[0], y - center[1]
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    return np.where((x / half[0]) ** 2 + (y / half[1]) ** 2 <= 1, 255, 0).astype(np.uint8)


# --- the ellipses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0.0, 0.6, -1.1])
def test_the_ellipse_is_that_of_the_subject(turn: float) -> None:
    """Against the definition: a Gaussian whose standard deviations are the half-axes of the subject."""
    alpha = filled((240, 320), (180, 100), (96, 40), turn)[None].repeat(5, 0)
    found = noise_shift.ellipses(alpha, STRIDE)
    assert found.shape == (2, 30, 40) and found.dtype == np.float32
    assert np.allclose(found[0], found[1]) and found.max() == 1 and found.min() == 0
    y, x = np.mgrid[:30, :40] + 0.5
    x, y = x - 180 / 8, y - 100 / 8
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wanted = np.exp(-0.5 * ((x / 12) ** 2 + (y / 5) ** 2))
    assert np.abs(found[0] - wanted).max() < 0.12, "whole cells are up to half a cell from the outline"
    wrong = np.exp(-0.5 * ((x / 5) ** 2 + (y / 12) ** 2))
    assert np.abs(found[0] - wrong).max() > 0.5


def test_latent_frames_average_four_frames_and_empty_ones_have_no_subject() -> None:
    alpha = np.zeros((9, 64, 64), np.uint8)
    alpha[1:3] = filled((64, 64), (32, 32), (24, 24), 0)  # half of the second latent frame
    alpha[5] = alpha[1]  # a quarter of the third
    found = noise_shift.ellipses(alpha, STRIDE)
    assert (found[0] == 0).all() and found[1].max() == 1 and found[2].max() == 1
    alpha[5] = alpha[1] // 2
    assert (noise_shift.ellipses(alpha, STRIDE)[2] == 0).all(), "alpha up to a half is no subject"
    speck = np.zeros((1, 64, 64), np.uint8)
    speck[0, 8:16, 16:32] = 255  # two cells: no axes can be fitted
    found = noise_shift.ellipses(speck, STRIDE)[0]
    assert np.unravel_index(found.argmax(), found.shape)[0] == 1 and found[1, 2] == found[1, 3] == 1


def test_noise_is_shifted_away_from_the_subject() -> None:
    noise = torch.randn(2, 3, 2, 8, 8)
    ellipse = torch.zeros(2, 2, 8, 8)
    ellipse[:, :, 3:5, 3:5] = 1
    added = noise_shift.shifted(noise, ellipse, 0.05) - noise
    assert torch.allclose(added[..., 3:5, 3:5], torch.zeros(1), atol=1e-6)
    assert torch.allclose(added[..., 0, :], torch.full((1,), 0.05), atol=1e-6)
    other = noise_shift.shifted(noise, torch.zeros(2, 5, 20, 12), 0.05)
    assert torch.allclose(other, noise + 0.05), "masks of another size are interpolated"


# --- files --------------------------------------------------------------------------------------------------


def test_masks_are_read_from_clips_mattes_and_torch_files(tmp_path: Path) -> None:
    pixels = np.zeros((10, 66, 64, 4), np.uint8)
    pixels[..., 3] = filled((66, 64), (20, 40), (14, 14), 0)
    path = rgba.write_rgba(tmp_path / "a.mkv", pixels, 16)
    wanted = noise_shift.ellipses(pixels[:9, :64, :, 3], STRIDE)
    assert np.array_equal(noise_shift.read_mask(path, STRIDE), wanted), "the last frame fills no latent frame"
    matte = make.video(tmp_path / "m.mkv", pixels[..., 3:])
    assert np.array_equal(noise_shift.read_mask(matte, STRIDE), wanted)
    torch.save(torch.rand(21, 96, 170), tmp_path / "gauss_mask")
    assert noise_shift.read_mask(tmp_path / "gauss_mask", STRIDE).shape == (21, 96, 170)
    torch.save(torch.rand(2, 3), tmp_path / "two")
    torch.save({"a": torch.rand(2, 3, 4)}, tmp_path / "map")
    torch.save(torch.rand(2, 3, 4) + 1, tmp_path / "large")
    opaque = make.video(tmp_path / "o.mkv", np.full((5, 32, 32, 3), 70, np.uint8))
    (tmp_path / "text").write_text("no")
    for name, says in {
        "two": "not a tensor",
        "map": "not a tensor",
        "large": "weights must be 0 to 1",
        opaque.name: "70 of 255 in every pixel",
        "text": "text",
        "none": "none",
    }.items():
        with pytest.raises(ValueError, match=says):
            noise_shift.read_mask(tmp_path / name, STRIDE)


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(recipe: Callable[..., dict], tiny_wan: Path, tmp_path: Path) -> Callable[..., config.Config]:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae").eval()
    rgba_vae_checkpoint.save(made(vae), tmp_path / "v1")
    rgba_vae_checkpoint.save(made(vae), tmp_path / "v2", about={"noise_shift": 0.05})
    clips = rgba_clips(tmp_path / "rgba_clips", 4, 5)

    def make(vae: str = "v1", **alpha: object) -> config.Config:
        section = {"kind": "merged", "vae": str(tmp_path / vae), "colors": 2, **alpha}
        raw = recipe(alpha=section, data__sources=str(clips), train__steps=2, train__save_every=2)
        raw["data"] |= {"frames": 5}
        return config.build(raw)

    return make


def test_version_2_shifts_by_default_and_recipes_win(
    merged: Callable[..., config.Config], capsys: Any
) -> None:
    shifts = [
        build_family(merged(*v, **a)).noise_shift
        for v, a in (
            (("v1",), {}),
            (("v2",), {}),
            (("v2",), {"noise_shift": 0}),
            (("v1",), {"noise_shift": 0.1}),
        )
    ]  # type: ignore[attr-defined]
    assert shifts == [0, 0.05, 0, 0.1]
    one, two = (build_family(merged(v)) for v in ("v1", "v2"))
    assert one.shapes(5, 32, 32).keys() == {"latents"} and two.shapes(5, 32, 32)["ellipse"] == (2, 4, 4)
    assert one.media_key != two.media_key, "cached clips of the two differ"
    assert two.about()["inlaid_noise_shift"] == "0.05" and "inlaid_noise_shift" not in one.about()
    two.accept(two.about())
    assert "noise_shift" not in capsys.readouterr().err
    two.accept(one.about())
    assert "trained with alpha.noise_shift 0, but it is 0.05" in " ".join(capsys.readouterr().err.split())


def test_masks_of_recipes_are_checked_first(merged: Callable[..., config.Config], tmp_path: Path) -> None:
    torch.save(torch.rand(21, 96, 170), tmp_path / "gauss_mask")
    with pytest.raises(ValueError, match=r"alpha.noise_mask: alpha.noise_shift is 0"):
        open_family(merged("v1", noise_mask=str(tmp_path / "gauss_mask")))
    with pytest.raises(ValueError, match=r"alpha.noise_mask: .*nothing"):
        open_family(merged("v2", noise_mask=str(tmp_path / "nothing")))
    open_family(merged("v2", noise_mask=str(tmp_path / "gauss_mask")))


def test_training_noise_is_shifted_by_the_clip_s_own_alpha(merged: Callable[..., config.Config]) -> None:
    family: Any = build_family(merged("v2"))
    frames = disc(5)
    item = family.encode_media(family.load_media_encoder(torch.device("cpu")), frames)
    assert {k: tuple(v.shape) for k, v in item.items()} == family.stored(5, 32, 32)
    ellipse = torch.from_numpy(noise_shift.ellipses(frames[..., 3], STRIDE))
    assert torch.equal(item["ellipse"], ellipse)

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

    def predict(denoiser: Blind, x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        denoiser.seen.append(x_t / t.view(-1, 1, 1, 1, 1))
        return torch.zeros_like(x_t)

    family.predict = predict
    batch = Batch(torch.zeros(1, *family.shapes(5, 32, 32)["latents"]), {"ellipse": ellipse[None]}, ["a"])
    step, blind = DenoisingStep(family, FlowMatching()), Blind()
    found = step(blind, batch, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    FlowMatching().sample_time(1, generator)
    noise = torch.randn(batch.latents.shape, generator=generator) + 0.05 * (1 - ellipse)
    assert torch.allclose(blind.seen[0], noise, atol=1e-5), "the input of the network"
    assert found["loss"].item() == pytest.approx(noise.square().mean().item(), rel=1e-5), "and the target"
    step.validation(blind, [batch], torch.device("cpu"))
    means = torch.stack(blind.seen[1:]).mean((0, 1, 2))
    assert len(blind.seen) == 6 and (means - 0.05 * (1 - ellipse)).abs().mean() < 0.12


def test_sampling_starts_from_shifted_noise(merged: Callable[..., config.Config], tmp_path: Path) -> None:
    calls: list[dict] = []

    class Pipeline(SimpleNamespace):
        def __call__(self, **inputs: Any) -> Any:
            calls.append(inputs)
            raise InterruptedError

    def start(*vae: str, **alpha: Any) -> torch.Tensor | None:
        family: Any = build_family(merged(*vae, **alpha))
        family.pipeline_inputs = lambda *_: {}
        with pytest.raises(InterruptedError):
            how = {"size": (32, 48), "frames": 5, "steps": 2, "guidance": 1.0}
            family.sample(Pipeline(), {}, {}, **how, generator=torch.Generator().manual_seed(1))
        return calls.pop().get("latents")

    assert start("v1") is None, "the pipeline samples the noise"
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    added = (start("v2") - noise)[0]
    assert torch.allclose(added, added[:1, :1].expand_as(added), atol=1e-6), "all channels, all frames"
    assert added.max() == pytest.approx(0.05, abs=1e-6) and added[0, 0, 1:3, 2:4].max() < 0.01
    mask = torch.zeros(21, 96, 170)
    mask[:, :48] = 1
    torch.save(mask, tmp_path / "gauss_mask")
    added = (start("v2", noise_mask=str(tmp_path / "gauss_mask")) - noise)[0]
    assert torch.allclose(added[:, :, :2], torch.zeros(1), atol=1e-6)
    assert torch.allclose(added[:, :, 2:], torch.full((1,), 0.05), atol=1e-6)


@pytest.mark.slow
def test_a_run_with_shifted_noise_from_training_to_samples(merged: Callable[..., config.Config]) -> None:
    from inlaid.generation.generate import generate
    from inlaid.runs.folder import read_header
    from inlaid.training.loop import train

    run = train(merged("v2"))
    header = read_header(run / "adapter/pytorch_lora_weights.safetensors")
    assert header["inlaid_noise_shift"] == "0.05"
    made = generate(run, ["a disc"], transparent=["png"], steps=2)
    about = json.loads(made[0].with_suffix(".json").read_text("utf-8"))
    assert rgba.read_rgba(made[0].with_name(about["files"][0])).shape == (5, 32, 32, 4)
