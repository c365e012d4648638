"""lorakit.serve.page: the page's headers and files; in Chromium, answers of several models, which are never HTML."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorakit.serve.app import Access
from lorakit.serve.keys import Key
from lorakit.serve.page import FILES

from .conftest import Running, Start

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = "/usr/bin/chromium"
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
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if shutil.which(CHROMIUM) is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as found:
        one = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab; it must request nothing from elsewhere, and report no error of a script or the policy."""
    one = browser.new_page()
    problems: list[str] = []
    hosts: set[str] = set()
    one.on("pageerror", lambda error: problems.append(str(error)))
    one.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    one.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    yield one
    one.close()
    assert hosts == {"127.0.0.1"}
    assert [text for text in problems if "status of 4" not in text] == []  # a status is no error of the page


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
