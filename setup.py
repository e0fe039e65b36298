"""Finds the packages of the collection: ``common/`` and every bundle folder hold one each.

Everything else stands in ``pyproject.toml``; its static tables cannot scan, and a new bundle must need no list.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def package_dirs() -> dict[str, str]:
    """Map each top-level package to its folder, relative to this file."""
    bundles = [folder.parent for pattern in ("*/configs", "bundles/*/configs") for folder in HERE.glob(pattern)]
    found: dict[str, str] = {}
    for root in [HERE / "common", *sorted(bundles)]:
        for init in sorted(root.glob("*/__init__.py")):
            name = init.parent.name
            if name in found:
                raise SystemExit(f"two packages are called {name}: {found[name]} and {init.parent}; rename one")
            found[name] = init.parent.relative_to(HERE).as_posix()
    return found


PACKAGE_DIRS = package_dirs()
PACKAGES = [
    package
    for name, folder in PACKAGE_DIRS.items()
    for package in [name, *(f"{name}.{part}" for part in find_packages(str(HERE / folder)))]
]

setup(packages=PACKAGES, package_dir=PACKAGE_DIRS)
