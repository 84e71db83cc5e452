"""Loading models: local directories of six families, the hub (a local stand-in), devices, and what is refused."""

import inspect
import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from families import HEADS, LAYERS, VOCAB, WIDTH, bridged, hf_module
from hub_server import Hub
from safetensors.torch import load_file, save_file

import patchlab as pl
from patchlab.errors import InterventionError, ModelError

FAMILIES = {"gpt2": "gpt2", "pythia": "neox", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
TEXT = "w3 w14 w15"


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<bos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory per family, as ``save_pretrained`` writes it."""
    root = tmp_path_factory.mktemp("models")
    for name, family in FAMILIES.items():
        hf_module(family).save_pretrained(root / name)
        _save_tokenizer(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def llama_copy(directories: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama directory to damage."""
    return Path(shutil.copytree(directories["llama"], tmp_path / "damaged"))


@pytest.fixture(scope="session")
def llama(directories: dict[str, Path]) -> pl.Model:
    return pl.load_model(directories["llama"], device="cpu")


# --- local directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_local_directory_gives_the_logits_of_hugging_face(name: str, directories: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    model = pl.load_model(directories[name], device="cpu")
    with torch.no_grad():
        expected = hf_module(FAMILIES[name])(TOKENS).logits
    torch.testing.assert_close(model.run(TOKENS).logits, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert (model.name, model.vocab_size, model.bos_id) == (name, VOCAB, 1)
    assert (model.arch.n_layers, model.arch.n_heads, model.arch.d_model) == (LAYERS, HEADS, WIDTH)
    assert model.arch.n_kv_heads == (HEADS if name in ("gpt2", "pythia") else 2)
    assert list(model.arch.absent) == (["resid_mid"] if name == "pythia" else [])
    assert model.to_ids(TEXT) == [1, 3, 14, 15]
    assert model.tokenizer.decode([3, 14, 15]) == TEXT
    torch.testing.assert_close(model.run(TEXT).logits, model.run([1, 3, 14, 15]).logits, rtol=0, atol=0)
    assert not model.bridge.training
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_memory_is_the_one_of_its_directory(name: str, directories: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from_folder = pl.load_model(directories[name], device="cpu")
    module = AutoModelForCausalLM.from_pretrained(directories[name], attn_implementation="sdpa", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directories[name])
    model = pl.load_model(module.train(), tokenizer=tokenizer)
    assert model.fingerprint == from_folder.fingerprint
    assert model.arch.sites == from_folder.arch.sites  # patterns among them, which sdpa would not show
    assert not module.training
    torch.testing.assert_close(model.run(TEXT).logits, from_folder.run(TEXT).logits, rtol=0, atol=0)
    assert pl.load_model(hf_module(name), dtype="float64").dtype == torch.float64
    nameless = pl.load_model(hf_module(name))
    assert (nameless.tokenizer, nameless.name) == (None, type(hf_module(name)).__name__)


def test_what_is_no_model_in_memory_is_refused(directories: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"a Hugging Face causal language model; got Linear"):
        pl.load_model(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"a TransformerLens bridge already; use patchlab\.wrap_bridge"):
        pl.load_model(pl.load_model(directories["gpt2"], device="cpu").bridge)


def test_a_model_that_a_bridge_has_changed_is_refused() -> None:
    module = hf_module("llama")
    pl.load_model(module)
    with pytest.raises(ModelError, match="has been bridged before, which changes it; load or build it again"):
        pl.load_model(module)


def test_a_tokenizer_can_be_given_beside_a_directory(directories: dict[str, Path], llama_copy: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for file in llama_copy.glob("tokenizer*"):
        file.unlink()
    assert pl.load_model(llama_copy, device="cpu").tokenizer is None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directories["llama"])
    assert pl.load_model(llama_copy, tokenizer=tokenizer, device="cpu").to_ids(TEXT) == [1, 3, 14, 15]


def test_prompts_of_a_task_bring_their_positions(demo_gpt2_4l: pl.Model) -> None:
    task = pl.load_task("ioi", demo_gpt2_4l, n=4, order="mixed")
    clean = demo_gpt2_4l.run(task.prompts("clean"), keep="resid_pre")
    patched = demo_gpt2_4l.run(task.prompts("corrupted"), edits=[pl.Edit("L2.resid_pre@S2", clean)])
    places = torch.tensor([pair.positions["S2"] for pair in task.pairs])
    by_hand = demo_gpt2_4l.run(task.prompts("corrupted").tokens, edits=[pl.Edit("L2.resid_pre@S2", clean)], positions={"S2": places})
    torch.testing.assert_close(patched.logits, by_hand.logits, rtol=0, atol=0)
    assert not torch.equal(patched.logits, demo_gpt2_4l.run(task.prompts("corrupted")).logits)
    part = task.select([3, 1]).prompts("clean")
    assert demo_gpt2_4l.run(part).examples.tolist() == [0, 1]
    with pytest.raises(InterventionError, match=r"names the position 'S9'; this run knows"):
        demo_gpt2_4l.run(part, edits=[pl.Edit("L2.resid_pre@S9", pl.sources.zero())])
    with pytest.raises(InterventionError, match=r"the prompts have 65 tokens, and demo-gpt2-4l reads 64 at most"):
        demo_gpt2_4l.run([[1] * 65])


def test_the_qwen2_tokenizer_that_returns_nothing_is_not_used(directories: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(directories["qwen2"]).encode(TEXT) == [], "the trap is gone; this test can go"
    assert pl.load_model(directories["qwen2"], device="cpu").to_ids(TEXT, bos=False) == [3, 14, 15]


def test_both_names_of_the_tokenizer_class_load(llama_copy: Path) -> None:
    written = json.loads((llama_copy / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "TokenizersBackend"
    (llama_copy / "tokenizer_config.json").write_text(json.dumps({**written, "tokenizer_class": "PreTrainedTokenizerFast"}))
    assert pl.load_model(llama_copy, device="cpu").to_ids(TEXT) == [1, 3, 14, 15]


@pytest.mark.slow
def test_a_relative_path_a_string_and_a_home_directory(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, llama: pl.Model) -> None:
    monkeypatch.chdir(directories["llama"].parent)
    monkeypatch.setenv("HOME", str(directories["llama"].parent))
    for path in ("./llama", "llama", "~/llama", str(directories["llama"])):
        model = pl.load_model(path, device="cpu")
        assert (model.name, model.fingerprint) == ("llama", llama.fingerprint)


def test_without_tokenizer_files_there_is_no_tokenizer(llama_copy: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (llama_copy / file).unlink()
    model = pl.load_model(llama_copy, device="cpu")
    assert (model.tokenizer, model.bos_id) == (None, None)
    with pytest.raises(ModelError, match="damaged has no tokenizer; give token ids instead of text"):
        model.run("w3 w4")


def test_repr(directories: dict[str, Path], llama: pl.Model) -> None:
    assert repr(llama) == "Model(llama: LlamaForCausalLM, 3 layers, 4 heads (2 kv), d_model 16; torch.float32, cpu)"
    pythia = pl.load_model(directories["pythia"], device="cpu")
    assert repr(pythia) == "Model(pythia: GPTNeoXForCausalLM, 3 layers, 4 heads, d_model 16; torch.float32, cpu; absent: resid_mid)"


# --- damaged and unsuitable directories ----------------------------------------------------------------------------------


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the directory \S+ has no config.json; give a Hugging Face model directory"):
        pl.load_model(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"there is no directory \S*nothing; give a Hugging Face model directory, a hub name, or one of: .*demo-gpt2"
    ):
        pl.load_model(tmp_path / "nothing")


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _junk(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"junk" * 100)


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "why"),
    [(_cut, "incomplete metadata"), (_junk, "header too large"), (_remove, "no file named model.safetensors"), (_bad_config, "valid JSON")],
)
def test_damaged_files(damage, why: str, llama_copy: Path) -> None:
    damage(llama_copy)
    with pytest.raises(ModelError, match=rf"damaged: the files in \S+ could not be loaded as a causal language model: .*{why}"):
        pl.load_model(llama_copy, device="cpu")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("replacement", [None, torch.zeros(3, 4)], ids=["missing", "other shape"])
def test_weights_that_would_be_random_are_refused(replacement: torch.Tensor | None, llama_copy: Path) -> None:
    weights = load_file(llama_copy / "model.safetensors")
    del weights[UP]
    if replacement is not None:
        weights[UP] = replacement
    save_file(weights, llama_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 weights are missing from \S+ or have another shape than config.json says, such as {UP}"):
        pl.load_model(llama_copy, device="cpu")


def test_weights_that_are_no_numbers_are_named(llama_copy: Path) -> None:
    weights = load_file(llama_copy / "model.safetensors")
    weights[UP].view(-1)[:3] = float("nan")
    weights[UP].view(-1)[5] = float("-inf")
    save_file(weights, llama_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"damaged: 1 of \d+ parameters hold weights that are no numbers: {UP} \(3 NaN and 1 infinite of [\d,]+ values\)\. "
    ):
        pl.load_model(llama_copy, device="cpu")
    for one in weights.values():
        one.view(-1)[0] = float("inf")
    save_file(weights, llama_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"hold weights that are no numbers: .*\(1 infinite of [\d,]+ values\), and \d+ more"):
        pl.load_model(llama_copy, device="cpu")


def test_a_tokenizer_that_cannot_be_read(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"damaged: the tokenizer in \S+ cannot be used: .+ Check tokenizer.json"):
        pl.load_model(llama_copy, device="cpu")


def test_a_tokenizer_that_loses_its_words(llama_copy: Path) -> None:
    content = json.loads((llama_copy / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}  # letter by letter: all unknown
    (llama_copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be used: it does not turn its own tokens into ids and back. Check tokenizer.json"):
        pl.load_model(llama_copy, device="cpu")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=4, d_ff=32, d_kv=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded as a causal language model: Unrecognized configuration class .*T5Config"):
        pl.load_model(tmp_path, device="cpu")


def test_an_architecture_that_the_bridge_does_not_know(tmp_path: Path) -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    CTRLLMHeadModel(CTRLConfig(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, dff=32)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="TransformerLens cannot bridge CTRLLMHeadModel: Unsupported architecture"):
        pl.load_model(tmp_path, device="cpu")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, initializer_range=0.3)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(BertLMHeadModel\) is not a causal language model: the last token changes the logits before it"):
        pl.load_model(tmp_path, device="cpu")


# --- device and dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device 'cuda' was asked for, but this machine .* has no CUDA. Use device='cpu'"),
        ("cuda:3", "device 'cuda:3' was asked for, but this machine .* has no CUDA"),
        ("mps", "device 'mps' was asked for, but it is not available here. Use device='cpu'"),
        ("gpu", r"unknown device 'gpu'; give 'cpu', 'cuda', 'cuda:1' or 'mps' \(one device; device_map= keeps elsewhere what does not fit there\)"),
        ("auto", "unknown device 'auto'"),
        ("meta", "unknown device 'meta'"),
    ],
)
def test_devices_that_are_not_there(device: str, message: str, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=message):
        pl.load_model(directories["gpt2"], device=device)


def test_a_cuda_device_beyond_the_last(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="device 'cuda:1' was asked for, but this machine has 1 CUDA devices"):
        pl.load_model(directories["gpt2"], device="cuda:1")


@pytest.mark.parametrize(("present", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_cuda_if_present(present: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchlab.models.load import chosen_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert chosen_device(None) == torch.device(expected)


def test_no_device_is_written_into_the_code() -> None:
    """Outside the choice of the default, "cuda" may only be compared with."""
    package = Path(inspect.getfile(pl)).parent
    found = set()
    for path in package.rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\.cuda\(", line) or (re.search(r"""["']cuda(:\d+)?["']""", line) and '.type == "cuda"' not in line):
                found.add((path.relative_to(package).as_posix(), line.strip()))
    assert {name for name, _ in found} == {"models/load.py"}
    assert sum("return torch.device(" in line for _, line in found) == 1
    assert all("return torch.device(" in line or "give 'cpu'" in line or "not in (" in line for _, line in found), found


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int64", "Tensor", "fp16"])
def test_unknown_dtypes(dtype: str, directories: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=rf"unknown dtype '{dtype}';.* Valid: bfloat16, float16, float32, float64"):
        pl.load_model(directories["gpt2"], dtype=dtype)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_other_dtypes_pass_the_self_test(name: str, dtype: str | torch.dtype, directories: dict[str, Path]) -> None:
    model = pl.load_model(directories[name], device="cpu", dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float64)
    assert model.arch.absent == {}
    assert [place.name for place in model.arch.places if place.problem] == []
    assert model.run(TOKENS).logits.dtype == model.dtype


def test_a_model_whose_weights_are_nowhere_is_refused() -> None:
    module = hf_module("gpt2")
    model = bridged(module, "gpt2")
    mlp = module.transformer.h[1].mlp
    mlp.to("meta")
    with pytest.raises(ModelError, match=r"gpt2 has weights that hold no numbers \(.*1.* is on torch's meta device.*device_map="):
        pl.wrap_bridge(model.bridge, "gpt2")


# --- names and the hub ---------------------------------------------------------------------------------------------------


def _refused(name: str, message: str, *, within: float = 40.0) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match=message):
        pl.load_model(name, device="cpu")
    assert time.monotonic() - start < within


@pytest.mark.usefixtures("empty_cache")
def test_an_unknown_name_offline_lists_the_packaged_models() -> None:
    _refused(
        "demo-gtp2", r"unknown model 'demo-gtp2'; did you mean 'demo-gpt2'\? Valid: .*demo-gpt2.* not in the hub cache, and HF_HUB_OFFLINE is set"
    )
    _refused("not a name!", r"unknown model 'not a name!';.* Valid: .*demo-gpt2.* Or give a local directory or a hub name")


@pytest.mark.usefixtures("online")
def test_a_closed_port_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    _refused("gpt2", rf"unknown model 'gpt2'.* Valid: .*demo-gpt2.* not cached, and http://127.0.0.1:{port} did not answer within 2 s \(.*refused")


@pytest.mark.usefixtures("online")
def test_a_silent_port_is_asked_once_and_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        open_ones: list[socket.socket] = []

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                open_ones.append(connection)
                asked.append(connection.recv(4096))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        _refused("EleutherAI/pythia-70m", r"unknown model 'EleutherAI/pythia-70m'.* did not answer within 2 s \(.*timed out")
        server.shutdown(socket.SHUT_RDWR)
    thread.join(600)
    for connection in open_ones:
        connection.close()
    assert [request.split(b"\r\n")[0] for request in asked] == [b"HEAD /EleutherAI/pythia-70m/resolve/main/config.json HTTP/1.1"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "the hub has no such model, or it has no config.json. Or give a local directory"),
        (401, "the hub has no such model, or it is private: set HF_TOKEN if you have access"),
        (403, "access to it is restricted: set HF_TOKEN to a token that has access"),
        (500, r"the hub at http://127.0.0.1:\d+ answered with HTTP 500"),
    ],
)
def test_what_the_hub_says_is_passed_on(hub, status: int, message: str) -> None:
    hub.status = status
    _refused(
        "someone/tiny",
        rf"unknown model 'someone/tiny';.* Valid: .*demo-gpt2.* There is no such directory, it is not cached, and {message}",
    )
    assert hub.requests == ["HEAD /someone/tiny/resolve/main/config.json"]


def test_a_hub_model_is_downloaded_once_and_then_comes_from_the_cache(
    hub, directories, llama: pl.Model, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    hub.folder = directories["llama"]
    model = pl.load_model("someone/tiny", device="cpu")
    assert (model.name, model.fingerprint, model.to_ids(TEXT)) == ("someone/tiny", llama.fingerprint, [1, 3, 14, 15])
    torch.testing.assert_close(model.run(TOKENS).logits, llama.run(TOKENS).logits, rtol=0, atol=0)
    assert hub.requests[0] == "HEAD /someone/tiny/resolve/main/config.json"
    assert capfd.readouterr().out == ""
    asked = len(hub.requests)
    assert pl.load_model("someone/tiny", device="cpu").fingerprint == llama.fingerprint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pl.load_model("someone/tiny", device="cpu").fingerprint == llama.fingerprint
    assert len(hub.requests) == asked


def _put_in_cache(cache: Path, folder: Path, files: list[str]) -> Path:
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / Hub.commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(Hub.commit)
    for file in files:
        shutil.copy(folder / file, snapshot / file)
    return snapshot


def test_a_config_alone_in_the_cache_is_completed(hub, online: Path, directories, llama: pl.Model) -> None:
    _put_in_cache(online, directories["llama"], ["config.json"])
    hub.folder = directories["llama"]
    assert pl.load_model("someone/tiny", device="cpu").fingerprint == llama.fingerprint


def test_an_incomplete_cache_offline(empty_cache: Path, directories: dict[str, Path]) -> None:
    snapshot = _put_in_cache(empty_cache, directories["llama"], ["config.json"])
    _refused("someone/tiny", "unknown model 'someone/tiny'.* Its files in the hub cache are incomplete, and HF_HUB_OFFLINE is set")
    shutil.copy(directories["llama"] / "model.safetensors", snapshot / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    _refused("someone/tiny", "Its files in the hub cache are incomplete")


def test_a_hub_model_without_weights(hub, tmp_path: Path, directories: dict[str, Path]) -> None:
    (tmp_path / "only").mkdir()
    shutil.copy(directories["llama"] / "config.json", tmp_path / "only")
    hub.folder = tmp_path / "only"
    _refused("someone/tiny", r"someone/tiny has no weights that can be loaded \(\*.safetensors or \*.bin\) at http://127.0.0.1:\d+")


def test_a_download_that_breaks_off(hub, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.folder = directories["llama"]

    def broken(*args: object, **options: object) -> str:
        raise ConnectionError("the line went dead")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    _refused("someone/tiny", r"downloading someone/tiny from http://127.0.0.1:\d+ failed: the line went dead. Try again, or give a local directory")


@pytest.mark.parametrize("abroad", [False, True])
def test_the_token_is_sent_to_the_hub_and_to_nobody_else(hub, abroad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str | None]] = []
    other = f"http://localhost:{hub.server_address[1]}" if abroad else ""

    class Redirecting(Hub):
        def _answer(self) -> None:
            seen.append((self.headers["Host"].split(":")[0], self.path, self.headers["Authorization"]))
            self.send_response(404 if self.path == "/elsewhere" else 307)
            self.send_header("Location", f"{other}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET = _answer

    hub.RequestHandlerClass = Redirecting
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    _refused("someone/tiny", "downloading someone/tiny from .* failed" if abroad else "the hub has no such model")
    assert seen[0] == ("127.0.0.1", "/someone/tiny/resolve/main/config.json", "Bearer secret")
    assert {host for host, _, token in seen if token == "Bearer secret"} == {"127.0.0.1"}
    assert ("127.0.0.1", "/elsewhere", "Bearer secret") in seen or abroad


# --- running and fingerprints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [1, 2, 3]], r"a run needs prompts with one common number of tokens, at least 1; got \[2, 3\]. Run lengths apart"),
        (["w3 w4", "w3"], r"got \[2, 3\]"),
        ([], "got no prompts"),
        ([[]], r"got \[0\]"),
        ([[1, VOCAB]], rf"token ids must lie in 0 to {VOCAB - 1}; got 1 to {VOCAB}"),
        ([[-1, 2]], "got -1 to 2"),
    ],
)
def test_prompts_that_cannot_be_run(tokens, message: str, llama: pl.Model) -> None:
    with pytest.raises(InterventionError, match=message):
        llama.run(tokens)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), torch.tensor(3)])
def test_token_tensors_of_the_wrong_kind(tokens: torch.Tensor, llama: pl.Model) -> None:
    with pytest.raises(InterventionError, match=r"token ids are whole numbers of shape \[row, pos\]; got shape \["):
        llama.as_tokens(tokens)


def test_the_ways_to_give_prompts(llama: pl.Model) -> None:
    expected = llama.run(torch.tensor([[1, 3, 14]])).logits
    for tokens in ("w3 w14", ["w3 w14"], [1, 3, 14], [[1, 3, 14]], torch.tensor([1, 3, 14])):
        torch.testing.assert_close(inspect.unwrap(type(llama).run)(llama, tokens).logits, expected, rtol=0, atol=0)


def test_bos_where_there_is_none(llama_copy: Path) -> None:
    # the Bridge gives its tokenizer a bos token, which this vocabulary would read as <unk>
    config = json.loads((llama_copy / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (llama_copy / "tokenizer_config.json").write_text(json.dumps(config))
    model = pl.load_model(llama_copy, device="cpu")
    assert (model.bos_id, model.to_ids(TEXT)) == (None, [3, 14, 15])
    with pytest.raises(ModelError, match="the tokenizer of damaged has no bos token; use bos=False"):
        model.to_ids(TEXT, bos=True)


def test_the_fingerprint_sees_every_weight() -> None:
    first = bridged(hf_module("llama"), "a").fingerprint
    assert bridged(hf_module("llama"), "b").fingerprint == first
    module = hf_module("llama")
    with torch.no_grad():
        module.model.embed_tokens.weight[5, 7] *= 1.0001  # not among the sampled entries
    assert bridged(module, "c").fingerprint != first


def test_only_the_last_logits_equal_all_of_them(llama: pl.Model) -> None:
    assert llama.keeps_logits
    from patchlab.engine import Program, run

    examples = torch.arange(2)
    every = run(llama, Program(TOKENS, examples, logits="all")).logits
    last = run(llama, Program(TOKENS, examples, logits="answer")).logits
    torch.testing.assert_close(last, every[:, -1], rtol=1e-5, atol=1e-6)
