"""metadata.json: MONAI's rules for bundles, and what is stated against what is there."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from bundles_under_test import BUNDLES, ROOT, SCHEMAS, errors_against, every_bundle, read_config
from monai.bundle import verify_metadata

import vila_m3_common


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.parametrize("schema", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_the_schemas_are_schemas(schema: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema.read_text()))


@every_bundle
def test_metadata_keeps_the_bundle_specification(bundle: Path) -> None:
    assert errors_against("bundle_schema.json", read_config(bundle, "metadata")) == []


@every_bundle
def test_monai_verifies_the_metadata_without_a_network(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text((SCHEMAS / "bundle_schema.json").read_text())
    verify_metadata(meta_file=str(bundle / "configs/metadata.json"), filepath=str(tmp_path / "schema.json"))


def test_a_missing_field_is_noticed() -> None:
    metadata = dict(read_config(next(iter(BUNDLES.values())), "metadata"))
    del metadata["authors"]
    metadata["network_data_format"] = {"inputs": {"image": {"type": "image"}}, "outputs": {}}
    errors = errors_against("bundle_schema.json", metadata)
    assert "$: 'authors' is a required property" in errors
    assert "$.network_data_format.inputs.image: 'channel_def' is a required property" in errors
    assert any(error.startswith("$.network_data_format.outputs:") for error in errors)


@every_bundle
def test_the_changelog_tells_of_the_version(bundle: Path) -> None:
    metadata = read_config(bundle, "metadata")
    assert metadata["version"] in metadata["changelog"]


@every_bundle
def test_stated_versions_are_the_pinned_ones(bundle: Path) -> None:
    metadata, pinned = read_config(bundle, "metadata"), pinned_versions()
    stated = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    stated |= metadata.get("required_packages_version", {})
    different = {
        name: version for name, version in stated.items() if pinned.get(name.lower().replace("_", "-")) != version
    }
    assert different == {}
    assert metadata["vila_m3_common_version"] == vila_m3_common.__version__


@every_bundle
def test_the_metadata_describes_its_bundle(bundle: Path) -> None:
    metadata = read_config(bundle, "metadata")
    assert re.fullmatch(r"https://.*meta_schema_20240725\.json", metadata["schema"])
    for key in ("name", "intended_use", "data_source", "data_type", "eval_metrics", "references"):
        assert key in metadata, f"{bundle.name} does not state {key}"


def test_the_shared_version_is_that_of_the_distribution() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{vila_m3_common.__version__}"\n' in pyproject
