"""The page of `scfm app`: one prompt by student and teacher side by side, in a browser on this machine.

Nothing leaves the machine and nothing is fetched: images travel inside the page, scripts are Gradio's own
files, fonts the system's, and of Gradio's server only what the page calls is answered.
"""

import base64
import html
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scfm.data.animation import FPS, frames_of
from scfm.evaluation.compare import MOST_STEPS, SEEDS, Choice, Comparer, Sampled, pixel_distance
from scfm.evaluation.latency import device_name
from scfm.inference.step_lora import describe_origin, format_scales

RULE, FREE = "the LoRA's rule", "free"
LARGEST_SCALE, LARGEST_SHIFT = 2.0, 12.0
SMALL = 160  # pixels: images up to this size are shown with sharp ones
UNSEEN: Any = {"show_progress": "hidden", "api_visibility": "private"}  # no overlay, no entry in an API
ROLES = ("student", "teacher", "target")
STYLE = (Path(__file__).with_name("app.css")).read_text(encoding="utf-8")
POLICY = (  # of what the browser may load: what this server sends
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; frame-ancestors 'self'"
)
SERVED = ("assets/", "static/", "gradio_api/heartbeat/", "gradio_api/queue/")
SERVED_EXACTLY = {
    "",
    "config",
    "theme.css",
    "favicon.ico",
    "manifest.json",
    *(f"gradio_api/{name}" for name in ("info", "startup-events", "theme.css", "cancel", "reset", "app_id")),
}


class Start(NamedTuple):
    """What the page shows first. captions: that it offers; the first one stands in the field."""

    captions: Sequence[str] = ()
    steps: int = 2
    seed: int = 0


class OnlyThePage:
    """Answers what the page calls and nothing else of Gradio's server: no files, uploads or proxies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        path = scope.get("path", "").strip("/")
        if scope["type"] == "http" and not (path in SERVED_EXACTLY or path.startswith(SERVED)):
            await PlainTextResponse("not a part of this page", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


def serve(page: gr.Blocks, host: str, port: int, open_browser: bool = False, block: bool = True) -> str:
    """Serves the page until the process is interrupted; the address at once with block=False.

    port: 0 for the first free one from 7860 on. OSError when it is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at each call that would report
    _, url, _ = page.launch(
        server_name=host,
        server_port=port or None,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        css=STYLE,
        theme=theme(),
        app_kwargs={"middleware": [Middleware(OnlyThePage)]},
    )
    if block:
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return url


def theme() -> gr.themes.Base:
    """Fonts of the system: none is fetched."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=sans, font_mono=mono)


def build_page(comparer: Comparer, start: Start) -> gr.Blocks:
    """The page, not yet served. Every control samples again: one image at a time, the student's first."""
    with gr.Blocks(title="scfm", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(comparer), elem_id="heading", padding=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=280):
                knobs, another = build_knobs(comparer, start)
            with gr.Column(scale=5, min_width=320):
                cards = gr.HTML(show_cards(comparer, {}), elem_id="cards", padding=False)
                offered = gr.Dataset(
                    components=[knobs["prompt"]],
                    samples=[[caption] for caption in start.captions],
                    label="Captions to try",
                    visible=bool(start.captions),
                    elem_id="captions",
                    samples_per_page=24,
                )

        def sample(*values: Any) -> Iterator[tuple[str, Any]]:
            yield from sample_cards(comparer, *values)

        sampling: Any = {
            "fn": sample,
            "inputs": list(knobs.values()),
            "outputs": [cards, knobs["scale"]],
            "concurrency_limit": 1,
            "concurrency_id": "network",  # one for all events: images are made one after the other
            "trigger_mode": "always_last",
            **UNSEEN,
        }
        moved = [knobs[name].input for name in ("steps", "mode", "scale", "shift")]
        gr.on([page.load, knobs["prompt"].submit, knobs["seed"].submit, *moved], **sampling)
        drawn = another.click(None, None, knobs["seed"], js=f"() => Math.floor(Math.random() * {SEEDS})")
        taken = offered.click(lambda row: row[0], offered, knobs["prompt"], **UNSEEN)
        for event in (drawn, taken):
            event.then(**sampling)
    page.queue(default_concurrency_limit=1, max_size=32)
    return page


def build_knobs(comparer: Comparer, start: Start) -> tuple[dict[str, Any], gr.Button]:
    """The inputs of `sample_cards` by name, in its order, and the button that draws a seed."""
    step_lora = comparer.step_lora
    first = start.captions[0] if start.captions else ""
    prompt = gr.Textbox(first, label="Prompt", info="Enter samples it", max_lines=4, elem_id="prompt")
    with gr.Group():
        steps = gr.Slider(1, MOST_STEPS, start.steps, step=1, label="Steps", elem_id="steps")
        mode = gr.Radio([RULE, FREE], value=RULE, label="LoRA scale", elem_id="mode")
        rule = round(step_lora.scales_for(start.steps)[0], 3)
        scale = gr.Slider(
            0, LARGEST_SCALE, rule, step=0.001, show_label=False, interactive=False, elem_id="scale"
        )
        shift = gr.Slider(
            0.25, LARGEST_SHIFT, step_lora.config.inference_shift, step=0.05, label="Shift", elem_id="shift"
        )
    with gr.Group():
        seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=SEEDS - 1, elem_id="seed")
        another = gr.Button("Another noise", elem_id="another", size="sm")
    knobs = {"prompt": prompt, "steps": steps, "mode": mode, "scale": scale, "shift": shift, "seed": seed}
    return knobs, another


def sample_cards(
    comparer: Comparer, prompt: str, steps: float, mode: str, scale: float, shift: float, seed: float
) -> Iterator[tuple[str, Any]]:
    """The cards after each image, and the scale's slider, which shows the rule's where that is followed."""
    try:
        by_rule = mode == RULE
        choice = Choice(
            prompt or "", int(steps), None if by_rule else float(scale), float(shift), int(seed or 0)
        )
        choice.check()
    except (ValueError, TypeError) as error:
        yield show_cards(comparer, {}, mistake=str(error)), gr.skip()
        return
    first = comparer.step_lora.scales_for(choice.steps)[0]
    slider = gr.update(value=round(first, 3), interactive=False) if by_rule else gr.update(interactive=True)
    made: dict[str, Sampled] = {}
    for role in ROLES:
        made[role] = getattr(comparer, role)(choice)
        yield show_cards(comparer, made, choice), slider


def heading(comparer: Comparer) -> str:
    """The head of the page: what it compares, and where it runs."""
    step_lora = comparer.step_lora
    names = [
        Path(p).name or p for p in (step_lora.config.lora, step_lora.config.pretrained_model_name_or_path)
    ]
    lora, base = (html.escape(name) for name in names)
    return (
        "<h1>Student and teacher from the same noise</h1>"
        f"<p>One prompt, one noise. The student is <b>{base}</b> with the LoRA <b>{lora}</b>, the teacher "
        "the same network at LoRA scale 0. Everything is computed on this machine "
        f"({html.escape(device_name(step_lora.pipe.device))}).</p>"
    )


def show_cards(
    comparer: Comparer, made: dict[str, Sampled], choice: Choice | None = None, mistake: str = ""
) -> str:
    """The three images with what each cost; those still to be made are blank, as all are beside a mistake."""
    if choice is None:
        titles = {role: "" for role in ROLES}
    else:
        few = steps_text(choice.steps)
        titles = {"student": few, "teacher": few, "target": steps_text(comparer.teacher_steps)}
    cards = "".join(card(role, titles[role], made, choice) for role in ROLES)
    note = scale_note(comparer, choice) if choice else html.escape(mistake[:1].upper() + mistake[1:])
    kind = "note mistake" if mistake else "note"
    return f'<div class="cards">{cards}</div><p class="{kind}">{note}</p>'


def card(role: str, title: str, made: dict[str, Sampled], choice: Choice | None) -> str:
    """One image with its costs, as HTML."""
    name = "Student" if role == "student" else "Teacher"
    sampled, prompt = made.get(role), html.escape(choice.prompt if choice else "", quote=True)
    if sampled is None:
        busy = " busy" * (choice is not None)
        body = f'<div class="blank{busy}"></div><dl><dt>{"sampling" * bool(busy)}</dt><dd></dd></dl>'
    else:
        small = " small" if max(sampled.image.shape[-2:]) <= SMALL else ""
        kind, data = file_of(sampled.image)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        rows = {"seconds": f"{sampled.seconds:.2f}", "evaluations": str(sampled.evaluations)}
        if role != "target":
            target = made.get("target")
            rows["distance"] = f"{pixel_distance(sampled.image, target.image):.3f}" if target else "…"
        cells = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
        body = f'<img class="{small.strip()}" src="{source}" alt="{prompt}"><dl>{cells}</dl>'
    return f'<figure class="{role}"><figcaption><b>{name}</b> {title}</figcaption>{body}</figure>'


def scale_note(comparer: Comparer, choice: Choice) -> str:
    """Which LoRA scale the student has and where it comes from, and what the distance is."""
    step_lora = comparer.step_lora
    if choice.scale is None:
        scales = format_scales(step_lora.scales_for(choice.steps))
        origin = describe_origin(step_lora.lora_scales, choice.steps)
    else:
        scales, origin = f"{choice.scale:.3g}", "as given"
    return (
        f"LoRA scale {scales} ({html.escape(origin)}). Distance: root mean square of the pixels' differences "
        f"from the teacher's in {steps_text(comparer.teacher_steps)}, 1 is black against white."
    )


def steps_text(steps: int) -> str:
    """ "1 step", "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def file_of(image: torch.Tensor) -> tuple[str, bytes]:
    """("png", an image (3, H, W) in [-1, 1] as such a file), or ("webp", a video (F, 3, H, W) as one)."""
    first, *more = frames_of(image.clamp(-1, 1))
    if more:
        moving: dict[str, Any] = {"save_all": True, "append_images": more, "loop": 0}
        first.save(file := io.BytesIO(), "webp", duration=1000 // FPS, quality=90, **moving)
        return "webp", file.getvalue()
    first.save(file := io.BytesIO(), "png")
    return "png", file.getvalue()
