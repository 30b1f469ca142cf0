"""Wan: what we compute is what the stock pipeline computes, for every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from inlaid import config
from inlaid.adapters import tuners
from inlaid.families import Grid, get, names
from inlaid.families.wan import Wan
from support.slow import slow

CPU = torch.device("cpu")


def family(checkpoint: Path | str, **options: object) -> Wan:
    return Wan(config.Model(family="wan", checkpoint=str(checkpoint), **options))  # type: ignore[arg-type]


def first_step(
    folder: Path, prompt: str, size: int, frames: int, component: str = "transformer", steps: int = 1
) -> dict:
    """Runs the stock pipeline and records what `component` was given and gave when first called."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: dict = {}

    def record(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if not seen:
            seen.update(
                kwargs, output=output[0], sigma=float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0])
            )

    getattr(pipe, component).register_forward_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    pipe(
        prompt,
        height=size,
        width=size,
        num_frames=frames,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    )
    return seen


@pytest.mark.parametrize(("variant", "size"), [("tiny_wan", 32), ("tiny_5b", 64)])
def test_first_step_equals_the_stock_pipeline(
    variant: str, size: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(variant)
    stock = first_step(folder, "A  red &amp; blue\ncar", size, 9)
    wan = family(folder)
    text = wan.collate(wan.encode_text(wan.load_text_encoder(CPU, torch.float32), ["A  red &amp; blue\ncar"]))
    assert text["text"].shape == (1, Wan.text_length, 32)
    assert torch.equal(text["text"], stock["encoder_hidden_states"])
    t = torch.tensor([stock["timestep"].flatten()[0].item() / 1000])
    with torch.no_grad():
        ours = wan.predict(wan.load_denoiser(torch.float32), stock["hidden_states"], t, text)
    assert (ours - stock["output"]).abs().max().item() == 0.0


@pytest.mark.parametrize(("expert", "component"), [slow("high", "transformer"), ("low", "transformer_2")])
def test_first_step_of_each_expert(tiny_a14b: Path, expert: str, component: str) -> None:
    stock = first_step(tiny_a14b, "a car", 32, 9, component, steps=8)
    wan = family(tiny_a14b, expert=expert)
    t = stock["timestep"].float() / 1000
    assert (t.item() >= 0.875) == (expert == "high")
    with torch.no_grad():
        ours = wan.predict(
            wan.load_denoiser(torch.float32),
            stock["hidden_states"],
            t,
            {"text": stock["encoder_hidden_states"]},
        )
    assert (ours - stock["output"]).abs().max().item() < 1e-6  # t / 1000 * 1000 may differ in the last bit
    low, high = wan.objective(config.Objective(), (480, 832)).interval
    assert (low, high) == ((0.875, 1.0) if expert == "high" else (0.0, 0.875))


def test_latents_are_the_normalised_mode(tiny_wan: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    wan = family(tiny_wan)
    latents = wan.encode_media(wan.load_media_encoder(CPU), frames)["latents"]
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()[0]
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    assert torch.allclose(latents, (z - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1), atol=1e-6)
    assert latents.shape == wan.shapes(9, 32, 32)["latents"] == (16, 3, 4, 4)
    assert wan.tokens(9, 32, 32) == 12


def test_sample_is_the_stock_pipeline(tiny_wan: Path) -> None:
    wan = family(tiny_wan)
    text, negative = wan.encode_text(wan.load_text_encoder(CPU, torch.float32), ["a cat", ""])
    options = {"steps": 2, "guidance": 5.0, "generator": torch.Generator().manual_seed(7)}
    pipe = wan.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    ours = wan.sample(pipe, text, negative, size=(32, 32), frames=9, **options)
    stock = WanPipeline.from_pretrained(tiny_wan)(
        "a cat",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    assert np.array_equal(ours, (stock * 255).round().astype(np.uint8))


def test_text_is_cut_at_512_and_empty_text_is_one_token(tiny_wan: Path) -> None:
    wan = family(tiny_wan)
    long, empty = wan.encode_text(wan.load_text_encoder(CPU, torch.float32), ["x" * 2000, ""])
    assert len(long["text"]) == Wan.text_length and len(empty["text"]) == 1
    assert (wan.collate([empty])["text"][0, 1:] == 0).all()


def test_short_text_changes_nothing_but_the_time(tiny_wan: Path) -> None:
    """Values and gradients, of captions of several lengths, and of one without a zero at its end."""
    short, padded = family(tiny_wan, options={"text": "short"}), family(tiny_wan)
    captions = ["", "a red car", "a long drive " * 3]
    items = short.encode_text(short.load_text_encoder(CPU, torch.float32), captions)
    noisy, t = torch.randn(4, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.rand(4)
    found = []
    for wan in (padded, short):
        denoiser = wan.load_denoiser(torch.float32)
        tuners.attach(config.LowRank(rank=2), wan.targets, denoiser, seed=0)
        text = wan.collate([*items, items[0]])["text"]
        out = wan.predict(denoiser, noisy, t, {"text": text})
        out.square().mean().backward()
        slopes = {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}
        whole = wan.predict(denoiser, noisy[:1], t[:1], {"text": torch.ones(1, 512, text.shape[-1])})
        found.append((text.shape[1], out, slopes, whole))
    (full, out, slopes, whole), (few, again, others, same) = found
    assert full == 512 and few == 8 * (max(map(len, (i["text"] for i in items))) // 8 + 1)
    assert torch.allclose(out, again, atol=1e-5) and torch.equal(whole, same)
    assert slopes.keys() == others.keys()
    assert all(torch.allclose(slopes[n], others[n], atol=1e-6) for n in slopes)


def test_text_of_full_length_is_not_shortened(tiny_wan: Path) -> None:
    short = family(tiny_wan, options={"text": "short"})
    width = short.encode_text(short.load_text_encoder(CPU, torch.float32), [""])[0]["text"].shape[1]
    for length, collated in ((7, 8), (8, 16), (505, 512), (512, 512)):
        assert short.collate([{"text": torch.ones(length, width)}])["text"].shape == (1, collated, width)


def test_norms_stay_float32_in_a_bfloat16_base_and_adapters_are_float32(tiny_wan: Path) -> None:
    wan = family(tiny_wan)
    denoiser = wan.load_denoiser(torch.bfloat16)
    assert denoiser.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert denoiser.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert denoiser.scale_shift_table.dtype == torch.float32
    trained = tuners.attach(config.LowRank(rank=2), wan.targets, denoiser, seed=0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    x = torch.randn(1, 16, 3, 4, 4)
    wan.predict(denoiser, x, torch.tensor([0.5]), {"text": torch.zeros(1, 512, 32)}).float().mean().backward()
    assert all(p.grad is not None for p in trained.values())


def test_default_targets_are_ten_modules_per_block(tiny_wan: Path) -> None:
    wan = family(tiny_wan)
    for kind, tensors in (("lora", 2), ("dora", 3)):
        trained = tuners.attach(
            config.LowRank(kind=kind), wan.targets, wan.load_denoiser(torch.float32), seed=0
        )  # type: ignore[arg-type]
        assert len(trained) == 2 * 10 * tensors


@pytest.mark.slow
def test_published_checkpoints_have_the_published_sizes() -> None:
    def model(name: str, **options: object) -> Wan:
        return family(f"Wan-AI/{name}-Diffusers", **options)

    def size(wan: Wan) -> int:
        return sum(p.numel() for p in wan.load_denoiser(torch.float32, meta=True).parameters())

    small = model("Wan2.1-T2V-1.3B")
    assert size(small) == pytest.approx(1.419e9, rel=1e-3)
    assert size(model("Wan2.1-T2V-14B")) == pytest.approx(14.29e9, rel=1e-3)
    assert size(model("Wan2.2-TI2V-5B")) == pytest.approx(5.00e9, rel=1e-3)
    assert small.shapes(81, 480, 832)["latents"] == (16, 21, 60, 104) and small.tokens(81, 480, 832) == 32760
    assert (small.grid, small.fps) == (Grid(16, 4), 16.0)
    big = model("Wan2.2-TI2V-5B")
    assert (big.grid, big.fps) == (Grid(32, 4), 24.0) and big.shapes(81, 704, 1280)["latents"] == (
        48,
        21,
        44,
        80,
    )
    meta = small.load_denoiser(torch.float32, meta=True)
    trained = tuners.attach(config.LowRank(rank=32), small.targets, meta, seed=0)
    assert sum(p.numel() for p in trained.values()) == 43_745_280


def test_shift_follows_the_size(tiny_wan: Path) -> None:
    wan = family(tiny_wan)
    assert wan.objective(config.Objective(), (480, 832)).s == 3.0
    assert wan.objective(config.Objective(), (720, 1280)).s == 5.0
    assert wan.objective(config.Objective(shift=7.0), (720, 1280)).s == 7.0


def test_experts_are_asked_for_and_refused(tiny_wan: Path, tiny_a14b: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two experts; choose `high` \(t >= 0\.875\) or `low`"):
        family(tiny_a14b)
    with pytest.raises(ValueError, match="has one network; leave `expert` out"):
        family(tiny_wan, expert="high")


def edited(source: Path, target: Path, file: str, change: Callable[[dict], None]) -> Path:
    import json
    import shutil

    shutil.copytree(source, target)
    values = json.loads((target / file).read_text("utf-8"))
    change(values)
    (target / file).write_text(json.dumps(values), "utf-8")
    return target


def test_checkpoints_that_are_something_else_are_refused(tiny_wan: Path, tmp_path: Path) -> None:
    control = edited(tiny_wan, tmp_path / "c", "transformer/config.json", lambda c: c.update(in_channels=48))
    with pytest.raises(
        ValueError, match="takes 48 channels, not 16 for text-to-video or 36 for image-to-vid"
    ):
        family(control)
    lone = edited(tiny_wan, tmp_path / "lone", "model_index.json", lambda c: c.update(boundary_ratio=0.875))
    with pytest.raises(ValueError, match=r"boundary_ratio 0\.875 but has no transformer_2"):
        family(lone)
    other = edited(
        tiny_wan,
        tmp_path / "other",
        "transformer/config.json",
        lambda c: c.update(_class_name="MochiTransformer3DModel"),
    )
    with pytest.raises(ValueError, match="not a Wan text-to-video or image-to-video checkpoint"):
        family(other)
    with pytest.raises(ValueError, match="not a diffusers folder"):
        family(tmp_path)
    with pytest.raises(ValueError, match="neither a folder in diffusers layout nor a Hub id"):
        family("no-such-thing")
    with pytest.raises(
        ValueError, match=r"model\.options\.vae: wan has no such option; its options are text"
    ):
        family(tiny_wan, options={"vae": "raw"})
    assert "wan" in names() and get("wan") is Wan
    with pytest.raises(ValueError, match=r"no family `van`; choose from: .*wan"):
        get("van")


def test_grid() -> None:
    grid = Grid(16, 4)
    assert [grid.snap_frames(n) for n in (0, 1, 4, 5, 80, 81, 84)] == [0, 1, 1, 5, 77, 81, 81]
    assert grid.problems(81, 480, 832) == []
    assert grid.problems(80, 480, 832) == ["80 frames is not 4n+1: use 77 or 81"]
    assert grid.problems(81, 481, 832) == ["481x832 is not a multiple of 16: use 480x832"]
    assert len(grid.problems(80, 481, 832)) == 2


def test_gradient_checkpointing_changes_nothing(tiny_wan: Path) -> None:
    gradients = []
    for on in (False, True):
        denoiser = family(tiny_wan).load_denoiser(torch.float32).train()
        assert isinstance(denoiser, WanTransformer3DModel)
        if on:
            denoiser.enable_gradient_checkpointing()
        trained = tuners.attach(config.LowRank(kind="dora", rank=2), Wan.targets, denoiser, seed=3)
        torch.manual_seed(0)
        x = torch.randn(1, 16, 3, 4, 4)
        family(tiny_wan).predict(
            denoiser, x, torch.tensor([0.5]), {"text": torch.ones(1, 512, 32)}
        ).square().mean().backward()
        gradients.append([p.grad for p in trained.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
