"""Maths on tensors: one function is one equation. Imports torch and nothing of this project."""
