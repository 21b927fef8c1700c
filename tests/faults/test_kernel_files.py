"""The kernel cache with real kernels: damaged, foreign, contended, unwritable and full."""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import work
from disks import NOBODY, become_nobody, fill, mount_small_disk, needs_root
from isolation import isolated
from test_forking import in_child, make_users_function

import numba_attention as na
from numba_attention.errors import NumbaAttentionWarning

LONG = pytest.mark.faults
ENVIRONMENT = "NUMBA_ATTENTION_CACHE_DIR"


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """A cache with the kernels of the forward pass and of decoding; to be copied."""
    folder = tmp_path_factory.mktemp("kernels")
    check = "work.check(['forward', 'decode'])"
    code = f"import work; {check}; {check}"  # a call that is like an earlier one needs kernels of its own
    environment = {**os.environ, ENVIRONMENT: str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    return folder


@pytest.fixture
def folder(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "kernels")


def compute(folder, names=("forward",)):
    """Compute with a cache in this folder, by the textbook; returns the warnings."""
    os.environ[ENVIRONMENT] = str(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work.check(names)
        work.check(names)
    return [str(warning.message) for warning in caught if issubclass(warning.category, NumbaAttentionWarning)]


def small(folder):
    """The kernels that compile in no time: all but those that attend."""
    return [path for path in Path(folder).iterdir() if not path.name.startswith(("forward", "decode"))]


def one(folder, name):
    (path,) = Path(folder).glob(f"{name}-*")
    return path


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: os.truncate(path, 0),
    "bit flipped at its begin": lambda path: flip(path, 0),
    "bit flipped within": lambda path: flip(path, 0.6),
    "bit flipped at its end": lambda path: flip(path, 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("no kernel"),
}


@pytest.mark.parametrize(
    "damage", [x if x in ("truncated", "bit flipped within") else pytest.param(x, marks=LONG) for x in DAMAGES]
)
@isolated
def test_damaged_files_are_compiled_again(damage, folder):
    for path in small(folder):
        DAMAGES[damage](path)
    assert compute(folder) == []


@LONG
@pytest.mark.parametrize("damage", DAMAGES)
@isolated(seconds=120)
def test_every_file_damaged(damage, folder):
    for path in Path(folder).iterdir():
        DAMAGES[damage](path)
    assert compute(folder, ["forward", "decode"]) == []


@isolated
def test_file_under_the_name_of_another_kernel(folder):
    """It is whole, and its checksum right; run with the parameters of the other it would write anywhere."""
    first, second = one(folder, "forward"), one(folder, "decode")
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    assert compute(folder, ["forward", "decode"]) == []


@isolated
def test_small_files_under_the_names_of_one_another(folder):
    paths = small(folder)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    assert compute(folder) == []


FOREIGN = {
    "written by the group": lambda path: path.chmod(0o620),
    "written by all": lambda path: path.chmod(0o606),
    "of another user": lambda path: (needs_root(), os.chown(path, NOBODY, NOBODY)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@isolated
def test_foreign_files_are_refused(kind, folder):
    """With one warning, however many they are, and without being run."""
    for path in small(folder):
        FOREIGN[kind](path)
    (warning,) = compute(folder)
    assert str(folder) in warning


@isolated
def test_symbolic_links_are_not_followed(folder, tmp_path):
    for path in small(folder):
        target = Path(tmp_path) / path.name
        path.rename(target)
        path.symlink_to(target)
    assert len(compute(folder)) <= 1


@isolated
def test_pipe_under_the_name_of_a_kernel(folder):
    """A reader of a pipe would wait for a writer for ever."""
    for path in small(folder):
        path.unlink()
        os.mkfifo(path)
    assert len(compute(folder)) <= 1


@pytest.mark.parametrize("kind", [x if x == "written by all" else pytest.param(x, marks=LONG) for x in FOREIGN])
@isolated
def test_foreign_folders_are_refused(kind, folder):
    """With one warning; kernels are then in memory only, and nothing is written there."""
    if kind == "of another user":
        needs_root()
        os.chown(folder, NOBODY, NOBODY)
    else:
        Path(folder).chmod(0o770 if "group" in kind else 0o707)
    before = sorted(os.listdir(folder))
    (warning,) = compute(folder)
    assert str(folder) in warning
    assert sorted(os.listdir(folder)) == before


@isolated
def test_folder_is_created_for_its_user_alone(tmp_path, folder):
    os.umask(0)
    new = Path(tmp_path, "a", "b")
    assert compute(new) == []
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in new.iterdir()} == {0}


@isolated
def test_home_in_the_name_of_the_folder(tmp_path, filled):
    os.environ["HOME"] = tmp_path
    shutil.copytree(filled, Path(tmp_path, "kernels"))
    os.chdir(tmp_path)
    assert compute("~/kernels") == []
    assert os.listdir(tmp_path) == ["kernels"]


@isolated
def test_files_of_others_in_the_folder_stay(folder):
    """A folder that holds other things too, such as a home directory, loses none of them."""
    names = [".profile", ".netrc", "tmpnotes", "notes.txt"]
    for name in names:
        Path(folder, name).write_text("mine")
        os.utime(Path(folder, name), (0, 0))
    for path in small(folder):
        if path.suffix == ".kernel":
            path.unlink()  # so that some are written again
    compute(folder)
    assert [name for name in names if not Path(folder, name).exists()] == []


@isolated
def test_folder_cannot_be_listed(folder):
    needs_root()
    import_all()
    with public(folder) as shared:
        shared.chmod(0o711)
        in_child(lambda: (become_nobody(), compute(shared)))


def import_all():
    """Import what calls and the compiler need: another user may not be able to read the interpreter's own files."""
    empty = np.empty((1, 0, 32), np.float32)
    na.attention(empty, empty, empty)
    make_users_function()(np.ones(4))


@contextlib.contextmanager
def public(folder=None):
    """A folder that every user can reach, as a copy of another; made and removed as root."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)
        shared = Path(temporary, "kernels")
        if folder is None:
            shared.mkdir(mode=0o755)
        else:
            shutil.copytree(folder, shared)
            shared.chmod(0o755)
            for path in shared.iterdir():
                path.chmod(0o644)
        yield shared


@isolated
def test_nobody_reads_what_root_has_filled(folder):
    """An image whose kernels were compiled when it was built, run by a user without rights or a home."""
    needs_root()
    import_all()

    def run():
        become_nobody()
        os.environ["HOME"] = "/nonexistent"
        assert compute(shared) == []

    with public(folder) as shared:
        before = sorted(os.listdir(shared))
        in_child(run)
        assert sorted(os.listdir(shared)) == before


@pytest.mark.parametrize("where", ["a folder of root", "a file", "nowhere"])
@isolated
def test_nobody_has_no_place_to_write(where):
    needs_root()
    import_all()

    def run():
        become_nobody()
        os.environ["HOME"] = "/nonexistent"
        os.environ.pop("XDG_CACHE_HOME", None)
        if where == "nowhere":
            os.environ.pop(ENVIRONMENT, None)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work.check(["forward"])
            assert len([w for w in caught if issubclass(w.category, NumbaAttentionWarning)]) == 1
        else:
            (warning,) = compute(shared if where == "a folder of root" else shared / "file")
            assert ENVIRONMENT in warning

    with public() as shared:
        (shared / "file").write_text("")
        in_child(run, seconds=40)
        assert os.listdir(shared) == ["file"]


@isolated
def test_full_disk(tmp_path):
    """Kernels are then in memory only; nothing half written stays, however many processes try."""
    mount_small_disk(tmp_path, 256 * 1024)
    folder = Path(tmp_path, "kernels")
    folder.mkdir(mode=0o700)
    fill(tmp_path)
    for _ in range(2):
        in_child(lambda: len(compute(folder)) == 1 or sys.exit("one warning, please"), seconds=40)
    assert os.listdir(folder) == []


@LONG
@isolated
def test_files_may_not_become_large(tmp_path):
    """As quotas and ``ulimit -f`` have it: some kernels fit, others do not."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    folder = Path(tmp_path, "kernels")
    assert len(compute(folder)) == 1
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".kernel")] == []


@LONG
@isolated(seconds=300)
def test_eight_processes_fill_one_cache(tmp_path):
    folder = Path(tmp_path, "kernels")
    check = "work.check(['forward', 'decode'])"
    code = f"import work; {check}; {check}"  # a call that is like an earlier one needs kernels of its own
    environment = {**os.environ, ENVIRONMENT: str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.endswith(".kernel")] == []
    assert len({name.rpartition("-")[0] for name in names}) == len(names) >= 4


@isolated
def test_processes_are_killed_while_they_write(tmp_path, filled):
    """What they leave is not taken for a kernel."""
    folder = shutil.copytree(filled, Path(tmp_path, "kernels"))
    for path in small(folder):
        path.with_name("." + path.name[:8]).write_bytes(path.read_bytes()[:1000])
        path.unlink()
    assert compute(folder) == []
