"Pictures: what they show is what they were given, and it can be read."
import copy
from itertools import product
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.text import Text

from attnnas.cells.cell import AttentionCell
from attnnas.core.errors import AttnnasError
from attnnas.cells.derivation import derive, random_cell
from attnnas.evidence.tables.state_of_the_art import accuracy_against_cost
from attnnas.evidence.tables.two_streams import STREAM_NAMES, stream_dots
from attnnas.figures.attention import _shown, collect, map_overlay, query_overlay, query_weights, to_pixels
from attnnas.figures.cells import COLOURS, draw_cell, draw_supergraph
from attnnas.figures.curves import connection_curves, learning_curves, relative_entropy
from attnnas.networks.insertion import insert
from attnnas.cells.operations.base import DIMENSIONS, TYPES
from attnnas.cells.operations.registry import create_operation
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import ALL_OPERATIONS, CellSpec, OperationSpec
from attnnas.cells.supergraph import level_nodes


@pytest.fixture(autouse=True)
def style_and_figures():
    "Functions leave the global style alone; figures are closed."
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before
    plt.close("all")


# Cells

OPERATION = OperationSpec("spatiotemporal", "dot-product", "softmax", pool_keys=True)  # the longest text
CELLS = {"one": CellSpec((OPERATION,), ((0,),)),
         "wide": CellSpec((OPERATION,) * 12, ((0,),) * 12),
         "chain": CellSpec((OPERATION,) * 12, tuple((k,) for k in range(12)), (12,)),
         "every operation reads all": CellSpec((OPERATION,) * 5, tuple(tuple(range(k)) for k in range(1, 6))),
         **{f"derived {seed}": random_cell(seed).cell for seed in range(4)},
         **{f"random {k}": SearchSpace(k).sample(0) for k in (2, 3, 4, 6, 12)}}


def boxes(ax):
    "Left, right, bottom, top of every box in points."
    return np.array([(b.get_x(), b.get_x() + b.get_width(), b.get_y(), b.get_y() + b.get_height())
                     for b in ax.patches if isinstance(b, FancyBboxPatch)])


@pytest.mark.parametrize("name", CELLS)
def test_cell_picture_can_be_read(name):
    cell = CELLS[name]
    figure = draw_cell(cell)
    ax, found = figure.axes[0], boxes(figure.axes[0])
    assert len(found) == len(cell.operations) + 2
    for i, (left, right, bottom, top) in enumerate(found):          # no box over another
        other = np.delete(found, i, 0).T
        assert not ((other[0] < right) & (other[1] > left) & (other[2] < top) & (other[3] > bottom)).any()
    # Lanes lie beside the boxes, curves between the rows: sampled points of no line lie within any box.
    t = np.linspace(0, 1, 25)[:, None]
    lines = [(1 - t)**3 * p[0] + 3 * t * (1 - t)**2 * p[1] + 3 * t**2 * (1 - t) * p[2] + t**3 * p[3]
             for p in (patch.get_path().vertices for patch in ax.patches if isinstance(patch, PathPatch))]
    lanes = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 2]
    lines += [lane[0] * (1 - t) + lane[1] * t for lane in lanes]
    for left, right, bottom, top in found:
        for x, y in (line.T for line in lines):
            assert not ((left < x) & (x < right) & (bottom < y) & (y < top)).any()
    # Text fits into its box, and is still large when the picture is 800 pixels wide.
    width = figure.get_figwidth() * 72
    for text, (left, right, bottom, top) in zip(ax.texts, found):
        extent = text.get_window_extent().transformed(ax.transData.inverted())
        assert left < extent.x0 and extent.x1 < right and bottom < extent.y0 and extent.y1 < top
        assert text.get_fontsize() / width * 800 >= 9
    assert ax.get_xlim()[0] <= found[:, 0].min() and found[:, 1].max() <= ax.get_xlim()[1]


def test_cell_picture_tells_operations_apart():
    texts, looks = set(), set()
    for op in ALL_OPERATIONS:
        ax = draw_cell(CellSpec((op,), ((0,),))).axes[0]
        box = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)][1]
        texts.add(ax.texts[1].get_text())
        looks.add((box.get_edgecolor(), box.get_boxstyle().rounding_size))
        plt.close(ax.figure)
    assert texts == {f"f1  {op.dimension}\n{op.type} {op.activation}" for op in ALL_OPERATIONS}
    assert len(looks) == len(DIMENSIONS) * len(TYPES)


@pytest.mark.parametrize("name", ["every operation reads all", "derived 0", "random 4"])
def test_arrows_are_the_cells_connections(name):
    "Each arrow head ends on a box; there is one for every input and output, in the colour of where it comes from."
    cell = CELLS[name]
    ax = draw_cell(cell).axes[0]
    colour = [plt.matplotlib.colors.to_hex("0.45"), *(COLOURS[op.dimension].lower() for op in cell.operations)]
    expected = [sorted(colour[i] for i in inputs) for inputs in cell.inputs] + [sorted(colour[k] for k in cell.outputs)]
    heads = [line for line in ax.lines if line.get_marker() == "v"]
    found = []
    for left, right, bottom, top in boxes(ax)[1:]:
        found.append(sorted(plt.matplotlib.colors.to_hex(line.get_color()) for line in heads
                            if left < line.get_xdata()[0] < right and abs(line.get_ydata()[0] - top) < 4))
    assert found == expected and sum(map(len, found)) == len(heads)


def test_cell_in_a_small_axes_keeps_its_text_in_its_boxes():
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    assert draw_cell(CELLS["derived 1"], axes[1], "derived") is figure
    for text, (left, right, bottom, top) in zip(axes[1].texts[1:], boxes(axes[1])):
        extent = text.get_window_extent().transformed(axes[1].transData.inverted())
        assert left < extent.x0 and extent.x1 < right and bottom < extent.y0 and extent.y1 < top


# Supergraph

def test_supergraph_widths_areas_and_signs():
    level, sink = torch.zeros(1, 2, 2), torch.tensor([[.4, .1], [.2, -.3]])
    level[0, 1, 0], level[0, 0, 1] = .8, -.2                             # node 1 of level 2 reads node 0 of level 1
    ax = draw_supergraph(level.requires_grad_(), sink, level_nodes()[:2], kept=[(0, 0), (1, 1)]).axes[0]
    drawn = {tuple(map(int, line.get_ydata())): (line.get_linewidth(), line.get_linestyle()) for line in ax.lines}
    assert drawn[0, 1] == (4, "-") and drawn[1, 0] == (pytest.approx(1), "--") and drawn[0, 0][0] == 0
    areas = [c.get_sizes()[0] for c in ax.collections]
    assert np.allclose(areas, 400 * sink.abs().flatten() / .4)
    hollow = [c.get_facecolor()[0, :3].tolist() == [1, 1, 1] for c in ax.collections]
    assert hollow == [False, False, False, True], "the negative one"
    assert [text.get_text() for text in ax.texts] == ["f1", "f2"]


def test_supergraph_highlights_the_derived_connections():
    draw = torch.Generator().manual_seed(0)
    level, sink = torch.rand(3, 6, 6, generator=draw), torch.rand(4, 6, generator=draw)
    found = derive(level, sink, level_nodes())
    ax = draw_supergraph(level, sink, level_nodes(), kept=found).axes[0]
    black = {tuple(map(tuple, line.get_xydata().astype(int))) for line in ax.lines if line.get_color() == "black"}
    node = lambda k: found.kept[k - 1]
    assert black == {(node(i), node(k)) for k, inputs in enumerate(found.cell.inputs, 1) for i in inputs if i}


def test_supergraph_of_one_level_and_wrong_shapes():
    assert len(draw_supergraph(torch.zeros(0, 6, 6), torch.full((1, 6), 1 / 6), level_nodes()).axes[0].lines) == 0
    for level, sink in (((3, 6, 6), (6, 4)), ((2, 6, 6), (4, 6)), ((3, 5, 6), (4, 6)), ((3, 6, 6), (24,))):
        with pytest.raises(AttnnasError, match="do not fit 6 nodes"):
            draw_supergraph(torch.ones(level), torch.ones(sink), level_nodes())


# Curves

def search_history(epochs=3, activation=True, sites=("a", "b")):
    draw = np.random.default_rng(0)
    return [{"connections": {site: {"level": [], "sink": draw.dirichlet(np.ones(12)).reshape(2, 6).tolist(),
                                    "activation": draw.dirichlet(np.ones(4), (2, 6)).tolist() if activation else None}
                             for site in sites}} for _ in range(epochs)]


@pytest.mark.parametrize("site", [None, "b"])
def test_connection_curves_show_the_history(site):
    history = search_history()
    axes = connection_curves(history, site=site, top=2).axes
    sink = np.array([epoch["connections"][site or "a"]["sink"] for epoch in history]).reshape(3, 12)
    assert np.allclose(np.array([line.get_ydata() for line in axes[0].lines]).T, sink)
    assert np.allclose(axes[1].lines[0].get_ydata(), [relative_entropy(s) for s in sink])
    activation = history[-1]["connections"][site or "a"]["activation"]
    assert np.allclose(axes[2].images[0].get_array(), np.reshape(activation, (12, 4)))
    best = {divmod(int(i), 6) for i in sink[-1].argsort()[-2:]}
    named = {f"level {i + 1} {level_nodes()[j].dimension}\n{level_nodes()[j].type}" for i, j in best}
    assert {text.get_text() for text in axes[0].texts} == named
    framed = {round(p.get_y() + .5) for p in axes[2].patches if isinstance(p, Rectangle)}
    assert framed == {6 * i + j for i, j in best}


def test_connection_curves_without_activations_and_of_one_epoch():
    assert len(connection_curves(search_history(activation=False)).axes) == 2
    connection_curves(search_history(epochs=1)).canvas.draw()


def test_named_lines_have_labels_that_do_not_overlap():
    history = search_history()
    for epoch in history: epoch["connections"]["a"]["sink"] = (np.ones((2, 6)) / 12).tolist()
    figure = connection_curves(history, top=4)
    figure.canvas.draw()
    labels = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(labels) == 4
    for low, high in zip(labels, labels[1:]): assert low.y1 <= high.y0 + 1


def test_connection_curves_errors():
    with pytest.raises(AttnnasError, match="no connection weights"): connection_curves([{"loss": 1}])
    with pytest.raises(AttnnasError, match="no connection weights"): connection_curves([])
    with pytest.raises(AttnnasError, match="Unknown site 'c'"): connection_curves(search_history(), site="c")


def test_relative_entropy_of_free_weights():
    assert relative_entropy([[1, -1], [1, -1]]) == pytest.approx(1)
    assert 0 < relative_entropy([[.9, .1], [0, 0]]) < .5


def learning_history(*top1, validation=True):
    found = lambda t: {"validation": {"loss": 2.1 - t / 100, "top1": t - 1}} if validation else {}
    return [{"loss": 2 - t / 100, "top1": t, **found(t)} for t in top1]


def lines(ax): return [line for line in ax.lines if len(line.get_xdata())]


def test_learning_curves_are_means_with_their_range():
    axes = learning_curves({"cell": [learning_history(10, 50), learning_history(20, 90)]}).axes
    training, validation = (line.get_ydata() for line in lines(axes[1]))
    assert training.tolist() == [15, 70] and validation.tolist() == [14, 69]
    band = axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (10, 90)
    assert "cell (2 seeds)" in [text.get_text() for text in axes[0].figure.legends[0].get_texts()]


def test_learning_curves_group_records_by_all_but_the_seed():
    record = lambda label, history: SimpleNamespace(run=SimpleNamespace(label=label), history=history)
    figure = learning_curves([record("A i3d cell seed 0", learning_history(10)),
                              record("A i3d none seed 0", learning_history(5)),
                              record("A i3d cell seed 11", learning_history(30))])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["A i3d cell (2 seeds)", "A i3d none (1 seed)"]


def test_learning_curves_end_where_a_run_diverged():
    diverged = [{"loss": 2.0, "top1": 9.0}, {"loss": None, "top1": 8.0}]
    axes = learning_curves({"cell": [learning_history(10, 20, 30, validation=False), diverged]}).axes
    loss = lines(axes[0])[0].get_ydata()
    assert np.isfinite(loss).tolist() == [True, False, False]
    for nothing in ({}, {"a": []}, {"a": [[], []]}, []):
        with pytest.raises(AttnnasError, match="no finished epoch"): learning_curves(nothing)


# Attention

VIDEO = torch.randint(0, 256, (3, 16, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid, cell, pixels", [
    ((8, 4, 4), (3, 1, 2), ((6, 8), (8, 16), (16, 24))),
    ((16, 32, 32), (15, 31, 0), ((15, 16), (31, 32), (0, 1))),
    ((5, 5, 3), (0, 4, 1), ((0, 3), (26, 32), (11, 21)))])                # 16 / 5, 32 / 5 and 32 / 3: by pixel centres
def test_a_planted_cell_lands_on_its_pixels(grid, cell, pixels):
    planted = torch.zeros(grid)
    planted[cell] = 1
    expected = torch.zeros(16, 32, 32)
    expected[tuple(slice(*p) for p in pixels)] = 1
    assert to_pixels(planted, (16, 32, 32)).equal(expected)


def test_the_picture_shows_the_planted_cell():
    "Frames 1, 3, .. 15 stand side by side, 33 columns each; only frame 7 has the cell."
    planted = torch.zeros(8, 4, 4)
    planted[3, 1, 2] = 1
    ax = map_overlay(VIDEO, planted).axes[0]
    frames, heat = (image.get_array() for image in ax.images)
    assert ax.get_xlim() == (-.5, heat.shape[1] - .5) and heat.shape == (32, 8 * 33 - 1)
    rows, columns = np.nonzero(np.nan_to_num(np.asarray(heat)) == 1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 3 * 33 + 16, 3 * 33 + 23)
    assert np.allclose(frames[:, 33:65], VIDEO[:, 3].float().mean(0) / 255)


def test_every_frame_has_the_same_scale():
    weights = torch.linspace(.2, .6, 8)[:, None, None].expand(8, 4, 4)
    image = map_overlay(VIDEO, weights, units="sigmoid").axes[0].images[1]
    assert np.allclose(image.get_clim(), (.2, .6))
    heat = np.asarray(image.get_array())
    assert np.allclose([heat[0, 33 * i] for i in range(8)], weights[:, 0, 0])
    assert image.colorbar.ax.get_ylabel() == "sigmoid"


def test_scales_of_negative_and_constant_weights():
    image = map_overlay(VIDEO, torch.tensor([[-1., 3.], [0., 0.]])).axes[0].images[1]
    assert image.get_clim() == (-3, 3) and image.cmap(.5)[3] < .01, "zero is in the middle and clear"
    low, high = map_overlay(VIDEO, torch.full((4, 4), .5)).axes[0].images[1].get_clim()
    assert low < .5 < high


@pytest.mark.parametrize("shape, images, bars", [
    ((4, 4), 2, 0), ((1, 4, 4), 2, 0), ((8,), 1, 8), ((8, 1, 1), 1, 8), ((8, 4, 4), 2, 8)])
def test_dimensions_are_drawn_as_heat_or_bars(shape, images, bars):
    figure = map_overlay(VIDEO, torch.rand(shape))
    assert len(figure.axes[0].images) == images
    assert sum(isinstance(p, Rectangle) for ax in figure.axes[1:] for p in ax.patches) == bars


def test_bars_stand_under_their_frames():
    weights = torch.arange(16.)
    ax = map_overlay(VIDEO, weights, frames=16).axes[1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert np.allclose(centres, [33 * t + 16 for t in range(16)], atol=.5)
    assert [bar.get_height() for bar in ax.patches] == weights.tolist()


def test_overlay_refuses_other_shapes():
    with pytest.raises(AttnnasError, match="one clip"): map_overlay(VIDEO[None], torch.ones(4, 4))
    with pytest.raises(AttnnasError, match="expected \\(T'\\)"): map_overlay(VIDEO, torch.ones(1, 1, 8, 4, 4))


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_query_weights_are_the_row_that_the_forward_pass_uses(dimension, activation):
    "The output at the query is the sum of the values, weighted by what query_weights says."
    torch.manual_seed(0)
    operation = create_operation(dimension, "dot-product", activation, 6)
    x, query = torch.randn(6, 8, 4, 5), (9, 20, 31)                      # grid position 4, 2, 4
    video = VIDEO[..., :32]
    weights = query_weights(operation, x, query, video)
    with torch.no_grad():
        output, value = operation(x[None])[0], operation.value(x.movedim(0, -1)).movedim(-1, 0)
    if dimension == "spatial": expected, got = torch.einsum("yx,dtyx->dt", weights, value), output[:, :, 2, 4]
    elif dimension == "temporal": expected, got = torch.einsum("t,dtyx->dyx", weights, value), output[:, 4]
    else: expected, got = torch.einsum("tyx,dtyx->d", weights, value), output[:, 4, 2, 4]
    assert torch.allclose(expected, got, atol=1e-5)


def test_query_weights_errors():
    operation, x = create_operation("spatial", "dot-product", "softmax", 4), torch.randn(4, 8, 4, 4)
    with pytest.raises(AttnnasError, match="outside the clip"): query_weights(operation, x, (0, 32, 0), VIDEO)
    with pytest.raises(AttnnasError, match="outside the clip"): query_overlay(VIDEO, torch.ones(4, 4), (16, 0, 0))
    with pytest.raises(AttnnasError, match="no queries"):
        query_weights(create_operation("spatial", "map-based", "softmax", 4), x, (0, 0, 0), VIDEO)


@pytest.mark.parametrize("shape, marks, size", [((8, 4, 4), 1, (8, 8)), ((4, 4), 8, (8, 8)), ((8,), 1, (32, 32))])
def test_the_query_is_outlined_where_it_is(shape, marks, size):
    figure = query_overlay(VIDEO, torch.rand(shape).softmax(0), query := (10, 9, 31))
    ax = figure.axes[0]
    shown = [int(text.get_text()) for text in figure.axes[0 if len(shape) == 2 else 1].get_xticklabels()]
    outlines = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert query[0] in shown and len(shown) == 8 and len(outlines) == marks
    for outline in outlines:
        (x, y), frame = outline.get_xy(), shown[int(outline.get_x() + .5) // 33]
        assert marks == 8 or frame == query[0]
        assert x < shown.index(frame) * 33 + 31 < x + outline.get_width() and y < 9 < y + outline.get_height()
        assert (outline.get_width(), outline.get_height()) == size


def test_query_weights_are_drawn_times_their_number():
    image = query_overlay(VIDEO, torch.full((4, 4), 1 / 16), (0, 0, 0)).axes[0].images[1]
    assert np.allclose(np.unique(np.asarray(image.get_array())[:, :32]), 1)


@pytest.mark.parametrize("steps", [4, 8, 16])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_the_attended_frame_is_shown(shape, frames, steps):
    "If this fails, the one frame that the network looks at is the one that the picture leaves out."
    for step in range(steps):
        weights = torch.full((steps, *shape), 0.01)
        weights[step] = 1
        attended = set(range(step * 16 // steps, (step + 1) * 16 // steps))
        for asked in (None, 0, 5, 12, 15):
            shown = _shown(VIDEO, weights, frames, asked).tolist()
            assert attended & set(shown) and shown == sorted(set(shown))
            assert asked is None or asked in shown
            assert len(shown) == max(frames, 1 if asked is None or asked in attended else 2)


def test_pictures_of_both_kinds_show_the_attended_frame():
    weights = torch.zeros(16, 4, 4)
    weights[14, 1, 2] = 1
    for figure in (map_overlay(VIDEO, weights), query_overlay(VIDEO, weights, (2, 0, 0))):
        assert "14" in [text.get_text() for text in figure.axes[1].get_xticklabels()]
        assert np.nanmax(figure.axes[0].images[1].get_array()) >= 1


@pytest.mark.parametrize("level", [1e-6, 0.5, 1, 300])
def test_a_nearly_flat_map_is_not_stretched(level):
    "If this fails, differences of a thousandth get all the colours, and look like a find."
    weights = level * (1 + 0.001 * torch.rand(8, 4, 4))
    image = map_overlay(VIDEO, weights).axes[0].images[1]
    low, high = image.get_clim()
    assert high - low > 0.2 * level and low < weights.min() and weights.max() < high


def test_markers_of_streams_are_whole():
    "If this fails, the markers of the first or of the last model are cut by the frame."
    models = ["none", "cbam", "gated"]
    lines = [{"model": model, "stream": stream, "all": 0.0, "single": 50.0, "relation": 100.0}
             for model, stream in product(models, STREAM_NAMES)]
    for ax in stream_dots(pd.DataFrame(lines), models).axes:
        bottom, top = ax.get_ylim()
        heights = [float(y) for dots in ax.collections for _, y in dots.get_offsets()]
        assert bottom - max(heights) > 0.25 and min(heights) - top > 0.25 and bottom > top


def test_our_own_count_is_drawn_beside_the_talks():
    "If this fails, the picture shows the talk's cost of a cell as if it were counted here."
    rows = pd.DataFrame({"model": ["I3D", "I3D-R50+Cell", "I3D-R50+Cell"], "cell": ["", "as found", "within"], "views": 1,
                         "flops_a_multiply_add": 2, "published_top1": [75.0, 80.0, 80.0],
                         "published_gflops": [1136.0, 1034.0, 1034.0], "multiply_adds": [568e9, 2917e9, 515e9]})
    ax, = accuracy_against_cost({"Kinetics-600": rows}, rows).axes
    hollow, full = ([tuple(point) for point in dots.get_offsets().tolist()] for dots in ax.collections)
    assert sorted(hollow) == [(1030, 80), (5834, 80)] and sorted(full) == [(1034, 80), (1136, 75)]
    texts = [text.get_text() for text in ax.texts]
    assert {"as found: 5,834", "within: 1,030"} < set(texts) and texts.count("I3D-R50+Cell") == 1


# Collecting

class Net(nn.Module):
    "Two convolutions and a classifier, with a part that is frozen in evaluation mode."
    default_sites, example_shape = ("first", "second"), (1, 3, 4, 8, 8)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 5, 3, padding=1)
        self.frozen = nn.BatchNorm3d(6)
        self.fail = False

    def forward(self, x):
        x = self.second(self.frozen(self.first(x)))
        if self.fail: raise RuntimeError("out of memory")
        return x.mean((2, 3, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    focus, gate = OperationSpec("spatial", "map-based", "sigmoid"), OperationSpec("temporal", "map-based", "none")
    cell = CellSpec((focus, OPERATION, gate), ((0,), (0,), (1, 2)), width=4)
    model = insert(Net(), cell)
    model.frozen.eval()
    return model


CLIPS = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_collect_sees_what_the_forward_pass_sees(model):
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    seen = collect(model, CLIPS)
    assert list(seen) == [(site, k) for site in ("first", "second") for k in (1, 2, 3)]
    cell = model.second.added
    spec, module, x = seen["second", 3]
    assert module is cell.operations[2] and spec == cell.spec.operations[2] and x.shape == (2, 4, 4, 8, 8)
    first, second = (seen["second", k].module(seen["second", k].input) for k in (1, 2))
    assert torch.allclose(x, .5 * first + .5 * second, atol=1e-6), "operation 3 reads the mean of 1 and 2"
    assert all(a.equal(b) for a, b in zip(before.values(), model.state_dict().values())), "not even batch statistics"
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes and hooks(model) == 0
    assert module.weights(x).shape == (2, 1, 4, 1, 1)


def test_collect_cleans_up_after_a_failure(model):
    modes, model.fail = [m.training for m in model.modules()], True
    with pytest.raises(RuntimeError, match="out of memory"): collect(model, CLIPS)
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0


def test_collect_wants_cells_and_passes_other_modules_by():
    with pytest.raises(AttnnasError, match="no attention cell"): collect(Net(), CLIPS)
    both = insert(Net(), lambda channels: nn.Identity(), ["first"])
    insert(both, CellSpec((OPERATION,), ((0,),), width=4), ["second"])
    assert list(collect(both, CLIPS)) == [("second", 1)]
    assert isinstance(both.second.added, AttentionCell)
