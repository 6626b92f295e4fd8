"""One adapter per program: trains with the program's own trainer on batches from stdin, in the program's environment.

An adapter imports its program, torch, numpy, the standard library and `job`, nothing else.
"""
