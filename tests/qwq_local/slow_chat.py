"""`qwq chat` with a model that thinks slowly enough to be interrupted, as a program."""

from qwq_local.chat import run_chat
from qwq_local.sampling import Sampling
from tests.qwq_local.server.running import fake_qwq
from tests.qwq_local.server.slow_page import Scripted

if __name__ == "__main__":
    run_chat(fake_qwq(engine=Scripted()), system=None, sampling=Sampling(), seed=1, folded=False)
