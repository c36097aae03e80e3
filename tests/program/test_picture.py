from __future__ import annotations

import pytest
from program_runs import rows

from lwkd.program.distill.history import History
from lwkd.program.distill.plot import write_picture
from lwkd.program.distill.report import write_logs
from lwkd.program.distill.settings import Settings
from lwkd.program.distill.signals import unit_of


def test_records_from_before_standard_errors_load(tmp_path):
    plain = History(layers=["a", "b"], steps=[1, 2], divergences=[[0.1, 0.2]] * 2, rates=[[1.0, 1.0]] * 2).as_plain()
    del plain["standard_errors"]
    history = History(**plain)
    nan = float("nan")
    history.record(3, {"a": 0.1, "b": 0.2}, {"a": 1.0, "b": 1.0}, {"a": nan, "b": 0.05})
    assert history.standard_errors == [[None, None], [None, None], [None, 0.05]]
    assert History(**history.as_plain()) == history
    write_logs(tmp_path, {"layerwise": history})
    assert [r["standard_error"] for r in rows(tmp_path / "layers.csv")] == ["", "", "", "", "", "0.05"]


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        (Settings(), "JSD of attention maps (nats)"),
        (Settings(kind="l2"), "squared L2 of attention maps (0 to 2)"),
        (Settings(signal="jacobian", kind="direction"), "Jacobian, direction (0 to 4)"),
        (Settings(signal="jacobian", wrt="parameters"), "Jacobian, norm (0 to 1)"),
        (Settings(signal="hessian"), "Hessian, relative (0 to 1)"),
        (Settings(signal="hessian", wrt="input"), "second derivative of the maps, relative (0 to 2)"),
    ],
)
def test_axis_names_the_signal_and_its_values(settings, unit):
    assert unit_of(settings) == unit


@pytest.mark.parametrize("known", [True, False])
def test_picture_has_a_band_where_the_error_is_known(tmp_path, monkeypatch, known):
    from matplotlib.figure import Figure

    drawn = []
    plain = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), plain(self, *a, **k)))
    history = History(layers=["a", "b"], steps_per_epoch=10)
    for step, error in enumerate([float("nan"), 0.3, 0.1] if known else [float("nan")] * 3):
        history.record(step, {"a": 0.2, "b": 0.5}, {"a": 0.8, "b": 1.2}, {"a": error, "b": error})
    assert write_picture(tmp_path, {"teacher": History(), "layerwise": history}, "nats of something") is not None
    above, below = drawn[0].axes
    assert above.get_ylabel() == "nats of something"
    assert above.get_ylim()[0] >= 0
    bands = [band for band in above.collections if band.get_paths()]
    assert len(bands) == (2 if known else 0)
    if known:
        heights = [path.vertices[:, 1] for path in bands[1].get_paths()]
        assert min(h.min() for h in heights) == pytest.approx(0.2)
        assert max(h.max() for h in heights) == pytest.approx(0.8)
    assert ("standard error" in drawn[0].get_supxlabel()) is known
    assert not below.collections
    assert [line.get_label() for line in above.lines] == ["a", "b"]
