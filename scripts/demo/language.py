"""What is said about a scene: one wording for every caption, question and answer.

All of it is a plain function of the scene's words (noun, colour, size, row, order); no pixels.
"""

import json
import random

from demo.scenes import Object, Scene
from demo.vocabulary import COLOUR_NAMES, NOUNS, SIZES, with_article

CAPTION = "Describe this image."
CAPTION_VARIANTS = (
    "Describe the image.",
    "What is in this image?",
    "What do you see?",
    "Describe this picture.",
)
OBJECTS = "List the objects as JSON."
CATEGORIES = ("caption", "objects", "count", "exists", "side", "colour", "size", "place", "which")
QUESTION_KINDS = CATEGORIES[2:]


def name(thing: Object) -> str:
    """`cat`."""
    return NOUNS[thing.noun].name


def phrase(thing: Object) -> str:
    """`a small cat on a red disc`."""
    return (
        f"a {SIZES[thing.large]} {name(thing)} on {with_article(COLOUR_NAMES[thing.colour])} disc"
    )


def sentence(text: str) -> str:
    """With a capital at the start and a full stop at the end."""
    return text[0].upper() + text[1:] + "."


def caption(scene: Scene) -> str:
    """The one sentence that describes the scene."""
    things = [phrase(thing) for thing in scene.objects]
    if not things:
        return "No objects."
    if len(things) == 1:
        thing = scene.objects[0]
        return sentence(f"{things[0]} at the {thing.row} {half(thing)}")
    if len(things) == 2:
        return sentence(f"{things[0]} is to the left of {things[1]}")
    return sentence(f"from left to right, {', '.join(things[:-1])} and {things[-1]}")


def half(thing: Object) -> str:
    """`left` or `right`; only one object alone is asked this."""
    return "left" if thing.x < 112 else "right"


def objects(scene: Scene) -> str:
    """The objects from left to right as JSON."""
    rows = [
        {"object": name(t), "color": COLOUR_NAMES[t.colour], "size": SIZES[t.large]}
        for t in scene.objects
    ]
    return json.dumps(rows)


def _once(scene: Scene) -> list[int]:
    """Positions of the objects whose noun appears once."""
    nouns = [thing.noun for thing in scene.objects]
    return [i for i, noun in enumerate(nouns) if nouns.count(noun) == 1]


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.35 or not scene.objects:
        return "How many objects are there?", str(len(scene.objects))
    if draw < 0.6:
        there = rng.random() < 0.75
        colour = rng.choice(scene.objects).colour if there else rng.randrange(len(COLOUR_NAMES))
        count = sum(thing.colour == colour for thing in scene.objects)
        return f"How many {COLOUR_NAMES[colour]} discs are there?", str(count)
    noun = rng.choice(scene.objects).noun if rng.random() < 0.8 else rng.randrange(len(NOUNS))
    return f"How many {NOUNS[noun].plural} are there?", str(
        sum(thing.noun == noun for thing in scene.objects)
    )


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    there = {thing.noun for thing in scene.objects}
    noun = (
        rng.choice(scene.objects).noun
        if there and rng.random() < 0.5
        else rng.randrange(len(NOUNS))
    )
    return f"Is there {with_article(NOUNS[noun].name)}?", "Yes." if noun in there else "No."


def _side(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    once = _once(scene)
    if not once:
        return None
    i, left = rng.choice(once), rng.random() < 0.5
    other = i - 1 if left else i + 1
    answer = "Nothing."
    if 0 <= other < len(scene.objects):
        answer = sentence(with_article(name(scene.objects[other])))
    return f"What is just {'left' if left else 'right'} of the {name(scene.objects[i])}?", answer


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    once = _once(scene)
    if not once:
        return None
    thing = scene.objects[rng.choice(once)]
    return f"What color is the disc behind the {name(thing)}?", sentence(COLOUR_NAMES[thing.colour])


def _size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    once = _once(scene)
    if not once:
        return None
    thing = scene.objects[rng.choice(once)]
    return f"Is the {name(thing)} small or large?", sentence(SIZES[thing.large])


def _place(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    once = _once(scene)
    if not once:
        return None
    thing = scene.objects[rng.choice(once)]
    return f"Is the {name(thing)} at the top or at the bottom?", f"At the {thing.row}."


def _which(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    colours = [thing.colour for thing in scene.objects]
    once = [thing for thing in scene.objects if colours.count(thing.colour) == 1]
    if not once:
        return None
    thing = rng.choice(once)
    return f"What is on the {COLOUR_NAMES[thing.colour]} disc?", sentence(with_article(name(thing)))


_ASK = {
    "count": _count,
    "exists": _exists,
    "side": _side,
    "colour": _colour,
    "size": _size,
    "place": _place,
    "which": _which,
}


def question(scene: Scene, rng: random.Random, kind: str) -> tuple[str, str, str]:
    """(kind, question, answer); another kind when the scene cannot be asked this one."""
    asked = _ASK[kind](scene, rng)
    if asked is None:
        kind, asked = "count", _count(scene, rng)
    return kind, *asked
