"""A picture follows its controls, a click finds its place, and without widgets there is still a picture."""
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from attnnas.core.errors import AttnnasError
from attnnas.figures import play as module
from attnnas.figures.play import find_click, play


@pytest.fixture
def drawn():
    "What was asked of `picture` below."
    return []


@pytest.fixture
def picture(drawn):
    def draw(**values):
        drawn.append(values)
        figure, axes = plt.subplots(1, 2, figsize=(4, 2))
        axes[0].plot(range(values["count"]))
        return figure
    return draw


def test_every_control_draws_again(picture, drawn):
    "A slider, a menu and a box to tick; the picture that the browser has is another one where the drawing is."
    shown = play(picture, count=range(2, 8, 2), colour=["red", "blue"], wide=False, start={"count": 4})
    assert drawn == [{"count": 4, "colour": "red", "wide": False}] and shown.controls["count"].max == 6
    before = shown.picture.html
    shown.controls["count"].value = 6
    assert shown.picture.html != before and before.startswith("<img") and "data:image/png;base64," in before
    shown.controls["colour"].value, shown.controls["wide"].value = "blue", True
    assert drawn[-1] == {"count": 6, "colour": "blue", "wide": True} and len(drawn) == 4
    assert not plt.get_fignums(), "figures pile up"


def test_a_click_goes_to_the_drawing_and_stays_there(picture, drawn):
    shown = play(picture, click=True, count=[3, 5])
    assert drawn[-1]["click"] is None
    shown.picture.at = [.2, .5]
    first = drawn[-1]["click"]
    shown.picture.at = [.8, .5]
    assert (first.axes, drawn[-1]["click"].axes) == (0, 1)
    shown.picture.at = [0., 0.]
    assert len(drawn) == 3, "outside all axes nothing is drawn"
    shown.controls["count"].value = 5
    assert drawn[-1]["click"].axes == 1


def test_clicks_are_in_the_coordinates_of_the_data():
    figure, axes = plt.subplots()
    axes.set(xlim=(100, 200), ylim=(1, 0))
    left, right = (find_click(figure, x, .5) for x in (.3, .7))
    up, down = (find_click(figure, .5, y) for y in (.3, .7))
    plt.close()
    assert 100 < left.x < right.x < 200 and 0 < up.y < down.y < 1


def test_a_page_without_python_has_the_picture_or_the_table(picture):
    figure = play(picture, count=[3])._repr_mimebundle_()
    table = play(lambda sort: pd.DataFrame({"run": [1, 2]}), sort=["run"])._repr_mimebundle_()
    assert "image/png" in figure and "<td>2</td>" in table["text/html"]


def test_without_anywidget_the_picture_stands_alone(picture, monkeypatch):
    module._classes.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    try: assert hasattr(play(picture, click=True, count=[3]), "savefig")
    finally: module._classes.cache_clear()


def test_errors_stand_in_the_place_of_the_picture_and_wrong_controls_are_refused(picture):
    def draw(size):
        if size > 1: raise AttnnasError("size < 2 <b>")
        return pd.DataFrame({"size": [size]})

    shown = play(draw, size=[1, 2])
    shown.controls["size"].value = 2
    assert shown.picture.html == "<pre>size &lt; 2 &lt;b&gt;</pre>"
    shown.controls["size"].value = 1
    assert "<table" in shown.picture.html
    with pytest.raises(AttnnasError, match="Unknown control 'cuont'. Did you mean 'count'"): play(picture, count=[3], start={"cuont": 3})
    with pytest.raises(AttnnasError, match=r"Control count cannot start at 9: it takes \[3\]"): play(picture, count=[3], start={"count": 9})
