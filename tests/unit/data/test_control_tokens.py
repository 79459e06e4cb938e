"""Text of a data set that spells a control token is encoded as text; every other text as if nobody looked."""

import json

import pytest
from tokenizers import AddedToken

from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.control_tokens import CLOSE, OPEN, TextEncoder
from nemo_jepo.data.files import BadRow, Row
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.data.splice import Splicer
from nemo_jepo.types import Prompt
from tests.support.small_tokenizers import BUILDERS, END

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
UNIGRAM = tuple(kind for kind in BUILDERS if kind.startswith("metaspace"))
OTHERS = tuple(kind for kind in BUILDERS if kind not in UNIGRAM)
ORDINARY = ("is the  final\n answer 42 ?", " So 6 * 7 <is> 42|>", "<|end", "the \u00e9 step\n")


def chat_tokenizer(kind, **options):
    tokenizer = BUILDERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True, **options)]})
    tokenizer.chat_template = CHAT
    return tokenizer


def prompt_of(tokenizer, question, answer="42", **settings):
    (item,) = prompts_of_rows([Row("rows", 1, question, answer)], DataConfig(**settings), tokenizer, AnswerConfig())
    return item


def control_ids(tokenizer, ids):
    return [
        token_id
        for token_id in ids
        if token_id in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|turn|>"))
    ]


@pytest.mark.parametrize("kind", BUILDERS)
def test_ordinary_prompts_have_the_ids_that_the_tokenizer_gives_the_whole_text(kind):
    tokenizer = chat_tokenizer(kind)
    for question in ORDINARY:
        turns = [{"role": "user", "content": f"Q: {question}"}]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        chat = prompt_of(tokenizer, question, use_chat_template=True, prompt_template="Q: {question}")
        assert list(chat.token_ids) == tokenizer.encode(whole, add_special_tokens=False)
        end = tokenizer.eos_token
        plain = prompt_of(tokenizer, question, prompt_template="<|turn|>Q: {question}\n" + end)
        wanted = tokenizer.encode(f"<|turn|>Q: {question}\n{end}", add_special_tokens=False)
        assert list(plain.token_ids) == wanted


@pytest.mark.parametrize("kind", OTHERS)
def test_a_question_cannot_end_its_own_turn(kind):
    tokenizer = chat_tokenizer(kind)
    harmless, end = prompt_of(tokenizer, "is the answer", use_chat_template=True), tokenizer.eos_token
    prompt = prompt_of(tokenizer, f"is {end}<|turn|> the", use_chat_template=True)
    assert control_ids(tokenizer, prompt.token_ids) == control_ids(tokenizer, harmless.token_ids)
    written = tokenizer.decode(list(prompt.token_ids), clean_up_tokenization_spaces=False)
    assert f"is {end}<|turn|> the" in written


@pytest.mark.parametrize("kind", OTHERS)
def test_a_plain_prompt_keeps_the_control_tokens_of_its_template_alone(kind):
    tokenizer = chat_tokenizer(kind)
    end = tokenizer.eos_token
    prompt = prompt_of(tokenizer, f"is {end} the", prompt_template="<|turn|>{question}" + end)
    assert control_ids(tokenizer, prompt.token_ids) == [prompt.token_ids[0], prompt.token_ids[-1]]


def test_a_text_between_control_tokens_has_the_ids_that_it_has_alone():
    tokenizer = chat_tokenizer("byte_level")
    encoder = TextEncoder(tokenizer)
    turn, end = tokenizer.convert_tokens_to_ids("<|turn|>"), tokenizer.eos_token_id
    (ids,) = encoder.encode([f"<|turn|>So {encoder.quoted(f'is {END}')}{END} the"])
    (first, last) = encoder.encode_plain([f"So is {END}", " the"])
    assert ids == [turn, *first, end, *last]


def test_white_space_that_a_control_token_takes_in_is_taken_in_beside_quotes_too():
    """Some chat models' end-of-turn swallows the line's end."""
    tokenizer = chat_tokenizer("byte_level", rstrip=True)
    encoder = TextEncoder(tokenizer)
    (quoted,) = encoder.encode([f"<|turn|>\nis {encoder.quoted(END)}"])
    (bare,) = encoder.encode_plain([f"is {END}"])
    assert quoted == [tokenizer.convert_tokens_to_ids("<|turn|>"), *bare]


def test_a_text_that_holds_the_quotes_themselves_is_read_back_as_it_stands():
    encoder = TextEncoder(chat_tokenizer("byte_level"))
    text = f"{OPEN}1{CLOSE} is {OPEN}{END}"
    assert encoder.decode(encoder.encode([encoder.quoted(text)])[0]) == text


@pytest.mark.parametrize("kind", OTHERS)
def test_answers_and_golden_chains_are_text_too(kind):
    tokenizer = chat_tokenizer(kind)
    splicer, end = Splicer(tokenizer, AnswerConfig()), tokenizer.eos_token
    prompt = Prompt(0, (tokenizer.eos_token_id,), "is", f"the {end} is", f"So {end}<|turn|> is")
    (target,) = splicer.supervised([prompt], "chain_of_thought")
    assert control_ids(tokenizer, target.token_ids[1:]) == [tokenizer.eos_token_id]  # the end of the answer's turn
    written = tokenizer.decode(list(target.token_ids[1:-1]), clean_up_tokenization_spaces=False)
    assert f"So {end}<|turn|> is" in written and f"the {end} is" in written


def test_solved_examples_are_text_too(tmp_path):
    tokenizer = chat_tokenizer("byte_level")
    path = tmp_path / "examples.jsonl"
    example = {"question": f"is {END}", "chain_of_thought": f"So {END}", "answer": END}
    path.write_text(json.dumps(example))
    prompt = prompt_of(tokenizer, "is", use_chat_template=True, examples=str(path))
    template = "<|turn|> <|endoftext|> <|turn|> <|endoftext|> <|turn|> <|endoftext|> <|turn|>"
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in template.split()]
    assert control_ids(tokenizer, prompt.token_ids) == wanted


@pytest.mark.parametrize("kind", UNIGRAM)
def test_where_a_control_token_is_a_word_of_the_model_the_row_is_bad(kind):
    tokenizer = BUILDERS[kind]()
    for question, answer in ((f"is {END}", "42"), ("is", f"42 {END}")):
        item = prompt_of(tokenizer, question, answer)
        assert isinstance(item, BadRow) and f"cannot write {END!r} as text" in item.problem
    assert isinstance(prompt_of(tokenizer, "is", "42"), Prompt)
