"""Programs of jaxbn and of Flax, compiled for TPUs and GPUs on a machine that has neither.

    make compiled            # everything; SMALL=1 for what `.ci/run` checks

XLA's compilers run without the hardware. What they produce is the program that would run: the bytes that it moves, the
collectives that it sends, the memory that it takes. Those are facts about a target; times are not among them.

How it is built, from the ground up:

* `targets`: the cards, and the environment variables and packages of their compilers.
* `cases`: what is measured, as data; all of it, and the small part.
* `counting`: what is read off an optimized program.
* `programs`: a case's training step, the shapes and meshes that it is compiled for, and its record.
* `measure`: the file of records, and which of them are still valid.
* `bars`, `report`: what was promised with the verdicts, and the tables.
* `command`, `__main__`: the command line.
"""
