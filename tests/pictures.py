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
