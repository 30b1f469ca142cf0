"""Joint transparency: what the networks compute, for every family that has it, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from inlaid import config
from inlaid.adapters import tuners
from inlaid.alpha.opening import build_family
from inlaid.check import estimate
from inlaid.data.batch import Batch
from inlaid.networks import joint_attention, quantize
from inlaid.networks.half_tokens import NOT_MERGEABLE, HalfTokens
from inlaid.tiny import random
from inlaid.tiny.random import TEXT_WIDTH
from inlaid.training import memory
from inlaid.training.steps import DenoisingStep
from support.joint import (
    CASES,
    CPU,
    FEW,
    ONE_SEQUENCE,
    Checkpoint,
    every_case,
    mostly_few_cases,
    network,
    opened,
    pipeline_inputs,
    size,
    swap,
)
from support.slow import mostly_slow, slow

# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", mostly_slow(CASES, [*FEW, ("cogvideox", "2b")].__contains__), ids="-".join
)  # each kind of positions
def test_equal_clips_stay_equal_and_wan_does_to_them_what_it_does_to_one(
    case: tuple[str, str], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = opened(checkpoint, case)
    x, t, cond = pipeline_inputs(family)
    one = x.chunk(2, 2)[0]
    x = torch.cat([one, one], 2)
    with torch.no_grad():
        color, gray = family.predict(network(family), x, t, cond).chunk(2, 2)
        alone = family.single.predict(network(family.single), one, t, cond)
        monkeypatch.setattr(family.opaque, "share_positions", lambda *_: None)
        apart = family.predict(network(family), x, t, cond).chunk(2, 2)
    assert torch.equal(color, gray)
    assert (apart[0] - apart[1]).abs().max() > 1e-3, "positions that go on would be seen"
    difference = (color - alone).abs().max()
    assert difference < 1e-5 if case[0] == "wan" else difference > 1e-3


@mostly_few_cases
def test_swapped_clips_come_out_swapped(case: tuple[str, str], checkpoint: Checkpoint) -> None:
    rule = "block" if case[0] == "wan" else "open"
    family = opened(checkpoint, case, domain_embedding=False, text_to_alpha=rule)
    x, t, cond = pipeline_inputs(family)
    with torch.no_grad():
        out, swapped = (family.predict(network(family), y, t, cond) for y in (x, swap(x)))
    assert (swap(out) - swapped).abs().max() < 1e-5
    assert (out - swapped).abs().max() > 0.1


@pytest.mark.parametrize("case", mostly_slow(ONE_SEQUENCE, FEW.__contains__), ids="-".join)
def test_only_that_text_sees_color_tells_the_halves_apart(
    case: tuple[str, str], checkpoint: Checkpoint
) -> None:
    family = opened(checkpoint, case)
    x, t, cond = pipeline_inputs(family)
    with torch.no_grad():
        out, swapped = (family.predict(network(family), y, t, cond) for y in (x, swap(x)))
    assert (swap(out) - swapped).abs().max() > 1e-4


# --- the update ---------------------------------------------------------------------------------------------


def trained(family: Any, kind: str, **tuner: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """A network with an adapter that does something, as training has it."""
    denoiser = family.load_denoiser(torch.float32)
    tuners.attach(config.LowRank(kind=kind, rank=2, **tuner), family.targets, denoiser, seed=1)  # type: ignore[arg-type]
    family.attached(denoiser)
    open_to = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    for name, p in open_to.items():
        noise = 0.3 * torch.randn(p.shape, generator=generator)
        p.data = p.data * (1 + noise) if "magnitude" in name else p.data + noise
    return denoiser, open_to


@pytest.mark.parametrize(
    ("kind", "case"),
    [("lora", c) if c in FEW else slow("lora", c) for c in CASES]
    + [("dora", c) if c == FEW[0] else slow("dora", c) for c in CASES],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_tokens_of_color_and_text_are_not_changed_at_all(
    case: tuple[str, str], kind: str, checkpoint: Checkpoint
) -> None:
    family = opened(checkpoint, case)
    denoiser, _ = trained(family, kind)
    before, after = [], []

    def watch(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
        head = out.shape[1] - (family.tokens(*size(family)) - family.text_before) // 2
        change = out - layer.base_layer(args[0])
        before.append(change[:, :head].abs().max().item())
        after.append(change[:, head:].abs().mean().item())

    layers = [m for m in denoiser.modules() if isinstance(m, HalfTokens)]
    for layer in layers:
        layer.register_forward_hook(watch)  # type: ignore[attr-defined]
    x, t, cond = pipeline_inputs(family)
    with torch.no_grad():
        family.predict(denoiser.eval(), x, t, cond)
    each = {"wan": 8, "mochi": 4, "cogvideox": 4}[case[0]]
    assert len(after) == len(layers) == each * len(quantize.blocks(denoiser))
    assert before == [0.0] * len(before) and min(after) > 1e-4


@mostly_few_cases
def test_all_that_trains_has_a_gradient_and_recomputing_changes_none(
    case: tuple[str, str], checkpoint: Checkpoint
) -> None:
    family = opened(checkpoint, case)
    found = []
    for recompute in (False, True):
        denoiser, open_to = trained(family, "dora", dropout=0.1)
        if recompute:
            memory.enable_checkpointing(denoiser.train(), True)
        torch.manual_seed(3)
        family.predict(denoiser.train(), *pipeline_inputs(family)).square().mean().backward()
        found.append({n: p.grad for n, p in open_to.items()})
    assert "domain_embedding.weight" in found[0] and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, found[1][name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_update_that_is_switched_off_or_weakened_is(kind: str, checkpoint: Checkpoint) -> None:
    family = opened(checkpoint, CASES[0])
    denoiser, _ = trained(family, kind)
    asked = pipeline_inputs(family)
    with torch.no_grad():
        plain, tuned = (family.predict(d.eval(), *asked) for d in (network(family), denoiser))
        denoiser.disable_adapters()
        off = family.predict(denoiser, *asked)
        denoiser.enable_adapters()
        assert torch.equal(family.predict(denoiser, *asked), tuned)
    assert torch.equal(off, plain) and (tuned - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match=NOT_MERGEABLE):
        denoiser.fuse_lora()


def test_dropout_is_for_alpha_too(checkpoint: Checkpoint) -> None:
    family = opened(checkpoint, CASES[0], domain_embedding=False)
    denoiser, _ = trained(family, "lora", dropout=0.5)
    asked = pipeline_inputs(family)
    with torch.no_grad():
        drawn = [family.predict(denoiser.train(), *asked) for _ in range(2)]
        same = [family.predict(denoiser.eval(), *asked) for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(*same)


def test_the_vector_is_for_alpha(checkpoint: Checkpoint) -> None:
    """In the first block; later ones see color through attention."""
    family = opened(checkpoint, CASES[0])
    denoiser, seen = network(family), []
    denoiser.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for value in (0.0, torch.randn(denoiser.domain_embedding.weight.shape)):
        denoiser.domain_embedding.weight.copy_(
            torch.as_tensor(value).expand_as(denoiser.domain_embedding.weight)
        )
        with torch.no_grad():
            family.predict(denoiser, *pipeline_inputs(family))
    color, gray = (seen[1] - seen[0]).chunk(2, 1)
    assert not color.any()
    assert torch.allclose(gray, denoiser.domain_embedding.weight.expand_as(gray), atol=1e-5)


# --- attention ----------------------------------------------------------------------------------------------


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention as it is written down, with a number for every pair."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return logits.softmax(-1) @ value


def rule_of_pairs(text: int, half: int, first: bool, rule: str) -> Tensor:
    """What is added to the logits of each pair (tokens, tokens)."""
    color, gray, words = (torch.zeros(text + 2 * half, dtype=torch.bool) for _ in range(3))
    start = text if first else 0
    color[start : start + half] = gray[start + half : start + 2 * half] = True
    words |= ~(color | gray)
    out = torch.zeros(text + 2 * half, text + 2 * half)
    out[words[:, None] & gray[None]] = {"block": float("-inf"), "bias": -1.0, "open": 0.0}[rule]
    return out


@pytest.mark.parametrize("rule", ["block", "bias", "open"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("real", [None, (5, 2), (0, 3)], ids=["all", "padded", "none"])
def test_two_calls_are_one_with_a_mask(rule: Any, first: bool, real: tuple[int, int] | None) -> None:
    text, half = 5, 12
    q, k, v = torch.randn(3, 2, 3, text + 2 * half, 8, generator=torch.Generator().manual_seed(0))
    bias, mask = rule_of_pairs(text, half, first, rule).expand(2, 1, -1, -1), None
    if real:
        there = torch.arange(text) < torch.tensor(real)[:, None]
        mask = F.pad(there, (0, 2 * half) if first else (2 * half, 0), value=True)[:, None, None]
        bias = bias.masked_fill(~mask, float("-inf"))
        mask = None if first else mask
    if real and first:
        return  # CogVideoX attends to padding
    found = joint_attention.attention(q, k, v, text=text, first=first, rule=rule, mask=mask)
    assert (found - dense(q, k, v, bias)).abs().max() < 1e-6


def test_a_video_without_text() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    for first in (True, False):
        found = joint_attention.attention(q, k, v, text=0, first=first, rule="block")
        assert torch.allclose(found, F.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_bias_leaves_a_share_of_exp_minus_one() -> None:
    """Two keys that text may see and two of alpha, all alike: .365 .365 .134 .134 (joint_alpha, 5.1)."""
    q, k, v = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    # One token of text, one of color, one of alpha would be three: text 2, color 1, alpha 1.
    found = joint_attention.attention(q, k, v, text=2, first=True, rule="bias")[0, 0, 0]
    rest = np.exp(-1) / (3 + np.exp(-1))
    assert found[3].item() == pytest.approx(rest, abs=1e-6) and found[:3].sum().item() == pytest.approx(
        1 - rest
    )


class Dense:
    """Attention processors of Mochi and CogVideoX with a mask for all pairs, in no words of the package's."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        video, words = hidden_states, encoder_hidden_states
        n, m, own = video.shape[1], words.shape[1], getattr(attn, "add_q_proj", None)
        if own:  # Mochi
            x, y = (
                [f(z).unflatten(-1, (attn.heads, -1)) for f in fs]
                for z, fs in (
                    (video, (attn.to_q, attn.to_k, attn.to_v)),
                    (words, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
                )
            )
            x = [
                self.turn(attn.norm_q(x[0]), image_rotary_emb),
                self.turn(attn.norm_k(x[1]), image_rotary_emb),
                x[2],
            ]
            y = [attn.norm_added_q(y[0]), attn.norm_added_k(y[1]), y[2]]
            q, k, v = (torch.cat([b, a], 1).transpose(1, 2) for a, b in zip(x, y, strict=True))
        else:
            z = torch.cat([words, video], 1)
            q, k, v = (
                f(z).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for f in (attn.to_q, attn.to_k, attn.to_v)
            )
            q, k = attn.norm_q(q), attn.norm_k(k)
            if image_rotary_emb is not None:
                q, k = (
                    torch.cat([a[:, :, :m], apply_rotary_emb(a[:, :, m:], image_rotary_emb)], 2)
                    for a in (q, k)
                )
        bias = rule_of_pairs(m, n // 2, True, self.rule)[None, None]
        if attention_mask is not None:
            bias = bias.masked_fill(
                ~F.pad(attention_mask.bool(), (0, n), value=True)[:, None, None], float("-inf")
            )
        out = dense(q, k, v, bias).transpose(1, 2).flatten(2)
        words, video = out[:, :m], out[:, m:]
        if not own:
            return attn.to_out[0](video), attn.to_out[0](words)
        return attn.to_out[0](video), attn.to_add_out(words) if hasattr(attn, "to_add_out") else words

    @staticmethod
    def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*angles)
        return torch.view_as_real(turned).flatten(-2)


def by_hand(family: Any, rule: str) -> Callable[..., Tensor]:
    """The stock network, stated by hand that there are two clips: positions twice, a mask for all pairs."""
    denoiser = network(family.single)
    for block in denoiser.transformer_blocks if hasattr(denoiser, "transformer_blocks") else ():
        block.attn1.processor = Dense(rule)

    if family.model.family == "cogvideox":
        embed = denoiser.patch_embed
        stock = embed.forward

        def apart(text: Tensor, clips: Tensor) -> Tensor:
            one, two = (stock(text, clip) for clip in clips.chunk(2, 1))
            return torch.cat([one, two[:, text.shape[1] :]], 1)

        embed.forward = apart
    else:
        rope = denoiser.rope.forward

        def twice(*asked: Any, **named: Any) -> Any:
            if len(asked) == 1:
                return tuple(torch.cat([x, x], 1) for x in rope(asked[0][:, :, : asked[0].shape[2] // 2]))
            frequencies, frames, *size = asked
            return tuple(torch.cat([x, x]) for x in rope(frequencies, frames // 2, *size, **named))

        denoiser.rope.forward = twice
    return lambda **asked: denoiser(**asked)[0]


SOME = [
    (("mochi", "t2v"), "block"),
    (("cogvideox", "5b"), "bias"),
    (("cogvideox", "2b"), "block"),
    (("cogvideox", "1.5"), "block"),
]
"""Where text and video attend to each other, each network with a rule."""


@pytest.mark.parametrize(
    ("case", "rule"),
    [(c, r) if c[0] == "wan" or (c, r) in SOME else slow(c, r) for c in CASES for r in ("block", "bias")],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_first_steps_of_the_pipeline_are_those_of_a_dense_mask(
    case: tuple[str, str], rule: str, checkpoint: Checkpoint
) -> None:
    """Latents as the stock pipeline has them, and what our network answers, against the stock network's."""
    if case[0] == "wan" and rule == "bias":
        return
    family = opened(checkpoint, case, text_to_alpha=rule, shared_noise=False)
    pipe = family.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[dict, Tensor]] = []
    pipe.transformer.register_forward_hook(
        lambda m, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    text = family.encode_text(family.load_text_encoder(CPU, torch.float32), ["a cat", ""])
    frames, *pixels = size(family)
    made = family.sample(
        pipe,
        *text,
        size=pixels,
        frames=frames,
        steps=2,
        guidance=2.0,
        generator=torch.Generator().manual_seed(1),
    )
    assert made.shape == (frames, *pixels, 4) and made.dtype == np.uint8 and made[..., 3].std() > 0
    expected = by_hand(family, rule)
    for asked, answer in calls:
        with torch.no_grad():
            assert (expected(**asked) - answer).abs().max() < 1e-5
    halves = calls[0][0]["hidden_states"][0].chunk(2, 0 if case[0] == "cogvideox" else 1)
    assert not torch.equal(*halves)


def test_positions_of_the_table_that_the_network_was_built_with(checkpoint: Checkpoint) -> None:
    """2B keeps the table of one size; two clips that are together as long must not get it."""
    family = opened(checkpoint, ("cogvideox", "2b"))
    denoiser = family.single.load_denoiser(torch.float32)
    embed = denoiser.patch_embed
    h, w = embed.sample_height, embed.sample_width
    table = torch.randn(1, 4, 16, h, w)
    embed.sample_frames = 3 * embed.temporal_compression_ratio + 1
    embed.register_buffer("pos_embedding", embed._get_positional_embeddings(h, w, embed.sample_frames))
    family.share_positions(denoiser)
    with torch.no_grad():
        out = embed(torch.zeros(1, 226, TEXT_WIDTH), torch.cat([table[:, :2], table[:, :2]], 1))
    assert torch.equal(*out[:, 226:].chunk(2, 1))


# --- the pipeline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", mostly_slow(CASES, (FEW[0], FEW[2]).__contains__), ids="-".join)
def test_untrained_and_from_equal_noise_alpha_is_the_picture(
    case: tuple[str, str], checkpoint: Checkpoint
) -> None:
    """And of Wan the picture is the base's, after a whole run of the pipeline."""
    family = opened(checkpoint, case)
    text = family.encode_text(family.load_text_encoder(CPU, torch.float32), ["a cat", ""])
    frames, *pixels = size(family)
    options = {"size": pixels, "frames": frames, "steps": 3, "guidance": 2.0}
    drawn = []
    for each in (family, family.single):
        pipe = each.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if case[0] == "cogvideox":  # others draw noise in each step, for each half its own
            pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
        drawn.append(each.sample(pipe, *text, generator=torch.Generator().manual_seed(1), **options))
    both, one = (d.astype(int) for d in drawn)
    gray = both[..., :3].mean(-1)
    assert np.abs(both[..., 3] - gray).max() <= 1.01 and both[..., 3].std() > 1
    assert (np.abs(both[..., :3] - one).max() <= 1) == (case[0] == "wan")


def test_clips_are_decoded_apart(checkpoint: Checkpoint) -> None:
    """Mochi's VAE makes more frames of the latents of two clips than twice those of one."""
    family = opened(checkpoint, ("mochi", "t2v"), alpha_from="max")
    pipe = family.pipeline(denoiser=None, device=CPU, dtype=torch.float32)
    z = torch.randn(1, *family.shapes(13, 32, 32)["latents"])
    alone = [
        family.single.pipeline(denoiser=None, device=CPU, dtype=torch.float32).vae.decode(c)
        for c in z.chunk(2, 2)
    ]
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(z).sample, torch.cat([a.sample for a in alone], 2))
        assert pipe.vae.decode(z, return_dict=False)[0].shape[2] == 2 * alone[0].sample.shape[2]
    drawn = family.run = lambda *_, **__: np.arange(26 * 3).reshape(26, 1, 1, 3) / 100
    assert drawn
    found = family.sample(None, {}, {}, size=(32, 32), frames=13, generator=torch.Generator())
    assert found[0, 0, 0].tolist() == [0, 3, 5, round(255 * 41 / 100)], "the largest of the three channels"


# --- items --------------------------------------------------------------------------------------------------


@every_case
def test_an_item_is_two_clips_and_is_sampled_as_one(case: tuple[str, str], checkpoint: Checkpoint) -> None:
    family = opened(checkpoint, case)
    frames = np.random.default_rng(0).integers(0, 255, (*size(family), 4), dtype=np.uint8)
    encoder = family.load_media_encoder(CPU)
    item = family.encode_media(encoder, frames)
    assert {k: tuple(v.shape) for k, v in item.items()} == family.stored(*size(family))
    gray = family.single.encode_media(encoder, np.repeat(frames[..., 3:], 3, -1))
    assert {k.removeprefix("alpha_") for k in item if k.startswith("alpha_")} == set(gray)
    assert all(torch.equal(item[f"alpha_{k}"], v) for k, v in gray.items())
    drawn = family.sample_item(item, torch.Generator().manual_seed(0))
    assert {k: tuple(v.shape) for k, v in drawn.items()} == family.shapes(*size(family))
    again = family.sample_item(item, torch.Generator().manual_seed(0))
    assert torch.equal(drawn["latents"], again["latents"])
    one = family.single.shapes(*size(family))["latents"][1]
    first = family.single.sample_item({k: item[k] for k in gray}, torch.Generator().manual_seed(0))["latents"]
    assert torch.equal(drawn["latents"][:, :one], first)
    assert family.tokens(*size(family)) == 2 * family.single.tokens(*size(family)) - family.text_before


def test_losses_are_reported_of_both(checkpoint: Checkpoint) -> None:
    family = opened(checkpoint, CASES[0])
    x, _, cond = pipeline_inputs(family, 3)
    step = DenoisingStep(family, family.objective(config.Objective(), (32, 32)))
    out = step(network(family), Batch(x, cond, ["a"] * 3), torch.Generator().manual_seed(0))
    assert torch.allclose((out["loss_rgb"] + out["loss_alpha"]) / 2, out["losses"])
    assert out["loss"] == out["losses"].mean() and not torch.allclose(out["loss_rgb"], out["loss_alpha"])


@pytest.mark.parametrize("case", [CASES[0], *map(slow, CASES[1:])], ids="-".join)
def test_the_network_is_counted_on_shapes_alone(case: tuple[str, str], checkpoint: Checkpoint) -> None:
    """Attention is quadratic in twice the tokens."""
    family = opened(checkpoint, case)
    meta = family.load_denoiser(torch.float32, meta=True)
    both = estimate.count_operations(family, meta, size(family), 1, checkpointing=False)
    one = estimate.count_operations(
        family.single,
        family.single.load_denoiser(torch.float32, meta=True),
        size(family),
        1,
        checkpointing=False,
    )
    assert both.activations > one.activations and both.linear > one.linear
    assert both.attention > one.attention
    if case[0] == "wan":
        assert both.attention == 4 * one.attention and both.across == 2 * one.across


# --- compiled, quantised ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [slow(CASES[0]), *map(slow, ONE_SEQUENCE[:2])], ids="-".join)
def test_blocks_compile_into_one_graph(case: tuple[str, str], checkpoint: Checkpoint) -> None:
    family = opened(checkpoint, case)
    found = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        denoiser, open_to = trained(family, "dora")
        memory.enable_checkpointing(denoiser.train(), True)
        if backend:
            memory.compile_blocks(denoiser, backend)
        family.predict(denoiser, *pipeline_inputs(family)).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in open_to.values() if p.grad is not None]))
    torch._dynamo.reset()
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *[("lora", "int8"), slow("lora", "int4"), ("lora", "nf4")],
        *[slow("dora", "int8"), ("dora", "int4"), slow("dora", "nf4")],
    ],
)
def test_the_base_may_be_small(scheme: Any, kind: str, checkpoint: Checkpoint) -> None:
    """Color is what the small base makes of it, to the last bit."""
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}.get(scheme, "torch"))
    family = opened(checkpoint, CASES[0])
    denoiser = family.load_denoiser(torch.float32).train()
    quantize.shrink_weights(config.Memory(quantize=scheme), denoiser, CPU, torch.float32)
    tuners.attach(config.LowRank(kind=kind, rank=2), family.targets, denoiser, seed=1)  # type: ignore[arg-type]
    family.attached(denoiser)
    layers = [m for m in denoiser.modules() if isinstance(m, HalfTokens)]
    assert len(layers) == 8 * len(denoiser.blocks)
    changes = []

    def watch(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
        changes.append((out - layer.base_layer(args[0])).detach().abs().chunk(2, 1))

    for layer in layers:
        for p in layer.lora_B.parameters():  # type: ignore[attr-defined]
            nn.init.normal_(p, std=0.3)
        layer.register_forward_hook(watch)  # type: ignore[attr-defined]
    family.predict(denoiser, *pipeline_inputs(family)).square().mean().backward()
    assert len(changes) == len(layers)
    assert all(color.max() == 0 and gray.max() > 0 for color, gray in changes)


# --- what it cannot do --------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "full": (
        {"tuner": {"kind": "full"}},
        "`joint` trains the alpha tokens only, which full does not support",
    ),
    "lokr": ({"tuner": {"kind": "lokr"}}, "which lokr does not support; use lora or dora"),
    "text": (
        {"tuner": {"kind": "lora", "targets": [r"blocks\.\d+\.attn2\.to_k"]}},
        "matches 2 layers that process no alpha tokens, such as blocks.0.attn2.to_k: exclude them",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_recipes_that_cannot_be(name: str, checkpoint: Checkpoint) -> None:
    change, says = BAD[name]
    raw = {
        "run": "x",
        "model": {"family": "wan", "checkpoint": str(checkpoint(*CASES[0]))},
        "data": {"sources": "x", "size": [32, 32], "frames": 9},
        "alpha": {"kind": "joint"},
        **change,
    }
    settings = config.build(raw)
    assert any(says in problem for problem in build_family(settings).problems(settings))
    good = config.build({**raw, "tuner": {"kind": "dora", "targets": [r"blocks\.\d+\.attn1\.to_q"]}})
    assert build_family(good).problems(good) == []


@pytest.mark.parametrize(
    "case", [("wan", "i2v"), ("cogvideox", "i2v"), ("cogvideox", "1.5-i2v")], ids="-".join
)
def test_images_have_no_place(case: tuple[str, str], checkpoint: Checkpoint) -> None:
    if case not in random.cases():
        pytest.skip(f"there is no tiny {case}")
    with pytest.raises(ValueError, match="is conditioned on images, which `joint` does not support"):
        opened(checkpoint, case)


def test_what_wan_has_no_use_for(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="text never attends to alpha: remove `bias`"):
        opened(checkpoint, CASES[0], text_to_alpha="bias")


def test_pairs_of_latent_frames_are_of_one_clip(checkpoint: Checkpoint) -> None:
    """Of an odd number, 1.5 would make one token of the last of color and the first of alpha."""
    family = opened(checkpoint, ("cogvideox", "1.5"))
    assert "9 frames is not 8n+5: use 5 or 13" in family.grid.problems(9, 32, 32)[0]
    assert all(family.single.shapes(n, 32, 32)["latents"][1] % 2 == 0 for n in range(5, 90, 8))
