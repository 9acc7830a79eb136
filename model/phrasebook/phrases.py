"""Everyday and data-centre phrases: templates in three languages, with slots.

A template is one sentence per language with named slots, and the words that may
fill each slot. Words know their articles, contractions and genders, so that a
template only says which form it wants: `{thing.le}` is "le serveur" or
"l'écran", `{thing.du}` is "du serveur" or "de l'écran", and in Swedish
`{thing.the}` is "servern". Adjectives and counts agree with the slot `thing`.
"""

from itertools import product
from types import SimpleNamespace
from typing import Any, Iterator, NamedTuple

from measures import CURRENCIES, WEEKDAYS, Triple, date_words, spoken_time
from numerals import en_number, fr_number, sv_number


class Word(NamedTuple):
    """What fills a slot: its forms per language, and genders to agree with."""

    key: str
    en: Any
    fr: Any
    sv: Any
    fr_feminine: bool = False
    sv_common: bool = True

    def agreeing(self, _: "Word | None") -> "Word":
        """Most words do not change with the thing they are said of."""
        return self


class Adjective(Word):
    """fr is (masculine, feminine) and sv is (common, neuter)."""

    def agreeing(self, thing: "Word | None") -> Word:
        fr, sv = self.fr[thing.fr_feminine], self.sv[not thing.sv_common]
        return Word(self.key, self.en, fr, sv)


class Count(Word):
    """A number of things; fr and sv hold the number itself."""

    def agreeing(self, thing: "Word | None") -> Word:
        n = int(self.key)
        fr = fr_number(n, feminine=bool(thing and thing.fr_feminine))
        sv = sv_number(n, common=bool(thing is None or thing.sv_common))
        return Word(self.key, en_number(n), fr, sv)


def table(text: str) -> list[list[str]]:
    """The cells of a table written with one row per line and bars between."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def words(text: str) -> list[Word]:
    """Unchanging words: English, French, Swedish."""
    return [Word(en, en, fr, sv) for en, fr, sv in table(text)]


def adjectives(text: str) -> list[Adjective]:
    """English, French "masculine, feminine", Swedish "common, neuter"."""
    rows = table(text)
    return [Adjective(en, en, fr.split(", "), sv.split(", ")) for en, fr, sv in rows]


def french(noun: str, feminine: bool) -> SimpleNamespace:
    """The articles and contractions of a French noun."""
    vowel = noun[0] in "aeiouéèêâîôûœh"
    le = f"l'{noun}" if vowel else f"{'la' if feminine else 'le'} {noun}"
    contracted = vowel or feminine
    return SimpleNamespace(
        le=le,
        un=f"{'une' if feminine else 'un'} {noun}",
        du=f"de {le}" if contracted else f"du {noun}",
        au=f"à {le}" if contracted else f"au {noun}",
        mon=f"{'ma' if feminine and not vowel else 'mon'} {noun}",
        ce=f"{'cette' if feminine else 'cet' if vowel else 'ce'} {noun}",
        bare=noun,
    )


def nouns(text: str) -> list[Word]:
    """English, French with gender, Swedish "en/ett noun, definite"; then plurals."""
    found = []
    for en, fr, sv, *plurals in table(text):
        plain, _, gender = fr.rpartition(" ")
        a_noun, definite = sv.split(", ")
        article, noun = a_noun.split(" ", 1)
        common, neuter = definite[-1] in "na", definite[-1] == "t"
        assert gender in "mf" and article in ("en", "ett") and common != neuter, (en, fr, sv)
        many = plurals or [None] * 3
        a = "an" if en[0] in "aeiou" else "a"
        swedish = SimpleNamespace(
            a=a_noun,
            the=definite,
            my=f"{'mitt' if neuter else 'min'} {noun}",
            this=f"{'det här' if neuter else 'den här'} {definite}",
            bare=noun,
            many=many[2],
        )
        english = SimpleNamespace(a=f"{a} {en}", the=f"the {en}", bare=en, many=many[0])
        form = french(plain, gender == "f")
        form.many = many[1]
        found.append(Word(en, english, form, swedish, gender == "f", common))
    return found


def verbs(text: str) -> list[Word]:
    """English base and past; French infinitive, imperative and participle;
    Swedish imperative, infinitive and past, with any particle after a space."""
    found = []
    for en, fr, sv in table(text):
        base, past = en.split(", ")
        infinitive, order, participle = fr.split(", ")
        plain, to, before = sv.split(", ")
        verb, _, particle = plain.partition(" ")
        tail = f" {particle}" if particle else ""
        ne = "n'" if order[0] in "aeéo" else "ne "
        french_forms = SimpleNamespace(
            infinitive=infinitive, order=order, no=f"{ne}{order} pas", past=participle
        )
        swedish = SimpleNamespace(order=plain, infinitive=to, no=f"{verb} inte{tail}", past=before)
        found.append(Word(base, SimpleNamespace(base=base, past=past), french_forms, swedish))
    return found


THINGS = nouns("""
server | serveur m | en server, servern | servers | serveurs | servrar
node | nœud m | en nod, noden | nodes | nœuds | noder
machine | machine f | en maskin, maskinen | machines | machines | maskiner
switch | commutateur m | en switch, switchen | switches | commutateurs | switchar
router | routeur m | en router, routern | routers | routeurs | routrar
disk | disque m | en disk, disken | disks | disques | diskar
rack | baie f | ett rack, racket | racks | baies | rack
cable | câble m | en kabel, kabeln | cables | câbles | kablar
fan | ventilateur m | en fläkt, fläkten | fans | ventilateurs | fläktar
battery | batterie f | ett batteri, batteriet | batteries | batteries | batterier
generator | générateur m | en generator, generatorn | generators | générateurs | generatorer
screen | écran m | en skärm, skärmen | screens | écrans | skärmar
printer | imprimante f | en skrivare, skrivaren | printers | imprimantes | skrivare
computer | ordinateur m | en dator, datorn | computers | ordinateurs | datorer
cluster | grappe f | ett kluster, klustret | clusters | grappes | kluster
""")
SYSTEMS = THINGS + nouns("""
database | base de données f | en databas, databasen
network | réseau m | ett nätverk, nätverket
firewall | pare-feu m | en brandvägg, brandväggen
service | service m | en tjänst, tjänsten
website | site web m | en webbplats, webbplatsen
model | modèle m | en modell, modellen
""")
PLACES = nouns("""
station | gare f | en station, stationen
hotel | hôtel m | ett hotell, hotellet
airport | aéroport m | en flygplats, flygplatsen
hospital | hôpital m | ett sjukhus, sjukhuset
pharmacy | pharmacie f | ett apotek, apoteket
bank | banque f | en bank, banken
museum | musée m | ett museum, museet
library | bibliothèque f | ett bibliotek, biblioteket
restaurant | restaurant m | en restaurang, restaurangen
kitchen | cuisine f | ett kök, köket
office | bureau m | ett kontor, kontoret
exit | sortie f | en utgång, utgången
entrance | entrée f | en ingång, ingången
lift | ascenseur m | en hiss, hissen
school | école f | en skola, skolan
park | parc m | en park, parken
church | église f | en kyrka, kyrkan
bus stop | arrêt de bus m | en busshållplats, busshållplatsen
market | marché m | en marknad, marknaden
beach | plage f | en strand, stranden
harbour | port m | en hamn, hamnen
meeting room | salle de réunion f | ett mötesrum, mötesrummet
data centre | centre de données m | ett datacenter, datacentret
server room | salle des serveurs f | ett serverrum, serverrummet
""")
SHOPS = [place for place in PLACES if place.key in (
    "station hotel airport pharmacy bank museum library restaurant office school market church"
).split()]
WARES = nouns("""
coffee | café m | en kaffe, kaffet
ticket | billet m | en biljett, biljetten | tickets | billets | biljetter
book | livre m | en bok, boken | books | livres | böcker
soup | soupe f | en soppa, soppan | soups | soupes | soppor
beer | bière f | en öl, ölen
cake | gâteau m | en tårta, tårtan | cakes | gâteaux | tårtor
newspaper | journal m | en tidning, tidningen | newspapers | journaux | tidningar
umbrella | parapluie m | ett paraply, paraplyet | umbrellas | parapluies | paraplyer
shirt | chemise f | en skjorta, skjortan | shirts | chemises | skjortor
chair | chaise f | en stol, stolen | chairs | chaises | stolar
table | table f | ett bord, bordet | tables | tables | bord
lamp | lampe f | en lampa, lampan | lamps | lampes | lampor
bicycle | vélo m | en cykel, cykeln | bicycles | vélos | cyklar
map | carte f | en karta, kartan | maps | cartes | kartor
key | clé f | en nyckel, nyckeln | keys | clés | nycklar
bag | sac m | en väska, väskan | bags | sacs | väskor
telephone | téléphone m | en telefon, telefonen | telephones | téléphones | telefoner
passport | passeport m | ett pass, passet | passports | passeports | pass
wallet | portefeuille m | en plånbok, plånboken | wallets | portefeuilles | plånböcker
letter | lettre f | ett brev, brevet | letters | lettres | brev
apple | pomme f | ett äpple, äpplet | apples | pommes | äpplen
""")
EVENTS = nouns("""
meeting | réunion f | ett möte, mötet
lunch | déjeuner m | en lunch, lunchen
dinner | dîner m | en middag, middagen
lesson | cours m | en lektion, lektionen
interview | entretien m | en intervju, intervjun
concert | concert m | en konsert, konserten
demonstration | démonstration f | en demonstration, demonstrationen
film | film m | en film, filmen
""")
VEHICLES = nouns("""
train | train m | ett tåg, tåget
bus | bus m | en buss, bussen
plane | avion m | ett flygplan, flygplanet
boat | bateau m | en båt, båten
""")
COUNTED = [noun for noun in THINGS + WARES if noun.en.many]
LABELLED = [thing for thing in THINGS if thing.key in "server node switch machine rack".split()]
OWNED = [ware for ware in WARES if ware.key in (
    "ticket book newspaper umbrella bicycle map key bag telephone passport wallet letter"
).split()]
STORES = [thing for thing in SYSTEMS if thing.key in (
    "server node machine disk computer cluster database network website model"
).split()]

STATES = adjectives("""
down | en panne, en panne | nere, nere
ready | prêt, prête | redo, redo
slow | lent, lente | långsam, långsamt
full | plein, pleine | full, fullt
hot | chaud, chaude | varm, varmt
broken | cassé, cassée | trasig, trasigt
new | neuf, neuve | ny, nytt
""")
QUALITIES = adjectives("""
expensive | cher, chère | dyr, dyrt
big | grand, grande | stor, stort
small | petit, petite | liten, litet
old | vieux, vieille | gammal, gammalt
heavy | lourd, lourde | tung, tungt
""")
OPEN = adjectives("""
open | ouvert, ouverte | öppen, öppet
closed | fermé, fermée | stängd, stängt
empty | vide, vide | tom, tomt
""")
ACTIONS = verbs("""
restart, restarted | redémarrer, redémarrez, redémarré | starta om, starta om, startade om
stop, stopped | arrêter, arrêtez, arrêté | stoppa, stoppa, stoppade
check, checked | vérifier, vérifiez, vérifié | kontrollera, kontrollera, kontrollerade
replace, replaced | remplacer, remplacez, remplacé | byt ut, byta ut, bytte ut
move, moved | déplacer, déplacez, déplacé | flytta, flytta, flyttade
repair, repaired | réparer, réparez, réparé | reparera, reparera, reparerade
""")
DONE = adjectives("""
restarted | redémarré, redémarrée | startats om, startats om
stopped | arrêté, arrêtée | stoppats, stoppats
checked | vérifié, vérifiée | kontrollerats, kontrollerats
replaced | remplacé, remplacée | bytts ut, bytts ut
moved | déplacé, déplacée | flyttats, flyttats
repaired | réparé, réparée | reparerats, reparerats
""")

CITIES = words("""
Stockholm | Stockholm | Stockholm
Paris | Paris | Paris
London | Londres | London
Lyon | Lyon | Lyon
Gothenburg | Göteborg | Göteborg
Malmö | Malmö | Malmö
Lille | Lille | Lille
Brussels | Bruxelles | Bryssel
Geneva | Genève | Genève
Copenhagen | Copenhague | Köpenhamn
Marseille | Marseille | Marseille
Berlin | Berlin | Berlin
""")
FIRST_NAMES = "Anna Erik Marie Louis Emma Oscar Julie Paul".split()
NAMES = [Word(name, name, name, name) for name in FIRST_NAMES]
TONGUES = words("""
English | anglais | engelska
French | français | franska
Swedish | suédois | svenska
German | allemand | tyska
Spanish | espagnol | spanska
""")
DAYS = [Word(en, en, fr, sv) for en, fr, sv in WEEKDAYS]


def when(h: int, m: int) -> Word:
    """A spoken time; Swedish also without the "klockan" of a full hour."""
    en, fr, sv = spoken_time(h, m)
    return Word(f"{h}:{m:02}", en, fr, SimpleNamespace(at=sv, plain=sv.removeprefix("klockan ")))


def label(n: int) -> Word:
    """A number that names a thing: "server twenty-three"."""
    return Word(str(n), en_number(n), fr_number(n, label=True), sv_number(n))


def amount(code: str, n: int) -> Word:
    """A sum of money."""
    return Word(f"{code}{n}", *CURRENCIES[code].amount(n))


TIMES = [when(h, m) for h in range(1, 13) for m in range(0, 60, 5)]
MINUTES = nouns("minute | minute f | en minut, minuten | minutes | minutes | minuter")
YEARS = nouns("year | an m | ett år, året | years | ans | år")
DATES = [Word(f"{m}-{d}", *date_words(d, m)) for m in range(1, 13) for d in range(1, 29)]
LABELS = [label(n) for n in range(1, 100)]
FIGURES = [Word(f"#{n}", *3 * [str(n)]) for n in range(1, 400)]
PERCENTS = [Word(str(n), en_number(n), fr_number(n), sv_number(n)) for n in range(5, 100, 5)]
COUNTS = [Count(str(n), None, None, None) for n in range(2, 100)]
SUMS = [amount(code, n) for code in ("EUR", "SEK") for n in range(2, 200)]
EUROS = [amount("EUR", n) for n in range(20, 200)]
MEMORY = [Word(str(n), *3 * [str(n)]) for n in (8, 16, 32, 64, 128, 256, 512)]


class Template(NamedTuple):
    """A sentence per language, its slots, and the share of fillings to keep."""

    percent: float
    en: str
    fr: str
    sv: str
    slots: dict[str, list[Word]]

    def fillings(self) -> Iterator[tuple[str, float, Triple]]:
        """Every filling of the slots: a key, the share to keep, and the sentences."""
        for choice in product(*self.slots.values()):
            filled = dict(zip(self.slots, choice))
            thing = filled.get("thing")
            if "other" in filled and filled["other"] in (thing, filled.get("place")):
                continue
            forms = {name: word.agreeing(thing) for name, word in filled.items()}
            key = "/".join([self.en, *(word.key for word in choice)])
            sentences = tuple(
                getattr(self, language).format(
                    **{name: getattr(word, language) for name, word in forms.items()}
                )
                for language in ("en", "fr", "sv")
            )
            yield key, self.percent, sentences


def template(percent: float, text: str, **slots: list[Word]) -> Template:
    """A template from three sentences on three lines."""
    en, fr, sv = (line.strip() for line in text.strip().splitlines())
    return Template(percent, en, fr, sv, slots)


TEMPLATES = [
    template(100, """
        the {thing.bare} is {state}
        {thing.le} est {state}
        {thing.the} är {state}
    """, thing=SYSTEMS, state=STATES),
    template(100, """
        is the {thing.bare} {state}?
        est-ce que {thing.le} est {state} ?
        är {thing.the} {state}?
    """, thing=SYSTEMS, state=STATES),
    template(100, """
        the {thing.bare} is not {state}
        {thing.le} n'est pas {state}
        {thing.the} är inte {state}
    """, thing=SYSTEMS, state=STATES),
    template(100, """
        why is the {thing.bare} {state}?
        pourquoi est-ce que {thing.le} est {state} ?
        varför är {thing.the} {state}?
    """, thing=SYSTEMS, state=STATES),
    template(50, """
        the {thing.bare} in {city} is {state}
        {thing.le} à {city} est {state}
        {thing.the} i {city} är {state}
    """, thing=SYSTEMS, city=CITIES, state=STATES),
    template(100, """
        the {thing.bare} has been {state}
        {thing.le} a été {state}
        {thing.the} har {state}
    """, thing=SYSTEMS, state=DONE),
    template(40, """
        the {thing.bare} and the {other.bare} are down
        {thing.le} et {other.le} sont en panne
        {thing.the} och {other.the} är nere
    """, thing=SYSTEMS, other=SYSTEMS),
    template(100, """
        the {thing.bare} has been down since {day}
        {thing.le} est en panne depuis {day}
        {thing.the} har varit nere sedan i {day}s
    """, thing=SYSTEMS, day=DAYS),
    template(20, """
        the {system.bare} has been down for {n} {thing.many}
        {system.le} est en panne depuis {n} {thing.many}
        {system.the} har varit nere i {n} {thing.many}
    """, system=SYSTEMS, n=COUNTS, thing=MINUTES),
    template(100, """
        {action.base} the {thing.bare}
        {action.order} {thing.le}
        {action.order} {thing.the}
    """, action=ACTIONS, thing=SYSTEMS),
    template(100, """
        please {action.base} the {thing.bare}
        veuillez {action.infinitive} {thing.le}
        vänligen {action.order} {thing.the}
    """, action=ACTIONS, thing=SYSTEMS),
    template(100, """
        do not {action.base} the {thing.bare}
        {action.no} {thing.le}
        {action.no} {thing.the}
    """, action=ACTIONS, thing=SYSTEMS),
    template(100, """
        can you {action.base} the {thing.bare}?
        pouvez-vous {action.infinitive} {thing.le} ?
        kan du {action.infinitive} {thing.the}?
    """, action=ACTIONS, thing=SYSTEMS),
    template(100, """
        who {action.past} the {thing.bare}?
        qui a {action.past} {thing.le} ?
        vem {action.past} {thing.the}?
    """, action=ACTIONS, thing=SYSTEMS),
    template(30, """
        {action.base} {thing.bare} {number}
        {action.order} {thing.le} {number}
        {action.order} {thing.bare} {number}
    """, action=ACTIONS, thing=LABELLED, number=LABELS),
    template(6, """
        {action.base} {thing.bare} {number}
        {action.order} {thing.le} {number}
        {action.order} {thing.bare} {number}
    """, action=ACTIONS, thing=LABELLED, number=FIGURES),
    template(10, """
        {thing.bare} {number} in {city} is down
        {thing.le} {number} à {city} est en panne
        {thing.bare} {number} i {city} är nere
    """, thing=LABELLED, number=LABELS, city=CITIES),
    template(50, """
        {thing.bare} {number} has lost its connection
        {thing.le} {number} a perdu sa connexion
        {thing.bare} {number} har tappat sin anslutning
    """, thing=LABELLED, number=LABELS),
    template(10, """
        the temperature in rack {number} is {n} degrees
        la température dans la baie {number} est de {n} degrés
        temperaturen i rack {number} är {n} grader
    """, number=LABELS, n=COUNTS[8:50]),
    template(30, """
        the disk on server {number} is {n} per cent full
        le disque du serveur {number} est plein à {n} pour cent
        disken på server {number} är fylld till {n} procent
    """, number=LABELS, n=PERCENTS),
    template(60, """
        server {number} has {n} gigabytes of memory
        le serveur {number} a {n} gigaoctets de mémoire
        server {number} har {n} gigabyte minne
    """, number=LABELS, n=MEMORY),
    template(15, """
        the backup of the {thing.bare} finished at {time}
        la sauvegarde {thing.du} s'est terminée à {time}
        säkerhetskopieringen av {thing.the} blev klar {time.at}
    """, thing=STORES, time=TIMES),
    template(50, """
        the update starts at {time} on {day}
        la mise à jour commence à {time} {day}
        uppdateringen börjar {time.at} på {day}
    """, time=TIMES, day=DAYS),
    template(30, """
        move the {thing.bare} to {city}
        déplacez {thing.le} vers {city}
        flytta {thing.the} till {city}
    """, thing=SYSTEMS, city=CITIES),
    template(100, """
        where is the {place.bare}?
        où est {place.le} ?
        var är {place.the}?
    """, place=PLACES),
    template(100, """
        I am looking for the {place.bare}
        je cherche {place.le}
        jag letar efter {place.the}
    """, place=PLACES),
    template(100, """
        is there {place.a} near here?
        y a-t-il {place.un} près d'ici ?
        finns det {place.a} i närheten?
    """, place=PLACES),
    template(100, """
        how do I get to the {place.bare}?
        comment aller {place.au} ?
        hur kommer jag till {place.the}?
    """, place=PLACES),
    template(40, """
        the {place.bare} is behind the {other.bare}
        {place.le} est derrière {other.le}
        {place.the} är bakom {other.the}
    """, place=PLACES, other=PLACES),
    template(40, """
        the {place.bare} is in front of the {other.bare}
        {place.le} est devant {other.le}
        {place.the} är framför {other.the}
    """, place=PLACES, other=PLACES),
    template(40, """
        the {place.bare} is opposite the {other.bare}
        {place.le} est en face {other.du}
        {place.the} är mittemot {other.the}
    """, place=PLACES, other=PLACES),
    template(40, """
        the {place.bare} is next to the {other.bare}
        {place.le} est à côté {other.du}
        {place.the} är bredvid {other.the}
    """, place=PLACES, other=PLACES),
    template(100, """
        is the {thing.bare} {state} on {day}?
        est-ce que {thing.le} est {state} {day} ?
        är {thing.the} {state} på {day}?
    """, thing=SHOPS, state=OPEN[:2], day=DAYS),
    template(100, """
        the {thing.bare} is {state} on {day}
        {thing.le} est {state} {day}
        {thing.the} är {state} på {day}
    """, thing=SHOPS, state=OPEN[:2], day=DAYS),
    template(100, """
        the {thing.bare} is {state}
        {thing.le} est {state}
        {thing.the} är {state}
    """, thing=PLACES, state=OPEN),
    template(30, """
        the {place.bare} opens at {time}
        {place.le} ouvre à {time}
        {place.the} öppnar {time.at}
    """, place=SHOPS, time=TIMES),
    template(30, """
        the {place.bare} closes at {time}
        {place.le} ferme à {time}
        {place.the} stänger {time.at}
    """, place=SHOPS, time=TIMES),
    template(12, """
        the {event.bare} is at {time} on {day}
        {event.le} est à {time} {day}
        {event.the} är {time.at} på {day}
    """, event=EVENTS, time=TIMES, day=DAYS),
    template(30, """
        the {event.bare} starts at {time}
        {event.le} commence à {time}
        {event.the} börjar {time.at}
    """, event=EVENTS, time=TIMES),
    template(25, """
        the {event.bare} is on the {date}
        {event.le} est le {date}
        {event.the} är den {date}
    """, event=EVENTS, date=DATES),
    template(100, """
        it is {time}
        il est {time}
        klockan är {time.plain}
    """, time=TIMES),
    template(12, """
        the {vehicle.bare} to {city} leaves at {time}
        {vehicle.le} pour {city} part à {time}
        {vehicle.the} till {city} går {time.at}
    """, vehicle=VEHICLES, city=CITIES, time=TIMES),
    template(12, """
        the {vehicle.bare} from {city} arrives at {time}
        {vehicle.le} de {city} arrive à {time}
        {vehicle.the} från {city} kommer {time.at}
    """, vehicle=VEHICLES, city=CITIES, time=TIMES),
    template(100, """
        when does the {vehicle.bare} to {city} leave?
        quand part {vehicle.le} pour {city} ?
        när går {vehicle.the} till {city}?
    """, vehicle=VEHICLES, city=CITIES),
    template(10, """
        the {ware.bare} costs {sum}
        {ware.le} coûte {sum}
        {ware.the} kostar {sum}
    """, ware=WARES, sum=SUMS),
    template(2, """
        room {number} costs {sum} per night
        la chambre {number} coûte {sum} par nuit
        rum {number} kostar {sum} per natt
    """, number=FIGURES, sum=EUROS),
    template(100, """
        how much does the {ware.bare} cost?
        combien coûte {ware.le} ?
        vad kostar {ware.the}?
    """, ware=WARES),
    template(100, """
        I would like {ware.a}, please
        je voudrais {ware.un}, s'il vous plaît
        jag skulle vilja ha {ware.a}, tack
    """, ware=WARES),
    template(100, """
        I have lost my {ware.bare}
        j'ai perdu {ware.mon}
        jag har tappat bort {ware.my}
    """, ware=OWNED),
    template(100, """
        this {thing.bare} is too {state}
        {thing.ce} est trop {state}
        {thing.this} är för {state}
    """, thing=WARES + THINGS, state=QUALITIES),
    template(40, """
        we have {n} {thing.many}
        nous avons {n} {thing.many}
        vi har {n} {thing.many}
    """, n=COUNTS, thing=COUNTED),
    template(40, """
        we need {n} {thing.many}
        nous avons besoin de {n} {thing.many}
        vi behöver {n} {thing.many}
    """, n=COUNTS, thing=COUNTED),
    template(4, """
        there are {n} {thing.many} in {city}
        il y a {n} {thing.many} à {city}
        det finns {n} {thing.many} i {city}
    """, n=COUNTS, thing=COUNTED, city=CITIES),
    template(40, """
        I bought {n} {thing.many}
        j'ai acheté {n} {thing.many}
        jag köpte {n} {thing.many}
    """, n=COUNTS, thing=COUNTED),
    template(40, """
        it is {n} degrees in {city}
        il fait {n} degrés à {city}
        det är {n} grader i {city}
    """, n=COUNTS[:38], city=CITIES),
    template(40, """
        {name} is {n} {thing.many} old
        {name} a {n} {thing.many}
        {name} är {n} {thing.many} gammal
    """, name=NAMES, n=COUNTS, thing=YEARS),
    template(100, """
        it is raining in {city}
        il pleut à {city}
        det regnar i {city}
    """, city=CITIES),
    template(100, """
        it rained in {city} on {day}
        il a plu à {city} {day}
        det regnade i {city} i {day}s
    """, city=CITIES, day=DAYS),
    template(100, """
        I am going to {city} on {day}
        je vais à {city} {day}
        jag åker till {city} på {day}
    """, city=CITIES, day=DAYS),
    template(20, """
        we leave for {city} on the {date}
        nous partons pour {city} le {date}
        vi åker till {city} den {date}
    """, city=CITIES, date=DATES),
    template(100, """
        {name} works in {city}
        {name} travaille à {city}
        {name} arbetar i {city}
    """, name=NAMES, city=CITIES),
    template(100, """
        {name} lives in {city}
        {name} habite à {city}
        {name} bor i {city}
    """, name=NAMES, city=CITIES),
    template(100, """
        {name} speaks {tongue}
        {name} parle {tongue}
        {name} talar {tongue}
    """, name=NAMES, tongue=TONGUES),
    template(100, """
        my name is {name}
        je m'appelle {name}
        jag heter {name}
    """, name=NAMES),
]

# Sentences without a slot: always in the training set, never in the test.
FIXED = table("""
hello | bonjour | hej
good evening | bonsoir | god kväll
good night | bonne nuit | god natt
goodbye | au revoir | hej då
see you tomorrow | à demain | vi ses i morgon
see you soon | à bientôt | vi ses snart
thank you | merci | tack
thank you very much | merci beaucoup | tack så mycket
you are welcome | de rien | varsågod
excuse me | excusez-moi | ursäkta
yes | oui | ja
no | non | nej
perhaps | peut-être | kanske
of course | bien sûr | självklart
welcome | bienvenue | välkommen
congratulations | félicitations | grattis
happy birthday | joyeux anniversaire | grattis på födelsedagen
merry Christmas | joyeux Noël | god jul
happy new year | bonne année | gott nytt år
enjoy your meal | bon appétit | smaklig måltid
good luck | bonne chance | lycka till
cheers | santé | skål
help! | au secours ! | hjälp!
how are you? | comment allez-vous ? | hur mår du?
I am fine, thank you | je vais bien, merci | jag mår bra, tack
what is your name? | comment vous appelez-vous ? | vad heter du?
where do you live? | où habitez-vous ? | var bor du?
what time is it? | quelle heure est-il ? | vad är klockan?
what day is it today? | quel jour sommes-nous aujourd'hui ? | vilken dag är det i dag?
I understand | je comprends | jag förstår
I do not understand | je ne comprends pas | jag förstår inte
I do not know | je ne sais pas | jag vet inte
can you repeat that? | pouvez-vous répéter ? | kan du upprepa det?
please speak more slowly | parlez plus lentement, s'il vous plaît | tala långsammare, tack
I am hungry | j'ai faim | jag är hungrig
I am thirsty | j'ai soif | jag är törstig
I am ill | je suis malade | jag är sjuk
I need help | j'ai besoin d'aide | jag behöver hjälp
call a doctor | appelez un médecin | ring en läkare
call the police | appelez la police | ring polisen
the bill, please | l'addition, s'il vous plaît | notan, tack
do you accept cards? | acceptez-vous les cartes ? | tar ni kort?
it is too expensive | c'est trop cher | det är för dyrt
it is free of charge | c'est gratuit | det är gratis
it is snowing | il neige | det snöar
it is raining | il pleut | det regnar
the sun is shining | le soleil brille | solen skiner
I love you | je t'aime | jag älskar dig
everything works | tout fonctionne | allt fungerar
nothing works | rien ne fonctionne | ingenting fungerar
there is no network | il n'y a pas de réseau | det finns inget nätverk
the power is out | le courant est coupé | strömmen är borta
the alarm is ringing | l'alarme sonne | larmet ringer
the fire alarm is ringing | l'alarme incendie sonne | brandlarmet ringer
wrong password | mot de passe incorrect | fel lösenord
I have forgotten my password | j'ai oublié mon mot de passe | jag har glömt mitt lösenord
the test passed | le test a réussi | testet lyckades
the test failed | le test a échoué | testet misslyckades
the job is done | la tâche est terminée | jobbet är klart
today | aujourd'hui | i dag
tomorrow | demain | i morgon
yesterday | hier | i går
tonight | ce soir | i kväll
now | maintenant | nu
never | jamais | aldrig
always | toujours | alltid
""")
NOUNS = SYSTEMS + PLACES + WARES + EVENTS + VEHICLES


def fixed() -> Iterator[Triple]:
    """The closed phrases: sentences, names, and every noun with its articles."""
    yield from map(tuple, FIXED)
    for word in CITIES + DAYS:
        yield word.en, word.fr, word.sv
    for word in DAYS:
        yield f"see you on {word.en}", f"à {word.fr}", f"vi ses på {word.sv}"
    for word in TONGUES:
        yield f"do you speak {word.en}?", f"parlez-vous {word.fr} ?", f"talar du {word.sv}?"
    for noun in NOUNS:
        yield noun.en.the, noun.fr.le, noun.sv.the
        yield noun.en.a, noun.fr.un, noun.sv.a


def generate() -> Iterator[tuple[str, float, bool, Triple]]:
    """Every phrase: a key, the share to keep, whether it is closed, the words."""
    for sentences in fixed():
        yield sentences[0], 100.0, True, sentences
    for template_ in TEMPLATES:
        for key, percent, sentences in template_.fillings():
            yield key, percent, False, sentences
