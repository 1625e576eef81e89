import glob
import os
import pickle
import socket
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Store
from pipelines.data_config import SourceConfig
from pipelines.listing import _Glob, list_source
from pipelines.sources import DataError, find_corpus
from tests.pipelines.reading import corpus_of, read_all, texts

NAMES = ("a.txt", "b.txt", "b1.md", "[x].txt")


@pytest.fixture
def tree(tmp_path):
    for folder in ("", "one", "one/deep", "two", "two/deep/er"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (tmp_path / folder / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*.txt",
        "**/*.txt",
        "*/*",
        "one/**",
        "**/deep/*",
        "two/**/b?.md",
        "*/deep/**/a.txt",
        "[ab]*",
        "**",
        "o*/[!b]*.txt",
    ],
)
def test_globs_match_what_pythons_match(tree, pattern):
    expected = {
        path for path in glob.glob(pattern, root_dir=tree, recursive=True) if os.path.isfile(os.path.join(tree, path))
    }
    found = list_source(str(tree / pattern))
    base = found.store.local_path()
    assert {os.path.relpath(base / path, tree) for path in found.files} == expected


@given(
    st.lists(st.sampled_from(["**", "*", "a", "b", "a*"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=5),
)
def test_a_glob_is_all_ways_of_matching_at_once(parts, path):
    def matches(parts, path):
        if not parts or not path:
            return not parts and not path
        if parts[0] == "**":
            return matches(parts[1:], path) or matches(parts, path[1:])
        fits = parts[0] in ("*", path[0]) or (parts[0] == "a*" and path[0].startswith("a"))
        return fits and matches(parts[1:], path[1:])

    pattern = _Glob(parts)
    states = pattern.start
    for name in path:
        assert pattern.goes_on(states) or not pattern.matches(pattern.step(states, name))
        states = pattern.step(states, name)
    assert pattern.matches(states) == matches([*parts, "*"] if parts[-1] == "**" else parts, path)


def test_a_name_with_brackets_is_a_name_if_there_is_one(tree):
    assert list(list_source(str(tree / "[x].txt")).files) == ["[x].txt"]
    with pytest.raises(DataError, match="the glob matches no file"):
        corpus_of(tree / "*.parquet")


def test_what_is_no_file_is_named_and_never_opened(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.txt").write_text("good")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "sub" / "good.txt")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.txt")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(tmp_path / "socket.txt"))
        corpus = corpus_of(tmp_path)
    assert texts(read_all(corpus)) == ["good", "good"]
    reasons = {os.path.basename(item.path): item.reason.partition(";")[0] for item in corpus.left_out[0]}
    assert reasons == {"up": "a link to a folder", "pipe.txt": "a pipe", "socket.txt": "a socket"}
    reasons = {os.path.basename(item.path): item.reason for item in corpus.quarantined}
    assert reasons == {"gone.txt": "a link to nothing", "loop": "a link that leads to itself"}


def test_a_glob_names_the_links_that_it_would_have_gone_through(tree):
    (tree / "linked").symlink_to(tree / "two")
    (tree / "one" / "b.lnk").symlink_to(tree / "one" / "b.txt")
    (tree / "loop").symlink_to(tree / "loop")
    link = "a link to a folder; links to folders are not followed"
    for pattern in ("**/*.txt", "*/a.txt", "*/*/a.txt", "**"):
        assert ("linked", link) in list_source(str(tree / pattern)).left_out, pattern
    for pattern in ("*.txt", "one/**/*.txt", "t*/*.txt"):
        assert not list_source(str(tree / pattern)).left_out, pattern


def test_a_source_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "a.txt", tmp_path / "loop" / "*.txt"):
        with pytest.raises(DataError, match="a link on its path leads to itself; give a file"):
            corpus_of(path)


def test_names_that_are_no_text_are_read_and_shown_escaped(tmp_path):
    name = b"caf\xe9 \n.txt"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(b"text")
    corpus = corpus_of(tmp_path)
    (record,) = read_all(corpus)
    assert record.text == "text" and record.path == f"{tmp_path.as_uri()}/caf%E9%20%0A.txt"


def test_a_folder_whose_name_is_no_text_is_a_source(tmp_path, monkeypatch):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(os.path.join(folder, b"in"))
    with open(os.path.join(folder, b"in", b"a.txt"), "wb") as file:
        file.write(b"text")
    monkeypatch.chdir(os.fsdecode(folder))
    for uri in ("in", "in/*.txt", "in/a.txt", f"{tmp_path.as_uri()}/caf%E9"):
        config = SourceConfig(uri=uri)
        (record,) = read_all(find_corpus([config]))
        assert (record.text, record.path) == ("text", f"{tmp_path.as_uri()}/caf%E9/in/a.txt")
        assert SourceConfig.model_validate_json(config.model_dump_json()) == config
    store = pickle.loads(pickle.dumps(Store(os.fsdecode(folder))))
    assert store.list() == ["in/a.txt"] and store.uri == f"{tmp_path.as_uri()}/caf%E9"
    with pytest.raises(DataError, match=r"caf%E9/no.*does not exist"):
        corpus_of("no")


def test_a_path_longer_than_the_system_allows(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with os.fdopen(os.open("deep.txt", os.O_WRONLY | os.O_CREAT, dir_fd=here), "w") as file:
        file.write("text")
    os.close(here)
    corpus = corpus_of(tmp_path)
    assert texts(read_all(corpus)) == ["text"]
    assert [item.reason for item in corpus.quarantined] == ["its path is longer than the system allows"]


def test_what_nobody_may_read_is_quarantined(tmp_path):
    """In a child that is nobody: root may read everything."""
    if os.getuid():
        pytest.skip("only root can become nobody")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "good.txt").write_text("good")
    (tmp_path / "open" / "secret.txt").write_text("secret")
    (tmp_path / "open" / "secret.txt").chmod(0)
    (tmp_path / "open" / "closed").mkdir(mode=0)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.seteuid(65534)
            corpus = corpus_of(tmp_path / "open")
            found = [*corpus.quarantined, *read_all(corpus)]
            os.write(write, "\n".join(sorted(map(repr, found))).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as result:
        closed, secret, good = result.read().splitlines()
    uri = (tmp_path / "open").as_uri()
    assert closed == f"Quarantined(path='{uri}/closed', offset=0, reason='no permission to read it', records=1)"
    assert secret == f"Quarantined(path='{uri}/secret.txt', offset=0, reason='no permission to read it', records=1)"
    assert "text='good'" in good
