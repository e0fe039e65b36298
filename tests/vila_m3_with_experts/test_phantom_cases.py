"""The whole system on 30 phantoms of each modality, asked in wordings that training never saw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_m3_composite.evaluation import run_evaluation

# Ninety conversations with the experts take minutes, more of them on a busy machine.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def metrics(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    composite = {
        "bundle_root": str(repository / "bundles/vila_m3_with_experts"),
        "vlm_bundle": "vila_m3_bundle",
        "expert_bundles": ["expert_vista3d", "expert_brats", "expert_cxr"],
    }
    folder = tmp_path_factory.mktemp("evaluation")
    found = run_evaluation(30, 300000, str(folder), composite)
    assert json.loads((folder / "metrics.json").read_text()) == found
    assert len((folder / "cases.jsonl").read_text().splitlines()) == 90
    return found


@pytest.mark.parametrize("modality", ["CT", "MRI", "CXR"])
@pytest.mark.parametrize("figure", ["right_expert", "right_argument", "agreement"])
def test_at_least_95_percent(metrics: dict[str, Any], modality: str, figure: str) -> None:
    assert metrics[modality]["count"] == 30
    assert metrics[modality][figure] >= 0.95


def test_the_demo_prints_three_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, read_case: Callable[[Path], dict]
) -> None:
    from vila_m3_composite import demo

    monkeypatch.setattr("sys.argv", ["demo", "--output_dir", str(tmp_path)])
    demo.main()
    shown = capsys.readouterr().out
    for trigger in ("<VISTA3D(hepatic tumor)>", "<BRATS()>", "<CXR()>"):
        assert trigger in shown
    assert {path.parent.name for path in tmp_path.glob("*/report.html")} == {
        "phantom_ct",
        "phantom_mri",
        "phantom_cxr",
    }
