"""Random changes of good manifests."""

import copy
from pathlib import Path

from hypothesis import strategies as st

from finetune_operator.manifest import read_manifests

GOOD = [
    read_manifests(path.read_text(encoding="utf-8"))[0]
    for path in sorted((Path(__file__).parents[3] / "tests/data/jobs/good").glob("*.yaml"))
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "..", "pvc://a/../b", "simplecache::s3://a", "-1", "1e400", "5", "auto", "\ud800", "\x00", 10**400, -(10**400), 1e308]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=6
)


def places(value, path=()):
    """The path of every value inside a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutants(draw, within=()):
    """A good manifest after one to three changes, each to a value, to a key, or by leaving a value out; all below the path `within`."""
    manifest = copy.deepcopy(dict(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(1, 3))):
        inside = [path for path in places(manifest) if path[: len(within)] == within and len(path) > len(within)]
        *outer, last = draw(st.sampled_from(inside))
        parent = manifest
        for part in outer:
            parent = parent[part]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            parent[last] = draw(VALUES)
        elif change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=10))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
        if not manifest:
            break
    return manifest
