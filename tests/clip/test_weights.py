"""Weight files: what is read, what is refused, and what is said of a file that does not fit."""

import json
import os
import pickle
import socket
import zipfile
from urllib.parse import urlsplit

import open_clip
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from open_clip.model import build_model_from_openai_state_dict

from dfa.clip import build_clip
from dfa.clip.weights import read_weights
from tests.clip.models import assert_relative, load, normalized, picture, write_model


def test_random_weights_are_asked_for_by_name_and_follow_the_seed(tmp_path):
    path = write_model(tmp_path)
    state = torch.random.get_rng_state()
    first, again, other = load(path), load(path), load(path, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.visual.proj, again.visual.proj) and not torch.equal(first.visual.proj, other.visual.proj)
    with pytest.raises(ValueError, match="random"):
        load(path, checkpoint=None)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_half_precision_checkpoint_is_upcast(tmp_path, suffix):
    path, file = write_model(tmp_path), tmp_path / f"weights{suffix}"
    state = {name: value.half().contiguous() for name, value in build_clip(path).state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    else:
        safetensors.torch.save_file(state, file)
    clip = load(path, checkpoint=str(file))
    assert clip.visual.proj.dtype == clip.clip.text_projection.dtype == torch.float32
    assert torch.equal(clip.visual.proj, state["visual.proj"].float())


@pytest.mark.parametrize(
    "drop, add, message",
    [
        ("visual.ln_post.bias", {}, r"model.json: 1 missing keys \(visual.ln_post.bias\)"),
        (None, {"strange": torch.zeros(1)}, r"1 unexpected keys \(strange\)"),
        (None, {"visual.proj": torch.zeros(3, 3)}, r"visual.proj: \(3, 3\) in the file, \(32, 24\) in the model"),
        ("logit_scale", {"other": torch.zeros(1)}, r"missing keys \(logit_scale\); 1 unexpected keys \(other\)"),
    ],
)
def test_weights_of_another_model_are_named(tmp_path, drop, add, message):
    path, file = write_model(tmp_path), tmp_path / "weights.safetensors"
    state = dict(build_clip(path).state_dict()) | add
    state.pop(drop, None)
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match=message):
        load(path, checkpoint=str(file))


def scripted(tmp_path, top=None, name="archive.pt"):
    """A TorchScript archive of a CLIP, and that CLIP."""
    clip = build_clip(write_model(tmp_path, top)).half().float()
    torch.jit.script(clip).save(str(tmp_path / name))
    return tmp_path / name, clip


def with_description(archive, description):
    """The archive with another data.pkl."""
    changed = archive.with_name("changed.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, description if name.endswith("/data.pkl") else old.read(name))
    return changed


def test_a_torchscript_archive_gives_the_state_dict_of_its_model(tmp_path):
    file, clip = scripted(tmp_path)
    got = read_weights(file)
    assert got.tensors.keys() == clip.state_dict().keys() and got.quick_gelu is False
    assert all(torch.equal(got.tensors[name], value) for name, value in clip.state_dict().items())
    loaded = load(str(tmp_path / "model.json"), checkpoint=str(file))
    assert torch.equal(loaded.visual.proj, clip.visual.proj)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_traced_half_precision_archive_gives_what_open_clips_reader_of_it_gives(tmp_path):
    """As its files are: partly fp16, traced, with three notes, of a model that the names and shapes alone describe."""
    top = {"quick_gelu": True, "text_cfg": {"width": 128, "heads": 2, "layers": 2}}
    path = write_model(tmp_path, top, vision={"width": 128, "head_width": 64}, vocabulary=False)
    weights = build_clip(path).state_dict()
    notes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    model = build_model_from_openai_state_dict(weights | {name: torch.tensor(note) for name, note in notes.items()})
    text = open_clip.tokenize(["a photo of a red dog", "tree"])
    for name, note in notes.items():
        model.__dict__.pop(name, None)  # plain numbers in open_clip's class
        model.register_buffer(name, torch.tensor(note))
    traced = torch.jit.trace_module(
        model, {"encode_text": (text,), "encode_image": (normalized(picture()).half(),)}, check_trace=False
    )
    traced.save(str(tmp_path / "archive.pt"))
    assert model.visual.proj.dtype == torch.float16 and model.visual.ln_post.weight.dtype == torch.float32

    clip = load(path, checkpoint=str(tmp_path / "archive.pt"))
    theirs = model.float()
    bank_KE = clip.text_bank([("photo of a red dog",), ("tree",)], ["a {}."])
    assert_relative(
        bank_KE, theirs.encode_text(open_clip.tokenize(["a photo of a red dog.", "a tree."]), normalize=True)
    )
    found = clip.encode(
        picture(), bank_KE, token_blocks=0, attention_blocks=0, similarity="raw", surgery_blocks=0
    ).class_similarity_BK
    assert_relative(found, theirs.encode_image(normalized(picture()).float(), normalize=True) @ bank_KE.T)


class Malice:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_in_an_archive_is_executed(tmp_path):
    file, _ = scripted(tmp_path)
    attack = with_description(file, pickle.dumps(Malice(tmp_path / "owned"), protocol=2))
    pickle.loads(pickle.dumps(Malice(tmp_path / "would_work"), protocol=2))  # the attack is a real one
    assert (tmp_path / "would_work").exists()
    with pytest.raises(ValueError, match=r"archive.*calls posix\.mkdir, which is refused"):
        read_weights(attack)
    pickled = tmp_path / "pickled.pt"
    torch.save({"state_dict": Malice(tmp_path / "owned")}, pickled)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_weights(pickled)
    assert not (tmp_path / "owned").exists()


def storage_of(count):
    """Instructions that push one tensor of `count` numbers from storage 0, as TorchScript writes them."""
    return (
        b"\x80\x02c__torch__.a\nModule\n)\x81}(X\x06\x00\x00\x00weightctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
        b"K\x00(K" + bytes([count]) + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtRub."
    )


@pytest.mark.parametrize(
    "description, message",
    [
        (storage_of(9), r"reaches beyond its 4 numbers"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u", "cannot be read"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lsio.", "instruction OBJ|cannot be read"),
        (b"\x80\x02c__torch__.a\nModule\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "refers to itself"),
        (b"no pickle", "cannot be read"),
    ],
)
def test_a_damaged_or_malicious_description_is_told(tmp_path, description, message):
    file = tmp_path / "archive.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data.pkl", description)
    with pytest.raises(ValueError, match=message):
        read_weights(file)
    good = tmp_path / "good.pt"
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data.pkl", storage_of(4))
    assert read_weights(good).tensors["weight"].tolist() == [0.0] * 4


def test_a_storage_that_unpacks_to_more_than_its_file_is_refused(tmp_path):
    file = tmp_path / "archive.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data/0", bytes(10_000_000))
        archive.writestr("archive/data.pkl", storage_of(4))
    with pytest.raises(ValueError, match="larger than the file"):
        read_weights(file)


def test_a_file_of_another_kind_or_content_is_told(tmp_path):
    path = write_model(tmp_path)
    for name, content, message in (
        ("weights.npz", b"", "npz"),
        ("weights.safetensors", b"12345678", "no whole safetensors"),
        ("weights.pt", b"", "damaged"),
        ("weights.bin", b"garbage, no zip", "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path, checkpoint=str(tmp_path / name))
    torch.save({"epoch": 3, "model": torch.zeros(1)}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match=r"'epoch'.*no tensors"):
        load(path, checkpoint=str(tmp_path / "training.pt"))


def test_another_architecture_is_named_on_both_sides(tmp_path):
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(build_clip(write_model(tmp_path, vision={"width": 48, "layers": 2})).state_dict(), file)
    expected = "file holds a ViT of patch 8, width 48, 2 blocks.*model is a ViT of patch 8, width 32, 3 blocks"
    with pytest.raises(ValueError, match=expected):
        load(write_model(tmp_path), checkpoint=str(file))
    safetensors.torch.save_file({"vision_model.embeddings.class_embedding": torch.zeros(32)}, file)
    with pytest.raises(ValueError, match="transformers' names"):
        load(write_model(tmp_path), checkpoint=str(file))


@pytest.mark.parametrize("file_has, model_has", [(True, False), (False, True)])
def test_an_archive_of_the_other_activation_is_refused(tmp_path, file_has, model_has):
    file, _ = scripted(tmp_path, {"quick_gelu": file_has})
    with pytest.raises(ValueError, match=f'set "quick_gelu" to {str(file_has).lower()}.*modules of this TorchScript'):
        load(write_model(tmp_path, {"quick_gelu": model_has}), checkpoint=str(file))
    load(write_model(tmp_path, {"quick_gelu": file_has}), checkpoint=str(file))


def test_openais_state_dict_is_known_by_its_notes_and_needs_quickgelu(tmp_path):
    file = tmp_path / "weights.pt"
    notes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(11)}
    torch.save(build_clip(write_model(tmp_path)).state_dict() | notes, file)
    with pytest.raises(ValueError, match=r"trained with QuickGELU.*has GELU.*input_resolution"):
        load(write_model(tmp_path), checkpoint=str(file))
    load(write_model(tmp_path, {"quick_gelu": True}), checkpoint=str(file))


@pytest.mark.parametrize(
    "model, tag, right",
    [("ViT-B-16", "openai", "ViT-B-16-quickgelu"), ("ViT-L-14", "openai", "ViT-L-14-quickgelu")],
)
def test_a_tag_of_the_other_activation_is_refused_before_anything_is_fetched(model, tag, right):
    with pytest.raises(ValueError, match=f"trained with QuickGELU.*take {right}$"):
        load(model, checkpoint=tag)


def test_half_precision_matrices_without_a_word_on_the_activation_are_warned_of(tmp_path, caplog):
    # A bare state dict does not tell its activation: half precision, whatever it is stored in, is all there is to see.
    file, path = tmp_path / "weights.safetensors", write_model(tmp_path, vocabulary=False)
    full = build_clip(path).state_dict()
    for state, warned in ((full, False), ({name: value.half().float() for name, value in full.items()}, True)):
        caplog.clear()
        safetensors.torch.save_file(state, file)
        load(path, checkpoint=str(file))
        assert ("does not tell its activation" in caplog.text) == warned
    caplog.clear()
    quick = write_model(tmp_path, {"quick_gelu": True}, vocabulary=False)
    load(quick, checkpoint=str(file))
    assert not caplog.text
    safetensors.torch.save_file(full, file)
    load(quick, checkpoint=str(file))
    assert "if they are LAION's or DataComp's, set \"quick_gelu\" to false" in caplog.text


@pytest.mark.parametrize(("file_has", "model_has"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_description_beside_open_clips_weights_tells_their_activation(tmp_path, caplog, file_has, model_has):
    path = write_model(tmp_path, {"quick_gelu": model_has})
    file, beside = tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    safetensors.torch.save_file(build_clip(path).state_dict(), file)
    beside.write_text(json.dumps({"model_cfg": {"embed_dim": 24} | ({"quick_gelu": True} if file_has else {})}))
    if file_has == model_has:
        load(path, checkpoint=str(file))
        assert not caplog.text
    else:
        with pytest.raises(ValueError, match=r"told by open_clip_config\.json beside it"):
            load(path, checkpoint=str(file))
    beside.write_text("[]")
    with pytest.raises(ValueError, match=r"open_clip_config\.json is no description of open_clip's"):
        load(path, checkpoint=str(file))


@pytest.mark.parametrize(
    "model, checkpoint, message",
    [
        ("ViT-Z-99", "random", "ViT-Z-99.*list_models"),
        ("no/such.json", "random", "does not exist"),
        ("ViT-B-16-quickgelu", "opneai", "opneai.*openai"),
        ("ViT-B-16-SigLIP", "random", "timm"),
    ],
)
def test_unknown_models_and_tags_are_told(model, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        load(model, checkpoint=checkpoint)


def test_without_a_network_the_tag_and_the_way_out_are_named(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(
        ValueError,
        match=r"openai.*ViT-B-16-quickgelu.*https://openaipublic.*ViT-B-16\.pt.*timm/.*weights/.*clip\.checkpoint=",
    ):
        load("ViT-B-16-quickgelu", checkpoint="openai")


def test_numbers_that_are_not_finite_are_told(tmp_path):
    weights = build_clip(path := write_model(tmp_path)).state_dict()
    weights["visual.proj"][0, 0] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors holds numbers that are not finite.*visual\.proj"):
        load(path, checkpoint=str(tmp_path / "nan.safetensors"))


@pytest.mark.parametrize("content", [b"hello world", b"", b"\x80\x02", b"PK\x03\x04 and then nothing", bytes(64)])
def test_a_file_that_is_no_pickle_is_damaged(tmp_path, content):
    (tmp_path / "text.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*text\.pt is damaged"):
        read_weights(tmp_path / "text.pt")


@pytest.mark.parametrize(
    "model, message",
    [
        ("RN50", "'RN50' is no ViT.*patch_size, layers"),
        ("coca_ViT-B-32", "'coca_ViT-B-32' does not describe a CLIP.*multimodal"),
    ],
)
def test_models_that_are_no_clip_with_a_vit_are_told(model, message):
    with pytest.raises(ValueError, match=message):
        load(model)


def test_an_unknown_key_of_a_description_is_told(tmp_path):
    path = write_model(tmp_path, vision={"wdth": 8})
    with pytest.raises(ValueError, match=r"model\.json' does not describe a CLIP.*wdth"):
        load(path)


def test_where_no_name_resolves_the_hub_is_asked_once(monkeypatch):
    """Its client would ask twelve times, in 50 s."""
    asked = []

    def unknown(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"laion2b_s34b_b88k.*could not be fetched"):
        load("ViT-B-16", checkpoint="laion2b_s34b_b88k")
    assert asked == [urlsplit(constants.ENDPOINT).hostname] and not constants.HF_HUB_OFFLINE
