"""MONAI Label's tasks around what the other modules of this package do; the only one that imports MONAI Label."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random

from vila_m3_common.default_hooks import DefaultHooks
from vila_m3_common.errors import find_user_error, near_match_hint
from vista3d_expert.labels import argument_ids, label_table

from .asking import Asker
from .label_maps import load_labels, on_grid, read_names, read_segment_names, write_label_map
from .models import ViewerModels
from .running import Wish, describe_result, describe_scores, run_on
from .scoring import dice_by_name, most_uncertain, uncertainty
from .settings import ViewerSettings
from .training import LabelledCase, TrainOptions, can_be_trained, read_stats, train
from .workarounds import is_readable, keep_going, on_one_device

logger = logging.getLogger(__name__)

# The expert that understands class and point prompts; OHIF shows its prompt panels for models of the type "vista3d".
PROMPTED_EXPERT = "VISTA3D"
# Slicer's plug-in lists models of the type "segmentation" only, so that expert is there a second time.
FOR_SLICER = "_segmentation"
VLM_TASK = "vila_m3"
UNCERTAINTY = "_uncertainty"


@contextmanager
def told_to_client() -> Iterator[None]:
    """Answer what a user can mend with status 400 and the reason; MONAI Label would answer 500 without one."""
    try:
        yield
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return what a user can mend about an error; any other error is raised again."""
    cause = find_user_error(error)
    if cause is None:
        raise error
    return str(cause)


def expert_labels(models: ViewerModels, name: str) -> dict[str, int]:
    """Return structure -> label of an expert, or finding -> number: of VISTA3D those that have a class prompt.

    Parents of other classes and what only points can mark are left out: a viewer would offer them for nothing.
    """
    expert = models.expert(name)
    if expert.card.name == PROMPTED_EXPERT:
        table = label_table()
        return {table.names[label]: label for label in table.promptable()}
    names = DefaultHooks(expert.metadata, expert.card).names
    is_segmentation = expert.card.task == "segmentation"
    return {label: number for number, label in names.items() if number > 0 or not is_segmentation}


class ExpertInfer(InferTask):
    """An expert as a model of MONAI Label.

    Args:
        models: of the app.
        name: of the expert.
        kind: type of the model, which viewers choose their panels by.
        config: options that viewers show.
    """

    def __init__(self, models: ViewerModels, name: str, kind: str, config: Mapping[str, Any]) -> None:
        card = models.expert(name).card
        description = f"{card.name}: {card.overview}. Reads {card.input_description or card.modality}. Research only."
        super().__init__(
            type=kind,
            labels=expert_labels(models, name),
            dimension=2 if card.task == "classification" else 3,
            description=description,
            config=dict(config),
        )
        self.models, self.name = models, name

    def is_valid(self) -> bool:
        """Return True: a bundle that cannot be opened ends the start of the app."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Run the expert; return the label map's file, None for scores, and what there is to tell."""
        with told_to_client(), tempfile.TemporaryDirectory() as folder:
            result = run_on(self.models, self.name, request["image"], Wish.from_params(request), Path(folder))
            if self.type == InferType.CLASSIFICATION:
                return None, describe_scores(result, self.labels)
            return written_for(request, result.label_map_path), describe_result(result, self.name)


class VlmInfer(InferTask):
    """The VLM with its experts as a model of MONAI Label.

    Args:
        models: of the app.
    """

    def __init__(self, models: ViewerModels) -> None:
        super().__init__(
            type=InferType.OTHERS,
            labels=[],
            dimension=3,
            description="VILA-M3 with experts: answers a question about the image. Research only.",
            config={"question": "", "modality": ["", "CT", "MRI", "CXR"]},
        )
        self.asker = Asker(models)

    def is_valid(self) -> bool:
        """Return True."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer a question; return the label map's file, where an expert made one, and answer and log."""
        with told_to_client():
            answered = self.asker.ask(request["image"], request)
            return written_for(request, answered.label_map), answered.params


def written_for(request: Mapping[str, Any], label_map: Path | None) -> str | None:
    """Write a label map in the format that a request wants; MONAI Label removes the file when it is sent."""
    if label_map is None:
        return None
    extension = str(request.get("result_extension") or ".nii.gz")
    return str(write_label_map(label_map, extension, bool(request.get("result_compress", True))))


class ExpertTrain(TrainTask):
    """Trains an expert on the labels of the tag ``final``.

    Args:
        models: of the app.
        name: of the expert.
    """

    def __init__(self, models: ViewerModels, name: str) -> None:
        super().__init__(f"Trains {name} on saved labels with the bundle's train.json")
        self.models, self.name = models, name

    def config(self) -> dict[str, Any]:
        """Return the options and their defaults."""
        return {
            "max_epochs": 5,
            "pretrained": True,
            "learning_rate": 0.0,
            "val_split": 0.2,
            "multi_gpu": False,
            "device": [self.models.device],
        }

    def stats(self) -> dict[str, Any]:
        """Return what the last training wrote."""
        return read_stats(self.models, self.name)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train; return the stats."""
        given = {**self.config(), **{key: value for key, value in request.items() if value is not None}}
        with told_to_client():
            if given["multi_gpu"] not in (False, "false"):
                raise HTTPException(400, "multi_gpu is true; this task trains on one device, see multi_gpu_train.json")
            options = TrainOptions(
                epochs=int(given["max_epochs"]),
                is_pretrained=bool(given["pretrained"]),
                learning_rate=float(given["learning_rate"]) or None,
                val_split=float(given["val_split"]),
            )
            cases = list(labelled_cases(datastore))
            stats = train(self.models, self.name, cases, expert_labels(self.models, self.name), options)
        for case, reason in stats["left_out"].items():
            print(f"left out {case}: {reason}", flush=True)
        return stats


def labelled_cases(datastore: Datastore) -> Iterator[LabelledCase]:
    """Yield the images with a label of the tag ``final``; a DICOMweb store fetches its DICOM SEGs for that."""
    files = {Path(entry["image"]).name: entry for entry in datastore.datalist()}
    for image, stored in sorted(datastore.json()["objects"].items()):
        entry = files.get(f"{image}{stored['image']['ext']}")
        if entry is None:
            continue
        label, info = Path(entry["label"]), stored["labels"][DefaultLabelTag.FINAL]["info"]
        # A fetched SEG lies beside the label map that it was turned into.
        names = read_names(info) or read_segment_names(label.parent / str(info.get("SeriesInstanceUID") or image))
        yield LabelledCase(image, Path(entry["image"]), label, names)


class UncertaintyScoring(ScoringMethod):
    """Says of each image without a final label how unsure an expert is; see :func:`.scoring.uncertainty`.

    Args:
        models: of the app.
        name: of the expert.
    """

    def __init__(self, models: ViewerModels, name: str) -> None:
        super().__init__(f"How much the label map of {name} changes with small changes of the image")
        self.models, self.name = models, name

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score images; ``max_samples`` bounds their number, ``variants`` is the number of changed copies of each."""
        result: dict[str, Any] = {}
        limit = int(request.get("max_samples") or 0)
        stamp = self.models.weights_stamp(self.name)
        for image in sorted(datastore.get_unlabeled_images()):
            rows = dict(datastore.get_image_info(image).get("uncertainty") or {})
            if rows.get(self.name, {}).get("weights") == stamp:
                continue
            if limit and len(result) >= limit:
                break
            row = self._score(datastore.get_image_uri(image), int(request.get("variants") or 2))
            result[image] = row
            datastore.update_image_info(image, {"uncertainty": {**rows, self.name: {**row, "weights": stamp}}})
        return result

    def _score(self, image: str, variants: int) -> dict[str, Any]:
        try:
            return {"score": round(uncertainty(self.models, self.name, image, variants), 4)}
        except Exception as error:
            return {"score": None, "reason": reason_of(error)}


class DiceScoring(ScoringMethod):
    """Compares the label that a user saved with the one that an expert made, structure by structure."""

    def __init__(self) -> None:
        super().__init__("Dice between the saved (final) and the expert's (original) label, by structure")

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score every image that has both; the mean goes into its info as ``dice``."""
        result: dict[str, Any] = {}
        for case in labelled_cases(datastore):
            if datastore.get_label_by_image_id(case.id, DefaultLabelTag.ORIGINAL):
                result[case.id] = self._compare(datastore, case)
                datastore.update_image_info(case.id, result[case.id])
        return result

    def _compare(self, datastore: Datastore, case: LabelledCase) -> dict[str, Any]:
        tag = DefaultLabelTag.ORIGINAL
        names = read_names(datastore.get_label_info(case.id, tag))
        try:
            original, affine = load_labels(datastore.get_label_uri(case.id, tag))
            final = on_grid(*load_labels(case.label), original.shape, affine)
            scores = dice_by_name(final, case.names, original, names)
        except Exception as error:
            return {"dice": None, "reason": reason_of(error)}
        mean = round(sum(scores.values()) / len(scores), 4) if scores else None
        return {"dice": mean, "dice_by_structure": {name: round(value, 4) for name, value in scores.items()}}


class MostUncertain(Strategy):
    """Gives out the image that an expert is least sure of; see :func:`.scoring.most_uncertain`.

    Args:
        experts: whose scores count when a request names none.
    """

    def __init__(self, experts: list[str]) -> None:
        super().__init__("The image that an expert is least sure of; run its uncertainty scoring first")
        self.experts = experts

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose an image; ``expert`` in the request bounds the choice to the scores of one expert."""
        named = request.get("expert")
        if named and named not in self.experts:
            raise HTTPException(400, f"there is no expert {named!r} with uncertainty; {', '.join(self.experts)}")
        images = {image: datastore.get_image_info(image) for image in datastore.get_unlabeled_images()}
        if not images:
            return None
        strategy = request["strategy"]
        served = {image: info.get("strategy", {}).get(strategy, {}).get("ts", 0) for image, info in images.items()}
        image, score = most_uncertain(images, [named] if named else self.experts, served)
        return {"id": image, "uncertainty_score": score}


class BatchInfer(BatchInferTask):
    """Batch inference that works without GPUs and goes on after an image that fails."""

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable[..., Any]) -> dict[str, Any]:
        """Run a model on many images; of one that fails the result holds ``error``."""
        return super().__call__(on_one_device(request), datastore, keep_going(infer))


class ViewerApp(MONAILabelApp):
    """The app: experts, the VLM, trainings, scores and the choice of what to label next.

    Args:
        app_dir: folder of ``main.py``, inside the composite's bundle folder.
        studies: folder of images, or the address of a DICOMweb server.
        conf: see :data:`.settings.CONF`.
    """

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str] | None = None) -> None:
        conf = dict(conf or {})
        self.models = ViewerModels(ViewerSettings.from_conf(conf, app_dir))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="VILA-M3 with experts",
            description="Experts for CT, brain MRI and chest X-ray, and a VLM that uses them. Research only.",
            version="1",
            labels=self._first_labels(),
        )

    def _first_labels(self) -> list[str]:
        """Return the segments that Slicer begins with: a few, because it lists every one of them."""
        names: list[str] = []
        for name in self.models.roots:
            card = self.models.expert(name).card
            if card.name == PROMPTED_EXPERT:
                names += [label_table().names[label] for label in argument_ids("organs")]
            elif card.task == "segmentation":
                names += expert_labels(self.models, name)
        return list(dict.fromkeys(names))

    def init_infers(self) -> dict[str, InferTask]:
        """Return the experts and the VLM."""
        infers: dict[str, InferTask] = {}
        for name in self.models.roots:
            card = self.models.expert(name).card
            config = {"argument": list(card.valid_args)} if card.valid_args else {}
            if card.name == PROMPTED_EXPERT:
                infers[name] = ExpertInfer(self.models, name, "vista3d", {})
                infers[name + FOR_SLICER] = ExpertInfer(self.models, name, InferType.SEGMENTATION, config)
            else:
                infers[name] = ExpertInfer(self.models, name, InferType(card.task), config)
        infers[VLM_TASK] = VlmInfer(self.models)
        return infers

    @property
    def _segmenting(self) -> list[str]:
        return [name for name in self.models.roots if self.models.expert(name).card.task == "segmentation"]

    def init_trainers(self) -> dict[str, TrainTask]:
        """Return the trainings of the experts that segment."""
        return {name: ExpertTrain(self.models, name) for name in self.models.roots if can_be_trained(self.models, name)}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Return Dice and the uncertainty of each expert that segments."""
        scores = {name + UNCERTAINTY: UncertaintyScoring(self.models, name) for name in self._segmenting}
        return {"dice": DiceScoring(), **scores}

    def init_strategies(self) -> dict[str, Strategy]:
        """Return MONAI Label's own and the most uncertain image."""
        return {"random": Random(), "first": First(), "uncertain": MostUncertain(self._segmenting)}

    def init_batch_infer(self) -> BatchInferTask:
        """Return batch inference for this machine."""
        return BatchInfer()

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a model; a label that shall be saved is saved with the names of its structures.

        Raises:
            HTTPException: 404 for a model or an image that does not exist, 400 for what cannot be used.
        """
        self._known("model", request.get("model"), self._infers)
        store = datastore or self.datastore()
        image = str(request["image"])
        self._check_image(image, store)
        shall_save = request.get("save_label", False) and not os.path.exists(image)
        result = super().infer({**request, "save_label": False}, store)
        if shall_save and result["file"]:
            params = result["params"]
            info = {"model": request["model"], "params": params, "label_info": params.get("label_info")}
            tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL
            result["label"] = store.save_label(image, result["file"], tag, info)
        return result

    def _check_image(self, image: str, store: Datastore) -> None:
        if os.path.exists(image):
            session_path = self.sessions().store_path if self.sessions() else ""
            if is_readable(image, [session_path, "" if self.studies.startswith("http") else self.studies]):
                return
            raise HTTPException(404, "there is no such image; images of this server go by their id")
        try:
            uri = store.get_image_uri(image)
        except (LookupError, OSError) as error:
            raise HTTPException(404, f"there is no image {image[:120]!r}, or its server does not answer") from error
        if not uri or not os.path.exists(uri):
            raise HTTPException(404, f"there is no image {image[:120]!r}; GET /datastore/?output=all lists them")

    @staticmethod
    def _known(what: str, name: Any, valid: Mapping[str, Any]) -> None:
        if name not in valid:
            hint = near_match_hint(str(name), list(valid))
            raise HTTPException(404, f"there is no {what} {str(name)[:120]!r}; {hint}there are: {', '.join(valid)}")

    def bundle_path(self, model: str | None) -> None:
        """Refuse a background task for a model that does not exist; no path is needed, the tasks find the bundles.

        MONAI Label asks this before it starts a process.
        """
        if model is not None:
            self._known("model", model, {**self._infers, **self._trainers})

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose the image to label next."""
        self._known("strategy", request.get("strategy"), self._strategies)
        return super().next_sample(request)
