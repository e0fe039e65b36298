"""Each zip runs alone: unpacked into an empty folder, and downloaded the Model Zoo way among decoys.

The checkout's editable install is hidden from the processes that run the zips, so that whatever they
import comes out of the zip.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import monai.bundle
import pytest
from bundles_under_test import BUNDLES, every_bundle, is_expert, packages_of, read_config

from vila_m3_common.hooks import quiet

# `python -m monai.bundle` in an interpreter that does not know the checkout.
RUN_ALONE = """
import importlib.util, runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path[:] = [entry for entry in sys.path if "__editable__" not in entry]
known = [name for name in sys.argv.pop(1).split(",") if importlib.util.find_spec(name)]
assert not known, f"{known} can be imported without the zip; the test would prove nothing"
sys.argv[0] = "monai.bundle"
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""
QUESTION = "What is in the image?"
ALL_PACKAGES = ["vila_m3_common", *(package for bundle in BUNDLES.values() for package in packages_of(bundle))]


@pytest.fixture(scope="module")
def images(ct_file: Path, mri_folder: Path, cxr_file: Path) -> dict[str, Path]:
    return {"CT": ct_file, "MRI": mri_folder, "CXR": cxr_file}


def run_monai(working_dir: Path, *arguments: str) -> str:
    """Run ``python -m monai.bundle`` without the checkout; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", RUN_ALONE, ",".join(ALL_PACKAGES), *arguments],
        cwd=working_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def run_bundle(root: Path, working_dir: Path, *arguments: str) -> str:
    """Run a bundle's inference as a user does; return what it prints."""
    return run_monai(working_dir, "run", "--config_file", str(root / "configs/inference.json"), *arguments)


def arguments_for(bundle: Path, images: dict[str, Path], output_dir: Path) -> list[str]:
    config = read_config(bundle, "inference")
    modality = config["model_card"]["study_modality"] if is_expert(bundle) else "CXR"
    arguments = ["--image", str(images[modality])]
    if "question" in config:
        arguments += ["--question", QUESTION]
    if "output_dir" in config:
        arguments += ["--output_dir", str(output_dir)]
    return arguments


def check_results(bundle: Path, printed: str, output_dir: Path) -> None:
    assert printed.strip()
    if is_expert(bundle):
        record = json.loads((output_dir / "result.json").read_text())
        assert record["text"] in printed
        assert record["text"].startswith(("The results are <image>", "The resulting predictions are:"))
        assert not record["is_error"]
    elif "output_dir" in read_config(bundle, "inference"):
        assert any(path.is_file() for path in output_dir.rglob("*"))


@every_bundle
def test_an_unpacked_zip_runs_alone(
    bundle: Path, zips: dict[str, Path], images: dict[str, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(zips[bundle.name]) as archive:
        archive.extractall(tmp_path / "unpacked")
    working_dir = tmp_path / "elsewhere"
    working_dir.mkdir()
    root = tmp_path / "unpacked" / bundle.name
    printed = run_bundle(root, working_dir, *arguments_for(bundle, images, tmp_path / "out"))
    check_results(bundle, printed, tmp_path / "out")
    assert list(working_dir.iterdir()) == [], "an inference writes only to its output_dir"


@every_bundle
def test_a_downloaded_zip_runs_among_decoys(
    bundle: Path, zips: dict[str, Path], images: dict[str, Path], tmp_path: Path
) -> None:
    version = read_config(bundle, "metadata")["version"]
    with quiet():
        monai.bundle.download(
            name=bundle.name,
            version=version,
            url=zips[bundle.name].as_uri(),
            bundle_dir=str(tmp_path / "downloaded"),
            progress=False,
        )
    decoys = tmp_path / "decoys"
    for name in ("common", "scripts"):
        (decoys / name).mkdir(parents=True)
        (decoys / name / "__init__.py").write_text("raise RuntimeError('a decoy was imported')\n")
    root = tmp_path / "downloaded" / bundle.name
    printed = run_bundle(root, decoys, *arguments_for(bundle, images, tmp_path / "out"))
    check_results(bundle, printed, tmp_path / "out")


def test_the_download_command_unpacks_every_file(zips: dict[str, Path], tmp_path: Path) -> None:
    name, archive = min(zips.items(), key=lambda item: item[1].stat().st_size)
    version = read_config(BUNDLES[name], "metadata")["version"]
    options = ["--name", name, "--version", version, "--url", archive.as_uri(), "--bundle_dir", str(tmp_path)]
    run_monai(tmp_path, "download", *options)
    with zipfile.ZipFile(archive) as opened:
        assert [entry for entry in opened.namelist() if not (tmp_path / entry).is_file()] == []


@every_bundle
def test_a_zip_has_one_top_folder_and_the_shared_package(bundle: Path, zips: dict[str, Path]) -> None:
    with zipfile.ZipFile(zips[bundle.name]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {bundle.name}
    assert f"{bundle.name}/vila_m3_common/__init__.py" in names
    assert f"{bundle.name}/configs/metadata.json" in names
    assert zips[bundle.name].name == f"{bundle.name}_v{read_config(bundle, 'metadata')['version']}.zip"


def test_model_info_lists_every_zip(zips: dict[str, Path]) -> None:
    folder = next(iter(zips.values())).parent
    info = json.loads((folder / "model_info.json").read_text())
    assert sorted(info) == sorted(path.stem for path in zips.values())
