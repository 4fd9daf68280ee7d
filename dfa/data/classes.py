"""The class list of a data set: names, text prompts, palette."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dfa.core.void import MAX_CLASSES

_TEMPLATE = "a clean origami {}."  # METHOD 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like `name`, whatever the case: for error messages."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    match = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.0)
    return by_folded[match[0]] if match else ""


@dataclass(frozen=True)
class ClassSet:
    """The C foreground classes of a data set and the texts that stand for them.

    Class `names[c - 1]` has index c in masks and labels; 0 is background, and void is what `dfa.core.void` says.

    Attributes:
        names: C foreground class names, in index order; no background among them.
        prompts: for each class one or more texts; the embeddings of several are averaged.
        background: background texts, one text-bank column each; may be empty.
        templates: sentences with one `{}` for the text.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    background: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise ValueError(f"a class list has 1 to {MAX_CLASSES} names, got {len(self.names)}")
        if len(self.prompts) != len(self.names):
            raise ValueError(f"{len(self.names)} class names but prompts for {len(self.prompts)}")
        _check_texts("names", self.names)
        _check_texts("background", self.background)
        for name, prompts in zip(self.names, self.prompts, strict=True):
            if not prompts:
                raise ValueError(f"class {name!r} has no prompt")
            _check_texts(f"prompts of {name!r}", prompts)
        if "background" in (name.casefold() for name in self.names):
            raise ValueError("names lists 'background': list foreground classes only, background is always index 0")
        _check_ambiguous(self.names, self.prompts, self.background)
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"each template needs exactly one {{}}, got {list(self.templates)}")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "ClassSet":
        """Build from plain data as it stands in conf/classes_*.yaml.

        Keys: `names` (list), `prompts` (mapping name -> text or list of texts; a name that is not listed stands for
        itself), `background` (list, none where absent), `templates` (list; where absent METHOD's, "a clean origami {}.").

        Raises:
            ValueError: unknown or missing keys, prompts for an unknown class, duplicates.
        """
        allowed = ("names", "prompts", "background", "templates")
        for key in mapping:
            if key not in allowed:
                raise ValueError(f"class list has key {key!r}; allowed: {allowed}; nearest: {nearest(key, allowed)!r}")
        if "names" not in mapping:
            raise ValueError("class list has no 'names', which it needs")
        names = _as_names(mapping["names"])
        prompts = mapping.get("prompts") or {}
        if not isinstance(prompts, Mapping):
            raise ValueError(f"prompts is {prompts!r}; needed is a mapping of class name to text or list of texts")
        for name in prompts:
            if name not in names:
                raise ValueError(f"prompts names class {name!r}; nearest in names: {nearest(name, names)!r}")
        return cls(
            names=names,
            prompts=tuple(_as_texts(prompts.get(name, name)) for name in names),
            background=_as_texts(mapping.get("background") or ()),
            templates=_as_texts(mapping.get("templates", _TEMPLATE)),
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that `from_mapping` takes; classes that stand for themselves have no entry in `prompts`."""
        prompts = {n: list(texts) for n, texts in zip(self.names, self.prompts, strict=True) if texts != (n,)}
        lists = {"background": list(self.background), "templates": list(self.templates)}
        return {"names": list(self.names)} | ({"prompts": prompts} if prompts else {}) | lists

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes."""
        return len(self.names)

    def index(self, name: str) -> int:
        """Return the index 1..C of a class name.

        Raises:
            ValueError: unknown name; the message gives the nearest known one.
        """
        if name not in self.names:
            raise ValueError(f"unknown class {name!r}; nearest known: {nearest(name, self.names)!r}")
        return self.names.index(name) + 1

    def palette(self) -> npt.NDArray[np.uint8]:
        """Return PASCAL VOC's palette, uint8 (256, 3): the bits of the index spread over R, G, B from the top."""
        return voc_palette()


def voc_palette() -> npt.NDArray[np.uint8]:
    """Return PASCAL VOC's colours of all 256 indices, uint8 (256, 3)."""
    index = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    # Bits 0, 3, 6 go to red, 1, 4, 7 to green, 2, 5 to blue, each from the highest bit of the channel downwards.
    for bit in range(8):
        colors[:, bit % 3] |= (((index >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


def own_class_set(names: Sequence[str], *, like: ClassSet) -> ClassSet:
    """A class list of names alone: each is its own prompt (underscores are spaces), the rest is that of another list.

    Background prompts that one of the names stands for are left out; `background` is no class name and is too.

    Raises:
        ValueError: no names, the same name twice (whatever its case), or two names with one text.
    """
    names = tuple(name for name in names if name.casefold() != "background")
    texts = tuple(name.replace("_", " ").strip() for name in names)
    taken = {_folded(text) for text in (*names, *texts)}
    return ClassSet(
        names=names,
        prompts=tuple((text,) for text in texts),
        background=tuple(text for text in like.background if _folded(text) not in taken),
        templates=like.templates,
    )


def _as_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"names is {value!r}; needed is a list")
    for name in value:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"names holds {name!r}, which YAML does not take for text; put it in quotes")
    return tuple(str(name) for name in value)


def _as_texts(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(text) for text in value)


def _check_ambiguous(names: tuple[str, ...], prompts: tuple[tuple[str, ...], ...], background: tuple[str, ...]) -> None:
    """One text in two columns of the text bank, whatever its case: the softmax over the columns could not decide."""
    folded, owner = {_folded(text): text for text in background}, dict[str, str]()
    for name, texts in zip(names, prompts, strict=True):
        for text in {name, *texts}:
            key = _folded(text)
            if key in folded:
                raise ValueError(
                    f"{text!r} (class {name!r}) and the background prompt {folded[key]!r} are class texts and background "
                    "prompts at once; drop it from background"
                )
        for text in texts:
            other = owner.setdefault(_folded(text), name)
            if other != name:
                raise ValueError(f"the text {text!r} stands for the classes {other!r} and {name!r}; give it to one")


def _check_texts(what: str, texts: tuple[str, ...]) -> None:
    if any(not text.strip() for text in texts):
        raise ValueError(f"{what} holds an empty text: {list(texts)}")
    seen: set[str] = set()
    for text in texts:
        if _folded(text) in seen:
            raise ValueError(f"{what} lists {text!r} twice")
        seen.add(_folded(text))


def _folded(text: str) -> str:
    """What two texts share that are the same but for their case and spaces."""
    return " ".join(text.casefold().split())


def check_classes(saved: Sequence[str], wanted: Sequence[str], *, where: str) -> None:
    """Raise a ValueError that names both sides when the class lists differ."""
    if tuple(saved) == tuple(wanted):
        return
    if len(saved) != len(wanted):
        raise ValueError(
            f"{where} has {len(saved)} foreground classes ({_first(saved)}), this run has {len(wanted)} ({_first(wanted)}):"
            " give the data set that it was trained on, or another run"
        )
    number, (old, new) = next(
        (i, pair) for i, pair in enumerate(zip(saved, wanted, strict=True), 1) if pair[0] != pair[1]
    )
    raise ValueError(
        f"{where} calls class {number} {old!r}, this run calls it {new!r} (both have {len(saved)} classes):"
        " give the data set that it was trained on, or another run"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
