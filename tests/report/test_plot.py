from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from onlinequant_backend.report import NodeDecision, Report, plot


def layer(kind: str, density: float, sensitivity: float | None, quantized: bool) -> NodeDecision:
    shape = (1, 8, 8, 8) if kind == "conv" else (8, 8)
    return NodeDecision(
        f"{kind}_{density}",
        kind,
        shape,
        shape,
        64,
        64,
        density,
        sensitivity,
        sensitivity,
        sensitivity,
        quantized,
        "why",
    )


MIXED = [
    layer("conv", 500, 0.01, True),
    layer("conv", 400, 0.05, False),
    layer("linear", 400, 0.02, True),
    layer("linear", 600, 0.0, True),
    layer("linear", 2, None, False),
    layer("conv", 35, None, False),
]
THRESHOLDS = {"conv_compute_density_threshold": 100, "linear_compute_density_threshold": 300}


def drawn(decisions: list[NodeDecision], path: Path, config: dict[str, Any] = THRESHOLDS) -> Any:
    plot.plot_layers(Report("UNet", phase="quantized", decisions=decisions, config=config), path)
    return image.imread(path)


def count(picture: Any, colour: str) -> int:
    """Pixels close to ``colour`` as alpha blends it with white."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    near = [abs(picture[..., i] - (1 - 0.75 * (1 - value))) < 0.02 for i, value in enumerate((red, green, blue))]
    return int((near[0] & near[1] & near[2]).sum())


def test_each_outcome_is_drawn_in_its_colour(tmp_path: Path) -> None:
    picture = drawn(MIXED, tmp_path / "new folder" / "layers.png")
    assert picture.shape[1] > picture.shape[0] > 500
    only_8_bit = drawn([one for one in MIXED if one.quantized], tmp_path / "quantized.png")
    assert count(picture, plot.COLOURS["8 bit"]) > 100 and count(picture, plot.COLOURS["float"]) > 100
    assert count(only_8_bit, plot.COLOURS["8 bit"]) > 100 and count(only_8_bit, plot.COLOURS["float"]) < 20


@pytest.mark.parametrize("decisions", [[], MIXED[:1], MIXED[-2:], MIXED[:2]], ids=["none", "one", "rug", "no rug"])
def test_any_set_of_layers_can_be_drawn(tmp_path: Path, decisions: list[NodeDecision]) -> None:
    assert drawn(decisions, tmp_path / "layers.png").size


def test_both_axes_are_logarithmic_with_the_thresholds_as_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot.plot_layers(Report("UNet", decisions=MIXED, config=THRESHOLDS), tmp_path / "layers.png")
    plot.plot_layers(Report("UNet", config={"conv_compute_density_threshold": 0}), tmp_path / "layers.png")
    with_lines, without = (figure.axes for figure in figures)
    for scatter, rug in (with_lines, without):
        assert scatter.get_xscale() == scatter.get_yscale() == rug.get_xscale() == "log"
    assert [[line.get_xdata()[0] for line in axes.lines] for axes in with_lines] == [[100, 300], [100, 300]]
    assert [len(axes.lines) for axes in without] == [0, 0]


def test_a_report_plots_itself(tmp_path: Path) -> None:
    Report("UNet", decisions=MIXED).plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        Report("UNet").plot(tmp_path / "taken" / "layers.png")


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from onlinequant_backend.report.report import Report; "
        "assert 'matplotlib' not in sys.modules; "
        f"Report('UNet').plot({str(tmp_path / 'layers.png')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
