"""Which patients are kept apart from training: one rule, so that what one bundle never saw another can test on."""

from __future__ import annotations

import zlib


def is_held_out(patient: str, share: float) -> bool:
    """Return whether a patient is in the held-out share.

    The checksum of the id decides, so that a patient never changes sides when others are added.

    Args:
        patient: id of the patient.
        share: of all patients, 0..1.
    """
    return zlib.crc32(patient.encode()) / 2**32 < share
