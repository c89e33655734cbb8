"""What the command line's exit codes mean. Part of the contract: scripts rely on them."""

DONE = 0
BROKEN = 1  # verify and replay: something is not as it should be
BAD_INPUT = 2
NO_CAPACITY = 3
FAILED = 4
INTERRUPTED = 130
READER_GONE = 141  # what a shell says of a program that SIGPIPE ended
