"""Whether the commands of the documents would be understood: by make, finetune, kubectl, helm, docker and python.

Each check returns what is wrong in words, or None. Nothing is run but `kubectl VERB --help`.
"""

import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import helm_python
import typer
import yaml
from tests.unit.docs.markdown import EXAMPLES, ROOT, Block, blocks, comments

from finetune_api import ANNOTATION_CANCEL, ANNOTATION_RECONCILE, ANNOTATION_RETRY, KIND
from finetune_api.status import ConditionType
from finetune_api.v1alpha1 import parse_job
from finetune_operator.cli import app
from finetune_operator.manifest import read_manifests

Arguments = Sequence[str]


def commands(block: Block) -> Iterator[tuple[str, ...]]:
    """The commands of a block: lines joined on backslashes, comments left out, pipelines and chains taken apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        command: list[str] = []
        for token in (*lexer, ";"):
            if set(token) <= set("|&;"):
                if command:
                    yield tuple(command)
                command = []
            elif command or not re.match(r"[A-Z_]+=", token):
                command.append(token)


def problem(command: Arguments) -> str | None:
    """What is wrong with a command; None where nothing is."""
    check = PROGRAMS.get(Path(command[0]).name)
    return check(command[1:]) if check else f"{command[0]} is not a program that the tests know"


def _absent(*files: str) -> str | None:
    return next((f"{file} is not in the repository" for file in files if not (ROOT / file).exists()), None)


def _make(arguments: Arguments) -> str | None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return next((f"the Makefile has no target {word}" for word in arguments if "=" not in word and word not in targets), None)


def _finetune(arguments: Arguments) -> str | None:
    """Parsed by the program's own command line."""
    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("finetune", list(arguments))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        parameters = command.make_context(name, rest, parent=context).params
    except Exception as error:
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    given = [value.split("=", 1)[1] for option in ("claim", "config_map") for value in parameters.get(option) or ()]
    given = [path for path in given if path not in _published()]
    return _absent(*given, *(str(file) for file in (parameters.get("job"), parameters.get("file"), *parameters.get("files", ())) if file))


@functools.cache
def _published() -> set[str]:
    """Folders that local runs of the examples publish, from the repository's root."""
    manifests = ((path, manifest) for path in EXAMPLES for manifest in read_manifests(path.read_text()) if manifest.get("kind") == KIND)
    return {
        str((path.parent / ".finetune/claims" / spec.output.storage.removeprefix("pvc://") / kind).relative_to(ROOT))
        for path, spec in ((path, parse_job(manifest).spec) for path, manifest in manifests)
        if spec.output.storage is not None
        for kind in spec.artifacts
    }


def _docker(arguments: Arguments) -> str | None:
    verb, *rest = arguments
    image = [word for word in rest if word.startswith("registry.example/")]
    if verb == "push":
        return None if image and set(image) <= _built_images() else f"no command here builds {' '.join(rest)}"
    text = (ROOT / "Dockerfile").read_text()
    stages, declared = set(re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE)), set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    options = dict(zip(rest[::2], rest[1::2], strict=False))
    if verb != "build" or len(rest) % 2 == 0 or rest[-1] != "." or not options.keys() <= {"-t", "--target", "--build-arg"}:
        return "not a `docker build` of this repository"
    if options.get("--target") not in stages:
        return f"the Dockerfile has no target {options.get('--target')}"
    argument = options.get("--build-arg", "").split("=")[0]
    return f"the Dockerfile has no argument {argument}" if argument and argument not in declared else None


def _built_images() -> set[str]:
    return {command[command.index("-t") + 1] for block in blocks("sh") for command in commands(block) if command[:2] == ("docker", "build")}


def _helm(arguments: Arguments) -> str | None:
    verb, *rest = arguments
    words, options = _taken_apart(rest, switches={"create-namespace", "reuse-values", "wait"})
    if unknown := options.keys() - {"namespace", "create-namespace", "set", "reuse-values", "wait"}:
        return f"helm {verb} has no option {sorted(unknown)} that the tests know"
    if verb == "uninstall":
        return None if words == [_release()] else f"no command here installs {words}"
    if verb not in ("install", "upgrade") or len(words) != 2:
        return f"helm {verb} is not known, or lacks the release and the chart"
    if missing := _absent(f"{words[1]}/Chart.yaml"):
        return missing
    return _refused_values(words[1], options.get("set", []))


def _refused_values(chart: str, settings: list[str]) -> str | None:
    """The words of Helm itself, where the chart's schema does not take a value."""
    values: dict[str, Any] = {}
    for setting in settings:
        path, _, value = setting.partition("=")
        *parents, last = re.split(r"(?<!\\)\.", path)
        place = values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = yaml.safe_load(value)
    try:
        with helm_python.Chart.load(ROOT / chart) as loaded:
            loaded.render(values, name=_release(), namespace="finetune-system")
    except helm_python.HelmError as error:
        return str(error)
    return None


@functools.cache
def _release() -> str:
    installs = (command for block in blocks("sh") for command in commands(block) if command[:2] == ("helm", "install"))
    return next(installs)[2]


def _python(arguments: Arguments) -> str | None:
    if arguments[0] == "-m":
        return None if importlib.util.find_spec(arguments[1]) else f"there is no module {arguments[1]}"
    return _absent(arguments[0])


def _vllm(arguments: Arguments) -> str | None:
    """Only what https://docs.vllm.ai tells of serving adapters."""
    words, options = _taken_apart(arguments, switches={"enable-lora"})
    if words[0] != "serve" or len(words) != 2 or options.keys() != {"enable-lora", "max-lora-rank", "lora-modules"}:
        return "not how vLLM serves an adapter"
    return None


# kubectl


_KINDS = {
    **dict.fromkeys(("finetunejob", "finetunejobs", "ftj", "finetunejob.finetune.dev"), "FineTuneJob"),
    **dict.fromkeys(("tuningprofile", "tuningprofiles", "tprof"), "TuningProfile"),
    **dict.fromkeys(("pod", "pods"), "Pod"),
    **dict.fromkeys(("configmap", "configmaps"), "ConfigMap"),
    **dict.fromkeys(("secret", "secrets"), "Secret"),
    **dict.fromkeys(("namespace", "namespaces"), "Namespace"),
    **dict.fromkeys(("deployment", "deployments"), "Deployment"),
    **dict.fromkeys(("customresourcedefinition", "crd"), "CustomResourceDefinition"),
    "events": "Event",
}
_CONDITIONS = {"FineTuneJob": set(get_args(ConditionType)), "Pod": {"Ready"}, "Deployment": {"Available"}}
_SWITCHES = {"watch", "w", "A", "all-namespaces", "follow", "overwrite"}
_OPENS_FILE = {"f", "filename", "from-file"}


def _kubectl(arguments: Arguments) -> str | None:
    words, options = _taken_apart(arguments, switches=_SWITCHES | ({"f"} if "logs" in arguments else set()))
    verb, *objects = words
    if verb not in _KUBECTL:
        return f"kubectl {verb} is not a verb that the tests know"
    files = [value.split("=")[-1] for name in _OPENS_FILE & options.keys() for value in options[name] if verb != "logs"]
    unknown = _unknown_option(verb, options) if shutil.which("kubectl") else None
    return unknown or _absent(*files) or _KUBECTL[verb](objects, options)


def _unknown_option(verb: str, options: dict[str, list[str]]) -> str | None:
    told = _help(verb) + _help("options")
    known = set(re.findall(r"--([a-z-]+)=", told)) | set(re.findall(r"-(\w), --", told))
    if verb == "create":
        known |= {"from-file", "from-literal"}
    return next((f"kubectl {verb} has no option {name}" for name in options if name not in known), None)


@functools.cache
def _help(verb: str) -> str:
    words = (verb,) if verb == "options" else (verb, "--help")
    return subprocess.run(("kubectl", *words), capture_output=True, text=True, timeout=60, check=True).stdout


def _named(objects: list[str], options: dict[str, list[str]]) -> str | None:
    """KIND NAME, KIND/NAME, or KIND alone."""
    pairs = [tuple(word.split("/", 1)) for word in objects] if "/" in "".join(objects) else [tuple(objects)]
    for kind, *names in pairs:
        if kind not in _KINDS:
            return f"{kind} is not a kind that the tests know"
        if unknown := next((name for name in names if not _exists(_KINDS[kind], name)), None):
            return f"no manifest or command here makes {kind} {unknown}"
        conditions = [value.partition("=")[2] for value in options.get("for", [])]
        if wrong := [condition for condition in conditions if condition not in _CONDITIONS.get(_KINDS[kind], set())]:
            return f"{kind} has no condition {wrong[0]}"
    return None


def _exists(kind: str, name: str) -> bool:
    if kind == "Namespace":
        return True  # A user's cluster has its own.
    if kind == "Pod" and (match := re.fullmatch(r"(.+)-\d+-(head|worker-\d+)", name)):
        return match[1] in _made()["FineTuneJob"]
    if kind == "Deployment":
        return name == _release()
    return name in _made().get(kind, set()) or (kind, name) == ("CustomResourceDefinition", "finetunejobs.finetune.dev")


@functools.cache
def _made() -> dict[str, set[str]]:
    """Names by kind of what the manifests and the commands of the documents make."""
    texts = [file.read_text() for file in EXAMPLES]
    made: dict[str, set[str]] = {}
    for text in (*texts, *(block.text for block in blocks("yaml"))):
        for manifest in read_manifests(text):
            made.setdefault(manifest.get("kind", ""), set()).add(manifest.get("metadata", {}).get("name", ""))
    for command in (command for block in (*blocks("sh"), *map(comments, EXAMPLES)) for command in commands(block)):
        words, _ = _taken_apart(command, switches=_SWITCHES)
        if words[:2] == ["kubectl", "create"] and words[2] in _KINDS:
            made.setdefault(_KINDS[words[2]], set()).add(words[4 if words[2] == "secret" else 3])
    return made


def _create(objects: list[str], options: dict[str, list[str]]) -> str | None:
    ok = objects[0] in _KINDS and (objects[0] != "secret" or objects[1] == "generic")
    return None if ok else f"kubectl create {' '.join(objects)} is not known"


def _copy(objects: list[str], _: dict[str, list[str]]) -> str | None:
    source, target = objects
    pod = next((end.split(":")[0] for end in (source, target) if ":" in end), None)
    if pod is None or not _exists("Pod", pod):
        return f"no manifest here makes the pod {pod}"
    return None if ":" in source else _absent(source)


def _log(objects: list[str], options: dict[str, list[str]]) -> str | None:
    return _named(objects if "/" in objects[0] else [f"pod/{objects[0]}"], options)


def _patch(objects: list[str], options: dict[str, list[str]]) -> str | None:
    """A patch in words is of an object of the documents; one in a file may be of somebody else's, such as Argo CD's settings."""
    for file in options.get("patch-file", ()):
        return _absent(file) or (None if isinstance(yaml.safe_load((ROOT / file).read_text()), dict) else "a patch is a mapping")
    patch = yaml.safe_load("".join(options.get("patch", options.get("p", []))) or "null")
    return _named(objects, options) if isinstance(patch, dict) else "a patch is a mapping"


def _rollout(objects: list[str], options: dict[str, list[str]]) -> str | None:
    return _named(objects[1:], options) if objects[0] == "status" else f"kubectl rollout {objects[0]} is not known"


def _annotate(objects: list[str], options: dict[str, list[str]]) -> str | None:
    """KIND NAME KEY=VALUE KEY-, where every key is one that the operator reads."""
    keys = {re.split(r"=|-$", word)[0] for word in objects[2:]}
    unknown = keys - {ANNOTATION_RETRY, ANNOTATION_CANCEL, ANNOTATION_RECONCILE}
    return f"the operator does not read {sorted(unknown)}" if unknown or not keys else _named(objects[:2], options)


def _explain(objects: list[str], _: dict[str, list[str]]) -> str | None:
    """KIND.FIELD.FIELD, as the CRD's schema has it."""
    kind, *path = objects[0].split(".")
    if _KINDS.get(kind) != "FineTuneJob":
        return f"{kind} is not this project's"
    place = yaml.safe_load((ROOT / "crds/finetunejobs.yaml").read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for name in path:
        if name not in place.get("properties", {}):
            return f"FineTuneJob has no field {'.'.join(path)}"
        place = place["properties"][name]
    return None


_KUBECTL: dict[str, Callable[[list[str], dict[str, list[str]]], str | None]] = {
    "apply": lambda objects, options: f"{objects} is not a file given with -f" if objects or not _OPENS_FILE & options.keys() else None,
    **dict.fromkeys(("get", "describe", "wait", "delete"), _named),
    "annotate": _annotate,
    "label": lambda objects, options: _named(objects[:-1], options),
    "cp": _copy,
    "create": _create,
    "explain": _explain,
    "logs": _log,
    "patch": _patch,
    "rollout": _rollout,
}


def _taken_apart(arguments: Arguments, switches: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Words, and options with their values; a switch has none."""
    words: list[str] = []
    options: dict[str, list[str]] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            words.append(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        options.setdefault(name, []).append(value if equals else "" if name in switches else next(rest, ""))
    return words, options


def _source(arguments: Arguments) -> str | None:
    return None if list(arguments) == [".venv/bin/activate"] else "only the environment that make installs is sourced"


PROGRAMS: dict[str, Callable[[Arguments], str | None]] = {
    "source": _source,
    "make": _make,
    "finetune": _finetune,
    "kubectl": _kubectl,
    "helm": _helm,
    "docker": _docker,
    "python": _python,
    "vllm": _vllm,
}
