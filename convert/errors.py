"""The errors that a user can cause, as one tree.

QwqError                 exit code 1: the base of all, caught once in the program's main
├── CheckpointError      a checkpoint folder that is incomplete, damaged or of another architecture
├── GgufError            a file that is no GGUF, is cut, or contradicts itself
├── OutputExistsError    the output is there already and --force was not given
├── OutputBusyError      another process is making the same output
├── StaleOutputError     unfinished work of something else is where the output's own would be
├── DiskFullError        the disk has, or had, too little room for the output
├── NumericalError       arithmetic that cannot go on: NaN, Inf, a matrix that stays indefinite
├── ContextError         a conversation is longer than the context that the model was opened with
├── EngineError          the process that runs a model has died; the next request starts another
├── UsageError           exit code 2: a request that cannot be meant as it was given
└── RegressionError      exit code 3: a quality gate found a model worse than its baseline

A message reads `<file or tensor>: <what is wrong, with both numbers>; <what to do>`.
"""


class QwqError(Exception):
    exit_code = 1


class CheckpointError(QwqError):
    pass


class GgufError(QwqError):
    pass


class OutputExistsError(QwqError):
    pass


class OutputBusyError(QwqError):
    pass


class StaleOutputError(QwqError):
    pass


class DiskFullError(QwqError):
    pass


class NumericalError(QwqError):
    pass


class ContextError(QwqError):
    pass


class EngineError(QwqError):
    pass


class UsageError(QwqError):
    exit_code = 2


class RegressionError(QwqError):
    exit_code = 3
