"""The tasks: what a training example is made of, and how an estimate is scored."""

from bgray.tasks.unshift import Unshift

TASKS = {
    "unshift": Unshift,
}
