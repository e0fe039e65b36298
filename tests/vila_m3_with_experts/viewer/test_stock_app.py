"""MONAI Label's own sample app, which reads bundle folders, on the folders of the segmenting experts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monailabel_server import MonaiLabel, start
from safetensors.torch import load_file
from viewer_studies import fill_studies

from vila_m3_common import phantoms
from vila_m3_common.package import bundle_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
EXPERTS = ("expert_vista3d", "expert_brats")
# The sample app imports what needs torchvision, too; the environment has none.
LAUNCHER = (
    "from vila_m3_composite.viewer.workarounds import apply_all; apply_all(); "
    "from monailabel.main import Main; Main().run()"
)


@pytest.fixture(scope="module")
def server(
    repository: Path,
    venv: Path,
    ct_file: Path,
    mri_4d_file: Path,
    cxr_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MonaiLabel]:
    work = tmp_path_factory.mktemp("stock")
    shutil.copytree(venv / "monailabel" / "sample-apps" / "monaibundle", work / "app")
    for name in EXPERTS:
        target = work / "app" / "model" / name
        for relative, path in bundle_files(repository / name):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / relative)
        torch.save(load_file(target / "models" / "model.safetensors"), target / "models" / "model.pt")
    studies = fill_studies(work / "studies", ct_file, mri_4d_file, cxr_file)
    options = ["--conf", "models", ",".join(EXPERTS), "--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    started = start(repository, venv, work, studies, *options, app=work / "app", launcher=("-c", LAUNCHER))
    yield started
    started.end()


@pytest.mark.parametrize(("model", "image"), [("expert_vista3d", "ct_2"), ("expert_brats", "mri")])
def test_a_bundle_folder_segments(
    server: MonaiLabel,
    model: str,
    image: str,
    ct_phantom: phantoms.VolumePhantom,
    mri_phantom: phantoms.VolumePhantom,
) -> None:
    file, _ = server.infer(model, image, device="cpu")
    assert file is not None
    found = nib.load(file)
    source = nib.load(server.log.parent / "studies" / f"{image}.nii.gz")
    assert np.allclose(found.affine, source.affine, atol=1e-4)
    labels = np.asarray(found.dataobj)
    truth = ct_phantom.labels[::-1] == 1 if image == "ct_2" else mri_phantom.labels > 0
    inside = labels == 1 if image == "ct_2" else labels > 0
    assert 2 * (inside & truth).sum() / (inside.sum() + truth.sum()) > 0.6


def test_a_bundle_folder_trains(server: MonaiLabel, mri_phantom: phantoms.VolumePhantom, tmp_path: Path) -> None:
    label = phantoms.save_volume(mri_phantom.labels, mri_phantom.affine, tmp_path / "label.nii.gz")
    server.client.save_label("mri", str(label), "final")
    server.client.upload_image(str(server.log.parent / "studies" / "mri.nii.gz"), "mri_again")
    server.client.save_label("mri_again", str(label), "final")
    weights = server.log.parent / "app" / "model" / "expert_brats" / "models" / "model.safetensors"
    before = weights.read_bytes()
    # The bundle validates, and writes weights, after every second epoch.
    wish = {"max_epochs": 2, "multi_gpu": False, "device": "cpu", "val_split": 0.5}
    assert server.post("/train/expert_brats?run_sync=true", wish).status_code == 200
    assert weights.read_bytes() != before
