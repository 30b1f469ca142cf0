"""Mochi: what we compute is what the stock pipeline computes, backward clock and all; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import MochiPipeline
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.data.batch import Batch
from inlaid.families.mochi import Mochi, padded
from inlaid.objectives import mean_squared_error
from inlaid.tiny import random
from inlaid.training.steps import DenoisingStep
from support.commands import inlaid

CPU = torch.device("cpu")
SHAPE = (13, 32, 48)
"""Frames, height and width."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random.build("mochi", tmp_path_factory.mktemp("checkpoints") / "tiny-mochi")


@pytest.fixture(scope="module")
def mochi(folder: Path) -> Mochi:
    return family(folder)


@pytest.fixture(scope="module")
def network(mochi: Mochi) -> nn.Module:
    return mochi.load_denoiser(torch.float32).eval().requires_grad_(False)


def family(checkpoint: Path | str, **options: object) -> Mochi:
    return Mochi(config.Model(family="mochi", checkpoint=str(checkpoint), **options))  # type: ignore[arg-type]


def stock(folder: Path) -> Any:
    pipe = MochiPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watched(pipe: Any) -> list[dict]:
    """What a pipeline's transformer is given, and gives, call by call."""
    seen: list[dict] = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append({**kwargs, "output": output[0]}), with_kwargs=True
    )
    return seen


def texts(mochi: Mochi, *captions: str) -> list[dict[str, Tensor]]:
    return mochi.encode_text(mochi.load_text_encoder(CPU, torch.float32), captions)


def noisy(mochi: Mochi, n: int = 1) -> Tensor:
    return torch.randn(n, *mochi.shapes(*SHAPE)["latents"], generator=torch.Generator().manual_seed(5))


class Fixed(nn.Module):
    """A network that answers one thing and keeps what it was asked."""

    dtype = torch.float32

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(
        self, x: Tensor, text: Tensor, timestep: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor]:
        self.timestep = timestep
        return (self.answer,)


# --- the network --------------------------------------------------------------------------------------------


def test_first_steps_equal_the_stock_pipeline(folder: Path, mochi: Mochi, network: nn.Module) -> None:
    pipe = stock(folder)
    assert pipe.transformer.pos_frequencies.abs().mean() > 0.2, "zeros would hide mistakes in positions"
    seen = watched(pipe)
    pipe(
        "A red  car",
        height=32,
        width=48,
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    clock = [s["timestep"].item() for s in seen]
    assert clock == pytest.approx([0, 25], abs=1e-4), "it runs from noise at 0 to data at 1000"
    cond = mochi.collate(texts(mochi, "A red  car"))
    n = cond["text"].shape[1]
    assert torch.equal(cond["text"], seen[0]["encoder_hidden_states"][:, :n]) and "mask" not in cond
    assert torch.equal(padded(cond["text"])[1], seen[0]["encoder_attention_mask"])
    for step in list(seen):
        with torch.no_grad():
            ours = mochi.predict(network, step["hidden_states"], 1 - step["timestep"] / 1000, cond)
            step["timestep"] = 1000 - (1 - step["timestep"] / 1000) * 1000
            exact = pipe.transformer(**{k: v for k, v in step.items() if k != "output"})[0]
        assert (ours + exact).abs().max().item() == 0.0
        assert (ours + step["output"]).abs().max().item() < 1e-4, "its timestep is off by up to 6e-5"


def test_padding_changes_nothing(folder: Path, mochi: Mochi, network: nn.Module) -> None:
    """Trimmed, masked in a batch, or masked by the stock pipeline: one answer, also without any text."""
    items = texts(mochi, "a car", "a much longer caption", "")
    x, t = noisy(mochi, 3), torch.tensor([0.3, 0.6, 0.9])
    batch = mochi.collate(items)
    lengths = [len(item["text"]) for item in items]
    assert batch["mask"].tolist() == [[i < n for i in range(max(lengths))] for n in lengths]
    with torch.no_grad():
        together = mochi.predict(network, x, t, batch)
        theirs = stock(folder).transformer.eval()
        for i, item in enumerate(items):
            text, mask = padded(item["text"][None])
            text = text + torch.randn(text.shape) * ~mask[..., None]
            asked = (x[i : i + 1], text, 1000 - t[i : i + 1] * 1000, mask)
            expected = -theirs(*asked, return_dict=False)[0]
            alone = mochi.predict(network, x[i : i + 1], t[i : i + 1], mochi.collate([item]))
            ours = -network(*asked, return_dict=False)[0]
            assert (alone - expected).abs().max().item() == 0.0
            for found in (together[i : i + 1], ours):
                assert (found - expected).abs().max().item() < 1e-5
    processors = {type(b.attn1.processor) for b in theirs.transformer_blocks}
    assert processors == {MochiAttnProcessor2_0}, "the stock network was left as it is"


@pytest.mark.slow
def test_blocks_compile_into_one_graph(mochi: Mochi) -> None:
    losses, gradients = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        denoiser = mochi.load_denoiser(torch.float32).train()
        section = config.LowRank(kind="dora", rank=2)
        trained = tuners.attach(section, mochi.targets, denoiser, seed=3)
        for name, parameter in trained.items():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if compiled:
            for block in denoiser.transformer_blocks:  # type: ignore[union-attr]
                block.compile(fullgraph=True, backend="aot_eager")
        for captions in (["a car"], ["a car", "two cars"]):
            cond = mochi.collate(texts(mochi, *captions))
            x, n = noisy(mochi, len(captions)), len(captions)
            loss = mochi.predict(denoiser, x, torch.full((n,), 0.5), cond).square().mean()
            loss.backward()
            losses.append(loss.item())
        gradients.append([p.grad for p in trained.values()])
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_no_graph_breaks(mochi: Mochi, network: nn.Module) -> None:
    """What `fullgraph` asserts, counted: the stock attention has breaks, ours has none."""
    caught: list[dict] = []
    block: Any = network.transformer_blocks[0]  # type: ignore[index]
    hook = block.register_forward_pre_hook(lambda m, a, k: caught.append(k), with_kwargs=True)
    with torch.no_grad():
        for captions in (["a car"], ["a car", "two cars"]):
            cond = mochi.collate(texts(mochi, *captions))
            n = len(captions)
            mochi.predict(network, noisy(mochi, n), torch.full((n,), 0.5), cond)
    hook.remove()
    assert [k["encoder_attention_mask"] is None for k in caught] == [True, False]
    for given in caught:
        torch._dynamo.reset()
        assert torch._dynamo.explain(block)(**given).graph_break_count == 0


def test_positions_stay_float32_in_a_bfloat16_base(mochi: Mochi) -> None:
    denoiser: Any = mochi.load_denoiser(torch.bfloat16)
    assert denoiser.dtype == denoiser.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    exact = mochi.load_denoiser(torch.float32)
    assert torch.equal(denoiser.pos_frequencies, exact.pos_frequencies)  # type: ignore[arg-type]
    trained = tuners.attach(config.LowRank(rank=2), mochi.targets, denoiser, seed=0)
    cond = mochi.collate(texts(mochi, "a car"))
    mochi.predict(denoiser, noisy(mochi), torch.tensor([0.5]), cond).float().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained.values())


def test_targets_are_four_layers_per_block(mochi: Mochi) -> None:
    chosen = tuners.select(config.LowRank(), mochi.targets, mochi.load_denoiser(torch.float32, meta=True))
    leaves = ("to_q", "to_k", "to_v", "to_out.0")
    assert chosen == [f"transformer_blocks.{i}.attn1.{leaf}" for i in range(2) for leaf in leaves]


@pytest.mark.slow
def test_the_published_checkpoint_has_the_published_sizes() -> None:
    mochi = family("genmo/mochi-1-preview")
    meta = mochi.load_denoiser(torch.float32, meta=True)
    assert sum(p.numel() for p in meta.parameters()) == 10_027_677_744
    assert mochi.shapes(79, 480, 848)["latents"] == (12, 14, 60, 106)
    assert (mochi.tokens(79, 480, 848), mochi.tokens(37, 480, 848)) == (22_260, 11_130)
    trained = tuners.attach(config.LowRank(rank=128), mochi.targets, meta, seed=0)
    assert sum(p.numel() for p in trained.values()) == 150_994_944
    made = config.build(
        {
            "run": "x",
            "model": {"family": "mochi", "checkpoint": "genmo/mochi-1-preview"},
            "data": {"sources": "x"},
        }
    )
    assert (made.data.size, made.objective.preset, made.sample.steps) == ((480, 848), "uniform", 64)
    assert mochi.fps == 30 and mochi.problems(made) == []


# --- the objective ------------------------------------------------------------------------------------------


def test_perfect_prediction_has_no_loss_and_leads_back_to_the_data(mochi: Mochi) -> None:
    data, noise = noisy(mochi), torch.randn(noisy(mochi).shape)
    perfect = Fixed(data - noise)
    step = DenoisingStep(mochi, mochi.objective(config.Objective(preset="uniform"), (480, 848)))
    batch = Batch(data, {"text": torch.zeros(1, 0, 32)}, ["a"])
    assert step.losses(perfect, batch, torch.tensor([0.25]), noise).item() == 0.0
    assert perfect.timestep.item() == 750.0
    sigmas = [*linear_quadratic_schedule(64, 0.025), 0.0]
    x = noise.clone()
    for now, then in pairwise(sigmas):
        x += (then - now) * mochi.predict(perfect, x, torch.tensor([now]), batch.cond)
    assert torch.allclose(x, data, atol=1e-5)


def test_the_timestep_loses_no_digits(mochi: Mochi) -> None:
    """Of the sampler's steps, t = 1 - timestep / 1000 in float32 leads back to the timestep."""
    answer = Fixed(torch.zeros(1))
    cond = {"text": torch.zeros(1, 0, 32)}
    for wanted in (0.0, 12.5, 25.0, 62.5, 500.0, 987.5, 999.5, 1000.0):
        mochi.predict(answer, torch.zeros(1), torch.tensor([1 - wanted / 1000]), cond)
        assert answer.timestep.item() == wanted
    for sigma in linear_quadratic_schedule(64, 0.025):
        mochi.predict(answer, torch.zeros(1), torch.tensor([sigma]), cond)
        assert abs(answer.timestep.item() - (1000 - 1000 * sigma)) < 6.2e-5, (
            "the spacing of float32 near 1000"
        )


def test_text_has_the_length_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"max_sequence_length": 19}), "utf-8")
    other = family(tmp_path / "other")
    long, short = texts(other, "x" * 60, "a")
    assert other.text_length == len(long["text"]) == 19 > len(short["text"])
    network: Any = other.load_denoiser(torch.float32)
    seen: list[tuple[int, ...]] = []
    network.time_embed.pooler.register_forward_hook(lambda m, args, out: seen.append(args[1].shape))
    with torch.no_grad():
        other.predict(network, noisy(other), torch.tensor([0.5]), other.collate([short]))
    assert seen == [(1, 19)], "the mask of the text pooler"


def test_objective_is_that_of_the_reference_trainer(goldens_root: Path, mochi: Mochi) -> None:
    tensors = load_file(goldens_root / "legacy_objectives.safetensors")
    given, wanted = (
        {k.removeprefix(f"{part}.mochi."): v for k, v in tensors.items() if k.startswith(f"{part}.mochi.")}
        for part in ("inputs", "outputs")
    )
    objective = mochi.objective(config.Objective(preset="uniform"), (480, 848))
    t, answer = given["sigma"], given["model_output"].clone().requires_grad_()
    asked = Fixed(answer)
    found = mochi.predict(asked, given["x0"], t, {"text": torch.zeros(4, 0, 32)})
    target = objective.target(given["x0"], given["noise"], t)
    loss = mean_squared_error(found, target, objective.weight(t)).mean()
    loss.backward()
    assert answer.grad is not None
    noisy_latents = objective.corrupt(given["x0"], given["noise"], t)
    pairs = {
        "noisy_latents": noisy_latents,
        "target": -target,
        "model_timestep": asked.timestep,
        "loss": loss.detach()[None],
        "grad_model_output": answer.grad,
    }
    assert pairs.keys() == wanted.keys()
    for name, value in pairs.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    drawn = objective.sample_time(10_000, torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01) and drawn.var().item() == pytest.approx(
        1 / 12, abs=2e-3
    )


# --- latents and text ---------------------------------------------------------------------------------------


def test_latents_are_samples_normalised_or_raw(folder: Path, mochi: Mochi) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), dtype=np.uint8)
    encoder: Any = mochi.load_media_encoder(CPU)
    item = mochi.encode_media(encoder, frames)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = encoder.encode(pixels).latent_dist
    assert torch.equal(item["moments"][None], expected.parameters)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(9)

    z = DiagonalGaussianDistribution(expected.parameters).sample(generator())[0]
    raw = family(folder, options={"latent_space": "raw"}).sample_item(item, generator())["latents"]
    assert torch.equal(raw, z), "what the public trainers learned"
    latents = mochi.sample_item(item, generator())["latents"]
    mean, std = (torch.tensor(encoder.config[k]).view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    assert torch.allclose(latents * std + mean, z, atol=1e-6)
    assert not torch.equal(latents, mochi.sample_item(item, torch.Generator().manual_seed(8))["latents"])
    known = [-0.0673, -0.0380, -0.0748, -0.0557, 0.0128], [0.9264, 0.9249, 0.9393, 0.9593, 0.8245]
    published = family("genmo/mochi-1-preview").statistics
    for values, listed in zip(published, known, strict=True):
        assert values.flatten()[:5].tolist() == pytest.approx(listed, abs=5e-5)


@pytest.mark.parametrize("space", ["normalized", "raw"])
def test_latents_are_decoded_as_they_were_learned(folder: Path, space: str) -> None:
    mochi = family(folder, options={"latent_space": space})
    pipe = mochi.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    options: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 13, "num_inference_steps": 2}
    text = mochi.pipeline_inputs(pipe, *texts(mochi, "a car", ""), [])  # type: ignore[arg-type]
    latents = noisy(mochi)
    decoded: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **k: (decoded.append(z), decode(z, **k))[1]
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(**text, **options, latents=latents, output_type="latent").frames
    pipe(**text, **options, latents=latents, output_type="np")
    mean, std = family(folder).statistics
    expected = drawn if space == "raw" else drawn * std + mean
    assert torch.allclose(decoded[0], expected, atol=1e-6)


def test_no_caption_is_no_token(folder: Path, mochi: Mochi, network: nn.Module) -> None:
    empty, blank, dot = texts(mochi, "", "  ", ".")
    assert empty["text"].shape == blank["text"].shape == (0, 32) and len(dot["text"]) > 1
    (long,) = texts(mochi, "x" * 1000)
    assert len(long["text"]) == mochi.text_length == 256
    pipe = mochi.pipeline(denoiser=network, device=CPU, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = watched(pipe)
    mochi.sample(
        pipe,
        dot,
        empty,
        size=(32, 48),
        frames=13,
        steps=2,
        guidance=4.0,
        generator=torch.Generator().manual_seed(0),
    )
    first = seen[0]
    assert not first["encoder_hidden_states"][0].any() and not first["encoder_attention_mask"][0].any()
    assert first["encoder_attention_mask"][1].sum() == len(dot["text"])
    with torch.no_grad():
        dropped = mochi.predict(network, first["hidden_states"][:1], torch.ones(1), mochi.collate([empty]))
    assert (dropped + first["output"][:1]).abs().max().item() < 1e-5


def test_t5_stays_float32(mochi: Mochi) -> None:
    _, encoder = mochi.load_text_encoder(CPU, torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


# --- the pipeline -------------------------------------------------------------------------------------------


def test_sample_is_the_stock_pipeline(folder: Path, mochi: Mochi, network: nn.Module) -> None:
    """Also around the network in training, whose attention is ours."""
    text, negative = texts(mochi, "a cat", "")
    theirs = stock(folder)
    zeros, nothing = torch.zeros(1, 256, 32), torch.zeros(1, 256, dtype=torch.bool)
    expected = theirs(
        "a cat",
        negative_prompt_embeds=zeros,
        negative_prompt_attention_mask=nothing,
        height=32,
        width=48,
        num_frames=13,
        num_inference_steps=64,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    pipe = mochi.pipeline(denoiser=network, device=CPU, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = watched(pipe)
    ours = mochi.sample(
        pipe,
        text,
        negative,
        size=(32, 48),
        frames=13,
        steps=64,
        guidance=6.0,
        generator=torch.Generator().manual_seed(7),
    )
    assert ours.shape == (13, 32, 48, 3) and ours.std() > 1
    assert np.abs(ours.astype(int) - (expected * 255).round().astype(int)).max() <= 1
    sigmas = 1 - torch.stack([s["timestep"][0] for s in seen]) / 1000
    assert torch.allclose(sigmas, torch.tensor(schedule(64)), atol=1e-6)


@pytest.mark.slow
def test_bfloat16_generates_too(folder: Path, mochi: Mochi) -> None:
    """Steps and guidance are float32; only what is computed inside the network and the VAE is rounded."""
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = mochi.pipeline(denoiser=None, device=CPU, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        seen = watched(pipe)
        options: dict[str, Any] = {"size": (32, 48), "frames": 13, "steps": 4, "guidance": 4.0}
        generator = torch.Generator().manual_seed(7)
        drawn.append(mochi.sample(pipe, *texts(mochi, "a cat", ""), generator=generator, **options))  # type: ignore[misc]
        assert {s["hidden_states"].dtype for s in seen} == {torch.float32}
    assert np.abs(drawn[0].astype(float) - drawn[1]).mean() < 3


def schedule(n: int, threshold: float = 0.025) -> list[float]:
    """Genmo's linear-quadratic schedule: half of the steps take a fortieth of the way."""
    half = n // 2
    rest = n - half
    a = (half - threshold * n) / (half * rest**2)
    b = threshold / half - 2 * (half - threshold * n) / rest**2
    return [1 - (i * threshold / half if i < half else a * i * i + b * i + a * half**2) for i in range(n)]


# --- from the command line ----------------------------------------------------------------------------------


def write(path: Path, folder: Path, clips: Path, **changes: Any) -> Path:
    """A recipe that works; keyword `section__key` changes a value."""
    raw: dict[str, Any] = {
        "run": "run",
        "model": {"family": "mochi", "checkpoint": str(folder)},
        "data": {"sources": str(clips), "size": [32, 48], "frames": 13, "validation": 0},
        "tuner": {"kind": "lora", "rank": 2},
        "train": {"steps": 1, "trackers": []},
        "sample": {"prompts": ["a cat"], "steps": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw[section], name: value}
    path.write_text(yaml.safe_dump(raw), "utf-8")
    return path


@pytest.fixture
def clips(make_clips: Callable[..., Path]) -> Path:
    return make_clips(2, size=(32, 48), frames=13, fps=30)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_in_the_same_words(folder: Path, clips: Path, here: Path) -> None:
    done = inlaid("new", "mochi", clips, "--checkpoint", folder)
    assert done.code == 0, done.output
    made = config.load(here / "clips.yaml")
    assert (made.model.family, made.data.size, made.data.frames) == ("mochi", (32, 48), [13])
    recipe = write(here / "r.yaml", folder, clips, model__options={"latent_space": "raw"})
    for command in (["check", recipe], ["train", recipe], ["generate", "run", "a cat"]):
        done = inlaid(*command)
        assert done.code == 0, done.output
    assert len(list(here.glob("run/samples/generated/*.mp4"))) == 1
    message = inlaid("inspect", "run/adapter").out
    for words in ("inlaid_latent_space  raw", "8 in 2 blocks", "mochi", "alpha"):
        assert words in message, message
    assert "| latent_space | raw |" in (here / "run/adapter/README.md").read_text("utf-8")
    refused = inlaid("export", "run", "--to", "kohya")
    assert refused.code == 2 and "no kohya layout is known for Mochi; use `diffusers`" in refused.output
    for to in ("diffusers", "merged", "comfyui", "genmo"):
        assert inlaid("export", "run", "--to", to).code == 0
    done = inlaid("import", "run/export/diffusers", "again", "--family", "mochi")
    assert done.code == 0, done.output
    again, before = (
        load_file(here / f / "pytorch_lora_weights.safetensors") for f in ("again", "run/adapter")
    )
    assert again.keys() == before.keys() and all(torch.equal(again[k], before[k]) for k in again)
    changed = inlaid("train", recipe, "model.options={latent_space: normalized}")
    assert changed.code == 2 and "started with another recipe" in changed.output


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "8 frames": ({"data__frames": 8}, "data: 8 frames is not 6n+1: use 7 or 13"),
    "12 frames": ({"data__frames": [7, 12]}, "data: 12 frames is not 6n+1: use 7 or 13"),
    "frames to sample": ({"sample__frames": 14}, "sample: 14 frames is not 6n+1: use 13 or 19"),
    "odd size": ({"data__size": [32, 40]}, "data: 32x40 is not a multiple of 16: use 32x32"),
    "an image": ({"sample__images": ["start.png"]}, "is text-to-video and uses no images; leave"),
    "a task": ({"model__task": "i2v"}, "model.task: CHECKPOINT has one network, for t2v; leave `task` out"),
    "an expert": (
        {"model__expert": "low"},
        "model.expert: CHECKPOINT has one network, for t2v; leave `expert`",
    ),
    "an option": (
        {"model__options": {"latents": "raw"}},
        "model.options.latents: mochi has no such option; its options are latent_space",
    ),
    "its value": (
        {"model__options": {"latent_space": "row"}},
        "model.options.latent_space: `row` is not one of normalized, raw",
    ),
    "one step": (
        {"sample__steps": 1},
        "sample.steps: the sampling schedule of Mochi has two parts; use 2 steps",
    ),
    "a made-up target": (
        {"tuner__targets": [r"time_embed\.pooler\.to_z"]},
        "matches no linear or convolution layer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_end_in_one_message(name: str, folder: Path, clips: Path, here: Path) -> None:
    changes, message = BAD[name]
    Image.new("RGB", (48, 32)).save(here / "start.png")
    done = inlaid("train", write(here / "r.yaml", folder, clips, **changes))
    assert done.code == 2 and "Traceback" not in done.output
    assert message.replace("CHECKPOINT", str(folder)).replace(" ", "") in done.output.replace(" ", "")
    assert not (here / "run/cache").exists(), "nothing was encoded for nothing"


def edited(source: Path, target: Path, **components: dict[str, Any]) -> Path:
    shutil.copytree(source, target)
    for component, values in components.items():
        path = target / component / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")
    return target


def test_checkpoints_that_are_something_else_are_refused(
    folder: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not a Mochi checkpoint, it contains WanTransformer3DModel and"):
        family(tiny_wan)
    wide = edited(folder, tmp_path / "wide", transformer={"in_channels": 24})
    with pytest.raises(ValueError, match="takes 24 channels for a 12-channel VAE; only Mochi text-to-video"):
        family(wide)
    shutil.rmtree(wide / "vae")
    with pytest.raises(ValueError, match="it contains MochiTransformer3DModel and None"):
        family(wide)


def test_lengths_that_the_vae_would_cut_are_refused(mochi: Mochi) -> None:
    assert [n for n in range(1, 40) if not mochi.grid.problems(n, 480, 848)] == [1, 7, 13, 19, 25, 31, 37]
    for n in (8, 12):
        with pytest.raises(AssertionError):
            mochi.encode_media(nn.Identity(), np.zeros((n, 32, 48, 3), np.uint8))
