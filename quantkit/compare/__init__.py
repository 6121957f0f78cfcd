"""Same-seed comparison of a reference and a candidate along the denoising path, with a verdict and a report."""
