"""What there is to learn from a GPU that is at hand for minutes, in the order of its worth. README.md beside
this tells how to use it.

run.sh          the environment, then drive.py
drive.py        which stages, in which order, each in processes of its own, until they are done or the seconds
                are used up
stages.py       a stage's process: the table of stages
log.py          results as JSON lines
cases.py        calls and logits; what makes a result right
timing.py       stages that measure times: the loss alone, from a graph, over shapes, over the plans' knobs
tools.py        stages that run other programs: pytest, compute-sanitizer, ncu
training.py     stages of whole training steps, from logits and from hidden states
simple_kl.py    the yardstick: KL alone, in the form that was fastest
pack.py         make gpu-pack, on a machine without a GPU; fake_gpu.py, cuda_stub.c: Triton's compiler and
                launcher without one
report.py       a result as tables; the goals; what `auto` should take
"""
