"""The Hub: fetch an adapter or its base, push a folder; turn the client's errors into ours, with advice."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..errors import (
    AdapterFileError,
    BaseRequiredError,
    BNAdapterError,
    ConfigError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    NoSpaceError,
    TooLargeError,
    causes,
    disk_is_full,
    file_error,
    reading,
)
from ..settings import (
    COMPACT_NAME,
    CONFIG_NAME,
    HUB_ID,
    LIFT,
    MAX_PARAMETERS,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Settings,
    hub_id,
)
from .card import CARD_NAME, EVAL_RESULTS, write_card
from .compact import compact_file, read_adapter
from .contents import read_tensors
from .figure import FIGURE_NAME
from .folder import COMMIT, max_bytes, missing_file
from .handwritten import joined, sealed_again
from .paths import local_paths
from .results import RESULTS_NAME
from .untrusted import MAX_BYTES, opened, present, read_text

LIBRARY: dict[str, Any] = {"library_name": "bn_affine_adapters", "library_version": version("bn-affine-adapters")}
BASE_FILE = "model.safetensors"
# What each HTTP status means; None is for no answer.
_ADVICE: dict[int | None, tuple[type[HubError], str]] = {
    401: (HubAccessError, "check the name, and log in with a token that is valid: hf auth login, or token="),
    403: (HubAccessError, "use a token with that permission, or ask the owner of the repository for access"),
    404: (HubNotFoundError, "check the name and the revision; a private repository needs the token of a member"),
    409: (HubConflictError, "it exists, or somebody else is changing it: look at the repository, then try again"),
    412: (HubConflictError, "somebody else committed meanwhile: look at the changes, then try again"),
    429: (HubUnavailableError, "too many requests: wait a few minutes, then try again"),
    None: (HubUnavailableError, "check the connection and HF_ENDPOINT, then try again"),
}
_OTHERWISE: tuple[type[HubError], str] = (HubError, "correct what the Hub refuses, then try again")


def fetch(
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    max_parameters: int | None = MAX_PARAMETERS,
    **client: Any,
) -> Path:
    """Return the folder of an adapter, local or a snapshot of a Hub repository; the path of a file as it is.

    Args: as in `load_bn_only_model`; ``client`` is token, cache_dir and local_files_only.

    Raises:
        AdapterFileError: there is no such folder, or the repository has only a pickle.
        TooLargeError: a file is larger than an adapter of a network within the limit can be.
        HubError: the adapter is not on the Hub, needs another token, or the Hub cannot be reached.
    """
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise AdapterFileError("A subfolder is inside its repository.", seen=repr(subfolder), do="give a plain name")
    with reading(adapter):
        here = Path(adapter).exists()
    if here or not HUB_ID.fullmatch(str(adapter)):
        return _local(Path(adapter), inside)
    repo, token = str(adapter), client.get("token")
    with explained(f"The adapter {repo} cannot be loaded (and there is no folder of that name)", token):
        first = _first_file(repo, inside, revision, max_parameters, client)
        if (folder := first.parent) and first.name == COMPACT_NAME:
            return folder
        # The second file is taken from the commit of the first, in case the branch changes between the two.
        commit = folder.parents[len(inside.parts) - 1].name if inside.parts else folder.name
        try:
            _download(repo, inside / SAFETENSORS_WEIGHTS_NAME, commit, max_bytes(max_parameters), client)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            pickled = HfApi().file_exists(repo, (inside / WEIGHTS_NAME).as_posix(), revision=commit, token=token)
            do = "ask its owner to push it with model.push_to_hub(...)"
            raise missing_file(repo, SAFETENSORS_WEIGHTS_NAME, pickled, f"commit {commit}", do) from error
    return folder


def _local(adapter: Path, inside: Path) -> Path:
    folder = adapter / inside
    if inside.parts and not folder.resolve().is_relative_to(adapter.resolve()):
        what, seen = "A subfolder is inside its repository.", f"{folder} is a link to {folder.resolve()}"
        raise AdapterFileError(what, seen=seen, do="give that folder itself")
    return folder


def _first_file(
    repo: str, inside: Path, revision: str | None, max_parameters: int | None, client: dict[str, Any]
) -> Path:
    """Return the configuration in a repository, or the compact file where there is none."""
    try:
        return _download(repo, inside / CONFIG_NAME, revision, MAX_BYTES, client)
    except EntryNotFoundError as error:
        with suppress(EntryNotFoundError):
            return _download(repo, inside / COMPACT_NAME, revision, max_bytes(max_parameters), client)
        raise error


def fetch_base(config: Settings, max_parameters: int | None = None, **client: Any) -> Path:
    """Return the file of the pretrained weights that an adapter's configuration pins, from the configured endpoint.

    Args: as in `fetch`.

    Raises:
        BaseRequiredError: no repository is named, or no commit; the files of a branch may change.
        HubError: the file is not on the Hub, needs another token, or the Hub cannot be reached.
    """
    base, commit = config.base_model_name_or_path or "", config.revision or ""
    if not HUB_ID.fullmatch(base) or not COMMIT.fullmatch(commit):
        raise BaseRequiredError(
            "The adapter was trained on given weights and does not say where on the Hub they are.",
            seen=f"base_model_name_or_path={base[:200]!r}, revision={commit[:200]!r}",
            do="load_bn_only_model(adapter, model=base)",
        )
    with explained(f"The base {base} of the adapter cannot be fetched", client.get("token")):
        # Twice the bytes of the network: the head of the file may be much larger than the adapter's.
        limit = max_bytes(max_parameters and 2 * max_parameters)
        return _download(base, Path(BASE_FILE), commit, limit, client)


def cached_commit(repo: str) -> str | None:
    """Return the commit of a repository's weights in the client's cache, or None if they are not there."""
    try:
        return hf_hub_download(repo, BASE_FILE, local_files_only=True, dry_run=True).commit_hash
    except (EntryNotFoundError, HFValidationError):
        return None


def _download(repo: str, file: Path, revision: str | None, max_bytes: int | None, client: dict[str, Any]) -> Path:
    options: dict[str, Any] = {"filename": file.as_posix(), "revision": revision, **client, **LIBRARY}
    size = hf_hub_download(repo, dry_run=True, **options).file_size
    if max_bytes is not None and size > max_bytes:
        raise TooLargeError(
            f"{options['filename']} of {repo} is larger than any adapter needs, and was not downloaded.",
            seen=f"{size:,} bytes; the limit is {max_bytes:,}",
            do=LIFT,
        )
    return Path(hf_hub_download(repo, **options))


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    card: bool = True,
    **about: Any,
) -> CommitInfo:
    """Push an adapter's folder in one commit, with its model card; files that did not change are not sent again.

    Args:
        folder: what ``model.save_pretrained`` wrote; or a compact file that `export` wrote, or a folder that holds one
            and no adapter_config.json, which is pushed as adapter_compact.safetensors.
        repo_id: "me/name", or "name" for the token's owner; created if it does not exist.
        commit_message: by default it says what the adapter is.
        commit_description: the rest of the commit's message.
        private: of a new repository; by default as its owner's settings say.
        token: by default the one of ``hf auth login``.
        revision: a branch, created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        tag: a new tag for the commit, e.g. "v1".
        card: push the folder's README.md, or write one with its figure; what a person wrote into the card on the Hub is
            kept. False leaves a card on the Hub unchanged.
        about: as in `card.write_card`: results, license, tags, datasets.

    Returns:
        What `huggingface_hub.HfApi.upload_folder` returns.

    Raises:
        HubError: the push failed; the folder is unchanged, and the message says how to resume.
        AdapterFileError, ConfigError: the folder holds no complete adapter.
    """
    folder = Path(folder)
    config = read_adapter(folder, Settings)
    if compact_file(folder) is None:
        read_tensors(folder, config)
    if revision and COMMIT.fullmatch(revision):
        raise ConfigError("A push goes to a branch, not to a commit.", seen=f"revision={revision}", do="name a branch")
    if "/" in repo_id and not HUB_ID.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is not the name of a repository.", seen=str(folder), do='use "owner/name"')
    api = HfApi(token=token, **LIBRARY)
    weights = "pretrained weights" if config.seed is None else f"seed {config.seed}"
    options = {"revision": revision, "tag": tag, "private": private, "create-pr": create_pr, "no-card": not card}
    options |= {"message": commit_message, "license": about.get("license")}
    resume = shlex.join(["bn-adapters", "push", str(folder), repo_id, *_flags(options)])
    with (
        explained(f"The adapter could not be pushed to {repo_id}", token, f"; then: {resume}"),
        tempfile.TemporaryDirectory() as staging,
    ):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        there = _download_card(repo_id, revision, token) if card else None
        _stage(folder, config, Path(staging), repo_id, token, there, card, about)
        _prepare_repository(api, repo_id, private, None if create_pr else revision, tag)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            commit_message=commit_message or f"Norm parameters of {config.architecture}, {weights}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.parent.name if there else None,  # the card must not have changed meanwhile
            # Files of an earlier adapter; a card that is left unchanged may refer to them.
            delete_patterns=[RESULTS_NAME, f"{EVAL_RESULTS}*"] if card else None,
        )
    if tag:
        with explained(f"The adapter was pushed to {repo_id}, but not tagged {tag!r}", token, f"; then: {resume}"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _stage(
    folder: Path,
    config: Settings,
    staging: Path,
    repo_id: str,
    token: str | bool | None,
    there: Path | None,
    card: bool,
    about: dict[str, Any],
) -> None:
    """Copy the files to push, write the card and the results, and mask the token in all texts."""
    own_card = (CARD_NAME, FIGURE_NAME) if card and present(folder, CARD_NAME) else ()
    for name in (CONFIG_NAME, RESULTS_NAME, *own_card[:1]):
        if present(folder, name):
            (staging / name).write_text(read_text(folder, name), encoding="utf-8")
    tensors = compact_file(folder) or folder / SAFETENSORS_WEIGHTS_NAME
    targets = {tensors: COMPACT_NAME if config.compact else SAFETENSORS_WEIGHTS_NAME}
    for file, name in (targets | {folder / name: name for name in own_card[1:]}).items():
        if present(file.parent, file.name):
            limit = None if file == tensors else MAX_BYTES  # its size is checked when it is read
            with opened(file.parent, file.name, limit) as theirs, (staging / name).open("wb") as copy:
                shutil.copyfileobj(theirs, copy)
    if config.compact:
        _check_paths(config.to_dict())
    else:
        _check_config(staging / CONFIG_NAME)
    if there is not None:
        text = read_text(there.parent, CARD_NAME)
        if own_card:
            text = joined(text, (staging / CARD_NAME).read_text(encoding="utf-8"), config.seed is not None)
        (staging / CARD_NAME).write_text(text, encoding="utf-8")
    write_card(staging, repo_id, write_readme=card and not own_card, **about)
    for file in staging.rglob("*.*"):
        if file.suffix in (".md", ".json", ".yaml"):  # the command in a result line may contain the token
            text = file.read_text(encoding="utf-8")
            if (safe := _masked(text, token)) != text:
                file.write_text(sealed_again(safe) if file.name == CARD_NAME else safe, encoding="utf-8")


def _check_config(file: Path) -> None:
    """Take the path of a base out of a configuration that an earlier version wrote; refuse any other path in it."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("base_model_name_or_path") and hub_id(content["base_model_name_or_path"]) is None:
        content["base_model_name_or_path"] = content["revision"] = None
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)  # as PEFT writes it
        file.write_text(text, encoding="utf-8")
    _check_paths(content)


def _check_paths(content: dict[str, Any]) -> None:
    if found := local_paths({key: value for key, value in content.items() if key != "label_names"}):
        do = "leave it out of the settings of BNOnlyConfig, and save the adapter again"
        raise ConfigError("The adapter's configuration names a path of this machine.", seen=found[0][:200], do=do)


def _download_card(repo: str, branch: str | None, token: str | bool | None) -> Path | None:
    """Return the model card that is on the Hub, of a new branch that of main; None if there is none."""
    for revision in dict.fromkeys((branch, None)):
        try:
            return _download(repo, Path(CARD_NAME), revision, MAX_BYTES, {"token": token})
        except LocalEntryNotFoundError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            if not isinstance(error, RevisionNotFoundError):
                return None
    return None


def _prepare_repository(api: HfApi, repo_id: str, private: bool | None, branch: str | None, tag: str | None) -> None:
    """Create the repository and the branch if they do not exist, and refuse what would fail after the commit."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        do = "choose another name, or make it private on the Hub first"
        raise HubConflictError(f"{repo_id} exists and is public.", seen="private=True; nothing was pushed", do=do)
    if tag and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        raise HubConflictError(f"{repo_id} has a tag {tag!r}.", seen="nothing was pushed", do="choose another tag")
    if branch and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _flags(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value:
            yield f"--{name}" if value is True else f"--{name}={value}"


@contextmanager
def explained(what: str, token: str | bool | None = None, resume: str = "") -> Iterator[None]:
    """Turn what the client raises into an error of this package, with advice and without the token.

    Raises:
        HubError: a subclass that follows from the Hub's HTTP status.
        FileError: a file here cannot be read or written, or the disk is full.
        ConfigError: a repository or revision has a name that cannot be one, or the Hub refuses a card's metadata.
    """
    try:
        yield
    except BNAdapterError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{what}: the name is not valid.", seen=str(error), do='use "owner/name"') from None
    except (OSError, httpx.HTTPError, RuntimeError) as error:  # the client's transfers raise plain RuntimeErrors
        if disk_is_full(error):
            raise NoSpaceError(f"{what}: the disk is full.", seen=str(error), do="free some space" + resume) from None
        if isinstance(error, OSError) and error.filename is not None:
            raise file_error(error, error.filename, "read or written") from None
        raise _translated(what, error, token, resume) from None
    except ValueError as error:
        if CARD_NAME not in str(error):
            raise
        do = f"correct the metadata at the top of {CARD_NAME}, between the lines ---"  # the client has the Hub check it
        raise ConfigError(f"{what}: the Hub refuses the card.", seen=str(error)[:400], do=do) from None


def _translated(what: str, error: BaseException, token: str | bool | None, resume: str) -> HubError:
    chain = causes(error)
    answers = [getattr(cause, "response", None) for cause in chain]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    kind, do = _ADVICE.get(status, _OTHERWISE)
    if status is not None and status >= 500:
        kind, do = HubUnavailableError, "the Hub has a fault (status.huggingface.co): wait, then try again"
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in chain):
        kind, do = _ADVICE[401]
    elif any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        do = "unset HF_HUB_OFFLINE: the file is not in the cache"
    elif status is None and isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
        do = "it is not in the cache: load it once without local_files_only"
    seen = _masked(" ".join(str(error).split()), token)
    translated = kind(f"{what}.", seen=f"{f'HTTP {status}; ' if status else ''}{seen[:400]}", do=do + resume)
    translated.status = status
    return translated


def _masked(text: str, token: str | bool | None) -> str:
    for secret in (token, get_token()):
        text = text.replace(secret, "***") if isinstance(secret, str) and secret else text
    return text
