"""The geometric median against cases known in closed form and against the condition of optimality."""

import math

import pytest
import torch

from cytosae.training.geometric_median import geometric_median


def cost(points, where) -> float:
    return (points.double() - where).norm(dim=1).sum().item()


def test_equilateral_triangle_has_its_centre():
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3)]])
    torch.testing.assert_close(
        geometric_median(points), torch.tensor([1, 1 / math.sqrt(3)], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_convex_quadrilateral_has_the_crossing_of_its_diagonals():
    points = torch.tensor([[0.0, 0.0], [4.0, 4.0], [0.0, 3.0], [3.0, 0.0]])
    torch.testing.assert_close(
        geometric_median(points, max_iterations=2000, tolerance=1e-12),
        torch.tensor([1.5, 1.5], dtype=torch.float64), rtol=0, atol=1e-5,
    )  # fmt: skip


def test_fermat_point_of_a_triangle_sees_its_sides_at_120_degrees():
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    median = geometric_median(points, max_iterations=1000, tolerance=1e-10)
    rays = torch.nn.functional.normalize(points - median, dim=1)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (rays[i] @ rays[j]).item() == pytest.approx(-0.5, abs=1e-6)


def test_triangle_with_an_angle_above_120_degrees_has_that_corner():
    points = torch.tensor([[0.0, 0.0], [10.0, 1.0], [-10.0, 1.0]])
    torch.testing.assert_close(geometric_median(points), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_majority_of_points_in_one_place_is_the_median():
    points = torch.tensor([[1.0, 2.0]] * 3 + [[5.0, 0.0], [0.0, 7.0]])
    torch.testing.assert_close(
        geometric_median(points), torch.tensor([1.0, 2.0], dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_starting_on_a_point_that_is_not_the_median_moves_on():
    # Their mean is the first point, where a naive iteration divides by zero; the other points move the estimate.
    points = torch.tensor([[0.0, 0.0], [6.0, 0.0], [-2.0, 1.0], [-2.0, -1.0], [-2.0, 0.0]])
    assert not points.mean(dim=0).any()
    median = geometric_median(points, max_iterations=3000, tolerance=1e-10)
    assert cost(points, median) < cost(points, torch.zeros(2)) - 1e-3
    assert median[0] < -1e-2


def test_starting_on_the_median_stays_there():
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert geometric_median(points).tolist() == [0.0, 0.0]


def test_odd_points_on_a_line_have_the_middle_one():
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    points = torch.tensor([-9.0, -1.0, 0.5, 2.0, 30.0], dtype=torch.float64)[:, None] * direction
    median = geometric_median(points, max_iterations=3000, tolerance=1e-12)
    torch.testing.assert_close(median, 0.5 * direction, rtol=0, atol=1e-4)


def test_even_points_on_a_line_reach_the_minimum_cost():
    points = torch.tensor([[0.0], [1.0], [4.0], [10.0]])
    assert cost(points, geometric_median(points)) == pytest.approx(13.0, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_copies_of_one_point_have_that_point(n):
    points = torch.tensor([[3.0, -1.0, 0.25]]).expand(n, 3)
    assert geometric_median(points).tolist() == [3.0, -1.0, 0.25]


@pytest.mark.parametrize("seed", range(4))
def test_random_points_meet_the_condition_of_optimality(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(60, 6, generator=generator, dtype=torch.float64) ** 3
    median = geometric_median(points)
    pull = torch.nn.functional.normalize(points - median, dim=1).sum(dim=0)
    assert pull.norm() < 1e-3 * len(points)
    for _ in range(20):
        step = torch.randn(6, generator=generator, dtype=torch.float64)
        assert cost(points, median) <= cost(points, median + 0.01 * step)


def test_outliers_hardly_move_it_and_it_is_equivariant_to_scale_and_shift():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    median = geometric_median(points)
    outlier = torch.cat([points, torch.full((1, 3), 1e6, dtype=torch.float64)])
    assert (geometric_median(outlier, max_iterations=1000) - median).norm() < 0.2
    for scale in (1e-6, 1e6):
        moved = geometric_median(points * scale + 3 * scale)
        torch.testing.assert_close(moved / scale, median + 3, rtol=0, atol=1e-5)


def test_half_precision_is_summed_in_float64():
    points = torch.full((4096, 2), 1000.0, dtype=torch.float16)
    assert geometric_median(points).dtype == torch.float64
    assert geometric_median(points).tolist() == [1000.0, 1000.0]


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(N, D\) with N >= 1, found"):
        geometric_median(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        geometric_median(torch.tensor([[0.0, value]]))
