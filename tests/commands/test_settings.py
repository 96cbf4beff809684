"""What holds for the settings and the flags of every command."""

import importlib
import inspect
import pkgutil
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import scfm
from scfm.cli import COMMANDS, main
from scfm.commands.sample import sample_parser
from scfm.data.prepare import DataConfig
from scfm.evaluation.evaluate import EvaluateConfig
from scfm.inference.config import InferenceConfig
from scfm.inference.export import ExportConfig
from scfm.inference.push import PushConfig
from scfm.method.distill import SCFMConfig
from scfm.training.config import DistillConfig, as_json
from scfm.training.flow_config import FlowConfig
from toy.pipelines import FLUX

PIPELINE = {"pretrained_model_name_or_path": str(FLUX)}
# settings with which a config passes its check
VALID = {
    SCFMConfig: {},
    FlowConfig: {"train_data_dir": "cifar"},
    DataConfig: {**PIPELINE, "prompts": "prompts.txt", "output_dir": "images"},
    DistillConfig: {**PIPELINE, "prompts": "prompts.txt"},
    InferenceConfig: {"quantize": "none", "guidance_scale": -3.0},
    ExportConfig: {"quantize": "none", "output_dir": "exported"},
    EvaluateConfig: {"quantize": "none"},
    PushConfig: {"lora": "runs/mine", "repo_id": "me/steps"},
}


def config_classes():
    """Every dataclass of the library that can check itself."""
    modules = pkgutil.walk_packages(scfm.__path__, "scfm.")
    for module in (importlib.import_module(info.name) for info in modules):
        for _, value in inspect.getmembers(module, inspect.isclass):
            if is_dataclass(value) and hasattr(value, "check"):
                yield value


def make(config_class, lora):
    """A valid config, of a copy of the carried LoRA where it is of a LoRA."""
    more = {"lora": str(lora)} if issubclass(config_class, InferenceConfig) else {}
    return config_class(**VALID[config_class], **more)


def test_every_config_is_tried_here():
    assert set(config_classes()) == set(VALID)


@pytest.mark.parametrize("config_class", VALID)
def test_a_check_changes_nothing_and_passes_again(config_class, lora):
    config, twin = make(config_class, lora), make(config_class, lora)
    config.check()
    assert config == twin and vars(config) == vars(twin)
    config.check()


@pytest.mark.parametrize("config_class", [c for c in VALID if issubclass(c, InferenceConfig)])
def test_a_config_is_resolved_once(config_class, lora):
    config, twin = make(config_class, lora), make(config_class, lora)
    new = config.resolved()
    assert config == twin and vars(config) == vars(twin)  # a new object
    assert type(new) is config_class and new != config
    settings = as_json(new)
    assert new.resolved() == new and as_json(new.resolved()) == settings
    new.check()
    assert as_json(new) == settings
    assert new.quantize == "" and new.guidance_scale == new.teacher_guidance_scale == 2.5
    assert new.pretrained_model_name_or_path == str(FLUX) and new.weight_dtype == "fp32"


def test_a_tilde_is_the_home_also_where_the_shell_leaves_it(monkeypatch):
    """As in --lora=~/runs/mine."""
    monkeypatch.setenv("HOME", "/somewhere")
    config = EvaluateConfig(lora="~/runs/mine", prompts="~/held_out.txt", negative_prompt="~ugly~")
    assert (config.lora, config.prompts) == ("/somewhere/runs/mine", "/somewhere/held_out.txt")
    assert config.negative_prompt == "~ugly~"
    args = sample_parser().parse_args(["--output=~/a.png", "--prompts=~/b.txt"])
    assert (args.output, args.prompts) == ("/somewhere/a.png", "/somewhere/b.txt")


def test_the_rest_of_an_export_and_an_evaluation_is_filled_in(lora):
    assert make(ExportConfig, lora).resolved().tolerance == 1e-3
    bf16 = ExportConfig(lora=str(lora), output_dir="exported", weight_dtype="bf16")
    assert bf16.resolved().tolerance == 0.03
    assert Path(make(EvaluateConfig, lora).resolved().output_dir) == lora / "evaluation"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_a_flag_is_written_in_full(command, capsys):
    """An abbreviated one could swallow another's value: --lora is not --lora_scale."""
    flag = {"plan": "--num_image", "data": "--num_image", "pretrain": "--max_train_step"}
    words = [command, flag.get(command, "--see"), "3"]
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2 and f"unrecognized arguments: {words[1]} 3" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    fewest = {"push": 1}.get(command, 4)  # what has none, or an empty one, shows none
    assert done.value.code == 0 and capsys.readouterr().out.count("(default: ") >= fewest


@pytest.mark.parametrize("algorithm", ["dual", "step_scaled"])
def test_a_config_of_a_file_has_lists_and_is_the_same(algorithm):
    """`asdict` of a run's config.json: its lists are no other values than the tuples of the defaults."""
    config = DistillConfig(pretrained_model_name_or_path="a", prompts="b", algorithm=algorithm)
    DistillConfig(**as_json(config)).check()


@pytest.mark.parametrize(
    "command", ["plan", "data", "distill", "pretrain", "dial", "sample", "evaluate", "export", "push"]
)
def test_a_misspelt_option_is_answered_in_one_line_with_the_one_that_was_meant(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--confg", "x", "--prompt_s", "y"])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1
    assert said[0].startswith(f"scfm {command}: ") and f"(scfm {command} --help lists all)" in said[0]
    if command in ("plan", "distill", "pretrain", "data"):
        assert "did you mean --config" in said[0]
    with pytest.raises(SystemExit):
        main([command, "--seed", "two"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_groups_the_settings_of_each_class_and_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    said = capsys.readouterr().out
    method, run = said.index("The method and its optimizer"), said.index("Everything that one")
    assert method < said.index("--teacher_ratio") < run < said.index("--gradient_checkpointing")
    assert "example:\n  scfm distill --config" in said and "(default: )" not in said
