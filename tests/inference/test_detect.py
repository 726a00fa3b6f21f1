"""detect.py as a user calls it, on a tiny model with random weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import detect
from tests.inference.conftest import write_png
from utils.checkpoint import read_checkpoint
from utils.errors import CheckpointError, ConfigError, SourceError, run_cli
from utils.files import ROOT


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(2):
        write_png(tmp_path / "in" / f"{i}.png", seed=i)
    return tmp_path / "in"


@pytest.fixture
def flags(checkpoint: Path, pictures: Path, tmp_path: Path) -> list[str]:
    out = ["--project", str(tmp_path / "runs"), "--device", "cpu"]
    return ["--weights", str(checkpoint), "--source", str(pictures), "--img", "128", *out]


def test_everything_is_written_where_the_last_lines_say(flags: list[str], tmp_path: Path, capsys) -> None:
    wanted = ["--save-txt", "--save-conf", "--save-csv", "--save-crop", "--conf", "0.00001", "--max-det", "3"]
    assert detect.main([*flags, *wanted]) == 0
    folder = tmp_path / "runs" / "exp"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"image 1/2 {tmp_path}/in/0.png: 96x128 ") and lines[1].endswith("ms")
    assert lines[-2:] == [f"Results saved to {folder}", f"2 labels saved to {folder}/labels"]
    assert [p.name for p in sorted(folder.glob("*.*"))] == ["0.png", "1.png", "predictions.csv"]
    assert len((folder / "labels" / "0.txt").read_text().splitlines()) == 3
    assert len(list(folder.glob("crops/*/*.jpg"))) == 6


def test_run_takes_the_flags_as_names(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    given = dict(weights=checkpoint, source=[pictures / "0.png"], imgsz=[96, 128], device="cpu", nosave=True)
    assert detect.run(**given, project=tmp_path / "runs", save_txt=True, classes=[0, 2]) == 0
    assert (tmp_path / "runs/exp/labels").is_dir()
    with pytest.raises(ConfigError, match="save_text: no such argument, did you mean 'save_txt'"):
        detect.run(save_text=True)


def test_nothing_is_made_when_nothing_is_saved(flags: list[str], tmp_path: Path) -> None:
    assert detect.main([*flags, "--nosave"]) == 0
    assert not (tmp_path / "runs").exists()


def test_one_unreadable_picture_is_exit_status_1_and_the_others_are_done(
    flags: list[str], pictures: Path, tmp_path: Path, capsys
) -> None:
    (pictures / "bad.png").write_bytes(b"text")
    assert detect.main(flags) == 1
    assert len(list((tmp_path / "runs/exp").iterdir())) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "WARNING 1 source could not be read, see the warnings above"


def test_augment_visualize_and_ensemble(flags: list[str], checkpoint: Path, tmp_path: Path) -> None:
    assert detect.main([*flags, "--augment", "--visualize", "--nosave"]) == 0
    maps = sorted(p.name for p in (tmp_path / "runs/exp/0").iterdir())
    assert "stage0_Conv_features.png" in maps and "stage9_SPPF_features.npy" in maps
    assert detect.main([*flags, "--weights", str(checkpoint), str(checkpoint)]) == 0
    with pytest.raises(ConfigError, match="--visualize: .* a single --weights file"):
        detect.main([*flags, "--weights", str(checkpoint), str(checkpoint), "--visualize"])


def test_update_drops_the_training_state(flags: list[str], checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copy(checkpoint, tmp_path / "last.pt")
    assert read_checkpoint(copy).train is not None
    assert detect.main([*flags, "--weights", str(copy), "--update", "--nosave"]) == 0
    assert read_checkpoint(copy).train is None


def test_names_from_a_dataset_yaml(flags: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "images").mkdir()
    data = tmp_path / "data.yaml"
    data.write_text("train: images\nval: images\nnames: [one, two, three]\n")
    assert detect.main([*flags, "--data", str(data), "--conf", "0.00001", "--max-det", "1"]) == 0
    assert any(name in capsys.readouterr().out for name in ("1 one", "1 two", "1 three"))
    data.write_text("train: images\nval: images\nnames: [one]\n")
    with pytest.raises(ConfigError, match="1 class names, but the model has 3 classes"):
        detect.main([*flags, "--data", str(data)])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (["--source", "no/such/place"], SourceError, "--source no/such/place: no such file or folder"),
        (["--weights", "bst.pt"], CheckpointError, "--weights bst.pt: no such file.*train.py|newest trained"),
        (["--classes", "7"], ConfigError, "--classes 7: this model has classes 0 to 2"),
        (["--conf", "1.5"], ConfigError, "--conf-thres"),
        (["--imgsz", "1", "2", "3"], ConfigError, "--imgsz 1 2 3"),
        (["--save-conf"], ConfigError, "--save-conf: .* add --save-txt"),
        (["--dnn"], ConfigError, "--dnn: "),
        (["--agnostc"], ConfigError, "did you mean '--agnostic-nms'"),
        (["--line-thickness", "-1"], ConfigError, "--line-thickness"),
        (["--vid-stride", "0"], SourceError, "--vid-stride"),
        (["--device", "9"], ConfigError, "--device 9"),
        (["--device", "cpu", "--cuda-graphs", "on"], ConfigError, "--cuda-graphs on: they need a CUDA device"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    flags: list[str], tmp_path: Path, wrong: list[str], error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        detect.main([*flags, *wrong])
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()
    assert run_cli(detect.main, [*flags, *wrong]) == 2


def test_the_beginning_of_a_flag_is_enough(flags: list[str]) -> None:
    args = detect.parse_args([*flags, "--conf", "0.3", "--agn", "--save-t", "--hide-l"])
    assert args.conf_thres == 0.3 and args.agnostic_nms and args.save_txt and args.hide_labels


def test_help_and_wrong_flags_need_no_torch() -> None:
    for argv in (["--help"], ["--weights", "gone.pt"]):
        code = "import sys; sys.modules['torch'] = sys.modules['cv2'] = sys.modules['numpy'] = None; import detect\n"
        code += f"from utils.errors import run_cli\nrun_cli(detect.main, {argv!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
