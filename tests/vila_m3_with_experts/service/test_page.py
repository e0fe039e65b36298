"""The chat page in headless Chromium: a scripted conversation on CT, MRI and X-ray."""

import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
WAIT_SECONDS = 180


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, nano: Any) -> Iterator[Any]:
    """The page, freshly opened; it must load nothing from elsewhere and log no error."""
    context = browser.new_context(viewport={"width": 1400, "height": 860})
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    # A refused request is the page's to tell; the browser logs it too.
    opened.on(
        "console",
        lambda message: (
            faults.append(message.text) if message.type == "error" and "status of 400" not in message.text else None
        ),
    )
    opened.on("request", lambda request: faults.append(request.url) if not is_own(request.url, nano.url) else None)
    opened.goto(nano.url)
    wait_until(opened, "document.getElementById('model').textContent.includes('experts')")
    yield opened
    context.close()
    assert faults == []


def wait_until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression holds; the driver's own waiting would need the page to allow ``eval``."""
    end = time.monotonic() + WAIT_SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"waited for {expression}; the page shows {page.inner_text('body')}"
        page.wait_for_timeout(100)


def is_own(url: str, base: str) -> bool:
    return url.startswith((base, f"blob:{base}", "data:"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go; $VILA_M3_SCREENSHOTS keeps them."""
    folder = Path(os.environ.get("VILA_M3_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_files(page: Any, *paths: Path) -> None:
    page.set_input_files("#files", [str(path) for path in paths])
    wait_until(page, "document.getElementById('study').textContent.includes('known from')")
    wait_until(page, "document.getElementById('slice').naturalWidth > 0")


def ask(page: Any, question: str) -> str:
    page.fill("#question", question)
    page.click("#ask")
    wait_until(page, "document.body.dataset.busy === 'false'")
    assert page.locator(".message.error").count() == 0, page.locator(".message.error").all_text_contents()
    return page.locator(".message.assistant:not(.trigger)").last.text_content()


def canvas_colors(page: Any, selector: str) -> int:
    """Count the opaque pixels of an image on the page."""
    return page.evaluate(
        """(selector) => {
            const image = document.querySelector(selector);
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let place = 3; place < data.length; place += 4) count += data[place] > 0;
            return count;
        }""",
        selector,
    )


def test_a_conversation_about_a_ct(page: Any, ct_file: Path, pictures: Path, tmp_path: Path) -> None:
    open_files(page, ct_file)
    assert page.text_content("#study") == "CT (known from: intensities), 72 × 64 × 56 voxels"
    assert page.text_content("#place") == "axial 28 of 55"
    page.hover("#stage")
    page.mouse.wheel(0, 100)
    wait_until(page, "document.getElementById('place').textContent === 'axial 29 of 55'")
    first = page.get_attribute("#slice", "src")
    page.select_option("#window", label="lung")
    wait_until(page, f"document.getElementById('slice').src !== '{first}'")
    page.screenshot(path=pictures / "ct_1_lung_window.png")
    page.select_option("#window", label="as the model sees it")
    assert ask(page, "Which organs are visible?").startswith("This a CT image. It contains")
    assert "VISTA3D" in page.text_content(".message.trigger")
    assert page.text_content("#about") == "about axial slice 29"
    assert "liver" in page.text_content("#legend")
    assert re.search(r"liver\d+\.\d\d\d+\d+\.\d", page.text_content(".expert table"))  # mL, parts, longest diameter
    assert canvas_colors(page, "#labels") > 100
    page.fill("#opacity", "80")
    assert page.evaluate("document.getElementById('labels').style.opacity") == "0.8"
    page.screenshot(path=pictures / "ct_2_organs.png")
    page.click("#legend button:has-text('liver')")
    page.select_option("#plane", label="coronal")
    wait_until(page, "document.getElementById('place').textContent.startsWith('coronal')")
    page.screenshot(path=pictures / "ct_3_coronal.png")
    assert ask(page, "Is there a hepatic tumor?") in ("yes", "no")
    page.screenshot(path=pictures / "ct_4_second_question.png")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "results.zip")
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert {"report.html", "conversation.json", "01_vista3d_labels.nii.gz"} <= set(archive.namelist())


def test_a_conversation_about_a_brain_mri(page: Any, mri_folder: Path, pictures: Path) -> None:
    open_files(page, *sorted(mri_folder.iterdir()))
    assert page.text_content("#study").startswith("MRI (known from: sequences)")
    assert page.locator("#sequence option").all_text_contents() == ["T1C", "T1", "T2", "FLAIR"]
    page.select_option("#sequence", label="FLAIR")
    assert ask(page, "Is there a brain tumor?") == "yes"
    assert "enhancing tumor" in page.text_content("#legend")
    page.screenshot(path=pictures / "mri_1_tumor.png")
    assert ask(page, "Segment any tumors in the image") == "All tumors were segmented"
    assert "earlier result" in page.locator(".expert").last.text_content()
    page.click("#fresh")
    assert page.locator(".message").count() == 0


def test_a_conversation_about_a_chest_x_ray(page: Any, cxr_file: Path, pictures: Path) -> None:
    open_files(page, cxr_file)
    assert not page.is_visible("#index")
    assert ask(page, "Is there a pleural effusion?") == "yes"
    assert "effusion" in page.text_content(".expert table")
    wait_until(page, "document.querySelector('.expert img').naturalWidth > 0")
    page.screenshot(path=pictures / "cxr_1_effusion.png")
    assert not page.is_visible("#overlay")


def test_what_cannot_be_opened_is_explained(page: Any, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "notes.txt").write_text("<b>no</b> image")
    page.set_input_files("#files", [str(tmp_path / "notes.txt")])
    page.wait_for_selector(".message.error")
    assert "no image that this service reads" in page.text_content(".message.error")
    page.screenshot(path=pictures / "error.png")


def test_the_page_fits_a_narrow_window(page: Any, cxr_file: Path, pictures: Path) -> None:
    page.set_viewport_size({"width": 420, "height": 800})
    open_files(page, cxr_file)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=pictures / "narrow.png", full_page=True)
