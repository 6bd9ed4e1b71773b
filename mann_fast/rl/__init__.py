"""A MemoryLayer as reinforcement-learning libraries take a recurrent network: one module for each library, which imports it.

:mod:`mann_fast.rl.torchrl`, :mod:`mann_fast.rl.sb3` and :mod:`mann_fast.rl.popgym`; docs/rl.md shows each.
"""
