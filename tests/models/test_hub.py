"""A hub that does not answer is noticed in seconds, and is one clear line."""

import shutil
import socket
import time
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from scfm.cli import main
from scfm.models import hub, source
from scfm.models.hub import answers
from toy.pipelines import FLUX, WEIGHTS

LORA = ["--lora", "lora"]
SIZE = ["--height", "32", "--width", "32"]
WORDS = {
    "distill": ["--prompts", "captions.txt", "--output_dir", "run", *SIZE],
    "data": ["--prompts", "captions.txt", "--output_dir", "run", "--sizes", "32x32"],
    "plan": [],
    "sample": [*LORA, "--prompt", "a red star", *SIZE],
    "dial": [*LORA, "--prompts", "captions.txt", *SIZE],
    "evaluate": [*LORA, "--prompts", "captions.txt", "--output_dir", "run", *SIZE],
    "export": [*LORA, "--output_dir", "run", *SIZE],
}


@pytest.fixture
def silent():
    """The address of a server that takes a connection and never says a word."""
    with socket.create_server(("localhost", 0)) as server:
        yield f"http://localhost:{server.getsockname()[1]}"


@pytest.fixture
def missing():
    """The address of a server that has nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("localhost", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_answers_also_with_an_error(missing, silent):
    began = time.perf_counter()
    assert answers(missing, 5)
    assert not answers(silent, 0.3) and not answers("http://localhost:9", 5)
    assert time.perf_counter() - began < 4


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    def look_up(*_, **__):
        time.sleep(5)
        raise OSError("no such name")

    monkeypatch.setattr(hub, "urlopen", look_up)
    began = time.perf_counter()
    assert not answers("http://somewhere", 0.2) and time.perf_counter() - began < 3


@pytest.mark.parametrize("command", WORDS)
def test_every_command_says_in_one_line_that_the_hub_is_away(
    lora_copy, tmp_path, monkeypatch, capsys, silent, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a red star\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent)
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    asked, download = [], source.snapshot_download
    monkeypatch.setattr(source, "snapshot_download", lambda *a, **k: asked.append(k) or download(*a, **k))
    assert main([command, "--pretrained_model_name_or_path", "me/flux", *WORDS[command]]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        f"no pipeline at me/flux: there is no such folder, and no copy from the hub is here ({silent}" in line
    )
    assert [more["local_files_only"] for more in asked] == [True] and not (tmp_path / "run").exists()


@pytest.fixture
def lora_copy(tmp_path):
    return shutil.copytree(WEIGHTS / "lora", tmp_path / "lora")


def test_a_plan_downloads_configuration_files_alone(tmp_path, monkeypatch, capsys):
    def download(name, allow_patterns, local_files_only):
        folder = tmp_path / "snapshot"
        for path in FLUX.rglob("*"):
            place = path.relative_to(FLUX)
            if path.is_file() and any(fnmatch(str(place), pattern) for pattern in allow_patterns):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / place)
        return str(folder)

    monkeypatch.setattr(source, "hub_reachable", lambda: True)
    monkeypatch.setattr(source, "snapshot_download", download)
    name = ["--pretrained_model_name_or_path", "somebody/tiny-flux"]
    assert main(["plan", *name, *SIZE, "--max_sequence_length", "16"]) == 0
    assert "GiB" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "snapshot").rglob("*") if path.is_file()} == {".json"}
    assert not list((tmp_path / "snapshot").rglob("tokenizer.json"))
