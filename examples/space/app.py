"""A page to look at a base and its adapters: sample classes, teach one, go from one to another, add and remove classes.

    python examples/space/app.py --base outputs/digits/base --adapters outputs/digits/adapters --server_port 7860

Without arguments it opens outputs/digits, if that is there. Needs Gradio: the extra `space`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from studio import MOST_NAME_CHARACTERS, Picture, Studio, title
from teaching import draw_hearts

from funlora_hf.sampling.solvers import SOLVERS


try:
    import gradio as gr
except ImportError as error:
    sys.exit(f"error: {error}: the page needs the extra `space`: pip install 'funlora-hf[space]'.")


logger = logging.getLogger("funlora_space")
DEFAULT_RUN = Path("outputs/digits")
SHOWN_AT_FIRST = 10
SETTINGS = {"steps": 10, "solver": "heun", "seed": 0}
IMAGES = 8
TRAIN_STEPS = 150
MESSAGE_LENGTH = 600
# Users whose classes are kept.
MOST_SESSIONS = 100
# Files older than this, in seconds, are deleted, as often.
FILE_SECONDS = 3600
CSS = """
.picture .image-frame { padding-top: 36px; }
.picture img { max-width: 100%; }
.message { overflow-wrap: anywhere; }
"""
# One computation at a time, whoever asks for it.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "pipeline"}


def build_page(
    studio: Studio, *, base: str = "", adapters: str = "", message: str = "", first: Picture | None = None
) -> gr.Blocks:
    """
    The page. Each user gets a session of the studio.

    Args:
        studio (`Studio`): what it shows, loaded or empty.
        base (`str`, *optional*): what the field for the base has in it at first.
        adapters (`str`, *optional*): the same for the adapters.
        message (`str`, *optional*): shown under these at first.
        first (`Picture`, *optional*): samples that are shown at first.
    """
    hearts = tempfile.TemporaryDirectory(prefix="funlora-hearts-")
    with gr.Blocks(title="FunLoRA", analytics_enabled=False, delete_cache=(FILE_SECONDS, FILE_SECONDS)) as page:
        session = gr.State()
        gr.Markdown(
            "# FunLoRA\nOne frozen base, one small adapter for every class added. Sample the classes, teach it one of your "
            "own, and go from one class to another."
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
                        1,
                        100,
                        SETTINGS["steps"],
                        step=1,
                        label="Steps",
                        info="dopri5 chooses its own",
                        elem_id="steps",
                    )
                    solver = gr.Dropdown(list(SOLVERS), value=SETTINGS["solver"], label="Solver", elem_id="solver")
                    seed = gr.Number(SETTINGS["seed"], label="Seed", precision=0, minimum=0, elem_id="seed")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Sample", elem_id="sample-tab"):
                    chosen = gr.Dropdown(
                        multiselect=True, label="Classes", info="One row of images for each", elem_id="classes"
                    )
                    images = gr.Slider(1, 16, IMAGES, step=1, label="Images of each class", elem_id="images")
                    sample_button = gr.Button("Sample", variant="primary", elem_id="sample")
                    image, facts = _shown(first)
                    sample_text = _message("sample-text", facts)
                    sample_picture = _picture("sample-picture", image)
                with gr.Tab("Teach", elem_id="teach-tab"):
                    files = gr.File(
                        file_count="multiple",
                        label="Images of a new class: five or more, alike in what matters",
                        height=180,
                        elem_id="files",
                    )
                    examples_button = gr.Button("No images at hand? Take twelve hearts", size="sm", elem_id="hearts")
                    with gr.Row():
                        new_name = gr.Textbox(
                            label="Name of the class", max_length=MOST_NAME_CHARACTERS, elem_id="name"
                        )
                        train_steps = gr.Slider(
                            10,
                            500,
                            TRAIN_STEPS,
                            step=10,
                            label="Training steps (ends after a minute)",
                            elem_id="train-steps",
                        )
                    teach_button = gr.Button("Teach", variant="primary", elem_id="teach")
                    teach_text = _message("teach-text")
                    teach_picture = _picture("teach-picture")
                    download = gr.DownloadButton(visible=False, elem_id="download")
                with gr.Tab("Interpolate", elem_id="interpolate-tab"):
                    with gr.Row():
                        start = gr.Dropdown(label="From", elem_id="first", min_width=120)
                        end = gr.Dropdown(label="To", elem_id="second", min_width=120)
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

        choices, selection, settings = (
            [overview, chosen, start, end, removable],
            [chosen, start, end],
            [steps, solver, seed],
        )
        for button, action, inputs, outputs in (
            (load_button, _load, [base_field, adapters_field], [*choices, sample_picture, sample_text, model_text]),
            (sample_button, _sample, [chosen, images, *settings], [sample_picture, sample_text]),
            (
                teach_button,
                _teach,
                [files, new_name, train_steps, seed, *selection],
                [*choices, teach_picture, download, teach_text],
            ),
            (interpolate_button, _interpolate, [start, end, way, *settings], [interpolate_picture, interpolate_text]),
            (add_button, _add, [source, subfolder, class_label, class_name, *selection], [*choices, add_text]),
            (remove_button, _remove, [removable, *selection], [*choices, remove_text]),
        ):
            pictures = [output for output in outputs if isinstance(output, gr.Image)]
            button.click(
                _with_message(action, len(outputs) - 1),
                [session, *inputs],
                outputs,
                show_progress_on=pictures or outputs[-1:],
                **ONE_AT_A_TIME,
            )
        files.change(_with_message(_preview, 1), [session, files], [teach_picture, teach_text])
        examples_button.click(lambda: (draw_hearts(Path(hearts.name)), "heart"), None, [files, new_name])

        def enter() -> tuple:
            own = studio.session()
            return own, *_choices(own)

        # Nobody waits for the computations of others to see the page.
        page.load(enter, None, [session, *choices], concurrency_limit=None)
    return page


def _load(studio: Studio, base: str, adapters: str) -> tuple:
    studio.load(base, adapters)
    return *_choices(studio), *_shown(first_picture(studio)), f"Loaded {len(studio.classes)} classes."


def _sample(studio: Studio, chosen: list | None, images: int, steps: int, solver: str, seed: int | None) -> tuple:
    return _shown(studio.sample(chosen or [], images=images, steps=steps, solver=solver, seed=seed or 0))


def _preview(studio: Studio, files: list[str] | None) -> tuple:
    return (studio.preview(files), "") if files else (None, "")


def _teach(
    studio: Studio,
    files: list[str] | None,
    name: str,
    steps: int,
    seed: int | None,
    chosen: list | None,
    start: int | None,
    end: int | None,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it here
) -> tuple:
    def show(step: int) -> None:
        progress((step, steps), desc="Learning", unit="steps")

    taught = studio.teach(files or [], name, steps=steps, seed=seed or 0, on_step=show)
    label = taught.class_label
    done = (
        f"{taught.steps} steps"
        if taught.steps == steps
        else f"{taught.steps} of {steps} steps, since the minute was over"
    )
    text = (
        f"Learned class {title(label, studio.classes)} in {taught.seconds:.1f} seconds: {taught.numbers:,} numbers, {done}. "
        "The base and the other classes are as they were. Sample it, go to it from another class, or download it, unpack it, "
        "and use it on the same base:\n```python\nfrom funlora_hf import FunLoraPipeline\n\n"
        f"pipe = FunLoraPipeline.from_pretrained({studio.base!r})\npipe.load_adapter({taught.archive.stem!r})\n"
        f"images = pipe(class_labels=[{label}] * 8).images\n```"
    )
    kept = _choices(studio, [*(chosen or []), label], start, label)
    button = gr.DownloadButton(f"Download {taught.archive.name}", os.fspath(taught.archive), visible=True)
    return *kept, taught.picture, button, text


def _interpolate(
    studio: Studio, start: int | None, end: int | None, images: int, steps: int, solver: str, seed: int | None
) -> tuple:
    return _shown(studio.interpolate(start, end, images=images, steps=steps, solver=solver, seed=seed or 0))


def _add(
    studio: Studio,
    source: str,
    subfolder: str,
    label: str,
    name: str,
    chosen: list | None,
    start: int | None,
    end: int | None,
) -> tuple:
    added = studio.add_class(source, subfolder=subfolder, class_label=_class_id(label), class_name=name)
    kept = _choices(studio, [*(chosen or []), added], start, end)
    return *kept, f"Added class {title(added, studio.classes)}."


def _remove(studio: Studio, label: int | None, chosen: list | None, start: int | None, end: int | None) -> tuple:
    name = studio.remove_class(label)
    return *_choices(studio, chosen, start, end), f"Removed class {title(label, {label: name})}."


def first_picture(studio: Studio) -> Picture | None:
    """What the page shows before anybody has asked for anything; None where there is no class."""
    classes = list(studio.classes)[:SHOWN_AT_FIRST]
    return studio.sample(classes, images=IMAGES, **SETTINGS) if classes else None


def _picture(elem_id: str, image: Any = None) -> gr.Image:
    return gr.Image(
        image,
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


def _shown(picture: Picture | None) -> tuple[Any, str]:
    """A picture, and what to say of it."""
    if picture is None:
        return None, ""
    facts = f"{picture.images} images in {picture.seconds:.2f} seconds, {picture.nfe} evaluations of the U-Net."
    return picture.image, facts


def _choices(
    studio: Studio, chosen: list[int] | None = None, first: int | None = None, second: int | None = None
) -> tuple[Any, ...]:
    """The overview, and the fields to choose classes in, with what was chosen as far as it is still there."""
    classes, added = studio.classes, studio.added_classes
    every = [(title(class_id, classes), class_id) for class_id in classes]
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
        gr.Dropdown(choices=[(title(label, added), label) for label in added], value=next(reversed(added), None)),
    )


def _with_message(action: Callable[..., tuple], unchanged: int) -> Callable[..., tuple]:
    """An error of any kind becomes the last output, a text; the page stays as it is."""

    @wraps(action)
    def run(studio: Studio | None, *inputs: Any) -> tuple:
        try:
            if studio is None:
                raise ValueError("This session is over, or has not begun: reload the page.")
            return action(studio, *inputs)
        except Exception as error:
            logger.warning("%s failed", action.__name__, exc_info=True)
            return *[gr.skip()] * unchanged, error_text(error)

    return run


def error_text(error: Exception) -> str:
    """What the page says of an error, short enough to be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"**Error:** {text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + '…'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    studio, message, first = Studio(), "", None
    if arguments.base:
        try:
            studio.load(arguments.base, arguments.adapters)
            first = first_picture(studio)
        except Exception as error:
            logger.warning("loading failed", exc_info=True)
            message = error_text(error)
    page = build_page(studio, base=arguments.base, adapters=arguments.adapters, message=message, first=first)
    page.queue(default_concurrency_limit=1, max_size=MOST_SESSIONS).launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=False,
        max_file_size="10mb",
        state_session_capacity=MOST_SESSIONS,
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        # The system's own fonts: the page fetches nothing from elsewhere.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
