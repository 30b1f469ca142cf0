"""Trained parts of an RGBA VAE: storage, initialization and training losses.

An RGBA VAE encodes color and alpha of a clip into one latent. It is based on a frozen Wan VAE (base VAE). Its
folder contains `config.json`, `merge.safetensors`, `decoder_rgb_lora.safetensors` and
`decoder_alpha_lora.safetensors`. Its ID (`rgba_vae_id`) is a hash of the weights, the base VAE, the
transparency threshold and the background colors. Latents of different RGBA VAEs are incompatible. Caches and
adapters therefore store the ID of their RGBA VAE. The ID is checked when a cache or adapter is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlaid.config.sections import ALPHA_EPS
from inlaid.files import atomic
from inlaid.networks.rgba_vae import DecoderLora, MergeBlock, RgbaVae, convolutions
from inlaid.networks.rgba_vae_losses import COLORS, RgbaLoss, hard_render, sample_colors
from inlaid.reading import parse_json, read_text

FILES = {"merge": "merge", "rgb": "decoder_rgb_lora", "alpha": "decoder_alpha_lora"}
"""File names (without suffix) of the trained parts of an `RgbaVae`."""

FOLDER = "rgba_vae"
"""Name of the folder that contains the trained RGBA VAE, in the run and in each of its checkpoints."""

FORMAT = 1

Colors = Sequence[Sequence[float]]


def new(vae: Any, rank: int, seed: int, init: Init = "random", width: int | None = None) -> RgbaVae:
    """Create an untrained RGBA VAE from a Wan VAE.

    The decoder for color and the decoder for alpha are initially equal to the decoder of the Wan VAE.

    Args:
        vae: Wan VAE, the base of the RGBA VAE.
        rank: rank of the low-rank updates of the decoders.
        seed: seed of the random weights.
        init: initialization of the merge block. `random`: random weights. `encoder`: the block initially
            ignores alpha, and returns the latent that the Wan VAE computes from color. Color is then
            correct from the first step.
        width: width of the merge block's hidden layers. Default: the width of the encoder features. The
            initialization `encoder` requires the default.

    Raises:
        ValueError: if the VAE is not supported.
    """
    features, z = fits(vae)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        merge = MergeBlock(width or features, z, features)
        loras = [DecoderLora.of(vae.decoder, rank) for _ in range(2)]
    if init == "encoder":
        _as_encoder(merge, vae)
    return RgbaVae(vae, merge, *loras)


Init = Literal["random", "encoder"]


@torch.no_grad()
def _as_encoder(merge: Any, vae: Any) -> None:
    """Initialize a `MergeBlock` so that it returns the VAE's latent of color and ignores alpha."""
    width = merge.conv_out.weight.shape[1]
    merge.conv_in.weight.zero_()[:, :width, 0, 0, 0] = torch.eye(width)
    nn.init.zeros_(merge.conv_in.bias)
    for block in merge.res:
        nn.init.zeros_(block.conv2.weight)  # type: ignore[arg-type]
        nn.init.zeros_(block.conv2.bias)  # type: ignore[arg-type]
    merge.norm_out.load_state_dict(vae.encoder.norm_out.state_dict())
    head, mean = vae.encoder.conv_out, slice(0, merge.conv_out.weight.shape[0])
    quant = vae.quant_conv.weight[mean, :, 0, 0, 0]
    merge.conv_out.weight.copy_(torch.einsum("oc,cithw->oithw", quant, head.weight))
    merge.conv_out.bias.copy_(quant @ head.bias + vae.quant_conv.bias[mean])


@torch.no_grad()
def initialize(rgba_vae: RgbaVae, seed: int, init: Init) -> None:
    """Initialize the trained parts of an RGBA VAE in place.

    An RGBA VAE on the meta device is not changed.
    """
    if rgba_vae.merge.conv_in.weight.is_meta:
        return
    fresh = new(rgba_vae.vae, rgba_vae.rgb.rank, seed, init)
    for part in FILES:
        getattr(rgba_vae, part).load_state_dict(getattr(fresh, part).state_dict())


def fits(vae: Any) -> tuple[int, int]:
    """Check that a VAE can be the base of an RGBA VAE.

    Returns:
        The number of channels of the encoder features, and the number of latent channels.

    Raises:
        ValueError: if the VAE is not supported, for example the VAE of Wan 2.2 TI2V-5B.
    """
    z = vae.config.z_dim
    if z != 16 or vae.config.patch_size:
        raise ValueError(
            f"merged alpha supports the 16-channel VAE of Wan 2.1 and Wan 2.2 A14B only; this VAE has {z} "
            "channels: use another checkpoint"
        )
    return vae.encoder.mid_block.resnets[-1].conv2.weight.shape[0], z


# --- the folder -------------------------------------------------------------------------------------------


def parts(rgba_vae: RgbaVae, weights: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the trained weights of an RGBA VAE: one mapping per part, from names in its file to tensors.

    The parts are `merge`, `rgb` and `alpha`. The parts `rgb` and `alpha` are updates of the decoder. For each
    convolution NAME, they contain `NAME.lora_A` (r, in, *kernel) and `NAME.lora_B` (out, r).

    Args:
        rgba_vae: RGBA VAE that defines the names.
        weights: weights that are returned instead of those of `rgba_vae`, such as their EMA. Keys are
            parameter names of `rgba_vae`.
    """
    held = dict(rgba_vae.state_dict()) if weights is None else weights
    out: dict[str, dict[str, Tensor]] = {
        "merge": {n.removeprefix("merge."): t for n, t in held.items() if n.startswith("merge.")}
    }
    for part, lora in (("rgb", rgba_vae.rgb), ("alpha", rgba_vae.alpha)):
        names = [(f"{part}.{s}.{i}", f"{n}.lora_{s.upper()}") for i, n in enumerate(lora.names) for s in "ab"]
        out[part] = {stored: held[own] for own, stored in names}
    return out


def identity(weights: Mapping[str, Mapping[str, Tensor]], base: str, alpha_eps: float, colors: Colors) -> str:
    """Return the `rgba_vae_id`, a hash that identifies an RGBA VAE.

    It is computed from the stored weights, the hash of the base VAE (`base`), the transparency threshold and
    the background colors.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, base, alpha_eps, colors]).encode())
    for part in sorted(weights):
        for name in sorted(weights[part]):
            tensor = weights[part][name].detach().cpu().contiguous()
            digest.update(f"{part} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_hash(vae: Any) -> str:
    """Return a hash of a VAE's weights after conversion to bfloat16.

    Float32 and bfloat16 copies of a VAE therefore have the same hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def save(
    rgba_vae: RgbaVae,
    folder: Path,
    *,
    alpha_eps: float = ALPHA_EPS,
    colors: Colors = COLORS,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Write an RGBA VAE to a folder atomically; return its `rgba_vae_id`.

    Args:
        rgba_vae: RGBA VAE; its base VAE is not written.
        folder: folder to write; replaced if it exists.
        alpha_eps: largest alpha that was treated as transparent in training.
        colors: background colors that replace transparent pixels of clips before encoding, in [-1, 1].
        about: further entries of `config.json`, such as the losses and the number of steps. Its entry
            `parts`, if present, lists which parts of the RGBA VAE are written; by default, all.
        dtype: dtype of the weights on disk.
        weights: weights to write, by parameter name, such as EMA weights. Default: those of `rgba_vae`.
    """
    from safetensors.torch import save_file

    kept = (about or {}).get("parts", FILES)
    stored = {
        part: {n: t.detach().cpu().to(dtype).contiguous() for n, t in tensors.items()}
        for part, tensors in parts(rgba_vae, weights).items()
        if part in kept
    }
    base = base_hash(rgba_vae.vae)
    name = identity(stored, base, alpha_eps, colors)
    values = {
        "format": FORMAT,
        "rgba_vae_id": name,
        "base_vae": base,
        "z_dim": rgba_vae.merge.conv_out.weight.shape[0],
        "width": rgba_vae.merge.conv_out.weight.shape[1],
        "features": rgba_vae.merge.conv_in.weight.shape[1] // 2,
        "rank": {"rgb": rgba_vae.rgb.rank, "alpha": rgba_vae.alpha.rank},
        "alpha_eps": alpha_eps,
        "colors": colors,
        **(about or {}),
    }
    with atomic(folder) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        for part, tensors in stored.items():
            save_file(tensors, temporary / f"{FILES[part]}.safetensors", metadata={"rgba_vae_id": name})
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of an RGBA VAE, and check that the files of its parts exist.

    Raises:
        ValueError: if the folder does not contain an RGBA VAE, or files are missing.
    """
    path = folder / "config.json"
    try:
        values = parse_json(read_text(path))
        if not isinstance(values, dict) or "rgba_vae_id" not in values:
            raise ValueError("it has no rgba_vae_id")
        if not {*values.get("parts", FILES)} <= {*FILES}:
            raise ValueError("it has unknown parts")
    except (OSError, ValueError, TypeError) as error:
        cause = str(error) if path.is_file() else "file not found"
        raise ValueError(
            f"{folder} is not an RGBA VAE: config.json cannot be used ({cause}); use a run that trained an "
            "RGBA VAE, or a folder from `inlaid import`"
        ) from None
    wanted = [FILES[part] for part in values.get("parts", FILES)]
    missing = [f"{f}.safetensors" for f in wanted if not (folder / f"{f}.safetensors").is_file()]
    if missing:
        raise ValueError(f"{folder}: RGBA VAE without {', '.join(missing)}; copy the whole folder again")
    return values


def load(folder: Path, vae: Any) -> RgbaVae:
    """Load an RGBA VAE from a folder in float32, with `vae` as its base.

    The ranks are inferred from the tensors.

    Raises:
        ValueError: if files are missing, damaged, or from different RGBA VAEs, or `vae` is not the base VAE.
    """
    from safetensors.torch import load_file

    said = read_config(folder)
    parts = said.get("parts", list(FILES))
    try:
        weights = {part: load_file(folder / f"{FILES[part]}.safetensors") for part in parts}
    except Exception as error:
        raise ValueError(
            f"{folder}: a file of this RGBA VAE is damaged ({str(error).splitlines()[0]}); copy it again"
        ) from None
    base = base_hash(vae)
    if said.get("base_vae") not in (None, base):
        raise ValueError(
            f"{folder}: this RGBA VAE was trained on another VAE ({said['base_vae']}, not {base}); "
            "use the checkpoint that it was trained on"
        )
    eps = float(said.get("alpha_eps", ALPHA_EPS))
    if identity(weights, base, eps, said.get("colors", COLORS)) != said["rgba_vae_id"]:
        raise ValueError(
            f"{folder}: weights do not match the rgba_vae_id {said['rgba_vae_id']}: files of different "
            "RGBA VAEs were mixed, or a file was changed; copy the whole folder again"
        )
    return assemble(vae, weights, str(folder))


def assemble(vae: Any, weights: Mapping[str, Mapping[str, Tensor]], where: str) -> RgbaVae:
    """Create an RGBA VAE from the weights of its parts.

    Args:
        vae: Wan VAE, the base of the RGBA VAE.
        weights: tensors by part (`merge`, `rgb`, `alpha`) and name. If the part `merge` is missing, the
            `MergeBlock` has random weights.
        where: prefix of error messages.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape.
    """
    merge = read_merge(vae, weights.get("merge"), f"{where}: the merge block")
    loras = [
        read_factors(vae.decoder, weights[part], f"{where}: the {what} decoder")
        for part, what in (("rgb", "color"), ("alpha", "alpha"))
    ]
    return RgbaVae(vae, merge, *loras)


def read_merge(vae: Any, weights: Mapping[str, Tensor] | None, where: str) -> MergeBlock:
    """Create a merge block from stored weights.

    A merge block maps the encoder features of color and alpha to one latent. Its width is inferred from the
    tensors.

    Args:
        vae: Wan VAE, the base of the RGBA VAE.
        weights: tensors by name. If None or empty, the merge block has random weights, and its width is the
            number of channels of the encoder features.
        where: prefix of error messages.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape.
    """
    if not weights:
        return new(vae, 1, 0).merge
    features, z = fits(vae)
    bias = weights.get("conv_in.bias")
    width = features if bias is None else bias.numel()
    with torch.device("meta"):  # a file may claim any width: nothing is allocated before the shapes match
        merge = MergeBlock(width, z, features)
    wanted = {n: tuple(t.shape) for n, t in merge.state_dict().items()}
    given = {n: tuple(t.shape) for n, t in weights.items()}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        what = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        what += [f"{len(extra)} are unexpected, such as {extra[0]}"] if extra else []
        raise ValueError(f"{where} does not fit: {' and '.join(what)}")
    wrong = [n for n in wanted if wanted[n] != given[n]]
    if wrong:
        raise ValueError(
            f"{where} does not fit: {wrong[0]} has shape {list(given[wrong[0]])}, this VAE needs "
            f"{list(wanted[wrong[0]])}; use the checkpoint that it was trained on"
        )
    merge.load_state_dict({n: t.float().contiguous() for n, t in weights.items()}, assign=True)
    return merge


def read_factors(decoder: nn.Module, weights: Mapping[str, Tensor], where: str) -> DecoderLora:
    """Create the low-rank update of a decoder from stored factors.

    The rank is inferred from the tensors; `where` is the prefix of error messages.

    Raises:
        ValueError: if factors are missing, unexpected or of the wrong shape, or if layers have different
            ranks.
    """
    found = dict(convolutions(decoder))
    wanted = {f"{name}.lora_{side}" for name in found for side in "AB"}
    missing, extra = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or extra:
        what = [f"{len(missing)} factors are missing, such as {missing[0]}"] if missing else []
        what += [f"{len(extra)} are unexpected, such as {extra[0]}"] if extra else []
        raise ValueError(f"{where} does not fit: {' and '.join(what)}")
    ranks = {name: weights[f"{name}.lora_A"].shape[0] for name in found}
    if len(set(ranks.values())) > 1:
        low, high = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
        raise ValueError(
            f"{where}: ranks differ, {ranks[low]} in {low} and {ranks[high]} in {high}; the update is scaled "
            "by 1 / rank, so all layers must have the same rank"
        )
    rank = next(iter(ranks.values()))
    lora = DecoderLora({n: m.weight.shape for n, m in found.items()}, rank)
    for i, name in enumerate(lora.names):
        for side, held in (("A", lora.a[i]), ("B", lora.b[i])):
            tensor = weights[f"{name}.lora_{side}"]
            if tensor.shape != held.shape:
                raise ValueError(
                    f"{where}: {name}.lora_{side} has shape {list(tensor.shape)}, this VAE needs "
                    f"{list(held.shape)}"
                )
            held.data.copy_(tensor)
    return lora


# --- training ---------------------------------------------------------------------------------------------


def to_video(rgba: Tensor) -> tuple[Tensor, Tensor]:
    """Convert RGBA clips, uint8 (b, 4, t, h, w), to color and alpha, each (b, 3, t, h, w) in [-1, 1].

    Alpha is repeated in three channels. Color remains straight (not premultiplied).
    """
    video = rgba.float() / 127.5 - 1
    return video[:, :3], video[:, 3:].expand(-1, 3, -1, -1, -1)


def to_pixels(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Convert decoded color and alpha to RGBA clips, uint8 (b, 4, t, h, w).

    Values are clamped to [-1, 1]. Alpha is then averaged over its three channels.
    """
    video = torch.cat([rgb.clamp(-1, 1), alpha.clamp(-1, 1).mean(1, keepdim=True)], 1)
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def losses(
    rgba_vae: RgbaVae,
    rgba: Tensor,
    loss: RgbaLoss,
    generator: torch.Generator,
    *,
    anchor: float = 0.0,
    noise: float = 0.0,
    visible: float = 0.0,
    visible_alpha: float = 0.0,
    colors: Colors = COLORS,
) -> dict[str, Tensor]:
    """Compute the loss terms of one micro-batch by name; the entry `loss` is their sum.

    Args:
        rgba_vae: RGBA VAE that is trained.
        rgba: clips in straight RGBA, uint8 (b, 4, t, h, w).
        loss: the loss terms of the paper (Dong et al. 2025).
        generator: CPU random generator for the noise, for the background color of the encoder input, and for
            the background colors of the two composites in `loss`.
        anchor: weight of a term that compares the RGBA VAE's latents with the base VAE's latents. The base
            VAE encodes an opaque version of the clip, in which dark gray replaces transparent pixels. The
            term is the mean of ((z - z_base) / latents_std)^2. Not in the paper. It keeps latents close to
            those of opaque videos. Then the base VAE's decoder reproduces the color, and a denoiser
            pretrained on opaque videos has less to learn.
        noise: maximum standard deviation of the noise added to latents before decoding, as a multiple of
            `latents_std`. Not in the paper. It makes the decoders robust to errors of the denoiser.
        visible: weight of the mean absolute color error of visible pixels. Not in the paper. The
            terms of the paper are means over all pixels, to which few visible pixels contribute little.
        visible_alpha: weight of the mean absolute alpha error of visible pixels. Not in the paper.
        colors: background colors of the encoder input, in [-1, 1].
    """
    (color,), (hard, soft) = sample_colors(generator, 1, colors), sample_colors(generator, 2)
    rgb, alpha = to_video(rgba)
    z = rgba_vae.encode(hard_render(rgb, alpha, color, eps=loss.alpha_eps), alpha)
    terms: dict[str, Tensor] = {}
    spread = torch.tensor(rgba_vae.vae.config.latents_std, device=z.device).view(1, -1, 1, 1, 1)
    if anchor:
        ground = torch.tensor(GROUND, dtype=torch.float32) / 127.5 - 1
        with torch.no_grad():
            seen = hard_render(rgb, alpha, ground, eps=loss.alpha_eps)
            own = rgba_vae.vae.encode(seen).latent_dist.mode()
        terms["anchor"] = anchor * ((z - own) / spread).square().mean()
    if noise:
        amount = noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
        z = z + (amount * torch.randn(z.shape, generator=generator)).to(z.device) * spread
    got = rgba_vae.decode(z)
    mask = alpha > 2 * loss.alpha_eps - 1
    for name, weight, one, two in (
        ("visible", visible, got[0], rgb),
        ("visible_alpha", visible_alpha, got[1], alpha),
    ):
        if weight:
            terms[name] = weight * ((one - two).abs() * mask).sum() / mask.sum().clamp_min(1)
    more = list(terms.values())
    terms |= loss(*got, rgb, alpha, hard, soft)
    terms["loss"] = torch.stack([terms["loss"], *more]).sum()
    return terms


GROUND = (62, 66, 70)
"""Dark gray (RGB, 0-255) that replaces transparent pixels in the loss term `anchor` (see `losses`)."""
