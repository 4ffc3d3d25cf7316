"""Concepts to learn: their pictures, tokens, captions and prompts, from a file or from folders."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from ..data.image_folder import is_image
from ..utils.checks import check_not_mistyped, did_you_mean, expanded, is_repository_name, shortened
from ..utils.field_types import check_field_types, one_of
from ..utils.files import read_json, read_mapping
from .dataset_pictures import dataset_pictures
from .pictures import MOST_BYTES, captions_beside, load_images, pictures, read_text


logger = logging.getLogger(__name__)

FILE = "concepts.json"
# The package's own, by the value of `concepts`.
_OWN = {
    name: Path(__file__).parent / "tiny" / "concepts" / file
    for name, file in (("tiny", FILE), ("tiny_domain", "items_and_domain.json"))
}
# The largest public benchmark, CustomConcept101, has 101.
MOST_CONCEPTS = 1000
_PARQUET = ".parquet"
_NOUNS = "prompts_and_classes.txt"
NAME = re.compile(r"\w[\w-]{0,63}")
_TOKEN = re.compile(r"[^\s{}]{2,64}")
# In a template, for token and noun; in that of a style, for those of a subject.
_PLACE = re.compile(r"\{\}|<TOK>")
_SUBJECT = "{subject}"
_LIVE_NOUNS = ("cat", "dog")
_SCENES = (
    "in the jungle, in the snow, on the beach, on a cobblestone street, on top of pink fabric, on top of a wooden floor, "
    "with a city in the background, with a mountain in the background, with a blue house in the background, "
    "on top of a purple rug in a forest"
)
_SCENES_BY_KIND = {
    "object": "with a wheat field in the background, with a tree and autumn leaves in the background, "
    "with the Eiffel Tower in the background, floating on top of water, floating in an ocean of milk, "
    "on top of green grass with sunflowers around it, on top of a mirror, on top of the sidewalk in a crowded street, "
    "on top of a dirt road, on top of a white rug",
    "live": "wearing a red hat, wearing a santa hat, wearing a rainbow scarf, wearing a black top hat and a monocle, "
    "in a chef outfit, in a firefighter outfit, in a police outfit, wearing pink glasses, wearing a yellow shirt, "
    "in a purple wizard outfit",
}
_CHANGES = tuple(f"a {change} {{}}" for change in ("red", "purple", "shiny", "wet", "cube shaped"))
# Source: arXiv 2208.12242, the prompts that were published with its data set [exact].
DREAMBOOTH_PROMPTS = {
    kind: (*(f"a {{}} {scene}" for scene in f"{_SCENES}, {scenes}".split(", ")), *_CHANGES)
    for kind, scenes in _SCENES_BY_KIND.items()
}
# Of a style, whose instance prompt is such as "a picture in <s1> style" [ours].
_STYLE_PROMPTS = tuple(
    f"a {thing} in {{}}"
    for thing in ("house", "tree", "cat", "city street", "bowl of fruit", "mountain", "boat", "portrait of a woman")
)
_PROMPTS = {**DREAMBOOTH_PROMPTS, "style": _STYLE_PROMPTS}


@dataclass(frozen=True)
class Concept:
    """A subject or style to learn.

    Args:
        name: unique in a run, and valid as the name of a folder.
        token: the new word that stands for it, such as "<new1>".
        noun: what it is, such as "cat"; it follows the token in prompts.
        initializer: word or words whose embedding the token's row starts from.
        instance_prompt: prompt of its pictures, with the token.
        class_prompts: prompts of pictures of its class, which are drawn from them in turn; none: `plain(instance_prompt)`.
        images: pictures to train on, sorted, at least one.
        captions: name of a picture's file -> its prompt, with the token, instead of `instance_prompt`.
        class_data_dir: folder of pictures of its class, which may not exist yet.
        eval_prompts: templates of prompts to evaluate, with "{}" for token and noun.
        references: pictures to compare samples with.
        pair_prompt: of a style or domain, the template of prompts with a subject, with "{}" and "{subject}" for token and noun of
            each; None: it is a subject.
    """

    name: str
    token: str
    noun: str
    initializer: str
    instance_prompt: str
    class_prompts: tuple[str, ...]
    images: tuple[Path, ...]
    captions: Mapping[str, str] = field(default_factory=dict)
    class_data_dir: Path | None = None
    eval_prompts: tuple[str, ...] = DREAMBOOTH_PROMPTS["object"]
    references: tuple[Path, ...] = ()
    pair_prompt: str | None = None

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", self.images)

    @property
    def is_style(self) -> bool:
        """Whether it is a style or domain, not a subject."""
        return self.pair_prompt is not None

    def caption(self, path: Path) -> str:
        """Return the prompt of one of its pictures."""
        return self.captions.get(path.name, self.instance_prompt)

    @property
    def class_caption(self) -> str:
        """The prompt of its class: the only one of `class_prompts`, or else `plain(instance_prompt)`."""
        return self.class_prompts[0] if len(self.class_prompts) == 1 else self.plain(self.instance_prompt)

    def prompt(self, template: str) -> str:
        """Fill a template: "{}" or "<TOK>" becomes token and noun."""
        return _PLACE.sub(lambda _: f"{self.token} {self.noun}", template)

    def plain(self, prompt: str) -> str:
        """Return a prompt as the base knows it: without the token, but with the noun."""
        noun = rf"(\s+(?i:{re.escape(self.noun)})(?!\w))?"
        return re.sub(_as_word(self.token) + noun, lambda _: self.noun, prompt)

    def prompt_with(self, other: Concept) -> str | None:
        """Return a prompt with both concepts; None: both are styles."""
        if other.is_style:
            return None if self.is_style else other.prompt_with(self)
        if self.pair_prompt is not None:
            return self.prompt(self.pair_prompt).replace(_SUBJECT, other.prompt("{}"))
        return f"{self.prompt('a photo of a {}')} and {other.prompt('a {}')}"

    def texts(self, *, evaluated: bool = True) -> Iterator[str]:
        """Yield all its prompts, filled; those of the evaluation only with `evaluated`."""
        yield from (self.instance_prompt, *self.captions.values(), self.class_caption, *self.class_prompts)
        if evaluated:
            yield from map(self.prompt, self.eval_prompts)


@dataclass
class _Entry:
    """An entry of a file; the first key is needed, and one of the next two. Four are Custom Diffusion's."""

    instance_prompt: str
    instance_data_dir: str | None = None
    dataset_name: str | None = None
    class_prompt: str | list[str] | None = None
    class_data_dir: str | None = None
    name: str | None = None
    token: str | None = None
    noun: str | None = None
    initializer: str | None = None
    kind: Annotated[str, one_of(*_PROMPTS)] | None = None
    pair_prompt: str | None = None
    captions: str | None = None
    eval_prompts: str | list[str] | None = None
    reference_dir: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None


_KEYS = [one.name for one in fields(_Entry)]
_OF_DATASETS = ("dataset_config_name", "dataset_revision", "train_split", "image_column", "caption_column")


def load_concepts(source: str | os.PathLike, *, instance_prompt: str | None = None) -> list[Concept]:
    """Read concepts, in the order of learning. Every picture is decoded once, as a check.

    Nothing is written, except that pictures of a data set are put into the cache of `datasets`.

    Args:
        source: one of
            - a JSON file with a list of objects, or a folder with such a file, `concepts.json`. Needed keys: `instance_prompt`, and
              `instance_data_dir` or `dataset_name`: a data set with pictures of the concept, as [`load_image_data`] opens it, with
              `dataset_config_name`, `dataset_revision`, `train_split` ("train"), `image_column` (the only one with images) and
              `caption_column` (none). Others: `class_prompt` (a prompt, a list of them, or a .txt file with one in each line),
              `class_data_dir`, `name` (default: the name of `instance_data_dir`), `token` (the only <...> of the prompt), `noun` (the
              words after the token that end a prompt of the class, else one word), `initializer` (the noun), `captions` ("txt":
              `a.txt` for `a.jpg`; or a JSON file of captions by file; a caption has the token, or the noun, before which the token is
              put), `eval_prompts` (a file of lines, or a list, with "{}" or "<TOK>" for token and noun) or `kind` ("object" or
              "live": which of DreamBooth's templates; default: "live" for cats and dogs), `kind` "style" for a style or domain, with
              `pair_prompt` (its prompt with a subject, with "{}" and "{subject}"; default: "a photo of a {subject} in {}"), and
              `reference_dir` (default: the training pictures). Relative paths start at the file's folder if `instance_data_dir` is there, otherwise at the working directory.
            - a folder with a folder of pictures for each concept, as DreamBooth's data set; `prompts_and_classes.txt` in or beside it
              gives the nouns. Without it, a noun is the folder's name without digits at its end.
            - a folder with pictures of one concept.
            - with `instance_prompt`: a data set with pictures of one concept, on the Hub or a .parquet file.
            - "tiny": the package's own concepts, for its tiny base; "tiny_domain": two of them and a domain, scenes at the shore.
            Images of a class may be drawn into a `class_data_dir`: know the file before you use it.
        instance_prompt: prompt with the token, for one folder of pictures or one data set.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: anything else that cannot be used; the error names file, concept and value.
    """
    given = expanded("concepts", os.fspath(source))
    place = Path(given) if os.path.exists(given) else _OWN.get(given, Path(given))
    is_there = os.path.exists(place)
    if not (is_there or (instance_prompt is not None and "/" in given and is_repository_name(given))):
        check_not_mistyped("`concepts`", given)
        raise FileNotFoundError(
            f"`concepts` is {shortened(repr(given), 300)}, but there is no such file or folder: give a JSON file, a folder with one "
            "folder of pictures for each concept, 'tiny' or 'tiny_domain'. (A data set on the Hub: owner/name, and `instance_prompt`.)"
        )
    if os.path.isfile(place / FILE):
        place /= FILE
    shown = shortened(repr(str(place)), 300)
    is_dataset, is_folder = not is_there or place.suffix == _PARQUET, place.is_dir()
    if is_dataset:
        entries: list[Any] = [{"dataset_name": str(place.absolute()) if is_there else given}]
    else:
        entries = _subjects(place) if is_folder else _listed(place)
    if instance_prompt is not None:
        if len(entries) != 1 or not (is_dataset or is_folder):
            raise ValueError(
                f"`instance_prompt` is {shortened(repr(instance_prompt), 300)}, but {shown} is neither one folder of pictures nor a data "
                "set: its prompts belong into a concepts.json."
            )
        # Token and noun follow from the prompt.
        entries = [{**entries[0], "instance_prompt": instance_prompt, "token": None, "noun": None}]
    elif is_dataset:
        raise ValueError(
            f"`concepts` is {shown}, a data set: also give `instance_prompt`, such as 'a photo of a <new1> dog'."
        )
    if not 1 <= len(entries) <= MOST_CONCEPTS:
        raise ValueError(f"{shown} has {len(entries)} concepts, expected 1 to {MOST_CONCEPTS}.")
    concepts = [
        _Reader(entry, place, f"{shown}, entry {number}").concept() for number, entry in enumerate(entries, start=1)
    ]
    check_together(concepts, shown)
    for concept in concepts:
        try:
            load_images((*concept.images, *concept.references), size=8)
        except ValueError as error:
            raise ValueError(f"{shown}, concept {concept.name!r}: {error}") from error
    return concepts


def check_concepts(
    concepts: Sequence[Concept], tokenizers: Mapping[str, Any], *, num_vectors: int = 1, evaluated: bool = True
) -> None:
    """Check concepts against the tokenizers of a base, before new tokens are added to these.

    Args:
        tokenizers: by name of their text encoder.
        num_vectors: ids that a token becomes.
        evaluated: whether `eval_prompts` will be read.

    Raises:
        ValueError: a token is a word already, an initializer has characters that a tokenizer does not know, or a prompt is longer
            than a tokenizer's limit, so that its end would be cut.
    """
    for concept in concepts:
        where = f"concept {concept.name!r}"
        for name, tokenizer in tokenizers.items():
            ids = _ids(tokenizer, concept.token)
            if len(ids) == 1 and ids != [tokenizer.unk_token_id]:
                raise ValueError(
                    f"{where}: `token` {concept.token!r} is a word of {name}'s tokenizer already, expected a new one, such as "
                    f"'<{concept.token.strip('<>')}-1>'."
                )
            pieces = _ids(tokenizer, concept.initializer)
            if not pieces or tokenizer.unk_token_id in pieces:
                raise ValueError(
                    f"{where}: `initializer` {concept.initializer!r} has characters that {name}'s tokenizer does not know, "
                    "expected a known word."
                )
            if len(pieces) > 1:
                text = "%s: initializer %r is %d tokens of %s; the row starts as their mean."
                logger.info(text, where, concept.initializer, len(pieces), name)
            most = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
            for prompt in concept.texts(evaluated=evaluated):
                parts = re.split(_as_word(concept.token), prompt)
                count = sum(len(_ids(tokenizer, part)) for part in parts) + num_vectors * (len(parts) - 1)
                if count > most:
                    of_evaluation = map(concept.prompt, concept.eval_prompts)
                    is_default = concept.eval_prompts in _PROMPTS.values() and prompt in of_evaluation
                    remedy = "give `eval_prompts`, in place of the default ones" if is_default else "shorten it"
                    raise ValueError(
                        f"{where}: the prompt {shortened(repr(prompt), 300)} has {count} tokens, expected {most} at most for {name}: "
                        f"{remedy}."
                    )


def _listed(file: Path) -> list[Any]:
    entries = read_json(file, most_bytes=MOST_BYTES)
    if not isinstance(entries, list):
        raise ValueError(
            f"{str(file)!r} holds {type(entries).__name__}, expected a list of objects, one for each concept."
        )
    return entries


def _subjects(folder: Path) -> list[dict[str, str]]:
    """Return an entry for each folder in a folder, or if it has none, for itself."""
    found = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith((".", "__")))
    images = [one.name for one in sorted(folder.iterdir()) if is_image(one)]
    if not (found or images):
        raise ValueError(
            f"{str(folder)!r} has no folders, expected one folder of pictures for each concept, or pictures of one."
        )
    if not found:
        found = [folder.resolve()]
    elif images:
        warnings.warn(f"{str(folder)!r}: {images[0]} is in no concept's folder and will not be read.", stacklevel=3)
    file = next((one for one in (folder / _NOUNS, folder.resolve().parent / _NOUNS) if one.is_file()), None)
    if file is None:
        nouns = {one.name: " ".join(re.sub(r"[\W_\d]*$", "", one.name).replace("_", " ").split()) for one in found}
        logger.info("%s has no %s; the nouns are the folders' names: %s", folder, _NOUNS, nouns)
    else:
        nouns = dict(re.findall(r"^([^,\n]+),(\S[^,\n]*?)\s*$", read_text(file), re.MULTILINE))
        if missing := [one.name for one in found if one.name not in nouns]:
            raise ValueError(f"{str(file)!r} has no noun for {missing[0]!r}: add the line '{missing[0]},NOUN'.")
    entries = []
    for one in found:
        name, noun = _safe_name(one), nouns[one.name]
        entry = {"name": name, "token": f"<{name}>", "noun": noun, "instance_data_dir": str(one.absolute())}
        entries.append(entry | {"instance_prompt": f"a photo of a <{name}> {noun}"})
    return entries


class _Reader:
    """Checks one entry of a file or folder, and makes a concept of it, without decoding its pictures."""

    def __init__(self, given: Any, place: Path, where: str) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{where} is {type(given).__name__}, expected an object with some of the keys {_KEYS}.")
        if unknown := sorted(given.keys() - set(_KEYS)):
            hint = did_you_mean(unknown[0], _KEYS) or f" The keys are {', '.join(_KEYS)}."
            raise ValueError(f"{where} has the unknown key {shortened(repr(unknown[0]), 100)}.{hint}")
        needed = ["instance_prompt"] if "dataset_name" in given else ["instance_prompt", "instance_data_dir"]
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f"{where} has no {missing[0]!r}: add it{', or dataset_name' * (missing[0] != _KEYS[0])}.")
        self.where, self.entry = where, _Entry(**given)
        try:
            check_field_types(self.entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        self._check_source()
        source = "dataset_name" if self.entry.dataset_name else "instance_data_dir"
        name = expanded(source, getattr(self.entry, source))
        near = place.parent / name
        in_folder = os.path.exists(near) if self.entry.dataset_name else os.path.isdir(near)
        self.base = place.parent.absolute() if in_folder else Path.cwd()
        captions = self.entry.captions or ""
        if self.entry.dataset_name:
            self.images, self.of_dataset = self._dataset(name)
            named = Path(self.entry.dataset_config_name or self.entry.dataset_name)
        else:
            self.images = self._images("instance_data_dir", ".txt" if captions == "txt" else Path(captions).suffix)
            named = self.images[0].parent.resolve()
        self.name = self.entry.name or _safe_name(named)
        if not NAME.fullmatch(self.name):
            raise self._wrong("name", self.name, "1 to 64 letters, digits, '_' and '-'")
        self.where += f" ({self.name})"
        self.token = self._token()
        self.class_prompts = self._class_prompts()
        self.noun = self._noun()

    def concept(self) -> Concept:
        entry = self.entry
        class_data_dir = None
        if entry.class_data_dir is not None:
            class_data_dir = self.base / expanded("class_data_dir", entry.class_data_dir)
            if os.path.exists(class_data_dir) and not os.path.isdir(class_data_dir):
                raise self._wrong("class_data_dir", entry.class_data_dir, "a folder")
            if class_data_dir.resolve() == self.images[0].parent.resolve():
                raise self._wrong("class_data_dir", entry.class_data_dir, "another folder than `instance_data_dir`")
        return Concept(
            name=self.name,
            token=self.token,
            noun=self.noun,
            initializer=entry.initializer or self.noun,
            instance_prompt=entry.instance_prompt,
            class_prompts=self.class_prompts,
            images=self.images,
            captions=self._captions(),
            class_data_dir=class_data_dir,
            eval_prompts=self._templates(),
            references=self._images("reference_dir") if entry.reference_dir else self.images,
            pair_prompt=self._pair_prompt(),
        )

    def _check_source(self) -> None:
        """Raise a ValueError unless the pictures are in a folder or in a data set, and no key is of the other one."""
        entry = self.entry
        if bool(entry.dataset_name) == bool(entry.instance_data_dir):
            raise self._wrong("dataset_name", entry.dataset_name, "one of `dataset_name` and `instance_data_dir`")
        others = ("captions",) if entry.dataset_name else _OF_DATASETS
        for key in others:
            if (value := getattr(entry, key)) is not None:
                instead = "a `caption_column`" if entry.dataset_name else "a `dataset_name`, to which it belongs"
                raise self._wrong(key, value, instead)

    def _dataset(self, name: str) -> tuple[tuple[Path, ...], dict[str, str]]:
        """Return the pictures of a data set and captions by their names."""
        place = self.base / name
        try:
            return dataset_pictures(
                str(place) if os.path.exists(place) else name,
                **{key: getattr(self.entry, key) for key in _OF_DATASETS},
            )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{self.where}: {error}") from error

    def _wrong(self, key: str, value: object, expected: str) -> ValueError:
        return ValueError(f"{self.where}: `{key}` is {shortened(repr(value), 300)}, expected {expected}.")

    def _images(self, key: str, beside: str = "") -> tuple[Path, ...]:
        folder = self.base / expanded(key, getattr(self.entry, key))
        if not os.path.isdir(folder):
            raise self._wrong(key, getattr(self.entry, key), f"a folder; there is no {shortened(str(folder), 300)}")
        if not (found := pictures(folder, beside=beside)):
            raise self._wrong(key, getattr(self.entry, key), "a folder with pictures, but it has none")
        return found

    def _file(self, key: str, *folders: Path) -> Path:
        given = getattr(self.entry, key)
        places = [folder / expanded(key, given) for folder in (*folders, self.base)]
        if found := [place for place in places if os.path.isfile(place)]:
            return found[0]
        raise self._wrong(key, given, f"a file; there is no {shortened(str(places[-1]), 300)}")

    def _token(self) -> str:
        prompt = self.entry.instance_prompt
        tokens = {self.entry.token} if self.entry.token else set(re.findall(r"<[^<>\s]+>", prompt))
        if len(tokens) != 1:
            raise self._wrong(
                "instance_prompt", prompt, f"one token such as <new1>; it has {len(tokens)}: set `token`"
            )
        (token,) = tokens
        if not _TOKEN.fullmatch(token) or _PLACE.search(token):
            raise self._wrong("token", token, "one new word, such as '<new1>'")
        if not re.search(_as_word(token), prompt):
            raise self._wrong("instance_prompt", prompt, f"a prompt with the token {token!r} as a word")
        return token

    def _noun(self) -> str:
        """Return the noun: as given, or the words after the token that end the prompt of the class, or the word after it."""
        found = self.entry.noun
        if found is None:
            after = re.split(_as_word(self.token), self.entry.instance_prompt, maxsplit=1)[1]
            words = re.findall(r"\w[\w'-]*", re.split(r"[^\w\s'-]", after, maxsplit=1)[0])
            starts = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
            ends = [
                one
                for one in starts
                if any(re.search(rf"(?i)(?<!\w){re.escape(one)}\W*$", text) for text in self.class_prompts)
            ]
            found = (ends or words or [""])[0]
        for key, value in (("noun", found), ("initializer", self.entry.initializer or found)):
            if not re.search(r"\w", value) or len(value) > 100:
                hint = "" if value else ", since no word follows the token"
                raise self._wrong(key, value, f"a word or a few{hint}")
        return found

    def _captions(self) -> dict[str, str]:
        given, names = self.entry.captions or self.entry.caption_column, [one.name for one in self.images]
        if given is None:
            return {}
        if self.entry.caption_column:
            found: dict[str, Any] = dict(self.of_dataset)
        elif given == "txt":
            found = captions_beside(self.images)
        else:
            found = read_mapping(self._file("captions", self.images[0].parent), most_bytes=MOST_BYTES)
        if unknown := sorted(found.keys() - set(names)):
            raise self._wrong("captions", unknown[0], f"the name of a picture.{did_you_mean(unknown[0], names)}")
        if not found:
            raise self._wrong("captions", given, "captions, but no picture has one")
        if len(found) < len(names):
            text = "%s: %d of %d pictures have no caption; theirs is `instance_prompt`."
            logger.info(text, self.where, len(names) - len(found), len(names))
        return {name: self._caption(name, caption) for name, caption in found.items()}

    def _caption(self, name: str, caption: object) -> str:
        """Return a caption with the token, which is put before the noun where it is missing."""
        if isinstance(caption, str) and re.search(_as_word(self.token), caption):
            return caption
        noun = rf"(?i)(?<!\w)({re.escape(self.noun)})(?!\w)"
        if isinstance(caption, str) and re.search(noun, caption):
            return re.sub(noun, lambda found: f"{self.token} {found[1]}", caption, count=1)
        expected = f"text with the token {self.token!r} or the noun {self.noun!r}"
        raise self._wrong(f"captions[{shortened(repr(name), 100)}]", caption, expected)

    def _class_prompts(self) -> tuple[str, ...]:
        given = self.entry.class_prompt
        if given is None:
            return ()
        if isinstance(given, str):
            given = self._lines("class_prompt") if given.endswith(".txt") else [given]
        if not given:
            raise self._wrong("class_prompt", self.entry.class_prompt, "at least one prompt")
        for prompt in given:
            if not prompt.strip() or re.search(_as_word(self.token), prompt):
                raise self._wrong("class_prompt", prompt, f"a prompt without the token {self.token!r}")
        return tuple(given)

    def _lines(self, key: str) -> list[str]:
        """Return the lines of a file that are not empty."""
        return [line for line in map(str.strip, read_text(self._file(key)).splitlines()) if line]

    def _templates(self) -> tuple[str, ...]:
        given, kind = self.entry.eval_prompts, self.entry.kind
        if given is None:
            return _PROMPTS[kind or ("live" if self.noun.casefold() in _LIVE_NOUNS else "object")]
        if kind in DREAMBOOTH_PROMPTS:
            raise self._wrong("kind", kind, "no such `kind` beside `eval_prompts`, which replace its templates")
        if isinstance(given, str):
            given = self._lines("eval_prompts")
        if not given:
            raise self._wrong("eval_prompts", self.entry.eval_prompts, "at least one prompt")
        for template in given:
            if not _PLACE.search(template):
                raise self._wrong("eval_prompts", template, "a place for token and noun, '{}' or '<TOK>', in each")
        return tuple(_PLACE.sub("{}", template) for template in given)

    def _pair_prompt(self) -> str | None:
        given = self.entry.pair_prompt
        if self.entry.kind != "style":
            if given is not None:
                raise self._wrong("pair_prompt", given, "none, or `kind` 'style', to which it belongs")
            return None
        template = given or f"a photo of a {_SUBJECT} in {{}}"
        if not (_PLACE.search(template) and _SUBJECT in template):
            raise self._wrong(
                "pair_prompt", template, f"places for the style, '{{}}', and for a subject, '{_SUBJECT}'"
            )
        return _PLACE.sub("{}", template)


def check_together(concepts: Sequence[Concept], where: str) -> None:
    """Raise a ValueError that starts with `where` if concepts share a name, a token, the start of a token, or a folder of different classes."""
    by_token = sorted(concepts, key=lambda one: one.token.casefold())
    for one, other in pairwise(by_token):
        # A tokenizer may ignore case, and would find the shorter token in the longer one.
        if other.token.casefold().startswith(one.token.casefold()):
            how = "equals" if one.token.casefold() == other.token.casefold() else "is the beginning of"
            raise ValueError(
                f"{where}: the token {one.token!r} of concept {one.name!r} {how} the token {other.token!r} of concept "
                f"{other.name!r}: rename one."
            )
    names: dict[str, Concept] = {}
    classes: dict[Path, Concept] = {}
    tokens = re.compile("|".join(_as_word(one.token) for one in concepts))
    for one in concepts:
        if names.setdefault(one.name.casefold(), one) is not one:
            raise ValueError(f"{where}: two concepts have the name {one.name!r}: give one of them another `name`.")
        for text in one.texts():
            if others := set(tokens.findall(text)) - {one.token}:
                raise ValueError(
                    f"{where}: the prompt {shortened(repr(text), 300)} of concept {one.name!r} has the token {min(others)!r} of "
                    "another concept: remove it."
                )
        if one.class_data_dir is not None:
            first = classes.setdefault(one.class_data_dir.resolve(), one)
            if (first.class_caption, first.class_prompts) != (one.class_caption, one.class_prompts):
                raise ValueError(
                    f"{where}: concepts {first.name!r} and {one.name!r} have the same `class_data_dir`, but different classes: give "
                    "one of them another folder."
                )


def _as_word(token: str) -> str:
    """Return a regular expression: "<new1>" is not in "<new1>0", nor "new1" in "new10"."""
    return rf"(?<!\w){re.escape(token)}(?!\w)"


def _safe_name(folder: Path) -> str:
    return re.sub(r"[^\w-]+", "_", folder.name.removesuffix(_PARQUET))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
