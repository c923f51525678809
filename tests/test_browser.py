"""The live page in a real browser: its switch, and pictures of the viewer's own."""

import base64
import os
import shutil
import signal
from io import BytesIO

import numpy as np
import pytest
from clusters import CLASSES, PATIENCE, make_image
from pages import picture_file, start_up
from PIL import Image


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """Headless Chromium with an empty profile, driven by the system's chromedriver: nothing is downloaded."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    monkeypatch.setenv("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path}/profile"]
    flags += ["use-fake-ui-for-media-stream", "use-fake-device-for-media-stream"]
    flags += ["no-sandbox"] if os.geteuid() == 0 else []
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        browser.set_window_size(390, 900)  # a phone's
        yield browser


@pytest.mark.usefixtures("cluster")
def test_clicking_the_switch_silences_a_device(browser, pictures_folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name: str) -> str:
        return browser.find_element(By.ID, name).text

    def until(condition) -> None:
        WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    process, address = start_up("--images", pictures_folder)
    try:
        browser.get(address)
        until(lambda: text("summary").startswith("3 of 3 devices take part"))
        browser.find_element(By.ID, "hold").click()
        until(lambda: browser.find_element(By.ID, "hold").get_attribute("aria-pressed") == "true")
        assert text("label") in CLASSES
        before, caption = text("classes"), text("caption")
        switch = browser.find_element(By.ID, "switch-node-1")
        assert (switch.aria_role, switch.accessible_name) == ("switch", "node-1 answers")
        card = switch.find_element(By.XPATH, "ancestor::article")
        assert switch.get_attribute("aria-checked") == "true"
        switch.click()
        until(lambda: text("summary").startswith("2 of 3 devices take part"))
        assert switch.get_attribute("aria-checked") == "false"
        assert card.get_attribute("data-state") == "silenced"
        assert text("classes") != before
        assert text("caption") == caption  # the same picture, with another prediction
        until(lambda: card.find_element(By.CLASS_NAME, "breaker").text == "open")
        switch.send_keys(Keys.SPACE)  # back again, from the keyboard
        until(lambda: text("summary").startswith("3 of 3 devices take part"))
        until(lambda: text("classes") == before)
        for hidden, state in (("true", "CLOSED"), ("false", "OPEN")):  # connections of a browser to a host are few
            options = f"{{value: {hidden}, configurable: true}}"
            browser.execute_script(f"Object.defineProperty(document, 'hidden', {options})")
            browser.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
            until(lambda state=state: browser.execute_script(f"return events.readyState === EventSource.{state}"))
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        assert browser.get_log("browser") == []
        process.send_signal(signal.SIGINT)
        until(lambda: "does not answer" in text("problem"))
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("cluster")
def test_pictures_of_the_viewers_own(browser, pictures_folder, tmp_path):
    """A file, the same inverted, a drawing, and a frame of the camera, which here is Chromium's test pattern."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(name: str):
        return browser.find_element(By.ID, name)

    def until(condition) -> None:
        WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    def shown() -> np.ndarray:
        content = base64.b64decode(find("picture").get_attribute("src").partition(",")[2])
        return np.asarray(Image.open(BytesIO(content)))[None]

    pixels = make_image(7)
    (tmp_path / "mine.png").write_bytes(picture_file(pixels))
    process, address = start_up("--images", pictures_folder)
    try:
        browser.get(address)
        until(lambda: find("summary").text.startswith("3 of 3 devices take part"))
        assert "A device's share says how much of the lead" in find("explained").text
        assert find("calibrated").text == "The probabilities are not calibrated."
        find("file").send_keys(str(tmp_path / "mine.png"))
        until(lambda: find("caption").text == "mine.png")
        np.testing.assert_array_equal(shown(), pixels)
        find("invert").click()
        until(lambda: np.array_equal(shown(), 255 - pixels))
        (tmp_path / "none.png").write_text("no picture")
        find("file").send_keys(str(tmp_path / "none.png"))
        until(lambda: "none.png: cannot be read (not an image)" in find("refused").text)
        find("draw").click()
        sketch = find("sketch")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", sketch)
        ActionChains(browser).move_to_element(sketch).click_and_hold().move_by_offset(0, 60).release().perform()
        until(lambda: find("caption").text == "your drawing")
        assert shown()[0, :, 0].max() == 0, "black at the left"
        assert shown()[0, 2, 1:3].min() > 20, "a light stroke down from the middle"
        until(lambda: find("camera").is_displayed())
        find("camera").click()
        until(lambda: browser.execute_script("return arguments[0].videoWidth", find("viewfinder")) > 0)
        find("shoot").click()
        until(lambda: find("caption").text == "your camera")
        find("camera").click()
        assert not find("viewfinder").is_displayed()
        find("hold").click()
        until(lambda: find("caption").text.endswith("of 3), in truth " + find("caption").text.rpartition(" ")[2]))
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        logged = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
        assert logged == []
    finally:
        process.kill()
        process.wait()
