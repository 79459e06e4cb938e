r"""What a text says, without what says only how it looks: where its turn ends, Markdown, dollars, spacing, characters.

"**\(1\,000\)**<|im_end|>" -> "1000"
"""

import re

END_OF_TURN = re.compile(
    r"<\|.*?\|>|</?s>|<(?:end|start)_of_turn>|<eos>|\[/?INST\]"
    r"|\n\s*(?:\*\*|#+ ?)?(?:Q|A|Question|Problem|Exercise|Example|User|Human|Assistant|Instruction|Input)\b ?\d*:"
)
UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DIVISION SIGN}": "/",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{NOT EQUAL TO}": r"\ne ",
        "\N{ALMOST EQUAL TO}": r"\approx ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{UNION}": r"\cup ",
        "\N{ELEMENT OF}": r"\in ",
        "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
        "\N{NO-BREAK SPACE}": " ",
        "\N{ZERO WIDTH SPACE}": "",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    }
)
SUPERSCRIPT = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
ROOT = re.compile(r"(?:\N{SQUARE ROOT}|\bsqrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[a-z]))")
MARKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<=[\w)])\*\*(?=[\w(])(?!\w*\*\*)"), "^"),  # a power as programs write it
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"(?<![\w*])([*_])(?=\S)([^*_\n]+)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"(?:^|(?<=[\s:]))~(?=\s*\.?\d)"), r"\\approx "),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\^)"), r" \\times "),
    (re.compile(r"\\\$|\$|(?<!\\)\\[()\[\]]"), " "),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\s+\^"), "^"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr|big|Big)(?![A-Za-z])"), ""),
    (re.compile(r"(?<=\d)(?:\\,|\\!|\{,\})+(?=\d{3})"), ""),  # of thousands
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"<=|\\leqslant|\\leq(?![A-Za-z])"), r"\\le "),
    (re.compile(r">=|\\geqslant|\\geq(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"!=|\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])"), r"\\infty "),
)


def plain(text: str) -> str:
    """The text without the marks that only say how it looks, in LaTeX where it is mathematics."""
    text = SUPERSCRIPTS.sub(lambda digits: f"^{{{digits[0].translate(SUPERSCRIPT)}}}", text)
    text = ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text).translate(UNICODE)
    for mark, instead in MARKS:
        text = mark.sub(instead, text)
    return text


def own_turn(text: str) -> str:
    """The text up to a special token, or to the beginning of another question."""
    return END_OF_TURN.split(text.strip(), maxsplit=1)[0]
