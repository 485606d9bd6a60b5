"""Primitives that JAX lacks: a linear map with its transpose, a choice by platform."""
