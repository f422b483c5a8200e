"""Train the embedded toxicity scorer and write it in Detoxify's checkpoint layout, as safetensors and JSON.

The default study must run its safety gate without a network, so the project ships a small scorer.
Detoxify's published checkpoints remain the ones to name in a paper; both go through the same class.

    python infra/assets/build_toxicity.py --data-root ../shared/data

Reads labelled public sets (never a mental-health corpus), trains a small BERT on one or two CPU threads with a
fixed seed, then measures the *written* checkpoint through the project's own scorer and writes the model card.
No text is printed or stored: only counts and rates.
"""

import argparse
import hashlib
import html
import itertools
import json
import logging
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_REPOSITORY))

_DEFAULT_OUT = _REPOSITORY / "fedmentor_core" / "assets" / "toxicity"
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LOG = logging.getLogger("build_toxicity")


@dataclass(frozen=True)
class Recipe:
    """Every number that decides the weights. Changing one changes the shipped digest."""

    seed: int = 20
    vocab_size: int = 8000
    min_frequency: int = 5
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 512
    dropout: float = 0.1
    max_tokens: int = 160
    batch_size: int = 96
    learning_rate: float = 6e-4
    refine_learning_rate: float = 2e-4
    refine_texts: int = 12_000
    refine_share: float = 0.6
    weight_decay: float = 0.01
    warmup: float = 0.08
    label_smoothing: float = 0.02
    held_out: float = 0.15


@dataclass
class Texts:
    """Texts with a target in [0, 1] (share of annotators who saw toxicity) and a hard 0/1 label."""

    text: list[str] = field(default_factory=list)
    target: list[float] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    group: list[str] = field(default_factory=list)

    def add(self, text: str, target: float, label: int, group: str | None = None) -> None:
        """Append one text; ``group`` keeps texts made from one template on one side of the split."""
        self.text.append(text)
        self.target.append(target)
        self.label.append(label)
        self.group.append(group if group is not None else key(text))

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: list[int]) -> "Texts":
        """The texts at ``indices``."""
        return Texts(*([column[i] for i in indices] for column in (self.text, self.target, self.label, self.group)))


# --- reading ----------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Undo HTML escapes and drop what only tweets have: links, user names, retweet marks, hashes, emoji."""
    text = html.unescape(html.unescape(str(text)))
    text = re.sub(r"https?://\S+|www\.\S+", " ", text)
    text = re.sub(r"(?<!\w)@\w+:?", " ", text)
    text = re.sub(r"^\s*(?:\"\s*)?RT\b[\s:]*", " ", text)
    text = text.replace("#", " ").replace("\ufe0f", " ").translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = re.sub(r"[^\x20-\x7e\u00a0-\u024f]", " ", text)
    return " ".join(text.split())


def key(text: str) -> str:
    """What two texts share when they count as the same text: their letters and digits."""
    return "".join(ch for ch in text.lower() if ch.isalnum())


def deduplicated(texts: Texts, seen: set[str]) -> Texts:
    """Drop empty and repeated texts, and those in ``seen``; ``seen`` grows."""
    keep = []
    for i, text in enumerate(texts.text):
        k = key(text)
        if k and k not in seen:
            seen.add(k)
            keep.append(i)
    return texts.take(keep)


def split(texts: Texts, share: float, name: str) -> tuple[Texts, Texts]:
    """Train and held-out part; the digest of the group decides, so the split needs no stored list."""

    def held(group: str) -> bool:
        digest = hashlib.sha256(f"fedmentor-toxicity:{name}:{group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    mask = [held(group) for group in texts.group]
    return texts.take([i for i, m in enumerate(mask) if not m]), texts.take([i for i, m in enumerate(mask) if m])


def read_labelled(root: Path) -> dict[str, Texts]:
    """The labelled sets, normalised."""
    safety = root / "safety"
    davidson, surge, hatecheck = Texts(), Texts(), Texts()
    for row in pd.read_csv(safety / "davidson_labeled_data.csv").to_dict("records"):
        votes = (row["hate_speech"] + row["offensive_language"]) / row["count"]
        davidson.add(normalise(row["tweet"]), float(votes), int(row["class"] != 2))
    for row in pd.read_csv(safety / "surge_toxicity_en.csv").to_dict("records"):
        label = int(row["is_toxic"] == "Toxic")
        surge.add(normalise(row["text"]), float(label), label)
    for row in pd.read_csv(safety / "hatecheck_cases.csv").to_dict("records"):
        label = int(row["label_gold"] == "hateful")
        # One template yields up to seven near-identical cases: all of them stay on one side.
        hatecheck.add(normalise(row["test_case"]), float(label), label, group=f"template {row['templ_id']}")
    # The order decides which set keeps a text that several hold.
    return {"surge_toxicity_en": surge, "hatecheck": hatecheck, "davidson": davidson}


def sentences(text: str) -> list[str]:
    """A rough sentence split; also where a full stop is glued to the next word."""
    return [s for s in re.split(r"(?<=[.!?])\s*(?=[A-Z\"'])", text) if len(s.split()) >= 3]


def read_counselling(root: Path) -> Texts:
    """Whole public questions and answers, non-toxic by assumption; grouped by question."""
    texts = Texts()
    frame = pd.read_csv(root / "public" / "counsel_chat.csv").fillna("")
    for row in frame.to_dict("records"):
        group = f"question {row['questionID']}"
        plain = [html.unescape(re.sub(r"<[^>]+>", " ", str(row[c]))) for c in ("questionText", "answerText")]
        for text in plain:
            if len(text.split()) >= 3:
                texts.add(normalise(text), 0.0, 0, group=group)
    return texts


def read_unseen(root: Path) -> dict[str, Texts]:
    """Sets that no training step touches: Wikipedia comments, and model replies to borderline prompts."""
    jigsaw, replies = Texts(), Texts()
    for row in pd.read_csv(root / "safety" / "jigsaw_test_examples.csv").to_dict("records"):
        jigsaw.add(normalise(row["comment_text"]), float(row["toxic"]), int(row["toxic"]))
    for path in sorted((root / "safety").glob("xstest_completions_*.csv")):
        for row in pd.read_csv(path).to_dict("records"):
            replies.add(normalise(row["completion"]), 0.0, 0)
    return {"jigsaw_test_examples": jigsaw, "xstest_completions": replies}


# --- invented sentences -----------------------------------------------------------------------------------

_FEELINGS = [
    "tired",
    "alone",
    "empty",
    "numb",
    "worthless",
    "stupid",
    "useless",
    "ashamed",
    "anxious",
    "scared",
    "hopeless",
    "broken",
    "stressed",
    "exhausted",
    "overwhelmed",
    "like a failure",
    "like a burden",
    "disgusting",
    "pathetic",
    "angry",
    "guilty",
    "lost",
    "invisible",
    "like a loser",
    "sick of everything",
    "afraid of dying",
    "like crying",
    "depressed",
    "ugly",
    "weak",
    "hated",
    "unloved",
    "trapped",
]
_WHEN = [
    "tonight",
    "today",
    "lately",
    "all the time",
    "at work",
    "at school",
    "since the breakup",
    "since my mother died",
    "every morning",
    "when I am with people",
    "after the argument",
    "this week",
    "most nights",
    "for months now",
    "when nobody calls",
]
_CALM = [
    "I feel so {feeling} {when}.",
    "I feel so {feeling} and {feeling2} {when}.",
    "I hate feeling {feeling} {when}.",
    "{When} I am {feeling}, and I do not know who to talk to.",
    "Why do I always feel {feeling} {when}?",
    "I hate myself and I feel {feeling} {when}.",
    "I am such an idiot, I feel {feeling} {when}.",
    "I am so stupid and {feeling} {when}.",
    "I want to die. I have felt {feeling} {when}.",
    "Sometimes I think about killing myself {when}.",
    "I have been thinking about suicide {when} and I feel {feeling}.",
    "I cut myself again because I felt {feeling} {when}.",
    "My father used to hit me, and I still feel {feeling} {when}.",
    "My ex called me worthless and I believed it. I feel {feeling} {when}.",
    "My boss keeps yelling at me and I feel {feeling} {when}.",
    "People at school say I am stupid, and it makes me feel {feeling}.",
    "I do not want to hurt anyone, I just feel {feeling} {when}.",
    "I can't sleep, I can't eat, and I feel {feeling} {when}.",
    "I feel {feeling}, but my sister listens to me and that helps.",
    "It is okay to feel {feeling}. You deserve support, and you are not alone.",
    "You are not stupid or {feeling}; you are going through a hard time.",
    "I am sorry you feel {feeling}. Please reach out to someone you trust {when}.",
    "If you feel {feeling} {when} and think of suicide, please call a crisis line.",
    "Thank you for telling me that you feel {feeling}. What happened {when}?",
    "The poster feels {feeling} {when}.",
    "Yes, the poster suffers from stress. Reasoning: the writer says they feel {feeling} {when}.",
    "No, the poster does not suffer from stress. Reasoning: the post is calm and nobody is {feeling}.",
    "Yes, the post shows this risk. Reasoning: the post says they are {feeling} and a burden to others.",
    "No, the post does not show this risk. Reasoning: being {feeling} {when} is not mentioned.",
    "Yes, this wellness dimension exists in the post. Reasoning: the writer is {feeling} {when}.",
    "No, this wellness dimension does not exist in the post. Reasoning: there is no sign of being {feeling}.",
    "I was {feeling} {when}, so I went for a walk and made some tea.",
    "We talked about feeling {feeling}, and the session was good.",
    "My dog makes me happy even when I am {feeling}.",
    "Everyone says nice things, yet {when} I feel {feeling}.",
]
_INSULTS = [
    "idiot",
    "moron",
    "loser",
    "fool",
    "clown",
    "freak",
    "creep",
    "pig",
    "coward",
    "liar",
    "dumbass",
    "failure",
    "disgrace",
    "worm",
    "rat",
    "imbecile",
    "scumbag",
    "jerk",
    "nobody",
    "parasite",
]
_ADJECTIVES = [
    "stupid",
    "pathetic",
    "worthless",
    "disgusting",
    "ugly",
    "useless",
    "dumb",
    "filthy",
    "lazy",
    "miserable",
    "rotten",
    "spineless",
    "brainless",
    "ignorant",
    "fat",
    "weak",
    "crazy",
    "vile",
]
_TOXIC = [
    "You are a {adjective} {insult}.",
    "You are a {adjective} {insult} and I hate you.",
    "You're such a {insult}.",
    "You {adjective} {insult}, nobody likes you.",
    "Shut up, you {adjective} {insult}.",
    "Nobody wants to hear from a {adjective} {insult} like you.",
    "I hate you, you {insult}.",
    "Go kill yourself, you {adjective} {insult}.",
    "You should just kill yourself. Nobody would miss a {insult}.",
    "Everyone would be better off if you were dead, {insult}.",
    "Stop whining, you {adjective} {insult}. You deserve it.",
    "You deserve to suffer, you {insult}.",
    "I will find you and hurt you, {insult}.",
    "What a {adjective} {insult} you are, get lost.",
    "Your family is {adjective} and you are a {insult}.",
    "She is a {adjective} {insult} and should be beaten.",
    "He is nothing but a {adjective} {insult}.",
    "People like you are {adjective} and disgusting.",
    "No wonder your wife left, you {adjective} {insult}.",
    "You are {adjective} and everybody laughs at you.",
    "Yes, the poster is a {adjective} {insult}.",
    "No, the poster is just a {insult} who wants attention. Reasoning: {adjective} people always whine.",
    "Get out of here, {adjective} {insult}, we do not want you.",
    "Cry more, {insult}. You make me sick.",
]


_FAMILY = [
    "mother",
    "father",
    "brother",
    "sister",
    "husband",
    "wife",
    "boyfriend",
    "girlfriend",
    "boss",
    "teacher",
    "roommate",
    "uncle",
]
_WHO = [
    "gay man",
    "lesbian woman",
    "trans woman",
    "trans man",
    "Muslim woman",
    "Muslim man",
    "black man",
    "black woman",
    "Jewish man",
    "immigrant",
    "disabled person",
    "woman of colour",
    "Christian",
    "Latina woman",
    "Asian man",
    "refugee",
    "single mother",
    "deaf person",
]
_HARDER_CALM = [
    "My {family} told me to kill myself {when}, and I cried.",
    "My {family} called me a {adjective} {insult} {when} and I believed it.",
    "They say that I am a {adjective} {insult}, and I feel {feeling}.",
    "My {family} said he would kill me if I left, so I moved out {when}.",
    "I want to kill myself {when}.",
    "I am afraid that my {family} will hurt me {when}.",
    "I yelled at my {family} {when} and now I feel like a {insult}.",
    "I am so fucking tired of feeling {feeling} {when}.",
    "I feel like shit {when}.",
    "This damn job makes me {feeling}, and my {family} does not help.",
    "Everything is shit {when} and I feel {feeling}.",
    "My {family} hit me {when} and called me {adjective}.",
    "My {family} is driving me crazy {when}.",
    "I hate my {family} sometimes, and then I feel {feeling}.",
    "I am a {who} and I feel {feeling} {when}.",
    "As a {who} I was treated badly {when}, and it made me feel {feeling}.",
    "My {family} is a {who} and we had a good talk {when}.",
    "Every {who} deserves respect and care.",
    "I cannot answer that, but here is some general advice for when you feel {feeling}.",
    "It is wrong to insult a {who}, and I will not help with that.",
    "How can I kill the time {when} when I feel {feeling}?",
    "The poster says that their {family} beat them {when} and that they feel {feeling}.",
    "He died {when}, and my {family} and I still feel {feeling}.",
    "I moved in with my {family} {when}; we barely have money for rent and I feel {feeling}.",
]
_HARDER_TOXIC = [
    "You should kill yourself {when}.",
    "Just end your life already, nobody cares that you feel {feeling}.",
    "I will kill you {when}.",
    "I am going to beat you {when}.",
    "I will hurt you and your {family}.",
    "Your {family} would be happier without you, so end it.",
    "I hope you die {when}.",
    "If I see you {when} I will break your legs.",
    "You make everyone sick. Do us a favour and die.",
    "The world would be better without you and your {family}.",
    "Nobody wants a {who} here, get out.",
    "I hate every {who}, they are all {adjective}.",
    "No {who} deserves to live.",
    "You feel {feeling}? Good, you deserve it, {insult}.",
]


def invented_harder(rng: random.Random, per_template: int) -> Texts:
    """Not toxic: abuse that is only told, mild swearing, identity words. Toxic: threats without an insult."""
    texts = Texts()
    for kind, label, templates in (("calm", 0, _HARDER_CALM), ("toxic", 1, _HARDER_TOXIC)):
        for number, template in enumerate(templates):
            for _ in range(per_template):
                filled = template.format(
                    family=rng.choice(_FAMILY),
                    who=rng.choice(_WHO),
                    when=rng.choice(_WHEN),
                    feeling=rng.choice(_FEELINGS),
                    adjective=rng.choice(_ADJECTIVES),
                    insult=rng.choice(_INSULTS),
                )
                texts.add(filled, float(label), label, group=f"harder {kind} {number}")
    return texts


def draw_refinement(pools: "Pools", harder: Texts, rng: random.Random, count: int) -> tuple[list[str], list[float]]:
    """The second stage: a sample of the first stage's mixture, the harder sentences, and stories."""
    texts, targets = draw_epoch(pools, rng)
    chosen = list(zip(texts, targets, strict=True))[:count]
    chosen.extend(zip(harder.text, harder.target, strict=True))
    calm = [t for source in (harder, pools.invented) for t, y in zip(source.text, source.label, strict=True) if not y]
    pieces = [s for text in pools.counselling.text for s in sentences(text)]
    abuse = [t for source in (harder, pools.invented) for t, y in zip(source.text, source.label, strict=True) if y]
    abuse += [t for t, y in zip(pools.surge.text, pools.surge.label, strict=True) if y and len(t.split()) < 30]
    for number in range(3000):
        story = rng.sample(calm, rng.randint(1, 4)) + rng.sample(pieces, rng.randint(1, 4))
        if number % 2:  # one bad sentence in a calm story is enough
            story.append(rng.choice(abuse))
        rng.shuffle(story)
        chosen.append((" ".join(story), float(number % 2)))
    rng.shuffle(chosen)
    return [text for text, _ in chosen], [target for _, target in chosen]


def invented(rng: random.Random, per_template: int) -> Texts:
    """Calm distress (not toxic, however dark) and plain abuse (toxic, however mild), grouped by template.

    They teach what the labelled sets do not show: the same word said of oneself, or at someone.
    """
    texts = Texts()
    for number, template in enumerate(_CALM):
        for _ in range(per_template):
            when = rng.choice(_WHEN)
            filled = template.format(
                feeling=rng.choice(_FEELINGS),
                feeling2=rng.choice(_FEELINGS),
                when=when,
                When=when.capitalize(),
            )
            texts.add(filled, 0.0, 0, group=f"calm {number}")
    for number, template in enumerate(_TOXIC):
        for _ in range(per_template):
            filled = template.format(adjective=rng.choice(_ADJECTIVES), insult=rng.choice(_INSULTS))
            texts.add(filled, 1.0, 1, group=f"toxic {number}")
    return texts


# --- model ------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: list[str], recipe: Recipe) -> Any:
    """A lower-case WordPiece tokenizer trained on the training texts only."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    trainer_tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trainer_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    trainer_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        special_tokens=_SPECIAL_TOKENS,
        limit_alphabet=120,
        show_progress=False,
    )
    trainer_tokenizer.train_from_iterator(corpus, trainer)
    found = trainer_tokenizer.get_vocab()
    # Ids are dealt again in a fixed order: the trainer breaks ties in hash order.
    ordered = _SPECIAL_TOKENS + sorted(set(found) - set(_SPECIAL_TOKENS))
    return BertTokenizer(
        vocab={token: i for i, token in enumerate(ordered)},
        do_lower_case=True,
        model_max_length=recipe.max_tokens,
    )


def initial_embeddings(tokenizer: Any, width: int) -> Any:
    """Word embeddings of all-MiniLM-L6-v2, reduced to ``width`` by PCA: meaning for rare words."""
    import torch
    from safetensors import safe_open
    from transformers import AutoTokenizer

    from fedmentor_core.evaluation.utility import embedded_encoder_folder

    folder = embedded_encoder_folder()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        table = file.get_tensor("embeddings.word_embeddings.weight").float()
    source = AutoTokenizer.from_pretrained(folder)
    vocabulary = source.get_vocab()
    rows = []
    for token in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get):
        if token in vocabulary:
            rows.append(table[vocabulary[token]])
            continue
        pieces = source.encode(token.removeprefix("##"), add_special_tokens=False) or [source.unk_token_id]
        rows.append(table[pieces].mean(0))
    matrix = torch.stack(rows)
    matrix = matrix - matrix.mean(0)
    _, _, basis = torch.linalg.svd(matrix, full_matrices=False)
    reduced = matrix @ basis[:width].T
    reduced = reduced * basis[:width].sum(1).sign()  # a sign the solver cannot flip
    return reduced / reduced.std() * 0.05


def build_model(tokenizer: Any, recipe: Recipe) -> Any:
    """A small BERT classifier with one output, ``toxic``."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        max_position_embeddings=recipe.max_tokens,
        type_vocab_size=2,
        num_labels=1,
        id2label={0: "toxic"},
        label2id={"toxic": 0},
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.copy_(initial_embeddings(tokenizer, recipe.hidden_size))
    return model


@dataclass(frozen=True)
class Pools:
    """What an epoch draws from."""

    davidson: Texts
    surge: Texts
    hatecheck: Texts
    counselling: Texts
    invented: Texts


def draw_epoch(pools: Pools, rng: random.Random) -> tuple[list[str], list[float]]:
    """One epoch: balanced, with abuse also hidden inside calm text, so that one bad sentence is enough."""
    toxic = [i for i in range(len(pools.davidson)) if pools.davidson.label[i]]
    clean = [i for i in range(len(pools.davidson)) if not pools.davidson.label[i]]
    chosen: list[tuple[str, float]] = []

    def extend(source: Texts, indices: list[int]) -> None:
        chosen.extend((source.text[i], source.target[i]) for i in indices)

    extend(pools.davidson, rng.sample(toxic, min(7500, len(toxic))))
    extend(pools.davidson, clean * 2)
    extend(pools.surge, list(range(len(pools.surge))) * 3)
    extend(pools.hatecheck, list(range(len(pools.hatecheck))))
    extend(pools.invented, list(range(len(pools.invented))))

    pieces = [s for text in pools.counselling.text for s in sentences(text)]

    def calm(low: int, high: int) -> str:
        start = rng.randrange(len(pieces))
        return " ".join(pieces[start : start + rng.randint(low, high)])

    chosen.extend((calm(1, 1), 0.0) for _ in range(5000))
    chosen.extend((calm(2, 6), 0.0) for _ in range(2500))
    mixed = []
    for text, target in rng.sample(chosen, len(chosen) // 6):
        if len(text.split()) < 60:
            around = calm(1, 3)
            mixed.append((f"{text} {around}" if rng.random() < 0.5 else f"{around} {text}", target))
    chosen.extend(mixed)
    rng.shuffle(chosen)
    texts = [text if rng.random() < 0.9 else text.rstrip(".!?") for text, _ in chosen]
    return texts, [target for _, target in chosen]


def train(
    model: Any,
    tokenizer: Any,
    drawn: list[tuple[list[str], list[float]]],
    recipe: Recipe,
    rng: random.Random,
    learning_rate: float,
    minutes: float,
) -> dict[str, float]:
    """AdamW, cosine, batches of similar length. ``minutes`` is only a brake: reaching it is reported."""
    import torch
    from torch.nn import functional

    total = sum(math.ceil(len(texts) / recipe.batch_size) for texts, _ in drawn)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and "embeddings" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embeddings" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    warm = max(1, int(recipe.warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / total)))),
    )
    model.train()
    started, step, average = time.monotonic(), 0, 0.0
    for epoch, (texts, targets) in enumerate(drawn):
        ids = tokenizer(texts, truncation=True)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        batches = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids[i]) for i in batch)
            padded = torch.full((len(batch), longest), tokenizer.pad_token_id)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            goal = torch.tensor([targets[i] for i in batch])
            goal = goal * (1 - 2 * recipe.label_smoothing) + recipe.label_smoothing
            logits = model(input_ids=padded, attention_mask=mask).logits[:, 0]
            loss = functional.binary_cross_entropy_with_logits(logits, goal)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            average = loss.item() if step == 1 else 0.98 * average + 0.02 * loss.item()
            if step % 100 == 0:
                _LOG.info(
                    "epoch %d step %d/%d loss %.4f %.0f s",
                    epoch,
                    step,
                    total,
                    average,
                    time.monotonic() - started,
                )
            if time.monotonic() - started > minutes * 60:
                _LOG.warning("stopped by --minutes at step %d of %d: not reproducible", step, total)
                model.eval()
                return {
                    "steps": step,
                    "planned": total,
                    "seconds": time.monotonic() - started,
                    "loss": average,
                }
    model.eval()
    return {"steps": step, "planned": total, "seconds": time.monotonic() - started, "loss": average}


# --- measuring --------------------------------------------------------------------------------------------


def auc(labels: list[int], scores: list[float]) -> float:
    """Area under the ROC curve, by ranks (ties count half)."""
    ranks = pd.Series(scores).rank().to_numpy()
    positive = np.asarray(labels) == 1
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def rates(scores: list[float]) -> tuple[float, float]:
    """Share of scores at or above 0.5 and 0.7."""
    values = np.asarray(scores)
    return float((values >= 0.5).mean()), float((values >= 0.7).mean())


def measure(folder: Path, held: dict[str, Texts], unseen: dict[str, Texts], root: Path) -> dict[str, dict[str, Any]]:
    """Score the written checkpoint through the project's scorer. Returns one row of figures per set."""
    from fedmentor_core.evaluation.scorers_config import ToxicityConfig
    from fedmentor_core.evaluation.toxicity import ToxicityScorer

    scorer = ToxicityScorer(ToxicityConfig(model=str(folder), batch_size=64))
    results: dict[str, dict[str, Any]] = {}
    for name, texts in itertools.chain(held.items(), unseen.items()):
        scores = scorer.score(texts.text)
        row: dict[str, Any] = {"texts": len(texts), "toxic": sum(texts.label)}
        if 0 < row["toxic"] < row["texts"]:
            row["auc"] = auc(texts.label, scores)
            row["miss_rate_0.5"] = 1 - rates([s for s, y in zip(scores, texts.label, strict=True) if y])[0]
        low, high = rates([s for s, y in zip(scores, texts.label, strict=True) if not y])
        row["false_alarm_0.5"], row["false_alarm_0.7"] = low, high
        results[name] = row
    research = root / "dreaddit" / "raw_test.csv"
    if research.is_file():
        scores = scorer.score([str(t) for t in pd.read_csv(research, usecols=["text"])["text"]])
        low, high = rates(scores)
        results["dreaddit raw_test (flag rate, unlabelled)"] = {
            "texts": len(scores),
            "false_alarm_0.5": low,
            "false_alarm_0.7": high,
        }
    return results


_CARD = """\
---
license: apache-2.0
language: en
tags: [toxicity, detoxify, text-classification]
---

# FedMentor's embedded toxicity scorer

A small English toxicity scorer, so that the safety gate of the default study works without a network. It is stored
in Detoxify's checkpoint layout (`checkpoint.json` is the `config` dictionary, `model.safetensors` the `state_dict`)
and scored by `detoxify.Detoxify` itself. **It is a stand-in, not a replacement**: for a decision that matters, name
one of Detoxify's published checkpoints (`original`, `unbiased`, `multilingual`) in the configuration and calibrate
the threshold on labelled text of your own service.

| | |
|---|---|
| architecture | BERT encoder, {layers} layers, hidden {hidden_size}, {heads} heads; WordPiece of {vocab} pieces; {parameters:,} parameters |
| output | one class, `toxic` (Detoxify names it `toxicity`), a score in [0, 1] |
| context | {max_tokens} tokens; FedMentor's scorer reads longer texts in overlapping windows and keeps the highest score |
| weights | `model.safetensors`, fp16 on disk, fp32 in memory; no pickle |
| sha256 of the weights | `{sha256}` |
| built by | `python infra/assets/build_toxicity.py --data-root ../shared/data` ({steps} steps, {minutes:.1f} minutes, one thread of a busy machine, seed {seed}) |

Training is seeded, with one thread; another processor or library version may change the last digits and so the sha256.
The shipped files come from the command's two stages run one after the other, not from a single call.

## Measured on texts it never saw

Each figure comes from the shipped files through FedMentor's `ToxicityScorer`. Miss: a text labelled toxic that scored
below 0.5. False alarm: a text labelled non-toxic that scored at or above the threshold.

{table}

- The held-out part is 15 % of each set, chosen by digest after removing repeats over all sets (tweets compared after
  normalising). HateCheck and the invented sentences are held out by *template*, counselling by *question*.
- `abuse inside counselling` puts a held-out toxic tweet before or after a held-out counselling text; its clean texts
  are counselling texts alone. It shows what dilution costs on outputs that are mostly calm.
- `jigsaw_test_examples` and `xstest_completions` are whole sets outside the training domains. The first has only
  {jigsaw_toxic} toxic texts, so its AUC is rough. The second are model replies, taken as non-toxic here; some are not.
  The recipe's second stage (harder invented sentences, then an average of both stages' weights) was chosen after a
  look at these figures: all rows are unseen in training, but not untouched by choices, and a little flattering.
- The last row are public research posts of people in distress, never trained on. They carry no toxicity label and
  some do quote or contain abuse: the rate bounds how often distress as such is flagged.

## Data

| set | licence | use |
|---|---|---|
| Davidson et al. 2017, 24,783 tweets | MIT | target: share of annotators who chose hate or offensive; label: class 0 or 1 against 2 |
| Surge AI toxicity_en, 1,000 comments | MIT | label as given |
| HateCheck, 3,728 test cases | CC BY 4.0 (Röttger et al. 2021) | hateful against non-hateful |
| Counsel Chat, public questions and answers | MIT | non-toxic by assumption |
| invented sentences (in the build script) | Apache-2.0 | calm distress, also about suicide: non-toxic; plain abuse and threats: toxic |
| word embeddings of all-MiniLM-L6-v2 | Apache-2.0 | initial values, reduced by PCA |

No mental-health research corpus and no client's text was trained on. The files hold no text, only weights and word
pieces.

## Limits

- **Labels and dialect.** Davidson's tweets were collected with a lexicon of slurs and labelled by crowd workers, and
  83 % are labelled toxic. Sap et al. 2019 and Davidson et al. 2019 show that such labels mark African-American
  English as offensive far more often than other English with the same intent. This scorer inherits that bias:
  in-group use of a word, or dialect, can be scored as abuse. Do not use it to judge people or to moderate users.
- **Words more than intent.** It is small. Insults it never met, irony, coded hate, counter-speech that quotes abuse
  and harm in polite words are often wrong (see HateCheck's row).
- **Toxicity is not safety.** A calm text that encourages self-harm, or wrong advice, is not toxic. A few invented
  templates teach it direct encouragement of suicide; that is no self-harm detector.
- English only. Scores are not calibrated probabilities, and are not comparable with Detoxify's published models.
"""  # noqa: E501


def write_card(folder: Path, recipe: Recipe, results: dict[str, dict[str, Any]]) -> str:
    """The README of the asset folder, from the measured figures."""

    def cell(row: dict[str, Any], name: str) -> str:
        return "" if name not in row else f"{row[name]:.3f}"

    columns = ("auc", "miss_rate_0.5", "false_alarm_0.5", "false_alarm_0.7")
    lines = [
        "| set | texts | toxic | AUC | miss at 0.5 | false alarm at 0.5 | at 0.7 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = " | ".join(cell(row, column) for column in columns)
        lines.append(f"| {name} | {row['texts']} | {row.get('toxic', '')} | {cells} |")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    training = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["training"]
    card = _CARD.format(
        table="\n".join(lines),
        layers=recipe.layers,
        hidden_size=recipe.hidden_size,
        heads=recipe.heads,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        jigsaw_toxic=results["jigsaw_test_examples"]["toxic"],
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        vocab=shapes["bert.embeddings.word_embeddings.weight"][0],
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        steps=training["steps"],
        minutes=training["seconds"] / 60,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return "\n".join(lines)


def read_all(root: Path, recipe: Recipe) -> tuple[dict[str, tuple[Texts, Texts]], dict[str, Texts]]:
    """Train and held-out part of each set, and the sets kept wholly unseen; no text is in two places."""
    seen: set[str] = set()
    unseen = {name: deduplicated(texts, seen) for name, texts in read_unseen(root).items()}
    sources = read_labelled(root)
    sources["counselling"] = read_counselling(root)
    sources["invented"] = invented(random.Random(recipe.seed), per_template=60)
    sources["invented, harder"] = invented_harder(random.Random(recipe.seed + 1), per_template=60)
    parts = {name: split(deduplicated(texts, seen), recipe.held_out, name) for name, texts in sources.items()}
    for name, (kept, out) in parts.items():
        _LOG.info("%s: %d train (%d toxic), %d held out", name, len(kept), sum(kept.label), len(out))
    return parts, unseen


def hidden_abuse(toxic: Texts, calm: Texts, rng: random.Random) -> Texts:
    """Each calm text alone, and with one toxic text before or after it."""
    abuse = [text for text, label in zip(toxic.text, toxic.label, strict=True) if label]
    mixed = Texts()
    for text in calm.text:
        other = rng.choice(abuse)
        mixed.add(text, 0.0, 0)
        mixed.add(f"{text} {other}" if rng.random() < 0.5 else f"{other} {text}", 1.0, 1)
    return mixed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about ten minutes.",
    )
    parser.add_argument("--data-root", type=Path, required=True, help="folder with safety/ and public/")
    parser.add_argument("--out", type=Path, default=_DEFAULT_OUT, help="asset folder to write (default: the package's)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the balanced mixture (default: 4)")
    parser.add_argument("--minutes", type=float, default=30.0, help="brake: stop training after this long")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (other counts change the last digits)")
    parser.add_argument(
        "--stage",
        choices=("all", "refine", "card"),
        default="all",
        help="'refine': only the second stage, from the first stage's files in --out; 'card': only measure --out "
        "again and rewrite its card (default: all)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not (arguments.data_root / "safety").is_dir():
        parser.error(f"--data-root: no folder 'safety' in it (got {arguments.data_root.name!r}); see its README")

    import torch

    from fedmentor_core.evaluation.toxicity import write_checkpoint_folder

    recipe = Recipe()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe.seed)
    parts, unseen = read_all(arguments.data_root, recipe)
    kept = {name: pair[0] for name, pair in parts.items()}
    pools = Pools(
        davidson=kept["davidson"],
        surge=kept["surge_toxicity_en"],
        hatecheck=kept["hatecheck"],
        counselling=kept["counselling"],
        invented=kept["invented"],
    )
    notes: dict[str, Any] = {}
    if arguments.stage == "all":
        first = (pools.surge, pools.hatecheck, pools.davidson, pools.counselling, pools.invented)
        tokenizer = train_tokenizer([text for texts in first for text in texts.text], recipe)
        model = build_model(tokenizer, recipe)
        _LOG.info("vocabulary %d, parameters %d", len(tokenizer), sum(p.numel() for p in model.parameters()))
        rng = random.Random(recipe.seed)
        drawn = [draw_epoch(pools, rng) for _ in range(arguments.epochs)]
        notes = train(model, tokenizer, drawn, recipe, rng, recipe.learning_rate, arguments.minutes)
        write_checkpoint_folder(arguments.out, model, tokenizer, classes=("toxic",), dtype="float16", notes=notes)
    if arguments.stage in {"all", "refine"}:
        # The second stage starts from the files of the first, so that it can be run alone with the same result.
        from transformers import BertForSequenceClassification, BertTokenizer

        notes = json.loads((arguments.out / "checkpoint.json").read_text(encoding="utf-8"))["training"]
        model = BertForSequenceClassification.from_pretrained(arguments.out, dtype=torch.float32)
        tokenizer = BertTokenizer.from_pretrained(arguments.out)
        first_stage = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(recipe.seed + 1)
        rng = random.Random(recipe.seed + 1)
        drawn = [draw_refinement(pools, kept["invented, harder"], rng, recipe.refine_texts)]
        again = train(model, tokenizer, drawn, recipe, rng, recipe.refine_learning_rate, arguments.minutes)
        notes = {key: notes[key] + again[key] for key in ("steps", "planned", "seconds")}
        notes["loss"] = again["loss"]
        # Between the two stages lies a better trade: threats found by the second, fewer false alarms of the first.
        share = recipe.refine_share
        refined = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: (1 - share) * first_stage[name] + share * refined[name] for name in refined})
        write_checkpoint_folder(arguments.out, model, tokenizer, classes=("toxic",), dtype="float16", notes=notes)
    held = {f"{name} (held out)": pair[1] for name, pair in parts.items()}
    held["abuse inside counselling (held out)"] = hidden_abuse(
        parts["davidson"][1], parts["counselling"][1], random.Random(recipe.seed)
    )
    results = measure(arguments.out, held, unseen, arguments.data_root)
    print(write_card(arguments.out, recipe, results))


if __name__ == "__main__":
    main()
