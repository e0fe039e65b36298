"""``make demo``: three phantoms, three conversations, three reports."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

from monai.bundle import run

from vila_m3_common import phantoms
from vila_m3_common.measure import largest_slice

QUESTIONS = {
    "ct": ["Are there any liver masses?", "Which organs are visible?"],
    "mri": ["Is there a brain tumor?", "Segment any tumors in the image"],
    "cxr": ["Is there a pleural effusion?", "What are the findings?"],
}


class Case(NamedTuple):
    """An image of the demonstration: its path, and the slice to show, through the tumour, where it is a volume."""

    path: Path
    slice_index: int | None


def main() -> None:
    """Draw a phantom CT, MRI and chest X-ray and ask the composite about them."""
    parser = argparse.ArgumentParser(prog="demo", description=main.__doc__)
    parser.add_argument("--output_dir", default="out/demo", help="where phantoms and reports go (default: %(default)s)")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    config = Path(__file__).parents[1] / "configs" / "inference.json"
    start = time.perf_counter()
    for name, case in draw_phantoms(folder / "phantoms").items():
        print(f"\n=== {name} " + "=" * (74 - len(name)))
        run(
            config_file=str(config),
            image=str(case.path),
            slice_index=case.slice_index,
            question=QUESTIONS[name],
            output_dir=str(folder),
            logging_file=False,
        )
    print(f"\nThree conversations in {time.perf_counter() - start:.0f} s. Open {folder}/*/report.html in a browser.")


def draw_phantoms(folder: Path) -> dict[str, Case]:
    """Write the demonstration's phantoms: a liver tumour, a glioma, an effusion with a mass."""
    ct = phantoms.ct_phantom(11, [tumor := "hepatic tumor"])
    mri = phantoms.mri_phantom(12, has_tumor=True)
    radiograph = phantoms.cxr_phantom(13, ["Effusion", "Mass"])
    return {
        "ct": Case(
            phantoms.save_volume(ct.image, ct.affine, folder / "phantom_ct.nii.gz"),
            largest_slice(ct.labels == phantoms.CT_TUMORS[tumor]),
        ),
        "mri": Case(phantoms.save_mri(mri, folder / "phantom_mri"), largest_slice(mri.labels > 0)),
        "cxr": Case(phantoms.save_radiograph(radiograph, folder / "phantom_cxr.png"), None),
    }


if __name__ == "__main__":
    main()
