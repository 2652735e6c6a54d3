"""Command ``chat``: what each line is answered with, commands, interrupts, a full context, and errors as messages."""

from __future__ import annotations

import copy
import io
import signal
import sys

import pytest

import tiny
from prefixfast import Engine, GenerationParams, Prefix, PrefixStore, generate, load
from prefixfast.cli.chat_session import ChatSession
from prefixfast.cli.prefix_choice import PrefixChoice
from prefixfast.data import TASKS, column_task
from prefixfast.errors import ConfigError
from terminal import at_terminal

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
FAST = ("--dtype", "float32", "--max-num-seqs", 2)
NEW = {"max_new_tokens": 6, "dtype": "float32"}
SIX = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tokenizer):
    """Folder of a tiny GPT-2 whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("bases") / "chatty"
    tiny.make("gpt2").save_pretrained(path)
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    own.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prefixes(folder, make_prefix, tmp_path_factory):
    """Folders of two prefixes of the tiny GPT-2, by name."""
    root = tmp_path_factory.mktemp("prefixes")
    with load(folder, dtype="float32") as base:
        fingerprint = base.fingerprint
    for seed, name in enumerate(("ann", "bob")):
        make_prefix(seed, base=fingerprint).save_pretrained(root / name)
    return {name: root / name for name in ("ann", "bob")}


@pytest.fixture
def chat(cli, monkeypatch):
    """Function from lines of a pipe and arguments to the result of the command."""

    def run(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", *FAST, *arguments)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes that run in the background
    yield run
    signal.signal(signal.SIGINT, before)


def printed(texts) -> str:
    """Standard output of answers."""
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts)


def answers(prompts, own, model, **more) -> list[str]:
    return [str(g) for g in generate(prompts, own, model=str(model), **NEW, **more)]


def dialogue(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


# ---- what a line is answered with ----


def test_every_line_of_a_pipe_is_a_prompt_and_commands_switch_the_prefix(chat, folder, prefixes):
    lines = ["ab", "/prefix bob", "ab", "", "/prefix none", "ab", "/prefix ann bob", "ab", "//x", "/quit", "ab"]
    done = chat(lines, *SIX, "--prefix", prefixes["ann"], "--prefix", prefixes["bob"])
    ann, bob = map(Prefix.from_pretrained, prefixes.values())
    expected = answers(["ab", "ab", "ab", "ab", "/x"], [ann, bob, None, [ann, bob], [ann, bob]], folder)
    assert (done.code, done.out) == (0, printed(expected))
    assert len(set(expected[:4])) > 2
    assert "has no chat template" in done.err


def test_names_of_a_store_are_prefixes_and_a_new_version_answers_the_next_line(folder, prefixes, tmp_path, base):
    store = PrefixStore(tmp_path / "store")
    ann, bob = map(Prefix.from_pretrained, prefixes.values())
    store.put("mill", ann)
    told = []
    with Engine(base, max_num_seqs=2) as engine:
        params = GenerationParams(max_new_tokens=6)
        session = ChatSession(engine, PrefixChoice(["mill"], store.path), params, None, told.append)
        session.use(["mill"])
        first = "".join(session.answer("ab"))
        store.put("mill", bob)
        assert [first, "".join(session.answer("ab"))] == answers(["ab", "ab"], [ann, bob], folder)


def test_a_chat_template_keeps_the_conversation(chat, chat_folder):
    done = chat(["hi", "more", "/reset", "more"], *SIX, "--model", chat_folder)
    (first,) = answers([dialogue("hi")], None, chat_folder)
    second, anew = answers([dialogue("hi", first, "more"), dialogue("more")], None, chat_folder)
    assert (done.code, done.out) == (0, printed([first, second, anew]))
    assert "chat template writes the conversation" in done.err


def test_a_prefix_is_asked_as_it_was_trained(chat, chat_folder, make_prefix, tmp_path):
    """Only a prefix of messages, or without a task, is asked through the chat template."""
    tasks = {"plain": TASKS["prompt"], "said": TASKS["messages"], "sum": TASKS["summary"], "table": TASKS["table"]}
    tasks |= {
        "one": column_task(prompt="say {word}:", target="reply"),
        "two": column_task(prompt="{word}, {n}:", target="reply"),
    }
    rows = {
        "plain": ("ab", {"prompt": "ab"}),
        "said": ("ab", dialogue("ab")),
        "sum": ("ab", {"document": "ab"}),
        "table": ('{"a": "b"}', {"table": {"a": "b"}}),
        "one": ("ab", {"word": "ab"}),
        "two": ('{"Word": "ab", "n": 7}', {"word": "ab", "n": 7}),
        "peft": ("ab", dialogue("ab")),
    }
    for name, (line, row) in rows.items():
        task = tasks[name].spec() if name in tasks else None
        prefix = make_prefix(3, task=task)
        prefix.save_pretrained(tmp_path / name)
        how = (*SIX, "--model", chat_folder, "--prefix", tmp_path / name)
        assert chat([line], *how).out == printed(answers([row], prefix, chat_folder)), name
    wrong = chat(["ab", "[1]", '{"word": "ab"}'], "--model", chat_folder, "--prefix", tmp_path / "two")
    assert (wrong.code, wrong.out) == (3, "")
    assert wrong.err.count('such as {"word": "...", "n": "..."}') == 4  # the greeting and each line
    for flag, row in (("--no-conversation", {"prompt": "ab"}), ("--conversation", dialogue("ab"))):
        for name in ("plain", "said", "peft"):
            prefix = Prefix.from_pretrained(tmp_path / name)
            how = (*SIX, "--model", chat_folder, "--prefix", tmp_path / name, flag)
            assert chat(["ab"], *how).out == printed(answers([row], prefix, chat_folder)), (name, flag)


# ---- settings ----


def test_a_temperature_samples_and_settings_can_be_restored(chat, folder):
    lines = ["/set temperature 0.7", "/set seed 5", "ab", "/set seed none", "/set temperature=none", "ab", "/set"]
    done = chat(lines, *SIX, "--model", folder)
    sampled = answers(["ab"], None, folder, do_sample=True, temperature=0.7, seed=5)
    assert done.out == printed([*sampled, *answers(["ab"], None, folder)])
    flagged = chat(["ab"], *SIX, "--model", folder, "--temperature", "0.7", "--seed", "5")
    assert flagged.out == printed(sampled)


def test_the_beams_of_a_prefix_are_not_used_and_that_is_said(chat, folder, make_prefix, tmp_path):
    prefix = make_prefix(1, decoding={"num_beams": 3, "num_return_sequences": 2})
    prefix.save_pretrained(tmp_path / "p")
    done = chat(["ab"], *SIX, "--model", folder, "--prefix", tmp_path / "p")
    assert done.out == printed(answers(["ab"], prefix, folder, num_beams=1, num_return_sequences=1))
    assert "num_beams=3" in done.err


# ---- a full context ----


def test_the_oldest_texts_are_dropped_and_that_is_said(chat, chat_folder):
    """A message takes 9 tokens and its text; the context has 160 tokens, of which an answer asks for 6."""
    texts = ["a" * 40, "b" * 40, "c" * 40, "d" * 40]
    done = chat(texts, *SIX, "--model", chat_folder)
    said: list[str] = []
    with load(chat_folder, dtype="float32") as base:
        encode = base.require_tokenizer().encode
        turns: list[str] = []
        for text in texts:
            while len(encode([written(*turns, text)])[0]) + 6 > 160:
                turns = turns[2:]
            said += [str(generate([dialogue(*turns, text)], model=base, max_new_tokens=6)[0])]
            turns += [text, said[-1]]
    assert done.out == printed(said)
    assert len(turns) < 8
    assert "'aaaa" in done.err
    assert done.err.count("are dropped") >= 1


def written(*contents: str) -> str:
    return "".join(f"<s>{m['role']}: {m['content']}</s>" for m in dialogue(*contents)["messages"]) + "<s>"


def test_a_text_longer_than_the_context_is_a_message_and_leaves_the_conversation_as_it_was(chat, chat_folder):
    done = chat(["hi", "x" * 500, "more"], *SIX, "--model", chat_folder)
    (first,) = answers([dialogue("hi")], None, chat_folder)
    assert done.out == printed([first, *answers([dialogue("hi", first, "more")], None, chat_folder)])
    assert done.code == 3
    assert "exceed the limit of 160" in done.err
    assert "Traceback" not in done.err


def test_an_answer_that_fills_the_context_says_so(chat, folder):
    done = chat(["x" * 150], "--model", folder, "--min-new-tokens", 50)
    assert "the context's 160 tokens" in done.err
    assert "the context's" not in chat(["x" * 20], *SIX, "--model", folder).err


# ---- interrupts ----


def test_an_interrupt_stops_the_answer_and_not_the_program(chat, folder, monkeypatch):
    """The signal comes when the third piece of the second answer is printed."""
    pieces = []
    real = ChatSession.answer

    def answer(self, text):
        for i, piece in enumerate(real(self, text)):
            if text == "stop":
                pieces.append(piece)
                if i == 3:
                    signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(ChatSession, "answer", answer)
    long = ("--max-new-tokens", 100, "--min-new-tokens", 100)
    done = chat(["ab", "stop", "ab"], "--model", folder, *long)
    assert done.code == 0
    (whole,) = generate(["ab"], model=str(folder), max_new_tokens=100, min_new_tokens=100, dtype="float32")
    # Python handles the signal before the fourth piece is printed or just after.
    assert done.out in [printed([str(whole), "".join(begun), str(whole)]) for begun in (pieces[:-1], pieces)]
    assert "stopped" in done.err


def test_what_an_interrupt_leaves_of_an_answer_joins_the_conversation(chat_folder):
    told = []
    with Engine(str(chat_folder), max_num_seqs=2, dtype="float32") as engine:
        params = GenerationParams(max_new_tokens=80, min_new_tokens=80)
        session = ChatSession(engine, PrefixChoice([], None), params, None, told.append)
        pieces = session.answer("hi")
        begun = next(pieces) + next(pieces)
        pieces.close()
        assert session.messages == dialogue("hi", begun)["messages"]
        pieces = session.answer("more")
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)
        assert session.messages == dialogue("hi", begun)["messages"]


@pytest.mark.long
def test_a_terminal_shows_a_prompt_ctrl_c_empties_the_line_or_stops_the_answer_and_ctrl_d_ends(folder, tmp_path):
    base = tmp_path / "long"
    shape = tiny.GROUPED | {"max_position_embeddings": 10**6}
    tiny.randomize(lambda: tiny.LlamaForCausalLM(tiny.LlamaConfig(**shape))).save_pretrained(base)
    with load(folder) as small:
        small.require_tokenizer().hf.save_pretrained(base)
    steps = [
        ("> ", "/set"),
        ("/set", "\x03"),
        ("> ", "ab\r"),
        (r"ab\r\n.", "\x03"),  # a piece of the answer is there
        ("> ", "/prefixes\r"),
        ("> ", "\x04"),
    ]
    endless = ("--max-model-len", 900_000, "--max-new-tokens", 800_000, "--min-new-tokens", 800_000)
    code, shown = at_terminal(["chat", "--model", base, *FAST, *endless], steps)
    assert code == 0, shown
    assert "Ctrl-D or /quit ends" in shown
    assert "stopped" in shown
    assert "no prefix was given" in shown
    assert "Traceback" not in shown


# ---- errors ----

WRONG = {
    "no base": ((), "model: expected a base"),
    "beams": (("--model", "x", "--num-beams", 3), "num_beams: expected 1"),
    "several texts": (("--model", "x", "--num-return-sequences", 2), "num_return_sequences: expected 1"),
    "no sampling": (("--model", "x", "--no-do-sample", "--top-p", 0.5), "top_p has no effect with do_sample=false"),
    "no folder": (("--model", "x", "--prefix", "none"), "none: no such folder"),
    "no store": (("--model", "x", "--store", "none", "--prefix", "a"), "store: expected"),
    "wrong range": (("--model", "x", "--max-num-seqs", 0), "EngineConfig.max_num_seqs"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_one_message_before_the_base_is_loaded(cli, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("chat", *arguments)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_wrong_lines_are_messages_and_the_next_line_is_answered(chat, folder, prefixes):
    wrong = {
        "/prefx ann": "did you mean '/prefix'",
        "/prefix": "expected a name",
        "/prefix an": "did you mean 'ann'",
        "/prefix 'ann": "expected names",
        "/set tempo 3": "unknown option 'tempo'",
        "/set temperature hot": "temperature: expected float",
        "/set temperature": "expected an option and a value",
        "/set num_beams 2": "num_beams: expected 1",
        "/set max_num_seqs 2": "option of EngineConfig",
        "/set top_p [[[": "expected a value as in YAML",
        "\udcff": "expected Unicode text",
    }
    done = chat([*wrong, "ab"], *SIX, "--model", folder, "--prefix", prefixes["ann"])
    assert done.code == 3
    assert done.out == printed(answers(["ab"], Prefix.from_pretrained(prefixes["ann"]), folder))
    for message in wrong.values():
        assert message in done.err
    assert "Traceback" not in done.err


def test_a_prefix_of_another_base_is_refused_and_the_one_in_use_stays(chat, folder, prefixes, make_prefix, tmp_path):
    make_prefix(2, layers=2).save_pretrained(tmp_path / "other")
    done = chat([f"/prefix {tmp_path / 'other'}", "ab"], *SIX, "--model", folder, "--prefix", prefixes["ann"])
    assert done.out == printed(answers(["ab"], Prefix.from_pretrained(prefixes["ann"]), folder))
    assert done.code == 3


def test_a_pipe_gets_the_answers_alone_and_bytes_that_are_no_text_are_one_wrong_line(cli, folder, monkeypatch):
    given = b"ab\n/help\n\xff\xfe\n/prefixes\ncd"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf8"))
    done = cli("chat", "--model", folder, *FAST, *SIX)
    assert done.code == 3
    assert done.out == printed(answers(["ab", "cd"], None, folder))
    assert "/reset" in done.err


def test_the_refused_options_are_those_that_a_stream_refuses(base):
    """The table in the command names every option with which an engine makes no single stream."""
    with Engine(base, max_num_seqs=4) as engine:
        for fields in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(ValueError, match="stream: expected one text"):
                engine.stream("ab", **fields)


def test_a_choice_reads_folders_once_and_names_them_by_their_last_part(prefixes):
    choice = PrefixChoice(list(map(str, prefixes.values())), None)
    assert choice.find("ann") is choice.find(str(prefixes["ann"]))
    assert choice.names() == list(map(str, prefixes.values()))
    with pytest.raises(ConfigError, match="model: expected a base model"):
        PrefixChoice([], None).base(None)
    with pytest.raises(KeyError, match="ann"):
        choice.find("anm")
