"""Every failure of the Hub is one sentence with the repository, the file and the way out, after seconds."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from inlaid.families import hub
from support.fake_hub import FakeHub, fake_hub, python
from support.slow import mostly_slow

FILES = {
    "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
    "transformer": [
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ],
    "text_encoder": ["config.json", "pytorch_model.bin"],
    "only_variant": ["config.json", "model.fp16.safetensors"],
    "tokenizer": ["spiece.model", "tokenizer_config.json"],
}


@pytest.fixture(scope="module")
def served(tiny_wan: Path) -> Iterator[FakeHub]:
    with fake_hub(tiny_wan) as made:
        yield made


ASK = """
import json, time
from inlaid.families import hub
assert hub.TIMEOUT == 5
hub.TIMEOUT = 0.6
start, out = time.perf_counter(), {}
try:
    out["folder"] = str(hub.fetch_component("some/one", None, "vae"))
except hub.HubError as error:
    out["error"] = str(error)
found = hub.availability("some/one", None, ["vae", "text_encoder", "transformer", "image_encoder"])
out |= {"text": found.text, "severity": found.severity, "seconds": time.perf_counter() - start}
print(json.dumps(out))
"""


def ask(served: FakeHub, home: Path, **more: str) -> dict:
    done = python(ASK, served.environment(home, **more))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


REFUSALS = {
    "missing": (["there is no `some/one` on the Hub", "check the name", "hf auth login"], "error"),
    "not found": (["there is no `some/one` on the Hub", "check the name"], "error"),
    "no revision": (["some/one has no revision", "model.revision"], "error"),
    "gated": (["access to `model_index.json` of some/one is denied", "accept its terms at"], "error"),
    "forbidden": (["access to some/one is denied", "hf auth login"], "error"),
    "broken": (["some/one cannot be downloaded", "answers with error 500", "run again"], "warning"),
    "busy": (["some/one cannot be downloaded", "answers with error 429", "run again"], "warning"),
    "hang": (["some/one cannot be downloaded", "does not answer (ReadTimeout)"], "warning"),
}


@pytest.mark.parametrize("mode", mostly_slow(REFUSALS, {"missing", "gated", "busy", "hang"}.__contains__))
def test_a_refusal_is_one_sentence_after_seconds(served: FakeHub, tmp_path: Path, mode: str) -> None:
    served.mode = mode
    words, severity = REFUSALS[mode]
    found = ask(served, tmp_path)
    for word in words:
        assert word in found["error"]
    assert "\n" not in found["error"]
    assert found["severity"] == severity
    assert found["seconds"] < 9, "requests of a second, and imports; huggingface_hub alone takes 34 s"


@pytest.mark.slow
def test_a_download_that_breaks_off_names_the_file(served: FakeHub, tmp_path: Path) -> None:
    served.mode = "cut"
    found = ask(served, tmp_path)
    assert "`vae/diffusion_pytorch_model.safetensors` of some/one cannot be downloaded" in found["error"]
    assert "stopped answering" in found["error"]
    served.mode = "ok"
    assert Path(ask(served, tmp_path)["folder"]).name == "vae", "the same command again goes on"


def test_sizes_are_reported_and_no_weights_are_downloaded(
    served: FakeHub, tmp_path: Path, tiny_wan: Path
) -> None:
    served.mode, served.requests[:] = "ok", []
    code = "from inlaid.families import hub\n"
    code += "print(hub.availability('some/one', None, ['vae', 'transformer']).text)"
    text = python(code, served.environment(tmp_path)).stdout
    size = sum(f.stat().st_size for part in ("vae", "transformer") for f in (tiny_wan / part).iterdir()) / 1e6
    assert text.startswith(f"some/one: reachable on the Hub, {size:.1f} MB to download (")
    assert not [r for r in served.requests if r.startswith("GET /some/one/resolve")]


@pytest.mark.slow
def test_cached_files_need_no_hub(served: FakeHub, tmp_path: Path, tiny_wan: Path) -> None:
    served.mode = "ok"
    code = "from inlaid.families import hub\nfor c in ('vae', 'text_encoder', 'transformer'): "
    code += "hub.fetch_component('some/one', None, c)\nhub.fetch('some/one', None, 'model_index.json')"
    assert python(code, served.environment(tmp_path)).returncode == 0
    for mode, more in (("broken", {}), ("ok", {"HF_HUB_OFFLINE": "1"})):
        served.mode = mode
        found = ask(served, tmp_path, **more)
        assert Path(found["folder"]).name == "vae"
        assert found["severity"] == "note"
        assert "all files are cached" in found["text"]
    code = "from inlaid.families import hub\nprint(hub.fetch('some/one', None, 'image_encoder/config.json'))"
    served.mode = "broken"
    assert python(code, served.environment(tmp_path)).stdout == "None\n", (
        "model_index.json lists no such part"
    )


def test_offline_without_a_cache_names_the_variable(served: FakeHub, tmp_path: Path) -> None:
    found = ask(served, tmp_path, HF_HUB_OFFLINE="1")
    assert "unset HF_HUB_OFFLINE" in found["error"]
    assert found["severity"] == "error"


def test_a_network_without_weights_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").touch()
    monkeypatch.setattr(hub, "cached", lambda *_: tmp_path / "model_index.json")
    for part, files in FILES.items():
        for file in files:
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / file).write_text(json.dumps({"weight_map": {"a": files[1]}}), "utf-8")
        assert hub._cached_component("some/one", None, part) == tmp_path / part
    for part in ("vae", "transformer", "text_encoder"):
        (tmp_path / part / FILES[part][1]).unlink()
        assert hub._cached_component("some/one", None, part) is None


def test_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    full = hub.explain(OSError(errno.ENOSPC, "No space left"), "some/one", None, "vae/model.safetensors")
    assert "no disk space for `vae/model.safetensors` of some/one" in str(full)
    assert "set HF_HOME" in str(full)
    denied = hub.explain(PermissionError(errno.EACCES, "denied"), "some/one", None, "x")
    assert "cannot be written" in str(denied)
    monkeypatch.setattr(hub, "free_space", lambda: 1_000_000_000)
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    sizes = {"vae/config.json": 100, "vae/model.safetensors": 30_000_000_000}
    monkeypatch.setattr(hub, "repository", lambda *_: hub.Repository("c", sizes))
    with pytest.raises(hub.HubError, match=r"some/one: 30.0 GB to download and 1.0 GB are free in .*HF_HOME"):
        hub.fetch_component("some/one", None, "vae")
    assert hub.availability("some/one", None, ["vae"]).severity == "error"


BESIDE = [
    "README.md",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
    "text_encoder_2/model.safetensors",
]


@pytest.mark.parametrize("part", FILES)
def test_one_format_of_weights_is_downloaded(part: str) -> None:
    names = sorted([*BESIDE, *(f"{p}/{f}" for p, files in FILES.items() for f in files)])
    assert hub.needed_files(names, part) == [f"{part}/{f}" for f in FILES[part]]
