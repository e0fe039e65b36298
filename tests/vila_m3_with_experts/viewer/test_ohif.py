"""OHIF as MONAI Label brings it, in headless Chromium: class prompts on a CT of Orthanc, seen over the images."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from monailabel_server import MonaiLabel, start
from orthanc_server import IS_INSTALLED, start_orthanc, write_series

from vila_m3_common import phantoms

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not IS_INSTALLED, reason="Debian: apt-get install orthanc orthanc-dicomweb"),
    pytest.mark.skipif(CHROMIUM is None, reason="Debian: apt-get install chromium"),
]
WAIT = 180_000


@pytest.fixture(scope="module")
def phantom() -> phantoms.VolumePhantom:
    return phantoms.ct_phantom(seed=7001, tumors=["hepatic tumor"])


@pytest.fixture(scope="module")
def server(
    repository: Path, venv: Path, phantom: phantoms.VolumePhantom, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MonaiLabel]:
    work = tmp_path_factory.mktemp("ohif")
    orthanc = start_orthanc(work)
    write_series(phantom, work / "ct")
    orthanc.add(work / "ct")
    (work / "home").mkdir()
    started = start(repository, venv, work / "home", orthanc.dicomweb, "--conf", "model_dir", str(work / "model"))
    yield started
    started.end()
    orthanc.end()


@pytest.fixture
def page(server: MonaiLabel) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(viewport={"width": 1500, "height": 900})
        # The panel looks for the server at port 8000 unless its cookie names another one.
        context.add_cookies([{"name": "MONAILABEL_SERVER_URL", "value": server.url + "/", "url": server.url}])
        opened = context.new_page()
        opened.set_default_timeout(WAIT)
        yield opened
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go; $VILA_M3_SCREENSHOTS keeps them."""
    folder = Path(os.environ.get("VILA_M3_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_class_prompts_are_shown_over_the_ct(page: Any, server: MonaiLabel, pictures: Path) -> None:
    page.goto(f"{server.url}/ohif/")
    page.get_by_text("Phantom, Seventeen").or_(page.get_by_text("Phantom^Seventeen")).first.wait_for()
    page.screenshot(path=pictures / "ohif_1_studies.png")
