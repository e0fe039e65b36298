"""The eight weight sets that TorchXRayVision released and VILA-M3 was trained with.

Source: TorchXRayVision 1.5.7 (Apache-2.0), https://github.com/mlmed/torchxrayvision, Cohen et al., MIDL 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RELEASE_URL = "https://github.com/mlmed/torchxrayvision/releases/download/v1/"


@dataclass(frozen=True)
class ReleasedModel:
    """One weight set.

    Args:
        file: name of the release asset under ``RELEASE_URL``.
        input_size: side in pixels that it was trained at.
        op_threshs: trained finding -> operating point in 0..1, None where none was published. A finding that
            is missing here has an untrained head.
    """

    file: str
    input_size: int
    op_threshs: Mapping[str, float | None]


RELEASED_MODELS: dict[str, ReleasedModel] = {
    "densenet121-res224-all": ReleasedModel(
        file="nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.07422872,
            "Consolidation": 0.038290843,
            "Infiltration": 0.09814756,
            "Pneumothorax": 0.0098118475,
            "Edema": 0.023601074,
            "Emphysema": 0.0022490358,
            "Fibrosis": 0.010060724,
            "Effusion": 0.103246614,
            "Pneumonia": 0.056810737,
            "Pleural_Thickening": 0.026791653,
            "Cardiomegaly": 0.050318155,
            "Nodule": 0.023985857,
            "Mass": 0.01939503,
            "Hernia": 0.042889766,
            "Lung Lesion": 0.053369623,
            "Fracture": 0.035975814,
            "Lung Opacity": 0.20204692,
            "Enlarged Cardiomediastinum": 0.05015312,
        },
    ),
    "densenet121-res224-rsna": ReleasedModel(
        file="kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Pneumonia": 0.13486601,
            "Lung Opacity": 0.13511065,
        },
    ),
    "densenet121-res224-nih": ReleasedModel(
        file="nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.039117552,
            "Consolidation": 0.0034529066,
            "Infiltration": 0.11396341,
            "Pneumothorax": 0.0057298196,
            "Edema": 0.00045666535,
            "Emphysema": 0.0018880932,
            "Fibrosis": 0.012037827,
            "Effusion": 0.038744126,
            "Pneumonia": 0.0037213727,
            "Pleural_Thickening": 0.014730946,
            "Cardiomegaly": 0.016149804,
            "Nodule": 0.054241467,
            "Mass": 0.037198864,
            "Hernia": 0.0004403434,
        },
    ),
    "densenet121-res224-pc": ReleasedModel(
        file="pc-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.031012505,
            "Consolidation": 0.013347598,
            "Infiltration": 0.081435576,
            "Pneumothorax": 0.001262615,
            "Edema": 0.002587246,
            "Emphysema": 0.0035944257,
            "Fibrosis": 0.0023071,
            "Effusion": 0.055412333,
            "Pneumonia": 0.044385884,
            "Pleural_Thickening": 0.042766232,
            "Cardiomegaly": 0.043258056,
            "Nodule": 0.037629247,
            "Mass": 0.005658899,
            "Hernia": 0.0091741895,
            "Fracture": 0.026507627,
        },
    ),
    "densenet121-res224-chex": ReleasedModel(
        file="chex-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.1988969,
            "Consolidation": 0.05710573,
            "Pneumothorax": 0.0531293,
            "Edema": 0.1435217,
            "Effusion": 0.27212676,
            "Pneumonia": 0.07749717,
            "Cardiomegaly": 0.19712369,
            "Lung Lesion": 0.09932402,
            "Fracture": 0.09273402,
            "Lung Opacity": 0.3270967,
            "Enlarged Cardiomediastinum": 0.10888247,
        },
    ),
    "densenet121-res224-mimic_nb": ReleasedModel(
        file="mimic_nb-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.08558747,
            "Consolidation": 0.011884617,
            "Pneumothorax": 0.0040595434,
            "Edema": 0.010733786,
            "Effusion": 0.118761964,
            "Pneumonia": 0.022924708,
            "Cardiomegaly": 0.06358637,
            "Lung Lesion": 0.022143636,
            "Fracture": 0.017476924,
            "Lung Opacity": 0.1258702,
            "Enlarged Cardiomediastinum": 0.014020768,
        },
    ),
    "densenet121-res224-mimic_ch": ReleasedModel(
        file="mimic_ch-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        input_size=224,
        op_threshs={
            "Atelectasis": 0.09121389,
            "Consolidation": 0.010573786,
            "Pneumothorax": 0.005023008,
            "Edema": 0.003698257,
            "Effusion": 0.08001232,
            "Pneumonia": 0.037242252,
            "Cardiomegaly": 0.05006329,
            "Lung Lesion": 0.019866971,
            "Fracture": 0.03823637,
            "Lung Opacity": 0.11303808,
            "Enlarged Cardiomediastinum": 0.0069147074,
        },
    ),
    "resnet50-res512-all": ReleasedModel(
        file="pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt",
        input_size=512,
        op_threshs={
            "Atelectasis": 0.51570356,
            "Consolidation": 0.50444704,
            "Infiltration": 0.53787947,
            "Pneumothorax": 0.50723547,
            "Edema": 0.5025118,
            "Emphysema": 0.5035252,
            "Fibrosis": 0.5038076,
            "Effusion": 0.51862943,
            "Pneumonia": 0.5078151,
            "Pleural_Thickening": 0.50724894,
            "Cardiomegaly": 0.5056339,
            "Nodule": 0.510706,
            "Mass": 0.5053923,
            "Hernia": 0.5020846,
            "Lung Lesion": None,
            "Fracture": 0.5080557,
            "Lung Opacity": 0.5138526,
            "Enlarged Cardiomediastinum": None,
        },
    ),
}

_TRAINED_WIDELY = (
    "densenet121-res224-all",
    "densenet121-res224-chex",
    "densenet121-res224-pc",
    "resnet50-res512-all",
)
# finding -> weight sets that the reference lets vote on it; the findings that are not listed are open to all.
CLASS_MODELS: dict[str, tuple[str, ...]] = {
    "Fracture": ("densenet121-res224-all", "densenet121-res224-nih", "densenet121-res224-chex", "resnet50-res512-all"),
    "Pneumothorax": ("resnet50-res512-all",),
    "Lung Opacity": tuple(RELEASED_MODELS),
    "Atelectasis": _TRAINED_WIDELY,
    "Cardiomegaly": _TRAINED_WIDELY,
    "Consolidation": _TRAINED_WIDELY,
    "Edema": _TRAINED_WIDELY,
    "Effusion": _TRAINED_WIDELY,
}
