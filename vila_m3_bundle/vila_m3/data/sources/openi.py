"""Open-i (Demner-Fushman et al., 2016): Indiana University chest X-ray reports, one XML file each."""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from vila_m3_common.errors import UserError, check_choice

from ..cleaning import clean_report
from ..record import Record
from ..source import Item, Located, Rejected, RowProblem, ask
from .mimic_cxr import QUESTION

TEXTS = ("sections", "cleaned")
_LARGEST = 1 << 22  # the largest report file has 20 KB; this bounds what a hostile one costs


def read_openi(
    source: str | Path, split: str = "all", text: str = "sections", has_images: bool = True
) -> Iterator[Item]:
    """Yield one question for a report per image, or per report when the images are not there.

    Args:
        source: folder with the XML files, or the release's ``.tgz``, in the order of the report numbers.
        split: the release has none: all.
        text: findings and impression as they are, or ``cleaned``.
        has_images: whether records show the images (``<id>.png``); False makes text-only rows.

    Raises:
        UserError: for a source without XML files.
    """
    check_choice(split, ("all",), "split")
    check_choice(text, TEXTS, "text")
    count = 0
    for count, (name, data) in enumerate(_read_files(Path(source)), start=1):
        try:
            for record in _convert(data, text, has_images):
                yield Located(count, record, name)
        except RowProblem as problem:
            yield Rejected(count, str(problem), name)
    if count == 0:
        raise UserError(f"source {source} has no XML files; give the folder of the unpacked reports or their .tgz")


def _number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", Path(name).stem)
    return int(digits[-1]) if digits else 0, name


def _read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(source.rglob("*.xml"), key=lambda path: _number(path.name)):
            yield path.name, path.read_bytes()[:_LARGEST]
        return
    try:
        with tarfile.open(source) as archive:
            members = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(".xml")]
            for member in sorted(members, key=lambda member: _number(member.name)):
                file = archive.extractfile(member)
                if file is not None:
                    yield Path(member.name).name, file.read(_LARGEST)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"source {source} is neither a folder nor a readable .tgz ({error})") from error


def _convert(data: bytes, text: str, has_images: bool) -> Iterator[Record]:
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise RowProblem("the XML declares entities, which no report needs")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise RowProblem(f"is not valid XML ({error})") from error
    sections = {node.get("Label", ""): " ".join((node.text or "").split()) for node in root.iter("AbstractText")}
    report = " ".join(part for part in (sections.get("FINDINGS"), sections.get("IMPRESSION")) if part)
    report = clean_report(report) if text == "cleaned" else report
    if not report:
        raise RowProblem("has neither findings nor impression")
    identifier = root.find("uId")
    name = identifier.get("id", "") if identifier is not None else ""
    metadata = {
        "dataset": "openi",
        "patient": name,
        "study": name,
        "indication": sections.get("INDICATION", ""),
        "labels": [node.text for node in root.iter("major") if node.text],
        "question": QUESTION,
    }
    images = [node.get("id", "") for node in root.iter("parentImage")] if has_images else []
    if has_images and not images:
        raise RowProblem("lists no image")
    for image in images:
        yield Record(image, ask(QUESTION, report, True), (f"{image}.png",), metadata)
    if not has_images:
        yield Record(name, ask(QUESTION, report, None), (), metadata)
