"""`scfm app`: its flags, and its page in a headless Chromium."""

import socket
import time
import urllib.error
import urllib.request

import pytest
import torch
from browser import chromium, complaints, requested

from scfm.cli import main
from scfm.commands.app import CAPTIONS, CARRIED, app_parser, offered_captions
from scfm.evaluation.compare import Choice, Comparer, Sampled
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora

WAIT = 60  # seconds, for a machine that does other things too


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "0"], "--steps is 0: give 1 to 32"),
        (["--teacher_steps", "0"], "--teacher_steps is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--host", "not a host"], "--host not a host with --port 0 cannot be served"),
        (["--lora", "nowhere"], "no LoRA at nowhere"),
        (["--prompts", "nowhere.txt"], "no captions at nowhere.txt"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(capsys, monkeypatch, words, message):
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert main(["app", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("scfm app: ") and message in line and "\n" not in line


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert f"--port {port} is taken: give another one, or 0" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr("scfm.commands.app.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "needs Gradio, which is not installed: pip install 'scfm[app]'" in capsys.readouterr().err


def test_without_a_lora_an_installed_copy_asks_for_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("scfm.commands.app.CARRIED", tmp_path / "none")
    assert main(["app"]) == 2
    assert "say --lora FOLDER" in capsys.readouterr().err


def test_the_captions_that_the_page_offers(tmp_path, lora):
    (tmp_path / "captions.txt").write_text("\n".join(f"caption {i}" for i in range(30)))
    assert offered_captions(str(tmp_path / "captions.txt"), str(lora), False)[-1] == "caption 11"
    assert offered_captions("", str(CARRIED), True) == list(CAPTIONS)
    assert offered_captions("", str(tmp_path), False) == []


def test_the_page_is_for_this_machine_alone_unless_another_host_is_given():
    args = app_parser().parse_args([])
    assert args.host == "127.0.0.1" and not args.open_browser


def test_the_cards_name_steps_costs_and_the_captions_safely():
    from scfm.app import ROLES, show_cards

    comparer = Comparer.__new__(Comparer)
    comparer.teacher_steps = 32
    comparer.step_lora = StepLora.__new__(StepLora)
    comparer.step_lora.lora_scales = None
    choice = Choice('a "star" <script>', 2, 0.5)
    black = Sampled(-torch.ones(3, 8, 8), 2, (0.5, 0.5), 0.25, 4)
    text = show_cards(comparer, {"student": black}, choice)
    assert text.count("<img") == 1 and text.count('class="blank busy"') == 2
    assert "2 steps" in text and "32 steps" in text and "0.25" in text and "<script>" not in text
    assert "LoRA scale 0.5 (as given)" in text
    white = black._replace(image=torch.ones(3, 8, 8), evaluations=32)
    text = show_cards(comparer, dict(zip(ROLES, (black, black, white), strict=True)), choice)
    assert text.count("<dd>1.000</dd>") == 2 and text.count("<dd>32</dd>") == 1


@pytest.fixture(scope="module")
def reached():
    """The hosts that this process connects to."""
    hosts, connect = set(), socket.socket.connect

    def remember(self, address):
        hosts.add(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", remember)
        yield hosts


@pytest.fixture(scope="module")
def page(reached):
    """The address of the page with the carried emoji, where 8 steps stand for the teacher's 32."""
    from scfm.app import Start, build_page, serve

    config = InferenceConfig(lora=str(CARRIED), weight_dtype="fp32")
    page = build_page(Comparer(StepLora(config, "cpu"), teacher_steps=8), Start(CAPTIONS, 2))
    yield serve(page, "127.0.0.1", 0, block=False)
    page.close(verbose=False)


def sources(driver):
    """The three images of the page, once all of them are there."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        images = driver.execute_script(
            "return [...document.querySelectorAll('#cards img')].map(image => image.src)"
        )
        if len(images) == 3:
            return images
        time.sleep(0.1)
    raise AssertionError("no three images: " + driver.find_element("id", "cards").text)


def when_changed(driver, before):
    """The three images, once the student's is another one."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        images = sources(driver)
        if images[0] != before[0]:
            return images
        time.sleep(0.1)
    raise AssertionError("the student's image has not changed")


@pytest.mark.slow
def test_turning_a_slider_changes_the_image(page, reached, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with chromium(tmp_path) as driver:
        driver.get(page)
        two = sources(driver)
        assert all(image.startswith("data:image/png") for image in two)
        assert "Student 2 steps" in driver.find_element("id", "cards").text.replace("\n", " ")
        driver.find_element("css selector", "#steps input[type=range]").send_keys(Keys.ARROW_LEFT)
        one = when_changed(driver, two)
        assert "Student 1 step" in driver.find_element("id", "cards").text.replace("\n", " ")
        assert one[1] != two[1] and one[2] == two[2] and one[0] != one[1]

        scale = "#scale input[type=range]"
        assert not driver.find_element("css selector", scale).is_enabled()  # the rule's
        driver.find_element("css selector", "#mode input[value=free]").click()
        end = time.monotonic() + WAIT
        while not driver.find_element("css selector", scale).is_enabled() and time.monotonic() < end:
            time.sleep(0.1)
        driver.find_element("css selector", scale).send_keys(Keys.HOME)
        free = when_changed(driver, one)
        while free[0] != one[1] and time.monotonic() < end:  # each key between moved it a little
            free = sources(driver)
        assert free[0] == one[1] == free[1]  # at scale 0 the student is the teacher

        driver.find_element("id", "another").click()
        noise = when_changed(driver, free)
        driver.find_elements("css selector", "#captions button")[1].click()
        assert len({free[2], noise[2], when_changed(driver, noise)[2]}) == 3
        assert driver.find_element("css selector", "#prompt textarea").get_property("value") == CAPTIONS[1]
        prompt = driver.find_element("css selector", "#prompt textarea")
        prompt.send_keys(Keys.CONTROL + "a")
        prompt.send_keys(Keys.BACKSPACE + Keys.ENTER)
        end = time.monotonic() + WAIT
        while "The prompt is empty" not in driver.find_element("id", "cards").text:
            assert time.monotonic() < end, "no word on the empty prompt"
            time.sleep(0.1)
        assert not driver.find_elements("css selector", "#cards img")
        prompt.send_keys(CAPTIONS[2] + Keys.ENTER)
        assert sources(driver)
        assert not complaints(driver)
        outside = [url for url in requested(driver) if not url.startswith(page)]
        assert not outside and reached == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["gradio_api/file=settings.ini", "gradio_api/upload", "monitoring", "runs"])
def test_nothing_but_the_page_is_served(page, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(page + path)
    assert "default-src 'self'" in urllib.request.urlopen(page).headers["content-security-policy"]
