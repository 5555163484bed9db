"""Findings of a check: problems, which make a training fail or its figures wrong, and remarks."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.data.checking.duplicates import LEAST_CONTRAST, same_files, similar_images
from shufflenet_mlflow.data.checking.folders import Part
from shufflenet_mlflow.data.checking.images import Look
from shufflenet_mlflow.data.digests import shortened
from shufflenet_mlflow.data.folder import by_suffix
from shufflenet_mlflow.runtime.text import counted, name_some

SHORTEST_SIDE = 32
LONGEST_RATIO = 5
"""Images with a shorter side than the first are called tiny, those with a higher ratio of sides extreme."""
LARGEST_IMBALANCE = 10
FEWEST_IMAGES = 10
"""A class with fewer images in a part that is trained on is called small."""

Group = tuple[Look, ...]


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found."""

    kind: str
    is_problem: bool
    """Whether it makes a training fail or its figures wrong; otherwise it is only a remark."""
    text: str
    groups: tuple[Group, ...] = ()
    """The images; those that belong together are in one group."""

    def to_dict(self) -> dict[str, Any]:
        """Return its entry in the output of `data check --json`."""
        groups = [[_image_entry(look) for look in group] for group in self.groups]
        return {"kind": self.kind, "problem": self.is_problem, "text": self.text, "groups": groups}


def _image_entry(look: Look) -> dict[str, Any]:
    entry = {"part": look.image.part, "class": look.image.class_name, "path": look.image.file}
    return entry if look.problem is None else {**entry, "reason": look.problem}


@dataclass(frozen=True)
class Reference:
    """The images that a data set is compared with: those of a folder, or those that a run was trained on."""

    name: str
    looks: tuple[Look, ...] = ()
    digests: Collection[bytes] = ()
    """Digests of images that are not at hand."""


@dataclass(frozen=True)
class CheckReport:
    """A data set that was checked."""

    directory: Path
    parts: tuple[Part, ...]
    looks: tuple[Look, ...]
    findings: tuple[Finding, ...]
    against: str | None = None
    """Name of what it was compared with."""

    @property
    def problems(self) -> int:
        """Number of findings that are problems."""
        return sum(finding.is_problem for finding in self.findings)

    def counts(self, part: Part) -> dict[str, int]:
        """Return the number of images of each class of a part."""
        counts = Counter(file.class_name for file in part.files)
        return {name: counts[name] for name in sorted({*map(_normal, part.folders), *counts})}

    def looks_of(self, part: Part) -> list[Look]:
        """Return the images of a part that can be decoded."""
        return [look for look in self.looks if look.image.part == part.name and look.problem is None]

    def sizes(self, part: Part) -> tuple[tuple[int, int], ...]:
        """Return width and height of the smallest, the median and the largest image of a part, by their pixels."""
        sizes = sorted(((look.width, look.height) for look in self.looks_of(part)), key=lambda size: size[0] * size[1])
        return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else ()

    def channels(self, part: Part) -> dict[str, int]:
        """Return how many images of a part have which of Pillow's modes, the most frequent first."""
        return dict(Counter(look.channels for look in self.looks_of(part)).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `data check --json`."""
        return {
            "directory": str(self.directory),
            "against": self.against,
            "parts": [
                {
                    "name": part.name,
                    "directory": str(part.root),
                    "images": len(part.files),
                    "classes": self.counts(part),
                    "sizes": dict(zip(("smallest", "median", "largest"), map(list, self.sizes(part)), strict=False)),
                    "channels": self.channels(part),
                }
                for part in self.parts
            ],
            "problems": self.problems,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def report_on(
    directory: Path, parts: Sequence[Part], looks: Sequence[Look], reference: Reference | None = None
) -> CheckReport:
    """Judge a data set by its folders and the looks at its images."""
    findings = [
        *_names(parts),
        *_of_images(looks),
        *_duplicates(looks, reference),
        *_numbers(parts),
    ]
    findings.sort(key=lambda finding: not finding.is_problem)
    name = None if reference is None else reference.name
    return CheckReport(directory, tuple(parts), tuple(looks), tuple(findings), name)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _names(parts: Sequence[Part]) -> Iterable[Finding]:
    """Yield what is wrong with the names of the classes."""
    alike: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for folder in part.folders:
            alike[_normal(_normal(folder).casefold())].add(folder)
    for names in alike.values():
        within = any(len(names & set(part.folders)) > 1 for part in parts)
        if len({*map(_normal, names)}) > 1 or within:
            listed = " and ".join(ascii(name) for name in sorted(names))
            text = f"the classes {listed} differ only in case, or in their form of Unicode"
            yield Finding("names-alike", True, text)
    classes = {part.name: {_normal(folder) for folder in part.folders} for part in parts}
    everywhere = set().union(*classes.values())
    for part in parts:
        if missing := sorted(everywhere - classes[part.name]):
            yield Finding("class-missing", True, f"{part.name} lacks the class {name_some(missing, shown_as=repr)}")
        filled = {file.class_name for file in part.files}
        if empty := sorted(classes[part.name] - filled):
            where = f" in {part.name}" if part.name else ""
            text = f"no image in the class {name_some(empty, shown_as=repr)}{where}"
            yield Finding("class-empty", True, text)


def _of_images(looks: Sequence[Look]) -> Iterable[Finding]:
    """Yield what is odd about single images."""
    decoded = [look for look in looks if look.problem is None]

    def found(kind: str, chosen: Iterable[Look], text: str, *, is_problem: bool = False) -> Iterable[Finding]:
        groups = tuple((look,) for look in chosen)
        if groups:
            yield Finding(kind, is_problem, f"{counted(len(groups), 'image')} {text}", groups)

    yield from found(
        "unreadable", (look for look in looks if look.problem is not None), "cannot be read", is_problem=True
    )
    yield from found(
        "constant", (look for look in decoded if look.contrast < LEAST_CONTRAST), "of one colour, or nearly so"
    )
    tiny = (look for look in decoded if min(look.width, look.height) < SHORTEST_SIDE)
    yield from found("tiny", tiny, f"with a side below {SHORTEST_SIDE} pixels")
    extreme = (look for look in decoded if max(look.width, look.height) > LONGEST_RATIO * min(look.width, look.height))
    yield from found("extreme", extreme, f"more than {LONGEST_RATIO} times as long as wide, or the other way round")


def _duplicates(looks: Sequence[Look], reference: Reference | None) -> Iterable[Finding]:
    """Yield groups of images that are there more than once; a group in two parts and two classes is found twice."""
    own = {id(look) for look in looks}
    parted = "" if any(look.image.part for look in looks) else "; dividing the folder can part them"
    everything = [*looks, *(reference.looks if reference is not None else ())]

    def choose(groups: Iterable[Sequence[Look]], differ: Callable[[Sequence[Look]], bool]) -> tuple[Group, ...]:
        inside = ([look for look in group if id(look) in own] for group in groups)
        return tuple(tuple(group) for group in inside if len(group) > 1 and differ(group))

    def parts_differ(group: Sequence[Look]) -> bool:
        return len({look.image.part for look in group}) > 1

    def classes_differ(group: Sequence[Look]) -> bool:
        return len({look.image.class_name for look in group}) > 1

    for prefix, groups, noun, plural in (
        ("same", same_files(everything), "image", "images"),
        ("similar", similar_images(everything), "group of similar images", "groups of similar images"),
    ):
        if reference is not None:
            yield from _shared_with(reference, prefix, groups, looks, own)
        for kind, differ, text in (
            ("in-parts", parts_differ, "in more than one part: figures on one of them are too good"),
            ("in-classes", classes_differ, "in more than one class: one of the labels is wrong"),
            (
                "repeated",
                lambda group: not (parts_differ(group) or classes_differ(group)),
                f"within one class{parted}",
            ),
        ):
            if chosen := choose(groups, differ):
                times = "repeated " if kind == "repeated" and prefix == "same" else ""
                text = f"{counted(len(chosen), noun, plural)} {times}{text}"
                yield Finding(f"{prefix}-{kind}", kind != "repeated", text, chosen)


def _shared_with(
    reference: Reference, prefix: str, groups: Sequence[Sequence[Look]], looks: Sequence[Look], own: set[int]
) -> Iterable[Finding]:
    """Yield the images that the reference has, too."""
    shared = [
        tuple(group)
        for group in groups
        if any(id(look) in own for look in group) and any(id(look) not in own for look in group)
    ]
    if prefix == "same" and reference.digests:
        at_hand = {id(look) for group in shared for look in group}
        shared += [
            (look,)
            for look in looks
            if look.digest is not None and shortened(look.digest) in reference.digests and id(look) not in at_hand
        ]
    if shared:
        count = sum(id(look) in own for group in shared for look in group)
        what = "also" if prefix == "same" else "similar to others"
        verb = "is" if count == 1 else "are"
        text = f"{counted(count, 'image')} {verb} {what} among those of {reference.name}"
        yield Finding(f"{prefix}-in-reference", True, text, tuple(shared))


def _numbers(parts: Sequence[Part]) -> Iterable[Finding]:
    """Yield what is odd about the numbers of images, and files that no command takes for images."""
    for part in parts:
        where = f"{part.name}: " if part.name else ""
        counts = Counter(file.class_name for file in part.files)
        ordered = counts.most_common()
        if ordered and ordered[0][1] >= LARGEST_IMBALANCE * ordered[-1][1]:
            (largest, most), (smallest, least) = ordered[0], ordered[-1]
            text = f"{where}{largest!r} has {most / least:.0f} times as many images as {smallest!r}"
            yield Finding("imbalance", False, f"{text} ({most:,} and {least:,})")
        few = [name for name, count in sorted(counts.items()) if count < FEWEST_IMAGES]
        if few and part is parts[0]:
            text = f"{where}fewer than {FEWEST_IMAGES} images of {name_some(few, shown_as=repr)}"
            yield Finding("few-images", False, text)
        foreign = [path for path in part.others if "/" in path]
        if foreign:
            text = f"{where}{by_suffix(foreign)} in class folders are not images: training refuses them"
            yield Finding("not-images", True, f"{text}, unless they are skipped with --on-bad-image skip")
        if loose := [path for path in part.others if "/" not in path]:
            yield Finding("other-files", False, f"{where}{by_suffix(loose)} outside the class folders, left out")
