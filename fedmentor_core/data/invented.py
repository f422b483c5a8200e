"""Invented corpora for the quickstart: three domains that differ in words, style, length and label balance.

Nobody wrote these posts. A post is put together from templates in which every statement has a known truth
value, so the label follows from the text and the explanation names the evidence. Posts also carry statements
that do not decide the label: about somebody else, about another time, or about another subject. The wording is
that of a few dozen templates: a model of word pairs learns the labels from 250 posts, so these corpora show that
a run works, not how good a method is.

The three corpora stand for three services that would federate:

- ``peer_forum``: casual lower-case posts of a peer-support forum; two questions for each post;
- ``student_inbox``: polite letters to a university's counselling team;
- ``crisis_notes``: clipped third-person notes of a telephone line.

Distress is spoken of calmly throughout; nothing graphic is said.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fedmentor_core.errors import DataError

Slots = Mapping[str, Sequence[str]]
Row = dict[str, str]

_THIRD_PERSON: Final = {
    "am": "is", "was": "was", "have": "has", "had": "had", "do": "does", "did": "did", "go": "goes", "can": "can",
    "cannot": "cannot", "will": "will", "could": "could", "carry": "carries", "try": "tries", "worry": "worries",
    "study": "studies", "finish": "finishes", "miss": "misses", "cry": "cries", "said": "said", "built": "built",
    "spoke": "spoke", "won": "won", "borrowed": "borrowed", "lost": "lost", "quit": "quit", "passed": "passed",
    "stood": "stood", "grew": "grew", "froze": "froze", "know": "knows", "fail": "fails", "need": "needs",
    "freeze": "freezes", "dread": "dreads", "spend": "spends", "bear": "bears", "let": "lets", "left": "left",
    "paid": "paid", "found": "found", "blame": "blames", "gave": "gave", "forgave": "forgave", "got": "got",
    "never": "never", "cook": "cooks", "look": "looks",
}  # fmt: skip
_PERSON: Final = re.compile(r"\{(I \S+?|my|me|myself)\}")
_SLOT: Final = re.compile(r"<(\w+)>")
_PAST_OR_MODAL: Final = ("ed", "ught", "ould", "elt", "ept", "ent", "ade", "old", "aw", "ame", "ook", "ost")


def _third(verb: str) -> str:
    """Return the third-person form of a first-person verb; a past form stays as it is."""
    if verb in _THIRD_PERSON:
        return _THIRD_PERSON[verb]
    return verb if verb.endswith(_PAST_OR_MODAL) else verb + "s"


def speak(template: str, subject: str | None = None) -> str:
    """Write a template in the first person, or in the third person about ``subject``.

    ``{I have}`` gives "I have" or "<subject> has"; ``{my}``, ``{me}`` and ``{myself}`` follow.

    Args:
        template: Text whose slots are filled already; only the marks of person are left in it.
        subject: How the explanation calls the writer, such as "the writer"; ``None`` for the first person.
    """
    n_seen = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal n_seen
        mark = match.group(1)
        if subject is None:
            return mark
        if mark in {"my", "me", "myself"}:
            return {"my": "their", "me": "them", "myself": "themselves"}[mark]
        n_seen += 1
        verb = mark.removeprefix("I ")
        if n_seen == 1:
            return f"{subject} {_third(verb)}"
        return f"they {'are' if verb == 'am' else 'were' if verb == 'was' else verb}"

    return _PERSON.sub(replace, template)


def fill(template: str, slots: Slots, rng: random.Random) -> str:
    """Fill each ``<slot>`` of a template; the same slot named twice gets two different values."""
    used: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        values = slots[match.group(1)]
        value = rng.choice([value for value in values if value not in used] if used else values)
        used.add(value)
        return value

    return _SLOT.sub(replace, template)


@dataclass(frozen=True)
class CorpusDescription:
    """What one invented corpus is.

    Attributes:
        title: What it stands for.
        sensitivity: How sensitive the domain counts: ``low``, ``medium`` or ``high``.
        questions: The questions asked of every post; one row for each.
        yes_share: The share of posts built to be answered with yes, in the order of ``questions``.
        style: How the posts read.
    """

    title: str
    sensitivity: str
    questions: tuple[str, ...]
    yes_share: tuple[float, ...]
    style: str


_OVERLOADED: Final = "Does the writer feel overloaded?"
_LEAN_ON: Final = "Does the writer have someone to lean on?"
_KEEPING_UP: Final = "Is the student keeping up?"
_CALL_BACK: Final = "Does the caller want us to call back?"

CORPORA: Final[Mapping[str, CorpusDescription]] = MappingProxyType(
    {
        "peer_forum": CorpusDescription(
            title="an invented peer-support forum",
            sensitivity="low",
            questions=(_OVERLOADED, _LEAN_ON),
            yes_share=(0.55, 0.5),
            style="casual, first person, lower case, about work and home",
        ),
        "student_inbox": CorpusDescription(
            title="an invented inbox of a student counselling service",
            sensitivity="medium",
            questions=(_KEEPING_UP,),
            yes_share=(0.42,),
            style="polite letters, first person, about courses and deadlines",
        ),
        "crisis_notes": CorpusDescription(
            title="invented call notes of a crisis line",
            sensitivity="high",
            questions=(_CALL_BACK,),
            yes_share=(0.36,),
            style="clipped third-person notes with times",
        ),
    }
)

_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS: Final = ("January", "March", "April", "May", "June", "September", "October", "November")

# --------------------------------------------------------------------------------------- the peer forum

_FORUM_SLOTS: Final[Slots] = MappingProxyType(
    {
        "n": ("three", "four", "five", "six", "seven", "eight", "nine"),
        "day": tuple(day.lower() for day in _DAYS),
        "month": tuple(month.lower() for month in _MONTHS),
        "task": (
            "reports", "orders", "repairs", "invoices", "shifts", "deliveries", "bookings", "fittings",
            "inspections", "translations", "audits", "menus", "contracts", "lesson plans", "drawings",
        ),
        "job": (
            "drive a bus", "bake bread for a living", "fix bikes", "work nights at a warehouse", "run a small cafe",
            "teach evening classes", "clean offices", "mend clocks", "look after a garden centre", "sell shoes",
            "answer phones for a bank", "paint houses", "cook at a school", "translate manuals", "sort parcels",
        ),
        "place": ("leeds", "a village up north", "the coast", "a new town", "the old harbour", "the city", "the hills"),
        "friend": (
            "sister", "brother", "neighbour", "cousin", "old flatmate", "mum", "dad", "aunt", "partner",
            "best friend", "running buddy", "uncle",
        ),
        "boss": ("manager", "supervisor", "team lead", "head chef", "foreman"),
        "hobby": ("chess", "knitting", "the piano", "a jigsaw", "football", "pottery", "the crossword", "birdwatching"),
        "food": ("soup", "a loaf", "pancakes", "stew", "plum cake", "lentils", "a curry"),
    }
)  # fmt: skip
_FORUM_OPEN: Final = (
    "hi all,", "hey everyone,", "evening folks,", "first post here,", "long time reader,", "hello again,",
    "ok so,", "morning,", "not sure where to put this,", "quick one,",
)  # fmt: skip
_FORUM_CONTEXT: Final = (
    "i <job> in <place>.", "i <job> and live in <place>.", "i moved to <place> in <month> and <job>.",
    "i <job>, have done since <month>.", "these days i <job>.",
)  # fmt: skip
_FORUM_LOADED: Final = (
    "{I have} <n> <task> and <n> <task> due by <day>",
    "{my} <boss> keeps adding <task> and {I have} <n> already",
    "{I worked} <n> days in a row and the <task> still pile up",
    "{I have} more <task> than hours before <day>",
    "the <task> never stop and {I cannot} keep pace",
    "{I am} doing the <task> of two people since <month>",
    "{I took} <n> extra <task> and there is no gap left until <day>",
    "{I wake} at four thinking of the <n> <task> still to do",
    "every <day> brings <n> new <task> and {I am} worn out",
    "{I said} yes to <n> <task> too many and {my} week is bursting",
)
_FORUM_UNLOADED: Final = (
    "{I have} only one of the <task> left and all of <day> for it",
    "{my} <boss> took the <task> away so {my} week is light",
    "{I finish} by three and {my} evenings are free",
    "the <task> moved to <month> so {I can} breathe again",
    "{I have} plenty of time for the <n> <task> on {my} list",
    "{I dropped} the extra <task> and {my} days are calm now",
    "people think {I am} buried in <task> but {my} list is short",
    "<month> was too much but now {I have} room for <hobby>",
    "{I share} the <task> with <n> others and it is an easy pace",
    "the <task> are done and {I have} <day> off",
)
_FORUM_LOAD_NOISE: Final = (
    "my <friend> is buried in <task> at work.", "my <friend> has <n> <task> due and never rests.",
    "my <friend> says their week is very light.", "the job before this one was all <task>.",
    "the shop next door had <n> <task> this week.",
)  # fmt: skip
_FORUM_SUPPORTED: Final = (
    "{my} <friend> rings every <day> and listens",
    "{I can} call {my} <friend> at any hour",
    "{my} <friend> sits with {me} on <day> evenings and asks how it is going",
    "{I talk} things over with {my} <friend> each <day>",
    "{my} <friend> came round with <food> and stayed to hear it all",
    "{I thought} nobody cared, then {my} <friend> began to visit on <day>",
    "{my} <friend> and {my} <friend> both check on {me}",
    "{my} <friend> lives far off but still writes to {me} every <day>",
)
_FORUM_UNSUPPORTED: Final = (
    "{my} <friend> moved away in <month> and nobody asks how {I am}",
    "{I keep} it to {myself} as there is nobody to tell",
    "{my} <friend> used to listen but has not called since <month>",
    "{I have} no one here to talk to on <day> evenings",
    "{I tried} to tell {my} <friend> but they changed the subject",
    "since <month> {I eat} alone and no one calls",
    "{my} <friend> and {my} <friend> are both too busy to hear it",
    "nobody in <place> knows {me} well enough to ask",
)
_FORUM_SUPPORT_NOISE: Final = (
    "my <friend> has lots of people to talk to.", "my <friend> is lonely in <place> i think.",
    "i listen to my <friend> when they need it.", "the lady upstairs gets visits every <day>.",
)  # fmt: skip
_FORUM_FILLER: Final = (
    "i made <food> on <day>.", "it rained all <day>.", "i tried <hobby> again.", "the bus was late on <day>.",
    "<hobby> helps a bit.", "i slept ok on <day>.", "the pay is fine.", "i am learning <hobby>.",
)  # fmt: skip
_FORUM_CLOSE: Final = (
    "thanks for reading.", "any tips welcome.", "just wanted to say it.", "how do you all do it?", "that is all.",
    "hope you are well.", "anyone else?", "",
)  # fmt: skip


def _peer_forum(rng: random.Random, answers: Sequence[bool]) -> tuple[str, list[str]]:
    """Write one forum post and its two responses."""
    overloaded, supported = answers
    load = fill(rng.choice(_FORUM_LOADED if overloaded else _FORUM_UNLOADED), _FORUM_SLOTS, rng)
    support = fill(rng.choice(_FORUM_SUPPORTED if supported else _FORUM_UNSUPPORTED), _FORUM_SLOTS, rng)
    body = [f"{speak(load)}.", f"{speak(support)}.", fill(rng.choice(_FORUM_FILLER), _FORUM_SLOTS, rng)]
    if rng.random() < 0.35:
        body.append(fill(rng.choice(_FORUM_LOAD_NOISE), _FORUM_SLOTS, rng))
    if rng.random() < 0.35:
        body.append(fill(rng.choice(_FORUM_SUPPORT_NOISE), _FORUM_SLOTS, rng))
    rng.shuffle(body)
    start = [rng.choice(_FORUM_OPEN), fill(rng.choice(_FORUM_CONTEXT), _FORUM_SLOTS, rng)]
    post = " ".join([*start, *body, rng.choice(_FORUM_CLOSE)]).strip().lower()
    load_end = "which is too much" if overloaded else "which leaves room"
    support_end = "so someone is there" if supported else "so nobody is there"
    said, told = (speak(text, "the writer").lower() for text in (load, support))
    return post, [
        f"{'Yes, the writer feels' if overloaded else 'No, the writer does not feel'} overloaded. "
        f"Reasoning: the post says that {said}, {load_end}.",
        f"{'Yes, the writer has' if supported else 'No, the writer does not have'} someone to lean on. "
        f"Reasoning: the post says that {told}, {support_end}.",
    ]


# ------------------------------------------------------------------------------------ the student inbox

_INBOX_SLOTS: Final[Slots] = MappingProxyType(
    {
        "n": ("two", "three", "four", "five", "six", "seven"),
        "day": _DAYS[:5],
        "month": _MONTHS,
        "year": ("first-year", "second-year", "third-year", "final-year", "part-time", "visiting", "master's"),
        "subject": (
            "biology", "law", "history", "physics", "nursing", "economics", "geography", "music", "chemistry",
            "architecture", "linguistics", "engineering", "philosophy", "statistics",
        ),
        "piece": (
            "essay", "lab report", "problem sheet", "portfolio", "presentation", "case study", "draft chapter",
            "book review", "field diary", "poster",
        ),
        "pieces": (
            "lab reports", "problem sheets", "seminars", "essays", "quizzes", "tutorials", "lectures",
            "translations", "workshops", "readings",
        ),
        "staff": ("tutor", "lecturer", "supervisor", "course leader", "seminar teacher", "adviser"),
        "mate": ("flatmate", "roommate", "lab partner", "cousin", "friend from home", "study partner"),
        "feeling": ("homesick", "nervous", "restless", "rather tired", "shy in groups", "unsettled", "anxious"),
        "cause": ("the noise in halls", "the grey weather", "being far from home", "money", "the long bus ride"),
    }
)  # fmt: skip
_INBOX_OPEN: Final = (
    "Dear counselling team,", "Good morning,", "Dear Sir or Madam,", "Dear student support,", "Good afternoon,",
    "To whom it may concern,", "Dear all,",
)  # fmt: skip
_INBOX_CONTEXT: Final = (
    "I am a <year> student of <subject>.", "I study <subject> as a <year> student.",
    "I began <subject> in <month> and am a <year> student.", "My <staff> in <subject> suggested that I write to you.",
)  # fmt: skip
_INBOX_ON_TRACK: Final = (
    "{I handed} in all <n> <pieces> on time",
    "{my} <staff> says that {my} marks in <subject> are steady",
    "{I have} read everything for <subject> up to this <day>",
    "{I have} attended all <n> <pieces> since <month>",
    "{my} <piece> was returned on <day> with a good mark",
    "{I finished} the <piece> a week before the deadline",
    "{I was} behind in <month>, but {I caught} up on all <n> <pieces>",
    "{I feared} that {I failed} the <piece>, yet {I passed} it well",
    "{my} <staff> praised the <piece> that {I submitted} on <day>",
    "{I study} <subject> each <day> and the <pieces> are done",
)
_INBOX_BEHIND: Final = (
    "{I missed} <n> <pieces> since <month>",
    "{my} <piece> is <n> weeks late and still not begun",
    "{my} <staff> warned {me} that <n> <pieces> are overdue",
    "{I stopped} opening the notes for <subject> in <month>",
    "{I have} not handed in the <piece> that was due on <day>",
    "{I failed} <n> <pieces> and {I have} not dared to open the next",
    "{I did} well until <month>, but now <n> <pieces> are missing",
    "{I promised} the <piece> for <day>, yet {I have} written nothing",
    "{my} <staff> has not received a single <piece> since <month>",
    "{I have} <n> <pieces> to make up and no plan for them",
)
_INBOX_NOISE: Final = (
    "My <mate> has missed <n> <pieces> this term.", "My <mate> has handed in every <piece> early.",
    "My <mate> failed the <piece> in <month>.", "The <staff> moved the next <piece> to <month>.",
    "My <mate> has the best marks in <subject>.",
)  # fmt: skip
_INBOX_FEELING: Final = (
    "I feel <feeling> because of <cause>.", "Lately I have been <feeling>, perhaps because of <cause>.",
    "On most days I am <feeling>.", "I sleep badly because of <cause>.",
    "I am otherwise well and see friends on <day>.",
    "I enjoy the choir on <day>.",
)  # fmt: skip
_INBOX_CLOSE: Final = (
    "Could I see somebody on <day>?", "I would be glad of a meeting.", "Thank you for your time.",
    "Would <day> suit you?", "Kind regards.", "I look forward to your reply.",
)  # fmt: skip


def _student_inbox(rng: random.Random, answers: Sequence[bool]) -> tuple[str, list[str]]:
    """Write one letter and its response."""
    (keeping_up,) = answers
    fact = fill(rng.choice(_INBOX_ON_TRACK if keeping_up else _INBOX_BEHIND), _INBOX_SLOTS, rng)
    sentence = speak(fact)
    body = [sentence[0].upper() + sentence[1:] + "."]
    body += [fill(text, _INBOX_SLOTS, rng) for text in rng.sample(_INBOX_FEELING, rng.choice((1, 2)))]
    if rng.random() < 0.4:
        body.append(fill(rng.choice(_INBOX_NOISE), _INBOX_SLOTS, rng))
    rng.shuffle(body)
    close = [fill(text, _INBOX_SLOTS, rng) for text in rng.sample(_INBOX_CLOSE, rng.choice((1, 2)))]
    post = " ".join([rng.choice(_INBOX_OPEN), fill(rng.choice(_INBOX_CONTEXT), _INBOX_SLOTS, rng), *body, *close])
    end = "so all is on track" if keeping_up else "so work is slipping"
    return post, [
        f"{'Yes, the student is' if keeping_up else 'No, the student is not'} keeping up. "
        f"Reasoning: the message states that {speak(fact, 'the student')}, {end}."
    ]


# ------------------------------------------------------------------------------------- the crisis notes

_NOTES_SLOTS: Final[Slots] = MappingProxyType(
    {
        "hour": ("18", "19", "20", "21", "22", "23", "00", "01", "02", "03"),
        "minute": ("05", "10", "15", "20", "25", "35", "40", "45", "50", "55"),
        "length": ("12", "15", "18", "20", "25", "30", "35", "40", "45"),
        "age": ("twenties", "thirties", "forties", "fifties", "sixties", "seventies"),
        "when": (
            "tomorrow morning", "on Sunday evening", "before noon on Monday", "tomorrow after work", "on Friday night",
            "in two days", "on Saturday at six", "tomorrow at nine", "later tonight", "on Wednesday",
        ),
        "kin": ("sister", "brother", "neighbour", "son", "daughter", "former partner", "colleague", "landlady",
            "mother"),
        "where": (
            "at home, lamp on", "in a parked car", "in the kitchen with tea", "on a bench near the station",
            "in a hostel room", "in the garden shed", "on a night bus", "at work after closing",
        ),
        "topic": (
            "a loss in the family", "a move last month", "the end of a job", "a court letter", "a long illness",
            "rent arrears", "an argument at home", "an anniversary", "weeks of poor sleep", "empty evenings",
        ),
        "voice": ("low", "flat", "tired", "hurried", "quiet", "shaky", "steady"),
    }
)  # fmt: skip
_NOTES_OPEN: Final = (
    "Call <hour>:<minute>, <length> min.", "<hour>:<minute>. Duration <length> min.", "Rang at <hour>:<minute>.",
    "Night desk, <hour>:<minute>.",
)  # fmt: skip
_NOTES_CONTEXT: Final = (
    "Caller in <age>, <where>.", "Caller, <age>, speaking <where>.", "Repeat caller in <age>, <where>.",
    "New caller, <age>, <where>.",
)  # fmt: skip
_NOTES_YES: Final = (
    "asked us to ring again <when>",
    "would like to hear from us <when>",
    "agreed to a follow-up <when>",
    "at first said no, then asked for a call <when>",
    "hopes that we will phone <when>",
    "gave a number and wants us to use it <when>",
    "asked twice whether we could ring <when>",
    "said a call from us <when> would help",
)
_NOTES_NO: Final = (
    "declined a further call from us",
    "prefers to ring us if it is needed",
    "asked that we do not phone <when> or after",
    "said one talk was enough",
    "at first asked for a call <when>, then took that back",
    "gave no number and wishes no follow-up",
    "would rather see a doctor <when> than hear from us",
    "thanked us and said no to a follow-up <when>",
)
_NOTES_NOISE: Final = (
    "<Kin> will phone the caller <when>.", "<Kin> wanted us to ring, caller did not comment.",
    "Caller means to ring their <kin> <when>.", "<Kin> has said no to further visits.",
    "Doctor's surgery will ring <when>.", "Line dropped once, caller rang again.", "<Kin> declined to come over.",
)  # fmt: skip
_NOTES_STATE: Final = (
    "Spoke of <topic>.", "Voice <voice>, calmer by the end.",
    "Feels low since <topic>.", "Has eaten, no drink taken.", "Says that nights are hardest.", "<Kin> is in the house.",
    "Alone tonight.",
)  # fmt: skip


def _crisis_notes(rng: random.Random, answers: Sequence[bool]) -> tuple[str, list[str]]:
    """Write one call note and its response."""
    (call_back,) = answers
    slots = {**_NOTES_SLOTS, "Kin": [kin.capitalize() for kin in _NOTES_SLOTS["kin"]]}
    fact = fill(rng.choice(_NOTES_YES if call_back else _NOTES_NO), slots, rng)
    body = [fill(text, slots, rng) for text in rng.sample(_NOTES_STATE, rng.choice((2, 3)))]
    body.append(f"Caller {fact}." if rng.random() < 0.5 else f"{fact[0].upper()}{fact[1:]}.")
    if rng.random() < 0.5:
        body.append(fill(rng.choice(_NOTES_NOISE), slots, rng))
    rng.shuffle(body)
    post = " ".join([fill(rng.choice(_NOTES_OPEN), slots, rng), fill(rng.choice(_NOTES_CONTEXT), slots, rng), *body])
    end = "so we should ring" if call_back else "so we should not"
    return post, [
        f"{'Yes, the caller wants' if call_back else 'No, the caller does not want'} us to call back. "
        f"Reasoning: the note records that the caller {fact}, {end}."
    ]


_WRITERS: Final[Mapping[str, Callable[[random.Random, Sequence[bool]], tuple[str, list[str]]]]] = MappingProxyType(
    {"peer_forum": _peer_forum, "student_inbox": _student_inbox, "crisis_notes": _crisis_notes}
)


def generate(corpus: str, n_units: int, seed: int) -> list[Row]:
    """Return the rows of an invented corpus.

    The first units of a longer corpus are the units of a shorter one with the same seed.

    Args:
        corpus: A key of ``CORPORA``.
        n_units: How many posts; each gives one row for each of the corpus's questions.
        seed: The seed; another seed gives other posts.

    Returns:
        Rows with the keys ``unit_id``, ``post``, ``question``, ``response`` and ``label`` ("yes" or "no"). No
        two units have the same post.

    Raises:
        DataError: If the corpus is unknown or ``n_units`` is negative.
    """
    if corpus not in CORPORA:
        raise DataError(f"unknown invented corpus: got {corpus!r}, allowed {sorted(CORPORA)}")
    if n_units < 0:
        raise DataError(f"n_units counts posts: got {n_units}, allowed 0 or more")
    description = CORPORA[corpus]
    seen: set[str] = set()
    rows: list[Row] = []
    for index in range(n_units):
        rng = random.Random(f"fedmentor invented {corpus} {seed} {index}")
        answers = [rng.random() < share for share in description.yes_share]
        post, responses = _WRITERS[corpus](rng, answers)
        while post in seen:
            post, responses = _WRITERS[corpus](rng, answers)
        seen.add(post)
        for question, response, answer in zip(description.questions, responses, answers, strict=True):
            rows.append(
                {
                    "unit_id": f"{corpus}-{seed}-{index:05d}",
                    "post": post,
                    "question": question,
                    "response": response,
                    "label": "yes" if answer else "no",
                }
            )
    return rows
