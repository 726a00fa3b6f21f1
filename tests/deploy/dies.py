"""A trial that ends as the loader of a faulty package does: by a signal that nothing catches."""

import os
import resource
import signal

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.kill(os.getpid(), signal.SIGSEGV)
