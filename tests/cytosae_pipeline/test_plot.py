"""Figures of statistics in memory: the pictures of `report --figures`, and messages where they cannot be drawn."""

import io

import numpy as np
import pytest
from PIL import Image

import cytosae
import cytosae_cache
import cytosae_pipeline
from cytosae_pipeline import UserError, plot

GROUPS = {"p0": "a", "p1": "a", "p2": "b", "p3": "b"}


@pytest.fixture
def pair(with_sae):
    return cytosae.load(with_sae.sae()), cytosae_cache.open(with_sae.store)


@pytest.fixture
def stats(pair):
    return cytosae_pipeline.feature_stats(*pair, top_k=4)


@pytest.fixture
def counts(pair):
    return cytosae_pipeline.patient_counts(*pair, threshold=0.1)


def texts(figure):
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text")))


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))


def test_top_images_of_latents_are_drawn_over_the_cells(stats, with_sae):
    best = stats.best_latents(2)
    figure = plot.latent(stats, best, images=with_sae.images)
    found = texts(figure)
    assert all(str(latent) in found for latent in best)
    assert f"{stats.top_values[best[0], 0]:#.3g}".rstrip(".") in found
    bare = plot.latent(stats, best)
    assert pixels(figure).shape == pixels(bare).shape
    assert not np.array_equal(pixels(figure), pixels(bare))


def test_scatter_names_its_axes_and_rings_what_is_chosen(stats):
    found = texts(plot.scatter(stats, stats.best_latents(3)))
    assert "log10 sparsity (share of images where active)" in found
    assert "chosen (3)" in found
    assert "chosen" not in texts(plot.scatter(stats))


def test_barcodes_and_correlation_name_patients_and_groups(counts):
    assert {"p0", "p1", "p2", "p3", "a (2)", "b (2)"} <= set(
        text.get_text()
        for text in plot.barcodes(counts, [1, 2], groups=GROUPS).findobj(lambda i: hasattr(i, "get_text"))
    )
    assert "Pearson correlation" in texts(plot.correlation(counts, groups=GROUPS))


def test_classes_have_barcodes_too(pair):
    found = texts(plot.barcodes(cytosae_pipeline.class_counts(*pair), 3))
    assert "lymphocyte" in found


@pytest.mark.parametrize("test", ["mann-whitney", "permutation"])
def test_a_volcano_plot_compares_groups(counts, test):
    assert "log2 fold change" in texts(plot.volcano(counts, "a", "b", groups=GROUPS, group_test=test))
    assert "more in all others" in texts(plot.volcano(counts, "b", groups=GROUPS, group_test=test))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda stats, counts: plot.latent(stats, 96), r"latents must lie in 0\.\.95, found 96"),
        (lambda stats, counts: plot.scatter(stats, [-1]), "found -1"),
        (lambda stats, counts: plot.latent(stats, 1, images="nowhere"), "no images at 'nowhere'"),
        (lambda stats, counts: plot.volcano(counts, "c", groups=GROUPS), "there is no group 'c'; there are: 'a', 'b'"),
        (
            lambda stats, counts: plot.volcano(counts, "a", groups={"p0": "a", "p1": "b"}),
            "the groups cannot be compared",
        ),
        (lambda stats, counts: plot.barcodes(counts, 1, groups={"x": "a"}), "groups names none of the 4 patients"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(stats, counts, draw, message):
    with pytest.raises(UserError, match=message):
        draw(stats, counts)
