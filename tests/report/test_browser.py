"""The pages in a real browser: what a reader's screen shows, at two widths and in both schemes."""

from __future__ import annotations

import shutil

import pytest

from shared.run_folders import log
from softlabels.report import Variant, write_comparison, write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Everything that is wrong with the page as it is drawn, in words.
FIND_FAULTS = """
const faults = [];
const name = e => (e.textContent || e.outerHTML).trim().slice(0, 40);
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width)
  faults.push(`page is ${document.documentElement.scrollWidth} wide, the window ${width}`);
for (const e of document.querySelectorAll('main *')) {
  const box = e.getBoundingClientRect();
  if (box.width && (box.right > width + 1 || box.left < -1) && !e.closest('.scroll, pre, .sr'))
    faults.push(`${e.tagName} "${name(e)}" leaves the window: ${box.left} to ${box.right}`);
}
for (const e of document.querySelectorAll('img'))
  if (!e.alt.trim() || !e.naturalWidth) faults.push(`no text or content: ${e.outerHTML}`);
for (const svg of document.querySelectorAll('svg')) {
  const label = svg.getAttribute('aria-label') || '';
  if (svg.getAttribute('role') !== 'img' || !label.trim()) faults.push('svg without a description');
  const frame = svg.getBoundingClientRect();
  const crowded = label.startsWith('Scatter');  // letters are points there
  const texts = [...svg.querySelectorAll('text')].map(e => [e, e.getBoundingClientRect()]);
  texts.forEach(([e, box], i) => {
    if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 ||
        box.bottom > frame.bottom + 2)
      faults.push(`"${name(e)}" leaves its chart: ${label.slice(0, 60)}`);
    for (const [other, box2] of crowded ? [] : texts.slice(i + 1)) {
      const across = Math.min(box.right, box2.right) - Math.max(box.left, box2.left);
      const down = Math.min(box.bottom, box2.bottom) - Math.max(box.top, box2.top);
      // A line of text has some empty space above and below its letters.
      if (across > 1 && down > 0.3 * box.height)
        faults.push(`"${name(e)}" lies on "${name(other)}": ${label.slice(0, 60)}`);
    }
  });
}
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = text => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = c => c.slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const style = getComputedStyle(e);
    // A bar behind the text of a cell counts as its background.
    if (style.backgroundImage.includes('gradient')) return rgba(style.getPropertyValue('--bar'));
    const color = rgba(style.backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255, 255];
};
const seen = new Set();
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const style = getComputedStyle(e);
  const front = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
  const back = behind(e);
  const [light, dark] = [luminance(rgba(front)), luminance(back)].sort((a, b) => b - a);
  const contrast = (light + 0.05) / (dark + 0.05);
  const key = `${front} on ${back}`;
  if (contrast < 4.5 && !seen.has(key)) {
    seen.add(key);
    faults.push(`contrast ${contrast.toFixed(2)} of "${name(e)}", ${key}`);
  }
}
return faults;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.fail("needs chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture
def page(request, make_run, make_analysis, make_gallery, tmp_path):
    """One of three pages: of eight variants, of ten without an analysis, of a single run."""
    long = "a method with a rather long name"
    classes = ["cat", "golden retriever", "\u011f", "Welsh springer spaniel, a dog"]

    def variant(name, number, seeds=2, **options):
        folders = [
            make_run(
                f"{request.param}{number}-{seed}",
                label=name,
                method=None if number == 0 else "x",
                seed=seed,
                final={"top1": 50.0 + number / 3 + seed, "nll": 2.0, "ece": 5.0 - number / 9},
                metrics=log(50 + number / 3 + seed, (0.98 - number / 50, 0.02 + number / 50)),
                environment={"torch": "2.6.0", "processor": "a processor of some name " * 4},
                **options,
            )
            for seed in range(seeds)
        ]
        return Variant(name, tuple(folders))

    def analysis(number):
        return {
            "analysis": make_analysis(
                classes, per_class=[50.0 + number, 100.0 - 9 * number, 70.0 + 2 * number, 0.0]
            ),
            "gallery": make_gallery(classes),
        }

    output = tmp_path / "page.html"
    if request.param == "run":
        run = variant("cross_entropy", 1, seeds=1, **analysis(1)).folders
        return write_report(run, output, title="One run")
    count = 8 if request.param == "eight" else 10
    names = ["cross_entropy", long, *(f"method_{i}" for i in range(2, count))]
    variants = [
        variant(name, i, **(analysis(i) if request.param == "eight" else {}))
        for i, name in enumerate(names)
    ]
    table = [
        {
            "top-1 (%)": "50.12 \u00b1 0.31",
            "change (points)": "+0.52 [\u22120.10, +1.14]",
            "seconds per epoch": "5.1",
        }
    ] * count
    notes = ["Two seeds are too few for an exact test."]
    return write_comparison(
        variants,
        output,
        title="A comparison",
        table=table,
        notes=notes,
        command="softlabels compare",
    )


@pytest.mark.parametrize("page", ["eight", "many", "run"], indirect=True)
def test_page_is_as_it_should_be_on_screens_of_all_kinds(browser, page):
    for width in (360, 1100):
        for scheme in ("light", "dark"):
            browser.get_log("performance")
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            browser.get(page.as_uri())
            for element in browser.find_elements("tag name", "details"):
                browser.execute_script("arguments[0].open = true", element)
            assert browser.execute_script(FIND_FAULTS) == [], (width, scheme)
            background = browser.execute_script(
                "return getComputedStyle(document.body).backgroundColor"
            )
            assert (background == "rgb(252, 252, 251)") == (scheme == "light")
            assert [entry["message"] for entry in browser.get_log("browser")] == []
            asked = [
                entry["message"]
                for entry in browser.get_log("performance")
                if "Network.requestWillBeSent" in entry["message"]
            ]
            outside = [m for m in asked if '"url":"file:' not in m and '"url":"data:' not in m]
            assert asked
            assert outside == []
