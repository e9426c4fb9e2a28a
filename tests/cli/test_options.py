"""How a signature becomes a command line: dataclasses among its parameters stand for their fields."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from fmlit.cli.options import Names, Numbers, options_of, run
from fmlit.sampling.grids import Grid, UniformGrid


@dataclass(frozen=True)
class Drawing:
    """How it is drawn.

    Args:
        mirror_images: Add mirror images.
        scales: Some numbers.
        grid: Where the steps lie.
    """

    mirror_images: bool = False
    scales: Numbers = Numbers([1.0])
    grid: Grid | None = None


def command(name: str, words: Names = Names(["a"]), drawing: Drawing = Drawing()) -> dict[str, Any] | None:
    """Say what was given.

    Args:
        name: A name.
        words: Some words.
        drawing: How it is drawn.
    """
    assert drawing.grid is None or isinstance(drawing.grid, UniformGrid)
    given = [drawing.mirror_images, drawing.scales, drawing.grid is not None]
    return None if name == "nobody" else {"name": name, "words": words, "drawing": given}


def test_options_of_a_dataclass_stand_beside_the_others(capsys):
    run(command, ["--name", "x", "--mirror-images", "--scales", "2,3.5", "--words=b,c"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "x",
        "words": ["b", "c"],
        "drawing": [True, [2.0, 3.5], False],
    }
    run(command, ["--grid", "UniformGrid", "--mirror_images=false", "--name", "x"])
    assert json.loads(capsys.readouterr().out) == {"name": "x", "words": ["a"], "drawing": [False, [1.0], True]}
    run(command, ["--name", "nobody"])
    assert capsys.readouterr().out == ""
    assert [option.name for option in options_of(command)] == ["name", "words", "mirror_images", "scales", "grid"]


def test_they_stand_in_files_too(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("name: y\nscales: [4]\ngrid: UniformGrid\n")
    run(command, ["--config", str(tmp_path / "options.yaml"), "--scales", "5"])
    assert json.loads(capsys.readouterr().out) == {"name": "y", "words": ["a"], "drawing": [False, [5.0], True]}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name: required, and not given"),
        (["--name", "x", "--drawing.scales", "2"], "drawing.scales: no such option"),
        (["--name", "x", "--scale", "2"], "scale: no such option; did you mean scales?"),
        (["--name", "x", "--scales", "many"], "expected values such as 1.0,1.5"),
        (["--name", "x", "--grid", "UniformGird"], "UniformGird"),
    ],
)
def test_mistakes_take_one_line(args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, args)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_help_groups_them(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, ["--help"])
    assert stopped.value.code == 0
    before, after = capsys.readouterr().out.split("How it is drawn:")
    assert "Say what was given." in before
    assert "--words" in before
    assert "--mirror_images" in after
    assert "--drawing" not in before + after
