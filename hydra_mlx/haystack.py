"""Text to hide things in: neutral sentences, made from a seed or taken from files.

Everything here depends on the random.Random that is passed in and on nothing else.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import UsageError
from .text import decode, first_line

PEOPLE = (
    "the baker|a retired teacher|the younger sister|an old sailor|the librarian|two gardeners|"
    "the night watchman|a travelling musician|the mayor's assistant|our neighbour|"
    "the postal clerk|a quiet student|the stonemason|three cousins|the innkeeper|"
    "a visiting engineer|the ferryman|an apprentice carpenter|the weaver|a young doctor"
).split("|")
DEEDS = (
    "repaired the wooden fence|carried a basket of apples|wrote a long letter|waited for the bus|"
    "painted the kitchen wall|looked for a lost glove|swept the stone steps|read the newspaper|"
    "planted a row of beans|counted the passing carts|mended an old umbrella|made a pot of tea|"
    "moved the heavy table|listened to the radio|borrowed a ladder|folded the clean sheets|"
    "sharpened the garden tools|talked about the harvest|sorted a box of buttons|fed the ducks|"
    "hung a lamp above the door|drew a map of the coast|tuned the upright piano|baked rye bread"
).split("|")
PLACES = (
    "near the market|beside the river|behind the school|at the edge of the forest|in the courtyard|"
    "on the far side of the hill|by the railway station|under the chestnut tree|in the back room|"
    "close to the harbour|along the canal|opposite the town hall|at the top of the stairs|"
    "outside the chapel|across the street|in the small workshop"
).split("|")
TIMES = (
    "in the early morning|before supper|after the rain had stopped|on a warm afternoon|"
    "while the bells were ringing|as the fog lifted|late in the autumn|without any hurry|"
    "during the holidays|before anyone else was awake|until the lamps were lit|as usual|"
    "shortly after lunch|when the wind turned|on the way home|for the second time that week"
).split("|")
FACTS = (
    "the road was dry and easy to walk|nobody seemed to be in a hurry|the windows stood open|"
    "the air smelled of cut grass|a dog slept in the shade|the shop had closed already|"
    "the water was calm and grey|the children had gone indoors|a light breeze came from the sea|"
    "the clouds moved slowly to the east|the old clock was a little late|the path led downhill|"
    "there was still some bread on the table|the leaves had begun to turn|the bridge was empty|"
    "the music could be heard from far away"
).split("|")
ADJECTIVES = (
    "amber bitter crimson distant eager fragile gentle hollow ivory jolly keen lunar mellow noble "
    "olive polished quiet rustic silver tender upbeat velvet wandering yellow"
).split()
NOUNS = (
    "falcon harbor lantern meadow orchid pebble quarry raven saddle temple violin walnut anchor "
    "basket candle dragon engine forest garden hammer island jacket kettle ladder"
).split()
WORDS = (
    "copper marble cotton pepper ginger butter carbon salmon cherry lemon garlic honey "
    "timber velvet bronze crystal paper leather rubber silk linen amber maple cedar "
    "tiger eagle rabbit monkey turtle spider parrot beaver donkey lizard"
).split()
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"


def made_sentences(rng: random.Random) -> Iterator[str]:
    """Endless neutral sentences without figures, of several shapes, never twice in a row alike."""
    last = ""
    while True:
        who, deed, place = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(PLACES)
        time, fact = rng.choice(TIMES), rng.choice(FACTS)
        sentence = rng.choice(
            (
                f"{who} {deed} {place} {time}",
                f"{time}, {who} {deed} {place}",
                f"{place} {fact}, and {who} {deed}",
                f"{who} {deed} {time}, and {fact}",
                f"{fact} {time}, so {who} {deed} {place}",
            )
        )
        if sentence != last:
            last = sentence
            yield sentence[0].upper() + sentence[1:] + "."


def file_sentences(files: Sequence) -> list:
    """The sentences of text files, blank space in each reduced to single spaces.

    Raises:
        UsageError: A file cannot be read, or there is no sentence in them.
    """
    texts = []
    for name in files:
        try:
            texts.append(decode(Path(name).expanduser().read_bytes(), name))
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or first_line(e)
            raise UsageError(f"The haystack file {name!r} cannot be read ({why}).") from None
    text = " ".join(texts)
    found = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
    if not found:
        raise UsageError(
            "The haystack files hold no text.", "Leave --haystack out, or give others."
        )
    return found


def digest(source: Sequence | None) -> str | None:
    """SHA-256 of sentences from files, hex; None for made ones."""
    return hashlib.sha256("\n".join(source).encode()).hexdigest() if source else None


def sentences(rng: random.Random, source: Sequence | None = None) -> Iterator[str]:
    """Endless sentences: made ones, or those of `source` in order from a random one on."""
    if not source:
        yield from made_sentences(rng)
        return
    at = rng.randrange(len(source))
    while True:
        yield source[at % len(source)]
        at += 1


def keys(rng: random.Random, count: int) -> list:
    """`count` different two-word names.

    Raises:
        UsageError: More than there are.
    """
    if count > len(ADJECTIVES) * len(NOUNS):
        raise UsageError(f"{count} keys are asked for; there are {len(ADJECTIVES) * len(NOUNS)}.")
    return [
        f"{ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}"
        for i in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    ]


def answer(rng: random.Random, kind: str, digits: int = 7, unlike: str = "") -> str:
    """A random answer: "digits", "letters" or "word".

    Args:
        unlike: An answer of the same kind from which it must differ in every character (a word:
            as a whole).
    """
    if kind == "word":
        return rng.choice([w for w in WORDS if w != unlike])
    alphabet, n = ("0123456789", digits) if kind == "digits" else (LETTERS, 5)
    out = ""
    for i in range(n):
        taken = unlike[i : i + 1]
        first = "0" if kind == "digits" and i == 0 else ""  # a leading zero may get lost
        out += rng.choice([c for c in alphabet if c not in (taken, first)])
    return out
