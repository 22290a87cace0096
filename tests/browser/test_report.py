"""The report in a real browser: quiet, complete, equal to its records, safe with hostile text, good without a mouse."""

from __future__ import annotations

import pytest

from kvprofile.records.record import Request, Verdict
from kvprofile.report.charts import charts
from tests.helpers.made_up import LEGS, make_leg, make_record

HOSTILE = [
    "<script>window.pwned = 1; alert(1)</script>",
    "</pre></details></main><img src=x onerror='window.pwned = 2'>",
    "\u202eright to left override\u202c and \u2066isolate",
    "שלום עולם, هذا نص من اليمين إلى اليسار",
    "\x00\x1b[31m\x07 control \x9b31m",
    "<svg onload=window.pwned=3><style>*{display:none!important}</style>",
    "unbroken" * 12_500,
    "&lt;b&gt; &amp;amp; {{ 7 * 7 }} {% raw %}",
]


@pytest.fixture(scope="module")
def seed_page(written):
    """The page of a whole seed plan, three repetitions."""
    return written(make_record())


@pytest.fixture(scope="module")
def hostile_page(written):
    requests = [
        Request(
            document="documents & <tags>", question=f"{text} {number}", output=text, expected=text, error=None,
            verdicts=[Verdict(name="answer <i>", passed=number % 2 == 0, warnings=[text])],
        )
        for number, text in enumerate(HOSTILE)
    ]  # fmt: skip
    requests.append(Request(question="failed", error="<script>window.pwned = 4</script>"))
    legs = [
        make_leg(
            name, documents=[], requests=requests, model="<b>model</b>", warnings=["<script>window.pwned=5</script>"]
        )
        for name in ("baseline", "0.5")
    ]
    legs.append(make_leg("remote", status="failed", reason="<script>window.pwned=6</script>"))
    record = make_record(1, name="</title><script>window.pwned=7</script>", settings={"<i>key</i>": "<b>value</b>"})
    return written(record.model_copy(update={"legs": legs}))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_says_nothing_and_asks_for_nothing(opened, seed_page, scheme):
    path, _ = seed_page
    found = opened(path, color_scheme=scheme)
    found.page.wait_for_load_state("networkidle")
    assert found.said == []
    assert [url for url in found.requested if url != path.as_uri() and not url.startswith("data:")] == []
    assert found.page.title() == "seed plan \N{EN DASH} kvprofile report"


def test_every_chart_and_table_is_drawn(opened, seed_page):
    path, summary = seed_page
    page = opened(path).page
    expected = charts(summary)
    drawn = page.eval_on_selector_all(
        "figure.chart",
        """figures => figures.map(figure => {
            const svg = figure.querySelector('svg'), frame = svg.getBoundingClientRect();
            const shapes = [...svg.querySelectorAll('.series path, .series circle')];
            const boxes = shapes.map(shape => shape.getBoundingClientRect());
            return {
                id: figure.id, width: frame.width, height: frame.height, shapes: shapes.length,
                empty: boxes.filter(box => !(box.width + box.height > 0)).length,
                outside: boxes.filter(box => box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2).length,
                invisible: shapes.filter(shape => {
                    const style = getComputedStyle(shape);
                    const nothing = ['none', 'rgba(0, 0, 0, 0)'];
                    return nothing.includes(style.stroke) && nothing.includes(style.fill);
                }).length,
                rows: figure.querySelectorAll('tbody tr').length,
                texts: svg.querySelectorAll('text').length,
            };
        })""",
    )
    assert [each["id"] for each in drawn] == [f"chart-{chart.key}" for chart in expected]
    for each, chart in zip(drawn, expected, strict=True):
        assert each["width"] > 250, each
        assert each["height"] > 150, each
        assert each["shapes"] >= len(chart.series), each
        assert each["empty"] == each["outside"] == each["invisible"] == 0, each
        assert each["rows"] == len(chart.table.rows), each
        assert each["texts"] >= len(chart.x_ticks) + len(chart.y_ticks)
    assert page.locator("svg.map").count() == 3
    assert page.locator("svg.map").first.locator("rect").count() == 28 * 4
    assert page.locator("table.side").count() == 2
    assert page.locator(".card").count() == 9
    assert page.locator("details.question").count() == 9
    empty = page.eval_on_selector_all("table", "tables => tables.filter(t => !t.querySelector('td')).length")
    assert empty == 0


def test_axis_labels_do_not_overlap(opened, seed_page):
    page = opened(seed_page[0]).page
    overlapping = page.eval_on_selector_all(
        "figure.chart svg",
        """svgs => svgs.flatMap(svg => {
            const texts = [...svg.querySelectorAll('text')];
            const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
            return boxes.flatMap(([a, one], i) => boxes.slice(i + 1)
                .filter(([, other]) => one.left < other.right && other.left < one.right
                    && one.top + 2 < other.bottom && other.top + 2 < one.bottom)
                .map(([b]) => `${svg.closest('figure').id}: ${a} | ${b}`));
        })""",
    )
    assert overlapping == []


def shown_numbers(page):
    """{(reference, key, leg): (number in full, number as read)} of the side-by-side tables."""
    rows = page.eval_on_selector_all(
        "table.side",
        """tables => tables.flatMap(table => {
            const legs = [...table.querySelectorAll('thead .name')].map(each => each.textContent);
            const rows = [...table.querySelectorAll('tr[data-key]')];
            return rows.flatMap(row => [...row.querySelectorAll('td')].map((cell, i) => {
                const found = cell.querySelector(':scope > data');
                const apart = cell.querySelector('.apart data');
                return [table.dataset.reference, row.dataset.key, legs[i], found && found.value, cell.innerText,
                        apart && apart.value];
            }));
        })""",
    )
    return {(reference, key, leg): (value, text, apart) for reference, key, leg, value, text, apart in rows}


def test_numbers_are_those_of_the_summary(opened, seed_page):
    path, summary = seed_page
    shown = shown_numbers(opened(path).page)
    checked = 0
    for comparison in (summary.against_baseline, *summary.against_remote):
        for row in comparison.rows:
            for leg, estimate in row.values.items():
                value, text, apart = shown.pop((comparison.reference, row.key, leg))
                assert (value and float(value)) == estimate.value
                difference = row.differences.get(leg)
                assert (apart and float(apart)) == (difference and difference.value)
                if estimate.value is not None and row.unit in ("tokens/s", "ms", "s", "x"):
                    read = float(text.split()[0].replace(",", ""))
                    assert read == pytest.approx(estimate.value, rel=0.006), (row.key, leg)
                checked += 1
    assert checked > 250
    assert {value for value, _, _ in shown.values()} <= {None}  # legs that a comparison leaves out


def test_numbers_of_one_repetition_are_those_of_the_record(opened, written):
    record = make_record(1)
    path, _ = written(record)
    page = opened(path).page
    shown = shown_numbers(page)
    for leg in record.legs:
        for key in ("output_throughput", "mean_ttft_ms", "median_tpot_ms", "p99_itl_ms", "median_e2el_ms", "duration",
                    "completed", "total_output_tokens"):  # fmt: skip
            assert float(shown["baseline", key, leg.name][0]) == getattr(leg.metrics, key)
        if leg.kind == "local":
            assert float(shown["baseline", "pool_bytes_peak", leg.name][0]) == leg.memory.pool_bytes_peak
            assert float(shown["baseline", "eviction_ratio", leg.name][0]) == leg.eviction_ratio
            assert float(shown["baseline", "attention_mean_ms", leg.name][0]) == leg.attention.mean_ms
    pool = page.eval_on_selector_all(
        "#chart-pool tbody td:last-child data", "all => all.map(each => Number(each.value))"
    )
    recorded = {sample.pool_bytes_in_use for leg in record.legs for sample in leg.samples}
    assert len(pool) >= 20
    assert set(pool) <= recorded
    heads = page.eval_on_selector_all("#heads-1 tbody td data", "all => all.map(each => Number(each.value))")
    budgets = next(leg.heads.budgets for leg in record.legs if leg.heads)
    assert heads == [value for row in budgets for value in row]
    assert page.locator("#heads-1 rect.full").count() == sum(map(sum, budgets))


def test_hostile_text_stays_text(opened, hostile_page):
    path, _ = hostile_page
    found = opened(path)
    page = found.page
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    page.wait_for_load_state("networkidle")
    assert found.said == []
    assert [url for url in found.requested if url != path.as_uri() and not url.startswith("data:")] == []
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.scripts.length") == 0
    assert page.locator("img, iframe, object, embed, form, b, i").count() == 0
    assert page.locator("style").count() == 1
    shown = page.locator("pre").all_text_contents()
    assert HOSTILE[0] in shown
    assert HOSTILE[3] in shown
    assert HOSTILE[7] in shown
    assert any(text.startswith("unbroken") and text.endswith("more characters are in the record") for text in shown)
    assert not any(
        "\u202e" in text or "\x1b" in text or "\x00" in text for text in page.locator("body").all_text_contents()
    )
    assert page.locator("h1").text_content() == "</title><script>window.pwned=7</script>"
    assert page.evaluate("getComputedStyle(document.body).direction") == "ltr"
    arabic = page.locator("pre", has_text="שלום").first
    assert arabic.evaluate("each => getComputedStyle(each).direction") == "rtl"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_do_not_scroll_sideways(opened, seed_page, hostile_page, width):
    for path, _ in (seed_page, hostile_page):
        page = opened(path, viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True).page
        page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_is_reached_by_the_keyboard(opened, seed_page):
    page = opened(seed_page[0]).page
    wanted = page.eval_on_selector_all(
        "a[href], summary, [tabindex='0']",
        "all => all.filter(each => each.checkVisibility()).map((each, i) => (each.dataset.stop = String(i)))",
    )
    reached, bare = [], []
    for number in range(len(wanted) + 3):
        page.keyboard.press("Tab")
        stop, outline = page.evaluate(
            "(e => [e.dataset.stop ?? null, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        if number == 0:
            assert page.evaluate("document.activeElement.className") == "skip"
            assert page.locator(".skip").bounding_box()["y"] >= 0
        if stop is None:
            break
        reached.append(stop)
        if outline == "none":
            bare.append(stop)
    assert reached == wanted
    assert bare == []


def test_keys_open_questions_and_skip_to_the_content(opened, seed_page):
    page = opened(seed_page[0]).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    question = page.locator("details.question").first
    question.locator("summary").focus()
    page.keyboard.press("Enter")
    assert question.evaluate("each => each.open")
    assert question.locator("pre").count() == 5
    chart = page.locator("#chart-pool details")
    chart.locator("summary").focus()
    page.keyboard.press("Space")
    assert chart.locator("table").is_visible()


def test_axe_does_not_find_barriers(opened, written):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe, of the extra 'dev'").Axe()
    path, _ = written(make_record(2, legs=("baseline", "0.5", "remote"), looks=4))
    page = opened(path, bypass_csp=True).page  # axe is a script, which the page's policy forbids
    page.eval_on_selector_all(
        "#charts details, .question:nth-of-type(2)", "all => all.forEach(each => each.open = true)"
    )
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        results = axe.run(page, options={"resultTypes": ["violations"], **rules}).response
        assert [(each["id"], each["nodes"][0]["html"][:200]) for each in results["violations"]] == []
        assert results["passes"]


def test_charts_have_names_and_words_for_those_who_do_not_see_them(opened, seed_page):
    page = opened(seed_page[0]).page
    tree = page.locator("#charts").aria_snapshot()
    assert 'img "Output throughput baseline' in tree
    nameless = page.eval_on_selector_all(
        "svg[role=img]",
        """all => all.filter(svg => svg.getAttribute('aria-labelledby').split(' ')
            .some(id => !document.getElementById(id)?.textContent.trim())).length""",
    )
    assert nameless == 0
    ids = page.eval_on_selector_all("[id]", "all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))


def test_paper_has_everything_but_the_controls(opened, seed_page):
    page = opened(seed_page[0], color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert page.locator("details.question pre").first.evaluate(
        "each => each.checkVisibility({contentVisibilityAuto: true})"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_failures_and_absent_numbers_have_a_page_too(opened, written):
    legs = [make_leg(name, status="failed", reason="out of memory") for name in LEGS]
    path, _ = written(make_record(1).model_copy(update={"legs": legs}))
    found = opened(path)
    assert found.said == []
    assert "No leg finished" in found.page.locator("#summary").inner_text()
    assert "leg 0.5, repetition 1, failed: out of memory" in found.page.locator(".doubts").inner_text()
    bare = make_leg("0.5", retention_asked=None, retention_realised=None, compressed=None, kind=None, dtype=None,
                    engine=None, device=None, pool_bytes=None, block_tokens=None, documents=[], seeds=[], requests=[],
                    samples=[], eviction_ratio=None, attention=None, bound=None, heads=None)  # fmt: skip
    path, _ = written(make_record(1).model_copy(update={"legs": [bare]}))
    found = opened(path)
    assert found.said == []
    assert found.page.locator("figure.chart").count() >= 4
