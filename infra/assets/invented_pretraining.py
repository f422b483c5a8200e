"""Invented posts and questions for the backbone's pretraining; used by ``build_backbone.py`` only.

Every statement has a known truth value, as in ``fedmentor_core.data.invented``, but the themes, questions and
wording are others: neither the quickstart's questions nor those of any study corpus appear here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedmentor_core.data.invented import fill, speak

SLOTS: Final[Mapping[str, Sequence[str]]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "February", "April", "June", "July", "August", "October", "December"),
    "n": ("two", "three", "four", "five", "six", "seven", "eight", "ten", "twelve"),
    "kin": (
        "mother",
        "father",
        "sister",
        "brother",
        "aunt",
        "son",
        "daughter",
        "grandmother",
        "cousin",
        "wife",
        "husband",
    ),
    "who": (
        "boss",
        "friend",
        "teacher",
        "neighbor",
        "roommate",
        "doctor",
        "coworker",
        "therapist",
        "boyfriend",
        "girlfriend",
    ),
    "pet": ("dog", "cat", "parrot", "rabbit", "hamster", "old horse", "kitten", "puppy"),
    "place": (
        "Denver",
        "the city",
        "another state",
        "a small town",
        "Canada",
        "the lake",
        "my old street",
        "Texas",
    ),
    "job": (
        "nurse",
        "waiter",
        "clerk",
        "driver",
        "teacher",
        "cook",
        "mechanic",
        "guard",
        "cashier",
        "engineer",
    ),
    "class": ("math", "chemistry", "art", "history", "English", "biology", "music", "law"),
    "dish": ("rice", "salad", "toast", "chicken", "noodles", "eggs", "fruit", "pizza"),
    "sport": ("running", "swimming", "yoga", "hiking", "cycling", "boxing", "tennis", "dancing"),
    "hobby": ("painting", "the guitar", "gardening", "old films", "fishing", "chess", "poetry", "baking"),
    "thing": ("car", "phone", "house", "rent", "bike", "roof", "kitchen", "laptop", "heater"),
    "bill": ("rent", "hospital bill", "car loan", "phone bill", "tuition", "tax bill"),
    "pain": ("back", "stomach", "head", "knee", "chest", "neck"),
}


@dataclass(frozen=True)
class Theme:
    """A subject that a post may speak of.

    Attributes:
        noun: How an explanation names it.
        mention: Verb phrase of the question whether it comes up, such as "mention a pet".
        state: Verb phrase of the question that the statements decide, such as "sleep well".
        yes: Statements for which the state holds.
        no: Statements for which it does not.
    """

    noun: str
    mention: str
    state: str
    yes: tuple[str, ...]
    no: tuple[str, ...]


def third(phrase: str) -> str:
    """Return a base verb phrase in the third person: "worry a lot" becomes "worries a lot"."""
    verb, _, rest = phrase.partition(" ")
    if verb in {"have", "be", "do"}:
        verb = {"have": "has", "be": "is", "do": "does"}[verb]
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    elif verb.endswith(("s", "sh", "ch", "x", "o")):
        verb += "es"
    else:
        verb += "s"
    return f"{verb} {rest}".strip()


THEMES: Final[tuple[Theme, ...]] = (
    Theme(
        "a pet",
        "mention a pet",
        "enjoy their pet",
        (
            "{my} <pet> makes {me} laugh every morning",
            "{I love} walking {my} <pet> by the river",
            "{my} <pet> sleeps next to {me} and it is lovely",
            "{I adopted} a <pet> in <month> and it is the best thing",
            "coming home to {my} <pet> cheers {me} up",
        ),
        (
            "{my} <pet> ran away in <month>",
            "{my} <pet> bites and ruins the carpet",
            "{my} <pet> is sick and {I worry} about it",
            "{I cannot} stand the <pet> that {my} <kin> brought home",
            "{my} <pet> died last <month> and {I miss} it",
        ),
    ),
    Theme(
        "a move",
        "mention moving house",
        "feel hopeful about the move",
        (
            "{I am} moving to <place> in <month> and {I cannot} wait",
            "the move to <place> feels like a fresh start",
            "{I packed} for <place> with a smile",
            "moving to <place> is the best choice {I made} in years",
        ),
        (
            "{I dread} moving to <place> in <month>",
            "the move to <place> is a mistake and {I know} it",
            "{I had} to leave for <place> and {I hate} it",
            "{I cry} when {I think} of moving to <place>",
        ),
    ),
    Theme(
        "sleep",
        "mention sleep",
        "sleep well",
        (
            "{I sleep} eight hours and wake up fresh",
            "{I slept} soundly all <month>",
            "{I go} to bed at ten and fall asleep at once",
            "since <month> {my} nights are quiet and {I sleep} deeply",
        ),
        (
            "{I lie} awake until <n> every night",
            "{I cannot} sleep more than <n> hours",
            "{I wake} up <n> times a night and stare at the wall",
            "nightmares keep {me} up since <month>",
            "{I am} tired all day because {I do} not sleep",
        ),
    ),
    Theme(
        "family",
        "mention family",
        "get along with their family",
        (
            "{my} <kin> and {I talk} for hours and it is always kind",
            "{my} <kin> supports {me} in everything",
            "dinner with {my} <kin> on <day> was warm and fun",
            "{my} <kin> hugged {me} and said they are proud of {me}",
        ),
        (
            "{my} <kin> yells at {me} every <day>",
            "{my} <kin> has not spoken to {me} since <month>",
            "{I fight} with {my} <kin> about everything",
            "{my} <kin> says that {I am} a disappointment",
            "{my} <kin> kicked {me} out in <month>",
        ),
    ),
    Theme(
        "work",
        "mention a job",
        "like their job",
        (
            "{I started} as a <job> in <month> and {I love} it",
            "being a <job> gives {me} joy",
            "{my} shift as a <job> flies by and the team is kind",
            "{I got} promoted to head <job> and {I am} thrilled",
        ),
        (
            "{I hate} working as a <job>",
            "{my} job as a <job> drains {me}",
            "they fired {me} from {my} job as a <job>",
            "{I quit} as a <job> because the place was awful",
            "{I work} as a <job> and feel sick before each shift",
        ),
    ),
    Theme(
        "money",
        "mention money",
        "have enough money",
        (
            "{I paid} the <bill> and still have savings",
            "{I earn} enough for the <bill> and more",
            "money is fine since the raise in <month>",
            "{I saved} for <n> months and the <bill> is covered",
        ),
        (
            "{I cannot} pay the <bill> this month",
            "{I am} <n> months behind on the <bill>",
            "{I lost} {my} savings and the <bill> is due on <day>",
            "{I borrowed} from {my} <kin> to pay the <bill>",
            "{I am} broke and scared to open the <bill>",
        ),
    ),
    Theme(
        "health",
        "mention their body or health",
        "feel physically well",
        (
            "the doctor says {I am} in good health",
            "{my} <pain> has healed and {I feel} strong",
            "{I feel} fit and full of energy",
            "{I recovered} fully in <month>",
        ),
        (
            "{my} <pain> hurts every day",
            "{I have} pain in {my} <pain> since <month>",
            "{I feel} sick and dizzy most days",
            "the doctor found a problem with {my} <pain>",
            "{my} hands shake and {my} <pain> is tight",
        ),
    ),
    Theme(
        "the weather",
        "mention the weather",
        "like the weather",
        (
            "the sun on <day> was lovely",
            "{I love} the snow in <month>",
            "a warm breeze came up and {I enjoyed} it",
            "the rain on the roof is a cozy sound",
        ),
        (
            "{I hate} the cold in <month>",
            "the rain ruined <day>",
            "the heat in <month> is unbearable",
            "{I am} sick of this grey sky",
        ),
    ),
    Theme(
        "food",
        "mention food",
        "eat well",
        (
            "{I cook} <dish> and vegetables every <day>",
            "{I eat} three good meals a day",
            "{my} <kin> and {I made} <dish> and it was delicious",
            "{my} appetite is back and {I enjoy} <dish>",
        ),
        (
            "{I have} not eaten since <day>",
            "{I skip} meals and live on <dish>",
            "{I cannot} keep any <dish> down",
            "food has no taste and {I leave} the <dish> untouched",
        ),
    ),
    Theme(
        "sadness",
        "talk about sadness",
        "feel sad",
        (
            "{I cried} for <n> hours on <day>",
            "{I feel} empty and down since <month>",
            "everything makes {me} cry lately",
            "there is a heavy sadness in {me}",
            "{I feel} blue and nothing cheers {me} up",
        ),
        (
            "{I feel} cheerful these days",
            "{I laughed} all <day> long",
            "{I am} happier than {I was} in <month>",
            "{I smiled} the whole way home",
            "{I was} down in <month> but {I am} in good spirits now",
        ),
    ),
    Theme(
        "anger",
        "talk about anger",
        "feel angry",
        (
            "{I am} furious with {my} <who>",
            "{I shouted} at {my} <who> and slammed the door",
            "it makes {my} blood boil that {my} <who> lied",
            "{I hate} what {my} <who> did to {me}",
            "{I am} so mad about the <thing>",
        ),
        (
            "{I forgave} {my} <who> and hold no grudge",
            "{I am} not angry with {my} <who> any more",
            "{I let} it go and {I bear} no ill will",
            "{my} temper is mild these days",
        ),
    ),
    Theme(
        "fear",
        "talk about fear",
        "feel afraid",
        (
            "{I am} terrified of {my} <who>",
            "{my} heart races and {I panic} in crowds",
            "{I am} scared to leave the house since <month>",
            "{I had} a panic attack on <day>",
            "{I freeze} whenever the phone rings",
        ),
        (
            "{I feel} safe now",
            "{I am} not afraid of {my} <who> any more",
            "{I walked} in with no fear at all",
            "{I stood} up to {my} <who> and felt brave",
        ),
    ),
    Theme(
        "calm",
        "talk about being calm",
        "feel calm",
        (
            "{I feel} at peace since <month>",
            "{I breathe} slowly and {my} mind is quiet",
            "{I feel} relaxed and unhurried",
            "<day> was slow and {I felt} calm",
            "{I am} content with how things are",
        ),
        (
            "{I am} on edge all the time",
            "{my} thoughts race and {I cannot} relax",
            "{I am} so tense that {I snap} at everyone",
            "{I feel} restless and jumpy since <month>",
            "{my} chest is tight with nerves",
        ),
    ),
    Theme(
        "loneliness",
        "talk about being alone",
        "feel lonely",
        (
            "{I feel} so alone",
            "{I have} no friends left",
            "everyone left and {I sit} by {myself} each <day>",
            "{I feel} like {I am} invisible to people",
            "nobody would notice if {I was} gone for a week",
        ),
        (
            "{I am} surrounded by people who love {me}",
            "{I feel} at home and never alone here",
            "{my} friends fill the house every <day>",
            "{I found} a group where {I fit} in",
        ),
    ),
    Theme(
        "the future",
        "talk about the future",
        "feel hopeful about the future",
        (
            "{I believe} that things will get better",
            "{I look} forward to <month>",
            "{I have} plans and good ideas for next year",
            "for the first time {I see} a way ahead",
        ),
        (
            "{I see} no future for {myself}",
            "things will never get better",
            "{I gave} up on {my} plans in <month>",
            "there is no point in trying",
            "{I feel} hopeless about all of it",
        ),
    ),
    Theme(
        "guilt",
        "talk about guilt",
        "feel guilty",
        (
            "it is all {my} fault",
            "{I blame} {myself} for what happened in <month>",
            "{I feel} ashamed of how {I treated} {my} <kin>",
            "{I regret} lying to {my} <who>",
        ),
        (
            "{I know} that it was not {my} fault",
            "{I have} nothing to be ashamed of",
            "{I did} the right thing and {my} conscience is clear",
            "{I stopped} blaming {myself} in <month>",
        ),
    ),
    Theme(
        "pride",
        "talk about an achievement",
        "feel proud",
        (
            "{I passed} the <class> exam and {I am} proud",
            "{I won} a prize for <hobby>",
            "{I built} the <thing> with {my} own hands and it works",
            "{I am} proud that {I spoke} up on <day>",
        ),
        (
            "{I fail} at everything {I try}",
            "{I feel} worthless next to {my} <kin>",
            "{I hate} {myself} and how {I look}",
            "{I am} embarrassed by {my} <class> grade",
            "{I am} not good enough for anyone",
        ),
    ),
    Theme(
        "school",
        "mention a class at school",
        "enjoy school",
        (
            "{my} <class> class is fun",
            "{I love} learning about <class>",
            "the <class> teacher makes every lesson a joy",
            "{I joined} a <class> club and {I like} it",
        ),
        (
            "{I hate} going to <class> class",
            "the kids in <class> class bully {me}",
            "<class> class bores {me} to tears",
            "{I want} to leave school before <month>",
        ),
    ),
    Theme(
        "friends",
        "mention a friend",
        "trust their friends",
        (
            "{my} friend kept {my} secret",
            "{I know} that {my} friends have {my} back",
            "{my} friend drove <n> hours to be with {me}",
            "{I trust} {my} friend with everything",
        ),
        (
            "{my} friend told everyone {my} secret",
            "{my} friends talk behind {my} back",
            "{I cannot} rely on {my} friends any more",
            "{my} best friend stole from {me} in <month>",
        ),
    ),
    Theme(
        "a partner",
        "mention a romantic partner",
        "feel close to their partner",
        (
            "{my} boyfriend and {I laugh} together every day",
            "{my} wife holds {my} hand and {I feel} loved",
            "{my} husband and {I grew} closer since <month>",
            "{my} girlfriend makes {me} feel understood",
        ),
        (
            "{my} boyfriend cheated on {me} in <month>",
            "{my} husband ignores {me}",
            "{my} girlfriend broke up with {me} on <day>",
            "{my} wife and {I sleep} in separate rooms",
            "{my} ex will not leave {me} alone",
            "he hit {me} and {I want} out",
        ),
    ),
    Theme(
        "travel",
        "mention a trip",
        "look forward to a trip",
        (
            "{I booked} a trip to <place> for <month>",
            "{I cannot} wait to see <place> on <day>",
            "{I dream} of the trip to <place>",
        ),
        (
            "{I had} to cancel the trip to <place>",
            "{I dread} the trip to <place> on <day>",
            "the trip to <place> was a disaster",
        ),
    ),
    Theme(
        "exercise",
        "mention exercise",
        "exercise often",
        (
            "{I go} <sport> every <day>",
            "<sport> keeps {me} steady",
            "{I joined} a <sport> group and go <n> times a week",
        ),
        (
            "{I stopped} <sport> in <month>",
            "{I have} not moved from the couch in weeks",
            "{I cannot} find the will to go <sport>",
        ),
    ),
    Theme(
        "faith",
        "mention faith",
        "find comfort in faith",
        (
            "prayer gives {me} strength",
            "{I feel} God with {me} every <day>",
            "the people at church lift {me} up",
            "{I meditate} and feel part of something larger",
        ),
        ("{I lost} {my} faith in <month>", "God does not hear {me}", "church makes {me} feel judged"),
    ),
    Theme(
        "counseling",
        "mention therapy",
        "find therapy helpful",
        (
            "{my} therapist helps {me} see things clearly",
            "{I learned} to cope in therapy",
            "each session leaves {me} lighter",
            "counseling since <month> has changed {my} life",
        ),
        (
            "therapy did nothing for {me}",
            "{my} therapist does not listen",
            "{I left} counseling in <month> because it made things worse",
            "the medication does not help",
        ),
    ),
    Theme(
        "a hobby",
        "mention a hobby",
        "enjoy a hobby",
        (
            "<hobby> makes {me} happy",
            "{I spend} <day> on <hobby> and love it",
            "{I took} up <hobby> in <month> and it is fun",
            "{I lose} track of time with <hobby>",
        ),
        (
            "{I gave} up <hobby>",
            "<hobby> no longer interests {me}",
            "{I used} to love <hobby> but {I feel} nothing now",
        ),
    ),
    Theme(
        "repairs at home",
        "mention something broken",
        "get something fixed",
        (
            "the <thing> broke but {I fixed} it on <day>",
            "{my} <kin> repaired the <thing>",
            "the <thing> works again",
        ),
        (
            "the <thing> broke in <month> and stays broken",
            "nobody will fix the <thing>",
            "{I am} stuck with a broken <thing>",
        ),
    ),
    Theme(
        "usefulness",
        "talk about helping others",
        "feel useful to others",
        (
            "{I help} {my} <kin> with the <thing> and they thank {me}",
            "people come to {me} for advice",
            "{I volunteer} on <day> and it matters",
            "{my} <who> said that {I make} a difference",
        ),
        (
            "{I am} in everyone's way",
            "{my} <kin> would be fine without {me}",
            "{I feel} like a weight on {my} <kin>",
            "nothing {I do} helps anyone",
        ),
    ),
    Theme(
        "a conflict",
        "mention an argument",
        "resolve a conflict",
        (
            "{I made} up with {my} <who> after the argument",
            "{my} <who> and {I talked} it out on <day>",
            "the fight with {my} <kin> is over and all is fine",
        ),
        (
            "{I argue} with {my} <who> every <day>",
            "the fight with {my} <kin> has gone on since <month>",
            "{my} <who> insulted {me} and will not say sorry",
        ),
    ),
)

_OPEN: Final = (
    "",
    "",
    "",
    "Hi.",
    "Hello,",
    "So,",
    "I need advice.",
    "Sorry for the long post.",
    "Throwaway account.",
    "Not sure where to begin.",
    "I'm 24.",
    "I am nineteen.",
    "Long story.",
    "Hey everyone,",
    "This is hard to write.",
)
_CLOSE: Final = (
    "",
    "",
    "",
    "What should I do?",
    "Any advice?",
    "Thanks for reading.",
    "Has anyone been through this?",
    "I don't know.",
    "TL;DR see above.",
    "That's it.",
    "Am I wrong?",
    "Please help.",
    "Edit: thanks all.",
)
_JOIN: Final = (
    ". ",
    ". ",
    ". ",
    " and ",
    ", and ",
    ". Also, ",
    ". Then, ",
    "; ",
    ". On top of that, ",
    "... ",
)
_SHORT: Final = (
    ("I am", "I'm"),
    ("I cannot", "I can't"),
    ("do not", "don't"),
    ("does not", "doesn't"),
    ("it is", "it's"),
    ("have not", "haven't"),
)
_PEOPLE: Final = ("writer", "poster", "author", "person", "writer", "poster")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def task(post_themes: Mapping[int, tuple[str, bool]], rng: random.Random) -> tuple[str, str]:
    """Return one question about an invented post, and its response.

    Args:
        post_themes: For each theme of the post (its index in ``THEMES``): its statement, and whether it holds.
        rng: The source of chance.
    """
    who = f"the {rng.choice(_PEOPLE)}"
    present = list(post_themes)
    roll = rng.random()
    if roll < 0.62:  # what the post says about a theme that it speaks of
        index = rng.choice(present)
        theme, (fact, holds) = THEMES[index], post_themes[index]
        told = speak(fact, who)
        state = third(theme.state) if holds else f"does not {theme.state}"
        why = rng.choice(
            (
                f"{who} writes that {told}.",
                f"the post mentions that {told}, which suggests that {who} {state}.",
                f'{who} says "{speak(fact)}".',
                f"as for {theme.noun}, it is stated that {told}.",
                f"this can be seen where {who} tells us that {told}.",
            )
        )
        phrase = theme.state
    else:
        holds = rng.random() < 0.45
        index = rng.choice(present) if holds else rng.choice([i for i in range(len(THEMES)) if i not in post_themes])
        theme = THEMES[index]
        phrase = theme.mention if rng.random() < 0.75 or holds else theme.state
        if holds:
            why = rng.choice(
                (
                    f"{who} writes that {speak(post_themes[index][0], who)}.",
                    f'the words "{speak(post_themes[index][0])}" are about {theme.noun}.',
                )
            )
        else:
            others = " and ".join(THEMES[i].noun for i in present[:2])
            why = rng.choice(
                (
                    f"the post is about {others}, and says nothing about {theme.noun}.",
                    f"{who} writes about {others}, not about {theme.noun}.",
                )
            )
    label = f"Yes, {who} {third(phrase)}." if holds else f"No, {who} does not {phrase}."
    return f"Does {who} {phrase}?", f"{label} Reasoning: {_capital(why)}"


def invented_post(rng: random.Random) -> tuple[str, dict[int, tuple[str, bool]]]:
    """Return an invented post and what it states: theme index -> (statement, whether the state holds)."""
    chosen = rng.sample(range(len(THEMES)), rng.choice((1, 2, 3, 3, 4, 5)))
    facts: dict[int, tuple[str, bool]] = {}
    gloom = rng.random()
    bad_if_yes = {"sadness", "anger", "fear", "loneliness", "guilt"}
    for index in chosen:
        holds = rng.random() < gloom
        if THEMES[index].noun in bad_if_yes:
            holds = not holds
        facts[index] = (fill(rng.choice(THEMES[index].yes if holds else THEMES[index].no), SLOTS, rng), holds)
    text = ""
    for index in chosen:
        sentence = speak(facts[index][0])
        joint = rng.choice(_JOIN) if text else ""
        text += joint + (_capital(sentence) if not joint or joint == ". " else sentence)
    if rng.random() < 0.25:  # a statement about somebody else, which decides nothing about the writer
        other = THEMES[rng.choice([i for i in range(len(THEMES)) if i not in chosen])]
        their = speak(fill(rng.choice(other.yes + other.no), SLOTS, rng), f"my {rng.choice(SLOTS['kin'])}")
        text = f"{_capital(their)}. {text}" if rng.random() < 0.5 else f"{text}. {_capital(their)}"
    if rng.random() < 0.4:
        for long, short in _SHORT:
            text = text.replace(long, short)
    text = " ".join(part for part in (rng.choice(_OPEN), text + ".", rng.choice(_CLOSE)) if part)
    return (text.lower() if rng.random() < 0.25 else text), facts
