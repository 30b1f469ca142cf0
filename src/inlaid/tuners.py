"""Tuners: selection of the trainable weights and their storage, independent of model families.

LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoKr and LoHa (Yeh et al. 2023) use peft's `add_adapter`; full
fine-tuning makes the weights themselves trainable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from inlaid import config as recipe
from inlaid import formats, lycoris, memory
from inlaid.alpha import joint
from inlaid.models import rgba_codec
from inlaid.models.rgba_losses import COLORS

ADAPTER = "default"
"""Name of the trained adapter in peft."""


def match(patterns: Sequence[str], names: Sequence[str], *, what: str) -> list[str]:
    """Return the names that fully match any of the patterns.

    Raises:
        ValueError: if a pattern is no regular expression or matches nothing.
    """
    found: set[str] = set()
    wrong = []
    for pattern in patterns:
        try:
            hits = {n for n in names if re.fullmatch(pattern, n)}
        except re.error as error:
            wrong.append(f"`{pattern}` is not a regular expression ({error})")
            continue
        if not hits:
            like = [
                n
                for n in names
                if re.search(pattern.replace(".", r"\.") if pattern.isidentifier() else pattern, n)
            ]
            near = (
                f", but `.*{pattern}` would match {len(like)}, such as {like[0]}"
                if like
                else f"; an existing name is {names[0]}"
            )
            wrong.append(f"`{pattern}` matches no {what}{near}")
        found |= hits
    if wrong:
        raise ValueError("tuner.targets: " + "; ".join(wrong))
    return [n for n in names if n in found]


Section = recipe.LowRank | recipe.Full | recipe.Codec


def folder(section: Section) -> str:
    """Return the name of the folder with the exported weights, in a run and in each of its checkpoints."""
    return "codec" if isinstance(section, recipe.Codec) else "adapter"


def select(section: Section, targets: Sequence[str], denoiser: nn.Module) -> list[str]:
    """Return the names of the layers that get an adapter, or of the trainable parameters.

    Also works on a network on the meta device.

    Raises:
        ValueError: if a target matches nothing.
    """
    if isinstance(section, recipe.Codec):
        trained = ("merge.",) if section.train == "merge" else ("merge.", "rgb.", "alpha.")
        return [n for n, _ in denoiser.named_parameters() if n.startswith(trained)]
    if isinstance(section, recipe.Full):
        names = [n for n, _ in denoiser.named_parameters()]
        return match(section.targets, names, what="parameter") if section.targets else names
    layers, what = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "linear or convolution layer"
    if section.kind in lycoris.KINDS:
        layers, what = (nn.Linear, nn.Conv1d, nn.Conv2d), f"layer that {section.kind} supports"
    names = [n for n, m in denoiser.named_modules() if isinstance(m, layers)]
    chosen = match(section.targets or targets, names, what=what)
    for part in formats.companions(denoiser):
        if not any(n.startswith(f"{part}.") for n in chosen):
            raise ValueError(
                f"tuner.targets: no pattern matches a layer of {part}, which this recipe trains: add one"
            )
    return chosen


def attach(
    section: Section, targets: Sequence[str], denoiser: nn.Module, *, seed: int
) -> dict[str, nn.Parameter]:
    """Freeze the denoiser and make the selected weights or new adapters trainable, in float32.

    Args:
        section: tuner section of the recipe.
        targets: default targets of the family.
        denoiser: network; changed in place.
        seed: seed of the initial low-rank factors.

    Returns:
        The trainable parameters by name.

    Raises:
        ValueError: if a target matches nothing.
    """
    denoiser.requires_grad_(False)
    chosen = select(section, targets, denoiser)
    if isinstance(section, recipe.Codec) and section.start is None:
        rgba_codec.draw(denoiser, seed, section.begin)  # type: ignore[arg-type]
    if not isinstance(section, recipe.LowRank):
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in set(chosen))
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser.add_adapter(_peft_config(section, chosen), adapter_name=ADAPTER)  # type: ignore[operator]
            _factor_norms(denoiser)
            half = (torch.bfloat16, torch.float16)
            if not section.dropout and any(p.dtype in half for p in denoiser.parameters()):
                _keep_inputs(denoiser)
            lycoris.factor(denoiser, ADAPTER)
            # peft initializes in the dtype of the base model, which may be float8: repeat it in float32.
            rounded = {p.dtype for p in denoiser.parameters() if p.requires_grad} != {torch.float32}
            _float32(denoiser)
            if rounded:
                _start_again(denoiser)
    _float32(denoiser)
    return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """Disable the adapters within the context, which restores the network before `attach`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert layers, "only adapters can be disabled"
    for layer in layers:  # peft's own switch would also freeze the adapter
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _float32(denoiser: nn.Module) -> None:
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _start_again(denoiser: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    for layer in denoiser.modules():
        if isinstance(layer, LycorisLayer):
            layer.reset_adapter_parameters(ADAPTER)
        elif isinstance(layer, LoraLayer):
            layer.reset_lora_parameters(ADAPTER, True)
            magnitudes: Any = layer.lora_magnitude_vector
            for magnitude in magnitudes.values():
                weight = memory.dense(layer.get_base_layer()).float()
                norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
                magnitude.weight.copy_(norms.view_as(magnitude.weight))


def _peft_config(section: recipe.LowRank, modules: Sequence[str]):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if section.kind in lycoris.KINDS:
        kind = LoKrConfig if section.kind == "lokr" else LoHaConfig
        return kind(r=section.rank, alpha=section.alpha or section.rank, target_modules=list(modules))  # type: ignore[arg-type]
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha or section.rank,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=list(modules),
        use_dora=section.kind == "dora",
    )


def _factor_norms(denoiser: nn.Module) -> None:
    """Make every DoRA linear layer compute its norm from the factors.

    peft computes B A through an identity matrix (in, in) and adds it to a copy of W, in each layer and pass.
    The squared row norms of W + s B A are ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, whose largest
    intermediate is W A^T (out, r). The result is equal up to rounding. It needs no gradient, because DoRA
    treats the norm as a constant (Liu et al. 2024, section 4.3).
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    class FactoredDora(DoraLinearLayer):
        def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, **_):  # noqa: N803
            with torch.no_grad():
                weight = memory.dense(base_layer).to(lora_A.weight.dtype)
                norm = row_norm(weight, lora_A.weight, lora_B.weight, scaling)
            scale = (self.weight / norm).to(lora_A.weight.dtype)
            if base_result is None:
                base = nn.functional.linear(x, weight)
            else:
                base = base_result if base_layer.bias is None else base_result - base_layer.bias
            return _Rescaled.apply(base, lora_A(x), lora_B.weight, scale, scaling)

    for module in denoiser.modules():
        if type(module) is DoraLinearLayer:
            module.__class__ = FactoredDora


def _keep_inputs(denoiser: nn.Module) -> None:
    """Make every low-rank linear layer save its input for the backward pass in the original dtype.

    peft first casts the input to the dtype of the factors and so saves a float32 copy in each layer: six
    times the size of one bfloat16 tensor for queries, keys and values alone. Casting again in the backward
    pass gives bit-identical gradients.
    """
    from peft.tuners.lora import LoraLayer

    class FirstFactor(nn.Linear):
        def forward(self, x):
            return _Product.apply(x, self.weight)

    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer) and type(layer.lora_A[ADAPTER]) is nn.Linear:
            layer.lora_A[ADAPTER].__class__ = FirstFactor
            layer.cast_input_dtype_enabled = False


class _Product(torch.autograd.Function):
    """x W^T in the dtype of W for x of any dtype; saves only x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        return (grads[0] @ weight).to(x.dtype), grad.T @ x.flatten(0, -2).to(weight.dtype)


class _Rescaled(torch.autograd.Function):
    """(m - 1) y + s m B h; saves y (..., out) and h (..., r), but not the product with B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(y, h, b, m)
        ctx.s = s
        return (m - 1) * y + m * nn.functional.linear(h, b) * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y, h, b, m), (grad,) = ctx.saved_tensors, grads
        scaled = grad * ctx.s
        rows = (grad * y).flatten(0, -2).sum(0) + (scaled * nn.functional.linear(h, b)).flatten(0, -2).sum(0)
        inner = (scaled * m).flatten(0, -2)
        return (
            ((m - 1) * grad).to(y.dtype),
            (inner @ b).view_as(h),
            inner.T @ h.flatten(0, -2),
            rows,
            None,
        )


def row_norm(weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return the row norms (out,) of W + s B A, float32, from W (out, in), A (r, in) and B (out, r)."""
    w, a, b = weight, a.float(), b.float()
    squared = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) ** 2
    cross = ((w @ a.T.to(w.dtype)).float() * b).sum(1)
    return (squared + 2 * s * cross + s * s * ((b @ (a @ a.T)) * b).sum(1)).clamp(min=0).sqrt()


def weights(section: Section, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that `save` writes, by name: the trained ones, or all after full fine-tuning."""
    if isinstance(section, recipe.Codec):
        return {n: p for n, p in denoiser.named_parameters() if not n.startswith("vae.")}
    if isinstance(section, recipe.Full):
        return denoiser.state_dict(keep_vars=True)
    return {n: p for n, p in denoiser.named_parameters() if p.requires_grad}


def save(
    section: Section,
    denoiser: nn.Module,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    metadata: Mapping[str, str],
) -> Path:
    """Write the trained weights: an adapter, an RGBA VAE, or a whole network in diffusers layout.

    Args:
        section: tuner section of the recipe.
        denoiser: network that `attach` changed; only its configuration is read.
        weights: tensors from the function `weights`, unsharded.
        folder: created if missing.
        metadata: header entries of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(section, recipe.Codec):
        colors = [[c / 127.5 - 1 for c in color] for color in section.colors] or COLORS
        about = {"loss": section.loss, **{n.removeprefix("inlaid_"): v for n, v in metadata.items()}}
        about |= {
            n: getattr(section, n)
            for n in ("hard_mask", "anchor", "noise", "visible", "visible_alpha")
            if getattr(section, n)
        }
        codec: Any = denoiser
        rgba_codec.save(
            codec, folder, alpha_eps=section.alpha_eps, colors=colors, about=about, weights=weights
        )
        return folder
    if isinstance(section, recipe.Full):
        with torch.device("meta"):  # FSDP replaces the class of a sharded network and shards its weights
            kind = next(c for c in type(denoiser).__mro__ if not issubclass(c, FSDPModule))
            shell = kind.from_config(denoiser.config)  # type: ignore[attr-defined]
        shell.load_state_dict(weights, assign=True)
        shell.save_pretrained(folder, max_shard_size="5GB")
        return folder
    tensors = {
        n.replace(f".{ADAPTER}", "").replace("_vector.weight", "_vector"): w for n, w in weights.items()
    }
    vector = tensors.pop(f"{joint.NAME}.weight", None)
    if vector is not None:
        formats.write_tensors(folder / joint.EMBEDDING, {joint.NAME: vector}, metadata)
    peft_config = denoiser.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr]
    for part in formats.companions(denoiser):
        own = {n: tensors.pop(n) for n in [*tensors] if n.startswith(f"{part}.")}
        own = {n.removeprefix(f"{part}."): w for n, w in own.items()}
        formats.write_peft(folder / part, own, peft_config, metadata=dict(metadata))
    if section.kind in lycoris.KINDS:
        return lycoris.write(folder, tensors, peft_config, metadata=dict(metadata))
    return formats.write_diffusers(folder, tensors, peft_config, metadata=dict(metadata))
