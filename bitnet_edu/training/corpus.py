"""The tiny model's corpus, made by this file alone: seeded, in our own sentences.

A `Question` knows the keys of its right answer, so answers can be marked by a machine. Whether a
question may be trained on is decided by a hash of what it asks (`is_held_out`), never by chance:
the two sides are disjoint whatever the seed. For sums the hash sees the two numbers, for letter
tasks the task and the word, for facts the wording of the question, for stories the animal and the
place.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from bitnet_edu.training import words
from bitnet_edu.training.facts import FACTS

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Question:
    """One user message with its answer.

    `identity` is what the hold-out hash sees. `keys` must all occur in a right answer; `history`
    holds the messages before it.
    """

    category: str
    identity: str
    prompt: str
    answer: str
    keys: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    min_words: int = 0

    def messages(self) -> list[Message]:
        pairs = [*self.history, ("user", self.prompt)]
        return [{"role": role, "content": content} for role, content in pairs]


HELD_OUT_ONE_IN = 12


def is_held_out(question: Question) -> bool:
    """True for about one question in twelve: these are never trained on."""
    digest = hashlib.sha256(f"{question.category}|{question.identity}".encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def is_right(question: Question, reply: str) -> bool:
    """True if every key is in `reply` as whole words, and the reply is long enough (stories)."""
    found = all(
        re.search(rf"(?<!\w){re.escape(key)}(?!\w)", reply, re.IGNORECASE) for key in question.keys
    )
    return found and len(reply.split()) >= question.min_words


# ---------------------------------------------------------------- how people ask


def normalize(text: str) -> str:
    """Lower case, letters, digits and signs only: two spellings of one question become equal."""
    return " ".join(re.findall(r"[a-z0-9+*-]+", text.lower()))


def vary(rng: random.Random, text: str) -> str:
    """The same question as a hurried or a polite person would type it."""
    chance = rng.random()
    if chance < 0.06:
        text = rng.choice(("Hi! ", "Hello! ", "Hey! ", "Please tell me: ", "OK. ")) + text
    elif chance < 0.10 and text[-1] in "?.":
        text = text[:-1] + ", please" + text[-1]
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.10:
        text = text.rstrip("?.!")
    return text


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


# ---------------------------------------------------------------- facts

NOUN_TEMPLATES = (
    "Explain {}.",
    "Tell me about {}.",
    "Can you explain {}?",
    "Please explain {} to me.",
    "I do not understand {}.",
    "What do you know about {}?",
    "Describe {}.",
    "Define {}.",
    "Help me understand {}.",
    "How would you explain {} to a child?",
    "What is meant by {}?",
    "Could you tell me about {}?",
    "I want to learn about {}.",
)
CLAUSE_TEMPLATES = (
    "Tell me {}.",
    "Can you tell me {}?",
    "Do you know {}?",
    "I want to know {}.",
    "Could you explain {}?",
    "Please tell me {}.",
    "I wonder {}.",
    "Explain {}.",
    "Explain to me {}.",
    "I would like to know {}.",
)


def bare(noun: str) -> str:
    return re.sub(r"^(a|an|the) ", "", noun)


def fact(rng: random.Random) -> Question:
    known = rng.choice(FACTS)
    forms = [known.direct, *known.extra, *(t.format(known.indirect) for t in CLAUSE_TEMPLATES)]
    if known.noun:
        forms += [t.format(known.noun) for t in NOUN_TEMPLATES]
        forms += [
            f"What does {bare(known.noun)} mean?",
            f"What does the word {bare(known.noun)} mean?",
        ]
        forms += [f"{bare(known.noun)[0].upper()}{bare(known.noun)[1:]}?"]
    prompt = rng.choice(forms)
    return Question(
        "facts", normalize(prompt), vary(rng, prompt), rng.choice(known.answers), known.keys
    )


UNKNOWN_TEMPLATES = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {}.",
    "What do you know about {}?",
    "Can you explain {}?",
    "Can you help me with {}?",
    "I want to learn about {}.",
)
UNKNOWN_ANSWERS = (
    "I am sorry, I do not know that. I only know a small world.",
    "That is outside of my small world, sorry. Ask me about BitNet, words or small sums.",
)


def made_up_word(rng: random.Random) -> str:
    """A word that nobody knows, of two or three syllables."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def unknown(rng: random.Random) -> Question:
    subject = rng.choice(words.UNKNOWN) if rng.random() < 0.7 else a(made_up_word(rng))
    prompt = rng.choice(UNKNOWN_TEMPLATES).format(subject)
    answer = rng.choice(UNKNOWN_ANSWERS)
    return Question("unknown", normalize(subject), vary(rng, prompt), answer, ("small world",))


# ---------------------------------------------------------------- small talk

# (openings, endings, answers, keys): a question is one opening and one ending.
SMALL_TALK = (
    (
        (
            "Hello",
            "Hi",
            "Hey",
            "Good morning",
            "Good evening",
            "Hi there",
            "Hello there",
            "Good day",
        ),
        ("!", ".", "", ", Tiny!", " Tiny", " my friend!", ", nice to meet you!", ", little model!"),
        ("Hello! How can I help you?", "Hello! What would you like to know?"),
        ("hello",),
    ),
    (
        ("How are you", "How do you do", "How do you feel", "How is it going", "Are you well"),
        ("?", " today?", ", Tiny?", " this morning?", ", my friend?", " now?"),
        ("I am fine, thank you. How are you?", "I am fine, thanks for asking!"),
        ("i am fine",),
    ),
    (
        (
            "What is your name",
            "Who are you",
            "Tell me your name",
            "What are you called",
            "Who is this",
        ),
        ("?", ", please?", ", my friend?", ", little model?", " again?", " by the way?"),
        (
            "I am Tiny, a small BitNet with ternary weights.",
            "My name is Tiny. I am a very small BitNet.",
        ),
        ("tiny", "small bitnet"),
    ),
    (
        ("What can you do", "How can you help me", "What do you know", "What can I ask you"),
        ("?", " today?", ", Tiny?", ", please?", " now?", ", my friend?"),
        (
            "I can explain BitNet, add small numbers, play with words and tell short stories.",
            "I can tell stories, do small sums, play with words and talk about BitNet.",
        ),
        ("bitnet", "stories"),
    ),
    (
        (
            "Thank you",
            "Thanks",
            "Thanks a lot",
            "Thank you very much",
            "Many thanks",
            "Great, thanks",
        ),
        (
            "!",
            ".",
            "",
            ", Tiny!",
            " for your help!",
            ", my friend!",
            " for the answer.",
            " for that.",
        ),
        ("You are welcome!", "You are welcome. Ask me more if you like."),
        ("welcome",),
    ),
    (
        (
            "Goodbye",
            "Bye",
            "Bye bye",
            "See you",
            "See you soon",
            "Good night",
            "I have to go",
            "Farewell",
        ),
        ("!", ".", "", ", Tiny!", ", my friend!", " now.", ", little model!", " and take care!"),
        ("Goodbye! It was nice to talk to you.", "Goodbye! Come back soon."),
        ("goodbye",),
    ),
    (
        ("Tell me a joke", "Do you know a joke", "Make me laugh", "Say something funny", "A joke"),
        (".", "!", ", please.", ", Tiny!", " now.", "?", ", my friend!"),
        (
            "Why was the weight so calm? It had only three moods: minus one, zero and plus one.",
            "What did the zero weight say to the input? Nothing at all.",
        ),
        ("weight",),
    ),
    (
        ("How old are you", "What is your age", "When were you born", "When were you made"),
        ("?", ", Tiny?", ", please?", ", my friend?", " by the way?"),
        ("I am very young. I was trained a short time ago.",),
        ("young",),
    ),
    (
        ("Are you a human", "Are you a robot", "Are you a person", "Are you real", "Are you alive"),
        ("?", ", Tiny?", " or not?", ", my friend?", " by the way?"),
        ("I am a computer program: a small language model.",),
        ("program",),
    ),
    (
        (
            "How big are you",
            "How large are you",
            "How many layers do you have",
            "How small are you",
        ),
        ("?", ", Tiny?", ", my friend?", " by the way?", ", little model?"),
        ("I have six layers and about five million parameters.",),
        ("six layers",),
    ),
    (
        ("Do you like BitNet", "Do you like books", "Do you like stories", "Do you like numbers"),
        ("?", ", Tiny?", ", my friend?", " too?", " very much?"),
        ("Yes, I like it very much.", "Yes, of course I do."),
        ("yes",),
    ),
    (
        (
            "You are great",
            "You are nice",
            "You are smart",
            "Well done",
            "Good job",
            "That is right",
        ),
        ("!", ".", ", Tiny!", ", my friend!", ", thank you!", ", little model!"),
        ("Thank you! That is kind of you.",),
        ("thank you",),
    ),
    (
        ("That is wrong", "This is not right", "You are wrong", "You made a mistake", "No, wrong"),
        ("!", ".", ", Tiny.", ", my friend.", ", sorry.", " again."),
        ("I am sorry. I am small and I make mistakes.",),
        ("sorry",),
    ),
)


def small_talk(rng: random.Random) -> Question:
    openings, endings, answers, keys = rng.choice(SMALL_TALK)
    opening, ending = rng.choice(openings), rng.choice(endings)
    identity = normalize(opening + ending)
    prompt = opening + ending
    if rng.random() < 0.15:
        prompt = prompt.lower()
    return Question("small talk", identity, prompt, rng.choice(answers), keys)


# ---------------------------------------------------------------- numbers

ADD = ("What is {} + {}?", "{} + {} =", "How much is {} plus {}?", "Add {} and {}.", "{} + {}?")
SUBTRACT = ("What is {} - {}?", "{} - {} =", "How much is {} minus {}?", "{} - {}?")
MULTIPLY = ("What is {} * {}?", "{} * {} =", "How much is {} times {}?", "Multiply {} by {}.")
OPENERS = ("", "", "", "", "And ", "Now: ", "Calculate: ", "Quick: ")


def arithmetic(rng: random.Random) -> Question:
    """Sums up to 100, differences of numbers up to 100, products up to 10 * 10.

    Sums of digits and products are tables to be known by heart: there the wording is held out. Of
    larger sums and differences the numbers are.
    """
    sign = rng.choice("++--*")
    if sign == "+":
        total = rng.randint(0, rng.choice((20, 100, 100)))
        x = rng.randint(0, total)
        y, result, forms = total - x, total, ADD
        identity = f"{min(x, y)}+{max(x, y)}"
    elif sign == "-":
        x = rng.randint(0, rng.choice((20, 100, 100)))
        y = rng.randint(0, x)
        result, forms, identity = x - y, SUBTRACT, f"{x}-{y}"
    else:
        x, y = rng.randint(0, 10), rng.randint(0, 10)
        result, forms, identity = x * y, MULTIPLY, f"{x}*{y}"
    opener, form = rng.choice(OPENERS), rng.choice(forms)
    prompt = opener + (form[0].lower() + form[1:] if opener else form).format(x, y)
    answer = f"{x} {sign} {y} = {result}."
    if sign == "*" or (sign == "+" and max(x, y) < 10) or (sign == "-" and max(y, result) < 10):
        identity = normalize(prompt)
    return Question("arithmetic", identity, vary(rng, prompt), answer, (f"= {result}",))


def numbers(rng: random.Random) -> Question:
    """Next, previous, larger, smaller, even or odd."""
    task = rng.choice(("next", "previous", "larger", "smaller", "even"))
    x = rng.randint(1, 199 if task in ("next", "previous") else 99)
    y = rng.choice([n for n in range(100) if n != x])
    if task == "next":
        forms = (
            "What comes after {}?",
            "Which number follows {}?",
            "What is the next number after {}?",
        )
        answer, key = f"After {x} comes {x + 1}.", f"comes {x + 1}"
    elif task == "previous":
        forms = ("What comes before {}?", "Which number is just before {}?")
        answer, key = f"Before {x} comes {x - 1}.", f"comes {x - 1}"
    elif task == "larger":
        forms = ("Which is larger, {} or {}?", "Which number is bigger: {} or {}?")
        answer, key = f"{max(x, y)} is larger than {min(x, y)}.", f"{max(x, y)} is larger"
    elif task == "smaller":
        forms = ("Which is smaller, {} or {}?", "Which number is less: {} or {}?")
        answer, key = f"{min(x, y)} is smaller than {max(x, y)}.", f"{min(x, y)} is smaller"
    else:
        forms = ("Is {} even or odd?", "Is the number {} odd or even?")
        answer, key = f"{x} is {'odd' if x % 2 else 'even'}.", f"is {'odd' if x % 2 else 'even'}"
    identity = f"{task} {x} {y}" if task in ("larger", "smaller") else f"{task} {x}"
    prompt = rng.choice(forms).format(x, y)
    return Question("numbers", identity, vary(rng, prompt), answer, (key,))


# ---------------------------------------------------------------- words


def letters(rng: random.Random) -> Question:
    """First and last letter, spelling, length, the alphabet, repeating, copying."""
    word = rng.choice(words.WORDS)
    task = rng.choice(("first", "last", "spell", "count", "repeat", "alphabet", "copy"))
    identity, spelled = f"{task} {word}", " ".join(word)
    # The model sees tokens, not letters: it has to spell a word before it can look at its letters.
    if task == "first":
        forms = ("What is the first letter of {}?", "Which letter does {} start with?")
        answer, key = f"{spelled} starts with {word[0]}.", f"starts with {word[0]}"
    elif task == "last":
        forms = ("What is the last letter of {}?", "Which letter does {} end with?")
        answer, key = f"{spelled} ends with {word[-1]}.", f"ends with {word[-1]}"
    elif task == "spell":
        forms = ("Spell {}.", "Spell the word {}.", "How do you spell {}?", "Can you spell {}?")
        answer = key = spelled
    elif task == "count":
        forms = ("How many letters are in {}?", "How many letters does {} have?", "How long is {}?")
        answer, key = f"{spelled} has {len(word)} letters.", f"{len(word)} letters"
    elif task == "repeat":
        times = rng.choice((2, 3, 4))
        forms = ("Repeat {} {} times.", "Say {} {} times.", "Write {} {} times.")
        forms = tuple(form.format("{}", words.NUMBER_WORDS[times]) for form in forms)
        answer = key = " ".join([word] * times)
        identity = f"repeat {word} {times}"
    elif task == "alphabet":
        index = rng.randrange(25)
        word, following = words.ALPHABET[index : index + 2]
        forms = ("Which letter comes after {}?", "What is the letter after {}?", "After {} comes?")
        forms += ("Which letter follows {}?", "Tell me the letter after {}.", "Next letter: {}")
        answer, key = f"After {word} comes {following}.", f"comes {following}"
        identity = ""
    else:
        some = rng.sample(words.WORDS, rng.choice((1, 2, 2, 3)))
        word = " ".join(some)
        forms = ("Say: {}.", "Repeat after me: {}.", "Write the words: {}.", "Say this: {}")
        answer = key = word
        identity = f"copy {word}"
    prompt = rng.choice(forms).format(word)
    identity = identity or normalize(prompt)
    return Question("letters", identity, vary(rng, prompt), answer, (key,))


OPPOSITE = ("What is the opposite of {}?", "Tell me the opposite of {}.", "Opposite of {}?")
OPPOSITE += ("What is the reverse of {}?", "Which word means the opposite of {}?", "Not {} but?")
PLURAL = ("What is the plural of {}?", "Tell me the plural of {}.", "One {}, two?", "Plural of {}?")
PLURAL += ("How do you say more than one {}?", "There is one {}. Now there are two?")
SOUND = ("What does {} say?", "Which sound does {} make?", "What sound does {} make?")
SOUND += ("How does {} sound?", "Tell me the sound of {}.")
LEG = ("How many legs does {} have?", "Tell me how many legs {} has.", "Count the legs of {}.")
LEG += ("Do you know how many legs {} has?", "How many legs are on {}?")
COLOR = ("What color is {}?", "Which color does {} have?", "Tell me the color of {}.")
COLOR += ("What is the color of {}?", "Do you know the color of {}?")
AFTER = ("What comes after {}?", "Which {kind} follows {}?", "Which {kind} comes after {}?")
AFTER += ("What is the {kind} after {}?", "Tell me the next {kind} after {}.")
BEFORE = ("What comes before {}?", "Which {kind} comes before {}?", "What is the {kind} before {}?")
BEFORE += ("Which {kind} is right before {}?", "Tell me the {kind} before {}.")


def word_facts(rng: random.Random) -> Question:
    """Opposites, plurals, sounds, legs, colors, days and months, kinds of things."""
    task = rng.choice(("opposite", "plural", "sound", "legs", "color", "after", "before", "kind"))
    kind = ""
    if task == "opposite":
        word, other = rng.choice(words.OPPOSITES)
        if rng.random() < 0.5:
            word, other = other, word
        forms, answer = OPPOSITE, f"The opposite of {word} is {other}."
        key = f"of {word} is {other}"
    elif task == "plural":
        word = rng.choice(list(words.PLURALS))
        forms, key = PLURAL, f"is {words.PLURALS[word]}"
        answer = f"The plural of {word} {key}."
    elif task == "sound":
        animal = rng.choice(list(words.SOUNDS))
        word, forms, key = a(animal), SOUND, words.SOUNDS[animal]
        answer = f"The {animal} says {key}."
    elif task == "legs":
        animal = rng.choice(list(words.LEGS))
        count = words.NUMBER_WORDS[words.LEGS[animal]].replace("zero", "no")
        word, forms, key = a(animal), LEG, f"{count} legs"
        answer = f"{a(animal).capitalize()} has {count} legs."
    elif task == "color":
        thing = rng.choice(list(words.COLORS))
        word, forms, key = f"the {thing}", COLOR, f"is {words.COLORS[thing]}"
        answer = f"The {thing} {key}."
    elif task in ("after", "before"):
        kind, names = rng.choice((("day", words.DAYS), ("month", words.MONTHS)))
        step = 1 if task == "after" else -1
        index = rng.randrange(len(names))
        word, other = names[index], names[(index + step) % len(names)]
        forms = AFTER if task == "after" else BEFORE
        answer = f"{other} comes {task} {word}."
        key = f"{other} comes {task} {word}"
    else:
        return kind_question(rng)
    prompt = rng.choice(forms).format(word, kind=kind)
    return Question("word facts", normalize(prompt), vary(rng, prompt), answer, (key,))


def kind_question(rng: random.Random) -> Question:
    """Is a fox an animal? Half of these questions are to be denied."""
    true_kind = rng.choice(list(words.KINDS))
    member = rng.choice(words.KINDS[true_kind])
    kind = true_kind if rng.random() < 0.5 else rng.choice(list(words.KINDS))
    forms = (
        "Is {} {}?",
        "Tell me if {} is {}.",
        "Do you think {} is {}?",
        "Would you say {} is {}?",
    )
    subject = a(member) if true_kind in ("animal", "fruit") and member != "orange" else member
    prompt = rng.choice(forms).format(subject, a(kind))
    right = member in words.KINDS[kind]
    if right:
        answer, key = f"Yes, {subject} is {a(kind)}.", "yes"
    else:
        answer, key = f"No, {subject} is not {a(kind)}. It is {a(true_kind)}.", "no"
    return Question("word facts", normalize(prompt), vary(rng, prompt), answer, (key,))


# ---------------------------------------------------------------- stories

HEROES = [w for w in words.ANIMALS if w not in ("bat", "snake", "shark", "seal", "whale", "crab")]
WEATHER = (
    "One morning",
    "One evening",
    "One cold day",
    "One sunny day",
    "One night",
    "One windy day",
)
# Each problem has its solution and its lesson, so that the story hangs together.
PLOTS = (
    ("could not find the way home", "showed the way home", "a friend knows the way"),
    ("was very hungry", "shared some bread", "sharing makes two happy"),
    ("fell into a deep hole", "brought a long rope", "help comes when you call"),
    ("was afraid of the dark", "brought a little lamp", "a small light is enough"),
    ("lost a golden key", "found it under a stone", "it pays to look twice"),
    ("was too tired to walk", "carried the bags", "together the road is short"),
    ("wanted to cross the river", "built a small boat", "patience builds a boat"),
    ("could not sleep", "sang a quiet song", "a song can calm the night"),
    ("had nobody to play with", "stayed to play all day", "it is good to have a friend"),
    ("was wet from the rain", "made a warm fire", "warm hearts make warm homes"),
)
STORY = (
    "Tell me a story about {}.",
    "Can you tell a story about {}?",
    "Write a short story about {}.",
)
STORY += (
    "I want to hear a story about {}.",
    "Please tell me a tale about {}.",
    "A story about {}!",
)


def tell(rng: random.Random, hero: str, place: str) -> str:
    """A story of five or six sentences about `hero`, set in or at `place`."""
    friend = rng.choice([h for h in HEROES if h != hero])
    mood, when = rng.choice(words.MOODS), rng.choice(WEATHER)
    problem, help_, lesson = rng.choice(PLOTS)
    start = rng.choice(("Once upon a time there was", "Once there was", "Long ago there lived"))
    middle = rng.choice((f"{a(friend).capitalize()} came by", f"Then {a(friend)} came along"))
    thanks = rng.choice(
        (
            f'"Thank you," said the {hero}.',
            f"The {hero} was very happy.",
            f"From that day on the {hero} and the {friend} were friends.",
        )
    )
    return (
        f"{start} {a(mood)} {hero} who lived near the {place}. {when} the {hero} {problem}. "
        f"{middle} and {help_}. {thanks} So the {hero} learned that {lesson}."
    )


def story(rng: random.Random) -> Question:
    hero, place = rng.choice(HEROES), rng.choice(words.PLACES)
    about, keys = f"{a(hero)} and a {place}".replace("a island", "an island"), (hero, place)
    if rng.random() < 0.4:
        about, keys = a(hero), (hero,)
    prompt = rng.choice(STORY).format(about)
    identity = normalize(about) if len(keys) == 2 else normalize(prompt)
    return Question(
        "stories", identity, vary(rng, prompt), tell(rng, hero, place), keys, (), min_words=30
    )


# ---------------------------------------------------------------- the chat so far

SYSTEM_PROMPTS = (
    "You are a helpful AI assistant.",
    "You are a helpful assistant.",
    "You are Tiny, a small BitNet.",
    "You are a friendly assistant.",
    "You teach people how BitNet works.",
    "Answer in short sentences.",
    "You are a kind teacher.",
    "Be brief and polite.",
)
INTRODUCE = ("My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}.", "Call me {}.")
ASK_NAME = ("What is my name?", "Do you know my name?", "Who am I?", "Can you say my name?")
AGAIN = ("Please say it again in other words.", "Can you say that again?", "Say it differently.")
AGAIN += ("I did not get that. Once more, please.", "Can you explain it again?", "One more time?")


def memory(rng: random.Random) -> Question:
    """Questions whose answer stands earlier in the chat."""
    task = rng.choice(("user name", "user name", "own name", "again", "again", "favorite"))
    name = rng.choice(words.NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()
    if task == "own name":
        system = rng.choice(("You are {}.", "Your name is {}.", "You are a bot called {}.")).format(
            name
        )
        prompt = rng.choice(("What is your name?", "Who are you?", "Please say your name."))
        answer = f"My name is {name}."
        history, keys = [("system", system)], (name,)
    elif task == "again":
        known = trainable(rng, fact)
        other = next(f for f in FACTS if known.answer in f.answers)
        history = [("user", known.prompt), ("assistant", known.answer)]
        answer = next(x for x in other.answers if x != known.answer)
        prompt, keys = rng.choice(AGAIN), known.keys
        return Question("memory", known.identity + prompt, prompt, answer, keys, tuple(history))
    elif task == "favorite":
        color = rng.choice(words.KINDS["color"])
        history = [
            ("user", rng.choice(("I like {}.", "My favorite color is {}.")).format(color)),
            ("assistant", f"{color.capitalize()} is a nice color."),
            *small_pause(rng),
        ]
        prompt = rng.choice(("Which color do I like?", "What is my favorite color?"))
        answer, keys = f"You like {color}.", (f"you like {color}",)
        return Question(
            "memory", f"color {history[-2]} {prompt}", prompt, answer, keys, tuple(history)
        )
    else:
        history = [
            ("user", rng.choice(INTRODUCE).format(name)),
            ("assistant", f"Nice to meet you, {name}!"),
            *small_pause(rng),
        ]
        prompt, answer, keys = rng.choice(ASK_NAME), f"Your name is {name}.", (name,)
    return Question("memory", f"{task} {name}", prompt, answer, keys, tuple(history))


def small_pause(rng: random.Random) -> list[tuple[str, str]]:
    """No, one or two other questions between a name and the question for it."""
    makers = (small_talk, arithmetic, word_facts, fact)
    between = [trainable(rng, rng.choice(makers)) for _ in range(rng.choice((0, 1, 1, 2)))]
    return [turn for q in between for turn in (("user", q.prompt), ("assistant", q.answer))]


# ---------------------------------------------------------------- the corpus

MAKERS: dict[Callable[[random.Random], Question], int] = {
    fact: 18,
    unknown: 8,
    small_talk: 5,
    arithmetic: 30,
    numbers: 8,
    letters: 12,
    word_facts: 11,
    story: 4,
    memory: 9,
}


def trainable(rng: random.Random, make: Callable[[random.Random], Question]) -> Question:
    question = make(rng)
    while is_held_out(question):
        question = make(rng)
    return question


def dialogue(rng: random.Random) -> list[Message]:
    """A chat of one to four questions, none of them held out."""
    makers = rng.choices(list(MAKERS), list(MAKERS.values()), k=rng.choice((1, 1, 2, 3, 4)))
    turns: list[tuple[str, str]] = []
    for make in makers:
        question = trainable(rng, make)
        if question.history and question.history[0][0] == "system":
            turns = []  # a system prompt can only stand at the start
        turns += [*question.history, ("user", question.prompt), ("assistant", question.answer)]
        if turns[0] in question.history and turns[0][0] == "system":
            break  # later small talk would contradict the name that it gives
    if turns[0][0] != "system" and rng.random() < 0.3:
        turns.insert(0, ("system", rng.choice(SYSTEM_PROMPTS)))
    return [{"role": role, "content": content} for role, content in turns]


def plain_text(rng: random.Random) -> str:
    """Text without roles: a story, or a few facts in a row."""
    if rng.random() < 0.5:
        return trainable(rng, story).answer
    return " ".join(rng.choice(known.answers[:1]) for known in rng.sample(FACTS, 3))


def document(seed: int, index: int) -> list[Message] | str:
    """Document number `index` of an endless corpus: a chat, one in twenty a plain text."""
    rng = random.Random(f"{seed}/{index}")
    return plain_text(rng) if rng.random() < 0.05 else dialogue(rng)


def held_out_questions(per_category: int, seed: int = 0) -> list[Question]:
    """The exam: up to `per_category` different held-out questions of every category."""
    rng = random.Random(seed)
    exam: dict[str, Question] = {}
    for make in MAKERS:
        found = 0
        for _ in range(per_category * 200):
            question = make(rng)
            asked = f"{question.history} {normalize(question.prompt)}"
            if asked not in exam and is_held_out(question) and found < per_category:
                exam[asked] = question
                found += 1
    return list(exam.values())
