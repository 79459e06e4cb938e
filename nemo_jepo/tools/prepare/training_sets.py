"""Data sets to train on, with splits of their own for evaluation."""

from nemo_jepo.data.files import BadRow
from nemo_jepo.data.files import Row as QuestionRow
from nemo_jepo.data.gsm8k import split_solution
from nemo_jepo.tools.prepare.cleaning import boxed_answer, without_labels, without_proof_environment
from nemo_jepo.tools.prepare.records import HUB, Example, Published, Row, text_of


def math(row: Row) -> Example | str:
    """MATH: the answer stands in the last box of the solution."""
    question, solution = text_of(row, "problem"), text_of(row, "solution")
    if not question or not solution:
        return "blank"
    answer = boxed_answer(solution)
    return "no_box" if answer is None else Example(question, answer, solution, text_of(row, "type"))


def gsm8k(row: Row) -> Example | str:
    """GSM8K: the answer is the number after ####, the chain of thought what stands before."""
    question, solution = text_of(row, "question"), text_of(row, "answer")
    if not question or not solution:
        return "blank"
    split = split_solution(QuestionRow("gsm8k", 0, question, solution))
    if isinstance(split, BadRow):
        return "no_final_answer"
    return Example(split.question, split.answer, split.chain_of_thought, "gsm8k")


def proofnet(row: Row) -> Example | str:
    """ProofNet: the answer is the proof."""
    question, proof = text_of(row, "nl_statement"), without_proof_environment(text_of(row, "nl_proof"))
    if not question or not proof:
        return "blank"
    name = text_of(row, "id")
    return Example(question, proof, None, name.partition("|")[0], name or None)


def says_proof(row: Row) -> bool:
    """The two columns agree for most proofs only, so either counts."""
    return "proof" in (text_of(row, "question_type").lower(), text_of(row, "answer").lower())


def marked_valid(row: Row) -> bool:
    """NuminaMath's own judgement of problem and solution."""
    return text_of(row, "problem_is_valid") == text_of(row, "solution_is_valid") == "Yes"


def numina(row: Row) -> Example | str:
    """NuminaMath-1.5 without its proofs: the published answer, the cleaned solution as chain of thought."""
    question, solution, answer = (text_of(row, column) for column in ("problem", "solution", "answer"))
    if not question or not solution or not answer:
        return "blank"
    if says_proof(row):
        return "proof"
    if not marked_valid(row):
        return "marked_invalid"
    if answer.lower() == "notfound":
        return "no_answer"
    question, solution = without_labels(question), without_labels(solution)
    return Example(question, answer, solution, text_of(row, "source")) if question and solution else "nothing_left"


def numina_proof(row: Row) -> Example | str:
    """The proofs of NuminaMath-1.5: the cleaned proof is the answer."""
    if not says_proof(row):
        return "not_a_proof"
    question, proof = text_of(row, "problem"), text_of(row, "solution")
    if not question or not proof:
        return "blank"
    if not marked_valid(row):
        return "marked_invalid"
    question, proof = without_labels(question), without_labels(proof)
    return Example(question, proof, None, text_of(row, "source")) if question and proof else "nothing_left"


NUMINA_HOME = "AI-MO/NuminaMath-1.5"
NUMINA_REVISION = "1b05109f9e5c1ad06c0663519502416c30b300f8"
NUMINA_FILES = {"train": HUB.format(home=NUMINA_HOME, files="data/train-*.parquet")}
NUMINA_COLUMNS = ("problem", "solution", "answer", "question_type", "problem_is_valid", "solution_is_valid", "source")
NUMINA_HELD_OUT = 640  # as many as the paper's Numina test set

TRAINING_SETS = {
    "math": Published(
        home="EleutherAI/hendrycks_math",
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
        licence="MIT",
        files={
            split: HUB.format(home="EleutherAI/hendrycks_math", files=f"*/{split}-*.parquet")
            for split in ("train", "test")
        },
        columns=("problem", "level", "type", "solution"),
        read=math,
        filters=("blank", "no_box"),
        paper="7,500 for training, 2,500 for testing; which of the 5,000 published ones is not said",
    ),
    "numina": Published(
        home=NUMINA_HOME,
        revision=NUMINA_REVISION,
        licence="Apache-2.0",
        files=NUMINA_FILES,
        columns=NUMINA_COLUMNS,
        read=numina,
        filters=("blank", "proof", "marked_invalid", "no_answer", "nothing_left", "repeated"),
        held_out=NUMINA_HELD_OUT,
        paper="about 22,000 for training, 640 held out, at least 40% not verifiable; how they were chosen is not said",
    ),
    "numina_proof": Published(
        home=NUMINA_HOME,
        revision=NUMINA_REVISION,
        licence="Apache-2.0",
        files=NUMINA_FILES,
        columns=NUMINA_COLUMNS,
        read=numina_proof,
        filters=("not_a_proof", "blank", "marked_invalid", "nothing_left", "repeated"),
        held_out=NUMINA_HELD_OUT,
        verified=False,
        paper="58,088 proofs of NuminaMath-1.5 after cleaning and filtering by simple expressions (App. B.1)",
        paper_count=58_088,
    ),
    "gsm8k": Published(
        home="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        licence="MIT",
        files={split: HUB.format(home="openai/gsm8k", files=f"main/{split}-*.parquet") for split in ("train", "test")},
        columns=("question", "answer"),
        read=gsm8k,
        filters=("blank", "no_final_answer"),
    ),
    # The hub's copy is a loading script, which `datasets` no longer runs; these are the authors' own files.
    "proofnet": Published(
        home="https://github.com/zhangir-azerbayev/ProofNet",
        revision="bddbe1c81acd5f20f7d9564c26fd7b4ea66e571b",
        licence="MIT",
        files={
            split: f"https://raw.githubusercontent.com/zhangir-azerbayev/ProofNet/{{revision}}/benchmark/{file}"
            for split, file in (("validation", "valid.jsonl"), ("test", "test.jsonl"))
        },
        columns=("id", "nl_statement", "nl_proof"),
        read=proofnet,
        filters=("blank",),
        verified=False,
    ),
}
