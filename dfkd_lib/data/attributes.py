"""What is known of classes that nobody has seen: a vector of attributes per class, designed, or rated by people.

Digits have attributes designed for the smoke runs, CIFAR-100 has sixty defined by hand for this book. Ratings of
Animals with Attributes 2 are read from `<data root>/awa2`: `classes.txt` (number, name with + for a blank),
`predicates.txt` (number, name) and `predicate-matrix-continuous.txt` (50 x 85 numbers from 0 to 100, -1 where there is
none).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DamagedFile, DataUnavailable, InputError, first_line, unknown
from ..locations import data_root

_SUPERCLASSES = """
AQ aquatic_mammals: beaver dolphin otter seal whale
FI fish: aquarium_fish flatfish ray shark trout
FL flowers: orchid poppy rose sunflower tulip
CO food_containers: bottle bowl can cup plate
FR fruit_and_vegetables: apple mushroom orange pear sweet_pepper
EL household_electrical_devices: clock keyboard lamp telephone television
FU household_furniture: bed chair couch table wardrobe
IN insects: bee beetle butterfly caterpillar cockroach
CA large_carnivores: bear leopard lion tiger wolf
MO large_man-made_outdoor_things: bridge castle house road skyscraper
NO large_natural_outdoor_scenes: cloud forest mountain plain sea
HE large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo
ME medium_mammals: fox porcupine possum raccoon skunk
NI non-insect_invertebrates: crab lobster snail spider worm
PE people: baby boy girl man woman
RE reptiles: crocodile dinosaur lizard snake turtle
SM small_mammals: hamster mouse rabbit shrew squirrel
TR trees: maple_tree oak_tree palm_tree pine_tree willow_tree
V1 vehicles_1: bicycle bus motorcycle pickup_truck train
V2 vehicles_2: lawn_mower rocket streetcar tank tractor
"""
# Two capitals stand for all classes of a superclass.
_ATTRIBUTES = """
animal: AQ FI IN CA HE ME NI RE SM
mammal: AQ CA HE ME SM PE
plant: FL TR apple orange pear sweet_pepper forest plain
human: PE
man_made: CO EL FU MO V1 V2
vehicle: V1 V2
large_scene: MO NO
furry: CA ME SM beaver otter seal camel cattle chimpanzee kangaroo bee
bare_or_wet_skin: dolphin whale seal ray shark elephant worm snail PE
scales_or_shell: aquarium_fish flatfish trout crocodile dinosaur lizard snake turtle crab lobster snail beetle cockroach
four_legs: CA ME SM beaver otter camel cattle elephant crocodile lizard turtle dinosaur bed chair table couch
many_legs: IN crab lobster spider
no_legs: FI dolphin whale seal snake worm snail
two_legs_upright: PE chimpanzee kangaroo dinosaur
wings: bee butterfly beetle
fins_or_flippers: FI dolphin whale seal
long_tail: CA beaver otter cattle kangaroo fox possum raccoon skunk mouse squirrel shrew crocodile dinosaur lizard snake
big_ears: elephant rabbit fox mouse kangaroo wolf
spots: leopard caterpillar lizard ray beetle butterfly
stripes: tiger skunk raccoon bee snake aquarium_fish
predator: CA shark crocodile snake spider dolphin seal otter fox dinosaur
wheels: bicycle bus motorcycle pickup_truck train lawn_mower streetcar tractor tank
engine: V2 motorcycle bus pickup_truck train
metal: V1 V2 can keyboard bridge clock
glass_or_ceramic: bottle bowl cup plate lamp skyscraper television
wooden: TR bed chair table wardrobe forest house
screen_or_dial: clock television telephone keyboard
petals: FL
leaves_visible: TR FL forest apple pear caterpillar
edible: FR trout lobster crab
sky_background: MO NO TR rocket dinosaur
water_background: AQ FI sea bridge crab crocodile
grass_background: HE wolf lion fox rabbit plain lawn_mower tractor snail worm
street_background: bus streetcar pickup_truck motorcycle bicycle road train house
indoor_background: EL FU CO PE hamster
plain_white_background: CO EL FU FR IN lawn_mower
red: maple_tree apple poppy rose tulip sweet_pepper lobster crab bus
orange_or_yellow: orange sunflower lion tiger bee pear bus aquarium_fish leopard streetcar
green: TR caterpillar lizard crocodile turtle forest plain pear sweet_pepper tractor lawn_mower tank
blue: sea dolphin shark whale cloud ray rocket mountain
brown: beaver bear otter camel kangaroo squirrel wardrobe table mushroom cockroach cattle hamster worm flatfish
gray: elephant seal whale wolf mouse shrew possum raccoon road skyscraper castle rocket shark dolphin tank
black: skunk chimpanzee beetle spider keyboard television telephone
white: cloud rabbit plate cup bowl lamp possum
pink_or_purple: orchid tulip rose baby girl
round: FR clock plate bowl sunflower turtle snail
elongated: snake worm caterpillar train rocket bottle crocodile lizard bridge trout shrew
boxy: bus streetcar television wardrobe house can skyscraper castle keyboard
tall: skyscraper rocket palm_tree pine_tree castle bottle lamp wardrobe
tiny: IN spider worm snail mouse shrew
huge: MO NO TR elephant whale dinosaur train rocket
flat: plate flatfish ray keyboard table bed road plain sea
soft: bed couch
pointed_or_conical: pine_tree castle rocket mountain tulip pear
thorns_or_spines: rose porcupine lobster crab
wide_crown: maple_tree oak_tree
young: baby boy girl
female: girl woman
seat_or_bed: bed chair couch bicycle motorcycle
horizon_line: sea plain mountain road bridge
"""

_SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")
_STROKES = {
    "upper loop": "89", "lower loop": "68", "single big loop": "0", "long vertical": "149", "diagonal": "247",
    "curved bottom": "03568",
}  # fmt: skip
# Mean of the digits of DejaVu Sans, Serif and Sans Mono, cropped and 8 pixels high; 0 to 15 in hexadecimal.
_GLYPHS = (
    "01bba100 08708800 0d203c00 0e121d00 0e131d00 0d203c00 08708800 01bba100",
    "079d4000 012c4000 000c4000 000c4000 000c4000 000c4000 000c4000 07adca00",
    "08cbb200 06007a00 00005c00 0000a600 0006a000 004b0000 04c10300 0ddddc00",
    "07cbb200 04006a00 00006900 005ac200 00007900 00002e00 05005c00 0acbb300",
    "0001d900 0009b900 00497900 01b17900 07607900 0d99cd80 02228a10 00028b20",
    "08ddd400 08400000 08641000 0788d400 00005c00 00003d00 05007a00 0acba200",
    "008bc600 06800300 0c232000 0ea7b600 0e402d00 0d301e00 08705b00 01bbb200",
    "0cdddd00 02007700 0000c200 0003b000 00086000 000d1000 004a0000 00a40000",
    "03cbb200 0a506a00 0b405a00 03b8b200 09829800 0e101d00 0d304c00 04cbc300",
    "03bba100 0b407700 0d103c00 0c205d00 05c8ad00 00233b00 03009500 06cb8000",
)
_AWA2_OF_CIFAR100 = {
    "beaver": ("beaver",), "dolphin": ("dolphin",), "otter": ("otter",), "seal": ("seal",), "leopard": ("leopard",),
    "lion": ("lion",), "tiger": ("tiger",), "wolf": ("wolf",), "chimpanzee": ("chimpanzee",),
    "elephant": ("elephant",), "fox": ("fox",), "raccoon": ("raccoon",), "skunk": ("skunk",), "hamster": ("hamster",),
    "mouse": ("mouse",), "rabbit": ("rabbit",), "squirrel": ("squirrel",),
    "whale": ("blue whale", "humpback whale", "killer whale"), "bear": ("grizzly bear", "polar bear"),
    "cattle": ("ox", "cow"),
}  # fmt: skip
_ANIMAL_SPLITS = (
    ("beaver", "tiger", "cattle", "mouse"), ("dolphin", "wolf", "raccoon", "squirrel"),
    ("otter", "lion", "elephant", "hamster"), ("seal", "bear", "fox", "rabbit"),
    ("whale", "leopard", "chimpanzee", "skunk"),
)  # fmt: skip


@dataclass(frozen=True)
class ClassAttributes:
    """Signatures of classes.

    Attributes:
        classes: C names.
        names: of the A attributes.
        values: float32 [C, A] as they were defined, not normalised.
        groups: how many attributes belong together, if they come from several sources.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor
    groups: tuple[int, ...] = ()

    def signatures(self) -> Tensor:
        """phi, float32 [C, A] with rows of length 1: :func:`normalised` values, each group by itself."""
        parts = self.values.split(self.groups or self.values.shape[1], dim=1)
        return torch.cat([normalised(part) for part in parts], 1) / len(parts) ** 0.5

    def of(self, classes: tuple[str, ...]) -> ClassAttributes:
        """The same of some classes, in the order given.

        Raises:
            InputError: a class has no signature.
        """
        for name in classes:
            if name not in self.classes:
                raise unknown("class", name, self.classes)
        at = [self.classes.index(name) for name in classes]
        return replace(self, classes=classes, values=self.values[at])


def normalised(values: Tensor) -> Tensor:
    """Each attribute brought to mean 0 and deviation 1 over the classes, then each class to length 1: [C, A] -> [C, A].

    An attribute that all classes share says nothing and becomes 0.
    """
    centred = values - values.mean(0)
    scaled = centred / values.std(0, correction=0).clamp_min(1e-6)
    return torch.nn.functional.normalize(scaled)


def superclasses() -> dict[str, tuple[str, ...]]:
    """The twenty superclasses of CIFAR-100 with their five classes each, all in alphabetical order."""
    rows = (line[3:].split(": ") for line in _SUPERCLASSES.strip().splitlines())
    return {name: tuple(sorted(members.split())) for name, members in sorted(rows)}


def cifar100_attributes(kind: str = "super+hand80") -> ClassAttributes:
    """Attributes of the 100 classes, 0 or 1.

    Args:
        kind: "super20", the superclass, in which five siblings are one; "hand60", sixty defined by hand, in which no
            two classes are; or "super+hand80", both.

    Raises:
        InputError: another kind.
    """
    groups = superclasses()
    classes = tuple(sorted(name for members in groups.values() for name in members))
    coded = {line[:2]: groups[line[3:].split(": ")[0]] for line in _SUPERCLASSES.strip().splitlines()}
    by_hand = {}
    for line in _ATTRIBUTES.strip().splitlines():
        name, having = line.split(": ")
        by_hand[name] = {member for word in having.split() for member in coded.get(word, (word,))}
    tables: dict[str, dict[str, tuple[str, ...] | set[str]]] = {
        "super20": {**groups}, "hand60": {**by_hand}, "super+hand80": {**groups, **by_hand},
    }  # fmt: skip
    if kind not in tables:
        raise unknown("kind of attributes", kind, tables)
    values = torch.tensor([[float(c in having) for having in tables[kind].values()] for c in classes])
    return ClassAttributes(classes, tuple(tables[kind]), values)


def sibling_split(k: int = 0) -> tuple[str, ...]:
    """The twenty target classes of split A to E (k = 0, ..., 4): of superclass i, number (i + k) mod 5 of its five.

    Raises:
        InputError: k outside 0..4.
    """
    if k not in range(5):
        raise InputError(f"there are five splits, 0 to 4, not {k!r}")
    return tuple(members[(i + k) % 5] for i, members in enumerate(superclasses().values()))


def animal_split(k: int = 0) -> tuple[str, ...]:
    """The four target classes of split k of the twenty animals of :func:`cifar100_animals`: each is a target once.

    Each split has an animal of the water, a large carnivore and two others.

    Raises:
        InputError: k outside 0..4.
    """
    if k not in range(5):
        raise InputError(f"there are five splits, 0 to 4, not {k!r}")
    return _ANIMAL_SPLITS[k]


def digit_attributes(kind: str = "all") -> ClassAttributes:
    """Attributes of the ten digits.

    Args:
        kind: "7-segment", the segments that light up; "all", these and six strokes as one group, and the 64 pixels of
            printed glyphs as another.

    Raises:
        InputError: another kind.
    """
    classes = tuple("0123456789")
    segments = torch.tensor([[float(s in lit) for s in "abcdefg"] for lit in _SEGMENTS])
    names = tuple(f"segment {s}" for s in "abcdefg")
    if kind == "7-segment":
        return ClassAttributes(classes, names, segments)
    if kind != "all":
        raise unknown("kind of attributes", kind, ("7-segment", "all"))
    strokes = torch.tensor([[float(c in having) for having in _STROKES.values()] for c in classes])
    glyphs = torch.tensor([[int(p, 16) / 15 for p in glyph.replace(" ", "")] for glyph in _GLYPHS])
    names = (*names, *_STROKES, *(f"pixel {i}" for i in range(64)))
    return ClassAttributes(classes, names, torch.cat([segments, strokes, glyphs], 1), groups=(13, 64))


def awa2_attributes(folder: Path | None = None) -> ClassAttributes:
    """The 85 attributes of the 50 animals of AwA2, as people rated them, 0 to 100; missing ratings are 0.

    Args:
        folder: of the three files; `<data root>/awa2` by default.

    Raises:
        DataUnavailable: a file is not there.
        DamagedFile: the files do not fit each other.
    """
    folder = folder or data_root() / "awa2"
    words = [_lines(folder / name) for name in ("classes.txt", "predicates.txt", "predicate-matrix-continuous.txt")]
    classes, names = (tuple(" ".join(line.split()[1:]).replace("+", " ") for line in part) for part in words[:2])
    try:
        rows = [[float(number) for number in line.split()] for line in words[2]]
        values = torch.tensor(rows, dtype=torch.float32)
    except ValueError as e:
        raise DamagedFile(f"{folder}: the matrix cannot be read ({first_line(e)}); copy the files anew") from e
    if values.shape != (len(classes), len(names)):
        raise DamagedFile(
            f"{folder}: the matrix is {list(values.shape)} for {len(classes)} classes and {len(names)} attributes; "
            "copy the files anew"
        )
    return ClassAttributes(classes, names, values.clamp_min(0))


def cifar100_animals(kind: str = "awa2", folder: Path | None = None) -> ClassAttributes:
    """Attributes of the twenty classes of CIFAR-100 that are animals of AwA2.

    Args:
        kind: "awa2", as people rated them; whale, bear and cattle are means. "animals60", the sixty defined by hand.
        folder: of the ratings, as of :func:`awa2_attributes`.

    Raises:
        InputError: another kind.
        DataUnavailable, DamagedFile: as of :func:`awa2_attributes`.
    """
    classes = tuple(sorted(_AWA2_OF_CIFAR100))
    if kind == "animals60":
        return cifar100_attributes("hand60").of(classes)
    if kind != "awa2":
        raise unknown("kind of attributes", kind, ("awa2", "animals60"))
    rated = awa2_attributes(folder)
    return ClassAttributes(
        classes, rated.names, torch.stack([rated.of(_AWA2_OF_CIFAR100[name]).values.mean(0) for name in classes])
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as e:
        raise DataUnavailable(
            f"awa2: {path.name} cannot be read in {path.parent}; "
            "put the attribute files of Animals with Attributes 2 there"
        ) from e
