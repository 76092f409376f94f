"""The page that chats with the model, in a real browser."""

import time

import pytest
from test_http import serving
from tiny_serving import model_of, until

from lm_jax.serving.service import Limits


@pytest.fixture(scope="module")
def model():
    return model_of()


def type_and_send(page, text: str) -> None:
    page.get_by_label("Your text").fill(text)
    page.get_by_label("Your text").press("Enter")


def test_a_chat(model, open_page):
    with serving(model, limits=Limits()) as server:
        page = open_page(server.address)
        page.wait_for_selector("h1:text-is('tiny')")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("max tokens").fill("15")
        shown = "document.querySelector('.assistant')?.textContent.length ?? 0"
        page.evaluate(
            "() => { window.lengths = new Set(); new MutationObserver(() =>"
            f" lengths.add({shown})).observe(document.body, {{subtree: true, childList: true}}); }}"
        )
        type_and_send(page, "hi <b>there</b>")
        page.wait_for_selector(".note:text-is('ended at the limit of tokens')")
        assert page.locator(".user").text_content() == "hi <b>there</b>"
        assert len(page.evaluate("[...lengths]")) > 5  # it came piece by piece
        first = page.locator(".assistant").text_content()
        assert first
        # What was said is part of the next question.
        asked = []
        page.on("request", lambda request: asked.append(request.post_data_json))
        type_and_send(page, "and?")
        page.wait_for_selector(".note >> nth=1")
        said = [(m["role"], m["content"]) for m in asked[0]["messages"]]
        assert said == [("user", "hi <b>there</b>"), ("assistant", first), ("user", "and?")]


def test_stopping_and_errors(model, open_page):
    with serving(model, limits=Limits(request_timeout=3.0)) as server:
        server.service.warm_up()
        scheduler = server.service.scheduler
        turn = scheduler._turn
        scheduler._turn = lambda: (time.sleep(0.05), turn())
        page = open_page(server.address)
        page.wait_for_selector("h1:text-is('tiny')")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("max tokens").fill("120")
        type_and_send(page, "hi")
        until(lambda: scheduler.counts() == (1, 0))
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector(".note:text-is('stopped')")
        until(lambda: scheduler.counts() == (0, 0))
        page.get_by_role("button", name="New").click()
        assert page.locator(".turn").count() == 0
        type_and_send(page, "hi")
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "the answer took too long" in alert.text_content()
        assert page.locator(".assistant").text_content()
        assert page.get_by_role("button", name="Send").is_enabled()


def test_without_a_template_it_continues_text(model, open_page):
    with serving(model, template=None) as server:
        page = open_page(server.address)
        page.wait_for_selector(".note:has-text('it continues your text')")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("max tokens").fill("20")
        type_and_send(page, "Once")
        page.wait_for_selector(".note:text-is('ended at the limit of tokens')")
        assert page.locator(".assistant").text_content().startswith("Once")
        assert len(page.locator(".assistant").text_content()) > 6
