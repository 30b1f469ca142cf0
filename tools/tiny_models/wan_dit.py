"""Tokenizer, text encoder and diffusion transformer of the tiny Wan: construction and training."""

from __future__ import annotations

import math
import re
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from inlaid.tiny import world
from inlaid.tiny.world import BACKGROUNDS, SIZES, Scene
from tiny_models import wan_vae
from tiny_models.training import MuonAdamW, Progress, load_state, save_state

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}

TEXT = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

TOKENS = 512
"""Text tokens that the pipeline passes to the transformer; padding is zero but not masked in attention."""

SHIFT = 3.0

SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Cycle:
    """Training cycle, at the end of which the learning rates are zero."""

    steps: int
    peak: float
    """Factor on both learning rates."""
    decay: float
    """Share of the steps, at the end, over which the learning rates decay."""
    background: float
    """Share of captions that state the background."""
    ffn: int
    """Hidden units per feed-forward layer; a smaller number prunes the units of smallest norm (`narrow`)."""


@dataclass(frozen=True)
class Settings:
    """Training settings of the transformer."""

    clips: int = 4608
    cycles: tuple[Cycle, ...] = (Cycle(6200, 1.0, 0.35, 0.65, 480), Cycle(2700, 0.5, 1.0, 0.8, 456))
    """Reason for the second cycle: after the first, only nine of ten clips had the prompted background, and
    the folder had 8.07 MB."""
    batch: int = 32
    muon: float = 0.02
    adamw: float = 2e-3
    ema: float = 0.998
    empty: float = 0.1
    """Share of captions replaced by an empty caption, for classifier-free guidance."""
    vague: float = 0.04
    """Share of captions with an invented noun instead of color and shape."""


def tokenizer() -> T5Tokenizer:
    """Return a unigram tokenizer of the captions' vocabulary; other words are split into characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = [(f"▁{word}", -3.0) for word in world.vocabulary()]
    spelled = [(c, -8.0) for c in string.ascii_lowercase + string.ascii_uppercase + string.digits + ".,'-!?"]
    return T5Tokenizer(vocab=special + words + spelled, extra_ids=0, model_max_length=TOKENS)


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Return a text encoder with initial weights, in evaluation mode (it has no dropout)."""
    return UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT)).eval()


# --- cross-attention to 512 text tokens at reduced cost ---------------------------------------------------


class ShortContext(WanAttnProcessor):
    """Cross-attention in which a few padding tokens represent all of them.

    The pipeline pads the text to 512 tokens with zeros and attends to all tokens. The padding tokens are
    equal, so `m` of them with `log(n / m)` added to their logits give the same output as `n`.
    """

    bias: Tensor | None = None
    """Bias of the logits `(b, 1, 1, tokens)`, set for each batch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """Call `WanAttnProcessor` with `bias` as the attention mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def shorten(transformer: WanTransformer3DModel) -> ShortContext:
    """Install one `ShortContext` in all cross-attention layers of a transformer, and return it."""
    short, blocks = ShortContext(), cast(Any, transformer.blocks)
    for block in blocks:
        block.attn2.set_processor(short)
    return short


def encode_text(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Encode captions like the pipeline does.

    Args:
        encoder: The text encoder.
        ids: Token ids `(b, n)`, padded so that every row has at least one pad token.
        mask: 1 for tokens, 0 for padding, `(b, n)`.

    Returns:
        Embeddings `(b, n, 64)`, zero past each caption's end, and the bias for `ShortContext` `(b, 1, 1, n)`.
    """
    embeddings = encoder(ids, mask).last_hidden_state * mask[..., None]
    length = mask.sum(dim=1, keepdim=True)
    weight = torch.log((TOKENS - length) / (mask.shape[1] - length))
    return embeddings, torch.where(mask > 0, 0.0, weight)[:, None, None, :]


# --- data -------------------------------------------------------------------------------------------------


def dataset(n: int) -> list[tuple[Scene, int]]:
    """Return the fully specified scene and the render seed of each training clip."""
    rng = np.random.default_rng(67)
    pairs = []
    for k, scene in enumerate(world.scenes(1, n)):
        size, background = str(rng.choice(list(SIZES))), str(rng.choice(BACKGROUNDS))
        pairs.append((replace(scene, size=size, background=background), k))
    return pairs


@torch.no_grad()
@wan_vae.fast_norm()
def cache(work: Path, vae: Any, n: int, part: int = 0, parts: int = 1) -> None:
    """Encode one part of the training clips: posterior mode, not normalized, `(n / parts, 16, 5, 8, 8)`."""
    file = work / f"latents-{n}-{part}of{parts}.safetensors"
    if file.exists():
        return
    mine = dataset(n)[part::parts]
    progress, latents, variances = Progress(f"latents {part + 1} of {parts}", len(mine)), [], []
    for start in range(0, len(mine), 8):
        clips = np.stack([world.render(scene, seed) for scene, seed in mine[start : start + 8]])
        video = wan_vae.to_model(clips).contiguous(memory_format=torch.channels_last_3d)
        posterior = vae.encode(video).latent_dist
        latents.append(posterior.mode())
        variances.append(posterior.var.mean(dim=(0, 2, 3, 4)))
        progress(min(start + 8, len(mine)))
    save_state(file, {}, latents={"mode": torch.cat(latents), "variance": torch.stack(variances).mean(dim=0)})


def load_latents(work: Path, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all cached latents `(n, 16, 5, 8, 8)` in the order of `dataset`, with normalization constants.

    Returns:
        Latents, not normalized; mean and standard deviation per channel, `(1, 16, 1, 1, 1)`. The deviation
        includes the posterior variance; otherwise channels that the VAE does not use would be amplified.
    """
    files = sorted(work.glob(f"latents-{n}-*.safetensors"))
    parts = int(files[0].stem.rpartition("of")[2])
    assert len(files) == parts, f"{len(files)} of {parts} parts of the latents found"
    pieces = [load_state(work / f"latents-{n}-{k}of{parts}.safetensors")[1]["latents"] for k in range(parts)]
    whole = torch.empty(n, *pieces[0]["mode"].shape[1:])
    for k, piece in enumerate(pieces):
        whole[k::parts] = piece["mode"]
    mean = whole.mean(dim=(0, 2, 3, 4))
    std = (whole.var(dim=(0, 2, 3, 4)) + torch.stack([p["variance"] for p in pieces]).mean(dim=0)).sqrt()
    mean, std = (torch.round(t, decimals=4).view(1, -1, 1, 1, 1) for t in (mean, std))
    return whole, mean, std


def training_caption(
    scene: Scene, rng: np.random.Generator, settings: Settings, background_share: float
) -> str:
    """Return a random caption of a scene for one step: empty, vague, or with some of the attributes."""
    seed, use = int(rng.integers(1 << 30)), rng.random()
    if use < settings.empty:
        return ""
    size = scene.size if rng.random() < 0.7 else None
    background = scene.background if rng.random() < background_share else None
    stated = replace(scene, size=size, background=background)
    return world.vague_caption(stated, seed) if use > 1 - settings.vague else world.caption(stated, seed)


def sample_sigma(n: int, generator: torch.Generator) -> Tensor:
    """Sample noise levels `(n,)` in (0, 1): logit-normal, stratified, shifted towards noise."""
    even = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    u = torch.sigmoid(torch.special.ndtri(even.clamp(1e-5, 1 - 1e-5)))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


# --- training ---------------------------------------------------------------------------------------------

_BY_ADAMW = re.compile(
    r"scale_shift_table|patch_embedding|proj_out|shared|embed_tokens|relative_attention_bias"
)


def train(work: Path, latents: Tensor, settings: Settings, minutes: float | None = None) -> Path:
    """Train transformer and text encoder, resuming from a checkpoint; return the path of the weights.

    Args:
        work: Folder for checkpoints.
        latents: Normalized latents of `dataset(settings.clips)`, `(n, 16, 5, 8, 8)`.
        settings: Training settings.
        minutes: Target duration. The step counts of all cycles are scaled to it, and saved.
    """
    words, pairs, state = tokenizer(), dataset(settings.clips), work / "dit.safetensors"
    for k in range(len(settings.cycles)):
        _train_cycle(state, k, latents, pairs, words, settings, minutes)
    return state


def _train_cycle(
    state: Path,
    k: int,
    latents: Tensor,
    pairs: list[tuple[Scene, int]],
    words: T5Tokenizer,
    settings: Settings,
    minutes: float | None,
) -> None:
    """Run or resume cycle `k`; it starts from the EMA of the previous cycle with a new optimizer."""
    facts, groups = {"done": 0, "seconds": 0.0, "counts": [c.steps for c in settings.cycles]}, {}
    if state.exists():
        facts, groups = load_state(state)
    cycle, begin, step = settings.cycles[k], sum(facts["counts"][:k]), facts["done"]
    if step >= begin + facts["counts"][k]:
        return
    torch.manual_seed(1)
    model = nn.ModuleDict({"text": text_encoder(len(words)), "dit": transformer(cycle.ffn)})
    optimizer = MuonAdamW(
        model.named_parameters(), settings.muon, settings.adamw, lambda n: bool(_BY_ADAMW.search(n))
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if step > begin:
        model.load_state_dict(groups["model"], strict=False)
        optimizer.load(groups["optimizer"])
    if step:
        kept = narrow(groups["average"], cycle.ffn)
        average = {name: kept[name] for name in average}
    if step and step == begin:
        model.load_state_dict(average, strict=False)
        average = {name: tensor.clone() for name, tensor in average.items()}
    forward = _forward(model, shorten(cast(WanTransformer3DModel, model["dit"])))
    first, saved = step, time.monotonic()
    timed, progress = saved, Progress("dit", sum(facts["counts"]), first)
    while step < (end := begin + facts["counts"][k]):
        loss = forward(*batch(step, latents, pairs, words, settings, cycle.background))
        loss.backward()
        left = (end - step) / (cycle.decay * facts["counts"][k])
        optimizer.step(cycle.peak * min(1.0, (step + 1 - begin) / 50, left))
        keep = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        step += 1
        if step == first + 20:
            timed = time.monotonic()
        if minutes and step == 60 and first == 0:
            scale = minutes * 60 / ((time.monotonic() - timed) / 40) / sum(facts["counts"])
            facts["counts"] = [max(61, round(c.steps * scale)) for c in settings.cycles]
            progress.total, end = sum(facts["counts"]), facts["counts"][0]
        progress(step, loss=loss.detach())
        if time.monotonic() - saved > SAVE_EVERY or step == end:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step, time.monotonic()
            save_state(state, facts, model=model.state_dict(), optimizer=optimizer.tensors(), average=average)


def transformer(ffn: int) -> WanTransformer3DModel:
    """Return a transformer with initial weights and `ffn` hidden units per feed-forward layer."""
    config: dict[str, Any] = TRANSFORMER | {"ffn_dim": ffn}
    return WanTransformer3DModel(**config)


def narrow(weights: dict[str, Tensor], ffn: int) -> dict[str, Tensor]:
    """Keep the `ffn` hidden units per layer with the largest product of input and output weight norms."""
    weights = dict(weights)
    for out in [name for name in weights if name.endswith("ffn.net.2.weight")]:
        into, bias = (out.replace("net.2.weight", f"net.0.proj.{what}") for what in ("weight", "bias"))
        size = weights[into].norm(dim=1) * weights[out].norm(dim=0)
        units = size.topk(ffn).indices.sort().values
        weights |= {into: weights[into][units], bias: weights[bias][units], out: weights[out][:, units]}
    return weights


def batch(
    step: int,
    latents: Tensor,
    pairs: list[tuple[Scene, int]],
    words: T5Tokenizer,
    settings: Settings,
    background: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the latents, noise, sigma, token ids and mask of batch `step`, which depends only on `step`.

    The width of token ids and mask is a multiple of 8.
    """
    rng, generator = np.random.default_rng([step, 71]), torch.Generator().manual_seed(step)
    chosen = rng.integers(len(latents), size=settings.batch)
    captions = [training_caption(pairs[k][0], rng, settings, background) for k in chosen]
    text = words(captions, padding=True, return_tensors="pt")
    width = 8 * math.ceil((text.input_ids.shape[1] + 1) / 8) - text.input_ids.shape[1]
    ids, mask = (nn.functional.pad(t, (0, width)) for t in (text.input_ids, text.attention_mask))
    x0 = latents[torch.from_numpy(chosen)]
    noise = torch.randn(x0.shape, generator=generator)
    return x0, noise, sample_sigma(len(x0), generator), ids, mask


def _forward(model: Any, short: ShortContext) -> Callable[..., Tensor]:
    def loss(x0: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        context, short.bias = encode_text(model["text"], ids, mask)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * noise
        flow = model["dit"](x, timestep=1000 * sigma, encoder_hidden_states=context, return_dict=False)[0]
        return (flow - (noise - x0)).square().mean()

    return loss
