"""Whatever goes wrong at any stage of a push or a load: an error says what to do, and nothing is left in halves."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from conftest import each_once, images
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import (
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
)
from bn_affine_adapters.sharing.hub import push_folder

REPO = "alice/x"
PAIR = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
FOREVER = 10**6

# How the Hub, or the way to it, fails: the arguments of Hub.fail, and the error that says so.
FAULTS = {
    "401": ({"status": 401}, HubAccessError),
    "403": ({"status": 403}, HubAccessError),
    "404": ({"status": 404}, HubNotFoundError),
    "409": ({"status": 409}, HubConflictError),
    "412": ({"status": 412}, HubConflictError),
    "429": ({"status": 429}, HubUnavailableError),
    "500": ({"status": 500}, HubUnavailableError),
    "503": ({"status": 503}, HubUnavailableError),
    "503-though-done": ({"status": 503, "done": True}, HubUnavailableError),
    "dropped": ({"status": 0}, HubUnavailableError),
    "answer-lost": ({"status": 0, "done": True}, HubUnavailableError),
    "answer-cut": ({"status": 0, "after": 1}, HubUnavailableError),
}

# The stages of a push, and which requests they are.
STAGES = {
    "create": ("POST", "/api/repos/create$"),
    "refs": ("GET", "/refs$"),
    "branch": ("POST", "/branch/"),
    "preupload": ("POST", "/preupload/"),
    "lfs-batch": ("POST", "/info/lfs/objects/batch$"),
    "lfs-upload": ("PUT", "/lfs/"),
    "lfs-verify": ("POST", "/lfs/.*/verify$"),
    "xet-token": ("GET", "/xet-write-token/"),
    "xet-xorb": ("POST", "/cas/v1/xorbs/"),
    "xet-shard": ("POST", "/cas/v1/shards$"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}
# Where the client takes the answer for a good one: what was to be made is there.
OVERCOME = {("create", "401"), ("create", "403")}
# To a creation 409 says that it is there: that is met by every push to a repository or a branch that exists.
# And the answer to an upload has no body that could be cut.
NO_FAULT = {("create", "409"), ("branch", "409"), ("lfs-upload", "answer-cut")}


def pushes():
    """Every fault at every stage: what makes the commit fails in every way, each other stage in one of its own."""
    for i, stage in enumerate(STAGES):
        for j, fault in enumerate(FAULTS):
            if (stage, fault) not in NO_FAULT:
                fast = stage == "commit" or i == j
                yield pytest.param(stage, fault, marks=[] if fast else [pytest.mark.slow])


def content(hub, revision="main"):
    """Everything at a revision: {path: bytes}; None where there is no such thing."""
    repo = hub.repos.get(("models", REPO))
    if repo is None or (revision not in repo.branches and revision not in repo.tags):
        return None
    return {path: hub.content(blob) for path, blob in repo.tree(revision).items()}


def kept(error):
    """The folder and the options of the command by which an error says that the push can be resumed."""
    command = re.search(r"bn-adapters push .*", error.do)
    assert command, error.do
    words = shlex.split(command[0])
    folder, repo = [word for word in words[2:] if not word.startswith("--")]
    assert repo == REPO
    return Path(folder), [word for word in words[2:] if word.startswith("--")]


def same_adapter(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in PAIR)


@pytest.fixture
def use(monkeypatch, hub):
    """Choose the way of the large files that a stage belongs to."""

    def choose(stage):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not stage.startswith("xet"))

    return choose


@pytest.fixture
def pushed(hub, versions, alice, use):
    """What the Hub holds after the first version was pushed, and will hold after the second."""
    use("lfs")
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    old = content(hub)
    new = old | {name: (versions[1].folder / name).read_bytes() for name in PAIR}
    assert old != new
    hub.requests.clear()
    return old, new


@pytest.mark.parametrize(("stage", "fault"), list(pushes()))
def test_a_push_that_fails_leaves_the_old_or_the_new_and_can_be_resumed(
    stage, fault, versions, pushed, hub, alice, use, here
):
    old, new = pushed
    use(stage)
    arguments, kind = FAULTS[fault]
    options = {"tag": "v2", "revision": "further" if stage == "branch" else None, "card": False}
    branch = options["revision"] or "main"
    folder = versions[1].folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    there = hub.fail(*STAGES[stage], times=FOREVER, **arguments)
    if (stage, fault) in OVERCOME:
        push_folder(folder, REPO, token=alice, **options)
    else:
        with pytest.raises(HubError) as caught:
            push_folder(folder, REPO, token=alice, **options)
        # Of the storage's answers the Xet client tells only the text.
        assert stage.startswith("xet") or type(caught.value) is kind, repr(caught.value)
        assert stage.startswith("xet") or caught.value.status in (arguments["status"] or None, 409)
        assert (stage, fault) != ("commit", "412") or "meanwhile" in str(caught.value)
        assert content(hub, branch) in ([old, new, None] if branch != "main" else [old, new])
        assert content(hub, "v2") in [None, new]
        assert kept(caught.value)[0].resolve() == folder.resolve()
    assert there.hits
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(here.iterdir())
    hub.faults.clear()
    if content(hub, "v2") is None:
        push_folder(folder, REPO, token=alice, **options)
    assert content(hub, branch) == content(hub, "v2") == new
    if fault == "503":
        assert torch.equal(load_bn_only_model(REPO, revision="v2")(images()), versions[1].logits)


@each_once(stage=list(STAGES), fault=["503", "answer-lost"])
def test_the_model_of_a_push_that_fails_is_kept_in_a_folder(stage, fault, versions, hub, alice, use, here):
    use(stage)
    arguments, _ = FAULTS[fault]
    options = {"tag": "v1", "revision": "further" if stage == "branch" else None, "card": False}
    model = versions[1].model
    before, config = copy.deepcopy(model.state_dict()), model.peft_config["default"].to_dict()
    there = hub.fail(*STAGES[stage], times=FOREVER, **arguments)
    with pytest.raises(HubUnavailableError) as caught:
        model.push_to_hub(REPO, token=alice, **options)
    assert there.hits
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert (model.peft_config["default"].to_dict(), model.training) == (config, False)
    folder, flags = kept(caught.value)
    assert same_adapter(folder, versions[1].folder)
    assert torch.equal(load_bn_only_model(folder)(images()), versions[1].logits)
    assert any("v1" in flag for flag in flags)
    found = content(hub, options["revision"] or "main")
    assert found is None or set(found) == {".gitattributes"} or {".gitattributes", *PAIR} == set(found)
    hub.faults.clear()
    if content(hub, "v1") is None:
        push_folder(folder, REPO, token=alice, **options)
    assert torch.equal(load_bn_only_model(REPO, revision="v1")(images()), versions[1].logits)


@each_once(
    stage=["preupload", "lfs-upload", "xet-token", "xet-xorb", "xet-shard"], fault=["429", "500", "503", "dropped"]
)
def test_a_short_trouble_is_overcome(stage, fault, versions, hub, alice, use):
    use(stage)
    there = hub.fail(*STAGES[stage], times=1, **FAULTS[fault][0])
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    assert there.hits == 1
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[0].logits)


# -- loading

LOADING = {
    "config-head": ("HEAD", f"/resolve/.*{CONFIG_NAME}$"),
    "config": ("GET", f"/resolve/.*{CONFIG_NAME}$"),
    "tensors-head": ("HEAD", f"/resolve/.*{SAFETENSORS_WEIGHTS_NAME}$"),
    "tensors-cdn": ("GET", "/cdn/"),
    "xet-token": ("GET", "/xet-read-token/"),
    "xet-plan": ("GET", "/cas/v./reconstructions/"),
    "xet-bytes": ("GET", "/cas/xorb/"),
}
LOADING_FAULTS = ["401", "403", "404", "429", "500", "503", "dropped", "answer-cut"]


@pytest.fixture
def second():
    """A network with one adapter, which another shall join."""
    return get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=7)).eval()


@pytest.fixture
def load(second):
    def by(door):
        if door == "load_bn_only_model":
            return load_bn_only_model(REPO)
        second.load_adapter(REPO, "second")
        second.set_adapter("second")
        return second

    return by


@each_once(stage=list(LOADING), fault=LOADING_FAULTS, door=["load_bn_only_model", "load_adapter"])
def test_a_load_that_fails_leaves_a_usable_cache(stage, fault, door, versions, hub, alice, use, load, second):
    if stage.endswith("head") and fault == "answer-cut":
        fault = "answer-lost"  # it has no body
    use(stage)
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    before, answer = list(second.peft_config), second(images())
    arguments, kind = FAULTS[fault]
    there = hub.fail(*LOADING[stage], times=FOREVER, **arguments)
    with pytest.raises(HubError) as caught:
        load(door)
    assert there.hits
    assert stage.startswith("xet") or type(caught.value) is kind, repr(caught.value)
    assert caught.value.do
    assert REPO in str(caught.value)
    assert list(second.peft_config) == before
    assert torch.equal(second(images()), answer)
    with pytest.raises(HubUnavailableError):
        load_bn_only_model(REPO, local_files_only=True)
    hub.faults.clear()
    assert torch.equal(load(door)(images()), versions[0].logits)
    assert torch.equal(load_bn_only_model(REPO, local_files_only=True)(images()), versions[0].logits)


@pytest.mark.parametrize("stage", ["config-head", "tensors-head", "xet-token", "xet-plan", "xet-bytes"])
def test_a_short_trouble_while_loading_gives_the_new_or_the_cached_version(stage, versions, hub, alice, use):
    use(stage)
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    load_bn_only_model(REPO)
    push_folder(versions[1].folder, REPO, token=alice, card=False)
    there = hub.fail(*LOADING[stage], times=1, status=503)
    found = load_bn_only_model(REPO)(images())
    assert there.hits == 1
    assert [torch.equal(found, version.logits) for version in versions].count(True) == 1


@pytest.mark.parametrize("fault", ["429", "500", "503"])
def test_a_cached_adapter_stands_in_while_the_hub_is_in_trouble(fault, versions, hub, alice):
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    load_bn_only_model(REPO)
    there = hub.fail("*", "", times=FOREVER, **FAULTS[fault][0])
    assert torch.equal(load_bn_only_model(REPO)(images()), versions[0].logits)
    assert there.hits


def test_the_branch_may_move_between_the_two_files(versions, hub, alice):
    """The second file is fetched at the commit of the first: never one's configuration with another's tensors."""
    push_folder(versions[0].folder, REPO, token=alice, card=False)
    first = hub.repos["models", REPO].branches["main"]
    load_bn_only_model(REPO)
    asked = [request.path for request in hub.requests if SAFETENSORS_WEIGHTS_NAME in request.path]
    assert asked
    assert not [path for path in asked if f"/resolve/{first}/" not in path]
