import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vila_m3_common.expert import ExpertRequest, ExpertResult, ModelCard
from vila_m3_common.standalone import make_output_dir, run_expert

CARD = ModelCard("TOY", "CT", "segmentation", "o", "a", ("organs",), study_modality="CT")


class FakeBundle:
    """A dataset and an evaluator that note what they are given."""

    def __init__(self) -> None:
        self.dataset = SimpleNamespace(data=[{}])
        self.evaluator = SimpleNamespace(state=SimpleNamespace(batch=None, output=None), run=self.run)
        self.run_count = 0

    def run(self) -> None:
        self.run_count += 1
        self.evaluator.state.batch, self.evaluator.state.output = [self.dataset.data[0]], [{"pred": 5}]

    def feedback(self, output: Mapping[str, Any]) -> ExpertResult:
        request = ExpertRequest.from_json(output["request"])
        return ExpertResult(f"slice {request.slice_index}, pred {output['pred']}", notes=["a note"])

    def start(self, image: str | None, argument: str = "", output_dir: str = ".", **options: Any) -> None:
        options = {"slice_index": None, "axis": 2, **options}
        run_expert(
            image=image,
            argument=argument,
            output_dir=output_dir,
            model_card=CARD,
            expert_request=lambda request: {"image": request.image_paths[0]},
            expert_feedback=self.feedback,
            dataset=self.dataset,
            evaluator=self.evaluator,
            **options,
        )


def test_one_image_gives_text_and_record(ct_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FakeBundle().start(str(ct_file), output_dir=str(tmp_path / "out"), slice_index=9)
    assert capsys.readouterr().out == f"slice 9, pred 5\nnote: a note\nwritten to {tmp_path / 'out'}\n"
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert (record["text"], record["notes"], record["is_error"]) == ("slice 9, pred 5", ["a note"], False)


def test_without_an_image_the_dataset_is_run_as_it_is() -> None:
    bundle = FakeBundle()
    bundle.start(None)
    assert bundle.run_count == 1
    assert bundle.dataset.data == [{}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"argument": "organ"}, r"error: unknown TOY argument 'organ'; did you mean 'organs'\? Valid: organs"),
        ({"slice_index": 99}, r"error: slice_index 99 is out of range; the axial slices of this volume are 0..55"),
        ({"axis": 4}, r"error: axis 4 does not exist"),
    ],
)
def test_bad_options_end_with_one_line(options: dict[str, Any], message: str, ct_file: Path, tmp_path: Path) -> None:
    bundle = FakeBundle()
    with pytest.raises(SystemExit, match=message):
        bundle.start(str(ct_file), output_dir=str(tmp_path), **options)
    assert bundle.run_count == 0


def test_an_image_of_another_modality_ends_with_one_line(cxr_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: cxr.png is 2-D; CT is read as a volume"):
        FakeBundle().start(str(cxr_file), output_dir=str(tmp_path))


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"output folder .*file/out cannot be written \(.*\); give another --output_dir"
    ):
        make_output_dir(tmp_path / "file/out")


def test_an_output_folder_asked_for_by_several_at_once_is_given_to_all(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: make_output_dir(tmp_path / "out"), range(400)))
    assert folders == {tmp_path.resolve() / "out"}
    assert not list((tmp_path / "out").iterdir())
