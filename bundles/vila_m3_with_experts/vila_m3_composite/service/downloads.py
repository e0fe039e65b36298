"""Results of a conversation as one zip."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

from vila_m3_common.agent import Session

from ..outputs import write_session
from ..report import render_report
from .store import FileStore


def zip_folder(folder: Path) -> bytes:
    """Return the files of a folder as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                archive.write(path, path.name)
    return buffer.getvalue()


def pack_results(session: Session, cards: str, store: FileStore) -> bytes:
    """Return what the composite's command writes about a case: conversation, report, overlays, label maps."""
    with store.incoming() as folder:
        for call in session.calls:
            for path in (call.result.overlay_path, call.result.label_map_path):
                if path is not None and path.is_file():
                    shutil.copyfile(path, folder / path.name)
        record = write_session(session, folder, "conversation", cards)
        (folder / "report.html").write_text(render_report(record, folder))
        return zip_folder(folder)
