"""`scfm dial` and `scfm sample` on a copy of the LoRA that the repository carries."""

import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.cli import main
from scfm.commands.sample import sample_parser
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, describe_origin, generate
from scfm.method.lora_scale import LoraScales
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales, write_lora_scales
from toy.pipelines import load_flux

PROMPTS = ["a large red cross", "a small blue ring on the left"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def run(command, *words):
    return main([str(word) for word in (command, *words)])


def dial(lora, prompts, *words):
    few = ["--num_prompts", 3, "--lora_scales", "1,.5", "--target_steps", 4]
    return run("dial", "--lora", lora, "--prompts", prompts, *few, *words)


def test_dial_keeps_the_tensors_and_a_stock_pipeline_still_loads_them(lora, prompts, capsys):
    before = load_file(lora / WEIGHT_NAME)
    assert dial(lora, prompts, "--steps", "2,1") == 0
    assert "lora_scales.json and README.md beside it" in capsys.readouterr().out
    scales = read_lora_scales(lora / WEIGHT_NAME)
    assert scales.steps == (1, 2) and scales.scales[0] >= scales.scales[1]
    assert set(scales.scales) <= {0.0, 0.5, 1.0}
    record = json.loads((lora / "lora_scales.json").read_text())
    assert record["captions"] == 3 and record["target_steps"] == 4 and len(record["curve"]) == 2 * 3
    nearest = {n: min(row["distance"] for row in record["curve"] if row["steps"] == n) for n in (1, 2)}
    assert nearest[1] > nearest[2] > 0
    after = load_file(lora / WEIGHT_NAME)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert f'set_adapters(["step"], [{scales.scale(2):g}])' in (lora / "README.md").read_text()
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}


@pytest.mark.slow
def test_dial_finds_a_scale_for_each_step_and_sample_uses_it(lora, prompts, tmp_path, capsys):
    assert dial(lora, prompts, "--steps", "2,4", "--per_step", "2") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("   2 steps")]
    (scales,) = read_lora_scales(lora / WEIGHT_NAME).schedules
    assert len(scales) == 2
    assert json.loads((lora / "lora_scales.json").read_text())["schedules"] == [list(scales)]
    one, each = (float(line.split("distance")[1].split()[0]) for line in lines)
    assert each <= one
    words = ["sample", "--lora", lora, "--prompt", PROMPTS[0], "--steps", 2]
    assert run(*words, "--output", tmp_path / "a.png") == 0
    shown = ", ".join(f"{scale:.3g}" for scale in scales)
    assert f"LoRA scale {shown} (from the LoRA's file, a scale for each step)" in capsys.readouterr().out
    given = ",".join(map(str, scales))
    assert run(*words, "--lora_scale", given, "--output", tmp_path / "b.png") == 0
    assert "(as given)" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "A scale for each step" in (lora / "README.md").read_text()
    assert dial(lora, prompts, "--steps", "2") == 0  # forgets it
    assert read_lora_scales(lora / WEIGHT_NAME).schedules == ()


def test_dial_writes_beside_a_readme_that_is_not_its_own(lora, prompts, capsys):
    (lora / "README.md").write_text("# Mine\n")
    assert dial(lora, prompts, "--steps", "1") == 0
    assert "lora_scales.json and MODEL_CARD.md beside it" in capsys.readouterr().out
    assert (lora / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("words, scale", [([], 0.5), (["--lora_scale", ".75"], 0.75)])
def test_sample_writes_the_images_as_a_grid(lora, tmp_path, capsys, words, scale):
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1,), (0.5,), 3.0))
    out = tmp_path / "new/star.png"
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert run("sample", "--lora", lora, *prompts, "--steps", 1, "--seed", 5, "--output", out, *words) == 0
    assert f"2 images, 1 step, LoRA scale {scale:g}" in capsys.readouterr().out
    images, _ = generate(StepLora(InferenceConfig(lora=str(lora), seed=5), "cpu"), PROMPTS, 1, scale)
    written = pil_to_tensor(Image.open(out)).float() / 127.5 - 1
    assert (written - torch.cat(list(images), 2)).abs().max() < 0.02


def test_sample_says_where_the_scale_comes_from():
    scales = LoraScales((2, 4), (1.0, 0.5), 3.0)
    assert [describe_origin(scales, n) for n in (1, 2, 3, 8)] == [
        "that for 2 steps, the nearest in the LoRA's file",
        "from the LoRA's file",
        "between those for 2 and 4 steps in the LoRA's file",
        "that for 4 steps, the nearest in the LoRA's file",
    ]
    per_step = scales._replace(schedules=((1.0, 2.0),))
    assert describe_origin(per_step, 2) == "from the LoRA's file, a scale for each step"
    assert "scfm dial finds it" in describe_origin(None, 2)


@pytest.mark.parametrize(
    "command, change, message",
    [
        ("sample", {"--lora": "nowhere"}, "no LoRA at nowhere"),
        ("sample", {"--prompts": "x.txt"}, "either --prompt"),
        ("sample", {"--steps": "0"}, "--steps is 0"),
        ("sample", {"--pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
        ("sample", {"--weight_dtype": "fp8"}, "fp32, bf16"),
        ("sample", {"--inference_shift": "-1"}, "shift"),
        ("sample", {"--negative_prompt": "ugly"}, "a negative prompt means nothing to Flux"),
        ("sample", {"--lora_scale": "1,2"}, "--lora_scale gives 2 scales for 4 steps"),
        ("sample", {"--output": "."}, "--output . is a folder: name a file in it, such as image.png"),
        ("sample", {"--output": __file__ + "/a.png"}, "cannot be written to (Not a directory): take another"),
        ("dial", {"--lora": "nowhere"}, "no LoRA at nowhere"),
        ("dial", {"--per_step": "5"}, "--per_step 5: give step counts that --steps has too"),
        ("dial", {"--prompts": "nowhere.txt"}, "no captions at nowhere.txt"),
        ("dial", {"--num_prompts": "0"}, "--num_prompts"),
        ("dial", {"--target_steps": "0"}, "--target_steps"),
        ("dial", {"--steps": ","}, "--steps"),
        ("dial", {"--lora_scales": "1,-.5"}, "--lora_scales has -0.5: give scales of 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_code_2(lora, capsys, monkeypatch, command, change, message):
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    flags = {"--lora": str(lora), **({"--prompt": "a red star"} if command == "sample" else {}), **change}
    assert run(command, *(word for pair in flags.items() for word in pair)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"scfm {command}: ") and message in line


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    "what, how, message",
    [
        (
            "tempfile.NamedTemporaryFile",
            read_only,
            "(Read-only file system): the scales go into the LoRA's file",
        ),
        (
            "shutil.disk_usage",
            lambda _: SimpleNamespace(free=2**20),
            "(1.0 MiB are free there, 4.8 are needed): the scales go into the LoRA's file",
        ),
    ],
    ids=["read-only", "full"],
)
def test_dial_looks_whether_it_can_write_before_it_searches(
    lora, prompts, capsys, monkeypatch, what, how, message
):
    monkeypatch.setattr(f"scfm.files.{what}", how)
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert dial(lora, prompts, "--steps", "1") == 2
    assert f"lora cannot be written to {message}" in capsys.readouterr().err


def test_a_caption_is_read_as_utf_8_whatever_the_locale(lora):
    """LC_ALL=POSIX makes Python hand over half characters, which no tokenizer reads."""
    caption = "ein grüner Stern"
    assert sample_parser().parse_args(["--lora", str(lora), "--prompt", caption]).prompt == [caption]
    code = "import sys; from scfm.commands.sample import sample_parser\n"
    code += "print(ascii(sample_parser().parse_args(sys.argv[1:]).prompt))"
    posix = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = [sys.executable, "-c", code, "--lora", lora, "--prompt", caption.encode()]
    done = subprocess.run(words, env={**os.environ, **posix}, capture_output=True, text=True)
    assert done.stdout.strip() == r"['ein gr\xfcner Stern']", done.stderr


def test_a_caption_that_is_no_utf_8_is_named(lora, capsys):
    latin = os.fsdecode("ein grüner Stern".encode("latin-1"))
    for flag in ("--prompt", "--negative_prompt"):
        with pytest.raises(SystemExit, match="2"):
            run("sample", "--lora", lora, flag, latin)
        assert "is not UTF-8: put it into a file of captions" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "dial"])
def test_long_captions_are_counted_once(lora, prompts, tmp_path, caplog, capfd, command):
    prompts.write_text("a red star\n" + "a red star on the left " * 40)
    words = ["--lora", lora, "--prompts", prompts, "--steps", 1]
    more = {
        "sample": ["--output", tmp_path / "a.png", "--batch_size", 1],
        "dial": ["--num_prompts", 2, "--lora_scales", "1", "--target_steps", 2],
    }
    assert run(command, *words, *more[command]) == 0
    assert caplog.text.count("1 of 2 captions are longer than 16 tokens") == 1
    assert not re.search("truncated|indexing errors", caplog.text + capfd.readouterr().err)
