"""The tasks: what a training example is made of, and how an estimate is scored."""

from bgray.tasks.deartifact import Deartifact
from bgray.tasks.pianoroll import Pianoroll
from bgray.tasks.separation import Separation
from bgray.tasks.unshift import Unshift

TASKS = {
    "unshift": Unshift,
    "deartifact": Deartifact,
    "separation": Separation,
    "pianoroll": Pianoroll,
}
