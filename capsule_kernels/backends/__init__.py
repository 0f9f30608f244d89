"""Where the kernels live, one module a backend; none imports another, nor the oracle."""
