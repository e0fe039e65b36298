import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vila_m3_common import prompts
from vila_m3_common.agent import Agent, Session
from vila_m3_common.conversation import Conversation
from vila_m3_common.expert import ExpertRequest, ExpertResult, ModelCard
from vila_m3_common.overlay import overlay_figure
from vila_m3_common.study import Study, open_study
from vila_m3_composite.app import console
from vila_m3_composite.outputs import CaseFolder, case_name

CARDS = "Cards:\nGive the model <NAME(args)> when selecting a suitable expert model.\n"


MEASURED = {
    "name": "liver",
    "label": 1,
    "volume_ml": 12.5,
    "component_count": 1,
    "longest_diameter_mm": 31.4,
    "perpendicular_diameter_mm": 22.6,
    "diameter_slice": 17,
    "largest_slice": 18,
    "slice_axis": "axial",
    "mean_hu": 61.2,
    "side": "right",
}


class Marker:
    """An expert that marks a square and measures it."""

    card = ModelCard("VISTA3D", "CT", "segmentation", "o", "a", ("organs",), "CT", "one CT")

    def run(self, request: ExpertRequest) -> ExpertResult:
        grey, labels = np.full((20, 20), 90, np.uint8), np.eye(20, dtype=np.int32)
        overlay_figure(grey, labels, {1: "red"}, {1: "liver"}, "organs").save(request.file("_overlay.png"))
        return ExpertResult(
            text=prompts.ct_feedback([("red", "liver")], request.question, "trained"),
            images=(np.zeros((20, 20, 3), np.uint8),),
            overlay_path=request.file("_overlay.png"),
            measurements=[MEASURED],
            notes=["liver is <largest> elsewhere"],
        )


def vlm(conversation: Conversation) -> Iterator[str]:
    expert_has_spoken = conversation.turns[-1].role == "expert"
    yield "the liver & more" if expert_has_spoken else "Let me trigger <VISTA3D(organs)>."


@pytest.fixture
def study(ct_file: Path) -> Study:
    return open_study(ct_file)


def make_case(study: Study, output: Path) -> Path:
    agent = Agent(vlm, {"VISTA3D": Marker()}, CARDS)
    with CaseFolder(output, study) as folder:
        session = Session(study, folder.working)
        agent.ask(session, "What <b>organs</b>?")
        return folder.finish(session, agent.cards)


def test_everything_of_a_case_is_written(study: Study, tmp_path: Path) -> None:
    folder = make_case(study, tmp_path)
    record = json.loads((folder / "conversation.json").read_text())
    assert folder == tmp_path / "ct"
    assert [turn["role"] for turn in record["turns"]] == ["user", "assistant", "expert", "assistant"]
    assert record["turns"][0]["text"] == " <image>This is a CT image.\nWhat <b>organs</b>?"
    assert record["turns"][0]["has_model_cards"]
    assert record["turns"][2]["expert"]["name"] == "VISTA3D"
    assert record["turns"][2]["expert"]["overlay"] == "01_vista3d_overlay.png"
    assert record["slice_index"] == 28
    assert record["turns"][2]["expert"]["measurements"] == [MEASURED]
    assert "Measurements" not in record["turns"][2]["text"]
    assert (folder / "answer.txt").read_text() == "the liver & more\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "01_vista3d_overlay.png",
        "answer.txt",
        "conversation.json",
        "report.html",
        "turn00_image1.png",
        "turn02_image1.png",
    ]


def test_the_report_is_one_page_that_shows_text_as_text(study: Study, tmp_path: Path) -> None:
    page = (make_case(study, tmp_path) / "report.html").read_text()
    assert "What &lt;b&gt;organs&lt;/b&gt;?" in page
    assert "the liver &amp; more" in page
    assert "liver is &lt;largest&gt; elsewhere" in page
    assert page.count("data:image/png;base64,") == 2
    for value in (12.5, 31.4, 22.6, 17, 61.2):
        assert f'<td class="number">{value}</td>' in page
    assert "<td>right</td>" in page
    assert "not for diagnosis" in page


def test_a_second_run_gets_a_folder_of_its_own(study: Study, tmp_path: Path) -> None:
    assert [make_case(study, tmp_path).name for _ in range(3)] == ["ct", "ct_2", "ct_3"]


def test_an_error_leaves_nothing_behind(study: Study, tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with CaseFolder(tmp_path / "new", study) as folder:
            (folder.working / "half.txt").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("<VISTA3D(everything)>.nii.gz", "VISTA3D_everything"),
        ("...", "case"),
        ("ähm scan.NII.GZ", "hm_scan"),
        ("a b;c.png", "a_b_c"),
    ],
)
def test_a_case_name_stays_in_the_output_folder(name: str, expected: str, tmp_path: Path) -> None:
    assert case_name(Study("CT", (tmp_path / name,), "user")) == expected


def test_the_console_shows_questions_without_the_cards(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    agent = Agent(vlm, {"VISTA3D": Marker()}, CARDS)
    session = Session(study, tmp_path)
    agent.ask(session, "What organs?", console(agent.cards))
    agent.ask(session, "And now?", console(agent.cards))
    shown = capsys.readouterr().out
    assert CARDS not in shown
    assert (
        "user: <image>This is a CT image.\nWhat organs?\nassistant: Let me trigger <VISTA3D(organs)>.\nexpert: "
        in shown
    )
    assert "expert (earlier result): The results are <image>." in shown
