"""OHIF as MONAI Label brings it, in headless Chromium: class prompts on a CT of Orthanc, seen over the images."""

import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from monailabel_server import MonaiLabel, start
from orthanc_server import IS_INSTALLED, start_orthanc, write_series
from PIL import Image
from scipy import ndimage

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


PROMPTED = ("liver", "hepatic tumor", "right kidney", "spleen")


def axial_view(page: Any) -> np.ndarray:
    """Return what the first viewport shows, ``(H, W, 3)``; texts at its edges are cut off."""
    box = page.locator("canvas").first.bounding_box()
    clip = {"x": box["x"], "y": box["y"] + 90, "width": box["width"], "height": box["height"] - 180}
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")).astype(int)


def box_of(mask: np.ndarray) -> np.ndarray:
    """Return top, left, bottom and right of a mask, in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], dtype=float)


def relative(box: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Return a box in parts of the body's box."""
    size = np.tile(body[2:] - body[:2], 2)
    return (box - np.tile(body[:2], 2)) / size


def laid_over(view: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return where colour came onto the picture; letters and the scroll bar had theirs before."""
    return (view.max(axis=2) - view.min(axis=2) > 40) & (np.abs(view - before).max(axis=2) > 20)


def largest_part(mask: np.ndarray) -> np.ndarray:
    parts, _ = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def test_class_prompts_are_shown_over_the_ct(
    page: Any, server: MonaiLabel, phantom: phantoms.VolumePhantom, pictures: Path
) -> None:
    page.goto(f"{server.url}/ohif/")
    page.get_by_text("Phantom, Seventeen").first.wait_for()
    page.screenshot(path=pictures / "ohif_1_studies.png")
    page.goto(f"{server.url}/ohif/monai-label?StudyInstanceUIDs={study_uid(server)}")
    page.get_by_text("(45/88)").first.wait_for()
    page.get_by_text("Confirm and Hide").click()
    page.wait_for_timeout(5000)  # the images come one by one
    before = axial_view(page)
    page.locator(".monaiLabelPanel .actionButton").first.click()
    page.get_by_text("Class Prompts").click()
    tab = page.locator(".tab", has_text="Class Prompts")
    for name in PROMPTED:
        tab.locator("tr", has=page.get_by_role("cell", name=name, exact=True)).locator("input").check()
    with page.expect_response(lambda response: "/infer/expert_vista3d" in response.url) as answered:
        tab.get_by_role("button", name="Run").click()
    assert answered.value.status == 200
    end = time.monotonic() + 120
    while laid_over(axial_view(page), before).sum() < 2000:
        assert time.monotonic() < end, "no segmentation is shown"
        page.wait_for_timeout(1000)
    page.wait_for_timeout(2000)
    page.screenshot(path=pictures / "ohif_2_segmentation.png")
    body = box_of(largest_part(before.max(axis=2) > 60))
    shown = relative(box_of(laid_over(axial_view(page), before)), body)
    ids = (1, 26, 5, 3)
    plane = phantom.labels[::-1, ::-1, 44].T  # anterior up, the patient's right on the left
    inside = largest_part(phantom.image[::-1, ::-1, 44].T > -100)
    expected = relative(box_of(np.isin(plane, ids)), box_of(inside))
    assert np.abs(shown - expected).max() < 0.08, (shown, expected)


def study_uid(server: MonaiLabel) -> str:
    """Return the only study, as the server passes it on from Orthanc."""
    (entry,) = httpx.get(f"{server.url}/proxy/dicom/qido/studies", timeout=60).json()
    return entry["0020000D"]["Value"][0]
