"""Questions of a viewer: answer, trigger log, label map, conversations that go on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vila_m3_common.errors import UserError
from vila_m3_composite.viewer.asking import Asker
from vila_m3_composite.viewer.models import ViewerModels

FIRST, SECOND = "Is there a brain tumor?", "Segment any tumors in the image"


@pytest.fixture(scope="module")
def asker(models: ViewerModels) -> Iterator[Asker]:
    made = Asker(models)
    yield made
    made.close()


def test_a_conversation_goes_on_with_the_experts_result(asker: Asker, mri_4d_file: Path) -> None:
    first = asker.ask(str(mri_4d_file), {"question": FIRST, "slice_index": 20})
    assert first.params["answer"] == "yes"
    assert [call["trigger"] for call in first.params["triggers"]] == ["<BRATS()>"]
    assert first.params["study"] == {"modality": "MRI", "source": "sequences", "slice_index": 20, "axis": 2}
    assert first.label_map is not None
    assert first.label_map.is_file()
    assert set(first.params["label_names"].values()) <= {1, 2, 4}
    follow_up = {"question": SECOND, "history": first.params["history"], "slice_index": 20}
    second = asker.ask(str(mri_4d_file), follow_up)
    assert second.params["answer"] == "All tumors were segmented"
    assert [call["is_reused"] for call in second.params["triggers"]] == [True]
    assert second.label_map == first.label_map
    assert [message["content"] for message in second.params["history"]][::2] == [FIRST, SECOND]
    assert not any("was not kept" in note for note in second.params["notes"])
    again = asker.ask(str(mri_4d_file), follow_up)
    assert again.params["answer"] == second.params["answer"], "one point of a conversation can be continued twice"


def test_an_unknown_history_is_read_and_said_to_be_forgotten(asker: Asker, cxr_file: Path) -> None:
    told = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<CXR()> never ran"}]
    answered = asker.ask(str(cxr_file), {"question": "Is there a pleural effusion?", "history": told})
    assert answered.label_map is None
    assert any("was not kept" in note for note in answered.params["notes"])
    assert all(turn["role"] != "expert" or turn["expert"]["name"] == "CXR" for turn in answered.params["turns"])


def test_a_slice_index_of_another_image_is_refused(asker: Asker, cxr_file: Path) -> None:
    with pytest.raises(UserError, match="slice_index 3 was given for a 2-D image"):
        asker.ask(str(cxr_file), {"question": "What?", "slice_index": 3})


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({}, "the last message has no text"),
        ({"question": "<image>"}, "the last message has no text"),
        ({"question": 7}, "question cannot be read; question is a text"),
        ({"question": "What?", "history": [{"role": "nurse", "content": "x"}]}, "history.0.role cannot be read"),
        ({"question": "What?", "axis": 5}, "axis is 5"),
        ({"question": "x" * 20_000}, "allowed are 16000"),
    ],
)
def test_questions_that_cannot_be_asked(asker: Asker, cxr_file: Path, params: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        asker.ask(str(cxr_file), params)
