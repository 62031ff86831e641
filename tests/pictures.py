"""What every picture has to be."""

from matplotlib.backends.backend_agg import FigureCanvasAgg


def assert_nothing_overlaps(figure):
    """All texts and axes lie within the figure, and none on another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    boxes += [(axes.get_label(), axes.get_tightbbox(renderer)) for axes in figure.axes]
    whole = figure.bbox
    for index, (name, box) in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, name
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, name
        for other_name, other in boxes[:index]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or down <= 1, (name, other_name)


def check_layout(figure):
    """All texts, tick labels and axes lie within the figure, and no text lies on another or on other axes' inside."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    words = [(text, None) for text in figure.texts]
    for axes in figure.axes:
        labels = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        ticks = [
            tick.label1
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if min(axis.get_view_interval()) - 1e-9 <= tick.get_loc() <= max(axis.get_view_interval()) + 1e-9
        ]
        words += [(text, axes) for text in [*labels, *ticks]]
    boxes = [
        (text.get_text(), axes, text.get_window_extent(renderer))
        for text, axes in words
        if text.get_text() and text.get_visible()
    ]
    assert boxes
    for index, (name, own, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, name
        for other_name, _, other in boxes[:index]:
            assert not overlaps(box, other), (name, other_name)
        for axes in figure.axes:
            assert axes is own or not overlaps(box, axes.get_window_extent(renderer)), (name, axes.get_label())
    for index, axes in enumerate(figure.axes):
        for other in figure.axes[:index]:
            assert not overlaps(axes.get_window_extent(renderer), other.get_window_extent(renderer))


def overlaps(box, other):
    across = min(box.x1, other.x1) - max(box.x0, other.x0)
    down = min(box.y1, other.y1) - max(box.y0, other.y0)
    return across > 1 and down > 1
