"""Running one expert bundle by itself: ``python -m monai.bundle run --config_file .../inference.json``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, exits_with_message
from .expert import ExpertRequest, ExpertResult, ModelCard
from .hooks import quiet
from .study import Study, open_study, render_images


@exits_with_message
def run_expert(
    image: str | Sequence[str] | None,
    argument: str,
    output_dir: str,
    slice_index: int | None,
    axis: int,
    model_card: ModelCard,
    expert_request: Callable[[ExpertRequest], Mapping[str, Any]],
    expert_feedback: Callable[[Mapping[str, Any]], ExpertResult],
    dataset: Any,
    evaluator: Any,
) -> None:
    """Run an expert on one image and write label map, overlay and ``result.json``.

    With ``image`` None the evaluator runs over whatever data the dataset holds; this is how the
    composite and other MONAI applications feed items.

    Args:
        image: file, folder, or list of files; see :func:`vila_m3_common.study.open_study`.
        argument: what the trigger's brackets would hold.
        output_dir: folder for the results; created when missing.
        slice_index: slice of the overlay; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.
        model_card: the bundle's hook.
        expert_request: the bundle's hook.
        expert_feedback: the bundle's hook.
        dataset: the bundle's inference dataset; its data is replaced by the one item.
        evaluator: the bundle's evaluator.
    """
    if image is None:
        evaluator.run()
        return
    message = model_card.unknown_argument_message(argument)
    if message:
        raise UserError(message)
    study = open_study(image, model_card.study_modality or None)
    folder = make_output_dir(output_dir)
    request = request_for(study, argument, slice_index, axis, folder, model_card.name.lower())
    with quiet():
        dataset.data[0] = {**expert_request(request), "request": request.to_json()}
        evaluator.run()
    result = expert_feedback({**evaluator.state.batch[0], **evaluator.state.output[0]})
    record = {"text": result.text, **result.to_record()}
    (folder / "result.json").write_text(json.dumps(record, indent=2))
    print(result.text)
    for note in result.notes:
        print(f"note: {note}")
    print(f"written to {folder}")


def request_for(
    study: Study, argument: str, slice_index: int | None, axis: int, folder: Path, stem: str, question: str = ""
) -> ExpertRequest:
    """Make the request for a study; checks the slice."""
    _, index = render_images(study, slice_index, axis)
    paths = tuple(str(path.resolve()) for path in study.paths)
    return ExpertRequest(paths, argument, index, axis, question, str(folder), stem)


def make_output_dir(output_dir: str | Path) -> Path:
    """Create a folder for results; several processes may ask for the same one at the same time.

    Raises:
        UserError: if it cannot be created or written.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}); give another --output_dir"
        ) from error
    return folder.resolve()
