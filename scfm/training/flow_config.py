"""The settings of pre-training on labelled images."""

from dataclasses import dataclass
from typing import Any

from scfm.files import expand_user
from scfm.method.distill import STEP_SCALED, SCFMConfig, is_int, setting, validate
from scfm.models.unet import SIZES

LEVELS = 8  # the step sizes 1, 1/2, ..., 1/128 of a Shortcut Model
SHORTCUT: dict[str, Any] = {
    "method": "shortcut",
    "non_shortcut_ratio": 0.75,
    "shift": (1.0, 1.0),
    "self_grids": tuple(2**k for k in range(1, LEVELS)),
}


@dataclass
class FlowConfig(SCFMConfig):
    """Everything that one `scfm pretrain` needs to know; the defaults are for CIFAR-10 on one GPU."""

    train_data_dir: str = setting(
        "", "folder of parquet files with the columns img and label, or hub:OWNER/NAME"
    )
    output_dir: str = setting(
        "runs/pretrain", "folder of checkpoints, validation images and the result, flow.safetensors"
    )
    size: str = setting("full", f"of the network: {', '.join(SIZES)}")
    method: str = setting(
        "scfm", "scfm, or shortcut: a network whose input is the step size too (arXiv 2410.12557)"
    )
    teacher: str = setting(
        "", "flow.safetensors of a finished run: distil it instead of starting from nothing"
    )
    max_train_steps: int = setting(200_000, "training steps")
    global_batch_size: int = setting(128, "examples of one step, over all processes")
    learning_rate: float = setting(3e-4, "learning rate of AdamW, after the warm-up")
    lr_warmup_steps: int = setting(
        1000, "steps over which the learning rate rises in a straight line; 0 for none"
    )
    max_grad_norm: float = setting(1.0, "largest gradient norm; inf for no clipping")
    non_shortcut_ratio: float = setting(
        0.75, "share of flow-matching examples, 1 for nothing else; the others are self-consistency"
    )
    teacher_ratio: float = setting(
        0.0, "share of those others whose target is the teacher's; 0 without a teacher"
    )
    shift: tuple = setting(
        (),
        "range of the time shift, drawn per example; empty: 1 to 2; with step_scaled, which trains on the "
        "grids that are sampled, within a tenth of 1",
    )
    algorithm: str = setting(
        "one_ema",
        "one_ema: targets of one average; dual and dual_pure only with a teacher; step_scaled: the scale is "
        "the step size (chapter 06_step_scale), and many steps are the plain flow",
    )
    ema_decay_slow: float = setting(
        0.999, "decay of the EMA, per step: targets are its, and it is what is saved"
    )
    ema_decay: float = setting(
        0.99, "step_scaled: decay of the EMA of what few steps add to the plain flow; a short memory"
    )
    difference_lr: float = setting(
        0.0,
        "step_scaled: learning rate of the differences; 0: a quarter of learning_rate, with a teacher "
        "learning_rate over the mean of the scale",
    )
    label_dropout: float = setting(
        0.1, "share of examples whose label is hidden, so that guidance is possible"
    )
    random_flip: bool = setting(True, "mirror every other image")
    weight_dtype: str = setting(
        "fp32", "fp32, or bf16: autocast of the networks (weights and averages stay in fp32)"
    )
    checkpointing_steps: int = setting(2000, "training steps between checkpoints")
    checkpoints_total_limit: int = setting(2, "checkpoints that stay, the newest ones")
    validation_steps: int = setting(2000, "training steps between validation images; 0 for none")
    eval_num_steps: tuple = setting(
        (1, 2, 4, 8, 64), "step counts of validation, rising; the others are compared with the last"
    )

    def __post_init__(self) -> None:
        expand_user(self)

    @property
    def shift_range(self) -> tuple[float, float]:
        """Between which shifts an example's is drawn."""
        if self.shift:
            low, high = self.shift
            return low, high
        return (1 / 1.1, 1.1) if self.algorithm == STEP_SCALED else (1.0, 2.0)

    def check(self) -> None:
        """ValueError with the setting, its value and the mend. Looks at nothing but the settings."""
        super().check()
        validate(self, FLOW_VALIDATORS)


def is_plain_shortcut(c: FlowConfig) -> bool:
    """Whether the settings are those that a Shortcut Model can be trained with."""
    same = (c.shift, c.self_grids, c.t_skip) == (SHORTCUT["shift"], SHORTCUT["self_grids"], 2)
    return same and not c.teacher and c.algorithm != STEP_SCALED


FLOW_VALIDATORS = [
    (
        "train_data_dir",
        lambda c: c.train_data_dir,
        "say --train_data_dir FOLDER, with files such as train-00000-of-00001.parquet",
    ),
    ("size", lambda c: c.size in SIZES, f"one of {', '.join(SIZES)}"),
    ("method", lambda c: c.method in ("scfm", "shortcut"), "scfm or shortcut"),
    (
        "method",
        lambda c: c.method == "scfm" or is_plain_shortcut(c),
        f"needs --shift 1,1 --self_grids {','.join(map(str, SHORTCUT['self_grids']))} --t_skip 2, no "
        "teacher, and not --algorithm step_scaled",
    ),
    (
        "teacher_ratio",
        lambda c: c.teacher or c.teacher_ratio == 0,
        "there is no teacher: take 0, or name one with --teacher",
    ),
    (
        "shift",
        lambda c: c.algorithm != STEP_SCALED or c.shift_range[0] <= 1 <= c.shift_range[1],
        "step_scaled trains on the grids that are sampled, at shift 1: leave --shift out",
    ),
    (
        "non_shortcut_ratio",
        lambda c: not (c.algorithm == STEP_SCALED and c.teacher) or c.non_shortcut_ratio == 0,
        "step_scaled with a teacher leaves the teacher as it is: no example can train it, take 0",
    ),
    (
        "algorithm",
        lambda c: c.teacher or c.algorithm in ("one_ema", STEP_SCALED),
        "without a teacher there is one average: take one_ema, or step_scaled",
    ),
    ("label_dropout", lambda c: 0 <= c.label_dropout < 1, "a share of the examples, in [0, 1)"),
    ("lr_warmup_steps", lambda c: is_int(c.lr_warmup_steps, 0), "a whole number of steps; 0 for none"),
    ("weight_dtype", lambda c: c.weight_dtype in ("fp32", "bf16"), "fp32 or bf16"),
    ("checkpointing_steps", lambda c: is_int(c.checkpointing_steps, 1), "a whole number of at least 1"),
    (
        "checkpoints_total_limit",
        lambda c: is_int(c.checkpoints_total_limit, 1),
        "a whole number of at least 1",
    ),
    ("validation_steps", lambda c: is_int(c.validation_steps, 0), "a whole number of steps; 0 for none"),
    (
        "eval_num_steps",
        lambda c: c.eval_num_steps and all(is_int(n, 1) for n in c.eval_num_steps),
        "step counts of 1 or more, as 1,4,64",
    ),
]
