"""The page in a real headless Chromium: what a reader sees, clicks and types, and that nothing leaves the page."""

import json
import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from nemo_jepo.tools.report.command import main
from tests.support.report_folders import HOSTILE, POLICY, write_run
from tests.unit.report.test_drawings import rows, written

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt-get install chromium chromium-driver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync"]
FLAGS += ["disable-background-networking", "disable-component-update", "no-proxy-server"]
SHADE_AT_FULL = 0.62


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}", "window-size=1280,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "localhost,127.0.0.1")  # of the driver itself
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of two runs, of which the second has hostile rollouts, and an experiment."""
    folder = tmp_path_factory.mktemp("report")
    settings = {"objective": {"name": "rloo"}, "kl": {"beta": 0.1}}
    runs = [write_run(folder / "jepo"), write_run(folder / "rloo", settings, num_steps=5, question=HOSTILE, shift=-1.5)]
    results = written(folder / "results.parquet", rows(arms=("jepo", "rloo"), regimes=("verifiable",)))
    out = folder / "report.html"
    assert main([*map(str, runs), "--results", str(results), "--out", str(out)]) == 0
    return out.as_uri()


@pytest.fixture
def page(browser, address):
    """The page, loaded anew at 1280 px; after the test: no error on the console, no request to anywhere."""
    show(browser, 1280, "light")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"
    ]
    assert address in asked and all(url == address or url.startswith("data:") for url in asked)


def show(browser, width, mode):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": mode}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def all_of(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def one(page, selector):
    (found,) = all_of(page, selector)
    return found


def tokens(page):
    return all_of(page, "#tokens .token")


def opacity(token):
    """Of a token's shade."""
    color = token.value_of_css_property("background-color")
    return float(re.split(r"[,/ ]+", color.strip(")"))[-1]) if color.startswith("rgba") else 1.0


def chosen(page):
    return one(page, "#samples tr.chosen").text


def test_tokens_are_shaded_by_log_prob_and_marked_by_their_part(page):
    shown = tokens(page)
    assert [token.get_attribute("class") for token in shown] == [
        f"token {part}" for part in ("prompt", "chain", "chain", "chain", "marker", "answer", "answer")
    ]
    assert [token.text for token in shown] == [
        "2+2=",
        "First ",
        "two",
        "\u21b5",
        "the final answer is",
        " 4",
        "<|end|>",
    ]
    surprise = [0.0, *(min(-logprob / 6, 1.0) for logprob in POLICY[0])]
    assert [opacity(token) for token in shown] == pytest.approx([SHADE_AT_FULL * s for s in surprise], abs=0.01)
    styles = {
        part: [one(page, f".legend .{part}").value_of_css_property(name) for name in ("text-decoration", "font-style")]
        for part in ("prompt", "chain", "marker", "answer")
    }
    assert len({str(style) for style in styles.values()}) == 4  # told apart without colour


def test_the_shade_can_be_the_samplers_log_prob_or_the_difference(page):
    Select(one(page, "#shade")).select_by_value("generation")
    wanted = [0, 0.5 / 6, 2.5 / 6, 0.1 / 6, 1, 0, 0]
    assert [opacity(token) for token in tokens(page)] == pytest.approx([SHADE_AT_FULL * s for s in wanted], abs=0.01)
    Select(one(page, "#shade")).select_by_value("difference")
    wanted = [0, 0, 0.5 / 6, 0.1 / 6, 0, 0, 0]
    assert [opacity(token) for token in tokens(page)] == pytest.approx([SHADE_AT_FULL * s for s in wanted], abs=0.01)


def test_a_reader_chooses_run_step_and_sample(page):
    assert "valid" in chosen(page) and Select(one(page, "#step")).first_selected_option.text == "training 3"
    one(page, "button[aria-label='Earlier step']").click()
    assert Select(one(page, "#step")).first_selected_option.text == "training 2"
    assert "0.5" in chosen(page)  # the advantage of that step
    Select(one(page, "#step")).select_by_visible_text("validation 2")
    one(page, ".own summary").click()
    assert one(page, ".own p").text == "own text of step 2"
    Select(one(page, "#run")).select_by_visible_text("rloo")
    assert Select(one(page, "#step")).first_selected_option.text == "training 5"
    all_of(page, "#samples tbody tr")[1].click()
    assert "no marker" in chosen(page)
    assert [token.get_attribute("class") for token in tokens(page)] == ["token prompt"] + ["token chain"] * 3


def test_hostile_rollouts_are_shown_and_not_obeyed(page):
    Select(one(page, "#run")).select_by_visible_text("rloo")
    all_of(page, "#samples tbody tr")[1].click()
    assert tokens(page)[2].text == HOSTILE and tokens(page)[3].text == "<U+202E>txt<U+0007>"
    assert page.title == "nemo_jepo report: jepo, rloo"
    assert not all_of(page, "#browser img, #browser script")
    refused = page.execute_script("try { document.body.innerHTML = '<b>'; return false } catch { return true }")
    assert refused  # by the page's policy, were the script ever to try
    (entry,) = page.get_log("browser")
    assert "TrustedHTML" in entry["message"]


def test_pointing_at_a_token_shows_its_figures(page):
    ActionChains(page).move_to_element(tokens(page)[2]).perform()
    card = one(page, "#card").text
    for shown in ("chain of thought", "\u22123 (p 0.0498)", "\u22122.5", "\u22120.5", "0.75", "0.09375", "valid"):
        assert shown in card
    ActionChains(page).move_to_element(tokens(page)[5]).perform()
    assert "not sampled" in one(page, "#card").text and "0.125" in one(page, "#card").text
    ActionChains(page).move_to_element(one(page, "#rollouts-title")).perform()
    assert not one(page, "#card").is_displayed()


def test_everything_can_be_done_from_the_keyboard(page):
    buttons = all_of(page, "#samples button")
    page.execute_script("arguments[0].focus()", buttons[1])
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert "no marker" in chosen(page) and buttons[1].get_attribute("aria-pressed") == "true"
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element == tokens(page)[0]
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    focused = page.switch_to.active_element
    assert focused == tokens(page)[1] and "\u22120.5" in one(page, "#card").text
    assert focused.get_attribute("aria-describedby") == "card"
    ActionChains(page).send_keys(Keys.END).perform()
    assert page.switch_to.active_element == tokens(page)[-1]
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not one(page, "#card").is_displayed()


def test_charts_have_a_line_a_run_and_stand_on_one_step_together(page):
    charts = all_of(page, "svg.chart")
    titles = [title.text for title in all_of(page, "#charts h3")]
    assert titles[0].startswith("Bound") and titles[1].startswith("Held-out proxy NLL")
    assert len(charts[0].find_elements(By.CSS_SELECTOR, ".line path")) == 2
    assert charts[0].get_attribute("aria-valuetext") == "step 5, jepo \u22121, rloo \u22120.5"
    page.execute_script("arguments[0].focus()", charts[0])
    ActionChains(page).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    assert charts[0].get_attribute("aria-valuetext") == "step 2, jepo \u22122, rloo \u22123.5"
    kl = next(chart for chart in charts if chart.get_attribute("aria-label").startswith("KL"))
    assert kl.get_attribute("aria-valuetext") == "step 2, jepo 0.2, rloo 0.2"
    select = Select(one(page, "#charts select"))
    select.select_by_value("train_rollouts/kl")
    assert charts[-1].get_attribute("aria-valuetext") == "step 5, jepo 0.3, rloo 0.5"


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_read_at_any_width_in_light_and_dark(page, width, mode, tmp_path):
    show(page, width, mode)
    wide, seen = page.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide == seen <= width  # nothing sticks out
    for selector in ("#tokens .token", "td", "th", "p", "figcaption", "label", ".readout"):
        for contrast in page.execute_script(CONTRASTS, selector):
            assert contrast >= 4.5, selector  # WCAG 2.2, level AA
    backgrounds = {"light": "rgba(255, 255, 255, 1)", "dark": "rgba(15, 19, 23, 1)"}
    assert one(page, "body").value_of_css_property("background-color") == backgrounds[mode]
    image = all_of(page, "#experiments img")[0]
    page.execute_script("arguments[0].scrollIntoView()", image)
    assert page.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image)
    ActionChains(page).move_to_element(tokens(page)[-1]).perform()
    box = one(page, "#card").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.save_screenshot(str(tmp_path / "page.png"))


# Contrast of each element's text with what it stands on, translucent backgrounds laid over each other.
CONTRASTS = """
const channels = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c };
const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
const ground = (node) => node ? over(channels(getComputedStyle(node).backgroundColor), ground(node.parentElement))
                              : [255, 255, 255];
const linear = (value) => value <= 10.31475 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
const light = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
return [...document.querySelectorAll(arguments[0])].filter((node) => node.textContent.trim()).map((node) => {
  const both = [light(channels(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
});
"""
