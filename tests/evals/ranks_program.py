"""What test_cli.py starts on two ranks: a job that fails on one of them, and then ``maestri eval`` as it is called."""

import sys

import torch.distributed as dist

from maestri.engine.errors import RunError
from maestri.evals import cli
from maestri.evals.sharing import shared_out


def square(number: int) -> int:
    if number == 5:
        raise ValueError("five is too large")
    return number**2


def main() -> int:
    dist.init_process_group("gloo")
    assert shared_out([1, 2, 3], square) == [1, 4, 9]
    assert shared_out([], square) == []
    try:
        shared_out([2, 5, 3, 4], square)
    except RunError as error:
        assert str(error) == "five is too large (rank 1)"
        print("both ranks heard of it", flush=True)
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
