"""Standard sets to evaluate on. Nothing here is for training.

Where no revision is known for certain, the address says main: pin another one by --revision for a comparison.
"""

import random

from nemo_jepo.rewards.verifiable import undelimited
from nemo_jepo.tools.prepare.records import HUB, Example, Published, Row, text_of

OPTIONS = "ABCD"


def math500(row: Row) -> Example | str:
    """MATH-500: the published answer."""
    question, answer, solution = (text_of(row, column) for column in ("problem", "answer", "solution"))
    if not question or not answer:
        return "blank"
    return Example(question, answer, solution or None, text_of(row, "subject"), text_of(row, "unique_id") or None)


def aime(row: Row) -> Example | str:
    """AIME: a whole number from 0 to 999, without the zeros that fill it up to three digits."""
    question, answer = text_of(row, "problem"), str(row["answer"]).strip()
    if not question:
        return "blank"
    return Example(question, str(int(answer)), None, "aime") if answer.isdecimal() else "no_integer"


def olympiadbench(row: Row) -> Example | str:
    """OlympiadBench, text-only mathematics in English: the final answers, several of them side by side."""
    question = "\n".join(filter(None, (text_of(row, "context"), text_of(row, "question"))))
    answers = [undelimited(answer) for answer in row["final_answer"] or [] if answer]
    if not text_of(row, "question") or not all(answers) or not answers:
        return "blank"
    solutions = [solution for solution in row["solution"] or [] if solution]
    return Example(question, ", ".join(answers), solutions[0] if solutions else None, text_of(row, "subfield"))


def minerva(row: Row) -> Example | str:
    """Minerva's questions from MIT OpenCourseWare: the published answer."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    return Example(question, answer, None, "minerva") if question and answer else "blank"


def minif2f(row: Row) -> Example | str:
    """miniF2F in words: the answer is the informal proof."""
    question, proof, name = (text_of(row, column) for column in ("informal_stmt", "informal_proof", "id"))
    if not question or not proof:
        return "blank"
    return Example(question, proof, None, name.partition("_")[0], name or None)


def gpqa(row: Row) -> Example | str:
    """GPQA: the letter of the right option; their order depends on the question alone."""
    question, right = text_of(row, "Question"), text_of(row, "Correct Answer")
    options = [right, *(text_of(row, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    if not question or not all(options):
        return "blank"
    random.Random(f"order of {question}").shuffle(options)
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(OPTIONS, options, strict=True))
    asked = f"{question}\n\n{listed}\n\nAnswer with the letter of the right option."
    explanation, name = text_of(row, "Explanation"), text_of(row, "Record ID")
    answer = OPTIONS[options.index(right)]
    return Example(asked, answer, explanation or None, text_of(row, "High-level domain"), name or None)


BENCHMARKS = {
    "math500": Published(
        home="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        licence="MIT (of MATH)",
        files={"test": HUB.format(home="HuggingFaceH4/MATH-500", files="test.jsonl")},
        columns=("problem", "solution", "answer", "subject", "unique_id"),
        read=math500,
        filters=("blank",),
    ),
    "aime24": Published(
        home="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        licence="none stated; the problems are the MAA's",
        files={"test": HUB.format(home="HuggingFaceH4/aime_2024", files="data/train-00000-of-00001.parquet")},
        columns=("problem", "answer"),
        read=aime,
        filters=("blank", "no_integer"),
    ),
    "aime25": Published(
        home="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        licence="Apache-2.0; the problems are the MAA's",
        files={"test": HUB.format(home="math-ai/aime25", files="test.jsonl")},
        columns=("problem", "answer"),
        read=aime,
        filters=("blank", "no_integer"),
    ),
    "olympiadbench": Published(
        home="Hothan/OlympiadBench",
        revision="3b426ee1d587c71b495146dde9f3e995ee7ac59f",
        licence="Apache-2.0",
        files={
            "test": HUB.format(
                home="Hothan/OlympiadBench", files="OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"
            )
        },
        columns=("question", "context", "solution", "final_answer", "subfield"),
        read=olympiadbench,
        filters=("blank",),
    ),
    "minerva": Published(
        home="math-ai/minervamath",
        revision="main",
        licence="none stated; the questions are MIT OpenCourseWare's (CC BY-NC-SA 4.0)",
        files={"test": HUB.format(home="math-ai/minervamath", files="test.jsonl")},
        columns=("question", "answer"),
        read=minerva,
        filters=("blank",),
    ),
    "minif2f": Published(
        home="cat-searcher/minif2f-lean4",
        revision="70a1249ce240667f6bcdd1ccd62f847f0e065d57",
        licence="MIT",
        files={
            split: HUB.format(home="cat-searcher/minif2f-lean4", files=file)
            for split, file in (("validation", "valid.jsonl"), ("test", "test.jsonl"))
        },
        columns=("id", "informal_stmt", "informal_proof"),
        read=minif2f,
        filters=("blank",),
        verified=False,
    ),
    "gpqa": Published(
        home="Idavidrein/gpqa",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        licence="CC BY 4.0",
        files={"test": HUB.format(home="Idavidrein/gpqa", files="gpqa_diamond.csv")},
        columns=(
            "Question",
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
            "Explanation",
            "High-level domain",
            "Record ID",
        ),
        read=gpqa,
        filters=("blank",),
        conditions="Access (hf auth login) is for those who agree not to publish GPQA's questions as plain text.",
    ),
}
