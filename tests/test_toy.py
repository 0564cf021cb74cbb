"""The toy clouds against brute force, closed forms and automatic differentiation."""

import pytest
import torch

from minisd import toy


def noisy(cloud, sigma, n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, labels = cloud.sample(n, generator)
    return x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype), labels


def test_clouds_are_normalised_and_labelled():
    cloud = toy.cloud(("cat", "dog", "human"), n=300)
    assert cloud.points.shape == (900, 2) and cloud.points.dtype == torch.float64
    assert cloud.labels.bincount().tolist() == [300, 300, 300]
    torch.testing.assert_close(cloud.points.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert cloud.points.square().mean() == pytest.approx(1)
    left, middle, right = (cloud.only(name).points for name in cloud.names)
    assert left[:, 0].max() < middle[:, 0].min() and middle[:, 0].max() < right[:, 0].min()


def test_sample_draws_from_the_density():
    """The mean of -log p over draws is the entropy; for one Gaussian in d = 2 that is 1 + log(2 pi s^2)."""
    cloud = toy.Cloud(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), ("one",), width=0.5)
    x, labels = cloud.sample(40000, torch.Generator().manual_seed(0))
    entropy = 1 + torch.tensor(2 * torch.pi * 0.25, dtype=torch.float64).log()
    assert -cloud.log_density(x, 0.0).mean() == pytest.approx(entropy.item(), abs=0.02)
    assert (labels == 0).all()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_denoiser_of_a_single_gaussian(sigma):
    """E[x0 | x] = (s^2 x + sigma^2 m) / (s^2 + sigma^2)."""
    mean, s = torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.7
    cloud = toy.Cloud(mean, torch.tensor([0]), ("one",), width=s)
    x, _ = noisy(cloud, sigma)
    torch.testing.assert_close(
        cloud.denoise(x, sigma), (s**2 * x + sigma**2 * mean) / (s**2 + sigma**2), rtol=0, atol=1e-12
    )
    variance = torch.tensor(s**2 + sigma**2, dtype=torch.float64)
    density = -(x - mean).square().sum(1) / (2 * variance) - (2 * torch.pi * variance).log()
    torch.testing.assert_close(cloud.log_density(x, sigma), density, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_denoiser_against_brute_force(width):
    """E[x0 | x] by summing over a fine grid of every possible x0."""
    cloud = toy.Cloud(
        torch.tensor([[-1.0, 0.0], [0.3, 0.5], [0.8, -0.7]], dtype=torch.float64),
        torch.arange(3),
        ("a", "b", "c"),
        width,
    )
    x, sigma = torch.tensor([[0.1, 0.2], [-2.0, 1.0]], dtype=torch.float64), 0.6
    if width:
        axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
        x0 = torch.cartesian_prod(axis, axis)
        prior = sum(torch.exp(-(x0 - p).square().sum(1) / (2 * width**2)) for p in cloud.points)
    else:
        x0, prior = cloud.points, torch.ones(3, dtype=torch.float64)
    weights = prior * torch.exp(-(x[:, None] - x0).square().sum(-1) / (2 * sigma**2))
    expected = (weights @ x0) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(cloud.denoise(x, sigma), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [0.0, 0.1])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_score_is_the_gradient_of_the_log_density(sigma, width):
    cloud = toy.cloud(n=200, width=width)
    x, _ = noisy(cloud, sigma)
    x.requires_grad_()
    [gradient] = torch.autograd.grad(cloud.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(cloud.score(x, sigma), gradient, rtol=1e-9, atol=1e-9)


def test_no_denoiser_does_better():
    """The exact denoiser has the least mean squared error: any change of it costs."""
    cloud, sigma = toy.cloud(n=200), 0.5
    x0, _ = cloud.sample(20000, torch.Generator().manual_seed(0))
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=x0.dtype)
    best = cloud.denoise(x, sigma)
    error = (best - x0).square().mean()
    for worse in (best * 0.98, best * 1.02, best + 0.02, cloud.denoise(x, 0.45), cloud.denoise(x, 0.55)):
        assert (worse - x0).square().mean() > error


def test_posteriors():
    cloud = toy.cloud(n=100)
    x, labels = noisy(cloud, 0.2)
    posterior, classes = cloud.posterior(x, 0.2), cloud.label_posterior(x, 0.2)
    torch.testing.assert_close(posterior.sum(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(classes, torch.stack([posterior[:, :100].sum(1), posterior[:, 100:].sum(1)], 1))
    assert (classes.argmax(1) == labels).float().mean() > 0.9
    # far from everything nothing can be told: the posterior is the prior
    torch.testing.assert_close(
        cloud.label_posterior(x, 1e4), torch.full((50, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-3
    )


def test_class_conditional_denoisers_add_up():
    """E[x0 | x] is the mean of the conditional ones, weighted by p(label | x)."""
    cloud, sigma = toy.cloud(n=100, width=0.05), 0.8
    x, _ = noisy(cloud, sigma)
    weights = cloud.label_posterior(x, sigma)
    parts = torch.stack([cloud.only(name).denoise(x, sigma) for name in cloud.names], dim=1)
    torch.testing.assert_close((weights[..., None] * parts).sum(1), cloud.denoise(x, sigma), rtol=0, atol=1e-12)


def test_follows_the_dtype_of_x():
    cloud = toy.cloud(n=100, width=0.05)
    x, _ = noisy(cloud, 0.5)
    single = cloud.denoise(x.float(), torch.tensor(0.5, dtype=torch.float64))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), cloud.denoise(x, 0.5), rtol=0, atol=1e-5)
