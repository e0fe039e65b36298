"""Hooks for a segmentation or classification bundle that declares none, made from its ``metadata.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from . import prompts, slices
from .errors import UserError
from .expert import ExpertRequest, ExpertResult, ModelCard
from .segmentation import view_segmentation
from .volumes import load_volume

_MODALITIES = {"ct": "CT", "mr": "MRI", "mri": "MRI", "cxr": "CXR", "x-ray": "CXR", "xray": "CXR"}


def card_from_metadata(metadata: Mapping[str, Any], folder_name: str) -> ModelCard:
    """Make a card from task, modality, description, metrics and channels of a bundle's metadata.

    Args:
        metadata: the content of ``configs/metadata.json``.
        folder_name: names the expert: ``spleen_ct_segmentation`` is triggered as ``<SPLEEN_CT_SEGMENTATION()>``.
    """
    image_format = _first(metadata, "inputs")
    modality = str(image_format.get("modality", "")).strip()
    channel_count = int(image_format.get("num_channels", 1))
    metrics = metadata.get("eval_metrics", {})
    accuracy = ", ".join(f"{name}: {value}" for name, value in metrics.items()) or "not stated"
    task = "classification" if "classif" in str(metadata.get("task", "")).lower() else "segmentation"
    return ModelCard(
        name=re.sub(r"[^A-Z0-9]+", "_", folder_name.upper()).strip("_"),
        modality=modality or "unknown",
        task=task,
        overview=str(metadata.get("description", metadata.get("task", folder_name))).rstrip("."),
        accuracy=accuracy,
        study_modality=_MODALITIES.get(modality.lower(), ""),
        input_description=f"one {modality or 'image'} volume" if channel_count == 1 else f"{channel_count} sequences",
        sequence_count=channel_count,
    )


def _first(metadata: Mapping[str, Any], side: str) -> dict[str, Any]:
    formats = metadata.get("network_data_format", {}).get(side, {})
    return next(iter(formats.values()), {})


class DefaultHooks:
    """``expert_request`` and ``expert_feedback`` for bundles of the Model Zoo.

    The dataset item is ``{"image": path}``; the prediction is read from ``pred`` after the bundle's own
    post-processing, which is expected to bring it back to the geometry of the input.

    Args:
        metadata: the bundle's metadata; ``channel_def`` names the labels.
        card: its card.
    """

    def __init__(self, metadata: Mapping[str, Any], card: ModelCard) -> None:
        self.card = card
        channels = _first(metadata, "outputs").get("channel_def", {})
        self.names = {int(index): str(name) for index, name in channels.items()}

    def expert_request(self, request: ExpertRequest) -> dict[str, Any]:
        """Return the dataset item: the image path under ``image``, a list for several sequences."""
        paths = list(request.image_paths)
        return {"image": paths[0] if len(paths) == 1 else paths}

    def expert_feedback(self, output: Mapping[str, Any]) -> ExpertResult:
        """Turn ``pred`` into text, overlay, label map and measurements."""
        request = ExpertRequest.from_json(output["request"])
        prediction = np.asarray(output["pred"].detach().cpu())
        if self.card.task == "classification":
            return self._classified(prediction.ravel(), request)
        labels = prediction[0] if prediction.shape[0] == 1 else prediction.argmax(axis=0)
        volume = load_volume(request.image_paths[0])
        if volume.array.ndim == 4:
            volume = replace(volume, array=volume.array[..., 0])
        if labels.shape != volume.array.shape:
            raise UserError(
                f"{self.card.name} returned a label map of {labels.shape} for an image of {volume.array.shape}; "
                "its post-processing must invert the resampling (Invertd)"
            )
        names = {index: name for index, name in self.names.items() if index > 0}
        view = view_segmentation(
            np.rint(labels).astype(np.int32),
            volume,
            _grey(volume.array, self.card),
            names,
            request,
            self.card.name,
            is_ct=self.card.study_modality == "CT",
        )
        pairs = [(color, names[label]) for label, color in view.colors.items() if label in names]
        return ExpertResult(
            text=prompts.ct_feedback(pairs, request.question, "trained"),
            images=(view.picture,),
            overlay_path=view.overlay_path,
            label_map_path=view.label_map_path,
            legend=dict(pairs),
            measurements=view.measurements,
        )

    def _classified(self, scores: np.ndarray, request: ExpertRequest) -> ExpertResult:
        named = {self.names.get(index, f"class {index}"): float(score) for index, score in enumerate(scores)}
        return ExpertResult(text=prompts.cxr_feedback(named, request.question, "trained"), scores=named)


def _grey(array: np.ndarray, card: ModelCard) -> np.ndarray:
    if card.study_modality == "CT":
        return slices.window_ct(array)
    return slices.scale_min_max(array, float(array.min()), float(array.max()))
