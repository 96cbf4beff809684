"""`scfm push`: what would be uploaded, as a dry run without a network, and what the hub is asked for."""

import json
import re
import shutil

import httpx
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

import scfm.inference.push
from scfm.cli import main
from scfm.inference.model_card import MARKER
from scfm.inference.push import PushConfig, build_repository, push
from toy.pipelines import WEIGHTS

SECRET = "hf_" + "x" * 34


@pytest.fixture
def run(tmp_path):
    """The carried pair as a run's folder, with two validation images, the newest of which is shown."""
    folder = tmp_path / "run"
    shutil.copytree(WEIGHTS / "step_lora", folder)
    (folder / "validation").mkdir()
    for step in ("000100", "000600"):
        (folder / "validation" / f"{step}.png").write_bytes(b"png" + step.encode())
    return folder


class Hub:
    """Remembers what it was asked for. card: of the repository that is there, or None."""

    def __init__(self, tmp_path, card=None, error=None):
        self.tmp_path, self.card, self.error, self.commits = tmp_path, card, error, []

    def create_repo(self, repo_id, private, exist_ok):
        if self.error:
            raise HfHubHTTPError(
                self.error, response=httpx.Response(403, request=httpx.Request("POST", "x://"))
            )
        self.private = private
        return f"https://hub/{repo_id}"

    def file_exists(self, repo_id, name):
        return self.card is not None

    def hf_hub_download(self, repo_id, name):
        (self.tmp_path / "theirs.md").write_text(self.card)
        return str(self.tmp_path / "theirs.md")

    def create_commit(self, repo_id, operations, commit_message):
        self.commits.append({op.path_in_repo: op.path_or_fileobj for op in operations})


def header(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_the_repository_has_what_others_need_and_no_path_of_this_machine(run, tmp_path):
    files, card = build_repository(PushConfig(str(run), "me/steps", "black/flux", "apache-2.0"))
    names = {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors", "selection.json"}
    assert files.keys() == names | {"images/000600.png"}
    assert files["images/000600.png"].read_bytes() == b"png000600"
    told = header(card)
    assert told["base_model"] == "black/flux" and told["license"] == "apache-2.0"
    assert told["pipeline_tag"] == "text-to-image" and {"lora", "diffusers"} <= set(told["tags"])
    assert 'pipe.load_lora_weights("me/steps", weight_name=' in card and "(images/000600.png)" in card
    assert "the licence of black/flux holds for it too" in card and MARKER in card
    texts = [card] + [path.read_text() for name, path in files.items() if name.endswith(".json")]
    assert not any(str(tmp_path) in text or str(WEIGHTS) in text for text in texts)


def test_a_base_that_is_a_folder_is_not_called_one_of_the_hub(run):
    assert "base_model" not in header(build_repository(PushConfig(str(run), "me/steps")).card)


def test_a_dry_run_shows_all_and_asks_nobody(run, capsys, monkeypatch):
    monkeypatch.setattr(scfm.inference.push, "HfApi", None)
    monkeypatch.setattr(scfm.inference.push, "get_token", None)
    assert main(["push", "--lora", str(run), "--repo_id", "me/steps", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "pytorch_lora_weights_2.safetensors" in printed and "library_name" in printed
    assert "nothing was uploaded" in printed and "say --base_model OWNER/NAME" in printed
    named = ["--repo_id", "me/steps", "--base_model", "a/b", "--dry_run"]
    assert main(["push", "--lora", str(run), *named]) == 0
    assert "names no base model" not in capsys.readouterr().out


def test_all_goes_in_one_commit(run, tmp_path):
    hub, config = Hub(tmp_path), PushConfig(str(run), "me/steps", private=True)
    assert push(config, hub) == "https://hub/me/steps" and hub.private
    files, card = build_repository(config)
    assert hub.commits == [{name: str(path) for name, path in files.items()} | {"README.md": card.encode()}]


def test_a_card_of_ours_is_replaced_and_another_is_not(run, tmp_path):
    push(PushConfig(str(run), "me/steps"), again := Hub(tmp_path, card=f"old\n{MARKER}\n"))
    assert len(again.commits) == 1
    hub = Hub(tmp_path, card="# Mine")
    with pytest.raises(ValueError, match="did not write"):
        push(PushConfig(str(run), "me/steps"), hub)
    assert not hub.commits


def test_the_token_is_never_shown(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scfm.inference.push, "get_token", lambda: SECRET)
    with pytest.raises(OSError, match="the hub refused") as caught:
        push(PushConfig(str(run), "me/steps"), Hub(tmp_path, error=f"bad token {SECRET}"))
    assert SECRET not in str(caught.value) and "role write" in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--repo_id", "steps"], "say OWNER/NAME"),
        (["--repo_id", "me/steps", "--base_model", "./here"], "as the hub has it"),
        (["--repo_id", "me/steps"], "no token of the hub"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(run, monkeypatch, capsys, words, message):
    monkeypatch.setattr(scfm.inference.push, "get_token", lambda: None)
    assert main(["push", "--lora", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_lora_and_a_hub_out_of_reach(tmp_path, run, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    words = ["--repo_id", "me/steps", "--dry_run"]
    assert main(["push", "--lora", str(tmp_path / "empty"), *words]) == 2
    monkeypatch.setattr(scfm.inference.push, "get_token", lambda: SECRET)
    monkeypatch.setattr(scfm.inference.push, "hub_reachable", lambda: False)
    assert main(["push", "--lora", str(run), *words[:2]]) == 1
    assert "nothing was uploaded" in capsys.readouterr().err


def test_the_header_survives_words_that_yaml_would_read_otherwise(run):
    card = build_repository(PushConfig(str(run), "me/no", license="no")).card
    assert header(card)["license"] == "no" and json.dumps("no") in card
