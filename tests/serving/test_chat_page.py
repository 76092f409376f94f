"""The page that chats with the model, in a real browser."""

import pytest
from tiny_serving import held, model_of, serving, slowed, until

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
        slowed(server, 0.05)
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


def asked_of(page) -> list[list[tuple[str, str]]]:
    """What each request from now on says: roles and contents."""
    asked = []

    def note(request) -> None:
        if request.method == "POST":
            asked.append([(m["role"], m["content"]) for m in request.post_data_json["messages"]])

    page.on("request", note)
    return asked


def test_a_new_conversation_knows_nothing_of_one_that_still_runs(model, open_page):
    with serving(model, limits=Limits()) as server:
        server.service.warm_up()
        slowed(server, 0.02)
        page = open_page(server.address)
        page.wait_for_selector("h1:text-is('tiny')")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("max tokens").fill("140")
        asked = asked_of(page)
        type_and_send(page, "first")
        until(lambda: len(page.locator(".assistant").text_content()) > 3)
        page.get_by_role("button", name="New").click()
        page.get_by_label("max tokens").fill("5")
        type_and_send(page, "second")
        page.wait_for_selector(".note:text-is('ended at the limit of tokens')")
        assert page.locator(".user").all_text_contents() == ["second"]
        assert page.locator(".turn").count() == 3
        until(lambda: server.service.scheduler.counts() == (0, 0))
        type_and_send(page, "third")
        page.wait_for_selector(".note >> nth=1")
        second = page.locator(".assistant").first.text_content()
        assert asked == [
            [("user", "first")],
            [("user", "second")],
            [("user", "second"), ("assistant", second), ("user", "third")],
        ]


def test_what_was_not_answered_can_be_asked_again(model, open_page):
    with serving(model, limits=Limits(), slots=1) as server:
        server.service.warm_up()
        scheduler, goes_on = server.service.scheduler, held(server)
        page = open_page(server.address)
        page.wait_for_selector("h1:text-is('tiny')")
        page.get_by_label("temperature").fill("0")  # a drawn answer may end before its limit
        page.get_by_label("max tokens").fill("5")
        asked = asked_of(page)
        type_and_send(page, "hi")
        until(lambda: sum(scheduler.counts()) == 1)
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector(".note:text-is('stopped')")
        assert page.locator(".assistant").count() == 0
        assert page.get_by_label("Your text").input_value() == "hi"
        goes_on.set()
        page.get_by_label("Your text").press("Enter")
        page.wait_for_selector(".note >> nth=1")
        assert asked == [[("user", "hi")]] * 2


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
