"""The toy task: its prompts, its right responses, its verdicts and its damaged drafts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import toy


def test_toy_prompts_and_responses_are_as_described():
    tokenizer = toy.tokenizer()
    unknown = tokenizer.encode("zebra")
    train, test = toy.prompts("train"), toy.prompts("test")
    assert (len(train), len(test), len({*train, *test})) == (704, 304, 1008)
    lengths = set()
    for prompt in train + test:
        ids = data.encode_prompts([[{"role": "user", "content": prompt}]], tokenizer)[0]
        assert (len(ids), ids[0]) == (8, tokenizer.bos_id)
        responses = toy.valid_responses(prompt)
        assert len(responses) == 18
        for response in responses:
            ids = tokenizer.encode(response)
            assert tokenizer.decode(ids) == "".join(tokenizer.pieces(ids)) == response
            assert unknown[0] not in ids
            lengths.add(len(ids))
    assert (min(lengths), max(lengths)) == (6, 22)
    problems = {re.sub(r"^\w+", "", prompt) for prompt in test}
    assert problems <= {re.sub(r"^\w+", "", prompt) for prompt in train}, "each is seen with another name"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_toy_tokenizer_writes_any_tokens_so_that_they_are_read_back(draw):
    tokenizer = toy.tokenizer()
    ids = draw.draw(st.lists(st.integers(6, tokenizer.vocab_size - 1)))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    words = toy.words(tokenizer.decode(ids))
    assert words == [toy.VOCABULARY[i - 6] for i in ids]
    assert toy.text(words) == tokenizer.decode(ids)


def test_toy_check_tells_answers_from_whole_responses():
    prompt = "Ann has 3 apples, gets 9:"
    for response, verdict in {
        "3 + 9 = 12. #### 12": (True, True),
        "Start with 3, add 9, get 12. So now Ann has 12 apples. #### 12": (True, True),
        "3 + 9 = 13. #### 12": (True, False),
        "#### 12": (True, False),
        "3 + 9 = 12. #### 1": (False, False),
        "3 + 9 = 12. #### 123": (False, False),
        "3 + 9 = 12. ####": (False, False),
        "So now Ben has 12 apples. #### 12": (True, False),
        "#### 12 #### 13": (False, False),
        "": (False, False),
    }.items():
        assert toy.check(prompt, response) == verdict, response
    assert toy.check("Ann has 9 apples, loses 9:", "That leaves 0. #### 0") == (True, True)
    with pytest.raises(ValueError, match="not a prompt of the toy task"):
        toy.check("What is 3 + 4?", "7")


def test_what_is_wrong_with_a_response_is_said():
    prompt = "Ann has 3 apples, gets 9:"
    for response, wrong in {
        "3 + 9 = 13. #### 12": "'13.' should be '12.'",
        "3 + 9 = 12. #### 1": "'1' should be '12'",
        "3 + 9 = 12. ####": "'12' is missing",
        "So now Ben has 12 apples. #### 12": "'That makes 12.' is missing, 'Ben' should be 'Ann'",
        "That that makes 12.  #### 12": "'that' is too much",
        "That makes 12.  #### 12 ": "",
    }.items():
        assert toy.explain(prompt, response) == wrong


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400), st.sampled_from(toy.SOURCES))
def test_nothing_is_wrong_with_the_valid_responses_alone(seed, kind):
    [record] = toy.records("test", 1, seed, kind)
    prompt, suffix = record["messages"][0]["content"], record.get("suffix", "")
    for response in (record["draft"] or "7 apples", record["response"]):
        assert (toy.explain(prompt, response, suffix) == "") == toy.check(prompt, response, suffix)[1]


def test_toy_records_are_right_seeded_and_held_out():
    train, test, [report] = data.load_records("toy[train:1000]", seed=1)
    assert (len(train), len(test)) == (1000, 304)
    assert report == "toy: 1000 problems to train on, 304 held out"
    prompts = [record["messages"][0]["content"] for record in test]
    assert len(set(prompts)) == 304
    assert not set(prompts) & {record["messages"][0]["content"] for record in train}
    for record in train + test:
        assert toy.check(record["messages"][0]["content"], record["response"]) == (True, True)
        assert record["draft"] is None
    assert train == data.load_records("toy[train:1000]", seed=1)[0] != data.load_records("toy[train:1000]", seed=2)[0]
    assert len({record["response"] for record in train}) > 500


def test_toy_drafts_are_damaged_responses():
    tokenizer = toy.tokenizer()
    records = data.load_records("toy-repair[train:500,test:0]")[0]
    [unknown] = tokenizer.encode("zebra")
    broken = 0
    for record in records:
        prompt = record["messages"][0]["content"]
        assert toy.check(prompt, record["response"]) == (True, True)
        broken += toy.check(prompt, record["draft"]) != (True, True)
        assert unknown not in tokenizer.encode(record["draft"])
    assert broken > 480
    assert all(e.draft for e in data.encode(records, tokenizer, max_length=64).examples)
