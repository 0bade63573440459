"""What holds for all tests."""

import signal

# A shell that starts the tests in the background has Ctrl-C ignored, for their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
