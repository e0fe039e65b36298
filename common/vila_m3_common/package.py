"""Bundle folder -> ``dist/<name>_v<version>.zip``, ready for ``python -m monai.bundle download --url``.

A zip needs nothing else of the collection: it holds this package beside the bundle's own, and that of a
composite (a folder under ``bundles/``) also holds the bundles that it wires together, in ``members/``.
The same sources always give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .errors import UserError, exits_with_message, near_match_hint

COMMON_PACKAGE = Path(__file__).resolve().parent
# What a zip leaves out: caches and logs anywhere, and in the bundle's own folder the data, checkpoints and
# results of its users.
CACHES = (".*", "__pycache__", "*.pyc", "*.egg-info", "*.log")
RESULTS = (
    "checkpoints*",
    "ckpt*",
    "data",
    "eval",
    "logs",
    "members",
    "out",
    "phantoms",
    "results",
    "runs",
    COMMON_PACKAGE.name,
)
# What a running MONAI Label writes into the folder of its app.
APP_STATE = "monailabel_app/*/*"
# The Model Zoo takes no larger file; larger ones are listed in large_files.yml.
MAX_FILE_BYTES = 25 * 1024 * 1024
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold


def find_bundles(root: str | Path) -> dict[str, Path]:
    """Return folder name -> folder of every bundle: ``*/configs/metadata.json`` and the same below ``bundles/``.

    Args:
        root: the checkout.

    Raises:
        UserError: if there is none.
    """
    root = Path(root)
    configs = [*root.glob("*/configs/metadata.json"), *root.glob("bundles/*/configs/metadata.json")]
    bundles = {path.parents[1].name: path.parents[1] for path in sorted(configs)}
    if not bundles:
        raise UserError(f"{root} holds no bundle (*/configs/metadata.json); give the checkout with --root")
    return bundles


def bundle_files(bundle: Path) -> list[tuple[str, Path]]:
    """Return (path inside the bundle, file) of what belongs into its zip, sorted.

    Left out are ``CACHES``, ``RESULTS`` and the released weights of ``large_files.yml``, which
    ``python -m monai.bundle download_large_files`` fetches.

    Raises:
        UserError: if a file is larger than 25 MB and not listed in ``large_files.yml``.
    """
    downloaded = {entry["path"] for entry in read_large_files(bundle)}
    kept = []
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if not path.is_file() or name in downloaded or is_left_out(name):
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"{bundle.name}/{name} has {path.stat().st_size / 2**20:.1f} MB, allowed are 25 MB; "
                "publish it elsewhere and list it in large_files.yml"
            )
        kept.append((name, path))
    return kept


def is_left_out(name: str) -> bool:
    """Return whether a path inside a bundle matches ``APP_STATE``, ``CACHES`` anywhere, or ``RESULTS`` at first."""
    parts = name.split("/")
    is_cache = any(fnmatch(part, pattern) for part in parts for pattern in CACHES)
    return is_cache or fnmatch(name, APP_STATE) or any(fnmatch(parts[0], pattern) for pattern in RESULTS)


def read_large_files(bundle: Path) -> list[dict[str, Any]]:
    """Return the entries of a bundle's ``large_files.yml``; none when it has no such file."""
    path = bundle / "large_files.yml"
    if not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text())
        return list((content or {}).get("large_files") or [])
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{bundle.name}/large_files.yml cannot be read; it needs a list called large_files") from error


def member_names(bundle: Path) -> list[str]:
    """Return the bundles that a composite wires together, from its inference config.

    They are its items ``vlm_bundle`` and ``expert_bundles``; a bundle outside ``bundles/`` has no members.
    """
    if bundle.parent.name != "bundles":
        return []
    config = _read_json(bundle / "configs" / "inference.json")
    given = [config.get("vlm_bundle"), *(config.get("expert_bundles") or [])]
    return [Path(str(entry)).name for entry in given if entry]


def zip_entries(bundle: Path, bundles: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield (path inside the zip, file): the bundle, the shared package, and a composite's members.

    Args:
        bundle: the bundle to pack.
        bundles: name -> folder of all bundles, where the members are looked up.

    Raises:
        UserError: if a member does not exist.
    """
    for name, path in bundle_files(bundle):
        yield f"{bundle.name}/{name}", path
    for path in sorted(COMMON_PACKAGE.rglob("*")):
        name = path.relative_to(COMMON_PACKAGE).as_posix()
        if path.is_file() and not is_left_out(name):
            yield f"{bundle.name}/{COMMON_PACKAGE.name}/{name}", path
    for member in member_names(bundle):
        if member not in bundles:
            raise UserError(
                f"{bundle.name} names the member {member!r}, which does not exist; "
                f"{near_match_hint(member, list(bundles))}bundles: {', '.join(bundles)}"
            )
        for name, path in bundle_files(bundles[member]):
            yield f"{bundle.name}/members/{member}/{name}", path


def write_zip(bundle: Path, bundles: dict[str, Path], output: Path) -> Path:
    """Pack one bundle into ``output`` and return the zip."""
    metadata = _read_json(bundle / "configs" / "metadata.json")
    if "version" not in metadata:
        raise UserError(f"{bundle.name}/configs/metadata.json has no version; add one, such as 0.1.0")
    needed = metadata.get("vila_m3_common_version", __version__)
    if needed != __version__:
        raise UserError(
            f"{bundle.name} needs vila_m3_common {needed}, but this is {__version__}; "
            "change vila_m3_common_version in its configs/metadata.json"
        )
    target = output / f"{bundle.name}_v{metadata['version']}.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(zip_entries(bundle, bundles)):
            info = zipfile.ZipInfo(name, _TIMESTAMP)
            info.create_system = 3  # Unix, so that the mode below counts wherever the zip is made
            info.external_attr = 0o100644 << 16
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return target


def update_model_info(output: Path, archives: Sequence[Path], base_url: str = "") -> Path:
    """Write checksum and source of each zip into ``model_info.json``, in the Model Zoo's form.

    Args:
        output: folder of the zips; entries of other zips in an existing file are kept.
        archives: the zips to enter.
        base_url: where the zips will be published; without it the source is the file name.
    """
    path = output / "model_info.json"
    known = _read_json(path) if path.is_file() else {}
    prefix = f"{base_url.rstrip('/')}/" if base_url else ""
    for archive in archives:
        checksum = hashlib.sha1(archive.read_bytes(), usedforsecurity=False).hexdigest()
        known[archive.stem] = {"checksum": checksum, "source": f"{prefix}{archive.name}"}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=4) + "\n")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a bundle needs it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _select(bundles: dict[str, Path], names: Sequence[str]) -> list[Path]:
    for name in names:
        if name not in bundles:
            hint = near_match_hint(name, list(bundles))
            raise UserError(f"unknown bundle {name!r}; {hint}bundles: {', '.join(bundles)}")
    return [bundles[name] for name in names or bundles]


def package_bundles(root: Path, output: Path, names: Sequence[str] = (), base_url: str = "") -> list[Path]:
    """Pack bundles into ``output`` and say what is done.

    Args:
        root: the checkout.
        output: folder for the zips; created when missing.
        names: folder names of the bundles; all when empty.
        base_url: see :func:`update_model_info`.

    Returns:
        The zips.
    """
    bundles = find_bundles(root)
    selected = _select(bundles, names)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created ({error.strerror}); give another --output") from error
    archives = []
    for number, bundle in enumerate(selected, start=1):
        print(f"[{number}/{len(selected)}] {bundle.name} ...", end=" ", flush=True)
        archives.append(write_zip(bundle, bundles, output))
        print(f"{archives[-1].name}, {archives[-1].stat().st_size / 2**20:.1f} MB", flush=True)
    print(f"written to {output}, checksums in {update_model_info(output, archives, base_url).name}")
    return archives


@exits_with_message
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m vila_m3_common.package``."""
    parser = argparse.ArgumentParser(
        prog="python -m vila_m3_common.package",
        description="Pack bundles into zips that run on their own, with checksums in model_info.json.",
    )
    parser.add_argument("names", nargs="*", help="bundle folders such as expert_vista3d; all when none is given")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder for the zips (default: dist)")
    parser.add_argument("--root", type=Path, default=COMMON_PACKAGE.parents[1], help="the checkout that is packed")
    parser.add_argument("--base-url", default="", help="where the zips will be published, for model_info.json")
    options = parser.parse_args(arguments)
    package_bundles(options.root, options.output, options.names, options.base_url)


if __name__ == "__main__":
    main()
