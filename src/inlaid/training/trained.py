"""Interface to the trained weights of a run: an adapter, the weights of a denoiser, or an RGBA VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.adapters import tuners
from inlaid.adapters.model_card import model_card
from inlaid.data.modality import modality_of
from inlaid.families import Family
from inlaid.objectives import FlowMatching
from inlaid.training.rgba_vae import TrainedRgbaVae
from inlaid.training.steps import DenoisingStep, Step


class Trained(Protocol):
    """Interface to the weights that a run trains.

    A class with this interface selects the weights, defines their loss, and writes their files. In all
    methods, `network` is the network that is trained: the family's denoiser or an RGBA VAE.
    """

    @property
    def folder(self) -> str:
        """Name of the folder with the trained weights, in the run folder and in each checkpoint."""
        ...

    @property
    def name(self) -> str:
        """Name of the trained weights in progress messages, such as `lora`."""
        ...

    @property
    def autocast(self) -> bool:
        """True if the whole network is loaded in float32 and computes under autocast.

        If False, the network is loaded in the run's precision.
        """
        ...

    def select(self, network: nn.Module) -> list[str]:
        """Return the names of the layers that get an adapter, or of the trainable parameters.

        `network` may be on the meta device.

        Raises:
            ValueError: if a pattern in `tuner.targets` matches nothing.
        """
        ...

    def attach(self, network: nn.Module, *, seed: int) -> dict[str, nn.Parameter]:
        """Add adapters or unfreeze the selected weights, and return the trainable parameters by name.

        The network changes in place. Its other parameters are frozen; trainable parameters are float32.

        Args:
            network: network without adapters.
            seed: random seed for the initialization of new weights.

        Raises:
            ValueError: if a pattern in `tuner.targets` matches nothing.
        """
        ...

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that `save` writes, by name."""
        ...

    def save(
        self, network: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, metadata: Mapping[str, str]
    ) -> None:
        """Write the trained weights to `folder`, which is created if missing.

        Args:
            network: network that `attach` changed; only its configuration is read.
            weights: unsharded tensors, as returned by the method `weights`.
            folder: output folder.
            metadata: text values to store in the files.
        """
        ...

    def step(self, precision: AbstractContextManager[Any]) -> Step:
        """Return the training step. It computes in the context manager `precision`, such as autocast."""
        ...

    def card(self, step: int, prompts: Sequence[str]) -> str:
        """Return the model card.

        Args:
            step: number of completed training steps.
            prompts: sample prompts.
        """
        ...


def trained_by(config: recipe.Config, family: Family) -> Trained:
    """Return the interface to the weights that a recipe trains, of either an RGBA VAE or a denoiser."""
    if config.rgba_vae is not None:
        return TrainedRgbaVae(config, config.rgba_vae, family.name)
    return TrainedDenoiser(config, family)


@dataclass(frozen=True)
class TrainedDenoiser:
    """Interface to the trained weights of a denoiser: an adapter, or its own weights in full fine-tuning."""

    config: recipe.Config
    family: Family
    folder: str = field(default="adapter", init=False)

    @property
    def name(self) -> str:
        """Value of `tuner.kind` in the recipe, such as `lora`."""
        return self.config.tuner.kind

    @property
    def autocast(self) -> bool:
        """True for full fine-tuning: the network is then loaded in float32, and computes under autocast."""
        return isinstance(self.config.tuner, recipe.Full)

    def select(self, network: nn.Module) -> list[str]:
        """Return the names of the layers that get an adapter.

        For full fine-tuning, return the names of the trainable parameters.
        """
        return tuners.select(self.config.tuner, self.family.targets, network)

    def attach(self, network: nn.Module, *, seed: int) -> dict[str, nn.Parameter]:
        """Add adapters or unfreeze the selected weights; see `Trained.attach`."""
        tuners.attach(self.config.tuner, self.family.targets, network, seed=seed)
        self.family.attached(network)
        return {n: p for n, p in network.named_parameters() if p.requires_grad}

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of the adapter, or of the whole network after full fine-tuning."""
        return tuners.weights(self.config.tuner, network)

    def save(
        self, network: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, metadata: Mapping[str, str]
    ) -> None:
        """Write an adapter, or a whole network in the folder layout of diffusers."""
        tuners.save(self.config.tuner, network, weights, folder, metadata=metadata)

    def step(self, precision: AbstractContextManager[Any]) -> DenoisingStep:
        """Return the training step with the denoising loss; see `Trained.step`."""
        objective = self.family.objective(self.config.objective, self.config.data.size)
        return DenoisingStep(self.family, objective, precision, tuners.disabled)

    def card(self, step: int, prompts: Sequence[str]) -> str:
        """Return the model card; see `Trained.card`."""
        objective = self.family.objective(self.config.objective, self.config.data.size)
        flow = isinstance(objective, FlowMatching)
        return model_card(
            self.config,
            step=step,
            prompts=list(prompts) if self.family.text_length else [],
            task=modality_of(self.family.modality).task(self.family),
            objective="" if flow else "v-prediction on the checkpoint's schedule",
            warnings=self.family.warnings(),
        )
