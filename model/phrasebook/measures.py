"""Times, dates and money in words: the parts that phrases are filled with."""

from typing import NamedTuple

from numerals import en_number, en_ordinal, fr_number, sv_number, sv_ordinal

Triple = tuple[str, str, str]

WEEKDAYS = [
    ("Monday", "lundi", "måndag"),
    ("Tuesday", "mardi", "tisdag"),
    ("Wednesday", "mercredi", "onsdag"),
    ("Thursday", "jeudi", "torsdag"),
    ("Friday", "vendredi", "fredag"),
    ("Saturday", "samedi", "lördag"),
    ("Sunday", "dimanche", "söndag"),
]
MONTHS = [
    ("January", "janvier", "januari"),
    ("February", "février", "februari"),
    ("March", "mars", "mars"),
    ("April", "avril", "april"),
    ("May", "mai", "maj"),
    ("June", "juin", "juni"),
    ("July", "juillet", "juli"),
    ("August", "août", "augusti"),
    ("September", "septembre", "september"),
    ("October", "octobre", "oktober"),
    ("November", "novembre", "november"),
    ("December", "décembre", "december"),
]


def fr_hours(h: int) -> str:
    """ "une heure", "deux heures", "vingt et une heures"."""
    return f"{fr_number(h, feminine=True)} {'heure' if h < 2 else 'heures'}"


def spoken_time(h: int, m: int) -> Triple:
    """A time of the twelve-hour clock, in five-minute steps, as people say it."""
    after = h % 12 + 1
    en, fr, sv = en_number(h), fr_hours(h), sv_number(h)
    en1, fr1, sv1 = en_number(after), fr_hours(after), sv_number(after)
    return {
        0: (f"{en} o'clock", fr, f"klockan {sv}"),
        5: (f"five past {en}", f"{fr} cinq", f"fem över {sv}"),
        10: (f"ten past {en}", f"{fr} dix", f"tio över {sv}"),
        15: (f"quarter past {en}", f"{fr} et quart", f"kvart över {sv}"),
        20: (f"twenty past {en}", f"{fr} vingt", f"tjugo över {sv}"),
        25: (f"twenty-five past {en}", f"{fr} vingt-cinq", f"fem i halv {sv1}"),
        30: (f"half past {en}", f"{fr} et demie", f"halv {sv1}"),
        35: (f"twenty-five to {en1}", f"{fr1} moins vingt-cinq", f"fem över halv {sv1}"),
        40: (f"twenty to {en1}", f"{fr1} moins vingt", f"tjugo i {sv1}"),
        45: (f"quarter to {en1}", f"{fr1} moins le quart", f"kvart i {sv1}"),
        50: (f"ten to {en1}", f"{fr1} moins dix", f"tio i {sv1}"),
        55: (f"five to {en1}", f"{fr1} moins cinq", f"fem i {sv1}"),
    }[m]


def date_words(day: int, month: int) -> Triple:
    """ "third of May", "trois mai", "tredje maj": a date without its article."""
    en, fr, sv = MONTHS[month - 1]
    fr_day = "premier" if day == 1 else fr_number(day)
    return (f"{en_ordinal(day)} of {en}", f"{fr_day} {fr}", f"{sv_ordinal(day)} {sv}")


class Currency(NamedTuple):
    """A currency's singulars and plurals, and the genders its numbers agree with."""

    en: tuple[str, str]
    fr: tuple[str, str]
    sv: tuple[str, str]
    fr_feminine: bool
    sv_common: bool

    def amount(self, n: int) -> Triple:
        """`n` units of it in the three languages."""
        many = int(n != 1)
        fr = fr_number(n, feminine=self.fr_feminine)
        sv = sv_number(n, common=self.sv_common)
        return (
            f"{en_number(n)} {self.en[many]}",
            f"{fr} {self.fr[int(n > 1)]}",
            f"{sv} {self.sv[many]}",
        )


CURRENCIES = {
    "EUR": Currency(("euro", "euros"), ("euro", "euros"), ("euro", "euro"), False, True),
    "SEK": Currency(
        ("krona", "kronor"), ("couronne", "couronnes"), ("krona", "kronor"), True, True
    ),
    "USD": Currency(
        ("dollar", "dollars"), ("dollar", "dollars"), ("dollar", "dollar"), False, True
    ),
    "GBP": Currency(("pound", "pounds"), ("livre", "livres"), ("pund", "pund"), True, False),
}
CENTS = Currency(("cent", "cents"), ("centime", "centimes"), ("cent", "cent"), False, True)
ORE = Currency(("öre", "öre"), ("öre", "öre"), ("öre", "öre"), False, False)
SMALL = {"EUR": CENTS, "SEK": ORE}
