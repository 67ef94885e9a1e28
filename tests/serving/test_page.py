"""Tests of the web page at `GET /`, one of them in a real browser."""

import base64
import hashlib
import pathlib
import re

import pytest

IMAGES = pathlib.Path(__file__).parent / "images"


def test_browser_may_run_only_the_script_of_the_page(embedded):
    reply = embedded.rest.get("/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", reply.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in reply.headers["content-security-policy"]
    assert "innerHTML" not in script  # so names and labels are always shown as text


@pytest.mark.slow
def test_page_classifies_and_attacks_an_image(embedded, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(name):
        return browser.find_element(By.ID, name).text

    wait = WebDriverWait(browser, 60)
    browser.get(embedded.url + "/")
    wait.until(lambda _: "digits" in text("models"))
    assert "half_plus_two 123 AVAILABLE" in text("models")
    assert not browser.find_element(By.ID, "result").is_displayed()

    chooser = browser.find_element(By.ID, "file")
    chooser.send_keys(str(IMAGES / "d.jpg"))
    wait.until(lambda _: text("bars").count("%") == 5)
    wait.until(lambda _: text("verdict"))
    assert text("seen-size") == ", 16 x 16 pixels"
    shown = [float(part) for part in re.findall(r"([\d.]+) %", text("bars"))]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == pytest.approx(100, abs=0.5)

    def move_slider(position):
        browser.execute_script(
            "const slider = document.getElementById('epsilon'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));",
            position,
        )

    move_slider(0)
    wait.until(lambda _: "holds" in text("verdict"))
    clean, adversarial = (browser.find_element(By.ID, name).get_attribute("src") for name in ("clean", "adversarial"))
    assert clean == adversarial == browser.find_element(By.ID, "seen").get_attribute("src")
    move_slider(60)
    wait.until(lambda _: "broken" in text("verdict"))
    assert browser.find_element(By.ID, "adversarial").get_attribute("src") != clean
    browser.save_screenshot(str(tmp_path / "page.png"))

    chooser.send_keys(str(pathlib.Path(__file__)))
    wait.until(lambda _: "Unknown image file format" in text("error"))
    assert not browser.find_element(By.ID, "result").is_displayed()
    severe = [entry for entry in browser.get_log("browser") if "400 (Bad Request)" not in entry["message"]]
    assert [entry for entry in severe if entry["level"] == "SEVERE" and "favicon" not in entry["message"]] == []
