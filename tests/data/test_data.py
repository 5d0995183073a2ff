"""From text to batches: labels cover only the target, and long prompts are shortened as the task allows."""

from types import SimpleNamespace

import pytest
import tokenizers
from helpers.tiny import composed, tiny
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerFast

from tiedlora.config.identity import identity
from tiedlora.data import encoding
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoder, encode_rows
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.scoring.split import PROTOCOL_KEYS
from tiedlora.tasks import Example, load_task
from tiedlora.tasks.rows import DataRow
from tiedlora.tasks.squad import Squad

PASSAGE = " ".join(f"word{i}" for i in range(200))
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder(*overrides: str, context: int = 512, template: str | None = None) -> Encoder:
    tokenizer = tiny("tiny_llama").tokenizer
    tokenizer.chat_template = template
    return Encoder(tokenizer, composed(["task=squad", "task.max_new_tokens=20", *overrides]).task, context)


def test_the_end_of_a_turn_that_is_not_trained_is_known():
    coder = encoder("task.chat_template=true", template=CHAT)
    assert coder.other_turn_end() is None, "it is no token here"
    coder.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert coder.other_turn_end() == "<|im_end|>"
    coder.tokenizer.eos_token = "<|im_end|>"
    assert coder.other_turn_end() is None
    assert encoder().other_turn_end() is None
    for_prompts = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}" + CHAT
    assert encoder("task.chat_template=true", template=for_prompts).other_turn_end() is None


def test_the_rules_of_a_folders_tokenizer_are_known_by_their_content(tmp_path):
    found = []
    for number, end in enumerate(("<|end|>", "a", "a")):
        tiny("tiny_llama").tokenizer.save_pretrained(tmp_path / str(number))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / str(number), eos_token=end)
        found.append(Encoder(tokenizer, encoder().config, 512).versions["tokenizer"])
    assert found[0] != found[1] == found[2]
    assert "tokenizer" not in encoder().versions, "its model is in no folder"


def squad_example(context: str, answer: str, task: Squad, question: str = "Which one?") -> Example:
    row = {"context": context, "question": question, "answers": {"text": [answer], "answer_start": [0]}}
    return task.example(DataRow("here", row), "0")


def test_labels_cover_the_target_and_the_end_of_text_alone():
    coder = encoder()
    examples = [Example("a", "Ask:", " yes"), Example("b", "A longer question:", " no, not\n")]
    end = coder.tokenizer.eos_token_id
    batch = collate([coder.example(example) for example in examples], end)
    flat = batch.input_ids.flatten()
    # A byte is a token here, so positions can be counted by hand.
    targets = [example.target.encode() for example in examples]
    assert batch.targets.tolist() == [t for text in targets for t in [*coder.continuation(text.decode()), end]]
    assert flat[batch.positions + 1].tolist() == batch.targets.tolist()
    for number, example in enumerate(examples):
        first = number * batch.input_ids.shape[1] + len(example.prompt.encode()) - 1
        assert first in batch.positions.tolist()
        assert first - 1 not in batch.positions.tolist()


def test_a_long_context_loses_its_end_at_a_word_and_never_the_question():
    coder, task = encoder(), Squad(encoder().config)
    short = coder.shortened(squad_example(PASSAGE, "word1", task))
    assert short is not None
    context, question = short.prompt.removeprefix("Passage: ").split("\n", 1)
    assert question == "Question: Which one?\nAnswer:"
    assert PASSAGE.startswith(context + " ")
    # It is as long as possible: the next word does not fit, and no part of a word is kept.
    assert 492 - len(" word66") < len(coder.prompt(short.prompt)) <= 492
    assert coder.shortened(short) is short


def test_rows_that_do_not_fit_are_counted_and_a_lost_answer_is_not_trained_on():
    coder, task = encoder("task.max_target_tokens=30"), Squad(encoder().config)
    examples = [
        squad_example("word1 is short", "word1", task),
        squad_example(PASSAGE, "word1", task),
        squad_example(PASSAGE, "word199", task),
        squad_example("x " * 40, "x " * 20, task),
        Example("4", PASSAGE, " no part may be cut"),
        # Nothing was cut, so the answer was not lost: a question without its passage.
        Example("5", "Which one?", " word1", must_hold="word1"),
    ]
    kept, encoded, counts = encode_rows(coder, examples)
    assert kept == [0, 1, 5]
    assert len(encoded) == 3
    assert counts == {"rows": 6, "shortened": 1, "dropped_prompt": 1, "dropped_target": 1, "dropped_answer": 1}


def test_a_prompt_of_which_nothing_would_be_left_is_not_shortened():
    coder = encoder("task.max_prompt_tokens=40")
    long_question = Example("0", "short context " + PASSAGE, " x", cuttable=(0, len("short context")))
    assert coder.shortened(long_question) is None
    assert coder.shortened(Example("0", "o" * 100 + "?", " x", cuttable=(0, 100))) is None


def test_a_question_that_cannot_fit_is_not_tokenised_again_and_again(monkeypatch):
    """The search for the part of the passage that fits once took the tokens of the whole question a dozen times."""
    coder, tokenised = encoder(), []
    take, question = coder.text, "w " * 5_000
    monkeypatch.setattr(coder, "text", lambda text: tokenised.append(len(text)) or take(text))
    rows = [squad_example(PASSAGE, "word1", Squad(coder.config), question=text) for text in ("Which?", question)]
    assert encode_rows(coder, rows).kept == [0]
    assert sum(length > len(question) for length in tokenised) == 2


def test_with_a_chat_template_the_assistants_turn_is_the_target():
    coder = encoder("task=iwslt2017", "task.chat_template=true", template=CHAT)
    tokenizer = coder.tokenizer
    encoded = coder.example(Example("0", "German: Danke.\nEnglish:", " Thanks."))
    turns = "<|im_start|>user\nGerman: Danke.\nEnglish:<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.prompt) == turns
    # The assistant's turn starts without a blank, and ends with the end-of-text token.
    assert encoded.target == (*tokenizer("Thanks.").input_ids, tokenizer.eos_token_id)
    assert encoder().continuation(" Thanks.") == tuple(tokenizer(" Thanks.").input_ids)
    assert encoder(f"task.stop=['{tokenizer.eos_token}', 'x']").more_ends == (tokenizer.eos_token_id,)
    dated = encoder("task.chat_template=true", template="{{ strftime_now('%d %b %Y') }}" + CHAT)
    assert tokenizer.decode(dated.prompt("a")).startswith("26 Jul 2024<|im_start|>user"), "the same on every day"


THINKS = CHAT.replace(
    "assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}<no>{% endif %}{% endif %}"
)
OFF = "task.template_options={enable_thinking: false}"


def test_options_reach_the_chat_template_and_the_identity():
    usual, off = (encoder("task.chat_template=true", *more, template=THINKS) for more in ([], [OFF]))
    ends = [coder.tokenizer.decode(coder.prompt("a")).rpartition("assistant\n")[2] for coder in (usual, off)]
    assert ends == ["", "<no>"]
    assert [usual.may_think(), off.may_think()] == [True, False]
    assert not encoder("task.chat_template=true", template=CHAT).may_think()
    assert not encoder(template=THINKS).may_think()
    assert "template_options" not in identity(usual.config)
    assert identity(off.config)["template_options"] == {"enable_thinking": False}
    assert {"template_options"} <= PROTOCOL_KEYS


def test_options_of_messages_reach_the_chat_template():
    words = ("task=rows", "task.messages=m", "task.metrics=[exact_match]")
    coder = encoder(*words, OFF, template=THINKS)
    assert coder.tokenizer.decode(coder.prompt('[{"role": "user", "content": "a"}]')).endswith("assistant\n<no>")


def test_options_that_change_nothing_are_refused():
    with pytest.raises(UserError, match=r"template_options\.enable_thinking: this model's chat template has no such"):
        encoder("task.chat_template=true", OFF, template=CHAT)
    for words, says in (
        ([OFF], r"options\.enable_thinking: changes nothing without a chat template; add task\.chat_template=true"),
        (
            ["task.chat_template=true", "task.template_options={tokenize: true}"],
            r"options\.tokenize: is set by the program",
        ),
    ):
        with pytest.raises(UserError, match=says):
            load_task(composed(["task=squad", *words]).task).check_options()


def test_a_row_that_the_chat_template_refuses_is_named():
    refuses = "{{ raise_exception('roles must alternate') }}"
    rows = [Example("a", '[{"role": "user", "content": "x"}]', "y")]
    coder = encoder("task=rows", "task.messages=m", "task.metrics=[exact_match]", template=refuses)
    for use in (lambda: encode_rows(coder, rows), lambda: coder.scored(rows[0])):
        with pytest.raises(UserError, match=r"roles must alternate.*change or remove the row.*\(row a\)$"):
            use()


def test_a_target_that_holds_an_end_of_an_answer_is_refused():
    coder = encoder("task.stop=['<|im_end|>']")
    end = coder.tokenizer.eos_token
    with pytest.raises(UserError, match=r"the target of row a holds '.+', which is a token that ends an answer"):
        encode_rows(coder, [Example("a", "x", f" yes {end} no")])
    coder.tokenizer = SimpleNamespace(eos_token_id=0, decode=str)
    coder.continuation, coder.prompt = lambda _text: (5, 0, 6), lambda _text: (1,)
    with pytest.raises(UserError, match="the target of row a holds '0'"):
        coder.example(Example("a", "x", "y"))
    coder = encoder("task.stop=['<|im_end|>']")
    # A template may write the end of its turn.
    assert encode_rows(coder, [Example("a", "x", f" yes{end}")]).encoded[0].target[-2:] == (
        coder.tokenizer.eos_token_id,
        coder.tokenizer.eos_token_id,
    )


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match=r"row a gives an empty prompt"):
        encoder().example(Example("a", "", " yes"))


def test_tokens_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MIN_ROWS", 3)
    usual = encoder()
    examples = [squad_example(f"{i} word1 " + PASSAGE * (i == 2), "word1", Squad(usual.config)) for i in range(4)]
    expected = encode_rows(usual, examples)

    def load_or_encode(digest="rows", weights="sha256:1", coder=usual, known=True):
        base = BaseModelRecord("a", "main", weights) if known else None
        return encoding.load_or_encode(coder, examples, digest, base, tmp_path)

    assert load_or_encode(known=False) == expected
    assert not (tmp_path / "tokens").exists(), "kept although nothing says which tokenizer it was"
    assert load_or_encode() == expected
    (file,) = (tmp_path / "tokens").iterdir()
    monkeypatch.setattr(encoding, "encode_rows", lambda *_: pytest.fail("encoded again"))
    assert load_or_encode() == expected
    # Other rows, another tokenizer or other settings have other tokens, and so has another chat template, although the
    # model's digest is the same. A damaged file is not used.
    chats = [encoder("task.chat_template=true", template=template) for template in (CHAT, f"{CHAT} ")]
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_rows", encode_rows)
        load_or_encode(coder=chats[0])
    load_or_encode(coder=chats[0])
    others = ({"digest": "x"}, {"weights": "2"}, {"coder": encoder("task.max_target_tokens=9")}, {"known": False})
    for other in (*others, {"coder": chats[1]}, {"coder": encoder(context=400)}):
        with pytest.raises(pytest.fail.Exception, match="again"):
            load_or_encode(**other)
    data = file.read_bytes()
    for damaged in (data[:-5], data[:-4] + b"\1\1\1\1", b""):
        file.write_bytes(damaged)
        with pytest.raises(pytest.fail.Exception, match="again"):
            load_or_encode()


@pytest.fixture(params=[True, False], ids=["adds a blank", "adds none"])
def sentencepiece(request):
    """A tokenizer with SentencePiece's marks, as Mistral's file describes it: with a blank before every text."""
    marks = [normalizers.Prepend("\u2581")] if request.param else []
    characters = ["<s>", "</s>", "\u2581", *"Ask:nox\n"]
    pieces = {piece: number for number, piece in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(pieces, []))
    tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"), request.param


def test_a_target_has_one_blank_also_where_the_tokenizer_adds_one(sentencepiece):
    tokenizer, adds_blank = sentencepiece
    coder = Encoder(tokenizer, composed(["task=squad"]).task, 512)
    assert coder.leaves_out_blank is adds_blank
    encoded = coder.example(Example("a", "Ask:", " no"))
    together = tokenizer("Ask: no", add_special_tokens=False).input_ids
    assert [*encoded.prompt, *encoded.target[:-1]] == together
    encoded = coder.example(Example("a", "Ask\n", "no"))
    assert [*encoded.prompt, *encoded.target[:-1]] == tokenizer("Ask\nno", add_special_tokens=False).input_ids
    assert not encoder().leaves_out_blank
