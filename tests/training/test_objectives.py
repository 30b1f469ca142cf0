"""Flow matching: formulas, presets and their distributions."""

from __future__ import annotations

import pytest
import torch

from inlaid import config
from inlaid.objectives import FlowMatching, mean_squared_error, shift, unshift


def draws(objective: FlowMatching, n: int = 200_000) -> torch.Tensor:
    return objective.sample_time(n, torch.Generator().manual_seed(0))


def test_perfect_prediction_has_no_loss_and_recovers_the_data() -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise = (
        torch.randn(5, 4, 3, 2, 2, generator=generator),
        torch.randn(5, 4, 3, 2, 2, generator=generator),
    )
    objective, t = FlowMatching(), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    x_t, v = objective.corrupt(x0, noise, t), objective.target(x0, noise, t)
    assert mean_squared_error(v, noise - x0, objective.weight(t)).max() == 0
    assert torch.allclose(x_t - t.view(-1, 1, 1, 1, 1) * v, x0, atol=1e-6)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[4], noise[4])
    assert mean_squared_error(v + 1, v, objective.weight(t)).tolist() == pytest.approx([1] * 5, rel=1e-5)


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0, 12.0])
def test_shift_and_its_inverse(s: float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(unshift(shift(u, s), s), u, atol=1e-12)
    assert shift(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)


def test_default_is_logit_normal_shifted() -> None:
    t = draws(FlowMatching(s=3.0))
    u = unshift(t.double(), 3.0)
    z = torch.logit(u)
    assert z.mean().abs() < 0.01 and (z.std() - 1).abs() < 0.01
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1


def test_diffsynth_preset_has_the_published_numbers() -> None:
    objective = FlowMatching.from_config(config.Objective(preset="diffsynth"), family_shift=3.0)
    t = draws(objective) * 1000
    assert t.mean().item() == pytest.approx(748, abs=2)
    assert t.median().item() == pytest.approx(833, abs=2)
    assert (t > 500).float().mean().item() == pytest.approx(0.83, abs=0.005)
    index = torch.tensor([0, 100, 250, 417, 500, 750, 900, 999])
    table = shift(1 - index.double() / 1000, 5.0)
    assert (table * 1000).tolist() == pytest.approx(
        [1000, 978.3, 937.5, 874.8, 833.3, 625, 357.1, 5.0], abs=0.06
    )
    expected = [0, 0.139, 0.398, 0.784, 1.025, 1.914, 1.865, 0.032]
    assert objective.weight(table).tolist() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("preset", ["logit_normal", "uniform", "diffsynth"])
@pytest.mark.parametrize("interval", [(0.875, 1.0), (0.0, 0.875), (0.3, 0.4)])
def test_interval_cuts_the_same_distribution(preset: str, interval: tuple[float, float]) -> None:
    whole = draws(FlowMatching(preset, 5.0))
    inside = whole[(whole >= interval[0]) & (whole <= interval[1])]
    t = draws(FlowMatching(preset, 5.0, interval=interval))
    assert t.min() >= interval[0] - 1e-6 and t.max() <= interval[1] + 1e-6
    for q in (0.1, 0.5, 0.9):
        assert t.quantile(q).item() == pytest.approx(inside.quantile(q).item(), abs=0.006)


def test_quantiles_match_samples() -> None:
    objective = FlowMatching(s=3.0, mean=0.5, std=0.7)
    q = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    assert torch.allclose(draws(objective).quantile(q), objective.quantile(q), atol=0.005)


def test_recipe_wins_over_preset_over_family() -> None:
    def s(**given: object) -> float:
        return FlowMatching.from_config(config.Objective(**given), family_shift=3.0).s  # type: ignore[arg-type]

    assert (s(), s(preset="diffsynth"), s(preset="uniform"), s(preset="diffsynth", shift=2.0)) == (
        3.0,
        5.0,
        1.0,
        2.0,
    )
