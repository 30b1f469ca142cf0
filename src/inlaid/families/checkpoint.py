"""Checkpoints in diffusers layout, on the Hub or in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe

if TYPE_CHECKING:
    import torch


class Checkpoint:
    """Configurations and components of a checkpoint in diffusers layout, on the Hub or in a folder."""

    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """Configuration values of published checkpoints by Hub ID, used instead of downloading them; the first ID
    is the default checkpoint."""
    text_encoder: ClassVar[str] = "T5EncoderModel"
    """Name of the text encoder's class in transformers."""

    def __init__(self, model: recipe.Model) -> None:
        self.model = model
        self.source = locate(model.checkpoint)

    @property
    def name(self) -> str:
        """Hub ID, or the name of a local folder without its path, for files that may be published."""
        return self.source.name if isinstance(self.source, Path) else self.source

    def read_config(self, component: str) -> dict[str, Any] | None:
        """Return the configuration of a component, or `model_index.json` for the empty name; None if absent.

        Raises:
            ValueError: if the checkpoint is neither a local folder nor reachable on the Hub, or the file is
                not a JSON object.
        """
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        if component.startswith("feature_extractor"):
            file = "preprocessor_config.json"
        name = f"{component}/{file}" if component else "model_index.json"
        if self.source in self.published and self.model.revision is None:
            return dict(self.published[self.model.checkpoint].get(component, {})) or None
        if isinstance(self.source, Path):
            path = self.source / name
            if not path.is_file():
                return None
            try:
                found = json.loads(path.read_text("utf-8"))
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(
                    f"model.checkpoint: {path} is not a JSON object; copy or download the checkpoint again"
                )
            return found
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return json.loads(
                Path(hf_hub_download(self.source, name, revision=self.model.revision)).read_text("utf-8")
            )
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise ValueError(
                f"model.checkpoint: `{self.source}` is not a local folder and could not be read from the Hub "
                f"({type(error).__name__}); check the name and the network, or run `hf auth login`"
            ) from None

    @contextmanager
    def loading(self, part: str, folder: Path | None = None) -> Iterator[None]:
        """Convert exceptions while loading a component or a folder, except MemoryError, to a ValueError.

        Args:
            part: component, or file of the checkpoint, for the message.
            folder: folder that is loaded instead, for the message.

        Raises:
            ValueError: if loading fails; the message names the component or folder.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            what = folder or f"model.checkpoint: `{part}` of {self.model.checkpoint}"
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"{what} cannot be loaded ({cause}); it may be incomplete: copy or download it again"
            ) from error

    def folder(self, component: str) -> Path:
        """Return the folder with the files of a component, after downloading them if needed.

        Raises:
            ValueError: if the download fails.
        """
        if isinstance(self.source, Path):
            return self.source / component
        from huggingface_hub import snapshot_download

        wanted = f"{component}/*"
        with self.loading(component):
            found = snapshot_download(self.source, revision=self.model.revision, allow_patterns=wanted)
        return Path(found) / component

    def load(self, component: str, dtype: torch.dtype) -> Any:
        """Load a component with all its weights, as the diffusers class that its configuration names.

        Raises:
            ValueError: if the component cannot be loaded, or weights are missing from its files.
        """
        import diffusers

        with self.loading(component):
            network = getattr(diffusers, self._class_name(component)).from_pretrained(
                self.source, subfolder=component, revision=self.model.revision, torch_dtype=dtype
            )
            missing = [n for n, p in network.named_parameters() if p.is_meta]
            if missing:
                raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
        return network

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load the tokenizer and the text encoder, as a pair."""
        import transformers

        options: dict[str, Any] = {"revision": self.model.revision}
        with self.loading("tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.source, subfolder="tokenizer", **options
            )
        with self.loading("text_encoder"):
            kind: Any = getattr(transformers, self.text_encoder)
            encoder = kind.from_pretrained(self.source, subfolder="text_encoder", dtype=dtype, **options)
        return tokenizer, encoder.to(device).eval().requires_grad_(False)

    def _class_name(self, component: str) -> str:
        return (self.read_config(component) or {})["_class_name"]


TINY = "tiny:"


def locate(checkpoint: str) -> Path | str:
    """Return the path of a local checkpoint or of `tiny:NAME` (ships with inlaid), or the Hub ID unchanged.

    Raises:
        ValueError: if `checkpoint` is neither a folder in diffusers layout nor a possible Hub ID.
    """
    if checkpoint.startswith(TINY):
        from inlaid import tiny

        return tiny.path(checkpoint.removeprefix(TINY))
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model.checkpoint: {path} is not a diffusers folder (it has no model_index.json)"
            )
        return path
    if path.is_file() or checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise ValueError(
            f"model.checkpoint: `{checkpoint}` is neither a folder in diffusers layout nor a Hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return checkpoint
