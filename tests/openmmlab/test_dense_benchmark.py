"""The comparison with the frameworks' backbones runs, and its competitors compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import dense

NARROW = {"embed_dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "mlp_ratios": [2, 2, 2, 2]}
SMALL = {
    "swin": dense.Dense(
        "swin_tiny",
        {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        {
            name: ("SwinTransformer", {"embed_dims": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)})
            for name in ("mmdet", "mmseg")
        },
    ),
    "pvt_v2": dense.Dense(
        "pvt_v2_b2",
        {**NARROW, "patch_norm_eps": 1e-6, "sr_norm_eps": 1e-6},
        {
            "mmdet": (
                "PyramidVisionTransformerV2",
                {"embed_dims": 8, "num_layers": [1] * 4, "num_heads": [1, 2, 4, 8], "mlp_ratios": [2] * 4},
            )
        },
    ),
    "pcpvt": dense.Dense(
        "twins_pcpvt_small", {**NARROW, "norm_eps": 1e-5}, {"mmseg": ("PCPVT", {**dense.PCPVT, **NARROW})}
    ),
    "svt": dense.Dense(
        "twins_svt_small",
        {**NARROW, "norm_eps": 1e-5, "mask_padding": True},
        {"mmseg": ("SVT", {**dense.SVT, **NARROW})},
    ),
}


@pytest.mark.slow
def test_frameworks_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(dense, "MODELS", SMALL)
    out = tmp_path / "dense.json"
    assert (
        dense.main(["--sizes", "64x96", "--rounds", "1", "--warmup", "1", "--models", *SMALL, "--out", str(out)]) == 0
    )
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 2 * len(SMALL)
    for row in report["rows"]:
        frameworks = set(SMALL[row["model"]].frameworks)
        assert set(row["competitors"]) == {"hvt", "HVTBackbone", *frameworks}
        assert row["peer_best"] in frameworks
        assert row["missing"] == []
        assert all(entry["error_to_hvt"] < 1e-4 for entry in row["competitors"].values())
    assert report["machine"]["mmdet"]
    assert "left out" not in capsys.readouterr().out
