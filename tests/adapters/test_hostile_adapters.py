"""Hostile adapters: values, headers and files that no trainer writes end in one sentence."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inlaid import config
from inlaid.adapters.importing import import_adapter
from inlaid.adapters.inspect import describe, inspect_path
from inlaid.adapters.read import read_adapter
from inlaid.families.wan import Wan
from support.layouts import ALL, WAN, spell, trained
from support.slow import mostly_slow

KEY = "lora_adapter_metadata"


@pytest.fixture
def tensors(base) -> dict[str, torch.Tensor]:
    return spell(trained(base)[1], "diffusers")


def written(path: Path, tensors: dict[str, torch.Tensor], values: Any) -> Path:
    text = values if isinstance(values, str) else json.dumps(values)
    save_file(tensors, path / "a.safetensors", metadata={KEY: text})
    return path / "a.safetensors"


VALUES: dict[str, tuple[Any, str]] = {
    "alpha nan": ({"lora_alpha": math.nan}, "alpha of `lora_alpha` is nan"),
    "alpha infinite": ({"lora_alpha": math.inf}, "alpha of `lora_alpha` is inf"),
    "alpha zero": ({"lora_alpha": 0}, "is 0, it must be a finite number"),
    "alpha true": ({"lora_alpha": True}, "is True"),
    "alpha of many digits": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha huge": ({"lora_alpha": 1e300}, "is 1e+300, it must be"),
    "alpha a list": ({"lora_alpha": [1]}, "lora_alpha"),
    "pattern nan": ({"lora_alpha": 4, "alpha_pattern": {"to_q": math.nan}}, "alpha of `to_q` is nan"),
    "pattern a list": ({"lora_alpha": 4, "alpha_pattern": [1]}, "`alpha_pattern` is list"),
    "pattern invalid": ({"lora_alpha": 4, "alpha_pattern": {"to_(": 1}}, "is not a regular expression"),
    "pattern slow": ({"lora_alpha": 4, "alpha_pattern": {"(b+)+$": 1}}, "repeats a group"),
    "pattern slower": ({"lora_alpha": 4, "alpha_pattern": {".*.*.*.*.*x": 1}}, "repeats a group"),
    "type a number": ({"peft_type": 7}, "`peft_type` is int"),
    "dora a word": ({"use_dora": "no"}, "`use_dora` is str"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules"),
    "not a mapping": ([1], "found list"),
    "no JSON": ("{", "line 1, column 2"),
    "deep": ("[" * 3000, "is nested 3000 levels deep"),
    "deeper": ('{"a":' * 200_000, "nested"),
    "twice": ('{"r": 4, "r": 8}', "has the key `r` twice"),
}


ALIKE = ("alpha infinite", "alpha zero", "alpha huge", "pattern slower")


@pytest.mark.parametrize("name", mostly_slow(VALUES, lambda name: name not in ALIKE))
def test_configurations(tensors, tmp_path, name):
    values, says = VALUES[name]
    path = written(tmp_path, tensors, values)
    start = time.process_time()
    for call in (lambda: read_adapter(path, WAN), lambda: import_adapter(path, tmp_path / "out", "wan")):
        with pytest.raises(ValueError) as error:
            call()
        assert says in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()
    assert time.process_time() - start < 4


def test_null_is_no_value(tensors, tmp_path):
    empty = {"lora_alpha": None, "alpha_pattern": None, "target_modules": None, "use_dora": None}
    assert read_adapter(written(tmp_path, tensors, empty), WAN).alpha_from == "rank"


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e20])
def test_values_of_tensors(tensors, tmp_path, value):
    key = next(k for k in tensors if "lora_B" in k)
    other = key.replace("lora_B", "lora_A")
    path = written(
        tmp_path, tensors | {key: tensors[key] * 0 + value, other: tensors[other] * 0 + value}, {"r": 4}
    )
    with pytest.raises(ValueError, match=r"not finite numbers|overflows"):
        import_adapter(path, tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_no_folder(tensors, tmp_path, monkeypatch):
    from inlaid.adapters import write

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("differs")

    monkeypatch.setattr(write, "_verify", fail)
    path = written(tmp_path, tensors, {"r": 4, "lora_alpha": 4})
    for there in (False, True):
        if there:
            (tmp_path / "out").mkdir()
        with pytest.raises(AssertionError):
            import_adapter(path, tmp_path / "out", "wan")
        assert (tmp_path / "out").exists() == there and not any(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "shape", [{"A": (4, 0)}, {"B": (0, 4)}, {"A": ()}, {"A": (4,)}, {"alpha": (100_000,)}, {"A": (4, 24, 1)}]
)
def test_shapes(tensors, tmp_path, shape):
    (part, size), layer = next(iter(shape.items())), f"transformer.{ALL[0]}"
    key = f"{layer}.alpha" if part == "alpha" else f"{layer}.lora_{part}.weight"
    path = written(tmp_path, tensors | {key: torch.ones(size)}, {"r": 4})
    with pytest.raises(ValueError, match=r"a\.safetensors") as error:
        read_adapter(path, WAN)
    assert len(str(error.value)) < 1000
    describe(inspect_path(path))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bfloat16]
)
def test_types_of_tensors(tensors, tmp_path, dtype):
    path = written(tmp_path, {k: v.to(dtype) for k, v in tensors.items()}, {"r": 4, "lora_alpha": 4})
    try:
        read_adapter(path, WAN)
        describe(inspect_path(path))
    except ValueError as error:
        assert str(path) in str(error)


HEADERS = {
    "promises terabytes": struct.pack("<Q", 2**60) + b"{" + b" " * 100,
    "promises the file": struct.pack("<Q", 100) + b"{" + b" " * 99,
    "deep": struct.pack("<Q", 40_000) + b'{"a":' * 8000 + b" " * 1000,
    "offsets beyond": b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "no types": b'{"a":7}',
    "list": b"{[[[",
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path, name):
    raw = HEADERS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 16 if raw[:1] == b"{" else raw)
    for call in (lambda: read_adapter(path, WAN), lambda: inspect_path(path)):
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            call()


def test_names_that_control_the_terminal(tmp_path):
    nasty = "x\x1b[31m\x07.lora_A.weight"
    save_file({nasty: torch.ones(4, 8)}, tmp_path / "a.safetensors", metadata={"note": "\x1b[2J\x9b1m"})
    text = describe(inspect_path(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError) as error:
        read_adapter(tmp_path / "a.safetensors", WAN)
    for shown in (text,):
        assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in shown)
    from inlaid.text import printable

    assert "\x1b" not in printable(error.value)
    save_file({"y" * 5000: torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError) as error:
        read_adapter(tmp_path / "b.safetensors", WAN)
    assert len(str(error.value)) < 600


def test_pickles_and_bombs(tmp_path):
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a tensor has 4 TB"):
        read_adapter(tmp_path / "a.pt", WAN)
    deep: Any = torch.zeros(1)
    for _ in range(300):
        deep = [deep]
    torch.save(deep, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt"):
        read_adapter(tmp_path / "b.pt", WAN)


def test_an_unknown_class_is_not_a_broken_download(checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint("wan", "t2v"), tmp_path / "c")
    for component in ("transformer", "vae"):
        file = folder / component / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "FutureModel\x1b"}))
    try:
        family = Wan(config.Model(family="wan", checkpoint=str(folder)))
    except ValueError as error:  # the family may already know that it is no Wan
        assert "download" not in str(error)
        return
    for load in (lambda: family.load_denoiser(torch.float32), lambda: family.load("vae", torch.float32)):
        with pytest.raises(ValueError, match="does not have: update diffusers") as caught:
            load()
        assert "download" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_models_and_checkpoints_in_inspect(tmp_path):
    for name, text in {"config.json": '["a"]', "state.json": "[" * 3000, "model_index.json": "7"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            inspect_path(folder)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "config.json").write_text('{"rgba_vae_id": 1, "parts": ["x"]}')
    with pytest.raises(ValueError, match="unknown parts"):
        inspect_path(tmp_path / "v")
