"""The splice over small real tokenizers of every kind; the oracle decodes every prefix in full."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig
from nemo_jepo.data.splice import MarkerEnd, Splicer
from nemo_jepo.types import FinishReason, Prompt, Rollout
from tests.support.small_tokenizers import BUILDERS, FOREIGN, LETTERS, small_tokenizer

MARKER = "the final answer is"
CHINESE_MARKER = "\u6700\u7ec8\u7b54\u6848\u662f"
# The usual one, one that ends inside a word, one of several bytes per character, one with spaces at both ends.
MARKERS = [MARKER, "the final ans", CHINESE_MARKER, "####"]
PIECES = [
    *MARKERS,
    "The FINAL answer Is",
    "The final answer is: ",
    " the final answer ",
    "is",
    "s",
    "ans",
    "wer",
    CHINESE_MARKER[-1],
    CHINESE_MARKER[0] * 9,
    " ",
]
KINDS = list(BUILDERS)

TEXT = st.text(LETTERS + FOREIGN, max_size=12)
ANSWER = st.text(LETTERS + FOREIGN, min_size=1, max_size=12).filter(lambda text: text.strip() == text)
COMPLETION = st.lists(TEXT | st.sampled_from(PIECES), max_size=8)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)


def sampled(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> tuple[int, ...]:
    """Ids that no tokenizer would make of the whole text, as a sampler draws them: the pieces' ids side by side."""
    return tuple(token_id for piece in pieces for token_id in encode(tokenizer, piece))


def marker_end_by_decoding_every_prefix(tokenizer, marker, token_ids) -> MarkerEnd | None:
    for num_tokens in range(len(token_ids) + 1):
        text = decode(tokenizer, token_ids[:num_tokens]).lower()
        if marker.lower() in text:
            return MarkerEnd(num_tokens, aligned=text.endswith(marker.lower()))
    return None


def prompt_of(tokenizer, question="2 * 3 =", answer="42", chain_of_thought=None) -> Prompt:
    return Prompt(0, encode(tokenizer, question), question, answer, chain_of_thought)


def rollout_of(token_ids: tuple[int, ...], finish_reason: FinishReason = "stop", group: int = 0) -> Rollout:
    logprobs = tuple(-0.5 - index for index in range(len(token_ids)))
    return Rollout(group, 2, token_ids, logprobs, finish_reason)


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("kind", KINDS)
@given(pieces=COMPLETION)
def test_the_marker_ends_where_decoding_every_prefix_first_shows_it(kind, marker, pieces):
    tokenizer = small_tokenizer(kind)
    token_ids = sampled(tokenizer, pieces)
    splicer = Splicer(tokenizer, AnswerConfig(marker=marker))
    end = splicer.marker_end(token_ids)
    assert end == marker_end_by_decoding_every_prefix(tokenizer, marker, token_ids)
    stops = [splicer.stop_after(token_ids[:n]) for n in range(len(token_ids) + 1)]
    assert (stops.index(True) if True in stops else None) == (end.num_tokens if end else None)


@pytest.mark.parametrize("kind", KINDS)
@given(question=TEXT, pieces=COMPLETION, own=TEXT, answer=ANSWER)
def test_a_spliced_sequence_is_the_samplers_ids_and_then_reads_one_space_and_the_answer(
    kind, question, pieces, own, answer
):
    tokenizer = small_tokenizer(kind)
    prompt = prompt_of(tokenizer, question, answer)
    generation = sampled(tokenizer, [*pieces, " the final answer is", own])
    (spliced,) = Splicer(tokenizer, AnswerConfig()).splice_reference([prompt], [rollout_of(generation)])

    end = marker_end_by_decoding_every_prefix(tokenizer, MARKER, generation)
    assert (spliced.valid, spliced.misaligned, spliced.has_marker) == (end.aligned, not end.aligned, True)
    assert spliced.ends == spliced.valid
    assert spliced.length == spliced.prompt_length + spliced.chain_length + spliced.answer_length
    assert spliced.token_ids[: spliced.prompt_length] == prompt.token_ids
    chain = spliced.token_ids[spliced.prompt_length : spliced.prompt_length + spliced.chain_length]
    assert chain == (generation[: end.num_tokens] if end.aligned else generation)
    assert spliced.generation_logprobs == rollout_of(generation).generation_logprobs[: len(chain)]
    if spliced.valid:
        *answer_ids, last = spliced.token_ids[spliced.prompt_length + spliced.chain_length :]
        assert last == tokenizer.eos_token_id
        read = decode(tokenizer, (*chain, *answer_ids))
        assert read == f"{decode(tokenizer, chain)} {unicodedata.normalize('NFC', answer)}"
    else:
        assert spliced.answer_length == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_that_ends_inside_a_token_keeps_its_format_credit_and_is_masked_out(kind):
    tokenizer = BUILDERS[kind]()
    tokenizer.add_tokens([AddedToken("is:=", normalized=False)])
    glued = tokenizer.convert_tokens_to_ids("is:=")
    generation = (*encode(tokenizer, "So the final answer "), glued, *encode(tokenizer, "5"))
    splicer = Splicer(tokenizer, AnswerConfig())
    prompt, rollout = prompt_of(tokenizer), rollout_of(generation, "length")

    (spliced,) = splicer.splice_reference([prompt], [rollout])
    assert (spliced.valid, spliced.has_marker, spliced.misaligned) == (False, True, True)
    assert spliced.token_ids == prompt.token_ids + generation
    assert (spliced.chain_length, spliced.answer_length) == (len(generation), 0)

    (own,) = splicer.splice_own([prompt], [rollout])
    assert (own.valid, own.misaligned, own.answer_length) == (True, True, len(encode(tokenizer, "5")))
    assert splicer.own_answer_text(rollout).startswith(":=")


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("kind", KINDS)
@given(pieces=COMPLETION)
def test_the_markers_tokens_are_the_fewest_that_read_it(kind, marker, pieces):
    tokenizer = small_tokenizer(kind)
    token_ids = sampled(tokenizer, pieces)
    splicer = Splicer(tokenizer, AnswerConfig(marker=marker))
    span, end = splicer.marker_span(token_ids), splicer.marker_end(token_ids)
    if end is None:
        assert span is None
        return
    start, stop = span
    assert stop == end.num_tokens
    assert start == 0 or marker.lower() in decode(tokenizer, token_ids[start:stop]).lower()
    assert marker.lower() not in decode(tokenizer, token_ids[start + 1 : stop]).lower()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_may_hold_the_whole_marker(kind):
    tokenizer = BUILDERS[kind]()
    tokenizer.add_tokens([AddedToken("=the final answer is", normalized=False)])
    generation = (*encode(tokenizer, "7"), tokenizer.convert_tokens_to_ids("=the final answer is"))
    splicer = Splicer(tokenizer, AnswerConfig())
    assert splicer.marker_end(generation) == MarkerEnd(len(generation), aligned=True)
    assert splicer.marker_span(generation) == (len(generation) - 1, len(generation))


def test_a_second_marker_belongs_to_the_own_answer():
    tokenizer = small_tokenizer("byte_level")
    first = encode(tokenizer, "So THE Final answer iS")
    generation = first + encode(tokenizer, " 7 or the final answer is 8")
    splicer = Splicer(tokenizer, AnswerConfig())
    (spliced,) = splicer.splice_reference([prompt_of(tokenizer)], [rollout_of(generation)])
    assert spliced.valid and spliced.chain_length == len(first)
    assert splicer.own_answer_text(rollout_of(generation)) == "7 or the final answer is 8"


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_answer_keeps_every_sampled_token_and_log_prob(kind):
    tokenizer = small_tokenizer(kind)
    chain, own = encode(tokenizer, "2 + 3\nthe final answer is"), (*encode(tokenizer, " 17."), tokenizer.eos_token_id)
    prompt, rollout = prompt_of(tokenizer), rollout_of(chain + own)
    splicer = Splicer(tokenizer, AnswerConfig())
    (spliced,) = splicer.splice_own([prompt], [rollout])
    assert spliced.token_ids == prompt.token_ids + chain + own
    assert (spliced.valid, spliced.own_answer, spliced.ends) == (True, True, False)
    assert (spliced.chain_length, spliced.answer_length) == (len(chain), len(own))
    assert spliced.generation_logprobs == rollout.generation_logprobs
    assert splicer.own_answer_text(rollout) == "17."


def test_a_generation_without_marker_is_scored_whole_and_has_no_own_answer():
    tokenizer = small_tokenizer("byte_level")
    prompt, rollout = prompt_of(tokenizer), rollout_of(encode(tokenizer, "the final answer i"), "length")
    splicer = Splicer(tokenizer, AnswerConfig())
    for (spliced,) in (splicer.splice_reference([prompt], [rollout]), splicer.splice_own([prompt], [rollout])):
        assert (spliced.valid, spliced.has_marker, spliced.failed) == (False, False, False)
        assert spliced.token_ids == prompt.token_ids + rollout.token_ids
        assert (spliced.chain_length, spliced.answer_length) == (len(rollout.token_ids), 0)
        assert spliced.generation_logprobs == rollout.generation_logprobs
    assert splicer.own_answer_text(rollout) is None


def test_a_failed_rollout_is_its_prompt_alone_whatever_it_holds():
    tokenizer = small_tokenizer("byte_level")
    prompt, rollout = prompt_of(tokenizer), rollout_of(encode(tokenizer, "the final answer is 4"), "failed")
    splicer = Splicer(tokenizer, AnswerConfig())
    for (spliced,) in (splicer.splice_reference([prompt], [rollout]), splicer.splice_own([prompt], [rollout])):
        assert (spliced.failed, spliced.valid, spliced.has_marker, spliced.misaligned) == (True, False, False, False)
        assert not spliced.ends
        assert spliced.token_ids == prompt.token_ids
        assert (spliced.chain_length, spliced.answer_length, spliced.generation_logprobs) == (0, 0, ())


def test_every_rollout_gets_the_answer_of_its_own_prompt():
    tokenizer = small_tokenizer("byte_level")
    prompts = [prompt_of(tokenizer, "one", "1"), prompt_of(tokenizer, "two", "2")]
    chain = encode(tokenizer, "the final answer is")
    spliced = Splicer(tokenizer, AnswerConfig(append_eos=False)).splice_reference(
        prompts, [rollout_of(chain, group=group) for group in (1, 0, 1)]
    )
    assert [decode(tokenizer, s.token_ids) for s in spliced] == [
        "twothe final answer is 2",
        "onethe final answer is 1",
        "twothe final answer is 2",
    ]
    assert [(s.group, s.sample, s.valid, s.ends) for s in spliced] == [
        (1, 2, True, False),
        (0, 2, True, False),
        (1, 2, True, False),
    ]


@pytest.mark.parametrize("num_tokens, valid", [(2, True), (3, False)])
def test_a_chain_of_fewer_tokens_than_min_cot_tokens_before_the_marker_is_not_valid(num_tokens, valid):
    tokenizer = small_tokenizer("byte_level")
    thought, marker, own = (encode(tokenizer, text) for text in ("So is", " the final answer is", " 4"))
    assert len(thought) == 2
    prompt, rollout = prompt_of(tokenizer), rollout_of(thought + marker + own)
    splicer = Splicer(tokenizer, AnswerConfig(min_cot_tokens=num_tokens))
    for (spliced,) in (splicer.splice_reference([prompt], [rollout]), splicer.splice_own([prompt], [rollout])):
        assert (spliced.valid, spliced.has_marker, spliced.misaligned) == (valid, True, False)
        assert spliced.chain_length == len(thought + marker) + (0 if valid else len(own))


@pytest.mark.parametrize("kind", KINDS)
@given(chain=st.none() | TEXT.filter(str.strip), answer=ANSWER)
def test_a_supervised_chain_of_thought_reads_as_a_sampled_one_would(kind, chain, answer):
    tokenizer = small_tokenizer(kind)
    prompt = prompt_of(tokenizer, answer=answer, chain_of_thought=chain)
    splicer = Splicer(tokenizer, AnswerConfig())
    (spliced,) = splicer.supervised([prompt], "chain_of_thought")
    cut = spliced.prompt_length + spliced.chain_length
    chain_ids = spliced.token_ids[spliced.prompt_length : cut]
    line = "The final answer is" if chain is None else f"{chain}\nThe final answer is"
    assert decode(tokenizer, chain_ids).removeprefix(" ") == unicodedata.normalize("NFC", line).removeprefix(" ")
    assert splicer.marker_end(chain_ids) == MarkerEnd(len(chain_ids), aligned=True)
    assert spliced.token_ids[cut:] == splicer.answer_ids(answer)
    assert (spliced.valid, spliced.has_marker, spliced.generation_logprobs) == (True, True, ())


def test_a_marked_answer_is_what_a_prompt_without_a_chain_of_thought_gets():
    tokenizer = small_tokenizer("byte_level")
    splicer = Splicer(tokenizer, AnswerConfig())
    prompts = [prompt_of(tokenizer, answer="42", chain_of_thought=chain) for chain in ("6*7=42", None)]
    expected = splicer.supervised(prompts[1:], "chain_of_thought")[0]
    marked = splicer.supervised(prompts, "marked_answer")
    assert [spliced.token_ids for spliced in marked] == [expected.token_ids] * 2


def test_a_supervised_answer_follows_its_prompt_at_once():
    tokenizer = small_tokenizer("byte_level")
    prompts = [prompt_of(tokenizer, "one", "1", "thought"), prompt_of(tokenizer, "two", "2")]
    spliced = Splicer(tokenizer, AnswerConfig()).supervised(prompts, "answer")
    assert [decode(tokenizer, s.token_ids) for s in spliced] == ["one 1<|endoftext|>", "two 2<|endoftext|>"]
    assert [(s.group, s.chain_length) for s in spliced] == [(0, 0), (1, 0)]


def test_an_answer_may_be_written_in_composed_form():
    tokenizer = small_tokenizer("byte_level_nfc")
    ids = Splicer(tokenizer, AnswerConfig(append_eos=False)).answer_ids("e\u0301")
    assert decode(tokenizer, ids) == " \u00e9"


def test_what_the_tokenizer_cannot_write_is_an_error():
    tokenizer = small_tokenizer("metaspace_always")  # no byte tokens
    with pytest.raises(ValueError, match=r"cannot write the answer '\u221a2'"):
        Splicer(tokenizer, AnswerConfig()).answer_ids("\u221a2")
    with pytest.raises(ConfigError, match=r"answer.marker='\u221a'"):
        Splicer(tokenizer, AnswerConfig(marker="\u221a"))


def test_an_end_of_turn_that_does_not_exist_cannot_be_appended():
    tokenizer = BUILDERS["byte_level"]()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="answer.append_eos=True"):
        Splicer(tokenizer, AnswerConfig())
    assert Splicer(tokenizer, AnswerConfig(append_eos=False)).answer_ids("4") == encode(tokenizer, " 4")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_before_the_marker_is_counted_apart_from_it(kind):
    tokenizer = small_tokenizer(kind)
    splicer = Splicer(tokenizer, AnswerConfig(marker=MARKER))
    reasoning, marker = encode(tokenizer, "2 * 3 = 6\n"), encode(tokenizer, MARKER)
    for splice in (splicer.splice_reference, splicer.splice_own):
        (sequence,) = splice([prompt_of(tokenizer)], [rollout_of(reasoning + marker)])
        before = sequence.token_ids[sequence.prompt_length :][: sequence.chain_length - sequence.marker_length]
        assert (before, sequence.marker_length) == (reasoning, len(marker))
        (unmarked,) = splice([prompt_of(tokenizer)], [rollout_of(reasoning)])
        assert unmarked.marker_length == 0
