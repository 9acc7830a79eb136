"""The phrasebook: every expression the demo model is asked to know.

An expression is one meaning in three languages. This module generates all of
them, checks that no prompt has two right answers, and splits them by a hash of
their key, so that the same expression is never trained in one direction and
tested in another. It is pure Python: the tests, the trainer and the evaluation
all read the same grammar.

Run it to write the held-out file: `python grammar.py > heldout.jsonl`.
"""

import calendar
import hashlib
import json
from collections import Counter, defaultdict
from itertools import permutations
from typing import Iterator, NamedTuple

import phrases
from measures import CURRENCIES, MONTHS, SMALL, WEEKDAYS, date_words, fr_hours, spoken_time
from numerals import en_number, fr_number, sv_number

LANGUAGES = {"en": "English", "fr": "French", "sv": "Swedish"}
DIRECTIONS = list(permutations(LANGUAGES, 2))
HELD_OUT_PERCENT = 8
# How many held-out expressions of each category are evaluated, in 6 directions.
SAMPLE = {"number": 60, "time": 30, "date": 35, "price": 32, "phrase": 45}


class Expression(NamedTuple):
    """One meaning; `key` names it, `closed` keeps it out of the held-out set."""

    key: str
    category: str
    en: str
    fr: str
    sv: str
    closed: bool = False


def digest(text: str) -> int:
    """A hash that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sampled(key: str, percent: float) -> bool:
    """A fixed pseudo-random choice of about `percent` per cent of all keys."""
    return digest("sample " + key) % 10000 < percent * 100


def numbers() -> Iterator[Expression]:
    """0 to 9999; below 100 are the building blocks and stay in the training set."""
    for n in range(10000):
        yield Expression(f"number/{n}", "number", en_number(n), fr_number(n), sv_number(n), n < 100)


DAY_PARTS = {
    "am": ("in the morning", "du matin", "på morgonen", range(4, 11)),
    "pm": ("in the afternoon", "de l'après-midi", "på eftermiddagen", range(1, 5)),
    "eve": ("in the evening", "du soir", "på kvällen", range(6, 11)),
}


def times() -> Iterator[Expression]:
    """Spoken times, with and without the part of the day, and railway times."""
    for h in range(1, 13):
        for m in range(0, 60, 5):
            en, fr, sv = spoken_time(h, m)
            yield Expression(f"time/{h}:{m:02}", "time", en, fr, sv)
            for part, (in_en, in_fr, in_sv, hours) in DAY_PARTS.items():
                if h in hours:
                    words = (f"{en} {in_en}", f"{fr} {in_fr}", f"{sv} {in_sv}")
                    yield Expression(f"time/{h}:{m:02} {part}", "time", *words)
    for h in range(13, 24):
        for m in range(1, 60):
            oh, noll = ("oh ", "noll ") if m < 10 else ("", "")
            yield Expression(
                f"time/{h}:{m:02}",
                "time",
                f"{en_number(h)} {oh}{en_number(m)}",
                f"{fr_hours(h)} {fr_number(m, feminine=True)}",
                f"{sv_number(h)} {noll}{sv_number(m)}",
            )


def year_dates(day: int, month: int, year: int) -> Iterator[Expression]:
    """One day of one year: in words, in figures, and with its true weekday."""
    key, (en, fr, sv) = f"date/{year}-{month:02}-{day:02}", date_words(day, month)
    yield Expression(key, "date", f"the {en} {year}", f"le {fr} {year}", f"den {sv} {year}")
    months = MONTHS[month - 1]
    first = "1er" if day == 1 else str(day)
    figures = (f"{d} {name} {year}" for d, name in zip((day, first, day), months))
    yield Expression(key + " figures", "date", *figures)
    den, dfr, dsv = WEEKDAYS[calendar.weekday(year, month, day)]
    words = (f"{den} the {en} {year}", f"le {dfr} {fr} {year}", f"{dsv}en den {sv} {year}")
    yield Expression(key + " weekday", "date", *words)


def dates() -> Iterator[Expression]:
    """Every day of the year, with every weekday, and a sample with years."""
    for month in range(1, 13):
        for day in range(1, calendar.monthrange(2024, month)[1] + 1):
            key, (en, fr, sv) = f"date/{month:02}-{day:02}", date_words(day, month)
            yield Expression(key, "date", f"the {en}", f"le {fr}", f"den {sv}")
            for den, dfr, dsv in WEEKDAYS:
                words = (f"{den} the {en}", f"le {dfr} {fr}", f"{dsv}en den {sv}")
                yield Expression(f"{key} {den}", "date", *words)
    for year in range(1900, 2100):
        for month in range(1, 13):
            for day in range(1, calendar.monthrange(year, month)[1] + 1):
                for expression in year_dates(day, month, year):
                    if sampled(expression.key, 1.5):
                        yield expression


def joined(parts: list[tuple[str, str, str]]) -> tuple[str, str, str]:
    """Two amounts joined with "and" in each language."""
    en, fr, sv = zip(*parts)
    return (" and ".join(en), " et ".join(fr), " och ".join(sv))


def prices() -> Iterator[Expression]:
    """Whole amounts in four currencies, and euros and kronor with small change."""
    for code, currency in CURRENCIES.items():
        for n in range(1, 10000):
            key = f"price/{code}/{n}"
            if n < 100 or sampled(key, 40 if n < 1000 else 2):
                yield Expression(key, "price", *currency.amount(n))
    for code, small in SMALL.items():
        for cents in range(1, 100):
            if (code, cents) != ("EUR", 6):  # In French "six cents" is 600.
                yield Expression(f"price/{code}/0.{cents:02}", "price", *small.amount(cents))
            for n in range(1, 300):
                key = f"price/{code}/{n}.{cents:02}"
                if sampled(key, 20 if n < 100 else 3):
                    words = joined([CURRENCIES[code].amount(n), small.amount(cents)])
                    yield Expression(key, "price", *words)


def phrase_expressions() -> Iterator[Expression]:
    """The template phrases, thinned; those without a slot are closed."""
    for key, percent, closed, words in phrases.generate():
        if sampled(key, percent):
            yield Expression(f"phrase/{key}", "phrase", *words, closed)


def expressions() -> list[Expression]:
    """Every expression, checked: unique keys, and one answer to every prompt."""
    found = [
        expression
        for source in (numbers, times, dates, prices, phrase_expressions)
        for expression in source()
    ]
    keys = Counter(expression.key for expression in found)
    assert len(keys) == len(found), keys.most_common(3)
    answers: dict[str, str] = {}
    for expression in found:
        for _, prompt, answer in rows(expression):
            known = answers.setdefault(prompt, answer)
            assert known == answer, (expression.key, prompt, known, answer)
    return found


def rows(expression: Expression) -> Iterator[tuple[str, str, str]]:
    """The six (direction, prompt, answer) rows of an expression."""
    for source, target in DIRECTIONS:
        prompt = f"Translate to {LANGUAGES[target]}: {getattr(expression, source)}"
        yield f"{source}-{target}", prompt, getattr(expression, target)


def is_held_out(expression: Expression) -> bool:
    """Whether a hash of the key puts the expression in the test set."""
    chosen = digest("split " + expression.key) % 100 < HELD_OUT_PERCENT
    return chosen and not expression.closed


def split() -> tuple[list[Expression], list[Expression]]:
    """The training and the held-out expressions.

    An expression that shares a whole prompt and answer with a held-out one
    (two keys, one wording) would leak it, so it is dropped from training.
    """
    train, held_out = [], []
    for expression in expressions():
        (held_out if is_held_out(expression) else train).append(expression)
    tested = {prompt for expression in held_out for _, prompt, _ in rows(expression)}
    clean = [e for e in train if not any(prompt in tested for _, prompt, _ in rows(e))]
    return clean, held_out


def held_out_rows() -> list[dict[str, str]]:
    """The fixed evaluation sample: every category, all six directions."""
    by_category = defaultdict(list)
    for expression in split()[1]:
        by_category[expression.category].append(expression)
    out = []
    for category, count in SAMPLE.items():
        ranked = sorted(by_category[category], key=lambda e: digest("order " + e.key))
        for expression in ranked[:count]:
            for direction, prompt, answer in rows(expression):
                out.append(
                    {
                        "direction": direction,
                        "category": category,
                        "prompt": prompt,
                        "answer": answer,
                    }
                )
    return out


if __name__ == "__main__":
    for row in held_out_rows():
        print(json.dumps(row, ensure_ascii=False))
