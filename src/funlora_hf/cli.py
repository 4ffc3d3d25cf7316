"""The command `funlora`: looks at, samples, shares and checks what runs have made. Results go to stdout, everything else to stderr.

Exit codes: 0, done, and for `verify` everything is sound; 1, an error, said on stderr after `error: `, or for `verify` something
that is not sound; 2, an argument that is not known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TextIO

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError

from .adapters.base_model import PIPELINE
from .adapters.class_folder import ADAPTERS_FOLDER, adapter_class
from .evaluation.figures import image_grid
from .hub.delete import delete_class
from .hub.describe import AdapterDescription, BankDescription, BaseDescription, describe
from .hub.find import find_contents
from .hub.pull import pull
from .hub.push import push_all
from .hub.verify import verify
from .sampling.drawing import draw_samples, to_uint8
from .sampling.pipeline import FunLoraPipeline
from .sampling.solvers import SOLVERS


EXIT_CODES = (
    "exit codes: 0 done (verify: everything is sound); 1 an error, said on stderr (verify: or something that is not sound); "
    "2 an argument that is not known"
)
# Of whatever HTTP client `huggingface_hub` has, requests or httpx: what it raises where no answer comes.
_NO_ANSWER = HfHubHTTPError.__bases__[0]
# Images of one class that are sampled at once.
_BATCH = 64
# Longer errors, such as those with a page of HTML, are cut off.
_ERROR_LINES = 4
_HELP_SOURCE = "folder of a run or a pipeline, of adapters class_<id> or of one adapter; a bank's file; or a repository on the Hub"


@dataclass(frozen=True)
class Command:
    """
    A subcommand.

    Args:
        name: of it.
        help: one line.
        add_arguments: to its parser.
        run: from its arguments to the exit code.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        arguments (sequence of `str`, *optional*): None: those of the process.

    Returns:
        `int`: the exit code.

    Raises:
        SystemExit: with 2 for arguments that are not known, with 0 after `--help`.
    """
    given = _parser().parse_args(arguments)
    try:
        with _progress_only_on_a_terminal():
            return given.run(given)
    except (HfHubHTTPError, _NO_ANSWER, SafetensorError, ValueError, OSError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        for line in [f"error: {lines[0]}", *lines[1:_ERROR_LINES]]:
            _say(line, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="funlora",
        description="Looks at, samples, shares and checks bases, FunLoRA adapters and banks of them.",
        epilog=EXIT_CODES,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=f"{command.help}.", epilog=EXIT_CODES
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    _add_json(parser)


def _info(given: argparse.Namespace) -> int:
    found = describe(**_source(given))
    if given.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    if found.base is not None:
        _say(_base_line(found.base))
    for adapter in found.adapters:
        _say(_adapter_line(adapter))
    for bank in found.banks:
        _say(_bank_line(bank))
    return 0


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--base", help="run, pipeline or U-Net to hold adapters against (default: the base in SOURCE)")
    _add_json(parser)


def _verify(given: argparse.Namespace) -> int:
    verdicts = verify(**_source(given), base=given.base)
    ok = all(verdict.ok for verdict in verdicts)
    if given.json:
        print(json.dumps({"ok": ok, "verdicts": [asdict(verdict) for verdict in verdicts]}, indent=2))
    else:
        for verdict in verdicts:
            _say(str(verdict))
    return 0 if ok else 1


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="run, pipeline or repository; brings its adapters")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="SOURCE", help=f"more classes: {_HELP_SOURCE}")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="ids or names, a row for each (default: all)")
    parser.add_argument("--num_images", type=_at_least_one, default=4, help="of each class (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=_at_least_one, default=10, help="(default: %(default)s)")
    parser.add_argument("--solver", choices=SOLVERS, default="heun", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal images (default: %(default)s)")
    parser.add_argument("--output", default="samples.png", help="PNG to write (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: %(default)s)")


def _sample(given: argparse.Namespace) -> int:
    device = _device(given.device)
    pipe = _load(given.base, given.adapters)
    class_ids = list(pipe.classes) if given.classes is None else [_class_id(pipe, text) for text in given.classes]
    pipe.to(device)
    pipe.set_progress_bar_config(disable=None)  # None: only on a terminal
    images = [
        draw_samples(
            pipe,
            class_id,
            given.num_images,
            purpose="funlora sample",
            seed=given.seed,
            batch_size=_BATCH,
            solver=given.solver,
            num_inference_steps=given.num_inference_steps,
            tolerance=1e-5,
        ).images
        for class_id in class_ids
    ]
    image_grid(to_uint8(torch.cat(images)), given.output, columns=given.num_images)
    for row, class_id in enumerate(class_ids, start=1):
        _say(f"row {row}: {_class_text(class_id, pipe.classes[class_id])}")
    _say(given.output)
    return 0


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder of a run")
    parser.add_argument("repo_id", metavar="REPO_ID", help='"user/repo", made if it is not there')
    parser.add_argument("--base_model", metavar="REPO", help="repository of the base, if it is another one")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="identifier of a licence, for the cards")


def _push(given: argparse.Namespace) -> int:
    commits = push_all(
        given.output_dir,
        given.repo_id,
        base_model=given.base_model,
        private=given.private or None,
        license=given.license,
    )
    for commit in commits:
        _say(commit.commit_url)
    if not commits:
        _say(f"{given.repo_id} has all of it already: no commit was made.")
    return 0


def _add_delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("class_label", type=int, metavar="ID", help="id of the class")
    parser.add_argument("--output_dir", help="folder of a run or of a saved pipeline that it is deleted from")
    parser.add_argument("--repo_id", help="repository that it is deleted from")
    parser.add_argument(
        "--history",
        choices=("keep", "squash"),
        default="keep",
        help="whether earlier commits of the repository keep it (default: %(default)s)",
    )


def _delete(given: argparse.Namespace) -> int:
    places = {"output_dir": given.output_dir, "repo_id": given.repo_id}
    for place in delete_class(given.class_label, **places, history=given.history):
        _say(f"deleted class {given.class_label} from {places[place]}")
    return 0


def _add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="repository with folders class_<id>, or with one adapter")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="gets adapters/class_<id>/, and base/ --with_base")
    parser.add_argument(
        "--classes", nargs="+", type=int, metavar="ID", help="ids of the classes wanted (default: all)"
    )
    parser.add_argument("--with_base", action="store_true", help="take the base, too")
    parser.add_argument("--overwrite", action="store_true", help="replace folders that have other content")
    _add_hub(parser)


def _pull(given: argparse.Namespace) -> int:
    written = pull(
        given.source,
        given.output_dir,
        classes=given.classes,
        with_base=given.with_base,
        overwrite=given.overwrite,
        revision=given.revision,
        local_files_only=given.local_files_only,
    )
    for folder in written:
        _say(str(folder))
    if not written:
        _say(f"{given.output_dir} has all of it already: nothing was written.")
    return 0


COMMANDS = (
    Command("info", "Say what lies in a folder, a file or a repository", _add_info_arguments, _info),
    Command("sample", "Draw images of classes, a row for each, into a PNG", _add_sample_arguments, _sample),
    Command("push", "Push a run to the Hub: its base and a folder for each class", _add_push_arguments, _push),
    Command("pull", "Fetch classes from the Hub into the folder of a run", _add_pull_arguments, _pull),
    Command("delete", "Delete a class from a folder and from a repository", _add_delete_arguments, _delete),
    Command("verify", "Check files, numbers and fingerprints, a line for each thing", _add_verify_arguments, _verify),
)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_HELP_SOURCE)
    parser.add_argument("--subfolder", help="where in SOURCE")
    _add_hub(parser)


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--local_files_only", action="store_true", help="take a repository from the cache")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _source(given: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(given, name) for name in ("source", "subfolder", "revision", "local_files_only")}


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` is {name!r}, which cannot be used here: {error}") from error


def _load(base: str, adapters: Sequence[str]) -> FunLoraPipeline:
    """A pipeline with the adapters that lie beside its base, and more of them."""
    found = find_contents(base)
    if found.base is None or not (found.base / PIPELINE).is_file():
        raise FileNotFoundError(f"{base!r} holds no pipeline ({PIPELINE}), expected a run or a pipeline.")
    pipe = FunLoraPipeline.from_pretrained(found.base)
    more = [find_contents(source, with_base=False) for source in adapters]
    for contents in (found, *more):
        for folder in contents.adapters:
            # Those the pipeline has loaded by itself.
            if folder.parent != found.base / ADAPTERS_FOLDER:
                pipe.load_adapter(folder, **adapter_class(folder))
        for file in contents.banks:
            pipe.load_adapter_bank(file)
    return pipe


def _class_id(pipe: FunLoraPipeline, text: str) -> int:
    """The class that a word means: an id, if there is one like it, else a name."""
    ids = {str(class_id): class_id for class_id in pipe.classes}
    names = {name: class_id for class_id, name in pipe.classes.items()}
    if text in ids or text in names:
        return ids.get(text, names.get(text))
    known = ", ".join(_class_text(class_id, name) for class_id, name in pipe.classes.items())
    raise ValueError(f"`--classes` has {text!r}, expected ids or names of: {known}.")


def _class_text(class_id: int, name: str | None) -> str:
    return str(class_id) if name in (None, str(class_id)) else f"{class_id} ({name})"


def _base_line(base: BaseDescription) -> str:
    classes = ", ".join(_class_text(class_id, name) for class_id, name in base.classes.items()) or "none"
    return f"base {base.name}: {base.parameters:,} parameters, fingerprint {base.fingerprint}, classes {classes}"


def _adapter_line(adapter: AdapterDescription) -> str:
    label = "unknown" if adapter.class_label is None else _class_text(adapter.class_label, adapter.class_name)
    parts = [f"class {label}", _method(adapter), f"{adapter.parameters:,} parameters", f"{adapter.num_bytes:,} bytes"]
    return f"adapter {adapter.name}: " + ", ".join([*parts, _on_base(adapter)])


def _bank_line(bank: BankDescription) -> str:
    classes = ", ".join(_class_text(class_id, name) for class_id, name in bank.classes.items()) or "none"
    parts = [_method(bank), f"{bank.parameters_per_class:,} parameters per class", f"{bank.num_bytes:,} bytes"]
    return f"bank {bank.name}: " + ", ".join([*parts, _on_base(bank), f"classes {classes}"])


def _method(adapter: AdapterDescription | BankDescription) -> str:
    return " ".join(part for part in (adapter.method, adapter.function, adapter.operation) if part)


def _on_base(adapter: AdapterDescription | BankDescription) -> str:
    matches = {True: "matches", False: "DOES NOT MATCH", None: "not checked"}[adapter.base_matches]
    return f"base {adapter.base_model or 'not named'} ({matches})"


def _say(line: str, *, file: TextIO | None = None) -> None:
    """Print a line that may have names of others in it, which could move the cursor or fake lines of their own."""
    file = sys.stdout if file is None else file
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    encoding = file.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), file=file)


@contextmanager
def _progress_only_on_a_terminal() -> Iterator[None]:
    """No progress bars of the libraries where stderr is a file; as it was before, afterwards."""
    with ExitStack() as after:
        if not sys.stderr.isatty():
            if not are_progress_bars_disabled():
                disable_progress_bars()
                after.callback(enable_progress_bars)
            if diffusers_logging.is_progress_bar_enabled():
                diffusers_logging.disable_progress_bar()
                after.callback(diffusers_logging.enable_progress_bar)
        yield


if __name__ == "__main__":
    sys.exit(main())
