"""A folder of phantom studies, so that the app can be tried without any data."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vila_m3_common import phantoms
from vila_m3_common.errors import exits_with_message
from vila_m3_common.standalone import make_output_dir

_SEED = 400_000  # phantoms that no training and no evaluation has seen


def write_studies(folder: str | Path, count: int = 3) -> list[Path]:
    """Write CTs, brain MRIs (4-D: T1c, T1, T2, FLAIR) and chest X-rays; files that are there stay.

    Args:
        folder: created when missing.
        count: studies of each kind.

    Returns:
        All of them.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = make_output_dir(folder)
    written = []
    for number in range(1, count + 1):
        seed = _SEED + number
        for name, save in (("ct", _save_ct), ("mri", _save_mri), ("cxr", _save_cxr)):
            path = folder / f"phantom_{name}_{number}{'.png' if name == 'cxr' else '.nii.gz'}"
            if not path.is_file():
                save(seed, path)
            written.append(path)
    return written


def _save_ct(seed: int, path: Path) -> None:
    phantom = phantoms.ct_phantom(seed, ["hepatic tumor"] if seed % 2 else None)
    phantoms.save_volume(phantom.image, phantom.affine, path)


def _save_mri(seed: int, path: Path) -> None:
    phantom = phantoms.mri_phantom(seed, has_tumor=True)
    phantoms.save_volume(np.moveaxis(phantom.image, 0, 3), phantom.affine, path)


def _save_cxr(seed: int, path: Path) -> None:
    phantoms.save_radiograph(phantoms.cxr_phantom(seed, ["Cardiomegaly", "Effusion"] if seed % 2 else []), path)


@exits_with_message
def main() -> None:
    """Write the studies of ``make monailabel``."""
    parser = argparse.ArgumentParser(prog="python -m vila_m3_composite.viewer.studies", description=main.__doc__)
    parser.add_argument("folder", help="where they go")
    parser.add_argument("--count", type=int, default=3, help="studies of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{len(write_studies(arguments.folder, arguments.count))} phantom studies are in {arguments.folder}")


if __name__ == "__main__":
    main()
