"""Data sets of the MIB circuit track: files made here to its published layout, in every form that they come in, and everything that can be wrong."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from mib_rows import COMMIT, arc, arithmetic, ioi, mcqa, put, put_in_cache
from stub_model import Stub, with_gpt2_tokenizer

from patchlab.errors import TaskError
from patchlab.tasks import Task, load_task


@pytest.fixture(scope="module")
def gpt2_bpe(shared_dir) -> Stub:
    return with_gpt2_tokenizer(shared_dir)


def answers(task: Task, i: int = 0) -> tuple[list[str], list[str]]:
    pair = task.pairs[i]
    return [task.token_text(one) for one in pair.correct], [task.token_text(one) for one in pair.incorrect]


def text(task: Task, ids: tuple[int, ...]) -> str:
    return task.tokenizer.decode(ids[1:])  # without the bos


# --- what is read ---


def test_the_four_tasks(tmp_path, gpt2_bpe):
    rows = {"ioi": ioi(), "copycolors_mcqa": mcqa(), "arithmetic_addition": arithmetic(), "arc_easy": arc()}
    tasks = {name: load_task(put(tmp_path / name / "train.jsonl", row).parent, gpt2_bpe) for name, row in rows.items()}
    assert {name: task.name for name, task in tasks.items()} == {name: name for name in rows}
    assert {name: answers(task) for name, task in tasks.items()} == {
        "ioi": ([" Phil"], [" Henry"]),
        "copycolors_mcqa": (["D"], ["4"]),
        "arithmetic_addition": (["38"], ["59"]),
        "arc_easy": (["C"], ["X"]),
    }
    for name, task in tasks.items():
        column = {"ioi": "s2_io_flip_counterfactual", "arithmetic_addition": "random_counterfactual"}.get(name, "symbol_counterfactual")
        assert task.metric.name == "logit_diff"
        assert (text(task, task.pairs[0].clean_ids), text(task, task.pairs[0].corrupted_ids)) == (rows[name]["prompt"], rows[name][column]["prompt"])
        assert task.provenance["corrupted_column"] == column
        assert task.provenance["notes"] == []
    pair = tasks["ioi"].pairs[0]
    named = {name: tasks["ioi"].token_text(pair.clean_ids[place]) for name, place in pair.positions.items()}
    assert named == {"IO": " Phil", "S1": " Henry", "S2": " Henry", "END": " to"}
    assert pair.positions["S1"] < pair.positions["IO"] < pair.positions["S2"]


@pytest.mark.parametrize(
    "place",
    ["train.jsonl", "train.json", "train.parquet", "data/train-00000-of-00001.parquet", "train/0000.parquet", "default/train/0000.jsonl"],
)
def test_the_layouts_of_the_hub(place, tmp_path, gpt2_bpe):
    rows = [ioi(), ioi("Mary", "John")]
    put(tmp_path / "ioi" / place, *rows)
    put(tmp_path / "ioi" / place.replace("train", "test"), ioi("Tom", "Paul"))
    (tmp_path / "ioi" / "dataset_infos.json").write_text("{}")
    task = load_task(tmp_path / "ioi", gpt2_bpe)
    assert [answers(task, i)[0] for i in range(2)] == [[" Phil"], [" Mary"]]
    assert (task.provenance["split"], task.provenance["files"]) == ("train", [place])
    assert answers(load_task(tmp_path / "ioi", gpt2_bpe, split="test")) == ([" Tom"], [" Paul"])
    assert load_task(tmp_path / "ioi" / place, gpt2_bpe).pairs == task.pairs  # the file itself


def test_splits_of_several_parts_and_subsets(tmp_path, gpt2_bpe):
    folder = tmp_path / "copycolors_mcqa"
    put(folder / "4_answer_choices" / "validation-00001-of-00002.jsonl", mcqa(answer=1))
    put(folder / "4_answer_choices" / "validation-00000-of-00002.jsonl", mcqa(answer=3))
    put(folder / "2_answer_choices" / "validation.jsonl", mcqa(answer=0))
    task = load_task(folder, gpt2_bpe, split="validation")
    assert [answers(task, i)[0] for i in range(2)] == [["D"], ["B"]]  # in the order of the parts, of the subset that MIB takes
    assert answers(load_task(folder, gpt2_bpe, split="val", subset="2_answer_choices")) == (["A"], ["1"])


def test_rows_that_mib_leaves_out_are_counted(tmp_path, gpt2_bpe):
    """Names of unequal numbers of tokens (Bartholomew has several), and results of several tokens, as its filters do."""
    path = put(tmp_path / "ioi.jsonl", ioi(), ioi("Bartholomew"), ioi("Phil", "Bartholomew"), ioi(c="Bartholomew"), ioi("Mary", "John"))
    task = load_task(path, gpt2_bpe)
    assert [answers(task, i)[0] for i in range(2)] == [[" Phil"], [" Mary"]]
    assert len(task) == 2
    assert task.provenance["notes"] == ["3 of 5 pairs dropped: names or answers of unequal numbers of tokens"]
    sums = [arithmetic(), arithmetic(random_counterfactual=None), arithmetic(random_counterfactual=dict.fromkeys(("prompt", "label", "operand1")))]
    sums += [arithmetic(7001, 8), arithmetic(other=(8, 30))]
    task = load_task(put(tmp_path / "sums.jsonl", *sums), gpt2_bpe)
    assert len(task) == 1
    assert task.provenance["notes"] == [
        "2 of 5 pairs dropped: without random_counterfactual",
        "1 of 5 pairs dropped: answers of several tokens",
        "1 of 5 pairs dropped: the result is the same in random_counterfactual",
    ]


def test_answers_of_several_tokens_count_by_their_first(tmp_path, gpt2_bpe):
    """As MIB takes them: its metric gathers the first token of each name."""
    encode = gpt2_bpe.tokenizer.encode
    names = ("Aliyah", "Aldous", "Rowena")
    assert {len(encode(f" {name}")) for name in names} == {2}
    row = ioi(*names)
    task = load_task(put(tmp_path / "ioi.jsonl", row), gpt2_bpe)
    assert (task.pairs[0].correct, task.pairs[0].incorrect) == ((encode(" Aliyah")[0],), (encode(" Aldous")[0],))
    assert task.provenance["notes"] == ["answers of several tokens count by the first, as in MIB"]
    with pytest.raises(TaskError, match=r"pair 0 of ioi.jsonl \(line 1\): the correct answer ' Aliyah' is 2 tokens .* an answer is one token"):
        load_task(tmp_path / "ioi.jsonl", gpt2_bpe, answers="continuation")
    same = ioi("Aldous", "Alden", "Rowena")
    assert encode(" Aldous")[0] == encode(" Alden")[0]
    with pytest.raises(TaskError, match=r"no pair is left of 1 .*: 1 both answers begin with the same token"):
        load_task(put(tmp_path / "same.jsonl", same), gpt2_bpe)


def test_sets_of_answers_and_other_counterfactuals(tmp_path, gpt2_bpe):
    path = put(tmp_path / "mcqa.jsonl", mcqa())
    assert answers(load_task(path, gpt2_bpe, incorrect="others")) == (["D"], ["A", "B", "C"])
    assert answers(load_task(path, gpt2_bpe, answers="continuation")) == ([" D"], [" 4"])
    assert answers(load_task(path, gpt2_bpe, answers="continuation", incorrect="others", metric="max_diff"))[1] == [" A", " B", " C"]
    assert answers(load_task(put(tmp_path / "arc.jsonl", arc()), gpt2_bpe, incorrect="others"))[1] == ["A", "B", "D", "E"]
    names = put(tmp_path / "ioi.jsonl", ioi())
    for column in ("abc", "abc_counterfactual"):
        made = load_task(names, gpt2_bpe, corrupted=column)
        assert "Angel gave" in text(made, made.pairs[0].corrupted_ids)
    with pytest.raises(TaskError, match=r"pair 0 of sums.jsonl .* offers no other answers"):
        load_task(put(tmp_path / "sums.jsonl", arithmetic()), gpt2_bpe, incorrect="others")


def test_no_more_of_a_data_set_is_read_than_is_asked_for(tmp_path, gpt2_bpe, monkeypatch):
    folder = put(tmp_path / "ioi" / "train.jsonl", *[ioi("Bartholomew"), *[ioi(one) for one in ("Mary", "Tom", "Paul", "Anna")]]).parent
    seen = []
    monkeypatch.setattr("patchlab.tasks.files.read._Encoder.prompt", lambda self, row, side: seen.append(row.where) or (1, 2, 3 + (side == "clean")))
    assert len(load_task(folder, gpt2_bpe, n=2)) == 2
    assert len(set(seen)) == 2
    with pytest.raises(TaskError, match="ioi has 4 pairs; got n=5"):
        load_task(folder, gpt2_bpe, n=5)


# --- generators of the same kinds, for any tokenizer ---


def split_at(numbers: str) -> Stub:
    """A byte-pair tokenizer that gives a space before a number a token of its own, and numbers as the pattern says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = pre_tokenizers.Split(Regex(rf"{numbers}| ?[a-zA-Z]+| ?[^\s\w]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([*(f"The sum of {n} and {n} is" for n in range(200)), "1 plus 2 = - +"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return Stub(fast, len(fast), fast.bos_token_id, name="split")


@pytest.mark.parametrize("operation", ["add", "subtract"])
@pytest.mark.parametrize("template", ["sum", "words", "symbols"])
def test_arithmetic_is_right_and_made_of_whole_tokens(template, operation, gpt2_bpe):
    """Operands are read back from the prompt; GPT-2 has the space within the token of a number, the other tokenizer does not."""
    for model in (gpt2_bpe, split_at(r"\d{1,3}")):
        for one in load_task("arithmetic", model, n=20, template=template, operation=operation).pairs:
            for ids, answer in ((one.clean_ids, one.correct), (one.corrupted_ids, one.incorrect)):
                whole = model.tokenizer.decode([*ids[1:], *answer])
                first, second, result = map(int, re.findall(r"\d+", whole))
                assert result == (first + second if operation == "add" else first - second)
                assert model.tokenizer.encode(model.tokenizer.decode(ids[1:]), add_special_tokens=False) == list(ids[1:])
                assert model.tokenizer.encode(whole, add_special_tokens=False) == [*ids[1:], *answer]  # the answer goes on as text would
            assert model.tokenizer.decode(one.clean_ids[one.positions["A"]]).strip() == re.findall(r"\d+", model.tokenizer.decode(one.clean_ids))[0]


def test_arithmetic_for_tokenizers_that_split_numbers_into_digits():
    digits = split_at(r"\d")
    assert len(load_task("arithmetic", digits, n=8, digits=1)) == 8
    with pytest.raises(TaskError, match=r"split has 10 of the numbers 0 to 198 as single tokens, .* operands of 2 digits .* Take digits=1"):
        load_task("arithmetic", digits)
    with pytest.raises(TaskError, match="digits is 4; arithmetic has operands of 1 to 3 digits"):
        load_task("arithmetic", digits, digits=4)


@pytest.mark.parametrize("corruption", ["symbol", "position", "colour"])
@pytest.mark.parametrize("choices", [2, 5])
def test_coloured_objects_are_answered_by_the_choice_with_the_colour(corruption, choices, gpt2_bpe):
    """The answers are found again in the text of both prompts."""
    task = load_task("coloured_objects", gpt2_bpe, n=12, corruption=corruption, choices=choices, incorrect="others")
    wrong = load_task("coloured_objects", gpt2_bpe, n=12, corruption=corruption, choices=choices)
    for one, other in zip(task.pairs, wrong.pairs, strict=True):
        found = []
        for ids in (one.clean_ids, one.corrupted_ids):
            said = gpt2_bpe.tokenizer.decode(ids[1:])
            colour = re.match(r"The \w+ is (\w+)\. What color is the \w+\?\n", said)
            listed = {name: letter for letter, name in re.findall(r"\n(\w)\. (\w+)", said)}
            assert colour is not None
            assert len(listed) == choices
            found.append((listed[colour[1]], set(listed.values())))
        (right, letters), (turned, _) = found
        assert answers(task, task.pairs.index(one)) == ([f" {right}"], [task.token_text(i) for i in one.incorrect])
        assert {task.token_text(i).strip() for i in one.incorrect} == letters - {right}
        assert [task.token_text(i) for i in other.incorrect] == [f" {turned}"]
        assert right != turned


def test_too_many_or_too_few_choices(gpt2_bpe):
    with pytest.raises(TaskError, match="choices is 9; a question of coloured_objects has 2 to 8 choices"):
        load_task("coloured_objects", gpt2_bpe, choices=9)
    with pytest.raises(TaskError, match="only 0 of 26 letters are single tokens .* Use a model with a larger vocabulary, or a task file"):
        load_task("coloured_objects", Stub(split_at(r"\d").tokenizer, 1, 0, name="none"))


# --- names of the hub ---


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_data_sets_of_the_hub_come_from_the_cache(cache, gpt2_bpe):
    put_in_cache(cache, "mib-bench/ioi", ioi(), ioi("Mary", "John"))
    task = load_task("mib-bench/ioi", gpt2_bpe, n=1)
    assert (task.name, len(task), task.provenance["data_set"]) == ("ioi", 1, "mib-bench/ioi")
    with pytest.raises(
        TaskError, match="'mib-bench/arc_easy' is no generator and no file here; as a data set of the hub it is not in the cache, and HF"
    ):
        load_task("mib-bench/arc_easy", gpt2_bpe)
    with pytest.raises(TaskError, match="unknown split 'test'"):
        load_task("mib-bench/ioi", gpt2_bpe, split="test")


def test_what_is_not_in_the_cache_is_fetched(cache, gpt2_bpe, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetched: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        fetched.append(options)
        put_in_cache(cache, name, ioi())
        return str(cache / f"datasets--{name.replace('/', '--')}" / "snapshots" / COMMIT)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for _ in range(2):
        assert len(load_task("mib-bench/ioi", gpt2_bpe)) == 1
    assert [one["repo_type"] for one in fetched] == ["dataset"]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(TaskError, match=r"did not answer within 2 s \(no route\). Give a local folder"):
        load_task("mib-bench/arc_easy", gpt2_bpe)


# --- what is refused: each with the place and what to do ---

BAD_ROWS = [
    (ioi(prompt=""), r"pair 0 of bad.jsonl \(line 1\): prompt must be a text that is not empty; got ''"),
    (ioi(metadata="Phil"), "metadata must be an object with indirect_object, subject, random_c, as MIB writes it; got 'Phil'"),
    (ioi(metadata={"indirect_object": "Phil", "subject": "Henry"}), "metadata lacks random_c; it has indirect_object, subject"),
    (ioi(metadata={"indirect_object": "Phil", "subject": 3, "random_c": "Tom"}), "subject of metadata must be a text that is not empty; got 3"),
    (ioi(answerKey=1), r"answerKey 1 of the choices \['Phil', 'Henry'\] is not the indirect object of metadata, 'Phil'. Correct one of them"),
    (ioi(choices="Phil"), "answerKey 0 of the choices 'Phil' is not the indirect object"),
    (ioi(s2_io_flip_counterfactual="Henry gave"), "s2_io_flip_counterfactual must be an object with prompt"),
    (ioi(s2_io_flip_counterfactual={"prompt": None}), "the prompt of s2_io_flip_counterfactual must be a text that is not empty; got None"),
    ({key: value for key, value in ioi().items() if not key.endswith("_counterfactual")}, "there is no counterfactual column .* nothing says what"),
    (
        {key: value for key, value in ioi().items() if not key.startswith("s2")},
        "unknown counterfactual 's2_io_flip_counterfactual'.*abc_counterfactual",
    ),
    (mcqa(choices=["A", "B"]), "choices of the prompt must be an object with label, text"),
    (mcqa(choices={"label": list("ABCD"), "text": ["gray"]}), "the prompt has 4 labels and 1 texts; each choice has one of both"),
    (mcqa(choices={"label": list("ABCA"), "text": list("wxyz")}), "the labels of the prompt repeat: A, B, C, A"),
    (mcqa(choices={"label": [None] * 4, "text": list("wxyz")}), "the labels of the prompt must be a list of texts or whole numbers"),
    (mcqa(answerKey=4), "answerKey of the prompt must be the index of one of its 4 choices, 0 to 3; got 4"),
    (mcqa(answerKey="D"), "answerKey of the prompt must be the index of one of its 4 choices, 0 to 3; got 'D'"),
    (mcqa(symbol_counterfactual={"prompt": "x"}), "symbol_counterfactual lacks choices, answerKey; it has prompt"),
    (arithmetic(label="39"), r"the label of the prompt is 39, and 13 \+ 25 is 38. Correct it"),
    (arithmetic(label="3.5"), "label of the prompt must be a whole number; got '3.5'"),
    (arithmetic(operator="*"), r"unknown operator '\*'"),
    (arithmetic(random_counterfactual={"prompt": "x", "label": 3}), "random_counterfactual lacks operand1, operand2; it has prompt, label"),
    (arithmetic(random_counterfactual={"prompt": "x", "label": 3, "operand1": 1, "operand2": 1}), r"random_counterfactual is 3, and 1 \+ 1 is 2"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_malformed_rows_are_refused(row, message, tmp_path, gpt2_bpe):
    with pytest.raises(TaskError, match=message) as caught:
        load_task(put(tmp_path / "bad.jsonl", row), gpt2_bpe)
    assert "pair 0 of bad.jsonl (line 1)" in str(caught.value)


def test_rows_that_lack_a_column_are_named(tmp_path, gpt2_bpe):
    short = {key: value for key, value in ioi().items() if key != "metadata"}
    with pytest.raises(TaskError, match=r"pair 1 of bad.jsonl \(line 2\): the row lacks metadata; it has template, prompt"):
        load_task(put(tmp_path / "bad.jsonl", ioi(), short), gpt2_bpe)


@pytest.mark.parametrize(
    ("places", "options", "message"),
    [
        (["readme.jsonl"], {}, r"has no files of splits .* Name them as in train.jsonl"),
        (["data-00000-of-00001.arrow"], {}, "It was written by save_to_disk; write each split with to_parquet"),
        (["train.jsonl"], {"split": "tset"}, "unknown split 'tset'"),
        (["train.jsonl"], {"subset": "main"}, "unknown subset 'main'"),
        (["a/train.jsonl", "b/train.jsonl"], {}, "has the subsets a, b; name one, as in subset='b'"),
        (["train.json", "train.jsonl"], {}, r"has the split train as .json and as .jsonl; keep one of them"),
        (["train-00001-of-00002.jsonl"], {}, "the split train is made of 2 parts and part 00000 is missing. Download it again"),
        (["train-00000-of-00001.jsonl", "train.jsonl"], {}, "made of 1 parts and it is there in two versions"),
    ],
)
def test_folders_that_cannot_be_read(places, options, message, tmp_path, gpt2_bpe):
    for place in places:
        put(tmp_path / "data-set" / place, ioi())
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / "data-set", gpt2_bpe, **options)


def test_options_that_do_not_fit(tmp_path, gpt2_bpe):
    mib = put(tmp_path / "ioi" / "train.jsonl", ioi())
    own = put(tmp_path / "own.jsonl", {"clean": "Mary is", "corrupted": "John is", "correct": " here", "incorrect": " there"})
    with pytest.raises(TaskError, match="incorrect is an option of MIB's data sets, and own.jsonl is a file of patchlab; leave it out"):
        load_task(own, gpt2_bpe, incorrect="others")
    with pytest.raises(TaskError, match="unknown answers 'first'"):
        load_task(mib, gpt2_bpe, answers="first")
    with pytest.raises(TaskError, match="split is an option of a folder with a data set, and .* is one file"):
        load_task(mib, gpt2_bpe, split="train")
    with pytest.raises(TaskError, match="clean has .* tokens and corrupted .*on_mismatch"):
        load_task(put(tmp_path / "longer.jsonl", ioi(abc_counterfactual={"prompt": "Some much longer prompt " * 9})), gpt2_bpe, corrupted="abc")


def test_parquet_that_cannot_be_read(tmp_path, gpt2_bpe, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TaskError, match="cannot read the parquet file .*train.parquet: .* Get or write it again"):
        load_task(path, gpt2_bpe)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"needs pyarrow: pip install 'patchlab\[parquet\]', or write the rows as JSON lines"):
        load_task(path, gpt2_bpe)
