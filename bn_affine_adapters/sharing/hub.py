"""The Hub: fetch an adapter or its base, push a folder. Whatever goes wrong is said with what to do."""

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
)
from huggingface_hub.utils import httpx
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..adapter.config import BNOnlyConfig
from ..adapter.limits import LIFT, MAX_PARAMETERS
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
)
from .card import CARD_NAME, FIGURE_NAME, write_card
from .folder import COMMIT, HUB_ID, MAX_BYTES, check_files, read_config
from .results import RESULTS_NAME

LIBRARY: dict[str, Any] = {"library_name": "bn_affine_adapters", "library_version": version("bn-affine-adapters")}
BASE_FILE = "model.safetensors"
_ADVICE: dict[int | None, tuple[type[HubError], str]] = {
    401: (HubAccessError, "check the name, and log in with a token that is valid: hf auth login, or token="),
    403: (HubAccessError, "use a token with that right, or ask the owner of the repository for access"),
    404: (HubNotFoundError, "check the name and the revision; a private repository needs the token of a member"),
    409: (HubConflictError, "it exists, or somebody else is at work there: look, then try again"),
    412: (HubConflictError, "somebody else committed meanwhile: look at what changed, then try again"),
    429: (HubUnavailableError, "too many requests: wait a few minutes, then try again"),
    None: (HubUnavailableError, "check the connection and HF_ENDPOINT, then try again"),
}
_OTHERWISE: tuple[type[HubError], str] = (HubError, "read what the Hub says, mend it, then try again")


def fetch(
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_parameters: int | None = MAX_PARAMETERS,
) -> Path:
    """Return the folder of an adapter: a local one as it is, or a snapshot of a Hub repository's two files.

    Args: as `load_bn_only_model`.

    Raises:
        AdapterFileError: there is no such folder, or the repository holds a pickle alone.
        TooLargeError: a file is larger than an adapter of a network within the limit can be.
        HubError: the Hub has it not, hides it, or cannot be reached.
    """
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise AdapterFileError("A subfolder lies inside its repository.", seen=repr(subfolder), do="give a plain name")
    if Path(adapter).is_dir() or not HUB_ID.fullmatch(str(adapter)):
        return Path(adapter, inside)
    repo, common = str(adapter), {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    most = None if max_parameters is None else MAX_BYTES + 8 * max_parameters
    with explained(f"The adapter {repo} cannot be loaded (and there is no folder of that name)", token):
        config = _download(repo, (inside / CONFIG_NAME).as_posix(), revision, MAX_BYTES, common)
        # The second file at the commit of the first, whatever happens on the branch between.
        folder = config.parent
        commit = folder.parents[len(inside.parts) - 1].name if inside.parts else folder.name
        try:
            _download(repo, (inside / SAFETENSORS_WEIGHTS_NAME).as_posix(), commit, most, common)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            pickled = HfApi().file_exists(repo, (inside / WEIGHTS_NAME).as_posix(), revision=commit, token=token)
            raise AdapterFileError(
                f"{repo} has no {SAFETENSORS_WEIGHTS_NAME}"
                + (f"; {WEIGHTS_NAME} is a pickle and is never loaded." if pickled else "."),
                seen=f"commit {commit}",
                do="ask its owner to push it with model.push_to_hub(...)",
            ) from error
    return folder


def fetch_base(config: BNOnlyConfig, max_parameters: int | None = None, **common: Any) -> Path:
    """Return the file of the pretrained weights that an adapter's configuration pins, from the configured endpoint.

    Args:
        config: of an adapter without a seed.
        max_parameters: refuse a file that is larger than such a network's.
        common: token, cache_dir, local_files_only.

    Raises:
        BaseRequiredError: no repository is named, or not at a commit: what a branch holds may change.
        HubError: the Hub has it not, hides it, or cannot be reached.
    """
    base, commit = config.base_model_name_or_path or "", config.revision or ""
    if not HUB_ID.fullmatch(base) or not COMMIT.fullmatch(commit):
        raise BaseRequiredError(
            "The adapter was trained on given weights and does not say where on the Hub they are.",
            seen=f"base_model_name_or_path={base[:200]!r}, revision={commit[:200]!r}",
            do="load_bn_only_model(adapter, model=base)",
        )
    most = None if max_parameters is None else MAX_BYTES + 8 * max_parameters
    with explained(f"The base {base} of the adapter cannot be fetched", common.get("token")):
        return _download(base, BASE_FILE, commit, most, common)


def cached_commit(repo: str) -> str | None:
    """Return the commit at which a repository's weights were fetched last, or None if they are not in the cache."""
    try:
        return hf_hub_download(repo, BASE_FILE, local_files_only=True, dry_run=True).commit_hash
    except (EntryNotFoundError, HFValidationError):
        return None


def _download(repo: str, file: str, revision: str | None, most: int | None, common: dict[str, Any]) -> Path:
    size = hf_hub_download(repo, file, revision=revision, dry_run=True, **common, **LIBRARY).file_size
    if most is not None and size > most:
        raise TooLargeError(
            f"{file} of {repo} is larger than any adapter needs, and was not downloaded.",
            seen=f"{size:,} bytes, where {most:,} are allowed",
            do=LIFT,
        )
    return Path(hf_hub_download(repo, file, revision=revision, **common, **LIBRARY))


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
        folder: what ``model.save_pretrained`` wrote.
        repo_id: "me/name", or "name" for the token's owner; made if there is none.
        commit_message: by default it says what the adapter is.
        commit_description: the rest of the commit's message.
        private: of a new repository; by default as its owner's settings say.
        token: by default the one of ``hf auth login``.
        revision: a branch, made if there is none.
        create_pr: open a pull request instead of a commit on the branch.
        tag: set on the commit, e.g. "v1"; has to be new.
        card: push the folder's README.md, or write one with its figure; False leaves a card on the Hub as it is.
        about: as `card.write_card`: results, license, tags, datasets.

    Returns:
        What `huggingface_hub.HfApi.upload_folder` returns.

    Raises:
        HubError: the push failed; the folder is untouched, and the message says how to resume.
        AdapterFileError, ConfigError: the folder holds no whole adapter.
    """
    folder = Path(folder)
    check_files(folder)
    config = read_config(folder)
    if revision and COMMIT.fullmatch(revision):
        raise ConfigError("A push goes to a branch, not to a commit.", seen=f"revision={revision}", do="name a branch")
    api = HfApi(token=token, **LIBRARY)
    if "/" in repo_id and not HUB_ID.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is no name of a repository.", seen=str(folder), do='use "owner/name"')
    options = {"revision": revision, "tag": tag, "private": private, "create-pr": create_pr, "no-card": not card}
    options |= {"message": commit_message, "license": about.get("license")}
    resume = shlex.join(["bn-adapters", "push", str(folder), repo_id, *_flags(options)])
    with (
        explained(f"The adapter could not be pushed to {repo_id}", token, f"; then: {resume}"),
        tempfile.TemporaryDirectory() as staging,
    ):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        own_card = (CARD_NAME, FIGURE_NAME) if card and (folder / CARD_NAME).exists() else ()
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RESULTS_NAME, *own_card):
            if (folder / name).exists():
                shutil.copy(folder / name, staging)
        write_card(Path(staging), repo_id, write_readme=card and not own_card, **about)
        for file in Path(staging).rglob("*.*"):
            if file.suffix in (".md", ".json", ".yaml"):  # a command in a result line may have held the token
                file.write_text(_masked(file.read_text(encoding="utf-8"), token), encoding="utf-8")
        _make_room(api, repo_id, private, None if create_pr else revision, tag)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            commit_message=commit_message or _message(config),
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # Of an adapter that was there before; a card that stays may refer to them.
            delete_patterns=[RESULTS_NAME, ".eval_results/*"] if card else None,
        )
    if tag:
        with explained(f"The adapter was pushed to {repo_id}, but not tagged {tag!r}", token, f"; then: {resume}"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _make_room(api: HfApi, repo_id: str, private: bool | None, branch: str | None, tag: str | None) -> None:
    """Make the repository and the branch where they are not there, and refuse what would fail after the commit."""
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


def _message(config: BNOnlyConfig) -> str:
    drawn = "pretrained weights" if config.seed is None else f"seed {config.seed}"
    return f"Norm parameters of {config.architecture}, {drawn}"


@contextmanager
def explained(what: str, token: str | bool | None = None, resume: str = "") -> Iterator[None]:
    """Turn what the client raises into an error of ours, with what to do and without the token.

    Raises:
        HubError: by the status that the Hub answered with.
        NoSpaceError: the disk is full.
        ConfigError: a repository or revision has a name that cannot be one.
    """
    try:
        yield
    except BNAdapterError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{what}: this is no name.", seen=str(error), do='use "owner/name"') from None
    except (OSError, httpx.HTTPError, RuntimeError) as error:  # the client's transfers raise plain RuntimeErrors
        full = "os error 28" in str(error)  # as hf_xet says it
        if full or any(getattr(cause, "errno", None) == errno.ENOSPC for cause in _causes(error)):
            raise NoSpaceError(f"{what}: the disk is full.", seen=str(error), do="free some space" + resume) from None
        raise _translated(what, error, token, resume) from None


def _translated(what: str, error: BaseException, token: str | bool | None, resume: str) -> HubError:
    answers = [getattr(cause, "response", None) for cause in _causes(error)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    kind, do = _ADVICE.get(status, _OTHERWISE)
    if status is not None and status >= 500:
        kind, do = HubUnavailableError, "the Hub is in trouble (status.huggingface.co): wait, then try again"
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in _causes(error)):
        kind, do = _ADVICE[401]
    elif any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        do = "unset HF_HUB_OFFLINE: the Hub is needed for what is not in the cache"
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


def _causes(error: BaseException | None) -> Sequence[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
