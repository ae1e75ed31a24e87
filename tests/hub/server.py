"""A small Hugging Face Hub in memory, for tests: the unmodified `huggingface_hub` client talks to it over loopback.

Written from the client's behaviour and the public descriptions of the LFS and Xet protocols. It needs the standard
library and PyYAML; hf_xet only where a file uploaded with Xet is downloaded without.

    with Hub() as hub:
        hub.token("alice")                   # HF_ENDPOINT=hub.url, HF_HOME and HF_XET_CACHE in a temporary folder
        hub.fail("POST", "/commit/", 503)    # the next commit is refused; status 0 drops the connection
        hub.requests                         # what was asked, and how many bytes went over the wire
        hub.reset()                          # as it was at the start

It holds users, organisations, tokens, private and gated model repositories, branches, tags, pull requests, commits with
their parents, LFS and a Xet storage: what a push and a load ask for. It checks no quota and merges nothing.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SUFFIXES = [
    "7z", "bin", "ckpt", "gz", "h5", "joblib", "msgpack", "npy", "npz", "onnx", "parquet", "pickle", "pkl", "pt",
    "pth", "safetensors", "tar", "tflite", "zip", "zst",
]  # fmt: skip
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in SUFFIXES)
LFS_THRESHOLD = 10 * 1024 * 1024
USERS = {"alice": ["acme", "timm"], "bob": []}  # and their organisations
TOKENS = {
    "hf_alice_write": ("alice", "write"),
    "hf_alice_read": ("alice", "read"),
    "hf_bob_write": ("bob", "write"),
}


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Refused(Exception):
    """An answer that is no success: raised anywhere in a route, sent by the handler."""

    def __init__(self, status, message, code=None, headers=None, **more):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}
        self.message, self.body = message, {"error": message, **more}


class Dropped(Exception):
    """The connection is closed without an answer."""


@dataclass
class Request:
    """What was asked, what it was answered, and the bytes of both, first lines and headers included."""

    method: str
    path: str
    headers: dict
    body: bytes = b""
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What happens to the next `times` requests that match."""

    method: str
    pattern: re.Pattern
    status: int
    times: int
    done: bool  # the request is carried out, only its answer is lost or another
    after: int | None  # the answer breaks off after so many bytes of its body
    headers: dict
    hits: int = 0


class Blob:
    """A file of a tree: `data` of a regular one; `sha256` of one whose bytes are in Hub.lfs or the Xet storage."""

    def __init__(self, data=None, sha256=None, size=None):
        self.data, self.sha256 = data, sha256
        self.size = len(data) if data is not None else size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        self.oid = git_sha(data if data is not None else pointer.encode())


class Repo:
    """A repository: commits by their sha, and what points to them."""

    def __init__(self, kind, id, private, user):
        self.kind, self.id, self.private, self.gated, self.created = kind, id, private, False, now()
        self.commits, self.branches, self.tags, self.prs, self.threads, self.downloads = {}, {}, {}, {}, {}, 0
        tree = {".gitattributes": Blob(GITATTRIBUTES.encode())}
        self.branches["main"] = self.add("initial commit", "", tree, None, user)

    def add(self, title, message, tree, parent, user):
        seed = [self.id, title, message, parent, len(self.commits), time.time_ns()]
        sha = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        self.commits[sha] = {
            "id": sha,
            "title": title,
            "message": message,
            "date": now(),
            "parent": parent,
            "authors": [{"user": user}],
            "tree": tree,
        }
        return sha

    def resolve(self, revision):
        revision = revision or "main"
        for refs, prefix in ((self.branches, "refs/heads/"), (self.tags, "refs/tags/"), (self.prs, "")):
            for name in (revision, revision.removeprefix(prefix)):
                if name in refs:
                    return refs[name]
        hits = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(hits) != 1:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return hits[0]

    def tree(self, revision="main"):
        """Return {path: blob} at a branch, tag or commit."""
        return self.commits[self.resolve(revision)]["tree"]

    def history(self, revision="main"):
        """Return the commits that lead to a revision, newest first."""
        out, sha = [], self.resolve(revision)
        while sha:
            out.append(self.commits[sha])
            sha = out[-1]["parent"]
        return out


class Hub:
    """The Hub's whole state, and the server that answers for it."""

    def __init__(self, host="127.0.0.1", port=0, xet=True, cdn=True):
        self.xet_enabled, self.cdn = xet, cdn
        self.lock = threading.RLock()
        self.reset()
        self.host, self.port, self.server = host, port, None

    def reset(self):
        """Forget every repository, object, fault and request; keep address, users and tokens."""
        with self.lock:
            self.users = {user: list(organisations) for user, organisations in USERS.items()}
            self.tokens = dict(TOKENS)
            self.repos, self.lfs = {}, {}
            self.xorbs, self.xet_files, self.xet_by_sha = {}, {}, {}
            self.requests, self.faults = [], []

    def token(self, user, role="write"):
        """Return a token of a user, for writing or for reading only."""
        return next(token for token, owner in self.tokens.items() if owner == (user, role))

    def fail(self, method, pattern, status, times=1, *, done=False, after=None, **headers):
        """Let the next `times` requests that match fail.

        Args:
            method: as the client sends it, or "*".
            pattern: a regular expression, searched in the path without its query.
            status: of the answer; 0 closes the connection instead.
            times: how often.
            done: the request is carried out first: only its answer is another, or lost.
            after: with status 0, the request is carried out and its answer breaks off after so many bytes of its body.
            headers: of the answer, e.g. Retry_After="0".

        Returns:
            The fault; its `hits` counts how often it came to pass.
        """
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        fault = Fault(method, re.compile(pattern), status, times, done or after is not None, after, headers)
        self.faults.append(fault)
        return fault

    def fault(self, method, path):
        """Return the fault that meets a request, counting it, or None."""
        with self.lock:
            for fault in self.faults:
                if fault.hits < fault.times and fault.method in (method, "*") and fault.pattern.search(path):
                    fault.hits += 1
                    return fault
        return None

    def bytes_sent(self, pattern=""):
        """Return (received, sent) bytes of all requests whose path matches: the traffic, headers included."""
        hits = [request for request in self.requests if re.search(pattern, request.path)]
        return sum(request.received for request in hits), sum(request.sent for request in hits)

    def start(self):
        """Listen, where it listened before if it did."""
        self.server = Server((self.host, self.port), type("BoundHandler", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://{self.host}:{self.port}"
        self.cdn_url = f"http://localhost:{self.port}"  # another host than the Hub's own, as in the real one
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        """Refuse new connections; what is open stays open until the client closes it. The state is kept."""
        self.server.shutdown()
        self.server.server_close()
        self.server = None

    __enter__ = start

    def __exit__(self, *exc):
        self.stop()

    def create(self, id, files, user="alice", private=False):
        """Create a model with files {path: bytes} in one commit, past all requests; return it."""
        repo = self.repos["models", id] = Repo("models", id, private, user)
        tree = {**repo.tree(), **{path: self.store(path, data) for path, data in files.items()}}
        repo.branches["main"] = repo.add("files", "", tree, repo.branches["main"], user)
        return repo

    def store(self, path, data):
        if path.rsplit(".", 1)[-1] not in SUFFIXES:
            return Blob(data)
        sha = hashlib.sha256(data).hexdigest()
        self.lfs[sha] = data
        return Blob(sha256=sha, size=len(data))

    def content(self, blob):
        """Return a file's bytes, rebuilt by the real client from our own Xet storage if they came with Xet."""
        if blob.data is not None:
            return blob.data
        if blob.sha256 not in self.lfs:
            import hf_xet

            with tempfile.TemporaryDirectory() as folder:
                file, expires = Path(folder, "file"), int(time.time()) + 3600
                info = hf_xet.XetFileInfo(self.xet_by_sha[blob.sha256], blob.size)
                session = hf_xet.XetSession()
                with session.new_file_download_group(
                    endpoint=self.url + "/cas", token="t", token_expiry_unix_secs=expires
                ) as group:
                    group.start_download_file(info, str(file))
                self.lfs[blob.sha256] = file.read_bytes()
        return self.lfs[blob.sha256]

    def has_object(self, sha):
        return sha in self.lfs or sha in self.xet_by_sha

    def entry(self, repo, sha, path):
        """Return a file as a listing shows it."""
        blob = repo.commits[sha]["tree"][path]
        entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
            if blob.sha256 in self.xet_by_sha:
                entry["xetHash"] = self.xet_by_sha[blob.sha256]
        return entry

    def info(self, repo, sha):
        """Return a repository as its page shows it, with the tags that its card gives."""
        commit = repo.commits[sha]
        tree, card = commit["tree"], {}
        if "README.md" in tree:
            card = front_matter(self.content(tree["README.md"]).decode("utf-8", "replace"))[0] or {}
        license = [f"license:{card['license']}"] if card.get("license") else []
        return {
            "id": repo.id,
            "sha": sha,
            "private": repo.private,
            "gated": repo.gated,
            "downloads": repo.downloads,
            "lastModified": commit["date"],
            "createdAt": repo.created,
            "tags": as_list(card.get("tags")) + license,
            "siblings": [{"rfilename": path} for path in sorted(tree)],
            "cardData": card,
        }


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def front_matter(text):
    """Return (metadata or None, errors, warnings) of a README.md, as POST /api/validate-yaml does."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    if not found:
        return None, [], [{"message": "empty or missing yaml metadata in repo card"}]
    try:
        meta = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return None, [{"message": f"YAML parse error: {str(error).splitlines()[0]}"}], []
    if not isinstance(meta, dict):
        return None, [{"message": "metadata must be a mapping"}], []
    return meta, [{"message": message} for message in card_faults(meta)], []


def card_faults(meta):
    for key in ("tags", "datasets", "metrics", "language", "base_model"):
        value = meta.get(key)
        if value is not None and not all(isinstance(item, str) for item in as_list(value)):
            yield f'"{key}" must be a string or an array of strings'
    for key in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if meta.get(key) is not None and not isinstance(meta[key], str):
            yield f'"{key}" must be a string'
    for i, entry in enumerate(meta.get("model-index") or []):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            yield f'"model-index[{i}].name" is required'
            continue
        for j, result in enumerate(entry.get("results") or []):
            for key in ("task", "dataset", "metrics"):
                if not result.get(key):
                    yield f'"model-index[{i}].results[{j}].{key}" is required'


# -- HTTP


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request, client_address):
        """Print what went wrong, unless it was the client that hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Counted:
    """A stream that counts what goes through it."""

    def __init__(self, stream):
        self.stream, self.count, self.request = stream, 0, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def read(self, *args):
        data = self.stream.read(*args)
        self.count += len(data)
        return data

    def readline(self, *args):
        data = self.stream.readline(*args)
        self.count += len(data)
        return data

    def write(self, data):
        self.request.sent += len(data)  # before the other side has it, and may look
        return self.stream.write(data)


ROUTES = []


def route(method, pattern, need=None):
    """Register a function for requests; {repo} in the pattern is looked up, and `need` is the right it asks for."""
    pattern = pattern.replace("{repo}", r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+(?:/[^/]+)?)")
    # The two routes outside /api name a model without a prefix.
    pattern = pattern.replace("{prefixed}", r"(?P<kind>datasets/|spaces/)?(?P<id>[^/]+(?:/[^/]+)?)")

    def register(function):
        ROUTES.append((method, re.compile(f"^{pattern}$"), function, need))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, hub = "HTTP/1.1", "loopback-hub", None
    disable_nagle_algorithm = True  # or every answer with a body waits 40 ms

    def setup(self):
        super().setup()
        self.rfile, self.wfile = Counted(self.rfile), Counted(self.wfile)

    def log_message(self, *args):
        """Keep quiet."""

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def json(self):
        return json.loads(self.raw or b"{}")

    def send(self, status, data=b"", **headers):
        """Answer with bytes, or with anything else as JSON. Headers: `_` stands for `-`."""
        if self.met and self.met.done:
            fault, self.met = self.met, None
            if fault.status:
                status, data, headers = fault.status, {"error": f"injected {fault.status}"}, fault.headers
            else:
                self.cut = fault.after
                if fault.after is None:
                    raise Dropped
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content_Type": "application/json; charset=utf-8", **headers}
        self.asked.status = status
        self.send_response(status)
        fixed = {"Content_Length": str(len(data)), "X_Request_Id": f"Root=1-{time.time_ns():x}"}
        for name, value in {**fixed, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if self.cut is None else data[: self.cut])
        if self.cut is not None:
            raise Dropped

    def hang_up(self):
        self.close_connection = True
        with suppress(OSError):  # the other side may have been first
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_any(self):
        url = urlsplit(self.path)
        self.query, self.met, self.cut = parse_qs(url.query), None, None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.raw = self.body()
        self.asked = Request(self.command, self.path, headers, self.raw)
        self.asked.received, self.rfile.count, self.wfile.request = self.rfile.count, 0, self.asked
        self.hub.requests.append(self.asked)
        try:
            self.answer(url.path)
        except Refused as refused:
            code = {"X_Error_Code": refused.code} if refused.code else {}
            headers = {"X_Error_Message": refused.message, **code, **refused.headers}
            try:
                self.send(refused.status, refused.body, **headers)
            except Dropped:
                self.hang_up()
        except Dropped:
            self.asked.status = 0
            self.hang_up()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client did not wait for its answer

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def answer(self, path):
        self.met = self.hub.fault(self.command, path)
        if self.met and not self.met.done:
            fault, self.met = self.met, None
            if not fault.status:
                raise Dropped
            return self.send(fault.status, {"error": f"injected {fault.status}"}, **fault.headers)
        self.user, self.role = self.authenticate(path)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function, need in ROUTES:
            if wanted == method and (hit := pattern.match(path)):
                found = {key: unquote(value) if value else value for key, value in hit.groupdict().items()}
                if "kind" in found and "id" in found:
                    kind = (found.pop("kind") or "models").rstrip("/")
                    found["repo"] = self.repo(kind, found.pop("id"), need)
                return function(self, **found)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    # -- rights

    def authenticate(self, path):
        given = self.headers.get("Authorization", "")
        if not given or path.startswith(("/cas/", "/cdn/", "/lfs/")):  # these carry rights of their own
            return None, None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def may(self, namespace):
        return self.user is not None and (namespace == self.user or namespace in self.hub.users[self.user])

    def repo(self, kind, id, need=None):
        known = {(k, name.lower()): repo for (k, name), repo in self.hub.repos.items()}
        repo, owner = known.get((kind, id.lower())), id.split("/")[0]
        if repo is None or (repo.private and not self.may(owner)):
            if self.user is None:  # over http:// the client needs the code to say "repository not found"
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if need == "read" and repo.gated and not self.may(owner):
            words = f"Access to model {id} is restricted and you are not in the authorized list."
            raise Refused(403 if self.user else 401, words, "GatedRepo")
        if need == "write":
            self.writable(owner, f"your token has no write permission on {id}")
        return repo

    def changeable(self, repo, revision):
        """Refuse who may not write, but for a pull request: everybody may open one, and write to one's own."""
        own = repo.threads.get(revision, {}).get("author", {}).get("name") == self.user
        if self.user is None or not ("create_pr" in self.query or own):
            self.repo(repo.kind, repo.id, "write")

    def writable(self, namespace, why):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.role != "write" or not self.may(namespace):
            raise Refused(403, f"Forbidden: {why}")


# -- account and repositories


@route("GET", "/api/whoami-v2")
def whoami(h):
    if h.user is None:
        raise Refused(401, "Invalid username or password.")
    organisations = [{"type": "org", "name": o, "fullname": o, "roleInOrg": "admin"} for o in h.hub.users[h.user]]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": h.role}}
    person = {"type": "user", "id": "0" * 24, "name": h.user, "fullname": h.user}
    h.send(200, {**person, "isPro": False, "emailVerified": True, "orgs": organisations, "auth": token})


@route("POST", "/api/repos/create")
def create(h):
    asked = h.json()
    owner, kind = asked.get("organization") or h.user, asked.get("type") or "model"
    h.writable(owner, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    kind, id = kind + "s", f"{owner}/{asked['name']}"
    url = f"{h.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"
    with h.hub.lock:
        if (kind, id) in h.hub.repos:
            raise Refused(409, f"You already created this {kind[:-1]} repo: {id}", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        h.hub.repos[kind, id] = Repo(kind, id, private, h.user)
    h.send(200, {"url": url, "name": id, "id": "0" * 24})


@route("POST", "/api/validate-yaml")
def validate(h):
    _, errors, warnings = front_matter(h.json()["content"])
    h.send(400 if errors else 200, {"errors": errors, "warnings": warnings})


@route("GET", "/api/{repo}(/revision/(?P<revision>[^/]+))?")
def info(h, repo, revision):
    h.send(200, h.hub.info(repo, repo.resolve(revision)))


@route("GET", "/api/{repo}/tree/(?P<revision>[^/]+)")
def tree(h, repo, revision):
    """List all files; a client that turns pages or opens folders one by one asks for what is not here."""
    if h.query.get("recursive", ["False"])[0].lower() != "true":
        raise Refused(501, "Only recursive listings are here.")
    sha = repo.resolve(revision)
    h.send(200, [h.hub.entry(repo, sha, name) for name in sorted(repo.commits[sha]["tree"])])


@route("GET", "/api/{repo}/refs")
def refs(h, repo):
    def named(refs, prefix):
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

    branches, tags = named(repo.branches, "refs/heads/"), named(repo.tags, "refs/tags/")
    h.send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": named(repo.prs, "")})


@route("POST", "/api/{repo}/(?P<what>branch|tag)/(?P<name>[^/]+)", "write")
def add_ref(h, repo, what, name):
    asked = h.json()
    if what == "branch":
        refs, start = repo.branches, asked.get("startingPoint")
    else:
        refs, start, name = repo.tags, name, asked["tag"]
    sha = repo.resolve(start)
    if not re.fullmatch(r"[^\s~^:?*\[\\]+", name) or ".." in name:
        raise Refused(400, f"Invalid reference name: {name}")
    if name in refs:
        raise Refused(409, f"Reference refs/{'heads' if what == 'branch' else 'tags'}/{name} already exists")
    refs[name] = sha
    h.send(200, {})


# -- upload: preupload, then LFS or Xet, then the commit


@route("POST", "/api/{repo}/preupload/(?P<revision>[^/]+)")
def preupload(h, repo, revision):
    h.changeable(repo, revision)
    asked, files, out = h.json(), repo.tree(revision), []
    attributes = h.hub.content(files[".gitattributes"]).decode() if ".gitattributes" in files else ""
    large = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    for file in asked["files"]:
        path = file["path"]
        if re.match(r"\.\.[\\/]", path) or ".." in path.split("/"):
            raise Refused(422, f"Invalid path: {path}")
        name, old = path.rsplit("/", 1)[-1], files.get(path)
        is_lfs = file["size"] > LFS_THRESHOLD or any(fnmatch.fnmatch(name, pattern) for pattern in large)
        oid = old and (old.sha256 or old.oid)
        out.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid})
    h.send(200, {"files": out, "commitOid": repo.resolve(revision)})


@route("POST", r"/{prefixed}\.git/info/lfs/objects/batch")
def lfs_batch(h, repo):
    asked, objects = h.json(), []
    if h.user is None or "ref" in asked:  # without a ref it is for a pull request, which every user may open
        h.repo(repo.kind, repo.id, "write")
    transfers = asked.get("transfers", [])
    if h.hub.xet_enabled and "xet" in transfers:  # a client that leaves the choice to the server
        same = [{"oid": item["oid"], "size": item["size"]} for item in asked["objects"]]
        return h.send(200, {"transfer": "xet", "objects": same})
    for item in asked["objects"]:
        found = {"oid": item["oid"], "size": item["size"]}
        if not h.hub.has_object(item["oid"]):
            href = f"{h.hub.url}/lfs/{item['oid']}"
            found["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
        objects.append(found)
    h.send(200, {"transfer": "basic", "objects": objects, "hash_algo": "sha256"})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(h, oid):
    if hashlib.sha256(h.raw).hexdigest() != oid:
        raise Refused(400, "sha256 mismatch")
    h.hub.lfs[oid] = h.raw
    h.send(200, b"", ETag=f'"{hashlib.md5(h.raw).hexdigest()}"')


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(h, oid):
    if oid not in h.hub.lfs:
        raise Refused(404, "object not found")
    h.send(200, {})


@route("POST", "/api/{repo}/commit/(?P<revision>[^/]+)")
def commit(h, repo, revision):
    is_pr = "create_pr" in h.query
    h.changeable(repo, revision)
    lines = [json.loads(line) for line in h.raw.splitlines() if line.strip()]
    head = next(line["value"] for line in lines if line["key"] == "header")
    branch = revision.removeprefix("refs/heads/")
    with h.hub.lock:
        to_pr = revision in repo.prs
        if not to_pr and branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tip = repo.resolve(revision)
        if (parent := head.get("parentCommit")) and not tip.startswith(parent):
            raise Refused(412, "The branch was updated since you opened this page. Please refresh and try again.")
        files = dict(repo.commits[tip]["tree"])
        for line in lines:
            CHANGES.get(line["key"], lambda *_: None)(h.hub, repo, files, line["value"])
        sha = repo.add(head["summary"], head.get("description", ""), files, tip, h.user)
        if is_pr:
            number = len(repo.prs) + 1
            repo.prs[f"refs/pr/{number}"] = sha
        elif to_pr:
            repo.prs[revision] = sha
        else:
            repo.branches[branch] = sha
    base = f"{h.hub.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{base}/commit/{sha}", "hookOutput": ""}
    h.send(200, answer | ({"pullRequestUrl": f"{base}/discussions/{number}"} if is_pr else {}))


def put_file(hub, repo, files, value):
    path = value["path"]
    encoded = value.get("encoding") == "base64"
    data = base64.b64decode(value["content"]) if encoded else value["content"].encode()
    if len(data) > LFS_THRESHOLD:
        raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    if path == "README.md" and (faults := front_matter(data.decode("utf-8", "replace"))[1]):
        raise Refused(400, "Invalid metadata in README.md: " + "; ".join(fault["message"] for fault in faults))
    files[path] = Blob(data)


def put_lfs_file(hub, repo, files, value):
    path, oid = value["path"], value["oid"]
    if not hub.has_object(oid):
        words = f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}"
        raise Refused(400, words)
    known = (blob.size for commit in repo.commits.values() for blob in commit["tree"].values() if blob.sha256 == oid)
    files[path] = Blob(sha256=oid, size=value.get("size") or next(known, 0))


def remove(hub, repo, files, value):
    path = value["path"].rstrip("/")
    hits = [name for name in files if name == path or name.startswith(path + "/")]
    if not hits:
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in hits:
        del files[name]


CHANGES = {"file": put_file, "lfsFile": put_lfs_file, "deletedFile": remove, "deletedFolder": remove}


@route("POST", "/api/{repo}/discussions")
def new_discussion(h, repo):
    """Open a pull request, to which a client that uploads with Xet commits afterwards."""
    number = len(repo.prs) + 1
    revision = f"refs/pr/{number}"
    repo.prs[revision] = repo.resolve("main")
    repo.threads[revision] = {
        "num": number,
        "title": h.json()["title"],
        "status": "draft",
        "isPullRequest": True,
        "createdAt": now(),
        "author": {"name": h.user},
        "repo": {"name": repo.id, "type": "model"},
        "events": [],
        "diff": "",
        "filesWithConflicts": [],
        "changes": {"base": "refs/heads/main", "mergeCommitId": None},
    }
    h.send(200, {"num": number, "url": f"{h.hub.url}/{repo.id}/discussions/{number}", "pullRequest": True})


@route("GET", "/api/{repo}/discussions/(?P<number>[0-9]+)")
def discussion(h, repo, number):
    h.send(200, repo.threads[f"refs/pr/{number}"])


# -- download


@route("GET", r"/{prefixed}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "read")
def resolve(h, repo, revision, path):
    sha = repo.resolve(revision)
    blob = repo.commits[sha]["tree"].get(path)
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", {"X_Repo_Commit": sha})
    head = {"X_Repo_Commit": sha, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept_Ranges": "bytes"}
    if blob.sha256:
        head |= {"X_Linked_ETag": f'"{blob.sha256}"', "X_Linked_Size": str(blob.size)}
        if h.hub.xet_enabled and (file := h.hub.xet_by_sha.get(blob.sha256)):
            rights = f"{h.hub.url}/api/{repo.kind}/{repo.id}/xet-read-token/{sha}"
            head |= {"X_Xet_Hash": file, "X_Xet_Refresh_Route": rights, "Link": f'<{rights}>; rel="xet-auth"'}
        if h.hub.cdn:  # the bytes come from another host, and without a token
            place = f"{h.hub.cdn_url}/cdn/{blob.sha256}?size={blob.size}"
            return h.send(302, b"", Location=place, **head)
    if h.command == "GET":
        repo.downloads += 1
    send_range(h, h.hub.content(blob) if h.command == "GET" or blob.data is not None else bytes(blob.size), head)


@route("GET", "/cdn/(?P<sha>[0-9a-f]{64})")
def cdn(h, sha):
    if h.headers.get("Authorization"):
        raise Refused(400, "the Hub's token was sent to another host")
    blob = Blob(sha256=sha, size=int(h.query["size"][0]))
    send_range(h, h.hub.content(blob), {"ETag": f'"{sha}"', "Accept_Ranges": "bytes"})


def send_range(h, data, head):
    kind = "application/octet-stream"
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", h.headers.get("Range", ""))
    if not asked or not any(asked.groups()):
        return h.send(200, data, Content_Type=kind, **head)
    start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
    end = min(int(asked[2]) if asked[1] and asked[2] else len(data) - 1, len(data) - 1)
    if start >= len(data):
        return h.send(416, b"", Content_Range=f"bytes */{len(data)}")
    place = f"bytes {start}-{end}/{len(data)}"
    return h.send(206, data[start : end + 1], Content_Type=kind, Content_Range=place, **head)


# -- Xet: tokens, and a minimal content-addressed storage


@route("GET", "/api/{repo}/xet-(?P<mode>read|write)-token/(?P<revision>[^/]+)", "read")
def xet_token(h, repo, mode, revision):
    if not h.hub.xet_enabled:
        raise Refused(404, "Xet is not enabled")
    if mode == "write":
        h.changeable(repo, revision)
    rights = {"casUrl": h.hub.url + "/cas", "exp": int(time.time()) + 3600, "accessToken": "xet_test"}
    head = {
        "X_Xet_Cas_Url": rights["casUrl"],
        "X_Xet_Access_Token": rights["accessToken"],
        "X_Xet_Token_Expiration": str(rights["exp"]),
    }
    h.send(200, rights, **head)


def hexhash(raw):
    """Return a Merkle hash as it is printed: four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@route("POST", "/cas/v1/xorbs/[^/]+/(?P<xorb>[0-9a-f]{64})")
def put_xorb(h, xorb):
    # The offset after each chunk, whose header has 8 bytes: version u8, packed u24, scheme u8, unpacked u24.
    ends, position = [0], 0
    while position + 8 <= len(h.raw) and h.raw[position] == 0:
        position += 8 + int.from_bytes(h.raw[position + 1 : position + 4], "little")
        ends.append(position)
    is_new = xorb not in h.hub.xorbs
    h.hub.xorbs[xorb] = (h.raw, ends)
    h.send(200, {"was_inserted": is_new})


@route("POST", "/cas/v1/shards")
def put_shard(h):
    data, position = h.raw, 48
    while data[position : position + 32] != b"\xff" * 32:
        file = hexhash(data[position : position + 32])
        flags, count = struct.unpack("<II", data[position + 32 : position + 40])
        position += 48
        terms = []
        for _ in range(count):
            _, size, start, end = struct.unpack("<4I", data[position + 32 : position + 48])
            terms.append((hexhash(data[position : position + 32]), size, start, end))
            position += 48
        if flags & 1 << 31:  # a verification entry for each term
            position += 48 * count
        if any(xorb not in h.hub.xorbs for xorb, *_ in terms):
            raise Refused(400, "shard references an unknown xorb")
        h.hub.xet_files[file] = terms
        if flags & 1 << 30:  # metadata: the sha256 of the file
            h.hub.xet_by_sha[hexhash(data[position : position + 32])] = file
            position += 48
    h.send(200, {"result": 1})


@route("GET", "/cas/v1/reconstructions/(?P<file>[0-9a-f]{64})")
def reconstruct(h, file):
    if file not in h.hub.xet_files:
        raise Refused(404, "file not found")
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", h.headers.get("Range", ""))
    low, high = (int(asked[1]), int(asked[2]) + 1) if asked else (0, 1 << 62)
    terms, fetch, position, skip = [], {}, 0, None
    for xorb, size, start, end in h.hub.xet_files[file]:
        if position < high and position + size > low:
            skip = max(0, low - position) if skip is None else skip
            ends, chunks = h.hub.xorbs[xorb][1], {"start": start, "end": end}
            terms.append({"hash": xorb, "unpacked_length": size, "range": chunks})
            place = {"start": ends[start], "end": ends[end] - 1}
            where = {"range": chunks, "url": f"{h.hub.url}/cas/xorb/{xorb}", "url_range": place}
            fetch.setdefault(xorb, []).append(where)
        position += size
    if low >= position > 0:
        return h.send(416, b"")
    return h.send(200, {"offset_into_first_range": skip or 0, "terms": terms, "fetch_info": fetch})


@route("GET", "/cas/xorb/(?P<xorb>[0-9a-f]{64})")
def get_xorb(h, xorb):
    send_range(h, h.hub.xorbs[xorb][0], {})
