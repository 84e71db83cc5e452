"""Pairs, batches, position axes, and the generators with two kinds of tokenizer."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from stub_model import Stub, with_gpt2_tokenizer

from patchlab.errors import MetricError, TaskError
from patchlab.metrics import METRICS, Metric
from patchlab.tasks import GENERATORS, TASKS, Pair, Task, generator, load_task


@pytest.fixture(scope="module")
def gpt2_bpe(shared_dir) -> Stub:
    return with_gpt2_tokenizer(shared_dir)


def pair(*clean: int, correct=(1,), incorrect=(2,), corrupted=None, **more: Any) -> Pair:
    return Pair(tuple(clean), tuple(corrupted or (*clean[:-1], clean[-1] + 1)), correct, incorrect, **more)


def task(*pairs: Pair, metric: str = "logit_diff") -> Task:
    return Task("toy", pairs, METRICS[metric])


# --- Pair ---


def test_pair_names_its_last_position():
    assert pair(5, 6, 7, positions={"S1": 1}).positions == {"S1": 1, "END": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 2), (1,), (1,), (2,)), "clean has 2 tokens and corrupted 1. Patching needs equal lengths"),
        (((), (), (1,), (2,)), "no tokens"),
        (((1, 2), (1, 2), (1,), (2,)), "identical"),
        (((1, 2), (1, 3), (), (2,)), "no correct answer"),
        (((1, 2), (1, 3), (4, 5), (5,)), r"\[5\] are both correct and incorrect"),
        (((1, 2), (1, 3), (4,), (5,), {"S": 2}), r"position S is 2, outside a prompt of 2 tokens \(0 to 1\)"),
        (((1, 2), (1, 3), (4,), (5,), {"END": 0}), "END is 0; it names the last token, 1"),
    ],
)
def test_bad_pairs(arguments, message):
    with pytest.raises(TaskError, match=message):
        Pair(*arguments)


# --- Task ---


def test_batches_group_lengths_and_keep_the_order():
    four = task(pair(1, 2), pair(1, 2, 3, correct=(3, 4)), pair(4, 2), pair(5, 2))
    batches = four.batches(2)
    assert [batch.examples.tolist() for batch in batches] == [[0, 2], [3], [1]]
    assert batches[0].clean.tolist() == [[1, 2], [4, 2]]
    assert batches[0].corrupted.tolist() == [[1, 3], [4, 3]]
    assert batches[2].answers.correct.tolist() == [[3, 4]]
    assert [len(batch) for batch in four.batches()] == [3, 1]
    with pytest.raises(TaskError, match="batch_size is 0; it must be at least 1"):
        four.batches(0)


def test_roles_label_an_axis_that_is_aligned_by_index():
    axis = task(pair(5, 6, 7, positions={"S1": 1}), pair(8, 6, 9, positions={"S1": 1})).position_axis()
    assert axis.names is None
    assert axis.roles == ("", "S1", "END")


def test_positions_line_up_by_index_only_when_everything_agrees():
    axis = task(pair(1, 2), pair(3, 2)).position_axis()
    assert axis.names is None
    assert axis.index.tolist() == [[0, 1], [0, 1]]
    assert axis.tokens == (("[1]", "[2]"), ("[3]", "[2]"))


@pytest.mark.parametrize(
    "other",
    [
        pair(1, 2, 3, 4, positions={"S": 1}),
        pair(1, 2, 3, positions={"S": 1}, template="b"),
        pair(1, 2, 3, positions={"S": 1}),
    ],
)
def test_positions_line_up_by_name(other):
    two = task(pair(7, 8, 9, positions={"S": 0, "V": 1}, template="b" if other.template == "" and len(other) == 3 else "a"), other)
    axis = two.position_axis()
    assert axis.names == ("S", "END")
    assert axis.index.tolist() == [[0, 2], [1, len(other) - 1]]
    assert axis.tokens[0] == ("[7]", "[9]")


def test_same_template_but_other_roles_is_not_aligned():
    axis = task(pair(7, 8, 9, positions={"S": 0}), pair(7, 8, 9, positions={"S": 1})).position_axis()
    assert axis.names == ("S", "END")


def test_pairs_that_share_no_name_line_up_at_their_ends_and_say_so():
    axis = task(pair(1, 2), pair(1, 2, 3)).position_axis()
    assert axis.names == ("END",)
    assert axis.index.tolist() == [[1], [2]]
    assert "(lengths [2, 3], 1 template) share no named position but END, so positions are scored at END alone" in axis.note
    assert "2 templates" in task(pair(1, 2), pair(1, 2, 3, template="b")).position_axis().note
    assert task(pair(1, 2), pair(3, 2)).position_axis().note == ""


def test_prompts_bring_their_named_positions():
    two = task(pair(7, 8, 9, positions={"S": 0}), pair(7, 8, 9, positions={"S": 1, "V": 2}))
    prompts = two.prompts("corrupted")
    assert prompts.tokens.tolist() == [list(one.corrupted_ids) for one in two.pairs]
    assert {name: index.tolist() for name, index in prompts.positions.items()} == {"S": [0, 1], "END": [2, 2]}
    mixed = task(pair(1, 2), pair(1, 2, 3), pair(4, 2))
    with pytest.raises(TaskError, match=r"one length, and toy has lengths \[2, 3\]\. Run each of task.batches\(\) apart"):
        mixed.prompts("clean")
    assert mixed.batches()[0].prompts("clean").examples.tolist() == [0, 2]
    with pytest.raises(TaskError, match="unknown side 'cleen'.*clean, corrupted"):
        two.prompts("cleen")


def test_show_writes_tokens_positions_and_answers(demo_gpt2_4l, capsys):
    made = load_task("ioi", demo_gpt2_4l, n=5)
    made.show(2)
    text = capsys.readouterr().out
    assert text == made.describe(2) + "\n"
    first = made.pairs[0]
    clean, corrupted = (made.token_text(ids[first.positions["S2"]]) for ids in (first.clean_ids, first.corrupted_ids))
    assert next(line.split() for line in text.splitlines() if line.endswith("S2")) == [str(first.positions["S2"]), repr(clean), repr(corrupted), "S2"]
    assert f"pair 0: correct {made.token_text(first.correct[0])!r}, incorrect {made.token_text(first.incorrect[0])!r}" in text
    assert text.count("pair ") == 2
    assert text.endswith("... and 3 more pairs\n")
    assert "more" not in made.describe(None)
    assert "incorrect none" in task(pair(1, 2, incorrect=())).describe()


def test_prompts_longer_than_the_model_reads_are_refused_with_their_pair(gpt2_bpe):
    short = dataclasses.replace(gpt2_bpe, n_positions=10)
    with pytest.raises(TaskError, match="pair 0 of ioi has 1\\d tokens, and gpt2 reads 10 at most. Shorten or drop such pairs"):
        load_task("ioi", short, n=4)


def test_fingerprint_follows_ids_answers_and_metric():
    base = task(pair(1, 2))
    same = Task("other name", base.pairs, base.metric, {"seed": 1})
    assert same.fingerprint == base.fingerprint
    different = [task(pair(1, 3)), task(pair(1, 2, correct=(5,))), task(pair(1, 2, incorrect=(5,))), base.with_metric("prob_diff")]
    assert len({base.fingerprint, *(one.fingerprint for one in different)}) == 5


def test_select_with_metric_and_repr():
    three = task(pair(1, 2), pair(3, 2), pair(4, 5, 6))
    assert three.select(np.array([2, 0])).pairs == (three.pairs[2], three.pairs[0])
    assert three.select(np.array([False, True, False])).pairs == (three.pairs[1],)
    with pytest.raises(TaskError, match="a mask of 2 values cannot select from the 3 pairs of toy"):
        three.select(np.array([True, True]))
    assert repr(three) == "Task(toy[3], logit_diff, 2 to 3 tokens in 2 lengths; positions END)"
    assert repr(three.select([0]).with_metric("prob_diff")) == "Task(toy[1], prob_diff, 2 tokens; positions END)"
    with pytest.raises(TaskError, match=r"pairs \[3\] are not in toy, which has the pairs 0 to 2"):
        three.select([3])
    with pytest.raises(TaskError, match="has no pairs"):
        three.select([])


def test_accuracy_on_hand_made_logits():
    # the last token t wins: logit 1 for token t, and for t = 2 twice that for token 1
    def logits(row: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(12)
        values[row[-1]] = 1.0
        return values

    two = task(pair(0, 1, corrupted=(0, 2)), pair(3, 2, corrupted=(3, 1)))
    model = Stub(logits=logits)
    assert two.solved(model).tolist() == [True, False]
    assert two.accuracy(model) == {"clean": 0.5, "corrupted": 0.5}
    assert two.select([0]).accuracy(model) == {"clean": 1.0, "corrupted": 0.0}
    # without incorrect answers: the most likely token
    top = task(pair(0, 1, incorrect=()), pair(0, 4, incorrect=()), metric="neg_kl")
    assert top.solved(model).tolist() == [True, False]


def test_prob_diff_is_solved_by_total_probability():
    # two unlikely correct answers against one likelier one: mean logits and summed probabilities disagree
    values = torch.tensor([0.0, 1.0, 1.0, 1.3] + [-9.0] * 8)
    model = Stub(logits=lambda row: values)
    one = task(pair(5, 6, correct=(1, 2), incorrect=(3,)))
    assert not one.solved(model)[0]
    assert one.with_metric("prob_diff").solved(model)[0]


def test_a_model_with_a_smaller_vocabulary_is_refused():
    with pytest.raises(TaskError, match=r"token id 7 and stub a vocabulary of 7: the task was made for another tokenizer"):
        task(pair(1, 2, correct=(7,))).accuracy(Stub(vocab_size=7))


# --- generators ---

VARIANTS = [
    *((name, {}) for name in sorted(TASKS)),
    ("ioi", {"order": "BABA"}),
    ("ioi", {"order": "mixed", "template": "mixed"}),
    ("ioi", {"corruption": "abc"}),
    *(("agreement", {"variant": variant}) for variant in ("simple", "within_rc", "across_pp")),
    ("docstring", {"corruption": "rename"}),
    ("facts", {"relation": "language"}),
    ("facts", {"relation": "mixed"}),
    ("induction", {"length": 5, "repeat": 2}),
]


def check_pairs(made: Task) -> None:
    assert len({(pair.clean_ids, pair.corrupted_ids, pair.correct) for pair in made.pairs}) == 64
    for one in made.pairs:
        assert len(one.clean_ids) == len(one.corrupted_ids)
        assert one.incorrect
        text = made.tokenizer.decode(one.clean_ids)
        for token in (*one.correct, *one.incorrect):
            assert made.tokenizer.decode([token]).strip()
        if made.name in ("ioi", "docstring"):
            assert made.tokenizer.decode(one.correct).strip() in text


LARGE_VOCABULARY = ("arithmetic", "coloured_objects")
"""Tasks whose numbers or letters the packaged models don't have."""


@pytest.mark.parametrize(("name", "options"), [one for one in VARIANTS if one[0] not in LARGE_VOCABULARY])
def test_64_distinct_pairs_with_the_demo_vocabulary(name, options, demo_gpt2_4l):
    made = load_task(name, demo_gpt2_4l, **options)
    check_pairs(made)
    assert all(pair.clean_ids[0] == demo_gpt2_4l.bos_id for pair in made.pairs)
    assert demo_gpt2_4l.tokenizer.unk_token_id not in {token for pair in made.pairs for token in pair.clean_ids}
    assert made.position_axis().names == (
        None if options.get("template") != "mixed" and options.get("relation") != "mixed" else made.position_names()
    )


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_64_distinct_pairs_with_byte_pair_encoding(name, options, gpt2_bpe):
    made = load_task(name, gpt2_bpe, bos=False, **options)
    check_pairs(made)
    for one in made.pairs:
        if name != "greater_than":  # " 1500" is one token as text; the generator writes it as two
            assert tuple(made.tokenizer.encode(made.tokenizer.decode(one.clean_ids))) == one.clean_ids
            assert all(made.tokenizer.decode([token]).startswith(" ") for token in one.correct)


def words_of(made: Task, index: int, side: str = "clean_ids") -> list[str]:
    return [made.token_text(token).strip() for token in getattr(made.pairs[index], side)]


@pytest.mark.parametrize(("order", "first"), [("ABBA", "IO"), ("BABA", "S1")])
def test_ioi_roles(order, first, gpt2_bpe):
    made = load_task("ioi", gpt2_bpe, n=8, order=order)
    for i, one in enumerate(made.pairs):
        clean, corrupted, at = words_of(made, i), words_of(made, i, "corrupted_ids"), one.positions
        assert min(("IO", "S1"), key=lambda role: at[role]) == first
        assert clean[at["S1"]] == clean[at["S2"]] == made.token_text(one.incorrect[0]).strip()
        assert clean[at["IO"]] == corrupted[at["S2"]] == made.token_text(one.correct[0]).strip()
        assert [p for p, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b] == [at["S2"]]
        assert at["AFTER_S1"] == at["S1"] + 1


def test_ioi_abc_replaces_all_three_names_by_others(gpt2_bpe):
    made = load_task("ioi", gpt2_bpe, n=8, corruption="abc")
    for i, one in enumerate(made.pairs):
        clean, corrupted = words_of(made, i), words_of(made, i, "corrupted_ids")
        roles = [one.positions[role] for role in ("IO", "S1", "S2")]
        assert len({corrupted[p] for p in roles}) == 3
        assert not {corrupted[p] for p in roles} & set(clean)


def test_greater_than_answers(gpt2_bpe):
    made = load_task("greater_than", gpt2_bpe, n=20)
    assert made.metric.name == "prob_diff"
    for i, one in enumerate(made.pairs):
        year = int(words_of(made, i)[one.positions["YY"]])
        assert [int(made.token_text(token)) for token in one.correct] == list(range(year + 1, 100))
        assert [int(made.token_text(token)) for token in one.incorrect] == list(range(year + 1))
        assert words_of(made, i, "corrupted_ids")[one.positions["YY"]] == "01"
        assert words_of(made, i)[-1] == words_of(made, i)[one.positions["XX"]]


@pytest.mark.parametrize("variant", ["simple", "within_rc", "across_rc", "across_pp"])
def test_agreement_changes_only_the_subject(variant, gpt2_bpe):
    from patchlab.tasks.generators.words import PEOPLE, VERBS

    made = load_task("agreement", gpt2_bpe, n=16, variant=variant)
    for i, one in enumerate(made.pairs):
        clean, corrupted, at = words_of(made, i), words_of(made, i, "corrupted_ids"), one.positions["SUBJECT"]
        assert [p for p, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b] == [at]
        verb = made.token_text(one.correct[0]).strip()
        assert (clean[at] in PEOPLE) == (verb in VERBS)
        assert {clean[at], corrupted[at]} in [{singular, plural} for singular, plural in PEOPLE.items()]


def test_induction_positions(gpt2_bpe):
    made = load_task("induction", gpt2_bpe, n=4, bos=False)
    for one in made.pairs:
        at = one.positions
        assert one.clean_ids[at["A1"]] == one.clean_ids[at["END"]]
        assert one.clean_ids[at["B1"]] == one.correct[0]
        assert one.corrupted_ids[at["B1"]] == one.incorrect[0]


def test_seeds(demo_gpt2_4l):
    first, again, other = (load_task("ioi", demo_gpt2_4l, n=8, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert load_task("ioi", demo_gpt2_4l, n=4).pairs == first.pairs[:4]


def test_bos_and_provenance(demo_gpt2_4l):
    import json

    with_bos, without = load_task("ioi", demo_gpt2_4l, n=2), load_task("ioi", demo_gpt2_4l, n=2, bos=False)
    assert with_bos.pairs[0].clean_ids[1:] == without.pairs[0].clean_ids
    assert with_bos.pairs[0].positions["IO"] == without.pairs[0].positions["IO"] + 1
    assert (with_bos.provenance["bos"], without.provenance["bos"]) == (True, False)
    assert json.loads(json.dumps(with_bos.provenance)) == with_bos.provenance
    assert with_bos.provenance["options"] == {"order": "ABBA", "corruption": "s2_io", "template": "plain"}
    with pytest.raises(TaskError, match="stub has no bos token"):
        load_task("ioi", Stub(demo_gpt2_4l.tokenizer, demo_gpt2_4l.vocab_size), bos=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "iou",
            {},
            "unknown task 'iou'; did you mean 'ioi'[?] Valid: agreement, arithmetic, coloured_objects, docstring, facts, greater_than, induction, "
            "ioi, pronoun. Or the path",
        ),
        ("ioi", {"n": 0}, "n is 0; a task needs at least 1 pair"),
        ("ioi", {"ordr": "ABBA"}, "unknown option of the task ioi 'ordr'; did you mean 'order'[?] Valid: corruption, order, template"),
        ("ioi", {"order": "ABA"}, "unknown order 'ABA'.*Valid: ABBA, BABA, mixed"),
        ("ioi", {"corruption": "s2"}, "unknown corruption 's2'.*Valid: abc, s2_io"),
        ("ioi", {"template": "x"}, "unknown template 'x'.*mixed"),
        ("agreement", {"variant": "rc"}, "unknown variant 'rc'.*across_pp, across_rc, simple, within_rc"),
        ("docstring", {"corruption": "x"}, "unknown corruption 'x'.*Valid: rename, swap"),
        ("facts", {"relation": "x"}, "unknown relation 'x'.*Valid: capital, language, mixed"),
        ("facts", {"n": 10_000}, "gives only 380 distinct pairs with the tokenizer of demo-gpt2-4l; got n=10000"),
        ("induction", {"length": "8"}, "length of the task induction is of type int, such as 8; got '8'"),
        ("induction", {"length": 4, "repeat": 4}, "1 <= repeat < length; got repeat=4 and length=4"),
        ("induction", {"length": 500}, "common words are single tokens.*this task needs 501"),
        ("ioi", {"metric": "logit_dif"}, "unknown metric 'logit_dif'; did you mean 'logit_diff'"),
    ],
)
def test_bad_options(name, options, message, demo_gpt2_4l):
    with pytest.raises((TaskError, MetricError), match=message):
        load_task(name, demo_gpt2_4l, **options)


def test_generators_need_a_tokenizer():
    with pytest.raises(TaskError, match=r"stub has no tokenizer.*clean_ids and corrupted_ids"):
        load_task("ioi", Stub())


def test_a_vocabulary_without_the_words_is_refused(reference_dir):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference_dir / "models" / "gpt2-random")
    with pytest.raises(TaskError, match="only 0 of 48 names are single tokens for the tokenizer of stub, and this task needs 5"):
        load_task("ioi", Stub(tokenizer, len(tokenizer)))


def test_a_generator_name_is_taken_once():
    with pytest.raises(TaskError, match="there is already a task 'ioi'"):
        generator("ioi")(GENERATORS["ioi"].stream)


def test_only_correct(demo_gpt2_4l):
    # this model believes in men: it solves the pronoun pairs whose answer is "he"
    he = demo_gpt2_4l.tokenizer.convert_tokens_to_ids("he")
    model = Stub(demo_gpt2_4l.tokenizer, demo_gpt2_4l.vocab_size, 0, lambda row: torch.eye(demo_gpt2_4l.vocab_size)[he])
    made = load_task("pronoun", model, n=40, only_correct=True)
    assert len(made) == 40
    assert {pair.correct for pair in made.pairs} == {(he,)}
    every = load_task("pronoun", model, n=made.provenance["candidates"])
    assert tuple(pair for pair in every.pairs if pair.correct == (he,)) == made.pairs
    model.logits = lambda row: torch.zeros(model.vocab_size)
    with pytest.raises(TaskError, match="stub solves 0 of 640 pairs of pronoun; got n=64 with only_correct"):
        load_task("pronoun", model, only_correct=True)


def test_metrics_of_your_own(demo_gpt2_4l):
    def margin(logits, answers):
        return logits.gather(-1, answers.correct[:, :1])[:, 0] - logits.mean(-1)

    assert load_task("ioi", demo_gpt2_4l, n=4, metric=margin).metric.name == "margin"
    assert load_task("ioi", demo_gpt2_4l, n=4, metric="logprob_diff").metric is METRICS["logprob_diff"]
    with pytest.raises(MetricError, match="metric 'mixed' mixes examples"):
        load_task("ioi", demo_gpt2_4l, n=4, metric=Metric("mixed", lambda logits, a: margin(logits, a) - margin(logits, a).mean()))
