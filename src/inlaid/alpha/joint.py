"""Joint transparency: colour and alpha are two clips in one sequence of tokens (arXiv 2501.03006).

Alpha is encoded as a grey video by the VAE as it is, and follows colour along the latent frames, at the same
positions. An adapter changes the tokens of alpha only; a vector, zero at first, may tell them apart. Where
text shares the sequence it does not look at alpha: see `models.attention`.

What surprises: an untrained network draws alpha as a second picture of the same, with equal noise in both
halves to the last bit. And an update of some tokens only is no change of weights: such an adapter cannot be
merged, and a program that does not know of it applies it to all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.families.base import Encoded, Family, as_bytes

WEIGHTS, EMBEDDING = "pytorch_lora_weights.safetensors", "domain_embedding.safetensors"
"""Files of an adapter: the low-rank update as all programs have it, and beside it the vector of alpha."""

NAME = "domain_embedding"
"""The vector's module in the network, and its tensor in the file."""

TOKENS = "the second half of the video's"
"""Which tokens an adapter changes, as its file says it."""

ALPHA = "alpha_"
"""What the names of alpha's tensors in a cached item begin with."""

if TYPE_CHECKING:
    _Base = Family
else:
    _Base = object


class Joint(_Base):
    """Goes before the class of a family, whose network then sees two clips; itself knows no family."""

    channels = 4

    def __init__(self, model: recipe.Model, section: recipe.Joint) -> None:
        super().__init__(model)
        self.section = section
        kind: Any = type(self).__mro__[2]
        name, rules = model.checkpoint, ("block", "bias", "open") if self.joint_attention else ("block",)
        if not self.video_layers:
            raise ValueError(f"alpha.kind: {model.family} has no `joint` transparency")
        if self.images:
            raise ValueError(
                f"alpha.kind: {name} is shown images, which `joint` has no place for; choose a checkpoint "
                "for text-to-video, or model.task=t2v where it does both"
            )
        if section.text_to_alpha not in rules:
            raise ValueError(
                f"alpha.text_to_alpha: text and video do not share a sequence in {model.family}, so text "
                f"never looks at alpha: leave `{section.text_to_alpha}` out"
            )
        self._single: Family = kind(model)
        video = "|".join(self.video_layers)
        self.targets = [f"(?=(?:{video})$)(?:{target})" for target in kind.targets]  # type: ignore[misc]
        self.media_key = ("joint",)

    def about(self) -> dict[str, str]:
        """Adds what decides how the adapter is applied."""
        said = {
            "alpha": "joint",
            "alpha_tokens": TOKENS,
            "text_to_alpha": self.section.text_to_alpha,
            NAME: "yes" if self.section.domain_embedding else "no",
        }
        return {**super().about(), **{f"inlaid_{k}": v for k, v in said.items()}}

    @property
    def single(self) -> Family:
        """The family of one clip."""
        return self._single

    def encoded_in(self, folder: Path) -> Encoded | None:
        """Pairs in two folders, where there is one for alpha; else both joined in one file, colour first."""
        one = self.single.encoded
        if one is None:
            return None
        clip = one.media[0]
        pair = replace(one, media=(clip, clip.replace("video", "alpha")))
        if "/" not in clip:
            named = {k: f"rgb/{getattr(one, k)}" for k in ("text", "caption", "video")}
            pair = replace(one, media=(f"rgb/{clip}", f"alpha/{clip}"), **named)
        return pair if (folder / pair.media[1]).parent.is_dir() else one

    def accept(self, header: Mapping[str, str]) -> None:
        """As `Family.accept`; only what was trained in this way is applied in it."""
        said = header.get("inlaid_alpha", "opaque")
        if said != "joint":
            raise ValueError(
                f"this adapter was trained with alpha.kind={said}, for all tokens; `joint` would apply it to "
                "those of alpha"
            )

    def warnings(self) -> list[str]:
        """For the model card."""
        what = (
            "This adapter makes **transparent videos**: colour and alpha are drawn as two clips in one "
            "sequence, at the same positions, and the update is for the tokens of alpha alone. inlaid applies "
            "it so. A pipeline that loads it as any other applies it to all tokens and knows no alpha. Do "
            "not fuse it."
        )
        return [what]

    def problems(self, config: recipe.Config) -> list[str]:
        """Adds what an update of alpha's tokens alone forbids."""
        found, tuner = super().problems(config), config.tuner
        if not isinstance(tuner, recipe.LowRank) or tuner.kind not in ("lora", "dora"):
            only = f"tuner.kind: `joint` trains the tokens of alpha only, which {tuner.kind} cannot"
            return [*found, f"{only}; use lora or dora"]
        names = [
            n
            for n, m in self.load_denoiser(torch.float32, meta=True).named_modules()
            if isinstance(m, nn.Linear)
        ]
        for target in tuner.targets:
            try:
                hit = [n for n in names if re.fullmatch(target, n)]
            except re.error:
                continue  # the tuner says it
            wrong = [n for n in hit if not self._sees_video(n)]
            if wrong:
                found.append(
                    f"tuner.targets: `{target}` takes in {len(wrong)} layers that have no tokens of "
                    f"alpha, such as {wrong[0]}; leave them out"
                )
        return found

    def _sees_video(self, layer: str) -> bool:
        return any(re.fullmatch(p, layer) for p in self.video_layers)

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """`latents` (c, 2 t, h, w): colour, then alpha."""
        c, t, h, w = self.single.shapes(frames, height, width)["latents"]
        return {"latents": (c, 2 * t, h, w)}

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """All that is kept of one clip, and again of alpha."""
        return _both(*[self.single.stored(frames, height, width)] * 2)

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Twice the video's."""
        return 2 * self.single.tokens(frames, height, width) - self.text_before

    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """uint8 (t, h, w, 4), straight -> what is kept of colour, and of alpha as a grey video."""
        clips = frames[..., :3], np.repeat(frames[..., 3:], 3, -1)
        return _both(*(self.single.encode_media(encoder, clip) for clip in clips))

    def draw(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Both clips as they are drawn alone, one after the other."""
        alpha = {k.removeprefix(ALPHA): v for k, v in item.items() if k.startswith(ALPHA)}
        clips = {k: item[k] for k in alpha}, alpha
        return {"latents": torch.cat([self.single.draw(clip, generator)["latents"] for clip in clips], 1)}

    def parts(self, latents: Tensor) -> dict[str, Tensor]:
        """Colour and alpha."""
        return dict(zip(("rgb", "alpha"), latents.chunk(2, 2), strict=True))

    # --- the network --------------------------------------------------------------------------------------

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """The network as it sees two clips."""
        return self._join(super().load_denoiser(dtype, meta=meta, folder=folder))

    def _join(self, network: Any) -> nn.Module:
        self.share_positions(network)
        if self.joint_attention:
            for block in network.transformer_blocks:
                block.attn1.processor = self.joint_attention(self.section.text_to_alpha)
        if self.section.domain_embedding:
            width = network.config.num_attention_heads * network.config.attention_head_dim
            domain = Domain(width).to(next(network.parameters()).device)
            network.add_module(NAME, domain)
            blocks: Any = next(m for m in network.children() if isinstance(m, nn.ModuleList))
            blocks[0].register_forward_pre_hook(domain.before, with_kwargs=True)
        return network

    def attached(self, denoiser: nn.Module) -> None:
        """The adapter's layers change alpha only, and the vector trains."""
        self._tail(denoiser)
        if self.section.domain_embedding:
            denoiser.get_submodule(NAME).requires_grad_(True)

    def _tail(self, denoiser: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            if not self._sees_video(name):
                raise ValueError(f"{name} has no tokens of alpha, which are all that `joint` changes")
            if not isinstance(layer, Tail):
                layer.__class__ = _tail(type(layer), self.text_before)
        if self.section.domain_embedding:
            domain: Any = denoiser.get_submodule(NAME)
            domain.beside = [next(iter(layers.values()))]

    # --- sampling -----------------------------------------------------------------------------------------

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """The stock pipeline; its VAE decodes the two clips apart, and its other networks see two as well."""
        pipe = super().pipeline(denoiser=denoiser, device=device, dtype=dtype)
        decode = pipe.vae.decode

        def apart(z: Tensor, **options: Any) -> Any:
            clips = [decode(clip, return_dict=False)[0] for clip in z.chunk(2, 2)]
            both = torch.cat(clips, 2)
            return _Decoded(both) if options.get("return_dict", True) else (both,)

        pipe.vae.decode = apart
        for name in {"transformer", "transformer_2"} - {self.component}:
            if getattr(pipe, name, None) is not None:
                self._join(getattr(pipe, name))
        return pipe

    def sample(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        size: tuple[int, int],
        frames: int,
        generator: torch.Generator,
        images: Sequence[np.ndarray] = (),
        **settings: Any,
    ) -> np.ndarray:
        """Runs the stock pipeline from noise for two clips -> uint8 (t, h, w, 4), straight."""
        shape = self.single.shapes(frames, *size)["latents"]
        noise = [
            torch.randn(shape, generator=generator) for _ in range(1 if self.section.shared_noise else 2)
        ]
        start = torch.cat([noise[0], noise[-1]], 1)
        settings |= {"size": size, "frames": frames, "generator": generator, "noise": start}
        colour, alpha = np.split(self.run(pipeline, text, negative, images, **settings), 2)
        grey = getattr(alpha[-frames:], self.section.alpha_from)(-1, keepdims=True)
        return as_bytes(np.concatenate([colour[-frames:], grey], -1))

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Loads an adapter as any other, then keeps it to alpha's tokens, and loads its vector.

        Raises:
            ValueError: when it was not trained for joint transparency, or is without a part of it.
        """
        with safe_open(folder / WEIGHTS, "pt") as file:
            header = file.metadata() or {}
        self.accept(header)
        vector = embedding(folder, header)
        super().load_adapter(pipeline, folder)
        network = getattr(pipeline, self.component)
        self._tail(network)
        if vector is not None and not self.section.domain_embedding:
            raise ValueError(
                f"{folder}: has a domain embedding, which alpha.domain_embedding=false leaves out"
            )
        if self.section.domain_embedding:
            weight = network.get_submodule(NAME).weight
            with torch.no_grad():
                weight.zero_() if vector is None else weight.copy_(vector.view_as(weight))

    def weaken(self, pipeline: Any, strength: float) -> None:
        """The vector too."""
        super().weaken(pipeline, strength)
        if self.section.domain_embedding:
            with torch.no_grad():
                getattr(pipeline, self.component).get_submodule(NAME).weight.mul_(strength)


class Domain(nn.Module):
    """A vector for the tokens of alpha; a module, so that sharding gathers it when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.beside: list[Any] = []
        """A layer of the adapter that it belongs to, with which it is switched off; no child of this one."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2 v, d) -> the same with the vector added to the second half."""
        colour, alpha = x.chunk(2, 1)
        return torch.cat([colour, alpha + self.weight.to(x.dtype)], 1)

    def before(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
        """Does so before the first block, which is given the tokens of the video by position or by name."""
        if any(layer.disable_adapters for layer in self.beside):
            return args, given
        if args:
            return (self(args[0]), *args[1:]), given
        return args, {**given, "hidden_states": self(given["hidden_states"])}


class Tail:
    """Of a peft layer: one that changes the second half of the video's tokens, and no other.

    Its own `forward`, because peft's has no place between the layer and its update. What is to be honoured of
    peft's is in here: adapters that are switched off or not active, dropout, variants such as DoRA.
    """

    text = 0
    """Tokens of text before the video's."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(n, text + 2 v, in) -> (n, text + 2 v, out)."""
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        head = (x.shape[1] + self.text) // 2
        tail, last = x[:, head:], out[:, head:]
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            tail = self._cast_input_dtype(tail, self.lora_A[name].weight.dtype)
            if name in self.lora_variant:
                last = self.lora_variant[name].forward(self, active_adapter=name, x=tail, result=last)
            else:
                update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](tail)))
                last = last + update * self.scaling[name]
        return torch.cat([out[:, :head], last.to(out.dtype)], 1)

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE)


MERGE = "this adapter changes the tokens of alpha only, which no change of weights does: it cannot be merged"


@lru_cache
def _tail(kind: type, text: int) -> type:
    return type(f"Tail{kind.__name__}", (Tail, kind), {"text": text})


class _Decoded:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def _both(colour: Mapping[str, Any], alpha: Mapping[str, Any]) -> dict[str, Any]:
    return {**colour, **{f"{ALPHA}{k}": v for k, v in alpha.items()}}


def embedding(folder: Path, header: Mapping[str, str]) -> Tensor | None:
    """The vector of an adapter in a folder, float32 (d,); None where it was trained without.

    Raises:
        ValueError: when the file is not there although the adapter was trained with it.
    """
    path = folder / EMBEDDING
    if header.get(f"inlaid_{NAME}") != "yes":
        return None
    if not path.is_file():
        raise ValueError(f"{folder}: {EMBEDDING} is missing, which belongs to this adapter: copy it too")
    with safe_open(path, "pt") as file:
        return file.get_tensor(NAME).float().flatten()
