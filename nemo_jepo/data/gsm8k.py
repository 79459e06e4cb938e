"""GSM8K: `answer` holds a worked solution and, after ####, the final number.

Source: Cobbe et al., arXiv 2110.14168; github.com/openai/grade-school-math.
"""

import dataclasses
import re

from nemo_jepo.data.files import BadRow, Row

CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def split_solution(row: Row) -> Row | BadRow:
    """The row with a* = the number after ####, commas removed, and the solution before it as its chain of thought.

    Calculator annotations such as <<48/2=24>> repeat what stands beside them and are removed.
    """
    solution, hashes, final = row.answer.rpartition("####")
    answer = final.replace(",", "").strip()
    if not hashes or not answer:
        problem = "has no '#### final answer'" if not hashes else "nothing follows ####"
        return BadRow(row.source, row.line, "answer", problem)
    chain_of_thought = CALCULATOR_ANNOTATION.sub("", solution).strip()
    return dataclasses.replace(row, answer=answer, chain_of_thought=chain_of_thought or None)
