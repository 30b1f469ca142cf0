"""The estimate against what a real step of a real small network does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.check.counting import _Ledger, count_operations, text_width
from inlaid.check.estimate import (
    EFFICIENCY,
    STATE_BYTES,
    Estimate,
    estimate_recipe,
    measure_speed,
)
from inlaid.networks import quantize
from inlaid.networks.quantize import QUANTIZED_BYTES
from inlaid.tiny import random
from inlaid.training import memory
from support.slow import slow

SHAPE = (9, 128, 192)
LONG = (9, 256, 256)


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> families.Family:
    folder = random.build("wan", tmp_path_factory.mktemp("wan") / "w", heads=4, head=32, layers=4, ffn=512)
    return families.get("wan")(config.Model(family="wan", checkpoint=str(folder)))


def recipe(**sections: Any) -> config.Config:
    raw = {"run": "x", "model": {"family": "wan", "checkpoint": "x/y"}, "data": {"sources": "x"}}
    return config.Config.model_validate(raw | sections)


def estimate(wan: families.Family, made: config.Config, **changes: Any) -> Estimate:
    settings: dict[str, Any] = {
        "device": torch.device("meta"),
        "precision": torch.float32,
        "optimizer": "adamw",
    }
    settings |= {"shapes": {SHAPE: 1}, "windows": {SHAPE: 3}, "captions": ["two words"]} | changes
    shapes, windows, captions = (settings.pop(k) for k in ("shapes", "windows", "captions"))
    return estimate_recipe(wan, made, shapes, windows, captions, **settings)


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *[
            slow("lora", True),
            ("lora", "attention"),
            slow("dora", 2),
            ("full", False),
            slow("lora", 2),
            slow("lora", False),
        ],
        *[slow("dora", True), slow("dora", False), slow("full", True), slow("full", 2)],
    ],
)
def test_memory_is_that_of_a_real_step(wan, kind, checkpointing, monkeypatch):
    monkeypatch.setattr(memory, "KEPT_TOKENS", 1)
    made = recipe(tuner={"kind": kind}, memory={"gradient_checkpointing": checkpointing})
    found = estimate(wan, made)
    denoiser = wan.load_denoiser(torch.float32)
    if checkpointing:
        memory.enable_checkpointing(denoiser, checkpointing)
    trained = tuners.attach(made.tuner, wan.targets, denoiser, seed=0)
    denoiser.train()
    ledger = _Ledger([*denoiser.parameters(), *denoiser.buffers()])
    for parameter in trained.values():
        parameter.register_post_accumulate_grad_hook(ledger.gradient)
    with ledger:
        latents, noise = torch.randn(2, 1, *wan.shapes(*SHAPE)["latents"])
        cond = wan.collate([{"text": torch.randn(3, text_width(denoiser))}])
        loss = (
            wan.predict(denoiser, latents + noise, torch.rand(1), cond).sub(noise - latents).square().mean()
        )
        loss.backward()
    assert found.trained == sum(p.numel() for p in trained.values())
    frozen = sum(p.numel() for p in denoiser.parameters()) - found.trained
    assert found.memory["frozen weights"] == frozen * 4
    ratio = (found.memory["activations"] + found.memory["gradients"]) / ledger.worst[0]
    assert 0.9 < ratio < 1.1, f"{found.memory} against {ledger.worst}"


@pytest.mark.slow
def test_checkpointing_and_batch_change_activations(wan):
    on, off = (estimate(wan, recipe(memory={"gradient_checkpointing": g})) for g in (True, False))
    assert on.memory["activations"] < 0.6 * off.memory["activations"]
    assert on.flops > off.flops
    double = estimate(wan, recipe(train={"batch": 2}))
    assert double.memory["activations"] == pytest.approx(2 * on.memory["activations"], rel=0.1)
    assert double.flops == pytest.approx(2 * on.flops, rel=0.01)
    assert estimate(wan, recipe(train={"accumulate": 3})).flops == pytest.approx(3 * on.flops)


def test_stored_attention_is_computed_once(wan):
    size = (9, 512, 256)  # above 1,024 tokens
    full, kept = (
        count_operations(wan, wan.load_denoiser(torch.float32, meta=True), size, 1, checkpointing=c)
        for c in (True, "attention")
    )
    assert kept.attention == pytest.approx(full.attention * 3 / 4), "forward, and two for backward"
    assert kept.across == full.across
    about = wan.load_denoiser(torch.float32, meta=True).config
    width = about.num_attention_heads * about.attention_head_dim
    each = wan.tokens(*size) * 4 * (width + about.num_attention_heads)
    assert kept.activations - full.activations > (about.num_layers - 1) * each


def test_attention_is_quadratic_and_never_kept(wan):
    denoiser = wan.load_denoiser(torch.float32, meta=True)
    small, large = (count_operations(wan, denoiser, s, 1, checkpointing=False) for s in (LONG, (9, 512, 256)))
    assert large.activations / small.activations == pytest.approx(2, rel=0.1)
    assert large.linear / small.linear == pytest.approx(2, rel=0.1)
    n, layers, width = wan.tokens(*LONG), 4, 128
    assert small.attention == 3 * 4 * n * n * width * layers, "twice as much backward"
    assert small.across == 3 * 4 * n * 512 * width * layers
    assert (large.attention, large.across) == (4 * small.attention, 2 * small.across)


@pytest.mark.parametrize(
    ("name", "size"), [("adamw", 8), ("adamw8bit", 2), slow("adamw4bit", 1), slow("prodigy", 16)]
)
def test_optimizer_state(wan, name, size):
    found = estimate(wan, recipe(optim={"name": name}), optimizer=name)
    assert found.memory[f"{name} state"] == pytest.approx(size * found.trained, rel=0.07)
    assert found.memory["EMA"] == 0
    assert estimate(wan, recipe(optim={"ema": 0.9})).memory["EMA"] == 4 * found.trained


def test_adamw_state_is_what_torch_keeps():
    weight = torch.nn.Parameter(torch.randn(100, 10))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    kept = sum(v.nbytes for v in optimizer.state[weight].values() if v.numel() > 1)
    assert kept == STATE_BYTES["adamw"] * weight.numel()


@pytest.mark.slow
def test_precision_halves_the_frozen_weights(wan):
    wide, narrow = (estimate(wan, recipe(), precision=p) for p in (torch.float32, torch.bfloat16))
    assert wide.memory["frozen weights"] == 2 * narrow.memory["frozen weights"]
    assert wide.memory["trained weights"] == narrow.memory["trained weights"]
    assert narrow.memory["activations"] < wide.memory["activations"]
    full = estimate(wan, recipe(tuner={"kind": "full"}), precision=torch.bfloat16)
    assert full.memory["frozen weights"] == 0
    assert full.memory["trained weights"] == 4 * full.trained, "float32"
    assert 0 < full.memory["unpacked weights"] < full.trained, "copies that autocast makes of one block"
    for section in ({"memory": {"gradient_checkpointing": False}}, {"train": {"accumulate": 2}}):
        found = estimate(wan, recipe(tuner={"kind": "full"}, **section), precision=torch.bfloat16)
        assert found.memory["unpacked weights"] == 2 * full.trained, "copies of all blocks"
    assert full.parameters == full.trained == wide.parameters


@pytest.mark.parametrize("scheme", [slow("int8"), "float8", "int4", slow("nf4")])
def test_a_quantised_base_is_smaller_by_its_blocks_linear_layers(wan, scheme):
    plain, small = (
        estimate(wan, recipe(memory={"quantize": q}), precision=torch.bfloat16) for q in (None, scheme)
    )
    linears = quantize.linears(wan.load_denoiser(torch.bfloat16, meta=True)).values()
    saved = sum(layer.weight.numel() for layer in linears) * (2 - QUANTIZED_BYTES[scheme])
    assert plain.memory["frozen weights"] - small.memory["frozen weights"] == pytest.approx(saved, rel=0.05)
    assert plain.memory["unpacked weights"] == 0 < small.memory["unpacked weights"]


def test_layers_cast_for_storage_are_half_as_large(wan):
    plain, cast = (
        estimate(wan, recipe(memory={"layerwise_casting": c}), precision=torch.bfloat16)
        for c in (None, "float8")
    )
    assert 0.5 < cast.memory["frozen weights"] / plain.memory["frozen weights"] < 0.7
    whole = estimate(
        wan,
        recipe(memory={"layerwise_casting": "float8", "gradient_checkpointing": False}),
        precision=torch.bfloat16,
    )
    assert whole.memory["unpacked weights"] == pytest.approx(4 * cast.memory["unpacked weights"], rel=0.1)


def test_several_processes_share(wan):
    full = {"tuner": {"kind": "full"}}
    one, fsdp, zero2 = (
        estimate(wan, recipe(**full, runtime={"parallel": p, "world_size": 4}))
        for p in ("ddp", "fsdp", "zero2")
    )
    assert fsdp.memory["trained weights"] == one.memory["trained weights"] / 4
    assert zero2.memory["trained weights"] == one.memory["trained weights"]
    for found in (fsdp, zero2):
        assert found.memory["adamw state"] == one.memory["adamw state"] / 4
        assert found.memory["activations"] == one.memory["activations"]
        assert any("each of 4 processes" in line for line in found.how)
    assert fsdp.memory["gathered blocks"] > 0


def test_a_shared_sample_needs_less_in_each_process(wan):
    long = {"shapes": {(81, 256, 256): 1}}
    one, two, four = (estimate(wan, recipe(runtime={"sequence": n}), **long) for n in (1, 2, 4))
    for n, found in ((2, two), (4, four)):
        for value in (lambda e: e.memory["activations"], lambda e: e.flops):
            assert 1 / n < value(found) / value(one) < 1.25 / n  # each process has the whole text
        assert found.memory["frozen weights"] == one.memory["frozen weights"]
        assert any(f"one of {n} processes that share each sample" in line for line in found.how)


def test_hybrid_shards_hold_the_weights_once_in_each_group(wan):
    full = {"tuner": {"kind": "full"}}
    runtime = {"parallel": "fsdp", "world_size": 4}
    whole, hybrid = (estimate(wan, recipe(**full, runtime=runtime | x)) for x in ({}, {"shard_size": 2}))
    assert hybrid.memory["trained weights"] == 2 * whole.memory["trained weights"]


def test_gradients_wait_for_the_next_micro_batch(wan):
    first, later = (estimate(wan, recipe(tuner={"kind": "full"}, train={"accumulate": n})) for n in (1, 2))
    assert first.memory["gradients"] < later.memory["gradients"] == 4 * later.trained


def test_offloaded_state_is_not_on_the_gpu(wan):
    found = estimate(wan, recipe(memory={"offload_optimizer": True}))
    assert found.memory["adamw state"] == 0 and any("CPU memory" in line for line in found.how)


def test_cache_size(wan):
    windows = {SHAPE: 3, (17, 64, 64): 2}
    found = estimate(wan, recipe(), windows=windows, captions=["one", "two words here"])
    latents = 3 * 16 * 3 * 16 * 24 + 2 * 16 * 5 * 8 * 8
    assert found.cache == {"clips": 2 * latents, "captions": (3 + 6) * 32 * 4}


def test_shapes_are_averaged_and_the_largest_decides_memory(wan):
    small, large = SHAPE, LONG
    mixes = ({small: 1}, {large: 1}, {small: 3, large: 1})
    one, other, both = (estimate(wan, recipe(), shapes=mix) for mix in mixes)
    assert both.memory == other.memory
    assert both.flops == pytest.approx((3 * one.flops + other.flops) / 4, rel=0.1)


def test_time_is_measured_or_refused(wan):
    assert estimate(wan, recipe()).seconds is None
    assert "not on this machine" in estimate(wan, recipe()).how[-1]
    cpu = torch.device("cpu")
    little = estimate(wan, recipe(), device=cpu, shapes={(1, 16, 16): 1})
    assert little.seconds is None
    assert "overhead dominates" in little.how[-1]
    much = estimate(wan, recipe(train={"accumulate": 1000}), device=cpu)
    assert much.seconds is not None
    assert 0 < much.seconds[0] < much.seconds[1]
    assert much.seconds[1] / much.seconds[0] == pytest.approx(EFFICIENCY[1] / EFFICIENCY[0])
    assert "measured now" in much.how[-1]
    assert much.device == "the CPU"
    assert much.capacity > 2**28


def test_speed_is_that_of_a_machine():
    assert 1e8 < measure_speed(torch.device("cpu"), torch.float32, seconds=0.05) < 1e14


def test_targets_that_match_nothing(wan):
    with pytest.raises(ValueError, match="matches no linear"):
        estimate(wan, recipe(tuner={"targets": ["proj_in"]}))


@pytest.mark.slow
def test_nothing_is_downloaded_or_allocated_for_the_large_ones():
    model = config.Model(family="wan", checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers")
    found = estimate(families.get("wan")(model), recipe(), shapes={(5, 64, 64): 1}, precision=torch.bfloat16)
    assert 14e9 < found.parameters < 14.5e9
    assert found.memory["frozen weights"] == 2 * found.parameters


@pytest.mark.parametrize(("section", "count"), [({"offload": "blocks"}, 4), ({"blocks_to_swap": 3}, 3)])
def test_offloaded_blocks_are_not_on_the_gpu(wan, section, count):
    for quantized in ({}, {"quantize": "int4"}):
        plain, away = (
            estimate(wan, recipe(memory=m), precision=torch.bfloat16)
            for m in (quantized, quantized | section)
        )
        stored = quantize.stored_bytes(
            recipe(memory=quantized).memory, wan.load_denoiser(torch.bfloat16, meta=True), torch.bfloat16
        )
        block = sum(v for n, v in stored.items() if n.startswith("blocks.0."))
        saved = plain.memory["frozen weights"] - away.memory["frozen weights"]
        assert saved == pytest.approx((count - 2) * block, rel=1e-3)
        assert away.memory["activations"] == plain.memory["activations"]
        text = next(line for line in away.how if line.startswith("blocks: "))
        assert "GB of frozen weights in host memory" in text


@pytest.mark.slow
def test_offloaded_activations_are_not_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("inlaid.training.store.LEAST", 1000)
    folder = random.build("wan", tmp_path / "w", layers=16, ffn=32)
    deep = families.get("wan")(config.Model(family="wan", checkpoint=str(folder)))
    plain, away = (
        estimate(deep, recipe(tuner={"rank": 1}, memory={"offload": o})) for o in ([], "activations")
    )
    inputs = deep.tokens(*SHAPE) * 24 * 4
    assert plain.memory["activations"] - away.memory["activations"] >= 10 * inputs
    assert away.flops == plain.flops
    assert any(line.startswith("activations: ") and "GB in host memory" in line for line in away.how)
    monkeypatch.setattr(memory, "KEPT_TOKENS", 9)
    counts = []
    for which in (True, "attention"):
        network = deep.load_denoiser(torch.float32, meta=True)
        with torch.device("meta"):
            tuners.attach(config.LowRank(rank=1), deep.targets, network, seed=0)
        counts.append(count_operations(deep, network, SHAPE, 1, checkpointing=which, offloaded=True))
    assert 15 * inputs <= counts[0].host < 20 * inputs
    assert counts[1].host >= counts[0].host + 2 * 16 * inputs, "also the results of attention"
    assert counts[1].activations <= counts[0].activations + 6 * inputs
    with pytest.raises(ValueError, match=r"memory\.blocks_to_swap: 17 is not from 3 to 16"):
        estimate(deep, recipe(memory={"blocks_to_swap": 17}))
