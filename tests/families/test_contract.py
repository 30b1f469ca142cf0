"""What every family owes, whichever checkpoint: learn, save, load elsewhere, go on, and be estimated.

A new family is under test as soon as `inlaid/tiny/random` can make a checkpoint of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inlaid import config
from inlaid.adapters import tuners
from inlaid.adapters.of_run import trained_folder
from inlaid.check import estimate
from inlaid.families import Family
from inlaid.generation.generate import generate, load_pipeline
from inlaid.networks import quantize
from inlaid.runs.folder import Run
from inlaid.runs.launch import start_processes
from inlaid.training.loop import train
from support.contract import (
    CASES,
    CPU,
    FEW,
    FIRST,
    VIDEO,
    WORDLESS,
    adapter,
    every_case,
    example,
    metrics,
    mostly_few_cases,
    mostly_first_cases,
    open_family,
    random_batch,
    shape,
)
from support.slow import mostly_slow, slow


@pytest.mark.parametrize(
    ("case", "kind"),
    [(c, "lora") if c in (*FEW, ("mochi", "t2v")) else slow(c, "lora") for c in CASES]
    + [(c, "dora") if c == ("wan", "t2v") else slow(c, "dora") for c in CASES],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_an_adapter_does_in_the_stock_pipeline_what_it_did_in_training(
    case: tuple[str, str], kind: str, contract_run: Callable[..., config.Config]
) -> None:
    cfg = contract_run(case, kind)
    run = Path(cfg.run)
    family = open_family(Path(cfg.model.checkpoint), case)
    weights = adapter(run)
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
    place = Run(run)
    with start_processes(cfg) as ctx:
        pipes = [
            load_pipeline(cfg, family, folder, 1.0, ctx)
            for folder in (None, trained_folder(place, None, family))
        ]
    denoisers = [getattr(p, family.component) for p in pipes]
    tuned = trained_network(family, cfg, weights)
    batch = random_batch(family)
    t = torch.tensor([0.5])
    with torch.no_grad():
        before, after, ours = (
            family.predict(d.eval(), batch.latents, t, batch.cond) for d in (*denoisers, tuned)
        )
    limit = 0 if kind == "lora" else 2e-6  # in training a DoRA's norms come from its factors: see tuners
    assert (after - ours).abs().max() <= limit
    assert (after - before).abs().max() > 1e-5


def trained_network(family: Family, cfg: config.Config, weights: dict) -> torch.nn.Module:
    """The network as training has it, with the weights that were saved put into its parameters."""
    from inlaid.adapters import tuners
    from inlaid.adapters.efficient_layers import ADAPTER

    denoiser = family.load_denoiser(torch.float32)
    parameters = tuners.attach(cfg.tuner, family.targets, denoiser, seed=0)
    names = {
        "transformer." + n.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): p
        for n, p in parameters.items()
    }
    assert set(names) == set(weights)
    for name, p in names.items():
        p.data = weights[name].clone()
    return denoiser.eval()


@pytest.mark.parametrize("case", mostly_slow(FIRST, lambda c: c[0] == "wan"), ids="-".join)
def test_loss_falls(case: tuple[str, str], contract_recipe: Callable[..., dict]) -> None:
    run = train(
        config.build(
            contract_recipe(case, train__steps=40, train__batch=3, train__validate_every=40, tuner__rank=16),
            ["data.caption_dropout=0.2"] if case[0] not in WORDLESS else [],
        )
    )
    losses = metrics(run, "loss")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


@mostly_few_cases
def test_resume_is_bit_exact(
    case: tuple[str, str],
    contract_recipe: Callable[..., dict],
    contract_run: Callable[..., config.Config],
    tmp_path: Path,
) -> None:
    whole = Path(contract_run(case).run)
    part = contract_recipe(case, run=str(tmp_path / "part"))
    train(config.build(part, ["train.steps=2"]))
    resumed = train(config.build(part))
    a, b = adapter(whole), adapter(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a) and set(a) == set(b)


@mostly_few_cases
def test_full_fine_tuning_loads_with_from_pretrained(
    case: tuple[str, str], contract_recipe: Callable[..., dict]
) -> None:
    raw = contract_recipe(case, tuner={"kind": "full"}, optim={"lr": 1e-3})
    run = train(config.build(raw))
    family = open_family(Path(raw["model"]["checkpoint"]), case)
    network = family.load_denoiser(torch.float32)
    again = type(network).from_pretrained(run / "adapter")
    base = dict(network.named_parameters())
    changed = [n for n, p in again.named_parameters() if not torch.equal(p, base[n])]
    assert len(changed) > 0.5 * len(base)


@pytest.mark.parametrize("case", mostly_slow(VIDEO, lambda c: c in FEW or c[1] == "a14b"), ids="-".join)
def test_videos_come_out_of_the_stock_pipeline(
    case: tuple[str, str], contract_run: Callable[..., config.Config], tmp_path: Path
) -> None:
    cfg = contract_run(case)
    run, family = Path(cfg.run), open_family(Path(cfg.model.checkpoint), case)
    from PIL import Image

    Image.new("RGB", (80, 50), "orange").save(tmp_path / "start.png")
    images = [[str(tmp_path / "start.png")] * len(family.images)] if family.images else []
    base, tuned = (
        generate(run, ["a clip"], images=images, checkpoint=c, out=tmp_path / str(c))[0]
        for c in ("base", None)
    )
    from inlaid.media import video

    frames = [
        video.read_frames(p, 0.0, shape(family)[0], family.fps, shape(family)[1:]) for p in (base, tuned)
    ]
    assert frames[0].shape == (*shape(family), 3)


@mostly_first_cases
def test_the_network_is_counted_on_shapes_alone(
    case: tuple[str, str], checkpoint: Callable[[str, str], Path]
) -> None:
    family = open_family(checkpoint(*case), case)
    counts = estimate.count_operations(
        family, family.load_denoiser(torch.float32, meta=True), shape(family), 2, checkpointing=False
    )
    assert counts.activations > 0 and counts.linear > 0 and counts.attention > 0


SMALL = [({"layerwise_casting": "float8"}, ("mochi", "t2v")), ({"quantize": "int8"}, ("midi", "scene"))]
"""How weights are kept small, and in which network every run of the tests does it."""


@pytest.mark.parametrize(
    ("small", "case"),
    [(small, c) if c == often else slow(small, c) for c in CASES for small, often in SMALL],
    ids=lambda x: "-".join(x if isinstance(x, tuple) else x.values()),
)
def test_weights_can_be_kept_small(
    small: dict[str, Any], case: tuple[str, str], checkpoint: Callable[[str, str], Path]
) -> None:
    family, half = open_family(checkpoint(*case), case), torch.bfloat16
    batch, t = random_batch(family), torch.tensor([0.4])
    predicted = []
    for section in ({}, small):
        denoiser = family.load_denoiser(half)
        quantize.shrink_weights(config.Memory(**section), denoiser, CPU, half)
        trained = tuners.attach(config.LowRank(rank=2), family.targets, denoiser, seed=0)
        predicted.append(family.predict(denoiser, batch.latents, t, batch.cond).float())
        predicted[-1].square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    error = (predicted[1] - predicted[0]).norm() / predicted[0].norm()
    assert 0 < error < 0.1, "other weights, nearly the same network"


@every_case
def test_a_cached_clip_has_the_shapes_that_were_promised(
    case: tuple[str, str], checkpoint: Callable[[str, str], Path]
) -> None:
    family = open_family(checkpoint(*case), case)
    item = family.encode_media(family.load_media_encoder(CPU), example(family))
    assert {k: tuple(v.shape) for k, v in item.items()} == family.stored(*shape(family))
    assert {v.dtype for v in item.values()} == {torch.float32}
    one, same, other = (family.sample_item(item, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert {k: tuple(v.shape) for k, v in one.items()} == family.shapes(*shape(family))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert family.tokens(*shape(family)) > 1 and other.keys() == one.keys()
