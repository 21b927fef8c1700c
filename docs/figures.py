"""What Sphinx-Gallery shows of a script: the figures that its variables hold, also those that pyplot does not know."""

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def figures(block, block_vars, gallery_conf):
    """Save the figures that are new since the last block, and return the text that shows them."""
    names = block_vars["example_globals"]
    shown = names.setdefault("__shown__", [])
    paths = []
    for value in list(names.values()):
        if isinstance(value, Figure) and not any(value is one for one in shown):
            shown.append(value)
            paths.append(next(block_vars["image_path_iterator"]))
            value.savefig(paths[-1], dpi=100)
    return figure_rst(paths, gallery_conf["src_dir"])


def _get_sg_image_scraper():
    return figures
