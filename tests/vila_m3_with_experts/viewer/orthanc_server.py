"""Debian's Orthanc with DICOMweb, and a CT phantom as a DICOM series in it."""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from monailabel_server import free_port
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from vila_m3_common import phantoms

BINARY = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
IS_INSTALLED = Path(BINARY).is_file() and DICOMWEB.is_file()


@dataclass
class Orthanc:
    """A running server."""

    process: subprocess.Popen
    url: str

    @property
    def dicomweb(self) -> str:
        return f"{self.url}/dicom-web"

    def add(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.dcm")):
            httpx.post(f"{self.url}/instances", content=path.read_bytes(), timeout=60).raise_for_status()

    def series(self, modality: str) -> list[str]:
        """Return Orthanc's ids of the series of one modality."""
        found = httpx.get(f"{self.url}/series?expand", timeout=60).json()
        return [entry["ID"] for entry in found if entry["MainDicomTags"].get("Modality") == modality]

    def first_file(self, series: str) -> bytes:
        instances = httpx.get(f"{self.url}/series/{series}", timeout=60).json()["Instances"]
        return httpx.get(f"{self.url}/instances/{instances[0]}/file", timeout=60).content

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def start_orthanc(work: Path) -> Orthanc:
    port = free_port()
    config = {
        "Name": "tests",
        "StorageDirectory": str(work / "storage"),
        "IndexDirectory": str(work / "storage"),
        "HttpPort": port,
        "DicomPort": free_port(),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(DICOMWEB)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": True, "Host": "127.0.0.1", "Ssl": False},
    }
    (work / "orthanc.json").write_text(json.dumps(config))
    with (work / "orthanc.log").open("w") as log:
        process = subprocess.Popen([BINARY, str(work / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        assert process.poll() is None, (work / "orthanc.log").read_text()
        try:
            httpx.get(f"{url}/dicom-web/studies", timeout=5).raise_for_status()
            return Orthanc(process, url)
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError((work / "orthanc.log").read_text())


def write_series(phantom: phantoms.VolumePhantom, folder: Path) -> str:
    """Write a CT phantom as axial slices in DICOM's directions (left, posterior); return the series' UID."""
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    x_count, y_count, z_count = phantom.image.shape
    first = phantom.affine @ [x_count - 1, y_count - 1, 0, 1]
    step = float(phantom.affine[0, 0])
    for index in range(z_count):
        pixels = phantom.image[::-1, ::-1, index].T + 1024
        height = float(phantom.affine[2, 3] + index * phantom.affine[2, 2])
        position = [-float(first[0]), -float(first[1]), height]
        dataset = _slice(np.ascontiguousarray(pixels.astype(np.uint16)), position, step, index)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.save_as(folder / f"{index:03d}.dcm", enforce_file_format=True)
    return series


def _slice(pixels: np.ndarray, position: list[float], step: float, index: int) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientID, dataset.PatientName = "CT", "PHANTOM-17", "Phantom^Seventeen"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20260101"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "120000"
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "1", ""
    dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
    dataset.StudyDescription = dataset.SeriesDescription = "CT phantom"
    dataset.ImageType, dataset.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "phantoms"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelSpacing, dataset.SliceThickness, dataset.SpacingBetweenSlices = [step, step], step, step
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = position, [1, 0, 0, 0, 1, 0]
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.WindowCenter, dataset.WindowWidth = 50, 400
    dataset.PixelData = pixels.tobytes()
    return dataset
