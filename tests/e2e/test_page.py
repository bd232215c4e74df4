"""The page in headless Chromium, before a real service with the bundled model."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
from PIL import Image

from server.model_spec import BUNDLED_NAME
from tests.e2e.behind import behind
from tests.e2e.service import Service, StartService

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is driven by playwright: pip install playwright"
)
from playwright.sync_api import (  # noqa: E402
    APIResponse,
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Response,
    Route,
    expect,
    sync_playwright,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"),
]

MODEL = f"/v1/models/{BUNDLED_NAME}"
TOKENS, BLOCKS = 257, 12
SOON_MS = 20_000
expect.set_options(timeout=SOON_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


COUNT_REQUESTS = """
    const { fetch } = window;
    let open = 0;
    window.mostAtOnce = 0;
    window.fetch = async (path, options) => {
        if (!/v1\\/(classify|explain)/.test(path)) return fetch(path, options);
        mostAtOnce = Math.max(mostAtOnce, ++open);
        try {
            return await fetch(path, options);
        } finally {
            open -= 1;
        }
    };
"""


class Watched:
    """A page and all that it does. No request may leave the origin, and no error may be overlooked."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.url = url
        self.requests: list[str] = []
        self.expected_errors = [r"/curve$"]  # a model without a measured curve answers 404, and Chromium logs that
        self._errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._told)
        self.page.on("pageerror", lambda error: self._errors.append(f"uncaught: {error}"))

    def _told(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._errors.append(f"{message.text} ({message.location.get('url', '')})")

    def open(self) -> Page:
        """Opens the page, and waits until both sides have looked at the first sample."""
        self.page.goto(f"{self.url}/")
        expect(self.page.locator("#a-caption")).to_contain_text("tokens")
        expect(self.page.locator("#b-caption")).to_contain_text("tokens")
        return self.page

    def close(self) -> None:
        """Closes the page, and checks what it has done."""
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.context.close()
        strangers = [url for url in self.requests if not url.startswith((f"{self.url}/", "data:", "blob:"))]
        assert strangers == []
        expected = re.compile("|".join(self.expected_errors))
        assert [error for error in self._errors if not expected.search(error.rstrip(")"))] == []


@pytest.fixture
def watched(browser: Browser, shared_service: Service) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    watched = Watched(context, shared_service.url)
    yield watched
    watched.close()


def png(colour: str = "red") -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(file, "PNG")
    return file.getvalue()


def caption(r: int, block: int = BLOCKS) -> str:
    """What stands below a picture."""
    return f"{TOKENS - r * block} tokens of {TOKENS} after block {block}"


def test_a_sample_is_answered_without_a_click(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    expect(page.locator("#b-caption")).to_have_text(caption(0))
    expect(page.locator("#a-bars li")).to_have_count(5)
    expect(page.locator("#a-bars li").first).to_contain_text("beacon")
    expect(page.locator("#verdict")).to_contain_text(re.compile("^Same answer.*: beacon."))
    expect(page.locator("#a-work")).to_have_text(f"{round(100 * (TOKENS - 16 * 6.5) / TOKENS)} %")
    expect(page.locator("#a-ms")).to_have_text(re.compile(r"^[\d.]+ ms$"))
    expect(page.locator("#health")).to_have_text("ready")


def test_another_sample_is_another_answer(watched: Watched) -> None:
    page = watched.open()
    page.get_by_role("button", name="Ladybug").click()
    expect(page.locator("#verdict")).to_contain_text(re.compile("^Same answer.*: ladybug."))
    expect(page.get_by_role("button", name="Ladybug")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Lighthouse")).to_have_attribute("aria-pressed", "false")


def test_the_slider_sends_one_request_at_a_time_and_ends_on_the_last_value(watched: Watched) -> None:
    watched.page.add_init_script(COUNT_REQUESTS)
    page = watched.open()
    page.locator("#a-dial").focus()
    for key in ["ArrowRight"] * 12 + ["ArrowLeft"] * 3:
        page.keyboard.press(key)
    expect(page.locator("#a-r")).to_have_text("18")  # 16 and 12 more is past the end, which is 21
    expect(page.locator("#a-caption")).to_have_text(caption(18))
    expect(page.locator("#a-tokens")).to_have_text(f"{TOKENS - 18 * BLOCKS} of {TOKENS}")
    assert page.evaluate("mostAtOnce") == 1
    asked = [int(found[1]) for url in watched.requests if (found := re.search(r"/v1/explain.*&r=(\d+)", url))]
    assert asked[-1] == 18


def test_the_bars_of_a_slider_are_the_servers_answer(watched: Watched) -> None:
    page = watched.open()
    page.get_by_role("button", name="School bus").click()
    page.locator("#a-dial").fill("18")
    expect(page.locator("#a-caption")).to_have_text(caption(18))
    photo = httpx.get(f"{watched.url}/static/samples/school-bus.jpg").content
    headers = {"content-type": "image/jpeg"}
    answer = httpx.post(f"{watched.url}/classify", params={"r": 18}, content=photo, headers=headers).json()
    expected = [f"{each['label']}{100 * each['score']:.1f} %" for each in answer["results"][0]["top_k"]]
    expect(page.locator("#a-bars li")).to_have_text(expected)
    widths = page.locator("#a-bars li").evaluate_all("bars => bars.map(bar => +bar.style.getPropertyValue('--share'))")
    assert widths == pytest.approx([each["score"] for each in answer["results"][0]["top_k"]])


def test_two_settings_that_differ_are_said_to_differ(watched: Watched) -> None:
    def other_class(route: Route) -> None:
        response = route.fetch()
        body = response.json()
        body["results"][0]["top_k"][0]["label"] = "teapot, kettle"
        route.fulfill(response=response, json=body)

    watched.page.route(re.compile(r"/v1/classify.*&r=16"), other_class)
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text(re.compile("^Different answers.*: A says teapot, B says beacon."))
    expect(page.locator("#verdict")).to_have_attribute("data-agree", "no")


IS_GREY = """part => {
    document.getAnimations().forEach((animation) => animation.finish());
    for (let each = part; each; each = each.parentElement) if (getComputedStyle(each).opacity < 1) return true;
    return false;
}"""


def is_grey(page: Page, part: str) -> bool:
    """Whether a part of the page, or an element around it, is greyed out or about to be."""
    return bool(page.locator(part).evaluate(IS_GREY))


class Answers:
    """Answers of /v1/classify with times and backends that a test sets; everything else is the server's.

    Attributes:
        times: Inference times in milliseconds that an r gets, one after the other; the last one stays.
        by: Backend and precision that compute an r.
        asked: The r of every classification.
        compiling: As the model tells of it.
    """

    def __init__(self, page: Page) -> None:
        self.times: dict[int, list[float]] = {16: [25.0], 0: [40.0]}
        self.by = {16: ("openvino", "bf16"), 0: ("openvino", "bf16")}
        self.asked: list[int] = []
        self.compiling: dict[str, Any] | None = None
        page.route(re.compile("/v1/classify"), self._classify)
        page.route(f"**{MODEL}", self._model)

    def _classify(self, route: Route) -> None:
        response = route.fetch()
        body = response.json()
        r = body["r"]
        self.asked.append(r)
        times = self.times[r]
        body["timings_ms"]["inference"] = times.pop(0) if len(times) > 1 else times[0]
        body["computed_by"] = dict(zip(("backend", "precision"), self.by[r], strict=True))
        route.fulfill(response=response, json=body)

    def _model(self, route: Route) -> None:
        response = route.fetch()
        body = response.json()
        body |= {"backend": {"name": "openvino", "precision": "bf16", "reason": ""}, "compiling": self.compiling}
        route.fulfill(response=response, json=body)


def test_the_gain_is_told_in_words_and_milliseconds(watched: Watched) -> None:
    Answers(watched.page)
    page = watched.open()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Same answer, A is 1.6× as fast: beacon.")
    expect(verdict).to_contain_text("A takes 25 ms, B 40 ms: medians of 5 inferences each.")
    expect(page.locator("#a-ms")).to_have_text("25 ms")
    expect(page.locator("#a-by")).to_have_text("openvino, bf16")
    wide = [page.locator(f"#{side}-time").evaluate("bar => bar.style.getPropertyValue('--share')") for side in "ab"]
    assert [float(share) for share in wide] == pytest.approx([25 / 40, 1])


@pytest.mark.parametrize(
    ("ms", "words"), [(41.0, "Same answer, equally fast"), (60.0, "Same answer, B is 1.5× as fast")]
)
def test_no_gain_is_claimed_where_there_is_none(watched: Watched, ms: float, words: str) -> None:
    Answers(watched.page).times[16] = [ms]
    expect(watched.open().locator("#verdict")).to_contain_text(words)


def test_twenty_times_are_measured_in_turns_and_their_medians_are_told(watched: Watched) -> None:
    answers = Answers(watched.page)
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text("medians of 5")
    answers.asked.clear()
    answers.times = {16: [*map(float, range(21, 41)), 99.0], 0: [*map(float, range(70, 50, -1)), 99.0]}
    page.get_by_role("button", name="Measure 20 times").click()
    expect(page.locator("#verdict")).to_contain_text("medians of 20")
    expect(page.locator("#verdict")).to_contain_text("A takes 31 ms, B 61 ms")  # 30.5 and 60.5
    expect(page.locator("#verdict")).to_contain_text("A is 2.0× as fast")
    assert sorted(answers.asked) == [0] * 20 + [16] * 20
    pairs = [set(answers.asked[at : at + 2]) for at in range(0, 40, 2)]
    assert pairs == [{0, 16}] * 20
    assert answers.asked[0::2] == [16, 0] * 10 or answers.asked[0::2] == [0, 16] * 10  # each goes first as often


def test_only_medians_of_one_measurement_are_compared(watched: Watched) -> None:
    answers = Answers(watched.page)
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text("medians of 5")
    page.evaluate("""() => {
        window.verdicts = [];
        new MutationObserver(() => verdicts.push(document.getElementById("verdict").textContent))
            .observe(document.getElementById("verdict"), { childList: true, subtree: true, characterData: true });
    }""")
    answers.times = {16: [10.0], 0: [16.0]}  # all at once faster, as when a compilation ends
    page.get_by_role("button", name="Measure 20 times").click()
    expect(page.locator("#verdict")).to_contain_text("medians of 20")
    verdicts = page.evaluate("verdicts")
    assert len(verdicts) >= 40 and {verdict.split(":")[0] for verdict in verdicts} == {"Same answer, A is 1.6× as fast"}


def test_times_of_two_backends_are_not_compared_and_follow_once_both_are_compiled(watched: Watched) -> None:
    answers = Answers(watched.page)
    answers.times[16], answers.by[16] = [100.0], ("torch", "fp32")
    answers.compiling = {"r": 16, "done": 2, "total": 9}
    page = watched.open()
    verdict, health = page.locator("#verdict"), page.locator("#health")
    expect(verdict).to_contain_text("Compiling r = 16 (3 of 9): the times follow.")
    expect(verdict).to_contain_text("Same answer: beacon.")
    expect(page.locator("#a-by")).to_have_text("torch, fp32")
    shares = [page.locator(f"#{side}-time").evaluate("bar => bar.style.getPropertyValue('--share')") for side in "ab"]
    assert shares == ["0", "0"]  # no bars side by side
    expect(health).to_have_text("ready, compiling r = 16 (3 of 9)")
    answers.compiling = {"r": [16, 8, 0], "done": 8, "total": 9}
    expect(health).to_have_text("ready, compiling r = 16, 8 (9 of 9)")
    expect(verdict).to_contain_text("Compiling r = 16, 8 (9 of 9): the times follow.")
    curves = len([url for url in watched.requests if url.endswith("/curve")])
    answers.times[16], answers.by[16], answers.compiling = [20.0], ("openvino", "bf16"), None
    expect(health).to_have_text("ready")
    expect(verdict).to_contain_text("Same answer, A is 2.0× as fast: beacon.")
    assert len([url for url in watched.requests if url.endswith("/curve")]) > curves  # it has new speeds


def test_two_backends_for_good_are_said_to_be_two(watched: Watched) -> None:
    answers = Answers(watched.page)
    answers.by[16] = ("torch", "fp32")
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text(
        "A was computed by torch, fp32, B was computed by openvino, bf16: their times cannot be compared."
    )
    answers.by[16] = ("openvino", "bf16")
    expect(page.locator("#verdict")).to_contain_text("A is 1.6× as fast")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_verdict_and_times_are_seen_without_scrolling(
    browser: Browser, shared_service: Service, width: int, height: int
) -> None:
    watched = Watched(browser.new_context(viewport={"width": width, "height": height}), shared_service.url)
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text("medians of 5")
    for part in ("#a-dial", "#verdict", "#a-ms", "#b-ms", "#a-by", "#b-by", "#measure"):
        box = page.locator(part).bounding_box()
        assert box and box["y"] >= 0 and box["y"] + box["height"] <= height, part
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
    watched.close()


def test_an_answer_of_another_dial_is_grey_until_the_new_one_comes(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#verdict")).to_contain_text("medians of 5")
    held, holds = list[Route](), True
    page.route(re.compile(r"/v1/classify.*&r=12"), lambda route: held.append(route) if holds else route.continue_())
    page.locator("#a-dial").fill("12")
    while not held:
        page.wait_for_timeout(20)
    assert is_grey(page, "#a-bars") and is_grey(page, "#verdict") and not is_grey(page, "#b-bars")
    holds = False
    held[0].continue_()
    expect(page.locator("#a-caption")).to_have_text(caption(12))
    expect(page.locator("#compare")).to_have_attribute("data-stale", "")
    assert not is_grey(page, "#a-bars") and not is_grey(page, "#verdict")


def test_the_blocks_are_stepped_through_without_another_request(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    explained = len([url for url in watched.requests if "/v1/explain" in url])
    page.locator("#block").focus()
    pictures = set()
    for block in range(BLOCKS - 1, 0, -1):
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#a-caption")).to_have_text(caption(16, block))
        expect(page.locator("#block-name")).to_have_text(f"after block {block} of {BLOCKS}")
        pictures.add(page.locator("#a-picture").evaluate("canvas => canvas.toDataURL()"))
    assert len(pictures) == BLOCKS - 1
    page.keyboard.press("Home")
    expect(page.locator("#a-caption")).to_have_text(f"{TOKENS} tokens of {TOKENS} before block 1")
    page.get_by_role("button", name="Play the blocks").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    expect(page.get_by_role("button", name="Play the blocks")).to_be_visible()
    assert len([url for url in watched.requests if "/v1/explain" in url]) == explained


def test_a_merged_group_is_one_colour_and_a_lone_patch_keeps_its_pixels(watched: Watched) -> None:
    page = watched.open()
    with page.expect_response(re.compile(r"/v1/explain.*&r=16")) as answered:
        page.locator("#a-dial").fill("16")
    groups = answered.value.json()["blocks"][-1]["groups"]
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    cell = 40
    read = """canvas => Array.from(canvas.getContext("2d").getImageData(0, 0, 640, 640).data)"""
    painted = Image.frombytes("RGBA", (640, 640), bytes(page.locator("#a-picture").evaluate(read)))
    page.locator("#block").fill("0")
    expect(page.locator("#a-caption")).to_contain_text("before block 1")
    photo = Image.frombytes("RGBA", (640, 640), bytes(page.locator("#a-picture").evaluate(read)))
    sizes = {group: groups.count(group) for group in groups}
    assert 1 in sizes.values() and max(sizes.values()) > 10
    colours: dict[int, set[Any]] = {}
    for patch, group in enumerate(groups):
        left, top = patch % 16 * cell, patch // 16 * cell
        inner = (left + 3, top + 3, left + cell - 3, top + cell - 3)
        if sizes[group] == 1:
            assert painted.crop(inner).tobytes() == photo.crop(inner).tobytes()
        else:
            colours.setdefault(group, set()).update(colour for _, colour in painted.crop(inner).getcolors(2000) or [])
    assert {len(of_group) for of_group in colours.values()} == {1}
    for group, (colour,) in colours.items():
        boxes = [(p % 16 * cell, p // 16 * cell) for p, g in enumerate(groups) if g == group]
        cells = [photo.crop((x, y, x + cell, y + cell)).tobytes() for x, y in boxes]
        mean = [sum(sum(each[channel::4]) for each in cells) / (len(cells) * cell**2) for channel in range(3)]
        assert list(colour[:3]) == pytest.approx(mean, abs=0.51)


def test_a_patch_is_picked_by_pointer_and_by_keyboard(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    before = page.locator("#b-picture").evaluate("canvas => canvas.toDataURL()")
    page.locator("#a-picture").hover(position={"x": 5, "y": 5})
    expect(page.locator("#touched")).to_have_text(re.compile("A: (one token for|a token).* · B: a token of its own"))
    assert page.locator("#b-picture").evaluate("canvas => canvas.toDataURL()") != before
    page.mouse.move(0, 0)
    expect(page.locator("#touched")).to_be_empty()
    page.locator("#a-picture").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#touched")).to_contain_text("B: a token of its own")
    page.keyboard.press("Escape")
    expect(page.locator("#touched")).to_be_empty()
    assert page.locator("#b-picture").evaluate("canvas => canvas.toDataURL()") == before


@pytest.fixture
def r_is_put_back(shared_service: Service) -> Iterator[None]:
    yield
    httpx.patch(shared_service.url + MODEL, json={"r": 0})


def test_the_deployments_r_is_set_and_b_follows_it(watched: Watched, r_is_put_back: None) -> None:
    page = watched.open()
    page.get_by_role("checkbox", name="the deployment's r").check()
    expect(page.locator("#b-dial")).to_be_disabled()
    page.get_by_role("textbox", name="The deployment's r").fill("13")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#deployment-says")).to_contain_text("now gets r = 13")
    assert httpx.get(watched.url + MODEL).json()["r"] == 13
    expect(page.locator("#b-caption")).to_have_text(caption(13))
    expect(page.locator("#b-r")).to_have_text("13")
    page.get_by_role("button", name="Use A's").click()
    expect(page.locator("#b-caption")).to_have_text(caption(16))
    page.get_by_role("textbox", name="The deployment's r").fill("16, 14,12")
    page.keyboard.press("Enter")
    expect(page.locator("#b-r")).to_have_text("16, 14, 12")
    assert httpx.get(watched.url + MODEL).json()["r"][:4] == [16, 14, 12, 0]
    page.get_by_role("textbox", name="The deployment's r").fill("auto")
    page.keyboard.press("Enter")
    expect(page.locator("#deployment-says")).to_contain_text("now gets r = auto")
    expect(page.locator("#b-r")).to_have_text(re.compile(r"^\d+$"))  # what auto has taken for this photo
    assert httpx.get(watched.url + MODEL).json()["r"] == "auto"


def test_a_change_by_somebody_else_is_seen_and_never_overwritten(watched: Watched, r_is_put_back: None) -> None:
    page = watched.open()
    httpx.patch(watched.url + MODEL, json={"r": 5})
    expect(page.get_by_role("textbox", name="The deployment's r")).to_have_value("5")

    def overtaken(route: Route) -> None:
        if route.request.method == "PATCH":
            httpx.patch(watched.url + MODEL, json={"r": 7})
        route.continue_()

    page.route(f"**{MODEL}", overtaken)
    watched.expected_errors.append(f"409.*{MODEL}$")
    page.get_by_role("textbox", name="The deployment's r").fill("20")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#deployment-says")).to_contain_text("somebody else changed it meanwhile, it is r = 7 now")
    expect(page.get_by_role("textbox", name="The deployment's r")).to_have_value("7")
    assert httpx.get(watched.url + MODEL).json()["r"] == 7


def test_word_from_before_a_change_does_not_undo_it(watched: Watched, r_is_put_back: None) -> None:
    page, reads = watched.page, list[tuple[Route, APIResponse]]()

    def hold_the_second_read(route: Route) -> None:
        if route.request.method == "GET" and len(reads) < 2:
            reads.append((route, route.fetch()))
            if len(reads) == 2:
                return
        route.continue_()

    page.route(f"**{MODEL}", hold_the_second_read)
    watched.open()  # reads the model once, and again at the first scrape
    while len(reads) < 2:
        page.wait_for_timeout(20)
    field, says = page.get_by_role("textbox", name="The deployment's r"), page.locator("#deployment-says")
    field.fill("13")
    field.press("Enter")
    expect(says).to_contain_text("now gets r = 13")
    route, old_word = reads[1]
    with page.expect_response(lambda response: response.url.endswith(MODEL) and response.request.method == "GET"):
        route.fulfill(response=old_word)
    field.fill("5")
    field.press("Enter")
    expect(says).to_contain_text("now gets r = 5")
    assert httpx.get(watched.url + MODEL).json()["r"] == 5


def test_a_change_waits_for_the_one_before(watched: Watched, r_is_put_back: None) -> None:
    page, statuses = watched.open(), list[int]()

    def answered(response: Response) -> None:
        if response.request.method == "PATCH":
            statuses.append(response.status)

    page.on("response", answered)
    page.get_by_role("textbox", name="The deployment's r").fill("13")
    page.get_by_role("button", name="Set").dblclick()
    while len(statuses) < 2:
        page.wait_for_timeout(20)
    assert statuses == [200, 200]


def test_an_r_out_of_range_is_refused_in_the_servers_words(watched: Watched) -> None:
    page = watched.open()
    watched.expected_errors.append(f"422.*{MODEL}$")
    page.get_by_role("textbox", name="The deployment's r").fill("1000")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#deployment-says")).to_contain_text("Not set: r is 1000; each r must lie between 0 and 128")


DROP = """async ([name, type, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, { type }));
    const happen = (kind) =>
        document.body.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
    ["dragenter", "dragover"].forEach(happen);
    const veiled = !document.getElementById("veil").hidden;
    happen("drop");
    return veiled && document.getElementById("veil").hidden;
}"""


def drop(page: Page, name: str, type: str, content: bytes) -> None:
    assert page.evaluate(DROP, [name, type, base64.b64encode(content).decode()])


def test_a_photo_is_dropped_or_chosen(watched: Watched) -> None:
    page = watched.open()
    drop(page, "sky.png", "image/png", png("skyblue"))
    expect(page.locator("#photo-name")).to_contain_text("sky.png")
    expect(page.locator("#a-picture")).to_have_attribute("aria-label", re.compile("^sky.png at r 16"))
    expect(page.locator("[data-sample][aria-pressed=true]")).to_have_count(0)
    page.locator("#file").set_input_files({"name": "red.png", "mimeType": "image/png", "buffer": png()})
    expect(page.locator("#b-picture")).to_have_attribute("aria-label", re.compile("^red.png at r 0"))
    middle = page.locator("#b-picture").evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(320, 310, 1, 1).data)"
    )
    assert middle[1] == middle[2] and middle[0] == 255


def test_a_broken_file_is_told_and_the_next_photo_is_answered(watched: Watched) -> None:
    page = watched.open()
    watched.expected_errors.append("415.*/v1/classify")
    drop(page, "holiday.jpg", "image/jpeg", b"no photo at all")
    expect(page.get_by_role("alert").first).to_contain_text("holiday.jpg: not an image in one of the formats JPEG")
    expect(page.locator("#a-caption")).to_have_text("Nothing to see yet.")
    expect(page.locator("#b-bars li")).to_have_count(0)
    page.get_by_role("button", name="School bus").click()
    expect(page.locator("#photo-error")).to_be_hidden()
    expect(page.locator("#b-caption")).to_have_text(caption(0))


def test_a_format_that_only_the_server_reads_is_answered_all_the_same(watched: Watched) -> None:
    page = watched.open()
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(file, "TIFF")
    drop(page, "scan.tiff", "image/tiff", file.getvalue())
    expect(page.locator("#photo-error")).to_contain_text("This browser cannot show this file")
    expect(page.locator("#a-picture")).to_have_attribute("aria-label", re.compile("^scan.tiff at r 16"))
    expect(page.locator("#a-bars li")).to_have_count(5)


def test_the_live_view_shows_load_and_the_share_of_each_r(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#share li")).not_to_have_count(0)  # it has looked once; what comes now is seen
    for r in [0, 5] * 8:
        httpx.post(f"{watched.url}/classify", params={"r": r}, content=png(), headers={"content-type": "image/png"})
    for r in (0, 5):
        expect(page.locator("#share li", has_text=f"r = {r}")).to_contain_text("%")
    expect(page.locator("#p95")).to_have_text(re.compile(r"^[\d.]+ ms$"))
    assert page.locator("#rate-line path").get_attribute("d")


NUMBERS = """async () => {
    const { read, growth, quantile } = await import("/static/prometheus.js");
    const { crop } = await import("/static/paint.js");
    const bucket = 'tome_request_duration_seconds_bucket{le="LE",model="m",r="8"} ';
    const text = (images, fast) => [
        "# HELP tome_images_total Images", `tome_images_total{model="m",r="8"} ${images}`,
        'tome_images_total{model="other",r="8"} 99', "tome_in_flight_images 3.0", "tome_config_version 1.0",
        ...[["0.01", 0], ["0.1", fast], ["1.0", 2 * fast], ["+Inf", 2 * fast]].map(
            ([le, count]) => bucket.replace("LE", le) + count),
    ].join("\\n");
    const before = read(text(10, 4), "m"), after = read(text(16, 14), "m"), anew = read(text(2, 1), "m");
    const latency = growth(before.latency, after.latency), none = growth(after.latency, after.latency);
    const center = { input_size: [200, 200], resize_size: [250, 250], crop_mode: "center" };
    const squash = { input_size: [200, 200], resize_size: [200, 200], crop_mode: "squash" };
    return {
        images: growth(before.images, after.images).get("8"),
        anew: growth(after.images, anew.images).get("8"),
        inFlight: after.inFlight,
        version: after.version,
        quantiles: [quantile(0.5, latency), quantile(0.75, latency), quantile(0.5, none)],
        center: crop(1000, 500, { seen: center, grid: [12, 12], patch: 16 }),
        squash: crop(1000, 500, { seen: squash, grid: [12, 12], patch: 16 }),
    };
}"""


def test_rates_quantiles_and_the_crop_are_right(watched: Watched) -> None:
    numbers = watched.open().evaluate(NUMBERS)
    assert (numbers["images"], numbers["anew"], numbers["inFlight"], numbers["version"]) == (6, 2, 3, 1)
    median, upper_quartile, of_none = numbers["quantiles"]
    assert (median, upper_quartile) == pytest.approx((0.1, 0.55))  # 10 of 20 lie below 0.1 s, 10 between 0.1 and 1
    assert of_none is None
    # 500 px become 250, of which the middle 200 are kept, of which 12 patches of 16 px fill 192.
    assert numbers["center"] == pytest.approx({"left": 300, "top": 50, "width": 384, "height": 384})
    assert numbers["squash"] == pytest.approx({"left": 0, "top": 0, "width": 960, "height": 480})


def a_curve() -> dict[str, Any]:
    rows = [
        (0, 257, 49.0, 1.0, [1.0, 1.0], 0.73),
        (8, 161, 67.1, 0.951, [0.93, 0.97], 0.72),
        (16, 65, 90.2, 0.883, [0.86, 0.9], None),
    ]
    keys = ("r", "tokens", "images_per_s", "agreement", "agreement_interval", "top1")
    return {
        "model": BUNDLED_NAME,
        "speed_from": {"device": "AMD EPYC", "backend": "openvino", "precision": "bf16", "measured": "2026-11-27"},
        "agreement_from": {
            "device": "NVIDIA H200",
            "backend": "torch",
            "precision": "fp32",
            "measured": "2026-11-22",
            "photos": 10_000,
        },
        "rows": [dict(zip(keys, row, strict=True)) for row in rows],
    }


def test_the_curve_marks_where_the_deployment_stands_and_sets_the_dial(watched: Watched) -> None:
    watched.page.route("**/curve", lambda route: route.fulfill(json=a_curve()))
    page = watched.open()
    dots = page.locator("#curve .dot")
    expect(dots).to_have_count(3)
    expect(page.locator("#curve .dot:has(.ring)")).to_have_attribute("aria-label", re.compile("r = 0: 49 images/s"))
    xs = [float(x) for x in dots.locator(".point").evaluate_all("points => points.map(p => p.getAttribute('cx'))")]
    ys = [float(y) for y in dots.locator(".point").evaluate_all("points => points.map(p => p.getAttribute('cy'))")]
    assert xs == sorted(xs) and ys == sorted(ys)  # faster to the right, less agreement lower
    dots.nth(2).focus()
    expect(page.locator("#curve-says")).to_contain_text(
        "r = 16: 90.2 images/s (1.8× r = 0), 65 tokens left, agrees with r = 0 on 88.3 %"
    )
    page.locator("#a-dial").fill("4")
    dots.nth(2).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    page.get_by_role("radio", name="top-1").check()
    expect(dots).to_have_count(2)


def test_a_curve_without_top_1_is_drawn_after_top_1_was_chosen_for_another(watched: Watched) -> None:
    curve = a_curve()
    watched.page.route("**/curve", lambda route: route.fulfill(json=curve))
    page = watched.open()
    page.get_by_role("radio", name="top-1").check()
    expect(page.locator("#curve .dot")).to_have_count(2)
    for row in curve["rows"]:
        row["top1"] = None
    page.get_by_role("combobox", name="Model").dispatch_event("change")
    expect(page.locator("#curve .dot")).to_have_count(3)


def test_the_curve_says_where_its_speed_and_where_its_agreement_come_from(watched: Watched) -> None:
    watched.page.route("**/curve", lambda route: route.fulfill(json=a_curve()))
    page = watched.open()
    expect(page.locator("#curve-from")).to_have_text(
        "Speed: AMD EPYC, openvino, bf16, 2026-11-27. Agreement: 10,000 photos, NVIDIA H200, torch, fp32, 2026-11-22."
    )


def test_the_curve_marks_a_and_b(watched: Watched) -> None:
    watched.page.route("**/curve", lambda route: route.fulfill(json=a_curve()))
    page = watched.open()

    def place(of: str, circle: str) -> float:
        return float(page.locator(f"#curve {of} {circle}").get_attribute("cx") or "nan")

    dots = [float(x) for x in page.locator("#curve .point").evaluate_all("all => all.map(p => p.getAttribute('cx'))")]
    assert (place(".mark-of.b", "circle"), place(".mark-of.a", "circle")) == pytest.approx((dots[0], dots[2]))
    expect(page.locator("#curve .mark-of.a")).to_have_text("A")
    page.locator("#a-dial").fill("12")  # it has no dot: halfway between those of 8 and 16
    expect(page.locator("#a-caption")).to_have_text(caption(12))
    assert place(".mark-of.a", "circle") == pytest.approx((dots[1] + dots[2]) / 2)


@pytest.mark.parametrize(("last_r", "first_of_a"), [(16, 16), (8, 8)])
def test_the_dials_end_where_the_curve_does(watched: Watched, last_r: int, first_of_a: int) -> None:
    curve = a_curve()
    curve["rows"] = [row for row in curve["rows"] if row["r"] <= last_r]
    watched.page.route("**/curve", lambda route: route.fulfill(json=curve))
    page = watched.open()
    expect(page.locator("#a-r")).to_have_text(str(first_of_a))
    for side in ("a", "b"):
        expect(page.locator(f"#{side}-dial")).to_have_attribute("max", str(last_r))


def test_the_bundled_model_brings_its_curve(watched: Watched) -> None:
    page = watched.open()
    expect(page.locator("#curve .dot")).to_have_count(8)
    expect(page.locator("#curve .dot").first).to_have_attribute("aria-label", re.compile("images/s"))


def test_without_a_curve_the_page_says_how_to_make_one(watched: Watched) -> None:
    error = {"code": "not_found", "message": "there is no curve", "details": {}}
    watched.page.route("**/curve", lambda route: route.fulfill(status=404, json={"error": error}))
    page = watched.open()
    expect(page.locator("#curve")).to_contain_text("tome-server calibrate --model bundled --images FOLDER")
    expect(page.locator("#curve-what")).to_be_hidden()


def test_nothing_else_may_be_loaded_or_run(watched: Watched) -> None:
    page = watched.open()
    watched.expected_errors.append("Content Security Policy")
    ran = page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.inlineRan = true";
        const image = new Image();
        image.src = "http://127.0.0.1:9/elsewhere.png";
        const refused = new Promise((resolve) => addEventListener("securitypolicyviolation", () => resolve(true)));
        document.body.append(script, image);
        return refused.then((told) => [told, "inlineRan" in window]);
    }""")
    assert ran == [True, False]
    watched.requests = [url for url in watched.requests if "elsewhere" not in url]  # asked for, and never sent


def test_the_page_works_under_a_path(browser: Browser, shared_service: Service) -> None:
    with behind(shared_service.url, "/tome") as url:
        watched = Watched(browser.new_context(), url)
        page = watched.open()
        expect(page.locator("#verdict")).to_contain_text("medians of 5")
        expect(page.locator("#share li").first).to_contain_text("%")
        page.get_by_role("link", name="API").click()
        expect(page.locator("h1")).to_have_text("The API")
        watched.close()


@pytest.mark.parametrize("prefix", ["", "/tome"])
def test_the_page_of_the_api_comes_from_this_server_alone(
    browser: Browser, shared_service: Service, prefix: str
) -> None:
    with behind(shared_service.url, prefix) if prefix else nullcontext(shared_service.url) as url:
        watched = Watched(browser.new_context(), url)
        page = watched.page
        page.goto(f"{url}/docs")
        expect(page.locator("#get-v1-models")).to_contain_text(f"curl '{url}/v1/models'")
        expect(page.locator("footer")).to_contain_text("Everything here comes from this server.")
        page.locator("#contents a", has_text="/v1/explain").click()
        expect(page.locator("#post-v1-explain")).to_be_in_viewport()
        page.get_by_role("link", name="The page").click()
        expect(page.locator("#a-caption")).to_contain_text("tokens")
        assert {f"{url}/{name}" for name in ("docs", "static/docs.js", "static/docs.css", "openapi.json")} <= set(
            watched.requests
        )
        watched.close()


@pytest.mark.parametrize("width", [360, 768, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_scrolls_sideways(browser: Browser, shared_service: Service, width: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    watched = Watched(context, shared_service.url)
    watched.page.route("**/curve", lambda route: route.fulfill(json=a_curve()))
    page = watched.open()
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    watched.close()


def test_all_that_takes_the_focus_has_a_name(watched: Watched) -> None:
    watched.page.route("**/curve", lambda route: route.fulfill(json=a_curve()))
    page = watched.open()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    focusable = {}
    for node in tree["nodes"]:
        properties = {each["name"]: each["value"].get("value") for each in node.get("properties", [])}
        role = node.get("role", {}).get("value")
        if properties.get("focusable") and role not in ("RootWebArea", "MenuListPopup"):
            focusable[node["nodeId"]] = (role, node.get("name", {}).get("value", ""))
    assert len(focusable) > 15
    assert [each for each in focusable.values() if not each[1].strip()] == []


def test_who_wants_less_motion_gets_none(browser: Browser, shared_service: Service) -> None:
    durations = []
    motions: list[Any] = [None, "reduce"]
    for motion in motions:
        context = browser.new_context(reduced_motion=motion)
        page = Watched(context, shared_service.url).open()
        bar = "getComputedStyle(document.querySelector('.bars li'), '::before').transitionDuration"
        durations.append(page.evaluate(bar))
        context.close()
    assert durations[0] == "0.25s" and durations[1] == "0s"


def test_a_server_that_goes_away_is_missed_and_welcomed_back(browser: Browser, start_service: StartService) -> None:
    service = start_service()
    context = browser.new_context()
    watched = Watched(context, service.url)
    watched.expected_errors.append("ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|503")
    page = watched.open()
    assert service.stop() == 0
    expect(page.locator("#away")).to_contain_text("The server does not answer")
    expect(page.locator("#health")).to_have_text("no answer")
    for part in (".verdict", ".times", "#a-bars", "#b-caption", "#curve", ".gauges", ".share", ".deployment"):
        assert is_grey(page, part), part
    expect(page.get_by_role("button", name="Measure 20 times")).to_be_disabled()
    page.locator("#a-dial").fill("12")
    expect(page.locator("#photo-error")).to_contain_text("the server does not answer. Trying again.")
    start_service("--port", service.url.rsplit(":", 1)[1])
    expect(page.locator("#away")).to_be_hidden(timeout=60_000)
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#a-caption")).to_have_text(caption(12))
    expect(page.locator("#photo-error")).to_be_hidden()
    expect(page.locator("#verdict")).to_contain_text("medians of")
    for part in (".verdict", ".times", "#a-bars", "#curve", ".gauges", ".deployment"):
        assert not is_grey(page, part), part
    watched.close()


def test_a_key_is_asked_for_where_the_server_wants_one(browser: Browser, start_service: StartService) -> None:
    service = start_service("--api-key", "sesame", "--admin-key", "open-sesame")
    context = browser.new_context()
    watched = Watched(context, service.url)
    watched.expected_errors.append("401|403")
    page = watched.page
    page.goto(service.url)
    expect(page.locator("#key")).to_be_visible()
    expect(page.locator("#key-why")).to_have_text("This server asks for a key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_have_text("The server does not accept this key.")
    page.get_by_label("API key").fill("sesame")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#a-caption")).to_have_text(caption(16))
    expect(page.locator("#key")).to_be_hidden()
    page.get_by_role("textbox", name="The deployment's r").fill("4")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#deployment-says")).to_have_text("Not set: changes need the admin key.")
    page.get_by_label("API key").fill("open-sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#deployment-says")).to_contain_text("now gets r = 4")
    stored = json.loads(page.evaluate("JSON.stringify([{...localStorage}, document.cookie])"))
    assert stored == [{}, ""]
    watched.close()


def test_another_model_brings_its_own_dial(browser: Browser, start_service: StartService) -> None:
    service = start_service("--model", "bundled", "--model", "vit_tiny_patch16_224,weights=random,r=4")
    context = browser.new_context()
    watched = Watched(context, service.url)
    page = watched.open()
    page.get_by_role("combobox", name="Model").select_option("vit_tiny_patch16_224")
    left = httpx.get(f"{service.url}/v1/models/vit_tiny_patch16_224").json()["token_counts"]
    expect(page.locator("#a-caption")).to_have_text(f"{left['16'][-1]} tokens of 197 after block 12")
    expect(page.locator("#b-tokens")).to_have_text("197 of 197")
    expect(page.get_by_role("textbox", name="The deployment's r")).to_have_value("4")
    most = int(page.locator("#a-dial").get_attribute("max") or 0)
    page.locator("#a-dial").focus()
    page.keyboard.press("End")
    expect(page.locator("#a-tokens")).to_have_text(f"{left[str(most)][-1]} of 197")
    assert left[str(most)][-1] == min(counts[-1] for counts in left.values()) < left[str(most - 1)][-1]
    watched.close()


def test_a_page_opened_before_the_engine_is_ready_waits_for_it(watched: Watched) -> None:
    unready = {"error": {"code": "unavailable", "message": "the models are still loading", "details": {}}}
    answers = iter([unready, unready])

    def loading(route: Route) -> None:
        body = next(answers, None)
        if body is None:
            route.continue_()
        else:
            route.fulfill(status=503, json=body, headers={"retry-after": "1"})

    watched.page.route("**/v1/models", loading)
    watched.expected_errors.append("503.*/v1/models$")
    watched.page.goto(watched.url)
    expect(watched.page.locator("#health")).to_have_text("the models are still loading")
    expect(watched.page.locator("#a-caption")).to_have_text(caption(16))
    expect(watched.page.locator("#health")).to_have_text("ready")
