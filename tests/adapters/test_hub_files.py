"""Files that `inlaid import` reads from the Hub: their size and license are printed before the download."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from inlaid import console
from inlaid.adapters.hub_files import local_source
from inlaid.adapters.importing import import_adapter
from inlaid.families import hub
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_published
from support.fake_hub import command, fake_hub
from support.rgba_vaes import made

REPOSITORY = {
    "VAE/Wan-Alpha-VAE.bin": 800_000_000,
    "VAE/Wan-Alpha-v2-VAE.bin": 810_000_000,
    "README.md": 900,
    "vae_rgb_channel.safetensors": 254_000_000,
    "vae_alpha_channel.safetensors": 254_000_000,
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A repository `some/one` whose files are downloaded to a folder; the names of the downloads."""
    import huggingface_hub

    state = SimpleNamespace(files=dict(REPOSITORY), license="apache-2.0", downloads=[])

    def repository(name: str, revision: str | None, probe: str) -> hub.Repository | hub.HubError:
        if name != "some/one":
            return hub.HubError(f"there is no `{name}` on the Hub")
        return hub.Repository("c", state.files, state.license)

    def download(name: str, file: str, **_: Any) -> str:
        path = tmp_path / "hub" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        state.downloads.append(file)
        return str(path)

    monkeypatch.setattr(hub, "_asked", repository)
    monkeypatch.setattr(hub, "free_space", lambda: 10**12)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(console, "_said", set())
    return state


def test_size_and_license_are_printed_before_the_download(
    served: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = local_source(Path("some/one/VAE/Wan-Alpha-VAE.bin"))
    assert path.name == "Wan-Alpha-VAE.bin" and served.downloads == ["VAE/Wan-Alpha-VAE.bin"]
    text = " ".join(capsys.readouterr().err.split())
    assert "downloading some/one/VAE/Wan-Alpha-VAE.bin: 0.8 GB, license apache-2.0 (http" in text
    served.license = ""
    local_source(Path("some/one/vae_rgb_channel.safetensors"))
    text = " ".join(capsys.readouterr().err.split())
    assert "vae_rgb_channel.safetensors: 0.3 GB, no license stated" in text
    assert served.downloads[1:] == ["vae_alpha_channel.safetensors", "vae_rgb_channel.safetensors"], (
        "both halves"
    )


def test_one_file_needs_no_name_and_several_are_listed(served: SimpleNamespace) -> None:
    with pytest.raises(
        ValueError, match=r"has 4 files of weights: name one of some/one/VAE/Wan-Alpha-VAE.bin"
    ):
        local_source(Path("some/one"))
    with pytest.raises(ValueError, match=r"has no file `VAE/v3.bin`: name one of .*v2-VAE.bin \(0.8 GB\)"):
        local_source(Path("some/one/VAE/v3.bin"))
    assert served.downloads == []
    served.files = {"lora.safetensors": 5_000_000, "README.md": 3}
    assert local_source(Path("some/one")).name == "lora.safetensors"
    served.files = {"README.md": 3}
    with pytest.raises(ValueError, match="no weights in this repository"):
        local_source(Path("some/one"))
    with pytest.raises(ValueError, match="there is no `other/one` on the Hub"):
        local_source(Path("other/one/decoder.bin"))


def test_local_paths_are_never_looked_up(
    served: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_asked", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/one").mkdir(parents=True)
    (tmp_path / "some/one/decoder.bin").touch()
    for name in (
        "some/one/decoder.bin",
        "some/one/none.bin",
        "x/none.safetensors",
        "none",
        "../a/b",
        "/a/b/c",
    ):
        assert local_source(Path(name)) == Path(name)


def test_what_is_missing_is_reported_before_the_download(served: SimpleNamespace, tmp_path: Path) -> None:
    for name in (
        "some/one/decoder.bin",
        "some/one/VAE/Wan-Alpha-v2-VAE.bin",
        "some/one/x_rgb_channel.safetensors",
    ):
        with pytest.raises(ValueError, match=r"an RGBA VAE, .* pass it with --checkpoint"):
            import_adapter(Path(name), tmp_path / "out", "wan")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/there").touch()
    with pytest.raises(ValueError, match="is not empty"):
        import_adapter(Path("some/one/decoder.bin"), tmp_path / "out", "wan", "tiny:wan")
    assert served.downloads == []


@pytest.mark.slow
def test_a_published_rgba_vae_is_one_command_away(tiny_wan: Path, tmp_path: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    source = made(vae, rank=3)
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(rgba_vae_published.whole_layout(source), folder / "Wan-Alpha-v2-VAE.bin")
    save_file({"pad": torch.zeros(10)}, folder / "other.safetensors")
    with fake_hub(folder) as served:
        environment = served.environment(tmp_path / "home")
        words: list[object] = [
            "import",
            "some/one/Wan-Alpha-v2-VAE.bin",
            tmp_path / "out",
            "--checkpoint",
            tiny_wan,
        ]
        done = command(words, environment, tmp_path)
        assert done.returncode == 0, done.stderr
        text = " ".join(done.stderr.split())
        size = (folder / "Wan-Alpha-v2-VAE.bin").stat().st_size / 1e6
        assert (
            f"downloading some/one/Wan-Alpha-v2-VAE.bin: {size:.1f} MB, license apache-2.0 ({served.url}"
            in text
        )
        assert "alpha.noise_shift is 0.05 by default" in text
        assert not [r for r in served.requests if r.startswith("GET") and "other.safetensors" in r]
        again = rgba_vae_checkpoint.load(tmp_path / "out", vae)
        assert all(
            torch.equal(a, b) for a, b in zip(source.rgb.parameters(), again.rgb.parameters(), strict=True)
        )
        facts = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
        assert facts["noise_shift"] == 0.05 and facts["imported"]["file"] == "Wan-Alpha-v2-VAE.bin"
        served.mode = "gated"
        done = command([*words[:2], tmp_path / "two", *words[3:]], environment, tmp_path)
        assert done.returncode == 0, "cached files need no Hub"
        words[1] = "some/one/other.safetensors"
        done = command([*words[:2], tmp_path / "three", *words[3:]], environment, tmp_path)
        assert done.returncode == 2 and "access to `other.safetensors` of some/one is denied" in done.stderr
        assert "Traceback" not in done.stderr
