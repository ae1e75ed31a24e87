"""Adapters of one network are served together: as each alone, within bounds, and what is wrong gets its status."""

import asyncio
import base64
import io
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from starlette.requests import Request

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, predict
from bn_affine_adapters.deploy.serving.pool import AdapterPool, Asked, named_sources
from bn_affine_adapters.deploy.serving.requests import Limits, RequestError, as_answer, decode, refused
from bn_affine_adapters.deploy.serving.service import PAGE, Service
from bn_affine_adapters.errors import AdapterError, AdapterNameError, ConfigError, HubError, TooLargeError

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cow", "dog"]
LIMITS = Limits(body=100_000, pixels=10_000, seconds=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four adapters of one network: other gamma and beta, and 3 to 6 classes."""
    root, model = tmp_path_factory.mktemp("served"), None
    for number, name in enumerate(NAMES):
        labels = [f"{name}{n}" for n in range(3 + number)]
        config = BNOnlyConfig(seed=0, train_head=True, label_names=labels, model_args={"num_classes": len(labels)})
        if model is None:
            model = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(root)
    return {name: str(root / name) for name in NAMES}


@pytest.fixture
def pool(folders):
    return AdapterPool(list(folders.values()))


def picture(seed=0, size=(50, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def file_of(image, kind="PNG", **how):
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def alone(folders):
    """What each adapter says of an image, loaded by itself."""
    models = {name: load_bn_only_model(folder) for name, folder in folders.items()}
    return lambda name, image: predict(models[name], image)


def same(found, expected):
    """Compare predictions; in a batch sums are rounded otherwise."""
    assert [best.label for best in found] == [best.label for best in expected]
    assert [best.probability for best in found] == pytest.approx([best.probability for best in expected], abs=1e-5)


# The pool.


def test_a_batch_of_several_adapters_answers_as_each_of_them_alone(pool, alone):
    images = [picture(n) for n in range(8)]
    asked = [Asked(NAMES[n % 4], pool.pixels(NAMES[n % 4], image)) for n, image in enumerate(images)]
    for n, found in enumerate(pool.predict(asked)):
        same(found, alone(NAMES[n % 4], images[n]))
    assert pool.counts == {"loads": 3, "evictions": 0, "batches": 1, "images": 8}
    assert len({alone(name, images[0])[0].probability for name in NAMES}) == 4


def test_the_least_recently_used_leave_and_the_first_stays(folders, alone):
    pool, image = AdapterPool(list(folders.values()), max_adapters=3), picture()
    for name in ("bee", "cow", "bee", "dog"):
        (found,) = pool.predict([Asked(name, pool.pixels(name, image))])
        same(found, alone(name, image))
    assert list(pool.held) == ["ant", "bee", "dog"]
    assert len(pool.model.peft_config) == 3
    assert pool.counts["evictions"] == 1


def test_the_bytes_of_the_adapters_are_bounded(folders):
    sizes = AdapterPool(list(folders.values()))
    for name in NAMES:
        sizes.pixels(name, picture())
    each = {name: held.bytes for name, held in sizes.held.items()}
    tensors = sum(t.numel() * t.element_size() for k, t in sizes.model.state_dict().items() if ".served_1." in k)
    assert tensors < each["bee"] < 2.5 * tensors
    pool = AdapterPool(list(folders.values()), max_bytes=each["ant"] + each["cow"] + each["bee"])
    for name in NAMES[1:]:
        pool.pixels(name, picture())
    assert list(pool.held) == ["ant", "dog"]  # cow and dog do not fit together
    small = AdapterPool(list(folders.values()), max_bytes=each["ant"] + 10)
    with pytest.raises(TooLargeError, match="does not fit"):
        small.pixels("bee", picture())
    assert list(small.held) == ["ant"]
    with pytest.raises(ConfigError, match="exceeds the bounds"):
        AdapterPool(list(folders.values()), max_bytes=10)


def test_a_batch_of_more_adapters_than_fit_is_run_in_parts(folders, alone):
    pool, images = AdapterPool(list(folders.values()), max_adapters=2), [picture(n) for n in range(12)]
    asked = [Asked(NAMES[n % 4], pool.pixels(NAMES[n % 4], image)) for n, image in enumerate(images)]
    for n, found in enumerate(pool.predict(asked)):
        same(found, alone(NAMES[n % 4], images[n]))
    assert pool.counts["batches"] == 3


def test_an_adapter_that_breaks_spoils_no_other_answer(folders, tmp_path, alone):
    shutil.copytree(folders["bee"], tmp_path / "bee")
    pool, image = AdapterPool([folders["ant"], str(tmp_path / "bee"), folders["cow"]], max_adapters=2), picture()
    asked = [Asked(name, pool.pixels(name, image)) for name in ("ant", "bee", "cow")]
    (tmp_path / "bee" / "adapter_model.safetensors").write_bytes(b"broken")
    first, second, third = pool.predict(asked)
    same(first, alone("ant", image))
    assert isinstance(second, AdapterError)
    same(third, alone("cow", image))
    assert str(tmp_path) in str(second)
    assert str(tmp_path) not in str(as_answer(second))


def test_an_adapter_whose_values_overflow_spoils_no_other_answer(folders, tmp_path, alone):
    model = load_bn_only_model(folders["bee"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bn_only_layers" in key and key.endswith("weight"):
                parameter.fill_(1e30)
    model.save_pretrained(tmp_path / "huge")
    pool, image = AdapterPool([folders["ant"], str(tmp_path / "huge")]), picture()
    first, second, third = pool.predict([Asked(name, pool.pixels(name, image)) for name in ("ant", "huge", "ant")])
    assert isinstance(second, AdapterError)
    same(first, alone("ant", image))
    assert third == first


def test_what_does_not_fit_the_network_or_cannot_be_mixed_is_refused_when_it_is_loaded(folders, tmp_path):
    other = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=1))
    other.save_pretrained(tmp_path / "other")
    pool = AdapterPool([folders["ant"], str(tmp_path / "other")])
    with pytest.raises(AdapterError, match="made for others"):
        pool.pixels("other", picture())
    assert (list(pool.held), list(pool.model.peft_config)) == (["ant"], ["served_0"])
    config = BNOnlyConfig(seed=0, layer_scale="train")
    get_bn_only_model(timm.create_model("test_convnext", num_classes=3), config).save_pretrained(tmp_path / "scales")
    with pytest.raises(AdapterError, match="layer scale"):
        AdapterPool([str(tmp_path / "scales")])


def test_threads_that_need_more_adapters_than_fit_get_right_answers(folders, alone):
    pool, images = AdapterPool(list(folders.values()), max_adapters=2), [picture(n) for n in range(3)]
    expected = {(name, n): alone(name, image) for name in NAMES for n, image in enumerate(images)}

    def ask(seed):
        order = np.random.default_rng(seed).permutation(len(expected))
        for name, n in [list(expected)[place] for place in order]:
            (found,) = pool.predict([Asked(name, pool.pixels(name, images[n]))])
            same(found, expected[name, n])
        return len(order)

    with ThreadPoolExecutor(3) as threads:
        assert sum(threads.map(ask, range(3))) == 36
    assert pool.counts["evictions"] >= 3
    assert len(pool.model.peft_config) == 2


def test_names_are_unique_and_there_is_one(tmp_path):
    assert named_sources([str(tmp_path), "me/leaves"]) == {tmp_path.name: str(tmp_path), "me/leaves": "me/leaves"}
    with pytest.raises(AdapterNameError, match="Two adapters"):
        named_sources(["x/y/same", "z/same/"])
    with pytest.raises(AdapterNameError, match="no adapter"):
        named_sources([])


def test_requests_name_only_what_is_listed_or_begins_as_allowed(folders, hub, alice, tmp_path, monkeypatch, alone):
    load_bn_only_model(folders["bee"]).push_to_hub("alice/leaves", token=alice)
    pool, image = AdapterPool([folders["ant"]], prefixes=["alice/"]), picture()
    (found,) = pool.predict([Asked("alice/leaves", pool.pixels("alice/leaves", image))])
    same(found, alone("bee", image))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["bee"], tmp_path / "alice" / "local")
    for name in (
        "bee",
        folders["bee"],
        "bob/leaves",
        "alice/../a",
        "alice/a/b",
        "alice/",
        "alice/local",
        "",
        "served_0",
    ):
        with pytest.raises(RequestError, match="no such adapter"):
            pool.pixels(name, image)
    with pytest.raises(HubError) as caught:
        pool.pixels("alice/nothing", image)
    assert as_answer(caught.value).status == 404
    with pytest.raises(ConfigError, match="prefix"):
        AdapterPool([folders["ant"]], prefixes=["alice"])


# Images and bodies of strangers.


def test_a_jpeg_of_thousands_of_scans_is_refused_in_no_time():
    whole = file_of(picture(size=(2000, 2000)), "JPEG", progressive=True)
    start, end = whole.rindex(b"\xff\xda"), whole.rindex(b"\xff\xd9")
    bomb = whole[:start] + 2000 * whole[start:end][:40] + whole[end:]
    began = time.process_time()
    with pytest.raises(RequestError, match="scans"):
        decode(bomb, Limits())
    assert time.process_time() - began < 1
    assert decode(whole, Limits()).size == (2000, 2000)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "EPS"])
def test_formats_that_may_do_more_than_decode_are_not_opened(kind):
    with pytest.raises(RequestError, match="UnidentifiedImageError"):
        decode(file_of(picture(), kind), Limits())


# The service.


def asking(service, *requests):
    """Return the responses to (method, path, arguments), one after another, without a network."""

    async def app(scope, receive, send):
        response = await service.answer(Request(scope, receive))
        await response(scope, receive, send)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return [await client.request(method, path, **how) for method, path, how in requests]

    return asyncio.run(ask())


def service_of(pool, limits=LIMITS):
    async def batched(asked):
        return (await asyncio.to_thread(pool.predict, [asked]))[0]

    return Service(pool, limits, batched)


def form(adapter="bee", image=None, **fields):
    return {"data": {"adapter": adapter, **fields}, "files": {"image": image or file_of(picture())}}


def as_json(**fields):
    usual = {"adapter": "bee", "image": base64.b64encode(file_of(picture())).decode()}
    return {"json": {key: value for key, value in (usual | fields).items() if value is not None}}


def test_a_form_and_json_get_the_answer_of_predict(pool, alone):
    expected = [best._asdict() for best in alone("bee", picture())]
    one, other, two = asking(
        service_of(pool), ("POST", "/predict", form()), ("POST", "/predict", as_json()),
        ("POST", "/predict", as_json(top_k=2)),
    )  # fmt: skip
    assert one.status_code == 200
    assert one.json() == other.json()
    assert one.json()["adapter"] == "bee"
    assert [best["label"] for best in one.json()["predictions"]] == [best["label"] for best in expected]
    assert two.json()["predictions"] == one.json()["predictions"][:2]


def test_every_path_answers(pool):
    page, adapters, health, metrics = asking(
        service_of(pool), *[("GET", path, {}) for path in ("/", "/adapters", "/healthz", "/metrics")]
    )
    assert page.text == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=", page.text), "the page loads something from elsewhere"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    rows = adapters.json()["adapters"]
    assert [row["name"] for row in rows if not row["loaded"]] == ["bee", "cow", "dog"]
    assert rows[0] == {
        "name": "ant",
        "loaded": True,
        "bytes": pool.held["ant"].bytes,
        "labels": ["ant0", "ant1", "ant2"],
    }
    assert health.json()["status"] == "ok"
    assert 'bn_adapters_requests_total{replica="0",status="200"} 3\n' in metrics.text
    lines = metrics.text.splitlines()
    assert all(re.fullmatch(r'[a-z_]+\{replica="0"(,status="\d+")?\} [\d.e+-]+', line) for line in lines)


def body(content, kind="application/json"):
    return {"content": content, "headers": {"content-type": kind}}


def png_head(side):
    """Return the first chunk of a PNG, which says how large it is."""
    head = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")


PNG = file_of(picture())
BAD = {
    "another path": ("GET", "/models", {}),
    "another method": ("GET", "/predict", {}),
    "another type of body": ("POST", "/predict", body(b"x", "text/plain")),
    "a body over the bound": ("POST", "/predict", form(image=bytes(200_000))),
    "a form that is cut off": ("POST", "/predict", body(b'--x\r\nContent-Disposition: form-data; name="adapter"',
                                                       "multipart/form-data; boundary=x")),
    "a form of two files": ("POST", "/predict", {"files": [("image", PNG), ("image", PNG)]}),
    "no image": ("POST", "/predict", as_json(image=None)),
    "a field that does not exist": ("POST", "/predict", form(seed="1")),
    "broken JSON": ("POST", "/predict", body(b'{"adapter": ')),
    "JSON of 50,000 lists": ("POST", "/predict", body(b"[" * 50_000)),
    "an image that is no base64": ("POST", "/predict", as_json(image="é!")),
    "top_k of 0": ("POST", "/predict", form(top_k="0")),
    "an adapter that does not exist": ("POST", "/predict", form("leaves")),
    "a folder of the server": ("POST", "/predict", form("../../etc")),
    "an adapter of other weights": ("POST", "/predict", form("other")),
    "a text as the image": ("POST", "/predict", form(image=b"no image")),
    "half an image": ("POST", "/predict", form(image=PNG[: len(PNG) // 2])),
    "an image of too many pixels": ("POST", "/predict", form(image=file_of(Image.new("1", (101, 100))))),
    "a PNG of 2 gigapixels": ("POST", "/predict", form(image=PNG[:8] + png_head(46_000) + PNG[33:])),
}  # fmt: skip


def test_each_bad_request_gets_the_answer_that_the_page_says(pool, tmp_path, folders):
    """The table of docs/serving.md is what the server answers; run with -s to print it."""
    other = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=1))
    other.save_pretrained(tmp_path / "other")
    pool = AdapterPool([folders["ant"], folders["bee"], str(tmp_path / "other")])
    responses = asking(service_of(pool), *BAD.values())
    rows = []
    for asked, response in zip(BAD, responses, strict=True):
        error = response.json()["error"]
        assert set(error) == {"what", "seen", "do"}
        assert str(tmp_path) not in response.text
        rows.append(f"| {asked} | {response.status_code} | {error['what']} |")
    print("\n".join(rows))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in page] == []
    assert {405, 413, 415, 422} <= {response.status_code for response in responses}
    good = asking(service_of(pool), ("POST", "/predict", form()))[0]
    assert good.status_code == 200


def test_a_body_or_an_answer_that_takes_too_long_has_an_end(pool):
    async def slowly():
        yield b"{"
        await asyncio.sleep(60)

    async def never(asked):
        await asyncio.sleep(60)

    limits = Limits(seconds=0.5)
    slow = {"content": slowly(), "headers": {"content-type": "application/json"}}
    late, unanswered = asking(Service(pool, limits, never), ("POST", "/predict", slow), ("POST", "/predict", form()))
    assert (late.status_code, unanswered.status_code) == (408, 504)
    assert late.json()["error"]["what"] == "The body did not arrive in time."


def test_a_body_is_read_no_further_than_its_bound(pool):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    (response,) = asking(service_of(pool), ("POST", "/predict", body(endless())))
    assert response.status_code == 413
    assert sent <= LIMITS.body + 2000


def test_an_error_inside_says_nothing_of_the_server(pool, caplog):
    async def broken(asked):
        raise RuntimeError("the secret of /srv/adapters")

    (response,) = asking(Service(pool, LIMITS, broken), ("POST", "/predict", form()))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_a_request_error_survives_the_way_to_another_process():
    error = refused(404, "No.", "x", "y")
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, str(again)) == (404, str(error))


# With Ray.


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url):
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def post(url, name, number):
    try:
        return httpx.post(f"{url}/predict", **form(name, file_of(picture(number))), timeout=60)
    except httpx.HTTPError as error:
        return error


@pytest.fixture
def server(folders, tmp_path):
    """The command with two replicas, and room for two of four adapters."""
    port = free_port()
    command = [sys.executable, str(ROOT / "recipes" / "serve.py"), *folders.values(), "--port", str(port)]
    options = ["--replicas", "2", "--max-adapters", "2", "--wait", "50", "--max-body", "100000"]
    log = tmp_path / "log.txt"
    with log.open("wb") as out:  # in a folder without the package: Ray looks for modules in the working folder first
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out, cwd=tmp_path)
    url, end, children = f"http://127.0.0.1:{port}", time.time() + 240, []
    try:
        while not answers(url):
            assert process.poll() is None, log.read_text()
            assert time.time() < end, log.read_text()
            time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        yield url, process
    finally:
        process.terminate()
        process.wait(120)
        psutil.wait_procs(children, timeout=30)
        left = [child for child in children if child.is_running()]
        for child in left:
            child.kill()
        assert not left, "processes of Ray were left"


@pytest.mark.slow  # Ray takes half a minute to start and end
def test_the_command_serves_loses_only_what_was_in_a_killed_replica_and_drains(server, alone):
    url, process = server
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda n: post(url, NAMES[n % 4], n), range(48)))
        for n, response in enumerate(found):
            assert response.status_code == 200, response.text
            best = response.json()["predictions"][0]
            assert best == pytest.approx(alone(NAMES[n % 4], picture(n))[0]._asdict(), abs=1e-5)
        for asked, status in (("an adapter that does not exist", 404), ("half an image", 400), ("no image", 400),
                              ("a body over the bound", 413), ("a form of two files", 400)):  # fmt: skip
            method, path, how = BAD[asked]
            assert httpx.request(method, url + path, **how).status_code == status
        replica = next(c for c in psutil.Process(process.pid).children(True) if "ServeReplica" in c.cmdline()[0])
        asked = [threads.submit(post, url, NAMES[n % 4], n) for n in range(64)]
        time.sleep(0.2)
        replica.send_signal(signal.SIGKILL)
        statuses = [getattr(each.result(), "status_code", 0) for each in asked]
        assert statuses.count(200) >= 64 - 16, statuses  # 16 threads have asked at once, at most
        last = [threads.submit(post, url, "ant", n) for n in range(8)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert [each.result().status_code for each in last] == [200] * 8
    assert process.wait(120) == 0
