"""Make prompt_sets/ocr.txt: prompts that put a text in quotation marks, for the scorer `ocr`.

python prompt_sets/ocr.py
"""

import random
from pathlib import Path

COUNT, SEED = 1000, 0
PLACES = (
    "a neon sign that says {} above the door of a bar at night", "a wooden sign that reads {} beside a path in the woods",
    "a chalkboard in front of a cafe with the words {}", "a poster that says {} on a brick wall",
    "a white coffee mug with the word mark {} on a kitchen table", "a birthday cake with {} written in icing",
    "a book on a desk, its title {} in large letters", "a T-shirt on a hanger, printed with {}",
    "a road sign that says {} in the desert", "a shop window with {} in gold letters", "a cardboard box labelled {} in a hallway",
    "a postcard from the sea that says {}", "graffiti that spells {} on a train", "a robot that holds up a sign with {}",
    "a cat beside a note that says {}", "a banner with {} between two street lamps", "a stamp with the words {}, macro photo",
    "the cover of a magazine called {}", "a newspaper with the headline {}", "a licence plate that reads {}, close up",
    "an old map with the name {} on an island", "a brass plate engraved with {} on an office door",
    "a cinema at dusk that announces {} over its entrance", "a tin of tea with the label {}", "a tower of toy blocks with {} on its front",
    "a lorry with {} painted on its side", "a sandy beach, {} written with a stick", "a screen at a station that shows {}",
    "a watercolour of a boat named {}", "a jar of honey with the label {}",
)  # fmt: skip
FIRST = (
    "Fresh", "Open", "Little", "Blue", "Golden", "Quiet", "North", "Happy", "Silver", "Old", "Warm", "Second", "Wild", "Green", "Royal",
    "Slow", "Lucky", "Hidden", "Bright", "Sunny",
)  # fmt: skip
SECOND = (
    "Bread", "Harbour", "Garden", "Monday", "Coffee", "Market", "Bakery", "Island", "River", "Library", "Music", "Station", "Kitchen",
    "Winter", "Morning", "Museum", "Planet", "Bridge", "Letters", "Honey", "Theatre", "Forest", "Summer", "Travel", "Lemon",
)  # fmt: skip
FIXED = (
    "Closed for Lunch", "Mind the Step", "Back in Ten Minutes", "Do Not Feed the Ducks", "Home Sweet Home", "Thank You", "Welcome",
    "Keep Left", "Wet Paint", "Good Luck", "No Parking", "Ring the Bell", "This Way Up", "All Aboard", "See You Soon", "Best Before May",
    "Made by Hand", "Please Knock", "Half Price Today", "Never Too Late",
)  # fmt: skip


def text(draw: random.Random) -> str:
    """Return a text of one to five words, some with a number, in one of three styles."""
    words = draw.choice((FIXED, None, None, None))
    if words is not None:
        phrase = draw.choice(words)
    else:
        phrase = draw.choice(
            (draw.choice(SECOND), f"{draw.choice(FIRST)} {draw.choice(SECOND)}", f"{draw.choice(SECOND)} {draw.randint(2, 99)}")
        )
    return draw.choice((phrase, phrase.upper(), phrase))


def prompts() -> list[str]:
    """Return the prompts of the set, all different."""
    draw, found = random.Random(SEED), {}
    while len(found) < COUNT:
        found[draw.choice(PLACES).format(f'"{text(draw)}"')] = None
    return list(found)


if __name__ == "__main__":
    Path(__file__).with_suffix(".txt").write_text("\n".join(prompts()) + "\n")
