from functools import partial

import pytest

from scfm.cli import main


@pytest.fixture(scope="session")
def command():
    """command("dial", lora=folder, steps="1,2") is `scfm dial --lora folder --steps 1,2`: the exit code."""

    def run(name, **settings):
        return main([name, *(word for k, v in settings.items() for word in (f"--{k}", str(v)))])

    return run


@pytest.fixture(scope="session")
def distill(command):
    """`scfm distill` of two training steps, but for the settings that are given."""
    return partial(
        command,
        "distill",
        rank=2,
        algorithm="dual",
        learning_rate=1e-2,
        max_train_steps=2,
        global_batch_size=2,
        teacher_steps=2,
        num_eval_prompts=2,
        eval_num_steps=2,
        eval_lora_scales="0.5,1",
        report_to="none",
    )
