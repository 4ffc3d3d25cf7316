"""A page to look at a base and its adapters: sample classes, go from one to another, add and remove classes.

    python examples/space/app.py --base outputs/digits/base --adapters outputs/digits/adapters --server_port 7860

Without arguments it opens outputs/digits, if that is there. Needs Gradio: the extra `space`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from studio import Picture, Studio

from funlora_hf.sampling.solvers import SOLVERS


try:
    import gradio as gr
except ImportError as error:
    sys.exit(f"error: {error}: the page needs the extra `space`: pip install 'funlora-hf[space]'.")


logger = logging.getLogger("funlora_space")
DEFAULT_RUN = Path("outputs/digits")
SHOWN_AT_FIRST = 10
MESSAGE_LENGTH = 600
CSS = """
.picture .image-frame { padding-top: 36px; }
.picture img { image-rendering: pixelated; max-width: 100%; }
.message { overflow-wrap: anywhere; }
"""
# Every action touches the one pipeline, so one at a time.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "pipeline"}


def build_page(studio: Studio, *, base: str = "", adapters: str = "", message: str = "") -> gr.Blocks:
    """
    The page.

    Args:
        studio (`Studio`): what it shows, loaded or empty.
        base (`str`, *optional*): what the field for the base has in it at first.
        adapters (`str`, *optional*): the same for the adapters.
        message (`str`, *optional*): shown under these at first.
    """
    with gr.Blocks(title="FunLoRA", analytics_enabled=False) as page:
        gr.Markdown(
            "# FunLoRA\nOne frozen base, one small adapter for every class added. Sample any of them, go from one "
            "class to another, and add classes while the page runs."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Accordion("Model", open=not studio.classes):
                    base_field = gr.Textbox(
                        base,
                        label="Base",
                        info="Folder of a run or a pipeline, or a repository on the Hub",
                        elem_id="base",
                    )
                    adapters_field = gr.Textbox(
                        adapters,
                        label="Adapters (optional)",
                        info="Folder or repository with class_<id> folders; a run's own are found",
                        elem_id="adapters",
                    )
                    load_button = gr.Button("Load", variant="primary", elem_id="load")
                    model_text = _message("model-text", message)
                overview = gr.Markdown(elem_id="overview")
                with gr.Group():
                    steps = gr.Slider(
                        1, 100, 10, step=1, label="Steps", info="dopri5 chooses its own", elem_id="steps"
                    )
                    solver = gr.Dropdown(list(SOLVERS), value="heun", label="Solver", elem_id="solver")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Sample", elem_id="sample-tab"):
                    chosen = gr.Dropdown(
                        multiselect=True, label="Classes", info="One row of images for each", elem_id="classes"
                    )
                    images = gr.Slider(1, 16, 8, step=1, label="Images of each class", elem_id="images")
                    sample_button = gr.Button("Sample", variant="primary", elem_id="sample")
                    sample_text = _message("sample-text")
                    sample_picture = _picture("sample-picture")
                with gr.Tab("Interpolate", elem_id="interpolate-tab"):
                    with gr.Row():
                        first = gr.Dropdown(label="From", elem_id="first", min_width=120)
                        second = gr.Dropdown(label="To", elem_id="second", min_width=120)
                    way = gr.Slider(
                        2, 16, 8, step=1, label="Images on the way", info="All from one noise", elem_id="way"
                    )
                    interpolate_button = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
                    interpolate_text = _message("interpolate-text")
                    interpolate_picture = _picture("interpolate-picture")
                with gr.Tab("Classes", elem_id="classes-tab"):
                    with gr.Row():
                        source = gr.Textbox(label="Adapter", info="Folder or repository on the Hub", elem_id="source")
                        subfolder = gr.Textbox(
                            label="Subfolder (optional)",
                            info="Where in it, such as adapters/class_7",
                            elem_id="subfolder",
                        )
                    with gr.Row():
                        class_label = gr.Textbox(
                            label="Class id (optional)", info="Empty: the adapter's own", elem_id="class-id"
                        )
                        class_name = gr.Textbox(
                            label="Class name (optional)", info="Empty: the adapter's own", elem_id="class-name"
                        )
                    add_button = gr.Button("Add class", variant="primary", elem_id="add")
                    add_text = _message("add-text")
                    removable = gr.Dropdown(label="Class added by an adapter", elem_id="removable")
                    remove_button = gr.Button("Remove class", variant="stop", elem_id="remove")
                    remove_text = _message("remove-text")

        choices = [overview, chosen, first, second, removable]

        def load(base: str, adapters: str) -> tuple:
            studio.load(base, adapters)
            return *_choices(studio), f"Loaded {len(studio.classes)} classes."

        def add(
            source: str,
            subfolder: str,
            label: str,
            name: str,
            chosen: list,
            first: int | None,
            second: int | None,
        ) -> tuple:
            added = studio.add_class(source, subfolder=subfolder, class_label=_class_id(label), class_name=name)
            kept = _choices(studio, [*(chosen or []), added], first, second)
            return *kept, f"Added class {_title(added, studio.classes)}."

        def remove(label: int | None, chosen: list, first: int | None, second: int | None) -> tuple:
            name = studio.remove_class(label)
            return *_choices(studio, chosen, first, second), f"Removed class {_title(label, {label: name})}."

        def sample(chosen: list, images: int, steps: int, solver: str, seed: int) -> tuple:
            picture = studio.sample(chosen or [], images=images, steps=steps, solver=solver, seed=seed or 0)
            return picture.image, _facts(picture)

        def interpolate(first: int, second: int, images: int, steps: int, solver: str, seed: int) -> tuple:
            picture = studio.interpolate(first, second, images=images, steps=steps, solver=solver, seed=seed or 0)
            return picture.image, _facts(picture)

        selection, settings = [chosen, first, second], [steps, solver, seed]
        for button, action, inputs, outputs in (
            (load_button, load, [base_field, adapters_field], [*choices, model_text]),
            (add_button, add, [source, subfolder, class_label, class_name, *selection], [*choices, add_text]),
            (remove_button, remove, [removable, *selection], [*choices, remove_text]),
            (sample_button, sample, [chosen, images, *settings], [sample_picture, sample_text]),
            (
                interpolate_button,
                interpolate,
                [first, second, way, *settings],
                [interpolate_picture, interpolate_text],
            ),
        ):
            button.click(_with_message(action, len(outputs) - 1), inputs, outputs, **ONE_AT_A_TIME)
        page.load(lambda: _choices(studio), None, choices, **ONE_AT_A_TIME)
    return page


def _picture(elem_id: str) -> gr.Image:
    return gr.Image(
        show_label=False,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes="picture",
    )


def _message(elem_id: str, text: str = "") -> gr.Markdown:
    return gr.Markdown(text, elem_id=elem_id, elem_classes="message")


def _class_id(text: str) -> int | None:
    text = text.strip()
    if text and not text.isdecimal():
        raise ValueError(f"`class id` is {text!r}, expected a whole number, or nothing for the adapter's own.")
    return int(text) if text else None


def _title(class_id: int, classes: Mapping[int, str]) -> str:
    name = classes[class_id]
    return name if name == str(class_id) else f"{class_id}: {name}"


def _facts(picture: Picture) -> str:
    return f"{picture.images} images in {picture.seconds:.2f} seconds, {picture.nfe} evaluations of the U-Net."


def _choices(
    studio: Studio, chosen: list[int] | None = None, first: int | None = None, second: int | None = None
) -> tuple[Any, ...]:
    """The overview, and the fields to choose classes in, with what was chosen as far as it is still there."""
    classes, added = studio.classes, studio.added_classes
    every = [(_title(class_id, classes), class_id) for class_id in classes]
    known = list(classes)
    chosen = known[:SHOWN_AT_FIRST] if chosen is None else [class_id for class_id in chosen if class_id in classes]
    first = first if first in classes else next(iter(known), None)
    second = second if second in classes else next(reversed(known), None)
    text = (
        f"{len(classes) - len(added)} classes of the base, {len(added)} of adapters." if classes else "No base loaded."
    )
    return (
        text,
        gr.Dropdown(choices=every, value=chosen),
        gr.Dropdown(choices=every, value=first),
        gr.Dropdown(choices=every, value=second),
        gr.Dropdown(choices=[(_title(label, added), label) for label in added], value=next(reversed(added), None)),
    )


def _with_message(action: Callable[..., tuple], unchanged: int) -> Callable[..., tuple]:
    """An error of any kind becomes the last output, a text; the page stays as it is."""

    @wraps(action)
    def run(*inputs: Any) -> tuple:
        try:
            return action(*inputs)
        except Exception as error:
            logger.warning("%s failed", action.__name__, exc_info=True)
            return *[gr.skip()] * unchanged, error_text(error)

    return run


def error_text(error: Exception) -> str:
    """What the page says of an error, short enough to be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"**Error:** {text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + '…'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = "folder or repository on the Hub; default: the environment's {}"
    base = os.environ.get("FUNLORA_BASE", "")
    adapters = os.environ.get("FUNLORA_ADAPTERS", "")
    parser.add_argument("--base", default=base, help=f"The base: {source.format('FUNLORA_BASE')}, or outputs/digits.")
    parser.add_argument("--adapters", default=adapters, help=f"Adapters: {source.format('FUNLORA_ADAPTERS')}.")
    parser.add_argument("--server_name", help="Address to listen on; default: Gradio's, which is 127.0.0.1.")
    parser.add_argument("--server_port", type=int, help="Port to listen on; default: the first free from 7860.")
    arguments = parser.parse_args()
    if not arguments.base and (DEFAULT_RUN / "base" / "model_index.json").is_file():
        arguments.base = os.fspath(DEFAULT_RUN)

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    studio, message = Studio(), ""
    if arguments.base:
        try:
            studio.load(arguments.base, arguments.adapters)
        except Exception as error:
            logger.warning("loading failed", exc_info=True)
            message = error_text(error)
    page = build_page(studio, base=arguments.base, adapters=arguments.adapters, message=message)
    page.queue(default_concurrency_limit=1).launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        # The system's own fonts: the page fetches nothing from elsewhere.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
