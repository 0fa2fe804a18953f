"""The words a scene is made of: nouns with their drawings' names, colours, sizes.

It knows names only; no pixels (artwork.py, render.py) and no sentences (language.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """One thing that can be drawn, its plural, and the names artists give the drawing."""

    name: str
    plural: str
    icons: tuple[str, ...]


# "noun[/plural]=icon[,icon…]"; without "=", the icon is called like the noun.
_NOUNS = """
airplane ambulance/ambulances anchor apple=red-apple,redapple banana bear
bee=honeybee bicycle bird=bird,front-facing-baby-chick boat=sailboat bomb
book=open-book,openbook bus/buses butterfly/butterflies cactus/cactuses
cake=birthday-cake,birthdaycake camel=camel,two-hump-camel,bactriancamel camera car=automobile
carrot castle=castle,europeancastle cat=cat-face,cat cherry/cherries=cherries
clock=alarm-clock,alarmclock cloud crab crown
dog=dog-face,dog door dress/dresses duck elephant envelope fish/fish=tropical-fish,tropicalfish
flower=tulip fox/foxes frog ghost guitar hammer
hat=top-hat,tophat helicopter horse=horse-face,horseface key leaf/leaves=maple-leaf,mapleleaf
lemon lion lock=locked moon=crescent-moon,crescentmoon mushroom octopus/octopuses owl
panda=panda,pandaface pencil penguin piano=musical-keyboard,musicalkeyboard pig=pig-face,pig
pineapple
pizza=pizza,sliceofpizza rabbit=rabbit-face,bunny rocket rose
saxophone shark shirt=t-shirt shoe=running-shoe snail snake
snowman/snowmen=snowman-without-snow,snowmanwithoutsnow spider star strawberry/strawberries
sun=sun-with-face,sunwithface television tiger=tiger-face,tiger
train=locomotive,steamlocomotive tree=deciduous-tree,deciduoustree trophy/trophies trumpet
truck=delivery-truck,deliverytruck turtle umbrella=umbrella-with-rain-drops,umbrellawithraindrops
violin watch/watches watermelon whale=spouting-whale,spurtingwhale
"""


def _parse(entry: str) -> Noun:
    word, _, icons = entry.partition("=")
    name, _, plural = word.partition("/")
    return Noun(name, plural or name + "s", tuple(icons.split(",")) if icons else (name,))


NOUNS: tuple[Noun, ...] = tuple(_parse(entry) for entry in _NOUNS.split())

# The colour of the disc behind a drawing.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 46, 48),
    "orange": (243, 140, 28),
    "yellow": (250, 219, 62),
    "green": (58, 168, 74),
    "blue": (48, 98, 218),
    "purple": (136, 62, 186),
    "white": (247, 247, 247),
    "black": (28, 28, 30),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)

SIZES: tuple[str, ...] = ("small", "large")
# Diameters of the disc in pixels, lowest and highest.
DIAMETERS: dict[str, tuple[float, float]] = {"small": (34.0, 38.0), "large": (50.0, 56.0)}

WIDTH, HEIGHT = 224, 168
MOST_OBJECTS = 4

TRAIN_ARTISTS: tuple[str, ...] = ("noto", "twemoji", "fluent", "noto-v1", "emojione", "fxemoji")
HELD_ARTIST = "openmoji"
ARTISTS: tuple[str, ...] = (*TRAIN_ARTISTS, HELD_ARTIST)


def with_article(word: str) -> str:
    """`cat` → `a cat`, `airplane` → `an airplane`."""
    return ("an " if word[0] in "aeiou" else "a ") + word
