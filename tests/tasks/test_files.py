"""Task files: patchlab's own, EAP-IG's, feature-circuits' and auto-circuit's, and everything that can be wrong with one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from stub_model import Stub, with_gpt2_tokenizer
from torch.nn.functional import one_hot

from patchlab.errors import TaskError
from patchlab.tasks import Task, load_task

GOOD = {
    "clean": "When Mary and John went to the store, John gave a drink to",
    "corrupted": "When Mary and John went to the store, Mary gave a drink to",
    "correct": " Mary",
    "incorrect": " John",
}


@pytest.fixture(scope="module")
def gpt2_bpe(shared_dir) -> Stub:
    return with_gpt2_tokenizer(shared_dir)


def jsonl(folder: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def table(folder: Path, *rows: dict[str, Any], name: str = "mine.csv") -> Path:
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(made: Task, ids: tuple[int, ...]) -> list[str]:
    return [made.token_text(token) for token in ids]


# --- what can be read ---


@pytest.mark.parametrize("write", [jsonl, table])
def test_text_rows(write, tmp_path, gpt2_bpe):
    path = write(tmp_path, GOOD, {**GOOD, "corrupted": GOOD["corrupted"].replace("Mary gave", "Tom gave")})
    made = load_task(path, gpt2_bpe)
    assert (made.name, len(made), made.metric.name) == ("mine", 2, "logit_diff")
    assert made.pairs[0].clean_ids[0] == gpt2_bpe.bos_id
    assert made.tokenizer.decode(made.pairs[0].clean_ids[1:]) == GOOD["clean"]
    assert texts(made, made.pairs[0].correct + made.pairs[0].incorrect) == [" Mary", " John"]
    assert made.position_axis().names is None
    assert made.provenance["file"] == path.name
    assert len(made.provenance["sha256"]) == 64
    assert load_task(str(path), gpt2_bpe, n=1).pairs == made.pairs[:1]
    assert len(load_task(path, gpt2_bpe, bos=False).pairs[0]) == len(made.pairs[0]) - 1


def test_lists_of_answers_and_the_missing_space(tmp_path, gpt2_bpe):
    made = load_task(jsonl(tmp_path, {**GOOD, "correct": ["Mary", " him"], "incorrect": "John"}), gpt2_bpe)
    assert texts(made, made.pairs[0].correct) == [" Mary", " him"]
    assert made.provenance["notes"] == ["answers without a leading space were given one"]
    same = load_task(table(tmp_path, {**GOOD, "correct": '["Mary", " him"]', "incorrect": "John"}), gpt2_bpe)
    assert same.pairs == made.pairs
    # digits go on where digits end, and nothing is put after an opening bracket
    years = {"clean": "from the year 1732 to the year 17", "corrupted": "from the year 1701 to the year 17", "correct": "58", "incorrect": "12"}
    assert texts(*(lambda made: (made, made.pairs[0].correct))(load_task(jsonl(tmp_path, years), gpt2_bpe))) == ["58"]
    call = {"clean": "def load(", "corrupted": "def save(", "correct": "self", "incorrect": "name"}
    assert texts(*(lambda made: (made, made.pairs[0].correct))(load_task(jsonl(tmp_path, call), gpt2_bpe))) == ["self"]


def test_ids_win_over_text_and_are_checked_against_it(tmp_path, gpt2_bpe):
    encode = gpt2_bpe.tokenizer.encode
    ids = {
        "clean_ids": encode(GOOD["clean"]),
        "corrupted_ids": encode(GOOD["corrupted"]),
        "correct_id": encode(" Mary")[0],
        "incorrect_id": encode(" John"),
    }
    made = load_task(jsonl(tmp_path, {**GOOD, **ids}), gpt2_bpe)
    assert made.pairs[0].clean_ids == tuple(ids["clean_ids"])  # no bos was added
    assert made.provenance["bos"] is False
    assert load_task(jsonl(tmp_path, ids), gpt2_bpe).pairs == made.pairs
    assert load_task(table(tmp_path, ids), gpt2_bpe).pairs == made.pairs
    assert load_task(jsonl(tmp_path, ids), Stub(vocab_size=50257)).pairs == made.pairs
    for wrong, message in [
        ({"clean_ids": [token + 1 for token in ids["clean_ids"]]}, "the ids of clean spell .* belong to another tokenizer; remove the id columns"),
        ({"correct_id": 47764}, "the ids of correct answer spell .* and the text says ' Mary'"),
        ({"correct_id": ids["incorrect_id"] * 2}, "correct has 1 texts and 2 ids"),
    ]:
        with pytest.raises(TaskError, match=message):
            load_task(jsonl(tmp_path, {**GOOD, **ids, **wrong}), gpt2_bpe)


def test_positions_template_and_metric_columns(tmp_path, gpt2_bpe):
    rows = [{**GOOD, "positions": {"S2": 10, "LAST": -1}, "template": "when", "metric": "prob_diff"}]
    longer = {key: value.replace("the store", "the big old store") for key, value in GOOD.items()}
    rows.append({**longer, "positions": {"S2": 12, "LAST": -1}, "template": "when", "metric": "prob_diff"})
    made = load_task(jsonl(tmp_path, *rows), gpt2_bpe)
    assert made.metric.name == "prob_diff"
    axis = made.position_axis()
    assert axis.names == ("S2", "LAST", "END")
    assert axis.tokens[1] == (" John", " to", " to")
    assert load_task(table(tmp_path, *({**row, "positions": json.dumps(row["positions"])} for row in rows)), gpt2_bpe).pairs == made.pairs


def test_positions_named_by_words(tmp_path, gpt2_bpe):
    row = {**GOOD, "positions": {"S2": "John", "S1": "John", "IO": " Mary", "PLACE": "store", "COMMA": 10}}
    made = load_task(jsonl(tmp_path, row), gpt2_bpe)
    pair = made.pairs[0]
    assert {name: made.token_text(pair.clean_ids[place]) for name, place in pair.positions.items()} == {
        "S1": " John", "S2": " John", "IO": "Mary" if pair.positions["IO"] == 1 else " Mary", "PLACE": " store", "COMMA": " John", "END": " to",
    }  # fmt: skip
    assert pair.positions["S1"] < pair.positions["PLACE"] < pair.positions["S2"]
    listed = load_task(jsonl(tmp_path, {**GOOD, "positions": ["store", "drink"]}, name="listed.jsonl"), gpt2_bpe)
    assert {name: listed.token_text(listed.pairs[0].clean_ids[place]) for name, place in listed.pairs[0].positions.items()} == {
        "store": " store", "drink": " drink", "END": " to",
    }  # fmt: skip
    assert load_task(table(tmp_path, {**row, "positions": json.dumps(row["positions"])}), gpt2_bpe).pairs == made.pairs


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"SUBJECT": "John"}, r"SUBJECT is 'John', which is 2 tokens of the clean prompt, at 4, 10; give the index.*SUBJECT1.* 4 ' John' 5"),
        ({"S3": "John"}, "S3 is 'John', which is 2 tokens of the clean prompt"),
        ({"S0": "John"}, "S0 is 'John', which is 2 tokens"),
        ({"X": "Marianne"}, r"X is 'Marianne', which is no token of the clean prompt; give a token.* Its tokens: 0 '<\|endoftext\|>' 1 'When'"),
        ({"two words": "John"}, "'two words' cannot name a position"),
        ({"1": "store"}, "'1' cannot name a position"),
        ({"S1": 1.5}, "positions must map names to token indices or words"),
        ({"S1": " "}, "positions must map names to token indices or words"),
        ([4], "or list different words; got"),
    ],
)  # fmt: skip
def test_bad_positions_echo_the_tokens(positions, message, tmp_path, gpt2_bpe):
    with pytest.raises(TaskError, match=message):
        load_task(jsonl(tmp_path, {**GOOD, "positions": positions}), gpt2_bpe)


def test_tasks_from_python_lists_are_those_of_a_file(tmp_path, gpt2_bpe):
    rows = [{**GOOD, "positions": {"S2": "John"}}, {**GOOD, "corrupted": GOOD["corrupted"].replace("Mary gave", "Tom gave")}]
    from_file = load_task(jsonl(tmp_path, *rows), gpt2_bpe)
    made = Task.from_pairs(gpt2_bpe, rows, name="mine")
    assert (made.pairs, made.name, made.metric) == (from_file.pairs, "mine", from_file.metric)
    assert made.provenance == {key: value for key, value in from_file.provenance.items() if key not in ("file", "sha256")}
    assert Task.from_pairs(gpt2_bpe, list(made.pairs)).pairs == made.pairs
    tuples = [tuple(row[key] for key in ("clean", "corrupted", "correct", "incorrect")) for row in rows]
    assert [one.clean_ids for one in Task.from_pairs(gpt2_bpe, tuples).pairs] == [one.clean_ids for one in made.pairs]
    several = Task.from_pairs(gpt2_bpe, [(*tuples[0][:2], (" Mary", " him"), "John")], metric="prob_diff", bos=False)
    assert (len(several.pairs[0].correct), several.metric.name, several.pairs[0].clean_ids[0] == gpt2_bpe.bos_id) == (2, "prob_diff", False)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs is a list of"),
        ("clean", {}, "pairs is a list of"),
        ([("a", "b", "c")], {}, "pair 0 of pairs: a pair is"),
        ([GOOD, ("When Mary", "When Marianne", " a", " b")], {}, "pair 1 of pairs: clean has 3 tokens and corrupted 4"),
        ([GOOD], {"seed": 1}, "unknown option of a list of pairs 'seed'"),
        ([GOOD], {"chat": True}, "gpt2 has no chat template"),
    ],
)
def test_bad_lists(pairs, options, message, gpt2_bpe):
    with pytest.raises(TaskError, match=message):
        Task.from_pairs(gpt2_bpe, pairs, **options)


def test_chat_templates_on_request(tmp_path, shared_dir):
    chatty = with_gpt2_tokenizer(shared_dir)
    chatty.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[answer]:{% endif %}"
    )
    row = {**GOOD, "correct": "Mary", "incorrect": "John", "positions": {"S2": "John"}}
    made = load_task(jsonl(tmp_path, row), chatty, chat=True)
    pair = made.pairs[0]
    text = made.tokenizer.decode(pair.clean_ids)
    assert text == f"<|endoftext|>[user] {GOOD['clean']}\n[answer]:"
    assert pair.clean_ids.count(chatty.bos_id) == 1
    assert texts(made, pair.correct + pair.incorrect) == [" Mary", " John"]
    assert texts(made, (pair.clean_ids[pair.positions["S2"]],)) == [" John"]
    assert "prompts are a user's message in the tokenizer's chat template" in made.provenance["notes"]
    assert Task.from_pairs(chatty, [row], chat=True).pairs == made.pairs
    with pytest.raises(TaskError, match="token ids cannot be put into a chat template"):
        load_task(jsonl(tmp_path, {**row, "clean_ids": list(pair.clean_ids)}, name="ids.jsonl"), chatty, chat=True)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("capitals", [str.lower, str.title, str.upper])
def test_what_spreadsheets_write(encoding, delimiter, capitals, tmp_path, gpt2_bpe):
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([capitals(name) + " " for name in GOOD])
        writer.writerow(GOOD.values())
    assert load_task(path, gpt2_bpe).pairs == load_task(jsonl(tmp_path, GOOD), gpt2_bpe).pairs
    assert load_task(path, gpt2_bpe, corrupted=capitals("corrupted")).pairs == load_task(path, gpt2_bpe).pairs


def test_other_encodings_and_doubled_columns_are_named(tmp_path, gpt2_bpe):
    path = tmp_path / "latin.csv"
    path.write_bytes("clean,corrupted,correct,incorrect\nJosé,Jose,a,b\n".encode("latin-1"))
    with pytest.raises(TaskError, match="byte 37 is not UTF-8. Save it as UTF-8 text"):
        load_task(path, gpt2_bpe)
    path.write_bytes("clean,corrupted\na,b".encode("utf-16")[:-1])
    with pytest.raises(TaskError, match="byte 38 is not UTF-16"):
        load_task(path, gpt2_bpe)
    with pytest.raises(TaskError, match="line 1: two columns have one name but for capitals: clean, .*Clean"):
        load_task(jsonl(tmp_path, {**GOOD, "Clean": "x"}), gpt2_bpe)


def test_another_column_as_corrupted(tmp_path, gpt2_bpe):
    row = {**GOOD, "harder": GOOD["clean"].replace("Mary and", "Tom and")}
    made = load_task(jsonl(tmp_path, row), gpt2_bpe, corrupted="harder")
    assert " Tom" in texts(made, made.pairs[0].corrupted_ids)
    assert made.provenance["corrupted_column"] == "harder"
    with pytest.raises(TaskError, match=r"mine.jsonl lacks the column softer"):
        load_task(jsonl(tmp_path, row), gpt2_bpe, corrupted="softer")


def test_unequal_lengths_can_be_dropped(tmp_path, gpt2_bpe):
    bad = {**GOOD, "corrupted": GOOD["corrupted"].replace("Mary and", "Marianne and")}
    path = jsonl(tmp_path, GOOD, bad)
    made = load_task(path, gpt2_bpe, on_mismatch="drop")
    assert len(made) == 1
    assert made.provenance["notes"] == ["1 of 2 pairs dropped: unequal lengths"]
    with pytest.raises(
        TaskError, match=r'pair 1 of mine.jsonl \(line 2\): clean has 15 .* corrupted 16 \("Mary" is one token, "Marianne" is 2 tokens\)'
    ):
        load_task(path, gpt2_bpe)
    with pytest.raises(TaskError, match="no pair is left of 1"):
        load_task(jsonl(tmp_path, bad), gpt2_bpe, on_mismatch="drop")
    with pytest.raises(TaskError, match=r"\(13 and 14 words\)"):
        load_task(jsonl(tmp_path, {**GOOD, "corrupted": GOOD["corrupted"].replace("a drink", "a cold drink")}), gpt2_bpe)


def test_only_correct_and_n(tmp_path, gpt2_bpe):
    mary = gpt2_bpe.tokenizer.encode(" Mary")[0]
    believer = Stub(gpt2_bpe.tokenizer, gpt2_bpe.vocab_size, None, lambda row: one_hot(torch.tensor(mary), gpt2_bpe.vocab_size).float())
    other = {"clean": GOOD["corrupted"], "corrupted": GOOD["clean"], "correct": " John", "incorrect": " Mary"}
    path = jsonl(tmp_path, other, GOOD)
    made = load_task(path, believer, only_correct=True)
    assert [pair.correct for pair in made.pairs] == [(mary,)]
    assert made.provenance["candidates"] == 2
    with pytest.raises(TaskError, match="has 1 pairs that stub solves; got n=2"):
        load_task(path, believer, only_correct=True, n=2)
    with pytest.raises(TaskError, match="has 2 pairs; got n=3"):
        load_task(path, believer, n=3)
    with pytest.raises(TaskError, match="solves none of the 1 pairs"):
        load_task(jsonl(tmp_path, other), believer, only_correct=True)


# --- bad input ---


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "mine.jsonl is empty"),
        ([GOOD, '{"clean": '], "mine.jsonl, line 2: not JSON"),
        ([GOOD, "[1, 2]"], "line 2: expected an object with the fields of one pair; got list"),
        ([{key: GOOD[key] for key in ("clean", "correct", "incorrect")}], "lacks the column corrupted; it has clean, correct, incorrect"),
        ([{"a": 1}], "lacks the columns clean, corrupted, correct, incorrect; it has a. .*Also read: EAP-IG: clean, corrupted, correct_idx"),
        ([GOOD, {**GOOD, "correct": None}], r"pair 1 of mine.jsonl \(line 2\): correct is missing; every pair needs it \(or correct_id\)"),
        ([{**GOOD, "clean": 7}], "clean must be a text that is not empty; got 7"),
        ([{**GOOD, "corrupted": GOOD["clean"]}], r"pair 0 of mine.jsonl \(line 1\): clean and corrupted are identical"),
        ([{**GOOD, "correct": " Marianne"}], "the correct answer ' Marianne' is 2 tokens"),
        ([{**GOOD, "incorrect": [" John", 3]}], "incorrect must be a text or a list of texts"),
        ([{**GOOD, "incorrect": []}], "pair 0 of mine has no incorrect answer, and logit_diff compares with it"),
        ([{**GOOD, "correct_id": "x"}], "correct_id must be a token id or a list of them; got 'x'"),
        ([{**GOOD, "clean_ids": [1, 99999]}], r"clean has the ids \[99999\], outside the vocabulary of gpt2 \(0 to 50256\)"),
        ([{**GOOD, "clean_ids": [-1]}], r"clean has the ids \[-1\]"),
        ([{**GOOD, "positions": {"S1": None}}], "positions must map names to token indices"),
        ([{**GOOD, "positions": {"S1": 40}}], "position S1 is 40, outside a prompt of 15 tokens"),
        ([{**GOOD, "positions": "{"}], "positions looks like JSON and is not"),
        ([{**GOOD, "metric": "logit_diff"}, {**GOOD, "metric": "prob_diff"}], r"asks for the metrics \['logit_diff', 'prob_diff'\]"),
    ],
)
def test_bad_files(lines, message, tmp_path, gpt2_bpe):
    with pytest.raises(TaskError, match=message):
        load_task(jsonl(tmp_path, *lines), gpt2_bpe)


def test_bad_csv(tmp_path, gpt2_bpe):
    path = tmp_path / "mine.csv"
    path.write_text("clean,corrupted,correct,incorrect\na,b,c\n")
    with pytest.raises(TaskError, match=r"mine.csv, line 2: expected 4 cells, as in the header"):
        load_task(path, gpt2_bpe)
    path.write_text('clean,corrupted,correct,incorrect\n"a"b,b,c,d\n')
    with pytest.raises(TaskError, match=r"mine.csv, line 2: not CSV"):
        load_task(path, gpt2_bpe)
    path.write_text("clean,corrupted,correct,incorrect\n")
    with pytest.raises(TaskError, match=r"mine.csv is empty"):
        load_task(path, gpt2_bpe)


def test_bad_paths_and_options(tmp_path, gpt2_bpe):
    with pytest.raises(TaskError, match=r"cannot read the task file .*nowhere.jsonl"):
        load_task(tmp_path / "nowhere.jsonl", gpt2_bpe)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TaskError, match=r"ends in '.txt'; a task file is one of .csv, .json, .jsonl"):
        load_task(tmp_path / "notes.txt", gpt2_bpe)
    path = jsonl(tmp_path, GOOD)
    with pytest.raises(
        TaskError, match="unknown option of a task file 'order'; Valid: answers, chat, corrupted, incorrect, on_mismatch, split, subset"
    ):
        load_task(path, gpt2_bpe, order="ABBA")
    with pytest.raises(TaskError, match="unknown on_mismatch 'skip'; Valid: drop, raise"):
        load_task(path, gpt2_bpe, on_mismatch="skip")
    with pytest.raises(TaskError, match="clean is text, and stub has no tokenizer"):
        load_task(path, Stub())


def test_unknown_words(tmp_path, demo_gpt2_4l):
    with pytest.raises(TaskError, match=r"clean has words that are not in the vocabulary of demo-gpt2-4l: 'Zebedee'"):
        load_task(jsonl(tmp_path, {**GOOD, "clean": GOOD["clean"].replace("Mary", "Zebedee")}), demo_gpt2_4l)
    with pytest.raises(TaskError, match="the correct answer 'Zebedee' is not in the vocabulary of demo-gpt2-4l"):
        load_task(jsonl(tmp_path, {**GOOD, "correct": "Zebedee"}), demo_gpt2_4l)


# --- files of others ---


@pytest.mark.parametrize("column", ["corrupted", "corrupted_hard"])
def test_eap_ig_ioi(column, shared_dir, gpt2_bpe):
    path = shared_dir / "data" / "eap-ig" / "ioi_llama.csv"
    made = load_task(path, gpt2_bpe, corrupted=column)
    assert len(made) == 499
    assert "correct_idx" in made.provenance["notes"][0]
    with path.open() as file:
        ids = [(int(row["correct_idx"]), int(row["incorrect_idx"])) for row in csv.DictReader(file)]
    for one, foreign in zip(made.pairs, ids, strict=True):
        assert (*one.correct, *one.incorrect) != foreign
        assert one.clean_ids.count(one.correct[0]) == 1
        assert one.clean_ids.count(one.incorrect[0]) == 2
    axis = made.position_axis()
    assert axis.names == ("S1", "IO", "S2", "END")
    assert all(row[0] == row[2] != row[1] for row in axis.tokens)


def test_ids_of_another_tokenizer_that_the_text_does_not_explain(tmp_path, gpt2_bpe):
    row = {"clean": "The friends", "corrupted": "The friend", "correct_idx": 617, "incorrect_idx": 706}
    with pytest.raises(TaskError, match=r"ids of a tokenizer that the file does not name.*Write the answers as text"):
        load_task(table(tmp_path, row), gpt2_bpe)
    both = {"clean": GOOD["clean"], "corrupted": GOOD["corrupted"], "correct_idx": 1, "incorrect_idx": 2}
    swapped = {"clean": GOOD["corrupted"], "corrupted": GOOD["clean"], "correct_idx": 1, "incorrect_idx": 2}
    with pytest.raises(TaskError, match="correct_idx is 1, which stood for 'Mary' before; the text says 'John'"):
        load_task(table(tmp_path, both, swapped), gpt2_bpe)
    with pytest.raises(TaskError, match="correct_idx or incorrect_idx is missing"):
        load_task(table(tmp_path, both, {**both, "correct_idx": None}), gpt2_bpe)


def test_eap_ig_greater_than(shared_dir, tmp_path, gpt2_bpe):
    made = load_task(shared_dir / "data" / "eap-ig" / "greater_than_data.csv", gpt2_bpe, bos=False)
    assert (len(made), made.metric.name, {len(pair) for pair in made.pairs}) == (500, "prob_diff", {12})
    for one in made.pairs:
        year = int(made.token_text(one.clean_ids[7]))
        assert [int(text) for text in texts(made, one.correct)] == list(range(year + 1, 100))
        assert len(one.incorrect) == year + 1
    row = {"clean": "from 1732 to 17", "corrupted": "from 1701 to 17", "label": "132"}
    with pytest.raises(TaskError, match="label must be the two last digits of the first year, 00 to 98; got '132'"):
        load_task(table(tmp_path, row), gpt2_bpe)


@pytest.mark.parametrize(("name", "rows", "kept"), [("simple_train", 480, 413), ("nounpp_test", 480, 414), ("within_rc_test", 500, 500)])
def test_feature_circuits(name, rows, kept, shared_dir, gpt2_bpe):
    path = shared_dir / "data" / "feature-circuits" / f"{name}.json"
    made = load_task(path, gpt2_bpe, on_mismatch="drop")
    assert len(made) == kept
    if kept < rows:
        with pytest.raises(TaskError, match="Patching needs equal lengths"):
            load_task(path, gpt2_bpe)
    else:
        axis = made.position_axis()
        assert axis.names == ("END",)
        assert "(lengths [6, 7, 8, 9], 1 template) share no named position but END" in axis.note
    assert all(text.startswith(" ") for one in made.pairs for text in texts(made, one.correct + one.incorrect))


PROMPT = {
    "clean": "When Mary and John went out, John gave it to",
    "corrupt": "When Mary and John went out, Mary gave it to",
    "answers": [" Mary"],
    "wrong_answers": [" John", " them"],
}


def prompts(folder: Path, *pairs: Any, name: str = "prompts.json", **shared: Any) -> Path:
    """A file as auto-circuit reads it: one object over several lines."""
    path = folder / name
    path.write_text(json.dumps({**shared, "prompts": list(pairs)}, indent=2))
    return path


def test_auto_circuit(tmp_path, gpt2_bpe):
    other = {**PROMPT, "clean": PROMPT["corrupt"], "corrupt": PROMPT["clean"], "answers": [" John"], "wrong_answers": [" Mary"]}
    made = load_task(prompts(tmp_path, PROMPT, other, word_idxs={"IO": 1, "S2": 7}), gpt2_bpe)
    assert (len(made), made.provenance["format"], made.metric.name) == (2, "auto-circuit", "logit_diff")
    first = made.pairs[0]
    assert made.tokenizer.decode(first.clean_ids[1:]) == PROMPT["clean"]
    assert made.tokenizer.decode(first.corrupted_ids[1:]) == PROMPT["corrupt"]
    assert (texts(made, first.correct), texts(made, first.incorrect)) == ([" Mary"], [" John", " them"])
    assert [texts(made, (first.clean_ids[first.positions[name]],)) for name in ("IO", "S2")] == [[" Mary"], [" John"]]
    bare = load_task(prompts(tmp_path, PROMPT, word_idxs={"IO": 1, "S2": 7}), gpt2_bpe, bos=False).pairs[0]
    assert (bare.positions["IO"], bare.positions["S2"]) == (1, 7), "counted from the first token, with or without bos"
    # on one line it is the same file
    (tmp_path / "line.json").write_text(json.dumps({"prompts": [PROMPT]}))
    assert load_task(tmp_path / "line.json", gpt2_bpe).pairs[0].clean_ids == first.clean_ids


def test_auto_circuit_labels_of_every_token(tmp_path, gpt2_bpe):
    labels = ["when", "IO", "and", "S", "went", "out", ",", "S", "gave", "it", "to"]
    path = prompts(tmp_path, PROMPT, seq_labels=labels)
    assert len(load_task(path, gpt2_bpe, bos=False).pairs[0]) == len(labels)
    made = load_task(path, gpt2_bpe).pairs[0]
    assert made.positions["IO"] == 2
    assert "S" not in made.positions, "a label that occurs twice names no position"
    short = load_task(prompts(tmp_path, PROMPT, seq_labels=labels[:-1], word_idxs={"IO": 1}), gpt2_bpe)
    assert set(short.pairs[0].positions) == {"END"}
    assert short.provenance["notes"] == ["positions left out where the prompt is not 10 tokens long, for which the file names them"]


def test_auto_circuit_ids(tmp_path):
    pair = {"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answers": [5], "wrong_answers": [6, 7]}
    made = load_task(prompts(tmp_path, pair, word_idxs={"B": 1}), Stub(bos_id=1)).pairs[0]
    assert (made.clean_ids, made.corrupted_ids, made.correct, made.incorrect) == ((1, 2, 3), (1, 4, 3), (5,), (6, 7))
    assert made.positions["B"] == 1, "ids are used as they are"
    alone = load_task(prompts(tmp_path, {**pair, "wrong_answers": []}), Stub(), metric="neg_kl")
    assert alone.pairs[0].incorrect == ()


@pytest.mark.parametrize(
    ("shared", "change", "message"),
    [
        ({"prompts": {"clean": 1}}, {}, "bad.json: prompts must be a list of objects .* got dict"),
        ({"prompts": [1]}, {}, "bad.json: prompts must be a list of objects"),
        ({"prompts": []}, {}, "bad.json is empty"),
        ({}, {"clean": None}, "pair 0 of bad.json: clean is missing"),
        ({}, {"corrupt": ""}, "pair 0 of bad.json: corrupt must be a text that is not empty"),
        ({}, {"answers": " Mary"}, "pair 0 of bad.json: answers must be a list of texts or of token ids; got ' Mary'"),
        ({}, {"answers": []}, "pair 0 of bad.json: there is no correct answer"),
        ({}, {"wrong_answers": [1, " John"]}, "wrong_answers must be a token id or a list of them"),
        ({}, {"clean": ["When"]}, "clean must be a token id or a list of them"),
        ({"word_idxs": ["IO"]}, {}, "word_idxs must map names to token indices"),
        ({"word_idxs": {"IO": -1}}, {}, "word_idxs must map names to token indices"),
        ({"word_idxs": {"IO": 30}}, {}, "position IO is 31, outside a prompt of 12 tokens"),
        ({"seq_labels": "IO"}, {}, "seq_labels must be a list of texts, one per token"),
    ],
)
def test_bad_auto_circuit_files(shared, change, message, tmp_path, gpt2_bpe):
    (tmp_path / "bad.json").write_text(json.dumps({"prompts": [{**PROMPT, **change}], **shared}))
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / "bad.json", gpt2_bpe)


@pytest.mark.parametrize("name", ["gpt2-random.swap1", "trained-gpt2-4l.docstring"])
def test_reference_files(name, reference_dir):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference_dir / "models" / name.partition(".")[0])
    path = reference_dir / "tasks" / f"{name}.jsonl"
    made = load_task(path, Stub(tokenizer, len(tokenizer), 0))
    for one, row in zip(made.pairs, map(json.loads, path.read_text().splitlines()), strict=True):
        assert one.clean_ids == tuple(row["clean_ids"])
        assert (one.correct, one.incorrect) == ((row["correct_id"],), (row["incorrect_id"],))


# --- the frozen files ---

DATASETS = ROOT / "datasets"


def test_every_generator_has_a_frozen_file():
    from patchlab.tasks import TASKS

    untrained = {"arithmetic", "coloured_objects"}  # of words that the packaged models have never seen
    assert {path.stem for path in DATASETS.glob("*.jsonl")} == set(TASKS) - untrained
    card = (DATASETS / "README.md").read_text()
    assert all(f"`{name}.jsonl`" in card for name in set(TASKS) - untrained)


@pytest.mark.parametrize("path", sorted(DATASETS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_frozen_files_are_what_the_generators_give(path, demo_gpt2_4l):
    frozen = load_task(path, demo_gpt2_4l)
    made = load_task(path.stem, demo_gpt2_4l, n=len(frozen), seed=1)
    assert frozen.pairs == made.pairs
    assert frozen.metric == made.metric
    assert frozen.fingerprint == made.fingerprint
    assert [one.positions for one in frozen.pairs] == [one.positions for one in made.pairs]
    # without the ids, the text alone gives the same pairs
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, one in zip(rows, made.pairs, strict=True):
        assert (0, *demo_gpt2_4l.tokenizer.encode(row["clean"])) == one.clean_ids
