"""The first step with a value that is not finite is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inlaid.training.meters import Meters

NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "norms", "message"),
    [
        ({5: 1.0, 6: NAN}, {5: NAN, 6: NAN}, "the gradient stopped being finite at step 5"),
        ({5: NAN, 6: NAN}, {5: NAN, 6: NAN}, r"the loss .* at step 5 \(clips: b.mp4\)"),
        ({5: 1.0, 6: NAN}, {5: 1.0}, r"the loss .* at step 6 \(clips: b.mp4\)"),
    ],
)
def test_the_first_bad_step_is_named(losses: dict, norms: dict, message: str) -> None:
    nowhere: Any = SimpleNamespace(main=False)
    meters = Meters(nowhere, nowhere)
    for step, loss in losses.items():
        meters.add(step, {"losses": torch.tensor([1.0, loss])}, ["a.mp4", "b.mp4"])
    for step, norm in norms.items():
        meters.norm(step, torch.tensor(norm))
    with pytest.raises(ValueError, match=message):
        meters.check()
