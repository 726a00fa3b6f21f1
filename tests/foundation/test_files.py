"""Writes are whole or absent; run folders count up; errors become one line and a status."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from utils.cli import Parser, add_run_flags, keywords_to_argv
from utils.errors import ConfigError, ResourceError, UserError, did_you_mean, run_cli
from utils.files import atomic_open, atomic_write, dump_yaml, find_file, load_yaml, new_run_dir, remove_leftovers


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "last.pt"
    atomic_write(target, "old")
    with pytest.raises(RuntimeError), atomic_open(target) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_run_folders_count_up(tmp_path: Path) -> None:
    project = tmp_path / "runs" / "train"
    assert [new_run_dir(project, "exp").name for _ in range(3)] == ["exp", "exp2", "exp3"]
    assert new_run_dir(project, "exp", exist_ok=True).name == "exp"
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot make this folder"):
        new_run_dir(tmp_path / "file", "exp")


def test_yaml_knows_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nlist:\n  - x\n  - y\nmap: {p: 1}\n")
    data = load_yaml(path)
    assert data.where("list", 1) == f"{path}:4"
    assert data.where("map", "p") == f"{path}:5"
    assert data.where("absent") == str(path)
    path.write_text(dump_yaml({"b": [1, 2], "a": None}))
    assert load_yaml(path) == {"b": [1, 2], "a": None}


def test_files_are_found_by_their_short_name() -> None:
    assert find_file("hyp.scratch-low.yaml").parent.name == "hyps"
    assert find_file("yolov5s.yaml").name == "yolov5s.yaml"
    assert find_file("nothing-of-the-kind.yaml") is None and find_file("") is None


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (ConfigError("--x 1: at least 2"), 2, "error: --x 1: at least 2\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("go on with --resume"), 130, "interrupted: go on with --resume\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "error: runs/a: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "error: runs/a: permission denied"),
    ],
)
def test_run_cli_turns_what_users_can_mend_into_a_line(raised, status, line, capsys) -> None:
    def main(argv):
        raise raised

    assert run_cli(main, []) == status
    assert capsys.readouterr().err.startswith(line)
    with pytest.raises(type(raised)):
        run_cli(main, ["--debug"])


def test_bugs_keep_their_traceback() -> None:
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main, [])


def test_did_you_mean() -> None:
    assert did_you_mean("yolo5s", ["yolov5s", "yolov5m"]) == ", did you mean 'yolov5s'?"
    assert did_you_mean("zzz", ["yolov5s"]) == ""
    assert did_you_mean("bcd.yaml", ["bccd.yaml", "tiny.yaml"]) == ", did you mean 'bccd.yaml'?"
    assert did_you_mean("bccd.yml", ["bccd.yaml"]) == ", did you mean 'bccd.yaml'?"
    assert did_you_mean("nope.yaml", ["tiny.yaml"]) == ""


def parser() -> Parser:
    made = Parser(prog="x.py")
    made.add_argument("--imgsz", "--img", type=int, default=640)
    made.add_argument("--resume", nargs="?", const="auto", default="")
    made.add_argument("--classes", nargs="+", type=int)
    add_run_flags(made, "runs/x")
    return made


def test_the_parser_answers_in_one_line() -> None:
    for argv, message in [
        (["--imgs", "x"], "--imgsz/--img: invalid int value: 'x'"),
        (["--projet", "a"], "--projet: no such flag, did you mean '--project'?"),
        (["--bucket", "a"], "--bucket: nothing is uploaded"),
    ]:
        with pytest.raises(ConfigError) as error:
            parser().parse_args(argv)
        assert message in str(error.value) or message.replace("/--img", "") in str(error.value)


def test_given_tells_flags_from_defaults() -> None:
    assert parser().given(["--img", "640", "--exist-ok"]) == {"imgsz", "exist_ok"}
    assert parser().given([]) == set()


def test_keywords_become_flags() -> None:
    argv = keywords_to_argv(parser(), {"img": 320, "resume": True, "exist_ok": True, "classes": [0, 2], "device": ""})
    args = parser().parse_args(argv)
    assert (args.imgsz, args.resume, args.exist_ok, args.classes, args.device) == (320, "auto", True, [0, 2], "")
    with pytest.raises(ConfigError, match="imgsize: no such argument"):
        keywords_to_argv(parser(), {"imgsize": 3})


def test_user_errors_have_a_status() -> None:
    assert UserError("x").exit_code == 2


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    for name in (".a.npz.x1.tmp", ".a.npz.x2.tmp", ".b.npz.x3.tmp", "a.npz", ".a.npz"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".a.npz.x2.tmp", (1, 1))
    remove_leftovers(tmp_path, of="a.npz.", older_than=60)
    assert not (tmp_path / ".a.npz.x2.tmp").exists() and (tmp_path / ".a.npz.x1.tmp").exists()
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.npz", "a.npz"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """kill -9: nothing can be caught. What is left is the whole old file and a hidden half that nobody reads."""
    target = tmp_path / "last.pt"
    atomic_write(target, "old")
    child = os.fork()
    if not child:
        with atomic_open(target) as file:
            file.write(b"half of the new")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [target]
