"""Checkpoints with random weights and any network size, for tests and benchmarks.

They use the same model classes as the published checkpoints. This package has a module for each model family.
Each module defines:

- `VARIANTS`: for each architecture variant, the keys that its recipe (YAML configuration) needs in the
  `model` section;
- `STANDS_FOR`: for each published checkpoint, the variant with the same architecture;
- `build`: function that writes a checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
import string
from pathlib import Path
from typing import Any

from inlaid.console import quiet_bars

TEXT_WIDTH = 32
"""Width of the random text encoder's output."""


def cases() -> list[tuple[str, str]]:
    """Return the pairs (family, variant) for which `build` can write a checkpoint."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [(name, variant) for name in names for variant in _module(name).VARIANTS]


def model(family: str, variant: str) -> dict[str, Any]:
    """Return the recipe section `model` for an architecture variant. The key `checkpoint` is not set."""
    return {"family": family, **_module(family).VARIANTS[variant]}


def sibling(family: str, checkpoint: str) -> str:
    """Return the architecture variant of a published checkpoint, a key of the family's `VARIANTS`."""
    return _module(family).STANDS_FOR[checkpoint]


def build(family: str, folder: Path, variant: str | None = None, **sizes: int) -> Path:
    """Write a checkpoint with random weights and return its folder.

    Args:
        family: name of the model family.
        folder: output folder.
        variant: a key of `VARIANTS` in the family's module of this package. Default: the first key.
        sizes: sizes of the network: `heads`, `head` (width of a head), `layers`, `ffn` (width of the
            feed-forward layers, if the architecture allows a choice), and for CogVideoX `text` (number of
            text tokens).
    """
    import torch

    quiet_bars()
    module = _module(family)
    chosen = variant or next(iter(module.VARIANTS))
    assert chosen in module.VARIANTS, f"{family} has no variant {chosen}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.build(folder, chosen, **sizes)
    return folder


def tokenizer() -> Any:
    """Return a T5 tokenizer in which each character is a token."""
    from transformers import T5Tokenizer

    symbols = [(c, -3.0) for c in string.ascii_letters + string.digits + ".,'-!?"]
    return T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *symbols],
        extra_ids=0,
        model_max_length=512,
    )


def text_encoder(kind: str = "T5") -> Any:
    """Return a random `T5` or `UMT5` text encoder with outputs of width `TEXT_WIDTH`."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=128,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def _module(family: str) -> Any:
    return importlib.import_module(f"{__name__}.{family}")
