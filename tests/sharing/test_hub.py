"""An adapter goes to the Hub in one commit and comes back bit for bit, through the client that everybody has."""

import base64
import copy
import json
import logging
import pickle
import re
import shutil
import traceback
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import peft
import pytest
import timm
import torch
from conftest import each_once, images
from hub.server import as_list, front_matter
from huggingface_hub import CommitInfo, HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from timm.models import save_for_hf

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import (
    AdapterError,
    AdapterFileError,
    AdapterTensorError,
    BaseRequiredError,
    ConfigError,
    FingerprintError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    NoSpaceError,
    TooLargeError,
)
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.hub import push_folder
from bn_affine_adapters.sharing.paths import local_paths, without_paths

NAME, REPO = "test_resnet", "alice/x"
PAIR = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
FILES = {".gitattributes", *PAIR}
DRAWN = {"gamma.png"} if find_spec("matplotlib") else set()
WHOLE = FILES | DRAWN | {"README.md"}
RESULTS = [{"dataset": "digits", "top1": 51.5, "seed": 7}]


@pytest.fixture
def repo(hub):
    """The repository alice/x as the Hub has it."""
    return lambda: hub.repos["models", REPO]


def paths(repo, revision="main"):
    return set(repo.tree(revision))


def push(adapter, repo_id=REPO, card=False, **options):
    """Push a model; most tests do without a card, whose figure takes longer than all the rest."""
    return adapter.model.push_to_hub(repo_id, card=card, **options)


def upload(hub, adapter, place="", id=REPO, **options):
    """Lay an adapter's two files into a new repository, past the push under test."""
    return hub.create(id, {place + name: (adapter.folder / name).read_bytes() for name in PAIR}, **options)


# The three ways to load: each returns a model whose active adapter came from the Hub.


def load_alone(adapter, **options):
    return load_bn_only_model(adapter, **options)


def load_with_peft(adapter, **options):
    return peft.PeftModel.from_pretrained(timm.create_model(NAME, num_classes=3), adapter, **options).eval()


def load_as_second(adapter, **options):
    model = get_bn_only_model(timm.create_model(NAME, num_classes=3), BNOnlyConfig(seed=7)).eval()
    model.load_adapter(adapter, "second", **options)
    model.set_adapter("second")
    return model


DOORS = {"load_bn_only_model": load_alone, "from_pretrained": load_with_peft, "load_adapter": load_as_second}


def downloaded(hub):
    """The names of all files that were asked for, even if only for their size."""
    found = [re.search(r"/resolve/[^/]+/([^?]+)", request.path) for request in hub.requests]
    return {unquote(hit[1]) for hit in found if hit}


# -- the round


TRANSFERS = ["xet", "lfs"]
private = pytest.mark.parametrize("private", [False, True], ids=["public", "private"])


@private
def test_a_push_and_a_load_give_bit_identical_logits(private, versions, hub, transfer, alice, here, repo):
    info = push(versions[0], private=private, token=alice)
    assert isinstance(info, CommitInfo)
    assert info.oid == repo().branches["main"]
    assert repo().private == private
    again = load_bn_only_model(REPO, token=alice)
    assert torch.equal(again(images()), versions[0].logits)
    assert any("/cas/" in request.path for request in hub.requests) == (transfer == "xet")
    assert not list(here.iterdir())
    up, down = hub.bytes_sent()
    size = sum((versions[0].folder / name).stat().st_size for name in PAIR)
    print(f"{transfer}: an adapter of {size:,} bytes went to the Hub and back with {up:,} bytes up and {down:,} down")
    assert down < size + 20_000
    assert up < size + 30_000


def test_a_push_is_one_commit_with_the_whole_adapter_and_a_valid_card(versions, hub, alice, repo):
    others_pass = {"max_shard_size": "5GB", "safe_serialization": True, "use_temp_dir": True}
    words = {"commit_message": "The first", "commit_description": "It has five lines."}
    push(versions[0], token=alice, card=True, tags=["tiny"], license="apache-2.0", **words, **others_pass)
    assert [commit["title"] for commit in repo().history()] == ["The first", "initial commit"]
    assert repo().history()[0]["message"] == "It has five lines."
    assert paths(repo()) == WHOLE
    for name in PAIR:
        assert hub.content(repo().tree()[name]) == (versions[0].folder / name).read_bytes()
    for name in DRAWN:
        assert hub.content(repo().tree()[name]).startswith(b"\x89PNG")
    meta, errors, warnings = front_matter(hub.content(repo().tree()["README.md"]).decode())
    assert errors == warnings == []
    assert "tiny" in as_list(meta["tags"])
    assert "license:apache-2.0" in HfApi().model_info(REPO).tags


@pytest.mark.parametrize("kind", ["list", "file"])
def test_results_go_along(kind, versions, hub, alice, repo, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(result) + "\n" for result in RESULTS))
    push(versions[0], token=alice, card=True, results=RESULTS if kind == "list" else file)
    assert paths(repo()) == WHOLE | {"results.json"}
    assert "51.5" in hub.content(repo().tree()["results.json"]).decode()


def test_a_saved_folder_is_pushed_as_the_model_would_be(versions, hub, alice, repo):
    before = {path.name: path.read_bytes() for path in versions[0].folder.iterdir()}
    push_folder(versions[0].folder, REPO, token=alice)
    one = {name: hub.content(blob) for name, blob in repo().tree().items()}
    assert {path.name: path.read_bytes() for path in versions[0].folder.iterdir()} == before
    push(versions[0], token=alice, card=True)
    assert {name: hub.content(blob) for name, blob in repo().tree().items()} == one
    assert len(repo().history()) == 2


def test_another_adapter_of_a_model_is_pushed_by_its_name(versions, alice, hub, repo, here):
    model = load_as_second(versions[1].folder)
    model.set_adapter("default")
    model.push_to_hub(REPO, token=alice, adapter_name="second")
    assert paths(repo()) == WHOLE
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[1].logits)
    assert not list(here.iterdir())


def test_results_that_cannot_be_read_are_refused_before_anything_is_made(versions, alice, hub, refused, here):
    with refused(ConfigError, "results"):
        push(versions[0], token=alice, revision="further", results=[{"accuracy": 1}])
    assert not hub.repos


@pytest.mark.parametrize(("name", "id"), [("x", REPO), ("acme/x", "acme/x")])
def test_a_name_alone_is_the_tokens_owners_and_an_organisation_is_named(name, id, versions, alice, hub):
    push(versions[0], name, token=alice)
    assert set(hub.repos) == {("models", id)}
    assert torch.equal(load_bn_only_model(id)(images()), versions[0].logits)


def test_the_token_of_the_environment_is_used(versions, alice, hub, monkeypatch, repo):
    monkeypatch.setenv("HF_TOKEN", alice)
    push(versions[0], private=True)
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[0].logits)
    assert repo().private


# -- pushing again


def test_pushing_again_commits_what_changed_alone(versions, hub, transfer, alice, repo):
    def push_again(adapter, **options):
        """Push, and return the paths in the commit, and those of the requests."""
        start = len(hub.requests)
        info = push(adapter, token=alice, card=True, **options)
        assert info.oid == repo().branches["main"]
        asked = hub.requests[start:]
        commits = [request for request in asked if "/commit/" in request.path]
        lines = [json.loads(line) for request in commits for line in request.body.splitlines()]
        return {line["value"].get("path") for line in lines} - {None}, [request.path for request in asked]

    push(versions[0], token=alice, card=True)
    assert push_again(versions[0])[0] == set()
    assert len(repo().history()) == 2

    sent, _ = push_again(versions[1])
    old, new = repo().tree(repo().history()[1]["id"]), repo().tree()
    assert len(repo().history()) == 3
    assert sent == {name for name in new if new[name].oid != old[name].oid}
    assert {SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME} <= sent  # the configuration has the tensors' digest
    assert ".gitattributes" not in sent
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[1].logits)

    sent, asked = push_again(versions[1], results=RESULTS)
    assert len(repo().history()) == 4
    assert SAFETENSORS_WEIGHTS_NAME not in sent
    assert not [path for path in asked if re.search("/cas/v1/xorbs/|^/lfs/", path)]


def test_files_that_somebody_added_stay(versions, hub, alice, repo):
    upload(hub, versions[0])
    HfApi(token=alice).upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)
    push(versions[1], token=alice)
    assert paths(repo()) == FILES | {"notes.txt"}


# -- tags, branches, pull requests, commits


@each_once(kind=["tag", "branch", "commit", "pull request"], load=DOORS, transfer=TRANSFERS, indirect=["transfer"])
def test_every_revision_loads_as_it_was(kind, load, versions, hub, transfer, alice):
    first = push(versions[0], token=alice, tag="v1")
    push(versions[1], token=alice, revision="further" if kind == "branch" else None, create_pr=kind == "pull request")
    revision, expected = {
        "tag": ("v1", versions[0]),
        "branch": ("further", versions[1]),
        "commit": (first.oid, versions[0]),
        "pull request": ("refs/pr/1", versions[1]),
    }[kind]
    assert torch.equal(load(REPO, revision=revision)(images()), expected.logits)


def test_a_tag_is_put_on_the_commit_or_on_what_is_there_and_never_moved(versions, hub, alice, repo, refused, here):
    first = push(versions[0], token=alice, tag="v1")
    assert repo().tags == {"v1": first.oid}
    push(versions[0], token=alice, tag="v2")
    assert repo().tags == {"v1": first.oid, "v2": first.oid}
    with refused(HubConflictError, "'v1'", "another tag"):
        push(versions[1], token=alice, tag="v1")
    assert repo().tags == {"v1": first.oid, "v2": first.oid}
    assert repo().branches == {"main": first.oid}


def test_a_branch_is_made_and_main_stays(versions, hub, alice, repo):
    first = push(versions[0], token=alice)
    info = push(versions[1], token=alice, revision="further")
    assert repo().branches == {"main": first.oid, "further": info.oid}
    again = push(versions[1], token=alice, revision="further")
    assert again.oid == info.oid


@pytest.mark.parametrize("who", ["the owner", "one without the right to write"])
def test_a_pull_request_leaves_main_alone(who, versions, hub, transfer, alice, bob, repo):
    first = push(versions[0], token=alice)
    info = push(versions[1], token=alice if who == "the owner" else bob, create_pr=True)
    assert repo().branches == {"main": first.oid}
    assert info.pr_revision == "refs/pr/1"
    assert paths(repo(), "refs/pr/1") == FILES
    assert torch.equal(load_bn_only_model(REPO, revision="refs/pr/1")(images()), versions[1].logits)


# -- loading


@each_once(place=["nested/2/", "runs/"], load=DOORS)
def test_an_adapter_in_a_subfolder_loads(place, load, versions, hub):
    upload(hub, versions[0], place)
    assert torch.equal(load(REPO, subfolder=place.rstrip("/"))(images()), versions[0].logits)
    assert downloaded(hub) == {place + name for name in PAIR}


@each_once(load=DOORS, transfer=TRANSFERS, indirect=["transfer"])
def test_loading_asks_for_two_files_and_no_other_and_once(load, versions, hub, transfer, alice):
    push(versions[0], token=alice, card=True, results=RESULTS)
    hub.requests.clear()
    assert torch.equal(load(REPO)(images()), versions[0].logits)
    assert downloaded(hub) == PAIR
    asked = {request.path.partition("?")[0] for request in hub.requests}
    assert not [path for path in asked if not re.search("/resolve/|/cas/|/cdn/|/xet-read-token/", path)]
    hub.requests.clear()
    load(REPO)
    assert hub.requests
    assert not [request.path for request in hub.requests if request.method != "HEAD"]


def test_an_adapter_loads_into_a_cache_of_ones_own(versions, hub, tmp_path):
    upload(hub, versions[0])
    load_bn_only_model(REPO, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--alice--x").is_dir()
    assert not (tmp_path / "hub-cache").exists()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_choices_of_a_load_hold_for_the_hub_too(is_trainable, versions, hub):
    upload(hub, versions[0])
    model = load_bn_only_model(
        REPO, adapter_name="other", is_trainable=is_trainable, verify="sampled", dtype=torch.float64
    )
    assert list(model.peft_config) == ["other"]
    assert any(parameter.requires_grad for parameter in model.parameters()) == is_trainable
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_an_adapter_loads_on_a_network_given(versions, hub):
    upload(hub, versions[0])
    model = load_bn_only_model(REPO, timm.create_model(NAME, num_classes=3))
    assert torch.equal(model(images()), versions[0].logits)


def test_a_folder_goes_before_a_repository_of_its_name(versions, hub, here):
    upload(hub, versions[0])
    shutil.copytree(versions[1].folder, here / REPO)
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[1].logits)
    assert not hub.requests


# -- offline


@pytest.fixture(params=["HF_HUB_OFFLINE", "local_files_only", "the Hub is down"])
def offline(request, hub, out_of_reach, monkeypatch):
    """Go offline; return the arguments that a load then needs."""

    def go():
        hub.requests.clear()
        if request.param == "HF_HUB_OFFLINE":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        elif request.param == "the Hub is down":
            out_of_reach()
        return {"local_files_only": True} if request.param == "local_files_only" else {}

    yield go
    assert not hub.requests


@each_once(
    offline=["HF_HUB_OFFLINE", "local_files_only", "the Hub is down"],
    revision=[None, "v1", "commit"],
    transfer=TRANSFERS,
    indirect=["offline", "transfer"],
)
def test_a_cached_adapter_loads_offline(revision, offline, versions, hub, transfer, alice):
    info = push(versions[0], token=alice, tag="v1")
    revision = info.oid if revision == "commit" else revision
    load_bn_only_model(REPO, revision=revision)
    assert torch.equal(load_bn_only_model(REPO, revision=revision, **offline())(images()), versions[0].logits)


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_a_cached_adapter_loads_offline_with_peft(door, versions, hub, monkeypatch):
    upload(hub, versions[0])
    DOORS[door](REPO)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(DOORS[door](REPO)(images()), versions[0].logits)
    assert not hub.requests


def test_offline_main_is_the_commit_seen_last(versions, hub, alice):
    push(versions[0], token=alice)
    load_bn_only_model(REPO)
    push(versions[1], token=alice)
    assert torch.equal(load_bn_only_model(REPO, local_files_only=True)(images()), versions[0].logits)
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[1].logits)


def test_offline_with_nothing_cached_says_so(offline, versions, hub, refused):
    upload(hub, versions[0])
    with refused(HubUnavailableError, REPO) as caught:
        load_bn_only_model(REPO, **offline())
    assert caught.value.status is None


def test_another_revision_than_the_cached_one_is_not_taken_for_it(versions, hub, alice, refused):
    push(versions[0], token=alice, tag="v1")
    load_bn_only_model(REPO)
    with refused(HubUnavailableError, "cache"):
        load_bn_only_model(REPO, revision="v2", local_files_only=True)


# -- rights


@each_once(door=["load_bn_only_model", "load_adapter"], who=["bob", "nobody"])
def test_a_private_adapter_is_not_seen_by_others(who, door, versions, hub, alice, bob):
    push(versions[0], token=alice, private=True)
    with pytest.raises((HubNotFoundError, HubAccessError), match="token") as caught:
        DOORS[door](REPO, token=bob if who == "bob" else None)
    assert caught.value.status == (404 if who == "bob" else 401)


@each_once(load=DOORS, transfer=TRANSFERS, indirect=["transfer"])
def test_a_private_adapter_is_seen_by_its_owner(load, versions, hub, alice, transfer):
    push(versions[0], token=alice, private=True)
    assert torch.equal(load(REPO, token=alice)(images()), versions[0].logits)


@pytest.mark.parametrize(("who", "status"), [("bob", 403), ("nobody", 401)])
def test_a_gated_adapter_asks_for_access(who, status, versions, hub, bob, refused):
    upload(hub, versions[0]).gated = True
    with refused(HubAccessError, REPO, "access" if who == "bob" else "hf auth login") as caught:
        load_bn_only_model(REPO, token=bob if who == "bob" else None)
    assert caught.value.status == status


PUSHERS = {"bob": ("hf_bob_write", 403), "a reader": ("hf_alice_read", 403), "a stranger": ("hf_wrong", 401)}


@each_once(who=[*PUSHERS, "nobody"], there={"existing": True, "new": False})
def test_a_push_to_anothers_namespace_is_refused(who, there, versions, hub, refused, here):
    if there:
        before = upload(hub, versions[0]).branches.copy()
    token, status = PUSHERS.get(who, (None, 401))
    with refused(HubAccessError, REPO, "token") as caught:
        push(versions[1], token=token)
    assert caught.value.status == status
    assert set(hub.repos) == ({("models", REPO)} if there else set())
    if there:
        assert hub.repos["models", REPO].branches == before


@pytest.mark.parametrize("what", ["repository", "revision"])
def test_what_is_not_there_is_named(what, versions, hub, alice, refused):
    upload(hub, versions[0])
    with refused(HubNotFoundError, "alice") as caught:
        load_bn_only_model("alice/y" if what == "repository" else REPO, revision="v9", token=alice)
    assert caught.value.status == 404


@pytest.mark.parametrize("name", ["alice/x/y", "alice/", "a b/c", "alice/x..y", "-alice/x"])
def test_what_is_no_name_of_a_repository_is_refused_on_a_push(name, versions, hub, alice, here):
    with pytest.raises((ConfigError, HubError)) as caught:
        push(versions[0], name, token=alice)
    assert caught.value.do
    assert not hub.repos


# -- what others may have put there


BROKEN = {
    "a pickle alone": (
        {SAFETENSORS_WEIGHTS_NAME: None, WEIGHTS_NAME: pickle.dumps({})},
        AdapterFileError,
        "is a pickle and is never loaded",
    ),
    "no tensors": ({SAFETENSORS_WEIGHTS_NAME: None}, AdapterFileError, SAFETENSORS_WEIGHTS_NAME),
    "no configuration": ({CONFIG_NAME: None}, HubNotFoundError, CONFIG_NAME),
    "truncated": ({SAFETENSORS_WEIGHTS_NAME: b"\0" * 100}, AdapterFileError, "not a whole safetensors file"),
    "no JSON": ({CONFIG_NAME: b"<html>"}, AdapterFileError, "not a JSON file"),
    "another method": ({CONFIG_NAME: b'{"peft_type": "LORA"}'}, AdapterFileError, "LORA"),
    "too much JSON": ({CONFIG_NAME: b'{"x": "' + b" " * 10_000_000 + b'"}'}, TooLargeError, "bytes"),
}


@each_once(fault=BROKEN, door=["load_bn_only_model", "load_adapter"])
def test_a_broken_repository_is_refused(fault, door, versions, hub, refused):
    changes, kind, words = fault
    files = {name: (versions[0].folder / name).read_bytes() for name in PAIR} | changes
    hub.create(REPO, {name: content for name, content in files.items() if content is not None})
    with refused(kind, words):
        DOORS[door](REPO)
    fetched = [request.path for request in hub.requests if request.method == "GET"]
    assert not [path for path in fetched if WEIGHTS_NAME in path]


def test_an_adapter_of_another_network_is_refused_and_leaves_the_cache_usable(versions, hub):
    upload(hub, versions[0])
    with pytest.raises((AdapterTensorError, FingerprintError)):
        load_bn_only_model(REPO, timm.create_model("test_byobnet", num_classes=3))
    assert torch.equal(load_bn_only_model(REPO, local_files_only=True)(images()), versions[0].logits)


# -- a full disk, a real one


def fill(folder, leave):
    """Fill a file system but for so many bytes."""
    file = folder / "filler"
    with file.open("wb") as out:
        out.write(bytes(max(shutil.disk_usage(folder).free - leave, 0)))
    return file


@pytest.mark.parametrize("leave", [0, 8_000])
def test_a_disk_that_fills_up_while_saving_loses_nothing(leave, versions, small_disk, refused):
    versions[0].model.save_pretrained(small_disk / "adapter")
    before = {path.name: path.read_bytes() for path in (small_disk / "adapter").iterdir()}
    filler = fill(small_disk, leave)
    with refused(NoSpaceError, "small-disk", "free some space"):
        versions[1].model.save_pretrained(small_disk / "adapter")
    assert {path.name: path.read_bytes() for path in (small_disk / "adapter").iterdir()} == before
    assert {path.name for path in small_disk.iterdir()} == {"adapter", "filler"}, "a scratch folder was left behind"
    filler.unlink()
    versions[1].model.save_pretrained(small_disk / "adapter")
    assert torch.equal(load_bn_only_model(small_disk / "adapter")(images()), versions[1].logits)


@pytest.mark.parametrize("leave", [0, 16_000])
def test_a_disk_that_fills_up_while_downloading_leaves_a_usable_cache(
    leave, versions, hub, transfer, alice, small_disk
):
    push(versions[0], token=alice)
    filler = fill(small_disk, leave)
    with pytest.raises(NoSpaceError, match="free some space"):
        load_bn_only_model(REPO, cache_dir=small_disk / "cache")
    filler.unlink()
    assert torch.equal(load_bn_only_model(REPO, cache_dir=small_disk / "cache")(images()), versions[0].logits)


@pytest.mark.parametrize("leave", [0, 8_000, 40_000])
def test_a_disk_that_is_full_while_pushing_leaves_nothing_unnamed(leave, versions, hub, alice, small_disk, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    fill(small_disk, leave)
    with pytest.raises(NoSpaceError, match="free some space") as caught:
        push(versions[0], token=alice)
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())
    named = re.findall(r"bn-adapters push (\S+)", caught.value.do)
    assert [path for path in small_disk.iterdir() if path.is_dir()] == [*map(Path, named)]


# -- the token is nobody else's business


def everything(error):
    """All texts by which an error may come to light."""
    whole = "".join(traceback.format_exception(error))
    return [str(error), repr(error), whole, repr(pickle.loads(pickle.dumps(error))), repr(vars(error))]


@each_once(where=["create", "preupload", "commit", "tag", "resolve"], given=["argument", "environment"])
def test_no_error_and_no_log_names_the_token(where, given, versions, hub, alice, caplog, monkeypatch, here):
    if where != "create":
        upload(hub, versions[0])
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", alice)
    token = {"token": alice} if given == "argument" else {}
    fault = hub.fail("*", where, 403, 10**6, X_Error_Message=f"the token {alice} has no right to this")
    caplog.set_level(logging.DEBUG, "bn_affine_adapters")
    with pytest.raises(HubError) as caught:
        load_bn_only_model(REPO, **token) if where == "resolve" else push(versions[1], tag="v1", **token)
    assert fault.hits
    texts = everything(caught.value)
    assert len(texts) == 5
    assert not [text for text in texts if alice in text]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("bn_affine_adapters")]
    assert alice not in "".join(ours)


def test_nothing_that_is_pushed_names_the_token(versions, hub, alice, repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", alice)
    other = "hf_" + "aB3" * 11
    results = [{**RESULTS[0], "command": f"HF_TOKEN={alice} OTHER={other} accelerate launch"}]
    push(versions[0], token=alice, card=True, results=results)
    sent = [hub.content(blob) for blob in repo().tree().values()]
    assert len(sent) == len(WHOLE) + 1
    assert sum(b"accelerate launch" in data for data in sent) == 2
    assert not [data for data in sent if other.encode() in data]
    assert not [data for data in sent if alice.encode() in data or base64.b64encode(alice.encode()) in data]
    assert not [commit for commit in repo().history() if alice in f"{commit['title']} {commit['message']}"]


# -- a base with weights of its own

BASE = "timm/test_resnet.r160_in1k"


@pytest.fixture
def publish(hub, tmp_path):
    """Publish pretrained weights as timm does, in one commit, and return that commit."""

    def new(seed):
        torch.manual_seed(seed)
        save_for_hf(timm.create_model(NAME), tmp_path / "base", safe_serialization=True)
        data = (tmp_path / "base" / "model.safetensors").read_bytes()
        if ("models", BASE) not in hub.repos:
            hub.create(BASE, {})
        repo = hub.repos["models", BASE]
        tree = {**repo.tree(), "model.safetensors": hub.store("model.safetensors", data)}
        repo.branches["main"] = repo.add(f"weights {seed}", "", tree, repo.branches["main"], "alice")
        return repo.branches["main"]

    return new


def adapted(train_step, config=None, **arguments):
    torch.manual_seed(3)  # draws a head of other classes
    model = get_bn_only_model(timm.create_model(NAME, pretrained=True, **arguments), config or BNOnlyConfig())
    return train_step(model)


def pushed_config(hub, repo):
    return json.loads(hub.content(repo().tree()[CONFIG_NAME]))


def with_head():
    return BNOnlyConfig(train_head=True)


@pytest.mark.parametrize("head", [False, True], ids=["its own head", "a new head"])
def test_an_adapter_on_pretrained_weights_brings_them_along(
    head, publish, hub, transfer, alice, train_step, repo, tmp_path
):
    commit = publish(0)
    model = adapted(train_step, with_head(), num_classes=3) if head else adapted(train_step)
    expected = model(images())
    model.push_to_hub(REPO, token=alice, card=False)
    config = pushed_config(hub, repo)
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, commit)
    assert config["seed"] is None
    publish(1)  # the branch moves on; the commit stays what it was
    hub.requests.clear()
    assert torch.equal(load_bn_only_model(REPO, cache_dir=tmp_path / "fresh")(images()), expected)
    assert downloaded(hub) == PAIR | {"model.safetensors"}
    asked = [request.path for request in hub.requests if BASE in request.path and "/resolve/" in request.path]
    assert asked
    assert not [path for path in asked if f"/resolve/{commit}/" not in path]


def test_a_pinned_base_loads_offline_from_the_cache(publish, hub, alice, train_step):
    publish(0)
    model = adapted(train_step)
    model.push_to_hub(REPO, token=alice, card=False)
    load_bn_only_model(REPO)
    hub.requests.clear()
    assert torch.equal(load_bn_only_model(REPO, local_files_only=True)(images()), model(images()))
    assert not hub.requests


def test_weights_that_changed_under_their_commit_are_refused(publish, hub, alice, train_step, refused, tmp_path):
    commit = publish(0)
    adapted(train_step).push_to_hub(REPO, token=alice, card=False)
    base = hub.repos["models", BASE]
    base.commits[commit]["tree"] = base.tree(publish(1))
    with refused(FingerprintError, "conv1"):
        load_bn_only_model(REPO, cache_dir=tmp_path / "fresh")


def test_a_base_that_is_not_what_the_hub_has_is_not_pinned(publish, hub, alice, train_step, repo, refused, tmp_path):
    publish(0)
    model = adapted(train_step)
    publish(1)
    model.push_to_hub(REPO, token=alice, card=False)
    config = pushed_config(hub, repo)
    if config["revision"] is None:
        with refused(BaseRequiredError, "model=base"):
            load_bn_only_model(REPO)
    else:  # the commit whose weights it has was found in the cache
        assert torch.equal(load_bn_only_model(REPO, cache_dir=tmp_path / "fresh")(images()), model(images()))


@pytest.mark.parametrize("revision", [None, "main"])  # what else is no commit: test_trust
def test_a_base_without_a_commit_is_not_fetched(revision, publish, hub, alice, train_step, refused, tmp_path):
    publish(0)
    model = adapted(train_step)
    model.save_pretrained(tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    content |= {"base_model_name_or_path": BASE, "revision": revision}
    (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps(content))
    hub.requests.clear()
    with refused(BaseRequiredError, "model=base"):
        load_bn_only_model(tmp_path / "adapter")
    assert not hub.requests
    torch.manual_seed(3)
    base = timm.create_model(NAME, pretrained=True)
    assert torch.equal(load_bn_only_model(tmp_path / "adapter", base)(images()), model(images()))


def test_a_network_whose_weights_came_from_nowhere_needs_its_base(hub, alice, repo, refused, train_step):
    base = timm.create_model(NAME, num_classes=3)
    model = train_step(get_bn_only_model(base, BNOnlyConfig()))
    model.push_to_hub(REPO, token=alice, card=False)
    assert pushed_config(hub, repo)["revision"] is None
    with refused(BaseRequiredError, "model=base"):
        load_bn_only_model(REPO)


def test_a_new_head_that_does_not_train_needs_its_base(publish, hub, alice, repo, refused, train_step):
    publish(0)
    model = adapted(train_step, num_classes=3)
    model.push_to_hub(REPO, token=alice, card=False)
    with pytest.raises((BaseRequiredError, FingerprintError), match="base"):
        load_bn_only_model(REPO)


def test_a_base_repository_with_a_pickle_alone_is_refused(publish, hub, alice, train_step, tmp_path):
    commit = publish(0)
    adapted(train_step).push_to_hub(REPO, token=alice, card=False)
    tree = hub.repos["models", BASE].commits[commit]["tree"]
    tree["pytorch_model.bin"] = tree.pop("model.safetensors")
    hub.requests.clear()
    with pytest.raises((HubNotFoundError, BaseRequiredError, AdapterFileError)) as caught:
        load_bn_only_model(REPO, cache_dir=tmp_path / "fresh")
    assert caught.value.do
    assert "pytorch_model.bin" not in downloaded(hub)


# What would surprise.


def test_private_is_not_pushed_into_a_public_repository(versions, hub, alice, repo, refused):
    push(versions[0], token=alice)
    with refused(HubConflictError, "public", "nothing was pushed"):
        push(versions[1], token=alice, private=True)
    assert len(repo().history()) == 2


def test_a_commit_is_no_branch_to_push_to(versions, hub, alice, repo, refused):
    sha = push(versions[0], token=alice).oid
    with refused(ConfigError, sha, "branch"):
        push(versions[1], token=alice, revision=sha)
    assert set(repo().branches) == {"main"}


def test_results_of_an_earlier_adapter_do_not_stay_with_another(versions, hub, alice, repo):
    ours, anothers = ".eval_results/bn-affine-adapters--me--digits.yaml", ".eval_results/me--digits.yaml"
    push(versions[0], token=alice, card=True, results=[{"dataset": "me/digits", "top1": 91.5}])
    HfApi(token=alice).upload_file(path_or_fileobj=b"[]", path_in_repo=anothers, repo_id=REPO)
    push(versions[1], token=alice)  # without a card, the one that stays may speak of them
    assert {"results.json", ours, anothers} <= paths(repo())
    push(versions[1], token=alice, card=True)
    assert not {"results.json", ours} & paths(repo())
    assert anothers in paths(repo())


def test_a_card_whose_metadata_the_hub_refuses_is_an_own_error(versions, alice, hub, tmp_path, refused):
    folder = shutil.copytree(versions[0].folder, tmp_path / "adapter")
    (folder / "README.md").write_text("---\n? [x]\n: x\n---\n")
    with refused(ConfigError, "README.md", "metadata"):
        push_folder(folder, REPO, token=alice)


@pytest.mark.parametrize("name", [NAME, "cifar_resnet14"])
def test_an_exported_network_loads_from_the_hub_with_timm_alone(name, hub, alice, tmp_path, train_step):
    model = train_step(get_bn_only_model(timm.create_model(name, num_classes=3), BNOnlyConfig(seed=1)))
    api = HfApi(token=alice)
    api.create_repo("alice/plain")
    api.upload_folder(repo_id="alice/plain", folder_path=export(model, tmp_path / "plain"))
    plain = timm.create_model("hf-hub:alice/plain", pretrained=True).eval()
    assert not any("bn_only" in key for key in plain.state_dict())
    assert torch.equal(plain(images()), model(images()))


def test_a_folders_own_card_is_pushed_as_it_is(versions, hub, alice, repo, tmp_path):
    folder = Path(shutil.copytree(versions[0].folder, tmp_path / "own"))
    (folder / "README.md").write_text("# My own words\n")
    push_folder(folder, REPO, token=alice)
    assert hub.content(repo().tree()["README.md"]).decode() == "# My own words\n"


@pytest.mark.parametrize("kind", ["seed", "given weights"])
def test_no_path_of_this_machine_is_pushed(kind, hub, alice, repo, tmp_path):
    network = timm.create_model(NAME, num_classes=3)
    network.name_or_path = str(tmp_path)  # as Transformers' networks have it
    labels = ["/m/01g317", "a", "b"]  # a name of Open Images is no path
    base = copy.deepcopy(network) if kind == "given weights" else None
    model = get_bn_only_model(network, BNOnlyConfig(seed=None if base else 1, label_names=labels))
    line = {"dataset": str(tmp_path / "birds"), "top1": 50.0, "adapter": str(tmp_path / "run" / "adapter")}
    line |= {"recipe": {"pretrained_file": str(tmp_path / "w.safetensors"), "seed": 1}}
    line |= {"command": f"bn-adapters train dataset={tmp_path}/birds"}
    model.push_to_hub(REPO, token=alice, results=[line])
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path), "PEFT's own is not changed"
    texts = {name: hub.content(file) for name, file in repo().tree().items()}
    assert {CONFIG_NAME, "README.md", "results.json", SAFETENSORS_WEIGHTS_NAME} <= texts.keys()
    assert not [name for name, text in texts.items() if str(tmp_path).encode() in text]
    config = json.loads(texts[CONFIG_NAME])
    assert (config["base_model_name_or_path"], config["label_names"]) == (None, labels)
    assert b"bn-adapters train dataset=PATH/TO/birds" in texts["README.md"]
    assert json.loads(texts["results.json"])[0]["recipe"]["pretrained_file"] == "w.safetensors"
    assert torch.equal(load_bn_only_model(REPO, base)(images()), model.eval()(images()))


def test_a_path_in_an_older_folder_is_not_pushed(versions, hub, alice, repo, tmp_path, refused):
    folder = Path(shutil.copytree(versions[0].folder, tmp_path / "old"))
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    push_folder(folder, REPO, token=alice)
    assert json.loads(hub.content(repo().tree()[CONFIG_NAME])) == config
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "data_config": {"file": f"file:{tmp_path}/x"}}))
    with refused(ConfigError, str(tmp_path), "leave it out"):
        push_folder(folder, REPO, token=alice)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("{here}/a/b.png and 'c'", "b.png and 'c'"),
        ("local-dir:{here}/net", "local-dir:net"),
        ("~/x", "x"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("/m/01g317", "/m/01g317"),
        ("/" + "n" * 300, "/" + "n" * 300),
        ("24/7 and/or me/cifar10 runs/x .. a / b", "24/7 and/or me/cifar10 runs/x .. a / b"),
    ],
)
def test_what_is_a_path_of_this_machine(text, kept, tmp_path):
    assert without_paths({"a": [text.format(here=tmp_path)], "b": 1}) == {"a": [kept], "b": 1}
    assert bool(local_paths([text.format(here=tmp_path)])) == (text != kept)


def card_on(hub, repo):
    return hub.content(repo().tree()["README.md"]).decode()


def edit_card(hub, repo, alice, text):
    HfApi(token=alice).upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)
    assert card_on(hub, repo) == text


@pytest.mark.parametrize("door", ["model", "folder"])
def test_a_second_push_keeps_what_a_person_wrote_into_the_card(door, versions, hub, alice, repo):
    def send(adapter, **options):
        if door == "model":
            return push(adapter, token=alice, card=True, **options)
        return push_folder(adapter.folder, REPO, token=alice, **options)

    send(versions[0], license="mit", tags=["mine"])
    edit_card(hub, repo, alice, card_on(hub, repo).replace("---\n", "---\nlanguage: en\n", 1) + "\n## Thanks\n")
    send(versions[1], results=RESULTS)
    text = card_on(hub, repo)
    assert text.endswith("-->\n\n## Thanks\n")
    assert text.count("## Load it") == 1
    assert "## Results" in text
    meta, errors, _ = front_matter(text)
    assert not errors
    assert (meta["license"], meta["language"]) == ("mit", "en")
    assert "mine" in meta["tags"]


def test_a_license_chosen_on_the_hub_stays(versions, hub, alice, repo):
    HfApi(token=alice).create_repo(REPO)
    edit_card(hub, repo, alice, "---\nlicense: apache-2.0\n---\n")
    push(versions[0], token=alice, card=True)
    assert front_matter(card_on(hub, repo))[0]["license"] == "apache-2.0"
    push(versions[0], token=alice, card=True, license="mit")
    assert front_matter(card_on(hub, repo))[0]["license"] == "mit"


def test_a_folders_card_does_not_replace_text_that_was_written_on_the_hub(
    versions, hub, alice, repo, tmp_path, refused
):
    folder = Path(shutil.copytree(versions[0].folder, tmp_path / "own"))
    write_card(folder, REPO)
    push_folder(folder, REPO, token=alice)
    edit_card(hub, repo, alice, card_on(hub, repo).replace("---\n\n<!--", "---\n\n# Above\n\n<!--"))
    push_folder(folder, REPO, token=alice)  # the folder's card is our section alone
    assert card_on(hub, repo).count("# Above\n") == 1
    (folder / "README.md").write_text("# Other words\n")
    with refused(HubConflictError, "'# Above'", "delete this file"):
        push_folder(folder, REPO, token=alice)
    (folder / "README.md").write_text("# Above\n\n# Other words\n")
    push_folder(folder, REPO, token=alice)
    assert card_on(hub, repo).endswith("# Above\n\n# Other words\n")
    assert "bn-only" in front_matter(card_on(hub, repo))[0]["tags"], "the metadata of the Hub stays"


def test_a_card_that_changes_during_the_push_is_not_overwritten(versions, hub, alice, repo, refused, monkeypatch):
    push(versions[0], token=alice, card=True)
    upload_folder = HfApi.upload_folder

    def meanwhile(self, **options):
        edit_card(hub, repo, alice, card_on(hub, repo) + "\nmine\n")
        return upload_folder(self, **options)

    monkeypatch.setattr(HfApi, "upload_folder", meanwhile)
    with refused(HubConflictError, "HTTP 412", "then try again"):
        push_folder(versions[1].folder, REPO, token=alice)
    assert card_on(hub, repo).endswith("\nmine\n")


def test_a_failed_push_names_what_was_asked_for(versions, hub, alice):
    hub.fail("POST", "/api/repos/create", 503, 10)
    with pytest.raises(HubUnavailableError) as caught:
        push(versions[0], token=alice, license="mit", commit_message="one two", results=RESULTS, tag="v1")
    folder = Path(re.search(r"bn-adapters push (\S+)", caught.value.do)[1])
    for word in ("--no-card", "--license=mit", "'--message=one two'", "--tag=v1"):
        assert word in caught.value.do
    assert json.loads((folder / "results.json").read_text()) == RESULTS
    shutil.rmtree(folder)


def test_an_adapter_that_is_not_there_is_not_pushed(versions, hub, alice, refused):
    with refused(AdapterError, "'secnd'", "default"):
        push(versions[0], token=alice, adapter_name="secnd")
    assert not hub.repos


def test_without_a_token_the_advice_is_to_log_in(versions, hub, refused):
    with refused(HubAccessError, "hf auth login"):
        push(versions[0], repo_id="x", token=None)
