"""CogVideoX: what we compute is what the stock pipelines compute, for every variant; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file

from inlaid import config
from inlaid.adapters import tuners
from inlaid.data.batch import Batch
from inlaid.families import Grid, cogvideox
from inlaid.families.cogvideox import COPIES, CogVideoX, noised
from inlaid.objectives import mean_squared_error
from inlaid.tiny import random
from inlaid.training.loop import train
from support.commands import inlaid
from support.slow import mostly_slow, slow

CPU = torch.device("cpu")
VARIANTS = [variant for name, variant in random.cases() if name == "cogvideox"]
SHAPES = {
    "5b": (9, 32, 64),
    "2b": (9, 48, 32),
    "1.5": (13, 32, 64),
    "i2v": (9, 32, 32),
    "1.5-i2v": (13, 32, 48),
}
"""Frames, height and width; where positions are not learned, none that the table or grid was made for."""
image_variants = pytest.mark.parametrize("variant", ["i2v", "1.5-i2v"])
OFTEN = ("2b", "5b", "1.5-i2v")
"""Both kinds of positions, and images with pairs of latent frames."""
Checkpoints = Callable[[str, str], Path]


def family(checkpoint: Path | str, **options: object) -> CogVideoX:
    return CogVideoX(config.Model(family="cogvideox", checkpoint=str(checkpoint), **options))  # type: ignore[arg-type]


def picture(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*shape[1:], 3), dtype=np.uint8)


def given_image(pipe: object, shape: tuple[int, int, int]) -> dict[str, Image.Image]:
    return {"image": Image.fromarray(picture(shape))} if "Image" in type(pipe).__name__ else {}


def first_step(folder: Path, prompt: str, shape: tuple[int, int, int]) -> dict:
    """Runs the stock pipeline without guidance; what its transformer was first given, and gave."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: dict = {}

    def record(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if not seen:
            seen.update(kwargs, output=output[0])

    pipe.transformer.register_forward_hook(record, with_kwargs=True)
    pipe(
        prompt=prompt,
        num_frames=shape[0],
        height=shape[1],
        width=shape[2],
        num_inference_steps=3,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **given_image(pipe, shape),
    )
    return seen


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, OFTEN.__contains__))
def test_first_step_equals_the_stock_pipeline(variant: str, checkpoint: Checkpoints) -> None:
    folder, shape = checkpoint("cogvideox", variant), SHAPES[variant]
    stock = first_step(folder, "A red  car", shape)
    cog = family(folder)
    text = cog.collate(cog.encode_text(cog.load_text_encoder(CPU, torch.float32), ["A red  car"]))
    assert text["text"].shape == (1, 226, 32)
    assert torch.equal(text["text"], stock["encoder_hidden_states"])
    x = stock["hidden_states"].transpose(1, 2)
    shapes = {k: (1, *s) for k, s in cog.shapes(*shape).items()}
    cond = {"image": x[:, 16:, :1]} if cog.images else {}
    assert {"latents": tuple(x[:, :16].shape), **{k: tuple(v.shape) for k, v in cond.items()}} == shapes
    t = (stock["timestep"] + 1) / 1000
    with torch.no_grad():
        ours = cog.predict(cog.load_denoiser(torch.float32), x[:, :16], t, {**text, **cond})
    assert (ours.transpose(1, 2) - stock["output"]).abs().max().item() == 0.0
    assert stock["timestep"].item() == 999 and t.item() == 1.0


@image_variants
def test_image_is_what_the_stock_pipeline_shows(
    variant: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise and dropout off, and the posterior's mean for its sample, in ours and in theirs."""
    monkeypatch.setattr(cogvideox, "noised", lambda frame: [frame] * COPIES)
    monkeypatch.setattr(cogvideox, "IMAGE_DROPOUT", 0)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    folder, shape = checkpoint("cogvideox", variant), SHAPES[variant]
    stock = first_step(folder, "a car", shape)["hidden_states"].transpose(1, 2)
    cog = family(folder)
    frames = np.repeat(picture(shape)[None], shape[0], 0)
    item = cog.encode_media(cog.load_media_encoder(CPU), frames)
    drawn = cog.sample_item(item, torch.Generator())
    assert torch.equal(drawn["image"], stock[0, 16:, :1]) and drawn["image"].any()
    assert not stock[0, 16:, 1:].any(), "the pipeline puts nothing before it where the length is even"
    latents = item["moments"][:16] * 0.7
    assert torch.equal(drawn["latents"], latents)
    other = latents[:, :1] / 0.49 if variant == "1.5-i2v" else latents[:, :1]
    torch.testing.assert_close(drawn["image"], other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("variant", "scale"), [("2b", 1.15258426), ("5b", 0.7)])
def test_latents_are_scaled_samples_of_the_posterior(
    variant: str, scale: float, checkpoint: Checkpoints
) -> None:
    folder, shape = checkpoint("cogvideox", variant), SHAPES[variant]
    cog = family(folder)
    frames = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    item = cog.encode_media(cog.load_media_encoder(CPU), frames)
    vae: Any = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255 * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
    seed = torch.Generator().manual_seed(5)
    theirs = posterior.sample(torch.Generator().manual_seed(5))[0] * scale
    assert torch.equal(cog.sample_item(item, seed)["latents"], theirs)
    assert not torch.equal(cog.sample_item(item, seed)["latents"], theirs), "another showing, another sample"


def test_image_noise_is_as_taught_and_a_function_of_the_frame() -> None:
    rng = torch.Generator().manual_seed(0)
    frames = [torch.rand(3, 1, 24, 24, generator=rng) * 2 - 1 for _ in range(600)]
    noise = [noised(f) - f for f in frames]
    sigma = torch.stack([n.flatten(1).std(1) for n in noise]).flatten()
    assert sigma.median().item() == pytest.approx(0.050, abs=0.0025)
    assert sigma.mean().item() == pytest.approx(0.056, abs=0.0025)
    assert sigma.log().std().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(noised(frames[0]), noised(frames[0].clone()))
    assert not torch.allclose(noise[0], noise[1]) and not torch.allclose(noise[0][0], noise[0][1])


@pytest.mark.parametrize("variant", [slow("i2v"), "1.5-i2v"])
def test_images_are_dropped_clip_by_clip_and_copies_take_turns(variant: str, checkpoint: Checkpoints) -> None:
    cog = family(checkpoint("cogvideox", variant))
    stored = cog.stored(13 if cog.pair == 2 else 9, 32, 32)
    item = {k: torch.full(shape, -30.0) for k, shape in stored.items()}  # of no variance
    item["image"][:, :16] = torch.arange(1.0, COPIES + 1).view(-1, 1, 1, 1, 1)
    text = [{"text": torch.zeros(226, 32)}] * 500
    shown = Batch.of(cog, [item] * 500, text, ["a"] * 500, 0, 0).cond["image"]
    scale = 1 / 0.7 if variant == "1.5-i2v" else 0.7
    copies = (shown.flatten(1).mean(1) / scale).round().long().bincount(minlength=COPIES + 1)
    assert copies[0].item() / 500 == pytest.approx(0.05, abs=0.025)
    assert copies[1:].min() > 80
    again = Batch.of(cog, [item] * 500, text, ["a"] * 500, 0, 0).cond["image"]
    assert torch.equal(shown, again)


# --- objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["2b", "5b"])
def test_objective_equals_the_golden(size: str, goldens_root: Path) -> None:
    golden = load_file(goldens_root / "legacy_objectives.safetensors")
    given = {k.split(".")[-1]: v for k, v in golden.items() if k.startswith("inputs.cogvideox")}
    wanted = {k.split(".")[-1]: v for k, v in golden.items() if k.startswith(f"outputs.cogvideox.{size}")}
    objective = family(f"THUDM/CogVideoX-{size}").objective(config.Objective(), (480, 720))
    torch.testing.assert_close(
        torch.tensor(objective.alphas_cumprod), wanted["alphas_cumprod"], atol=1e-6, rtol=0
    )
    t = (given["timesteps"] + 1) / 1000
    assert torch.equal(objective.index(t), given["timesteps"])
    noisy = objective.corrupt(given["x0"], given["noise"], t)
    target = objective.target(given["x0"], given["noise"], t)
    losses = mean_squared_error(given["model_output"], target, objective.weight(t))
    for ours, theirs in (
        (noisy, wanted["noisy_latents"]),
        (target, wanted["v_target"]),
        (losses, wanted["loss_per_sample"]),
        (losses.mean()[None], wanted["loss"]),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "heaviest"), [("2b", 393), ("5b", 1176)])
def test_plain_error_of_v_is_the_weighted_error_of_the_data(size: str, heaviest: float) -> None:
    objective = family(f"THUDM/CogVideoX-{size}").objective(config.Objective(), (480, 720))
    index = torch.tensor([0, 1, 10, 100, 500, 900, 999])
    t = (index + 1) / 1000
    x0, noise, v = torch.randn(3, len(index), 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x_t, target = objective.corrupt(x0, noise, t), objective.target(x0, noise, t)
    abar = torch.tensor(objective.alphas_cumprod)[index]
    signal, sigma = (a.sqrt().view(-1, 1, 1, 1, 1) for a in (abar, 1 - abar))
    weighted = (((signal * x_t - sigma * v) - x0) ** 2).flatten(1).mean(1) / (1 - abar)
    plain = mean_squared_error(v, target, objective.weight(t))
    torch.testing.assert_close(plain, weighted, rtol=1e-4, atol=0)
    assert 1 / (1 - abar[0].item()) == pytest.approx(heaviest, rel=2e-3)
    assert abar[-1] == 0, "zero terminal signal"
    every = torch.arange(1000)
    assert torch.equal(objective.index((every + 1) / 1000), every)
    times = objective.sample_time(20_000, torch.Generator().manual_seed(0))
    counts = objective.index(times).bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0, "uniform over all entries"


# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "table"), [("2b", "get_3d_sincos_pos_embed"), ("5b", "get_3d_rotary_pos_embed")]
)
def test_positions_are_made_once_for_each_size(
    variant: str, table: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    cog = family(checkpoint("cogvideox", variant))
    denoiser = cog.load_denoiser(torch.float32)
    original, made = getattr(diffusers.models.embeddings, table), []
    monkeypatch.setattr(
        diffusers.models.embeddings, table, lambda *a, **k: made.append(1) or original(*a, **k)
    )
    text = torch.zeros(1, 226, 32)
    for size in [(8, 4), (4, 8), (8, 4), (4, 8), (8, 4)]:
        cog.predict(denoiser, torch.zeros(1, 16, 2, *size), torch.tensor([0.5]), {"text": text})
    assert len(made) == 2


@pytest.mark.parametrize("variant", [slow("2b"), slow("5b")])
def test_blocks_compile_whole_at_another_size(variant: str, checkpoint: Checkpoints) -> None:
    cog = family(checkpoint("cogvideox", variant))
    x, t, text = torch.randn(1, 16, 2, 8, 4), torch.tensor([0.5]), torch.randn(1, 226, 32)
    outputs = []
    for compiled in (False, True):
        denoiser = cog.load_denoiser(torch.float32)
        tuners.attach(config.LowRank(rank=2), cog.targets, denoiser, seed=0)
        for block in denoiser.transformer_blocks if compiled else ():  # type: ignore[union-attr]
            block.compile(fullgraph=True, backend="aot_eager")
        out = cog.predict(denoiser.train(), x, t, {"text": text})
        out.square().mean().backward()
        outputs.append(out)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


# --- text, samples, sizes -----------------------------------------------------------------------------------


def test_all_226_tokens_are_text(checkpoint: Checkpoints) -> None:
    cog = family(checkpoint("cogvideox", "5b"))
    items = cog.encode_text(cog.load_text_encoder(CPU, torch.float32), ["x" * 2000, "", "a car"])
    assert {tuple(i["text"].shape) for i in items} == {(226, 32)}
    assert items[1]["text"][5:].any(), "padding is encoded, not zero"
    assert cog.collate(items)["text"].shape == (3, 226, 32)


@pytest.mark.parametrize("variant", ["2b", slow("5b"), slow("i2v"), "1.5-i2v"])
def test_sample_is_the_stock_pipeline(variant: str, checkpoint: Checkpoints) -> None:
    folder, shape = checkpoint("cogvideox", variant), SHAPES[variant]
    cog = family(folder)
    text, negative = cog.encode_text(cog.load_text_encoder(CPU, torch.float32), ["a cat", ""])
    pipe = cog.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    stock: Any = DiffusionPipeline.from_pretrained(folder)
    for p in (pipe, stock):
        p.set_progress_bar_config(disable=True)
    options = {"frames": shape[0], "size": shape[1:], "steps": 2, "guidance": 6.0}
    images = [picture(shape)] if cog.images else []
    generator = torch.Generator().manual_seed(7)
    ours = cog.sample(pipe, text, negative, generator=generator, images=images, **options)  # type: ignore[arg-type]
    theirs = stock(
        prompt="a cat",
        num_frames=shape[0],
        height=shape[1],
        width=shape[2],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **given_image(stock, shape),
    ).frames[0]
    assert ours.shape == (*shape, 3)
    assert len(theirs) == (16 if cog.pair == 2 else 9), "an even number of latent frames becomes four each"
    assert np.array_equal(ours, (theirs[-shape[0] :] * 255).round().astype(np.uint8))


def test_bfloat16_base_trains_and_generates(checkpoint: Checkpoints) -> None:
    cog = family(checkpoint("cogvideox", "1.5-i2v"))
    denoiser = cog.load_denoiser(torch.bfloat16)
    trained = tuners.attach(config.LowRank(rank=2), cog.targets, denoiser, seed=0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    cond = {"text": torch.zeros(1, 226, 32), "image": torch.randn(1, 16, 1, 4, 4)}
    out = cog.predict(denoiser, torch.randn(1, 16, 4, 4, 4), torch.tensor([0.5]), cond)
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad is not None for p in trained.values())
    pipe = cog.pipeline(denoiser=denoiser, device=CPU, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    item = {"text": cond["text"][0]}
    options = {"size": (32, 32), "frames": 13, "steps": 1, "guidance": 6.0, "generator": torch.Generator()}
    assert cog.sample(pipe, item, item, images=[picture((13, 32, 32))], **options).shape == (13, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "parameters", "frames", "size", "latents", "tokens", "grid", "fps"),
    [
        ("CogVideoX-2b", 1_693_783_872, 49, (480, 720), (16, 13, 60, 90), 17_776, Grid(16, 4), 8),
        slow("CogVideoX-5b", 5_570_283_072, 49, (480, 720), (16, 13, 60, 90), 17_776, Grid(16, 4), 8),
        (
            "CogVideoX-5b-I2V",
            None,
            49,
            (480, 720),
            (16, 13, 60, 90),
            17_776,
            Grid(16, 4, 1, (49, 480, 720)),
            8,
        ),
        ("CogVideoX1.5-5B", None, 85, (768, 1360), (16, 22, 96, 170), 45_106, Grid(16, 8, 5), 16),
        ("CogVideoX1.5-5B-I2V", None, 85, (768, 1360), (16, 22, 96, 170), 45_106, Grid(16, 8, 5), 16),
    ],
)
def test_published_checkpoints(
    name: str,
    parameters: int | None,
    frames: int,
    size: tuple[int, int],
    latents: tuple[int, ...],
    tokens: int,
    grid: Grid,
    fps: float,
) -> None:
    cog = family(f"THUDM/{name}")
    assert (cog.grid, cog.fps) == (grid, fps)
    assert cog.shapes(frames, *size)["latents"] == latents and cog.tokens(frames, *size) == tokens
    assert cog.images == (("first",) if "I2V" in name else ())
    network = cog.load_denoiser(torch.bfloat16, meta=True)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters or 5.571e9, rel=2e-4)
    assert parameters is None or sum(p.numel() for p in network.parameters()) == parameters
    if name == "CogVideoX-5b":
        trained = tuners.attach(config.LowRank(rank=128), cog.targets, network, seed=0)
        assert sum(p.numel() for p in trained.values()) == 132_120_576


# --- adapters -----------------------------------------------------------------------------------------------


def test_adapter_without_alpha_comes_in_and_none_goes_to_comfyui(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The older scripts' files hold no alpha: it is the rank, and a note says so."""
    folder = checkpoint("cogvideox", "5b")
    layers = [f"transformer_blocks.{i}.attn1.{x}" for i in (0, 1) for x in ("to_q", "to_out.0")]
    tensors = {f"transformer.{n}.lora_A.weight": torch.randn(4, 32) for n in layers}
    tensors |= {f"transformer.{n}.lora_B.weight": torch.randn(32, 4) for n in layers}
    save_file(tensors, tmp_path / "old.safetensors")
    base = ("--family", "cogvideox", "--checkpoint", folder)
    done = inlaid("import", tmp_path / "old.safetensors", tmp_path / "new", *base)
    assert done.code == 0 and "alpha = rank is assumed" in done.output
    back = load_file(tmp_path / "new/pytorch_lora_weights.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    half = inlaid("import", tmp_path / "old.safetensors", tmp_path / "half", *base, "--alpha", 2)
    assert half.code == 0 and "alpha argument" in half.output
    message = inlaid("inspect", tmp_path / "new").output
    assert "family cogvideox" in message and "alpha 4" in message


# --- what is refused ----------------------------------------------------------------------------------------


def edited(source: Path, target: Path, file: str, **changes: object) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / file).read_text("utf-8"))
    (target / file).write_text(json.dumps(values | changes), "utf-8")
    return target


MISTAKES = {
    "odd latent frames": ("1.5", {"data.frames": 81}, "81 frames is not 8n+5: use 77 or 85"),
    "one frame": ("1.5", {"data.frames": 1}, "1 frames is not 8n+5: use 5"),
    "even length": ("5b", {"data.frames": 48}, "48 frames is not 4n+1: use 45 or 49"),
    "odd size": ("2b", {"data.size": [40, 32]}, "40x32 is not a multiple of 16"),
    "sample of odd length": ("1.5-i2v", {"sample.frames": 9}, "sample: 9 frames is not 8n+5: use 5 or 13"),
    "past the table": ("1.5", {"data.size": [32, 2416]}, "32x2416 exceeds 2400x2400"),
    "another size": ("i2v", {"data.size": [32, 48]}, "were learned for 9 frames of 32x32"),
    "another length": ("i2v", {"data.frames": 5}, "5 frames of 32x32: the positional embeddings"),
    "prompt without image": ("i2v", {"sample.prompts": ["a"]}, "needs a first image for each prompt"),
    "images for text": (
        "5b",
        {"sample.prompts": ["a"], "sample.images": ["a.png"]},
        "is text-to-video and uses no images; leave images out",
    ),
    "expert": ("5b", {"model.expert": "high"}, "is one t2v network; leave `expert` out"),
    "task": ("5b", {"model.task": "i2v"}, "is one t2v network; leave `task` out"),
    "shift": (
        "2b",
        {"objective.shift": 3.0},
        "objective.shift: this checkpoint predicts v on a fixed schedule",
    ),
    "preset": ("2b", {"objective.preset": "diffsynth"}, "objective.preset: this checkpoint predicts v"),
}


@pytest.mark.parametrize(("variant", "changes", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_end_in_one_sentence(
    variant: str,
    changes: dict[str, object],
    message: str,
    checkpoint: Checkpoints,
    make_clips: Callable[..., Path],
    tmp_path: Path,
) -> None:
    raw: dict[str, dict | str] = {
        "run": str(tmp_path / "run"),
        "model": {"family": "cogvideox", "checkpoint": str(checkpoint("cogvideox", variant))},
        "data": {
            "sources": str(make_clips(2, frames=13, fps=16)),
            "size": [32, 32],
            "frames": 13 if variant.startswith("1.5") else 9,
        },
        "train": {"steps": 1, "trackers": []},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(raw), "utf-8")
    overrides = [f"{k}={json.dumps(v)}" for k, v in changes.items()]
    for command in ("check", "train"):
        done = inlaid(command, tmp_path / "r.yaml", *overrides)
        assert done.code in (1, 2) and message in done.output, done.output
        assert done.output.count(message) == 1 and "Traceback" not in done.output
    assert not list((tmp_path / "run/cache").glob("media/*/*")), "nothing is encoded first"


def test_other_checkpoints_are_refused(checkpoint: Checkpoints, tiny_wan: Path, tmp_path: Path) -> None:
    good = checkpoint("cogvideox", "5b")
    with pytest.raises(ValueError, match="not a CogVideoX checkpoint, it contains WanTransformer3DModel"):
        family(tiny_wan)
    control = edited(good, tmp_path / "control", "transformer/config.json", in_channels=48)
    with pytest.raises(ValueError, match=r"has 48 input and 16 output channels; supported are 16 \("):
        family(control)
    epsilon = edited(good, tmp_path / "e", "scheduler/scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ValueError, match="its prediction_type is epsilon, not v_prediction"):
        family(epsilon)
    shutil.rmtree(epsilon / "transformer")
    with pytest.raises(ValueError, match="it contains None and AutoencoderKLCogVideoX"):
        family(epsilon)


def test_what_a_run_cannot_be_asked_for(
    checkpoint: Checkpoints, make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("cogvideox", "i2v")
    raw = {
        "run": str(tmp_path / "run"),
        "model": {"family": "cogvideox", "checkpoint": str(folder), "task": "i2v"},
        "data": {"sources": str(make_clips(2, fps=8)), "size": [32, 32], "frames": 9, "validation": 0},
        "tuner": {"kind": "lora", "rank": 2},
        "train": {"steps": 1, "trackers": []},
    }
    run = train(config.build(raw))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    for options, message in (
        (["a cat"], "needs a first image for each prompt"),
        (["a cat", "--image", tmp_path / "a.png", "--size", "32x48"], "were learned for 9 frames of 32x32"),
        (["a cat", "--image", tmp_path / "a.png", "--frames", "13"], "were learned for 9 frames of 32x32"),
    ):
        done = inlaid("generate", run, *options)
        assert done.code == 2 and message in done.output and "Traceback" not in done.output, done.output
    for to, reason in {"kohya": "no kohya layout is known", "transpixeler": "joint alpha only"}.items():
        done = inlaid("export", run, "--to", to)
        assert done.code == 2 and reason in done.output, done.output
    for to in ("merged", "comfyui"):
        assert inlaid("export", run, "--to", to).code == 0
    done = inlaid("export", run, "--to", "comfyui", "--merge")
    assert done.code == 2 and "with one or the other" in done.output, done.output
