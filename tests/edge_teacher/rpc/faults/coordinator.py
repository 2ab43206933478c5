"""A coordinator of its own process, which can be killed and goes on where it was.

python -m tests.edge_teacher.rpc.faults.coordinator PORT FOLDER COUNT: asks COUNT questions, and keeps each
answer in FOLDER; what is there is not asked again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_teacher.files import write_atomically
from edge_teacher.rpc.address import BrokerAddress
from edge_teacher.rpc.invoke import Caller
from edge_teacher.rpc.pair import connect_pair
from tests.edge_teacher.rpc.wire import DEVICE, Ask, Said

BYTES = 1_500_000


def main() -> None:
    port, folder, count = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    pair = connect_pair(BrokerAddress(host="127.0.0.1", port=port), "ada")
    caller = Caller(pair.control, "ada", bulk=pair.bulk, retry_s=0.5, tick_s=0.05)
    due = [i for i in range(count) if not (folder / str(i)).exists()]
    bodies = (Ask(text=str(i), bytes_back=BYTES) for i in due)
    for number, future in caller.answers(DEVICE, "echo", bodies, outstanding=4):
        _, tensors = caller.decode(future.result(), Said)
        write_atomically(folder / str(due[number]), tensors["noise"].tobytes())
    caller.close()
    pair.close()


if __name__ == "__main__":
    main()
