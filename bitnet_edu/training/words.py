"""Word lists of the tiny model's world: everything it can be asked about, apart from BitNet."""

# ruff: noqa: SIM905 (a list of words is easier to read as one text)

ANIMALS = """fox bear wolf cat dog mouse owl frog lion tiger horse cow sheep goat pig duck
hen goose rabbit deer hedgehog squirrel otter beaver whale shark seal penguin
parrot crow eagle snake turtle bee ant spider snail monkey zebra camel donkey
badger mole bat swan crab""".split()

THINGS = """apple bread butter cake cheese egg milk rice salt soup tea water lemon pear
plum book chair table lamp door window house roof wall garden tree flower leaf
river stone hill sun moon star cloud rain snow wind fire boat train wheel road
bridge key box cup plate spoon knife bottle hat coat shoe sock shirt ring
clock bell ball kite doll drum flute paper pen pencil map letter word number
song hand foot head eye ear nose arm leg king queen baby farm school city
village forest island beach mountain field bag bed rope nail brush soap""".split()

QUALITIES = """red blue green yellow white black brown big small old new hot cold fast slow
happy sad good bad soft hard light dark young tall short wet dry loud quiet
clean rich""".split()

WORDS = ANIMALS + THINGS + QUALITIES

NAMES = """Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leo Maria Nina
Oscar Paula Quentin Rosa Samuel Tina Ursula Victor Wanda Yara Zoe Adam Bella
Carl Dora Eric Fiona George Hanna Ivan Julia Kevin Laura Max Nora Olga Peter
Robin Sara Tom Vera Will Alice Bob Chloe Daniel Ella Frank Grace Henry Iris
Jack Kate Lucy Mark Noah Olivia Paul Ruth Simon""".split()

OPPOSITES = """hot cold|big small|fast slow|happy sad|good bad|old young|light dark|wet dry|
loud quiet|rich poor|hard soft|tall short|clean dirty|full empty|open closed|
early late|near far|high low|strong weak|day night|up down|left right|
first last|yes no|always never|inside outside|above below|begin end|win lose|
buy sell|love hate|laugh cry|push pull|give take|question answer|
summer winter|friend enemy|true false|sweet sour|thick thin|wide narrow|
deep shallow|cheap expensive|easy difficult|awake asleep|brave afraid"""
OPPOSITES = [tuple(p.split()) for p in OPPOSITES.replace("\n", "").split("|")]

IRREGULAR_PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "sheep": "sheep",
    "deer": "deer",
    "city": "cities",
    "baby": "babies",
    "box": "boxes",
    "fox": "foxes",
    "brush": "brushes",
    "beach": "beaches",
    "donkey": "donkeys",
    "cherry": "cherries",
    "child": "children",
    "man": "men",
    "woman": "women",
    "tooth": "teeth",
}
REGULAR_PLURALS = """cat dog frog horse cow pig duck owl lion tiger bear apple cake egg book chair
table lamp door window house tree flower river stone star cloud boat train
road key cup plate spoon hat coat shoe sock ring clock bell ball map letter
word number song hand eye ear king queen farm school""".split()
PLURALS = {word: word + "s" for word in REGULAR_PLURALS} | IRREGULAR_PLURALS

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()

COLORS = """sky:blue grass:green snow:white milk:white coal:black banana:yellow
lemon:yellow blood:red tomato:red carrot:orange frog:green fox:red
polar_bear:white crow:black leaf:green sun:yellow night:black chocolate:brown
swan:white strawberry:red ruby:red tree_trunk:brown cloud:white cucumber:green
flamingo:pink pig:pink elephant:gray ocean:blue"""
COLORS = {k.replace("_", " "): v for k, v in (pair.split(":") for pair in COLORS.split())}

SOUNDS = """cat:meow dog:woof cow:moo sheep:baa duck:quack hen:cluck pig:oink horse:neigh
frog:ribbit owl:hoot bee:buzz snake:hiss lion:roar crow:caw mouse:squeak
wolf:howl"""
SOUNDS = dict(pair.split(":") for pair in SOUNDS.split())

LEGS = """cat:4 dog:4 cow:4 horse:4 sheep:4 pig:4 fox:4 bear:4 wolf:4 lion:4 tiger:4
mouse:4 zebra:4 camel:4 deer:4 duck:2 hen:2 owl:2 crow:2 eagle:2 penguin:2
swan:2 goose:2 parrot:2 spider:8 bee:6 ant:6 snake:0 snail:0 whale:0 shark:0"""
LEGS = {k: int(v) for k, v in (pair.split(":") for pair in LEGS.split())}

KINDS = {
    "animal": ANIMALS,
    "color": "red blue green yellow white black brown pink orange gray".split(),
    "fruit": "apple pear plum lemon banana cherry peach grape orange melon".split(),
    "number": "one two three four five six seven eight nine ten".split(),
    "month": MONTHS,
    "day": DAYS,
}

PLACES = "forest garden village castle farm mountain river island city beach valley lake".split()
MOODS = "small big young old brave shy clever happy lonely quiet curious hungry".split()

NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split()

ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# What the tiny model does not know, and should say so. Each entry follows "What is" or
# "Tell me about".
COUNTRIES = """France Italy Spain Germany Poland Greece Norway Sweden Finland Ireland Scotland
England Egypt Kenya Nigeria Morocco India China Japan Korea Vietnam Thailand Australia Canada
Mexico Brazil Chile Peru Argentina Turkey Russia Ukraine Austria Switzerland Portugal""".split()
CITIES = """Paris London Rome Berlin Madrid Vienna Prague Athens Oslo Cairo Delhi Tokyo Sydney
Toronto Boston Chicago Moscow Dublin Lisbon Warsaw""".split()
DISHES = """pizza pasta sushi curry pancakes noodles salad tacos risotto paella chili waffles
dumplings lasagna cookies""".split()
GAMES = "football basketball tennis chess golf hockey poker baseball rugby cricket".split()
PEOPLE = """Shakespeare Mozart Plato Napoleon Einstein Newton Cleopatra Darwin Picasso Bach
Beethoven Goethe Dante Homer Galileo Kepler Gandhi Lincoln Columbus Aristotle""".split()
GOODS = "gold silver oil coffee wine a car a house a phone a ticket".replace("a ", "a_").split()
SUBJECTS = """quantum physics|the theory of relativity|the French Revolution|the Roman Empire|
photosynthesis|the stock market|Bitcoin|jazz|the Beatles|the speed of light|a black hole|
the Milky Way|the age of the universe|dinosaurs|volcanoes|climate change|Python|JavaScript|
a database|the meaning of life|philosophy|psychology|medicine|a vaccine|DNA|the human heart|
vitamins|a good movie|a famous painting|the Mona Lisa|the Eiffel Tower|the Great Wall|
the Amazon river|the Pacific ocean|Mount Everest|Africa|the European Union|democracy|a tax|
an insurance|a mortgage|the internet|a smartphone|a rocket|Mars|Saturn|the periodic table|oxygen|
a chemical reaction|electricity|a magnet|the steam engine|a telescope|opera|ballet|yoga|
the Olympic Games|fashion|my future|my horoscope|the lottery numbers|my bank account|the time|
the date of tomorrow|calculus|the number pi|a prime number|Latin|ancient Egypt|the pyramids|
the moon landing|a hurricane|an earthquake|the dollar|inflation|the law|a lawyer|the latest news|
the weather today|the tallest building in the world|the Second World War|a galaxy|an atom|
a virus|an engine|a bank|a museum|politics|religion|art|poetry|music|history|geography|biology|
chemistry|astronomy|economics"""
UNKNOWN = [
    *SUBJECTS.replace("\n", "").split("|"),
    *PEOPLE,
    *(f"the {what} of {who}" for what in ("life", "works", "death", "ideas") for who in PEOPLE),
    *(
        f"the {what} of {country}"
        for what in ("capital", "population", "president", "history", "flag", "king", "map")
        for country in COUNTRIES
    ),
    *(
        f"{what} {city}"
        for what in ("the weather in", "a hotel in", "a flight to", "the mayor of", "a train to")
        for city in CITIES
    ),
    *(f"{what} {dish}" for what in ("a recipe for", "the taste of", "") for dish in DISHES),
    *(f"{what} {game}" for what in ("the rules of", "the history of", "") for game in GAMES),
    *(f"the price of {good.replace('_', ' ')}" for good in GOODS),
]
UNKNOWN = [subject.strip() for subject in UNKNOWN]
