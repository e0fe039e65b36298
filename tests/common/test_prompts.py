"""The texts against those that the reference's data preparation and demonstration server produced."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vila_m3_common import prompts

OPENING_ENDS = {
    "cxr": "This is a CXR image.\n",
    "vista3d": "This is a CT image.\n",
    "brats": "These are different MRI modalities.\n",
}


@pytest.fixture(scope="module")
def cards(shared: Path) -> str:
    benchmarks = json.loads((shared / "golden/data_eval/benchmarks.json").read_text())
    return benchmarks["model_list_texts"]["training_and_report"]


@pytest.fixture(scope="module")
def glue(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/experts/glue/glue.json").read_text())


@pytest.fixture(scope="module")
def cxr_text(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/experts/cxr/expert_text.json").read_text())


def recorded(shared: Path, expert: str) -> Iterator[tuple[dict[str, Any], list[str], str]]:
    """Yield (entry, its texts, the question) of every recorded training conversation that shows the model cards."""
    folder = shared / "golden/data_eval/1_data_preparation/experts" / expert / "output"
    for path in [*folder.glob("*_train.json"), *folder.glob("*_test.json")]:
        for entry in json.loads(path.read_text()):
            texts = [turn["value"] for turn in entry["conversations"]]
            if OPENING_ENDS[expert] in texts[0]:
                yield entry, texts, texts[0].split(OPENING_ENDS[expert], 1)[1]


def test_every_recorded_expert_conversation_is_read(shared: Path) -> None:
    counts = {expert: len(list(recorded(shared, expert))) for expert in OPENING_ENDS}
    assert counts == {"cxr": 9, "vista3d": 30, "brats": 12}


def test_trained_cxr_conversations_are_reproduced(shared: Path, cards: str) -> None:
    predictions = shared / "golden/data_eval/1_data_preparation/experts/cxr/input/pred"
    for entry, texts, question in recorded(shared, "cxr"):
        scores = json.loads((predictions / f"{entry['image']}.json").read_text())
        assert texts[0] == prompts.opening("CXR", question, cards)
        assert texts[1] == prompts.trigger_reply("CXR")
        assert texts[2] == prompts.cxr_feedback(scores, question, "trained")


def test_trained_mri_conversations_are_reproduced(shared: Path, cards: str) -> None:
    for _, texts, question in recorded(shared, "brats"):
        is_report = texts[1] == prompts.BRATS_REPORT
        assert texts[0] == prompts.opening("MRI", question, cards)
        assert is_report or texts[1] == prompts.trigger_reply("MRI")
        assert texts[2] == prompts.brats_feedback((1, 2, 4), {1: "red", 2: "blue", 4: "yellow"}, question, "trained")
        assert not is_report or texts[3] == prompts.BRATS_REPORTED


def test_trained_ct_conversations_are_reproduced(shared: Path, cards: str) -> None:
    for _, texts, question in recorded(shared, "vista3d"):
        argument = texts[1].split("<VISTA3D(")[1].split(")>")[0]
        assert texts[0] == prompts.opening("CT", question, cards)
        if len(texts) == 2:
            verb, structures = texts[1].removeprefix("I ").split(" using ")[0].split(" ", 1)
            report = prompts.ct_report(verb, structures, argument)
            assert texts[1] in (report, report.removesuffix("."))  # recorded with and without the final stop
            continue
        assert texts[1] == prompts.trigger_reply("CT", argument)
        # The made-up golden data names the structure before the colour.
        described = texts[2].split("describe ")[1].split(". Use")[0]
        pairs = [tuple(pair.split(": ")) for pair in described.split(", ")]
        assert texts[2] == prompts.ct_feedback(pairs, question, "trained")


def test_served_ct_texts_are_reproduced(glue: dict[str, Any]) -> None:
    names = {int(label): name for label, name in glue["label_id_to_name"].items() if name}
    cases = [case for case in glue["ct"].values() if isinstance(case, dict) and "text_all_groups" in case]
    assert len(cases) == 13
    for case in cases:
        pairs = [(color, names[int(label)]) for label, color in case["colormap"].items() if int(label) in names]
        expected = case["text_all_groups"] + "Use this result to respond to this prompt:\nWhat is it?"
        assert prompts.ct_feedback(pairs, "What is it?", "served") == expected


def test_served_brats_texts_name_only_the_colours_that_are_there(glue: dict[str, Any]) -> None:
    for key, case in glue["mri"]["brats_text_by_labels_present"].items():
        labels = [int(label) for label in key.split(",") if label]
        colors = dict(zip(labels, ("red", "blue", "yellow"), strict=False))
        expected = case["text"] + "Use this result to respond to this prompt:\nWhich grade?"
        assert prompts.brats_feedback(labels, colors, "Which grade?", "served") == expected


def test_trained_brats_text_falls_back_to_the_served_regions_when_a_label_is_missing() -> None:
    text = prompts.brats_feedback([2, 4], {2: "red", 4: "blue"}, "Which grade?", "trained")
    assert text == (
        "The results are <image>. The colors in this image describe\n"
        "only blue: enhancing tumor, all colors: whole tumor\n"
        "Use this result to respond to this prompt:\nWhich grade?."
    )


def test_served_cxr_texts_are_reproduced(cxr_text: dict[str, Any]) -> None:
    cases = [(run["averaged"], run["text"]) for run in cxr_text["runs"].values()]
    cases += [(case["predictions"], case["text"]) for case in cxr_text["format_made_up"]]
    assert len(cases) == 8
    for predictions, text in cases:
        scores = {finding: float(score) for finding, score in predictions.items()}
        expected = text + "Use this result to respond to this prompt:\nIs there an effusion?"
        assert prompts.cxr_feedback(scores, "Is there an effusion?", "served") == expected


def test_the_trained_order_is_that_in_which_the_ensemble_first_sees_a_finding(
    shared: Path, cxr_text: dict[str, Any]
) -> None:
    benchmarks = json.loads((shared / "golden/data_eval/benchmarks.json").read_text())
    ensemble = benchmarks["expert_results_text"]["ensemble"]
    seen: list[str] = []
    for model in ensemble["all_models"]:
        for finding in cxr_text["valid_labels_model"][model]:
            votes = model in ensemble["models_per_class"].get(finding, [model])
            if finding and votes and finding not in seen:
                seen.append(finding)
    assert tuple(seen) == prompts.CXR_TRAINED_ORDER


def test_a_mean_of_exactly_one_half_is_no_when_trained_and_yes_when_served() -> None:
    assert "edema: no\n" in prompts.cxr_feedback({"Edema": 0.5}, "?", "trained")
    assert "edema: yes\n" in prompts.cxr_feedback({"Edema": 0.5}, "?", "served")


def test_an_uncertain_finding_is_called_so_only_where_it_is_named() -> None:
    scores = {"Edema": 0.9, "Mass": 0.1}
    text = prompts.cxr_feedback(scores, "?", "trained", uncertain=["Edema", "Hernia"])
    assert text.startswith("The resulting predictions are:\nedema: uncertain\nmass: no\n.")
    assert "uncertain" not in prompts.cxr_feedback(scores, "?", "trained")


def test_the_served_openings_have_no_space_before_the_image() -> None:
    assert prompts.opening("CT", "Q", "cards\n", "served") == "cards\n<image>This is a CT image.\nQ"
    assert prompts.opening("CXR", "Q", "cards\n", "served") == "cards\n<image>This is a CXR image.\nQ"


def test_an_expert_without_a_bundle_is_answered_with_the_ones_there_are() -> None:
    assert prompts.not_available("VISTA2D", ["CXR", "BRATS"]) == (
        "The expert VISTA2D is not available. Available experts: CXR, BRATS."
    )
    assert prompts.not_available("VISTA2D", []).endswith("Available experts: none.")


LIVER = {
    "name": "liver",
    "volume_ml": 1520.25,
    "component_count": 1,
    "longest_diameter_mm": 189.3,
    "perpendicular_diameter_mm": 150.0,
    "mean_hu": 102.4,
    "side": "both",
}
LESIONS = {**LIVER, "name": "hepatic tumor", "volume_ml": 8.1, "component_count": 3, "side": "right"}


@pytest.mark.parametrize("variant", ["trained", "served"])
def test_measurements_stand_before_the_instruction_the_largest_structure_first(variant: prompts.Variant) -> None:
    question = "Use this result to respond to this prompt:\nIs it large?"
    text = prompts.ct_feedback([("red", "liver")], question, variant)
    head, ending = text[: text.index("Use this")], text[text.index("Use this") :]
    assert prompts.add_measurements(text, [LESIONS, LIVER], question) == (
        f"{head}Measurements: liver, 1520.25 mL, longest 189.3 x 150 mm, mean 102.4 HU, both sides; "
        f"hepatic tumor, 8.1 mL, 3 separate parts, longest 189.3 x 150 mm, mean 102.4 HU, right side. {ending}"
    )


def test_many_structures_are_told_by_the_largest() -> None:
    text = prompts.ct_feedback([("red", "liver")], "?", "trained")
    told = prompts.add_measurements(text, [{**LESIONS, "volume_ml": float(size)} for size in range(1, 31)], "?")
    assert told.count(" mL") == prompts.MAX_MEASURED_STRUCTURES
    assert "hepatic tumor, 30 mL" in told
    assert "; and 18 smaller structures. Use this result" in told


def test_without_measurements_the_text_stays_as_trained() -> None:
    text = prompts.brats_feedback([], {}, "?", "trained")
    assert prompts.add_measurements(text, [], "?") == text


def test_an_expert_may_measure_less() -> None:
    text = prompts.ct_feedback([("red", "spleen")], "?", "trained")
    assert "Measurements: spleen, 90 mL. Use" in prompts.add_measurements(
        text, [{"name": "spleen", "volume_ml": 90}], "?"
    )
