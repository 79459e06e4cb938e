"""What finds near duplicates, contaminated rows, difficulties, telling rows and clusters, against plain rewrites."""

import json
import random
import shutil
import zlib
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.tools.prepare import embed
from nemo_jepo.tools.prepare.cluster import clusters
from nemo_jepo.tools.prepare.decontaminate import contaminations
from nemo_jepo.tools.prepare.difficulty import difficulty_of, read_pass_rates
from nemo_jepo.tools.prepare.duplicates import SHINGLE_WORDS, near_duplicates
from nemo_jepo.tools.prepare.records import Example
from nemo_jepo.tools.prepare.select_zip import select_zip
from nemo_jepo.tools.prepare.text import ngrams, words
from tests.support.small_tokenizers import small_tokenizer

# Few words, so that questions share n-grams; between them what counts and what does not.
questions = st.lists(
    st.lists(st.sampled_from(["a", "b", "C", "c.", "1", "$-2$", "?"]), max_size=12).map(" ".join), max_size=12
)


def example(question: str) -> Example:
    return Example(question, "1", None, "own")


# ---- words and n-grams


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Find all REAL $x$, with $x^{2} = 4.5$!", "find all real x with x 2 4 5"),
        ("STRASSE Stra\u00dfe", "strasse strasse"),
        ("\uff11\uff12 \ufb01sh, na\u00efve_x", "12 fish na\u00efve x"),
        (" ?!-- ", ""),
    ],
)
def test_words_are_letters_and_digits_without_case_or_punctuation(text, expected):
    assert " ".join(words(text)) == expected


def test_a_text_of_fewer_words_than_n_is_one_ngram_and_one_without_words_has_none():
    assert ngrams("A b, c d", 3) == {"a b c", "b c d"}
    assert ngrams("a b c", 3) == ngrams("A (b) C?", 9) == {"a b c"}
    assert ngrams("?!", 3) == set()


# ---- decontamination


def share(question: list[str], other: list[str], n: int) -> bool:
    """The definition: a place in each from which n words are equal; of a short question, all of it."""
    if not question or not other:
        return False
    if len(question) < n or len(other) < n:
        return question == other
    return any(
        all(question[first + k] == other[second + k] for k in range(n))
        for first in range(len(question) - n + 1)
        for second in range(len(other) - n + 1)
    )


@given(questions, questions, questions, st.integers(1, 4))
def test_contaminated_questions_are_those_of_a_loop_over_all_places(train, first, second, n):
    found = contaminations(train, [first, second], n)
    expected = [
        [
            number
            for number, evaluation in enumerate((first, second))
            if any(share(words(question), words(other), n) for other in evaluation)
        ]
        for question in train
    ]
    assert found == expected


def test_nine_words_in_common_contaminate_and_eight_do_not():
    nine = "one two three four five six seven eight nine"
    evaluation = [f"Before {nine}, after.", "Short question?"]
    train = [
        f"Zero; {nine.upper()} ten",
        nine.replace("nine", "9"),
        "short QUESTION",
        "A short question that is longer than it was",
    ]
    assert contaminations(train, [evaluation], 9) == [[0], [], [0], []]


# ---- near duplicates


def jaccard(first: set[str], second: set[str]) -> Fraction:
    return Fraction(len(first & second), len(first | second)) if first | second else Fraction(0)


def by_brute_force(questions: list[str], threshold: Fraction) -> list[int | None]:
    shingles = [ngrams(question, SHINGLE_WORDS) for question in questions]
    found: list[int | None] = []
    for row, own in enumerate(shingles):
        earlier = [other for other in range(row) if found[other] is None]
        found.append(next((other for other in earlier if jaccard(own, shingles[other]) >= threshold), None))
    return found


@given(questions, st.sampled_from(["0.01", "0.3", "0.5", "0.6", "0.8", "1"]))
def test_near_duplicates_are_those_of_all_pairs(questions, threshold):
    assert near_duplicates(questions, Fraction(threshold)) == by_brute_force(questions, Fraction(threshold))


@pytest.mark.parametrize("threshold", ["0.2", "0.5", "0.7", "0.8", "0.9"])
def test_near_duplicates_are_those_of_all_pairs_of_longer_questions(threshold):
    """Copies of copies with a word changed, cut or added, so that similarities of every size occur."""
    rng = random.Random(7)
    questions = [" ".join(rng.choices("abcdefghij", k=rng.randint(5, 40))) for _ in range(20)]
    for _ in range(180):
        changed = rng.choice(questions).split()
        place = rng.randrange(len(changed))
        changed[place : place + rng.randint(0, 1)] = rng.choices("abcdefghij", k=rng.randint(0, 2))
        questions.append(" ".join(changed) or "a")
    expected = by_brute_force(questions, Fraction(threshold))
    assert near_duplicates(questions, Fraction(threshold)) == expected
    assert 10 < sum(twin is not None for twin in expected) < 190


def test_a_similarity_of_exactly_the_threshold_is_enough():
    """9 words have 5 shingles, and without the last word 4 of them: 4/5; 14 words with a new end share 9 of 11."""
    nine, fourteen = "a b c d e f g h i", "a b c d e f g h i j k l m n"
    assert near_duplicates([nine, nine[:-2]], Fraction("0.8")) == [None, 0]
    assert near_duplicates([nine, nine[:-2]], Fraction("0.81")) == [None, None]
    assert near_duplicates([fourteen, f"{fourteen[:-1]}z"], Fraction(9, 11)) == [None, 0]


def test_what_resembles_a_dropped_row_alone_stays():
    """The second is like the first, the third like the second alone."""
    first = "a b c d e f g h i j k l"
    second, third = first.replace(" k l", " k z"), "b c d e f g h i j k z y"
    assert near_duplicates([first, second, third], Fraction("0.7")) == [None, 0, None]
    assert near_duplicates([second, third], Fraction("0.7")) == [None, 0]


# ---- difficulty


def pass_rates(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pass_rates(path)


def test_difficulty_is_one_minus_the_mean_pass_rate_by_id_or_by_question(tmp_path):
    table = pass_rates(
        tmp_path / "rates.jsonl",
        {"id": "train/0", "pass_rate": 0.9, "accuracy": 0.1},
        {"question": "How  Many?", "accuracy": True},
        {"question": "how many?", "accuracy": 0},
        {"question": "how many?", "accuracy": 0},
        {"id": 7, "question": "Why?", "pass_rate": 0},
    )
    assert difficulty_of("train/0", example("other"), table) == 0.1
    assert difficulty_of("train/5", example("How many?"), table) == round(2 / 3, 9)
    assert difficulty_of("7", example("why? "), table) == 1.0
    assert difficulty_of("8", example("Where?"), table) is None
    with pytest.raises(DataError, match="id '7' has another question there"):
        difficulty_of("7", example("How?"), table)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"pass_rate": 0.5}, "neither id nor question"),
        ({"id": "1", "rate": 0.5}, "pass_rate or accuracy must be a number from 0 to 1"),
        ({"id": "1", "accuracy": 1.5}, "pass_rate or accuracy must be a number from 0 to 1"),
        ({"id": "1", "accuracy": float("nan")}, "pass_rate or accuracy must be a number from 0 to 1"),
        ({"id": ["1"], "accuracy": 1}, "id and question must be text"),
        ({"id": "0", "question": "Other?", "accuracy": 1}, "id '0' stands for another question in an earlier row"),
        ([1], "not a JSON object"),
    ],
)
def test_a_row_of_pass_rates_that_cannot_be_used_is_named(tmp_path, row, problem):
    path = tmp_path / "rates.jsonl"
    with pytest.raises(DataError) as caught:
        pass_rates(path, {"id": "0", "question": "Why?", "accuracy": 1}, row)
    assert str(caught.value) == f"{path}:2: {problem}. Mend the row, or take it out."


def test_an_empty_file_of_pass_rates_is_refused(tmp_path):
    with pytest.raises(DataError, match="no row"):
        pass_rates(tmp_path / "rates.jsonl")


# ---- selection by compression ratio


def zip_by_the_paper(texts: list[str], count: int, pool: int, candidates: int, group: int) -> list[int]:
    """Algorithm 1 word for word: every ratio is of the whole text, compressed anew."""

    def ratio(numbers: list[int]) -> float:
        whole = "".join(f"{texts[number]}\n" for number in numbers).encode()
        return len(whole) / len(zlib.compress(whole, 9))

    scores = {number: ratio([number]) for number in range(len(texts))}
    chosen: list[int] = []
    while len(chosen) < count:
        nearest = sorted(scores, key=lambda number: (scores[number], number))[:pool]
        for number in nearest:
            scores[number] = ratio([*chosen, number])
        closer = sorted(nearest, key=lambda number: (scores[number], number))[:candidates]
        together: list[int] = []
        while closer and len(together) < group and len(chosen) + len(together) < count:
            best = min(closer, key=lambda number: (ratio([*together, number]), number))
            together.append(best)
            closer.remove(best)
        for number in together:
            del scores[number]
        chosen += together
    return chosen


@pytest.mark.parametrize("sizes", [(1000, 200, 100), (20, 9, 5), (3, 2, 1)])
@pytest.mark.parametrize("count", [1, 37, 43])
def test_the_selection_is_that_of_the_papers_algorithm(sizes, count):
    """Texts of up to 3 kB, so that what was chosen is soon longer than the 32 kB that zlib looks back."""
    rng = random.Random(3)
    vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(300)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 500))) for _ in range(40)] + ["same", "same", "\u00fc"]
    pool, candidates, group = sizes
    found = select_zip(texts, count, pool=pool, candidates=candidates, group=group)
    assert found == zip_by_the_paper(texts, count, pool, candidates, group)
    assert len(set(found)) == count


def test_a_text_that_was_chosen_already_is_chosen_last_again():
    """Of five random texts and five copies, the five different ones come first."""
    rng = random.Random(5)
    texts = ["".join(rng.choices("0123456789abcdef", k=400)) for _ in range(5)]
    first = select_zip([*texts, *texts], 5)
    assert {number % 5 for number in first} == set(range(5))


# ---- clusters


def test_questions_about_the_same_things_are_in_one_cluster():
    about = {
        "trains": "train leaves station speed miles hour {}",
        "apples": "apples basket pears fruit market {}",
        "angles": "triangle angle degrees side circle {}",
    }
    sizes = {"trains": 5, "apples": 9, "angles": 7}
    questions = [about[name].format(number) for name in about for number in range(sizes[name])]
    labels, standing_out = clusters(questions, 3)
    assert labels == [2] * 5 + [0] * 9 + [1] * 7  # the largest is the first
    assert {"train", "station", "speed"} < set(standing_out[2]) and {"apples", "pears"} < set(standing_out[0])
    assert clusters(questions, 3) == (labels, standing_out)


def test_more_clusters_than_different_questions_are_refused():
    for questions in (["a b", "B, a!", "a b"], ["a b", "a c", "b a"], ["?", "!"]):
        with pytest.raises(ConfigError, match="more clusters than questions of different words"):
            clusters(questions, 3)


# ---- vectors of a model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random model of 2 layers, whose tokenizer knows no padding token."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = small_tokenizer("byte_level")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=2, **shape)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_a_vector_is_the_mean_hidden_state_of_a_question_by_itself(encoder, monkeypatch):
    """Batches of 3 with padding, against one question at a time without."""
    monkeypatch.setattr(embed, "BATCH", 3)
    monkeypatch.setattr(embed, "LONGEST", 20)
    questions = [f"What is {'very ' * length}{length}?" for length in (0, 9, 1, 4, 2, 0, 7)]
    found = embed.embeddings(questions, encoder)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for question, vector in zip(questions, found, strict=True):
        ids = torch.tensor([tokenizer(question)["input_ids"][:20]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(0)
        numpy.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert (embed.embeddings(questions, encoder) == found).all()


def test_clusters_follow_the_vectors_and_their_words_are_shown_all_the_same():
    questions = ["red apples", "red pears", "blue apples", "blue pears", "blue plums"]
    vectors = numpy.array([[1, 0], [0, 1], [1, 0.1], [0, 1.1], [0.1, 1]], dtype=numpy.float32)
    labels, standing_out = clusters(questions, 2, vectors)
    assert labels == [1, 0, 1, 0, 0]
    assert standing_out[1][0] == "apples" and standing_out[0][0] == "pears"
    with pytest.raises(ConfigError, match="more clusters than questions"):
        clusters(questions, 3, numpy.zeros((5, 2), dtype=numpy.float32))


def test_a_folder_without_a_whole_model_is_one_line(encoder, tmp_path):
    def line_of(folder) -> str:
        with pytest.raises(ConfigError) as caught:
            embed.weight_files(folder)
            embed.embeddings(["Why?"], folder)
        (line,) = str(caught.value).splitlines()
        return line

    gone = tmp_path / "gone"
    assert line_of(gone) == f"--embed='{gone}': cannot be read (No such file or directory). Give a model's folder."
    pickled = shutil.copytree(encoder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "holds no *.safetensors. Give a Hugging Face folder with them." in line_of(pickled)
    lacking = shutil.copytree(encoder, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["layers.1.mlp.down_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    assert "lacks weights of its model (layers.1.mlp.down_proj.weight)" in line_of(lacking)
    foreign = shutil.copytree(encoder, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}')
    (foreign / "mine.py").write_text("raise SystemExit('code of the folder ran')")
    assert line_of(foreign).startswith(f"--embed='{foreign}': transformers refuses it (")
