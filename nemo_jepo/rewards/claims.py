r"""What an answer claims, read from its text: pure functions, no mathematics.

    own answer -> as_claim -> the one claim that it makes, or None
    reference  -> as_reference -> the same, trusted to be one claim as a whole

An own answer must make one claim. The rules, in the order in which they apply:

    turn       what follows a special token, or begins another question, is not part of the answer
    marks      Markdown, dollars, \(, \text{...} and spacing are deleted wherever they stand (`nemo_jepo.rewards.marks`)
    head       the content of \boxed{...}, else the first sentence. The rest may comment on it: it may repeat the head's
               number, name no other one, and hold none of the words that deny, doubt or change (CHANGING)
    choice     one letter, alone or as the label of an option; or yes, no, true, false
    values     anything else without words is mathematics: one or more values, "2, 3" or "x = 2 or x = 3", each with an
               optional name (x =) and unit (cm). A unit is a few words, none of them CHANGING: "42 tenths" has none
    text       what is left, "Paris"; it equals only the same text

Two values are a claim too, and differ from one: "42 or 43" equals "42, 43" and not 42.
"""

import re
from dataclasses import dataclass
from typing import Literal

from nemo_jepo.rewards.marks import own_turn, plain

Kind = Literal["choice", "values", "text"]


@dataclass(frozen=True, slots=True)
class Value:
    """One mathematical object, as LaTeX."""

    latex: str
    """All of it but its unit."""
    name: str = ""
    """x of "x = 5"."""
    sides: tuple[str, ...] = ()
    """What it is said to equal: ("5",) of "x = 5", ("40+2", "42") of "40+2 = 42". One side, without "="."""
    is_relation: bool = False
    """Holds <, > or their like."""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """What an answer says."""

    kind: Kind
    text: str
    """Folded: letters of one case, single spaces, no marks, no full stop."""
    values: tuple[Value, ...] = ()


# ---- words ----------------------------------------------------------------------------------------------------------

NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion
    trillion dozen half halves third thirds quarter quarters fourths fifth fifths sixth sixths seventh sevenths eighth
    eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths twice double triple couple"""
CHANGING = frozenset(
    f"""{NUMBER_WORDS} not no nor never neither none cannot without except excluding unless wrong incorrect incorrectly
    false untrue mistake mistaken error invalid impossible undefined wait actually sorry correction corrected oops hmm
    hm but however although though yet instead rather alternatively otherwise else again recheck reconsider recalculate
    ignore disregard change changed opposite contrary maybe perhaps probably possibly possible likely might may could
    should would guess think assume suppose seems appears roughly about approximately approx around nearly almost circa
    unsure uncertain unknown doubt depends depending either between both another other others than least most plus minus
    times squared cubed factorial divided multiplied negative nope nah kidding joke""".split()
)
"""Words that deny, doubt or change what stands beside them, or are numbers themselves."""
FUNCTION_WORDS = frozenset(
    """is are was were be been am to of in on at from for by and or the it its this that these i we you he she they
    so if when where which who because since with more less fewer up down over under above below equals equal ish
    wise root power squareroot""".split()
)
"""Words that no unit holds."""
MATHEMATICAL_WORDS = frozenset("sin cos tan cot sec csc log ln exp max min gcd lcm arcsin arccos arctan".split())
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+(?:['\N{RIGHT SINGLE QUOTATION MARK}][A-Za-z]+)*")

# ---- one claim ------------------------------------------------------------------------------------------------------

LEAD = re.compile(
    r"\s*(?::?\s*\n\s*[-*]\s|[:=]|[*\u2022>#]+\s|(?:so|thus|hence|therefore|it is|is|equals?|equal to|option|choice)\b"
    r"|(?:the |our |my )?(?:final |correct )?(?:answer|result|solution|value of [a-z]|value)\s*(?:is\b|:|=))[\s,]*",
    re.IGNORECASE,
)
"""What may stand before a claim and says nothing."""
END_OF_HEAD = re.compile(
    r"\n|\.(?=\s|$)|(?<=[A-Za-z])!(?=\s|$)|,\s+(?=(?:which|because|since|as|so|where|thus|hence|making|giving|meaning)\b)"
    r"|\s+(?=(?:because|since|which)\b)|\s+is\s+(?=(?:the|my|our|correct|right)\b)|\s+(?=\([A-Za-z][A-Za-z -]+\))"
)
REST_FORBIDS = re.compile(r"[\\^/+*<>?|{}\[\]]")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
AROUND = " .,:;\"'"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def as_claim(own: str) -> Claim | None:
    """The one claim of an own answer; None where it makes none, takes it back, or hedges."""
    text = plain(own_turn(own))
    whole = folded(text)
    boxes = list(_boxes(text))
    if boxes:
        head, rest = boxes[0][0], "".join(_outside(text, boxes))
        if any(folded(content) != folded(head) for content, _, _ in boxes):
            return None
    else:
        text = _after_lead(text)
        end = END_OF_HEAD.search(text)
        head, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    claim = _read(head)
    if claim.kind == "text":  # words: all of them are the claim
        return Claim("text", folded(head) if boxes and not rest.strip(" .") else whole)
    changed = claim.kind != "choice" and is_changing(head)
    return None if changed or "?" in head or not _only_comments(rest, claim) else claim


def as_reference(reference: str) -> Claim:
    """What the reference answer claims, all of its text taken together."""
    text = plain(reference.strip())
    boxes = list(_boxes(text))
    return _read(boxes[0][0] if len(boxes) == 1 else text)


def is_changing(text: str) -> bool:
    """Whether the text holds a word that denies, doubts, changes or counts."""
    words = [word.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for word in WORD.findall(text)]
    return any(word in CHANGING or word.endswith("n't") for word in words)


def folded(text: str) -> str:
    """The text without differences of case, space, and what stands around words."""
    text = re.sub(r"(?<=[a-z])!$", "", " ".join(text.split()).casefold().strip(AROUND)).strip(AROUND)
    return re.sub(r"^(?:the|an?) (?=\w\w)", "", re.sub(r"\s*:\s*", ":", text))


def _after_lead(text: str) -> str:
    """The text from its claim on."""
    while (lead := LEAD.match(text)) and text[lead.end() :].strip():
        text = text[lead.end() :]
    return text.strip()


def _boxes(text: str) -> "list[tuple[str, int, int]]":
    """Content, start and end of every box that is closed."""
    boxes = []
    for box in BOX.finditer(text):
        depth = 1
        for index in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                boxes.append((text[box.end() : index], box.start(), index + 1))
                break
    return boxes


def _outside(text: str, boxes: "list[tuple[str, int, int]]") -> list[str]:
    starts = [0, *(end for _, _, end in boxes)]
    ends = [*(start for _, start, _ in boxes), len(text)]
    return [LEAD.sub(" ", text[start:end]) for start, end in zip(starts, ends, strict=True)]


def _only_comments(rest: str, claim: Claim) -> bool:
    """Whether the text beside a claim leaves it alone."""
    if is_changing(rest) or REST_FORBIDS.search(rest) or re.search(r"\bor\b|\bif\b(?! you)", rest, re.IGNORECASE):
        return False
    if claim.kind == "choice":
        letters = re.findall(r"(?<![A-Za-z'])(?!I\b|A [a-z])[A-Z](?![A-Za-z'])", rest)
        return all(letter.casefold() == claim.text for letter in letters)
    known = {_digits(number) for number in NUMBER.findall(claim.text)} if len(claim.values) == 1 else set()
    return all(_digits(number) in known for number in NUMBER.findall(rest))


def _digits(number: str) -> str:
    """A number in one writing: 1,000.0 -> 1000."""
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


# ---- kinds of claims ------------------------------------------------------------------------------------------------

LETTER = re.compile(r"\(?([A-Za-z])\)?[.):]?")
OPTION = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s+\S.*", re.DOTALL)
TRUTH = frozenset(("yes", "no", "true", "false"))
UNREAD = re.compile(
    r"\\(?:ne|approx|sim|simeq|neg|lnot|not|forall|exists|implies|iff|Rightarrow|Leftrightarrow|pmod|bmod|mod|equiv|mid"
    r"|[lc]?dots|overline|land|lor|lt|gt|ldotp)(?![A-Za-z])|\.\.\.|\N{HORIZONTAL ELLIPSIS}|:|\d\s*_|\?|\d\s+\.?\d|;"
)
"""Mathematics of which the library would read a part alone; it equals only the same text."""


def _read(head: str) -> Claim:
    """The claim of a text that makes one."""
    head = _after_lead(head)
    text = folded(head)
    if text in TRUTH:
        return Claim("choice", text)
    if letter := LETTER.fullmatch(head.strip(" .\"'")):  # or a variable
        return Claim("choice", letter[1].casefold(), (Value(letter[1], sides=(letter[1],)),))
    option = OPTION.fullmatch(head)
    if option and not is_changing(head) and " or " not in head:
        return Claim("choice", (option[1] or option[2]).casefold())
    parts = [_value(part) for part in _parts(head.rstrip(" .,").strip(" \"'"))]
    values = tuple(value for value in parts if value is not None)
    return Claim("values", text, values) if len(values) == len(parts) else Claim("text", text)


def _parts(text: str) -> list[str]:
    r"""The values of a list: split at commas, semicolons, "and", "or"; \{1, 2\} is its members, 1 \pm 2 two values."""
    text = _without_separators(text)
    members = re.fullmatch(r"\\\{(.*)\\\}|\{([^{}]*)\}", text.strip(), re.DOTALL)
    if members and not re.search(r"[|:]|\\mid|\\[{}]", members[1] or members[2]):
        text = members[1] or members[2]
    parts = []
    for part in _split(text, re.compile(r"\s*,\s*(?:and|or)\s+|\s*[,;]\s*|\s+(?:and|or)\s+")):
        signs = ("+", "-") if part.count(r"\pm") == 1 else ("",)
        parts += [part.replace(r"\pm", sign).strip().removeprefix("+") for sign in signs]
    return parts


def _without_separators(text: str) -> str:
    """1,234,567 -> 1234567, but not inside brackets, where a comma stands between two."""
    depth = list(_depths(text))
    grouped = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]*\d)")
    return grouped.sub(lambda number: number[0] if depth[number.start()] else number[0].replace(",", ""), text)


def _depths(text: str) -> "list[int]":
    """How many brackets are open before each character."""
    depth, depths = 0, []
    for character in text:
        depth -= character in ")]}"
        depths.append(depth)
        depth += character in "([{"
    return depths


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand outside of every bracket."""
    depth, parts, start = _depths(text), [], 0
    for found in separator.finditer(text):
        if depth[found.start()] == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


ALIASES = {
    "%": "percent",
    r"^\circ": "degree",
    "cm": "centimeter",
    "mm": "millimeter",
    "m": "meter",
    "km": "kilometer",
    "kg": "kilogram",
    "g": "gram",
    "s": "second",
    "sec": "second",
    "min": "minute",
    "h": "hour",
    "hr": "hour",
    "ft": "foot",
    "feet": "foot",
    "in": "inch",
    "inches": "inch",
    "usd": "dollar",
    "cents": "cent",
    "metre": "meter",
    "\N{EURO SIGN}": "euro",
    "\N{POUND SIGN}": "pound",
}
POWER = r"(?:\^\{?-?\d\}?)?"
UNIT = re.compile(
    rf"(?P<value>.*(?:[\d}})]|\\pi))(?:\s*(?P<sign>%|\^\\circ(?:\s*[CF])?)"
    rf"|(?P<glued>(?:mm|cm|dm|km|kg|mg|ml|mph|ft|lb|lbs|kW|MHz|Hz)\b{POWER})"
    rf"|(?:[\s-]+|/(?=[A-Za-z]{{3}}))(?P<words>[A-Za-z][A-Za-z'/.]*{POWER}(?:[\s-]+[A-Za-z][A-Za-z'/.]*{POWER}){{0,3}}))\s*",
    re.DOTALL,
)
SHORT_UNITS = frozenset("m s g h l L N J W V A K C F".split())


def _value(part: str) -> Value | None:
    """A value with its name and unit; None where it is not mathematics alone."""
    part, unit = _without_unit(part.strip())
    part = re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\\frac{\2}{\3})", part)  # a mixed number
    part = re.sub(r"(\d(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}", part)
    part = re.sub(r"(?<=\d)\s*\((?=\d)", r"\\cdot (", part)
    part = re.sub(r"^([A-Za-z])\s*\\in(?![A-Za-z])", r"\1 =", part)
    sides = [side.strip() for side in _split(part, re.compile("="))]
    names = [side for side in sides if _is_name(side)]
    if len(names) < len(sides):
        sides = [side for side in sides if side not in names]
    rest = " = ".join(sides)
    if not all(sides) or not _is_mathematics(rest):
        return None
    name = folded(names[0]) if len(names) == 1 and "=" in part else ""
    is_relation = re.search(r"[<>]|\\[lg]e(?![A-Za-z])", rest) is not None
    return Value(part, name, tuple(sides), is_relation, unit)


NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*\s*(?:\(\w\))?|\([a-z](?:\s*,\s*[a-z])+\)")


def _is_name(side: str) -> bool:
    return NAME.fullmatch(side) is not None and side not in (r"\pi", "e", "i")


def _is_mathematics(text: str) -> bool:
    """Whether the library would read all of it."""
    if UNREAD.search(text) or not re.search(r"[A-Za-z0-9]", text):
        return False
    environment = re.sub(r"\\(?:begin|end)\s*\{[a-zA-Z]+\}(?:\{[lcr|]+\})?", "", text)
    words = [word.casefold() for word in WORD.findall(environment)]
    return not any(
        (len(word) > 2 or word in FUNCTION_WORDS - {"a", "i"}) and word not in MATHEMATICAL_WORDS for word in words
    )


def _without_unit(part: str) -> tuple[str, str]:
    """A value and its unit, "" where it has none."""
    currency = re.match(r"[\N{EURO SIGN}\N{POUND SIGN}]\s*(?=[\d.])", part)
    if currency:
        return part[currency.end() :], ALIASES[currency[0].strip()]
    found = UNIT.fullmatch(part)
    if not found:
        return part, ""
    unit = (found["sign"] or found["glued"] or found["words"]).strip()
    words = [word for word in re.split(r"[\s/.-]+", re.sub(POWER + r"(?=\W|$)", "", unit)) if word]
    words = [word for index, word in enumerate(words) if not index or word != "a"]  # meters a day
    if found["words"] and any(
        word.casefold() in CHANGING | FUNCTION_WORDS - {"in"}
        or word in MATHEMATICAL_WORDS - {"min"}
        or (len(word) == 1 and word not in SHORT_UNITS)
        for word in words
    ):
        return part, ""
    return found["value"].strip(), _folded_unit(unit)


def _folded_unit(unit: str) -> str:
    """cm^2 and square centimeters alike."""
    unit = re.sub(r"[{}]", "", " ".join(unit.split()))
    names = [ALIASES.get(word.casefold(), word.casefold()) for word in re.split(r"[\s-]+", unit)]
    return " ".join(ALIASES.get(one := re.sub(r"(?<=[a-z]{2})s$", "", name), one) for name in names)
