from pathlib import Path

import numpy as np
import pytest

from vila_m3_common.expert import ExpertRequest, ExpertResult, ModelCard

CARD = ModelCard("VISTA3D", "CT", "segmentation", "segments", "0.8", ("everything", "hepatic tumor", "organs"))


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [((), "None"), (("a",), "'a'"), (("a", "b"), "'a', or 'b'"), (("a", "b", "c"), "'a', 'b', or 'c'")],
)
def test_the_card_lists_its_arguments(arguments: tuple[str, ...], listed: str) -> None:
    card = ModelCard("X", "CT", "segmentation", "o", "a", arguments)
    assert card.render() == (
        f"<X(args)> Modality: CT, Task: segmentation, Overview: o, Accuracy: a, Valid args are: {listed}"
    )


def test_a_card_is_read_from_json() -> None:
    config = {"name": "X", "modality": "CT", "task": "t", "overview": "o", "accuracy": "a", "valid_args": ["b"]}
    assert ModelCard.from_config(config).valid_args == ("b",)


def test_valid_and_empty_arguments_pass() -> None:
    assert CARD.unknown_argument_message("organs") is None
    assert CARD.unknown_argument_message("") is None


def test_other_words_for_an_argument_pass_and_do_not_change_the_card() -> None:
    card = ModelCard("VISTA3D", "CT", "s", "o", "a", ("hepatic tumor",), synonyms={"hepatoma": "hepatic tumor"})
    assert card.unknown_argument_message("Hepatoma") is None
    assert "hepatoma" not in card.render()
    assert card.unknown_argument_message("hepatomas") == ("unknown VISTA3D argument 'hepatomas'; Valid: hepatic tumor")


def test_an_unknown_argument_is_explained() -> None:
    assert CARD.unknown_argument_message("hepatic tumour") == (
        "unknown VISTA3D argument 'hepatic tumour'; did you mean 'hepatic tumor'? "
        "Valid: everything, hepatic tumor, organs"
    )
    assert ModelCard("BRATS", "MRI", "s", "o", "a").unknown_argument_message("x") == (
        "BRATS takes no argument, but was given 'x'; write <BRATS()>"
    )


def test_a_request_survives_as_one_string() -> None:
    request = ExpertRequest(
        ("a b.nii", "$x.nii"), "$argument", 3, 1, "Is 1.5 > 1?\n", "/tmp", "t1", {"points": [[1, 2, 3]]}
    )
    assert ExpertRequest.from_json(request.to_json()) == request
    assert request.file("_labels.nii.gz") == Path("/tmp/t1_labels.nii.gz")


def test_a_record_holds_file_names_and_no_pixels() -> None:
    result = ExpertResult("text", (np.zeros((2, 2, 3), np.uint8),), overlay_path=Path("/tmp/x/o.png"), notes=["n"])
    assert result.to_record() == {
        "overlay": "o.png",
        "label_map": None,
        "legend": {},
        "measurements": [],
        "scores": {},
        "notes": ["n"],
        "is_error": False,
    }
