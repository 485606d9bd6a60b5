"""What JAX lacks, as primitives: a linear map with its transpose, a choice by platform, a decision under `vmap`."""
