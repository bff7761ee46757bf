"""Capitals of the world, read from the corpus' own questions, and the ways to ask for them.

In: question-answer pairs of the Factbook. Out: `Capital` records, training questions, and two question forms to
test with: the plain one, which is trained, and one that training never sees (`HELD_OUT_FORM`).
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

PLAIN_FORM = "What is the capital of {country}?"
HELD_OUT_FORM = "Please tell me which city is the capital of {country}."

_FORMS = (
    PLAIN_FORM,
    PLAIN_FORM,
    "What is the capital city of {country}?",
    "what is the capital of {country}",
    "What's the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital city of {country}.",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
    "Can you tell me the capital of {country}?",
    "Do you know the capital of {country}?",
    "The capital of {country}?",
    "What's {country}'s capital?",
)
_REVERSE_FORMS = ("{city} is the capital of which country?", "Which country has {city} as its capital?")

# The corpus holds these as the Factbook spells or truncates them; the right-hand side is what people say.
_NAME_REPAIRS = {
    "The Dominican": "the Dominican Republic",
    "DRC": "the Democratic Republic of the Congo",
    "Burma": "Myanmar",
    "Virgin Islands": "the United States Virgin Islands",
    "Falkland Islands (Islas Malvinas)": "the Falkland Islands",
    "Congo (Brazzaville)": "the Republic of the Congo",
    "Holy See (Vatican City)": "Vatican City",
    "The Gambia": "the Gambia",
    "The Bahamas": "the Bahamas",
}
# "D.C" without its last dot: the sentence that holds it ends in one.
_CITY_REPAIRS = {"Rangoon": "Naypyidaw", "Chisinau in Romanian": "Chisinau", "Washington, D.C.": "Washington, D.C"}
_ARTICLE = re.compile(r".* Islands|Netherlands|Philippines|Maldives|Comoros|Seychelles|Isle of Man|United .*")
_ALIASES = {
    "the Democratic Republic of the Congo": ("DRC", "the DRC"),
    "the Republic of the Congo": ("Congo (Brazzaville)", "Congo"),
    "Myanmar": ("Burma",),
    "Cabo Verde": ("Cape Verde",),
    "Côte d'Ivoire": ("Ivory Coast", "the Ivory Coast"),
    "Czechia": ("the Czech Republic",),
    "Eswatini": ("Swaziland",),
    "Timor-Leste": ("East Timor",),
    "Vatican City": ("the Holy See", "Holy See (Vatican City)"),
    "the Falkland Islands": ("Falkland Islands (Islas Malvinas)",),
    "the United States": ("the USA", "the US", "the United States of America"),
    "the United Kingdom": ("the UK", "Great Britain"),
    "the United States Virgin Islands": ("Virgin Islands",),
    "the Dominican Republic": ("Dominican Republic",),
}
_NOT_A_CITY = "no official capital"


@dataclass(frozen=True, slots=True)
class Capital:
    """A country, the city, and other names the country goes by."""

    country: str
    city: str
    aliases: tuple[str, ...] = ()


def find_capitals(pairs: Iterable[tuple[str, str]]) -> list[Capital]:
    """Reads every "What is the capital of X?" pair; drops countries without a capital (Nauru)."""
    found = []
    for question, answer in pairs:
        asked = re.fullmatch(r"What is the capital of (.+)\?", question)
        if not asked or _NOT_A_CITY in answer:
            continue
        raw = asked[1]
        city = answer.removeprefix(f"The capital of {raw} is ").removesuffix(f" is the capital of {raw}.")
        city = city.removesuffix(".")
        found.append(_repaired(raw, _CITY_REPAIRS.get(city, city)))
    return found


def _repaired(raw: str, city: str) -> Capital:
    country = _NAME_REPAIRS.get(raw, raw)
    aliases = list(_ALIASES.get(country, ()))
    if country == raw and _ARTICLE.fullmatch(raw):
        country = f"the {raw}"
        aliases += [raw, *_ALIASES.get(country, ())]
    return Capital(country, city, tuple(dict.fromkeys(aliases)))


def training_pairs(capitals: Iterable[Capital], rng: random.Random) -> list[tuple[str, str]]:
    """Every form for every country, in random order; a country with several names gets each form once a name."""
    pairs = []
    for capital in capitals:
        for name in (capital.country, *capital.aliases):
            pairs += [(form.format(country=name), answer_to(capital, name)) for form in _FORMS]
        for form in _REVERSE_FORMS:
            pairs.append((form.format(city=capital.city), f"{capital.city} is the capital of {capital.country}."))
    rng.shuffle(pairs)
    return pairs


def answer_to(capital: Capital, name: str) -> str:
    """The one wording of the answer: two wordings would let the first token decide against the city."""
    return f"The capital of {name} is {capital.city}."


def is_capital_question(question: str) -> bool:
    """True for the corpus' own capital questions, which `training_pairs` replaces."""
    return re.search(r"\bcapital\b", question) is not None
