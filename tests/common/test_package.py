import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from vila_m3_common import __version__
from vila_m3_common.errors import UserError
from vila_m3_common.package import find_bundles, main, package_bundles


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two bundles, a composite of both, and what must not be packed."""
    root = tmp_path / "checkout"
    for name in ("expert_one", "vlm", "bundles/both"):
        write(root / name / "configs/metadata.json", json.dumps({"version": "0.2.0"}))
        write(root / name / "configs/inference.json", "{}")
        write(root / name / "LICENSE", "terms")
    config = {"expert_bundles": ["expert_one"], "vlm_bundle": "vlm"}
    write(root / "bundles/both/configs/inference.json", json.dumps(config))
    for left_out in ("one/__pycache__/a.pyc", "ckpt/model.pt", "eval/metrics.csv", ".hidden", "train.log"):
        write(root / "expert_one" / left_out, "x")
    write(root / "expert_one/one/__init__.py", "")
    write(root / "expert_one/models/released.pt", "many numbers")
    write(root / "expert_one/models/model.safetensors", "few numbers")
    write(root / "expert_one/large_files.yml", "large_files:\n  - path: models/released.pt\n    url: https://x/y.pt\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names_in(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        return opened.namelist()


def test_bundles_are_found_by_their_metadata(checkout: Path, tmp_path: Path) -> None:
    assert list(find_bundles(checkout)) == ["both", "expert_one", "vlm"]
    with pytest.raises(UserError, match=r"holds no bundle .*; give the checkout with --root"):
        find_bundles(tmp_path / "absent")


def test_a_zip_holds_the_bundle_and_the_shared_package(checkout: Path, tmp_path: Path) -> None:
    (archive,) = package_bundles(checkout, tmp_path / "dist", ["expert_one"])
    assert archive.name == "expert_one_v0.2.0.zip"
    names = names_in(archive)
    own = [name for name in names if "/vila_m3_common/" not in name]
    assert own == [
        "expert_one/LICENSE",
        "expert_one/configs/inference.json",
        "expert_one/configs/metadata.json",
        "expert_one/large_files.yml",
        "expert_one/models/model.safetensors",
        "expert_one/one/__init__.py",
    ]
    assert "expert_one/vila_m3_common/prompts.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "__pycache__" in name]


def test_a_composite_holds_its_members_and_one_shared_package(checkout: Path, tmp_path: Path) -> None:
    (archive,) = package_bundles(checkout, tmp_path / "dist", ["both"])
    names = names_in(archive)
    assert "both/members/expert_one/one/__init__.py" in names
    assert "both/members/vlm/configs/metadata.json" in names
    assert len([name for name in names if name.endswith("vila_m3_common/__init__.py")]) == 1


def test_the_same_sources_give_the_same_bytes(checkout: Path, tmp_path: Path) -> None:
    first = package_bundles(checkout, tmp_path / "a")
    for path in checkout.rglob("*.json"):
        path.touch()
    second = package_bundles(checkout, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_model_info_has_the_model_zoos_form(checkout: Path, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    (archive,) = package_bundles(checkout, dist, ["vlm"], "https://example.org/v1/")
    package_bundles(checkout, dist, ["expert_one"])
    info = json.loads((dist / "model_info.json").read_text())
    assert list(info) == ["expert_one_v0.2.0", "vlm_v0.2.0"]
    assert info["expert_one_v0.2.0"]["source"] == "expert_one_v0.2.0.zip"
    assert info["vlm_v0.2.0"] == {
        "checksum": hashlib.sha1(archive.read_bytes()).hexdigest(),
        "source": "https://example.org/v1/vlm_v0.2.0.zip",
    }


def test_progress_names_every_bundle(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package_bundles(checkout, tmp_path / "dist")
    output = capsys.readouterr().out
    assert "[2/3] expert_one ... expert_one_v0.2.0.zip, " in output
    assert output.endswith("checksums in model_info.json\n")


def test_a_large_file_that_is_not_listed_is_refused(checkout: Path, tmp_path: Path) -> None:
    with (checkout / "vlm/big.bin").open("wb") as file:
        file.truncate(26 * 2**20)
    with pytest.raises(UserError, match=r"vlm/big.bin has 26.0 MB, allowed are 25 MB; .* list it in large_files.yml"):
        package_bundles(checkout, tmp_path / "dist", ["vlm"])


def test_a_member_that_does_not_exist_is_refused(checkout: Path, tmp_path: Path) -> None:
    write(checkout / "bundles/both/configs/inference.json", json.dumps({"expert_bundles": ["expert_on"]}))
    with pytest.raises(UserError, match=r"both names the member 'expert_on', .* did you mean 'expert_one'\?"):
        package_bundles(checkout, tmp_path / "dist", ["both"])


def test_another_version_of_the_shared_package_is_refused(checkout: Path, tmp_path: Path) -> None:
    metadata = {"version": "0.2.0", "vila_m3_common_version": "9.9"}
    write(checkout / "vlm/configs/metadata.json", json.dumps(metadata))
    with pytest.raises(UserError, match=rf"vlm needs vila_m3_common 9.9, but this is {__version__}"):
        package_bundles(checkout, tmp_path / "dist", ["vlm"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("configs/metadata.json", "{", "metadata.json is not valid JSON"),
        ("configs/metadata.json", "{}", "vlm/configs/metadata.json has no version; add one"),
        ("large_files.yml", "- a", "vlm/large_files.yml cannot be read; it needs a list called large_files"),
    ],
)
def test_broken_bundle_files_are_refused(file: str, content: str, message: str, checkout: Path, tmp_path: Path) -> None:
    write(checkout / "vlm" / file, content)
    with pytest.raises(UserError, match=message):
        package_bundles(checkout, tmp_path / "dist", ["vlm"])


def test_the_command_ends_with_one_line(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"error: unknown bundle 'expert_on'; did you mean 'expert_one'\? bundles: both"
    ):
        main(["--root", str(checkout), "--output", str(tmp_path / "dist"), "expert_on"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file/dist cannot be created \(.*\); give another --output"):
        main(["--root", str(checkout), "--output", str(tmp_path / "file/dist")])
