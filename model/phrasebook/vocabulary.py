"""The tokenizer: byte-level BPE whose merges respect morphemes.

Byte-level, so that any text can be encoded; trained on text cut at morpheme
boundaries, so that "tjugotre" becomes tjugo|tre and a number the model has
never seen is still a row of tokens it knows.
"""

import re
from collections import Counter
from typing import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import numerals

SIZE = 1536
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
CONTEXT = 512

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Roles are user and assistant, and system for the first message only.') }}
    {%- endif %}
{%- endfor -%}
"""

# The parts of Swedish number words; "ettusen" shares one t between ett and tusen.
SWEDISH = {*numerals.SV_UNITS, *numerals.SV_TENS, *numerals.SV_ORDINALS} - {"_"}
SWEDISH |= {"en", "hundra", "tusen", "usen"}
PIECE = "|".join(sorted(SWEDISH, key=len, reverse=True))
COMPOUND = re.compile(f"( ?)((?:{PIECE})+)")


def byte_level(piece: str) -> str:
    """The byte-level spelling of one piece, in which a space is a letter too."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return cut.pre_tokenize_str(piece)[0][0]


def morphemes(word: str) -> list[str]:
    """Cuts a Swedish number word, or a weekday's article, off as its own piece."""
    found = COMPOUND.fullmatch(word)
    if found:
        pieces = re.findall(PIECE, found[2])
        return [found[1] + pieces[0], *pieces[1:]]
    if word.endswith("dagen"):
        return [word[:-2], word[-2:]]
    return [word]


def word_pieces(texts: Iterable[str]) -> Counter[str]:
    """The morphemes of all texts, each already in byte-level spelling."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(r" ?[^\W\d]+", text))
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece in morphemes(word):
            pieces[byte_level(piece)] += count
    return pieces


def build(texts: Iterable[str]) -> Tokenizer:
    """Trains the tokenizer.

    Frequencies are damped so that rare words merge too, and the pieces of
    Swedish compounds come first, so that no later merge crosses their seams.
    """
    pieces = word_pieces(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    seams = {byte_level(piece) for word in SWEDISH for piece in (word, f" {word}")}
    damped = {p: count if p in seams else 1 + int(count**0.6) for p, count in pieces.items()}
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stream = (" ".join([piece] * count) for piece, count in sorted(damped.items()))
    tokenizer.train_from_iterator(stream, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def config() -> dict:
    """What `tokenizer_config.json` says beside the tokenizer itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "padding_side": "left",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
