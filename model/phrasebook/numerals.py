"""Numbers in words in English, French and Swedish.

Each language gets one convention and keeps it, because a phrasebook with two
spellings of the same number could not be marked right or wrong:

* British English joins the last group with "and" (one hundred and five).
* French uses the traditional hyphenation: hyphens below one hundred except
  around "et" (vingt-trois, soixante et onze, deux cent un, mille deux cents).
* Swedish writes a number as one word and spells out its "ett"
  (tjugotre, etthundrafem, ettusentvåhundra).
"""

EN_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
EN_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
FR_UNITS = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize "
    "quatorze quinze seize dix-sept dix-huit dix-neuf"
).split()
FR_TENS = "_ _ vingt trente quarante cinquante soixante".split()
SV_UNITS = (
    "noll ett två tre fyra fem sex sju åtta nio tio elva tolv tretton "
    "fjorton femton sexton sjutton arton nitton"
).split()
SV_TENS = "_ _ tjugo trettio fyrtio femtio sextio sjuttio åttio nittio".split()

EN_ORDINALS = (
    "_ first second third fourth fifth sixth seventh eighth ninth tenth eleventh "
    "twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth "
    "nineteenth twentieth"
).split()
SV_ORDINALS = (
    "_ första andra tredje fjärde femte sjätte sjunde åttonde nionde tionde elfte "
    "tolfte trettonde fjortonde femtonde sextonde sjuttonde artonde nittonde "
    "tjugonde"
).split()


def en_number(n: int) -> str:
    """The British English cardinal for 0 to 9999."""
    if n < 20:
        return EN_UNITS[n]
    if n < 100:
        tens, unit = divmod(n, 10)
        return EN_TENS[tens] + (f"-{EN_UNITS[unit]}" if unit else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        return f"{EN_UNITS[hundreds]} hundred" + (f" and {en_number(rest)}" if rest else "")
    thousands, rest = divmod(n, 1000)
    head = f"{EN_UNITS[thousands]} thousand"
    if not rest:
        return head
    return head + (" " if rest >= 100 else " and ") + en_number(rest)


def _fr_below_100(n: int) -> str:
    """The French cardinal for 0 to 99, "quatre-vingts" with its final s."""
    if n < 20:
        return FR_UNITS[n]
    if n < 70:
        tens, unit = divmod(n, 10)
        if unit == 1:
            return f"{FR_TENS[tens]} et un"
        return FR_TENS[tens] + (f"-{FR_UNITS[unit]}" if unit else "")
    if n < 80:
        return "soixante et onze" if n == 71 else f"soixante-{FR_UNITS[n - 60]}"
    return "quatre-vingts" if n == 80 else f"quatre-vingt-{FR_UNITS[n - 80]}"


def fr_number(n: int, feminine: bool = False, label: bool = False) -> str:
    """The French cardinal for 0 to 9999.

    `feminine` agrees a final "un" with a counted noun (vingt et une livres).
    `label` is the invariable form that names rather than counts, as in "le
    serveur quatre-vingt", where vingt and cent take no s.
    """
    parts = []
    thousands, rest = divmod(n, 1000)
    if thousands:
        parts.append("mille" if thousands == 1 else f"{FR_UNITS[thousands]} mille")
    hundreds, tail = divmod(rest, 100)
    if hundreds:
        cent = "cent" if hundreds == 1 else f"{FR_UNITS[hundreds]} cent"
        parts.append(cent + ("s" if hundreds > 1 and not tail else ""))
    if tail or n == 0:
        parts.append(_fr_below_100(tail))
    words = " ".join(parts)
    if feminine and n % 10 == 1 and n % 100 not in (11, 71, 91):
        words += "e"
    if label and words.endswith(("vingts", "cents")):
        words = words[:-1]
    return words


def sv_number(n: int, common: bool = False) -> str:
    """The Swedish cardinal for 0 to 9999, one word.

    `common` agrees a final "ett" with a counted noun of common gender
    (tjugoen kronor).
    """
    words = ""
    thousands, rest = divmod(n, 1000)
    if thousands:
        words += "ettusen" if thousands == 1 else f"{SV_UNITS[thousands]}tusen"
    hundreds, tail = divmod(rest, 100)
    if hundreds:
        words += f"{SV_UNITS[hundreds]}hundra"
    tens, unit = divmod(tail, 10)
    if tens >= 2:
        words += SV_TENS[tens] + (SV_UNITS[unit] if unit else "")
    elif tail or n == 0:
        words += SV_UNITS[tail]
    if common and n % 10 == 1 and n % 100 != 11:
        words = words[:-2] + "n"
    return words


def en_ordinal(n: int) -> str:
    """The English ordinal for 1 to 31."""
    if n <= 20:
        return EN_ORDINALS[n]
    return "thirtieth" if n == 30 else f"{EN_TENS[n // 10]}-{EN_ORDINALS[n % 10]}"


def sv_ordinal(n: int) -> str:
    """The Swedish ordinal for 1 to 31."""
    if n <= 20:
        return SV_ORDINALS[n]
    return "trettionde" if n == 30 else f"{SV_TENS[n // 10]}{SV_ORDINALS[n % 10]}"
