"""Shared fixtures: real classes made small, real media and goldens where they are there."""

from __future__ import annotations

import os
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inlay import console

console.quiet()


def _outside(variable: str, name: str) -> Path:
    default = Path(__file__).parent.parent.parent / "shared" / name
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"no {name} folder: set {variable} to run this test")
    return path


@pytest.fixture(scope="session")
def media_root() -> Path:
    """Real clips, see its README."""
    return _outside("INLAY_MEDIA", "media")


@pytest.fixture(scope="session")
def goldens_root() -> Path:
    """Numeric vectors made with the reference implementations."""
    return _outside("INLAY_GOLDENS", "goldens")


def make_tiny_wan(folder: Path, *, variant: str = "2.1", width: int = 24, layers: int = 2) -> Path:
    """Writes a random Wan checkpoint of real classes: `2.1`, `a14b` (two experts) or `5b` (per-token time, 48 channels)."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    console.quiet_bars()
    symbols = [(c, -3.0) for c in string.ascii_letters + string.digits + ".,'-!?"]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *symbols], extra_ids=0, model_max_length=512
    )
    torch.manual_seed(0)
    text = UMT5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=128,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    channels = 48 if variant == "5b" else 16

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=width // 2,
            in_channels=channels,
            out_channels=channels,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )

    extra = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if variant == "5b":
        extra |= {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        extra |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
        extra |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = AutoencoderKLWan(z_dim=channels, **extra)
    options = {}
    if variant == "a14b":
        options = {"transformer_2": transformer(), "boundary_ratio": 0.875}
    if variant == "5b":
        options = {"expand_timesteps": True}
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        **options,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1 text-to-video checkpoint."""
    return make_tiny_wan(tmp_path_factory.mktemp("checkpoints") / "tiny-wan")


@pytest.fixture(scope="session")
def tiny_a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 checkpoint with two experts."""
    return make_tiny_wan(tmp_path_factory.mktemp("checkpoints") / "tiny-a14b", variant="a14b")


@pytest.fixture(scope="session")
def tiny_5b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 TI2V-5B checkpoint."""
    return make_tiny_wan(tmp_path_factory.mktemp("checkpoints") / "tiny-5b", variant="5b")


@pytest.fixture
def make_clips(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder of small captioned clips: n, size (h, w), frames, fps."""

    def make(n: int = 4, *, size: tuple[int, int] = (32, 32), frames: int = 9, fps: int = 16, name: str = "clips") -> Path:
        from inlay import media

        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for i in range(n):
            still = rng.integers(0, 255, (1, *size, 3), dtype=np.uint8)
            video = np.stack([np.roll(still[0], k, axis=1) for k in range(frames)])
            media.write_video(folder / f"{i:02d}.mp4", video, fps)
            (folder / f"{i:02d}.txt").write_text(f"clip number {i}", "utf-8")
        return folder

    return make


@pytest.fixture
def recipe(tiny_wan: Path, make_clips: Callable[..., Path], tmp_path: Path) -> Callable[..., dict]:
    """A function that gives a small complete recipe as a mapping; keyword `section__key` changes a value."""

    def make(**changes: object) -> dict:
        clips = tmp_path / "clips"
        raw: dict = {
            "run": str(tmp_path / "run"),
            "model": {"family": "wan", "checkpoint": str(tiny_wan)},
            "data": {"sources": str(clips if clips.is_dir() else make_clips()), "size": [32, 32], "frames": 9, "held_out": 1},
            "tuner": {"kind": "lora", "rank": 4},
            "optim": {"lr": 1e-2},
            "train": {"steps": 6, "save_every": 2, "log_every": 2, "validate_every": 3, "trackers": []},
            "sample": {"prompts": ["clip number 1"], "steps": 2},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section] = {**raw.get(section, {}), name: value}
            else:
                raw[section] = value
        return raw

    return make
