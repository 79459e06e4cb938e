r"""Text out of published data sets: the answer in \boxed{}, and the labels around problems and proofs.

Source of `without_labels`: arXiv 2503.19618, App. B.1, which names what is removed but not the expressions: leading
blanks, markdown headings like ##, prefixes like "Problem:" and "Solution", letter-digit combinations like "A1" / "G5" /
"ROU", trailing dots and blanks. Ours are below.
"""

import re
import string

COUNTRIES = """
    AFG ALB ALG ANG ARG ARM AUS AUT AZE BAH BEL BEN BGD BGR BIH BLR BOL BOT BRA BRU BUL CAM CAN CHI CHN CIS CMR COL CRI
    CRO CUB CYP CZE CZS DEN DNK ECU EGY ENG ESP EST FIN FRA FRG GBR GDR GEO GER GHA GRE GTM HEL HKG HND HON HRV HUN ICE
    IDN INA IND IRE IRL IRN IRQ ISL ISR ITA JAP JPN KAZ KEN KGZ KHM KOR KSV KUW KWT LAO LAT LIE LIT LUX LVA MAC MAR MAS
    MCD MDA MEX MKD MLT MNE MNG MOL MON MOR MYS NED NEP NET NGA NIC NLD NOR NPL NZL OMN PAK PAN PAR PER PHI POL POR PRI
    PRK PRT PRY PUR ROM ROU RUS SAF SAU SCG SER SGP SIN SLO SLV SMN SPA SRB SRI SUI SVK SVN SWE SWI SYR TAN THA TJK TKM
    TTO TUN TUR TWN UGA UKR UNK URU URY USA USS UZB VEN VIE VNM YEM YUG ZAF ZWE
"""
"""Countries that propose problems to the IMO, former ones included, in the spellings of shortlists and compendia."""

# "Solutions exist", "ABC is a triangle" and "A1, B1 and C1 lie on a line" begin with no label. So codes are those of
# IMO shortlists (subjects A, C, G, N), and a label without full stop or colon ends where a sentence or formula begins.
NEXT = r"(?=[A-Z$\\(\[\"]|\Z)(?![A-Z]\d)"
TITLE = rf"[*_]*(?i:problem|solution)\b[*_]*(?:\s*\d+\b)?[*_]*(?:\s*[.:)]+[*_]*|[ \t]*\n|\s+{NEXT}|\Z)"
COUNTRY = rf"(?:{'|'.join(COUNTRIES.split())})(?:\s\d+)?"
SUPERSCRIPT = r"\s*\$?\^\{(?:[^{}]|\{[^{}]*\})*\}\$?"
CODE = rf"(?:[ACGN]\d+|\({COUNTRY}\)|{COUNTRY}\b)(?:{SUPERSCRIPT})?"
NUMBERED_CODE = rf"(?:\d+[.)]\s*)?{CODE}(?:[.:)]+\s*|\s+)(?:(?={CODE})|{NEXT})"
LABELS = re.compile(rf"(?:\s+|#+|{TITLE}|{NUMBERED_CODE})*")
OPENING = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
PROOF_ENVIRONMENT = re.compile(r"\A\s*\\begin\{proof\}(.*)\\end\{proof\}\s*\Z", re.DOTALL)


def without_labels(text: str) -> str:
    """A problem or a proof without what stands before its first and after its last sentence; may be empty.

    Labels are removed until none is left: "## Problem 3. A5 (ROU) Let ..." -> "Let ...".
    """
    labels = LABELS.match(text)
    return text[labels.end() if labels else 0 :].rstrip(f"{string.whitespace}.")


def without_proof_environment(proof: str) -> str:
    r"""What stands between \begin{proof} and \end{proof}; another text stays as it is, without outer blanks."""
    inside = PROOF_ENVIRONMENT.match(proof)
    return (inside[1] if inside else proof).strip()


def boxed_answer(solution: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}, or "\boxed 5"), braces balanced; None without one.

    A box inside a box belongs to the outer one. Escaped braces, as in \boxed{\{1, 2\}}, do not count.
    """
    answer, position = None, 0
    while box := OPENING.search(solution, position):
        position = box.end()
        if solution[position] == "{":
            end = _closing_brace(solution, position)
            if end is None:
                break
            answer, position = solution[position + 1 : end], end
        else:
            answer = re.split(r"[\s$]", solution[position:], maxsplit=1)[0].rstrip(".,")
    return answer.strip() or None if answer else None


def _closing_brace(text: str, opening: int) -> int | None:
    """Where the brace that opens at `opening` is closed."""
    depth = 0
    for found in BRACES.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return None
