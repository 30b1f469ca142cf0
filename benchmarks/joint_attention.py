"""Measure the memory of attention for joint alpha: two exact calls against one call with a full mask.

    python benchmarks/joint_attention.py

Measures the growth of the peak resident set size beyond queries, keys and values, on the CPU in float32. Each
measurement runs in a separate process. Writes `results/joint-attention.json`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

HEADS, WIDTH, TEXT = 2, 64, 256
FULL = 44_776
"""Number of tokens of Mochi at 79x480x848: 2 x 22,260 of video and 256 of text."""
MEASURED = (FULL // 8, FULL // 4)
RESULTS = Path(__file__).parent / "results/joint-attention.json"


def mask_bytes(tokens: int, item: int = 1) -> int:
    """Return the bytes of a mask for one sample, shared by all heads."""
    return tokens * tokens * item


def measure(how: str, tokens: int) -> None:
    """Print the growth of the peak resident set size in bytes, and some output values."""
    import torch
    import torch.nn.functional as F

    from inlaid.networks import joint_attention

    tokens -= (tokens - TEXT) % 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(3))
    half = (tokens - TEXT) // 2
    F.scaled_dot_product_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64])  # load the kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if how == "split":
        out = joint_attention.attention(q, k, v, text=TEXT, first=False, rule="block")
    else:
        mask = torch.ones(tokens, tokens, dtype=torch.bool)
        mask[2 * half :, half : 2 * half] = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    numbers = [*out[0, 0, 0, :4].tolist(), *out[0, -1, -1, :4].tolist()]
    print(json.dumps({"bytes": grown, "numbers": numbers}))


def child(how: str, tokens: int) -> dict:
    command = [sys.executable, __file__, how, str(tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    rows = []
    for tokens in MEASURED:
        split, masked = child("split", tokens), child("mask", tokens)
        worst = max(abs(a - b) for a, b in zip(split["numbers"], masked["numbers"], strict=True))
        assert worst < 1e-5, "both must give the same result"
        row = {
            "tokens": tokens,
            "split_mib": round(split["bytes"] / 2**20, 1),
            "masked_mib": round(masked["bytes"] / 2**20, 1),
            "mask_alone_mib": round(mask_bytes(tokens) / 2**20, 1),
            "difference": worst,
        }
        rows.append(row)
        print(row)
    result = {
        "heads": HEADS,
        "width": WIDTH,
        "text": TEXT,
        "dtype": "float32",
        "measured": rows,
        "formula": {
            "tokens": FULL,
            "mask_gib": round(mask_bytes(FULL) / 2**30, 2),
            "mask_bfloat16_gib": round(mask_bytes(FULL, 2) / 2**30, 2),
            "split_gib": 0.0,
            "bias_rows_bfloat16_mib": round(TEXT * FULL * 2 / 2**20, 1),
        },
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(result["formula"])


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
