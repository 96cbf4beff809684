"""`scfm app`: student and teacher side by side, on a page in the browser."""

import errno
import socket
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path

from scfm.commands.options import add_options, caption_word, make_parser
from scfm.data.prompts import read_prompts
from scfm.evaluation.compare import MOST_STEPS, TEACHER_STEPS, Comparer
from scfm.inference.config import InferenceConfig, run_captions
from scfm.inference.step_lora import StepLora

CARRIED = Path(__file__).parents[2] / "toy/weights/emoji_lora"  # in a checkout, not in an installed copy
CAPTIONS = (  # for the carried emoji
    "a cat with tears of joy, fluent style",
    "a red apple",
    "waving hand, dark skin tone",
    "grinning face with big eyes",
    "woman astronaut, medium skin tone, fluent style",
    "pizza, noto style",
    "a lighthouse, noto style",
    "camel, fluent style",
    "a red heart",
    "bicycle",
)
OFFERED = 12  # captions on the page


def main(argv: Sequence[str]) -> int:
    """`scfm app`: loads the pipeline, then serves the page until it is interrupted."""
    args = app_parser().parse_args(argv)
    require_gradio()
    check_numbers(args.steps, args.teacher_steps)
    check_address(args.host, args.port)
    config = InferenceConfig(**{f.name: getattr(args, f.name) for f in fields(InferenceConfig)})
    carried = not config.lora
    if carried:
        config.lora = str(carried_lora())
    config = config.resolved()
    config.check()
    captions = args.prompt or offered_captions(args.prompts, config.lora, carried)
    app = import_module("scfm.app")
    comparer = Comparer(StepLora(config), args.teacher_steps)
    page = app.build_page(comparer, app.Start(captions, args.steps, config.seed))
    app.serve(page, args.host, args.port, args.open_browser)
    return 0


def app_parser() -> ArgumentParser:
    """The flags of `scfm app`."""
    parser = make_parser(
        "scfm app",
        "A page for your browser: a prompt, and beside each other from the same noise the student in a few "
        "steps, the teacher in as many, and the teacher in 32, with the seconds and the network evaluations "
        "of each. Steps, LoRA scale, shift and seed can be turned. Go from 4 steps down to 1, and see which "
        "of both falls apart first; then set the LoRA scale free and move it: 0 is the teacher. Without "
        "--lora it shows the emoji that the repository carries. The page is seen on this machine alone "
        "(--host), fetches nothing from elsewhere and reports nothing. Needs Gradio: pip install "
        "'scfm[app]'.",
        "scfm app\nscfm app --lora runs/mine --prompts held_out.txt --port 8000 --open_browser",
    )
    add_options(parser, InferenceConfig)
    parser.add_argument(
        "--prompt",
        type=caption_word,
        action="append",
        default=[],
        help="a caption that the page offers; may be given several times",
    )
    parser.add_argument(
        "--prompts",
        type=expanduser,
        default="",
        help=f"text file of captions, of which the page offers {OFFERED}; empty: those of the run",
    )
    parser.add_argument("--steps", type=int, default=2, help=f"that the page begins with, up to {MOST_STEPS}")
    parser.add_argument(
        "--teacher_steps",
        type=int,
        default=TEACHER_STEPS,
        help="of the teacher's image that both are held to",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="where the page can be seen from; 0.0.0.0: from other machines too",
    )
    parser.add_argument("--port", type=int, default=0, help="of the page; 0: the first free one from 7860 on")
    parser.add_argument(
        "--open_browser", action=BooleanOptionalAction, default=False, help="open the page in the browser"
    )
    return parser


def require_gradio() -> None:
    """ValueError where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio, which is not installed: pip install 'scfm[app]'")


def carried_lora() -> Path:
    """The emoji LoRAs of a checkout. ValueError where there are none."""
    if not CARRIED.is_dir():
        raise ValueError("say --lora FOLDER, of a run; only a checkout of the repository carries one to show")
    return CARRIED


def check_numbers(steps: int, teacher_steps: int) -> None:
    """ValueError for numbers that make no page."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"--steps is {steps}: give 1 to {MOST_STEPS}")
    if not 1 <= teacher_steps <= 1000:
        raise ValueError(f"--teacher_steps is {teacher_steps}: give 1 to 1000")


def check_address(host: str, port: int) -> None:
    """ValueError where no page can be served."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}: give 1 to 65535, or 0 for a free one")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is taken: give another one, or 0 for a free one") from None
        raise ValueError(f"--host {host} with --port {port} cannot be served ({error.strerror})") from None


def offered_captions(prompts: str, lora: str, carried: bool) -> list[str]:
    """The captions that the page offers: of a file, of the carried emoji, or of the run if it has them."""
    if prompts:
        return read_prompts(prompts)[:OFFERED]
    if carried:
        return list(CAPTIONS)
    try:
        return run_captions(lora)[:OFFERED]
    except (ValueError, OSError):  # the run names none, or they have been moved: the field begins empty
        return []
