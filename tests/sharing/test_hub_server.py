"""The Hub on loopback does what the tests of the push and of loading rely on: faults, byte counts, a fresh start."""

import http.client
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download

FILE, CONTENT = "adapter_model.safetensors", bytes(range(256)) * 40


@pytest.fixture
def pushed(hub, transfer, alice, tmp_path):
    """A repository that the real client filled."""
    folder = tmp_path / "pushed"
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    (folder / "adapter_config.json").write_text("{}")
    api = HfApi(token=alice)
    api.create_repo("alice/x")
    api.upload_folder(repo_id="alice/x", folder_path=folder)
    return hub


def test_no_test_sees_another_hub_or_a_token():
    assert os.environ["HF_ENDPOINT"] == huggingface_hub.constants.ENDPOINT
    assert os.environ["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    assert huggingface_hub.get_token() is None
    assert os.environ["HF_HOME"] == huggingface_hub.constants.HF_HOME
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_file_comes_back_as_it_went(pushed, transfer):
    assert Path(hf_hub_download("alice/x", FILE)).read_bytes() == CONTENT
    assert any("/cas/" in request.path for request in pushed.requests) == (transfer == "xet")
    assert any("/lfs/" in request.path for request in pushed.requests) == (transfer == "lfs")


def test_what_went_with_xet_comes_back_without(pushed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    assert Path(hf_hub_download("alice/x", FILE)).read_bytes() == CONTENT


def test_the_bytes_on_the_wire_are_counted(hub):
    hub.create("alice/x", {"a.json": b"x" * 5000})
    link = http.client.HTTPConnection("127.0.0.1", hub.port)
    for _ in range(2):  # on one connection
        link.request("GET", "/alice/x/resolve/main/a.json")
        assert len(link.getresponse().read()) == 5000
    first, second = hub.requests
    assert (first.method, first.path, first.status) == ("GET", "/alice/x/resolve/main/a.json", 200)
    line = "GET /alice/x/resolve/main/a.json HTTP/1.1\r\n"
    fields = f"Host: 127.0.0.1:{hub.port}\r\nAccept-Encoding: identity\r\n\r\n"
    assert first.received == second.received == len(line + fields)
    assert first.sent == second.sent
    assert 5000 < first.sent < 5500
    assert hub.bytes_sent("a.json") == (2 * first.received, 2 * first.sent)
    assert hub.bytes_sent("b.json") == (0, 0)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_fault_answers_so_often_and_no_more(status, hub):
    hub.create("alice/x", {})
    fault = hub.fail("GET", "/api/models/alice/x$", status, 2, Retry_After="0")
    found = []
    for _ in range(3):
        link = http.client.HTTPConnection("127.0.0.1", hub.port)
        link.request("GET", "/api/models/alice/x")
        answer = link.getresponse()
        found.append((answer.status, answer.headers["Retry-After"]))
    assert found == [(status, "0"), (status, "0"), (200, None)]
    assert fault.hits == 2


def ask_for_a_repository(hub, alice):
    link = http.client.HTTPConnection("127.0.0.1", hub.port)
    link.request("POST", "/api/repos/create", b'{"name": "x"}', {"Authorization": f"Bearer {alice}"})
    return link.getresponse()


def test_a_request_can_be_dropped_before_it_is_carried_out(hub, alice):
    hub.fail("POST", "create", 0)
    with pytest.raises(http.client.RemoteDisconnected):
        ask_for_a_repository(hub, alice)
    assert not hub.repos
    assert hub.requests[0].sent == 0


def test_a_request_can_be_carried_out_and_its_answer_lost_or_a_fault(hub, alice):
    hub.fail("POST", "create", 0, done=True)
    with pytest.raises(http.client.RemoteDisconnected):
        ask_for_a_repository(hub, alice)
    assert set(hub.repos) == {("models", "alice/x")}
    hub.reset()
    hub.fail("POST", "create", 503, done=True)
    assert ask_for_a_repository(hub, alice).status == 503
    assert set(hub.repos) == {("models", "alice/x")}


def test_an_answer_can_break_off(hub):
    hub.create("alice/x", {"a.json": b"x" * 5000})
    hub.fail("GET", "a.json", 0, after=1234)
    link = http.client.HTTPConnection("127.0.0.1", hub.port)
    link.request("GET", "/alice/x/resolve/main/a.json")
    with pytest.raises(http.client.IncompleteRead) as caught:
        link.getresponse().read()
    assert len(caught.value.partial) == 1234


def test_a_reset_forgets_everything_but_the_users(pushed, alice):
    pushed.fail("GET", "x", 500)
    pushed.reset()
    everything = [getattr(pushed, name) for name in ("repos", "lfs", "xorbs", "xet_files", "xet_by_sha")]
    assert [*everything, pushed.requests, pushed.faults] == [{}, {}, {}, {}, {}, [], []]
    assert HfApi(token=alice).whoami()["name"] == "alice"
