"""The command line of lm-evaluation-harness with the model type `mikv` among its own: `python -m mikv.lab.lm_eval`.

The package that this is part of registers it on import, after the harness has registered those that it knows.
"""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
