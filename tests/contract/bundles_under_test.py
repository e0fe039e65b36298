"""Finds the bundles of the checkout by scanning, and what the contract tests need to know of each."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vila_m3_common.package import find_bundles

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = find_bundles(ROOT)
SCHEMAS = ROOT / "metadata_schema"


@cache
def read_config(bundle: Path, name: str) -> dict[str, Any]:
    """Return ``configs/<name>.json`` of a bundle."""
    return json.loads((bundle / "configs" / f"{name}.json").read_text())


def errors_against(schema_name: str, document: dict[str, Any]) -> list[str]:
    """Return what a document breaks of a schema in ``metadata_schema/``."""
    schema = json.loads((SCHEMAS / schema_name).read_text())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def is_composite(bundle: Path) -> bool:
    return bundle.parent.name == "bundles"


def is_expert(bundle: Path) -> bool:
    return "model_card" in read_config(bundle, "inference")


def packages_of(bundle: Path) -> list[str]:
    return sorted(path.parent.name for path in bundle.glob("*/__init__.py"))


def tracked_files(folder: Path = ROOT) -> list[Path]:
    """Return what git tracks or would track below a folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", str(folder)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


every_bundle = pytest.mark.parametrize("bundle", BUNDLES.values(), ids=list(BUNDLES))
every_expert = pytest.mark.parametrize(
    "bundle", [path for path in BUNDLES.values() if is_expert(path)], ids=lambda path: path.name
)


def skip_opted_out(bundle: Path, opted_out: dict[str, str]) -> None:
    """Skip a bundle that a rule does not fit; the reason stands in the test file."""
    if bundle.name in opted_out:
        pytest.skip(f"{bundle.name}: {opted_out[bundle.name]}")
