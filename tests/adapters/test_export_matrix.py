"""Every family, tuner and target: what `inlaid export` takes, and why it refuses the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inlaid import families
from inlaid.adapters.programs import ALIASES, PROGRAMS, canonical, loading, markdown, refusal, table, targets

TAKEN = {
    ("wan", "comfyui"): "lora dora lokr loha model",
    ("wan", "musubi"): "lora lokr loha model",
    ("wan", "diffsynth"): "lora model",
    ("wan", "wan-alpha"): "lora dora",
    ("mochi", "comfyui"): "lora dora lokr loha model",
    ("mochi", "genmo"): "lora model",
    ("mochi", "transpixeler"): "joint",
    ("cogvideox", "comfyui"): "lora dora lokr loha model",
    ("cogvideox", "transpixeler"): "joint",
    ("midi", "midi-3d"): "lora dora model",
    **{(family, "merged"): "lora dora lokr loha model" for family in families.names()},
    **{(family, "diffusers"): "lora dora lokr loha model joint" for family in families.names()},
}


@pytest.mark.parametrize("family", families.names())
def test_the_matrix(family: str) -> None:
    kind = families.get(family)
    for target in PROGRAMS:
        taken = TAKEN.get((family, target), "").split()
        for tuner in ("lora", "dora", "lokr", "loha"):
            reason = refusal(target, kind, tuner)
            assert (reason is None) == (tuner in taken), (target, tuner, reason)
            whole = refusal(target, kind, tuner, whole=True)
            assert (whole is None) == ("model" in taken), (target, tuner, whole)
            for sentence in filter(None, (reason, whole)):
                assert target in sentence and any(w in sentence for w in ("use `", "add --merge", "use ")), (
                    sentence
                )
        assert (refusal(target, kind, "full") is None) == ("model" in taken), target
        assert (refusal(target, kind, "lora", joint=True) is None) == ("joint" in taken), target
        assert refusal(target, kind, "lora", joint=True, whole=True) is not None
        assert (target in targets(kind)) == bool(taken)


@pytest.mark.parametrize(
    ("to", "tuner", "options", "words"),
    [
        ("comfyui", "lora", {"joint": True}, "applies an adapter to all tokens. "),
        ("kohya", "dora", {}, "kohya cannot represent DoRA (it ignores the magnitudes): add --merge"),
        ("diffsynth", "loha", {}, "diffsynth cannot represent LoHa (it ignores them): add --merge"),
        ("wan-alpha", "lokr", {}, "wan-alpha cannot represent LoKr (it reads DoRA only): use `merged`"),
        ("wan-alpha", "full", {}, "wan-alpha takes adapters only, not a whole model; use `merged`"),
        ("genmo", "lora", {}, "no genmo layout is known for Wan; use `diffusers`, `merged`, `comfyui`"),
    ],
)
def test_the_sentences(to: str, tuner: str, options: dict[str, Any], words: str) -> None:
    assert words in str(refusal(to, families.get("wan"), tuner, **options))


def test_checkpoints_that_a_program_does_not_run() -> None:
    from inlaid import config

    def asked(family: str, checkpoint: str, target: str, whole: bool, **model: Any) -> str:
        opened = families.get(family)(config.Model(family=family, checkpoint=checkpoint, **model))
        return str(refusal(target, opened, "lora", whole=whole, joint=target == "transpixeler"))

    assert "ComfyUI runs a CogVideoX model with one or the other" in asked(
        "cogvideox", "THUDM/CogVideoX-5b-I2V", "comfyui", True
    )
    assert asked("cogvideox", "THUDM/CogVideoX-5b-I2V", "comfyui", False) == "None"
    for checkpoint in ("THUDM/CogVideoX-2b", "THUDM/CogVideoX1.5-5B"):
        assert "TransPixeler runs CogVideoX-5B" in asked("cogvideox", checkpoint, "transpixeler", False)
    assert asked("cogvideox", "THUDM/CogVideoX-5b", "transpixeler", False) == "None"
    assert "Wan-Alpha runs Wan 2.1 text-to-video only" in asked(
        "wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan-alpha", False
    )


def test_the_table_is_complete_and_in_the_docs() -> None:
    rows = table()
    assert [row["target"] for row in rows] == list(PROGRAMS)
    for row in rows:
        assert row["program"] and row["lacks"] and (row["adapter"] or row["whole"])
        assert "{" not in row["adapter"] + row["whole"]
    page = Path(__file__).parents[2] / "docs/how-to/use-in-diffusers-and-comfyui.md"
    assert markdown() in page.read_text("utf-8")
    for target in (*PROGRAMS, *ALIASES):
        assert canonical(target) in PROGRAMS
    line = loading("kohya", Path("a/b.safetensors"), families.get("wan"), "lora", whole=False)
    assert line.startswith(
        "musubi-tuner and other programs with kohya's names: --lora_weight a/b.safetensors"
    )
    for family, kind in (("wan", "lokr"), ("midi", "lora")):
        line = loading("diffusers", Path("x"), families.get(family), kind, whole=False)
        assert 'load_lora_adapter("x", prefix="transformer", weight_name=' in line
    with pytest.raises(ValueError, match="--to: `onnx` is not one of diffusers, merged, comfyui, musubi"):
        canonical("onnx")
