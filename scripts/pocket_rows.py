"""What the bundled checkpoint reads while it is trained: its tokenizer, and rows of questions, repeats and copies.

Data come from kvprofile.questions.tasks under the purpose "train", a fresh seed for every step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from pocket_model import POSITIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvprofile.corpus.generate import KINDS, generate_text
from kvprofile.questions.tasks import TASKS, exercise
from kvprofile.scoring.prompts import HINT_TOKENS, REPEAT_ALL, REPEAT_FROM

PAD, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '\n' if message['role'] == 'user' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SUFFIX = f"\n{ASSISTANT}\n"
"""What the chat template puts between a user's text and the answer."""

ANSWER, COPY, OTHER = 4.0, 0.5, 0.05
"""Loss weights of an answer token, a repeated token, and all other text."""

QUESTION_TASKS = {
    "needle": 3.0, "multi_key": 3.0, "multi_turn": 2.0, "lookup": 1.5, "variables": 1.0, "functions": 1.0,
    "prose": 2.0, "persona": 1.5, "multi_value": 0.7, "counting": 0.3,
}  # fmt: skip
"""How often each task is drawn where a row asks questions."""

CHAINS = ("variables", "functions", "multi_value")
"""Tasks whose answers are found in several steps, which are learned last."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training: steps, rows a step, row length, shares of rows that copy tokens and that repeat text.

    Tasks in CHAINS are drawn ``chain_weight`` times as often as QUESTION_TASKS says.
    """

    steps: int
    rows: int
    row_tokens: int
    copy_share: float
    repeat_share: float
    chain_weight: float = 1.0


def build_tokenizer(vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text of every kind; digits stay single so that numbers are spelled out."""

    def sample() -> list[str]:
        text = [generate_text(kind, seed, 1500) for kind in KINDS for seed in range(60)]
        for task in QUESTION_TASKS:
            for seed in range(150):
                made = exercise(task, "tokenizer", seed, 900, 8)
                text += [made.context, *(f"\n\n{q.text}{SUFFIX}{q.answer}" for q in made.questions)]
        return [*text, *[REPEAT_ALL, REPEAT_FROM] * 100]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


KINDS_OF_ROW = ("other", "copy", *TASKS)
"""What a token of a row belongs to, for the report while training; "other" is all that is not an answer."""

Piece = tuple[list[int], float, str]
"""Token ids, their loss weight, and one of KINDS_OF_ROW."""


class RowMaker:
    """Makes training rows, packed to a length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = len(tokenizer)
        self.seed = seed
        self.user, self.suffix = self.encode(f"{USER}\n"), self.encode(SUFFIX)
        self.end = self.encode(END)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens by their names."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def measure(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def batch(self, stage: Stage, step: int) -> dict[str, torch.Tensor]:
        """Ids, loss weights, kinds and positions, each [rows, row_tokens + 1], a function of seed and step only."""
        rng = random.Random(f"train:{self.seed}:{step}")
        rows = [self.row(rng, stage.row_tokens + 1, stage) for _ in range(stage.rows)]
        ids, weights, kinds = (torch.tensor([row[i] for row in rows]) for i in range(3))
        positions = torch.tensor([self.positions(rng, stage.row_tokens + 1) for _ in rows])
        return {"ids": ids, "weights": weights, "kinds": kinds, "positions": positions}

    @staticmethod
    def positions(rng: random.Random, length: int) -> list[int]:
        """Positions of a row; half of the rows leave gaps, so that short rows show the distances of long ones."""
        room = POSITIONS - length
        gaps = {}
        if rng.random() < 0.5:
            for place in (rng.randrange(1, length) for _ in range(rng.randrange(1, 4))):
                gaps[place] = rng.randrange(room + 1)
                room -= gaps[place]
        found, position = [], 0
        for index in range(length):
            position += gaps.get(index, 0)
            found.append(position)
            position += 1
        return found

    def row(self, rng: random.Random, length: int, stage: Stage) -> tuple[list[int], list[float], list[int]]:
        """One row of ``length`` ids, weights and indices into KINDS_OF_ROW."""
        ids: list[int] = []
        weights: list[float] = []
        kinds: list[int] = []
        drawn = rng.random()
        while len(ids) < length:
            room = length - len(ids)
            if drawn < stage.copy_share or room < 100:
                pieces = self._copies(rng, room)
            elif drawn < stage.copy_share + stage.repeat_share:
                pieces = self._repeat(rng, room)
            else:
                pieces = self._questions(rng, room, stage.chain_weight)
            for piece, weight, kind in pieces:
                ids += piece
                weights += [weight] * len(piece)
                kinds += [KINDS_OF_ROW.index(kind)] * len(piece)
        return ids[:length], weights[:length], kinds[:length]

    def _copies(self, rng: random.Random, room: int) -> list[Piece]:
        """Random tokens that occur again, some of them as the answer to a request."""
        span = rng.choice((rng.randrange(3, 12), rng.randrange(8, max(9, room // 2))))
        pool = [rng.randrange(len(SPECIAL_TOKENS), self.vocabulary) for _ in range(rng.choice((16, 64, 400)))]
        segment = [rng.choice(pool) for _ in range(span)]
        if rng.random() < 0.3:
            return self._repeat_turn(rng, segment, "copy")
        times = rng.randrange(2, max(3, min(8, room // span + 1)))
        return [(segment, OTHER, "other"), *[(segment, COPY, "copy")] * (times - 1)]

    def _repeat(self, rng: random.Random, room: int) -> list[Piece]:
        task = rng.choice(("repeat", "repeat", "repeat", "strings"))
        if rng.random() < 0.25:
            task = _draw(rng, QUESTION_TASKS)
        length = int((room // 2 - 16) * rng.uniform(0.2, 1.0))
        context = self.encode(exercise(task, "train", rng.randrange(2**48), max(20, length), 0, self.measure).context)
        return self._repeat_turn(rng, context[: room // 2 - 12], "strings" if task == "strings" else "repeat")

    def _repeat_turn(self, rng: random.Random, context: list[int], kind: str) -> list[Piece]:
        start = rng.randrange(HINT_TOKENS, len(context)) if len(context) > 3 * HINT_TOKENS and rng.random() < 0.4 else 0
        request = self.encode(REPEAT_ALL)
        if start:
            request = self.encode(REPEAT_FROM) + context[start - HINT_TOKENS : start]
        asked = self.user + context + request + self.suffix
        return [(asked, OTHER, "other"), (context[start:] + self.end, COPY, kind)]

    def _questions(self, rng: random.Random, room: int, chain_weight: float) -> list[Piece]:
        """A document, then a conversation that asks for what it says, each question once, until the room is used."""
        weights = {t: weight * (chain_weight if t in CHAINS else 1.0) for t, weight in QUESTION_TASKS.items()}
        task = _draw(rng, weights)
        length = int(room * rng.uniform(0.2, 0.8))
        made = exercise(task, "train", rng.randrange(2**48), length, room // 16, self.measure)
        pieces = [(self.user + self.encode(made.context), OTHER, "other")]
        for turn, question in enumerate(made.questions):
            opening = self.encode("\n\n" + question.text) if turn == 0 else self.user + self.encode(question.text)
            pieces.append((opening + self.suffix, OTHER, "other"))
            pieces.append((self.encode(question.answer) + self.end, ANSWER, task))
        return pieces


def _draw(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
