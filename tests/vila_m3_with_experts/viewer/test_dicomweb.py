"""A DICOM series in Orthanc is segmented through MONAI Label, and a DICOM SEG lands in Orthanc."""

import io
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monailabel_server import MonaiLabel, start
from orthanc_server import IS_INSTALLED, Orthanc, start_orthanc, write_series

from vila_m3_common import phantoms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not IS_INSTALLED, reason="Debian: apt-get install orthanc orthanc-dicomweb"),
]
LIVER, TUMOR = 1, 26


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    started = start_orthanc(tmp_path_factory.mktemp("orthanc"))
    yield started
    started.end()


@pytest.fixture(scope="module")
def series(orthanc: Orthanc, ct_phantom: phantoms.VolumePhantom, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("series") / "ct"
    uid = write_series(ct_phantom, folder)
    orthanc.add(folder)
    return uid


@pytest.fixture(scope="module")
def server(
    repository: Path, venv: Path, orthanc: Orthanc, series: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MonaiLabel]:
    work = tmp_path_factory.mktemp("monailabel")
    started = start(repository, venv, work, orthanc.dicomweb, "--conf", "model_dir", str(work / "model"))
    yield started
    started.end()


def test_the_series_is_given_out(server: MonaiLabel, series: str) -> None:
    assert server.client.next_sample("random", {})["id"] == series


def test_a_series_is_segmented_and_a_dicom_seg_lands_in_orthanc(
    server: MonaiLabel, orthanc: Orthanc, series: str, ct_phantom: phantoms.VolumePhantom
) -> None:
    wish = {"label_prompt": [LIVER, TUMOR], "save_label": True, "label_tag": "final"}
    file, result = server.infer("expert_vista3d", series, **wish)
    assert file is not None
    image = nib.load(file)
    labels = np.asarray(image.dataobj)
    truth = nib.Nifti1Image(ct_phantom.labels, ct_phantom.affine)
    placed = nib.as_closest_canonical(image)
    assert np.allclose(placed.affine, nib.as_closest_canonical(truth).affine, atol=1e-3)
    found, true = np.asarray(placed.dataobj) > 0, np.isin(ct_phantom.labels, (LIVER, TUMOR))
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.6

    (seg_id,) = orthanc.series("SEG")
    seg = pydicom.dcmread(io.BytesIO(orthanc.first_file(seg_id)))
    segments = {int(entry.SegmentNumber): str(entry.SegmentLabel) for entry in seg.SegmentSequence}
    assert set(segments.values()) == set(result["label_names"]) == {"liver", "hepatic tumor"}
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == series
    assert seg.PatientID == "PHANTOM-17"
    counts = dict.fromkeys(segments, 0)
    for frame, functional in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        counts[int(functional.SegmentIdentificationSequence[0].ReferencedSegmentNumber)] += int((frame > 0).sum())
    assert {segments[number]: count for number, count in counts.items()} == {
        name: int((labels == label).sum()) for name, label in result["label_names"].items()
    }


def test_the_saved_label_is_trained_on(server: MonaiLabel) -> None:
    assert server.post("/train/expert_vista3d", {"max_epochs": 1}).status_code == 200
    task = server.finished("train")
    assert task["status"] == "DONE", task["details"]
    assert server.client.info()["train_stats"]["expert_vista3d"]["labels"] == [LIVER, TUMOR]


def test_another_server_reads_the_names_of_the_dicom_seg(
    repository: Path, venv: Path, orthanc: Orthanc, tmp_path: Path
) -> None:
    """Its segments are numbered 1 and 2, which are other structures to the expert."""
    other = start(repository, venv, tmp_path, orthanc.dicomweb, "--conf", "model_dir", str(tmp_path / "model"))
    try:
        assert other.post("/train/expert_vista3d", {"max_epochs": 1}).status_code == 200
        task = other.finished("train")
        assert task["status"] == "DONE", task["details"]
        assert other.client.info()["train_stats"]["expert_vista3d"]["labels"] == [LIVER, TUMOR]
    finally:
        other.end()


def test_no_patient_is_named_in_the_log(server: MonaiLabel) -> None:
    log = server.log.read_text()
    assert "PHANTOM-17" not in log
    assert "Seventeen" not in log


def test_an_unknown_series(server: MonaiLabel) -> None:
    assert server.refusal("expert_vista3d", "1.2.3.4.5")[0] == 404
