"""The Wan tiny: what is trained is what the stock pipeline computes, and what ships is what it says."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny_models import wan_dit, wan_vae
from tiny_models.training import MuonAdamW, load_state, save_state
from tiny_models.wan_dit import TRANSFORMER, Cycle, Settings

from inlaid.tiny import path, world
from inlaid.tiny.world import Scene

SMALL = TRANSFORMER | {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    words = wan_dit.tokenizer()
    parts = {"text": wan_dit.text_encoder(len(words)), "dit": WanTransformer3DModel(**SMALL)}
    model = torch.nn.ModuleDict(parts).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_short_context_equals_the_pipelines_512_tokens(model):
    captions = [
        "",
        "a red circle",
        "a large green heart called zwibbelo, moving to the left on a striped background",
    ]
    text = wan_dit.tokenizer()(captions, padding="max_length", max_length=512, return_tensors="pt")
    ids, mask = text.input_ids, text.attention_mask
    noisy, time = torch.randn(3, 16, 2, 4, 4), torch.tensor([10.0, 500.0, 990.0])
    stock = model["text"](ids, mask).last_hidden_state * mask[..., None]
    expected = model["dit"](noisy, timestep=time, encoder_hidden_states=stock).sample
    short = wan_dit.shorten(model["dit"])
    context, short.bias = wan_dit.encode_text(model["text"], ids[:, :40], mask[:, :40])
    assert torch.allclose(
        model["dit"](noisy, timestep=time, encoder_hidden_states=context).sample, expected, atol=2e-5
    )
    short.bias = None
    wrong = model["dit"](noisy, timestep=time, encoder_hidden_states=context).sample
    assert not torch.allclose(wrong, expected, atol=1e-3)


def test_unknown_words_are_spelled_and_known_ones_are_not():
    words = wan_dit.tokenizer()
    assert words.tokenize("a large zorble") == ["▁a", "▁large", "▁", *"zorble"]
    texts = [world.caption(scene, k) for k, scene in enumerate(world.scenes(0, 200))]
    assert not any(words.unk_token_id in words(text).input_ids for text in texts)


def test_decoding_for_training_is_the_stock_one_without_the_clamp():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    latents = torch.randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        pixels = wan_vae.decode(vae, latents)
        assert torch.equal(pixels.clamp(-1, 1), vae.decode(latents).sample)


def test_batches_are_functions_of_their_number():
    settings = Settings(batch=4)
    latents, pairs, words = torch.randn(8, 16, 1, 2, 2), wan_dit.dataset(8), wan_dit.tokenizer()
    first, again = (wan_dit.batch(5, latents, pairs, words, settings, 0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], wan_dit.batch(6, latents, pairs, words, settings, 0.5)[0])
    assert (first[4].sum(dim=1) < first[4].shape[1]).all()


def test_times_are_logit_normal_and_shifted():
    sigma = torch.cat([wan_dit.sample_sigma(64, torch.Generator().manual_seed(k)) for k in range(50)])
    u = sigma / (3 - 2 * sigma)
    logit = torch.log(u / (1 - u))
    assert abs(float(logit.mean())) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03


def test_an_optimiser_continues_exactly(tmp_path):
    def build():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        return net, MuonAdamW(net.named_parameters(), 0.02, 1e-3)

    def step(net, optimizer, k):
        generator = torch.Generator().manual_seed(k)
        net(torch.randn(4, 2, 3, 3, 3, generator=generator)).square().mean().backward()
        optimizer.step(1.0)

    whole, optimizer = build()
    for k in range(4):
        step(whole, optimizer, k)
        if k == 1:
            save_state(
                tmp_path / "s.safetensors",
                {"done": 2},
                model=whole.state_dict(),
                optimizer=optimizer.tensors(),
            )
    facts, groups = load_state(tmp_path / "s.safetensors")
    assert facts == {"done": 2}
    resumed, optimizer = build()
    resumed.load_state_dict(groups["model"])
    optimizer.load(groups["optimizer"])
    for k in (2, 3):
        step(resumed, optimizer, k)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(wan_dit, "TRANSFORMER", SMALL)
    latents = torch.randn(6, 16, 2, 4, 4)
    cycles = Cycle(2, 1.0, 0.5, 0.5, 32), Cycle(3, 0.5, 1.0, 0.8, 24)
    settings = Settings(clips=6, batch=2, cycles=cycles)

    class InterruptionError(Exception):
        pass

    def stop_at(step):
        def batch(k, *rest):
            if k == step:
                raise InterruptionError
            return original(k, *rest)

        return batch

    original = wan_dit.batch
    whole = wan_dit.train(tmp_path / "whole", latents, settings)
    monkeypatch.setattr(wan_dit, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(wan_dit, "batch", stop_at(3))
    with pytest.raises(InterruptionError):
        wan_dit.train(tmp_path / "parts", latents, settings)
    monkeypatch.setattr(wan_dit, "batch", original)
    parts = wan_dit.train(tmp_path / "parts", latents, settings)
    for group in ("model", "average"):
        expected, found = (load_state(file)[1][group] for file in (whole, parts))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_there_is_no_other_twin():
    with pytest.raises(ValueError, match="'sora'"):
        path("sora")


needs_twin = pytest.mark.skipif(
    not (path("wan") / "model_index.json").exists(), reason="the tiny model is not built"
)


@needs_twin
def test_the_shipped_folder_is_small_and_holds_no_pickle():
    files = [file for file in path("wan").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}


@needs_twin
def test_the_shipped_twin_generates_what_the_prompt_asks():
    from tiny_models.wan_report import generate, load

    from inlaid.tiny import judge

    pipe = load(path("wan"))
    assert {str(module.dtype) for module in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {
        "torch.float32"
    }
    scene = Scene("circle", "red", "right", "large", "plain")
    clips = generate(pipe, ["a large red circle moving right on a plain background"] * 2, seed=0, steps=15)
    assert clips.shape == (2, 17, 64, 64, 3)
    assert any(judge.judge_scene(clip, scene)["all"] for clip in clips)


@needs_twin
def test_the_shipped_autoencoder_reconstructs_what_it_never_saw():
    from tiny_models.wan_report import STEPS

    vae = AutoencoderKLWan.from_pretrained(path("wan"), subfolder="vae")
    clips = np.stack([clip for clip, _ in world.subject_clips(4)])
    assert wan_vae.psnr(clips, wan_vae.reconstruct(vae, clips)) > 26
    assert STEPS <= 30
