"""The chain of `mainspring pipeline`: what a step runs, in which processes, what it left, what was promoted."""
