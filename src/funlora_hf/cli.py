"""The command `funlora`: train, and inspect, sample, share and check the results of runs.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError

from . import __version__
from .adapters.class_folder import ADAPTERS_FOLDER, adapter_class
from .adapters.untrusted_base import PIPELINE
from .continual.termination import Terminated, Termination
from .hub.classes_json import known_contents
from .hub.concept_folders import ConceptsError, concept_folders
from .hub.delete import delete_class
from .hub.describe import AdapterDescription, BankDescription, Description, describe
from .hub.find import find_contents
from .hub.pull import pull
from .hub.push import push_all
from .hub.repository import NO_ANSWER, HubRepository
from .hub.verify import verify
from .recipes.reading import recipe_names
from .sampling.drawing import draw_samples, to_uint8
from .sampling.pipeline import FunLoraPipeline
from .sampling.solvers import SOLVERS
from .utils.arguments import refuse_unknown, warnings_as_lines
from .utils.checks import did_you_mean, expanded, one_form


EXIT_CODES = "exit codes: 0 done; 1 an error, on stderr; 2 an argument that cannot be parsed; 75 the time limit (train, personalize, add); 130 Ctrl-C; 143 SIGTERM"
# Number of images of one class that are sampled at once.
_BATCH = 64
# Longer errors, such as an error with a page of HTML, are cut off.
_ERROR_LINES = 4
_HELP_SOURCE = (
    "folder of a run, a pipeline, adapters class_<id> or one adapter; file of a bank; or repository on the Hub"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments (sequence of `str`, *optional*): arguments of the command; None: the arguments of the process.

    Returns:
        `int`: the exit code.

    Raises:
        SystemExit: with 2 for unknown arguments, with 0 after `--help` and `--version`, and from `train` unless it succeeds.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    given: dict[str, Any] = {"arguments": arguments[1:]}
    run: Callable[..., int] | None = {
        "train": _train,
        "personalize": _personalize,
        "add": _add,
        "evaluate": _evaluate,
    }.get(arguments[0] if arguments else "")
    if run is None:
        known, unknown = _parser().parse_known_args(arguments)
        given = vars(known)
        run = given.pop("run")
        refuse_unknown(given.pop("command"), unknown)
    # These stop at a checkpoint.
    resumable = (_train, _personalize, _add)
    listening = nullcontext() if run in resumable else Termination()
    try:
        with listening, _progress_only_on_a_terminal(), warnings_as_lines():
            return run(**given)
    except Terminated as stopped:
        if run in resumable:
            raise
        name = {signal.SIGINT: "Ctrl-C"}.get(stopped.signal, stopped.signal.name)
        _say(f"stopped by {name}{'; the same command goes on' * (run in (_push, _pull))}", file=sys.stderr)
        return 128 + stopped.signal
    except (HfHubHTTPError, NO_ANSWER, SafetensorError, ValueError, OSError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if isinstance(error, NO_ANSWER) and not isinstance(error, HfHubHTTPError):
            lines[0] = (
                f"the Hub at {constants.ENDPOINT} does not answer ({lines[0]}): check the network, or HF_ENDPOINT."
            )
        for line in [f"error: {lines[0]}", *lines[1:_ERROR_LINES]]:
            _say(line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Accepts no abbreviations, and suggests the nearest choice, as argparse can do itself from Python 3.14 on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), action.choices or ()).replace(" ", ". ", 1)
            raise


def _parser() -> argparse.ArgumentParser:
    hub = _Parser(add_help=False)
    hub.add_argument("--revision", help="branch, tag or commit of a repository")
    hub.add_argument("--local_files_only", action="store_true", help="read a repository only from the cache")
    look = _Parser(add_help=False, parents=[hub])
    look.add_argument("source", type=_path, metavar="SOURCE", help=_HELP_SOURCE)
    look.add_argument("--subfolder", help="folder in SOURCE")
    look.add_argument("--json", action="store_true", dest="as_json", help="print JSON, for scripts")

    description = "Train, inspect, sample, share and check bases, FunLoRA adapters and banks of adapters."
    parser = _Parser(prog="funlora", description=description, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[..., int], text: str, *parents: _Parser) -> _Parser:
        """Add the parser of the command that the function `_<command>` runs, with the arguments of `parents`."""
        command = subparsers.add_parser(
            run.__name__.removeprefix("_"), help=text, description=f"{text}.", epilog=EXIT_CODES, parents=parents
        )
        command.set_defaults(run=run, command=command)
        return command

    # These four have separate parsers, see `main`; here they are only listed.
    subparsers.add_parser("train", help="Train a generator class after class, or continue a run", add_help=False)
    text = "Teach a text-to-image model concept after concept, or continue a run"
    subparsers.add_parser("personalize", help=text, add_help=False)
    subparsers.add_parser(
        "add", help="Add classes to a run, a base or a repository, or concepts to a run", add_help=False
    )
    subparsers.add_parser("evaluate", help="Evaluate a finished run, later or again", add_help=False)
    add(_recipes, "List the recipes that `funlora train --config` knows by name, one per line")

    add(_info, "Print what is in a folder, a file or a repository", look)

    sample = add(_sample, "Draw images of classes, or of prompts with concepts, into a PNG, one row each")
    sample.add_argument("base", type=_path, metavar="BASE", help="run, pipeline or repository, with its adapters")
    more = f"more classes: {_HELP_SOURCE}"
    sample.add_argument("--adapters", nargs="+", type=_path, default=[], metavar="SOURCE", help=more)
    sample.add_argument("--classes", nargs="+", metavar="CLASS", help="classes by id or name (default: all)")
    sample.add_argument("--class_label", nargs="+", default=[], type=int, metavar="ID", help="classes by id only")
    sample.add_argument("--class_name", nargs="+", default=[], metavar="NAME", help="classes by name only")
    text = "a prompt with tokens of the concepts in BASE, whose adapters are active; repeatable"
    sample.add_argument("--prompt", action="append", dest="prompts", default=[], metavar="TEXT", help=text)
    text = "a box of the image, from 0 to 1, with a prompt and concepts of its own; repeatable, later ones win"
    shown = "'LEFT,TOP,RIGHT,BOTTOM: TEXT'"
    sample.add_argument("--region", action="append", dest="regions", default=[], metavar=shown, help=text)
    text = "of the images of a prompt, in pixels; twice the height has room for two concepts (default: the height)"
    sample.add_argument("--width", type=_at_least_one, help=text)
    sample.add_argument("--num_images", type=_at_least_one, default=4, help="images per row (default: %(default)s)")
    text = "(default: 10, and 16 of a prompt; 'dopri5' chooses its steps)"
    sample.add_argument("--num_inference_steps", type=_at_least_one, help=text)
    sample.add_argument("--solver", choices=SOLVERS, help="of classes (default: heun)")
    sample.add_argument("--guidance_scale", type=float, help="1: none (default: 1, and 2.5 of a prompt)")
    sample.add_argument("--seed", type=int, default=0, help="equal seeds give equal images (default: %(default)s)")
    sample.add_argument("--output", type=_path, default="samples.png", help="PNG to write (default: %(default)s)")
    sample.add_argument("--device", default="cpu", help="such as cuda or mps (default: %(default)s)")

    export = add(_export, "Write concepts into a stock pipeline, for tools that know no adapters", hub)
    export.add_argument(
        "source", type=_path, metavar="SOURCE", help="folder of a run of concepts or of a concept, or repository"
    )
    export.add_argument("output_dir", type=_path, metavar="OUTPUT_DIR", help="new folder for the pipeline")
    export.add_argument("--concepts", nargs="+", metavar="NAME", help="concepts whose tokens to write (default: all)")
    text = "the one whose adapter to merge into the weights (default: the only one with an adapter)"
    export.add_argument("--adapter", metavar="NAME", help=text)
    export.add_argument("--base", type=_path, help="pipeline of the concepts' base (default: the one that they name)")

    push = add(_push, "Push a run to the Hub: its base and a folder for each class or concept")
    push.add_argument("output_dir", type=_path, metavar="OUTPUT_DIR", help="folder of a run")
    push.add_argument("repo_id", metavar="REPO_ID", help='"user/repo", created if it does not exist')
    push.add_argument("--base_model", metavar="REPO", help="repository of the base, if it is not REPO_ID")
    push.add_argument("--private", action="store_const", const=True, help="make a new repository private")
    push.add_argument("--license", help="identifier of a licence, for the cards")

    fetch = add(_pull, "Fetch classes from the Hub into the folder of a run", hub)
    fetch.add_argument(
        "source", type=_path, metavar="SOURCE", help="repository with folders class_<id>, or with one adapter"
    )
    fetch.add_argument(
        "output_dir",
        type=_path,
        metavar="OUTPUT_DIR",
        help="folder for adapters/class_<id>/, and for base/ --with_base",
    )
    fetch.add_argument(
        "--classes", nargs="+", type=int, metavar="ID", help="ids of the classes to fetch (default: all)"
    )
    fetch.add_argument("--with_base", action="store_true", help="also fetch the base")
    fetch.add_argument("--overwrite", action="store_true", help="replace folders that have other content")

    delete = add(_delete, "Delete a class or a concept from a folder and from a repository")
    delete.add_argument("class_label", metavar="CLASS", help="id or name of the class, or name of the concept")
    delete.add_argument(
        "--output_dir", type=_path, help="folder of a run or of a saved pipeline to delete the class from"
    )
    delete.add_argument("--repo_id", help="repository to delete the class from")
    delete.add_argument(
        "--history",
        choices=("keep", "squash"),
        default="keep",
        help="whether earlier commits of the repository keep the class (default: %(default)s)",
    )

    check = add(_verify, "Check files, numbers and fingerprints, and print one line for each", look)
    check.epilog = EXIT_CODES.replace("done", "everything is valid").replace(
        "an error", "something is not valid, or an error"
    )
    check.add_argument(
        "--base", type=_path, help="run, pipeline or U-Net for which to check adapters (default: the base in SOURCE)"
    )
    return parser


def _train(arguments: Sequence[str]) -> int:
    from .train import main as train  # this takes a second, and no other command needs it

    train(arguments, prog="funlora train")
    return 0


def _personalize(arguments: Sequence[str]) -> int:
    from .personalization.command import main as personalize

    personalize(arguments, prog="funlora personalize")
    return 0


def _add(arguments: Sequence[str]) -> int:
    from .continual.time_limit import TimeLimitReached
    from .train import EXIT_TIME_LIMIT, set_up_logging

    set_up_logging()
    # The options depend on what is added to.
    target = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    target.add_argument("--to", nargs="?")
    to = target.parse_known_args(arguments)[0].to
    add = _add_concepts if to and _has_concepts(Path(_path(to))) else _add_classes
    try:
        with Termination() as termination:
            add(arguments, termination)
    except (Terminated, TimeLimitReached) as stopped:
        _say(f"{str(stopped).partition(';')[0]}; the same command goes on.", file=sys.stderr)
        if isinstance(stopped, Terminated):
            raise
        return EXIT_TIME_LIMIT
    return 0


def _has_concepts(place: Path) -> bool:
    """Whether a folder is that of a run of concepts, or of learned concepts."""
    from .continual.run_folder import RunFolder

    run = RunFolder(place)
    return bool(concept_folders(place)) or (run.unfinished() is not None and "ConceptArguments" in run.settings())


def _add_classes(arguments: Sequence[str], termination: Termination) -> None:
    from .add import add_classes, parse
    from .evaluation.tables import how_to_see

    added = add_classes(**parse(arguments, prog="funlora add"), termination=termination)
    for class_id, one in added.classes.items():
        _say_added(f"class {_class_text(class_id, one['class_name'])}", one, one["images"], class_id in added.trained)
    _say(how_to_see(added.base, added.output_dir, added.classes))


def _add_concepts(arguments: Sequence[str], termination: Termination) -> None:
    from .personalization.add import add_concepts, parse

    added = add_concepts(**parse(arguments, prog="funlora add"), termination=termination)
    for name, one in added.concepts.items():
        _say_added(f"concept {name}", one, one["num_images"], name in added.trained)
    prompt = shlex.join([str(added.output_dir), *(f"--prompt={prompt}" for prompt in added.prompts.values())])
    _say(f"To see them: funlora sample {prompt}")


def _say_added(what: str, record: Mapping[str, Any], images: int, is_new: bool) -> None:
    how = f"learned from {images} image{'s' * (images != 1)} in {record['seconds']:.0f} s"
    _say(f"{what}: {how}" if is_new else f"{what}: already exists, {how}")


def _evaluate(arguments: Sequence[str]) -> int:
    from .run import evaluate
    from .train import parse_evaluation, set_up_logging

    set_up_logging()
    evaluate(*parse_evaluation(arguments, prog="funlora evaluate"))
    return 0


def _recipes() -> int:
    for name in recipe_names():
        _say(name)
    return 0


def _info(as_json: bool, **source: Any) -> int:
    # These import `datasets`; other commands should not wait for it.
    from .continual.added_classes import AddedClasses
    from .continual.run_folder import RunFolder

    place = Path(source["source"], source["subfolder"] or "")
    run = RunFolder(place)
    unfinished, begun = run.unfinished(), AddedClasses(run).unfinished()
    try:
        found = describe(**source)
    except ConceptsError:
        return _info_of_concepts(as_json, unfinished, **source)
    except FileNotFoundError as error:
        if unfinished is None:
            if runs := [str(one.parents[1]) for one in sorted(place.glob("*/checkpoints/run.json"))]:
                raise FileNotFoundError(f"{error} There are runs in it: {', '.join(runs)}.") from error
            raise
        found = Description(source["source"], None)  # a run that has no base yet
    if as_json:
        print(json.dumps({**asdict(found), "unfinished": unfinished, "unfinished_classes": begun}, indent=2))
        return 0
    if unfinished is not None:
        _say(_unfinished_text(unfinished, "personalize" if "ConceptArguments" in run.settings() else "train"))
    for class_id, name in begun.items():
        _say(f"unfinished class {_class_text(class_id, name)}. To go on: the `funlora add` command that began it")
    if (base := found.base) is not None:
        numbers = f"{base.parameters:,} parameters, fingerprint {base.fingerprint}"
        _say(f"base {base.name}: {numbers}, classes {_class_texts(base.classes)}")
    for adapter in found.adapters:
        label = "unknown" if adapter.class_label is None else _class_text(adapter.class_label, adapter.class_name)
        numbers = f"{adapter.parameters:,} parameters, {adapter.num_bytes:,} bytes"
        _say(f"adapter {adapter.name}: class {label}, {_method(adapter)}, {numbers}, {_on_base(adapter)}")
    for bank in found.banks:
        numbers = f"{bank.parameters_per_class:,} parameters per class, {bank.num_bytes:,} bytes"
        names = _class_texts(bank.classes)
        _say(f"bank {bank.name}: {_method(bank)}, {numbers}, {_on_base(bank)}, classes {names}")
    return 0


def _unfinished_text(unfinished: str, command: str) -> str:
    how = f"the `funlora {command}` command that began it, with --resume_from_checkpoint latest"
    return f"unfinished run: {unfinished}. To go on: {how}"


def _info_of_concepts(as_json: bool, unfinished: str | None, **source: Any) -> int:
    from .personalization.found_concepts import describe_concepts, find_concepts
    from .personalization.run_folder import AddedConcepts, ConceptFolder

    concepts = describe_concepts(find_concepts(**source))
    begun = AddedConcepts(ConceptFolder(Path(source["source"], source["subfolder"] or ""))).unfinished()
    if as_json:
        found = {"source": source["source"], "concepts": list(map(asdict, concepts)), "unfinished": unfinished}
        found["unfinished_concepts"] = begun
        print(json.dumps(found, indent=2))
        return 0
    if unfinished is not None:
        _say(_unfinished_text(unfinished, "personalize"))
    for name in begun:
        _say(f"unfinished concept {name}. To go on: the `funlora add` command that began it")
    for one in concepts:
        what = f"concept {one.place}: {one.token} {one.noun}, {one.strategy}{f' ({one.method})' if one.method else ''}"
        where = (
            ", in the run's own pipeline" if one.in_model else f", base {one.base_model_name_or_path or 'not named'}"
        )
        _say(f"{what}, {one.parameters:,} numbers, {one.num_bytes:,} bytes{where}; prompt: {one.instance_prompt}")
    return 0


def _verify(as_json: bool, base: str | None, **source: Any) -> int:
    try:
        verdicts = verify(base=base, **source)
    except ConceptsError:
        from .personalization.found_concepts import find_concepts, verify_concepts

        verdicts = verify_concepts(find_concepts(**source), base=base)
    ok = all(verdict.ok for verdict in verdicts)
    if as_json:
        print(json.dumps({"ok": ok, "verdicts": [asdict(verdict) for verdict in verdicts]}, indent=2))
    else:
        for verdict in verdicts:
            _say(str(verdict))
    return 0 if ok else 1


def _sample(
    base: str,
    adapters: list[str],
    classes: list[str] | None,
    class_label: list[int],
    class_name: list[str],
    num_images: int,
    output: str,
    device: str,
    solver: str | None,
    num_inference_steps: int | None,
    seed: int,
    prompts: list[str],
    guidance_scale: float | None,
    regions: list[str],
    width: int | None,
) -> int:
    from .evaluation.figures import image_grid

    if solver == "dopri5" and num_inference_steps is not None:
        raise ValueError(
            f"`--num_inference_steps` is {num_inference_steps}, which `--solver` 'dopri5' ignores: leave one of them out."
        )
    if not output.lower().endswith(".png"):
        raise ValueError(f"`--output` is {output!r}, expected a name ending in .png; only PNG is written.")
    place = _device(device)
    how: dict[str, Any] = {"num_images": num_images, "seed": seed}
    if prompts:
        of_classes = {"adapters": adapters, "classes": classes, "class_label": class_label, "class_name": class_name}
        for option, value in {**of_classes, "solver": solver}.items():
            if value:
                raise ValueError(f"`--{option}` is {value!r}, but `--prompt` draws concepts: leave one of them out.")
        how |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        how |= {"width": width, "device": place}
        given = {name: one for name, one in how.items() if one is not None}
        return _sample_prompts(base, prompts, regions, output, **given)
    for option, setting in {"region": regions or None, "width": width}.items():
        if setting is not None:
            raise ValueError(f"`--{option}` is {setting}, which only `--prompt` uses: add one, or leave it out.")
    how = {"solver": solver or "heun", "num_inference_steps": num_inference_steps or 10, "seed": seed}
    how |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    pipe = _load(base, adapters)
    class_ids = [_class_id(pipe.classes, text) for text in classes or ()]
    class_ids += [_class_id(pipe.classes, text, "--class_label") for text in map(str, class_label)]
    class_ids += [_class_id(pipe.classes, text, "--class_name") for text in class_name]
    class_ids = class_ids or list(pipe.classes)
    pipe.to(place)
    pipe.set_progress_bar_config(disable=None)  # None: show it only on a terminal
    images = [
        draw_samples(pipe, class_id, num_images, purpose="funlora sample", batch_size=_BATCH, **how).images
        for class_id in class_ids
    ]
    names = [_class_text(class_id, pipe.classes[class_id]) for class_id in class_ids]
    image_grid(to_uint8(torch.cat(images)), output, columns=num_images, names=names)
    for row, name in enumerate(names, start=1):
        _say(f"row {row}: {name}")
    _say(output)
    return 0


def _sample_prompts(base: str, prompts: list[str], regions: list[str], output: str, **how: Any) -> int:
    from .evaluation.figures import image_grid
    from .personalization.regions import Region
    from .personalization.sampling import sample_prompts

    rows = sample_prompts(base, prompts, regions=list(map(Region.parse, regions)), **how)
    image_grid(torch.cat([row.images for row in rows]), output, columns=how["num_images"], names=prompts)
    for number, row in enumerate(rows, start=1):
        what = (
            f"concept{'s' * (len(row.concepts) > 1)} {', '.join(row.concepts)}"
            if row.concepts
            else "no concept, the base"
        )
        active = f", {len(row.adapters)} adapters active together" if len(row.adapters) > 1 else ""
        _say(f"row {number}: {row.prompt}: {what}{active}")
    _say(output)
    return 0


def _export(source: str, output_dir: str, **options: Any) -> int:
    from .personalization.export import export_concepts

    done = export_concepts(source, output_dir, **options)
    merged = "no adapter" if done.adapter is None else f"the adapter of {done.adapter}"
    _say(f"{output_dir}: a {done.pipeline} with {', '.join(done.tokens)} and {merged}")
    return 0


def _push(repo_id: str, **options: Any) -> int:
    try:
        commits = push_all(repo_id=repo_id, **options)
    except ConceptsError:
        if not concept_folders(Path(options["output_dir"])):
            raise  # they are in the repository
        from .personalization.sharing import push_concepts

        commits = push_concepts(repo_id=repo_id, **options)
    for commit in commits:
        _say(commit.commit_url)
    if not commits:
        _say(f"{repo_id} already has everything: no commit was made.")
    return 0


def _delete(class_label: str, history: str, **places: Any) -> int:
    if not any(places.values()):
        raise ValueError(
            "`output_dir` and `repo_id` are None, expected a place to delete the class from: give one or both."
        )
    classes: dict[int, str] = {}
    try:
        if (folder := places["output_dir"]) is not None and Path(folder).is_dir():
            classes |= find_contents(folder, with_base=False).classes()
        if (repo_id := places["repo_id"]) is not None:
            rows = known_contents(repo_id, HubRepository(repo_id, create=False).files()).classes.values()
            classes |= {row.class_label: row.class_name for row in rows}
        class_id = _class_id(classes, class_label, "CLASS")
    except ConceptsError:
        from .personalization.sharing import delete_concept

        for place in delete_concept(class_label, **places, history=history):
            _say(f"deleted concept {class_label} from {places[place]}")
        return 0
    except (ValueError, FileNotFoundError):
        # A class that is damaged or not listed can be deleted by its id.
        if not class_label.isdecimal() or class_label in classes.values():
            raise
        class_id = int(class_label)
    for place in delete_class(class_id, **places, history=history):
        _say(f"deleted class {_class_text(class_id, classes.get(class_id))} from {places[place]}")
    return 0


def _pull(output_dir: str, **options: Any) -> int:
    written = pull(output_dir=output_dir, **options)
    for folder in written:
        _say(str(folder))
    if not written:
        _say(f"{output_dir} already has everything: nothing was written.")
    return 0


def _path(text: str) -> str:
    try:
        return expanded("path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    """Load a pipeline with the adapters beside its base, and with more adapters."""
    found = find_contents(base)
    if found.base is None or not (found.base / PIPELINE).is_file():
        raise FileNotFoundError(f"{base!r} holds no pipeline ({PIPELINE}), expected a run or a pipeline.")
    pipe = FunLoraPipeline.from_pretrained(found.base)
    more = [find_contents(source, with_base=False) for source in adapters]
    for contents in (found, *more):
        for folder in contents.adapters:
            # The pipeline has already loaded the others itself.
            if folder.parent != found.base / ADAPTERS_FOLDER:
                pipe.load_adapter(folder, **_free_class(pipe.classes, contents.source, **adapter_class(folder)))
        for file in contents.banks:
            pipe.load_adapter_bank(file)
    return pipe


def _free_class(
    classes: Mapping[int, str], source: str, class_label: int | None, class_name: str | None
) -> dict[str, Any]:
    """Return the id and name of an adapter; if another class has one of them, print and return a free id and a new name."""
    name, names = class_name or str(class_label), set(map(one_form, classes.values()))
    if class_label is None or (class_label not in classes and one_form(name) not in names):
        return {"class_label": class_label, "class_name": class_name}
    free, new_name = max(classes) + 1 if class_label in classes else class_label, f"{name} of {source}"
    was, now = _class_text(class_label, class_name), _class_text(free, new_name)
    _say(f"class {was} of {source} is {now} here, since another class has its id or name", file=sys.stderr)
    return {"class_label": free, "class_name": new_name}


def _class_id(classes: Mapping[int, str], text: str, option: str = "--classes") -> int:
    """Return the id of the class that a value of an option means."""
    ids = {str(class_id): class_id for class_id in classes if option != "--class_name"}
    names = {one_form(name): class_id for class_id, name in classes.items() if option != "--class_label"}
    found = {known[one_form(text)] for known in (ids, names) if one_form(text) in known}
    if len(found) > 1:
        remedy = f"pass --class_label {text}, or --class_name {text}"
        if option != "--classes":
            remedy = f"pass the name of class {text}, or {names[text]}"
        raise ValueError(
            f"`{option}` has {text!r}, the id of class {_class_text(ids[text], classes[ids[text]])} and the name of class "
            f"{names[text]}: {remedy}."
        )
    if not found:
        kind = {"--class_label": "ids", "--class_name": "names"}.get(option, "ids or names")
        raise ValueError(f"`{option}` has {text!r}, expected {kind} of: {_class_texts(classes)}.")
    return found.pop()


def _class_text(class_id: int, name: str | None) -> str:
    return str(class_id) if name in (None, str(class_id)) else f"{class_id} ({name})"


def _class_texts(classes: Mapping[int, str]) -> str:
    return ", ".join(_class_text(class_id, name) for class_id, name in classes.items()) or "none"


def _method(adapter: AdapterDescription | BankDescription) -> str:
    return " ".join(part for part in (adapter.method, adapter.function, adapter.operation) if part)


def _on_base(adapter: AdapterDescription | BankDescription) -> str:
    matches = {True: "matches", False: "DOES NOT MATCH", None: "not checked"}[adapter.base_matches]
    return f"base {adapter.base_model or 'not named'} ({matches})"


def _say(line: str, *, file: TextIO | None = None) -> None:
    """Print a line without control characters: names from others in it could move the cursor or fake other lines."""
    file = sys.stdout if file is None else file
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    encoding = file.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), file=file)


@contextmanager
def _progress_only_on_a_terminal() -> Iterator[None]:
    """Hide the progress bars of libraries until the context ends, if stderr is not a terminal."""
    with ExitStack() as after:
        if not sys.stderr.isatty():
            if not are_progress_bars_disabled():
                disable_progress_bars()
                after.callback(enable_progress_bars)
            if diffusers_logging.is_progress_bar_enabled():
                diffusers_logging.disable_progress_bar()
                after.callback(diffusers_logging.enable_progress_bar)
        yield
