"""Dictionaries of the hub: what is asked, what is downloaded, and what is said where that cannot be."""

import socket

import pytest
from families import model_of

import patchlab as pl
from patchlab.errors import DictionaryError
from patchlab.features.hub import HubName
from patchlab.testing.dictionaries import random_dictionary


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2")


@pytest.fixture
def repository(tmp_path, model):
    """A repository with three dictionaries and more."""
    folder = tmp_path / "repository"
    for layer in range(3):
        random_dictionary(model, layer=layer).save(folder / "post" / f"layer_{layer}")
    (folder / "README.md").write_text("about")
    (folder / "post" / "layer_1" / "large.bin").write_bytes(b"0" * 1000)
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/repo", HubName("owner/repo")),
        ("owner/repo:folder", HubName("owner/repo", "folder")),
        ("owner/repo/layer_3/width_16k", HubName("owner/repo", "layer_3/width_16k")),
        ("hf://owner/repo.x/layer_3@v1", HubName("owner/repo.x", "layer_3", "v1")),
        ("owner/repo@main", HubName("owner/repo", "", "main")),
        ("nothing", None),
        ("/absolute/path", None),
        ("./relative/path", None),
        ("~/home/path", None),
    ],
)
def test_names_of_the_hub(text, name):
    assert HubName.parse(text) == name
    assert name is None or HubName.parse(str(name)) == name


def test_one_folder_is_downloaded_and_then_comes_from_the_cache(hub, repository, model, monkeypatch):
    hub.folder = repository
    dictionary = pl.load_dictionary("someone/tiny:post/layer_1", model)
    assert dictionary.identity == random_dictionary(model, layer=1).identity
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if request.startswith("GET") and "/resolve/" in request}
    assert fetched == {"post/layer_1/cfg.json", "post/layer_1/sae_weights.safetensors"}, "nothing else of the repository"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert pl.load_dictionary("someone/tiny/post/layer_1", model).identity == dictionary.identity
    assert len(hub.requests) == asked
    with pytest.raises(DictionaryError, match="the hub cache has other parts of someone/tiny, but not post/layer_2, and HF_HUB_OFFLINE is set"):
        pl.load_dictionary("someone/tiny:post/layer_2", model)


def test_all_of_a_repository(hub, repository, model):
    hub.folder = repository
    assert [dictionary.layer for dictionary in pl.load_dictionaries("someone/tiny", model)] == [0, 1, 2]
    with pytest.raises(DictionaryError, match="holds 3 folders of dictionaries; name one, as in someone/tiny:post/layer_0. Others: post/layer_1"):
        pl.load_dictionary("someone/tiny", model)
    with pytest.raises(DictionaryError, match=r"someone/tiny:pre at http://127.0.0.1:\d+ holds no files of dictionaries"):
        pl.load_dictionaries("someone/tiny:pre", model)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "the hub has no such repository"),
        (401, "the hub has no such repository, or it is private: set HF_TOKEN"),
        (403, "access to it is restricted: set HF_TOKEN"),
        (500, "answered with HTTP 500"),
    ],
)
def test_what_the_hub_says_is_passed_on(hub, model, status, message):
    hub.status = status
    with pytest.raises(DictionaryError, match=f"there is no folder someone/tiny:x, and as a name of the hub: .*{message}"):
        pl.load_dictionary("someone/tiny:x", model)
    assert len(hub.requests) == 1


@pytest.mark.usefixtures("empty_cache")
def test_offline_and_not_in_the_cache(model):
    with pytest.raises(DictionaryError, match="there is no folder someone/tiny; as a name of the hub it is not in the hub cache, and HF_HUB_OFFLINE"):
        pl.load_dictionary("someone/tiny", model)
    with pytest.raises(
        DictionaryError, match="no folder nothing; give one, a packaged model that has dictionaries .demo-gpt2, demo-llama., or a name of"
    ):
        pl.load_dictionary("nothing", model)
    with pytest.raises(DictionaryError, match="there is no folder /nothing/there"):
        pl.load_dictionary("/nothing/there", model)
    with pytest.raises(DictionaryError, match=r"'some--one/tiny' is no folder here and no name of the hub"):
        pl.load_dictionary("some--one/tiny", model)


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer(model, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(DictionaryError, match=rf"not in the hub cache, and http://127.0.0.1:{port} did not answer within 2 s"):
        pl.load_dictionary("someone/tiny", model)


def test_a_hub_that_does_not_answer_leaves_the_cache(hub, repository, model, monkeypatch):
    hub.folder = repository
    first = pl.load_dictionary("someone/tiny:post/layer_1", model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert pl.load_dictionary("someone/tiny:post/layer_1", model).identity == first.identity


def test_a_download_that_breaks_off(hub, repository, model, monkeypatch):
    hub.folder = repository

    def broken(*args: object, **options: object) -> str:
        raise ConnectionError("the line went dead")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(DictionaryError, match="downloading someone/tiny:post/layer_1 from .* failed: the line went dead. Try again"):
        pl.load_dictionary("someone/tiny:post/layer_1", model)
