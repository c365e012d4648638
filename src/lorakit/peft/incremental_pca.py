"""PEFT's `IncrementalPCA`: principal components of rows that arrive in batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lorakit.errors import ConfigError


class IncrementalPCA:
    """Principal components of a data set, updated batch by batch (Ross et al. 2008).

    Each update computes the SVD of the previous components, scaled by their singular values, the centered batch, and a
    row that corrects for the shift of the mean. All statistics are in fp64.

    Attributes:
        n_components: Number of components k; if None, the first batch sets it to the smaller of its two sizes.
        components_: Components, (k, features); the entry of largest magnitude in each is positive.
        singular_values_: (k,).
        explained_variance_: Variance along each component, (k,).
        explained_variance_ratio_: Fraction of the total variance, (k,).
        noise_variance_: Mean variance along the components that were left out, a scalar.
        mean_: Mean of all rows, (features,).
        var_: Variance of all rows, (features,).
        n_samples_seen_: Number of rows so far.
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor
    mean_: Tensor
    var_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.copy = copy  # without effect: the data is never changed
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = 2 * n_components if lowrank_q is None and n_components else lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_samples_seen_ = 0
        if lowrank and self.lowrank_q is None:
            raise ConfigError("n_components must be set if lowrank=True and lowrank_q is None.", field="n_components")
        if lowrank and n_components is not None and (self.lowrank_q or 0) < n_components:
            raise ConfigError.of("lowrank_q", lowrank_q, f"at least n_components ({n_components})")

    def fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Update the components with all rows of a data set, in batches of `batch_size` (default 5·features).

        Args:
            X: Rows, (samples, features).
            check_input: Whether to check the shape.

        Raises:
            ConfigError: `n_components` or the number of features does not fit.
        """
        if check_input:
            self._check(X)
        self.batch_size = self.batch_size or 5 * X.shape[1]
        for part in self.gen_batches(len(X), self.batch_size, self.n_components or 0):
            self.partial_fit(X[part], check_input=False)
        return self

    @torch.no_grad()
    def partial_fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Update the components with one batch.

        Args:
            X: Rows, (samples, features).
            check_input: Whether to check the shape.

        Raises:
            ConfigError: `n_components` or the number of features does not fit.
        """
        if check_input:
            self._check(X)
        if self.n_components is None:
            self.n_components = min(X.shape)
        rows = X.double()
        seen, new = self.n_samples_seen_, len(rows)
        total, mean, var = seen + new, rows.mean(0), rows.var(0, correction=0)
        stacked = rows - mean
        if seen:
            shift = self.mean_ - mean
            before = self.singular_values_[:, None] * self.components_
            stacked = torch.cat([before, stacked, (seen * new / total) ** 0.5 * shift[None]])
            var = (seen * self.var_ + new * var + seen * new / total * shift.square()) / total
            mean = (seen * self.mean_ + new * mean) / total
        self.mean_, self.var_, self.n_samples_seen_ = mean, var, total
        self._take(*self._svd(stacked), rows.shape)
        return self

    def _take(self, values: Tensor, vectors: Tensor, shape: torch.Size) -> None:
        """Store the components from singular values (n,) and right vectors (n, features) of a batch of this shape."""
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        variances, kept = values.square() / (self.n_samples_seen_ - 1), self.n_components
        self.components_ = (vectors * largest.sign())[:kept]
        self.singular_values_ = values[:kept]
        self.explained_variance_ = variances[:kept]
        self.explained_variance_ratio_ = (values.square() / (self.var_ * self.n_samples_seen_).sum())[:kept]
        has_rest = kept not in shape
        self.noise_variance_ = variances[kept:].mean() if has_rest else variances.new_zeros(())

    def _svd(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return singular values (n,) and right singular vectors (n, features)."""
        if not self.lowrank:
            _, values, vectors = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
            return values, vectors
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, values, columns = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return values, columns.mT

    def transform(self, X: Tensor) -> Tensor:
        """Return the coordinates (samples, k) of rows (samples, features) along the components, in fp64, as in PEFT.

        Raises:
            ConfigError: No batch has been seen.
        """
        if not self.n_samples_seen_:
            raise ConfigError("transform: no data has been seen; call fit or partial_fit first.", field="X")
        return (X.double() - self.mean_) @ self.components_.mT

    def _check(self, X: Tensor) -> None:
        samples, features = X.shape
        kept = self.n_components
        if kept is not None and kept > features:
            raise ConfigError(
                f"n_components={kept} invalid for n_features={features}: there cannot be more components than columns.",
                what=kept,
                field="n_components",
            )
        if kept is not None and kept > samples:
            raise ConfigError(
                f"n_components={kept} must be less or equal to the batch number of samples {samples}.",
                what=kept,
                field="n_components",
            )
        if self.n_samples_seen_ and features != len(self.mean_):
            raise ConfigError.of("X", f"{features} columns wide", f"as wide as the first batch ({len(self.mean_)})")

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Iterate over slices of n rows; the last one is longer if it would be followed by too short a rest.

        Args:
            n: Number of rows.
            batch_size: Rows of a slice.
            min_batch_size: Smallest number of rows of the last slice.

        Yields:
            The slices, in order.
        """
        ends = [end for end in range(batch_size, n + 1, batch_size) if end + min_batch_size <= n]
        starts = [0, *ends]
        for start, end in zip(starts, [*ends, n], strict=True):
            if start < end:
                yield slice(start, end)
