"""Interface of a model family; all other code accesses a model architecture through this interface.

A family converts between the conventions of its model and the conventions of this package. In this package,
pixels are uint8 (t, h, w, c), and latents are normalized and have shape (c, t, h, w) per sample. Time runs
from 0 (data) to 1 (noise). Only family classes contain details of schedulers, VAE scaling factors and module
names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid.families.grid import Grid
from inlaid.families.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.networks.sequence_parallel import SequenceParallel
    from inlaid.objectives import Objective


@dataclass(frozen=True)
class PrecomputedLayout:
    """File layout of latents that were precomputed with another trainer.

    The fields are path patterns in which `*` stands for the clip's name, such as `video_latents/*.pt`.
    """

    media: Sequence[str]
    """Path patterns of the latent files: one for the clip, then one for each conditioning image. For joint
    alpha (color and alpha as two clips): one for the color clip, then one for the alpha clip."""
    text: str
    """Path pattern of the clip's text embeddings."""
    caption: str = "*.txt"
    """Path pattern of the clip's caption, if the other trainer stored captions."""
    video: str = "*"
    """Path pattern of the source video, without its file extension."""
    moments_key: str | None = None
    """Dictionary key, in a latent file, of the bfloat16 tensor (1, 2 * z, t, h, w) with means and
    log-variances. None if the file contains only a tensor (2 * z, t, h, w)."""
    text_keys: tuple[str, str] | None = None
    """Dictionary keys, in an embeddings file, of the text embeddings (1, n, d) and of their mask (1, n). None
    if the file contains only a tensor (n, d)."""

    @property
    def description(self) -> str:
        """Text that describes the layout in messages, such as `NAME.latent.pt + NAME.embed.pt`."""
        return " + ".join((*self.media, self.text)).replace("*", "NAME")


class Family(Sampling, ABC):
    """Base class of model families. A family adapts a model architecture to the conventions of this package.

    The constructor reads the configuration files of a checkpoint, but no weights.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Recipe (YAML configuration) defaults that this family overrides: a mapping from section to settings."""
    targets: Sequence[str]
    """Layers that an adapter modifies by default, as regular expressions that must match the full module
    name."""
    adaptable: ClassVar[Sequence[str]] = ()
    """Regular expressions for additional layers that an adapter may modify. Needed to import adapters without
    the checkpoint. Layers in `targets` or `original` need no entry."""
    more_blocks: ClassVar[Sequence[str]] = ()
    """Names of additional block lists in some networks, such as `vace_blocks`. Their blocks have the same
    layers as the blocks in the list `blocks`."""
    convolutions: ClassVar[Sequence[str]] = ()
    """Regular expressions for layers that are convolutions in some checkpoints of the family. If an adapter
    file does not state their kernel size, the adapter can be imported only with the checkpoint."""
    encoders: ClassVar[Mapping[str, Sequence[str]]] = {
        "media": ("vae",),
        "text": ("tokenizer", "text_encoder"),
    }
    """Names of the checkpoint components that encode `media` (videos, images) and `text`. The content of
    their files is part of the cache key."""
    widths: ClassVar[Mapping[int, str]] = {}
    """Names of the published model sizes, such as `Wan 14B`, by width of the hidden layers. Used in
    messages."""
    text_length: int
    """Maximum number of text tokens that the denoiser accepts."""
    fps: float
    """Frame rate, in frames per second, of the videos on which the published checkpoint was trained."""
    modality: ClassVar[str] = "video"
    """Modality of the training examples and outputs: `video` or `scene` (3D objects)."""
    choices: ClassVar[Mapping[str, Sequence[str | int | float | bool]]] = {}
    """Allowed values of each family-specific option (`model.options` in a recipe); the first value is the
    default. If an option changes the result of `encode_media`, `media_key` must include the option."""
    channels: int = 3
    """Number of channels of the clips that `encode_media` accepts and `sample` returns: 3 for RGB, 4 for RGBA
    with straight alpha."""
    media_key: Sequence[str] = ()
    """Settings that become part of the cache key because they change the encoded clips. The files of the
    encoder are always part of the cache key."""
    bytewise: Sequence[str] = ()
    """Names of the cached tensors that take one byte per value, such as pixels. All other cached tensors take
    two bytes per value."""
    video_layers: ClassVar[Sequence[str]] = ()
    """Linear layers that process all video tokens, as regular expressions that must match the full module
    name. Joint alpha (color and alpha as two clips in one token sequence) adapts only these layers. Empty if
    the family does not support joint alpha."""
    text_before: int = 0
    """Number of text tokens before the video tokens in the input of the layers in `video_layers`."""
    joint_attention: ClassVar[Any] = None
    """Function that returns an attention processor for joint alpha. Its argument is the rule for attention
    from text tokens to alpha tokens. None if text and video tokens are not in one sequence."""
    heads: int = 0
    """Number of attention heads of the denoiser. With `runtime.sequence`, processes share the heads. 0 if the
    family does not implement `split_sequence`."""
    grid: Grid
    precomputed: PrecomputedLayout | None = None
    """File layout of the precomputed latents that this family can read; None if it can read none. Each latent
    file contains one of the tensors in `stored`: means and log-variances of the VAE posterior."""

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        self.options = _chosen(model, self.choices)

    @property
    def single(self) -> Family:
        """Model family without joint alpha.

        A family with joint alpha processes color and alpha as two clips in one token sequence. It wraps
        another family, and `single` is the wrapped family. For all other families, `single` is `self`.
        """
        return self

    def precomputed_in(self, folder: Path) -> PrecomputedLayout | None:
        """Return the file layout of the precomputed latents in a folder.

        Return None if the family cannot read precomputed latents.
        """
        return self.precomputed

    def about(self) -> dict[str, str]:
        """Return metadata for the header of a weights file: the base checkpoint and the family options."""
        return {"inlaid_base": self.name, **{f"inlaid_{k}": str(v) for k, v in self.options.items()}}

    def warnings(self) -> list[str]:
        """Return paragraphs about limitations of the trained weights, for the model card."""
        return []

    def accept(self, header: Mapping[str, str]) -> None:
        """Check that an adapter is compatible with this family, from the metadata in its file header.

        Raises:
            ValueError: if the adapter requires other settings, such as another kind of alpha.
        """
        kind = header.get("inlaid_alpha")
        if kind and self.channels == 3:
            raise ValueError(
                f"this adapter was trained with alpha.kind={kind} and gives only noise without it"
            )

    @abstractmethod
    def shapes(self, length: int, height: int, width: int, /) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor in one training sample: `latents` and the conditioning tensors.

        The shape of `latents` is (c, t, h, w) for videos and (objects, tokens, c) for scenes. `sample_item`
        returns tensors of these shapes. The arguments are the fields of a `VideoExtent` or `SceneExtent`.

        Args:
            length: number of frames of a video, or of objects in a scene.
            height: height in pixels.
            width: width in pixels.
        """

    def stored(self, length: int, height: int, width: int, /) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the cached tensors of one clip, as `encode_media` returns them."""
        return self.shapes(length, height, width)

    @abstractmethod
    def tokens(self, length: int, height: int, width: int, /) -> int:
        """Return the number of tokens in the denoiser's self-attention sequence for one clip."""

    def load_media_encoder(self, device: torch.device) -> Any:
        """Load the encoder that `encode_media` takes as an argument; by default, the VAE in float32."""
        import torch

        return self.load("vae", torch.float32).to(device).eval().requires_grad_(False)

    @abstractmethod
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """Encode a clip to float32 tensors, which are stored in the cache.

        The clip is uint8 (t, h, w, c), where c is the attribute `channels`.
        """

    @abstractmethod
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return a mapping with the text embedding `text` (n, d) for each caption.

        If the network masks padding tokens, `text` does not contain them. If the network uses no text, the
        mappings are empty.
        """

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the training sample of a cached clip: normalized `latents` and the conditioning tensors.

        All random choices use `generator`: the sample from the VAE posterior, and the noise or dropout of a
        conditioning image. They therefore depend only on the seed and the index of the micro-batch.
        """
        return dict(item)

    def shift_noise(self, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Modify the training noise; by default, return it unchanged.

        `noise` is standard normal, (n, c, t, h, w).
        """
        return noise

    def share_positions(self, denoiser: nn.Module) -> None:
        """Modify the denoiser so that two clips in one sequence have the same positional embeddings.

        Called only for joint alpha, in which color and alpha are two clips. Only families with `video_layers`
        implement this method.
        """
        raise NotImplementedError

    def split_sequence(self, denoiser: nn.Module, sequence: SequenceParallel) -> None:
        """Modify the denoiser so that it computes only this process's share of the video tokens.

        The inputs and outputs of the denoiser still contain all tokens. They are the same in all processes
        that share the tokens of a sample. This method is called after adapters are attached. Families whose
        `heads` is 0 do not implement it.
        """
        raise NotImplementedError

    def attached(self, denoiser: nn.Module) -> None:
        """Hook that runs after an adapter is attached to the denoiser.

        For example, a family can make further parameters trainable.
        """

    @abstractmethod
    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> Objective:
        """Return the training objective of the published checkpoint with the changes that the recipe sets.

        Args:
            section: `objective` section of the recipe.
            size: height and width of the clips in pixels.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction of the denoiser: `noise - data` for flow matching, or v for v-prediction.

        Args:
            denoiser: network from `load_denoiser`.
            x_t: noisy latents (n, c, t, h, w).
            t: noise levels (n,), with 0 = data and 1 = noise.
            cond: text tensors from `collate`, and the stacked conditioning tensors from `sample_item`.
        """

    def parts(self, latents: Tensor) -> dict[str, Tensor]:
        """Split latents (n, c, t, h, w) into named parts whose losses are also reported separately.

        The result is empty if only the total loss is reported.
        """
        return {}

    def resolved(self, sample: recipe.Sample) -> recipe.Sample:
        """Return the sampling settings after filling in defaults that depend on the checkpoint."""
        return sample

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each recipe setting that this checkpoint does not support."""
        data, sample = config.data, config.sample
        sizes = [("data", frames, data.size) for frames in data.frames]
        if sample.frames or sample.size:
            sizes.append(("sample", sample.frames or max(data.frames), sample.size or data.size))
        found = [f"{section}: {p}" for section, n, size in sizes for p in self.grid.problems(n, *size)]
        found += [f"sample.images: {p}" for p in self.missing_images(len(sample.prompts), sample.images)]
        found += sequence_problems(self, config.runtime.sequence)
        if config.alpha.kind == "opaque" and data.matte != recipe.Matte():
            found.append("data.matte: an opaque run reads no alpha mattes; remove it, or set alpha.kind")
        try:
            self.objective(config.objective, data.size)
        except ValueError as error:
            found.append(str(error))
        return list(dict.fromkeys(found))

    def notes(self, config: recipe.Config) -> list[str]:
        """Return a message for each recipe setting that is valid but unusual."""
        return []

    def missing_images(self, prompts: int, images: Sequence[Sequence[str]]) -> list[str]:
        """Return messages about missing, unexpected or unreadable conditioning images of the prompts.

        Args:
            prompts: number of prompts.
            images: image files of each prompt.

        Returns:
            Messages; empty if all images are valid.
        """
        name = self.model.checkpoint
        if not self.images:
            return [f"{name} is text-to-video and uses no images; leave images out"] if images else []
        what = " and a ".join(f"{each} image" for each in self.images)
        if prompts != len(images):
            return [f"{name} needs a {what} for each prompt: {prompts} prompts, {len(images)} with images"]
        wrong = [f"prompt {i} has {len(g)}" for i, g in enumerate(images, 1) if len(g) != len(self.images)]
        if wrong:
            return [f"{name} needs a {what} for each prompt: {', '.join(wrong)}"]
        return _unreadable(dict.fromkeys(Path(file) for each in images for file in each))


def sequence_problems(family: Family, processes: int) -> list[str]:
    """Return a message if a family cannot split a sequence over `processes` processes.

    The number of attention heads must be divisible by `processes`.
    """
    heads = family.heads
    if processes == 1 or (heads and not heads % processes):
        return []
    if not heads:
        return [f"runtime.sequence: {family.model.family} does not support split sequences: remove it"]
    possible = ", ".join(str(n) for n in range(1, heads + 1) if not heads % n)
    wrong = f"{processes} processes cannot share the {heads} attention heads of {family.model.checkpoint}"
    return [f"runtime.sequence: {wrong} equally: use one of {possible}"]


def _unreadable(images: Iterable[Path]) -> list[str]:
    """Return a message for each file that is not a readable image."""
    from inlaid.media.kinds import IMAGES
    from inlaid.media.video import probe

    found = []
    for path in images:
        try:
            if path.suffix.lower() not in IMAGES:
                raise ValueError(f"{path}: not an image; use a file such as start.png")
            probe(path)
        except ValueError as error:
            found.append(str(error))
    return found


def _chosen(model: recipe.Model, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the value of each family option: the recipe's value if set, otherwise the default.

    Raises:
        ValueError: if the recipe sets an unknown option or a value that is not allowed.
    """
    wrong = []
    for key, value in model.options.items():
        if key not in choices:
            has = f"its options are {', '.join(choices)}" if choices else "it has none, leave it out"
            wrong.append(f"model.options.{key}: {model.family} has no such option; {has}")
        elif value not in choices[key]:
            values = ", ".join(map(str, choices[key]))
            wrong.append(f"model.options.{key}: `{value}` is not one of {values}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return {key: model.options.get(key, values[0]) for key, values in choices.items()}
