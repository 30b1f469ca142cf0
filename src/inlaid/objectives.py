"""Training objectives of all families: noise schedule, prediction target and sampling of noise levels.

In the whole package, the noise level t (also called time) is in [0, 1], with 0 = data and 1 = noise. A
flow-matching network predicts noise - data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inlaid import config as recipe


class Objective(Protocol):
    """Interface of a training objective.

    Noise levels `t` have shape (n,); data `x0` and `noise` have shape (n, ...).
    """

    def sample_time(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample n noise levels in [0, 1]."""
        ...

    def quantile(self, q: Tensor) -> Tensor:
        """Return quantiles of the distribution of noise levels; `q` contains probabilities in [0, 1].

        The validation loss uses fixed quantiles instead of random samples.
        """
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy input at time t."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the prediction target."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """Return the loss weights (n,) of samples at times `t` (n,)."""
        ...


def shift(u: Tensor, s: float) -> Tensor:
    """Apply the timestep shift s to noise levels u: s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23).

    A shift s > 1 moves noise levels toward 1 (noise).
    """
    return s * u / (1 + (s - 1) * u)


def unshift(sigma: Tensor, s: float) -> Tensor:
    """Invert `shift`: return sigma / (s - (s - 1) sigma)."""
    return sigma / (s - (s - 1) * sigma)


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


TABLE = 1000
"""Number of entries in the discrete schedule of the `diffsynth` preset."""


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow (Liu et al. 2022, Lipman et al. 2022).

    The noisy input is x_t = (1 - t) x0 + t noise, and the prediction target is noise - x0. To sample a noise
    level t, a value u is sampled, and the timestep shift `s` is applied to it (see `shift`). The distribution
    of t is truncated to `interval`.

    `preset` selects the distribution of u. With `logit_normal`, it is a logit-normal distribution with the
    parameters `mean` and `std`. With `uniform`, it is a uniform distribution. With `diffsynth`, it is uniform
    over 1000 discrete values, and the loss has a bell-shaped weight.
    """

    preset: str = "logit_normal"
    s: float = 3.0
    mean: float = 0.0
    std: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def from_config(cls, section: recipe.Objective, *, family_shift: float) -> FlowMatching:
        """Create the objective that a recipe section describes.

        The timestep shift is taken from the recipe, else from the preset, else from `family_shift`.
        """
        preset_shift = {"diffsynth": 5.0, "uniform": 1.0}.get(section.preset, family_shift)
        s = section.shift if section.shift is not None else preset_shift
        return cls(section.preset, s, section.mean, section.std, section.interval)

    def sample_time(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample n noise levels in `interval`, float32."""
        return self.quantile(torch.rand(n, generator=generator, dtype=torch.float64))

    def quantile(self, q: Tensor) -> Tensor:
        """Return the noise levels at the quantiles `q` (in [0, 1]), float32.

        The distribution of the noise levels is truncated to `interval`.
        """
        q = q.double()
        if self.preset == "diffsynth":
            table = self._table()
            low, high = self.interval
            table = table[(table >= low) & (table <= high)]
            return table[(q * len(table)).long().clamp(max=len(table) - 1)].float()
        u = unshift(torch.tensor(self.interval, dtype=torch.float64), self.s)
        if self.preset == "uniform":
            return shift(u[0] + q * (u[1] - u[0]), self.s).float()
        low, high = torch.special.ndtr((torch.logit(u) - self.mean) / self.std)
        inside = (low + q * (high - low)).clamp(1e-12, 1 - 1e-12)
        return shift(torch.sigmoid(torch.special.ndtri(inside) * self.std + self.mean), self.s).float()

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy input (1 - t) x0 + t noise."""
        t = _expand(t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the prediction target: noise - x0, for every t."""
        return noise - x0

    def weight(self, t: Tensor) -> Tensor:
        """Return the loss weight. It is 1, except for the preset `diffsynth`.

        For this preset, it is exp(-2 (t - 0.5)^2), offset and scaled to minimum 0 and mean 1 over the
        schedule.
        """
        if self.preset != "diffsynth":
            return torch.ones_like(t)
        table = _bell(self._table())
        return ((_bell(t.double()) - table.min()) / (table - table.min()).mean()).to(t.dtype)

    def _table(self) -> Tensor:
        return shift(1 - torch.arange(TABLE, dtype=torch.float64) / TABLE, self.s)


@dataclass(frozen=True)
class VPrediction:
    """v-prediction on a discrete variance-preserving schedule (Salimans & Ho 2022, appendix D).

    The noisy input is sqrt(abar) x0 + sqrt(1 - abar) noise, and the target is
    v = sqrt(abar) noise - sqrt(1 - abar) x0, where abar is the entry of `alphas_cumprod` at time t. Entry i
    of n has time t = (i + 1) / n, so t = 1 is the noisiest.

    The loss is the unweighted squared error of v in float32. It equals the squared error of x0 weighted by
    1 / (1 - abar), but that form is very inaccurate in bfloat16 at small t.
    """

    alphas_cumprod: tuple[float, ...]
    """Cumulative product of alphas (abar) for each schedule entry, in decreasing order."""
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def from_config(cls, section: recipe.Objective, alphas_cumprod: Tensor) -> VPrediction:
        """Create the objective that a recipe section describes.

        Raises:
            ValueError: if the section sets an option of flow matching.
        """
        plain = recipe.Objective(interval=section.interval)
        wrong = [k for k, v in section if v != getattr(plain, k) and (k, v) != ("preset", "uniform")]
        if wrong:
            raise ValueError(
                f"objective.{wrong[0]}: this checkpoint predicts v on a fixed schedule and samples times "
                "uniformly; remove the key, only `interval` can be set"
            )
        return cls(tuple(alphas_cumprod.tolist()), section.interval)

    def index(self, t: Tensor) -> Tensor:
        """Return the index in `alphas_cumprod` for time t, int64.

        This index is the timestep input of the network.
        """
        return (t * len(self.alphas_cumprod)).round().long() - 1

    def sample_time(self, n: int, generator: torch.Generator) -> Tensor:
        """Return `n` random times, float32 (n,).

        They are sampled uniformly from the times of the schedule entries inside `interval`.
        """
        return self.quantile(torch.rand(n, generator=generator, dtype=torch.float64))

    def quantile(self, q: Tensor) -> Tensor:
        """Return quantiles of the distribution of timesteps, float32; `q` is in [0, 1]."""
        n = len(self.alphas_cumprod)
        low, high = (round(edge * n) for edge in self.interval)
        chosen = low + (q.double() * (high - low)).long().clamp(max=max(high - low, 1) - 1)
        return ((chosen + 1) / n).float()

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = torch.tensor(self.alphas_cumprod, device=t.device)[self.index(t)]
        return _expand(abar.sqrt(), like), _expand((1 - abar).sqrt(), like)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy input sqrt(abar) x0 + sqrt(1 - abar) noise.

        The schedule `alphas_cumprod` contains abar for each time t.
        """
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the prediction target v = sqrt(abar) noise - sqrt(1 - abar) x0.

        The schedule `alphas_cumprod` contains abar for each time t.
        """
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def weight(self, t: Tensor) -> Tensor:
        """Return a loss weight of 1 for every t."""
        return torch.ones_like(t)


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * (t - 0.5) ** 2)


def mean_squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean squared error of each sample, float32 (n,)."""
    error = (prediction.float() - target.float()) ** 2
    return error.flatten(1).mean(1) * weight
