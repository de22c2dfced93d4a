"""Runs code that a model has written, and judges it, in two processes that may only compute. Standard library alone.

    parent (execution.py)  --program, tests-->  judge  --program, arguments-->  candidate
                           <--exit status-----         <--values, as JSON-----

The candidate is the interpreter in which the program runs. The tests are never in it: it gets arguments and answers
with values, which the judge reads as plain data and compares. It holds two ends of pipes, and the kernel lets it do
nothing else with the machine (confine.py). So whatever a program does to its interpreter, it can pass only by
answering what the tests ask for. The judge, which decodes what a hostile process has sent, is confined as well.
"""

from mikv.lab.tasks.sandbox.confine import ALLOWED as ALLOWED
from mikv.lab.tasks.sandbox.confine import MEMORY_BYTES as MEMORY_BYTES
