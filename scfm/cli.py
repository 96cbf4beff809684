"""The command line: `scfm COMMAND --help` explains each command. Heavy imports happen only in the command that runs."""
import argparse
import importlib
import json
import signal
import sys
from dataclasses import fields
from pathlib import Path

COMMANDS = {
    "demo": ("toy.demo:main", "distil the tiny Flux that the repository carries, and compare (5 minutes on 2 cores)"),
    "distill": ("scfm.cli:distill", "turn a pre-trained pipeline into a few-step one: writes a LoRA"),
    "dial": ("scfm.cli:dial", "find the LoRA's strength for each step count, and store it with the LoRA"),
    "sample": ("scfm.cli:sample", "paint prompts with a LoRA, at the strength that its dial says"),
}


def main(argv=None):
    """Entry point of `scfm`. Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 130 interrupted, 143 ended."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="scfm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Few-step sampling from pre-trained flow-matching models (SCFM, arXiv 2510.17858).",
        epilog="commands:\n" + "\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    name = parser.parse_args(argv[:1]).command
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"scfm {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def distill(argv):
    """`scfm distill`: a flag for every field of RunConfig."""
    from scfm.run import RunConfig, distill_pipeline, latest
    parser = argparse.ArgumentParser(
        prog="scfm distill", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Self-distil a pre-trained flow-matching pipeline into a 3 to 8 step one. The defaults are the "
                    "published recipe for FLUX.1-dev; the result, OUT/pytorch_lora_weights.safetensors, loads in a "
                    "stock pipeline with load_lora_weights. Run the same command again to resume after a kill.")
    parser.add_argument("--config", metavar="FILE", help="JSON file of the settings below, such as the config.json "
                        "that every run writes; flags override it")
    add_options(parser, RunConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = RunConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # finish the update, save, leave
    record = distill_pipeline(config, keep_going=lambda: not stopped)
    if record is None:
        print(f"stopped after saving {latest(config.out)}: the same command goes on from there")
        return 128 + signal.SIGTERM
    print(f"{record['updates']} updates; distance to the teacher's {record['teacher_steps']}-step endpoints:")
    for name, distance in record["endpoint_distance"].items():
        strength = lambda n: f" (strength {record['dial'][name][n]:g})" if name in record["dial"] else ""
        print(f"  {name:8}" + "".join(f"  {n} steps {d:.4f}{strength(n)}" for n, d in distance.items()))
    print(f"the {record['ships']} adapter ships: {config.out}/pytorch_lora_weights.safetensors")
    return 0


def dial(argv):
    """`scfm dial`: a flag for every field of UseConfig, and how finely to look."""
    from scfm.step_lora import StepLora, UseConfig, find_dial, keep_dial
    from scfm.teacher_data import read_prompts
    parser = argparse.ArgumentParser(
        prog="scfm dial", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Finds, for each number of steps, the strength of the LoRA whose endpoints lie nearest to the "
                    "teacher's own. Stores the table in the LoRA's header, dial.json and README.md beside it.")
    add_options(parser, UseConfig)
    parser.add_argument("--prompts", default="", help="text file of captions; empty: those of the run")
    parser.add_argument("--count", type=int, default=64, help="captions to look at, one noise for each")
    parser.add_argument("--steps", type=numbers(int), default=(1, 2, 3, 4, 8, 16), help="step counts of the table")
    parser.add_argument("--scales", type=numbers(float), default=tuple(i / 4 for i in range(9)), help="strengths to try")
    parser.add_argument("--goal_steps", type=int, default=64, help="steps of the teacher's own walks")
    args = vars(parser.parse_args(argv))
    path, count, steps, scales, goal_steps = (args.pop(k) for k in ("prompts", "count", "steps", "scales", "goal_steps"))
    if min(count, goal_steps, *steps) < 1:
        raise ValueError("--count, --goal_steps and --steps: give 1 or more")
    config = UseConfig(**args)
    config.check()
    captions = read_prompts(path or prompts_of_run(config.lora))
    captions = (captions * -(-count // len(captions)))[:count]      # fewer captions than asked: more noises for each
    tuned = StepLora(config)
    scales = tuple(sorted({0., *scales}))                            # 0 is the teacher: always a choice
    found, curve = find_dial(tuned, captions, tuple(sorted(set(steps))), scales, goal_steps, config.seed + 1)
    keep_dial(tuned, found, curve, captions, goal_steps)
    for n, scale in zip(found.steps, found.scales):
        print(f"{n:4} steps: strength {scale:<5g}  distance {curve[n, scale]:.4f}  (teacher {curve[n, 0.]:.4f})")
    print(f"stored in {tuned.path}, dial.json and README.md beside it")
    return 0


def prompts_of_run(folder):
    """The captions file that the run was made with. ValueError when the folder does not name one."""
    told = Path(folder) / "config.json"
    path = read_settings(told).get("prompts") if told.is_file() else ""
    if not path:
        raise ValueError(f"{folder} does not name its captions: say --prompts FILE")
    return path


def sample(argv):
    """`scfm sample`: a flag for every field of UseConfig, the prompts, the steps, and where the picture goes."""
    from scfm.step_lora import StepLora, UseConfig, paint, save_pictures
    from scfm.teacher_data import read_prompts
    parser = argparse.ArgumentParser(
        prog="scfm sample", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Paints prompts in a few steps, by the stock pipeline with the LoRA at the strength of its dial.")
    add_options(parser, UseConfig)
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", default="", help="text file of captions instead")
    parser.add_argument("--steps", type=int, default=4, help="Euler steps, one network evaluation each")
    parser.add_argument("--scale", type=float, help="strength of the LoRA; what the dial says when not given, 0: the teacher")
    parser.add_argument("--out", default="picture.png", help="PNG file; several pictures become a grid")
    args = vars(parser.parse_args(argv))
    told, path, steps, scale, out = (args.pop(k) for k in ("prompt", "prompts", "steps", "scale", "out"))
    if bool(told) == bool(path):
        raise ValueError("say either --prompt TEXT (several times if you like) or --prompts FILE")
    if steps < 1:
        raise ValueError(f"--steps is {steps}: give 1 or more")
    config = UseConfig(**args)
    config.check()
    captions = told or read_prompts(path)
    pictures, scale = paint(StepLora(config), captions, steps, scale)
    save_pictures(pictures, out)
    print(f"{out}: {len(captions)} picture{'s' * (len(captions) > 1)}, {steps} step{'s' * (steps > 1)}, strength {scale:g}")
    return 0


def from_file(parser, argv):
    """The parser with the settings of --config as its defaults. Unknown settings raise ValueError."""
    path = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    path.add_argument("--config")
    path = path.parse_known_args(argv)[0].config
    if path:
        told = read_settings(path)
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(told) - known)
        if unknown:
            raise ValueError(f"{path} has settings that do not exist: {', '.join(unknown)} (see --help)")
        parser.set_defaults(**told)
    return parser


def read_settings(path):
    """A JSON object of settings, lists as tuples. FileNotFoundError or ValueError when it cannot be read."""
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}


def add_options(parser, settings):
    """A flag for each field of a dataclass; its help sentence and default come from the field."""
    for f in fields(settings):
        default, help = f.default, f.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            kind = numbers(type(default[0])) if isinstance(default, tuple) else type(default)
            parser.add_argument(f"--{f.name}", type=kind, default=default, help=help, metavar=f.name.upper())


def numbers(kind):
    """A parser of lists such as 3,4 or 2.5,4.5."""
    def parse(text):
        return tuple(kind(part) for part in text.split(","))
    parse.__name__ = f"list of {kind.__name__}"
    return parse


if __name__ == "__main__":
    sys.exit(main())
