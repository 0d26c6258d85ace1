"""The page in a real browser on a real server: chat, stop, the engine's numbers, keys, and what the policy forbids."""

import httpx2
import pytest

from hybrid_jax.server.page import HEADERS, TEXT
from tests.hybrid_jax.server.browser import CHROMIUM, DRIVER, ENTER, ESCAPE, browse
from tests.hybrid_jax.server.live import KEY

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)
slow = pytest.mark.slow
IDLE = "return document.getElementById('stop').disabled"
ANSWERS = "return [...document.querySelectorAll('.assistant .text')].map((one) => one.textContent)"
WRITTEN = "return document.querySelector('.writing .text')?.textContent.length > 20"


def test_the_page_refers_to_nothing_outside_itself():
    assert "://" not in TEXT and "@import" not in TEXT and "innerHTML" not in TEXT
    assert " style=" not in TEXT and " onclick=" not in TEXT  # the policy would not let them work
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser, live):
    """The page, with the key typed in and the engine in sight."""
    browser.open(live.url + "/")
    browser.run("sessionStorage.clear()")
    browser.open(live.url + "/")
    browser.type("#key", KEY)
    browser.wait("return document.getElementById('phase').textContent === 'serving'")
    browser.complaints()
    yield browser
    browser.run("if (running) running.abort()")


@slow
def test_the_page_is_open_and_its_calls_want_the_key(live):
    answer = httpx2.get(live.url + "/")
    assert answer.status_code == 200 and answer.text == TEXT
    assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    assert httpx2.get(live.url + "/engine").status_code == 401
    seen = live.get("/engine").json()
    layers = seen["routing"]["layers"]
    assert {layer["keeps"] for layer in layers} == {"pages", "slot"}
    assert seen["pages"]["free"] > 0 and seen["phase"] == "serving"


@slow
@needs_browser
def test_a_chat_is_streamed_and_goes_on(page, live):
    page.type("#tokens", "12")
    page.type("#prompt", "Tell me about the fox." + ENTER)
    page.wait(IDLE)
    (first,) = page.run(ANSWERS)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Tell me about the fox."}], "max_tokens": 12}
    assert first and "12 tokens in" in page.text("#said")
    assert live.post("/v1/chat/completions", body).status_code == 200
    page.type("#prompt", "And then?" + ENTER)
    page.wait("return document.querySelectorAll('.assistant small').length === 2")
    assert page.run("return messages.map((one) => one.role).join()") == "user,assistant,user,assistant"
    assert page.run("return document.activeElement.id") == "prompt"
    assert page.complaints() == []


@slow
@needs_browser
@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped_and_kept(page, live, how):
    page.type("#prompt", "Once upon a time" + ENTER)
    page.wait(WRITTEN)
    if how == "key":
        page.type("#prompt", ESCAPE)
    else:
        page.click("#stop")
    page.wait(IDLE)
    live.wait_until_idle()
    assert page.run(ANSWERS)[-1] and "stopped" in page.text("#said")
    page.click("#clear")
    assert page.run("return messages.length") == 0 and page.run(ANSWERS) == []


@slow
@needs_browser
def test_the_engine_is_watched(page, live):
    seen = live.get("/engine").json()
    roles = [layer["kind"] for layer in seen["routing"]["layers"]]
    assert page.run("return document.querySelectorAll('#strip span').length") == len(roles)
    assert set(
        page.run("return [...document.querySelectorAll('#routing td:nth-child(3)')].map((e) => e.textContent)")
    ) == set(roles)
    page.type("#prompt", "Once upon a time" + ENTER)
    page.wait("return document.getElementById('running').textContent === '1'")
    page.wait("return Number(document.getElementById('rate').textContent) > 0")
    page.wait("return !document.getElementById('pages').textContent.startsWith('0 ')")
    assert page.text("#compilations") == "0"


@slow
@needs_browser
def test_without_the_key_it_says_so_and_gives_the_question_back(page):
    page.run("document.getElementById('key').value = ''; before = null")
    page.wait("return document.getElementById('phase').textContent.includes('API key')")
    page.type("#prompt", "Hello" + ENTER)
    page.wait("return document.getElementById('trouble').textContent")
    assert "API key" in page.text("#trouble")
    assert page.run("return document.getElementById('prompt').value") == "Hello" and page.run(ANSWERS) == []


@slow
@needs_browser
def test_what_is_written_is_text_and_nothing_else_runs_or_is_called(page):
    attack = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    page.run(f"turn('assistant', {attack!r})")
    assert page.run("return document.querySelectorAll('#said img, #said script').length") == 0
    refused = """const made = document.createElement('script'); made.text = "document.title = 'run'";
        document.body.append(made); return document.title"""
    with pytest.raises(OSError):  # assigning a text to a script is refused outright
        page.run(refused)
    outside = "return fetch('http://192.0.2.1/').then(() => 'called', () => 'refused')"
    assert page.run(outside) == "refused" and page.run("return document.title") == "hybrid-jax"
    assert any("Content Security Policy" in line for line in page.complaints())


@slow
@needs_browser
def test_no_width_needs_scrolling_sideways(page, tmp_path):
    for dark in (False, True):
        for width in (360, 800, 1280):
            picture = page.look(dark, width, 800)
            assert picture.startswith(b"\x89PNG")
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), (dark, width)
        ground = page.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 26)" if dark else "rgb(246, 247, 249)")
