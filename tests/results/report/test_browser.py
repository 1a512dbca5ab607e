"""The report in a browser: each kind of data, each control, the keyboard, accessibility, and data that is hostile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from axe_core_python.selenium import Axe
from selenium.webdriver import Keys
from selenium.webdriver.support.select import Select

from tests.results.report.making import attribution
from tests.results.report.test_report import HOSTILE, hostile

N, M = 60, 37
RNG = np.random.default_rng(0)
LABELS = [row % 3 for row in range(N + M)]
WORDS = [f"word{row} sentence number {row % 7}" for row in range(N + M)]
IMAGES = RNG.random((N + M, 8, 8))

KINDS = {
    "images": (list(zip(IMAGES, LABELS, strict=True)), "#feed .picture img.pixels"),
    "class maps": ([(image, (image > 0.5) * 2) for image in IMAGES], "#feed .legend .swatch"),
    "texts": ([(text * 40, "short name") for text in WORDS], "#feed .text"),
    "tokens": ([text.split() * (40 if row == N else 1) for row, text in enumerate(WORDS)], "#feed .token"),
    "pairs": (list(zip(IMAGES, WORDS, strict=True)), "#feed .beside .picture + *, #feed .beside .text"),
    "tables": ([{f"column {j}": RNG.normal() for j in range(12)} for _ in range(N + M)], "#feed .marked"),
    "series": ([RNG.normal(size=(80, 2)).cumsum(0) for _ in range(N + M)], "#feed svg polyline"),
    "unknown": ([object()] * (N + M), "#feed .text"),
    "nothing": (None, "#feed .side"),
}


def known(n=N, m=M):
    own = attribution(n, m, warnings=("The loss differs.",))
    return own.with_columns(
        train={"label": [row % 3 for row in range(n)], "source": ["web"] * n},
        targets={"label": [row % 3 for row in range(m)], "prediction": [row % 4 for row in range(m)]},
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The path of a report of each kind of data."""
    folder, made = tmp_path_factory.mktemp("reports"), {}

    def report(kind):
        if kind not in made:
            data, _ = KINDS[kind]
            halves = (None, None) if data is None else (data[:N], data[N:])
            suspects = torch.rand(N, generator=torch.Generator().manual_seed(0))
            made[kind] = known().report(folder / f"{kind}.html", *halves, suspects=suspects, title=f"Of {kind}", k=2)
        return made[kind]

    return report


@pytest.fixture
def images(browser, reports):
    browser.open(reports("images"))
    return browser


def shown(browser):
    """The rows of the targets that are shown."""
    found = browser.run("return [...document.querySelectorAll('#feed article')].map((article) => article.id)")
    return [int(identity.removeprefix("target-")) for identity in found]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_drawn(browser, reports, kind):
    browser.open(reports(kind))
    assert len(browser.all("#feed article")) == 10
    assert browser.all(KINDS[kind][1])
    sizes = browser.run("return [...document.querySelectorAll('#feed img')].map((image) => image.naturalWidth)")
    assert all(size == 8 for size in sizes)
    assert (
        browser.run("return performance.getEntriesByType('resource').filter((one) => !one.name.startsWith('data:'))")
        == []
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", ["", "#suspects", "#trust"])
def test_nothing_is_wider_than_a_phone(browser, reports, kind, page):
    browser.emulate("narrow")
    browser.open(reports(kind), page)
    assert browser.run("const page = document.documentElement; return page.scrollWidth - page.clientWidth") == 0


def test_long_words_are_no_wider_than_a_phone(browser, tmp_path):
    word = "x" * 190
    own = attribution(m=3).with_columns(
        train={"id": [f"{word}{row}" for row in range(30)], word: [word] * 30},
        targets={"id": [f"{word}{row}" for row in range(3)], "label": [word] * 3, word: [word] * 3},
    )
    train = [{"text": word * 9, "tokens": [word, word], "table": {word: 1.0, "b": word}}] * 30
    path = own.report(tmp_path / "report.html", train, train[:3], title=word, suspects=[{"row": 0, word: word}])
    browser.emulate("narrow")
    for page in ("", "#suspects", "#trust"):
        browser.open(path, page)
        assert browser.run("const page = document.documentElement; return page.scrollWidth - page.clientWidth") == 0


@pytest.fixture(scope="module")
def violations():
    """A function that returns what axe finds at a page; of many targets, the first two are looked at."""
    axe = Axe()

    def violations(browser):
        found = axe.run(
            browser.driver,
            {
                "exclude": [
                    ["#feed article:nth-child(n + 3)"],
                    ["tbody tr:nth-child(n + 4)"],
                    [".token:nth-child(n + 4)"],
                ]
            },
        )
        assert len(found["passes"]) > 15
        return [(rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found["violations"]]

    return violations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", ["#targets", "#suspects"])
def test_axe_finds_no_violation(browser, reports, violations, kind, page):
    browser.open(reports(kind), page)
    assert violations(browser) == []


@pytest.mark.parametrize(("size", "scheme"), [("narrow", "light"), ("wide", "dark")])
@pytest.mark.parametrize("page", ["#targets", "#suspects", "#trust"])
@pytest.mark.parametrize("kind", ["images", "tables"])
def test_axe_in_a_narrow_window_and_in_the_dark(browser, reports, violations, size, scheme, page, kind):
    browser.emulate(size, scheme)
    browser.open(reports(kind), page)
    assert violations(browser) == []


# Each control is used by a test that is named beside it. A control that is not here makes the next test fail.
CONTROLS = {
    "input#search": "search",
    "select#order": "order",
    "select#class": "class",
    "input#wrong": "wrong",
    "button#clear": "clear",
    "input#letters": "letters",
    "summary": "keyboard",
    "#pager button": "pages",
    "#pager input": "pages",
    "button.more": "unfolding",
    "a[href^='#target-']": "address",
    "nav a, a.skip": "address",
    "input#suspect-search": "suspects",
    "#suspect-table th button": "suspects",
    "#suspect-pager button, #suspect-pager input": "suspects",
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_controls_are_known(browser, reports, kind):
    browser.open(reports(kind))
    script = """
        const known = new Set(arguments[0].flatMap((selector) => [...document.querySelectorAll(selector)]));
        const all = [...document.querySelectorAll('a, button, input, select, textarea, summary, [onclick]')];
        return all.filter((element) => !known.has(element)).map((element) => element.outerHTML);"""
    assert browser.run(script, list(CONTROLS)) == []
    assert all(f"test_{name}" in globals() for name in CONTROLS.values())


def test_search(images):
    images.one("#search").send_keys("#1")
    expected = [row for row in range(M) if "1" in str(row)[:1]]
    assert images.text("#count") == f"{len(expected)} of 37 targets, page 1 of 2"
    assert shown(images) == expected[:10]
    images.one("#search").send_keys("nothing has this")
    assert images.text("#count") == "0 of 37 targets"
    assert not images.all("#pager")
    assert images.one("#count").get_attribute("role") == "status"


def test_search_reads_texts(browser, reports):
    browser.open(reports("texts"))
    browser.one("#search").send_keys("WORD70 sentence")
    assert shown(browser) == [10]


def test_order(images, reports):
    own = known()
    scores = own.scores.numpy()
    outputs = own.outputs.numpy()
    expected = {
        "as in the data set": list(range(M)),
        "label": sorted(range(M), key=lambda row: row % 3),
        "output, lowest first": np.argsort(outputs).tolist(),
        "output, highest first": np.argsort(-outputs).tolist(),
        "most helpful score first": np.argsort(-scores.max(0)).tolist(),
        "most harmful score first": np.argsort(scores.min(0)).tolist(),
    }
    order = Select(images.one("#order"))
    assert [option.text for option in order.options] == list(expected)
    for name, rows in expected.items():
        order.select_by_visible_text(name)
        assert shown(images) == rows[:10]


def test_class(images):
    choice = Select(images.one("#class"))
    assert [option.text for option in choice.options] == ["all", "0 (13)", "1 (12)", "2 (12)"]
    choice.select_by_visible_text("1 (12)")
    assert shown(images) == list(range(1, 30, 3))
    assert images.text("#count") == "12 of 37 targets, page 1 of 2"


def test_wrong(images):
    images.one("#wrong").click()
    assert shown(images) == [row for row in range(M) if row % 3 != row % 4][:10]
    assert all("✗ wrong" in text for text in images.texts("#feed article"))


def test_clear(images):
    images.one("#wrong").click()
    images.one("#search").send_keys("1")
    Select(images.one("#order")).select_by_index(1)
    images.button("Clear").click()
    assert shown(images) == list(range(10))
    assert images.focused == images.one("#search")
    assert images.one("#search").get_attribute("value") == ""
    assert not images.one("#wrong").is_selected()


def test_controls_that_make_no_sense_are_not_there(browser, tmp_path):
    browser.open(attribution().report(tmp_path / "report.html"))
    assert not browser.all("#class, #wrong, #pager, #suspects-page, .top a[href='#suspects']")
    assert [option.text for option in Select(browser.one("#order")).options][:2] == [
        "as in the data set",
        "output, lowest first",
    ]


def test_pages(images):
    for text, first in (("Next", 10), ("Last", 30), ("Previous", 20), ("First", 0)):
        button = images.button(text, "#pager")
        button.click()
        assert shown(images) == list(range(first, min(first + 10, M)))
        assert images.text("#count") == f"37 targets, page {first // 10 + 1} of 4"
        assert images.focused == button  # also where it can do no more
    assert images.button("First", "#pager").get_attribute("aria-disabled") == "true"
    images.button("First", "#pager").click()
    assert shown(images)[0] == 0
    number = images.one("#pager input")
    for typed, page in (("3", 3), ("99", 4), ("0", 1), ("", 1)):
        number.send_keys(Keys.CONTROL + "a", Keys.NULL, typed or Keys.DELETE, Keys.ENTER)
        assert shown(images)[0] == 10 * (page - 1)
        assert number.get_attribute("value") == str(page)


def test_keyboard(images):
    images.keys("/")
    assert images.focused == images.one("#search")
    images.keys("1", Keys.ESCAPE)
    assert images.text("#count").startswith("37 targets")
    assert images.focused.get_attribute("id") == "targets-title"
    images.keys("j")
    assert images.focused == images.all("#feed article")[0]
    images.keys("j", Keys.ARROW_DOWN)
    assert images.focused == images.all("#feed article")[2]
    images.keys("k", Keys.ARROW_UP, "k")  # nothing is above the first
    assert images.focused == images.all("#feed article")[0]
    for _ in range(10):
        images.keys("j")
    assert shown(images)[0] == 10
    assert images.focused == images.all("#feed article")[0]
    images.keys("k")
    assert images.focused == images.all("#feed article")[9]
    images.keys(Keys.ARROW_RIGHT)
    assert shown(images)[0] == 10
    assert images.focused == images.all("#feed article")[9]  # the focus is not lost with the card that had it
    images.keys(Keys.ARROW_LEFT)
    assert shown(images)[0] == 0
    images.one("summary").click()
    assert "next and previous target" in images.one(".keys dl").text


def test_letters(images):
    images.one("summary").click()
    images.one("#letters").click()
    images.keys("/", "j")
    assert images.focused == images.one("#letters")
    images.one("#letters").click()
    images.keys("j")
    assert images.focused == images.all("#feed article")[0]


def test_one_target_is_in_the_order_of_tab(images):
    assert [found.get_attribute("tabindex") for found in images.all("#feed article")] == ["0"] + ["-1"] * 9
    images.keys("j", "j", "j")
    assert [found.get_attribute("tabindex") for found in images.all("#feed article")].index("0") == 2


def test_address(images, reports):
    for link, page in (("Suspects", "suspects"), ("Trust", "trust"), ("Targets", "targets")):
        images.driver.find_element("link text", link).click()
        images.until(lambda link=link: images.text(".top [aria-current]") == link)
        assert [found.get_attribute("id") for found in images.all("main > section")] == [f"{page}-page"]
        assert images.focused.get_attribute("id") == f"{page}-title"
    images.driver.back()
    images.until(lambda: images.all("#trust-page"))
    images.open(reports("images"), "#target-23")
    assert shown(images) == list(range(20, 30))
    assert images.focused == images.all("#feed article")[3]
    images.click("#target-25 a")
    images.until(lambda: images.focused == images.all("#feed article")[5])
    images.open(reports("images"))
    images.keys(Keys.TAB)
    assert images.focused.text == "Skip to content"
    images.keys(Keys.ENTER)
    images.until(lambda: images.focused.get_attribute("id") == "main")
    assert images.all("#targets-page")
    images.open(reports("images"), "#target-999")
    assert shown(images) == list(range(10))


EXAMPLE = ".side:first-child li:first-child"


@pytest.mark.parametrize(
    ("kind", "selector", "places"),
    [
        ("texts", ".text", ["header", EXAMPLE]),
        ("tokens", ".tokens", ["header"]),
        ("tables", ".values", ["header", EXAMPLE]),
    ],
)
def test_unfolding(browser, reports, kind, selector, places):
    browser.open(reports(kind))
    for place in places:
        within = f"#feed article:first-child {place}"
        before, closed = browser.one(f"{within} {selector}").text, browser.one(f"{within} .more").text
        assert closed.startswith(("Show all", "All 12"))
        browser.click(f"{within} .more")
        assert len(browser.one(f"{within} {selector}").text) > len(before)
        assert browser.one(f"{within} .more").get_attribute("aria-expanded") == "true"
        browser.click(f"{within} .more")
        assert browser.one(f"{within} {selector}").text == before
        assert browser.one(f"{within} .more").text == closed
        assert browser.focused == browser.one(f"{within} .more")


def test_values_that_differ_are_said_in_words(browser, reports):
    browser.open(reports("tables"))
    assert len(browser.all("#feed article:first-child li .marked th[scope=row]")) == 12
    rows = browser.texts("#feed article:first-child li .marked td")
    assert len(rows) == 12  # of two helpful and two harmful examples
    for row in rows:
        own, word, _, other = row.replace("−", "-").split()
        assert word == ("higher" if float(own) > float(other) else "lower")


def test_suspects(images, reports):
    images.open(reports("images"), "#suspects")
    values = torch.rand(N, generator=torch.Generator().manual_seed(0))
    ranked = np.argsort(-values.numpy())

    def rows():
        return [int(text[1:]) for text in images.texts("#suspect-table tbody td:nth-child(2)")]

    assert rows() == ranked[:25].tolist()
    assert images.text("#suspect-count") == "60 suspects"
    assert len(images.all("#suspect-table img")) == 25
    heads = dict(zip(images.texts("#suspect-table th button"), images.all("#suspect-table th button"), strict=True))
    assert list(heads) == ["rank", "example", "label", "source", "self-influence"]
    heads["self-influence"].click()
    assert rows() == ranked[:25].tolist()
    heads["self-influence"].click()
    assert rows() == ranked[::-1][:25].tolist()
    assert images.text("#suspect-table th[aria-sort]") == "self-influence"
    assert images.one("#suspect-table th[aria-sort]").get_attribute("aria-sort") == "ascending"
    heads["example"].click()
    assert rows() == list(range(25))
    heads["source"].click()
    heads["label"].click()
    assert set(images.texts("#suspect-table tbody td:nth-child(4)")) == {"0", "1"}
    heads["rank"].click()
    images.button("Next", "#suspect-pager").click()
    assert rows() == ranked[25:50].tolist()
    images.keys(Keys.ARROW_RIGHT)
    assert rows() == ranked[50:].tolist()
    images.one("#suspect-pager input").send_keys(Keys.CONTROL + "a", Keys.NULL, "1", Keys.ENTER)
    images.one("h2").click()
    images.keys("/")
    assert images.focused == images.one("#suspect-search")
    images.keys("#5")
    assert rows() == [row for row in ranked if str(row).startswith("5")]
    assert images.text("#suspect-count") == f"{len(rows())} of 60 suspects"


def test_five_thousand_targets_have_the_elements_of_one_page(browser, tmp_path):
    own = known(n=50, m=5000)
    images = list(zip(RNG.random((5000, 8, 8)), [row % 10 for row in range(5000)], strict=True))
    browser.open(own.report(tmp_path / "report.html", images[:50], images))
    assert browser.text("#count") == "5000 targets, page 1 of 500"
    assert len(browser.all("#feed article")) == 10
    assert browser.run("return document.querySelectorAll('body *').length") < 4000
    before = browser.run("return document.querySelectorAll('body *').length")
    browser.button("Last", "#pager").click()
    assert shown(browser) == list(range(4990, 5000))
    assert abs(browser.run("return document.querySelectorAll('body *').length") - before) < 200
    Select(browser.one("#class")).select_by_index(2)
    browser.one("#wrong").click()
    browser.one("#search").send_keys("#49")
    expected = [row for row in range(5000) if row % 3 == 1 and row % 4 != 1 and str(row).startswith("49")]
    assert shown(browser) == expected[:10]
    assert all(size == 8 for size in browser.run("return [...document.images].map((image) => image.naturalWidth)"))


def test_drawings_are_parsed_when_they_are_shown(browser, tmp_path):
    """They are in many parts; of a large file, a browser shows the first page before it has read the rest."""
    texts = [f"{row} " + "x" * 1990 for row in range(N + M)] * 4
    own = known(n=4 * N, m=4 * M)
    browser.open(own.report(tmp_path / "report.html", texts[: 4 * N], texts[: 4 * M], k=1))
    assert browser.run("return document.querySelectorAll('script[id^=drawn-]').length") >= 3
    for page in (1, 8, 15):
        browser.one("#pager input").send_keys(Keys.CONTROL + "a", Keys.NULL, str(page), Keys.ENTER)
        for row, text in zip(shown(browser), browser.texts("#feed header .text"), strict=True):
            assert text.split()[0] == str(row % (N + M))


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_hostile_data_stays_text(browser, tmp_path, text):
    folder = tmp_path / "<img src=x onerror=alert(1)>" / '"><script>alert(1)<'
    browser.open(hostile(text, folder))
    for page in ("#targets", "#suspects", "#trust"):
        browser.go(page)
        assert (
            browser.run("return document.querySelectorAll('[onerror], img[src=x], main script, section b').length") == 0
        )
        assert browser.run("return document.querySelectorAll('script:not([type])').length") == 1
    browser.go("#targets")
    assert browser.one("h1").text == text
    for selector in ("#feed h3", "#feed .known dt", "#feed .text", "#feed .token", "#feed .values th", "#feed .about"):
        assert any(text in found for found in browser.texts(selector)), selector
    assert text in browser.one("#class").text
    browser.one("#search").send_keys(text)
    assert len(browser.all("#feed article")) == 3


def test_inline_handlers_and_requests_are_refused(browser, images):
    """What if some text were taken for HTML all the same? It could do nothing."""
    attempts = (
        "image.setAttribute('onerror', 'window.ran = 1')",
        "script.text = 'window.ran = 1'; document.body.append(script)",
        "document.body.insertAdjacentHTML('beforeend', '<b id=injected>x</b>')",
    )
    elements = "const [image, script] = ['img', 'script'].map((name) => document.createElement(name));"
    for attempt in attempts:
        assert images.run(f"{elements} try {{ {attempt} }} catch (error) {{ return error.name }}"), attempt
    images.run(f"{elements} image.src = 'https://example.org/x.png'; document.body.append(image)")
    assert images.run("return [window.ran ?? null, document.getElementById('injected')]") == [None, None]
    said = browser.console
    assert any("example.org" in message and "Content Security Policy" in message for message in said)
    assert not any("net::ERR" in message for message in said)


def test_print_has_all_pages_and_no_controls(browser, reports):
    browser.open(reports("images"))
    browser.emulate(media="print", scheme="dark")
    assert len(browser.all("main > section")) == 3
    assert not browser.all("input, select, nav, .tools, .keys, .more")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_dark_scheme(browser, reports):
    browser.emulate(scheme="dark")
    browser.open(reports("images"))
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 22, 25)"


def test_signs_besides_colour(images):
    for side, sign, first in (("helpful", "▲", "+"), ("harmful", "▼", "−")):
        assert all(text.startswith(sign) for text in images.texts(f"#feed h4.{side}"))
        scores = images.texts(f"#feed .score.{side}")
        assert len(scores) == 20
        assert all(score.split()[-1].startswith(first) for score in scores)
