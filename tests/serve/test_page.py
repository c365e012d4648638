"""lorakit.serve.page: the page's headers and files; in Chromium, answers of several models, which are never HTML."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorakit.serve.app import Access
from lorakit.serve.keys import Key
from lorakit.serve.page import FILES

from .conftest import Running, Start
from .test_app_tools import say

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = '<img src=x onerror="attacked=1"><script>a=1</script>'
ATTACK = [
    '<img src=x onerror="window.attacked=1">',
    "<script>window.attacked=1</script>",
    " " + "W" * 300,
    " שלום",
    " \u202eevil",
    " &amp; 🦊",
]


def policy_of(running: Running, path: str) -> dict[str, list[str]]:
    parts = running.client.get(path).headers["content-security-policy"].split(";")
    return {words[0]: words[1:] for words in (part.split() for part in parts)}


@pytest.mark.parametrize("path", FILES)
def test_the_page_is_served_with_a_strict_policy_and_without_a_key(start: Start, path: str) -> None:
    running = start(Access([Key(name="one", sha256=sha256(b"secret").hexdigest())]))
    reply = running.client.get(path)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith(FILES[path][1])
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = policy_of(running, path)
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == ["'none'"]
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert set(policy) & {"img-src", "object-src", "frame-src", "font-src"} == set()
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(", re.sub(r"(?m)^\s*//.*|\s// .*", "", reply.text))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|<style|\son\w+=", reply.text)


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"lorakit/serve/page/{name}" for name, _ in FILES.values()} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if shutil.which(CHROMIUM) is None:
        pytest.skip("Chromium is not installed")
    profile = tmp_path_factory.mktemp("profile")
    with playwright.sync_playwright() as found:
        one = found.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab; it must request nothing from elsewhere, and write nothing to the console, such as faults of the policy."""
    one = browser.new_page()
    problems: list[str] = []
    hosts: set[str] = set()
    one.on("pageerror", lambda error: problems.append(str(error)))
    one.on("console", lambda line: problems.append(line.text))
    one.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    yield one
    one.close()
    assert hosts == {"127.0.0.1"}
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []  # the page shows these


RECORD = """() => {
  window.order = [];
  const note = (changes) => {
    for (const change of changes) {
      for (const one of change.addedNodes) {
        if (one.classList?.contains("token")) window.order.push(one.closest(".column").getAttribute("aria-label"));
      }
    }
  };
  new MutationObserver(note).observe(document.getElementById("columns"), { childList: true, subtree: true });
}"""
"""Record the models of tokens in the order in which they are shown."""

FAINT = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, alpha = 1], below) => [r, g, b].map((one, i) => alpha * one + (1 - alpha) * below[i]);
  const background = (one) => one ? over(parts(getComputedStyle(one).backgroundColor), background(one.parentElement)) : [255, 255, 255];
  const linear = (value) => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = (color) => color.map(linear).reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0.05);
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const hasText = [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!hasText || one.closest(":disabled") || !one.checkVisibility()) continue;
    const back = background(one);
    const both = [light(over(parts(getComputedStyle(one).color), back)), light(back)];
    if (Math.max(...both) / Math.min(...both) < 4.5) found.push([one.className, one.textContent]);
  }
  return found;
}"""
"""Return texts whose contrast is below 4.5."""


def ask(page: Any, text: str, limit: int = 12) -> None:
    page.evaluate("limit => { document.getElementById('limit').value = limit }", limit)
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    page.locator("#stop:disabled").wait_for()


@pytest.mark.clients
def test_models_answer_side_by_side_as_over_http(page: Any, running: Running) -> None:
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    page.evaluate("document.getElementById('seed').value = 7")
    facts = page.locator(".card").nth(1).locator("dd").all_text_contents()
    assert facts[:2] == [running.id("one"), "tiny"] and "4" in facts
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    for turn, text in enumerate(("Hello", "And then?")):
        ask(page, text)
        assert page.locator(".answer").count() == 3 * (turn + 1)
    columns = {one.get_attribute("aria-label"): one for one in page.locator(".column").all()}
    assert set(columns) == {"tiny", running.id("one"), running.id("two")} == {one["model"] for one in sent}
    for body in sent:
        reply = running.client.post("/v1/chat/completions", json={**body, "stream": False}).json()
        turn = len(body["messages"]) // 2
        shown = columns[body["model"]].locator(".answer").nth(turn)
        visible = "".join(shown.locator(".token:not(.special)").all_text_contents())
        assert body["seed"] == 7 and visible == reply["choices"][0]["message"]["content"]
        first = reply["choices"][0]["logprobs"]["content"][0]
        shown.focus()
        page.keyboard.press("Home")
        rows = page.locator("#tip td").all_text_contents()
        assert json.loads(rows[0]) == first["token"] and len(rows) >= 10
        percent = 100 * math.exp(first["logprob"])
        assert float(rows[1].lstrip("<").rstrip("%")) == pytest.approx(percent, abs=0.1)


@pytest.mark.clients
def test_the_base_and_three_adapters_stream_at_the_same_time(
    page: Any, start: Start, save_adapter: Callable[..., Path]
) -> None:
    for seed, name in enumerate(("three", "two-more"), start=3):
        save_adapter(f"adapters/{name}", seed)
    running = start()
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    assert page.locator("#models :checked").count() == 4 and page.locator("#models :disabled").count() == 1
    page.evaluate(RECORD)
    ask(page, "Hello", 48)
    order = page.evaluate("window.order")
    shown = {one.get_attribute("aria-label") for one in page.locator(".column").all()}
    assert set(order) == shown == {"tiny", *map(running.id, ("one", "three", "two"))}
    assert max(order.index(name) for name in shown) < min(len(order) - order[::-1].index(name) for name in shown)
    texts = page.locator(".answer").all_text_contents()
    assert len(set(texts)) > 1 and page.locator(".answer").nth(0).locator(".differs").count() == 0
    assert page.locator(".differs").count() > 0


@pytest.mark.clients
def test_names_prompts_and_answers_are_text(monkeypatch: pytest.MonkeyPatch, page: Any, start: Start) -> None:
    running = start(name=HOSTILE)
    say(monkeypatch, running, HOSTILE)
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    page.locator(".card summary").first.click()
    ask(page, HOSTILE, 60)
    assert page.locator("h2").first.text_content() == page.locator(".user").first.text_content() == HOSTILE
    assert HOSTILE in page.locator("#server").text_content()
    assert page.locator(".card").first.locator("dd").first.text_content() == HOSTILE
    for answer in page.locator(".answer").all():
        assert "".join(answer.locator(".token:not(.special)").all_text_contents()) == HOSTILE
    page.locator(".answer").first.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.attacked") is None and page.locator("img, body script").count() == 0


@pytest.mark.clients
def test_widths_and_color_schemes(monkeypatch: pytest.MonkeyPatch, page: Any, running: Running) -> None:
    """Nothing is cut off, turns begin at one height, and text has a contrast of 4.5 with its background (WCAG AA)."""
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    page.locator("#models summary").first.click()
    page.locator("main > details > summary").click()
    say(monkeypatch, running, "A fox.")  # the model finds each of these tokens, and the end, unlikely
    page.evaluate("document.querySelector('.column h2').textContent += ' a long name'.repeat(5)")
    for text in ("Hello", "And then?"):
        ask(page, text)
    ask(page, "word " * 400)
    page.locator(".error").first.wait_for()
    assert page.locator(".special.p0").count() == 6
    for width in (390, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
            assert page.evaluate(FAINT) == []
            for turn in range(2):
                tops = {one.locator(".turn").nth(turn).bounding_box()["y"] for one in page.locator(".column").all()}
                assert len(tops) == (3 if width < 1000 else 1)


@pytest.mark.clients
def test_an_adapter_that_is_gone_is_an_error_of_its_column(page: Any, running: Running) -> None:
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    assert running.client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    ask(page, "Hello")
    assert page.locator(".error").count() == 1 and "two" in page.locator(".error").text_content()
    assert page.locator("#status").text_content() == "1 of 3 answers are not complete."
    page.locator("#refresh").click()
    page.locator(".card").nth(2).wait_for(state="detached")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello")
    assert page.locator(".error").first.text_content() == "The server cannot be reached."
    page.unroute_all()


def streamed(route: Any) -> None:
    """Answer with markup, which the first model does not have."""
    is_base = route.request.post_data_json["model"] == "tiny"
    parts = []
    for text in ATTACK[2:] if is_base else ATTACK:
        other = {"token": "<b>x</b>", "logprob": -1.0, "bytes": None}
        token = {"token": text, "logprob": -0.5, "bytes": None, "top_logprobs": [other]}
        parts.append({"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": [token]}}]})
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=body)


@pytest.mark.clients
def test_answers_are_text_and_fit_a_narrow_window(page: Any, running: Running) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.route("**/v1/chat/completions", streamed)
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    ask(page, "<b>bold</b>")
    assert page.evaluate("window.attacked") is None
    assert page.locator("#columns :is(img, script, b)").count() == 0
    assert page.locator(".user").first.text_content() == "<b>bold</b>"
    answers = page.locator(".answer")
    assert answers.nth(1).text_content() == "".join(ATTACK)
    page.locator(".differs").first.wait_for()
    assert answers.nth(0).locator(".differs").count() == 0
    assert answers.nth(1).locator(".differs").all_text_contents() == ATTACK[:2]
    answers.nth(1).locator(".token").nth(3).hover()
    assert "<b>x</b>" in page.locator("#tip").text_content() and page.locator("#tip b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.clients
def test_a_key_is_asked_for_and_errors_are_shown(page: Any, start: Start) -> None:
    running = start(Access([Key(name="one", sha256=sha256(b"secret").hexdigest())]))
    page.goto(running.url)
    page.locator("#key").fill("wrong")
    page.locator("#key").press("Enter")
    page.locator("#key").fill("secret")
    page.locator("#key").press("Enter")
    page.locator("#models input").first.wait_for()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.search]") == [
        0,
        0,
        "",
        "",
    ]
    ask(page, "word " * 400)
    assert "context" in page.locator(".error").first.text_content()


@pytest.mark.clients
def test_stop_aborts_the_requests(page: Any, running: Running) -> None:
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto(running.url)
    page.locator("#models input").first.wait_for()
    page.route("**/v1/chat/completions", lambda route: None)  # answers that never come
    page.locator("#prompt").fill("Hello")
    page.locator("#send").click()
    page.locator("#stop:enabled").click()
    page.locator("#stop:disabled").wait_for()
    assert page.locator(".note", has_text="stopped").count() == 3
    for _ in range(500):  # the browser reports it later
        if len(failed) < 3:
            page.wait_for_timeout(20)
    assert failed == [f"{running.url}/v1/chat/completions"] * 3
