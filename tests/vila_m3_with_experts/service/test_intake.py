"""What may come in: bombs, references to other files and damaged files are refused before anything decodes them."""

import gzip
import io
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from vila_m3_composite.service.errors import ApiError
from vila_m3_composite.service.intake import take_in
from vila_m3_composite.service.settings import Limits

LIMITS = Limits(upload_mb=16, image_pixels=1_000_000, volume_voxels=2_000_000, archive_files=20)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header tells any size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def nifti(shape: tuple[int, ...], voxels: bytes | None = None) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return header.binaryblock + b"\0" * 4 + (bytes(2 * int(np.prod(shape))) if voxels is None else voxels)


def dicom(rows: int = 8, columns: int = 8, syntax: str = ExplicitVRLittleEndian, frames: int = 1) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName = "Doe^Jane"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames, dataset.SamplesPerPixel = rows, columns, frames, 1
    dataset.BitsAllocated, dataset.PixelRepresentation = 8, 0
    dataset.PixelData = bytes(64)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def lying_zip() -> bytes:
    """A zip that tells 10 bytes and holds 64 MB."""
    data = bytearray(zipped({"a.nii": bytes(64 << 20)}))
    real, told = struct.pack("<I", 64 << 20), struct.pack("<I", 10)
    return bytes(data).replace(real, told)


NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: %b\n%b\n"
MHA = b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\n%bElementDataFile = %b\n"
BOMB = bytes(64 << 20)
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "text": (b"this is no image", "the content is no image that this service reads"),
    "program": (b"\x7fELF" + bytes(600), "the content is no image"),
    "a PNG of 65535 x 65535": (png(65535, 65535, zlib.compress(bytes(1000))), "has far more pixels than are allowed"),
    "a PNG of 3000 x 3000": (png(3000, 3000, zlib.compress(bytes(1000))), "has 9000000 pixels; allowed are 1 to"),
    "a PNG cut off": (png(100, 100, b"x"), "the picture is damaged"),
    "a JPEG cut off": (b"\xff\xd8\xff\xe0\0\x10JFIF", "the picture is damaged"),
    "a NIfTI of many voxels": (nifti((2000, 2000, 2000), b""), "has 8000000000 voxels; allowed are 1 to 2000000"),
    "a NIfTI of no voxels": (nifti((0, 4, 4), b""), "has 0 voxels"),
    "a NIfTI cut off": (nifti((16, 16, 16), b"x"), "is cut off: it holds fewer voxels"),
    "a gzipped bomb": (gzip.compress(BOMB), "the compressed file is no NIfTI"),
    "a gzipped NIfTI bomb": (gzip.compress(nifti((4, 4, 4), BOMB)), "unpacks to more than its header tells"),
    "a gzip cut off": (gzip.compress(nifti((32, 32, 32), np.random.default_rng(0).bytes(65536)))[:9000], "damaged"),
    "a gzipped gzip": (gzip.compress(gzip.compress(BOMB)), "the compressed file is no NIfTI"),
    "a DICOM of many pixels": (dicom(60000, 60000), "has 3600000000 pixels"),
    "a DICOM of many frames": (dicom(1000, 1000, frames=5000), "has 5000000000 voxels"),
    "a deflated DICOM": (dicom(syntax=DeflatedExplicitVRLittleEndian), "the DICOM file is deflated"),
    "a DICOM without image": (dicom()[:132] + b"\x02\0\x10\0UI", "no image|damaged"),
    "an NRRD elsewhere": (NRRD % (b"raw", b"data file: /etc/passwd\n"), "refers to another file"),
    "an NRRD bomb": (NRRD % (b"gzip", b"") + gzip.compress(BOMB), "unpacks to more than its header tells"),
    "an NRRD of many voxels": (NRRD.replace(b"4 4 4", b"9999 9999 9999") % (b"raw", b""), "voxels; allowed"),
    "an NRRD without end": (b"NRRD0004\n" + b"#x\n" * 40000, "the header of the file does not end"),
    "an NRRD in bzip2": (NRRD % (b"bzip2", b""), "has the encoding 'bzip2'"),
    "a MetaImage elsewhere": (MHA % (b"", b"/etc/passwd"), "refers to another file"),
    "a MetaImage bomb": (MHA % (b"CompressedData = True\n", b"LOCAL") + zlib.compress(BOMB), "unpacks to more"),
    "a MetaImage of nothing": (MHA.replace(b"4 4 4", b"4 x 4") % (b"", b"LOCAL"), "damaged"),
    "a zip bomb": (zipped({"a.nii": bytes(1 << 30)}), "unpacks to 1024 MB; allowed are 16 MB"),
    "a zip of many files": (zipped({f"{n}.nii": b"x" for n in range(21)}), "holds 21 files; allowed are 1 to 20"),
    "a zip that lies": (lying_zip(), "damaged|unpacks to more"),
    "a zip in a zip": (zipped({"inner.zip": zipped({"a": b"x"})}), "neither a DICOM series nor four MRI volumes"),
    "a damaged zip": (zipped({"a": b"x" * 100})[:60], "the zip is damaged"),
    "a zip with a bad volume": (zipped({f"{n}.nii": nifti((4, 4, 4), b"") for n in range(4)}), "is cut off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_in_little_memory_and_time(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "upload"
    path.write_bytes(content)
    del content
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(ApiError, match=message) as caught:
            take_in(path, "scan.nii.gz", LIMITS)
        assert caught.value.status in (400, 413)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 10


def test_what_a_png_holds_beyond_its_pixels_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(png(10, 10, zlib.compress(BOMB)))
    tracemalloc.start()
    take_in(path, "a.png", LIMITS)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "filename", "kept", "kind"),
    [
        (lambda: png(2, 2, zlib.compress(b"\0ab\0cd")), "photo.exe", "image.png", "picture"),
        (jpeg, "x", "image.jpg", "picture"),
        (dicom, "Doe^Jane", "image.dcm", "dicom"),
        (lambda: nifti((4, 4, 4)), "Jane_T1ce.nii", "t1c.nii", "volume"),
        (lambda: gzip.compress(nifti((4, 4, 4))), "Jane-flair.nii.gz", "flair.nii.gz", "volume"),
        (lambda: NRRD % (b"raw", b"") + bytes(128), "a.nrrd", "image.nrrd", "volume"),
        (lambda: NRRD % (b"gzip", b"") + gzip.compress(bytes(128)), "a.nrrd", "image.nrrd", "volume"),
        (lambda: MHA % (b"", b"LOCAL") + bytes(128), "a.mha", "image.mha", "volume"),
        (
            lambda: MHA % (b"CompressedData = True\n", b"LOCAL") + zlib.compress(bytes(128)),
            "t2.mha",
            "t2.mha",
            "volume",
        ),
    ],
)
def test_a_good_file_is_named_by_its_content(
    make: Callable[[], bytes], filename: str, kept: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "upload"
    path.write_bytes(make())
    found, what = take_in(path, filename, LIMITS)
    assert (found.name, what) == (kept, kind)
    assert [entry.name for entry in tmp_path.iterdir()] == [kept]


def test_a_zip_of_a_series_keeps_its_dicom_files(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(zipped({"../../1.dcm": dicom(), "b/2": dicom(), "notes.txt": b"Jane", "b/DICOMDIR.bak": b"x"}))
    found, kind = take_in(path, "series.zip", LIMITS)
    assert kind == "series"
    assert sorted(entry.name for entry in found.iterdir()) == ["00000_image.dcm", "00001_image.dcm"]
    assert all(pydicom.dcmread(entry).Rows == 8 for entry in found.iterdir())
    assert not list(tmp_path.parent.glob("*.dcm"))
