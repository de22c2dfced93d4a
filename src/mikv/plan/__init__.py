"""What a deployment will take, before anything is bought or loaded: memory, devices, time and energy per token.

Every number is an estimate. Formulas and their sources: docs/guides/planning.md.
"""
