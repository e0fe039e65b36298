"""What must stand in a bundle's folder, and what must not stand in any file."""

import configparser
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from bundles_under_test import BUNDLES, ROOT, every_bundle, is_composite, packages_of, skip_opted_out, tracked_files

from vila_m3_common.package import MAX_FILE_BYTES

NEEDED = (
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "large_files.yml",
)
NO_TRAINING = {name: "a composite has no weights to train" for name, path in BUNDLES.items() if is_composite(path)}
UNKNOWN_CHECKSUMS = {
    "expert_cxr": "the publisher of the TorchXRayVision weights states no checksums for most of its files",
}
THIS_FILE = Path(__file__).resolve()
TEXT_SUFFIXES = {".py", ".json", ".yml", ".yaml", ".toml", ".md", ".txt", ".conf", ".cfg", ".sh", ".html", ""}
FORBIDDEN_IN_CODE = {
    r"^\s*(import|from)\s+torchvision": "PyPI's torchvision may need CUDA; nothing here depends on it",
    r"trust_remote_code": "code from a checkpoint is never run",
    r"weights_only\s*=\s*False": "pickles are read with weights_only",
    r"pickle\.loads?\(": "pickles are read with torch.load(weights_only=True)",
}
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|home/[a-z]+|Users/[A-Za-z]+)/")


@every_bundle
@pytest.mark.parametrize("name", NEEDED)
def test_a_bundle_has_its_files(bundle: Path, name: str) -> None:
    assert (bundle / name).is_file()
    assert (bundle / name).stat().st_size > 0


@every_bundle
@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_bundle_can_be_trained_and_evaluated(bundle: Path, name: str) -> None:
    if name == "train":
        skip_opted_out(bundle, NO_TRAINING)
    assert (bundle / f"configs/{name}.json").is_file()


@every_bundle
def test_nano_weights_are_in_the_bundle(bundle: Path) -> None:
    skip_opted_out(bundle, NO_TRAINING)
    weights = list((bundle / "models").rglob("*.safetensors"))
    assert weights, f"{bundle.name}/models holds no .safetensors"
    assert sum(path.stat().st_size for path in weights) <= 10 * 2**20


@every_bundle
def test_a_bundles_code_is_one_package_of_its_own_name(bundle: Path) -> None:
    packages = packages_of(bundle)
    assert len(packages) == 1
    assert packages[0] not in ("scripts", "common", "src", "configs")


def test_package_names_are_unique() -> None:
    counts = Counter(package for bundle in BUNDLES.values() for package in packages_of(bundle))
    assert [name for name, count in counts.items() if count > 1] == []


@every_bundle
def test_large_files_can_be_fetched_and_checked(bundle: Path) -> None:
    entries = yaml.safe_load((bundle / "large_files.yml").read_text())["large_files"] or []
    for entry in entries:
        assert entry["url"].startswith("https://")
        assert not Path(entry["path"]).is_absolute()
        assert ".." not in Path(entry["path"]).parts
        if not entry.get("hash_val") and bundle.name in UNKNOWN_CHECKSUMS:
            continue
        length = {"sha256": 64, "md5": 32}[entry["hash_type"]]
        assert re.fullmatch(rf"[0-9a-f]{{{length}}}", entry["hash_val"]), entry["path"]


@every_bundle
def test_the_logging_config_has_its_sections(bundle: Path) -> None:
    parser = configparser.RawConfigParser()
    parser.read(bundle / "configs/logging.conf")
    assert {"loggers", "handlers", "formatters", "logger_root"} <= set(parser.sections())


@every_bundle
def test_the_licence_is_apache_2(bundle: Path) -> None:
    text = (bundle / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


@every_bundle
def test_no_file_is_too_large_for_the_model_zoo(bundle: Path) -> None:
    assert [path for path in tracked_files(bundle) if path.stat().st_size > MAX_FILE_BYTES] == []


def text_lines(suffixes: set[str]) -> list[tuple[str, str]]:
    """Return (file:line, text) of every line of the tracked files, this file apart."""
    lines = []
    for path in tracked_files():
        if path.suffix not in suffixes or path == THIS_FILE:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            lines.append((f"{path.relative_to(ROOT)}:{number}", line))
    return lines


@pytest.mark.parametrize("pattern", FORBIDDEN_IN_CODE)
def test_code_does_nothing_forbidden(pattern: str) -> None:
    expression = re.compile(pattern)
    found = [place for place, line in text_lines({".py"}) if expression.search(line)]
    assert found == [], FORBIDDEN_IN_CODE[pattern]


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    assert [place for place, line in text_lines(TEXT_SUFFIXES) if MACHINE_PATHS.search(line)] == []
