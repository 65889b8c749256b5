"""Distillation inside of trainers: each module imports the library that it is for, and nobody else does.

transformers.py and lightning.py have the mixins; heads.py takes a language model's head out of its forward,
and language.py makes of that the loss of a batch. trl.py puts the loss in the place of TRL's own.
"""
