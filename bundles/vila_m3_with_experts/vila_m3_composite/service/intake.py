"""What may come in: every file is measured before anything decodes it.

The content decides what a file is, not its name. Sizes are read from headers; compressed data are counted while they
are unpacked and thrown away, so that no small file becomes a large one later. Headers that name other files are
refused, since a reader would open those.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import nibabel as nib
import pydicom
from PIL import Image
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from vila_m3_common.errors import UserError
from vila_m3_common.study import match_sequences
from vila_m3_common.volumes import is_dicom

from .errors import ApiError
from .settings import Limits
from .store import Kind

_CHUNK = 1 << 20
_HEADER_BYTES = 1 << 16
# What may follow the voxels: extensions, padding.
_SLACK_BYTES = 1 << 20
READ_KINDS = (
    "PNG, JPEG, DICOM, NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha), "
    "or a zip of one DICOM series or of four MRI sequences"
)


def take_in(path: Path, filename: str, limits: Limits) -> tuple[Path, Kind]:
    """Check an uploaded file and give it a name that says what it is.

    Args:
        path: where it was written; the only file of its folder.
        filename: what the client called it; only the MRI sequence is read from it.
        limits: of the service.

    Returns:
        Its new path in the same folder (a folder for an archive), and what it is.

    Raises:
        ApiError: if it is nothing that can be read, damaged, or too large.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise _refused("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return _unpack(path, limits)
    suffix, kind, check = _recognise(path, head)
    _run_check(check, path, limits, suffix)
    return path.rename(path.with_name(stem_of(filename) + suffix)), kind


def _run_check(check: Callable[[Path, Limits], None], path: Path, limits: Limits, suffix: str) -> None:
    try:
        check(path, limits)
    except (ApiError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # of the file system, not of a reader
            raise
        raise _refused("the file is damaged") from error
    except Exception as error:  # the readers raise whatever a damaged header makes them meet
        raise _refused(f"the file is damaged or not what it seems to be ({suffix.lstrip('.')})") from error


def stem_of(filename: str) -> str:
    """Return the name of a stored file: the MRI sequence that a client's name tells, else ``image``."""
    try:
        return next(iter(match_sequences([Path(filename)])), "image")
    except UserError:
        return "image"


def _recognise(path: Path, head: bytes) -> tuple[str, Kind, Callable[[Path, Limits], None]]:
    if is_dicom(path):
        return ".dcm", "dicom", check_dicom
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png", "picture", check_picture
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg", "picture", check_picture
    if head.startswith(b"\x1f\x8b"):
        return ".nii.gz", "volume", check_nifti
    if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0":
        return ".nii", "volume", check_nifti
    if head.startswith(b"NRRD"):
        return ".nrrd", "volume", check_nrrd
    if re.match(rb"\s*(ObjectType|NDims|Comment|BinaryData)\s*=", head):
        return ".mha", "volume", check_metaimage
    raise _refused("the content is no image that this service reads")


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"{reason}; accepted are {READ_KINDS}", "invalid_file", "file")


def _check_count(count: float, allowed: int, what: str) -> None:
    if not 0 < count <= allowed:
        raise ApiError(413, f"the image has {count:.0f} {what}; allowed are 1 to {allowed}", "image_too_large", "file")


def check_picture(path: Path, limits: Limits) -> None:
    """Check a PNG or JPEG: its size first, then whether it can be decoded.

    Raises:
        ApiError: if it is too large, has several frames, or is damaged.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            _check_count(image.width * image.height, limits.image_pixels, "pixels")
            if getattr(image, "n_frames", 1) != 1:
                raise _refused("the picture has several frames")
            image.load()
    except Image.DecompressionBombError as error:
        message = f"the picture has far more pixels than are allowed ({limits.image_pixels})"
        raise ApiError(413, message, "image_too_large", "file") from error
    except (OSError, ValueError, SyntaxError, zlib.error) as error:
        raise _refused("the picture is damaged") from error


def check_dicom(path: Path, limits: Limits) -> None:
    """Check a DICOM file by its header; nothing that identifies a patient is read.

    Raises:
        ApiError: if it is too large, has no pixels, or its data set is deflated, which cannot be measured.
    """
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        raise _refused("the DICOM file is deflated; save it as Explicit VR Little Endian")
    wanted = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
    if "Rows" not in header or "Columns" not in header:
        raise _refused("the DICOM file holds no image")
    frame = int(header.Rows) * int(header.Columns)
    _check_count(frame, limits.image_pixels, "pixels")
    frame_count = int(header.get("NumberOfFrames") or 1) * int(header.get("SamplesPerPixel") or 1)
    _check_count(frame * frame_count, limits.volume_voxels, "voxels")


def check_nifti(path: Path, limits: Limits) -> None:
    """Check a NIfTI file: the voxels that its header tells, and the bytes that it unpacks to.

    Raises:
        ApiError: if it is too large or unpacks to something else than its header tells.
    """
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_packed else path.open("rb") as file:
        start = file.read(540)
        kind = nib.Nifti2Header if start[4:8] == b"n+2\0" else nib.Nifti1Header
        if kind is nib.Nifti1Header and start[344:348] != b"n+1\0":
            raise _refused("the compressed file is no NIfTI")
        header = kind(start[: kind.sizeof_hdr], check=False)
        shape = [int(size) for size in header["dim"][1 : 1 + int(header["dim"][0])]]
        voxels = math.prod(shape) if shape and min(shape) > 0 else 0
        _check_count(voxels, limits.volume_voxels, "voxels")
        expected = int(header["vox_offset"]) + voxels * int(header["bitpix"]) // 8
        _count_bytes(file, len(start), expected)


def _count_bytes(file: IO[bytes] | gzip.GzipFile, count: int, expected: int) -> None:
    """Read to the end; refuse more than what the header told."""
    while chunk := file.read(_CHUNK):
        count += len(chunk)
        if count > expected + _SLACK_BYTES:
            raise _refused("the file unpacks to more than its header tells")
    if count < expected:
        raise _refused("the file is cut off: it holds fewer voxels than its header tells")


def _count_inflated(file: IO[bytes], expected: int, window: int) -> None:
    unpacker = zlib.decompressobj(window)
    count = 0
    while chunk := file.read(_CHUNK):
        while chunk and not unpacker.eof:
            count += len(unpacker.decompress(chunk, _CHUNK))
            chunk = unpacker.unconsumed_tail
            if count > expected + _SLACK_BYTES:
                raise _refused("the file unpacks to more than its header tells")


# Names of the voxel types in NRRD and MetaImage headers (the latter after MET_) -> bytes.
_BYTES = {
    **dict.fromkeys(("char", "uchar", "signed char", "unsigned char", "int8", "int8_t", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "ushort", "signed short", "unsigned short", "int16", "int16_t", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        ("int", "uint", "signed int", "unsigned int", "int32", "int32_t", "uint32", "uint32_t", "float"), 4
    ),
    **dict.fromkeys(("double",), 8),
}


def check_nrrd(path: Path, limits: Limits) -> None:
    """Check an NRRD file by its header.

    Raises:
        ApiError: if it is too large, or its voxels are in another file or another encoding than raw and gzip.
    """
    with path.open("rb") as file:
        lines = _header_lines(file, lambda line: not line.strip())
        fields = dict(re.split(r":=?\s*", line, maxsplit=1) for line in lines if ":" in line and line[0] != "#")
        fields = {key.strip().lower(): value.strip() for key, value in fields.items()}
        if "data file" in fields or "datafile" in fields:
            raise _refused("the NRRD file refers to another file; save header and voxels as one")
        voxels = math.prod(int(size) for size in fields["sizes"].split())
        _check_count(voxels, limits.volume_voxels, "voxels")
        expected = voxels * _BYTES[fields["type"].lower()]
        encoding = fields["encoding"].lower()
        if encoding in ("gzip", "gz"):
            _count_inflated(file, expected, 31)
        elif encoding == "raw":
            _count_bytes(file, 0, expected)
        else:
            raise _refused(f"the NRRD file has the encoding {encoding[:20]!r}; save it raw or gzip")


def check_metaimage(path: Path, limits: Limits) -> None:
    """Check a MetaImage by its header.

    Raises:
        ApiError: if it is too large, or its voxels are in another file.
    """
    with path.open("rb") as file:
        lines = _header_lines(file, lambda line: line.startswith("ElementDataFile"))
        fields = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
        if fields["ElementDataFile"].upper() != "LOCAL":
            raise _refused("the MetaImage refers to another file; save it as one .mha")
        voxels = math.prod(int(size) for size in fields["DimSize"].split()) * int(
            fields.get("ElementNumberOfChannels", "1")
        )
        _check_count(voxels, limits.volume_voxels, "voxels")
        expected = voxels * _BYTES[fields["ElementType"].removeprefix("MET_").lower()]
        if fields.get("CompressedData", "False").lower() == "true":
            _count_inflated(file, expected, 15)
        else:
            _count_bytes(file, 0, expected)


def _header_lines(file: IO[bytes], is_last: Callable[[str], bool]) -> list[str]:
    """Read the lines of a text header up to its last one."""
    lines: list[str] = []
    while file.tell() < _HEADER_BYTES:
        raw = file.readline(_HEADER_BYTES)
        if not raw:
            break
        lines.append(raw.decode("utf-8", "replace").rstrip("\r\n"))
        if is_last(lines[-1]):
            return lines
    raise _refused("the header of the file does not end")


def _unpack(path: Path, limits: Limits) -> tuple[Path, Kind]:
    """Unpack a zip of one DICOM series or four MRI volumes; names inside it are not used as paths."""
    folder = path.with_name("content")
    folder.mkdir()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_archive(entries, limits)
            budget = int(limits.upload_mb * 2**20)
            for number, entry in enumerate(entries):
                budget -= _extract(archive, entry, folder / f"{number:05d}", budget)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, ValueError) as error:
        raise _refused("the zip is damaged, encrypted or packed in an unknown way") from error
    path.unlink()
    return folder, _sort_archive(folder, [entry.filename for entry in entries], limits)


def _check_archive(entries: list[zipfile.ZipInfo], limits: Limits) -> None:
    if not 0 < len(entries) <= limits.archive_files:
        message = f"the zip holds {len(entries)} files; allowed are 1 to {limits.archive_files}"
        raise ApiError(413, message, "file_too_large", "file")
    size = sum(entry.file_size for entry in entries)
    if size > limits.upload_mb * 2**20:
        message = f"the zip unpacks to {size / 2**20:.0f} MB; allowed are {limits.upload_mb:g} MB"
        raise ApiError(413, message, "file_too_large", "file")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, budget: int) -> int:
    """Write one entry and return its bytes; what the zip claims about its size is not believed."""
    count = 0
    with archive.open(entry) as source, target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            count += len(chunk)
            if count > budget:
                raise ApiError(413, "the zip unpacks to more than it tells", "file_too_large", "file")
            file.write(chunk)
    return count


def _sort_archive(folder: Path, names: list[str], limits: Limits) -> Kind:
    """Keep the DICOM files of an archive, or else its volumes, under neutral names; erase the rest."""
    files = sorted(folder.iterdir())
    dicom = [path for path in files if is_dicom(path)]
    for path in set(files) - set(dicom) if dicom else ():
        path.unlink()
    if dicom:
        for path in dicom:
            take_in_member(path, "slice", limits)
        return "series"
    for path, name in zip(files, names, strict=True):
        with path.open("rb") as file:
            head = file.read(4)
        if head.startswith((b"\x1f\x8b", b"NRRD", b"\\\x01")) or name.lower().endswith((".nii", ".mha")):
            take_in_member(path, name, limits)
        else:
            path.unlink()
    if len(list(folder.iterdir())) < 4:
        raise _refused("the zip holds neither a DICOM series nor four MRI volumes")
    return "sequences"


def take_in_member(path: Path, name: str, limits: Limits) -> Path:
    """Check one file of an archive and name it by its number and what it is."""
    with path.open("rb") as file:
        suffix, _, check = _recognise(path, file.read(512))
    _run_check(check, path, limits, suffix)
    return path.rename(path.with_name(f"{path.name}_{stem_of(name)}{suffix}"))
