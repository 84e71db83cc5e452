"""Token rows of a corpus: generated sentences and files."""

import hashlib

import numpy as np
import pytest
import torch
from stub_model import Stub, with_gpt2_tokenizer

from patchlab import texts
from patchlab.errors import TextError


@pytest.fixture(scope="module")
def words(demo_gpt2_4l):
    """The packaged vocabulary without the model."""
    return Stub(demo_gpt2_4l.tokenizer, demo_gpt2_4l.vocab_size, demo_gpt2_4l.bos_id, name="words", n_positions=64)


@pytest.fixture(scope="module")
def gpt2_words(shared_dir):
    return with_gpt2_tokenizer(shared_dir)


def test_sentences(words):
    rows = texts.sentences(words, 20, seed=3)
    assert repr(rows) == "Texts(sentences, seed 3: 20 rows of 48 tokens)"
    assert len(rows) == 20
    assert rows.n_tokens == 960
    assert all(row[0] == 0 and (row[1:] != 0).all() for row in rows.rows)
    assert words.tokenizer.unk_token_id not in np.concatenate(rows.rows)
    again, other = texts.sentences(words, 20, seed=3), texts.sentences(words, 20, seed=4)
    assert all(map(np.array_equal, rows.rows, again.rows))
    assert not any(map(np.array_equal, rows.rows, other.rows))
    assert all(len(row) == 30 for row in texts.sentences(words, 2, length=30).rows)
    with pytest.raises(ValueError, match="read-only"):
        rows[0][0] = 1


def test_the_random_stream_of_the_training_text_is_what_it_was(words):
    """Else a packaged model that is trained anew would be another one."""
    rows = np.stack(texts.sentences(words, 100, seed=0).rows).astype(np.int16)
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "c2e2e2d4c0d02abf"


def test_sentences_that_cannot_be_made(words):
    for options in ({"n": 0}, {"length": 1}, {"swaps": 1.5}):
        with pytest.raises(TextError, match=r"sentences need n of at least 1, .* got n="):
            texts.sentences(words, **options)
    with pytest.raises(TextError, match=r"^a row of 65 tokens is longer than words reads \(64\)"):
        texts.sentences(words, 2, length=65)
    with pytest.raises(TextError, match=r"the sentences are those of the packaged models.*stub has no tokenizer.*texts\.read\(path, model\)"):
        texts.sentences(Stub(), 2)


def test_a_model_with_another_vocabulary_has_no_sentences(gpt2_words):
    with pytest.raises(TextError, match=r"the tokenizer of gpt2 doesn't take words apart at white space\. Give a text of your own"):
        texts.sentences(gpt2_words, 2)


def test_a_packed_file(words, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("The doctor was in the garden.\n\nMary was at the store with the doctor.\n", encoding="utf-8")
    ids = words.tokenizer.encode("The doctor was in the garden. Mary was at the store with the doctor.", add_special_tokens=False)
    rows = texts.read(file, words, length=6)
    assert [row.tolist() for row in rows.rows] == [[0, *ids[:5]], [0, *ids[5:10]], [0, *ids[10:15]], [0, *ids[15:]]]
    assert repr(rows) == "Texts(own.txt: 4 rows of 2 to 6 tokens)"
    assert len(texts.read(file, words).rows) == 1
    without = Stub(words.tokenizer, words.vocab_size, None)
    assert [row.tolist() for row in texts.read(file, without, length=8).rows] == [ids[:8], ids[8:]]


def test_a_file_of_lines(words, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("The doctor was in the garden.\n \nMary was at the store.", encoding="utf-8")
    rows = texts.read(str(file), words, lines=True)
    assert [words.tokenizer.decode(row[1:]) for row in rows.rows] == ["The doctor was in the garden .", "Mary was at the store ."]
    assert all(row[0] == 0 for row in rows.rows)


def test_line_breaks_reach_a_tokenizer_that_has_them(gpt2_words, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("One line\nand another", encoding="utf-8")
    (row,) = texts.read(file, gpt2_words).rows
    assert gpt2_words.tokenizer.decode(row[1:]) == "One line\nand another\n"


def test_files_that_cannot_be_read(words, tmp_path):
    file = tmp_path / "own.txt"
    with pytest.raises(TextError, match=r"there is no file .*own\.txt"):
        texts.read(file, words)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match=r"own\.txt cannot be read as a text in UTF-8: .*Convert it"):
        texts.read(file, words)
    file.write_text("\n \n")
    with pytest.raises(TextError, match=r"own\.txt holds no text"):
        texts.read(file, words)
    file.write_text("The doctor was\nin the zeppelin.\n")
    with pytest.raises(TextError, match=r"own\.txt, line 2: the tokenizer of words doesn't know 'zeppelin\.'"):
        texts.read(file, words)
    file.write_text("The doctor was\n" + "in " * 64)
    with pytest.raises(TextError, match=r"own\.txt, line 2: a row of 65 tokens is longer than words reads \(64\)"):
        texts.read(file, words, lines=True)
    with pytest.raises(TextError, match="a row of 65 tokens is longer"):
        texts.read(file, words, length=65)
    with pytest.raises(TextError, match="at least one token beside bos; got length=1"):
        texts.read(file, words, length=1)
    with pytest.raises(TextError, match="length=5 is for packed rows"):
        texts.read(file, words, length=5, lines=True)
    with pytest.raises(TextError, match="stub has no tokenizer"):
        texts.read(file, Stub())


def test_batches_have_every_row_once_in_rows_of_one_length():
    rows = texts.Texts("own", tuple(np.full(length, i) for i, length in enumerate([3, 5, 3, 3, 5])))
    found = list(rows.batches(tokens=6))
    assert [numbers.tolist() for numbers, _ in found] == [[0, 2], [3], [1], [4]]
    for numbers, ids in found:
        assert ids.dtype == torch.long
        assert ids.shape[0] * ids.shape[1] <= 6
        assert (ids == torch.from_numpy(numbers)[:, None]).all()
    assert len(list(rows.batches(tokens=1))) == 5, "a row that is longer than a batch goes alone"
    assert [row.tolist() for row in rows[1:3].rows] == [[1] * 5, [2] * 3]


def test_texts_without_tokens():
    with pytest.raises(TextError, match="own: texts are at least one row of at least one token; got 0 rows"):
        texts.Texts("own", ())
    with pytest.raises(TextError, match="got 2 rows"):
        texts.Texts("own", (np.array([1]), np.array([], dtype=np.int64)))
